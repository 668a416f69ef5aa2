"""Were weights stored in 16 bits otherwise than by rounding to the nearest?

Cutting off the lower half of an fp32 number makes a bf16 number of it too, the next one toward
zero; stochastic rounding takes either neighbour. The certificate has room for some of that where an
update was added, and none where the base was stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from taskvec.bounds import AS_COMPUTED
from taskvec.certificate import Block
from taskvec.compare import ParameterResult
from taskvec.diagnosis.case import Case, merged_rows
from taskvec.rounding import FP32, U32, half_ulp
from taskvec.update import Update

TOWARD_ZERO = "toward zero, as by cutting bits off"
EITHER_WAY = (
    "to one neighbour or the other, as stochastic rounding does, or a change by less than the "
    "format's spacing before it"
)
_OFTEN = 0.1  # of the elements that had to be rounded; of stochastic rounding it is a quarter
_SIGMAS = 4.0


def rounded_otherwise(case: Case, results: Sequence[ParameterResult]) -> dict[str, str]:
    """How each parameter was rounded, of those that were not rounded to the nearest number.

    A vector alone tells too little: it is taken for that where a matrix is.
    """
    found: dict[str, str] = {}
    for result in sorted(results, key=lambda result: len(result.shape) < 2):
        if len(result.shape) > 1:
            how = _rounded(case, result.name, often=_OFTEN)
        elif found:
            how = _rounded(case, result.name, often=0.0)
        else:
            break
        if how and (len(result.shape) > 1 or how in found.values()):
            found[result.name] = how
    return found


def _rounded(case: Case, name: str, *, often: float) -> str | None:
    """How a parameter was rounded, if every element was, and not to the nearest number."""
    format = case.format_of(name)
    if format is FP32:
        return None
    update = case.update(name) if name in case.adapter.scalings else None
    found = _Roundings(often)
    for block in case.blocks(name):
        if not found.add(case, name, update, block):
            return None
    return found.how


class _Roundings:
    """Counts where M lies beside the exact W + delta, in units of the format's spacing.

    Args:
        often: which share of what had to be rounded must not have gone to the nearest number.
    """

    def __init__(self, often: float) -> None:
        self._often, self.toward_zero = often, True
        self.inexact = self.far = 0
        self._along = self._variance = 0.0

    @property
    def how(self) -> str | None:
        """None where it was to the nearest, but for a few."""
        if not self.far or self.far < self._often * self.inexact:
            return None
        if self.toward_zero:
            return TOWARD_ZERO
        unbiased = self._along**2 <= _SIGMAS**2 * self._variance
        return EITHER_WAY if unbiased else None

    def add(self, case: Case, name: str, update: Update | None, block: Block) -> bool:
        """Take rows into account; False if an element is no neighbour of what it should be."""
        format = case.format_of(name)
        exact, merged = block.base.double(), merged_rows(block)
        slack = torch.zeros_like(exact)
        if update is not None:
            delta = update.exact(block.start, block.stop)
            slack = update.error(
                AS_COMPUTED, block.start, block.stop, delta=delta, base=exact, format=format
            )
            exact = exact + delta
        slack += exact.abs() * U32
        if block.merged is None:
            slack += block.task_vector.double().abs() * U32
        gap, spacing = merged - exact, 2 * half_ulp(exact, format)
        if not bool((gap.abs() <= spacing + slack).all()):
            return False
        outward = gap * exact.sign()
        self.toward_zero = self.toward_zero and bool((outward <= slack).all())
        self.inexact += int((gap.abs() > slack).sum())
        self.far += int((gap.abs() > spacing / 2 + slack).sum())
        self._along += float((gap * exact).sum())
        self._variance += float(((gap * exact) ** 2).sum())
        return True
