"""A parameter's place in a model, read off its name alone; true of any architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_ATTENTION = ("attn", "attention", "q_proj", "k_proj", "v_proj", "qkv")
_MLP = (
    "mlp",
    "feed_forward",
    "ffn",
    "fc1",
    "fc2",
    "intermediate",
    "expert",
    "moe",
    "densereludense",
)
_NORM = ("norm", "ln_", "layer_norm")
_EMBEDDING = ("embed", "wte", "wpe")


@dataclass(frozen=True)
class Place:
    """Where a parameter sits.

    Attributes:
        layer: index of the layer, None for what stands outside the layers.
        stack: what the layers are those of, such as model.layers; an encoder and a decoder have one
            each. Empty outside the layers.
        block: "attention", "mlp", "norm", "embedding" or "other".
        module: the module's own name, such as q_proj.
        kind: what the module calls the parameter, such as weight or bias.
    """

    layer: int | None
    block: str
    module: str
    kind: str
    stack: str = ""


def place(name: str) -> Place:
    """The place of a parameter by name.

    Example:
        place("model.layers.3.self_attn.q_proj.weight")
        -> Place(layer=3, block="attention", module="q_proj", kind="weight", stack="model.layers")
    """
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if is_index(part)), None)
    words = [part for part in parts if not is_index(part)] or parts
    return Place(
        layer=None if first is None else int(parts[first]),
        block=_block(words[:-1] or words),
        module=words[-2] if len(words) > 1 else words[-1],
        kind=words[-1],
        stack="" if first is None else ".".join(parts[:first]),
    )


def layer_split(name: str) -> tuple[str, int, str] | None:
    """A parameter's stack of layers, its layer and its name within that; None outside of layers.

    The first number in a name is the layer's, so that an encoder's layers and a decoder's are two
    stacks and an expert's number is part of the name within the layer.

    Example:
        layer_split("decoder.block.3.layer.1.wi.weight")
        -> ("decoder.block", 3, "layer.1.wi.weight")
    """
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if is_index(part):
            return ".".join(parts[:position]), int(part), ".".join(parts[position + 1 :])
    return None


def fold_names(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only, as one: ``layers.0-29.self_attn.q_proj``.

    Example:
        fold_names(["h.0.w", "h.1.w", "h.3.w", "b"]) -> ["h.0-1,3.w", "b"]
    """
    rows = [name.split(".") for name in dict.fromkeys(names)]
    for position in reversed(range(max(map(len, rows), default=0))):
        groups: dict[tuple[str | None, ...], list[int]] = {}
        for parts in rows:
            key: tuple[str | None, ...] = tuple(parts)
            if position < len(parts) and is_index(parts[position]):
                key = (*parts[:position], None, *parts[position + 1 :])
                groups.setdefault(key, []).append(int(parts[position]))
            else:
                groups.setdefault(key, [])
        rows = [
            [fold_numbers(numbers) if part is None else part for part in key]
            for key, numbers in groups.items()
        ]
    return [".".join(parts) for parts in rows]


def natural_key(name: str) -> list[tuple[int, str]]:
    """For sorting names with their numbers in order, layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def template(name: str) -> tuple[str | None, ...]:
    """The parts of a name with None for its numbers (of layers, of experts)."""
    return tuple(None if is_index(part) else part for part in name.split("."))


def fold_alike(names: Iterable[str]) -> str:
    """Names of one template as one, which may cover more than they are: ``0..46`` has gaps.

    Example:
        fold_alike(["h.0.e.5.w", "h.1.e.7.w"]) -> "h.0-1.e.5,7.w"
    """
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(
        _few_runs(map(int, column)) if is_index(column[0]) else column[0] for column in columns
    )


def _few_runs(numbers: Iterable[int]) -> str:
    chosen = sorted(set(numbers))
    text = fold_numbers(chosen)
    return text if text.count(",") < 3 else f"{chosen[0]}..{chosen[-1]}"


def fold_numbers(numbers: Iterable[int]) -> str:
    """Numbers as ranges: ``0-29``, ``0-3,7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def is_index(part: str) -> bool:
    """True if a part of a name is the number of a layer, an expert and the like."""
    return re.fullmatch(r"[0-9]{1,9}", part) is not None


def _block(modules: list[str]) -> str:
    """The block that the innermost telling module belongs to."""
    for module in reversed([word.lower() for word in modules]):
        if any(mark in module for mark in _NORM):
            return "norm"
        if module == "embed_out":  # GPT-NeoX's head
            return "other"
        if module == "shared" or any(mark in module for mark in _EMBEDDING):  # shared: T5
            return "embedding"
        if any(mark in module for mark in _ATTENTION):
            return "attention"
        if any(mark in module for mark in _MLP):
            return "mlp"
    return "mlp" if "output" in modules[1:] else "other"  # BERT's layer.0.output.dense
