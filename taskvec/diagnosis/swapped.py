"""Were the base and the merged model given for each other?

Then T is -delta, as where the adapter was subtracted. Bits tell the two apart, where they can: the
base that was given is what a recipe makes of the merged model that was given, and that is not what
subtracting would have made of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from taskvec.certificate import Block
from taskvec.compare import UNCHANGED, ParameterResult
from taskvec.diagnosis.case import Case, merged_rows
from taskvec.diagnosis.cause import Cause
from taskvec.diagnosis.merges import WrongMerge
from taskvec.rounding import FORMATS, RECIPES
from taskvec.updates.dora import Dora
from taskvec.updates.products import LowRank
from taskvec.updates.replaced import RowReader
from taskvec.verdict import adapted


def swapped(case: Case, results: Sequence[ParameterResult]) -> Cause | None:
    """The cause, where every parameter says so, and one of them that nothing was subtracted."""
    names = [result.name for result, _ in adapted(results)]
    failing = next((r.name for r, found in adapted(results) if found.certificate.violations), None)
    if failing is None or not _gives_base(case, failing, [case.probe(failing)]):
        return None
    changed = [result for result in results if result.kind != UNCHANGED]
    if not all(_gives_base(case, result.name, case.blocks(result.name)) for result in changed):
        return None
    if all(result.name in names and _is_subtracted(case, result.name) for result in changed):
        return None
    sentence = (
        "Base and merged model were given for each other: the adapter, added to what was given as "
        f"merged, gives what was given as the base, bit for bit, in all {len(names)} adapted "
        "parameters. Swap the two."
    )
    return Cause("swapped", sentence, {"parameters": names}, len(changed))


def _gives_base(case: Case, name: str, blocks: Iterable[Block]) -> bool:
    """Whether a recipe, or storing what the adapter leaves alone, makes W of M."""
    stored = case.base.tensors[name].dtype
    format = next((format for format in FORMATS.values() if format.dtype == stored), None)
    if format is None:
        return False
    update = case.update(name) if name in case.adapter.scalings else None
    if isinstance(update, Dora):  # whose norms are those of what it is merged into
        update = replace(update, base=_merged_reader(case, name), _kept={})
    recipes = list(RECIPES) if update else list(RECIPES[:1])
    for block in blocks:
        start, stop = block.start, block.stop
        merged = _merged(case, name, block)
        recipes = [
            recipe
            for recipe in recipes
            if torch.equal(
                update.merged(recipe, merged, start, stop, format) if update else merged.to(stored),
                block.base,
            )
        ]
        if not recipes:
            return False
    return True


def _merged(case: Case, name: str, block: Block) -> torch.Tensor:
    """Rows of M in its dtype; where only T is known, the numbers of its format next to W + T."""
    if block.merged is not None:
        return block.merged
    return merged_rows(block).to(case.format_of(name).dtype)


def _merged_reader(case: Case, name: str) -> RowReader:
    def read(start: int, stop: int) -> torch.Tensor:
        base = case.base.read(name, start, stop).to(case.device)
        return _merged(case, name, case.vector.block(base, name, start, stop))

    return read


def _is_subtracted(case: Case, name: str) -> bool:
    """Whether a recipe makes M of W with the update taken off instead."""
    update, format = case.update(name), case.format_of(name)
    if not isinstance(update, LowRank):
        return False
    merges = [WrongMerge((-update.scaling,), (), recipe, format) for recipe in RECIPES]
    for block in case.blocks(name):
        merges = [m for m in merges if torch.equal(m.task_vector(update, block), block.task_vector)]
        if not merges:
            return False
    return True
