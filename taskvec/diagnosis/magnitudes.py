"""Were DoRA's magnitudes applied otherwise than they were learned?

The merged weight is diag(m / ‖V‖) V, V = W + s B A, with the norm over the inputs of each output
as PEFT has it. Tools have taken it over the other axis: the paper (Liu et al., arXiv 2402.09353,
equation 5) speaks of columns, and files of other tools hold a magnitude for each input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from taskvec.bounds import Family, families
from taskvec.certificate import Block
from taskvec.compare import Comparison, ParameterResult
from taskvec.diagnosis.case import Case, merged_rows, worst_row
from taskvec.rounding import U32, Format, rounding_error
from taskvec.updates.dora import Dora

_OF_NORM = 4  # times sqrt(n) u: more than sums of n squares are off by, short of any order's n u
_IN_FORMAT = 6  # roundings of norm and factor where all is computed in the format


@dataclass(frozen=True)
class Way:
    """Each element of V times a factor of its output and one of its input.

    Attributes:
        how: what was done to V, in words.
        rows, columns: the factors as the parameter is stored: (rows, 1) and (columns,)
            in float64, or a single one for all.
    """

    how: str
    rows: torch.Tensor
    columns: torch.Tensor

    def explains(self, update: Dora, family: Family, block: Block, format: Format) -> bool:
        """Whether rows are what this gives, up to rounding."""
        start, stop = block.start, block.stop
        base, merged = block.base.double(), merged_rows(block)
        rows = self.rows if len(self.rows) == 1 else self.rows[start:stop]
        factor = rows * self.columns
        expected = factor * (base + update.direction.exact(start, stop))
        error = update.sum_error(family, start, stop, base=base, format=format)
        error *= factor.abs()
        relative = _OF_NORM * U32 * math.sqrt(max(update.shape))
        if family.round_base:
            relative += (_IN_FORMAT if family.round_delta else 1) * format.unit_roundoff
        error += expected.abs() * relative + rounding_error(merged, format)
        error += block.task_vector.double().abs() * U32
        return bool(((merged - expected).abs() <= error).all())


def misapplied(case: Case, result: ParameterResult, comparison: Comparison) -> str | None:
    """How DoRA's magnitudes were applied, where one wrong way explains every element.

    None too where the right way would, by the same measure: then they are too near to tell.
    """
    update, format = case.update(result.name), case.format_of(result.name)
    if not isinstance(update, Dora) or update.direction.stored is not None:
        return None
    right, *ways = _ways(case, result.name, update)
    row = worst_row(comparison)

    def explains(way: Way, family: Family) -> bool:
        blocks = case.probe_first(result.name, row)
        return all(way.explains(update, family, block, format) for block in blocks)

    for family in families(format, case.base.tensors[result.name].dtype):
        if found := next((way for way in ways if explains(way, family)), None):
            return None if explains(right, family) else found.how
    return None


def _ways(case: Case, name: str, update: Dora) -> list[Way]:
    direction, m = update.direction, update.m.double()
    of_outputs, of_inputs = _norms(
        (
            block.base.double() + direction.exact(block.start, block.stop)
            for block in case.blocks(name)
        ),
        direction.transposed,
    )
    of_base, _ = _norms((block.base.double() for block in case.blocks(name)), direction.transposed)
    one = torch.ones_like(m[:1])
    ways = [
        ("normed and scaled output by output", m / of_outputs, one),  # as it should be
        ("divided by the norm of each input's weights instead of each output's", m, 1 / of_inputs),
        ("divided by the norm of W alone", m / of_base, one),
    ]
    if len(of_outputs) == len(of_inputs):
        ways += [
            ("normed and scaled input by input instead of output by output", one, m / of_inputs),
            ("normed output by output but scaled input by input", one, m / of_outputs),
        ]
    if direction.transposed:
        ways = [(how, of_input, of_output) for how, of_output, of_input in ways]
    return [Way(how, rows[:, None], columns) for how, rows, columns in ways]


def _norms(matrix: Iterable[torch.Tensor], transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms over the inputs of each output, and over the outputs of each input."""
    along, across = [], torch.zeros(1, dtype=torch.float64)
    for rows in matrix:
        squares = rows * rows
        along.append(squares.sum(1))
        across = across.to(squares.device) + squares.sum(0)
    norms = torch.cat(along).sqrt(), across.sqrt()
    return norms[::-1] if transposed else norms
