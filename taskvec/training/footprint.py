"""What training takes: parameters, and memory for weights, gradients and AdamW's moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from taskvec.wording import percent, size

_FP32 = 4
_MOMENTS = 2  # AdamW keeps a running mean of each gradient and of its square


@dataclass(frozen=True)
class Footprint:
    """Parameters and bytes, in fp32, without activations.

    Attributes:
        trainable, total: parameters; total counts base and adapter.
        base: parameters of the base alone: what full fine-tuning trains.
    """

    trainable: int
    total: int
    base: int

    @property
    def share(self) -> float:
        return self.trainable / self.total

    @property
    def optimizer_bytes(self) -> int:
        return _MOMENTS * _FP32 * self.trainable

    @property
    def training_bytes(self) -> int:
        """Weights, gradients of what is trained, and its moments."""
        return _FP32 * (self.total + self.trainable) + self.optimizer_bytes

    @property
    def full(self) -> Footprint:
        """The same for full fine-tuning of the base."""
        return Footprint(self.base, self.base, self.base)


def footprint(model: torch.nn.Module, *, full: bool) -> Footprint:
    """Count a model that is ready to be trained; tied weights count once.

    Args:
        full: every parameter is the base's; otherwise what is trainable was added to it.
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Footprint(trainable, total, total if full else total - trainable)


def measured_optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments that an optimiser holds after its first step."""
    states: Any = optimizer.state.values()
    return sum(
        tensor.nbytes
        for state in states
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.ndim
    )


def memory(
    footprint: Footprint, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Bytes, as `training_log.json` has them; activations count only in the peak on a GPU."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "optimizer_measured": measured_optimizer_bytes(optimizer),
        "optimizer": footprint.optimizer_bytes,
        "optimizer_full": footprint.full.optimizer_bytes,
        "training": footprint.training_bytes,
        "training_full": footprint.full.training_bytes,
        "peak_on_gpu": peak,
    }


def describe(footprint: Footprint, measured: int | None = None) -> list[str]:
    """What is trained, and what that takes beside full fine-tuning, in lines to print.

    Args:
        measured: bytes of the optimiser's moments, where there is one.
    """
    full = footprint.full
    moments = f"{size(footprint.optimizer_bytes)} (AdamW)"
    if measured is not None:
        moments = f"{size(measured)} (AdamW, measured)"
    fewer = optimizer_less = less = ""
    if footprint != full:
        fewer = f", {full.trainable / footprint.trainable:,.1f} times fewer than full fine-tuning"
        optimizer_less = _less(footprint.optimizer_bytes, full.optimizer_bytes)
        less = _less(footprint.training_bytes, full.training_bytes)
    return [
        f"Trainable parameters: {footprint.trainable:,} of {footprint.total:,} "
        f"({percent(footprint.share)}){fewer}",
        f"Optimiser memory: {moments}{optimizer_less}",
        f"Training memory: {size(footprint.training_bytes)} (weights, gradients, AdamW; without "
        f"activations){less}",
    ]


def _less(mine: int, full: int) -> str:
    return f", {full / mine:,.1f} times less than full fine-tuning's {size(full)}"
