"""Which modules an adapter_config.json selects, as PEFT reads it.

Coverage is what the tensors say; this tells where the tensors and the configuration disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from taskvec.adapters.patterns import Matcher

_FIRST_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."


class TargetRule:
    """The selection that ``target_modules`` and its companions make.

    Follows PEFT's ``check_target_module_exists``: a list names modules by their full name or its
    end, narrowed by ``layers_to_transform`` and ``layers_pattern``; a string is a regular
    expression; ``exclude_modules`` takes modules out.

    Args:
        values: the configuration.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._matcher = Matcher()
        self._targets = values.get("target_modules")
        self._excluded = values.get("exclude_modules")
        self._layers = _as_list(values.get("layers_to_transform"), int)
        self._patterns = _as_list(values.get("layers_pattern"), str)

    @property
    def names(self) -> list[str]:
        """The entries of a list; none where ``target_modules`` is an expression."""
        return _as_list(self._targets, str) if isinstance(self._targets, list) else []

    @property
    def expression(self) -> str | None:
        """The regular expression, where ``target_modules`` is one."""
        if isinstance(self._targets, str) and self._targets.lower() != "all-linear":
            return self._targets
        return None

    @property
    def is_known(self) -> bool:
        """False where the configuration does not say by name: nothing can be held against it."""
        return bool(self.names) or self.expression is not None

    def selects(self, module: str) -> bool:
        """True if PEFT would put an adapter on a module of this name."""
        if self._excludes(module):
            return False
        if self.expression is not None:
            return self._fullmatch(self.expression, module)
        if module in self.names:
            return True
        ends = any(module.endswith(f".{name}") for name in self.names)
        return ends and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if not self._layers:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in self._patterns]
        for pattern in patterns or [_FIRST_LAYER]:
            try:
                match = self._matcher.match(pattern, module)
            except re.error:
                match = None
            if match:
                return int(match["index"]) in self._layers
        return False

    def _excludes(self, module: str) -> bool:
        if isinstance(self._excluded, str):
            return self._fullmatch(self._excluded, module)
        if not isinstance(self._excluded, list):
            return False
        return any(module == entry or module.endswith(f".{entry}") for entry in self._excluded)

    def _fullmatch(self, expression: str, module: str) -> bool:
        try:
            return self._matcher.match(expression, module, whole=True) is not None
        except re.error:
            return False


_Entry = TypeVar("_Entry", int, str)


def _as_list(value: object, kind: type[_Entry]) -> list[_Entry]:
    """One entry or a list of them as a list; what is of another kind is left out."""
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, kind)]
