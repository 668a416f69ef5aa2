"""The figures of the mathematical analysis that are about matrices: spectra, subspaces, norms.

Drawn from mathematical_analysis.json alone, a panel per module. Purple is the adapter's delta,
circles are the task vector, red is their difference and blue the floor that the format allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from taskvec.figures.style import (
    BLUE,
    LIGHT_PURPLE,
    MARGIN,
    PURPLE,
    RED,
    SMALL,
    TEXT,
    WIDTH,
    Finding,
    Page,
    decades,
    fitted,
    label_log_axis,
    scientific,
    share,
    style,
    tick_step,
)
from taskvec.mathematics.document import LOST, RANDOM

Document = dict[str, Any]

MOST_PANELS, _MOST_HEATMAPS = 8, 5
_BETWEEN = 0.75  # inches between rows of heatmaps, for a title of two lines
_LOSS = LinearSegmentedColormap.from_list("loss", ["#FFFFFF", "#D9CCEB", "#8B63C4", "#2A0B5E"])
_LEAST_LOSS = 1e-16

_CIRCLES: dict[str, Any] = {
    "linestyle": "", "marker": "o", "markersize": 4.5, "markerfacecolor": "white",
    "markeredgecolor": PURPLE, "markeredgewidth": 1.1,
}  # fmt: skip


@style()
def spectra(document: Document, path: Path) -> Figure:
    """Singular values of T and delta by module, with the noise floor."""
    groups = {
        label: [entry["spectra"] for entry in members if entry["spectra"] is not None]
        for label, members in _groups(document).items()
    }
    groups = {label: members for label, members in groups.items() if members}
    limits = _value_limits([entry for members in groups.values() for entry in members])
    page, panels = _panels(_spectra_finding(document), groups, 2.7, "singular value σᵢ")
    for (ax, _), members in zip(panels, groups.values(), strict=True):
        _draw_spectra(ax, members, limits)
        ax.set_xlabel("index i")
    _legend(page)
    return page.save(path)


def _groups(document: Document) -> dict[str, list[dict[str, Any]]]:
    """The parameters' entries by module; of the first few modules, if there are many."""
    groups: dict[str, list[dict[str, Any]]] = {label: [] for label in document["modules"]}
    for entry in document["parameters"].values():
        groups[entry["module"]].append(entry)
    return dict(list(groups.items())[:MOST_PANELS])


def _shown(document: Document, most: int) -> str:
    """A remark where only some of the modules have a panel."""
    count = len(document["modules"])
    return f" The first {most} of {count} modules are shown." if count > most else ""


def _panels(
    finding: Finding, groups: dict[str, Any], tall: float, label: str
) -> tuple[Page, list[tuple[Axes, float]]]:
    """A page with a panel per group, up to four to a row, and each panel's width in inches."""
    columns = min(4, len(groups))
    rows = math.ceil(len(groups) / columns)
    page = Page(finding, rows * (tall + 0.9) + 0.3)
    wide = (WIDTH - 2 * MARGIN - 0.75 - 0.3 * (columns - 1)) / columns
    panels = []
    for place, name in enumerate(groups):
        row, column = divmod(place, columns)
        bottom = 0.95 + (rows - 1 - row) * (tall + 0.9)
        ax = page.axes(MARGIN + 0.75 + column * (wide + 0.3), bottom, wide, tall)
        ax.set_title(fitted(name, wide, TEXT), size=TEXT, loc="left")
        if column:
            ax.tick_params(labelleft=False)
        else:
            ax.set_ylabel(label)
        panels.append((ax, wide))
    return page, panels


def _legend(page: Page) -> None:
    handles = page.figure.axes[0].get_legend_handles_labels()[0]
    where = ((MARGIN + 0.6) / WIDTH, 0)
    page.figure.legend(handles=handles, loc="lower left", bbox_to_anchor=where, ncols=len(handles))


def _spectra_finding(document: Document) -> Finding:
    summary = document["summary"]
    found, matrices = summary["spectra"], summary["matrices"]
    rank = found["delta_rank"]
    r = f"{rank['min']:.0f}" if rank["min"] == rank["max"] else "own"
    kind = "predicted from the format" if found["floor"] == "predicted" else "measured from T − Δ"
    note = f"Medians over the layers, ranges shaded; both axes logarithmic. Noise floor {kind}."
    note += _shown(document, MOST_PANELS)
    nature = found["residual_nature"]
    if nature != RANDOM:
        what = "What rounding took from T is not random" if nature == LOST else "T − Δ is not noise"
        title = (
            f"{what}: its largest singular value is up to "
            f"{found['residual_to_threshold']['max']:.3g} times the floor of random noise"
        )
    elif found["ranks_equal"] == matrices:
        every = f"all {matrices} matrices" if matrices > 1 else "the one matrix"
        title = f"In {every}, exactly Δ's {r} directions stand above the noise floor"
    else:
        title = (
            f"The noise floor drowns directions of Δ: the ranks of T and Δ agree in "
            f"{found['ranks_equal']} of {matrices} matrices"
        )
    return Finding(title, note)


def _value_limits(entries: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """From a little below the smaller noise to the largest singular value."""
    tops = [
        entry[which]["spectral_norm"] for entry in entries for which in ("task_vector", "delta")
    ]
    floors = [_threshold(entry) for entry in entries]
    low = min((floor for floor in floors if floor > 0), default=max(tops, default=1.0) * 1e-8)
    return decades([low * 0.03, *tops])


def _threshold(entry: dict[str, Any]) -> float:
    return float(entry["floors"]["task_vector"]["threshold"])


def _draw_spectra(ax: Axes, members: Sequence[dict[str, Any]], limits: tuple[float, float]) -> None:
    for which, label in (("delta", "Δ"), ("task_vector", "T")):
        index, middle, low, high = _curves([member[which] for member in members])
        # What fp32 leaves of delta beyond its rank is far below: it is not drawn.
        ax.fill_between(index, low, high, color=LIGHT_PURPLE, alpha=0.6, linewidth=0)
        if which == "delta":
            ax.plot(index, middle, color=PURPLE, linewidth=1.8, label=label)
        else:
            ax.plot(
                index, middle, linestyle="", marker="o", markersize=4.5, label=label,
                markerfacecolor="white", markeredgecolor=PURPLE, markeredgewidth=1.1,
            )  # fmt: skip
    floor = median(_threshold(member) for member in members)
    noise = median(member["residual_norm"] for member in members)
    ax.axhline(floor, color=BLUE, linewidth=1.5, linestyle="--", label="noise floor")
    ax.axhline(noise, color=RED, linewidth=1.2, linestyle=":", label="‖T − Δ‖₂")
    last = max(member["task_vector"]["index"][-1] for member in members)
    ax.set(xscale="log", yscale="log", xlim=(0.85, last * 1.2), ylim=limits)
    label_log_axis(ax.xaxis, (0.9, last * 1.1), 4)
    label_log_axis(ax.yaxis, limits, 7)
    ax.grid(axis="y")


def _curves(
    found: Sequence[dict[str, Any]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Index, and median, smallest and largest singular value over some spectra, zeros left out."""
    by_index: dict[int, list[float]] = {}
    for spectrum in found:
        for index, value in zip(spectrum["index"], spectrum["curve"], strict=True):
            by_index.setdefault(index, []).append(value)
    kept = {i: values for i, values in sorted(by_index.items()) if min(values) > 0}
    values = list(kept.values())
    return (
        list(kept),
        [median(v) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
    )


@style()
def similarity(document: Document, path: Path) -> Figure:
    """1 - phi(i, j) of T's and delta's singular vectors, left and right, by module."""
    modules = {
        label: module for label, module in document["modules"].items() if module["left_similarity"]
    }
    shown = list(modules.items())[:_MOST_HEATMAPS]
    panels = [
        (label, name, 1 - np.array(module[f"{side}_similarity"]))
        for side, name in (("left", "left, U"), ("right", "right, V"))
        for label, module in shown
    ]
    columns = len(shown) if len(shown) > 2 else len(panels)
    cell = min(2.2, (WIDTH - 2 * MARGIN - 2.4) / columns - 0.3)
    tall, rows = 1.25 * cell, len(panels) // columns
    page = Page(_similarity_finding(document), rows * (tall + _BETWEEN) + 0.5)
    norm = _loss_scale([loss for *_, loss in panels])
    for place, (label, side, loss) in enumerate(panels):
        row, column = divmod(place, columns)
        bottom = 0.7 + (rows - 1 - row) * (tall + _BETWEEN)
        ax = page.axes(MARGIN + 0.95 + column * (cell + 0.3), bottom, cell, tall)
        _draw_loss(ax, loss, norm)
        ax.set_title(f"{fitted(label, cell + 0.2, SMALL)}\n{side}", size=SMALL, loc="left")
        ax.set_xlabel("j: Δ's first" if row == rows - 1 else "")
        ax.set_ylabel("" if column else "i: T's first")
        ax.tick_params(labelleft=not column)
    high = rows * (tall + _BETWEEN) - _BETWEEN
    bar = page.axes(MARGIN + 0.95 + columns * (cell + 0.3), 0.7, 0.22, high)
    scale = page.figure.colorbar(ScalarMappable(norm, _LOSS), cax=bar)
    scale.set_label("1 − φ(i, j): share not common", size=SMALL)
    label_log_axis(bar.yaxis, (norm.vmin or 0.1, norm.vmax or 1.0), 7)
    return page.save(path)


def _loss_scale(losses: Sequence[NDArray[np.float64]]) -> LogNorm:
    """Whole decades around what float64 resolves of 1 - phi."""
    values = np.concatenate([loss.ravel() for loss in losses])
    values = values[values > 10 * _LEAST_LOSS]
    top = math.ceil(math.log10(values.max())) if values.size else 0
    high = max(-14, min(0, top))
    bottom = math.floor(math.log10(values.min())) if values.size else high
    return LogNorm(10.0 ** max(-16, min(high - 2, bottom)), 10.0**high)


def _similarity_finding(document: Document) -> Finding:
    found = document["summary"]["spectra"]
    note = (
        "φ(i, j): share of the smaller of two spans, T's first i and Δ's first j singular vectors, "
        "that lies in the larger; mean over layers. Light: all of it. Dashed: i = r."
    ) + _shown(document, _MOST_HEATMAPS)
    degrees, smallest = found["largest_angle_degrees"], found["smallest_similarity"]
    angle = f"{scientific(degrees)}°" if degrees > 0.01 else f"{scientific(degrees)} degrees"
    if smallest > 0.99:
        lost = scientific(max(1 - smallest, _LEAST_LOSS))
        title = (
            f"T and Δ have the same directions: no principal angle is above {angle}, and "
            f"1 − φ(r, r) is at most {lost}"
        )
    else:
        title = (
            f"T's directions differ from Δ's by principal angles up to {angle}: φ(r, r) is down "
            f"to {smallest:.3f}"
        )
    return Finding(title, note)


def _draw_loss(ax: Axes, loss: NDArray[np.float64], norm: LogNorm) -> None:
    rows, columns = loss.shape
    ax.imshow(
        np.maximum(loss, _LEAST_LOSS),
        cmap=_LOSS,
        norm=norm,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
    )
    ax.axhline(columns + 0.5, color=BLUE, linewidth=1.2, linestyle="--")
    ax.spines[["top", "right"]].set_visible(True)
    for axis, count in ((ax.xaxis, columns), (ax.yaxis, rows)):
        step = max(1, count // 4)
        axis.set_ticks([1, *range(step, count + 1, step)] if step > 1 else range(1, count + 1))


@style()
def norms(document: Document, path: Path) -> Figure:
    """Norms of delta, T and T - delta of every parameter by layer, a panel per module."""
    groups = _groups(document)
    limits = decades([e[key] for members in groups.values() for e in members for key in _NORMS])
    page, panels = _panels(_norm_finding(document, groups), groups, 2.4, "Frobenius norm")
    for (ax, wide), members in zip(panels, groups.values(), strict=True):
        _draw_norms(ax, members, limits, wide)
    _legend(page)
    return page.save(path)


_NORMS = ("delta_norm", "task_vector_norm", "residual_norm")


def _norm_finding(document: Document, groups: dict[str, list[dict[str, Any]]]) -> Finding:
    note = "Frobenius norms by layer on a log axis; the distance to the red squares is the SNR."
    note += _shown(document, MOST_PANELS)
    overall = document["summary"]["relative_error"]
    if overall is None:
        return Finding("Δ is zero everywhere", note)
    errors = {
        label: document["modules"][label]["relative_error"]
        for label in groups
        if document["modules"][label]["relative_error"] is not None
    }
    least, most = min(errors, key=lambda g: errors[g]), max(errors, key=lambda g: errors[g])
    title = f"‖T − Δ‖ is {share(overall)} of ‖Δ‖ over all parameters"
    if least != most:
        title += f": from {share(errors[least])} in {least} to {share(errors[most])} in {most}"
    return Finding(title, note)


def _draw_norms(
    ax: Axes, members: Sequence[dict[str, Any]], limits: tuple[float, float], inches: float
) -> None:
    """One module; what is outside of the layers is drawn at 0 under its own axis label.

    Where a layer has several of that name (experts; an encoder's and a decoder's), no line says
    that one follows the other.
    """
    members = sorted(members, key=lambda entry: -1 if entry["layer"] is None else entry["layer"])
    outside = members[0]["layer"] is None
    x = [0 if entry["layer"] is None else entry["layer"] for entry in members]
    delta, task_vector, residual = ([entry[key] or np.nan for entry in members] for key in _NORMS)
    line: dict[str, Any] = {}
    if len(x) > len(set(x)) or len(x) == 1:
        line = {"marker": "_", "linestyle": "", "markersize": 14, "markeredgewidth": 1.8}
    ax.plot(x, delta, color=PURPLE, linewidth=1.8, label="‖Δ‖", **line)
    ax.plot(x, task_vector, label="‖T‖", **_CIRCLES)
    ax.plot(x, residual, color=RED, linewidth=1.0, marker="s", markersize=3.5, label="‖T − Δ‖")
    ax.set(yscale="log", ylim=limits, xlabel="no layer" if outside else "layer")
    label_log_axis(ax.yaxis, limits, 7)
    ax.set_xlim(min(x) - 0.7, max(x) + 0.7)
    step = tick_step(max(x) - min(x) + 1, inches, 0.4)
    ax.set_xticks([] if outside else range(min(x), max(x) + 1, step))
    ax.grid(axis="y")
