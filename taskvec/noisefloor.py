"""Where the singular values of rounding noise end.

A merged LoRA's task vector is T = delta + E: delta has rank r, and E is what rounding left, which
behaves like a random matrix. So T has r singular values that mean something and a bulk of others
below the edge of E's spectrum, and that edge follows from the number format: an error of rounding
to the nearest multiple of an ulp is spread evenly over [-ulp/2, ulp/2], with variance ulp^2 / 12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


class NoiseProfile:
    """The variances of independent errors on the elements of a matrix, by row and by column.

    Args:
        shape: (m, n).
        device: of the variances to come.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(shape[0], dtype=torch.float64, device=device)
        self.columns = torch.zeros(shape[1], dtype=torch.float64, device=device)

    def add(self, start: int, variances: torch.Tensor) -> None:
        """Take rows (b, n) float64 from row ``start`` on into account; may be added up."""
        self.rows[start : start + variances.shape[0]] += variances.sum(1)
        self.columns += variances.sum(0)

    def floor(self) -> NoiseFloor:
        m, n = self.rows.numel(), self.columns.numel()
        rms = math.sqrt(float(self.rows.sum()) / (m * n)) if m * n else 0.0
        widest = math.sqrt(_largest(self.rows)) + math.sqrt(_largest(self.columns))
        return NoiseFloor(rms, rms * (math.sqrt(m) + math.sqrt(n)), widest)


@dataclass(frozen=True)
class NoiseFloor:
    """How large the singular values of noise alone are.

    Attributes:
        rms: eps, the root mean square of one error.
        edge: eps * (sqrt(m) + sqrt(n)), where the spectrum of errors of one size ends (Bai and
            Yin, Ann. Probab. 21 (1993); Vershynin, arXiv 1011.3027, theorem 5.31).
        threshold: the largest row's norm plus the largest column's, of the errors' standard
            deviations: the leading terms of a bound on E‖noise‖_2 when errors differ in size
            (Bandeira and van Handel, arXiv 1408.6185, theorem 1.1). Never below the edge.
    """

    rms: float
    edge: float
    threshold: float

    def plus(self, other: NoiseFloor) -> NoiseFloor:
        """The floor of two independent noises together; of the threshold, a bound."""
        return NoiseFloor(
            math.hypot(self.rms, other.rms),
            math.hypot(self.edge, other.edge),
            self.threshold + other.threshold,
        )


def rounding_variance(half_ulps: torch.Tensor, spacing: torch.Tensor | None = None) -> torch.Tensor:
    """The variance of the error of rounding to multiples of an ulp, element by element, float64.

    Args:
        half_ulps: half the distance q of the numbers that are rounded to.
        spacing: half the distance g of the numbers that are rounded; infinitely fine if None.

    Returns:
        q^2 / 12 * (1 + 2 (g / q)^2), the mean of the squares of 0, g, 2g, ... up to q/2; and 0
        where g >= q, because then nothing is rounded.
    """
    even = half_ulps.double() ** 2 / 3
    if spacing is None:
        return even
    return torch.where(spacing < half_ulps, even + spacing**2 * (2 / 3), 0.0)


def _largest(values: torch.Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
