"""Small questions that many tests ask of a directory or of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def names(directory: Path) -> list[str]:
    """What lies in a directory, hidden files included."""
    return sorted(path.name for path in directory.iterdir())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's files, read by the safetensors library."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's memory: tells -0.0 from 0.0 and one NaN from another."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(
    mine: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    only: Iterable[str] | None = None,
) -> None:
    """Dtypes, shapes and bytes are equal, for the names of ``mine`` or for those given."""
    for name in mine if only is None else only:
        assert mine[name].dtype == theirs[name].dtype, name
        assert mine[name].shape == theirs[name].shape, name
        assert raw_bytes(mine[name]) == raw_bytes(theirs[name]), name


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object in place."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let ``change`` alter the tensors of a file in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
