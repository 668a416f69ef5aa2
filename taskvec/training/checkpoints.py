"""checkpoint-N/: what is trained after step N, and what the next step depends on beside it.

Nothing is pickled: tensors are in safetensors, the rest in JSON. A checkpoint appears under its
name only when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from taskvec.checkpoint import read_json_object
from taskvec.cli import UserError
from taskvec.output import output_directory, write_json
from taskvec.tensorfile import TensorFile
from taskvec.training.loop import Run, TrainingHistory
from taskvec.training.options import TrainingOptions

STATE_JSON, STATE_TENSORS = "training_state.json", "training_state.safetensors"
_NAME = re.compile(r"^checkpoint-(\d+)$")
# What a run that was killed while it wrote a checkpoint may leave.
_REMNANT = re.compile(r"^\.checkpoint-\d+\.(partial|replaced)$")


def settings_of(base: str, text: str, lora: Any, training: TrainingOptions) -> dict[str, Any]:
    """All that the outcome of a run depends on, as JSON gives it back.

    Args:
        base, text: hashes of the base's headers and of the tokens.
        lora: a dataclass, or None.
    """
    settings = {
        "base": base,
        "text": text,
        "lora": asdict(lora) if lora else None,
        "training": asdict(training),
    }
    content: dict[str, Any] = json.loads(json.dumps(settings))
    return content


def is_checkpoint(path: Path) -> bool:
    """True for a checkpoint of this module's, and for what a killed run left of one."""
    return (path / STATE_JSON).is_file() or _REMNANT.match(path.name) is not None


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = {path.parent: _NAME.match(path.parent.name) for path in folder.glob(f"*/{STATE_JSON}")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path])


def newest(folder: Path, settings: dict[str, Any], finished: bool) -> Path | None:
    """The checkpoint in ``folder`` that a run with these settings goes on from.

    Args:
        finished: the folder holds a finished run, so that checkpoints of other settings are its.

    Raises:
        UserError: the run that was interrupted had other settings.
    """
    for path in reversed(complete(folder)):
        theirs = read_json_object(path / STATE_JSON).get("settings")
        if theirs == settings:
            return path
        if not finished:
            raise UserError(
                f"{path}: is of a run with other settings ({_first_difference(theirs, settings)}); "
                "give the same flags to go on with it, or choose another --output_dir"
            )
    return None


def remove_older(folder: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints; none if None."""
    for path in complete(folder)[: -keep if keep else 0]:
        shutil.rmtree(path)


def carry_over(source: Path, target: Path, settings: dict[str, Any]) -> None:
    """Put the checkpoints of a run that is done beside its result; no bytes are copied."""
    for path in complete(source):
        if read_json_object(path / STATE_JSON).get("settings") == settings:
            shutil.copytree(path, target / path.name, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def save(run: Run, folder: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Write ``folder/checkpoint-N``; ``write`` puts what is trained into the directory it gets."""
    target = folder / f"checkpoint-{run.step}"
    with output_directory(target, lambda path: (path / STATE_JSON).is_file()) as directory:
        write(directory)
        state = run.optimizer.state_dict()
        tensors = {
            f"optimizer.{index}.{key}": value.cpu().contiguous()
            for index, values in state["state"].items()
            for key, value in values.items()
        }
        tensors["random.default"] = torch.get_rng_state()
        tensors["random.batches"] = run.generator.get_state()
        if run.model.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(run.model.device)
        save_file(tensors, directory / STATE_TENSORS, metadata={"format": "pt"})
        content = {
            "step": run.step,
            "settings": settings,
            "history": asdict(run.history),
            "stretch": run.stretch,
            "optimizer_groups": state["param_groups"],
            "schedule": run.schedule.state_dict(),
            "scaler": run.scaler.state_dict(),
        }
        write_json(directory / STATE_JSON, content)


def restore(run: Run, checkpoint: Path) -> None:
    """Bring a new run, on the checkpoint's model, to where the checkpoint was written.

    Raises:
        UserError: a file is damaged or of another model.
    """
    state = read_json_object(checkpoint / STATE_JSON)
    with TensorFile(checkpoint / STATE_TENSORS) as file:
        tensors = {name: file.read(info) for name, info in file.tensors.items()}
    try:
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        run.optimizer.load_state_dict({"state": moments, "param_groups": state["optimizer_groups"]})
        run.schedule.load_state_dict(state["schedule"])
        run.scaler.load_state_dict(state["scaler"])
        run.step, run.stretch = state["step"], state["stretch"]
        run.history = TrainingHistory(**state["history"])
        run.generator.set_state(tensors["random.batches"])
        torch.set_rng_state(tensors["random.default"])
        if run.model.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], run.model.device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint}: its training state is damaged ({error}); remove it to go on from the "
            "one before"
        ) from None


def _first_difference(theirs: Any, mine: dict[str, Any], prefix: str = "") -> str:
    if not isinstance(theirs, dict):
        return "unreadable"
    for key in sorted({*theirs, *mine}):
        old, new = theirs.get(key), mine.get(key)
        if old != new and isinstance(old, dict) and isinstance(new, dict):
            return _first_difference(old, new, f"{key}.")
        if old != new:
            return f"{prefix}{key}: {old}, not {new}"
    return "none"
