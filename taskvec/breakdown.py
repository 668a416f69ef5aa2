"""What a task vector consists of: by layer, block, module and kind of parameter.

Counts, norms and shares come from one pass over the tensors. The ranks say how many directions a
matrix's change has: the stable rank ‖T‖_F^2 / ‖T‖_2^2 hardly sees small singular values, the
effective rank counts them all, rounding noise included (`taskvec.spectrum`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from taskvec.architecture import layer_split, place
from taskvec.header import TensorInfo
from taskvec.spectrum import (
    DENSE_ELEMENTS,
    DENSE_SIDE,
    effective_rank,
    singular_values,
    stable_rank,
    streamed_krylov,
)
from taskvec.subject import Subject

LEADING = 16  # singular values that a spectrum from a few products resolves one by one
OUTSIDE = "outside the layers"

Entry = dict[str, Any]


def measure_tensor(subject: Subject, name: str, device: torch.device, *, ranks: bool) -> Entry:
    """What one tensor of the task vector amounts to.

    Args:
        ranks: compute its spectrum too, where it is a matrix that changed and is finite.

    Returns:
        ready for JSON. Norms are Frobenius, sparsity is the share of elements that are zero, rms
        is norm / sqrt(elements); stable_rank and effective_rank are null where not computed, and
        ranks_exact tells all singular values from an estimate of their distribution.
    """
    info, magnitude, where = subject.tensors[name], subject.measure(name, device), place(name)
    entry: Entry = {
        "shape": list(info.shape),
        "stack": where.stack,
        "layer": where.layer,
        "block": where.block,
        "module": where.module,
        "kind": where.kind,
        **_sizes(info.elements, magnitude.nonzero, magnitude.squared_norm, magnitude.max_abs),
        "non_finite_elements": magnitude.non_finite,
        "squared_norm_share": 0.0,
        "stable_rank": None,
        "effective_rank": None,
        "ranks_exact": None,
    }
    matrix = len(info.shape) == 2 and min(info.shape) > 0
    if ranks and matrix and magnitude.squared_norm and not magnitude.non_finite:
        nodes, weights, largest = _spectrum(subject, info, device)
        entry["stable_rank"] = stable_rank(magnitude.squared_norm, largest)
        entry["effective_rank"] = effective_rank(nodes, weights)
        entry["ranks_exact"] = weights is None
    return entry


def breakdown(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The totals and the groups of a task vector's tensors, ready for JSON.

    Args:
        entries: `measure_tensor` of every tensor, by name; their shares of ‖T‖^2 are filled in.

    Returns:
        ``summary``, ``by_layer``, ``by_block``, ``by_module``, ``by_kind`` and ``parameters``.
    """
    total = math.fsum(entry["norm"] ** 2 for entry in entries.values())
    for entry in entries.values():
        entry["squared_norm_share"] = entry["norm"] ** 2 / total if total else 0.0
    order, layer = layer_groups(entries)
    in_order = {name: entries[name] for name in order}
    return {
        "summary": _group(entries.values(), total),
        "by_layer": _groups(in_order, total, lambda name, _: layer(name)),
        "by_block": _groups(entries, total, lambda _, entry: entry["block"]),
        "by_module": _groups(entries, total, lambda _, e: f"{e['block']}.{e['module']}"),
        "by_kind": _groups(entries, total, lambda _, entry: entry["kind"]),
        "parameters": dict(entries),
    }


def layer_groups(names: Iterable[str]) -> tuple[list[str], Callable[[str], str]]:
    """Names stack by stack and layer by layer, and what to call the layer of each."""
    names = list(names)
    stacks = {split[0] for name in names if (split := layer_split(name)) is not None}
    return sorted(names, key=_layer_order), lambda name: _layer_label(name, len(stacks) > 1)


def _sizes(elements: int, nonzero: int, squared_norm: float, max_abs: float) -> Entry:
    return {
        "elements": elements,
        "nonzero_elements": nonzero,
        "sparsity": 1 - nonzero / elements if elements else 0.0,
        "norm": math.sqrt(squared_norm),
        "rms": math.sqrt(squared_norm / elements) if elements else 0.0,
        "max_abs": max_abs,
    }


def _groups(
    entries: Mapping[str, Entry], total: float, label: Callable[[str, Entry], str]
) -> dict[str, Any]:
    """Totals of the tensors with the same label, in the order of their first."""
    members: dict[str, list[Entry]] = {}
    for name, entry in entries.items():
        members.setdefault(label(name, entry), []).append(entry)
    return {key: _group(group, total) for key, group in members.items()}


def _group(members: Iterable[Entry], total: float) -> Entry:
    """What some tensors hold together; ``total`` is ‖T‖² of all."""
    members = list(members)
    squared_norm = math.fsum(entry["norm"] ** 2 for entry in members)
    return {
        "tensors": len(members),
        "nonzero_tensors": sum(entry["nonzero_elements"] > 0 for entry in members),
        **_sizes(
            sum(entry["elements"] for entry in members),
            sum(entry["nonzero_elements"] for entry in members),
            squared_norm,
            max((entry["max_abs"] for entry in members), default=0.0),
        ),
        "squared_norm_share": squared_norm / total if total else 0.0,
        "median_stable_rank": _median(members, "stable_rank"),
        "median_effective_rank": _median(members, "effective_rank"),
    }


def _median(members: Iterable[Entry], key: str) -> float | None:
    known = [entry[key] for entry in members if entry[key] is not None]
    return statistics.median(known) if known else None


def _layer_order(name: str) -> tuple[bool, str, int]:
    """Stack by stack and layer by layer, what is outside of them last."""
    split = layer_split(name)
    return (True, "", 0) if split is None else (False, split[0], split[1])


def _layer_label(name: str, several_stacks: bool) -> str:
    split = layer_split(name)
    if split is None:
        return OUTSIDE
    return f"{split[0]}.{split[1]}" if several_stacks else str(split[1])


def _spectrum(
    subject: Subject, info: TensorInfo, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Singular values, how often each one counts (None: once, they are all), and the largest.

    A small matrix is decomposed whole; a large one stays on disk and is read a few times.
    """
    if min(info.shape) <= DENSE_SIDE and info.elements <= DENSE_ELEMENTS:
        matrix = torch.cat([rows for _, rows in subject.blocks(info.name, device)])
        values = singular_values(matrix)
        return values, None, float(values[0])
    found = streamed_krylov(
        lambda: ((start, rows.double()) for start, rows in subject.blocks(info.name, device)),
        (info.shape[0], info.shape[1]),
        LEADING,
    )
    return found.nodes, found.weights, found.largest
