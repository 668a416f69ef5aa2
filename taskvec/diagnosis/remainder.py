"""What is in a task vector that no simple mistake of merging explains: its rank, and its parts.

A merged LoRA, or a second one on top, is of low rank; training all weights, or another base, is
not. Ranks are counted above the floor that rounding noise alone can reach (`taskvec.spectrum`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from taskvec.bounds import gamma
from taskvec.certificate import Block
from taskvec.compare import Comparison, ParameterResult
from taskvec.diagnosis.case import Case, merged_rows
from taskvec.noisefloor import NoiseProfile, rounding_variance
from taskvec.rounding import U32, Format, half_ulp
from taskvec.spectrum import (
    DENSE_ELEMENTS,
    DENSE_SIDE,
    Blocks,
    Spectrum,
    low_rank_spectrum,
    spectrum,
    streamed_krylov,
    subspace_similarity,
)
from taskvec.updates.products import LowRank

ADDITIONAL, OTHER, RESCALED = "additional", "other", "rescaled"
MIXED, TRUNCATED, CUT = "mixed", "truncated", "cut"
FURTHER, GONE, UNRELATED = "further", "gone", "unrelated"

# Rounding errors are not quite random (an update below half an ulp is lost as a whole), so what
# stands for more than noise has to exceed it by this much, in amplitude and in energy.
_MARGIN = 1.25
_ROUNDINGS = 2  # of the base and of the sum, or of two sums
_SPARE_RANK = 24  # ranks are counted up to twice the adapter's and this
_SAME_SUBSPACE = 0.9
_CONTAINED = 0.99  # one of two spans lies in the other
_ALONG = 0.99  # a cosine: the task vector is the delta times a factor, but for some noise
_SIGMAS = 4.0
_FAR = 10.0  # times the energy of noise, of what is to be orthogonal to delta by no chance


@dataclass(frozen=True)
class Structure:
    """A matrix seen through rounding noise.

    Attributes:
        rank: singular values above the noise, counted up to a limit.
        low: the matrix is of that rank, up to noise.
        left, right: (m, rank), (n, rank) orthonormal: its leading singular vectors.
        values: (rank,): those singular values.
        squared_norm: ‖A‖_F^2.
        noise_energy: what rounding alone may contribute to that.
    """

    rank: int
    low: bool
    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor
    squared_norm: float
    noise_energy: float


@dataclass(frozen=True)
class Remainder:
    """What one parameter holds.

    Attributes:
        kind: ADDITIONAL (delta and a low-rank rest), MIXED (delta by another factor and such a
            rest), CUT (delta, and a rest that a truncated SVD would leave out), TRUNCATED (only
            some of delta's directions), OTHER (low rank, but not delta), RESCALED (delta by another
            factor), FURTHER (delta and a rest of no low rank), GONE (nothing but noise of the size
            of rounding) or UNRELATED.
        evidence: the numbers.
    """

    name: str
    kind: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Slope:
    """Least-squares c of T = c * delta + rest over some parameters, with its standard error.

    The error is that of a rest which knows nothing of delta.
    """

    value: float
    error: float

    @property
    def contained(self) -> bool:
        """T holds delta about once, which chance does not give."""
        return 0.5 < self.value < 1.5 and self.value >= _SIGMAS * self.error

    @property
    def absent(self) -> bool:
        """T holds nothing of delta, which would have shown."""
        return abs(self.value) <= _SIGMAS * self.error <= 0.5


def pooled_slope(results: Sequence[ParameterResult]) -> Slope:
    """The slope over all the adapted ones of some parameters, from the sums of the first pass."""
    sums = [result.comparison.sums for result in results if result.comparison is not None]
    delta = sum(item.delta_squared for item in sums)
    if not delta:
        return Slope(0.0, math.inf)
    value = sum(item.product for item in sums) / delta
    variance = 0.0
    for item in sums:  # ‖T - c delta‖^2 = ‖T - delta‖^2 + 2 (1 - c) <T - delta, delta> + ...
        cross = item.product - item.delta_squared
        rest = item.difference_squared + 2 * (1 - value) * cross
        rest += (1 - value) ** 2 * item.delta_squared
        variance += max(rest, 0.0) / max(item.elements, 1) * item.delta_squared
    return Slope(value, math.sqrt(variance) / delta)


def adapted_remainder(
    case: Case, result: ParameterResult, comparison: Comparison, slope: Slope
) -> Remainder:
    """What the task vector of an adapted parameter is made of.

    If T = delta + L, then rank(T - delta) = rank(T) - r; if T is another adapter's, the rank of
    T - delta is the higher one. That tells the two apart without a threshold on any angle. An
    update that is no matrix of low rank is judged by its slope alone.
    """
    update = case.update(result.name)
    if not isinstance(update, LowRank) or update.stored is not None:
        kind = FURTHER if slope.contained else GONE if slope.absent else UNRELATED
        if kind == UNRELATED and abs(result.cosine or 0.0) >= _ALONG:
            kind = RESCALED
        return Remainder(result.name, kind, {"rank": None, **_evidence(result)})
    shape = update.matrix
    noise = _noise(case, result.name, shape, update)
    limit = 2 * update.rank + _SPARE_RANK
    whole = _structure(_blocks(case, result.name, None), shape, noise, limit)
    rest = _structure(_blocks(case, result.name, update), shape, noise, limit)
    delta = _delta_spectrum(update)
    overlap = min(_overlap(whole.left, delta.left), _overlap(whole.right, delta.right))
    kind = _kind(comparison, whole, rest, overlap, slope)
    factor = 1.0
    if kind == ADDITIONAL and _is_left_out(rest, delta):
        kind = CUT
    if kind == OTHER and overlap >= _CONTAINED:
        rank = int((delta.values > delta.values.max() * U32).sum())
        if whole.rank < rank:
            kind = TRUNCATED
        elif whole.rank > rank and (found := _factor_within(whole, delta, rank)):
            scaled = replace(update, scaling=update.scaling * found)
            without = _structure(_blocks(case, result.name, scaled), shape, noise, limit)
            if without.low and without.rank == whole.rank - rank:
                kind, rest, factor = MIXED, without, found
    return Remainder(
        result.name,
        kind,
        {
            "rank": whole.rank,
            "low_rank": whole.low,
            "rank_without_delta": rest.rank,
            "low_rank_without_delta": rest.low,
            "adapter_rank": update.rank,
            "subspace_overlap": overlap,
            "factor": factor if kind == MIXED else None,
            "best_of_its_rank": kind == TRUNCATED and _is_best(comparison, whole, delta),
            **_evidence(result),
        },
    )


def _evidence(result: ParameterResult) -> dict[str, Any]:
    return {
        "slope": result.slope,
        "cosine_similarity": result.cosine,
        "relative_residual": result.relative_error,
    }


def _kind(
    comparison: Comparison, whole: Structure, rest: Structure, overlap: float, slope: Slope
) -> str:
    sums = comparison.sums
    if slope.contained and not rest.rank:
        return FURTHER
    if slope.absent and whole.low and not whole.rank:
        return GONE
    full = slope.contained and not whole.low
    # What lies in the delta's own directions is no update beside it.
    inside = whole.low and whole.rank <= (comparison.rank or 0) and overlap >= _CONTAINED
    if rest.low and rest.rank and (rest.rank < whole.rank or full) and not inside:
        return ADDITIONAL
    if whole.low and whole.rank:
        explained = sums.product**2 / sums.delta_squared if sums.delta_squared else 0.0
        residual = whole.squared_norm - explained
        # A task vector that was scaled after it was rounded has that rounding scaled as well.
        times = max(1.0, sums.product / sums.delta_squared) if sums.delta_squared else 1.0
        noise = whole.noise_energy * (1 + times**2) / _ROUNDINGS
        if overlap >= _SAME_SUBSPACE and residual <= _MARGIN * noise:
            return RESCALED
        return OTHER
    return FURTHER if slope.contained else UNRELATED


def _factor_within(whole: Structure, delta: Spectrum, rank: int) -> float | None:
    """c of T = c * delta + L where the rank of T is that of delta and of L together.

    Then delta T^+ delta = delta / c (rank additivity: Marsaglia and Styan, Equalities and
    inequalities for ranks of matrices, 1974), so that the trace of T^+ delta is rank / c.
    """
    left = whole.left.T.to(delta.left) @ delta.left * delta.values
    trace = float(((left @ (delta.right.T @ whole.right)).diagonal() / whole.values).sum())
    return rank / trace if trace else None


def _is_best(comparison: Comparison, whole: Structure, delta: Spectrum) -> bool:
    """Whether T is delta's best approximation of its rank: ‖T - delta‖ is no more than must be."""
    least = float((delta.values[whole.rank :] ** 2).sum())
    return comparison.sums.difference_squared <= _MARGIN * (least + whole.noise_energy)


def _is_left_out(rest: Structure, delta: Spectrum) -> bool:
    """Whether T - delta is what a truncated SVD of T leaves out: orthogonal to delta, and smaller.

    Of a rest that has nothing to do with delta, the share r / m lies in delta's columns, and r / n
    in its rows, as of noise; so the rest has to be far larger than that.
    """
    energy, noise = float((rest.values**2).sum()), _MARGIN * rest.noise_energy
    if energy < _FAR * noise or rest.values.max() > delta.values.min() * _MARGIN:
        return False
    rank = delta.values.numel()
    for own, of_delta in ((rest.left, delta.left), (rest.right, delta.right)):
        common = float(((of_delta.T @ own.to(of_delta) * rest.values) ** 2).sum())
        if common > _MARGIN * noise * rank / own.shape[0]:
            return False
    return True


def unadapted_remainder(case: Case, result: ParameterResult) -> Remainder:
    """What the task vector of a parameter that the adapter leaves alone is made of."""
    info = case.base.tensors[result.name]
    if len(result.shape) < 2:
        return Remainder(result.name, FURTHER, {"rank": None})
    shape = (info.rows, info.row_elements)
    noise = _noise(case, result.name, shape, None)
    found = _structure(_blocks(case, result.name, None), shape, noise, _SPARE_RANK)
    kind = ADDITIONAL if found.low and found.rank else FURTHER
    return Remainder(result.name, kind, {"rank": found.rank, "low_rank": found.low})


def relative_change(case: Case, results: Sequence[ParameterResult]) -> float | None:
    """‖M - W‖ / ‖W‖ over some parameters; None where W is zero."""
    change = sum(result.task_vector.squared_norm for result in results)
    squared = 0.0
    for result in results:
        for block in case.blocks(result.name):
            base = block.subtracted.double()
            squared += float(torch.where(torch.isfinite(base), base * base, 0.0).sum())
    return math.sqrt(change / squared) if squared else None


def _blocks(case: Case, name: str, without: LowRank | None) -> Blocks:
    """T, or T - delta, as a matrix whose non-finite elements are zero."""

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        for block in case.blocks(name):
            wide = block.task_vector.double()
            if without is not None:
                wide = wide - without.exact(block.start, block.stop)
            wide = torch.where(torch.isfinite(wide), wide, 0.0)
            yield block.start, wide.reshape(wide.shape[0], -1)

    return blocks


def _noise(case: Case, name: str, shape: tuple[int, int], update: LowRank | None) -> NoiseProfile:
    """What two roundings of the weight, one of T and the matmul leave on each element."""
    format, noise = case.format_of(name), NoiseProfile(shape, case.device)
    for block in case.blocks(name):
        variance = noise_variance(block, format)
        variance = variance.reshape(variance.shape[0], -1)
        if update is not None:
            matmul = gamma(update.rank + 2) * update.magnitude(block.start, block.stop)
            variance += matmul**2
        noise.add(block.start, torch.where(torch.isfinite(variance), variance, 0.0))
    return noise


def noise_variance(block: Block, format: Format) -> torch.Tensor:
    """What two roundings of the weight and one of T leave on each element: rows in float64."""
    base, merged = block.subtracted.double(), merged_rows(block)
    largest = torch.where(base.abs() > merged.abs(), base, merged)
    variance = _ROUNDINGS * rounding_variance(half_ulp(largest, format))
    return variance + rounding_variance(block.task_vector.double().abs() * U32)


def _structure(
    blocks: Blocks, shape: tuple[int, int], noise: NoiseProfile, limit: int
) -> Structure:
    limit = min(limit, max(1, min(shape) // 2))  # past half its size, a rank is not low
    squared = sum(float((block * block).sum()) for _, block in blocks())
    found = _spectrum(blocks, shape, limit)
    above = found.values[:limit] > _MARGIN * noise.floor().threshold
    rank = int(above.sum())
    energy = float(noise.rows.sum())
    tail = squared - float((found.values[:rank] ** 2).sum())
    return Structure(
        rank=rank,
        low=tail <= _MARGIN * energy,
        left=found.left[:, :rank],
        right=found.right[:, :rank],
        values=found.values[:rank],
        squared_norm=squared,
        noise_energy=energy,
    )


def _spectrum(blocks: Blocks, shape: tuple[int, int], leading: int) -> Spectrum:
    """The leading singular triplets; a large matrix is read again for every product."""
    if min(shape) <= DENSE_SIDE and math.prod(shape) <= DENSE_ELEMENTS:
        return spectrum(torch.cat([rows for _, rows in blocks()]), leading)
    return streamed_krylov(blocks, shape, leading)


def _delta_spectrum(update: LowRank) -> Spectrum:
    """Of the delta as it is stored."""
    if update.transposed:
        return low_rank_spectrum(update.A.T, update.B.T, update.scaling)
    return low_rank_spectrum(update.B, update.A, update.scaling)


def _overlap(left: torch.Tensor, right: torch.Tensor) -> float:
    """phi of two spans; 0 where one is empty."""
    if not left.shape[1] or not right.shape[1]:
        return 0.0
    return float(subspace_similarity(left, right)[-1, -1])
