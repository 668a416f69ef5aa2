"""Is T = c * delta for some factor c, within the rounding bounds? Whoever's matmul it was.

Notation as in `taskvec.rounding`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch

from taskvec.bounds import bound_rows, families
from taskvec.certificate import Block, ParameterCertificate
from taskvec.compare import Comparison, ParameterResult
from taskvec.diagnosis.case import Case, lower_formats, merged_rows, wide, worst_row
from taskvec.diagnosis.merges import turned
from taskvec.rounding import FP32, U32, Format
from taskvec.update import Update
from taskvec.updates.dora import Dora
from taskvec.updates.products import LowRank

_NO_INFORMATION = 2.0**-60  # an element with delta below this part of its tolerance tells no factor


class FactorTest:
    """Is T = c * delta for one c, every element within its rounding bound?

    Each element allows an interval of c; [low, high] is what all of them allow.

    Args:
        update: what the adapter does to the parameter.
        format: the format that the merge rounded to.
        stored: dtype of the base's parameter.
        subtracted_format: what W was rounded to before it was subtracted; None: as stored.
        base_format: what W was rounded to before the merge, other than by a recipe.
        transposed: delta is taken the wrong way round.
        tf32: A and B are cut to TF32's significand before the product: "rounded" or "truncated".
        sums: of how many sums, each rounded, the merged weight is the result.
        plain: of DoRA, delta is the s B A beneath it, without the magnitudes.
    """

    def __init__(
        self,
        update: Update,
        format: Format,
        stored: torch.dtype,
        subtracted_format: Format | None,
        *,
        base_format: Format | None = None,
        transposed: bool = False,
        tf32: str | None = None,
        sums: int = 1,
        plain: bool = False,
    ) -> None:
        self.update = update.direction if plain and isinstance(update, Dora) else update
        self.plain = plain
        if isinstance(update, LowRank) and (transposed or tf32):
            A, B = (_to_tf32(factor, tf32) if tf32 else factor for factor in (update.A, update.B))
            self.update = replace(update, A=A, B=B)
            self.update = turned(self.update) if transposed else self.update
        self.tf32 = tf32
        self.format, self.stored = format, stored
        self.subtracted_format, self.base_format = subtracted_format, base_format
        self.transposed, self.sums = transposed, sums
        self.low, self.high = -math.inf, math.inf
        self._size = 0.0

    @property
    def holds(self) -> bool:
        """Some factor fits; but if 0 does, it is not known that anything was added."""
        return self.low <= self.high and not self.low <= 0 <= self.high

    @property
    def vanishes(self) -> bool:
        """Nothing but the rounding of several sums is there, though delta is far larger."""
        return self.sums > 1 and -0.5 < self.low <= 0 <= self.high < 0.5

    @property
    def factor(self) -> float:
        """0 or 1 where that fits, else the middle of the interval."""
        if self.vanishes:
            return 0.0
        return 1.0 if self.allows(1.0) else (self.low + self.high) / 2

    def allows(self, factor: float, slack: float = 0.0) -> bool:
        """Whether a factor fits, give or take a share of it."""
        slack = abs(factor) * (slack + 2.0**-40)  # the latter for the factor's own rounding
        return self.low - slack <= factor <= self.high + slack

    def add(self, block: Block, among: torch.Tensor | None = None) -> bool:
        """Take rows into account, all or some of their elements; False if no factor is left."""
        base, target = block.base.double(), block.task_vector.double()
        if self.base_format is not None:
            base = self.base_format.round(wide(block.base)).double()
            target = target + (block.subtracted.double() - base)
        delta = self.update.exact(block.start, block.stop)
        finite = torch.isfinite(target)
        if among is not None:
            finite &= among
        if not self._size:
            self._size = _size_of(torch.where(finite, target, 0.0), torch.where(finite, delta, 0.0))
        tolerance = self._tolerance(block, delta, base)
        telling = (delta.abs() > tolerance * _NO_INFORMATION) & finite
        if bool((finite & ~telling & (target.abs() > tolerance)).any()):
            self.low, self.high = math.inf, -math.inf
        if bool(telling.any()):
            centre, width = target / delta, tolerance / delta.abs()
            self.low = max(self.low, float(torch.where(telling, centre - width, -math.inf).max()))
            self.high = min(self.high, float(torch.where(telling, centre + width, math.inf).min()))
        return self.low <= self.high

    def _tolerance(self, block: Block, delta: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The bound of the loosest family for an update of the size that T shows."""
        update = self.update
        if isinstance(update, LowRank):
            update = replace(update, scaling=update.scaling * self._size)
        subtracted = self.subtracted_format if self.base_format is None else None
        return self.sums * tolerance(
            update,
            block,
            delta=delta * self._size,
            base=base,
            base_format=subtracted,
            format=self.format,
            stored=self.stored,
        )


def tolerance(
    update: Update,
    block: Block,
    *,
    delta: torch.Tensor,
    base: torch.Tensor,
    base_format: Format | None,
    format: Format,
    stored: torch.dtype,
) -> torch.Tensor:
    """What rounding can do to any merge of an update: `bound_rows` of the loosest family.

    Taken at the larger of the base's and the merged weight, so that it holds wherever on the way
    between the two something was rounded.
    """
    merged = merged_rows(block)
    largest = torch.where(base.abs() > merged.abs(), base, merged)
    bound = bound_rows(
        families(format, stored)[-1],
        update,
        block.start,
        block.stop,
        delta=delta,
        merged=largest,
        base=base,
        base_format=base_format,
        format=format,
    )
    return bound + block.task_vector.double().abs() * U32


def factor_test(case: Case, result: ParameterResult, comparison: Comparison) -> FactorTest | None:
    """The first of some ways of merging for which a factor explains T; None if there is none.

    That nothing is left of an update is the simplest of explanations, where it is one.
    """
    probe = case.probe(result.name, worst_row(comparison))
    tests = [
        test for test in _factor_tests(case, result, comparison.certificate) if test.add(probe)
    ]
    for test in sorted(tests, key=lambda test: not test.vanishes):
        fits = all(test.add(block) for block in case.blocks(result.name))
        if fits and (test.vanishes or test.holds):
            return test
    return None


def _factor_tests(
    case: Case, result: ParameterResult, certificate: ParameterCertificate
) -> list[FactorTest]:
    """From the tightest bounds to the loosest.

    Several sums and TF32 are tested in fp32 only: in a narrow format, rounding covers them.
    """
    stored, format = case.base.tensors[result.name].dtype, certificate.format
    make = functools.partial(
        FactorTest, case.update(result.name), format, stored, certificate.base_format
    )
    tests = [make()]
    update = tests[0].update
    product = isinstance(update, LowRank)
    if isinstance(update, LowRank) and update.stored is None:
        tests.append(make(transposed=True))
    tests += [make(base_format=lower) for lower in lower_formats(format)]
    if isinstance(update, Dora):
        tests.append(make(plain=True))
    if format is FP32:
        tests += [make(tf32=how) for how in ("rounded", "truncated") if product]
        tests += [make(sums=2), make(sums=3)]
    return tests


def misplaced_from(case: Case, result: ParameterResult, comparison: Comparison) -> str | None:
    """The adapted parameter of the same shape whose update T is, within rounding."""
    format, row = comparison.certificate.format, worst_row(comparison)
    for source in case.adapter.parameters:
        if source != result.name and _is_update_of(case, result, source, format, row):
            return source
    return None


def shared_with(case: Case, result: ParameterResult) -> str | None:
    """The adapted parameter whose update T is, of those that are tied to this one in the base."""
    place = case.base.tensors[result.name]
    for source in case.adapter.parameters:
        tied = case.base.tensors[source]
        if (tied.path, tied.offset) == (place.path, place.offset) and _is_update_of(
            case, result, source, case.format_of(result.name), 0
        ):
            return source
    return None


def _is_update_of(
    case: Case, result: ParameterResult, source: str, format: Format, row: int
) -> bool:
    """Whether T is another parameter's update; the block with ``row`` is looked at first."""
    update = case.update(source)
    if update.shape != result.shape:
        return False
    stored = case.base.tensors[result.name].dtype
    test = FactorTest(update, format, stored, case.vector.base_format)
    if not (test.add(case.probe(result.name, row)) and test.holds and test.allows(1.0)):
        return False
    return all(test.add(block) for block in case.blocks(result.name)) and test.allows(1.0)


def _size_of(target: torch.Tensor, delta: torch.Tensor) -> float:
    """About how many times delta T is, and at least once."""
    squared = float((delta * delta).sum())
    product = float((target * delta).sum())
    return max(1.0, abs(product / squared)) if squared else 1.0


def _to_tf32(factor: torch.Tensor, how: str) -> torch.Tensor:
    """An fp32 tensor with 10 of its 23 stored significand bits, as a tensor core takes it in."""
    bits = factor.contiguous().view(torch.int32)
    if how == "rounded":  # to nearest, ties away from zero
        bits = bits + (1 << 12)
    return (bits & ~((1 << 13) - 1)).view(torch.float32)
