"""What is a model, an adapter or a task vector? To say so where one was given for another.

By the names of files and tensors; their values are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from taskvec.adapters.files import CONFIG_FILE, PICKLED_FILE, WEIGHTS_FILE

TASK_VECTOR_FILE = "task_vector.safetensors"

# Metadata keys of a task vector file. They are hints: what the tensors show comes first.
BASE_PRECISION, MERGED_PRECISION = "base_precision", "merged_precision"

MODEL, ADAPTER, TASK_VECTOR = "a model", "an adapter", "a task vector"
_TAKEN_BY = {
    MODEL: "give it as --base_model or --finetuned_model",
    ADAPTER: "give it as --lora_path, or merge it into its base with merge_lora.py",
    TASK_VECTOR: "compare_lora_task_vector.py takes it as --task_vector_path, and "
    "analyze_task_vectors.py apply makes a model of it",
}
_OF_MODELS = ("model*.safetensors", "*.index.json", "pytorch_model*.bin")
_OF_ADAPTERS = (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE)
# As an adapter's file has them, and as a model in memory: there an adapter has a name.
_FACTOR = re.compile(r"\.lora_(?:[AB]\.weight|embedding_[AB])$")
_UNMERGED = re.compile(r"\.lora_(?:[AB]\.[^.]+\.weight|embedding_[AB]\.[^.]+)$")


def mistaken_directory(path: Path, wanted: str) -> str | None:
    """What a directory is instead of what is wanted, and where it belongs; None: nothing known.

    Args:
        wanted: `MODEL`, `ADAPTER` or `TASK_VECTOR`.
    """
    found = None
    if (path / TASK_VECTOR_FILE).is_file():
        found = TASK_VECTOR
    elif any((path / name).is_file() for name in _OF_ADAPTERS):
        found = ADAPTER
    elif any(next(path.glob(pattern), None) for pattern in _OF_MODELS):
        found = MODEL
    return _sentence(found, wanted) if found and found != wanted else None


def mistaken_file(
    path: Path, names: Iterable[str], metadata: Mapping[str, str], wanted: str
) -> str | None:
    """The same of a file, by its name, its tensors' names and the metadata in its header."""
    found = list(names)
    if any(map(_UNMERGED.search, found)):
        return (
            "was saved with an adapter in it that is not merged; call merge_and_unload() in PEFT "
            "before saving, or merge the adapter's own files with merge_lora.py"
        )
    if any(map(_FACTOR.search, found)):
        return _sentence(ADAPTER, wanted)
    named = path.name == TASK_VECTOR_FILE or {BASE_PRECISION, MERGED_PRECISION} <= metadata.keys()
    return _sentence(TASK_VECTOR, wanted) if named and wanted != TASK_VECTOR else None


def _sentence(found: str, wanted: str) -> str:
    return f"is {found}, not {wanted}; {_TAKEN_BY[found]}"
