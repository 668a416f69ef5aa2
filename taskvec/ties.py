"""Weights that are one in memory: an output head that is the input embedding, and the like.

A file may hold such a tensor once or several times. Copies are set aside when a model is opened,
so that there is one parameter wherever transformers makes one of them; and a head that an adapter,
or a fine-tuning, gave weights of its own becomes a parameter of the base, with the embedding's
values.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from taskvec.cli import notice
from taskvec.tensorfile import row_blocks, same_bits

if TYPE_CHECKING:  # which sets copies aside while it opens a model
    from taskvec.checkpoint import Checkpoint

# What shares its memory with the input embedding, or with a bias, where weights are tied
# (transformers' _tied_weights_keys).
_TIED = re.compile(
    r"(^|\.)((lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder)\.(weight|bias)"
    r"|(encoder|decoder)\.embed_tokens\.weight)$"
)
_EMBEDDING = re.compile(r"(^|\.)(shared|embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_HEADED = re.compile(r"For[A-Z]|LMHead")  # in the name of an architecture
_COMPARED_ELEMENTS = 1 << 20


def has_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token: an input embedding, or an output head."""
    return bool(_EMBEDDING.search(name) or _TIED.search(name))


def set_copies_aside(model: Checkpoint) -> None:
    """Take second copies of tied tensors out of a model that was just opened, and say so.

    A copy is one bit for bit; a model whose config.json says that nothing is tied keeps it.
    """
    if model.config().get("tie_word_embeddings", True) is False:
        return
    for name in [name for name in model.tensors if _TIED.search(name)]:
        original = _original(model, name)
        if original is not None:
            del model.tensors[name]
            notice(f"{model.source}: stores the tied {name} twice; it is one with {original}.")


def tied_to(model: Checkpoint, name: str) -> str | None:
    """The tensor that a tied one, which the file leaves out, is one with; None if it is not tied.

    Example:
        tied_to(starcoder2, "lm_head.weight") -> "model.embed_tokens.weight"
    """
    config = model.config()
    architectures = config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if name in model.tensors or not _TIED.search(name) or not name.endswith(".weight"):
        return None
    if config.get("tie_word_embeddings", True) is False or not _HEADED.search(first):
        return None
    found = [other for other in model.tensors if _EMBEDDING.search(other)]
    return found[0] if len(found) == 1 else None


def untie(model: Checkpoint, name: str) -> bool:
    """Make a tied tensor, which the file leaves out, a parameter of its own; False if it is not."""
    original = tied_to(model, name)
    if original is None:
        return False
    model.tensors[name] = dataclasses.replace(model.tensors[original], name=name)
    return True


def untied(model: Checkpoint) -> list[str]:
    """The tensors that `untie` made parameters of their own."""
    return [
        name
        for name, info in model.tensors.items()
        if name not in model.shards[info.path].tensors and info.name == name and _TIED.search(name)
    ]


def _original(model: Checkpoint, name: str) -> str | None:
    """What a tied tensor is a copy of, bit for bit."""
    info = model.tensors[name]
    for other in model.tensors.values():
        if (other.shape, other.dtype) != (info.shape, info.dtype) or _TIED.search(other.name):
            continue
        if (other.path, other.offset) == (info.path, info.offset) or all(
            same_bits(model.read(name, *rows), model.read(other.name, *rows))
            for rows in row_blocks(info, _COMPARED_ELEMENTS)
        ):
            return other.name
    return None
