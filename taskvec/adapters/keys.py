"""The names of an adapter's tensors, and what each of them is for.

PEFT names a tensor after the module that it belongs to, ``base_model.model.<module>.<what>``. A
module that is itself wrapped has ``base_layer`` in its name: once for each wrapper, and a module
has a wrapper for every parameter of its own that ``target_parameters`` names.

Where embeddings are saved along, as after a change of the vocabulary, PEFT writes all that their
wrappers hold: of a module in ``modules_to_save`` the trained tensor under two names, and what it
stands in for as ``original_module``, which does not enter a merge.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.tensorfile import TensorFile

PREFIX = "base_model.model."

# The roles of the tensors that PEFT adds to a module, by the end of their names.
A, B, BIAS, MAGNITUDE, TOKENS, WHOLE = "A", "B", "bias", "magnitude", "tokens", "whole"
ORIGINAL = "original"
_ROLES = (
    (A, r"\.lora_A\.weight"),
    (B, r"\.lora_B\.weight"),
    (A, r"\.lora_embedding_A"),
    (B, r"\.lora_embedding_B"),
    (BIAS, r"\.lora_B\.bias"),
    (MAGNITUDE, r"\.lora_magnitude_vector(\.weight)?"),
    (TOKENS, r"\.token_adapter\.trainable_tokens_delta"),
)
_PATTERNS = [(role, re.compile(rf"^(?P<module>.+){end}$")) for role, end in _ROLES]
_OURS = re.compile(r"lora|token_adapter|trainable_tokens|prompt_e|ia3|hada_|lokr_|vera_|oft_")


# Keys that PEFT does not write, and what to do about them; the first that matches counts.
_OTHER_KEYS = (
    (
        r"\.lora_([AB]\.[^.]+\.weight|embedding_[AB]\.[^.]+)$",
        "keys carry an adapter's name, as in memory",
        "write the adapter with save_pretrained() instead of its state_dict(), or take .NAME out "
        "of the keys",
    ),
    (
        r"^(?!base_model\.model\.).*\.lora_[AB]\.weight$",
        "keys lack the prefix base_model.model.",
        "put base_model.model. before the names of the tensors",
    ),
    (
        r"lora_?(up|down)|lora\.(up|down)",
        "keys are not PEFT's but another tool's",
        "convert the adapter to PEFT's format first",
    ),
    (
        r"^base_model\.model\.(?!.*lora_).*$",
        "whole tensors that neither modules_to_save nor bias names",
        "add their modules to modules_to_save if they were trained",
    ),
    (r"", "keys are not understood", "write the adapter with PEFT's save_pretrained()"),
)


@dataclass(frozen=True)
class Key:
    """What a tensor is for.

    Attributes:
        module: the module that it belongs to, without ``base_layer``; of a whole tensor, the
            parameter that it stands for.
        role: `A`, `B`, `BIAS`, `MAGNITUDE`, `TOKENS`, `WHOLE`, or `ORIGINAL` of what was replaced.
        depth: how many times ``base_layer`` was in the name.
        embedding: it is a factor of an embedding.
    """

    module: str
    role: str
    depth: int = 0
    embedding: bool = False


@dataclass
class Group:
    """The tensors that one wrapper of a module has, by role."""

    module: str
    depth: int
    embedding: bool = False
    tensors: dict[str, TensorInfo] = field(default_factory=dict)


def key_of(name: str) -> Key | None:
    """What a tensor of an adapter is for; None if its name is not one that PEFT gives."""
    if not name.startswith(PREFIX):
        return None
    name = name.removeprefix(PREFIX)
    for role, pattern in _PATTERNS:
        if match := pattern.match(name):
            module, depth = _unwrapped(match["module"])
            return Key(module, role, depth, ".lora_embedding_" in name)
    name = name.replace(".token_adapter.base_layer.", ".base_layer.")
    if _OURS.search(name):
        return None
    return Key(*_whole(name))


def unknown_key(name: str) -> tuple[str, str]:
    """What a key is that is no LoRA factor, and what to do about it."""
    return next((what, todo) for pattern, what, todo in _OTHER_KEYS if re.search(pattern, name))


def factor_of(name: str) -> tuple[str, str] | None:
    """The module and side ("A" or "B") of an adapter tensor; None if it is no LoRA factor.

    A module with several pairs, each for a parameter of its own, has ``base_layer`` at its end once
    for every pair but one.
    """
    key = key_of(name)
    if key is None or key.role not in (A, B):
        return None
    return key.module + ".base_layer" * key.depth, key.role


def grouped_keys(file: TensorFile) -> tuple[list[Group], dict[str, TensorInfo]]:
    """The adapter's tensors by wrapper, and its whole tensors by the parameter they stand for.

    Raises:
        UserError: a name or a dtype that is not understood, two different tensors for one thing,
            or none at all.
    """
    path = file.path
    groups: dict[tuple[str, int], Group] = {}
    whole: dict[str, TensorInfo] = {}
    for name, info in file.tensors.items():
        key = key_of(name)
        if key is None:
            what, todo = unknown_key(name)
            raise UserError(
                f"{path}: {name}: not a tensor that PEFT's LoRA writes ({what}); {todo}"
            )
        if not info.is_float:
            raise UserError(f"{path}: {name}: {info.dtype} {info.shape} is no LoRA factor")
        if key.role == ORIGINAL:
            continue
        if key.role == WHOLE:
            found, place = whole, key.module
        else:
            group = groups.setdefault((key.module, key.depth), Group(key.module, key.depth))
            group.embedding |= key.embedding
            found, place = group.tensors, key.role
        if place in found and not (key.role == WHOLE and file.same(info, found[place])):
            raise UserError(f"{path}: {name} and {found[place].name} are the same thing")
        found[place] = info
    if not groups and not whole:
        raise UserError(f"{path}: holds no LoRA tensors")
    return list(groups.values()), whole


def _unwrapped(module: str) -> tuple[str, int]:
    parts = module.split(".")
    return ".".join(part for part in parts if part != "base_layer"), parts.count("base_layer")


def _whole(name: str) -> tuple[str, str, int]:
    role = ORIGINAL if ".original_module." in name else WHOLE
    name = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    parameter, depth = _unwrapped(name)
    return parameter, role, depth
