"""What training takes: parameters, and memory for weights, gradients and AdamW's moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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
