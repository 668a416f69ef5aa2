"""A ``.bin`` file (torch.save of a state dict), read like a safetensors file.

Only ``torch.load(weights_only=True)`` ever sees the pickle in it, onto the meta device: that gives
names, dtypes, shapes and where each tensor's bytes lie in the file, and reads none of them. What
does not lie there as it is in memory (the format from before torch 1.6, compressed records, strided
tensors) is loaded, one file at a time, and spooled to a temporary file without a name.
"""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from taskvec.cli import UserError
from taskvec.header import DTYPE_NAMES, TensorInfo
from taskvec.tensorfile import TensorFile

_LOCAL_HEADER_BYTES = 30
_PIECE_BYTES = 1 << 24


class TorchFile(TensorFile):
    """A ``.bin`` file opened for reading; see `TensorFile`.

    Raises:
        UserError: missing, damaged, or holds anything but tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {}
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        try:
            tensors = _stored_tensors(path)
            if tensors is None:
                spooled, tensors = _spool(path)
                self.close()
                self._fd = spooled
        except BaseException:
            self.close()
            raise
        self.tensors = tensors


def is_torch_file(path: Path) -> bool:
    """True by the suffix: .bin, .pt or .pth."""
    return path.suffix in (".bin", ".pt", ".pth")


def _stored_tensors(path: Path) -> dict[str, TensorInfo] | None:
    """Where the file keeps each tensor; None if one does not lie there as it is in memory."""
    records = _records(path)
    if records is None:
        return None
    infos = {}
    for name, tensor in _load(path, "meta").items():
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if not tensor.is_contiguous() or start is None or records.get(start) != storage.nbytes():
            return None
        offset = start + tensor.storage_offset() * tensor.dtype.itemsize
        nbytes = tensor.numel() * tensor.dtype.itemsize
        if offset + nbytes > start + storage.nbytes():
            raise UserError(f"{path}: {name}: reaches beyond its storage; the file is damaged")
        infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, offset, nbytes)
    return infos


def _records(path: Path) -> dict[int, int] | None:
    """Size of each record of the archive, by its offset; None for bytes that are not plain."""
    if not zipfile.is_zipfile(path):
        return None
    sizes = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    return None
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    return None
                file.seek(record.header_offset)
                header = file.read(_LOCAL_HEADER_BYTES)
                lengths = (
                    int.from_bytes(header[26:28], "little"),
                    int.from_bytes(header[28:30], "little"),
                )
                start = record.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
                sizes[start] = record.file_size
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return sizes


def _spool(path: Path) -> tuple[int, dict[str, TensorInfo]]:
    """Load a file and write its tensors, one after another, to a file that has no name."""
    tensors = _load(path, "cpu")
    infos, end = {}, 0
    with tempfile.TemporaryFile() as spool:
        for name in list(tensors):
            tensor = tensors.pop(name).detach()
            if tensor.numel() * tensor.dtype.itemsize > tensor.untyped_storage().nbytes():
                raise UserError(f"{path}: {name}: claims more elements than the file holds")
            tensor = tensor.contiguous()
            raw = tensor.reshape(-1).view(torch.uint8)
            infos[name] = TensorInfo(
                name, tensor.dtype, tuple(tensor.shape), path, end, raw.numel()
            )
            for start in range(0, raw.numel(), _PIECE_BYTES):
                piece = raw[start : start + _PIECE_BYTES]
                spool.write(memoryview(piece.numpy()))  # type: ignore[arg-type]
            end += raw.numel()
        spool.flush()
        return os.dup(spool.fileno()), infos


def _load(path: Path, device: str) -> dict[str, torch.Tensor]:
    """The state dict in a file.

    Raises:
        UserError: torch refuses it, or it holds anything but strided tensors by name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: Any = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants to call {found[1]}" if found else "holds more than tensors, or is damaged"
        raise UserError(
            f"{path}: {what}, so it is not unpickled; get the model as safetensors"
        ) from None
    except Exception as error:  # whatever a damaged pickle or archive makes torch raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path}: no state dict that torch can read: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if not isinstance(name, str) or not plain or tensor.dtype not in DTYPE_NAMES:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise UserError(f"{path}: {name}: is a {kind}; only plain tensors by name are read")
    return dict(content)
