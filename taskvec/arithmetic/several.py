"""Several task vectors of one architecture, read side by side.

A parameter that one of them leaves out has not changed in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.rounding import all_finite
from taskvec.taskvector import StoredTaskVector, open_task_vector
from taskvec.tensorfile import row_blocks

BLOCK_ELEMENTS = 1 << 20  # of all the vectors together


@dataclass(frozen=True)
class TaskVectors:
    """Task vectors that fit together.

    Attributes:
        vectors: in the order in which they were given.
        tensors: every parameter that any of them holds, where the first that holds it has it.
    """

    vectors: list[StoredTaskVector]
    tensors: dict[str, TensorInfo]

    @property
    def sources(self) -> list[str]:
        return [vector.source for vector in self.vectors]

    @property
    def paths(self) -> list[Path]:
        """What is read, for checks that no output lands on an input."""
        return [path for vector in self.vectors for path in vector.paths]

    @property
    def nbytes(self) -> int:
        return sum(i.nbytes for vector in self.vectors for i in vector.tensors.values())

    def stored_bytes(self, name: str) -> int:
        """The bytes of one parameter in all the vectors."""
        return sum(v.tensors[name].nbytes for v in self.vectors if name in v.tensors)

    def is_zero(self, name: str) -> bool:
        """True if a parameter is known to be zero in all of them without reading it."""
        return all(vector.is_zero(name) for vector in self.vectors)

    def row_blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """Blocks of rows of which those of all the vectors fit into memory together."""
        return row_blocks(self.tensors[name], max(1, BLOCK_ELEMENTS // len(self.vectors)))

    def rows(self, name: str, start: int, stop: int, device: torch.device) -> list[torch.Tensor]:
        """The same rows of every vector: (rows, ...) fp32 each.

        Raises:
            UserError: NaN or infinity.
        """
        return [read_rows(v, self.tensors[name], start, stop, device) for v in self.vectors]

    def blocks(self, name: str, index: int, device: torch.device) -> Iterator[torch.Tensor]:
        """One vector's rows of a parameter, in the order of the file: (rows, ...) fp32."""
        for start, stop in self.row_blocks(name):
            yield read_rows(self.vectors[index], self.tensors[name], start, stop, device)


def read_rows(
    vector: StoredTaskVector, info: TensorInfo, start: int, stop: int, device: torch.device
) -> torch.Tensor:
    """Rows of a parameter of a task vector, (rows, ...) fp32; zeros where it leaves it out.

    Args:
        info: the parameter's name and shape; it may be another vector's.

    Raises:
        UserError: NaN or infinity, with which no arithmetic makes sense.
    """
    if vector.is_zero(info.name):
        shape = (stop - start, *info.row_shape) if info.shape else ()
        return torch.zeros(shape, device=device)
    rows = vector.file.read(vector.tensors[info.name], start, stop)
    rows = rows.to(device, torch.float32)
    if not all_finite(rows):
        raise UserError(f"{vector.file.path}: {info.name}: holds NaN or infinity")
    return rows


@contextlib.contextmanager
def open_task_vectors(paths: Sequence[str | Path]) -> Iterator[TaskVectors]:
    """Open task vectors and check that they are of one architecture.

    Args:
        paths: a task vector file, or its directory, each.

    Raises:
        UserError: nothing there, or a parameter that two of them have in different shapes.
    """
    with contextlib.ExitStack() as stack:
        vectors = [stack.enter_context(open_task_vector(Path(path))) for path in paths]
        tensors: dict[str, TensorInfo] = {}
        for vector in vectors:
            for name, info in vector.tensors.items():
                known = tensors.setdefault(name, info)
                if known.shape != info.shape:
                    raise UserError(
                        f"{name}: {info.shape} in {info.path}, but {known.shape} in {known.path}; "
                        "only task vectors of one architecture can be put together"
                    )
        if not tensors:
            raise UserError(f"{vectors[0].source}: holds no tensors")
        yield TaskVectors(vectors, tensors)
