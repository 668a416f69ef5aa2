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
# Up to 5 for each triplet and each rank, and up to 160 in any case, the eigenvectors of the smaller
# Gram matrix are the guess: they take less than the rounds without them. In float32 from _SINGLE
# on, where that saves more than the rounds that it costs.
_GRAM, _SMALL, _SINGLE = 5, 160, 320
_HEAD, _UPDATE = 14, 64  # of the start: coordinates beyond those wanted, directions of the update
_WIDTH, _ROUNDS = 10, 40  # columns for each triplet before a restart; rounds before LAPACK
_NEAR = 1e-3  # of sigma^2: a value as near as that is taken to be so far
_CHECKED, _GAP = 4, 1e-9  # gaps among the last triplets that the count is made in; of sigma_1


@dataclass(frozen=True)
class Bracket:
    """M = diag(S) + P Q^T, (m, n), where the diagonal may be shorter than a side.

    Attributes:
        diagonal: S (p,), descending, not negative; p <= min(m, n).
        near: P (m, r), and far: Q (n, r).
    """

    diagonal: torch.Tensor
    near: torch.Tensor
    far: torch.Tensor

    @property
    def T(self) -> Bracket:
        return Bracket(self.diagonal, self.far, self.near)

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


@dataclass(frozen=True)
class _Guess:
    """What M^T M is nearly: V diag(squares) V^T.

    Attributes:
        start: (n, b) orthonormal columns that its leading eigenvectors are nearly spanned by.
        squares: (n, 1).
        vectors: V (n, n) in any precision; None where it is the identity.
    """

    start: torch.Tensor
    squares: torch.Tensor
    vectors: torch.Tensor | None = None

    def number_above(self, value: float, largest: float) -> int | None:
        """How many singular values can be ``value`` or more; None where the guess cannot tell.

        Eigenvalues of the whole are wrong by at most n epsilons of the largest.
        """
        if self.vectors is None:
            return None
        error = len(self.squares) * torch.finfo(self.vectors.dtype).eps * largest**2
        return int((self.squares >= value**2 - error).sum())

    def corrections(self, residuals: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(1 - V diag(squares) V^T / sigma^2)^-1 times residuals (n, b) of length 1.

        Args:
            residuals: none of them zero.
            values: sigma (b,).
        """
        turned = residuals / torch.linalg.vector_norm(residuals, dim=0)
        distance = 1.0 - self.squares / (values**2).clamp(min=torch.finfo(values.dtype).tiny)
        distance = torch.where(distance.abs() < _NEAR, _NEAR, distance)
        if self.vectors is not None:
            turned = self.vectors.T @ turned.to(self.vectors.dtype)
        step: torch.Tensor = turned / distance
        if self.vectors is not None:
            step = (self.vectors @ step.to(self.vectors.dtype)).double()
        return step


def bracket_triplets(matrix: Bracket, count: int) -> Triplets:
    """The first ``count`` singular triplets, as LAPACK would give them.

    The best triplets with right vectors in a trial space (Rayleigh-Ritz) are improved by what a
    guess at M^T M makes of their residuals, (sigma^2 - guess)^-1 (M^T u - sigma v), which joins the
    space (Davidson, J. Comput. Phys. 17 (1975) 87), until each has ‖M^T u - sigma v‖ <= 2e-14
    sigma_1, as in `leading.leading_triplets`. The guess is S^2, and where the matrix is small, or
    the rank not, the Gram matrix in few digits.

    That no triplet was passed over is then counted, by the guess or else by `_number_above`, up to
    the widest gap among the last few: whoever needs k certain ones asks for four more. A very small
    matrix, one that does not converge and one whose count is wrong is left to LAPACK. The same
    input gives the same bits.

    Args:
        count: at most min(m, n).
    """
    m, n = matrix.shape
    if m < n:
        found = bracket_triplets(matrix.T, count)
        return Triplets(found.right, found.values, found.left)
    if n <= _WHOLE * count:
        return _whole(matrix, count)
    if n <= max(_GRAM * (count + matrix.near.shape[1]), _SMALL):
        guess = _gram_guess(matrix, count)
    else:
        matrix = _strongest_first(matrix)
        guess = _diagonal_guess(matrix, count)
    result = _rounds(matrix, guess, count)
    if result is None or not _none_is_missing(matrix, guess, result.values):
        return _whole(matrix, count)
    return result


def _strongest_first(matrix: Bracket) -> Bracket:
    """The same with the SVD of P Q^T in place of P and Q, half of each value in both.

    What their product does not need to float64's last bit is left out: a factor of zeros, columns
    that repeat each other, a rank larger than the matrix.
    """
    near_basis, near_core = torch.linalg.qr(matrix.near)
    far_basis, far_core = torch.linalg.qr(matrix.far)
    left, values, right = torch.linalg.svd(near_core @ far_core.T, full_matrices=False)
    rank = int((values > torch.finfo(values.dtype).eps * values[:1]).sum())
    root = values[:rank].sqrt()
    near, far = near_basis @ (left[:, :rank] * root), far_basis @ (right[:rank].T * root)
    return Bracket(matrix.diagonal, near, far)


def _gram_guess(matrix: Bracket, count: int) -> _Guess:
    whole = matrix.whole()
    size = whole.abs().max().clamp(min=torch.finfo(whole.dtype).tiny)
    scaled = whole / size
    if len(matrix.far) >= _SINGLE:
        scaled = scaled.float()
    squares, vectors = torch.linalg.eigh(scaled.T @ scaled)
    start = torch.linalg.qr(vectors[:, -count:].double()).Q
    return _Guess(start, squares.double()[:, None] * size**2, vectors)


def _diagonal_guess(matrix: Bracket, count: int) -> _Guess:
    """The first coordinates, and the strongest directions of the update outside them.

    Args:
        matrix: from `_strongest_first`.
    """
    p, n = len(matrix.diagonal), len(matrix.far)
    squares = torch.zeros(n, 1, dtype=torch.float64, device=matrix.far.device)
    squares[:p, 0] = matrix.diagonal**2
    head = count + _HEAD
    images = squares[:p].sqrt() * matrix.near[:p]
    update = torch.cat([matrix.far[:p], images], 1)
    columns = min(head + min(update.shape[1], _UPDATE), n // 2)
    start = torch.zeros(n, columns, dtype=torch.float64, device=squares.device)
    start.diagonal()[:head] = 1.0
    start[head:, head:] = torch.linalg.qr(update[head:, : columns - head]).Q
    return _Guess(start, squares)


def _rounds(matrix: Bracket, guess: _Guess, count: int) -> Triplets | None:
    """The triplets when all residuals are small enough; None where they do not become so."""
    basis, exact, last = guess.start, False, float("inf")
    images = matrix.apply(basis)
    for _ in range(_ROUNDS):
        left, values, turn = _best(images, count, exact=exact)
        right = basis @ turn[:, :count]
        residuals = matrix.adjoint(left) - right * values
        sizes = torch.linalg.vector_norm(residuals, dim=0)
        far = sizes > RESIDUAL * values[0]
        if not bool(far.any()):
            return Triplets(left, values, right)
        worst = float(sizes.max())
        if not exact and worst > 0.5 * last:
            exact = True  # the same space again, to the last digit
            continue
        last = worst
        if basis.shape[1] + count > min(_WIDTH * count, len(basis)):
            basis, images = basis @ turn[:, : 2 * count], images @ turn[:, : 2 * count]
        step = guess.corrections(residuals[:, far], values[far])
        if basis.shape[1] + step.shape[1] > len(basis):
            return None
        step = new_directions(step, basis)
        basis = torch.cat([basis, step], 1)
        images = torch.cat([images, matrix.apply(step)], 1)
    return None


def _best(
    images: torch.Tensor, count: int, *, exact: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rayleigh-Ritz in a space by its images (m, b): u (m, count), sigma (count,), and a rotation.

    Args:
        exact: by an SVD; else by the eigenvectors of the squares, in half the time and half the
            digits where sigma_1 is much larger than the others.

    Returns:
        ..., the combinations (b, b) of the space's basis, the best first.
    """
    if exact:
        basis, core = torch.linalg.qr(images)
        left, values, turn = torch.linalg.svd(core)
        return basis @ left[:, :count], values[:count], turn.T
    turn = torch.linalg.eigh(images.T @ images).eigenvectors.flip(1)
    best = images @ turn[:, :count]
    values = torch.linalg.vector_norm(best, dim=0)
    return best / torch.where(values > 0, values, 1.0), values, turn


def _none_is_missing(matrix: Bracket, guess: _Guess, values: torch.Tensor) -> bool:
    """Whether M has as many singular values above a gap among the last few as were found.

    Where the last are all equal there is nothing to count between; whoever needs the end of such a
    group asks for more.
    """
    listed: list[float] = values.tolist()
    first = max(1, len(listed) - _CHECKED)
    gaps = [(listed[i - 1] - listed[i], i) for i in range(first, len(listed))]
    widest, found = max(gaps, default=(0.0, 0))
    if widest <= _GAP * listed[0]:
        return True
    above, below = listed[found - 1], listed[found]
    return guess.number_above(above, listed[0]) == found or (
        _number_above(matrix, below, above) == found
    )


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
    near, far = _balanced(matrix.near, matrix.far)
    Z = torch.cat([torch.zeros_like(far), far], 1)
    Z[:p, :rank] = matrix.diagonal[:, None] * near[:p]
    core = -Z.T @ (Z / shifted[:, None])
    core[:rank, :rank] += near.T @ near
    core[:rank, rank:].diagonal().sub_(1.0)
    core[rank:, :rank].diagonal().sub_(1.0)
    return int((shifted > 0).sum()) + int((torch.linalg.eigvalsh(core) > 0).sum()) - rank


def _balanced(near: torch.Tensor, far: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P and Q with the same product and the same norm."""
    sizes = torch.linalg.vector_norm(near), torch.linalg.vector_norm(far)
    if not bool(sizes[0] * sizes[1] > 0):
        return near * 0.0, far * 0.0
    factor = torch.sqrt(sizes[1] / sizes[0])
    return near * factor, far / factor


def _whole(matrix: Bracket, count: int) -> Triplets:
    left, values, right = torch.linalg.svd(matrix.whole(), full_matrices=False)
    return Triplets(left[:, :count], values[:count], right[:count].T)
