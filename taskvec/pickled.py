"""What a pickle of tensors by name is made of; whatever holds more is not unpickled.

torch's restricted unpickler calls nothing that does harm, but a few bytes can keep it busy without
end, or break the interpreter: a tuple of twice the same tuple, forty times over, has 2^40 items for
the dictionary that takes it as a key, and one nested a million deep overflows the stack. So the
pickle's opcodes are followed here, on a stack of kinds instead of objects, and held to what
torch.save writes: keys are names, a tuple holds others only as a tensor's arguments hold its shape,
only names, globals and tensors are referred to twice, and only globals are called.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Sequence
from typing import IO

# What it may refer to, as "module name".
_TENSOR_GLOBALS = re.compile(
    r"collections OrderedDict|torch(\.storage)? \w*Storage|torch\._utils _rebuild_parameter\w*"
    r"|torch\._utils _rebuild_tensor(_v2|_v3)?|torch (float|bfloat|u?int|bool|complex)\w*"
)
_LONGEST_NAME = 10_000  # characters, of a name that is referred to again: a tuple may hold many

# Kinds of objects. FLAT is a tuple without tuples in it, NESTED one of such tuples.
_MARK, _PLAIN, _NAME, _GLOBAL, _MAPPING, _TENSOR = (
    "mark",
    "plain",
    "name",
    "global",
    "map",
    "tensor",
)
_CONTAINER, _FLAT, _NESTED = "container", "flat", "nested"

_PUSHED = {
    **dict.fromkeys(("NONE", "NEWFALSE", "NEWTRUE", "BINFLOAT"), _PLAIN),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _PLAIN),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _NAME),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT"), _CONTAINER),
    "EMPTY_TUPLE": _FLAT,
    "MARK": _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MORE = "holds more than tensors"


class Foreign(Exception):
    """Says what a pickle holds or does that one of tensors by name does not."""


def check(file: IO[bytes]) -> None:
    """Follow the pickle at the file's position, up to its end.

    Raises:
        Foreign: it is more than tensors by name.
        ValueError: it is damaged.
    """
    stack: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            _follow(opcode.name, argument, stack, memo)
    except LookupError:
        raise ValueError("a pickle that takes what is not there") from None


def _follow(opcode: str, argument: object, stack: list[str], memo: dict[int, str]) -> None:
    """What an opcode does to the stack and the memo of an unpickler."""
    if opcode in _PUSHED:
        kind = _PUSHED[opcode]
        long = kind is _NAME and len(str(argument)) > _LONGEST_NAME
        stack.append(_PLAIN if long else kind)
    elif opcode == "GLOBAL":
        stack.append(_global(str(argument)))
    elif opcode in ("BINPUT", "LONG_BINPUT"):
        memo[int(str(argument))] = stack[-1]
    elif opcode in ("BINGET", "LONG_BINGET"):
        stack.append(_again(memo[int(str(argument))]))
    elif opcode == "TUPLE":
        stack.append(_tuple_of(_to_mark(stack)))
    elif opcode in _TUPLES:
        stack.append(_tuple_of([stack.pop() for _ in range(_TUPLES[opcode])]))
    elif opcode == "APPEND":
        stack.pop()
    elif opcode == "APPENDS":
        _to_mark(stack)
    elif opcode == "SETITEM":
        stack.pop()
        _check_keys([stack.pop()])
    elif opcode == "SETITEMS":
        _check_keys(_to_mark(stack)[::2])
    elif opcode == "BINPERSID":
        stack[-1] = _TENSOR
    elif opcode == "REDUCE":
        stack.pop()
        stack.append(_called(stack.pop()))
    elif opcode == "BUILD":
        stack.pop()
    elif opcode not in ("PROTO", "STOP"):
        raise Foreign(_MORE)


def _global(name: str) -> str:
    if not _TENSOR_GLOBALS.fullmatch(name):
        raise Foreign(f"wants to call {name.replace(' ', '.')}")
    return _MAPPING if name.endswith("OrderedDict") else _GLOBAL


def _again(kind: str) -> str:
    if kind not in (_NAME, _GLOBAL, _MAPPING, _TENSOR):
        raise Foreign(f"{_MORE}: it refers twice to something else")
    return kind


def _tuple_of(items: Sequence[str]) -> str:
    if _MARK in items:
        raise ValueError("a pickle with a mark inside a tuple")
    if _NESTED in items:
        raise Foreign(f"{_MORE}: its tuples are nested more deeply than theirs")
    return _NESTED if _FLAT in items else _FLAT


def _to_mark(stack: list[str]) -> list[str]:
    """What lies above the last mark, which are taken from the stack."""
    items = []
    while (kind := stack.pop()) is not _MARK:
        items.append(kind)
    return items[::-1]


def _check_keys(kinds: Sequence[str]) -> None:
    if any(kind is not _NAME for kind in kinds):
        raise Foreign(f"{_MORE}: a key in it is no name")


def _called(kind: str) -> str:
    """What calling an object gives."""
    if kind not in (_GLOBAL, _MAPPING):
        raise Foreign(f"{_MORE}: it calls what is no function")
    return _CONTAINER if kind is _MAPPING else _TENSOR
