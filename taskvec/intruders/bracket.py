"""The leading singular triplets of a diagonal matrix plus one of low rank.

That is what a tuned matrix is in its base's own coordinates, and the base's singular values say
where the rest of a vector must lie that is known in part (Davidson's method). Everything is
float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from taskvec.intruders.leading import RESIDUAL, Triplets, new_directions

# LAPACK's SVD of the whole up to this many rows or columns for each triplet wanted.
_WHOLE = 4
# Up to this many for each triplet and each rank, and in all, the eigenvectors of the smaller Gram
# matrix are the start: they take half of LAPACK's SVD, and less than the rounds without them.
_GRAM, _GRAM_SIDE = 8, 640
_HEAD, _UPDATE = 2, 64  # of the start: coordinates for each triplet, directions of the update
_WIDTH, _ROUNDS = 10, 40  # columns for each triplet before a restart; rounds before LAPACK
_NEAR = 1e-3  # of sigma^2: a coordinate whose own value is as near is no longer divided by less
_CHECKED, _GAP = 4, 1e-9  # gaps among the last triplets that the count is made in; of sigma_1


@dataclass(frozen=True)
class Bracket:
    """M = diag(S) + P Q^T, (m, n), where the diagonal may be shorter than both sides.

    Attributes:
        diagonal: S (p,), descending, not negative; p <= min(m, n).
        near: P (m, r), and far: Q (n, r): columns orthogonal to each other within both, of the
            same norms in both, largest first.
    """

    diagonal: torch.Tensor
    near: torch.Tensor
    far: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.near), len(self.far)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """M x. x: (n, b)."""
        return self._product(x, self.near, self.far)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """M^T y. y: (m, b)."""
        return self._product(y, self.far, self.near)

    def whole(self) -> torch.Tensor:
        """M itself."""
        matrix = self.near @ self.far.T
        matrix.diagonal()[: len(self.diagonal)] += self.diagonal
        return matrix

    def _product(self, x: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        p = len(self.diagonal)
        image = near @ (far.T @ x)
        image[:p] += self.diagonal[:, None] * x[:p]
        return image


def bracket(diagonal: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> Bracket:
    """`Bracket` of any factors, near (m, r) and far (n, r), by the SVD of their product.

    What their product does not need to float64's last bit is left out: a factor of zeros, columns
    that repeat each other, a rank larger than the matrix.
    """
    near_basis, near_core = torch.linalg.qr(near)
    far_basis, far_core = torch.linalg.qr(far)
    left, values, right = torch.linalg.svd(near_core @ far_core.T, full_matrices=False)
    rank = int((values > torch.finfo(values.dtype).eps * values[:1]).sum())
    root = values[:rank].sqrt()
    return Bracket(
        diagonal, near_basis @ (left[:, :rank] * root), far_basis @ (right[:rank].T * root)
    )


def bracket_triplets(matrix: Bracket, count: int) -> Triplets:
    """The first ``count`` singular triplets, as LAPACK would give them.

    The best triplets with right vectors in a trial space (Rayleigh-Ritz) are improved by what the
    diagonal makes of their residuals, (sigma^2 - S^2)^-1 (M^T u - sigma v), which joins the space
    (Davidson, J. Comput. Phys. 17 (1975) 87), until each has ‖M^T u - sigma v‖ <= 2e-14 sigma_1, as
    in `leading.leading_triplets`. That none was passed over is then counted (`_number_above`), up
    to the widest gap among the last few: whoever needs k certain ones asks for four more. A small
    matrix, one that does not converge and one whose count is wrong is left to LAPACK. The same
    input gives the same bits.

    Args:
        count: at most min(m, n).
    """
    side, rank = min(matrix.shape), matrix.near.shape[1]
    if side <= _WHOLE * count:
        return _whole(matrix, count)
    by_gram = side <= min(_GRAM * (count + rank), _GRAM_SIDE)
    basis = _gram_start(matrix, count) if by_gram else _start(matrix, count)
    found = _rounds(matrix, basis, count)
    if found is not None and (by_gram or _none_is_missing(matrix, found.values)):
        return found
    return _whole(matrix, count)


def _gram_start(matrix: Bracket, count: int) -> torch.Tensor:
    """Leading right singular vectors, to the accuracy that squaring the matrix leaves."""
    whole = matrix.whole()
    m, n = whole.shape
    if n <= m:
        return torch.linalg.eigh(whole.T @ whole).eigenvectors[:, -count:]
    left = torch.linalg.eigh(whole @ whole.T).eigenvectors[:, -count:]
    basis: torch.Tensor = torch.linalg.qr(whole.T @ left.flip(1)).Q
    return basis


def _start(matrix: Bracket, count: int) -> torch.Tensor:
    """The first coordinates, and the strongest directions of the update outside them."""
    head, n = _HEAD * count, matrix.shape[1]
    update = matrix.far[head:, :_UPDATE]
    columns = min(head + update.shape[1], n // 2)
    basis = torch.zeros(n, columns, dtype=torch.float64, device=update.device)
    basis.diagonal()[:head] = 1.0
    basis[head:, head:] = torch.linalg.qr(update[:, : columns - head]).Q
    return basis


def _rounds(matrix: Bracket, basis: torch.Tensor, count: int) -> Triplets | None:
    """The triplets when all residuals are small enough; None where they do not become so.

    Args:
        basis: (n, b) orthonormal columns, b >= count: the trial space to begin with.
    """
    p, n = len(matrix.diagonal), matrix.shape[1]
    squares = torch.zeros(n, 1, dtype=torch.float64, device=basis.device)
    squares[:p, 0] = matrix.diagonal**2
    images = matrix.apply(basis)
    for _ in range(_ROUNDS):
        image_basis, core = torch.linalg.qr(images)
        left, values, turn = torch.linalg.svd(core, full_matrices=False)
        found = Triplets(image_basis @ left[:, :count], values[:count], basis @ turn[:count].T)
        residuals = matrix.adjoint(found.left) - found.right * found.values
        open_ = torch.linalg.vector_norm(residuals, dim=0) > RESIDUAL * values[0]
        if not bool(open_.any()):
            return found
        if basis.shape[1] + count > min(_WIDTH * count, n):
            basis, images = basis @ turn[: 2 * count].T, images @ turn[: 2 * count].T
        step = _corrections(residuals[:, open_], found.values[open_] ** 2, squares)
        if basis.shape[1] + step.shape[1] > n:
            break
        step = new_directions(step, basis)
        basis = torch.cat([basis, step], 1)
        images = torch.cat([images, matrix.apply(step)], 1)
    return None


def _corrections(
    residuals: torch.Tensor, wanted: torch.Tensor, squares: torch.Tensor
) -> torch.Tensor:
    """(sigma^2 - S^2)^-1 times residuals (n, b); wanted: sigma^2 (b,), squares: S^2 (n, 1)."""
    distance = wanted - squares
    least = _NEAR * wanted
    return residuals / torch.where(distance.abs() < least, least, distance)


def _none_is_missing(matrix: Bracket, values: torch.Tensor) -> bool:
    """Whether M has as many singular values above a gap among the last few as were found.

    Where the last are all equal there is nothing to count between; whoever needs the end of such a
    group asks for more.
    """
    last = values[-_CHECKED - 1 :]
    gaps = -last.diff()
    widest = int(gaps.argmax()) if len(gaps) else 0
    if not len(gaps) or float(gaps[widest]) <= _GAP * float(values[0]):
        return True
    above, below = float(last[widest]), float(last[widest + 1])
    return _number_above(matrix, below, above) == len(values) - len(last) + widest + 1


def _number_above(matrix: Bracket, below: float, above: float) -> int:
    """How many singular values of M lie above a gap between two of them.

    By the law of inertia: with Z = [S P, Q], M^T M - mu = (S^2 - mu) + Z C Z^T has as many positive
    eigenvalues as S^2 - mu and -C^-1 - Z^T (S^2 - mu)^-1 Z together, less those of -C^-1, which are
    r (Haynsworth, Linear Algebra Appl. 1 (1968) 73).

    Args:
        below, above: sigma^2 = mu is taken between them, where no value of the diagonal is near.
    """
    p, rank = len(matrix.diagonal), matrix.near.shape[1]
    squares = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.far.device)
    squares[:p] = matrix.diagonal**2
    choices = below + (above - below) * torch.linspace(0.25, 0.75, 9, dtype=torch.float64)
    choices = choices.to(squares.device) ** 2
    mu = choices[(choices[:, None] - squares).abs().amin(1).argmax()]
    shifted = squares - mu
    Z = torch.cat([torch.zeros_like(matrix.far), matrix.far], 1)
    Z[:p, :rank] = matrix.diagonal[:, None] * matrix.near[:p]
    core = -Z.T @ (Z / shifted[:, None])
    core[:rank, :rank] += matrix.near.T @ matrix.near
    core[:rank, rank:].diagonal().sub_(1.0)
    core[rank:, :rank].diagonal().sub_(1.0)
    return int((shifted > 0).sum()) + int((torch.linalg.eigvalsh(core) > 0).sum()) - rank


def _whole(matrix: Bracket, count: int) -> Triplets:
    left, values, right = torch.linalg.svd(matrix.whole(), full_matrices=False)
    return Triplets(left[:, :count], values[:count], right[:count].T)
