"""Was a base of a few bits merged into? Dequantised weights take few values, near one another.

A quantised weight is a code of b bits times the scale of its block: bitsandbytes' 4-bit formats
have 16 values in 64 consecutive weights (Dettmers et al., arXiv 2305.14314, section 3), its 8-bit
format 255 in a row (arXiv 2208.07339, section 2.1). Merging moves each weight by its delta, which
is known, so M - delta shows the levels again, blurred by the rounding of M.
"""

from __future__ import annotations

import torch

from taskvec.certificate import Block
from taskvec.compare import ParameterResult
from taskvec.diagnosis.case import Case, merged_rows
from taskvec.diagnosis.factors import tolerance
from taskvec.rounding import Format, half_ulp

_FOUR_BIT_BLOCK = 64
_LEVELS = {4: 16, 8: 256}


def quantised_bits(case: Case, result: ParameterResult) -> int | None:
    """The bits of the levels that a parameter shows, once its delta is taken off.

    Args:
        result: a matrix, adapted or not; a small part of it is looked at.

    Returns:
        4, 8, or None where there are more levels, or where the base has as few itself.
    """
    block, format = case.probe(result.name), case.format_of(result.name)
    weight, blur = merged_rows(block), half_ulp(merged_rows(block), format)
    if result.comparison is not None:
        weight, blur = _without_delta(case, result, block, format)
    base = block.subtracted.double()
    if not bool(torch.isfinite(weight).all()):
        return None
    for bits, length in ((4, _FOUR_BIT_BLOCK), (8, block.base[0].numel())):
        levels = _LEVELS[bits]
        if length >= 2 * levels and weight.numel() >= length:
            blurred = _median_levels(weight, blur, length)
            if blurred <= levels < _median_levels(base, blur, length):
                return bits
    return None


def _without_delta(
    case: Case, result: ParameterResult, block: Block, format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """M - delta, and how far rounding may have moved it; float64."""
    update = case.update(result.name)
    delta = update.exact(block.start, block.stop)
    blur = tolerance(
        update,
        block,
        delta=delta,
        base=block.subtracted.double(),
        base_format=None,
        format=format,
        stored=block.base.dtype,
    )
    return merged_rows(block) - delta, blur


def _median_levels(weight: torch.Tensor, blur: torch.Tensor, length: int) -> int:
    """How many values that rounding cannot have made from fewer a run of weights takes."""
    runs = weight.numel() // length
    values = weight.reshape(-1)[: runs * length].reshape(runs, length).sort(1).values
    reach = 2 * blur.reshape(-1)[: runs * length].reshape(runs, length).max(1, keepdim=True).values
    return int(((values.diff(dim=1) > reach).sum(1) + 1).median())
