"""Writing so that a file or directory appears under its name only when it is complete and on disk.

Everything is written beside its target under a temporary name, flushed, and renamed. A run that is
killed leaves at most that temporary directory, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from taskvec.cli import UserError

_PARTIAL = ".partial"
_REPLACED = ".replaced"


@contextlib.contextmanager
def output_directory(
    target: Path,
    is_ours: Callable[[Path], bool] | Iterable[str],
    inputs: Iterable[Path] = (),
) -> Iterator[Path]:
    """A fresh directory to write into, which becomes ``target`` when the block ends well.

    Args:
        target: absent, empty, or an earlier output, which is replaced as a whole.
        is_ours: the file names that this script writes, or a test of an existing directory, to
            tell an earlier output from somebody's other files.
        inputs: paths that are read meanwhile; ``target`` may not be one, nor lie inside one.

    Raises:
        UserError: ``target`` is a file, holds something else, or is an input.
    """
    target = target.resolve()
    _check_target(target, is_ours, inputs)
    partial, replaced = _beside(target, _PARTIAL), _beside(target, _REPLACED)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        _remove(partial)
        raise
    for path in sorted(partial.rglob("*")):
        _flush(path)
    _flush(partial)
    _remove(replaced)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _flush(target.parent)
    _remove(replaced)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that any parser takes: UTF-8, indented, without NaN or Infinity."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _check_target(
    target: Path, is_ours: Callable[[Path], bool] | Iterable[str], inputs: Iterable[Path]
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
