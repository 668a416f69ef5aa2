"""The training loop: AdamW on what is trainable, with everything a step depends on in one place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from taskvec import cli
from taskvec.training.options import TrainingOptions
from taskvec.training.texts import CAUSAL, Objective, consecutive_windows, draw_windows

MAX_GRADIENT_NORM = 1.0
LOGGED_POINTS = 100
HELD_OUT_CHECKS = 10
HELD_OUT_BATCH = 16
_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainingHistory:
    """What `train` saw. Losses are mean cross-entropies in nats per predicted token."""

    steps: list[int] = field(default_factory=list)  # the last step of each averaged stretch
    training_loss: list[float] = field(default_factory=list)  # mean over the stretch
    held_out_steps: list[int] = field(default_factory=list)  # 0 is before training
    held_out_loss: list[float] = field(default_factory=list)

    @property
    def loss_before(self) -> float:
        return self.held_out_loss[0]

    @property
    def loss_after(self) -> float:
        return self.held_out_loss[-1]

    @property
    def last_step(self) -> int:
        return self.held_out_steps[-1]


class Run:
    """A model in training, between two steps: all that the next step depends on.

    Attributes:
        step: how many are done.
        history: the losses so far.
        stretch: training losses that are not averaged into the history yet.
    """

    def __init__(self, model: Any, options: TrainingOptions, objective: Objective = CAUSAL) -> None:
        from transformers import get_scheduler

        self.model, self.options, self.objective = model, options, objective
        self.optimizer = make_optimizer(model, options)
        self.schedule = get_scheduler(
            options.schedule, self.optimizer, options.warmup_steps, options.steps
        )
        self.scaler = torch.amp.GradScaler(enabled=options.mixed_precision == "fp16")  # type: ignore[attr-defined]
        self.generator = torch.Generator().manual_seed(options.seed)  # of windows and masks
        self.step = 0
        self.history = TrainingHistory()
        self.stretch: list[float] = []

    @property
    def reached(self) -> bool:
        """Whether the held-out loss was brought to where it should be; True if nowhere is named."""
        target = self.options.until_loss
        return target is None or self.history.loss_after <= target

    @property
    def done(self) -> bool:
        early = self.options.until_loss is not None and self.reached
        return early or self.step >= self.options.steps

    def advance(self, tokens: torch.Tensor) -> float:
        """One optimiser step on random windows of ``tokens`` (tokens,); returns the loss.

        With accumulation, batches are weighted by the tokens that they predict, so that the
        gradient is that of all windows in one batch.
        """
        options = self.options
        windows = draw_windows(
            tokens,
            options.batch_size * options.gradient_accumulation_steps,
            options.sequence_length,
            self.generator,
        )
        batches = [
            self.objective.inputs(part, self.generator)
            for part in torch.split(windows, options.batch_size)
        ]
        predicted = [self.objective.predicted(batch) for batch in batches]
        total = 0.0
        for batch, count in zip(batches, predicted, strict=True):
            if count:  # a mean over nothing is not a number
                with autocast(self.model.device, options.mixed_precision):
                    loss = self.model(**_to(batch, self.model.device)).loss
                loss = loss * (count / sum(predicted))
                self.scaler.scale(loss).backward()
                total += loss.item()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        return total

    def measure(self, tokens: torch.Tensor) -> None:
        """Add the held-out loss to the history."""
        loss = held_out_loss(
            self.model,
            tokens,
            self.options.sequence_length,
            objective=self.objective,
            mixed_precision=self.options.mixed_precision,
        )
        self.history.held_out_steps.append(self.step)
        self.history.held_out_loss.append(loss)

    def close_stretch(self) -> None:
        """Average the training losses since the last time into the history."""
        if self.stretch:
            self.history.steps.append(self.step)
            self.history.training_loss.append(sum(self.stretch) / len(self.stretch))
            self.stretch.clear()


def train(
    run: Run,
    training_tokens: torch.Tensor,
    held_out_tokens: torch.Tensor,
    after_step: Callable[[Run], None] = lambda run: None,
) -> TrainingHistory:
    """Train ``run.model`` in place, from where the run stands to its end.

    Args:
        training_tokens, held_out_tokens: (tokens,) int64.
        after_step: called after every step, with its losses in the history.

    Raises:
        cli.UserError: the loss is no longer finite.
    """
    options = run.options
    log_every = max(1, options.steps // LOGGED_POINTS)
    check_every = options.eval_every or max(1, options.steps // HELD_OUT_CHECKS)
    if not run.history.held_out_loss:
        run.measure(held_out_tokens)
    clock = _Clock(run)
    run.model.train()
    with cli.progress(options.steps, "training", unit="step") as bar:
        bar.update(run.step)
        while not run.done:
            before = time.monotonic()
            loss = run.advance(training_tokens)
            clock.training += time.monotonic() - before
            if not math.isfinite(loss):
                raise cli.UserError(f"the loss is {loss} at step {run.step}: lower --learning_rate")
            run.stretch.append(loss)
            if run.step % check_every == 0 or run.step == options.steps:
                run.measure(held_out_tokens)
                cli.notice(f"{clock.line(loss)}, held-out loss {run.history.loss_after:.4f}")
            if run.step % log_every == 0 or run.done:
                run.close_stretch()
            bar.set_postfix_str(f"loss {loss:.3f}, {clock.tokens_per_second:,.0f} tokens/s", False)
            bar.update()
            after_step(run)
    return run.history


class _Clock:
    """How fast a run is since it was started or resumed.

    Attributes:
        training: seconds in steps alone, without measurements and checkpoints.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._first_step, self._started = run, run.step, time.monotonic()
        self.training = 0.0

    @property
    def tokens_per_second(self) -> float:
        options = self._run.options
        windows = options.batch_size * options.gradient_accumulation_steps
        tokens = (self._run.step - self._first_step) * windows * options.sequence_length
        return tokens / max(self.training, 1e-9)

    def line(self, loss: float) -> str:
        run = self._run
        per_step = (time.monotonic() - self._started) / (run.step - self._first_step)
        left = round((run.options.steps - run.step) * per_step)
        return (
            f"step {run.step}/{run.options.steps}: loss {loss:.4f}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {left // 60}:{left % 60:02d} left"
        )


def held_out_loss(
    model: Any,
    tokens: torch.Tensor,
    sequence_length: int,
    *,
    objective: Objective = CAUSAL,
    mixed_precision: str = "no",
) -> float:
    """Mean cross-entropy in nats per predicted token over consecutive windows of ``tokens``.

    What a masked language model is asked is drawn from a seed of its own: the same every time.

    Raises:
        cli.UserError: a text so short that no token of it was masked.
    """
    generator = torch.Generator().manual_seed(0)
    windows = consecutive_windows(tokens, sequence_length)
    was_training = model.training
    model.eval()
    total, predicted = 0.0, 0
    with torch.inference_mode(), autocast(model.device, mixed_precision):
        for part in torch.split(windows, HELD_OUT_BATCH):
            inputs = objective.inputs(part, generator)
            count = objective.predicted(inputs)
            if count:
                total += model(**_to(inputs, model.device)).loss.item() * count
                predicted += count
    model.train(was_training)
    if not predicted:
        raise cli.UserError("--text: no token of the held-out part was masked; give more text")
    return total / predicted


def make_optimizer(model: torch.nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW on what is trainable; biases and norms (one dimension) are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas)


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """Matmuls in bf16 or fp16; nothing changes for ``no``."""
    dtype = _DTYPES[mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _to(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
