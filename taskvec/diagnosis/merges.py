"""Wrong ways of merging, computed step by step and compared with T bit for bit.

That tells even merges apart whose update is near the format's own rounding. Notation as in
`taskvec.rounding`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from taskvec.certificate import Block
from taskvec.compare import Comparison, ParameterResult
from taskvec.diagnosis.case import Case, lower_formats, wide, worst_row
from taskvec.rounding import (
    FP32,
    RECIPES,
    Format,
    Recipe,
    merge_rows,
    recipe_delta,
    subtract_rows,
)
from taskvec.update import Update
from taskvec.updates.dora import Dora
from taskvec.updates.products import LowRank

# Of the elements that moved, a wrong hypothesis misses about half or more; the right one misses
# those that another matmul's last bits turn over, and damaged ones.
_MISSED_SHARE = 0.1
# A narrow format hides nearly all of a matmul's last bits.
_TURNED_OVER = 0.01


@dataclass(frozen=True)
class WrongMerge:
    """One way in which a parameter may have been merged.

    Attributes:
        scalings: what B @ A is multiplied with, once for each time that it is added; of an update
            that is no product, its own.
        readings: what this means, in words; several where they come to the same.
        recipe: how each sum is computed.
        format: the format that the sums are rounded to.
        base_format: what W was rounded to before, other than by the recipe.
        delta_format: what the recipe rounds factors and delta to, if not to ``format``.
        transposed: the delta is added the wrong way round, and read in the weight's shape.
        unmerge_rounds: what is subtracted is rounded first, as PEFT does whatever it added.
        wrong: False for the merge that should have been made.
    """

    scalings: tuple[float, ...]
    readings: tuple[str, ...]
    recipe: Recipe
    format: Format
    base_format: Format | None = None
    delta_format: Format | None = None
    transposed: bool = False
    unmerge_rounds: bool = False
    wrong: bool = True

    def task_vector(self, update: Update, block: Block) -> torch.Tensor:
        """T as this merge gives it: rows like the block's, fp32."""
        merged = block.base
        if self.base_format is not None:
            merged = self.base_format.round(wide(merged))
        if not isinstance(update, LowRank):
            for _ in self.scalings:
                merged = update.merged(self.recipe, merged, block.start, block.stop, self.format)
                update = _onto_its_result(update, self.recipe, self.format)
            return subtract_rows(merged, block.subtracted)
        update = turned(update) if self.transposed else update
        format = self.delta_format or self.format
        for number, scaling in enumerate(self.scalings):
            recipe = update.followed(self.recipe)
            if number == 1 and self.unmerge_rounds:
                recipe = replace(recipe, round_delta=True)
            scaled = replace(update, scaling=scaling)
            delta = recipe_delta(recipe, scaled, block.start, block.stop, format)
            merged = merge_rows(recipe, merged, delta, self.format)
        return subtract_rows(merged, block.subtracted)


@dataclass
class Agreement:
    """How far a hypothesis reproduces T.

    Attributes:
        moved: elements that do not have the value of an unmerged weight, in T or as predicted.
        missed: elements that are not as predicted.
    """

    merge: WrongMerge
    moved: int = 0
    missed: int = 0

    @property
    def missed_share(self) -> float:
        return self.missed / self.moved if self.moved else math.inf

    @property
    def holds(self) -> bool:
        return self.missed_share <= _MISSED_SHARE

    @property
    def clean(self) -> bool:
        """What is missed is damage, or what another matmul turns over; nothing else was added."""
        allowed = _MISSED_SHARE if self.merge.format is FP32 else _TURNED_OVER
        return self.missed_share <= allowed

    def add(self, update: Update, block: Block, format: Format) -> None:
        predicted = self.merge.task_vector(update, block)
        unmoved = subtract_rows(format.round(wide(block.base)), block.subtracted)
        finite = torch.isfinite(block.task_vector)
        moved = (block.task_vector != unmoved) | (predicted != unmoved)
        self.moved += int((moved & finite).sum())
        self.missed += int(((predicted != block.task_vector) & finite).sum())


def best_merge(case: Case, result: ParameterResult, comparison: Comparison) -> Agreement | None:
    """The merge that reproduces a parameter best, right or wrong; None if none comes near."""
    update = case.update(result.name)
    rslora = bool(case.adapter.config.values.get("use_rslora"))
    probe = case.probe(result.name, worst_row(comparison))
    format = comparison.certificate.format
    best = Agreement(next(merges(update, comparison, rslora)))
    for merge in merges(update, comparison, rslora):
        agreement = Agreement(merge)
        agreement.add(update, probe, format)
        best = min(best, agreement, key=lambda agreement: agreement.missed_share)
        if not best.missed_share:
            break
    if not best.holds:
        return None
    whole = Agreement(best.merge)
    for block in case.blocks(result.name):
        whole.add(update, block, format)
    return whole if whole.holds else None


def merges(update: Update, comparison: Comparison, rslora: bool) -> Iterator[WrongMerge]:
    """The right merge, then the wrong ones, the simplest first."""
    format = comparison.certificate.format
    recipes = [tally.recipe for tally in comparison.certificate.recipes]
    if not isinstance(update, LowRank):
        yield from _of_any_kind(update, recipes, format)
        return
    s = update.scaling
    variants: list[tuple[tuple[float, ...], tuple[str, ...]]] = [((s,), ())]
    variants += [((scaling,), texts) for scaling, texts in readings(s, update.rank, rslora).items()]
    variants += [
        ((s, s), (TWICE,)),
        ((s, s, s), (THRICE,)),
    ]
    for (scalings, texts), recipe in itertools.product(variants, recipes):
        yield WrongMerge(scalings, texts, recipe, format, wrong=bool(texts))
    undone = [((s, -s), (UNMERGED_AGAIN,)), ((s, -s, s), (REMERGED,))]
    for (scalings, texts), recipe in itertools.product(undone, recipes):
        for rounds in (False, True):
            yield WrongMerge(scalings, texts, recipe, format, unmerge_rounds=rounds)
    if update.stored is None:
        for recipe in recipes:
            yield WrongMerge((s,), (), recipe, format, transposed=True)
    for lower in lower_formats(format):
        for recipe in recipes:
            yield WrongMerge((s,), (), recipe, format, base_format=lower)
        for recipe in RECIPES:
            yield WrongMerge((s,), (), recipe, lower)
            if recipe.round_factors or recipe.round_delta:
                recipe = replace(recipe, round_base=False)
                yield WrongMerge((s,), (), recipe, format, delta_format=lower)


def turned(update: LowRank) -> LowRank:
    """The transposed delta in the parameter's shape: reshaped where that is not square."""
    return replace(update, transposed=not update.transposed, stored=update.shape)


def _onto_its_result(update: Update, recipe: Recipe, format: Format) -> Update:
    """The same update for what it made of the base; of DoRA, the norms are those of that."""
    if not isinstance(update, Dora):
        return update
    first = update

    def base(start: int, stop: int) -> torch.Tensor:
        return first.merged(recipe, first.base(start, stop), start, stop, format)

    return replace(first, base=base, _kept={})


def _of_any_kind(update: Update, recipes: Sequence[Recipe], format: Format) -> Iterator[WrongMerge]:
    """What can go wrong whatever is done: twice, or a base or a result that was rounded."""
    s = (update.scaling or 0.0,)
    for recipe in recipes:
        yield WrongMerge(s, (), recipe, format, wrong=False)
    if isinstance(update, Dora):
        for recipe in recipes:
            yield WrongMerge(2 * s, (DORA_TWICE,), recipe, format)
    for lower, recipe in itertools.product(lower_formats(format), recipes):
        yield WrongMerge(s, (), recipe, format, base_format=lower)
        yield WrongMerge(s, (), recipe, lower)


TWICE = "merged twice, or alpha doubled"
DORA_TWICE = "merged twice, the second time with the norms of the first result"
THRICE = "merged three times"
UNMERGED_AGAIN = "merged and unmerged again"
REMERGED = "merged, unmerged and merged again"


def readings(scaling: float, rank: int, rslora: bool) -> dict[float, tuple[str, ...]]:
    """What B @ A may have been multiplied with instead of s, and why."""
    root = math.sqrt(rank)
    named = [
        (2 * scaling, TWICE),
        (-scaling, "subtracted instead of added, or base and merged model swapped"),
        (1.0, "scaling left out: B @ A was added as it is"),
        (scaling * (root if rslora else rank), "scaling left out: alpha was not divided"),
        (
            scaling / root if rslora else scaling * root,
            "alpha / r taken for rsLoRA's alpha / sqrt(r)"
            if rslora
            else "rsLoRA's alpha / sqrt(r) taken for alpha / r",
        ),
        (scaling**2, "scaling applied twice"),
        (3 * scaling, THRICE),
        (scaling / 2, "halved"),
    ]
    found: dict[float, tuple[str, ...]] = {}
    for value, text in named if scaling else []:
        if value != scaling:
            found[value] = (*found.get(value, ()), text)
    return found
