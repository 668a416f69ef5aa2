"""Are weights, or rows of them, in the wrong place?

As where layers were swapped or counted from 1, or where the rows of an attention's projections lie
as in Meta's files and in GGUF, which order the rotary halves of a head otherwise than transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from taskvec.certificate import Block
from taskvec.compare import ParameterResult
from taskvec.diagnosis.case import Case, merged_rows, wide
from taskvec.diagnosis.factors import FactorTest
from taskvec.rounding import NARROW_FORMATS, U32, half_ulp, subtract_rows

_LEAST_ROWS, _PROJECTIONS = 16, 4
_ROUNDINGS = 4  # half ulps: more than a sum of many independent rounding errors comes to
_RESOLVED = (
    0.05  # the sorted products of other rows are farther apart than this share of their size
)


def weights_elsewhere(case: Case, results: Sequence[ParameterResult]) -> dict[str, str]:
    """Whose merged weights each parameter holds, of those that hold another's.

    Args:
        results: those that nothing simple explains. If it is not so of the first, with which the
            others of its shape are compared, the rest is not looked at.

    Returns:
        parameter -> the parameter of the base, with its update, that it holds.
    """
    found: dict[str, str] = {}
    shapes_without: set[tuple[int, ...]] = set()
    for result in results:
        if result.shape in shapes_without:
            continue
        source = _source_of(case, result)
        if source:
            found[result.name] = source
        elif result.shape not in {case.base.tensors[name].shape for name in found}:
            shapes_without.add(result.shape)
    return found


def rows_reordered(case: Case, result: ParameterResult) -> str | None:
    """What has its rows in another order: "weights", "update", or None if nothing has.

    The rows of two matrices are the same ones if their products with any vector are, once sorted;
    it is tried with a few vectors.
    """
    info = case.base.tensors[result.name]
    if len(result.shape) != 2 or info.rows < _LEAST_ROWS:
        return None
    generator = torch.Generator().manual_seed(0)
    shape = info.row_elements, _PROJECTIONS
    vectors = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.device)
    update = case.update(result.name) if result.comparison is not None else None
    seen: dict[str, list[list[torch.Tensor]]] = {"weights": [], "update": []}
    for block in case.blocks(result.name):
        base, merged = block.subtracted.double(), merged_rows(block)
        delta = update.exact(block.start, block.stop) if update else torch.zeros_like(base)
        blur = _ROUNDINGS * half_ulp(torch.maximum(base.abs(), merged.abs()), case.format)
        noise = (blur**2 @ vectors**2).sqrt()
        target = block.task_vector.double()
        seen["weights"].append([merged @ vectors, (base + delta) @ vectors, noise])
        seen["update"].append([target @ vectors, delta @ vectors, noise])
    for what, blocks in seen.items():
        there, expected, noise = (torch.cat(part) for part in zip(*blocks, strict=True))
        size, doubt = _RESOLVED * expected.std(), noise.max()
        gap = (there.sort(0).values - expected.sort(0).values).abs().max()
        moved = (there - expected).abs().max() > size
        if bool(moved) and bool(gap <= doubt) and bool(doubt < size):
            return what
    return None


def _source_of(case: Case, result: ParameterResult) -> str | None:
    row = case.base.tensors[result.name].rows // 2  # the first may be a token that is padding
    block = case.probe(result.name, row)
    for source, info in case.base.tensors.items():
        if source == result.name or info.shape != result.shape or not info.is_float:
            continue
        if _is_merged(case, result.name, source, block) and all(
            _is_merged(case, result.name, source, other) for other in case.blocks(result.name)
        ):
            return source
    return None


def _is_merged(case: Case, name: str, source: str, block: Block) -> bool:
    """Whether rows of a parameter are those of another one, with the latter's update if it has one.

    To within rounding: of a parameter without an update, to that of the task vector.
    """
    rows = case.base.read(source, block.start, block.stop).to(case.device)
    base, merged = wide(rows), merged_rows(block)
    if bool((base == base.flatten()[0]).all()):  # all ones, or zeros: that tells nothing
        return False
    seen = replace(block, base=rows, subtracted=base, task_vector=subtract_rows(merged, base))
    if source in case.adapter.scalings:
        update, format = case.update(source), case.format_of(name)
        test = FactorTest(update, format, rows.dtype, None)
        return test.add(seen) and test.holds and test.allows(1.0)
    slack = 0.0
    if block.merged is None:
        slack = 2 * U32 * float(block.task_vector.abs().max() + block.subtracted.abs().max())
    as_stored = [base, *(format.round(base) for format in NARROW_FORMATS)]
    gaps = [float((merged - rounded.double()).abs().max()) for rounded in as_stored]
    return min(gaps) <= slack and bool(torch.isfinite(merged).all())
