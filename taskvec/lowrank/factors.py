"""The best low-rank factors of one matrix of a task vector, and what they leave out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from taskvec.compare import BLOCK_ELEMENTS, read_blocks
from taskvec.lowrank.floor import FloorSums, RankFinding
from taskvec.spectrum import Spectrum, streamed_spectrum
from taskvec.subject import Subject
from taskvec.taskvector import FormedTaskVector, StoredTaskVector
from taskvec.tensorfile import row_blocks

_FIRST_LOOK = 16  # singular values that are computed before it is known how many there are


@dataclass(frozen=True)
class Factors:
    """T ~ left @ right for a stored matrix T (m, n), and how well.

    Attributes:
        left: (m, r) fp32, right: (r, n) fp32, of equal size: U sqrt(S) and sqrt(S) V^T.
        finding: what stands above the noise.
        norm: ‖T‖_F.
        error: ‖T - left @ right‖_F, from the factors as they are stored.
        optimum: the least that any matrices of this rank leave (Eckart and Young, 1936); None where
            not all singular values were computed.
        weakest_kept, strongest_left: singular values; None where there is none, or not known.
    """

    left: torch.Tensor
    right: torch.Tensor
    finding: RankFinding
    norm: float
    error: float
    optimum: float | None
    weakest_kept: float | None
    strongest_left: float | None

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def factorise(
    subject: Subject,
    names: Sequence[str],
    device: torch.device,
    rank: int | None,
    most: int | None = None,
) -> Factors:
    """The factors of one matrix.

    Args:
        subject: the task vector, and the base where there is one.
        names: the tensors that the matrix is, one below the other.
        rank: how many singular triplets to keep; None for those above the noise.
        most: no more than these of them.

    Returns:
        factors of rank 0 where nothing stands above the noise and no rank was asked for.
    """
    sums = _floor_sums(subject, names, device)
    shape = _shape(subject, names)
    side = min(shape)

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        for first, name in _placed(subject, names):
            if subject.vector.is_zero(name):
                for start, stop in row_blocks(subject.tensors[name], BLOCK_ELEMENTS):
                    zeros = torch.zeros(stop - start, shape[1], dtype=torch.float64, device=device)
                    yield first + start, zeros
            for start, rows in subject.blocks(name, device):
                yield first + start, rows.double()

    leading = min(side, (rank or 0) + _FIRST_LOOK)
    while True:
        found = streamed_spectrum(blocks, shape, leading)
        finding = sums.find(found)
        enough = most is not None and finding.rank >= most
        if finding.complete or rank is not None or enough or leading == side:
            break
        leading = min(side, 4 * leading)
    kept = min(side, finding.rank if rank is None else rank, side if most is None else most)
    return _factors(found, finding, kept, sums, blocks())


def _factors(
    found: Spectrum,
    finding: RankFinding,
    rank: int,
    sums: FloorSums,
    blocks: Iterator[tuple[int, torch.Tensor]],
) -> Factors:
    roots = found.values[:rank].sqrt()
    left, right = (found.left[:, :rank] * roots).float(), (found.right[:, :rank] * roots).T.float()
    squared = 0.0
    for start, rows in blocks:
        kept = left[start : start + rows.shape[0]].double() @ right.double()
        squared += float(((rows - kept) ** 2).sum())
    values = found.values
    return Factors(
        left=left.cpu().contiguous(),
        right=right.cpu().contiguous(),
        finding=finding,
        norm=math.sqrt(sums.squared_norm),
        error=math.sqrt(squared),
        optimum=found.tail_norm(rank) if found.exact else None,
        weakest_kept=float(values[rank - 1]) if rank else None,
        strongest_left=float(values[rank]) if rank < values.numel() else None,
    )


def _shape(subject: Subject, names: Sequence[str]) -> tuple[int, int]:
    shapes = [subject.tensors[name].shape for name in names]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def _placed(subject: Subject, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Each tensor with the matrix's row that it begins at."""
    first = 0
    for name in names:
        yield first, name
        first += subject.tensors[name].shape[0]


def _floor_sums(subject: Subject, names: Sequence[str], device: torch.device) -> FloorSums:
    vector, shape = subject.vector, _shape(subject, names)
    if subject.base is None:
        sums = FloorSums(shape, device)
        for first, name in _placed(subject, names):
            for start, rows in subject.blocks(name, device):
                sums.add(first + start, rows, None)
        return sums
    known = isinstance(vector, FormedTaskVector) or (
        isinstance(vector, StoredTaskVector) and vector.merged_format is not None
    )
    sums = FloorSums(
        shape,
        device,
        merged=vector.formats(names[0])[0] if known else None,
        stored=subject.base.tensors[names[0]].dtype,
        base_format=vector.base_format,
    )
    for first, name in _placed(subject, names):
        for block in read_blocks(subject.base, vector, name, device):
            sums.add(first + block.start, block.task_vector, block)
    return sums
