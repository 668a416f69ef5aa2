"""The leading singular triplets of any matrix.

Block Krylov with Rayleigh-Ritz and restarts, carried on until the residuals are at rounding level,
so that the answer can stand in for a dense SVD. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# ‖A^T u - sigma v‖ at most this many sigma_1: LAPACK's own backward error is of that size.
RESIDUAL = 2e-14
_EXTRA = 8  # columns of a block beyond those wanted
_STEPS, _RESTARTS = 8, 12
# LAPACK on the whole takes a fraction of a second up to here, and no longer than a basis that is
# nearly as large as the matrix.
DENSE_SIDE = 512


@dataclass(frozen=True)
class Triplets:
    """left (m, k) and right (n, k) orthonormal columns; values (k,) in descending order."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def leading_triplets(matrix: torch.Tensor, count: int, suspected: torch.Tensor) -> Triplets:
    """The first ``count`` singular triplets, as LAPACK would give them.

    From a block that is carried through A^T A a few times (Musco and Musco, arXiv 1504.05477,
    algorithm 2) the best triplets are taken (Rayleigh-Ritz) and start the next round, until each
    has ‖A^T u - sigma v‖ <= 2e-14 sigma_1 (A v = sigma u holds by construction): vectors whose
    singular values are a gap apart are then exact to 2e-14 sigma_1 / gap. A small matrix, and one
    that does not converge, is left to LAPACK. The same input gives the same bits.

    Args:
        matrix: A (m, n) float64.
        count: k, at most min(m, n).
        suspected: (n, p) orthonormal columns, p a good part of min(m, n): what its right singular
            vectors may be, in order. They are where the search begins.
    """
    width = count + _EXTRA
    if min(matrix.shape) <= max(DENSE_SIDE, width * _STEPS):
        return _dense(matrix, count)
    generator = torch.Generator().manual_seed(0)
    block = _shaken(suspected[:, :width], generator)
    for _ in range(_RESTARTS):
        found, residuals, block = _round(matrix, block, count)
        if bool((residuals <= RESIDUAL * found.values[0]).all()):
            return found
    return _dense(matrix, count)


def _shaken(start: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An orthonormal start that misses no direction for certain, where the guess might."""
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start.device)
    basis: torch.Tensor = torch.linalg.qr(start + noise * (0.1 / start.shape[0] ** 0.5)).Q
    return basis


def _round(
    matrix: torch.Tensor, block: torch.Tensor, count: int
) -> tuple[Triplets, torch.Tensor, torch.Tensor]:
    """One cycle: the triplets, the norms of A^T u - sigma v, and the block to go on with."""
    width = block.shape[1]
    basis, images = block, matrix @ block
    grams = matrix.T @ images
    for _ in range(_STEPS - 1):
        block = new_directions(grams[:, -width:], basis)
        basis = torch.cat([basis, block], 1)
        image = matrix @ block
        images = torch.cat([images, image], 1)
        grams = torch.cat([grams, matrix.T @ image], 1)
    image_basis, core = torch.linalg.qr(images)
    left, values, rotation = torch.linalg.svd(core)
    turned = rotation.T[:, :width]
    right = basis @ turned
    scale = torch.where(values > 0, values, 1.0)[:width]
    residual = grams @ turned / scale - right * values[:width]
    found = Triplets(image_basis @ left[:, :count], values[:count], right[:, :count])
    return found, torch.linalg.vector_norm(residual[:, :count], dim=0), right


def new_directions(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns, orthogonal to a basis; twice, against cancellation."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def _dense(matrix: torch.Tensor, count: int) -> Triplets:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Triplets(left[:, :count], values[:count], right[:count].T)
