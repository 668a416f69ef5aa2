"""By which recipe did a merged parameter come about, bit for bit, and which elements stand out?

A merge is a chain of roundings whose result is fixed by IEEE 754, up to the order in which a matmul
sums. So each recipe predicts every bit, and where one predicts nearly all of them, the few others
are evidence: of another computer's matmul, or of a changed element.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from taskvec.difference import count_differing
from taskvec.rounding import RECIPES, Format, Recipe, subtract_rows
from taskvec.update import Update

if TYPE_CHECKING:
    from taskvec.certificate import Block

# A recipe that misses more than this share of a tensor is not how the tensor came about,
_NEAR_MISS = 0.01
# and one that misses so many times more elements than another does need not be pursued.
_FAR_BEHIND = 8

_PLACES = 8  # of mismatches are kept

# Mismatches up to this number are not explained by what would have changed so many times more.
_LONE = 4
_TOO_FEW = 64


@dataclass
class RecipeTally:
    """How far a group of recipes with equal results reproduces a parameter.

    Attributes:
        recipe: the first of the group.
        names: of all of them.
        mismatches: elements with other bits.
        places: (row, column) of the first few of them.
        disordered: those of them that no other order of summation gives either.
        unexplained: nor rounding D to the merged format anywhere on its way.
        abandoned: not how the parameter came about; the counts are not complete.
    """

    recipe: Recipe
    names: tuple[str, ...]
    mismatches: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)
    disordered: int = 0
    unexplained: int = 0
    abandoned: bool = False

    def note(self, start: int, differs: torch.Tensor) -> None:
        """Keep the places of elements that differ, of rows from ``start`` on, if there is room."""
        room = _PLACES - len(self.places)
        if room > 0:
            found = differs.reshape(differs.shape[0] if differs.ndim else 1, -1).nonzero()[:room]
            self.places += [(start + row, column) for row, column in found.tolist()]


class RecipeSearch:
    """Predicts a parameter by every recipe, block by block, and counts what it finds otherwise.

    Args:
        update: what the adapter does to the parameter.
        format: the format that the merged parameter is stored in.
        stored: dtype of the base's parameter.
        elements: of the parameter.

    Attributes:
        tallies: one for each distinct recipe.
    """

    def __init__(
        self, update: Update, format: Format, stored: torch.dtype, *, elements: int
    ) -> None:
        self.update, self.format, self.elements = update, format, elements
        self.tallies = _distinct_recipes(update, format, stored)
        self._order_changes = self._format_changes = self._sampled = 0

    @property
    def best(self) -> RecipeTally:
        """The recipe with the fewest elements that it does not reproduce."""
        return min(self.tallies, key=lambda tally: (tally.abandoned, tally.mismatches))

    @property
    def reproduced_by(self) -> list[str]:
        """Names of the recipes that give every bit."""
        return [name for tally in self.tallies if not tally.mismatches for name in tally.names]

    @property
    def order_effect(self) -> float:
        """How many elements of M would be others, about, if D were summed in float64."""
        return self._order_changes * self.elements / max(1, self._sampled)

    @property
    def format_effect(self) -> float:
        """Or if D were rounded to the format first; if it were not, where the recipe does."""
        return self._format_changes * self.elements / max(1, self._sampled)

    @property
    def isolated(self) -> int:
        """Elements that stand out: a recipe gives nearly all others bit for bit, but not these.

        Another computer sums in another order, or rounds D on the way where this one does not: that
        explains an element if it lies in its `Update.interval`, and if it is not alone where many
        would have changed.
        """
        best = self.best
        if best.abandoned:
            return 0
        most = math.inf if best.mismatches > _LONE else best.mismatches * _TOO_FEW
        if most < self.order_effect:
            return best.mismatches
        return best.disordered if most < self.format_effect else best.unexplained

    def add(self, block: Block, delta: torch.Tensor, *, sampled: bool) -> None:
        """Take one block into account.

        Args:
            block: the rows.
            delta: the same rows of the update in float64.
            sampled: measure on this block what other arithmetic would change.
        """
        found = block.task_vector if block.merged is None else _comparable(block.merged)
        live = [tally for tally in self.tallies if not tally.abandoned]
        missed = []
        for tally in live:
            merged = self.update.merged(
                tally.recipe, block.base, block.start, block.stop, self.format
            )
            predicted = _as_found(merged, block)
            if sampled and tally is live[0]:
                self._measure_effects(tally.recipe, block, delta, predicted)
            if count_differing(predicted, found):
                differs = predicted != found
                differs &= ~(predicted.isnan() & found.isnan())
                tally.mismatches += int(differs.sum())
                tally.note(block.start, differs)
                missed.append((tally, differs))
        fewest = min(tally.mismatches for tally in self.tallies)
        limit = min(max(1, _NEAR_MISS * self.elements), _FAR_BEHIND * (1 + fewest))
        for tally, differs in missed:
            tally.abandoned = tally.mismatches > limit
            if not tally.abandoned:
                tally.disordered += self._outside(tally.recipe, block, found, differs, False)
                tally.unexplained += self._outside(tally.recipe, block, found, differs, True)

    def _outside(
        self,
        recipe: Recipe,
        block: Block,
        found: torch.Tensor,
        where: torch.Tensor,
        rounded_anywhere: bool,
    ) -> int:
        """How many of the chosen elements are out of their `Update.interval`."""
        low, high = (
            _as_found(end, block, where)
            for end in self.update.interval(
                recipe,
                block.start,
                block.stop,
                base=block.base,
                format=self.format,
                where=where,
                rounded_anywhere=rounded_anywhere,
            )
        )
        chosen = found[where]
        return chosen.numel() - int(((low <= chosen) & (chosen <= high)).sum())

    def _measure_effects(
        self, recipe: Recipe, block: Block, delta: torch.Tensor, predicted: torch.Tensor
    ) -> None:
        in_order, in_format = (
            _as_found(merged, block)
            for merged in self.update.variations(
                recipe, block.base, block.start, block.stop, self.format, delta
            )
        )
        self._order_changes += count_differing(in_order, predicted)
        self._format_changes += count_differing(in_format, predicted)
        self._sampled += predicted.numel()


def _as_found(
    merged: torch.Tensor, block: Block, where: torch.Tensor | None = None
) -> torch.Tensor:
    """M as it is known of a block: itself, or by its difference from W."""
    if block.merged is not None:
        return _comparable(merged)
    return subtract_rows(merged, block.subtracted if where is None else block.subtracted[where])


def _comparable(merged: torch.Tensor) -> torch.Tensor:
    """In fp32, in which no narrower number is lost; in float64 if it is."""
    return merged if merged.dtype is torch.float64 else merged.float()


def _distinct_recipes(update: Update, format: Format, stored: torch.dtype) -> list[RecipeTally]:
    """The recipes, grouped by what they really compute for this update, format and base."""
    groups: dict[Hashable, list[Recipe]] = {}
    for recipe in RECIPES:
        groups.setdefault(update.recipe_key(recipe, format, stored), []).append(recipe)
    return [
        RecipeTally(group[0], tuple(recipe.name for recipe in group)) for group in groups.values()
    ]
