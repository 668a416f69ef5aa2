"""What a tensor is called in a base's file, in memory, in an adapter and in another model's file.

Two models are compared under the base's names (`aligned`), and an adapter's parameters are found in
the base whatever it was trained with (`renaming`). What differs is a leading part (a base saved
from its backbone lacks that of its head), names that transformers changes while it loads a model
(taskvec/conversions.py), and buffers that one of the files leaves out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError, notice
from taskvec.conversions import Conversion, Key, conversion_of
from taskvec.header import TensorInfo
from taskvec.ties import has_vocabulary, tied_to, untie, untied

Rule = tuple[str, str]

# Causal masks, positions and frequencies, which a model computes when it is made. Older versions of
# transformers saved them, newer ones do not.
_MASK = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$")
_COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|token_type_ids)$")


def renaming(
    modules: Iterable[str], base: Checkpoint, parameters: Iterable[str] = ()
) -> Callable[[str], str]:
    """From a parameter's name in an adapter to its name in the base; one rule fits every module.

    A tied head that the base's file leaves out is the embedding. A tensor that is fused in memory,
    and lies in pieces in the base's file, is called what it is in memory (`pieces`). A name that no
    rule finds in the base comes back unchanged.

    Args:
        modules: what the adapter adapts, by module.
        parameters: and by parameter.
    """
    files = by_key(base)
    fused = {key.name for key in files if key.expert is not None}
    conversion = conversion_of(base.config())

    def find(name: str, rule: Rule) -> str | None:
        key = _renamed(conversion.key(name), rule)
        in_pieces = key.name if key.expert is None and key.name in fused else None
        return files.get(key) or in_pieces or tied_to(base, name)

    adapted = [*(f"{module}.weight" for module in modules), *parameters]
    for rule in naming_rules(adapted, base):
        if all(find(name, rule) for name in adapted):
            return lambda name: find(name, rule) or name
    return lambda name: name


def is_expert(base: Checkpoint, name: str) -> bool:
    """Whether a tensor of a base is one expert's, and fused with the others' in memory."""
    return conversion_of(base.config()).key(name).expert is not None


def naming_rules(modules: Iterable[str], base: Checkpoint) -> list[Rule]:
    """From names in memory to names in the file: leading part to take off, and to put on.

    A base saved from its backbone names ``h.0.attn`` what an adapter trained with a head calls
    ``transformer.h.0.attn``; the reverse happens too. One rule must fit every module.
    """
    heads = {module.split(".", 1)[0] + "." for module in modules}
    strips = heads if len(heads) == 1 else set()
    adds = sorted({name.split(".", 1)[0] + "." for name in base.tensors})
    return [("", ""), *((head, "") for head in strips), *(("", head) for head in adds)]


class Piece(NamedTuple):
    """A tensor of a base that is one part of one expert of a tensor that is fused in memory.

    Attributes:
        name: in the base's file.
        expert: its number.
        part, parts: which of how many equal parts of the expert's rows it is.
    """

    name: str
    expert: int
    part: int
    parts: int


def pieces(base: Checkpoint) -> dict[str, list[Piece]]:
    """Where a base keeps the experts that are fused in memory, by the fused tensor's name there.

    The names have the base's leading part; a base that keeps them fused has none.

    Raises:
        UserError: some of a tensor's pieces are missing.

    Example:
        pieces(mixtral)["model.layers.0.mlp.experts.down_proj"]
        -> [Piece("model.layers.0.block_sparse_moe.experts.0.w2.weight", 0, 0, 1), ...]
    """
    conversion = conversion_of(base.config())
    found: dict[str, list[Piece]] = {}
    for key, name in by_key(base, conversion).items():
        if key.expert is not None:
            piece = Piece(name, key.expert, key.part, conversion.parts(key.name))
            found.setdefault(key.name, []).append(piece)
    for fused, apart in found.items():
        apart.sort(key=lambda piece: (piece.expert, piece.part))
        parts = apart[0].parts
        wanted = [(number // parts, number % parts) for number in range(len(apart))]
        if len(apart) % parts or [(piece.expert, piece.part) for piece in apart] != wanted:
            raise UserError(f"{base.source}: some experts of {fused} are missing; get it whole")
    return found


def by_key(model: Checkpoint, conversion: Conversion | None = None) -> dict[Key, str]:
    """The names of a checkpoint's tensors, by what they are called in memory."""
    conversion = conversion or conversion_of(model.config())
    return {conversion.key(name): name for name in model.tensors}


def _renamed(key: Key, rule: Rule) -> Key:
    strip, add = rule
    return key._replace(name=add + key.name.removeprefix(strip))


def aligned(base: Checkpoint, other: Checkpoint, *, partly: bool = False) -> Checkpoint:
    """Another model of the base's architecture, under the base's names.

    Its tensors are those of the base in the base's order, except for buffers that it leaves out. A
    head that is tied in the base and has weights of its own in the other model becomes a parameter
    of the base; one that an adapter untied, of the other model. What is left out is said on stderr.

    Args:
        partly: the other one may leave out any tensor, as a task vector file does.

    Raises:
        UserError: names the first tensor that one of the two has not got or has in another shape,
            or that is a float in one of them only; or one of them is quantised.
    """
    for model in (base, other):
        model.refuse_quantised()
    for name in untied(base):
        if untie(other, name):
            notice(f"{other.source}: {name} is tied there, and has weights of its own here.")
    conversion = conversion_of(base.config() or other.config())
    others = _under_base_keys(by_key(base, conversion), by_key(other, conversion))
    _untie_heads(base, others)
    found: dict[str, TensorInfo] = {}
    for key, name in by_key(base, conversion).items():
        info = _counterpart(base, other, conversion, key, others)
        if info is not None:
            _check_alike(base, other, base.tensors[name], info)
            found[name] = info
        elif not partly and not _is_buffer(base.tensors[name]):
            raise UserError(f"{other.source}: has no {name}, which {base.source} has")
    _check_extra(base, other, {info.name for info in found.values()})
    if not partly:
        _say_absent(other, [name for name in base.tensors if name not in found])
    tensors = {
        name: dataclasses.replace(found[name], name=name) for name in base.tensors if name in found
    }
    return dataclasses.replace(other, tensors=tensors)


def _untie_heads(base: Checkpoint, others: Mapping[Key, str]) -> None:
    known = {key.name for key in by_key(base)}
    for key in others:
        if key.name not in known and untie(base, key.name):
            notice(f"{base.source}: {key.name} is tied here, and has weights of its own there.")


def _under_base_keys(wanted: Mapping[Key, str], others: Mapping[Key, str]) -> dict[Key, str]:
    """The other model's names by key, under the leading part that fits most of the base's."""
    names = {key.name for key in wanted}
    rules = [
        ("", ""),
        *((strip, "") for strip in _leading(key.name for key in others)),
        *(("", add) for add in _leading(names)),
    ]
    rule = max(rules, key=lambda rule: sum(_renamed(key, rule).name in names for key in others))
    return {key if key.name in names else _renamed(key, rule): others[key] for key in others}


def _leading(names: Iterable[str]) -> list[str]:
    return sorted({name.split(".", 1)[0] + "." for name in names if "." in name})


def _counterpart(
    base: Checkpoint,
    other: Checkpoint,
    conversion: Conversion,
    key: Key,
    others: Mapping[Key, str],
) -> TensorInfo | None:
    """Where the other model keeps a tensor of the base; None where it does not."""
    if key in others:
        return other.tensors[others[key]]
    fused = others.get(Key(key.name))
    if fused is not None and key.expert is not None:
        return _piece(other.tensors[fused], key, conversion.parts(key.name))
    if any(found.name == key.name for found in others):
        raise UserError(
            f"{other.source}: holds {key.name} one by one, {base.source} fused; load one of them "
            "in transformers and save it like the other (save_pretrained's save_original_format)"
        )
    return None


def _piece(fused: TensorInfo, key: Key, parts: int) -> TensorInfo:
    """An expert's part of a fused tensor (experts, parts x rows, columns), as a tensor (rows, ...).

    Raises:
        UserError: there is no such expert or part.
    """
    experts, rows = (*fused.shape, 0, 0)[:2]
    expert = key.expert or 0
    if len(fused.shape) != 3 or expert >= experts or rows % parts:
        raise UserError(
            f"{fused.path}: {fused.name}: {fused.shape} holds no expert {expert} of {parts} parts"
        )
    nbytes = fused.nbytes // (experts * parts)
    shape = (rows // parts, *fused.shape[2:])
    offset = fused.offset + (expert * parts + key.part) * nbytes
    return dataclasses.replace(fused, shape=shape, offset=offset, nbytes=nbytes)


def _check_alike(
    base: Checkpoint, other: Checkpoint, wanted: TensorInfo, found: TensorInfo
) -> None:
    name = wanted.name
    if found.shape != wanted.shape:
        raise UserError(
            f"{name}: {found.shape} in {other.source}, but {wanted.shape} in {base.source}"
            + resizing(name, found.shape, wanted.shape, "; resize the base and save it first")
        )
    if found.is_float != wanted.is_float:
        raise UserError(
            f"{name}: {found.dtype} in {other.source}, but {wanted.dtype} in {base.source}; only "
            "float tensors can be subtracted"
        )


def resizing(name: str, wanted: tuple[int, ...], found: tuple[int, ...], before: str = "") -> str:
    """How a base gets a vocabulary of so many rows, for a message; nothing if it is not that."""
    if not has_vocabulary(name) or len(wanted) != 2 or wanted[1:] != found[1:]:
        return ""
    return f"{before} (resize_token_embeddings({wanted[0]}), save_pretrained())"


def _is_buffer(info: TensorInfo) -> bool:
    """Whether a tensor is computed, not trained. A mask is (1, 1, n, n), or the number it has."""
    mask = _MASK.search(info.name) and (info.shape == () or info.shape[:2] == (1, 1))
    return bool(mask or _COMPUTED.search(info.name))


def _check_extra(base: Checkpoint, other: Checkpoint, used: Collection[str]) -> None:
    """What the other model has and the base has not can only be a buffer."""
    extra = [name for name in other.tensors if name not in used]
    for name in extra:
        if not _is_buffer(other.tensors[name]):
            raise UserError(f"{base.source}: has no {name}, which {other.source} has")
    _say_absent(base, extra)


def _say_absent(model: Checkpoint, buffers: list[str]) -> None:
    if buffers:
        more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
        notice(f"{model.source}: leaves out the buffer {buffers[0]}{more}, which is not trained.")
