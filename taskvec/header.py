"""The header of a safetensors file: what tensors there are, and where they lie.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes give the length of
a JSON header, the header gives dtype, shape and byte range of each tensor, the bytes follow.

Files are untrusted. Everything in a header is checked against the file's size before anything is
allocated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taskvec.cli import UserError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Elements that would be there if no extent were 0: more, and strides overflow in torch and numpy.
_MOST_STRIDED = 2**60
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``offset`` and ``nbytes`` are bytes within ``path``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Size of the first dimension; of a stack of matrices, that of all their rows."""
        return math.prod(self.shape[: len(self.shape) - len(self.row_shape)])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """What a block of rows has after its first dimension (`row_shape`)."""
        return row_shape(self.shape)

    @property
    def row_elements(self) -> int:
        return math.prod(self.row_shape)

    @property
    def end(self) -> int:
        """Where its bytes end within ``path``."""
        return self.offset + self.nbytes

    @property
    def is_float(self) -> bool:
        return self.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one row: a tensor's without its first dimension.

    Of a stack of matrices, such as the experts of a layer, the rows are those of its matrices, so
    that it is read in pieces of them.
    """
    return shape[2:] if len(shape) == 3 else shape[1:]


def encode_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """What a safetensors file begins with, and how many bytes of tensors follow.

    Args:
        tensors: name, dtype and shape of each tensor, in the order of the file.
        metadata: strings for the header, beside ``format: pt``.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def read_header(path: Path, fd: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of an open safetensors file, in the order of its header, and its metadata.

    Raises:
        UserError: the file is truncated, or its header contradicts the format or the file's size.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{path}: truncated, or not a safetensors file ({size} bytes)")
    if length > MAX_HEADER_BYTES:
        raise UserError(f"{path}: header of {length} bytes is over the format's limit")
    header = _parse_json(path, os.pread(fd, length, 8))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, metadata.values())):
        raise UserError(f"{path}: __metadata__ must map strings to strings")
    data = 8 + length
    tensors = {name: _tensor_info(path, name, entry, data) for name, entry in header.items()}
    _check_layout(path, tensors.values(), data, size)
    return tensors, metadata


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: damaged safetensors header: not a JSON object")
    return header


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file that means one thing only.

    Raises:
        ValueError: a name that appears twice, or that UTF-8 cannot hold (half a surrogate pair).
    """
    result = dict(pairs)
    "".join(result).encode()
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return result


def _tensor_info(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {name}: damaged header entry")
    if unknown := entry.keys() - _ENTRY_KEYS:
        raise UserError(f"{path}: {name}: header entry with the unknown key {min(unknown)!r}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(f"{path}: {name}: unsupported dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > 32:
        raise UserError(f"{path}: {name}: damaged shape in the header")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: {name}: damaged byte range in the header")
    begin, end = offsets
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise UserError(
            f"{path}: {name}: {dtype} {shape} takes {nbytes} bytes, the header gives {end - begin}"
        )
    if math.prod(max(1, extent) for extent in shape) >= _MOST_STRIDED:
        raise UserError(f"{path}: {name}: damaged shape in the header: {shape} overflows")
    return TensorInfo(name, _DTYPES[dtype], tuple(shape), path, data + begin, nbytes)


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: no half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**62 for item in value
    )


def _check_layout(path: Path, tensors: Iterable[TensorInfo], data: int, size: int) -> None:
    """The format wants the tensors to fill the file: no overlap, no gap, no bytes missing."""
    end = data
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            word = "overlaps another tensor" if info.offset < end else "leaves a gap before it"
            raise UserError(f"{path}: {info.name}: its byte range {word}")
        end = info.offset + info.nbytes
    if end != size:
        word = "truncated" if end > size else "longer than its header says"
        raise UserError(f"{path}: {word}: {size} bytes, the header describes {end}")
