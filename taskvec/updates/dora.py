"""DoRA: the weight's direction gets a low-rank update, its magnitude is learned by itself.

M = diag(m / ‖W + s B A‖) (W + s B A), the norm over the inputs of each output (Liu et al., arXiv
2402.09353, equation 5); so the change depends on the base. The order of the roundings is that of
PEFT's ``DoraLinearVariant.merge_unsafe`` and ``DoraLinearLayer.get_weight_norm``.

The norms come first, in one pass over the base for each way of computing them: of a parameter that
is stored (in, out), every row has a part of every norm.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from typing import Any

import torch

from taskvec.bounds import Family, delta_error, gamma
from taskvec.cli import UserError
from taskvec.header import row_shape
from taskvec.rounding import U32, Format, Recipe, rounding_error
from taskvec.update import Update
from taskvec.updates.products import LowRank
from taskvec.updates.replaced import RowReader

_PIECE_ELEMENTS = 1 << 22  # of the base at a time, in a pass over it
_TURNED_ELEMENTS = 1 << 24  # where every piece is a pass: 9 of them for StarCoder2-3B's embedding


@dataclass(frozen=True)
class Dora(Update):
    """A low-rank update whose outputs are scaled to the learned magnitudes.

    Attributes:
        parameter: the parameter's name in the base.
        direction: s B A.
        m: (out,) fp32, the magnitudes.
        base: reads rows of W.
        scaling: s.
    """

    parameter: str
    direction: LowRank
    m: torch.Tensor
    base: RowReader
    scaling: float
    kind: str = "DoRA"
    _kept: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.direction.shape

    def exact(self, start: int, stop: int) -> torch.Tensor:
        base = self.base(start, stop).double()
        return self._scaled(base, start, stop, None) - base

    def merged(
        self, recipe: Recipe, base: torch.Tensor, start: int, stop: int, format: Format
    ) -> torch.Tensor:
        used = self._as_used(recipe, format)
        delta = used.direction.delta(start, stop, prescaled=recipe.prescaled)
        total = _total(recipe, base, delta, format)
        factor = used.m.to(total.dtype) / self._norm(recipe, format)
        return (self._spread(factor, start, stop) * total).to(format.dtype)

    def recipe_key(self, recipe: Recipe, format: Format, stored: torch.dtype) -> Hashable:
        base, factors, delta, prescaled = self.direction.recipe_key(recipe, format, stored)
        # PEFT's safe_merge does not round the delta of DoRA; without autocast all of it is rounded.
        return base, factors, factors and delta, prescaled

    def variations(
        self,
        recipe: Recipe,
        base: torch.Tensor,
        start: int,
        stop: int,
        format: Format,
        exact: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        used, rounding = self._as_used(recipe, format), format if recipe.round_base else None
        wide = _wide(base, rounding).double()
        factor = used.m.double() / used._exact_norm(rounding)
        total = format.round(wide + used.direction.exact(start, stop))
        return (
            used._scaled(wide, start, stop, rounding).to(format.dtype),
            (self._spread(factor, start, stop) * total).to(format.dtype),
        )

    def interval(
        self,
        recipe: Recipe,
        start: int,
        stop: int,
        *,
        base: torch.Tensor,
        format: Format,
        where: torch.Tensor,
        rounded_anywhere: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        used, rounding = self._as_used(recipe, format), format if recipe.round_base else None
        wide = _wide(base, rounding).double()
        center = used._scaled(wide, start, stop, rounding)
        family = Family("", False, rounded_anywhere or recipe.in_format, False)
        reach = used.error(family, start, stop, delta=center - wide, base=wide, format=format)
        reach += (center.abs() + reach) * U32 + used.underflow()
        center, reach = center[where], reach[where]
        return (
            (center - reach).float().to(format.dtype),
            (center + reach).float().to(format.dtype),
        )

    def error(
        self,
        family: Family,
        start: int,
        stop: int,
        *,
        delta: torch.Tensor,
        base: torch.Tensor,
        format: Format,
    ) -> torch.Tensor:
        """The error of the sum is scaled by the factor; that of the factor scales the weight.

        |f^ V^ - f V| <= |f| (1 + phi) |V^ - V| + phi |f V|, where V = W + s B A, f = m / ‖V‖, and
        phi bounds the relative error of f^ (`_factor_error`).
        """
        of_sum = self.sum_error(family, start, stop, base=base, format=format)
        relative = self._factor_error(family, format)
        factor = self.m.double().abs() / self._exact_norm(None)
        of_sum *= self._spread(factor * (1 + relative), start, stop)
        of_sum += (base + delta).abs_().mul_(self._spread(relative, start, stop))
        return of_sum.to(base.dtype)

    def sum_error(
        self, family: Family, start: int, stop: int, *, base: torch.Tensor, format: Format
    ) -> torch.Tensor:
        """How far V^ can be from V = W + s B A: e of the proof, rows in float64."""
        used, direction = self.direction, self.direction.exact(start, stop)
        of_sum = delta_error(used, start, stop)
        if family.round_factors:
            used = used.rounded_factors(format.dtype)
            of_sum = delta_error(used, start, stop)
            of_sum += (used.exact(start, stop) - direction).abs_()
        if family.round_delta:
            of_sum += rounding_error(direction.abs() + of_sum, format)
        wide = base.double()
        if family.round_base:
            of_sum += rounding_error(wide, format)
        size = wide.abs() + direction.abs_() + of_sum
        of_sum += size * U32
        if family.round_delta:
            of_sum += rounding_error(size + of_sum, format)
        return of_sum

    def moved_by(
        self,
        of_sum: torch.Tensor,
        of_norm: torch.Tensor,
        of_m: torch.Tensor,
        total: torch.Tensor,
        start: int,
    ) -> torch.Tensor:
        """How far f V moves at most where V, its norms and m move by no more than given.

        Args:
            of_sum: rows of a bound on what V moves by, from row ``start`` on.
            of_norm, of_m: the same of ‖V‖ and of m, (out,).
            total: rows of f V.
        """
        norm, m, stop = self._exact_norm(None), self.m.double().abs(), start + of_sum.shape[0]
        relative = (1 + of_m / m) / (1 - of_norm / norm).clamp_min(0.0) - 1
        factor = self._spread(m / norm * (1 + relative), start, stop)
        return factor * of_sum + self._spread(relative, start, stop) * total.abs()

    def base_error(
        self, family: Family, base: torch.Tensor, base_format: Format | None, format: Format
    ) -> torch.Tensor | None:
        # Rounding W in the merge is in `error`, and does not cancel that of the subtraction.
        return None if base_format is None else rounding_error(base, base_format)

    def underflow(self) -> float:
        """The sum can lose as much as LoRA's, and the factor makes more of it."""
        factor = float((self.m.double().abs() / self._exact_norm(None)).max())
        return self.direction.underflow() * max(1.0, 2 * factor)

    # -- norms and factors, one for each output ---------------------------------------

    def _factor_error(self, family: Family, format: Format) -> torch.Tensor:
        """phi: relative error of m / ‖V‖ as computed, (out,) float64; infinite where none holds.

        ‖V^‖ is off by ‖V^ - V‖ at most, bounded over the whole output, and by the roundings of a
        sum of n squares: each goes through n of them at most, and the root halves that.
        """
        exact, used, m = self._exact_norm(None), self.direction, self.m.double()
        product = _row_norms(used.B, used.A, used.scaling)
        off, mu = gamma(used.rank + 2) * product, torch.zeros_like(m)
        if family.round_factors:
            rounded = used.rounded_factors(format.dtype)
            off = gamma(used.rank + 2) * _row_norms(rounded.B, rounded.A, used.scaling)
            off += _row_norms(rounded.B - used.B, rounded.A, used.scaling)
            off += _row_norms(used.B, rounded.A - used.A, used.scaling)
            mu = ((m.to(format.dtype).double() - m) / m).abs_().nan_to_num_(0.0)
        inputs, last = used.A.shape[1], U32
        weight = exact + product  # ‖W‖ <= ‖V‖ + ‖s B A‖
        smallest = sqrt(inputs) * format.smallest_half_ulp
        unit = (format.unit_roundoff + U32) * (1 + U32)
        if family.round_base:
            off += unit * weight + smallest
        if family.round_delta:
            off += unit * (product + off) + smallest
            last = unit
        off += U32 * (weight + product + off)
        if family.round_delta:
            off += unit * (weight + product + off) + smallest
        of_squares = gamma(inputs) / (2 - gamma(inputs)) + inputs * 2.0**-149 / exact**2
        below = (1 - off / exact) * (1 - of_squares) * (1 - last) ** 2
        phi = (1 + mu) * (1 + last) / below - 1
        return torch.where(below > 0, phi, torch.inf)

    def _scaled(
        self, wide: torch.Tensor, start: int, stop: int, rounding: Format | None
    ) -> torch.Tensor:
        """Rows of diag(m / ‖V‖) V in float64, V = W + s B A, from rows of W (rounded first)."""
        factor = self.m.double() / self._exact_norm(rounding)
        return self._spread(factor, start, stop) * (wide + self.direction.exact(start, stop))

    def _as_used(self, recipe: Recipe, format: Format) -> Dora:
        """With everything rounded that a recipe rounds before it computes."""
        if not recipe.round_factors:
            return self
        if format not in self._kept:
            self._kept[format] = replace(
                self,
                direction=self.direction.rounded_factors(format.dtype),
                m=format.round(self.m),
                _kept={},
            )
        used: Dora = self._kept[format]
        return used

    def _norm(self, recipe: Recipe, format: Format) -> torch.Tensor:
        """‖W + D‖ of each output as a recipe computes it, in the bits of PEFT: (out,)."""
        key = self.recipe_key(recipe, format, torch.float64), format
        if key not in self._kept:
            direction = self._as_used(recipe, format).direction
            self._kept[key] = torch.cat(
                [
                    torch.linalg.norm(_total(recipe, base, delta, format), dim=1)
                    for base, delta in (
                        (base, _by_output(direction).delta(low, high, prescaled=recipe.prescaled))
                        for low, high, base in self._outputs()
                    )
                ]
            )
        norm: torch.Tensor = self._kept[key]
        return norm

    def _exact_norm(self, rounding: Format | None) -> torch.Tensor:
        """‖W + s B A‖ of each output, (out,) float64; of the base rounded first, if asked for.

        Raises:
            UserError: one of them is zero, so that the output has no direction.
        """
        key = "exact", rounding
        if key not in self._kept:
            direction = _by_output(self.direction)
            norms = torch.cat(
                [
                    torch.linalg.norm(
                        _wide(base, rounding).double() + direction.exact(low, high), dim=1
                    )
                    for low, high, base in self._outputs()
                ]
            )
            if not bool(norms.all()):
                raise UserError(
                    f"{self.parameter}: output {int((norms == 0).nonzero()[0])} of W + s B A is "
                    "zero, so DoRA cannot scale it; is this the base that it was trained on?"
                )
            self._kept[key] = norms
        norm: torch.Tensor = self._kept[key]
        return norm

    def _outputs(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The base, some outputs at a time: (first, last + 1, W (outputs, inputs) as stored).

        Of a parameter that is stored (in, out) it is read again for every piece, and the piece is
        turned in its strides only: PEFT's norm sums a turned matrix in another order.
        """
        outputs, inputs = self.direction.B.shape[0], self.direction.A.shape[1]
        size = _TURNED_ELEMENTS if self.direction.transposed else _PIECE_ELEMENTS
        step = max(1, size // inputs)
        rows = prod(self.shape[: len(self.shape) - len(row_shape(self.shape))])
        for low in range(0, outputs, step):
            high = min(low + step, outputs)
            if not self.direction.transposed:
                each = rows // outputs  # more than one row where kernels are one-dimensional
                yield low, high, self.base(low * each, high * each).reshape(high - low, inputs)
                continue
            block = max(1, _PIECE_ELEMENTS // outputs)
            pieces = [
                self.base(start, min(start + block, inputs))[:, low:high]
                for start in range(0, inputs, block)
            ]
            yield low, high, torch.cat(pieces).T

    def _spread(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """One value for each output, (out,), in a shape that multiplies rows of the parameter."""
        if self.direction.transposed:
            return values
        shape = row_shape(self.shape)
        each = prod(self.shape[: len(self.shape) - len(shape)]) // len(values)
        chosen = values[torch.arange(start, stop, device=values.device) // each]
        return chosen.reshape(-1, *[1] * len(shape))


def _by_output(direction: LowRank) -> LowRank:
    """The same matrix with a row for each output."""
    return replace(direction, transposed=False, stored=None)


def _wide(base: torch.Tensor, rounding: Format | None) -> torch.Tensor:
    """W in fp32, or float64 if it is, rounded to a format first if one is given."""
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    return rounding.round(wide) if rounding else wide


def _total(recipe: Recipe, base: torch.Tensor, delta: torch.Tensor, format: Format) -> torch.Tensor:
    """W + D as a recipe adds them: fp32 (float64 for a float64 base), or the format's dtype."""
    wide = _wide(base, format if recipe.round_base else None)
    if recipe.in_format:
        return (wide + format.round(delta)).to(format.dtype)
    return wide + delta


def _row_norms(B: torch.Tensor, A: torch.Tensor, scaling: float) -> torch.Tensor:
    """A bound on the norm of each row of |s| |B| |A|: |s| sum_k |B_ik| ‖A_k‖, (out,) float64."""
    norms: torch.Tensor = torch.linalg.norm(A.double(), dim=1)
    return abs(scaling) * (B.double().abs() @ norms)
