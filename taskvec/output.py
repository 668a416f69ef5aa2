"""Writing so that a file or directory appears under its name only when it is complete and on disk.

Everything is written beside its target under a temporary name, flushed, and renamed. A run that is
killed leaves at most that temporary directory, and the next run removes it. Where several processes
share a run, the main one does all of this and every one gets the same directory to write into.
"""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def output_directory(
    target: Path,
    is_ours: Callable[[Path], bool] | Collection[str],
    inputs: Collection[Path] = (),
) -> Iterator[Path]:
    """A fresh directory to write into, which becomes ``target`` when the block ends well.

    Args:
        target: absent, empty, or an earlier output, which is replaced as a whole.
        is_ours: the file names that this script writes, or a test of an existing directory, to
            tell an earlier output from somebody's other files.
        inputs: paths that are read meanwhile; ``target`` may not be one, nor lie inside one.

    Raises:
        UserError: ``target`` is a file, holds something else, is an input, or is being written by
            another run.
    """
    target = target.resolve()
    partial = _beside(target, _PARTIAL)

    def begin() -> int:
        _check_target(target, is_ours, inputs)
        target.parent.mkdir(parents=True, exist_ok=True)
        return _claim(partial)

    def finish() -> None:
        for path in sorted(partial.rglob("*")):
            _flush(path)
        _flush(partial)
        _check_target(target, is_ours, inputs)  # nobody has put other files there meanwhile
        _take_place(partial, target)

    lock = processes.by_main(begin)
    try:
        yield partial
        processes.wait()
        processes.by_main(finish)
    except BaseException:
        if processes.is_main():
            _remove(partial)
        raise
    finally:
        if processes.is_main():
            os.close(lock)


@contextlib.contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target``, which becomes ``target`` when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{_PARTIAL}.{target.name}")  # keeps the suffix, which tells formats
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


def _check_target(
    target: Path, is_ours: Callable[[Path], bool] | Collection[str], inputs: Collection[Path]
) -> None:
    for source in inputs:
        original = source.resolve()
        if target == original or original in target.parents or target in original.parents:
            raise UserError(
                f"{target}: is, holds or lies inside the input {source}; "
                "choose another --output_dir"
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: is a file; choose another --output_dir")
    found = sorted(path.name for path in target.iterdir())
    if callable(is_ours):
        foreign = found if found and not is_ours(target) else []
    else:
        foreign = sorted(set(found) - set(is_ours))
    if foreign:
        raise UserError(
            f"{target}: holds {foreign[0]}, which is not an output of this script; choose another "
            "--output_dir or remove it"
        )


def _claim(partial: Path) -> int:
    """Make a fresh directory and keep other runs out of it until the descriptor is closed.

    What a killed run left is removed: its lock went with it.
    """
    with contextlib.suppress(FileNotFoundError):
        stale = _lock(partial)
        try:
            shutil.rmtree(partial)
        finally:
            os.close(stale)
    partial.mkdir()
    return _lock(partial)


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
    _remove(replaced)
    if target.exists():
        target.rename(replaced)
    try:
        partial.rename(target)
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    _flush(target.parent)
    _remove(replaced)


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
