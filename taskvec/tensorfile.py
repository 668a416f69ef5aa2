"""One safetensors file: read rows of a tensor, write one piece by piece.

What a header says is checked where it is read (`taskvec.header`). Rows are read with pread into
memory of the caller's own, not mapped, so that no page of a model stays resident after its block is
done.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from taskvec import processes
from taskvec.cli import UserError
from taskvec.header import TensorInfo, encode_header, read_header

# Linux's own call: Python's posix_fallocate writes zeros where the file system cannot do it.
_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2
_memcmp = ctypes.CDLL(None).memcmp  # PyTorch's torch.equal takes three times as long
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

_AHEAD = 1 << 22  # bytes that are fetched ahead of what is read, at least
_COMPARED_ELEMENTS = 1 << 20
_COPIED_AT_ONCE = 1 << 26  # bytes; what is copied is on its way to disk while the next is copied


class TensorFile:
    """A safetensors file opened for reading.

    Args:
        path: the file.

    Raises:
        UserError: the file is missing, truncated, or its header contradicts the format.

    Example:
        with TensorFile(Path("model.safetensors")) as file:
            rows = file.read(file.tensors["weight"], 0, 10)   # (10, in), stored dtype
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._passing: set[str] = set()
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        try:
            self.tensors, self.metadata = self._find_tensors()
        except BaseException:
            self.close()
            raise

    def _find_tensors(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """Where the tensors lie in the open file, and what else its header says."""
        return read_header(self.path, self._fd)

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its stored dtype, on the CPU.

        Returns:
            a tensor (stop - start, *row_shape) that owns its memory; a tensor that is read as a
            whole, by giving no ``stop``, keeps its shape.
        """
        whole = start == 0 and stop is None
        stop = info.rows if stop is None else stop
        row_bytes = info.nbytes // info.rows if info.rows else 0
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        offset = info.offset + start * row_bytes
        self._read_into(_bytes_of(buffer), offset)
        end = offset + len(buffer)
        _advise(self._fd, end, min(max(len(buffer), _AHEAD), info.end - end), "WILLNEED")
        if info.name in self._passing:
            _advise(self._fd, offset, len(buffer), "DONTNEED")
        shape = info.shape if whole or not info.shape else (stop - start, *info.row_shape)
        return buffer.view(info.dtype).view(shape)

    def same(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two of its tensors have one shape, and the same bits."""
        return one.shape == other.shape and all(
            same_bits(self.read(one, *rows), self.read(other, *rows))
            for rows in row_blocks(one, _COMPARED_ELEMENTS)
        )

    def is_cached(self, info: TensorInfo) -> bool:
        """Whether the middle of a tensor's bytes is in memory; True where nobody can tell."""
        try:
            flags = os.RWF_NOWAIT
            os.preadv(self._fd, [bytearray(1)], (info.offset + info.end) // 2, flags)
        except BlockingIOError:  # it would have to be fetched from disk
            return False
        except (OSError, AttributeError):  # a system that does not say
            pass
        return True

    def let_go(self, info: TensorInfo) -> None:
        """From here on, drop a tensor's bytes from the system's memory as they are read."""
        self._passing.add(info.name)

    def is_hole(self, info: TensorInfo) -> bool:
        """True if the file system knows that these bytes were never written (they read as zero).

        It knows of whole blocks. The first and the last may be shared with a neighbour that was
        written: what is the tensor's own in them is read.

        Raises:
            UserError: the file has shrunk since it was opened.
        """
        if not hasattr(os, "SEEK_DATA"):
            return False
        block = os.fstat(self._fd).st_blksize
        inner = (-(-info.offset // block) * block, info.end // block * block)
        if inner[0] >= inner[1]:
            return self._is_unwritten(info.offset, info.end)
        return (
            self._is_unwritten(*inner)
            and self._is_zero(info.offset, inner[0])
            and self._is_zero(inner[1], info.end)
        )

    def _is_unwritten(self, begin: int, end: int) -> bool:
        try:
            data = os.lseek(self._fd, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                return False
            data = end  # no data from here to the end of the file
        size = os.fstat(self._fd).st_size
        if size < end:
            raise self._shrunk(size)
        return data >= end

    def _is_zero(self, begin: int, end: int) -> bool:
        found = bytearray(end - begin)
        self._read_into(memoryview(found), begin)
        return not any(found)

    def copy_range(self, offset: int, nbytes: int, target_fd: int, target_offset: int) -> None:
        """Copy bytes to another file inside the kernel, or through memory where it cannot."""
        while nbytes:
            try:
                done = os.copy_file_range(
                    self._fd, target_fd, min(nbytes, 1 << 30), offset, target_offset
                )
            except (OSError, AttributeError):  # across file systems; a system without the call
                done = 0
            if done == 0:  # also what some network file systems answer to a call they lack
                return self._copy_through_memory(offset, nbytes, target_fd, target_offset)
            offset, target_offset, nbytes = offset + done, target_offset + done, nbytes - done

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_into(self, view: memoryview, offset: int) -> None:
        while view:
            done = os.preadv(self._fd, [view], offset)
            if done == 0:
                raise self._shrunk(offset)
            view, offset = view[done:], offset + done

    def _copy_through_memory(
        self, offset: int, nbytes: int, target_fd: int, target_offset: int
    ) -> None:
        buffer = memoryview(bytearray(min(nbytes, 1 << 22)))
        while nbytes:
            piece = buffer[: min(nbytes, len(buffer))]
            self._read_into(piece, offset)
            _write_all(target_fd, piece, target_offset)
            step = len(piece)
            offset, target_offset, nbytes = offset + step, target_offset + step, nbytes - step

    def _shrunk(self, offset: int) -> UserError:
        return UserError(f"{self.path}: the file ended at byte {offset} while it was being read")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, as something that the system has in memory or not."""

    file: TensorFile
    info: TensorInfo

    def is_cached(self) -> bool:
        """Whether it is in memory, as far as one byte of it tells."""
        return self.file.is_cached(self.info)

    def let_go(self) -> None:
        """Keep it out of there: what is still to be read has more use of the room."""
        self.file.let_go(self.info)


class TensorFileWriter:
    """A safetensors file written piece by piece, in any order; what is never written is zero.

    Bytes that are not written are a hole: they take no disk and read as zeros. The file is
    complete and on disk when the context ends without an exception. Where several processes share
    a run, every one opens it, the main one makes it, and each may write.

    Args:
        path: a file that does not exist yet.
        tensors: name, dtype and shape of each tensor, in the order of the file.
        metadata: strings for the header, beside ``format: pt``.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        content, nbytes = encode_header(tensors, metadata or {})
        processes.by_main(lambda: _create(path, content, len(content) + nbytes))
        self._fd = os.open(path, os.O_RDWR)
        self.tensors, _ = read_header(path, self._fd)

    def write(self, name: str, rows: torch.Tensor, start: int = 0) -> None:
        """Write rows of a tensor from row ``start`` on; the dtype must be the declared one."""
        info = self.tensors[name]
        fits = tuple(rows.shape) == info.shape or tuple(rows.shape[1:]) == info.row_shape
        if rows.dtype != info.dtype or not fits:
            raise ValueError(f"{name}: {rows.dtype} {tuple(rows.shape)} does not fit {info}")
        flat = rows.detach().cpu().contiguous().view(-1).view(torch.uint8)
        offset = info.offset + start * info.row_elements * info.dtype.itemsize
        _reserve(self._fd, offset, len(flat))
        _write_all(self._fd, _bytes_of(flat), offset)
        _begin_to_store(self._fd, offset, len(flat))

    def copy(
        self,
        source: TensorFile,
        info: TensorInfo,
        advance: Callable[[int], object] = lambda nbytes: None,
    ) -> None:
        """Copy a tensor of the same name, dtype and shape from another file, byte for byte.

        Args:
            advance: told of the bytes of each piece.
        """
        target = self.tensors[info.name]
        _reserve(self._fd, target.offset, info.nbytes)
        for done in range(0, info.nbytes, _COPIED_AT_ONCE):
            nbytes = min(_COPIED_AT_ONCE, info.nbytes - done)
            source.copy_range(info.offset + done, nbytes, self._fd, target.offset + done)
            _begin_to_store(self._fd, target.offset + done, nbytes)
            advance(nbytes)

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            os.close(self._fd)


def to_device(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows on a device; to a GPU from pinned memory, so that this thread need not wait for them."""
    if device.type != "cuda" or rows.device.type != "cpu":
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)


def row_blocks(info: TensorInfo, elements: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks ``(start, stop)`` of at most ``elements`` elements, but of one row.

    Rows without elements are one block, however many a header says there are.
    """
    step = max(1, elements // info.row_elements if info.row_elements else info.rows)
    for start in range(0, info.rows, step):
        yield start, min(start + step, info.rows)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors on the CPU, of one shape and each in one piece, are the same bit for bit.

    NaN is NaN's equal, and -0 is not 0's. Another dtype is another tensor.
    """
    if one.dtype != other.dtype:
        return False
    return bool(_memcmp(one.data_ptr(), other.data_ptr(), one.nbytes) == 0)


def _bytes_of(buffer: torch.Tensor) -> memoryview:
    return memoryview(buffer.numpy())  # type: ignore[arg-type]


def _reserve(fd: int, offset: int, nbytes: int) -> None:
    """Have the file system find room for bytes that come next; nothing where it has no such call.

    ext4 takes them several times as fast then, and a full disk is noticed before it is filled.
    """
    if _fallocate is None or not nbytes:
        return
    if _fallocate(fd, 0, ctypes.c_int64(offset), ctypes.c_int64(nbytes)):
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(code, os.strerror(code))


def _advise(fd: int, offset: int, nbytes: int, advice: str) -> None:
    """Tell the system that bytes will be read next, or not again; nothing where it does not listen.

    Its own guess of what comes next fails where several threads read one file.
    """
    if nbytes > 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, getattr(os, f"POSIX_FADV_{advice}"))


def _begin_to_store(fd: int, offset: int, nbytes: int) -> None:
    """Have the system begin to put written bytes on disk, so that fsync has less to wait for.

    A hint: what goes wrong with it goes wrong with fsync too, which tells.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def _create(path: Path, content: bytes, size: int) -> None:
    """A file that begins with some bytes and is a hole from there to its end."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(fd, memoryview(content), 0)
        os.truncate(fd, size)
    finally:
        os.close(fd)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
