"""Were the weights themselves scaled, and not the update alone?

As a whole, M = a W + b delta: decayed, averaged with weights that do not add up to 1, interpolated
on a sphere (SLERP), or stored without the base (a = 0). Or line by line, M = (W + delta) diag(s):
as SmoothQuant (arXiv 2211.10438, section 4) and AWQ (arXiv 2306.00978, section 3.2) fold the scales
of activations into them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from taskvec.certificate import Block
from taskvec.compare import ParameterResult
from taskvec.diagnosis.case import Case, merged_rows
from taskvec.header import row_shape
from taskvec.rounding import U32, half_ulp, rounding_error

_LEAST = 16  # elements of a line, or of a vector, from which a factor is taken
_SIGMAS = 5.0  # of a factor's error
_ROUNDINGS = 8  # of fp32 arithmetic on the way
_SAME, _MOST = 1e-6, 0.5
_INDEPENDENT = 1e-6  # of the product of two squares: less, and W and delta are one direction


@dataclass(frozen=True)
class Rescaled:
    """How the weights were scaled.

    Attributes:
        lines: "rows" or "columns" that have a factor each; None: all have one.
        of_base, of_delta: a and b; of lines, the least and the greatest factor.
    """

    lines: str | None
    of_base: float
    of_delta: float


def rescaled(case: Case, result: ParameterResult) -> Rescaled | None:
    """The factors that explain every element of a parameter up to rounding, if some do."""
    if result.elements < _LEAST or result.task_vector.non_finite:
        return None
    for fit in _Sums(case, result).fits():
        if fit.tells and _explains(case, result, fit):
            of_base, of_delta = fit.of_base, fit.of_delta
            if fit.lines is None:
                return Rescaled(None, float(of_base), float(of_delta))
            return Rescaled(fit.lines, float(of_base.min()), float(of_base.max()))
    return None


def rescaled_alike(case: Case, result: ParameterResult, by: float) -> Rescaled | None:
    """The same for a vector that the adapter leaves alone, which has too few elements to tell.

    Args:
        by: the factor of other parameters.
    """
    factor, none = torch.tensor(by).double(), torch.zeros(()).double()
    factor, none = factor.to(case.device), none.to(case.device)
    doubt = (factor - 1).abs() / (2 * _SIGMAS)
    if _explains(case, result, _Fit(None, factor, none, doubt, none)):
        return Rescaled(None, by, 1.0)
    return None


@dataclass(frozen=True)
class _Fit:
    """Factors by least squares: one, or (rows, 1) or (columns,) of them, float64.

    Attributes:
        base_error, delta_error: their standard errors, if all of what is left is rounding.
    """

    lines: str | None
    of_base: torch.Tensor
    of_delta: torch.Tensor
    base_error: torch.Tensor
    delta_error: torch.Tensor

    @property
    def tells(self) -> bool:
        """The base, or most of its lines, have a factor that is not 1."""
        least = (_SIGMAS * self.base_error).clamp_min(_SAME)
        differ = ((self.of_base - 1).abs() > least).double().mean()
        return float(differ) >= _MOST


class _Sums:
    """What the least-squares factors of a parameter follow from, in one pass over it."""

    def __init__(self, case: Case, result: ParameterResult) -> None:
        self.adapted = result.comparison is not None
        format = case.format_of(result.name)
        rows, of_all = [], torch.zeros(7, dtype=torch.float64, device=case.device)
        self._columns = torch.zeros(
            3, math.prod(row_shape(result.shape)), device=case.device
        ).double()
        for block in case.blocks(result.name):
            base, delta, merged = _matrices(case, result, block)
            noise, total = half_ulp(merged, format) ** 2 / 3, base + delta
            pairs = (base, base), (base, delta), (delta, delta), (merged, base), (merged, delta)
            noises = noise * base**2, noise * delta**2
            of_all += torch.stack([*((x * y).sum() for x, y in pairs), *(n.sum() for n in noises)])
            products = torch.stack([merged * total, total * total, noise * total**2])
            rows.append(products.sum(2))
            self._columns += products.sum(1)
        self._of_all, self._rows = of_all, torch.cat(rows, 1)

    def fits(self) -> Iterator[_Fit]:
        """The base left out; a factor of all of it; of columns, of rows."""
        ww, wd, dd, mw, md, noise_w, noise_d = self._of_all
        one, zero = torch.ones_like(ww), torch.zeros_like(ww)
        determinant = ww * dd - wd * wd
        if self.adapted:
            yield _Fit(None, zero, one, zero, zero)
        if not self.adapted and ww > 0:
            yield _Fit(None, mw / ww, one, noise_w.sqrt() / ww, zero)
        elif determinant > _INDEPENDENT * ww * dd:
            a, b = (mw * dd - md * wd) / determinant, (md * ww - mw * wd) / determinant
            error_a = (noise_w / ww * dd / determinant).sqrt()
            error_b = (noise_d / dd * ww / determinant).sqrt()
            yield _Fit(None, a, b, error_a, error_b)
        if min(self._rows.shape[1], self._columns.shape[1]) >= _LEAST:
            for lines, sums in (("columns", self._columns), ("rows", self._rows)):
                product, square, noise = sums[:, :, None] if lines == "rows" else sums
                factor = torch.where(square > 0, product / square, 1.0)
                error = torch.where(square > 0, noise.sqrt() / square, 0.0)
                yield _Fit(lines, factor, factor, error, torch.zeros_like(error))


def _explains(case: Case, result: ParameterResult, fit: _Fit) -> bool:
    """Whether every element is within rounding of a W + b delta."""
    format = case.format_of(result.name)
    for block in case.probe_first(result.name):

        def of_rows(factor: torch.Tensor, block: Block = block) -> torch.Tensor:
            return factor[block.start : block.stop] if factor.ndim == 2 else factor

        base, delta, merged = _matrices(case, result, block)
        expected = of_rows(fit.of_base) * base + of_rows(fit.of_delta) * delta
        doubted = base + delta if fit.lines else base
        allowed = _SIGMAS * of_rows(fit.base_error) * doubted.abs()
        allowed += _SIGMAS * of_rows(fit.delta_error) * delta.abs()
        allowed += rounding_error(merged, format)
        allowed += _ROUNDINGS * U32 * (base.abs() + delta.abs() + merged.abs())
        if not bool(((merged - expected).abs() <= allowed).all()):
            return False
    return True


def _matrices(
    case: Case, result: ParameterResult, block: Block
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of W, of delta (zero where there is none) and of M, as matrices in float64."""
    base, merged = block.base.double(), merged_rows(block)
    if block.merged is None:  # beside a power of two, what the rounding of T does would count
        merged = case.format_of(result.name).round(merged)
    delta = torch.zeros_like(base)
    if result.comparison is not None:
        delta = case.update(result.name).exact(block.start, block.stop)
    length = base.shape[0]
    return base.reshape(length, -1), delta.reshape(length, -1), merged.reshape(length, -1)
