"""What is diagnosed, and how its parameters are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from taskvec.adapter import Adapter
from taskvec.certificate import Block
from taskvec.checkpoint import Checkpoint
from taskvec.compare import Comparison, read_blocks
from taskvec.rounding import NARROW_FORMATS, Format, subtract_rows
from taskvec.taskvector import TaskVector
from taskvec.tensorfile import row_blocks
from taskvec.update import Update

_PROBE_ELEMENTS = 1 << 15


@dataclass(frozen=True)
class Case:
    """What is diagnosed: a task vector of a base that an adapter should explain.

    Attributes:
        format: what the adapted parameters are stored in.
    """

    base: Checkpoint
    adapter: Adapter
    vector: TaskVector
    device: torch.device
    format: Format

    def format_of(self, name: str) -> Format:
        """What a parameter is stored in; a few modules may be in another format than the rest."""
        possible = self.vector.formats(name)
        return self.format if self.format in possible else possible[0]

    def blocks(self, name: str) -> Iterator[Block]:
        """A parameter, block by block."""
        return read_blocks(self.base, self.vector, name, self.device)

    def probe_first(self, name: str, row: int = 0) -> Iterator[Block]:
        """The same after a small block of it, which is enough to refute most hypotheses."""
        yield self.probe(name, row)
        yield from self.blocks(name)

    def probe(self, name: str, row: int = 0) -> Block:
        """A small block of rows of a parameter that holds the given row."""
        for start, stop in row_blocks(self.base.tensors[name], _PROBE_ELEMENTS):
            if start <= row < stop:
                rows = self.base.read(name, start, stop).to(self.device)
                return self.vector.block(rows, name, start, stop)
        raise IndexError(f"{name}: row {row}")

    def update(self, name: str) -> Update:
        return self.adapter.update(name, self.device)


def worst_row(comparison: Comparison) -> int:
    """The row of the element that is farthest out of its bound."""
    worst = comparison.certificate.tally.worst
    return worst.row if worst else 0


def wide(base: torch.Tensor) -> torch.Tensor:
    """Rows of a weight in fp32, or in float64 if they are."""
    return base.to(torch.promote_types(base.dtype, torch.float32))


def merged_rows(block: Block) -> torch.Tensor:
    """M in float64; where only T is known, to within the rounding of T."""
    if block.merged is not None:
        return block.merged.double()
    return block.subtracted.double() + block.task_vector.double()


def unmerged_as(case: Case, name: str) -> tuple[Format, ...] | None:
    """The roundings after which the base's parameter is the merged one, bit for bit.

    Returns:
        () where it was not even rounded; None if this is not the base's parameter.
    """
    chains: Sequence[tuple[Format, ...]] = [
        (),
        *((format,) for format in NARROW_FORMATS),
        *itertools.permutations(NARROW_FORMATS, 2),
    ]
    for block in case.probe_first(name):
        chains = [chain for chain in chains if _is_rounded_base(block, chain)]
        if not chains:
            return None
    return chains[0]


def _is_rounded_base(block: Block, chain: Iterable[Format]) -> bool:
    rows = wide(block.base)
    for format in chain:
        rows = format.round(rows)
    return torch.equal(subtract_rows(rows, block.subtracted), block.task_vector)


def lower_formats(format: Format) -> list[Format]:
    """The formats with fewer significant bits than the given one."""
    return [other for other in reversed(NARROW_FORMATS) if other.bits < format.bits]
