"""Was a base of a few bits merged into? Dequantised weights take few values, near one another.

A quantised weight is a code of b bits times the scale of its block: bitsandbytes' 4-bit formats
have 16 values in 64 consecutive weights (Dettmers et al., arXiv 2305.14314, section 3), its 8-bit
format 255 in a row (arXiv 2208.07339, section 2.1), fp8 255 in all (Micikevicius et al., arXiv
2209.05433) where a tensor shares a scale. Merging moves each weight by its delta, which is known,
so M - delta shows the levels again, blurred by the rounding of M.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from taskvec.certificate import Block
from taskvec.compare import ParameterResult
from taskvec.diagnosis.case import Case, merged_rows
from taskvec.diagnosis.factors import tolerance
from taskvec.rounding import Format, half_ulp

_FOUR_BIT_BLOCK = 64
_LEVELS = {4: 16, 8: 256}
# Others have equal steps in each group: from 0 to the largest magnitude (GGUF's Q8_0 and Q4_0 in
# 32, absmax int8 in a row), or from the least to the largest (asymmetric, GPTQ's and AWQ's 128).
_GROUPS = (32, 64, 128)
_STEPS = {4: ((7, True), (8, True), (15, False)), 8: ((127, True), (128, True), (255, False))}
_KNOWN, _ON_STEPS, _OFF_STEPS = 0.15, 0.01, 0.04


@dataclass(frozen=True)
class Quantised:
    """What levels a parameter shows.

    Attributes:
        bits: 4 or 8.
        merged: the merged weights show them, as they are; else the base that the adapter was merged
            into did. None for a parameter without an update, where the two are the same.
    """

    bits: int
    merged: bool | None


def quantised(case: Case, result: ParameterResult) -> Quantised | None:
    """The levels that a parameter shows, as it is or once its delta is taken off.

    Args:
        result: a matrix, adapted or not; a small part of it is looked at.

    Returns:
        None where there are more levels, or where the base has as few itself.
    """
    block, format = case.probe(result.name), case.format_of(result.name)
    merged = merged_rows(block)
    if not bool(torch.isfinite(merged).all()):
        return None
    bits = _bits(block, merged, half_ulp(merged, format)) or _one_scale(block, merged, format)
    if bits:
        return Quantised(bits, None if result.comparison is None else True)
    if result.comparison is not None and (
        bits := _bits(block, *_without_delta(case, result, block, format))
    ):
        return Quantised(bits, False)
    return None


def _bits(block: Block, weight: torch.Tensor, blur: torch.Tensor) -> int | None:
    base, width = block.subtracted.double(), block.base[0].numel()
    for bits, length in ((4, _FOUR_BIT_BLOCK), (8, width)):
        levels = _LEVELS[bits]
        if length >= 2 * levels and weight.numel() >= length:
            blurred = _median_levels(weight, blur, length)
            if blurred <= levels < _median_levels(base, blur, length):
                return bits
    for bits, length in itertools.product((4, 8), (*_GROUPS, width)):
        if width % length == 0 and any(
            _off_steps(weight, blur, length, steps, centred) < _ON_STEPS
            and _off_steps(base, blur, length, steps, centred) > _OFF_STEPS
            for steps, centred in _STEPS[bits]
        ):
            return bits
    return None


def _one_scale(block: Block, merged: torch.Tensor, format: Format) -> int | None:
    """8, where all of it takes no more values than as many bits, and the base more."""
    levels = _LEVELS[8]
    few = merged.numel() >= 2 * levels and _values(merged) <= levels
    return 8 if few and _values(format.round(block.subtracted)) > levels else None


def _values(weight: torch.Tensor) -> int:
    """How many different values there are."""
    return int((weight.reshape(-1).sort().values.diff() > 0).sum()) + 1


def _off_steps(
    weight: torch.Tensor, blur: torch.Tensor, length: int, steps: int, centred: bool
) -> float:
    """Mean squared distance to the next step, in steps: 1/12 for weights that know of none.

    Of those weights whose place rounding leaves known; 1/12 if they are few.

    Args:
        length: of the runs that share a scale.
        steps: from 0 to the run's largest magnitude if ``centred``, else from least to largest.
    """
    runs = weight.numel() // length
    values = weight.reshape(-1)[: runs * length].reshape(runs, length)
    error = blur.reshape(-1)[: runs * length].reshape(runs, length)
    low = torch.zeros(runs, 1).to(values) if centred else values.amin(1, keepdim=True)
    span = (values - low).abs().amax(1, keepdim=True)
    step = span.clamp_min(torch.finfo(torch.float64).tiny) / steps
    place = (values - low) / step
    doubt = (error + error.amax(1, keepdim=True) * (place / steps).abs()) / step
    known = (doubt < _KNOWN) & (place.abs() < steps)
    if 8 * int(known.sum()) < known.numel():
        return 1 / 12
    return float(((place - place.round())[known] ** 2).mean())


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
        base=block.base.double(),
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
