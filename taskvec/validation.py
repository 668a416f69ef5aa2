"""What all the steps of a validation found, as one JSON document with one verdict."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from taskvec.behaviour import FP32_KL_LIMIT

Document = dict[str, Any]

_LIBRARIES = ("torch", "safetensors", "transformers", "peft", "numpy", "matplotlib")


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
        f"(KL {numbers['max_kl']:.2e} nats)"
        for label, entry in checked.items()
        if label in summaries and summaries[label]["certificate"]["precision"] == "fp32"
        for kind, numbers in entry.items()
        if numbers["max_kl"] > FP32_KL_LIMIT
    ]
