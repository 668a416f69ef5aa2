"""Statistics of streams of numbers: moments, correlation, quantiles and histograms.

Each class takes blocks with ``add`` and joins with others of its kind with ``merge``, so that the
statistics of a parameter and those of a whole model come from one pass. Central moments are joined,
never differences of large sums (Pebay, SAND2008-6212; Chan, Golub and LeVeque, 1979).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
EXACT_ELEMENTS = 1 << 18  # up to here quantiles come from sorting the values themselves

# An fp32 number's key is its upper half: sign, exponent and 7 bits of significand.
_KEYS = 1 << 16
KEY_RESOLUTION = 2.0**-7  # numbers with the same key differ by no more than this share
_SMALLEST_NORMAL = 2.0**-126

# Bins of magnitudes: four to an octave, from 2^-60 up to 2^16; the first is for all below.
_LOWEST, _HIGHEST = -60, 16
_STEPS = (0, 25, 54, 88)  # the first significands, in 128ths above 1, past 2^0, 2^1/4, 2^1/2, 2^3/4
MAGNITUDE_BINS = (_HIGHEST - _LOWEST) * len(_STEPS) + 1


@dataclass
class Moments:
    """Count, mean and sums of the second to fourth powers of deviations from the mean."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Take float64 values of any shape into account."""
        if not values.numel():
            return
        mean = float(values.mean())
        deviation = values.flatten() - mean
        square = deviation * deviation
        m2, m3, m4 = square.sum(), square @ deviation, square @ square
        self.merge(Moments(values.numel(), mean, float(m2), float(m3), float(m4)))

    def merge(self, other: Moments) -> None:
        """Join with the moments of other values (Pebay, equations 2.1 and 3.1)."""
        n, a, b = self.count + other.count, self.count, other.count
        if not b:
            return
        d = other.mean - self.mean
        self.m4 += (
            other.m4
            + d**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * d**2 * (a * a * other.m2 + b * b * self.m2) / n**2
            + 4 * d * (a * other.m3 - b * self.m3) / n
        )
        self.m3 += (
            other.m3 + d**3 * a * b * (a - b) / n**2 + 3 * d * (a * other.m2 - b * self.m2) / n
        )
        self.m2 += other.m2 + d**2 * a * b / n
        self.mean += d * b / n
        self.count = n

    @property
    def std(self) -> float:
        """Of the population: divided by n."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    @property
    def skewness(self) -> float | None:
        """m3 / std^3; None for values that are all the same."""
        return (self.m3 / self.count) / (self.m2 / self.count) ** 1.5 if self.m2 > 0 else None

    @property
    def kurtosis(self) -> float | None:
        """m4 / std^4: 3 for a normal distribution, 1.8 for a uniform one."""
        return self.count * self.m4 / self.m2**2 if self.m2 > 0 else None

    def as_json(self) -> dict[str, float | None]:
        return {
            "mean": self.mean,
            "std": self.std,
            "skewness": self.skewness,
            "kurtosis": self.kurtosis,
        }


@dataclass
class Regression:
    """Least squares of y on x, with an intercept, and Pearson's correlation of the two."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take pairs of float64 values of any shape into account."""
        if not x.numel():
            return
        mean_x, mean_y = float(x.mean()), float(y.mean())
        dx, dy = x.flatten() - mean_x, y.flatten() - mean_y
        self.merge(
            Regression(x.numel(), mean_x, mean_y, float(dx @ dx), float(dy @ dy), float(dx @ dy))
        )

    def merge(self, other: Regression) -> None:
        """Join with other pairs."""
        n = self.count + other.count
        if not other.count:
            return
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.count * other.count / n
        self.xx += other.xx + dx * dx * weight
        self.yy += other.yy + dy * dy * weight
        self.xy += other.xy + dx * dy * weight
        self.mean_x += dx * other.count / n
        self.mean_y += dy * other.count / n
        self.count = n

    @property
    def slope(self) -> float | None:
        return self.xy / self.xx if self.xx > 0 else None

    @property
    def intercept(self) -> float | None:
        return self.mean_y - self.slope * self.mean_x if self.slope is not None else None

    @property
    def pearson(self) -> float | None:
        """None where x or y is constant."""
        if not (self.xx > 0 and self.yy > 0):
            return None
        return max(-1.0, min(1.0, self.xy / math.sqrt(self.xx) / math.sqrt(self.yy)))


@dataclass
class Quantiles:
    """Quantiles of fp32 numbers: exact for few, within `KEY_RESOLUTION` of the value for many.

    The values themselves are kept up to `EXACT_ELEMENTS`. From there on they are counted by their
    upper 16 bits, which needs no range to be known beforehand.
    """

    _values: list[torch.Tensor] = field(default_factory=list)
    _kept: int = 0
    _counts: torch.Tensor | None = None

    @property
    def method(self) -> str:
        return "exact" if self._counts is None else "histogram"

    def add(self, values: torch.Tensor) -> None:
        """Take fp32 values of any shape into account; none may be NaN."""
        flat = values.flatten()
        if self._counts is None and self._kept + flat.numel() <= EXACT_ELEMENTS:
            self._values.append(flat.cpu())
            self._kept += flat.numel()
            return
        self._count(flat)

    def merge(self, other: Quantiles) -> None:
        """Join with the quantiles of other values."""
        for values in other._values:
            self.add(values)
        if other._counts is not None:
            self._count(torch.empty(0))
            self._counts = self._counts + other._counts if self._counts is not None else None

    def at(self, probabilities: Sequence[float]) -> list[float | None]:
        """The quantiles, interpolated as numpy does by default; None without values."""
        if self._counts is not None:
            total = self._ordered_counts().cumsum(0)
            return [self._from_counts(total, probability) for probability in probabilities]
        if not self._kept:
            return [None] * len(probabilities)
        values = torch.cat(self._values).double()
        levels = torch.tensor(probabilities, dtype=torch.float64)
        found: list[float | None] = torch.quantile(values, levels).tolist()
        return found

    def as_json(self) -> dict[str, Any]:
        found = zip(QUANTILES, self.at(QUANTILES), strict=True)
        return {"method": self.method, "values": {str(p): value for p, value in found}}

    def _count(self, flat: torch.Tensor) -> None:
        if self._counts is None:
            kept, self._values = self._values, []
            self._counts = torch.zeros(_KEYS, dtype=torch.int64)
            for values in kept:
                self._count(values)
        if flat.numel():
            self._counts += torch.bincount(keys(flat), minlength=_KEYS).cpu()

    def _ordered_counts(self) -> torch.Tensor:
        """The counts in the order of the numbers: the negative keys first, from the largest on."""
        assert self._counts is not None
        half = _KEYS // 2
        return torch.cat([self._counts[half:].flip(0), self._counts[:half]])

    def _from_counts(self, total: torch.Tensor, probability: float) -> float:
        """A quantile from the cumulated ordered counts, linear within a key's range."""
        rank = probability * (int(total[-1]) - 1)
        place = int(torch.searchsorted(total, int(rank), right=True))
        before = int(total[place - 1]) if place else 0
        inside = (rank + 0.5 - before) / (int(total[place]) - before)
        low, high = _lower_end(place), _lower_end(place + 1)
        value = low + inside * (high - low)
        return value if abs(value) >= _SMALLEST_NORMAL else 0.0  # zeros share a key with subnormals


def keys(values: torch.Tensor) -> torch.Tensor:
    """The upper 16 bits of fp32 numbers, int32 of the same number of elements in one dimension."""
    bits = values.contiguous().view(torch.int32).flatten()
    return (bits >> 16) & 0xFFFF


def _lower_end(place: int) -> float:
    """The smallest number of a place in the order of `Quantiles._ordered_counts`."""
    half = _KEYS // 2
    negative = place < half  # and grows downwards, so that its smallest has all lower bits set
    bits = (_KEYS - 1 - place) << 16 | 0xFFFF if negative else (place - half) << 16
    value: float = struct.unpack("<f", bits.to_bytes(4, "little"))[0]
    return value


def magnitude_bins(keys: torch.Tensor) -> torch.Tensor:
    """The bin of each number's magnitude by its key, int32 of the same shape; 0: below 2^-60."""
    steps = torch.tensor(_STEPS[1:], dtype=torch.int32, device=keys.device)
    quarters = torch.bucketize(keys & 0x7F, steps, right=True, out_int32=True)
    octaves = ((keys >> 7) & 0xFF) - (127 + _LOWEST)
    return (octaves * len(_STEPS) + quarters + 1).clamp_(0, MAGNITUDE_BINS - 1)


def magnitude_edges() -> list[float]:
    """The lower edges of bins 1, 2, ... and the upper edge of the last one."""
    octaves = range(_LOWEST, _HIGHEST)
    return [*(2.0**o * (1 + step / 128) for o in octaves for step in _STEPS), 2.0**_HIGHEST]


@dataclass
class MagnitudeHistogram:
    """How often |x| falls into each bin of `magnitude_bins`: (MAGNITUDE_BINS,) int64."""

    counts: torch.Tensor = field(
        default_factory=lambda: torch.zeros(MAGNITUDE_BINS, dtype=torch.int64)
    )

    def add(self, keys: torch.Tensor) -> None:
        """Take numbers into account by their keys."""
        bins = magnitude_bins(keys)
        self.counts += torch.bincount(bins, minlength=MAGNITUDE_BINS).cpu()

    def merge(self, other: MagnitudeHistogram) -> None:
        self.counts += other.counts


@dataclass
class JointMagnitudes:
    """How often (|x|, |y|) falls into each pair of bins: (MAGNITUDE_BINS, MAGNITUDE_BINS) int64."""

    counts: torch.Tensor = field(
        default_factory=lambda: torch.zeros(MAGNITUDE_BINS, MAGNITUDE_BINS, dtype=torch.int64)
    )

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take pairs of numbers into account by their keys."""
        pairs = magnitude_bins(x) * MAGNITUDE_BINS + magnitude_bins(y)
        counts = torch.bincount(pairs, minlength=MAGNITUDE_BINS**2).cpu()
        self.counts += counts.view(MAGNITUDE_BINS, MAGNITUDE_BINS)

    def merge(self, other: JointMagnitudes) -> None:
        self.counts += other.counts
