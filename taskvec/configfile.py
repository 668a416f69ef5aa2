"""The file of ``--config``: a YAML mapping of flags to values.

YAML can do more than such a file needs, and some of it is a trap: aliases that refer to aliases
grow without end, and a key given twice counts once. Both are refused.
"""

from __future__ import annotations

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
