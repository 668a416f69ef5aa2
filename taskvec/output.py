"""Writing so that a file or directory appears under its name only when it is complete and on disk.

Everything is written beside its target under a temporary name, flushed, and renamed; an earlier
output changes places with the new one in a single step, where the system has that. A run that is
killed leaves at most the temporary directory, and the next run removes it. Where several processes
share a run, the main one does all of this and every one gets the same directory to write into.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from taskvec import processes
from taskvec.cli import UserError

_PARTIAL = ".partial"
_REPLACED = ".replaced"

# Linux's call that exchanges two names at once.
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def output_directory(
    target: Path,
    is_ours: Callable[[Path], bool] | Collection[str],
    inputs: Collection[Path] = (),
) -> Iterator[Path]:
    """A fresh directory to write into, which becomes ``target`` when the block ends well.

    Args:
        target: absent, empty, or an earlier output, which is replaced as a whole.
        is_ours: the file names that this script writes, or a test of an existing directory and
            of all that is in it, to tell an earlier output from somebody's other files.
        inputs: paths that are read meanwhile; ``target`` may not be one, nor lie inside one.

    Raises:
        UserError: ``target`` is a file, holds something else, is an input, or is being written by
            another run.
    """
    target = target.resolve()
    partial = _beside(target, _PARTIAL)
    with _naming(target), contextlib.ExitStack() as stack, contextlib.ExitStack() as unfinished:

        def begin() -> None:
            _check_target(target, is_ours, inputs)
            stack.enter_context(_new_parents(target))
            _claim(partial, stack, unfinished)

        def finish() -> None:
            for path in sorted(partial.rglob("*")):
                _flush(path)
            _flush(partial)
            _check_target(target, is_ours, inputs)  # nobody has put other files there meanwhile
            _take_place(partial, target)
            unfinished.pop_all()

        processes.by_main(begin)
        yield partial
        processes.wait()
        processes.by_main(finish)


def refuse_on_input(
    target: Path, inputs: Collection[Path], flag: str = "--output_dir", *, around: bool = True
) -> None:
    """Refuse a place for an output that is, holds or lies inside what is read, through links too.

    Args:
        around: refuse one that holds an input, too; what only adds to a directory may.

    Raises:
        UserError: names the place, the input and the flag that chooses another.
    """
    target = target.resolve()
    for source in inputs:
        for original in (source.resolve(), source.parent.resolve() / source.name):
            inside = target == original or original in target.parents
            if inside or (around and target in original.parents):
                raise UserError(
                    f"{target}: is, holds or lies inside the input {source}; choose another {flag}"
                )


@contextlib.contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target``, which becomes ``target`` when the block ends well."""
    partial = target.with_name(f"{_PARTIAL}.{target.name}")  # keeps the suffix, which tells formats
    with _new_parents(target), _naming(target):
        try:
            yield partial
            _flush(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that any parser takes: UTF-8, indented, without NaN or Infinity."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _new_parents(target: Path) -> Iterator[None]:
    """Make the directories that ``target`` lies in; those that were made go if the block fails."""
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Let an error of the disk, which knows a descriptor only, say what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def _check_target(
    target: Path, is_ours: Callable[[Path], bool] | Collection[str], inputs: Collection[Path]
) -> None:
    refuse_on_input(target, inputs)
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: is a file; choose another --output_dir")
    found = sorted(path.name for path in target.iterdir())
    if callable(is_ours):
        foreign = found if found and not is_ours(target) else []
    else:
        foreign = [name for name in found if name not in is_ours or (target / name).is_dir()]
    if foreign:
        raise UserError(
            f"{target}: holds {foreign[0]}, which is not an output of this script; choose another "
            "--output_dir or remove it"
        )


def _claim(partial: Path, locked: contextlib.ExitStack, unfinished: contextlib.ExitStack) -> None:
    """Make a fresh directory and keep other runs out of it until ``locked`` is closed.

    What a killed run left is removed: its lock went with it. ``unfinished`` removes the directory.
    """
    with contextlib.suppress(FileNotFoundError):
        stale = _lock(partial)
        try:
            shutil.rmtree(partial)
        finally:
            os.close(stale)
    unfinished.callback(_remove, partial)  # first, so that an interrupt finds it noted down
    try:
        partial.mkdir()
        locked.callback(os.close, _lock(partial))
    except (FileExistsError, UserError):  # another run's
        unfinished.pop_all()
        raise


def _lock(directory: Path) -> int:
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(fd), directory.stat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:  # a file system without locks
        ours = True
    if ours:
        return fd
    os.close(fd)
    raise UserError(
        f"{directory}: another run is writing it; wait for that run, or choose another --output_dir"
    )


def _take_place(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``; an earlier output gives way only if that succeeds."""
    replaced = _beside(target, _REPLACED)
    _remove(replaced)  # what a killed run on a system without an exchange may have left
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        target.rename(replaced)
        try:
            partial.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
    _flush(target.parent)
    _remove(replaced)
    _remove(partial)  # the earlier output, if the two changed places


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places at once; False where the system cannot."""
    if _renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(_renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}{suffix}")


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
