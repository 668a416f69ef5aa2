"""A model on disk: open it by directory, file or hub id, and read its tensors one at a time.

Knows nothing of adapters. Tensors are read straight from the files; no model code runs and nothing
but tensors is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from taskvec.adapters.files import CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE
from taskvec.cli import UserError
from taskvec.header import TensorInfo, without_duplicates
from taskvec.kinds import MODEL, mistaken_directory, mistaken_file
from taskvec.tensorfile import StoredTensor, TensorFile
from taskvec.ties import set_copies_aside
from taskvec.torchfile import TorchFile, is_torch_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_TORCH_FILE = "pytorch_model.bin"

# In the order in which transformers looks for them: a file, and the index of one in shards.
_WEIGHT_FILES = ((SINGLE_FILE, INDEX_FILE), (_TORCH_FILE, f"{_TORCH_FILE}.index.json"))

_MOST_JSON_BYTES = 100_000_000  # as a safetensors header: an index may name as many tensors
_MOST_JSON_LAYERS = 100

# What a hub download of a model consists of: configuration, tokenizer and weights.
_MODEL_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
_TORCH_PATTERNS = ["pytorch_model*.bin"]  # only where there is no safetensors file
_ADAPTER_FILES = [CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE]
# What quantisation methods store beside or instead of a weight.
_QUANTISED = re.compile(
    r"\.(?:(?P<gptq>qweight|qzeros)|(?P<bnb8>SCB)|(?P<compressed>weight_packed)"
    r"|(?P<bnb4>absmax|quant_map|quant_state\.\w+)|(?P<scaled>weight_scale(?:_inv)?)"
    r"|(?P<mxfp4>\w+_blocks))$"
)
_METHODS = {
    "gptq": "GPTQ or AWQ",
    "bnb8": "bitsandbytes, 8 bits",
    "bnb4": "bitsandbytes, 4 bits",
    "compressed": "compressed-tensors",
    "scaled": "fp8 or compressed-tensors",
    "mxfp4": "mxfp4",
}
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
        tensors: where each tensor lies, in the order of the files; tied ones once (`taskvec.ties`).
        revision: the hub commit, where the model came from the hub.
    """

    source: str
    directory: Path | None
    shards: dict[Path, TensorFile]
    tensors: dict[str, TensorInfo]
    revision: str | None = None
    _config: dict[str, Any] | None = field(default=None, repr=False)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor (rows, ...), in its stored dtype, on the CPU."""
        info = self.tensors[name]
        return self.shards[info.path].read(info, start, stop)

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor is read from."""
        info = self.tensors[name]
        return StoredTensor(self.shards[info.path], info)

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
        """config.json, read once and not to be changed; an empty dict for a bare file."""
        if self._config is None:
            file = self.directory / "config.json" if self.directory else None
            self._config = read_json_object(file) if file and file.is_file() else {}
        return self._config

    def refuse_quantised(self) -> None:
        """Quantised weights cannot be added to or subtracted.

        Raises:
            UserError: config.json names a quantisation, or a tensor is one of a known method.
        """
        if method := self._quantisation():
            raise UserError(
                f"{self.source}: is quantised ({method}); use the unquantised base that it was "
                "made from"
            )

    def _quantisation(self) -> str | None:
        """What shows that the weights are quantised: a method by name, or a tensor."""
        configs = [self.config(), *(v for v in self.config().values() if isinstance(v, dict))]
        for config in configs:
            for key in ("quantization_config", "compression_config"):
                if found := config.get(key):
                    method = found.get("quant_method") if isinstance(found, dict) else None
                    return str(method or key)
        for name, info in self.tensors.items():
            if match := _QUANTISED.search(name):
                return f"{_METHODS[match.lastgroup or '']}: {name}"
            if str(info.dtype).startswith("torch.float8") and len(info.shape) > 1:
                return f"fp8: {name}"
        return None

    def identity(self) -> dict[str, Any]:
        """What tells this model from another: hub commit, or sizes and header hashes of files."""
        return {
            "source": self.source,
            "revision": self.revision,
            "files": {
                path.name: {"bytes": path.stat().st_size, "header_sha256": _header_sha256(shard)}
                for path, shard in self.shards.items()
            },
        }


@contextlib.contextmanager
def open_checkpoint(source: str, revision: str | None = None) -> Iterator[Checkpoint]:
    """Open a model for reading.

    Args:
        source: a directory with model.safetensors (or pytorch_model.bin) or its index and shards,
            a single .safetensors or .bin file, or a hub id (through the ordinary Hugging Face
            cache).
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: nothing there, no weights, damaged or missing shards.

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
        shards = {file: stack.enter_context(_open_file(file)) for file in files}
        tensors = _collect(shards)
        if weight_map is not None:
            index = next(path / name for _, name in _WEIGHT_FILES if (path / name).is_file())
            _check_index(index, weight_map, tensors)
        if not tensors:
            raise UserError(f"{source}: holds no tensors")
        metadata = next(iter(shards.values())).metadata
        if what := mistaken_file(files[0], tensors, metadata, MODEL):
            raise UserError(f"{source}: {what}")
        model = Checkpoint(source, directory, shards, tensors, commit)
        set_copies_aside(model)
        yield model


def locate_adapter(source: str) -> Path:
    """The directory of an adapter that is named by directory, hub id or a folder in a hub id.

    Example:
        locate_adapter("organisation/repository/folder")

    Raises:
        UserError: nothing there.
    """
    hub_id, folder = source, ""
    first, *rest = source.split("/")
    on_the_hub = first not in ("", ".", "..", "~") and not Path(first).exists()
    if on_the_hub and len(rest) == 2 and all(rest):
        hub_id, folder = f"{first}/{rest[0]}", f"{rest[1]}/"
    path, _ = _locate(hub_id, None, [folder + name for name in _ADAPTER_FILES])
    if path.is_file():
        raise UserError(f"{source}: is a file; give the adapter's directory")
    if not (path / folder).is_dir():
        named = ", ".join(named_adapters(path))
        raise UserError(f"{source}: {hub_id} has no such folder{named and '; it has '}{named}")
    return path / folder


def named_adapters(directory: Path) -> list[str]:
    """The folders within a directory that hold an adapter."""
    return sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        UserError: unreadable, not JSON, not an object, too large or too deep to be a configuration.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_JSON_BYTES + 1)
        if len(raw) > _MOST_JSON_BYTES:
            raise UserError(f"{path}: over {_MOST_JSON_BYTES:,} bytes")
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
        _check_depth(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _check_depth(content: Any) -> None:
    """Whoever walks through it, or writes it again, has only so much of a stack.

    Raises:
        ValueError: lists and objects lie too deep in each other, or a text is no text.
    """
    layer = [content]
    for _ in range(_MOST_JSON_LAYERS):
        "".join(value for value in layer if isinstance(value, str)).encode()
        lists = [value for value in layer if isinstance(value, list)]
        objects = [value.values() for value in layer if isinstance(value, dict)]
        layer = [inner for values in (*lists, *objects) for inner in values]
        if not layer:
            return
    raise ValueError(f"nested more than {_MOST_JSON_LAYERS} deep")


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _open_file(path: Path) -> TensorFile:
    _refuse_gguf(path)
    return TorchFile(path) if is_torch_file(path) else TensorFile(path)


def _refuse_gguf(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(4) == b"GGUF":
            raise UserError(
                f"{path}: is a GGUF file, which holds quantised weights under names of its own; "
                "use the unquantised base that it was made from, as safetensors"
            )


def _find_shards(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a model directory, as transformers would choose them."""
    for single, index_name in _WEIGHT_FILES:
        if (directory / single).is_file():
            return [directory / single], None
        index = directory / index_name
        if index.is_file():
            weight_map = _read_weight_map(index)
            files = [directory / name for name in sorted(set(weight_map.values()))]
            for file in files:
                if not file.is_file():
                    raise UserError(f"{file}: named in {index_name} but not there; copy it in")
            return files, weight_map
    for path in sorted(directory.glob("*.gguf")):
        _refuse_gguf(path)
    if what := mistaken_directory(directory, MODEL):
        raise UserError(f"{directory}: {what}")
    raise UserError(
        f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}, nor {_TORCH_FILE} or its index"
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
        if not plain or "\\" in name or "\0" in name:
            raise UserError(f"{index}: {tensor}: {name!r} is not the name of a file beside it")
        if not name.endswith(suffix):
            raise UserError(f"{index}: {tensor}: {name!r} is not the name of a {suffix} file")
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
    if local or source.count("/") > 1 or path.suffix == ".safetensors" or is_torch_file(path):
        raise UserError(f"{source}: no such file or directory. {EXAMPLE_HINT}")
    path, commit = _download(source, revision, patterns)
    if patterns is _MODEL_PATTERNS and not list(path.glob("model*.safetensors")):
        path, commit = _download(source, revision, [*patterns, *_TORCH_PATTERNS])
    return path, commit


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


def _header_sha256(shard: TensorFile) -> str:
    """Of a safetensors header as it lies there; of another file's names, dtypes and shapes."""
    if isinstance(shard, TorchFile):
        listing = [[info.name, str(info.dtype), info.shape] for info in shard.tensors.values()]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    with shard.path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()
