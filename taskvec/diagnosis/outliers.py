"""Damage to a few elements: where it is, and what should stand there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from taskvec.bounds import AS_COMPUTED, bound_rows
from taskvec.certificate import Block
from taskvec.compare import Comparison, ParameterResult
from taskvec.diagnosis.case import Case, merged_rows, wide
from taskvec.diagnosis.merges import WrongMerge
from taskvec.header import row_shape
from taskvec.rounding import FP16, NARROW_FORMATS, Format, Recipe, half_ulp, subtract_rows

# Scattered elements up to this number, or this share, are damage; more must lie together.
_FEW, _FEW_SHARE = 16, 1e-3
_SHOWN = 8
# Beyond the error of two matmuls, a sum can be rounded to the next number, but not past it.
_DAMAGE_ULPS = 1.5

# A block -> which of its elements are wrong, and what T should be there (both like the block).
Finder = Callable[[Block], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Outliers:
    """Elements of one parameter that are not what the rest of it says they should be.

    Attributes:
        name, shape: of the parameter.
        count: how many.
        rows, columns: which ones they lie in.
        first, last: their range in storage order.
        unmoved: those that have the value of the base.
        zeros: those that are 0.
        nearer: those that are nearer to 0 than they should be.
        least: of their absolute values.
        most: of the absolute values of all elements.
        shown: the first few, as JSON.
        recipe: what gives every other element bit for bit; None where that is not known.
    """

    name: str
    shape: tuple[int, ...]
    count: int = 0
    rows: set[int] = field(default_factory=set)
    columns: set[int] = field(default_factory=set)
    first: int = -1
    last: int = -1
    unmoved: int = 0
    zeros: int = 0
    nearer: int = 0
    least: float = math.inf
    most: float = 0.0
    shown: list[dict[str, Any]] = field(default_factory=list)
    recipe: str | None = None

    @property
    def width(self) -> int:
        """Elements in a row; 1 for a vector."""
        return math.prod(row_shape(self.shape))

    @property
    def few(self) -> bool:
        return self.count <= max(_FEW, _FEW_SHARE * math.prod(self.shape))

    @property
    def together(self) -> bool:
        """More than one element in one row, one column, or one run without large gaps."""
        if not 2 <= self.count <= math.prod(self.shape) / 2:
            return False
        line = len(self.rows) == 1 or (len(self.columns) == 1 and self.width > 1)
        return line or 2 * self.count >= self.last - self.first + 1

    @property
    def unmerged(self) -> bool:
        """A part that the merge left out, rather than damage."""
        return self.count > _FEW and self.unmoved == self.count

    @property
    def clipped(self) -> bool:
        """Cut to the largest value, to within what the rounding of T can do to it."""
        largest = self.least * (1 + 2.0**-20) >= self.most > 0
        return 0 < self.count == self.nearer and largest and math.isfinite(self.most)

    @property
    def sparse_zeros(self) -> bool:
        """More than a few, all of them 0, and in no whole rows or columns."""
        spread = len(self.rows) * len(self.columns)
        return not self.few and self.zeros == self.count <= 0.95 * spread

    @property
    def where(self) -> str:
        """In words."""
        row, column = min(self.rows), min(self.columns)
        number = "1 element" if self.count == 1 else f"{self.count:,} elements"
        rows = f"row {row}" if len(self.rows) == 1 else f"rows {row} to {max(self.rows)}"
        if self.width == 1:
            return f"{number} of {self.name} ({rows})"
        columns = f", column {column}" if len(self.columns) == 1 else ""
        return f"{number} of {self.name} ({rows}{columns})"

    def add(self, block: Block, wrong: torch.Tensor, expected: torch.Tensor) -> None:
        """Take rows into account: which are wrong, and what M should be (float64)."""
        found = int(wrong.sum())
        if not found:
            return
        self.count += found
        flat = wrong.reshape(wrong.shape[0], -1)
        rows = flat.any(1).nonzero().flatten()
        self.rows.update((rows + block.start).tolist())
        self.columns.update(flat.any(0).nonzero().flatten().tolist())
        merged = merged_rows(block)
        self.zeros += int((wrong & (merged == 0)).sum())
        self.nearer += int((wrong & (merged.abs() < expected.abs())).sum())
        self.least = min(self.least, float(merged[wrong].abs().min()))
        first, last = int(rows[0]), int(rows[-1])
        if self.first < 0:
            self.first = (block.start + first) * self.width + int(flat[first].nonzero()[0])
        self.last = (block.start + last) * self.width + int(flat[last].nonzero()[-1])
        if len(self.shown) < _SHOWN:
            self._show(block, flat.nonzero()[: _SHOWN - len(self.shown)].tolist(), expected)

    def _show(self, block: Block, places: list[list[int]], expected: torch.Tensor) -> None:
        merged = merged_rows(block).reshape(-1, self.width)
        expected = expected.reshape(-1, self.width)
        for row, column in places:
            self.shown.append(
                {
                    "row": row + block.start,
                    "column": column,
                    "merged": as_json(float(merged[row, column].float())),
                    "expected": as_json(float(expected[row, column])),
                }
            )


def as_json(value: float) -> float | str:
    """JSON has no NaN and no infinity: those are spelled out."""
    return value if math.isfinite(value) else str(value)


def locate(case: Case, name: str, find: Finder) -> Outliers:
    """Collect the outliers of a parameter in one pass, which ends early where most are."""
    info, format = case.base.tensors[name], case.format_of(name)
    outliers = Outliers(name, info.shape)
    for block in case.blocks(name):
        wrong, expected = find(block)
        outliers.add(block, wrong, block.subtracted.double() + expected.double())
        unmoved = subtract_rows(format.round(wide(block.base)), block.subtracted)
        outliers.most = max(outliers.most, float(merged_rows(block).abs().max()))
        outliers.unmoved += int((wrong & (block.task_vector == unmoved)).sum())
        if 2 * outliers.count > info.elements:
            break
    return outliers


def off_the_merge(
    case: Case, result: ParameterResult, comparison: Comparison, merge: WrongMerge
) -> Finder:
    """Finds what another matmul cannot have turned over: elements out of bounds or ulps away."""
    update = case.update(result.name)
    outside = out_of_bounds(case, result, comparison)

    def find(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        expected = merge.task_vector(update, block)
        gap = (expected.double() - block.task_vector.double()).abs()
        gap -= 2 * update.error(
            AS_COMPUTED,
            block.start,
            block.stop,
            delta=update.exact(block.start, block.stop),
            base=block.base.double(),
            format=merge.format,
        )
        ulp = 2 * half_ulp(merged_rows(block), merge.format)
        wrong = (gap >= _DAMAGE_ULPS * ulp) & torch.isfinite(block.task_vector)
        return wrong | outside(block)[0], expected

    return find


def off_the_bits(case: Case, result: ParameterResult, merge: WrongMerge) -> Finder:
    """Finds the finite elements that a merge does not give bit for bit."""
    update = case.update(result.name)

    def find(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        expected = merge.task_vector(update, block)
        return (expected != block.task_vector) & torch.isfinite(block.task_vector), expected

    return find


def out_of_interval(
    case: Case, result: ParameterResult, recipe: Recipe, *, rounded_anywhere: bool
) -> Finder:
    """Finds the finite elements that no other arithmetic gives either, by the same recipe."""
    update, format = case.update(result.name), case.format_of(result.name)

    def find(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        def as_found(merged: torch.Tensor) -> torch.Tensor:
            return subtract_rows(merged, block.subtracted)

        rows = block.base, block.start, block.stop
        low, high = update.interval(
            recipe,
            block.start,
            block.stop,
            base=block.base,
            format=format,
            where=torch.ones_like(block.task_vector, dtype=torch.bool),
            rounded_anywhere=rounded_anywhere,
        )
        low, high = (as_found(end.reshape(block.task_vector.shape)) for end in (low, high))
        wrong = (block.task_vector < low) | (block.task_vector > high)
        return wrong, as_found(update.merged(recipe, *rows, format))

    return find


def out_of_bounds(case: Case, result: ParameterResult, comparison: Comparison) -> Finder:
    """Finds the finite elements of an adapted parameter that are out of their rounding bound."""
    update, certificate = case.update(result.name), comparison.certificate

    def find(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        delta = update.exact(block.start, block.stop)
        bound = bound_rows(
            certificate.tally.family,
            update,
            block.start,
            block.stop,
            delta=delta,
            merged=merged_rows(block),
            base=block.base.double(),
            base_format=certificate.base_format,
            format=certificate.format,
        )
        wrong = (block.task_vector.double() - delta).abs() > bound
        return wrong & torch.isfinite(block.task_vector), delta

    return find


def off_the_base(chain: Iterable[Format]) -> Finder:
    """Finds the finite elements of an unadapted parameter that are not the base's, as rounded."""
    formats = list(chain)

    def find(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        rows = wide(block.base)
        for format in formats:
            rows = format.round(rows)
        expected = subtract_rows(rows, block.subtracted)
        return (expected != block.task_vector) & torch.isfinite(block.task_vector), expected

    return find


def damage_of_unadapted(case: Case, name: str) -> Outliers:
    """The finite elements that are not the base's, for the rounding that explains most of them."""
    chains: list[tuple[Format, ...]] = [(), *((format,) for format in NARROW_FORMATS)]
    found = [locate(case, name, off_the_base(chain)) for chain in chains]
    return min(found, key=lambda outliers: outliers.count)


def non_finite(case: Case, result: ParameterResult) -> tuple[Outliers, Outliers]:
    """The elements that are NaN or infinite: those that overflow a format, and the damaged ones.

    Overflow is expected where base + adapter lies beyond the largest number of the format, or of
    fp16, in which it may have been computed.
    """
    update = case.update(result.name) if result.comparison is not None else None
    overflow, damage = (Outliers(result.name, result.shape) for _ in range(2))
    for block in case.blocks(result.name):
        bad = ~torch.isfinite(block.task_vector)
        if not bool(bad.any()):
            continue
        expected = block.base.double()
        if update is not None:
            expected = expected + update.exact(block.start, block.stop)
        beyond = ~torch.isfinite(expected.float().to(case.format_of(result.name).dtype))
        beyond |= ~torch.isfinite(expected.to(FP16.dtype))
        overflow.add(block, bad & beyond, expected)
        damage.add(block, bad & ~beyond, expected)
    return overflow, damage
