"""The deltas of step 3 beside the task vector of step 2, read block by block.

Where the base is at hand, the merged weights are known too, and with them the format's ulps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.compare import BLOCK_ELEMENTS
from taskvec.header import TensorInfo
from taskvec.rounding import FP32, Format, half_ulp, subtract_rows
from taskvec.spectrum import Blocks
from taskvec.taskvector import StoredTaskVector
from taskvec.tensorfile import TensorFile, row_blocks


@dataclass(frozen=True)
class Rows:
    """Some rows of one parameter, seen as a matrix; all on one device.

    Attributes:
        start: the first one.
        task_vector: T (b, n) fp32.
        delta: (b, n) fp32.
        subtracted: W as T was formed with it, fp32 or wider; None without the base.
    """

    start: int
    task_vector: torch.Tensor
    delta: torch.Tensor
    subtracted: torch.Tensor | None = None

    @property
    def known_base(self) -> torch.Tensor:
        """What T was formed with.

        Raises:
            ValueError: the base is not at hand.
        """
        if self.subtracted is None:
            raise ValueError("the base is not known")
        return self.subtracted

    def merged(self, format: Format) -> torch.Tensor:
        """M in float64, recovered as W + T rounded to the format it was stored in."""
        wide = self.known_base.double() + self.task_vector.double()
        return wide.float().to(format.dtype).double()


@dataclass(frozen=True)
class Pair:
    """One parameter of both files.

    Attributes:
        info: in the file of deltas.
        deltas, vector, base: where its rows are read from.
        device: where they go.
    """

    info: TensorInfo
    deltas: TensorFile
    vector: StoredTaskVector
    base: Checkpoint | None
    device: torch.device

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def shape(self) -> tuple[int, int]:
        """As a matrix: its rows as files are read (`TensorInfo.rows`) against their elements."""
        return self.info.rows, self.info.row_elements

    def rows(self, *, base: bool = False) -> Iterator[Rows]:
        """The parameter, block by block, with the base's rows if they are wanted and known."""
        for start, stop in row_blocks(self.info, BLOCK_ELEMENTS):
            subtracted = self._subtracted(start, stop) if base and self.base else None
            yield Rows(start, self._task_vector(start, stop), self._delta(start, stop), subtracted)

    def task_vector_blocks(self) -> Blocks:
        return self._blocks(lambda start, stop: self._task_vector(start, stop).double())

    def delta_blocks(self) -> Blocks:
        return self._blocks(lambda start, stop: self._delta(start, stop).double())

    def residual_blocks(self) -> Blocks:
        return self._blocks(
            lambda start, stop: (
                self._task_vector(start, stop).double() - self._delta(start, stop).double()
            )
        )

    def base_blocks(self) -> Blocks:
        """W as T was formed with it; only where the base is known."""
        return self._blocks(lambda start, stop: self._subtracted(start, stop).double())

    def merged_format(self) -> Format | None:
        """The format that M was stored in: the first that can have given every element of T.

        Without the base it is what the task vector's file says, or None.
        """
        candidates = list(self.vector.formats(self.name))
        if self.base is None:
            return self.vector.merged_format
        for rows in self.rows(base=True):
            if candidates == [FP32]:
                break
            candidates = [format for format in candidates if _could_be(rows, format)] or [FP32]
        return candidates[0]

    def refuse_non_finite(self, rows: Rows) -> None:
        """
        Raises:
            UserError: NaN or infinity in either file.
        """
        for path, values in (
            (self.vector.file.path, rows.task_vector),
            (self.deltas.path, rows.delta),
        ):
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                raise UserError(
                    f"{path}: {self.name}: {bad} values in rows {rows.start} to "
                    f"{rows.start + values.shape[0] - 1} are NaN or infinite; "
                    "compare_lora_task_vector.py says which parameters are damaged"
                )

    def _task_vector(self, start: int, stop: int) -> torch.Tensor:
        file = self.vector.file
        return self._matrix(file.read(file.tensors[self.name], start, stop)).float()

    def _delta(self, start: int, stop: int) -> torch.Tensor:
        return self._matrix(self.deltas.read(self.info, start, stop)).float()

    def _subtracted(self, start: int, stop: int) -> torch.Tensor:
        if self.base is None:
            raise ValueError("the base is not known")
        rows = self.base.read(self.name, start, stop).to(self.device)
        return self._matrix(self.vector.block(rows, self.name, start, stop).subtracted)

    def _matrix(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.device).reshape(-1, self.shape[1])

    def _blocks(self, read: Callable[[int, int], torch.Tensor]) -> Blocks:
        return lambda: (
            (start, read(start, stop)) for start, stop in row_blocks(self.info, BLOCK_ELEMENTS)
        )


def pairs(
    deltas: TensorFile,
    vector: StoredTaskVector,
    base: Checkpoint | None,
    device: torch.device,
) -> list[Pair]:
    """The parameters of both files, in the order of the deltas.

    Raises:
        UserError: a delta without a task vector of the same shape, no deltas at all, or a base of
            another architecture.
    """
    if not deltas.tensors:
        raise UserError(f"{deltas.path}: holds no deltas; compare_lora_task_vector.py writes them")
    for name, info in deltas.tensors.items():
        other = vector.file.tensors.get(name)
        if other is None:
            raise UserError(f"{vector.file.path}: has no {name}, which {deltas.path} has")
        if other.shape != info.shape:
            raise UserError(
                f"{name}: {other.shape} in {vector.file.path}, but {info.shape} in {deltas.path}"
            )
        if not info.is_float:
            raise UserError(f"{deltas.path}: {name} is {info.dtype}, not a float")
    if base is not None:
        vector.check_fits(base)
    return [Pair(info, deltas, vector, base, device) for info in deltas.tensors.values()]


def half_ulps(rows: Rows, format: Format | None) -> torch.Tensor | None:
    """Half an ulp of each merged weight, float64; None where they are not known."""
    if format is None or rows.subtracted is None:
        return None
    return half_ulp(rows.merged(format), format)


def _could_be(rows: Rows, format: Format) -> bool:
    """Whether some number of the format less W gives every element of T."""
    stored = rows.merged(format).to(rows.known_base.dtype)
    return torch.equal(subtract_rows(stored, rows.known_base), rows.task_vector)
