"""A ``.bin`` file (torch.save of a state dict), read like a safetensors file.

Only ``torch.load(weights_only=True)`` ever sees the pickle in it, onto the meta device: that gives
names, dtypes, shapes and where each tensor's bytes lie in the file, and reads none of them. What
does not lie there as it is in memory (the format from before torch 1.6, strided tensors) is loaded,
one file at a time, and spooled to a temporary file without a name.

A small file can claim much: torch itself would unpickle ``bytearray(10**12)``. So the pickle may
hold only what torch.save writes of tensors (taskvec/pickled.py), records are not compressed, and
what is spooled is bounded by the size of the file.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import torch

from taskvec import pickled
from taskvec.cli import UserError
from taskvec.header import DTYPE_NAMES, TensorInfo
from taskvec.tensorfile import TensorFile

_LOCAL_HEADER_BYTES = 30
_PIECE_BYTES = 1 << 24
_MOST_SPOOLED = 4  # times the file's size: tensors may overlap, as slices of one storage do
_PICKLES_BEFORE_1_6 = 5  # magic number, protocol, system, the state dict, keys of the storages
# What zipfile and taskvec.pickled raise. RuntimeError: an archive with a password.
_DAMAGED = (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OverflowError, zlib.error)


class TorchFile(TensorFile):
    """A ``.bin`` file opened for reading; see `TensorFile`.

    Raises:
        UserError: missing, damaged, or holds anything but tensors by name.
    """

    def _find_tensors(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        tensors = _stored_tensors(self.path)
        if tensors is None:
            spooled, tensors = _spool(self.path)
            self.close()
            self._fd = spooled
        return tensors, {}


def is_torch_file(path: Path) -> bool:
    """True by the suffix: .bin, .pt or .pth."""
    return path.suffix in (".bin", ".pt", ".pth")


def _stored_tensors(path: Path) -> dict[str, TensorInfo] | None:
    """Where the file keeps each tensor; None if one does not lie there as it is in memory."""
    records = _records(path)
    _check_pickle(path, zipped=records is not None)
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
    """Size of each record of the archive, by its offset; None for a file that is no archive.

    There are none to be read in place where numbers are stored with the other end first.
    """
    sizes: dict[int, int] = {}
    end = path.stat().st_size
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = archive.infolist()
            if len({record.filename for record in records}) < len(records):
                raise UserError(f"{path}: damaged: two records of one name")
            for record in records:
                start = _start(record, file)
                if record.compress_type != zipfile.ZIP_STORED:
                    raise UserError(
                        f"{path}: {record.filename} is compressed, which torch.save does not do; "
                        "load the model and save it again, as safetensors"
                    )
                if start + record.file_size > end or record.file_size != record.compress_size:
                    raise UserError(f"{path}: damaged: {record.filename} ends beyond the file")
                sizes[start] = record.file_size
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    return {}
    except _DAMAGED as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return sizes


def _start(record: zipfile.ZipInfo, file: IO[bytes]) -> int:
    """Where the bytes of a record begin."""
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return record.header_offset + _LOCAL_HEADER_BYTES + name + extra


def _check_pickle(path: Path, *, zipped: bool) -> None:
    """Refuse a pickle that refers to more than tensors, before torch makes anything of it."""
    try:
        with path.open("rb") as file:
            if not zipped:
                for _ in range(_PICKLES_BEFORE_1_6):
                    pickled.check(file)
                return
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    pickled.check(io.BytesIO(archive.read(name)))
    except pickled.Foreign as foreign:
        raise _not_unpickled(path, str(foreign)) from None
    except _DAMAGED as error:
        raise UserError(f"{path}: no state dict that torch can read: {error}") from None


def _not_unpickled(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}, so it is not unpickled; get the model as safetensors")


def _spool(path: Path) -> tuple[int, dict[str, TensorInfo]]:
    """Load a file and write its tensors, one after another, to a file that has no name.

    Tensors that are one, as tied weights are, are written once.
    """
    tensors = _load(path, "cpu")
    infos, end = {}, 0
    written: dict[Any, int] = {}
    most = _MOST_SPOOLED * path.stat().st_size
    with tempfile.TemporaryFile() as spool:
        for name, tensor in tensors.items():
            nbytes = tensor.numel() * tensor.dtype.itemsize
            if nbytes > tensor.untyped_storage().nbytes():
                raise UserError(f"{path}: {name}: claims more elements than the file holds")
            content = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if content not in written:
                if end + nbytes > most:
                    raise UserError(
                        f"{path}: {name}: its tensors are over {_MOST_SPOOLED} times as large as "
                        "it; get the model as safetensors"
                    )
                written[content] = end
                raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                for start in range(0, nbytes, _PIECE_BYTES):
                    piece = raw[start : start + _PIECE_BYTES]
                    spool.write(memoryview(piece.numpy()))  # type: ignore[arg-type]
                end += nbytes
            begin = written[content]
            infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, begin, nbytes)
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
        raise _not_unpickled(path, what) from None
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
