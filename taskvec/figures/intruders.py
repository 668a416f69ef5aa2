"""The figures about intruder dimensions, from intruder_dimensions.json alone.

Purple is what comes from adapters, red what was fine-tuned whole; triangles mark intruders.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from taskvec.figures.style import (
    INK,
    MARGIN,
    MUTED,
    RED,
    SMALL,
    TEXT,
    WIDTH,
    Finding,
    Page,
    elided,
    style,
    text_width,
    tick_step,
)
from taskvec.figures.titles import short_name
from taskvec.intruders.report import Document, count, epsilon_key

_COSINES = LinearSegmentedColormap.from_list(
    "cosines", ["#FFFFFF", "#D9CCEB", "#8B63C4", "#2A0B5E"]
)
_ADAPTERS = LinearSegmentedColormap.from_list("adapters", ["#B79BDD", "#54278F", "#1F0542"])
_MARKERS = ("o", "s", "D", "v", "P", "<", ">", "p")
MOST_PANELS, _MOST_ROWS = 8, 40


@style()
def similarity(content: Document, size: int, path: Path) -> Figure:
    """|cos| between the first vectors of base and version, a panel for each version."""
    picture = content["picture"]
    shown = _shown(picture["similarity"])
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    cell = min(2.6, (WIDTH - 2 * MARGIN - 1.6) / columns - 0.42)
    page = Page(_similarity_finding(content, size), rows * (cell + 0.78) + 0.3)
    for place, (label, values) in enumerate(shown.items()):
        row, column = divmod(place, columns)
        bottom = 0.6 + (rows - 1 - row) * (cell + 0.78)
        ax = page.axes(MARGIN + 0.5 + column * (cell + 0.42), bottom, cell, cell)
        matrix = np.array(values)[:size, :size]
        entry = content["versions"][label]["matrices"][picture["matrix"]]
        first = epsilon_key(content["settings"]["epsilons"][0])
        _draw_similarity(ax, matrix, entry["intruders"][first])
        ax.set_title(elided(label, 22), size=TEXT, loc="left", pad=15)
        ax.set_xlabel("j: tuned vector" if place + columns >= len(shown) else "")
        ax.set_ylabel("" if column else "i: base vector")
    bar = page.axes(MARGIN + 0.6 + columns * (cell + 0.42), 0.6, 0.2, cell)
    scale = page.figure.colorbar(ScalarMappable(Normalize(0, 1), _COSINES), cax=bar)
    scale.set_label("|cos(xᵢ, yⱼ)|", size=SMALL)
    return page.save(path)


def _shown(similarity: dict[str, Any]) -> dict[str, Any]:
    """As many versions as there are panels, evenly from the first to the last."""
    labels = list(similarity)
    places = np.linspace(0, len(labels) - 1, min(len(labels), MOST_PANELS)).round()
    return {labels[int(place)]: similarity[labels[int(place)]] for place in places}


def _draw_similarity(ax: Axes, matrix: NDArray[np.float64], intruders: list[int]) -> None:
    height, width = matrix.shape
    ax.imshow(
        matrix, cmap=_COSINES, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0.5, width + 0.5, height + 0.5, 0.5),
    )  # fmt: skip
    inside = [j for j in intruders if j <= width]
    ax.plot(
        inside, [0.5 - 0.035 * height] * len(inside), linestyle="", marker="v", markersize=5,
        color=RED, clip_on=False,
    )  # fmt: skip
    ax.set(xlim=(0.5, width + 0.5), ylim=(height + 0.5, 0.5))
    ax.spines[["top", "right"]].set_visible(True)
    for axis, size in ((ax.xaxis, width), (ax.yaxis, height)):
        step = max(1, round(size / 4 / 5) * 5) if size > 10 else 3
        axis.set_ticks([1, *range(step, size + 1, step)])


def _similarity_finding(content: Document, size: int) -> Finding:
    picture, settings = content["picture"], content["settings"]
    where, epsilon = short_name(picture["matrix"]), settings["epsilons"][0]
    shown = _shown(picture["similarity"])
    note = "Absolute cosines of left singular vectors, in order of their singular values. "
    note += f"Red triangles: intruders among the first {settings['top_k']} (ε = {epsilon:g})."
    if len(shown) < len(picture["similarity"]):
        note += f" {len(shown)} of {len(picture['similarity'])} versions are shown."
    entries = {label: content["versions"][label]["matrices"][picture["matrix"]] for label in shown}
    key = epsilon_key(epsilon)
    most = max(entries, key=lambda label: len(entries[label]["intruders"][key]))
    number = len(entries[most]["intruders"][key])
    if size > settings["top_k"]:
        shifts = {label: _shift(entry, epsilon) for label, entry in entries.items()}
        label = max(shifts, key=lambda label: shifts[label])
        title = _shift_title(where, label, round(shifts[label]))
    elif number:
        among = f"of the first {settings['top_k']} directions of {most}"
        verb = "resembles" if number == 1 else "resemble"
        title = f"In {where}, {number} {among} {verb} no direction of the base"
    else:
        title = f"In {where}, every leading direction resembles one of the base's"
    return Finding(title, note)


def _shift_title(where: str, label: str, shift: int) -> str:
    if shift < 1:
        return f"In {where}, the diagonal is not shifted at its end: the last keep the base's ranks"
    new = "1 place: a new direction ranks"
    if shift > 1:
        new = f"{shift} places: so many new directions rank"
    return f"In {where}, {label}'s diagonal is shifted by {new} before the base's"


def _shift(entry: dict[str, Any], epsilon: float) -> float:
    """By how many places the base's vectors have moved back: the median over the last quarter."""
    moved = [
        j - nearest
        for j, (nearest, value) in enumerate(
            zip(entry["nearest_base_vector"], entry["max_similarity"], strict=True), 1
        )
        if value >= max(epsilon, 0.5)
    ]
    last = moved[-max(1, len(moved) // 4) :]
    return float(np.median(last)) if last else 0.0


@style()
def places(content: Document, path: Path) -> Figure:
    """How many intruders each layer has: a row for each version, or for each module of one."""
    labels = list(content["versions"])
    matrices = content["matrices"]
    key = epsilon_key(content["settings"]["epsilons"][0])
    layers = sorted({one["layer"] for one in matrices.values()}, key=lambda x: (x is None, x))

    def row_of(label: str, name: str) -> str:
        return label if len(labels) > 1 else str(matrices[name]["module"])

    rows = list(dict.fromkeys(row_of(label, name) for label in labels for name in matrices))
    grid = np.zeros((len(rows), len(layers)), dtype=int)
    for label in labels:
        for name, entry in content["versions"][label]["matrices"].items():
            place = rows.index(row_of(label, name)), layers.index(matrices[name]["layer"])
            grid[place] += len(entry["intruders"][key])
    rows, grid = rows[:_MOST_ROWS], grid[:_MOST_ROWS]
    page = Page(_places_finding(content, layers, grid), 0.3 * len(rows) + 1.15)
    left = MARGIN + max(text_width(elided(row), SMALL) for row in rows) + 0.2
    wide = min(WIDTH - MARGIN - 1.0 - left, 0.55 * len(layers))
    ax = page.axes(left, 0.75, wide, 0.3 * len(rows))
    _draw_counts(ax, grid, wide / len(layers))
    ax.set_yticks(range(len(rows)), [elided(row) for row in rows])
    step = tick_step(len(layers), wide)
    ticks = range(0, len(layers), step)
    ax.set_xticks(ticks, ["none" if layers[i] is None else str(layers[i]) for i in ticks])
    ax.set_xlabel("layer")
    for number, total in enumerate(grid.sum(1)):
        ax.text(len(layers) - 0.3, number, f"{total}", va="center", size=SMALL, weight="bold")
    ax.text(len(layers) - 0.3, -0.75, "all", va="center", size=SMALL, color=MUTED)
    return page.save(path)


def _draw_counts(ax: Axes, grid: NDArray[np.int_], cell: float) -> None:
    most = max(1, int(grid.max()))
    ax.imshow(grid, cmap=_COSINES, vmin=0, vmax=most, aspect="auto")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if cell >= 0.2:
        for (row, column), number in np.ndenumerate(grid):
            if number:
                color = "white" if number > 0.55 * most else INK
                ax.text(column, row, str(number), size=SMALL, ha="center", va="center", color=color)


def _places_finding(content: Document, layers: list[int | None], grid: NDArray[np.int_]) -> Finding:
    settings, versions = content["settings"], content["versions"]
    per_layer, total = grid.sum(0), int(grid.sum())
    note = (
        f"Intruder dimensions among the first {settings['top_k']} of each matrix, "
        f"ε = {settings['epsilons'][0]:g}; by layer, a row for each "
        + ("version." if len(versions) > 1 else "module.")
    )
    matrices = len(content["matrices"])
    many = "1 matrix" if matrices == 1 else f"{matrices} matrices"
    if not total:
        return Finding(f"No intruder dimension in {many}", note)
    top = int(per_layer.argmax())
    where = "outside of the layers" if layers[top] is None else f"in layer {layers[top]}"
    title = f"{total} intruder dimension{'' if total == 1 else 's'} in {many}"
    if len(versions) > 1:
        title += f" of {len(versions)} versions"
    if len(layers) > 1:
        title += f", the most, {per_layer[top]}, {where}"
    return Finding(title, note)


@style()
def counts(content: Document, path: Path) -> Figure:
    """The number of intruders against epsilon and against k, a line for each version."""
    settings, labels = content["settings"], list(content["versions"])
    legend_rows = math.ceil(len(labels) / 5)
    page = Page(_counts_finding(content), 4.1 + 0.24 * legend_rows)
    bottom = 0.75 + 0.24 * legend_rows
    wide = (WIDTH - 2 * MARGIN - 1.7) / 2
    by_epsilon = page.axes(MARGIN + 0.7, bottom, wide, 3.1)
    by_k = page.axes(MARGIN + 1.6 + wide, bottom, wide, 3.1)
    epsilons = np.linspace(0, 1, 41)
    depth = min(settings["leading"], _depth(content))
    for number, label in enumerate(labels):
        look = _look(content, number)
        found = [count(content, label, epsilon, settings["top_k"]) for epsilon in epsilons]
        by_epsilon.plot(epsilons, found, label=elided(label, 22), **look)
        found = [count(content, label, settings["epsilons"][0], k) for k in range(1, depth + 1)]
        by_k.plot(range(1, depth + 1), found, **look)
    for epsilon in settings["epsilons"]:
        by_epsilon.axvline(epsilon, color=MUTED, linewidth=1, linestyle=":")
    by_k.axvline(settings["top_k"], color=MUTED, linewidth=1, linestyle=":")
    by_epsilon.set(xlabel=f"ε, for the first {settings['top_k']} vectors", xlim=(0, 1))
    by_epsilon.set_ylabel("intruder dimensions")
    by_k.set(
        xlabel=f"k first vectors, for ε = {settings['epsilons'][0]:g}", xlim=(1, max(2, depth))
    )
    for ax in (by_epsilon, by_k):
        ax.set_ylim(0, max(1, ax.get_ylim()[1]))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
    handles = by_epsilon.get_legend_handles_labels()[0]
    page.figure.legend(
        handles=handles, loc="lower left", ncols=min(5, len(labels)),
        bbox_to_anchor=((MARGIN + 0.5) / WIDTH, 0), handlelength=2.6,
    )  # fmt: skip
    return page.save(path)


def _depth(content: Document) -> int:
    """How many vectors of every changed matrix were looked at."""
    return max(
        len(entry["max_similarity"])
        for version in content["versions"].values()
        for entry in version["matrices"].values()
        if entry["changed"]
    )


def _look(content: Document, number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a version: adapters from light to dark, whole models red."""
    kinds = [version["kind"] for version in content["versions"].values()]
    same = [place for place, kind in enumerate(kinds) if kind == kinds[number]]
    rank = same.index(number)
    look: dict[str, Any] = {
        "marker": _MARKERS[rank % len(_MARKERS)], "markevery": (2 + number % 4, 6),
        "markersize": 4.5, "linewidth": 1.5,
    }  # fmt: skip
    if kinds[number] == "model":
        return {**look, "color": RED, "linestyle": "--", "linewidth": 2.0}
    shade = rank / max(1, len(same) - 1) if len(same) > 1 else 0.5
    return {**look, "color": to_hex(_ADAPTERS(shade))}


def _counts_finding(content: Document) -> Finding:
    settings, versions = content["settings"], content["summary"]["versions"]
    key = epsilon_key(settings["epsilons"][0])
    found = {label: version["intruders"][key] for label, version in versions.items()}
    tested = max(version["tested_vectors"] for version in versions.values())
    note = (
        "Left: against the threshold ε. Right: against how many leading vectors of each matrix are "
        "tested. Dotted: what was asked for."
    )
    most, least = max(found, key=lambda x: found[x]), min(found, key=lambda x: found[x])
    if len(found) == 1:
        title = f"{found[most]} of {tested} leading directions are intruders at ε = {key}"
    elif found[most] == found[least]:
        title = f"All versions have {found[most]} intruders among {tested} leading directions"
    else:
        title = (
            f"Of {tested} leading directions at ε = {key}, {most} has {found[most]} "
            f"intruder{'' if found[most] == 1 else 's'} and {least} has {found[least]}"
        )
    return Finding(title, note)
