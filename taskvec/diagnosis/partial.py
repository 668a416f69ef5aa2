"""Was only a part of the update's elements merged, as DARE, TIES and pruning leave it?

The elements that moved are then c * delta within rounding, and the others are the base's own (DARE,
arXiv 2311.03099, section 3: dropped at random, the rest times 1 / density; TIES, arXiv 2306.01708,
section 4: all but the largest dropped), or zero (the merged model was pruned).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from taskvec.certificate import Block
from taskvec.compare import Comparison, ParameterResult
from taskvec.diagnosis.case import Case, merged_rows, wide, worst_row
from taskvec.diagnosis.factors import FactorTest
from taskvec.header import row_shape
from taskvec.rounding import Format, half_ulp, subtract_rows

_LEAST, _LEAST_SHARE = 16, 1e-3  # fewer elements, or a smaller share, are damage


@dataclass
class PartialMerge:
    """A parameter that took part of its update.

    Attributes:
        zeroed: the others are 0; else they are the base's.
        factor: c of the elements that took it.
        kept, dropped: elements that took it, and that did not though they would have moved.
        smallest_kept, largest_dropped: |delta| among those.
        in_rows, in_columns: dropped elements that lie in rows, or columns, without a kept one.
    """

    zeroed: bool
    factor: float
    kept: int = 0
    dropped: int = 0
    smallest_kept: float = math.inf
    largest_dropped: float = 0.0
    in_rows: int = 0
    in_columns: int = 0

    @property
    def density(self) -> float:
        """The share of the elements that took the update, of those that would have moved."""
        return self.kept / (self.kept + self.dropped) if self.kept + self.dropped else 0.0

    @property
    def by_size(self) -> bool:
        """What took it is the part with the largest |delta|."""
        return self.smallest_kept >= self.largest_dropped * (1 - 1e-4)

    @property
    def holds(self) -> bool:
        """Elements here and there were left out, rather than a few, or whole rows or columns."""
        least = max(_LEAST, _LEAST_SHARE * (self.kept + self.dropped))
        whole = max(self.in_rows, self.in_columns)
        return min(self.kept, self.dropped) > least and 2 * whole < self.dropped


def partial_merge(
    case: Case, result: ParameterResult, comparison: Comparison
) -> PartialMerge | None:
    """The part of its update that a parameter took; None where that does not explain it."""
    format = case.format_of(result.name)
    for zeroed in (False, True):
        test = _factor_of_moved(case, result, comparison, zeroed, format)
        if test is not None:
            found = _measure(case, result, PartialMerge(zeroed, test.factor), format)
            if found.holds:
                return found
    return None


def _factor_of_moved(
    case: Case, result: ParameterResult, comparison: Comparison, zeroed: bool, format: Format
) -> FactorTest | None:
    """The factor that explains all elements but those that were left out, if one does."""
    stored = case.base.tensors[result.name].dtype
    update = case.update(result.name)
    test = FactorTest(update, format, stored, comparison.certificate.base_format)
    for block in case.probe_first(result.name, worst_row(comparison)):
        if not test.add(block, ~_left_out(block, zeroed, format)):
            return None
    return test if test.holds and math.isfinite(test.factor) else None


def _left_out(block: Block, zeroed: bool, format: Format) -> torch.Tensor:
    """The elements that are 0 although the base's are not, or that are the base's."""
    if zeroed:
        return (merged_rows(block) == 0) & (block.base != 0)
    unmoved = subtract_rows(format.round(wide(block.base)), block.subtracted)
    return block.task_vector == unmoved


def _measure(
    case: Case, result: ParameterResult, found: PartialMerge, format: Format
) -> PartialMerge:
    """Count what was kept and dropped, of the elements that the whole update would have moved."""
    update = case.update(result.name)
    width = math.prod(row_shape(result.shape))
    columns = torch.zeros(2, width, dtype=torch.int64)  # kept, dropped
    for block in case.blocks(result.name):
        delta = update.exact(block.start, block.stop)
        left_out = _left_out(block, found.zeroed, format)
        base = block.subtracted.double()
        moves = (found.factor * delta).abs() > half_ulp(base, format)
        kept = (~left_out & (moves | found.zeroed)).reshape(-1, width)
        dropped = (left_out & (moves | found.zeroed)).reshape(-1, width)
        size = delta.abs().reshape(-1, width)
        found.kept += int(kept.sum())
        found.dropped += int(dropped.sum())
        found.smallest_kept = min(found.smallest_kept, _least(size[kept]))
        found.largest_dropped = max(found.largest_dropped, -_least(-size[dropped]))
        found.in_rows += int(dropped[~kept.any(1)].sum())
        columns += torch.stack([kept.sum(0), dropped.sum(0)]).cpu()
    found.in_columns = int(columns[1][columns[0] == 0].sum())
    return found


def _least(values: torch.Tensor) -> float:
    return float(values.min()) if values.numel() else math.inf
