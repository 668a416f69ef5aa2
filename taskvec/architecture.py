"""A parameter's place in a model, read off its name alone; true of any architecture."""

from __future__ import annotations

from dataclasses import dataclass

_ATTENTION = ("attn", "attention", "q_proj", "k_proj", "v_proj", "qkv")
_MLP = ("mlp", "feed_forward", "ffn", "fc1", "fc2", "intermediate", "experts", "densereludense")
_NORM = ("norm", "ln_", "layer_norm")
_EMBEDDING = ("embed", "wte", "wpe", "shared")


@dataclass(frozen=True)
class Place:
    """Where a parameter sits.

    Attributes:
        layer: index of the layer, None for what stands outside the layers.
        block: "attention", "mlp", "norm", "embedding" or "other".
        module: the module's own name, such as q_proj.
        kind: what the module calls the parameter, such as weight or bias.
    """

    layer: int | None
    block: str
    module: str
    kind: str


def place(name: str) -> Place:
    """The place of a parameter by name.

    Example:
        place("model.layers.3.self_attn.q_proj.weight")
        -> Place(layer=3, block="attention", module="q_proj", kind="weight")
    """
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    words = [part for part in parts if not part.isdigit()]
    kind = words[-1]
    module = words[-2] if len(words) > 1 else words[-1]
    return Place(numbers[0] if numbers else None, _block(words[:-1] or words), module, kind)


def _block(modules: list[str]) -> str:
    """The block that the innermost telling module belongs to."""
    for module in reversed([word.lower() for word in modules]):
        if any(mark in module for mark in _NORM):
            return "norm"
        if any(mark in module for mark in _EMBEDDING):
            return "embedding"
        if any(mark in module for mark in _ATTENTION):
            return "attention"
        if any(mark in module for mark in _MLP):
            return "mlp"
    return "other"
