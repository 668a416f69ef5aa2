"""A comparison's JSON document as a text report, plain enough for a terminal and a diff."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import Any

from taskvec.architecture import natural_key
from taskvec.wording import are, number, percent, size, table

_WIDTH = 100


def comparison_report(content: dict[str, Any], *, architecture: bool) -> str:
    """detailed_comparison_report.txt: verdict first, then what it rests on."""
    summary = content["summary"]
    sections = [
        ("VERDICT", _verdict(summary)),
        ("INPUTS", _inputs(content["inputs"])),
        ("NUMBERS", _numbers(summary)),
        ("CERTIFICATE", _certificate(summary["certificate"])),
        ("WHERE THE TASK VECTOR COMES FROM", _attribution(summary)),
    ]
    if architecture:
        sections.append(("ARCHITECTURE", _architecture(content["parameters"], summary)))
    if content["figures"]:
        sections.append(("FIGURES", _figures(content["figures"])))
    sections += [
        ("ADAPTED PARAMETERS", _adapted(content["parameters"])),
        ("OTHER CHANGED PARAMETERS", _others(content["parameters"])),
        ("HOW TO READ THIS", _GLOSSARY),
    ]
    title = "LoRA ADAPTER AGAINST TASK VECTOR"
    parts = [title, "=" * _WIDTH]
    for heading, lines in sections:
        parts += ["", heading, "-" * _WIDTH, *lines]
    return "\n".join(parts) + "\n"


def validation_table(document: dict[str, Any]) -> list[str]:
    """One line per precision: what changed and why, what was kept, whether it is proved."""
    header = (
        "precision",
        "changed",
        "LoRA",
        "artifacts",
        "cosine",
        "max |T-delta|",
        "update kept",
        "same next token",
        "certificate",
    )
    rows = []
    for label, summary in document["precisions"].items():
        certificate = summary["certificate"]
        error = certificate["cost"]["relative_error"]
        kept = summary["equivalent"] and error is not None
        merged = document["behaviour"].get(label, {}).get("merged")
        rows.append(
            (
                certificate["precision"],
                f"{summary['nonzero_parameters']}/{summary['total_parameters']}",
                f"{summary['shared_parameters']}",
                f"{certificate['attribution']['cast']['parameters']}",
                number(summary["average_cosine_similarity"], ".6f"),
                number(summary["max_absolute_difference"], ".2e"),
                percent(max(0.0, 1 - error)) if kept else "-",
                "-" if merged is None else f"{100 * merged['equal_top1']:.1f} %",
                certificate["verdict"],
            )
        )
    return table(header, rows)


def validation_report(document: dict[str, Any]) -> str:
    """validation_report.txt: the verdict, the table, and each precision's findings."""
    word = "SUCCESSFUL" if document["valid"] else "FAILED"
    lines = [
        "IS THE MERGED MODEL BASE + ADAPTER, AND WHAT DID THE MERGE COST?",
        "=" * _WIDTH,
        "",
        f"VALIDATION {word}",
        *(f"  {failure}" for failure in document["failures"]),
        "",
        f"base     {document['inputs']['base_model']}",
        f"adapter  {document['inputs']['lora_path']}",
        "",
        *validation_table(document),
    ]
    for label, summary in document["precisions"].items():
        precision = summary["certificate"]["precision"]
        heading = label if label == precision else f"{label}, {precision}"
        lines += ["", heading.upper(), "-" * _WIDTH, *_verdict(summary)]
        lines += _certificate(summary["certificate"])
        lines += _attribution(summary)
    lines += ["", "BEHAVIOUR (reference: base + adapter, unmerged, in PEFT)", "-" * _WIDTH]
    lines += _behaviour(document["behaviour"])
    lines += ["", "FIGURES", "-" * _WIDTH, *_figures(document["figures"])]
    lines += ["", "HOW TO READ THIS", "-" * _WIDTH, *_GLOSSARY]
    return "\n".join(lines) + "\n"


def _figures(figures: dict[str, Any]) -> list[str]:
    """Each figure's file, what it found, and what to see in it."""
    lines = []
    for file, figure in figures.items():
        lines.append(file)
        for text in (figure["title"], figure["caption"]):
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    return lines


def _behaviour(checked: dict[str, Any]) -> list[str]:
    if "skipped" in checked:
        return [f"Skipped: {checked['skipped']}."]
    rows = [
        (
            f"{label}: {name.replace('_', ' ')}",
            f"{numbers['max_logit_difference']:.2e}",
            f"{numbers['mean_kl']:.2e}",
            f"{numbers['max_kl']:.2e}",
            f"{100 * numbers['equal_top1']:.1f} %",
            f"{numbers['positions']}",
        )
        for label, entry in checked.items()
        for name, numbers in entry.items()
    ]
    header = ("model", "max logit diff", "mean KL", "max KL", "same next token", "positions")
    return table(header, rows)


_GLOSSARY = [
    "T      the task vector, fl32(merged - base)",
    "delta  what the adapter adds, scaling * B @ A, in float64",
    "bound  how far T may be from delta if the merge was right: the sum of every rounding on the",
    "       way, element by element (LORA_VS_TASK_VECTOR_ANALYSIS.md has the proof)",
    "exact  a known recipe reproduces every bit; rounding: every element is within its bound;",
    "       violated: some are not; incomplete: parameters are missing or unexplained",
    "cast   T equals R(W) - W bit for bit: the base's own rounding to a smaller format",
    "lost   elements whose update is not zero but whose merged value is the base's own",
]


def _verdict(summary: dict[str, Any]) -> list[str]:
    certificate = summary["certificate"]
    word = "SUCCESSFUL" if summary["equivalent"] else "FAILED"
    lines = [
        f"Validation {word}. Certificate: {certificate['verdict']}.",
        f"Reason: {certificate['reason']}.",
        certificate["cost"]["sentence"],
    ]
    for cause in certificate["diagnosis"]:
        lines += [f"Diagnosis ({cause['cause']}): {cause['sentence']}"]
    return lines


def _inputs(inputs: dict[str, Any]) -> list[str]:
    base = inputs["base"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    others = [f"{key:<16} {value}" for key, value in inputs.items() if key != "base"]
    return [f"{'base':<16} {base['source']}{revision}", *others]


def _numbers(summary: dict[str, Any]) -> list[str]:
    storage = summary["storage"]
    on_disk = storage["task_vector_disk_bytes"]
    within = f"{summary['within_tolerance']}/{summary['lora_parameters']}"
    rows = [
        ("parameters in the model", f"{summary['total_parameters']}"),
        ("  changed by the task vector", f"{summary['nonzero_parameters']}"),
        ("  changed by the adapter", f"{summary['lora_parameters']}"),
        ("  by both (shared)", f"{summary['shared_parameters']}"),
        ("  by the adapter only", f"{summary['lora_only_parameters']}"),
        ("  by the task vector only", f"{summary['task_vector_only_parameters']}"),
        ("average cosine similarity", number(summary["average_cosine_similarity"], ".9f")),
        ("smallest cosine similarity", number(summary["min_cosine_similarity"], ".9f")),
        ("cosine above 0.9999", f"{summary['perfect_matches']}/{summary['shared_parameters']}"),
        ("largest |T - delta|", number(summary["max_absolute_difference"])),
        ("mean of each parameter's largest", number(summary["mean_max_difference"])),
        ("mean |T - delta| over elements", number(summary["mean_absolute_difference"])),
        ("relative error ||T - delta|| / ||delta||", number(summary["relative_error"])),
        (f"parameters within {summary['tolerance']:g}", within),
        ("adapter on disk", size(storage["adapter_bytes"])),
        ("dense fp32 task vector", size(storage["dense_task_vector_bytes"])),
        ("task vector on disk", size(on_disk) if on_disk else "none was read"),
    ]
    return [f"{name:<42} {value:>16}" for name, value in rows]


def _certificate(certificate: dict[str, Any]) -> list[str]:
    lines = [
        f"{certificate['elements_checked']:,} elements checked against their own bound "
        f"({certificate['precision']}): {certificate['violations']:,} outside, largest ratio to "
        f"the bound {certificate['max_ratio_to_bound']:.4g}."
    ]
    if worst := certificate["worst"]:
        place = "Nearest to" if certificate["max_ratio_to_bound"] <= 1 else "Farthest beyond"
        lines.append(
            f"{place} its bound: {worst['parameter']}[{worst['row']}, {worst['column']}]: "
            f"T = {worst['task_vector']:.9e}, delta = {worst['delta']:.9e}, "
            f"bound {worst['bound']:.3e}"
        )
    if certificate["non_finite_elements"]:
        lines.append(f"{are(certificate['non_finite_elements'], 'element')} NaN or infinite.")
    lines.append("Parameters that each recipe reproduces bit for bit:")
    lines += [f"  {name:<12} {count:>6}" for name, count in certificate["recipes"].items()]
    for key, what in (
        ("violated_parameters", "Out of bounds"),
        ("missing_parameters", "Not merged"),
        ("isolated_deviations", "A few elements off the recipe"),
        ("unexplained_parameters", "Changed without an explanation"),
    ):
        if certificate[key]:
            lines += [f"{what}:", *(f"  {name}" for name in certificate[key])]
    return lines


def _attribution(summary: dict[str, Any]) -> list[str]:
    rows = [
        (
            kind,
            f"{entry['parameters']}",
            f"{entry['elements']:,}",
            percent(entry["squared_norm_share"]),
        )
        for kind, entry in summary["certificate"]["attribution"].items()
    ]
    return table(("kind", "parameters", "elements", "share of ||T||^2"), rows)


def _architecture(parameters: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    total: Counter[tuple[str, str]] = Counter()
    touched: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    layers = {
        (entry["stack"], entry["layer"])
        for entry in parameters.values()
        if entry["layer"] is not None
    }
    for entry in parameters.values():
        key = (entry["block"], entry["module"])
        total[key] += 1
        elements[key] += entry["elements"]
        touched[key] += entry["lora"] is not None
    rows = [
        (
            f"{block}: {module}",
            f"{count}",
            f"{elements[block, module]:,}",
            f"{touched[block, module]}",
        )
        for (block, module), count in sorted(total.items())
    ]
    coverage = summary["lora_coverage"]
    return [
        f"{len(layers)} layers. The adapter touches {100 * coverage['tensors']:.2f} % of the "
        f"tensors and {100 * coverage['elements']:.2f} % of the elements.",
        *table(("module", "tensors", "elements", "adapted"), rows),
    ]


def _in_order(parameters: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, parameters[name]) for name in sorted(parameters, key=natural_key)]


def _adapted(parameters: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            number(lora["cosine_similarity"], ".9f"),
            number(lora["max_absolute_difference"], ".2e"),
            number(lora["relative_error"], ".2e"),
            number(lora["snr_db"], ".1f"),
            f"{100 * lora['lost_share']:.2f} %",
            f"{lora['max_ratio_to_bound']:.3f}",
            f"{lora['violations']}",
            "/".join(lora["reproduced_by"][:1]) or "-",
        )
        for name, entry in _in_order(parameters)
        if (lora := entry["lora"]) is not None
    ]
    header = (
        "parameter",
        "cosine",
        "max diff",
        "rel. err",
        "SNR dB",
        "lost",
        "ratio",
        "viol.",
        "recipe",
    )
    return table(header, rows)


def _others(parameters: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            entry["attribution"] + (f" ({entry['cast_format']})" if entry["cast_format"] else ""),
            f"{entry['nonzero_elements']:,}",
            number(entry["task_vector_norm"]),
            number(entry["task_vector_max_abs"]),
        )
        for name, entry in _in_order(parameters)
        if entry["lora"] is None and entry["nonzero_elements"]
    ]
    if not rows:
        return ["None: what the adapter does not touch is zero, bit for bit."]
    return table(("parameter", "why", "non-zero", "norm", "largest"), rows)
