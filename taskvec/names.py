"""What a tensor is called in a base's file, in memory, in an adapter and in another model's file.

Two models are compared under the base's names (`aligned`), and an adapter's parameters are found in
the base whatever it was trained with (`renaming`). What differs is a leading part (a base saved
from its backbone lacks that of its head), names that transformers changes while it loads a model
(taskvec/conversions.py), and tensors that one file stores twice or leaves out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import torch

from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError, notice
from taskvec.conversions import Conversion, Key, conversion_of
from taskvec.tensorfile import TensorInfo, row_blocks

Rule = tuple[str, str]

# What shares its memory with the input embedding, or with a bias, in a model with tied weights
# (transformers' _tied_weights_keys). A file may hold a second copy of it.
_TIED = re.compile(
    r"(^|\.)((lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder)\.(weight|bias)"
    r"|(encoder|decoder)\.embed_tokens\.weight)$"
)
# Causal masks, positions and frequencies, which a model computes when it is made. Older versions of
# transformers saved them, newer ones do not.
_BUFFER = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)(inv_freq|position_ids|token_type_ids)$"
)
_COMPARED_ELEMENTS = 1 << 20


def renaming(modules: list[str], base: Checkpoint) -> Callable[[str], str]:
    """From a parameter's name in an adapter to its name in the base; one rule fits every module.

    A name that no rule finds in the base comes back unchanged.
    """
    files = by_key(base)
    conversion = conversion_of(base.config())
    for rule in naming_rules(modules, base):
        if all(_find(f"{module}.weight", rule, conversion, files) for module in modules):
            return lambda name: _find(name, rule, conversion, files) or name
    return lambda name: name


def naming_rules(modules: Iterable[str], base: Checkpoint) -> list[Rule]:
    """From names in memory to names in the file: leading part to take off, and to put on.

    A base saved from its backbone names ``h.0.attn`` what an adapter trained with a head calls
    ``transformer.h.0.attn``; the reverse happens too. One rule must fit every module.
    """
    heads = {module.split(".", 1)[0] + "." for module in modules}
    strips = heads if len(heads) == 1 else set()
    adds = sorted({name.split(".", 1)[0] + "." for name in base.tensors})
    return [("", ""), *((head, "") for head in strips), *(("", head) for head in adds)]


def by_key(model: Checkpoint, conversion: Conversion | None = None) -> dict[Key, str]:
    """The names of a checkpoint's tensors, by what they are called in memory."""
    conversion = conversion or conversion_of(model.config())
    return {conversion.key(name): name for name in model.tensors}


def _find(name: str, rule: Rule, conversion: Conversion, files: Mapping[Key, str]) -> str | None:
    return files.get(_renamed(conversion.key(name), rule))


def _renamed(key: Key, rule: Rule) -> Key:
    strip, add = rule
    return key._replace(name=add + key.name.removeprefix(strip))


def aligned(base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Another model of the base's architecture, under the base's names.

    Its tensors are those of the base in the base's order, except for buffers that it leaves out.
    What only one of the two stores, and why that does not matter, is said on stderr.

    Raises:
        UserError: names the first tensor that one of the two has not got or has in another shape,
            or that is a float in one of them only; or one of them is quantised.
    """
    for model in (base, other):
        model.refuse_quantised()
    conversion = conversion_of(base.config() or other.config())
    wanted = by_key(base, conversion)
    others = _under_base_keys(wanted, by_key(other, conversion))
    found: dict[str, TensorInfo] = {}
    for key, name in wanted.items():
        info = _counterpart(base, other, conversion, key, others)
        if info is not None:
            _check_alike(base, other, base.tensors[name], info)
            found[name] = info
        elif not _BUFFER.search(name):
            raise UserError(f"{other.source}: has no {name}, which {base.source} has")
    _say_what_differs(base, other, found)
    tensors = {
        name: dataclasses.replace(found[name], name=name) for name in base.tensors if name in found
    }
    return dataclasses.replace(other, tensors=tensors)


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
    twin = _copied(base, by_key(base, conversion)[key])
    original = others.get(conversion.key(twin)) if twin is not None else None
    return other.tensors[original] if original is not None else None


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


def _copied(model: Checkpoint, name: str) -> str | None:
    """What a tied tensor is a second copy of in the same model, bit for bit; None if of nothing."""
    info = model.tensors[name]
    if not _TIED.search(name):
        return None
    for other in model.tensors.values():
        if (other.shape, other.dtype) != (info.shape, info.dtype) or _TIED.search(other.name):
            continue
        if all(
            _same_bits(model.read(name, *rows), model.read(other.name, *rows))
            for rows in row_blocks(info, _COMPARED_ELEMENTS)
        ):
            return other.name
    return None


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def _check_alike(
    base: Checkpoint, other: Checkpoint, wanted: TensorInfo, found: TensorInfo
) -> None:
    name = wanted.name
    if found.shape != wanted.shape:
        raise UserError(
            f"{name}: {found.shape} in {other.source}, but {wanted.shape} in {base.source}"
        )
    if found.is_float != wanted.is_float:
        raise UserError(
            f"{name}: {found.dtype} in {other.source}, but {wanted.dtype} in {base.source}; only "
            "float tensors can be subtracted"
        )


def _say_what_differs(base: Checkpoint, other: Checkpoint, found: Mapping[str, TensorInfo]) -> None:
    """Notices about what one of the models stores alone.

    Raises:
        UserError: the other model stores what the base has not got, and it is neither a buffer nor
            a second copy.
    """
    used = {info.name for info in found.values()}
    extra = [name for name in other.tensors if name not in used]
    for name in extra:
        if not _BUFFER.search(name) and _copied(other, name) is None:
            raise UserError(f"{base.source}: has no {name}, which {other.source} has")
    shared = [name for name in found if found[name].name != name and _TIED.search(name)]
    for stores, lacks, names in (
        (base, other, [name for name in shared if not _TIED.search(found[name].name)]),
        (other, base, [name for name in extra if not _BUFFER.search(name)]),
    ):
        if names:
            notice(
                f"{stores.source}: stores the tied {', '.join(names)} beside what it is a copy of; "
                f"{lacks.source} stores it once."
            )
    absent = [name for name in base.tensors if name not in found]
    for lacks, names in ((other, absent), (base, [n for n in extra if _BUFFER.search(n)])):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            notice(f"{lacks.source}: leaves out the buffer {names[0]}{more}, which is not trained.")
