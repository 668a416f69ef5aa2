"""Several task vectors measured side by side: what each consists of, and which resemble which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taskvec.arithmetic.cosines import cosines, gram_matrices
from taskvec.arithmetic.several import TaskVectors
from taskvec.breakdown import breakdown, measure_tensor
from taskvec.subject import Subject
from taskvec.taskvector import StoredTaskVector
from taskvec.workers import for_each

if TYPE_CHECKING:
    from tqdm import tqdm

# What is told of a whole task vector and of each of its layers.
COLUMNS = (
    "tensors",
    "nonzero_tensors",
    "elements",
    "nonzero_elements",
    "sparsity",
    "norm",
    "rms",
    "max_abs",
    "squared_norm_share",
    "median_stable_rank",
    "median_effective_rank",
)


def overview(
    vectors: TaskVectors, device: torch.device, bar: tqdm[Any], *, ranks: bool
) -> dict[str, Any]:
    """The document of ``show``, ready for JSON.

    Args:
        bar: advanced by the bytes of the vectors twice.
        ranks: compute the spectrum of each matrix that changed.

    Returns:
        ``task_vectors``: for each its name, source, totals (``summary``), ``by_layer`` and
        ``by_block``; ``cosines``: k x k matrices ``overall``, ``by_layer`` and ``by_block``.

    Raises:
        UserError: an element is not finite.
    """
    grams = gram_matrices(vectors, device, bar)
    entries = []
    for name, vector in zip(short_labels(vectors.sources), vectors.vectors, strict=True):
        found = _breakdown(vector, device, bar, ranks)
        groups = {key: found[key] for key in ("summary", "by_layer", "by_block")}
        entries.append({"name": name, "source": vector.source, **groups})
    return {"ranks": ranks, "task_vectors": entries, "cosines": cosines(grams)}


def table_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per task vector and layer, for CSV; the layer "all" is the whole task vector."""
    return [
        {"task_vector": entry["name"], "layer": layer, **{key: group[key] for key in COLUMNS}}
        for entry in content["task_vectors"]
        for layer, group in [("all", entry["summary"]), *entry["by_layer"].items()]
    ]


def short_labels(sources: list[str]) -> list[str]:
    """The last part of each path, with as many before it as it takes to tell them apart."""
    parts = [Path(source).parts for source in sources]
    for count in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{source} ({number})" for number, source in enumerate(sources, 1)]


def _breakdown(
    vector: StoredTaskVector, device: torch.device, bar: tqdm[Any], ranks: bool
) -> dict[str, Any]:
    subject = Subject(vector, vector.tensors, None, [])

    def work(name: str) -> dict[str, Any]:
        entry = measure_tensor(subject, name, device, ranks=ranks)
        bar.update(vector.tensors[name].nbytes)
        return entry

    found = for_each(work, vector.tensors)
    return breakdown(dict(zip(vector.tensors, found, strict=True)))
