"""The noise that rounding left on T and on delta, predicted from number formats and measured.

With q the spacing of the merged format at M, g that of the numbers that were added and b the
base's own spacing once rounded to that format, T - delta is made of

    the sum's rounding       variance q^2/12 (1 + 2 (g/q)^2), 0 where g >= q: exact sums
    a base rounded as well   b^2/12, where errors show it
    T's own, fl32(M - W)     likewise, with T's spacing for q
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from taskvec.mathematics.pair import Pair, Rows
from taskvec.noisefloor import NoiseFloor, NoiseProfile, rounding_variance
from taskvec.rounding import FORMATS, FP32, Format, half_ulp

_UNKNOWN_RANK = 64  # what is allowed for where nobody says how many products delta sums up
_SLACK = 1.002  # on bounds that leave the roundings of fp32 sums out


@dataclass(frozen=True)
class Floors:
    """Where the singular values of noise end.

    Attributes:
        delta: noise on delta, an fp32 matmul: r + 1 roundings of each element.
        predicted: noise on T - delta, from the formats; None while the merged weights are unknown.
        measured: noise of the sizes that T - delta really has, row by row and column by column.
        base_rounded: the prediction counts a rounding of the base itself too.
        explained_share: of the elements, those that differ by no more than such roundings make
            them; None without a prediction.
    """

    delta: NoiseFloor
    predicted: NoiseFloor | None
    measured: NoiseFloor
    base_rounded: bool = False
    explained_share: float | None = None

    @property
    def residual(self) -> NoiseFloor:
        """Of T - delta: the predicted one where there is one."""
        return self.predicted or self.measured

    @property
    def task_vector(self) -> NoiseFloor:
        """Of T, which has delta's noise as well."""
        return self.residual.plus(self.delta)


class FloorSums:
    """Accumulates `Floors` over the rows of one parameter.

    Args:
        pair: the parameter.
        format: what M is stored in; None if unknown.
        rank: r of the adapter; None if unknown.
    """

    def __init__(self, pair: Pair, format: Format | None, rank: int | None) -> None:
        self._roundings = (rank or _UNKNOWN_RANK) + 1
        self._once, self._twice, self._delta, self._measured = (
            NoiseProfile(pair.shape, pair.device) for _ in range(4)
        )
        self._format = format if pair.base is not None else None
        stored = pair.base.tensors[pair.name].dtype if pair.base is not None else None
        self._stored = next((f for f in FORMATS.values() if f.dtype == stored), None)
        self._wider = format is not None and stored is not None and _is_wider(stored, format)
        self._subtracts_rounded = self._wider and pair.vector.base_format is format
        self._elements = self._beyond_once = self._beyond_twice = 0

    def add(self, rows: Rows, half_ulps: torch.Tensor | None) -> None:
        """Take rows into account, and half an ulp of each merged weight where known."""
        delta = rows.delta.double()
        error = (rows.task_vector.double() - delta).abs()
        spacing = half_ulp(delta, FP32)
        self._delta.add(rows.start, rounding_variance(spacing) * self._roundings)
        self._measured.add(rows.start, error**2)
        if half_ulps is not None and self._format is not None:
            self._predict(rows, error, half_ulps, spacing, self._format)

    def floors(self) -> Floors:
        """The floors. A rounding of the base is counted where errors are as large as only two
        roundings make them."""
        measured, delta = self._measured.floor(), self._delta.floor()
        if not self._elements:
            return Floors(delta, None, measured)
        allowed = 0.001 * self._elements
        twice = self._beyond_once > 10 * allowed and self._beyond_twice <= allowed
        beyond = self._beyond_twice if twice else self._beyond_once
        predicted = (self._twice if twice else self._once).floor()
        return Floors(delta, predicted, measured, twice, 1 - beyond / self._elements)

    def _predict(
        self,
        rows: Rows,
        error: torch.Tensor,
        merged: torch.Tensor,
        delta: torch.Tensor,
        format: Format,
    ) -> None:
        """One rounding and two; merged, delta: half an ulp of each."""
        W = rows.known_base.double()
        stored = half_ulp(W, self._stored) if self._stored else torch.zeros_like(merged)
        base = half_ulp(W, format) if self._wider else torch.zeros_like(merged)
        subtracted = base if self._subtracts_rounded else stored
        own, subtraction = _subtraction(rows.task_vector, merged, subtracted)
        once, twice = self._sum_variances(rows.delta.double().abs(), merged, delta, stored, base)
        self._once.add(rows.start, once + own)
        self._twice.add(rows.start, twice + own)
        self._elements += error.numel()
        allowed = merged + subtraction
        self._beyond_once += int((error > _SLACK * allowed).sum())
        self._beyond_twice += int((error > _SLACK * (allowed + base)).sum())

    def _sum_variances(
        self,
        size: torch.Tensor,
        merged: torch.Tensor,
        delta: torch.Tensor,
        stored: torch.Tensor,
        base: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The variance of the error if only the sum was rounded, and if the base was too.

        A base with bits below the format's spreads the sum's error evenly over an ulp. One that is
        a number of the format does not: a delta of less than half an ulp is then lost whole. And
        where the base is rounded for the subtraction only, such a delta makes T jump a whole ulp q
        with probability |delta| / q, which has the variance q |delta| - delta^2.

        Args:
            size: |delta|.
            merged, delta, stored, base: half the spacings of M, of delta, of W as stored, and of W
                in M's format where W has bits below that.
        """
        even = rounding_variance(merged, torch.minimum(delta, stored))
        on_grid = torch.where(size < merged, size**2, rounding_variance(merged, delta))
        if not self._wider:
            return on_grid, on_grid
        if not self._subtracts_rounded:
            return even, on_grid + rounding_variance(base, stored)
        jumps = torch.where(size < 2 * merged, (2 * merged - size) * size, 2 * even)
        return on_grid, jumps


def _subtraction(
    task_vector: torch.Tensor, merged: torch.Tensor, subtracted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and largest error of fl32(M - W), exact unless T is larger than both."""
    half = half_ulp(task_vector.double(), FP32)
    spacing = torch.minimum(merged, subtracted)
    return rounding_variance(half, spacing), torch.where(spacing < half, half, 0.0)


def _is_wider(stored: torch.dtype, format: Format) -> bool:
    """Whether numbers of a dtype have bits that a format has not."""
    return torch.finfo(stored).eps < torch.finfo(format.dtype).eps
