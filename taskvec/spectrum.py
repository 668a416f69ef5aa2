"""Spectra: singular values and vectors, ranks, and the subspaces that two matrices share.

Pure functions of tensors; everything is computed in float64. A is (m, n) throughout. A matrix may
be in memory, given by its low-rank factors, or on disk and read in blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

# Q (n, b) -> A Q (m, b) and A^T A Q (n, b). Lets a matrix stay on disk and be read in blocks.
GramStep = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# Rows of a matrix, block by block from its first row on: (first row, (b, n) float64).
Blocks = Callable[[], Iterator[tuple[int, torch.Tensor]]]

# Up to here LAPACK gives the whole spectrum in well under a second.
DENSE_SIDE, DENSE_ELEMENTS = 512, 1 << 24

_OVERSAMPLING, _KRYLOV_STEPS = 8, 8
_CONVERGED = 1e-2


@dataclass(frozen=True)
class Spectrum:
    """The leading singular triplets of A, and how all of its singular values are distributed.

    Attributes:
        left: (m, k) orthonormal columns u_1 ... u_k.
        values: (k,) sigma_1 >= ... >= sigma_k.
        right: (n, k) orthonormal columns v_1 ... v_k.
        errors: (k,) a singular value of A lies within errors[i] of values[i]; zeros from LAPACK.
        nodes: (p,) values in descending order that stand for all singular values:
        weights: (p,) nodes[i] stands for weights[i] of them. Exact: ones.
        exact: whether nodes are all the singular values, or a quadrature of their distribution.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    errors: torch.Tensor
    nodes: torch.Tensor
    weights: torch.Tensor
    exact: bool

    @property
    def transposed(self) -> Spectrum:
        """The spectrum of A^T."""
        return replace(self, left=self.right, right=self.left)

    @property
    def largest(self) -> float:
        """sigma_1 = ‖A‖_2; 0 for an empty matrix."""
        return float(self.values[0]) if self.values.numel() else 0.0

    @property
    def squared_norm(self) -> float:
        """Sum of all sigma^2, which is ‖A‖_F^2."""
        return float((self.weights * self.nodes**2).sum())

    @property
    def effective_rank(self) -> float:
        return effective_rank(self.nodes, self.weights)

    @property
    def stable_rank(self) -> float:
        return stable_rank(self.squared_norm, self.largest)

    def rank_above(self, threshold: float) -> int:
        """How many singular values stand above a threshold."""
        return round(float(self.weights[self.nodes > threshold].sum()))

    def tail_norm(self, rank: int) -> float:
        """Square root of the sum of sigma^2 beyond the first ``rank``: the error of the best
        approximation of that rank in the Frobenius norm (Eckart and Young, 1936)."""
        return math.sqrt(float((self.weights[rank:] * self.nodes[rank:] ** 2).sum()))

    def value_at(self, index: int) -> float:
        """sigma_index, counted from 1, read off the distribution; linear between its nodes."""
        places = self.weights.cumsum(0) - self.weights / 2 + 0.5
        after = int(torch.searchsorted(places, float(index)))
        if after == 0 or after == places.numel():
            return float(self.nodes[min(after, places.numel() - 1)])
        before, gap = after - 1, float(places[after] - places[after - 1])
        step = (index - float(places[before])) / gap if gap else 1.0
        return float(self.nodes[before] + step * (self.nodes[after] - self.nodes[before]))


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values of A in descending order, float64, by LAPACK; (min(m, n),)."""
    values: torch.Tensor = torch.linalg.svdvals(matrix.double())
    return values


def spectrum(matrix: torch.Tensor, leading: int) -> Spectrum:
    """The spectrum of a matrix in memory: `dense_spectrum` for a small one, else Krylov.

    Args:
        matrix: (m, n), any float dtype.
        leading: k, how many singular triplets are wanted.
    """
    matrix = matrix.double()
    small = min(matrix.shape) <= DENSE_SIDE and matrix.numel() <= DENSE_ELEMENTS
    if small or 4 * leading >= min(matrix.shape):
        return dense_spectrum(matrix, leading)
    if matrix.shape[0] >= matrix.shape[1]:
        return krylov_spectrum(gram_step(matrix), matrix.shape[1], leading, matrix.device)
    return krylov_spectrum(gram_step(matrix.T), matrix.shape[0], leading, matrix.device).transposed


def streamed_spectrum(blocks: Blocks, shape: tuple[int, int], leading: int) -> Spectrum:
    """`spectrum` of a matrix on disk, which is read whole only up to 2^24 elements (128 MiB)."""
    if shape[0] * shape[1] <= DENSE_ELEMENTS:
        return spectrum(torch.cat([rows for _, rows in blocks()]), leading)
    return streamed_krylov(blocks, shape, leading)


def streamed_krylov(blocks: Blocks, shape: tuple[int, int], leading: int) -> Spectrum:
    """`krylov_spectrum` of a matrix on disk, which is read again for every product."""
    device = next(blocks())[1].device
    if shape[0] >= shape[1]:
        return krylov_spectrum(_streamed_step(blocks), shape[1], leading, device)
    step = _streamed_transposed_step(blocks)
    return krylov_spectrum(step, shape[0], leading, device).transposed


def _streamed_step(blocks: Blocks) -> GramStep:
    """`GramStep` of A in one pass over its rows."""

    def step(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, gram = [], torch.zeros_like(block)
        for _, rows in blocks():
            images.append(rows @ block)
            gram += rows.T @ images[-1]
        return torch.cat(images), gram

    return step


def _streamed_transposed_step(blocks: Blocks) -> GramStep:
    """`GramStep` of A^T in two passes over the rows of A."""

    def step(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image: torch.Tensor | float = 0.0
        for start, rows in blocks():
            image = image + rows.T @ block[start : start + rows.shape[0]]
        image = torch.as_tensor(image)
        return image, torch.cat([rows @ image for _, rows in blocks()])

    return step


def gram_step(matrix: torch.Tensor) -> GramStep:
    """`GramStep` of a float64 matrix in memory."""

    def step(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = matrix @ block
        return image, matrix.T @ image

    return step


def dense_spectrum(matrix: torch.Tensor, leading: int) -> Spectrum:
    """All singular values by LAPACK (gesdd), O(m n min(m, n)). Arguments as `spectrum`."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    k = min(leading, values.numel())
    return Spectrum(
        left=left[:, :k].contiguous(),
        values=values[:k],
        right=right[:k].T.contiguous(),
        errors=torch.zeros_like(values[:k]),
        nodes=values,
        weights=torch.ones_like(values),
        exact=True,
    )


def low_rank_spectrum(B: torch.Tensor, A: torch.Tensor, scaling: float = 1.0) -> Spectrum:
    """The spectrum of s * B @ A from its factors, without forming the product.

    QR of B and of A^T, then the SVD of the r x r core s * R_B @ R_A^T: O((m + n) r^2).

    Args:
        B: (m, r), A: (r, n), any float dtype.
        scaling: s; its sign goes into the vectors.

    Returns:
        all min(m, n, r) singular values that can differ from zero.
    """
    basis_left, core_left = torch.linalg.qr(B.double())
    basis_right, core_right = torch.linalg.qr(A.double().T)
    core = dense_spectrum(core_left @ core_right.T * scaling, min(*B.shape, *A.shape))
    return Spectrum(
        left=basis_left @ core.left,
        values=core.values,
        right=basis_right @ core.right,
        errors=core.errors,
        nodes=core.nodes,
        weights=core.weights,
        exact=True,
    )


def krylov_spectrum(
    step: GramStep, columns: int, leading: int, device: torch.device | str = "cpu"
) -> Spectrum:
    """Leading triplets and the distribution of the rest, from a few products with A.

    A block of k + 8 random vectors Q_0 is carried through A^T A a few times; Rayleigh-Ritz on all
    the blocks together gives the triplets (block Krylov: Musco and Musco, arXiv 1504.05477,
    algorithm 2) and, weighted by each Ritz vector's share of Q_0, a quadrature of the spectral
    distribution (stochastic Lanczos: Golub and Meurant, Matrices, Moments and Quadrature, ch. 11;
    Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017)). What has converged counts as one
    singular value each. The random vectors are the same in every run.

    Args:
        step: the products, of a matrix that has no more columns than rows.
        columns: n.
        leading: k.
        device: where ``step`` wants its blocks.

    Returns:
        values approached from below, with a bound on each one's error in ``errors``; the effective
        rank comes out within about 3 % of the exact one.
    """
    width = min(leading + _OVERSAMPLING, columns)
    steps = max(1, min(_KRYLOV_STEPS, columns // width - 1))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, width, generator=generator, dtype=torch.float64).to(device)
    block = torch.linalg.qr(start).Q
    blocks, images, grams = [block], [], []
    for number in range(steps + 1):
        image, gram = step(block)
        images.append(image)
        grams.append(gram)
        if number < steps and (number + 2) * width <= columns:
            block = _orthonormal(gram, torch.cat(blocks, 1))
            blocks.append(block)
    return _rayleigh_ritz(
        torch.cat(blocks, 1), torch.cat(images, 1), torch.cat(grams, 1), width, leading
    )


def _orthonormal(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns for a block, orthogonal to a basis; three times, against cancellation.

    Columns that have nothing new to offer, as when the matrix is of low rank, are rounding errors
    after the first time: directions like any other, which the next two set upright.
    """
    for _ in range(3):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def _rayleigh_ritz(
    basis: torch.Tensor, image: torch.Tensor, gram: torch.Tensor, width: int, leading: int
) -> Spectrum:
    """Triplets of A within a basis Q (n, p), from A Q (m, p) and A^T A Q (n, p)."""
    columns = basis.shape[0]
    image_basis, core = torch.linalg.qr(image)
    core_left, values, rotation = torch.linalg.svd(core, full_matrices=False)
    rotation = rotation.T
    right = basis @ rotation
    scale = torch.where(values > 0, values, 1.0)
    residual = gram @ rotation / scale - right * values  # A^T u - sigma v, since u = A v / sigma
    errors = torch.where(values > 0, torch.linalg.vector_norm(residual, dim=0), 0.0)
    converged = errors <= _CONVERGED * values
    shares = (rotation[:width] ** 2).sum(0)
    shares = torch.where(converged, 0.0, shares)
    left_over = columns - int(converged.sum())
    total = shares.sum()
    weights = torch.where(converged, 1.0, shares * (left_over / total if total > 0 else 0.0))
    return Spectrum(
        left=(image_basis @ core_left[:, :leading]).contiguous(),
        values=values[:leading],
        right=right[:, :leading].contiguous(),
        errors=errors[:leading],
        nodes=values,
        weights=weights,
        exact=False,
    )


def spectral_norm(blocks: Blocks, shape: tuple[int, int]) -> float:
    """‖A‖_2; of a large matrix from below, within a fraction of a percent even for pure noise."""
    if min(shape) <= DENSE_SIDE and shape[0] * shape[1] <= DENSE_ELEMENTS:
        return float(singular_values(torch.cat([rows for _, rows in blocks()]))[0])
    return streamed_spectrum(blocks, shape, 8).largest


def effective_rank(values: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    """exp(-sum p ln p) with p = sigma / sum sigma; 0 for a zero matrix.

    Roy and Vetterli, The effective rank, EUSIPCO 2007, section 3.

    Args:
        values: (k,) singular values.
        weights: (k,) how often each one counts; once if None.
    """
    weights = torch.ones_like(values) if weights is None else weights
    total = (weights * values).sum()
    if not total > 0:
        return 0.0
    p = values / total
    return math.exp(-float((weights * torch.special.xlogy(p, p)).sum()))


def stable_rank(squared_norm: float, largest: float) -> float:
    """‖A‖_F^2 / ‖A‖_2^2, at most the rank; 0 for a zero matrix. Vershynin, arXiv 1011.3027."""
    return squared_norm / largest**2 if largest > 0 else 0.0


def subspace_similarity(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """phi(i, j) = ‖U_i^T V_j‖_F^2 / min(i, j) for the spans of the first i and j columns.

    1: the smaller span lies within the larger one; random spans of R^d give max(i, j) / d on
    average. Hu et al., arXiv 2106.09685, section 7.2.

    Args:
        left: (d, p), right: (d, q), orthonormal columns.

    Returns:
        (p, q) float64, phi(i, j) in row i - 1 and column j - 1.
    """
    overlap = (left.double().T @ right.double()) ** 2
    sums = overlap.cumsum(0).cumsum(1)
    i = torch.arange(1, sums.shape[0] + 1, device=sums.device, dtype=torch.float64)
    j = torch.arange(1, sums.shape[1] + 1, device=sums.device, dtype=torch.float64)
    return sums / torch.minimum(i[:, None], j[None, :])


def principal_angles(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The angles between the spans of two sets of orthonormal columns, ascending, in radians.

    From cosines where angles are large and from sines where they are small, so that an angle of
    1e-12 is not lost (Bjoerck and Golub, Math. Comp. 27 (1973); Knyazev and Argentati, SIAM J. Sci.
    Comput. 23 (2002), algorithm 3.1).

    Args:
        left: (d, p), right: (d, q).

    Returns:
        (min(p, q),) float64.
    """
    if left.shape[1] < right.shape[1]:
        left, right = right, left
    left, right = left.double(), right.double()
    overlap = left.T @ right
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(right - left @ overlap).flip(0).clamp(max=1.0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def amplification_factor(
    delta_norm: float, left: torch.Tensor, right: torch.Tensor, weight: Blocks
) -> float | None:
    """‖delta‖_F / ‖U_r^T W V_r‖_F: how much delta amplifies directions that W hardly uses.

    Hu et al., arXiv 2106.09685, section 7.3.

    Args:
        delta_norm: ‖delta‖_F.
        left: (m, r), right: (n, r), delta's leading singular vectors.
        weight: W (m, n).

    Returns:
        None where W has nothing in those directions.
    """
    core = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for start, rows in weight():
        core += left[start : start + rows.shape[0]].T @ (rows @ right)
    projected = float(torch.linalg.vector_norm(core))
    return delta_norm / projected if projected > 0 else None
