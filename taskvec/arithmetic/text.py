"""What `analyze_task_vectors.py` prints, made from the documents that it writes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from taskvec.architecture import fold_alike, fold_names, place, template
from taskvec.lowrank.convert import ARTIFACT, BELOW_FLOOR, BIAS, LEFT_OUT, LORA, SAVED, UNCHANGED
from taskvec.wording import number, percent, size, table

Document = dict[str, Any]

_NEAR_NOISE = 3  # times the noise's largest singular value
_LOW_RANK = 0.5  # of a matrix's elements; factors with more are hardly worth having


def overview_lines(content: Document) -> list[str]:
    """The totals of every task vector, and their cosines."""
    header = ("", "task vector", "tensors changed", "zero", "norm", "largest", "stable rank")
    rows = [
        (
            str(place),
            entry["name"],
            f"{entry['summary']['nonzero_tensors']}/{entry['summary']['tensors']}",
            percent(entry["summary"]["sparsity"]),
            f"{entry['summary']['norm']:.4g}",
            f"{entry['summary']['max_abs']:.3g}",
            number(entry["summary"]["median_stable_rank"], ".2f"),
        )
        for place, entry in enumerate(content["task_vectors"], 1)
    ]
    lines = table(header, rows)
    overall = content["cosines"]["overall"]
    if len(overall) > 1:
        lines += ["", *_cosine_table(overall)]
    return lines


def layer_lines(content: Document) -> list[str]:
    """Every task vector layer by layer, and the cosines of every pair layer by layer."""
    lines: list[str] = []
    for entry in content["task_vectors"]:
        header = (
            f"layer of {entry['name']}",
            "tensors changed",
            "zero",
            "norm",
            "share of ‖T‖²",
            "median stable rank",
            "median effective rank",
        )
        rows = [
            (
                layer,
                f"{group['nonzero_tensors']}/{group['tensors']}",
                percent(group["sparsity"]),
                f"{group['norm']:.4g}",
                percent(group["squared_norm_share"]),
                number(group["median_stable_rank"], ".2f"),
                number(group["median_effective_rank"], ".2f"),
            )
            for layer, group in entry["by_layer"].items()
        ]
        lines += ["", *table(header, rows)]
    by_layer = content["cosines"]["by_layer"]
    count = len(content["task_vectors"])
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if pairs:
        lines += [
            "",
            *table(
                ("layer", *(f"cos({i + 1}, {j + 1})" for i, j in pairs)),
                [
                    (layer, *(number(matrix[i][j], ".4f") for i, j in pairs))
                    for layer, matrix in by_layer.items()
                ],
            ),
        ]
    return lines


def _cosine_table(matrix: list[list[float | None]]) -> list[str]:
    rows = [
        (str(place), *(number(value, ".4f") for value in row))
        for place, row in enumerate(matrix, 1)
    ]
    return table(("cosine", *(str(place) for place in range(1, len(matrix) + 1))), rows)


def round_trip_lines(round_trip: Document) -> list[str]:
    """What of the merged model scale 1 brings back, and why the rest cannot come."""
    elements, may = round_trip["elements"], round_trip["may_differ"]
    differing, unexplained = round_trip["differing"], round_trip["unexplained"]
    if differing is None:
        if not may:
            return [
                "At scale 1 every element of the fine-tuned model comes back exactly: the task "
                "vector had room for the difference."
            ]
        return [
            f"At scale 1, {elements - may:,} of {elements:,} elements are certain to come back "
            f"exactly. The other {may:,} are so much smaller than their change that the task "
            "vector may have had no room for their last digits; --finetuned_model counts those "
            "that differ."
        ]
    if not differing:
        return [
            f"Scale 1 gives the fine-tuned model back, bit for bit: {elements:,} elements of the "
            "tensors that change, and all others."
        ]
    lines = [f"Scale 1 gives {elements - differing:,} of {elements:,} elements back; the rest:"]
    if explained := differing - unexplained:
        lines.append(
            f"{explained:,} differ because the task vector was rounded: they are so much smaller "
            "than their change that fp32 had no room for their last digits."
        )
    if unexplained:
        lines.append(
            f"⚠️ {unexplained:,} differ although there was room: this task vector is not the "
            "difference of these two models."
        )
    return lines


def lora_lines(content: Document) -> list[str]:
    """What became of the parameters, and how good the factors are."""
    summary = content["summary"]
    counts = summary["parameters"]
    entries = content["parameters"]
    ranks = ", ".join(f"{rank} ({count} of them)" for rank, count in summary["ranks"].items())
    lines = [
        f"{counts[LORA]} of {len(entries)} parameters as low-rank factors, "
        f"{size(summary['adapter_bytes'])}; rank {ranks}.",
        f"‖T - BA‖ / ‖T‖: {summary['relative_error']:.3g} of all of them together, "
        f"{summary['largest_relative_error']:.3g} at most.",
    ]
    if truth := summary["truth"]:
        lines.append(
            f"The rank is that of the adapter which was merged in {truth['true_ranks']} of "
            f"{truth['parameters']} parameters; its delta is recovered to "
            f"{truth['recovered_error']:.3g}, where the task vector is off by "
            f"{truth['task_vector_error']:.3g}."
        )
    if near := sum(_is_near_noise(entry) for entry in entries.values()):
        lines.append(
            f"In {near} of them the weakest singular value that was kept is less than "
            f"{_NEAR_NOISE} times the noise: there may be more of the change below it."
        )
    share = summary["factor_elements"] / summary["matrix_elements"]
    if share > _LOW_RANK:
        lines.append(
            f"⚠️ The factors are {percent(share)} of the size of the matrices: this change is not "
            "of low rank; --max_rank bounds it."
        )
    told = (
        (BIAS, "{} biases with their new values."),
        (SAVED, "{} norms and the like with their new values (modules_to_save)."),
        (UNCHANGED, "{} unchanged."),
        (ARTIFACT, "{} left out: nothing but the base's own rounding, bit for bit."),
        (BELOW_FLOOR, "{} left out: nothing stands above the rounding noise."),
        (LEFT_OUT, "⚠️ {} left out:"),
    )
    for treatment, words in told:
        if counts.get(treatment):
            lines.append(words.format(counts[treatment]))
    for reason, names in _reasons(entries):
        lines.append(f"   {', '.join(names)}: {reason}.")
    if summary["lost_share"]:
        lines.append(f"What was left out holds {percent(summary['lost_share'])} of ‖T‖².")
    return lines


def _reasons(entries: Document) -> Iterable[tuple[str, list[str]]]:
    """Why parameters were left out or judged noise: each reason with its parameters, folded."""
    found: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry["treatment"] == LEFT_OUT:
            found.setdefault(entry["reason"], []).append(name)
        elif entry["treatment"] == BELOW_FLOOR:
            found.setdefault("the change is no larger than rounding makes it", []).append(name)
    return [(reason, fold_names(names)) for reason, names in found.items()]


def factor_lines(content: Document) -> list[str]:
    """The factors by kind of module."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    entries = content["parameters"]
    for name, entry in entries.items():
        if entry["treatment"] in (LORA, BELOW_FLOOR):
            groups.setdefault(template(name), []).append(name)
    header = ("matrix", "rank", "weakest / noise", "next / noise", "error", "optimum")
    rows = []
    for names in groups.values():
        members = [entries[name] for name in names]
        rows.append(
            (
                fold_alike(names),
                _range([entry["rank"] for entry in members]),
                number(_least(_over_noise(entry, "weakest_kept") for entry in members), ".3g"),
                number(_most(_over_noise(entry, "strongest_left") for entry in members), ".3g"),
                number(_most(entry["relative_error"] for entry in members), ".3g"),
                number(_most(entry["optimal_relative_error"] for entry in members), ".3g"),
            )
        )
    return table(header, rows)


def _is_near_noise(entry: Document) -> bool:
    if entry["treatment"] != LORA or entry["rank"] < entry["rank_above_noise"]:
        return False
    return (_over_noise(entry, "weakest_kept") or math.inf) < _NEAR_NOISE


def _over_noise(entry: Document, key: str) -> float | None:
    value, noise = entry[key], entry["noise"]
    return value / noise if value is not None and noise else None


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def lora_notices(content: Document) -> list[str]:
    """What a user of the adapter should know before it surprises them."""
    notices = []
    if not content["modules_known"]:
        notices.append(
            "Modules were judged by the names of their parameters; with --base_model and its "
            "config.json they are known (GPT-2's Conv1D needs that)."
        )
    embeddings = [
        name
        for name, entry in content["parameters"].items()
        if entry["treatment"] == "lora" and place(name).block == "embedding"
    ]
    if embeddings and content["tied_embedding"]:
        notices.append(
            f"{embeddings[0]} is also the head's weight: PEFT gives the head its change only once "
            "the adapter is merged."
        )
    return notices
