"""The fine-tuning runs of the intruder experiment: LoRA at several ranks, and full, to one loss."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from intruder_tasks import Task
from safetensors.torch import load_file, save_file

from taskvec import cli
from taskvec.checkpoint import read_json_object
from taskvec.lora import LoraSettings, inject
from taskvec.lora_files import save_adapter
from taskvec.output import output_directory, write_json

RUN_FILE, HEAD_FILE, MODEL_DIR = "run.json", "head.safetensors", "model"
_WARM_UP, _GRADIENT_NORM = 20, 1.0


@dataclass(frozen=True)
class Run:
    """How one model is fine-tuned.

    Attributes:
        rank: of LoRA; 0 is full fine-tuning.
        alpha: LoRA's.
        learning_rate: of AdamW without weight decay, constant after 20 steps of warm-up.
        target: the held-out loss at which training ends.
        most_steps: and the number of steps at which it ends at the latest.
        check_every: how many steps lie between two looks at the held-out loss.
        seed: draws A, the batches, dropout and the task's head.
        rate: the learning rate as a multiple of the other runs' of its method.
    """

    rank: int
    alpha: int
    learning_rate: float
    target: float
    most_steps: int
    check_every: int = 10
    seed: int = 0
    rate: float = 1.0

    @property
    def label(self) -> str:
        name = f"r{self.rank}_alpha{self.alpha}" if self.rank else "full"
        return name if self.rate == 1 else f"{name}_rate{self.rate:g}"


def train_run(task: Task, run: Run, directory: Path) -> dict[str, Any]:
    """Fine-tune, and keep the adapter or model, the head and what was measured.

    A run that was finished before is not repeated.

    Returns:
        the content of run.json: the run, steps, held-out and pre-training loss.

    Raises:
        UserError: what was finished before is another run.
    """
    if (directory / RUN_FILE).is_file():
        return _finished(run, directory)
    started = time.monotonic()
    torch.manual_seed(run.seed)
    model = _prepared(task, run)
    held_out, steps = _train(task, run, model)
    with output_directory(directory, [RUN_FILE, HEAD_FILE, MODEL_DIR]) as partial:
        if run.rank:
            save_adapter(model, partial / MODEL_DIR, base_model=str(task.base))
        else:
            model.save_pretrained(partial / MODEL_DIR)
        if task.head is not None:
            save_file(dict(task.head.state_dict()), partial / HEAD_FILE)
        record = {
            **asdict(run),
            "label": run.label,
            "steps": steps,
            "held_out_loss": held_out,
            "pretraining_loss": task.pretraining(model),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(partial / RUN_FILE, record)
    cli.notice(
        f"{task.name}, seed {run.seed}, {run.label}: {steps} steps, held-out loss {held_out:.4f}, "
        f"pre-training loss {record['pretraining_loss']:.4f}, {record['seconds']} s"
    )
    return record


def _finished(run: Run, directory: Path) -> dict[str, Any]:
    record = read_json_object(directory / RUN_FILE)
    if {key: record.get(key) for key in asdict(run)} != asdict(run):
        raise cli.UserError(
            f"{directory}: holds a run with other settings; remove it or give another --output_dir"
        )
    return record


def load_head(task: Task, directory: Path) -> None:
    """The task's head becomes the one that was trained with a run."""
    if task.head is not None:
        task.head.load_state_dict(load_file(directory / HEAD_FILE))


def _prepared(task: Task, run: Run) -> Any:
    """The base, ready to be trained: with an adapter on it, or as a whole."""
    model = task.load(str(task.base))
    if task.head is not None:
        task.head.reset_parameters()
    if run.rank:
        inject(model, LoraSettings(run.rank, run.alpha, task.target_modules))
    return model


def _train(task: Task, run: Run, model: Any) -> tuple[float, int]:
    """Held-out loss at the end, and the number of steps that it took."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if task.head is not None:
        parameters += list(task.head.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(run.seed)
    model.train()
    held_out = task.held_out(model)
    for step in range(1, run.most_steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = run.learning_rate * min(1.0, step / _WARM_UP)
        optimiser.zero_grad()
        torch.autograd.backward(task.batch_loss(model, generator))
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        optimiser.step()
        if step % run.check_every == 0 or step == run.most_steps:
            held_out = task.held_out(model)
            if held_out <= run.target:
                break
    return held_out, step
