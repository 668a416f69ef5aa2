"""A model on disk: open it by directory, file or hub id, and read its tensors one at a time.

Knows nothing of adapters. Tensors are read straight from the safetensors files; no model code runs
and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taskvec.cli import UserError
from taskvec.tensorfile import TensorFile, TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What a hub download of a model consists of: configuration, tokenizer and weights.
_MODEL_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
_ADAPTER_PATTERNS = ["adapter_config.json", "adapter_model.safetensors"]
EXAMPLE_HINT = (
    "`python final_validation.py` without arguments runs the bundled example without a network"
)


@dataclass
class Checkpoint:
    """The tensors of one model, over one file or several shards.

    Attributes:
        source: the model as the user named it.
        directory: where its config.json and tokenizer lie; None for a bare file.
        shards: the open files, in the order of their names.
        tensors: where each tensor lies, in the order of the files.
        revision: the hub commit, where the model came from the hub.
    """

    source: str
    directory: Path | None
    shards: dict[Path, TensorFile]
    tensors: dict[str, TensorInfo]
    revision: str | None = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor (rows, ...), in its stored dtype, on the CPU."""
        info = self.tensors[name]
        return self.shards[info.path].read(info, start, stop)

    def is_hole(self, name: str) -> bool:
        """True if a tensor is known to be zero without reading it."""
        info = self.tensors[name]
        return self.shards[info.path].is_hole(info)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def paths(self) -> list[Path]:
        """What this model is read from, for checks that no output lands on an input."""
        return [self.directory] if self.directory else list(self.shards)

    def config(self) -> dict[str, Any]:
        """config.json, or an empty dict for a bare file."""
        if self.directory is None or not (self.directory / "config.json").is_file():
            return {}
        return read_json_object(self.directory / "config.json")

    def refuse_quantised(self) -> None:
        """Quantised weights cannot be added to.

        Raises:
            UserError: config.json names a quantisation.
        """
        quantisation = self.config().get("quantization_config")
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            raise UserError(
                f"{self.source}: is quantised ({method or 'quantization_config'}); use the "
                "unquantised base that it was made from"
            )

    def identity(self) -> dict[str, Any]:
        """What tells this model from another: hub commit, or sizes and header hashes of files."""
        return {
            "source": self.source,
            "revision": self.revision,
            "files": {
                path.name: {"bytes": path.stat().st_size, "header_sha256": _header_sha256(path)}
                for path in self.shards
            },
        }


@contextlib.contextmanager
def open_checkpoint(source: str, revision: str | None = None) -> Iterator[Checkpoint]:
    """Open a model for reading.

    Args:
        source: a directory with model.safetensors or its index and shards, a single
            .safetensors file, or a hub id (through the ordinary Hugging Face cache).
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: nothing there, no safetensors weights, damaged or missing shards.

    Example:
        with open_checkpoint("examples/starcoder2-mini") as base:
            weight = base.read("model.norm.weight")
    """
    path, commit = _locate(source, revision, _MODEL_PATTERNS)
    if path.is_file():
        directory = path.parent if (path.parent / "config.json").is_file() else None
        files, weight_map = [path], None
    else:
        directory = path
        files, weight_map = _find_shards(path)
    with contextlib.ExitStack() as stack:
        shards = {file: stack.enter_context(TensorFile(file)) for file in files}
        tensors = _collect(shards)
        if weight_map is not None:
            _check_index(path / INDEX_FILE, weight_map, tensors)
        if not tensors:
            raise UserError(f"{source}: holds no tensors")
        yield Checkpoint(source, directory, shards, tensors, commit)


def locate_adapter(source: str) -> Path:
    """The directory of an adapter that is named by directory or hub id.

    Raises:
        UserError: nothing there.
    """
    path, _ = _locate(source, None, _ADAPTER_PATTERNS)
    if path.is_file():
        raise UserError(f"{source}: is a file; give the adapter's directory")
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        UserError: unreadable, not JSON, not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _find_shards(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a model directory, as transformers would choose them."""
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE], None
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = _read_weight_map(index)
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: named in {INDEX_FILE} but not there; copy it in")
        return files, weight_map
    if list(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"{directory}: holds pytorch_model.bin only; load it in transformers and "
            "save_pretrained() it to get safetensors"
        )
    raise UserError(f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
        if not plain or "\\" in name or "\0" in name:
            raise UserError(f"{index}: {tensor}: {name!r} is not the name of a file beside it")
    return weight_map


def _collect(shards: dict[Path, TensorFile]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path, shard in shards.items():
        for name, info in shard.tensors.items():
            if name in tensors:
                raise UserError(f"{path}: {name} also lies in {tensors[name].path.name}")
            tensors[name] = info
    return tensors


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise UserError(f"{index}: {name} is said to lie in {file}, but does not")
    for name, info in tensors.items():
        if name not in weight_map:
            raise UserError(f"{info.path}: {name} is not named in {index.name}")


def _locate(source: str, revision: str | None, patterns: list[str]) -> tuple[Path, str | None]:
    """A local path, or the snapshot of a hub id and its commit."""
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise UserError(f"--revision {revision}: only a hub id has revisions; {source} is here")
        return path, None
    local = path.is_absolute() or source.startswith((".", "~")) or source.endswith("/")
    if local or source.count("/") > 1 or path.suffix == ".safetensors":
        raise UserError(f"{source}: no such file or directory. {EXAMPLE_HINT}")
    return _download(source, revision, patterns)


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ", ".join(patterns)
    try:
        snapshot = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"{hub_id}: no such directory, and not a valid hub id") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{hub_id}: no such directory, and the hub cannot be reached; needed from "
            f"https://huggingface.co/{hub_id} are {wanted}. {EXAMPLE_HINT}"
        ) from None
    except HfHubHTTPError as error:
        raise UserError(
            f"{hub_id}: no such directory, and the hub answered: {error}. {EXAMPLE_HINT}"
        ) from None
    except Exception as error:  # whatever the HTTP library of the day raises: proxies, timeouts
        raise UserError(
            f"{hub_id}: no such directory, and the download failed: {type(error).__name__}: "
            f"{error}. {EXAMPLE_HINT}"
        ) from None
    return snapshot, snapshot.name


def _header_sha256(path: Path) -> str:
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()
