"""What each figure found: its title and note, from the JSON document alone.

Every function takes the content of comparison_results.json
(`taskvec.reports.comparison.document`) and returns a `Finding`. Where the certificate does not
hold, the title says so and names the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from taskvec.architecture import is_index
from taskvec.compare import PERFECT_COSINE
from taskvec.figures.style import Finding, scientific
from taskvec.wording import percent

Document = dict[str, Any]

# In the order in which a layer computes them.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MOST_NAMES = 2
_MOST_MODULES = 4


def adapted(content: Document) -> dict[str, dict[str, Any]]:
    """The parameters that the adapter changes, by name."""
    return {name: entry for name, entry in content["parameters"].items() if entry["lora"]}


def only(content: Document) -> dict[str, dict[str, Any]]:
    """The parameters that changed though the adapter does not touch them, by name."""
    return {
        name: entry
        for name, entry in content["parameters"].items()
        if not entry["lora"] and entry["nonzero_elements"]
    }


def flagged(content: Document) -> list[str]:
    """The parameters because of which the certificate does not hold."""
    certificate = content["summary"]["certificate"]
    keys = (
        "missing_parameters",
        "violated_parameters",
        "isolated_deviations",
        "unexplained_parameters",
    )
    return list(dict.fromkeys(name for key in keys for name in certificate[key]))


def short_name(name: str) -> str:
    """A parameter's name as people say it.

    Example:
        short_name("model.layers.7.self_attn.q_proj.weight") -> "layer 7 q_proj"
    """
    parts = name.split(".")
    layer = next((index for index, part in enumerate(parts) if is_index(part)), None)
    tail = parts if layer is None else parts[layer + 1 :]
    if len(tail) > 1 and tail[-1] == "weight":
        tail = tail[:-1]
    kept = 2 if tail[-1:] == ["bias"] or any(is_index(part) for part in tail[-2:-1]) else 1
    last = ".".join(tail[-kept:]) or name
    return last if layer is None else f"layer {parts[layer]} {last}"


def precision_impact(contents: Mapping[str, Document]) -> Finding:
    """Why the task vector of a narrow merge has more parameters than the adapter."""
    note = (
        "Left: parameters that differ from the base after the merge, and why. "
        "Right: what is left of the update"
    )
    failed = [precision for precision, content in contents.items() if _failed(content)]
    if failed:
        first = contents[failed[0]]
        return Finding(f"{listed(failed)}: {_failure(first)}", note, failed=True)
    if not contents:
        return Finding("No precision was measured", note)
    adapter = max(content["summary"]["lora_parameters"] for content in contents.values())
    casts = {name: count for name, c in contents.items() if (count := _kind_count(c, "cast"))}
    if not casts:
        total = max(content["summary"]["total_parameters"] for content in contents.values())
        title = f"The adapter changes {adapter:,} of {total:,} parameters, and nothing else changed"
        return Finding(title, note)
    most = max(casts.values())
    changed = max(contents[name]["summary"]["nonzero_parameters"] for name in casts)
    formats = dict.fromkeys(
        entry["cast_format"]
        for name in casts
        for entry in contents[name]["parameters"].values()
        if entry["cast_format"]
    )
    up_to = "" if len(set(casts.values())) == 1 else "up to "
    title = (
        f"Why {changed:,} when the adapter has {adapter:,}? The other {up_to}{most:,} are the "
        f"base's own rounding to {listed(list(formats), 'or')}"
    )
    return Finding(title, note)


def cosine_similarity(content: Document) -> Finding:
    """Whether T points where delta points, and is as long."""
    note = "Direction (left) and length (right) of the task vector T against the adapter's delta Δ"
    summary = content["summary"]
    lowest, shared = summary["min_cosine_similarity"], summary["shared_parameters"]
    if _failed(content):
        astray = _smallest_failed_cosine(content)
        angle = f", cosine {astray:.4f}".replace("-", "−") if astray < PERFECT_COSINE else ""
        return Finding(_failure(content) + angle, note, failed=True)
    if lowest is None:
        return Finding("No parameter has both a delta and a task vector: nothing to compare", note)
    bound = "= 1" if lowest >= 1 else f"≥ {floored(lowest)}"
    every = "The one adapted parameter points"
    if shared != 1:
        every = f"All {shared:,} adapted parameters point"
    but = ""
    if summary["perfect_matches"] != shared:
        but = f", as far as {format_name(summary['certificate']['precision'])} can hold it"
    return Finding(f"{every} where the adapter says{but}: cosine {bound}", note)


def _smallest_failed_cosine(content: Document) -> float:
    chosen = adapted(content)
    failed = [chosen[name]["lora"] for name in flagged(content) if name in chosen]
    cosines = [lora["cosine_similarity"] for lora in failed]
    return min((cosine for cosine in cosines if cosine is not None), default=1.0)


def norm_distribution(content: Document) -> Finding:
    """The adapter's changes against all others."""
    note = "Size of the change, Frobenius norm ‖T‖ of each parameter's task vector"
    if _failed(content):
        return Finding(_failure(content), note, failed=True)
    shared = [e for e in adapted(content).values() if e["nonzero_elements"]]
    others = list(only(content).values())
    if not shared or not others:
        norms = [entry["task_vector_norm"] for entry in (*shared, *others)]
        ends = dict.fromkeys(scientific(end) for end in (min(norms), max(norms))) if norms else {}
        return Finding(_changed_sentence(content, f"‖T‖ {' to '.join(ends)}"), note)
    real = median(entry["task_vector_norm"] for entry in shared)
    artifact = median(entry["task_vector_norm"] for entry in others)
    title = (
        f"{len(others):,} parameters changed by rounding alone, beside the adapter's "
        f"{len(shared):,}: median ‖T‖ {scientific(artifact)} against {scientific(real)}"
    )
    return Finding(title, note)


def modification_heatmap(content: Document) -> Finding:
    """Which parameters changed, where, and by how much."""
    note = "Root mean square change of one weight; a row per kind of parameter, a column per layer"
    if _failed(content):
        return Finding(_failure(content), note, failed=True)
    return Finding(_changed_sentence(content, _where(content)), note)


def rounding_errors(contents: Mapping[str, Document]) -> Finding:
    """Whether every element is within its bound."""
    note = (
        "Distance of each merged weight from base + adapter in ulps, the spacing of its format "
        "there. Storing a weight costs up to ½ ulp; more is allowed where it is tiny beside the "
        "sums that made it"
    )
    certificates = {name: content["summary"]["certificate"] for name, content in contents.items()}
    violating = {name: c for name, c in certificates.items() if c["violations"]}
    if violating:
        return Finding(_violations(violating), note, failed=True)
    failing = [content for content in contents.values() if _failed(content)]
    if failing:
        return Finding(_failure(failing[0]), note, failed=True)
    checked = max((c["elements_checked"] for c in certificates.values()), default=0)
    if not checked:
        return Finding("The adapter changes no weight: there is no rounding to judge", note)
    ratio = max(c["max_ratio_to_bound"] for c in certificates.values())
    where = listed([format_name(name) for name in contents])
    title = (
        f"Each of the {checked:,} adapted weights is within its rounding bound in {where}: "
        f"the largest error is {ratio_text(ratio)} of it"
    )
    return Finding(title, note)


def _violations(certificates: Mapping[str, dict[str, Any]]) -> str:
    counts = [
        f"{c['violations']:,} of {c['elements_checked']:,} adapted weights in {format_name(name)}"
        for name, c in certificates.items()
    ]
    ratio = max(c["max_ratio_to_bound"] for c in certificates.values())
    strange = sum(c["non_finite_elements"] for c in certificates.values())
    text = f"Beyond the rounding bound: {listed(counts)}"
    if ratio > 1:
        text += f", by up to {scientific(ratio)} times the bound"
    return text + (f"; {strange:,} NaN or infinite" if strange else "")


def format_name(precision: str) -> str:
    """A precision in a sentence."""
    return "mixed formats" if precision == "mixed" else precision


def architecture_coverage(content: Document) -> Finding:
    """What of the model the adapter touches, and what it stores for that."""
    note = "What of the model the adapter changes; a row per kind of parameter, a column per layer"
    if _failed(content):
        return Finding(_failure(content), note, failed=True)
    coverage = content["summary"]["lora_coverage"]
    title = (
        f"The adapter touches {percent(coverage['tensors'])} of the tensors, "
        f"{percent(coverage['elements'])} of the elements, and stores "
        f"{percent(stored_share(content))} of the bytes"
    )
    return Finding(title, note)


def stored_share(content: Document) -> float:
    """Bytes of the adapter relative to a dense task vector's."""
    storage = content["summary"]["storage"]
    dense = storage["dense_task_vector_bytes"]
    return float(storage["adapter_bytes"] / dense) if dense else 0.0


def kept(relative_error: float | None) -> str:
    """What a merge keeps of the update: 100 % less the relative error."""
    return "n/a" if relative_error is None else percent(max(0.0, 1 - relative_error))


def floored(cosine: float) -> str:
    """A cosine below 1 rounded down, at the first digit that is not a nine."""
    if cosine < 0.9:
        return f"{math.floor(cosine * 100) / 100:.2f}"
    digits = min(12, -math.floor(math.log10(1 - cosine)))  # float64 sums give no more
    return f"{math.floor(cosine * 10**digits) / 10**digits:.{digits}f}"


def ratio_text(ratio: float) -> str:
    """An error relative to its bound as a percentage, rounded down: what holds is never 100 %."""
    return f"{math.floor(ratio * 1e4) / 100:.2f} %"


def listed(names: Sequence[str], word: str = "and") -> str:
    """Words in a sentence: a, b and c."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


def _failed(content: Document) -> bool:
    return not content["summary"]["equivalent"]


def _failure(content: Document) -> str:
    """Why the certificate does not hold, with the first parameters by name."""
    summary = content["summary"]
    certificate, total = summary["certificate"], summary["lora_parameters"]
    wrong = [*certificate["violated_parameters"], *certificate["isolated_deviations"]]
    missing, unexplained = certificate["missing_parameters"], certificate["unexplained_parameters"]
    parts = []
    if missing:
        parts.append(
            f"{len(missing):,} of {total:,} adapted parameters did not change{_some(missing)}"
        )
    if wrong:
        verb = "differs" if len(wrong) == 1 else "differ"
        parts.append(
            f"{len(wrong):,} of {total:,} adapted parameters {verb} from the adapter by more than "
            f"rounding{_some(wrong)}"
        )
    if unexplained:
        noun = "parameter" if len(unexplained) == 1 else "parameters"
        parts.append(
            f"{len(unexplained):,} {noun} changed that neither the adapter nor rounding explains"
            f"{_some(unexplained)}"
        )
    text = "; ".join(parts) or certificate["reason"]
    return text[:1].upper() + text[1:]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(short_name(name) for name in names[:_MOST_NAMES])
    return f" ({shown}{', …' if len(names) > _MOST_NAMES else ''})"


def _changed_sentence(content: Document, where: str = "") -> str:
    """How many parameters changed, and why."""
    summary = content["summary"]
    total, changed = summary["total_parameters"], summary["nonzero_parameters"]
    casts, shared = _kind_count(content, "cast"), summary["shared_parameters"]
    if not changed:
        return f"None of the {total:,} parameters changed"
    every = f"All {total:,}" if changed == total else f"{changed:,} of {total:,}"
    inside = f" ({where})" if where else ""
    if total == 1:
        reason = "by rounding alone" if casts else f"by the adapter{inside}"
        return f"The one parameter changed, {reason}"
    if casts:
        return (
            f"{every} parameters changed: {shared:,} by the adapter{inside}, "
            f"{casts:,} by rounding alone"
        )
    rest = "" if changed == total else "; the rest is bit for bit the base's"
    return f"{every} parameters changed, all by the adapter{inside}{rest}"


def _where(content: Document) -> str:
    """The modules that the adapter changes, and in how many of the model's layers."""
    entries = list(adapted(content).values())
    found = {entry["module"] for entry in entries}
    modules = [name for name in PROJECTIONS if name in found]
    modules += sorted(found - set(modules))
    layers, every = layers_of(entries), layers_of(content["parameters"].values())
    if not entries:
        return ""
    what = listed(modules) if len(modules) <= _MOST_MODULES else f"{len(modules)} kinds of module"
    if not layers:
        return what
    if len(every) == 1:
        return what
    whole = f"all {len(every)}" if layers == every else f"{len(layers)} of {len(every)}"
    return f"{what} in {whole} layers"


def layers_of(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The layers that some parameters lie in: stack by stack, each layer with its stack's name."""
    found = {(e["stack"], e["layer"]): None for e in entries if e["layer"] is not None}
    order = list(dict.fromkeys(stack for stack, _ in found))
    return sorted(found, key=lambda layer: (order.index(layer[0]), layer[1]))


def _kind_count(content: Document, kind: str) -> int:
    return int(content["summary"]["certificate"]["attribution"][kind]["parameters"])
