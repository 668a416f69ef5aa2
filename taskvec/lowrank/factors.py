"""The best low-rank factors of one matrix of a task vector, and what they leave out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from taskvec.compare import read_blocks
from taskvec.lowrank.floor import FloorSums, RankFinding
from taskvec.spectrum import Spectrum, streamed_spectrum
from taskvec.subject import Subject
from taskvec.taskvector import FormedTaskVector, StoredTaskVector

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
    subject: Subject, name: str, device: torch.device, rank: int | None, most: int | None = None
) -> Factors:
    """The factors of one matrix.

    Args:
        subject: the task vector, and the base where there is one.
        rank: how many singular triplets to keep; None for those above the noise.
        most: no more than these of them.

    Returns:
        factors of rank 0 where nothing stands above the noise and no rank was asked for.
    """
    sums = _floor_sums(subject, name, device)
    info = subject.tensors[name]
    shape, side = (info.shape[0], info.shape[1]), min(info.shape)

    def blocks() -> Iterator[tuple[int, torch.Tensor]]:
        for start, rows in subject.blocks(name, device):
            yield start, rows.double()

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


def _floor_sums(subject: Subject, name: str, device: torch.device) -> FloorSums:
    info, vector = subject.tensors[name], subject.vector
    shape = (info.shape[0], info.shape[1])
    if subject.base is None:
        sums = FloorSums(shape, device)
        for start, rows in subject.blocks(name, device):
            sums.add(start, rows, None)
        return sums
    known = isinstance(vector, FormedTaskVector) or (
        isinstance(vector, StoredTaskVector) and vector.merged_format is not None
    )
    sums = FloorSums(
        shape,
        device,
        merged=vector.formats(name)[0] if known else None,
        stored=subject.base.tensors[name].dtype,
        base_format=vector.base_format,
    )
    for block in read_blocks(subject.base, vector, name, device):
        sums.add(block.start, block.task_vector, block)
    return sums
