"""The spectra of T and delta beside each other, for one parameter."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from taskvec.mathematics.floors import Floors
from taskvec.mathematics.pair import Pair
from taskvec.spectrum import (
    Spectrum,
    amplification_factor,
    principal_angles,
    spectral_norm,
    streamed_spectrum,
    subspace_similarity,
)

MOST_DIRECTIONS = 128  # of delta, whose subspaces are compared
_CURVE_POINTS = 40


@dataclass(frozen=True)
class SpectrumSummary:
    """What is kept of a spectrum.

    Attributes:
        values: the leading singular values.
        index, curve: all of them at some indices, counted from 1, for drawing.
        spectral_norm: sigma_1.
        numerical_rank: how many stand above the floor.
        effective_rank, stable_rank: see `taskvec.spectrum`.
        exact: computed by LAPACK; otherwise the leading ones by block Krylov, and effective rank
            and curve from a quadrature.
    """

    values: list[float]
    index: list[int]
    curve: list[float]
    spectral_norm: float
    numerical_rank: int
    effective_rank: float
    stable_rank: float
    exact: bool


@dataclass(frozen=True)
class SpectralComparison:
    """The spectra of one parameter's T and delta, and what they share.

    Attributes:
        directions: r, the numerical rank of delta (at most `MOST_DIRECTIONS`).
        residual_norm: ‖T - delta‖_2.
        left_similarity, right_similarity: phi(i, j) of T's first 2r and delta's first r singular
            vectors.
        left_angles, right_angles: principal angles of both one's first r, in radians.
        delta_tail: ‖delta - delta_r‖_F, what fp32 left beyond the rank.
        tail_from_values, tail_direct: ‖T - T_r‖_F from singular values, and from the matrices.
        recovery_error: ‖T_r - delta‖_F: how far T cut down to rank r is from delta.
        amplification: None without the base.
        base_norm: ‖W‖_F; None without the base.
    """

    directions: int
    task_vector: SpectrumSummary
    delta: SpectrumSummary
    floors: Floors
    residual_norm: float
    left_similarity: list[list[float]]
    right_similarity: list[list[float]]
    left_angles: list[float]
    right_angles: list[float]
    delta_tail: float
    tail_from_values: float
    tail_direct: float
    recovery_error: float
    amplification: float | None
    base_norm: float | None

    def as_json(self) -> dict[str, Any]:
        """Everything but the similarity matrices, of which the diagonals are kept."""
        content = asdict(self)
        for side in ("left", "right"):
            matrix = content.pop(f"{side}_similarity")
            diagonal = [row[index] for index, row in enumerate(matrix[: self.directions])]
            content[f"{side}_similarity_diagonal"] = diagonal
            angles = content.pop(f"{side}_angles")
            content[f"{side}_principal_angles_degrees"] = [math.degrees(a) for a in angles]
        floor, residual = self.floors.task_vector, self.floors.residual
        content["floors"] |= {"task_vector": asdict(floor), "residual": asdict(residual)}
        return content


def has_spectrum(pair: Pair) -> bool:
    """Vectors have none worth the name."""
    return min(pair.shape) >= 2


def compare_spectra(pair: Pair, floors: Floors, rank: int | None) -> SpectralComparison:
    """Compare the spectra of one parameter's T and delta.

    Args:
        pair: the parameter.
        floors: of its noise.
        rank: the adapter's r, a hint at how many directions to look for.
    """
    side = min(pair.shape)
    leading = min(side, 2 * (rank or 8))
    delta = streamed_spectrum(pair.delta_blocks(), pair.shape, leading)
    r = min(delta.rank_above(floors.delta.threshold), MOST_DIRECTIONS)
    if 2 * r > leading:
        leading = min(side, 2 * r)
        delta = streamed_spectrum(pair.delta_blocks(), pair.shape, leading)
    task_vector = streamed_spectrum(pair.task_vector_blocks(), pair.shape, leading)
    tail_direct, recovery_error = _truncate(pair, task_vector, r)
    left, right = delta.left[:, :r], delta.right[:, :r]
    amplification, base_norm = _amplification(pair, delta, left, right)
    return SpectralComparison(
        directions=r,
        task_vector=_summary(task_vector, floors.task_vector.threshold, side),
        delta=_summary(delta, floors.delta.threshold, side),
        floors=floors,
        residual_norm=spectral_norm(pair.residual_blocks(), pair.shape),
        left_similarity=subspace_similarity(task_vector.left, left).tolist(),
        right_similarity=subspace_similarity(task_vector.right, right).tolist(),
        left_angles=principal_angles(task_vector.left[:, :r], left).tolist(),
        right_angles=principal_angles(task_vector.right[:, :r], right).tolist(),
        delta_tail=delta.tail_norm(r),
        tail_from_values=task_vector.tail_norm(r),
        tail_direct=tail_direct,
        recovery_error=recovery_error,
        amplification=amplification,
        base_norm=base_norm,
    )


def _summary(found: Spectrum, threshold: float, side: int) -> SpectrumSummary:
    index = _curve_indices(side, len(found.values))
    return SpectrumSummary(
        values=found.values.tolist(),
        index=index,
        curve=[found.value_at(i) for i in index],
        spectral_norm=found.largest,
        numerical_rank=found.rank_above(threshold),
        effective_rank=found.effective_rank,
        stable_rank=found.stable_rank,
        exact=found.exact,
    )


def _curve_indices(side: int, leading: int) -> list[int]:
    """The leading indices, then some more in geometric progression up to the last."""
    some = {round(side ** (step / _CURVE_POINTS)) for step in range(_CURVE_POINTS + 1)}
    return sorted(set(range(1, min(leading, side) + 1)) | some)


def _truncate(pair: Pair, task_vector: Spectrum, r: int) -> tuple[float, float]:
    """‖T - T_r‖_F and ‖T_r - delta‖_F, from the matrices."""
    tail = recovery = 0.0
    scaled, right = task_vector.left[:, :r] * task_vector.values[:r], task_vector.right[:, :r]
    for rows in pair.rows():
        kept = scaled[rows.start : rows.start + rows.delta.shape[0]] @ right.T
        tail += float(((rows.task_vector.double() - kept) ** 2).sum())
        recovery += float(((kept - rows.delta.double()) ** 2).sum())
    return math.sqrt(tail), math.sqrt(recovery)


def _amplification(
    pair: Pair, delta: Spectrum, left: torch.Tensor, right: torch.Tensor
) -> tuple[float | None, float | None]:
    if pair.base is None:
        return None, None
    squared = sum(float((rows**2).sum()) for _, rows in pair.base_blocks()())
    delta_norm = math.sqrt(delta.squared_norm)
    return amplification_factor(delta_norm, left, right, pair.base_blocks()), math.sqrt(squared)
