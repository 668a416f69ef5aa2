"""How many singular values of a task vector stand above the noise that rounding left.

Where the base is at hand, the floor follows from the formats: with q half the spacing of the merged
format at M = W + T, T holds

    the sum's rounding            variance as `taskvec.noisefloor.rounding_variance`, spacing q
    the base's, where it has bits below the merged format's and these were rounded too
    T's own, and what an fp32 product of up to 64 terms loses

Where it is not, the floor is measured: what is left of T beyond rank r, row by row and column by
column, bounds the singular values of noise of those sizes, and r is the largest rank that stands
above its own remainder. That takes a change without structure for noise, because it looks alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from taskvec.certificate import Block
from taskvec.noisefloor import NoiseFloor, NoiseProfile, rounding_variance
from taskvec.rounding import FORMATS, FP32, Format, half_ulp, loses
from taskvec.spectrum import Spectrum

FORMATS_FLOOR, MEASURED_FLOOR = "formats", "measured"

_PRODUCT_TERMS = 64
_TWO_ROUNDINGS = 1.1  # a remainder this much larger than one rounding makes shows a second one


@dataclass(frozen=True)
class RankFinding:
    """Where signal ends and noise begins in one matrix.

    Attributes:
        rank: how many singular values stand above the threshold.
        threshold: the largest singular value that noise is allowed.
        source: "formats" or "measured".
        complete: the spectrum reached down to the threshold; otherwise more of it is needed.
        noise_ratio: root mean square of what is left of T beyond the rank, over that of the
            rounding noise; above one there is more in it than rounding. None if measured.
    """

    rank: int
    threshold: float
    source: str
    complete: bool
    noise_ratio: float | None


class FloorSums:
    """What the floors of one matrix follow from, summed up over its rows.

    Args:
        shape: (m, n).
        device: of the rows to come.
        merged: what M is stored in; None where nobody knows, or there is no base.
        stored: dtype of the base; None without one.
        base_format: what the base was rounded to before it was subtracted; None: as stored.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        *,
        merged: Format | None = None,
        stored: torch.dtype | None = None,
        base_format: Format | None = None,
    ) -> None:
        self.shape = shape
        self._once, self._twice, self._size = (NoiseProfile(shape, device) for _ in range(3))
        self._merged = merged if stored is not None else None
        self._stored = next((f for f in FORMATS.values() if f.dtype == stored), None)
        self._wider = merged is not None and stored is not None and loses(stored, merged)
        self._base_format = base_format

    def add(self, start: int, task_vector: torch.Tensor, block: Block | None) -> None:
        """Take rows into account; the block they are from, where the base is at hand."""
        T = task_vector.double()
        self._size.add(start, T**2)
        if block is not None and self._merged is not None:
            once, twice = self._variances(block.subtracted.double(), T, self._merged)
            self._once.add(start, once)
            self._twice.add(start, twice)

    @property
    def squared_norm(self) -> float:
        return float(self._size.rows.sum())

    def find(self, found: Spectrum) -> RankFinding:
        """The rank, from the leading singular triplets of the matrix."""
        return self._measured(found) if self._merged is None else self._predicted(found)

    def _variances(
        self, W: torch.Tensor, T: torch.Tensor, merged: Format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise of one rounding and of two, element by element; W as it was subtracted."""
        own, sums = half_ulp(T, FP32), half_ulp(W + T, merged)
        stored = half_ulp(W, self._stored) if self._stored else torch.zeros_like(W)
        common = rounding_variance(own, torch.minimum(sums, stored))
        common = common + rounding_variance(own) * (_PRODUCT_TERMS + 1)
        if self._base_format is not None and self._base_format is not merged:
            common = common + rounding_variance(half_ulp(W, self._base_format), stored)
        if not self._wider:
            once = common + rounding_variance(sums, own)
            return once, once
        if self._base_format is merged:  # R(W + D) - R(W): the base's rounding is in both
            once = rounding_variance(sums, own)
            return common + once, common + 2 * once
        once = common + rounding_variance(sums, torch.minimum(own, stored))
        return once, once + rounding_variance(half_ulp(W, merged), stored)

    def _predicted(self, found: Spectrum) -> RankFinding:
        finding = self._above(found, self._once.floor())
        if self._wider and (finding.noise_ratio or 0.0) > _TWO_ROUNDINGS:
            finding = self._above(found, self._twice.floor())
        return finding

    def _above(self, found: Spectrum, floor: NoiseFloor) -> RankFinding:
        threshold = self._with_margin(floor.threshold)
        rank = int((found.values > threshold).sum())
        kept = float((found.values[:rank] ** 2).sum())
        left = math.sqrt(max(0.0, self.squared_norm - kept) / math.prod(self.shape))
        return RankFinding(
            rank,
            threshold,
            FORMATS_FLOOR,
            rank < found.values.numel() or rank == min(self.shape),
            left / floor.rms if floor.rms else None,
        )

    def _measured(self, found: Spectrum) -> RankFinding:
        """The largest rank r <= min(m, n) / 2 with sigma_r above the noise of what it leaves."""
        side, count = min(self.shape), found.values.numel()
        squares = found.values**2
        rows = self._size.rows[:, None] - (found.left**2 * squares).cumsum(1)
        columns = self._size.columns[:, None] - (found.right**2 * squares).cumsum(1)
        widest = sum(p.clamp(min=0).amax(0).sqrt() for p in (rows, columns))
        # What cancellation leaves of sums of squares must not pass for a small remainder.
        least = 2.0**-40 * found.largest
        thresholds = [self._with_margin(max(float(t), least)) for t in torch.as_tensor(widest)]
        most = max(1, side // 2)
        candidates = range(1, min(count, most) + 1)
        ranks = [r for r in candidates if found.values[r - 1] > thresholds[r - 1]]
        rank = max(ranks, default=0)
        complete = count >= min(most, side) or rank < count // 2
        return RankFinding(rank, thresholds[max(rank, 1) - 1], MEASURED_FLOOR, complete, None)

    def _with_margin(self, threshold: float) -> float:
        """Room for how far the largest singular value of finite noise fluctuates.

        Its fluctuations are (m^-1/2 + n^-1/2)^(1/3) / 2 times a Tracy-Widom variable, in units of
        one element's deviation (Johnstone, Ann. Statist. 29 (2001)): at most one or two of these.
        """
        m, n = self.shape
        return threshold * (1.02 + 2 / (math.sqrt(m) + math.sqrt(n)))
