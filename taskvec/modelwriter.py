"""Write a model that is another model with some parameters changed, shard by shard, row by row.

Bytes that stay the same are copied inside the kernel; only what changes passes through memory.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taskvec import processes
from taskvec.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from taskvec.cli import UserError, notice
from taskvec.conversions import stays_in_fp32
from taskvec.header import TensorInfo
from taskvec.output import write_json
from taskvec.rounding import FP16, FP32, Format, all_finite
from taskvec.tensorfile import TensorFileWriter, row_blocks
from taskvec.ties import untied
from taskvec.workers import for_each

if TYPE_CHECKING:
    from tqdm import tqdm

BLOCK_ELEMENTS = 1 << 18  # small enough for a core's own cache

# (rows of the base in their stored dtype, start, stop) -> the new rows in the target's dtype
RowFunction = Callable[[torch.Tensor, int, int], torch.Tensor]
# The same for several models at a time: the new rows of each
RowsFunction = Callable[[torch.Tensor, int, int], Sequence[torch.Tensor]]

_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """One output file and the tensors in it: name, dtype and shape each."""

    file_name: str
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in self.tensors)


def stored_format(base: Checkpoint, name: str, format: Format) -> Format:
    """What a float parameter is stored in when the model is stored in ``format``.

    That is fp32 for what transformers keeps in fp32 whatever dtype is asked for (T5's ``wo``).
    """
    return FP32 if stays_in_fp32(base.config(), name, format.dtype) else format


def write_model(
    base: Checkpoint,
    directory: Path,
    format: Format,
    edit: Callable[[str], RowFunction | None],
    *,
    max_shard_size: str | None,
    bar: tqdm[Any],
) -> list[Shard]:
    """Write a model directory that transformers loads.

    Args:
        base: the model to start from.
        directory: an empty directory.
        format: what float tensors are stored in (`stored_format`); others keep their dtype.
        edit: for a parameter's name, how to make its rows; None where it stays as it is.
        max_shard_size: e.g. "5GB"; the base's own shards if None.
        bar: advanced by the bytes of the base.

    Returns:
        the files written.

    Raises:
        UserError: a value that is finite in the base or in the sum overflows the format.
    """

    def edits(name: str) -> RowsFunction | None:
        rows = edit(name)
        return None if rows is None else lambda base, start, stop: [rows(base, start, stop)]

    return write_models(base, [directory], format, edits, max_shard_size=max_shard_size, bar=bar)


def write_models(
    base: Checkpoint,
    directories: Sequence[Path],
    format: Format,
    edit: Callable[[str], RowsFunction | None],
    *,
    max_shard_size: str | None,
    bar: tqdm[Any],
) -> list[Shard]:
    """Write several models that differ in the same parameters, in one read of the base.

    Args:
        directories: an empty one for each model; otherwise as `write_model`.

    Returns:
        the files written into each.

    Raises:
        UserError: as `write_model`.
    """
    formats = {name: stored_format(base, name, format) for name in base.tensors}
    shards = _plan_shards(base, formats, max_shard_size)
    with contextlib.ExitStack() as stack:
        files: dict[str, list[TensorFileWriter]] = {}
        for shard in shards:
            writers = [stack.enter_context(_open(to, shard)) for to in directories]
            files |= dict.fromkeys(writers[0].tensors, writers)
        for_each(
            lambda name: _write_tensor(
                base, base.tensors[name], files[name], formats[name], edit(name), bar
            ),
            files,
            cost=lambda name: base.tensors[name].nbytes,
            reads=lambda name: [base.stored(name)],
        )

    def write_other_files() -> None:
        for directory in directories:
            _write_index(directory, shards)
            _copy_side_files(base, directory, format)

    processes.by_main(write_other_files)
    return shards


def _open(directory: Path, shard: Shard) -> TensorFileWriter:
    return TensorFileWriter(directory / shard.file_name, shard.tensors)


def _write_tensor(
    base: Checkpoint,
    info: TensorInfo,
    writers: Sequence[TensorFileWriter],
    format: Format,
    make_rows: RowsFunction | None,
    bar: tqdm[Any],
) -> None:
    target = writers[0].tensors[info.name]
    if make_rows is None and info.dtype == target.dtype:
        for writer in writers[1:]:
            writer.copy(base.shards[info.path], info)
        writers[0].copy(base.shards[info.path], info, bar.update)
        return
    for start, stop in row_blocks(info, BLOCK_ELEMENTS):
        rows = base.read(info.name, start, stop)
        made = make_rows(rows, start, stop) if make_rows else [rows.to(target.dtype)] * len(writers)
        for writer, new in zip(writers, made, strict=True):
            _refuse_overflow(info, rows, new, format)
            writer.write(info.name, new, start)
        bar.update(rows.nbytes)


def _refuse_overflow(
    info: TensorInfo, base: torch.Tensor, new: torch.Tensor, format: Format
) -> None:
    if not new.is_floating_point() or all_finite(new):
        return
    if all_finite(base):
        advice = "use --precision bf16 or fp32" if format is FP16 else "check the adapter's scaling"
        beyond = int((~torch.isfinite(new)).sum())
        raise UserError(
            f"{info.name}: {beyond} values overflow {format.name}, whose largest is "
            f"{format.largest:g}; {advice}"
        )
    raise UserError(f"{info.path}: {info.name}: holds NaN or infinity")


def _plan_shards(
    base: Checkpoint, formats: dict[str, Format], max_shard_size: str | None
) -> list[Shard]:
    specs = {
        name: (name, formats[name].dtype if info.is_float else info.dtype, info.shape)
        for name, info in base.tensors.items()
    }
    if max_shard_size is not None:
        return _split(list(specs.values()), _parse_size(max_shard_size))
    shards: dict[Path, Shard] = {}
    for name, spec in specs.items():
        path = base.tensors[name].path
        shards.setdefault(path, Shard(_shard_name(path), [])).tensors.append(spec)
    if len(shards) == 1:
        return [Shard(SINGLE_FILE, list(specs.values()))]
    return list(shards.values())


def _shard_name(path: Path) -> str:
    """The base's own, as a safetensors file's: pytorch_model-00001-of-00002.bin has model-..."""
    if path.suffix == ".safetensors":
        return path.name
    return f"{path.stem.removeprefix('pytorch_')}.safetensors"


def _split(specs: list[tuple[str, torch.dtype, tuple[int, ...]]], limit: int) -> list[Shard]:
    """Fill files in order up to ``limit`` bytes; a larger tensor gets a file of its own."""
    groups: list[Shard] = [Shard("", [])]
    for spec in specs:
        if groups[-1].tensors and groups[-1].nbytes + Shard("", [spec]).nbytes > limit:
            groups.append(Shard("", []))
        groups[-1].tensors.append(spec)
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, groups[0].tensors)]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group.tensors)
        for number, group in enumerate(groups, 1)
    ]


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if not size:
        raise UserError(f"--max_shard_size {text}: give a size such as 5GB or 500MB")
    return size


def _write_index(directory: Path, shards: list[Shard]) -> None:
    if len(shards) == 1:
        return
    weight_map = {name: shard.file_name for shard in shards for name, _, _ in shard.tensors}
    total = sum(shard.nbytes for shard in shards)
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _copy_side_files(base: Checkpoint, directory: Path, format: Format) -> None:
    """config.json with the new dtype, and the tokenizer and generation files as they are."""
    if base.directory is None:
        return
    if config := copy.deepcopy(base.config()):
        _set_dtype(config, str(format.dtype).removeprefix("torch."))
        if untied(base):
            config["tie_word_embeddings"] = False
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    for pattern in _SIDE_FILES:
        for path in sorted(base.directory.glob(pattern)):
            if path.is_file() and not (directory / path.name).exists():  # no shard of that name
                _notice_link(path)
                shutil.copyfile(path, directory / path.name)


def _notice_link(path: Path) -> None:
    """A link out of the model brings somebody else's file into the output: let the person know.

    The hub's cache consists of links, from its snapshots to its blobs.
    """
    there = path.resolve()
    if there.parent != path.parent.resolve() and there.parent.name != "blobs":
        notice(f"{path} is a link: what it leads to, {there}, was copied.")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Older transformers read torch_dtype, newer ones dtype; parts of a model have their own."""
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    if "torch_dtype" not in config:
        config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, dtype)
