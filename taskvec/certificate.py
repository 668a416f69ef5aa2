"""The certificate: was this parameter merged as base + adapter, up to the rounding of its format?

`ParameterCertificate` looks at one block of rows of one parameter at a time and keeps only scalars
and two small histograms. Which recipes reproduce every bit, and whether every element of T - delta
lies within its bound, are both answered in that one pass.

It runs over every element of a model, so it makes few passes, and those in fp32 where the bound
allows (`bounds.bound_rows`). What is needed only when something is wrong is computed only then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from taskvec.bounds import Family, bound_rows, families
from taskvec.difference import Difference, count_differing, count_nonzero, differing
from taskvec.recipes import RecipeSearch, RecipeTally
from taskvec.rounding import FP32, RECIPES, U32, Format, all_finite, half_ulp, loses, subtract_rows
from taskvec.update import Update

ULP_BINS, ULP_RANGE = 120, 3.0  # histograms of |T - delta| and of its bound, in ulps of M
HISTOGRAM_ELEMENTS = 1 << 18  # of each parameter, in evenly spaced blocks


@dataclass(frozen=True)
class Block:
    """Rows of one parameter, all on one device.

    Attributes:
        start, stop: which rows.
        base: W as stored.
        subtracted: what T was formed with: W, or W rounded first, as fp32 or wider.
        task_vector: T, fp32.
        merged: M in any float dtype; None where only T is known.
    """

    start: int
    stop: int
    base: torch.Tensor
    subtracted: torch.Tensor
    task_vector: torch.Tensor
    merged: torch.Tensor | None = None


@dataclass(frozen=True)
class Element:
    """One element of a parameter: where it is and what was found there (floats)."""

    row: int
    column: int
    task_vector: float
    delta: float
    bound: float


@dataclass
class FamilyTally:
    """How a parameter fares against the bound of one family of recipes."""

    family: Family
    violations: int = 0
    max_ratio: float = 0.0
    worst: Element | None = None
    violating_rows: set[int] = field(default_factory=set)


class ParameterCertificate:
    """Accumulates the certificate of one parameter over its blocks.

    Args:
        update: what the adapter does to it.
        format: the format that the merged parameter is taken to be stored in.
        stored: dtype of the base's parameter.
        base_format: what W was rounded to before it was subtracted; None: as stored.
        elements: of the parameter.

    Attributes:
        search: how far each distinct recipe reproduces it.
        non_finite: elements of T that are NaN or infinite.
        overflowed: those of them where W + delta itself is beyond the format.
        changed_by_update, lost: elements whose update is not zero, and those of them whose merged
            value is the base's own all the same.
        ulp_histogram, bound_histogram: counts of |T - delta| and of its bound, in ulps of M, of
            all elements, or of evenly spaced blocks with about `HISTOGRAM_ELEMENTS`; `ULP_BINS`
            equal bins over [0, `ULP_RANGE`) and one for all beyond.
    """

    def __init__(
        self,
        update: Update,
        format: Format,
        stored: torch.dtype,
        *,
        base_format: Format | None,
        elements: int,
    ) -> None:
        self.update, self.format, self.elements = update, format, elements
        self.base_format = base_format
        self.search = RecipeSearch(update, format, stored, elements=elements)
        self._families = [FamilyTally(family) for family in families(format, stored)]
        self._level = 0  # index of the tightest family without a violation so far
        # Without an update, T is zero: M is what was subtracted, or W lost nothing to the format.
        self._zero_unmoved = base_format is format or (
            base_format is None and not loses(stored, format)
        )
        self._seen = self._sampled = 0
        self.non_finite = 0
        self.overflowed = 0
        self.lost = 0
        self.changed_by_update = 0
        self.ulp_histogram = torch.zeros(ULP_BINS + 1, dtype=torch.int64)
        self.bound_histogram = torch.zeros(ULP_BINS + 1, dtype=torch.int64)

    def conclude(self) -> None:
        """Let go of the adapter's factors once all blocks were seen: only what was found stays."""
        del self.update, self.search.update

    @property
    def tally(self) -> FamilyTally:
        """Against the tightest family that holds, or the loosest of all if none does."""
        return self._families[self._level]

    @property
    def recipes(self) -> list[RecipeTally]:
        """How far each distinct recipe reproduces it."""
        return self.search.tallies

    @property
    def best_recipe(self) -> RecipeTally:
        """The recipe with the fewest elements that it does not reproduce."""
        return self.search.best

    @property
    def reproduced_by(self) -> list[str]:
        """Names of the recipes that give every bit."""
        return self.search.reproduced_by

    def tally_of(self, recipe: str) -> RecipeTally:
        """How far the recipe of that name reproduces it."""
        return next(tally for tally in self.search.tallies if recipe in tally.names)

    @property
    def violations(self) -> int:
        """Elements out of bounds, NaN or infinite."""
        return self.tally.violations + self.non_finite

    @property
    def isolated(self) -> int:
        """Elements that stand out from a recipe which gives nearly all others bit for bit."""
        return self.search.isolated

    def add(self, block: Block, delta: torch.Tensor, difference: Difference | None = None) -> bool:
        """Take one block into account.

        Args:
            block: the rows.
            delta: the same rows of the update in float64.
            difference: of the two, where it is at hand.

        Returns:
            False if these rows cannot have been stored in ``format``, whatever was merged.
        """
        if not delta.numel():
            return True
        difference = difference or Difference(block.task_vector, delta)
        finite = self._set_non_finite_aside(block, delta, difference)
        merged = self._merged(finite)
        if merged is None:
            return False
        sampled = self._is_sampled(delta.numel())
        self.search.add(block, delta, sampled=sampled)
        self._count_lost(finite, difference)
        error = difference.error.float()
        bound = self._check_bounds(finite, difference, merged, error)
        if sampled:
            half = half_ulp(merged, self.format)
            self.ulp_histogram += _histogram(error.div_(half))
            self.bound_histogram += _histogram(bound.div_(half))
        return True

    def _is_sampled(self, elements: int) -> bool:
        """Whether the next block is one of those, evenly spaced, that are looked at for figures."""
        sampled = self._sampled * self.elements <= self._seen * HISTOGRAM_ELEMENTS
        self._seen += elements
        self._sampled += elements if sampled else 0
        return sampled

    def _set_non_finite_aside(
        self, block: Block, delta: torch.Tensor, difference: Difference
    ) -> Block:
        """Count what is not finite, and replace it by zeros with a zero update."""
        bad = difference.non_finite
        if bad is None:
            return block
        beyond = (block.base.double() + delta).abs() > self.format.largest
        self.non_finite += int(bad.sum())
        self.overflowed += int((beyond & bad).sum())
        base, subtracted = (rows.masked_fill(bad, 0.0) for rows in (block.base, block.subtracted))
        merged = None if block.merged is None else block.merged.masked_fill(bad, 0.0)
        return Block(block.start, block.stop, base, subtracted, difference.task_vector, merged)

    def _merged(self, block: Block) -> torch.Tensor | None:
        """M in fp32; where only W and T are known, the number of the format that is next to W + T.

        None where the next one is not as close as the rounding of T allows.
        """
        if block.merged is not None:
            return block.merged.float()
        wide = block.subtracted + block.task_vector
        if self.format is FP32:
            return wide.float()
        stored = wide.to(self.format.dtype)
        again = subtract_rows(stored, block.subtracted)
        if count_differing(again, block.task_vector):
            # M is within u32 |T| of W + T; the sum and its rounding to the format move it by less
            # than 2 u32 |W + T|.
            reach = (block.task_vector.abs() + 2 * wide.abs()) * U32
            if bool(((stored.to(wide.dtype) - wide).abs() > reach).any()):
                return None
        return stored.float()

    def _count_lost(self, block: Block, difference: Difference) -> None:
        """Elements whose update is not zero, yet whose merged value is the base's own."""
        touched = difference.nonzero_delta
        self.changed_by_update += touched
        if not touched:
            return
        if self._zero_unmoved and touched == difference.elements:
            self.lost += touched - difference.nonzero
            return
        moved = block.task_vector
        if not self._zero_unmoved:
            unmoved = subtract_rows(block.base.to(self.format.dtype), block.subtracted)
            moved = differing(unmoved, moved)
        if touched < difference.elements:
            moved = moved.bool() | (difference.delta == 0)
        self.lost += difference.elements - count_nonzero(moved)

    def _check_bounds(
        self, block: Block, difference: Difference, merged: torch.Tensor, error: torch.Tensor
    ) -> torch.Tensor:
        """Count violations of |T - delta|, fp32; returns its bound, fp32."""
        base = (block.subtracted if self.base_format is None else block.base).float()
        while True:
            tally = self.tally
            bound = bound_rows(
                tally.family,
                self.update,
                block.start,
                block.stop,
                delta=difference.delta,
                merged=merged,
                moved=difference.size,
                base=base,
                base_format=self.base_format,
                format=self.format,
                recovered=block.merged is None,
            )
            ratio = error / bound
            largest = float(ratio.amax())
            if not (math.isfinite(largest) and all_finite(bound)):
                ratio = _where_bounded(ratio, bound, error)
                largest = float(ratio.amax())
            if largest <= 1 or self._level + 1 == len(self._families):
                break
            self._level += 1
            # What was within a tighter bound so far is so within this one.
            self.tally.max_ratio, self.tally.worst = tally.max_ratio, tally.worst
        self._note_ratio(tally, block, difference.delta, bound, ratio, largest)
        return bound

    def _note_ratio(
        self,
        tally: FamilyTally,
        block: Block,
        delta: torch.Tensor,
        bound: torch.Tensor,
        ratio: torch.Tensor,
        largest: float,
    ) -> None:
        if largest > 1:
            outside = ratio > 1
            tally.violations += int(outside.sum())
            rows = outside.flatten(1).any(1) if outside.ndim > 1 else outside
            rows = rows.nonzero().flatten() + block.start
            tally.violating_rows.update(rows.tolist())
        if tally.worst is None or largest > tally.max_ratio:
            rows = ratio.reshape(ratio.shape[0] if ratio.ndim else 1, -1)
            row = int(rows.amax(1).argmax())
            column = int(rows[row].argmax())  # by rows: argmax takes long over many elements
            place = row * rows.shape[1] + column
            tally.max_ratio = largest
            tally.worst = Element(
                row=row + block.start,
                column=column,
                task_vector=float(block.task_vector.flatten()[place]),
                delta=float(delta.flatten()[place]),
                bound=float(bound.flatten()[place]),
            )


def _where_bounded(ratio: torch.Tensor, bound: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """|T - delta| against its bound where one of them overflows fp32.

    A bound that is infinite certifies nothing, and what it is the bound of (a factor or a product
    beyond the format) would have left no finite M: there any difference is a violation.
    """
    open_ended = ~torch.isfinite(bound) | ~torch.isfinite(error)
    return ratio.masked_fill(open_ended, FP32.largest).masked_fill(error == 0, 0.0)


def _histogram(half_ulps: torch.Tensor) -> torch.Tensor:
    """Counts in `ULP_BINS` equal bins over [0, `ULP_RANGE`) ulps, and one for all beyond."""
    bins = half_ulps.mul_(ULP_BINS / ULP_RANGE / 2).clamp_(max=ULP_BINS).to(torch.int16)
    return torch.bincount(bins.flatten(), minlength=ULP_BINS + 1).cpu()


def common_recipes(certificates: Sequence[ParameterCertificate]) -> list[str]:
    """Names of the recipes that reproduce every bit of every parameter."""
    if not certificates:
        return []
    return [
        recipe.name
        for recipe in RECIPES
        if all(recipe.name in certificate.reproduced_by for certificate in certificates)
    ]
