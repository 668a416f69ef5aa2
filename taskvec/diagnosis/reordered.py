"""Are weights, or rows or columns of them, in the wrong place?

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
from taskvec.diagnosis.permuted import permuted
from taskvec.rounding import NARROW_FORMATS, U32, half_ulp, subtract_rows
from taskvec.update import Update

WEIGHTS, UPDATE, TURNED = "of the weights", "of the update alone", "turned"

_LEAST_LINES, _PROJECTIONS = 16, 4
_ROUNDINGS = 4  # half ulps: more than a sum of many independent rounding errors comes to
_TURNED = 1 << 24  # elements of columns that are kept at a time
_MOVED = 0.01  # of the products' variance: less is two lines that are alike, and noise
_RESOLVED = 0.05  # of their size: the sorted products of other rows are farther apart


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


def lines_reordered(case: Case, result: ParameterResult) -> str | None:
    """What lies in another order: rows or columns "of the weights" or "of the update alone".

    `TURNED` where rows and columns of the weights have changed places.

    The rows of two matrices are the same ones if their products with any vector are, once sorted;
    it is tried with a few vectors. Rounding blurs the products of a small update, of which
    `taskvec.diagnosis.permuted` asks more.
    """
    info = case.base.tensors[result.name]
    if len(result.shape) != 2:
        return None
    products = {what: _Products(result.shape, case.device) for what in (WEIGHTS, UPDATE)}
    update = case.update(result.name) if result.comparison is not None else None
    if result.shape[0] == result.shape[1] and _is_turned(case, result.name, update):
        return TURNED
    for block in case.blocks(result.name):
        base, merged = block.subtracted.double(), merged_rows(block)
        delta = update.exact(block.start, block.stop) if update else torch.zeros_like(base)
        blur = _ROUNDINGS * half_ulp(torch.maximum(base.abs(), merged.abs()), case.format)
        products[WEIGHTS].add(block.start, merged, base + delta, blur)
        products[UPDATE].add(block.start, block.task_vector.double(), delta, blur)
    for what, found in products.items():
        for lines, count in (("rows", info.rows), ("columns", info.row_elements)):
            if count >= _LEAST_LINES and found.are_reordered(lines):
                return f"{lines} {what}"
    return permuted(case, result.name, update)


def _is_turned(case: Case, name: str, update: Update | None) -> bool:
    """Whether M is (W + delta)ᵀ within rounding; a few rows are enough to refute it."""
    format, side = case.format_of(name), case.base.tensors[name].rows
    expected, first, step = torch.zeros(0), 0, 0  # columns of W + delta, as rows from `first` on
    for block in case.probe_first(name):
        if not first <= block.start < block.stop <= first + len(expected):
            first, last = block.start, max(block.stop, block.start + step)
            columns = [_total(rows, update)[:, first:last].clone() for rows in case.blocks(name)]
            expected, step = torch.cat(columns).T, _TURNED // side
        merged, wanted = merged_rows(block), expected[block.start - first : block.stop - first]
        size = wanted.abs() + block.subtracted.double().abs()  # T is rounded to that of both
        allowed = 2 * _ROUNDINGS * half_ulp(merged, format) + _ROUNDINGS * U32 * size
        if not bool(((merged - wanted).abs() <= allowed).all()):
            return False
    return not bool((expected == expected[0, 0]).all())


def _total(block: Block, update: Update | None) -> torch.Tensor:
    """Rows of W + delta, float64."""
    base = block.subtracted.double()
    return base if update is None else base + update.exact(block.start, block.stop)


class _Products:
    """Products of the rows, and of the columns, of two matrices with a few vectors.

    Args:
        shape: (rows, columns) of the matrices.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._right, self._left = (
            torch.randn(length, _PROJECTIONS, generator=generator, dtype=torch.float64).to(device)
            for length in (shape[1], shape[0])
        )
        # There, as expected, and the variance of their rounding: of each row, and of each column.
        self._rows: list[list[torch.Tensor]] = []
        columns = shape[1], _PROJECTIONS
        self._columns = [torch.zeros(columns, dtype=torch.float64, device=device) for _ in range(3)]

    def add(
        self, start: int, there: torch.Tensor, expected: torch.Tensor, blur: torch.Tensor
    ) -> None:
        """Take rows into account, of both matrices and of what rounding can do to an element."""
        left, matrices = self._left[start : start + len(there)], (there, expected)
        self._rows.append([*(rows @ self._right for rows in matrices), blur**2 @ self._right**2])
        for total, rows in zip(self._columns, matrices, strict=False):
            total += rows.T @ left
        self._columns[2] += (blur**2).T @ left**2

    def are_reordered(self, lines: str) -> bool:
        """Whether the "rows", or "columns", of one matrix are the other's, in another order."""
        found = self._columns
        if lines == "rows":
            found = [torch.cat(part) for part in zip(*self._rows, strict=True)]
        there, expected, variance = found
        size, doubt = _RESOLVED * expected.std(), variance.max().sqrt()
        gap = (there.sort(0).values - expected.sort(0).values).abs().max()
        moved = ((there - expected) ** 2).mean() > _MOVED * expected.var()
        return bool(moved) and bool(gap <= doubt) and bool(doubt < size)


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
