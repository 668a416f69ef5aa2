"""Which parameters of a task vector changed, why, and which of their elements changed most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taskvec.adapter import Adapter
from taskvec.architecture import place
from taskvec.checkpoint import read_json_object
from taskvec.cli import UserError
from taskvec.compare import (
    KINDS,
    Magnitude,
    ParameterResult,
    attribute_parameter,
    compare_parameter,
)
from taskvec.header import TensorInfo
from taskvec.rounding import FORMATS
from taskvec.subject import Subject

Entry = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One element of a task vector.

    Attributes:
        parameter: its name.
        index: where the element is, one number per dimension.
        value: T there.
    """

    parameter: str
    index: tuple[int, ...]
    value: float


def largest_changes(
    subject: Subject, maxima: Mapping[str, float], count: int, device: torch.device
) -> list[Change]:
    """The elements of a task vector with the largest finite |T|, in descending order.

    Equal ones are in the order of the parameters and of their elements. Only parameters that can
    contribute are read, block by block.

    Args:
        maxima: the largest |T| of each parameter.
        count: how many are wanted; fewer if fewer elements changed.
    """
    order = {name: position for position, name in enumerate(maxima)}
    heap: list[tuple[float, int, int, float]] = []  # |T|, -order, -flat index, T; smallest first
    for name in sorted(maxima, key=lambda name: -maxima[name]):
        if not maxima[name] or (len(heap) == count and maxima[name] < heap[0][0]):
            break
        columns = subject.tensors[name].row_elements
        for start, rows in subject.blocks(name, device):
            at_least = heap[0][0] if len(heap) == count else 0.0
            for offset, value in _largest_of(rows.flatten(), count, at_least):
                item = (abs(value), -order[name], -(start * columns + offset), value)
                (heapq.heappush if len(heap) < count else heapq.heappushpop)(heap, item)
    names = list(maxima)
    return [
        Change(names[-rank], _index(-flat, subject.tensors[names[-rank]].shape), value)
        for _, rank, flat, value in sorted(heap, reverse=True)
    ]


def _largest_of(rows: torch.Tensor, count: int, at_least: float) -> list[tuple[int, float]]:
    """(index, value) of the ``count`` largest magnitudes; of equal ones the first come first."""
    magnitude = torch.where(rows.isfinite(), rows.abs(), 0.0)
    if not magnitude.numel() or float(magnitude.max()) < at_least:
        return []
    count = min(count, magnitude.numel())
    smallest = magnitude.topk(count).values[-1]
    above = (magnitude > smallest).nonzero().flatten()
    equal = (magnitude == smallest).nonzero().flatten()[: count - above.numel()]
    chosen = torch.cat([above, equal])
    chosen = chosen[magnitude[chosen] > 0]
    return list(zip(chosen.tolist(), rows[chosen].tolist(), strict=True))


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))


def attribute(subject: Subject, name: str, adapter: Adapter | None, device: torch.device) -> Entry:
    """What one parameter's change amounts to and, as far as the inputs tell, why it changed.

    With the base, a cast is told from a change, bit for bit; with the adapter too, its parameters
    are checked against the certificate (`taskvec.compare`).
    """
    if subject.base is None:
        return _entry(name, subject, subject.measure(name, device))
    if adapter is not None and name in adapter.scalings:
        update = adapter.update(name, device)
        result = compare_parameter(subject.base, subject.vector, name, update, device)
    else:
        result = attribute_parameter(subject.base, subject.vector, name, device)
    return _entry(name, subject, result.task_vector, result)


def _entry(
    name: str, subject: Subject, magnitude: Magnitude, result: ParameterResult | None = None
) -> Entry:
    where, info = place(name), subject.tensors[name]
    return {
        "shape": list(info.shape),
        "stack": where.stack,
        "layer": where.layer,
        "block": where.block,
        "module": where.module,
        "kind": where.kind,
        "elements": info.elements,
        "nonzero_elements": magnitude.nonzero,
        "non_finite_elements": magnitude.non_finite,
        "norm": magnitude.norm,
        "rms": magnitude.norm / math.sqrt(info.elements) if info.elements else 0.0,
        "max_abs": magnitude.max_abs,
        "attribution": result.kind if result else None,
        "cast_format": result.cast_format if result else None,
        "relative_error": result.relative_error if result else None,
    }


def adopt_attribution(entries: Mapping[str, Entry], path: Path) -> None:
    """Take the reasons over from a comparison_results.json about the same task vector.

    The file is believed about the reasons only if it agrees with the tensors: the same parameters,
    with as many elements that are not zero and the same largest one.

    Raises:
        UserError: unreadable, no comparison, or one of another task vector.
    """
    found = read_json_object(path).get("parameters")
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no parameters, so it is no result of a comparison")
    for name in [*entries, *found]:
        if name not in found or name not in entries or not _same(entries[name], found[name]):
            raise UserError(f"{path}: is about another task vector: {name} differs")
    for name, entry in entries.items():
        entry["attribution"] = found[name]["attribution"]
        entry["cast_format"] = found[name].get("cast_format")
        entry["relative_error"] = _relative_error(found[name].get("lora"))


def _same(entry: Entry, found: object) -> bool:
    return (
        isinstance(found, dict)
        and found.get("attribution") in KINDS
        and found.get("shape") == entry["shape"]
        and found.get("nonzero_elements") == entry["nonzero_elements"]
        and found.get("task_vector_max_abs") == entry["max_abs"]
        and found.get("cast_format") in (None, *FORMATS)
    )


def _relative_error(lora: object) -> float | None:
    error = lora.get("relative_error") if isinstance(lora, dict) else None
    return error if isinstance(error, float) and math.isfinite(error) else None


def summarise(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Totals, and per reason: parameters, elements, norm, share of ‖T‖^2 and largest element."""
    total = math.fsum(entry["norm"] ** 2 for entry in entries.values())
    known = any(entry["attribution"] for entry in entries.values())
    return {
        "total_parameters": len(entries),
        "changed_parameters": sum(entry["nonzero_elements"] > 0 for entry in entries.values()),
        "total_elements": sum(entry["elements"] for entry in entries.values()),
        "changed_elements": sum(entry["nonzero_elements"] for entry in entries.values()),
        "non_finite_elements": sum(entry["non_finite_elements"] for entry in entries.values()),
        "norm": math.sqrt(total),
        "attribution": {
            kind: _total([e for e in entries.values() if e["attribution"] == kind], total)
            for kind in (KINDS if known else ())
        },
    }


def _total(entries: Iterable[Entry], squared: float) -> dict[str, Any]:
    entries = list(entries)
    own = math.fsum(entry["norm"] ** 2 for entry in entries)
    return {
        "parameters": len(entries),
        "elements": sum(entry["elements"] for entry in entries),
        "changed_elements": sum(entry["nonzero_elements"] for entry in entries),
        "norm": math.sqrt(own),
        "squared_norm_share": own / squared if squared else 0.0,
        "max_abs": max((entry["max_abs"] for entry in entries), default=0.0),
    }


def describe_change(
    change: Change, subject: Subject, adapter: Adapter | None, attribution: str | None
) -> Entry:
    """One of the largest changes with the base's value and the adapter's delta, where known.

    Returns:
        ready for JSON; ``relative`` is |T / W|, null where W is not known or zero.
    """
    row, column = _row_and_column(change.index, subject.tensors[change.parameter])
    base = delta = None
    if subject.base is not None:
        value = float(subject.base.read(change.parameter, row, row + 1).reshape(-1)[column])
        base = value if math.isfinite(value) else None
    if adapter is not None and change.parameter in adapter.scalings:
        update = adapter.update(change.parameter, torch.device("cpu"))
        delta = float(update.exact(row, row + 1).reshape(-1)[column])
    return {
        "parameter": change.parameter,
        "index": list(change.index),
        "change": change.value,
        "base": base,
        "adapter_delta": delta,
        "relative": abs(change.value / base) if base else None,
        "attribution": attribution,
    }


def _row_and_column(index: tuple[int, ...], info: TensorInfo) -> tuple[int, int]:
    """The row that holds an element, and its position within the row."""
    flat = 0
    for position, size in zip(index, info.shape, strict=True):
        flat = flat * size + position
    return divmod(flat, info.row_elements)
