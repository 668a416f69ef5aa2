"""What a module is called in memory, and what its parameter is called in the base's file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from taskvec.checkpoint import Checkpoint


def renaming(modules: list[str], base: Checkpoint) -> Callable[[str], str]:
    """The naming rule that fits every module, as a function; the plain one if none does."""
    for strip, add in naming_rules(modules, base):
        if all(f"{add}{module.removeprefix(strip)}.weight" in base.tensors for module in modules):
            return lambda name: add + name.removeprefix(strip)
    return lambda name: name


def naming_rules(modules: Iterable[str], base: Checkpoint) -> list[tuple[str, str]]:
    """From names in memory to names in the file: leading part to take off, and to put on.

    A base saved from its backbone names ``h.0.attn`` what an adapter trained with a head calls
    ``transformer.h.0.attn``; the reverse happens too. One rule must fit every module.
    """
    heads = {module.split(".", 1)[0] + "." for module in modules}
    strips = heads if len(heads) == 1 else set()
    adds = sorted({name.split(".", 1)[0] + "." for name in base.tensors})
    return [("", ""), *((head, "") for head in strips), *(("", head) for head in adds)]
