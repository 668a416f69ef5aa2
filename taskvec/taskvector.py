"""A task vector T = fl32(M - W), read from a file or formed on the fly from a merged model.

Task arithmetic: Ilharco et al., arXiv 2212.04089, section 2. Both sources hand out the same
`Block`, so whoever looks at a merge need not know which of the two it was given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from taskvec.certificate import Block
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.difference import is_zero
from taskvec.header import TensorInfo
from taskvec.kinds import (
    BASE_PRECISION,
    MERGED_PRECISION,
    TASK_VECTOR,
    TASK_VECTOR_FILE,
    mistaken_directory,
    mistaken_file,
)
from taskvec.names import aligned
from taskvec.rounding import (
    BF16,
    FORMATS,
    FP16,
    FP32,
    Format,
    all_finite,
    dtype_name,
    subtract_rows,
)
from taskvec.tensorfile import StoredTensor, TensorFile, row_blocks, same_bits, to_device
from taskvec.ties import set_copies_aside

_ALL_FORMATS = (BF16, FP16, FP32)

# A task vector T is a model's file by mistake where ‖T - W‖ is so small a share of ‖W‖.
_LIKE_THE_BASE, _LOOKED_AT, _LOOKED_AT_ELEMENTS = 0.1, 4, 1 << 15


class TaskVector(Protocol):
    """What the comparison needs of a task vector.

    Attributes:
        source: as the user named it.
        tensors: what it holds, by name.
        base_format: what the base was rounded to before it was subtracted; None: as stored.
    """

    source: str
    base_format: Format | None

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    @property
    def disk_bytes(self) -> int: ...

    def formats(self, name: str) -> tuple[Format, ...]:
        """The formats a parameter may have been merged in, the first that fits being the one."""

    def dtype(self, name: str) -> torch.dtype | None:
        """What M is stored in, where that is known."""

    def is_zero(self, name: str) -> bool:
        """True if a parameter is known to be zero without reading it."""

    def stored(self, name: str) -> list[StoredTensor]:
        """Where a parameter is read from, beside the base; nothing if it is left out."""

    def block(self, base: torch.Tensor, name: str, start: int, stop: int) -> Block:
        """Rows of the task vector beside the given rows of the base, on the base's device."""


@dataclass
class StoredTaskVector:
    """A task vector in a safetensors file, such as extract_task_vectors.py writes."""

    source: str
    file: TensorFile
    base_format: Format | None
    merged_format: Format | None
    disk_bytes: int

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.file.tensors

    @property
    def paths(self) -> list[Path]:
        """What is read, for checks that no output lands on an input: as it was named, the file."""
        return [Path(self.source), self.file.path]

    def formats(self, name: str) -> tuple[Format, ...]:
        if self.merged_format is None:
            return _ALL_FORMATS
        return (self.merged_format,) if self.merged_format is FP32 else (self.merged_format, FP32)

    def dtype(self, name: str) -> torch.dtype | None:
        wide = self.file.metadata.get(MERGED_PRECISION) == dtype_name(torch.float64)
        return torch.float64 if wide else None

    def is_zero(self, name: str) -> bool:
        return name not in self.file.tensors or self.file.is_hole(self.file.tensors[name])

    def stored(self, name: str) -> list[StoredTensor]:
        held = name in self.file.tensors
        return [StoredTensor(self.file, self.file.tensors[name])] if held else []

    def check_fits(self, base: Checkpoint) -> None:
        """Refuse a task vector of another architecture; from here on its tensors have base's names.

        Raises:
            UserError: names the first tensor that the base lacks or has in another shape; or the
                file holds a model, such as the merged one, and no differences.
        """
        path = self.file.path
        held = Checkpoint(
            str(path), None, {path: self.file}, self.file.tensors, None, base.config()
        )
        set_copies_aside(held)
        self.file.tensors = aligned(base, held, partly=True).tensors
        if self._is_model(base):
            raise UserError(
                f"{path}: holds weights like the base's, not differences from them; "
                "extract_task_vectors.py makes a task vector of a model, and --finetuned_model "
                "takes the model itself"
            )

    def _is_model(self, base: Checkpoint) -> bool:
        """Whether the largest tensors, as far as they are looked at, are nearly the base's own."""
        common = [name for name in self.tensors if name in base.tensors]
        seen = []
        for name in sorted(common, key=lambda name: -self.tensors[name].elements)[:_LOOKED_AT]:
            info = self.tensors[name]
            start, stop = next(iter(row_blocks(info, _LOOKED_AT_ELEMENTS)), (0, 0))
            weights = base.read(name, start, stop).double()
            if size := float(weights.norm()):
                rows = self.file.read(info, start, stop).double()
                seen.append(float((rows - weights).norm()) <= _LIKE_THE_BASE * size)
        return bool(seen) and all(seen)

    def block(self, base: torch.Tensor, name: str, start: int, stop: int) -> Block:
        if name in self.file.tensors:
            rows = self.file.read(self.file.tensors[name], start, stop)
        else:  # a parameter that the file leaves out has not changed
            rows = torch.zeros(base.shape)
        rows = to_device(rows, base.device).to(torch.float32)
        return Block(start, stop, base, _subtracted(base, self.base_format), rows)


@dataclass
class FormedTaskVector:
    """The task vector of a merged model that is at hand: nothing needs to be extracted first.

    The model's tensors have the base's names (`taskvec.names.aligned`). What it leaves out, which
    can only be a buffer, has not changed.
    """

    source: str
    merged: Checkpoint
    base_format: Format | None = None

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.merged.tensors

    @property
    def disk_bytes(self) -> int:
        return 0

    def formats(self, name: str) -> tuple[Format, ...]:
        if name not in self.merged.tensors:
            return (FP32,)
        dtype = self.merged.tensors[name].dtype
        named = [format for format in FORMATS.values() if format.dtype == dtype]
        return tuple(named) or (FP32,)

    def dtype(self, name: str) -> torch.dtype | None:
        return self.merged.tensors[name].dtype if name in self.merged.tensors else None

    def is_zero(self, name: str) -> bool:
        return name not in self.merged.tensors

    def stored(self, name: str) -> list[StoredTensor]:
        return [self.merged.stored(name)] if name in self.merged.tensors else []

    def check_other_tensors(
        self, base: Checkpoint, advance: Callable[[int], object] = lambda nbytes: None
    ) -> None:
        """Tensors that are no floats have no difference that T could hold: they must be the same.

        Args:
            advance: told of the bytes of each of them, in both models.

        Raises:
            UserError: names the first that differs.
        """
        for name, info in base.tensors.items():
            if info.is_float or self.is_zero(name):
                continue
            other = self.merged.tensors[name]
            alike = info.dtype == other.dtype
            if not alike or not same_bits(base.read(name), self.merged.read(name)):
                raise UserError(
                    f"{self.source}: {name} ({other.dtype}) differs from the base's "
                    f"({info.dtype}); only float tensors can be subtracted"
                )
            advance(info.nbytes + other.nbytes)

    def block(self, base: torch.Tensor, name: str, start: int, stop: int) -> Block:
        merged = base
        if name in self.merged.tensors:
            merged = to_device(self.merged.read(name, start, stop), base.device)
        subtracted = _subtracted(base, self.base_format)
        rows = subtract_rows(merged, subtracted)
        return Block(start, stop, base, subtracted, rows, merged)

    def changed_rows(
        self, base: torch.Tensor, name: str, start: int, stop: int, device: torch.device
    ) -> torch.Tensor | None:
        """Rows of the task vector, fp32 on the device; None where all of them are zero.

        Args:
            base: the same rows of the base as stored, on the CPU.
        """
        merged = self.merged.read(name, start, stop)
        if self.base_format is None and same_bits(base, merged) and all_finite(base):
            return None
        subtracted = _subtracted(to_device(base, device), self.base_format)
        rows = subtract_rows(to_device(merged, device), subtracted)
        return None if is_zero(rows) else rows


@contextlib.contextmanager
def open_task_vector(path: Path) -> Iterator[StoredTaskVector]:
    """Open a task vector file, or the one in a directory of extract_task_vectors.py.

    Raises:
        UserError: nothing there, another kind of directory or file, or tensors that are no floats.
    """
    file = path / TASK_VECTOR_FILE if path.is_dir() else path
    if not file.is_file():
        if what := mistaken_directory(path, TASK_VECTOR):
            raise UserError(f"{path}: {what}")
        raise UserError(f"{file}: no such task vector; extract_task_vectors.py makes it")
    with TensorFile(file) as tensors:
        if what := mistaken_file(file, tensors.tensors, tensors.metadata, TASK_VECTOR):
            raise UserError(f"{file}: {what}")
        for info in tensors.tensors.values():
            if not info.is_float:
                raise UserError(f"{file}: {info.name} is {info.dtype}, not a float")
        yield StoredTaskVector(
            source=str(path),
            file=tensors,
            base_format=FORMATS.get(tensors.metadata.get(BASE_PRECISION, "")),
            merged_format=FORMATS.get(tensors.metadata.get(MERGED_PRECISION, "")),
            disk_bytes=file.stat().st_blocks * 512,
        )


def precision_of(model: Checkpoint) -> str:
    """What a model's float tensors are stored in: fp32, fp16, bf16, fp64, ..., or "mixed"."""
    dtypes = {info.dtype for info in model.tensors.values() if info.is_float}
    return dtype_name(dtypes.pop()) if len(dtypes) == 1 else "mixed"


def _subtracted(base: torch.Tensor, format: Format | None) -> torch.Tensor:
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    return format.round(wide) if format else wide
