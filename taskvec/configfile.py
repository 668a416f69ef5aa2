"""The file of ``--config``: a YAML mapping of flags to values.

YAML can do more than such a file needs, and some of it is a trap: aliases that refer to aliases
grow without end, and a key given twice counts once. Both are refused.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from taskvec.cli import UserError

_MOST_BYTES = 100_000  # hundreds of times what the flags of any script take
# What PyYAML lets through of a value that only looks like a date or a number.
_OF_VALUES = (ValueError, LookupError, TypeError, AttributeError)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases and without keys that appear twice."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a key appears twice", problem_mark=node.start_mark)
        return mapping


def read_flags(path: Path) -> dict[Any, object]:
    """The mapping in a file; an empty one where there is nothing.

    Raises:
        UserError: not there, not YAML, or no mapping.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    if len(raw) > _MOST_BYTES:
        raise UserError(f"{path}: over {_MOST_BYTES:,} bytes, so it is no file of flags")
    try:
        content = yaml.load(raw.decode("utf-8"), _PlainLoader)
    except (yaml.YAMLError, *_OF_VALUES, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `flag: value` lines, found {type(content).__name__}")
    return content


def as_flags(parser: argparse.ArgumentParser, path: Path, given: argparse.Namespace) -> list[str]:
    """A YAML mapping as command-line words, so that argparse checks types and choices alike.

    A flag that collects its values would join the file's with those ``given`` on the command line,
    which win: the file's are left out.

    Raises:
        UserError: as `read_flags`; or a key that is no flag, or a value that no flag takes.
    """
    flags = {
        option.lstrip("-"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config")
    }
    words: list[str] = []
    for key, value in read_flags(path).items():
        if key not in flags:
            near = difflib.get_close_matches(str(key), flags, n=1, cutoff=0.0)
            raise UserError(f"{path}: unknown key {key!r}; did you mean {near[0]!r}?")
        collects = isinstance(flags[key], argparse._ExtendAction)
        if collects and getattr(given, flags[key].dest):
            continue
        try:
            words += _as_flag(path, key, value, flags[key])
        except ValueError:  # a number of more digits than Python prints
            raise UserError(f"{path}: {key}: a number that is too long") from None
    return words


def _as_flag(path: Path, key: str, value: object, action: argparse.Action) -> list[str]:
    if value is None:
        return []
    if action.nargs == 0:  # a switch: --key, --no-key
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} is true or false, not {value!r}")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [f"--{key}" if value else f"--no-{key}"]
        return [f"--{key}"] if value else []
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [f"--{key}", *(_scalar(path, key, item) for item in value)]
    return [f"--{key}={_scalar(path, key, value)}"]


def _scalar(path: Path, key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{path}: {key} takes a single value, not {value!r}")
    return str(value)
