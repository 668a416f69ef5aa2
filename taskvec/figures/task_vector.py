"""The figures of the task vector analyses, each drawn from the document that is written as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from taskvec.figures.grid import GridPage, row_key
from taskvec.figures.style import (
    FAINT,
    HATCH,
    INK,
    LIGHT_PURPLE,
    LIGHT_RED,
    MARGIN,
    MUTED,
    ONLY_MARKER,
    PURPLE,
    RED,
    SHARED_MARKER,
    SMALL,
    UNCHANGED,
    WIDTH,
    Finding,
    Page,
    decades,
    elided,
    label_log_axis,
    scientific,
    style,
    text_width,
)
from taskvec.wording import percent

_ROW, _RANK_ROW = 0.42, 0.3  # inches per row of bars, and of dots
_MOST_RANK_ROWS = 24
_SHADES = LinearSegmentedColormap.from_list("shares", [FAINT, PURPLE])


@style()
def artifacts_by_precision(document: dict[str, Any], path: Path) -> Figure:
    """What each precision changes and what it costs, from precision_impact.json."""
    rows = document["impacts"]
    labels = [f"{row['precision']}, base as {row['base_precision']}" for row in rows]
    height = _ROW * len(rows)
    page = Page(_precision_finding(document), height + 1.15)
    left = page.axes(2.05, 0.75, 3.7, height)
    right = page.axes(6.05, 0.75, 2.0, height, sharey=left)
    _changed_bars(left, rows, labels, document["total_parameters"])
    _error_dots(right, rows)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2)
    return page.save(path)


def _precision_finding(document: dict[str, Any]) -> Finding:
    rows = document["impacts"]
    note = (
        "Left: parameters that change. Right: relative rounding error of the update, "
        f"‖T\N{NO-BREAK SPACE}−\N{NO-BREAK SPACE}Δ‖ / ‖Δ‖, where Δ is {document['reference']}; "
        "at 1 it is as large as the update."
    )
    if any(row["lost_share"] is not None for row in rows):
        note += " Lost: elements with an update that did not move."
    affected = [row for row in rows if row["artifact_parameters"]]
    if not affected:
        return Finding("No precision changes a parameter that was not trained", note)
    clean = {
        row["precision"]
        for row in rows
        if row["precision"] == row["base_precision"] and not row["artifact_parameters"]
    }
    counts = " and ".join(f"{row['artifact_parameters']} in {row['precision']}" for row in affected)
    if all(row["precision"] in clean for row in affected):
        title = f"Artifacts come from rounding the base: {counts}, none where it is rounded first"
        return Finding(title, note)
    return Finding(f"Artifacts, in which nothing was trained: {counts}", note)


def _changed_bars(axes: Axes, rows: list[dict[str, Any]], labels: list[str], total: int) -> None:
    """Changed parameters per row, real ones plain and artifacts hatched, with both counts."""
    places = range(len(rows))
    real = [row["real_parameters"] for row in rows]
    artifacts = [row["artifact_parameters"] for row in rows]
    axes.barh(places, real, 0.7, color=PURPLE, label="real")
    shown = [place for place in places if artifacts[place]]
    axes.barh(
        shown,
        [artifacts[place] for place in shown],
        0.7,
        [real[place] for place in shown],
        facecolor=LIGHT_RED,
        edgecolor=RED,
        hatch=HATCH,
        label="artifacts" if shown else None,
    )
    for place, (one, other) in enumerate(zip(real, artifacts, strict=True)):
        text = f"{one + other} = {one} + {other}" if other else str(one)
        axes.annotate(
            text,
            (one + other, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
    axes.set_yticks(places, labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, total * 1.5)
    axes.set_xticks([0, total])
    axes.set_xlabel("parameters changed")


def _error_dots(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Relative error of the update per row, with the share of elements that did not move."""
    errors = [row["relative_error"] for row in rows]
    known = [(place, error) for place, error in enumerate(errors) if error]
    limits = decades([1.0, *(error for _, error in known)])
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    label_log_axis(axes.xaxis, limits, 4)
    axes.axvline(1.0, color=MUTED, linestyle="--", linewidth=1)
    axes.grid(axis="x")
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.plot([e for _, e in known], [p for p, _ in known], "o", color=PURPLE, markersize=7)
    for place, error in enumerate(errors):
        axes.annotate(
            _cost(error, rows[place]["lost_share"]),
            (1.02, place),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=SMALL,
            annotation_clip=False,
        )
    axes.set_xlabel("relative error (log)")


def _cost(error: float | None, lost: float | None) -> str:
    if error is None:
        return "reference"
    text = "exact" if error == 0 else scientific(error)
    return text if lost is None else f"{text}, {percent(lost)} lost"


@style()
def shares(document: dict[str, Any], path: Path) -> Figure:
    """Where in the model the task vector lies, from task_vector_structure.json."""
    parameters = document["parameters"]
    most = max((entry["squared_norm_share"] for entry in parameters.values()), default=0.0)

    def paint(name: str) -> tuple[float, float, float]:
        entry = parameters[name]
        if not entry["nonzero_elements"]:
            return _rgb(UNCHANGED)
        return _rgb(_SHADES(entry["squared_norm_share"] / most if most else 0.0))

    def note(names: Sequence[str]) -> tuple[str, str]:
        share = math.fsum(parameters[name]["squared_norm_share"] for name in names)
        return _rounded_percent(share), INK if share else MUTED

    grid = GridPage(_shares_finding(document), parameters, below=0.95, row_note=note)
    grid.paint(paint, [])
    bar = grid.page.axes(grid.left, 0.5, 3.2, 0.16)
    scale = ScalarMappable(Normalize(0, 100 * most), _SHADES)
    grid.page.figure.colorbar(scale, bar, orientation="horizontal")
    bar.set_xlabel("share of ‖T‖² in one tensor (%)", size=SMALL)
    grid.page.axes(grid.left + 3.8, 0.5, 0.3, 0.16, xticks=[], yticks=[], facecolor=UNCHANGED)
    grid.page.text(grid.left + 4.2, 0.58, "did not change", size=SMALL, va="center")
    return grid.page.save(path)


def _rgb(colour: Any) -> tuple[float, float, float]:
    red, green, blue = to_rgb(colour)
    return red, green, blue


def _shares_finding(document: dict[str, Any]) -> Finding:
    summary = document["summary"]
    note = (
        "Each cell is a tensor; its shade is its share of the task vector's squared norm ‖T‖². At "
        "the right, the share of the whole row."
    )
    if not summary["nonzero_elements"]:
        return Finding("The task vector is zero everywhere", note)
    block, group = _largest(document["by_block"])
    module, part = _largest(document["by_module"])
    title = (
        f"{_rounded_percent(group['squared_norm_share'])} of the change is in "
        f"{_block_name(block)}, {_rounded_percent(part['squared_norm_share'])} in "
        f"{module.split('.', 1)[1]} alone"
    )
    return Finding(title, note)


def _rounded_percent(share: float) -> str:
    """One decimal; neither 0 of something nor 100 of something that is not whole."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.3g} %"


def _largest(groups: dict[str, Any]) -> tuple[str, Any]:
    return max(groups.items(), key=lambda item: item[1]["squared_norm_share"])


def _block_name(block: str) -> str:
    names = {
        "attention": "attention",
        "mlp": "the MLPs",
        "norm": "the norms",
        "embedding": "the embeddings",
    }
    return names.get(block, "other parts")


@style()
def ranks(document: dict[str, Any], path: Path) -> Figure:
    """Stable and effective rank of every matrix that changed, from task_vector_structure.json."""
    rows = _matrices(document["parameters"])
    labels = [key.split("*", 1)[-1].lstrip(".") for key in rows]
    if len(set(labels)) < len(labels):
        labels = list(rows)
    height = max(_RANK_ROW * len(rows), 0.5)
    page = Page(_ranks_finding(document, rows), height + 1.0)
    left = MARGIN + 0.15 + max(text_width(elided(label), SMALL) for label in labels)
    width = (WIDTH - left - MARGIN - 0.4) / 2
    stable = page.axes(left, 0.75, width, height)
    effective = page.axes(left + width + 0.3, 0.75, width, height)
    _rank_strip(stable, list(rows.values()), "stable_rank")
    _rank_strip(effective, list(rows.values()), "effective_rank")
    stable.set_xlabel(r"stable rank $\|T\|_F^2\,/\,\|T\|_2^2$ (log)", parse_math=True)
    effective.set_xlabel("effective rank (log)")
    stable.set_yticks(range(len(rows)), [elided(label) for label in labels])
    return page.save(path)


def _matrices(parameters: dict[str, Any]) -> dict[str, list[Any]]:
    """The matrices with ranks by their place within the layers; the largest rows, if too many."""
    rows: dict[str, list[Any]] = {}
    for name, entry in parameters.items():
        if entry["stable_rank"] is not None:
            rows.setdefault(row_key(name), []).append(entry)
    if len(rows) <= _MOST_RANK_ROWS:
        return rows
    heaviest = sorted(rows, key=lambda k: -sum(e["squared_norm_share"] for e in rows[k]))
    return {key: rows[key] for key in rows if key in heaviest[:_MOST_RANK_ROWS]}


def _rank_strip(axes: Axes, rows: list[list[Any]], key: str) -> None:
    """One row of dots per kind of matrix, a dot per layer, a bar at the median."""
    for place, entries in enumerate(rows):
        values = [entry[key] for entry in entries]
        axes.plot(values, [place] * len(values), "o", color=LIGHT_PURPLE, markeredgecolor=PURPLE)
        axes.plot([median(values)], [place], "|", color=PURPLE, markersize=16, markeredgewidth=2.5)
    limits = decades([entry[key] for entries in rows for entry in entries])
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    label_log_axis(axes.xaxis, limits, 7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="both")
    axes.set_yticks(range(len(rows)), [])


def _ranks_finding(document: dict[str, Any], rows: dict[str, list[Any]]) -> Finding:
    summary = document["summary"]
    full = sorted({min(entry["shape"]) for entries in rows.values() for entry in entries})
    most = f"{full[0]}" if len(full) == 1 else f"{full[0]} to {full[-1]}"
    title = (
        f"Median stable rank {summary['median_stable_rank']:.3g} and effective rank "
        f"{summary['median_effective_rank']:.3g}, of {most} possible"
    )
    note = (
        "A dot per matrix that changed, a bar at each row's median. The stable rank hardly sees "
        "small singular values; the effective rank counts them too, and with them rounding noise."
    )
    return Finding(title, note)


_REASONS = {
    "lora": ("the adapter", SHARED_MARKER, PURPLE),
    "cast": ("rounding the base", ONLY_MARKER, RED),
    "unexplained": ("unexplained", "X", INK),
    None: ("why is not known", "s", MUTED),
}


@style()
def change_norms(document: dict[str, Any], path: Path) -> Figure:
    """Size of every change by reason, largest first, from parameter_changes.json."""
    entries = document["parameters"].values()
    changed = sorted((e for e in entries if e["norm"]), key=lambda entry: -entry["rms"])
    page = Page(_changes_finding(document), 4.6)
    axes = page.axes(1.15, 0.75, WIDTH - 1.15 - MARGIN, 3.5)
    for reason, (label, marker, colour) in _REASONS.items():
        places = [at for at, entry in enumerate(changed, 1) if entry["attribution"] == reason]
        if places:
            sizes = [changed[at - 1]["rms"] for at in places]
            axes.plot(
                places,
                sizes,
                marker,
                color=colour,
                markersize=6,
                markeredgecolor="white",
                markeredgewidth=0.4,
                label=f"{label} ({len(places)})",
            )
    limits = decades([entry["rms"] for entry in changed])
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    label_log_axis(axes.yaxis, limits, 8)
    axes.set_xlim(0.5 - 0.02 * len(changed), len(changed) * 1.02 + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.set_xlabel("parameters that changed, the largest change first")
    axes.set_ylabel("root mean square of T (log)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, borderaxespad=0.2)
    return page.save(path)


def _changes_finding(document: dict[str, Any]) -> Finding:
    summary = document["summary"]
    note = (
        "Each mark is a parameter; its height is the size of its change per element, "
        "‖T‖ / √n for its n elements."
    )
    changed, total = summary["changed_parameters"], summary["total_parameters"]
    rms: dict[str | None, list[float]] = {reason: [] for reason in _REASONS}
    for entry in document["parameters"].values():
        if entry["nonzero_elements"]:
            rms[entry["attribution"]].append(entry["rms"])
    start = f"{changed} of {total} parameters changed"
    if rms[None]:
        return Finding(start, note)
    if rms["unexplained"]:
        return Finding(f"{start}, {len(rms['unexplained'])} of them without a known reason", note)
    if not rms["cast"]:
        return Finding(f"{start}, all of them by the adapter", note)
    if not rms["lora"]:
        return Finding(f"{start}, all of them by rounding the base", note)
    mixed = sum(value >= min(rms["lora"]) for value in rms["cast"])
    ending = (
        f"{mixed} of {len(rms['cast'])} artifacts are no smaller than a real change"
        if mixed
        else f"all {len(rms['cast'])} artifacts are smaller than any real change"
    )
    return Finding(f"{start}; {ending}", note)
