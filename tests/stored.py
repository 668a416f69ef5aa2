"""Models as people store them, and the verdict on a merge of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from compare_lora_task_vector import compare
from extract_task_vectors import extract
from tests.checks import weights

FAST: dict[str, Any] = {"generate_plots": False, "detailed_report": False, "device": "cpu"}
INDEX = "pytorch_model.bin.index.json"


def as_bin(source: Path, target: Path, tensors=None, *, shards=1, **options) -> Path:
    """A model directory whose weights are in pytorch_model.bin, or in shards of it."""
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    tensors = weights(source) if tensors is None else tensors
    order = list(tensors)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin", **options)
        return target
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in order[number::shards]}
        torch.save(part, target / file, **options)
        weight_map |= dict.fromkeys(part, file)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def certify(base: Path, adapter: Path, merged: Path, directory: Path) -> list[str]:
    """The verdict on a merged model, directly and through its extracted task vector."""
    extract(str(base), str(merged), directory / "tv", device="cpu")
    ways: tuple[dict[str, Any], ...] = (
        {"finetuned_model": str(merged)},
        {"task_vector_path": directory / "tv"},
    )
    return [
        compare(
            str(base),
            str(adapter),
            directory / "comparison",
            **given,
            **FAST,
        ).summary["certificate"]["verdict"]
        for given in ways
    ]


def names_of(directory: Path) -> set[str]:
    """The names of a model's tensors."""
    return set(weights(directory))
