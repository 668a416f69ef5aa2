"""The tensors of a checkpoint as stacks of layers and what stands outside them.

Everything is read off names and shapes, so it holds for any architecture; no tensor is read. What
is returned is ready for JSON, and text and figures are rendered from that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from taskvec.architecture import fold_alike, layer_split, place, template
from taskvec.header import TensorInfo

BLOCKS = ("embedding", "attention", "mlp", "norm", "other")


@dataclass(frozen=True)
class Row:
    """The tensors that share a name within their layers, or one tensor outside of the layers.

    Attributes:
        name: within the layer; numbers such as an expert's are folded: ``experts.0-7.w1.weight``.
        block: see `architecture.Place`.
        shapes, dtypes: the distinct ones.
        tensors, elements, nbytes: over all layers.
        layers: those that have it; empty outside of the layers.
        touched_tensors, touched_elements: of which the adapter changes so many.
        touched_layers: layers in which it changes all of them.
        partly_touched_layers: layers in which it changes some, but not all.
    """

    name: str
    block: str
    shapes: list[list[int]]
    dtypes: list[str]
    tensors: int
    elements: int
    nbytes: int
    layers: list[int]
    touched_tensors: int
    touched_elements: int
    touched_layers: list[int]
    partly_touched_layers: list[int]


@dataclass(frozen=True)
class Stack:
    """Numbered layers under one name, such as ``model.layers`` or ``decoder.block``.

    Attributes:
        layers: their numbers.
        sizes: how many layers have how many parameters: ``[{"layers": 30, "parameters": 16}]``.
    """

    name: str
    layers: list[int]
    sizes: list[dict[str, int]]
    rows: list[Row]


def describe(tensors: Mapping[str, TensorInfo], touched: Collection[str]) -> dict[str, Any]:
    """The structure of a checkpoint, ready for JSON.

    Args:
        tensors: of the checkpoint, by name.
        touched: names of those that an adapter changes.

    Returns:
        ``formula`` ("30 layers x 16 parameters + 3 global = 483"), ``totals``, ``blocks`` (by
        name), ``stacks`` (see `Stack`), ``global`` (rows) and ``parameters`` (by name).
    """
    stacks: dict[str, list[_Member]] = {}
    outside: list[str] = []
    for name in tensors:
        where = layer_split(name)
        if where is None:
            outside.append(name)
        else:
            stacks.setdefault(where[0], []).append(_Member(name, *where[1:]))
    found = [_stack(stack, members, tensors, touched) for stack, members in stacks.items()]
    return {
        "formula": formula(found, len(outside)),
        "totals": _totals(tensors, touched),
        "blocks": _blocks(tensors, touched),
        "stacks": [asdict(stack) for stack in found],
        "global": [
            asdict(row)
            for row in _sorted(_row(name, {None: [name]}, tensors, touched) for name in outside)
        ],
        "parameters": {name: _parameter(info, touched) for name, info in tensors.items()},
    }


def formula(stacks: Sequence[Stack], outside: int) -> str:
    """How the count of tensors comes about.

    Example:
        "30 layers x 16 parameters + 3 global = 483", or, where layers are of several kinds,
        "encoder.block (1 x 9 + 5 x 8) + decoder.block (1 x 14 + 5 x 13) + 3 global = 131"
    """
    sizes = [size for stack in stacks for size in stack.sizes]
    total = outside + sum(size["layers"] * size["parameters"] for size in sizes)
    if not sizes:
        return f"{_count(outside, 'parameter')}, no layers"
    if len(sizes) == 1:
        layers, parameters = sizes[0]["layers"], sizes[0]["parameters"]
        terms = [f"{_count(layers, 'layer')} x {_count(parameters, 'parameter')}"]
    else:
        terms = [f"{stack.name or 'layers'} ({sizes_text(stack.sizes)})" for stack in stacks]
    return f"{' + '.join([*terms, *([f'{outside} global'] if outside else [])])} = {total}"


def sizes_text(sizes: Iterable[Mapping[str, int]]) -> str:
    """Layers times parameters: ``1 x 9 + 5 x 8``."""
    return " + ".join(f"{size['layers']} x {size['parameters']}" for size in sizes)


def shape_text(shapes: Sequence[Sequence[int]]) -> str:
    """Shapes as they are read aloud: ``3072 x 256``; a scalar is ``1``; at most two of many."""
    texts = [" x ".join(map(str, shape)) or "1" for shape in shapes]
    return " | ".join(texts[:2]) + (" | ..." if len(texts) > 2 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True)
class _Member:
    """A tensor within a layer: its full name, the layer, and its name within that."""

    full_name: str
    layer: int
    name: str


def _stack(
    stack: str, members: list[_Member], tensors: Mapping[str, TensorInfo], touched: Collection[str]
) -> Stack:
    rows: dict[tuple[str | None, ...], list[_Member]] = {}
    for member in members:
        rows.setdefault(template(member.name), []).append(member)
    parameters = Counter(member.layer for member in members)
    layers = sorted(parameters)
    sizes = Counter(parameters[layer] for layer in layers)
    return Stack(
        name=stack,
        layers=layers,
        sizes=[{"layers": layers, "parameters": count} for count, layers in sizes.items()],
        rows=_sorted(
            _row(fold_alike(member.name for member in chosen), _by_layer(chosen), tensors, touched)
            for chosen in rows.values()
        ),
    )


def _by_layer(members: Iterable[_Member]) -> dict[int | None, list[str]]:
    cells: dict[int | None, list[str]] = {}
    for member in members:
        cells.setdefault(member.layer, []).append(member.full_name)
    return cells


def _row(
    name: str,
    cells: Mapping[int | None, list[str]],
    tensors: Mapping[str, TensorInfo],
    touched: Collection[str],
) -> Row:
    """One row from its tensors' names by layer (None: outside of the layers)."""
    infos = [tensors[tensor] for names in cells.values() for tensor in names]
    changed = [info for info in infos if info.name in touched]
    shares = {
        layer: sum(tensor in touched for tensor in names) / len(names)
        for layer, names in cells.items()
        if layer is not None
    }
    return Row(
        name=name,
        block=place(infos[0].name).block,
        shapes=[list(shape) for shape in dict.fromkeys(info.shape for info in infos)],
        dtypes=list(dict.fromkeys(_dtype(info) for info in infos)),
        tensors=len(infos),
        elements=sum(info.elements for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        layers=sorted(shares),
        touched_tensors=len(changed),
        touched_elements=sum(info.elements for info in changed),
        touched_layers=sorted(layer for layer, share in shares.items() if share == 1),
        partly_touched_layers=sorted(layer for layer, share in shares.items() if 0 < share < 1),
    )


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """Rows by block, and within a block as the files have them."""
    return sorted(rows, key=lambda row: BLOCKS.index(row.block))


def _totals(tensors: Mapping[str, TensorInfo], touched: Collection[str]) -> dict[str, Any]:
    infos = list(tensors.values())
    changed = [info for info in infos if info.name in touched]
    elements = sum(info.elements for info in infos)
    changed_elements = sum(info.elements for info in changed)
    return {
        "tensors": len(infos),
        "elements": elements,
        "nbytes": sum(info.nbytes for info in infos),
        "dtypes": {
            dtype: sum(_dtype(info) == dtype for info in infos)
            for dtype in dict.fromkeys(map(_dtype, infos))
        },
        "touched_tensors": len(changed),
        "touched_elements": changed_elements,
        "touched_tensor_share": len(changed) / len(infos) if infos else 0.0,
        "touched_element_share": changed_elements / elements if elements else 0.0,
    }


def _blocks(tensors: Mapping[str, TensorInfo], touched: Collection[str]) -> dict[str, Any]:
    """Tensors, elements and what is touched, by block; blocks that the model has not are absent."""
    table: dict[str, Any] = {}
    for block in BLOCKS:
        infos = [info for name, info in tensors.items() if place(name).block == block]
        if infos:
            changed = [info for info in infos if info.name in touched]
            table[block] = {
                "tensors": len(infos),
                "elements": sum(info.elements for info in infos),
                "touched_tensors": len(changed),
                "touched_elements": sum(info.elements for info in changed),
            }
    return table


def _parameter(info: TensorInfo, touched: Collection[str]) -> dict[str, Any]:
    where = layer_split(info.name)
    return {
        "shape": list(info.shape),
        "elements": info.elements,
        "dtype": _dtype(info),
        "stack": where[0] if where else None,
        "layer": where[1] if where else None,
        "block": place(info.name).block,
        "touched": info.name in touched,
    }


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")
