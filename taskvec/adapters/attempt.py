"""A merge that is tried without being written: whether it would stop, and at what."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from taskvec.adapter import open_adapter
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.tensorfile import row_blocks
from taskvec.update import Update
from taskvec.updates.products import LowRank

_BLOCK_ELEMENTS = 1 << 20
_FP32_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Attempt:
    """What came of a merge: why it would stop, and the parameters that it would change."""

    reason: str | None
    parameters: list[str]


def try_merge(source: str, base: Checkpoint) -> Attempt:
    """Go through the merge's own checks, and see whether a delta overflows fp32."""
    parameters: list[str] = []
    try:
        with open_adapter(source, base) as adapter:
            parameters = adapter.parameters
            for name in parameters:
                update = adapter.update(name, torch.device("cpu"))
                if _overflows(update, base.tensors[name]):
                    reason = f"{name}: its delta overflows fp32; check lora_alpha and the factors"
                    return Attempt(reason, parameters)
    except UserError as error:
        return Attempt(str(error), parameters)
    return Attempt(None, parameters)


def _overflows(update: Update, info: TensorInfo) -> bool:
    """True if the delta has values beyond fp32; computed only where a bound cannot exclude it."""
    if not info.elements:
        return False
    if not isinstance(update, LowRank):
        return not _finite_delta(update, info)
    rows = float(torch.linalg.vector_norm(update.B.double(), dim=1).max())
    columns = float(torch.linalg.vector_norm(update.A.double(), dim=0).max())
    scaling = abs(update.scaling)
    if rows * columns * max(1.0, scaling) < _FP32_LARGEST / 2 and scaling < _FP32_LARGEST:
        return False
    return not _finite_delta(update, info)


def _finite_delta(update: Update, info: TensorInfo) -> bool:
    return all(
        bool(torch.isfinite(update.delta(start, stop)).all())
        for start, stop in row_blocks(info, _BLOCK_ELEMENTS)
    )
