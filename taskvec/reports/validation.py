"""A validation of all steps: whether its inputs will do, and what was found as one document."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from taskvec.adapter import Adapter, open_adapter
from taskvec.behaviour import FP32_KL_LIMIT
from taskvec.checkpoint import Checkpoint, file_sha256, open_checkpoint
from taskvec.cli import UserError, adapters
from taskvec.output import refuse_on_input
from taskvec.rounding import FORMATS, Format, loses

Document = dict[str, Any]

_LIBRARIES = ("torch", "safetensors", "transformers", "peft", "numpy", "matplotlib")


def check_inputs(
    base_model: str,
    lora_path: str | Sequence[str],
    revision: str | None,
    target: Path,
    precisions: Sequence[str],
) -> None:
    """Refuse before the first byte if the two do not fit together, or the outputs on the disk.

    Raises:
        UserError: names what does not fit, or what is needed and what is free; the outputs would
            go on, into or around an input.
    """
    with open_checkpoint(base_model, revision) as base, open_adapter(lora_path, base) as adapter:
        refuse_on_input(target, [*base.paths, *adapter.paths])
        needed = sum(output_bytes(base, adapter, FORMATS[name]) for name in precisions)
    parent = next(path for path in [target.resolve(), *target.resolve().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{target}: the outputs may take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "choose another --output_dir or fewer --precisions"
        )


def output_bytes(base: Checkpoint, adapter: Adapter, format: Format) -> int:
    """What a merged model, its task vector (zeros take no disk) and the adapter's deltas take."""
    total = 0
    for name, info in base.tensors.items():
        changed = name in adapter.scalings
        itemsize = format.dtype.itemsize if info.is_float else info.dtype.itemsize
        itemsize += 4 * (changed + (changed or (info.is_float and loses(info.dtype, format))))
        total += itemsize * info.elements
    return total


def inputs_of(base_model: str, lora_path: str | Sequence[str], revision: str | None) -> Document:
    """What was validated, and what tells its files from others of the same name."""
    with open_checkpoint(base_model, revision) as base, open_adapter(lora_path, base) as adapter:
        several = len(adapter.paths) > 1
        return {
            "base_model": base_model,
            "lora_path": adapters(lora_path),
            "base": base.identity(),
            "adapter": {
                f"{path.parent.name}/{path.name}" if several else path.name: {
                    "bytes": path.stat().st_size,
                    "sha256": file_sha256(path),
                }
                for path in adapter.files
            },
        }


def document(
    comparisons: Mapping[str, Document],
    behaviour: Document,
    *,
    inputs: Document,
    figures: Document,
    files: Mapping[str, str],
) -> Document:
    """validation_summary.json, from which the text report and the HTML page are rendered.

    Args:
        comparisons: comparison_results.json by label: what was merged, or "given".
        behaviour: agreements by label and kind of model, or {"skipped": why}.
        inputs: what was validated: paths, and identities of their files.
        figures: title, note, caption and label by path, relative to the document.
        files: what each output is, by its path relative to the document.
    """
    summaries = {label: content["summary"] for label, content in comparisons.items()}
    failures = [
        f"{label}: {summary['certificate']['reason']}"
        for label, summary in summaries.items()
        if not summary["equivalent"]
    ]
    failures += _behaviour_failures(summaries, behaviour)
    return {
        "valid": not failures,
        "failures": failures,
        "inputs": inputs,
        "precisions": summaries,
        "behaviour": behaviour,
        "figures": figures,
        "files": dict(files),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Python, and the libraries whose arithmetic and file formats the result rests on."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        found[library] = metadata.version(library)
    return found


def _behaviour_failures(summaries: Mapping[str, Document], checked: Document) -> list[str]:
    """In fp32 nothing but rounding may separate the three models; narrower ones only cost."""
    return [
        f"{label}: the {kind.replace('_', ' ')} model does not behave like base + adapter "
        f"({_distance(numbers['max_kl'])})"
        for label, entry in checked.items()
        if label in summaries and summaries[label]["certificate"]["precision"] == "fp32"
        for kind, numbers in entry.items()
        if numbers["max_kl"] > FP32_KL_LIMIT
    ]


def _distance(kl: float) -> str:
    """KL in words; what is not finite comes as float64's largest (`behaviour.agreement`)."""
    return f"KL {kl:.2e} nats" if kl < sys.float_info.max else "its logits are not all finite"
