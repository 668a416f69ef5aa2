"""A cause as it is reported, and parameters in words."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any

from taskvec.architecture import fold_names
from taskvec.diagnosis.findings import Findings


@dataclass(frozen=True)
class Cause:
    """One likely cause.

    Attributes:
        cause: its name, stable for programs.
        sentence: the same for people, with the numbers.
        evidence: the numbers.
        weight: how many failing parameters it explains.
    """

    cause: str
    sentence: str
    evidence: dict[str, Any]
    weight: int

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "weight"}


def named(names: Sequence[str]) -> str:
    """Parameters in words: names that differ in their layer only are folded into one."""
    folded = fold_names(names)
    shown = ", ".join(folded[:3])
    return shown if len(folded) <= 3 else f"{len(names)} parameters ({shown}, ...)"


def whole(names: Sequence[str], findings: Findings) -> str:
    """The same, where they may be all that the adapter changes."""
    if set(names) == set(findings.adapted):
        return f"all {len(names)} adapted parameters" if len(names) > 1 else names[0]
    return named(names)


def counted(things: Sized, what: str = "parameter") -> str:
    """How many, with the noun in its number."""
    return f"{len(things):,} {what}{'' if len(things) == 1 else 's'}"
