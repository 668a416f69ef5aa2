"""The task vector that an analysis looks at: from a file, or formed from two models.

The analysis scripts ask the same questions of a task vector that was extracted before and of a
fine-tuned model that lies beside its base; a `Subject` is either of the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from taskvec.checkpoint import Checkpoint, open_checkpoint
from taskvec.cli import UserError
from taskvec.compare import BLOCK_ELEMENTS, Magnitude, read_blocks
from taskvec.header import TensorInfo
from taskvec.names import aligned
from taskvec.taskvector import (
    FormedTaskVector,
    StoredTaskVector,
    TaskVector,
    open_task_vector,
)
from taskvec.tensorfile import row_blocks


@dataclass(frozen=True)
class Subject:
    """A task vector, and the base where it was given.

    Attributes:
        vector: where its rows come from.
        tensors: its float parameters, by name, in the order of their files.
        base: the base model, or None for a task vector file on its own.
        paths: what is read, for checks that no output lands on an input.
    """

    vector: TaskVector
    tensors: dict[str, TensorInfo]
    base: Checkpoint | None
    paths: list[Path]

    def blocks(self, name: str, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of T, block by block: (first row, (rows, ...) fp32 on the device).

        A parameter that is known to be zero without reading it has no blocks.
        """
        if self.vector.is_zero(name):
            return
        if self.base is not None:
            for block in read_blocks(self.base, self.vector, name, device):
                yield block.start, block.task_vector
        elif isinstance(self.vector, StoredTaskVector):
            yield from stored_blocks(self.vector, self.tensors[name], device)

    def measure(self, name: str, device: torch.device) -> Magnitude:
        """Norm, largest absolute value and non-zero elements of one parameter."""
        magnitude = Magnitude()
        for _, rows in self.blocks(name, device):
            if bool(rows.any()):
                magnitude.add(rows)
        return magnitude


def stored_blocks(
    vector: StoredTaskVector, info: TensorInfo, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """A parameter of a task vector file, block by block: (first row, (rows, ...) fp32)."""
    for start, stop in row_blocks(info, BLOCK_ELEMENTS):
        yield start, vector.file.read(info, start, stop).to(device, torch.float32)


@contextlib.contextmanager
def open_subject(
    task_vector_path: str | Path | None,
    *,
    finetuned_model: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
) -> Iterator[Subject]:
    """Open what an analysis looks at.

    Args:
        task_vector_path: a task vector file, or a directory of extract_task_vectors.py; or
        finetuned_model: a model, which needs base_model. Exactly one of the two.
        base_model: the base. Beside a task vector it is optional, and parameters of the base that
            the file leaves out have not changed.
        revision: of a base on the hub.

    Raises:
        UserError: nothing there, both or neither given, or models that do not fit together.
    """
    if revision is not None and base_model is None:
        raise UserError("--revision is that of the base: give --base_model too")
    with contextlib.ExitStack() as stack:
        base = None
        if base_model is not None:
            base = stack.enter_context(open_checkpoint(base_model, revision))
            base.refuse_quantised()
        vector, paths = stack.enter_context(open_vector(base, task_vector_path, finetuned_model))
        tensors = base.tensors if base is not None else vector.tensors
        floats = {name: info for name, info in tensors.items() if info.is_float}
        if not floats:
            raise UserError(f"{vector.source}: holds no tensors")
        yield Subject(vector, floats, base, [*paths, *(base.paths if base is not None else [])])


@contextlib.contextmanager
def open_vector(
    base: Checkpoint | None, task_vector_path: str | Path | None, finetuned_model: str | None
) -> Iterator[tuple[TaskVector, list[Path]]]:
    """A task vector that fits a base, and the paths that it is read from.

    Args:
        base: the base, which a task vector file can do without.
        task_vector_path, finetuned_model: exactly one of the two.

    Raises:
        UserError: as `open_subject`.
    """
    if (task_vector_path is None) == (finetuned_model is None):
        raise UserError("give either a task vector (--task_vector_path) or --finetuned_model")
    if task_vector_path is not None:
        with open_task_vector(Path(task_vector_path)) as stored:
            if base is not None:
                stored.check_fits(base)
            yield stored, stored.paths
    elif finetuned_model is not None:
        if base is None:
            raise UserError("--finetuned_model needs --base_model, which is subtracted from it")
        with open_checkpoint(finetuned_model) as merged:
            formed = FormedTaskVector(finetuned_model, aligned(base, merged))
            formed.check_other_tensors(base)
            yield formed, merged.paths
