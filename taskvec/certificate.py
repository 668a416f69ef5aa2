"""The certificate: was this parameter merged as base + adapter, up to the rounding of its format?

`ParameterCertificate` looks at one block of rows of one parameter at a time and keeps only scalars
and two small histograms. Which recipes reproduce every bit, and whether every element of T - delta
lies within its bound, are both answered in that one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from taskvec.adapter import Update
from taskvec.rounding import (
    FP32,
    RECIPES,
    Family,
    Format,
    Recipe,
    bound_rows,
    families,
    half_ulp,
    merge_rows,
    recipe_delta,
    subtract_rows,
)

ULP_BINS, ULP_RANGE = 120, 3.0  # histograms of |T - delta| and of its bound, in ulps of M

# A recipe that misses more than this share of a tensor is not how the tensor came about.
_NEAR_MISS = 0.01


@dataclass(frozen=True)
class Block:
    """Rows of one parameter, all on one device.

    Attributes:
        start, stop: which rows.
        base: W as stored.
        subtracted: what T was formed with: W, or W rounded first, as fp32 or wider.
        task_vector: T, fp32.
        merged: M in float64; None where only T is known.
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


@dataclass
class RecipeTally:
    """How far a group of recipes with equal results reproduces a parameter."""

    recipe: Recipe
    names: tuple[str, ...]
    mismatches: int = 0
    largest_mismatch_ulps: float = 0.0
    abandoned: bool = False


class ParameterCertificate:
    """Accumulates the certificate of one parameter over its blocks.

    Args:
        update: what the adapter does to it.
        format: the format that the merged parameter is taken to be stored in.
        stored: dtype of the base's parameter.
        base_format: what W was rounded to before it was subtracted; None: as stored.
        elements: of the parameter.
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
        self.recipes = _distinct_recipes(format, stored, update.scaling)
        self._families = [FamilyTally(family) for family in families(format, stored)]
        self._level = 0  # index of the tightest family without a violation so far
        self.non_finite = 0
        self.lost = 0
        self.changed_by_update = 0
        self.ulp_histogram = torch.zeros(ULP_BINS + 1, dtype=torch.int64)
        self.bound_histogram = torch.zeros(ULP_BINS + 1, dtype=torch.int64)

    @property
    def tally(self) -> FamilyTally:
        """Against the tightest family that holds, or the loosest of all if none does."""
        return self._families[min(self._level, len(self._families) - 1)]

    @property
    def best_recipe(self) -> RecipeTally:
        """The recipe with the fewest elements that it does not reproduce."""
        return min(self.recipes, key=lambda tally: (tally.abandoned, tally.mismatches))

    @property
    def reproduced_by(self) -> list[str]:
        """Names of the recipes that give every bit."""
        return [
            name
            for tally in self.recipes
            if not tally.abandoned and not tally.mismatches
            for name in tally.names
        ]

    @property
    def violations(self) -> int:
        """Elements out of bounds, NaN or infinite."""
        return self.tally.violations + self.non_finite

    def add(self, block: Block, delta: torch.Tensor) -> bool:
        """Take one block into account.

        Args:
            block: the rows.
            delta: the same rows of s * B @ A in float64.

        Returns:
            False if these rows cannot have been stored in ``format``, whatever was merged.
        """
        merged = block.merged
        if merged is None:
            merged = self._merged_from_task_vector(block)
            if merged is None:
                return False
        finite = torch.isfinite(block.task_vector)
        self.non_finite += finite.numel() - int(finite.sum())
        self._check_recipes(block, merged)
        self._count_lost(block, delta)
        self._check_bounds(block, delta, merged, finite)
        return True

    def _merged_from_task_vector(self, block: Block) -> torch.Tensor | None:
        """M in float64, recovered from W and T; None where no number of the format gives T."""
        wide = block.subtracted.double() + block.task_vector.double()
        if self.format is FP32:
            # M is within u32 |T| of W + T; next to a power of two that could halve its ulp.
            return wide * (1 + 2.0**-23)
        stored = wide.float().to(self.format.dtype)
        again = subtract_rows(stored, block.subtracted)
        same = (again == block.task_vector) | ~torch.isfinite(block.task_vector)
        return stored.double() if bool(same.all()) else None

    def _check_recipes(self, block: Block, merged: torch.Tensor) -> None:
        for tally in self.recipes:
            if tally.abandoned:
                continue
            delta = recipe_delta(tally.recipe, self.update, block.start, block.stop, self.format)
            rows = merge_rows(tally.recipe, block.base, delta, self.format)
            predicted = subtract_rows(rows, block.subtracted)
            differs = predicted != block.task_vector
            differs &= ~(predicted.isnan() & block.task_vector.isnan())
            count = int(differs.sum())
            if count:
                self._note_mismatch(tally, block, merged, predicted, differs, count)

    def _note_mismatch(
        self,
        tally: RecipeTally,
        block: Block,
        merged: torch.Tensor,
        predicted: torch.Tensor,
        differs: torch.Tensor,
        count: int,
    ) -> None:
        tally.mismatches += count
        tally.abandoned = tally.mismatches > max(1, _NEAR_MISS * self.elements)
        gap = (predicted[differs].double() - block.task_vector[differs].double()).abs()
        ulps = gap / (2 * half_ulp(merged[differs], self.format))
        largest = float(ulps.nan_to_num(nan=math.inf).max())
        tally.largest_mismatch_ulps = max(tally.largest_mismatch_ulps, largest)

    def _count_lost(self, block: Block, delta: torch.Tensor) -> None:
        """Elements whose update is not zero, yet whose merged value is the base's own."""
        unmoved = subtract_rows(block.base.to(self.format.dtype), block.subtracted)
        touched = delta != 0
        self.changed_by_update += int(touched.sum())
        self.lost += int(((block.task_vector == unmoved) & touched).sum())

    def _check_bounds(
        self, block: Block, delta: torch.Tensor, merged: torch.Tensor, finite: torch.Tensor
    ) -> None:
        error = (block.task_vector.double() - delta).abs_()
        error = torch.where(finite, error, 0.0)  # counted as non-finite already
        while True:
            tally = self._families[self._level]
            bound = bound_rows(
                tally.family,
                self.update,
                block.start,
                block.stop,
                delta=delta,
                merged=merged,
                base=block.subtracted.double(),
                base_format=self.base_format,
                format=self.format,
            )
            ratio = torch.where(finite, error / bound, 0.0)
            if self._level + 1 < len(self._families) and bool((ratio > 1).any()):
                self._level += 1
                self._families[self._level].max_ratio = tally.max_ratio
                self._families[self._level].worst = tally.worst
                continue
            break
        self._note_ratio(tally, block, delta, bound, ratio)
        ulp = 2 * half_ulp(merged, self.format)
        self.ulp_histogram += _histogram(error / ulp)
        self.bound_histogram += _histogram(bound / ulp)

    def _note_ratio(
        self,
        tally: FamilyTally,
        block: Block,
        delta: torch.Tensor,
        bound: torch.Tensor,
        ratio: torch.Tensor,
    ) -> None:
        outside = ratio > 1
        count = int(outside.sum())
        if count:
            tally.violations += count
            rows = outside.any(1).nonzero().flatten() + block.start
            tally.violating_rows.update(rows.tolist())
        largest = float(ratio.max()) if ratio.numel() else 0.0
        if tally.worst is None or largest > tally.max_ratio:
            row, column = divmod(int(ratio.argmax()), ratio.shape[1])
            tally.max_ratio = largest
            tally.worst = Element(
                row=row + block.start,
                column=column,
                task_vector=float(block.task_vector[row, column]),
                delta=float(delta[row, column]),
                bound=float(bound[row, column]),
            )


def _histogram(ulps: torch.Tensor) -> torch.Tensor:
    """Counts in `ULP_BINS` equal bins over [0, `ULP_RANGE`), and one for all beyond."""
    flat = ulps.flatten().float().cpu()
    inside = torch.histc(flat, ULP_BINS, 0.0, ULP_RANGE)
    counts = inside.to(torch.int64)
    return torch.cat([counts, (flat.numel() - counts.sum()).reshape(1)])


def _distinct_recipes(format: Format, stored: torch.dtype, scaling: float) -> list[RecipeTally]:
    """The recipes, grouped by what they really compute for this format, base and scaling."""
    narrow = format is not FP32
    power_of_two = scaling != 0 and math.frexp(scaling)[0] in (0.5, -0.5)
    groups: dict[tuple[bool, ...], list[Recipe]] = {}
    for recipe in RECIPES:
        key = (
            recipe.round_base and stored != format.dtype and narrow,
            recipe.round_factors and narrow,
            recipe.round_delta and narrow,
            recipe.prescaled and not power_of_two,
        )
        groups.setdefault(key, []).append(recipe)
    return [
        RecipeTally(group[0], tuple(recipe.name for recipe in group)) for group in groups.values()
    ]


def common_recipes(certificates: Sequence[ParameterCertificate]) -> list[str]:
    """Names of the recipes that reproduce every bit of every parameter."""
    if not certificates:
        return []
    return [
        recipe.name
        for recipe in RECIPES
        if all(recipe.name in certificate.reproduced_by for certificate in certificates)
    ]
