"""What T and delta have to do with each other, element by element, from one pass over both.

`PairStatistics` holds the sums for one parameter, or for all of them together. `DirectSums` is a
second pass that computes anew, and the long way round, what identities say the first pass implies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from taskvec.compare import Magnitude, PairSums
from taskvec.difference import Difference
from taskvec.streamstats import (
    JointMagnitudes,
    MagnitudeHistogram,
    Moments,
    Quantiles,
    Regression,
    keys,
)

ULP_BINS, ULP_LIMIT = 120, 1.5  # histogram of (T - delta) / ulp over [-1.5, 1.5)
UNIFORM_RMS = 1 / math.sqrt(12)  # of an error spread evenly over one ulp

_HALF = 0.501  # what goes beyond half an ulp by more than a sum in fp32 can


@dataclass
class UlpResiduals:
    """T - delta in ulps of the merged weight.

    Attributes:
        counts: (ULP_BINS,) int64.
        beyond: elements outside the histogram.
        squared, largest: sum of squares, largest magnitude.
        over_half: elements that more than one rounding must have moved.
    """

    elements: int = 0
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(ULP_BINS, dtype=torch.int64))
    beyond: int = 0
    squared: float = 0.0
    largest: float = 0.0
    over_half: int = 0

    def add(self, residual: torch.Tensor, half_ulps: torch.Tensor) -> None:
        """Take T - delta and half an ulp of M, both float64 of one shape, into account."""
        ulps = (residual / half_ulps).flatten().mul_(0.5)
        self.elements += ulps.numel()
        self.squared += float(ulps @ ulps)
        scale = ULP_BINS / (2 * ULP_LIMIT)
        bins = (ulps * scale).add_(1 + ULP_LIMIT * scale).floor_().clamp_(0, ULP_BINS + 1)
        counts = torch.bincount(bins.int(), minlength=ULP_BINS + 2).cpu()
        self.counts += counts[1:-1]
        self.beyond += int(counts[0] + counts[-1])
        sizes = ulps.abs_()
        self.largest = max(self.largest, float(sizes.max()))
        self.over_half += int((sizes > _HALF).sum())

    def merge(self, other: UlpResiduals) -> None:
        self.elements += other.elements
        self.counts += other.counts
        self.beyond += other.beyond
        self.squared += other.squared
        self.largest = max(self.largest, other.largest)
        self.over_half += other.over_half

    @property
    def rms(self) -> float:
        return math.sqrt(self.squared / self.elements) if self.elements else 0.0

    @property
    def within_half(self) -> float:
        """Share of the elements that one rounding explains."""
        return 1 - self.over_half / self.elements if self.elements else 1.0

    def as_json(self) -> dict[str, Any]:
        return {
            "rms": self.rms,
            "max": self.largest,
            "share_within_half": self.within_half,
            "beyond_histogram": self.beyond,
        }


@dataclass
class PairStatistics:
    """Everything that is said of T beside delta. All properties are None where undefined.

    Attributes:
        magnitude, sums: what the comparison of step 3 counts too.
        regression: of T on delta.
        task_vector, delta, residual: moments of T, of delta and of T - delta.
        quantiles: of the three, by those names.
        same_sign: elements of T with the sign of a delta that is not zero; and
        nonzero_delta: how many of those delta has.
        joint: how |delta| and |T| occur together.
        residuals: the magnitudes |T - delta|.
        ulps: None while the merged weights are not known.
    """

    magnitude: Magnitude = field(default_factory=Magnitude)
    sums: PairSums = field(default_factory=PairSums)
    regression: Regression = field(default_factory=Regression)
    task_vector: Moments = field(default_factory=Moments)
    delta: Moments = field(default_factory=Moments)
    residual: Moments = field(default_factory=Moments)
    quantiles: dict[str, Quantiles] = field(
        default_factory=lambda: {name: Quantiles() for name in ("task_vector", "delta", "residual")}
    )
    same_sign: int = 0
    nonzero_delta: int = 0
    joint: JointMagnitudes = field(default_factory=JointMagnitudes)
    residuals: MagnitudeHistogram = field(default_factory=MagnitudeHistogram)
    ulps: UlpResiduals | None = None

    def add(
        self, task_vector: torch.Tensor, delta: torch.Tensor, half_ulps: torch.Tensor | None
    ) -> None:
        """Take rows of T and of delta, finite fp32, into account; half an ulp of M if known."""
        T, D = task_vector.double(), delta.double()
        residual = T - D
        self.magnitude.add(task_vector)
        self.sums.add(Difference(task_vector, D))
        self.regression.add(D, T)
        self.task_vector.add(T)
        self.delta.add(D)
        self.residual.add(residual)
        narrow = residual.float()
        for name, values in (("task_vector", task_vector), ("delta", delta), ("residual", narrow)):
            self.quantiles[name].add(values)
        self.joint.add(keys(delta), keys(task_vector))
        self.residuals.add(keys(narrow))
        self.nonzero_delta += int(torch.count_nonzero(delta))
        self.same_sign += int((task_vector.sign() * delta > 0).sum())
        if half_ulps is not None:
            self.ulps = self.ulps or UlpResiduals()
            self.ulps.add(residual, half_ulps)

    def merge(self, other: PairStatistics) -> None:
        """Join with another parameter's."""
        self.magnitude.squared_norm += other.magnitude.squared_norm
        self.magnitude.max_abs = max(self.magnitude.max_abs, other.magnitude.max_abs)
        self.magnitude.nonzero += other.magnitude.nonzero
        largest = max(self.sums.difference_max, other.sums.difference_max)
        for each in fields(PairSums):
            joined = getattr(self.sums, each.name) + getattr(other.sums, each.name)
            setattr(self.sums, each.name, joined)
        self.sums.difference_max = largest
        self.regression.merge(other.regression)
        for moments in ("task_vector", "delta", "residual"):
            getattr(self, moments).merge(getattr(other, moments))
            self.quantiles[moments].merge(other.quantiles[moments])
        self.same_sign += other.same_sign
        self.nonzero_delta += other.nonzero_delta
        self.joint.merge(other.joint)
        self.residuals.merge(other.residuals)
        if other.ulps is not None:
            self.ulps = self.ulps or UlpResiduals()
            self.ulps.merge(other.ulps)

    @property
    def task_vector_norm(self) -> float:
        return self.magnitude.norm

    @property
    def delta_norm(self) -> float:
        return math.sqrt(self.sums.delta_squared)

    @property
    def residual_norm(self) -> float:
        """‖T - delta‖."""
        return math.sqrt(self.sums.difference_squared)

    @property
    def cosine(self) -> float | None:
        norms = self.task_vector_norm * self.delta_norm
        return max(-1.0, min(1.0, self.sums.product / norms)) if norms else None

    @property
    def slope_through_origin(self) -> float | None:
        """c that minimises ‖T - c delta‖."""
        return self.sums.product / self.sums.delta_squared if self.sums.delta_squared else None

    @property
    def relative_error(self) -> float | None:
        """‖T - delta‖ / ‖delta‖."""
        return self.residual_norm / self.delta_norm if self.delta_norm else None

    @property
    def snr_db(self) -> float | None:
        """10 log10 of the power of delta over that of T - delta; None where either is zero."""
        sums = self.sums
        if not (sums.delta_squared and sums.difference_squared):
            return None
        return 10 * math.log10(sums.delta_squared / sums.difference_squared)

    def as_json(self) -> dict[str, Any]:
        elements = max(1, self.sums.elements)
        return {
            "elements": self.sums.elements,
            "task_vector_norm": self.task_vector_norm,
            "delta_norm": self.delta_norm,
            "residual_norm": self.residual_norm,
            "cosine_similarity": self.cosine,
            "pearson_correlation": self.regression.pearson,
            "slope": self.regression.slope,
            "intercept": self.regression.intercept,
            "slope_through_origin": self.slope_through_origin,
            "relative_error": self.relative_error,
            "snr_db": self.snr_db,
            "max_absolute_difference": self.sums.difference_max,
            "mean_absolute_difference": self.sums.difference_abs / elements,
            "exact_share": self.sums.exact / elements,
            "same_sign_share": self.same_sign / self.nonzero_delta if self.nonzero_delta else None,
            "residual_in_ulps": self.ulps.as_json() if self.ulps else None,
            "moments": {
                "task_vector": self.task_vector.as_json(),
                "delta": self.delta.as_json(),
                "residual": self.residual.as_json(),
            },
            "quantiles": {name: found.as_json() for name, found in self.quantiles.items()},
        }


@dataclass
class DirectSums:
    """Sums over a second pass, taken about the first pass's results.

    Attributes:
        slope, mean_task_vector, mean_delta: of the first pass.
        unexplained: ‖T - c delta‖^2.
        left_over: <T - c delta, delta>.
        centred_product, centred_task_vector, centred_delta: of T and delta less their means.
    """

    slope: float
    mean_task_vector: float
    mean_delta: float
    unexplained: float = 0.0
    left_over: float = 0.0
    centred_product: float = 0.0
    centred_task_vector: float = 0.0
    centred_delta: float = 0.0

    def add(self, task_vector: torch.Tensor, delta: torch.Tensor) -> None:
        """Take the same rows as the first pass into account."""
        T, D = task_vector.double().flatten(), delta.double().flatten()
        rest = T - self.slope * D
        self.unexplained += float(rest @ rest)
        self.left_over += float(rest @ D)
        T, D = T - self.mean_task_vector, D - self.mean_delta
        self.centred_product += float(T @ D)
        self.centred_task_vector += float(T @ T)
        self.centred_delta += float(D @ D)
