"""How a model is trained, and by what software. Needs no torch, so that --help stays fast."""

from __future__ import annotations

import platform
from dataclasses import dataclass

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
PRECISIONS = ("no", "bf16", "fp16")
METHODS, BACKENDS = ("lora", "full"), ("scratch", "peft")
# Where nothing else is asked for. A whole model takes smaller steps than an adapter.
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class LoraOptions:
    """The adapter that is asked for.

    Attributes:
        target_modules: names, ``all-linear``, or None for the attention's projections.
    """

    rank: int = 8
    alpha: int = 8
    dropout: float = 0.0
    rslora: bool = False
    target_modules: tuple[str, ...] | None = None
    backend: str = "scratch"


@dataclass(frozen=True)
class TrainingOptions:
    """AdamW with linear warm-up and, unless told otherwise, cosine decay to zero.

    Attributes:
        steps: optimiser steps, at most.
        batch_size: windows that pass through the model at once.
        gradient_accumulation_steps: how many such batches make one step.
        schedule: transformers' name for what the learning rate does after the warm-up.
        eval_every: steps between two measurements of the held-out loss; a tenth of all if None.
        until_loss: stop as soon as a measured held-out loss is not above this.
        mixed_precision: bf16 or fp16: matmuls in that format, weights and AdamW in fp32.
    """

    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    gradient_accumulation_steps: int = 1
    schedule: str = "cosine"
    eval_every: int | None = None
    until_loss: float | None = None
    mixed_precision: str = "no"


def versions(*packages: str) -> dict[str, str | int]:
    """What the numbers of a run may depend on."""
    from importlib.metadata import version

    import torch

    numbers = {package: version(package).split("+")[0] for package in packages}
    return {"python": platform.python_version(), **numbers, "threads": torch.get_num_threads()}
