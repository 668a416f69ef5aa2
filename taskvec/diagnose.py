"""Why a certificate does not hold: what most likely happened, from tests on the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from taskvec.adapter import Adapter
from taskvec.checkpoint import Checkpoint
from taskvec.compare import ParameterResult
from taskvec.taskvector import TaskVector


@dataclass(frozen=True)
class Cause:
    """One likely cause.

    Attributes:
        cause: its name, stable for programs.
        sentence: the same for people, with the numbers.
        evidence: the numbers.
    """

    cause: str
    sentence: str
    evidence: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(
    base: Checkpoint,
    adapter: Adapter,
    vector: TaskVector,
    results: Sequence[ParameterResult],
    device: torch.device,
) -> list[Cause]:
    return []
