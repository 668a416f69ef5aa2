"""The leading singular triplets of a matrix that can be multiplied but need not be formed.

Block Krylov with Rayleigh-Ritz and restarts, carried on until the residuals are at rounding level,
so that the answer can stand in for a dense SVD. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Product = Callable[[torch.Tensor], torch.Tensor]

# ‖A^T u - sigma v‖ at most this many sigma_1: LAPACK's own backward error is of that size.
RESIDUAL = 2e-14
_EXTRA = 8  # columns of a block beyond those wanted
_STEPS, _RESTARTS = 8, 12
# LAPACK on the whole takes a fraction of a second up to here, and no longer than a basis that is
# nearly as large as the matrix.
DENSE_SIDE = 512


@dataclass(frozen=True)
class Operator:
    """A matrix A (m, n) by its products.

    Attributes:
        apply: X (n, b) -> A X (m, b), float64.
        adjoint: Y (m, b) -> A^T Y (n, b), float64.
        start: b -> (n, b) orthonormal columns: where its leading right singular vectors are
            suspected; b is at most a fraction of min(m, n).
        device: where its factors are.
    """

    shape: tuple[int, int]
    apply: Product
    adjoint: Product
    start: Callable[[int], torch.Tensor]
    device: torch.device


@dataclass(frozen=True)
class Triplets:
    """left (m, k) and right (n, k) orthonormal columns; values (k,) in descending order."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def matrix_operator(matrix: torch.Tensor, suspected: torch.Tensor) -> Operator:
    """`Operator` of a float64 matrix in memory; suspected: right singular vectors, in order."""
    return Operator(
        (matrix.shape[0], matrix.shape[1]),
        lambda x: matrix @ x,
        lambda y: matrix.T @ y,
        lambda columns: suspected[:, :columns],
        matrix.device,
    )


def leading_triplets(operator: Operator, count: int) -> Triplets:
    """The first ``count`` singular triplets, as LAPACK would give them.

    From a block that is carried through A^T A a few times (Musco and Musco, arXiv 1504.05477,
    algorithm 2) the best triplets are taken (Rayleigh-Ritz) and start the next round, until each
    has ‖A^T u - sigma v‖ <= 2e-14 sigma_1 (A v = sigma u holds by construction): vectors whose
    singular values are a gap apart are then exact to 2e-14 sigma_1 / gap. A small matrix, and one
    that does not converge, is left to LAPACK. The same input gives the same bits.

    Args:
        operator: A (m, n).
        count: k, at most min(m, n).
    """
    width = count + _EXTRA
    if min(operator.shape) <= max(DENSE_SIDE, width * _STEPS):
        return _dense(operator, count)
    generator = torch.Generator().manual_seed(0)
    block = _shaken(operator.start(width), generator)
    for _ in range(_RESTARTS):
        found, residuals, block = _round(operator, block, count)
        if bool((residuals <= RESIDUAL * found.values[0]).all()):
            return found
    return _dense(operator, count)


def _shaken(start: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An orthonormal start that misses no direction for certain, where the guess might."""
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start.device)
    basis: torch.Tensor = torch.linalg.qr(start + noise * (0.1 / start.shape[0] ** 0.5)).Q
    return basis


def _round(
    operator: Operator, block: torch.Tensor, count: int
) -> tuple[Triplets, torch.Tensor, torch.Tensor]:
    """One cycle: the triplets, the norms of A^T u - sigma v, and the block to go on with."""
    width = block.shape[1]
    basis, images = block, operator.apply(block)
    grams = operator.adjoint(images)
    for _ in range(_STEPS - 1):
        block = _new_directions(grams[:, -width:], basis)
        basis = torch.cat([basis, block], 1)
        image = operator.apply(block)
        images = torch.cat([images, image], 1)
        grams = torch.cat([grams, operator.adjoint(image)], 1)
    image_basis, core = torch.linalg.qr(images)
    left, values, rotation = torch.linalg.svd(core)
    turned = rotation.T[:, :width]
    right = basis @ turned
    scale = torch.where(values > 0, values, 1.0)[:width]
    residual = grams @ turned / scale - right * values[:width]
    found = Triplets(image_basis @ left[:, :count], values[:count], right[:, :count])
    return found, torch.linalg.vector_norm(residual[:, :count], dim=0), right


def _new_directions(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns, orthogonal to a basis; three times, against cancellation."""
    for _ in range(3):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def _dense(operator: Operator, count: int) -> Triplets:
    identity = torch.eye(operator.shape[1], dtype=torch.float64, device=operator.device)
    left, values, right = torch.linalg.svd(operator.apply(identity), full_matrices=False)
    return Triplets(left[:, :count], values[:count], right[:count].T)
