"""The result as figures, one function each, drawn from the JSON document and never from tensors.

Each takes the content of comparison_results.json (`taskvec.reports.comparison.document`) and the
path of the PNG to write, and returns the figure. Purple circles are parameters that the adapter
changes, red triangles those that changed without it, black crosses those that fail the certificate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from taskvec.compare import PERFECT_COSINE
from taskvec.figures import titles as titles
from taskvec.figures.bars import precision_impact, rounding_errors
from taskvec.figures.grid import projection_rank, row_key
from taskvec.figures.maps import architecture_coverage, modification_heatmap
from taskvec.figures.style import (
    CROSS,
    FAINT,
    HATCH,
    LIGHT_RED,
    MARGIN,
    MUTED,
    ONLY_MARKER,
    PURPLE,
    RED,
    SHARED_MARKER,
    TEXT,
    UNCHANGED,
    WIDTH,
    Page,
    cross_key,
    decades,
    elided,
    label_log_axis,
    style,
    superscript,
    tick_step,
)
from taskvec.figures.titles import Document, adapted, flagged, only

__all__ = [
    "architecture_coverage",
    "cosine_similarity",
    "modification_heatmap",
    "norm_distribution",
    "precision_impact",
    "rounding_errors",
]


class _Places:
    """Where parameters lie along the horizontal axis: by layer, then those outside the layers."""

    def __init__(self, content: Document, names: Sequence[str]) -> None:
        entries = content["parameters"]
        self.layers = titles.layers_of(entries.values())
        column = {layer: index for index, layer in enumerate(self.layers)}
        inside = [name for name in names if entries[name]["layer"] is not None]
        outside = [name for name in names if entries[name]["layer"] is None]
        self.has_outside = bool(outside)
        slots = {row: index for index, row in enumerate(dict.fromkeys(map(row_key, inside)))}
        self._x = {
            name: column[entries[name]["stack"], entries[name]["layer"]]
            + _spread(slots[row_key(name)], len(slots))
            for name in inside
        }
        for index, name in enumerate(outside):
            self._x[name] = len(self.layers) + _spread(index, len(outside))

    def of(self, names: Sequence[str]) -> list[float]:
        return [self._x[name] for name in names]

    def label(self, ax: Axes, inches: float) -> None:
        """Ticks at the layers, as many as find room, and one for what is outside them."""
        count = len(self.layers)
        step = tick_step(count, inches)
        ticks = list(range(0, count, step))
        labels = [str(self.layers[tick][1]) for tick in ticks]
        if self.has_outside:
            near = [tick for tick in ticks if (count - tick) * inches / (count + 1) < 0.45]
            ticks = [*ticks[: len(ticks) - len(near)], count]
            labels = [*labels[: len(ticks) - 1], "outside" if count else ""]
        ax.set_xticks(ticks, labels)
        stacks = list(dict.fromkeys(stack for stack, _ in self.layers))
        ax.set_xlabel(
            ("layer of " + ", then of ".join(stacks) if len(stacks) > 1 else "layer")
            if stacks
            else "parameters outside numbered layers"
        )
        ax.set_xlim(-0.8, max(count + (0.8 if self.has_outside else -0.2), 0.8))


def _spread(index: int, count: int) -> float:
    return 0.7 * ((index + 0.5) / count - 0.5)


@style()
def cosine_similarity(content: Document, path: Path) -> Figure:
    """1 - cos(T, delta) of every adapted parameter by layer, and ‖T‖ against ‖delta‖."""
    names = list(adapted(content))
    groups = _groups(content, names)
    keys = len(groups) + bool(set(names) & set(flagged(content)))
    width, tall, foot = 4.75, 3.3, 0.85 + 0.2 * _legend_rows(keys)
    page = Page(titles.cosine_similarity(content), foot + tall + 0.25)
    left = page.axes(MARGIN + 1.2, foot, width, tall)
    right = page.axes(WIDTH - MARGIN - 2.55, foot, 2.45, tall)
    _draw_cosines(left, content, groups, width)
    _draw_lengths(right, content, names)
    return page.save(path)


# Cosines have no more than float64's 1e-16 below 1; what has no direction comes after them all.
_EXACT, _PERFECT, _UNDEFINED = 1e-16, 1 - PERFECT_COSINE, 1e3
_COSINE_TICKS = {
    _EXACT: "exactly 1",
    **{10.0**-exponent: f"1 − 10{superscript(-exponent)}" for exponent in (14, 12, 10, 8, 6)},
    _PERFECT: f"{PERFECT_COSINE}",
    1e-2: "0.99",
    math.sqrt(2): "0 to −1",
}
_MARKERS = ("o", "s", "D", "v", "P", "h", "*", "<")
_TONES = (PURPLE, "#9A78CE", "#6A51A3", "#C5B0E6")
_MOST_GROUPS = len(_MARKERS)


def _draw_cosines(
    ax: Axes, content: Document, groups: Mapping[str, Sequence[str]], width: float
) -> None:
    """Distance of each cosine from 1 on a log axis with 1 on top."""
    names = [name for members in groups.values() for name in members]
    places, distances = _Places(content, names), {n: _distance(content, n) for n in names}
    ax.axhspan(_EXACT / 10, _PERFECT, color=FAINT)
    ax.axhline(_PERFECT, color=PURPLE, linewidth=1, linestyle="--")
    for index, (group, members) in enumerate(groups.items()):
        ax.scatter(
            places.of(members),
            [distances[name] for name in members],
            s=24,
            marker=_MARKERS[index],
            color=_TONES[index % len(_TONES)],
            edgecolors=PURPLE,
            linewidths=0.6,
            label=elided(group, 22),
        )
    _cross(ax, content, names, places, distances)
    undefined = any(distance >= _UNDEFINED for distance in distances.values())
    ticks = {**_COSINE_TICKS, **({_UNDEFINED: "undefined"} if undefined else {})}
    ax.set_yscale("log")
    ax.set_ylim(_UNDEFINED * 20 if undefined else 20, _EXACT / 10)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.grid(axis="y")
    ax.set_ylabel("cosine similarity of T and Δ")
    ax.set_title(f"Same direction? (shaded: above {PERFECT_COSINE})", size=TEXT, loc="left")
    places.label(ax, width)
    _legend_below(ax, bool(set(names) & set(flagged(content))))


def _distance(content: Document, name: str) -> float:
    cosine = content["parameters"][name]["lora"]["cosine_similarity"]
    return _UNDEFINED if cosine is None else max(1 - cosine, _EXACT)


def _groups(content: Document, names: Sequence[str]) -> dict[str, list[str]]:
    """Parameters by module, by block and module where modules share a name, or only by block."""
    entries = content["parameters"]
    names = sorted(names, key=lambda name: projection_rank(row_key(name)))
    rows = len({row_key(name) for name in names})

    def by(*keys: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in names:
            bias = ".bias" if name.endswith(".bias") else ""
            found.setdefault(" ".join(entries[name][k] for k in keys) + bias, []).append(name)
        return found

    groups = by("module")
    if len(groups) < rows:
        groups = by("block", "module")
    return groups if len(groups) <= _MOST_GROUPS else by("block")


def _cross(
    ax: Axes,
    content: Document,
    names: Sequence[str],
    places: _Places,
    heights: Mapping[str, float],
) -> None:
    """Crosses on the parameters that fail the certificate."""
    failed = [name for name in flagged(content) if name in set(names)]
    if failed:
        ax.scatter(
            places.of(failed),
            [heights[name] for name in failed],
            **CROSS,
        )


def _legend_rows(keys: int) -> int:
    return 1 if keys <= 5 else math.ceil(keys / 4)


def _legend_below(ax: Axes, failed: bool) -> None:
    handles = [*ax.get_legend_handles_labels()[0], *([cross_key()] if failed else [])]
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.17),
        ncols=max(1, math.ceil(len(handles) / _legend_rows(len(handles)))),
        handletextpad=0.2,
        columnspacing=1.2,
        borderaxespad=0,
    )


def _draw_lengths(ax: Axes, content: Document, names: Sequence[str]) -> None:
    """‖T‖ over ‖delta‖: on the diagonal they are equally long."""
    entries = [content["parameters"][name] for name in names]
    deltas = np.array([entry["lora"]["delta_norm"] for entry in entries])
    norms = np.array([entry["task_vector_norm"] for entry in entries])
    low, high = decades([*deltas, *norms])
    zero = low / (high / low) ** 0.1  # beyond the smallest of the others, as a log axis has no 0
    empty = not (deltas.all() and norms.all())
    x, y = (np.where(values > 0, values, zero) for values in (deltas, norms))
    wrong = np.isin(names, flagged(content))
    ax.plot([low, high], [low, high], color=MUTED, linewidth=1, zorder=1)
    ax.scatter(x, y, s=24, marker=SHARED_MARKER, color=PURPLE, alpha=0.6, linewidths=0)
    ax.scatter(x[wrong], y[wrong], **CROSS)
    limits = (zero * (zero / low) ** 0.5 if empty else low, high)
    ax.set(xscale="log", yscale="log")
    for axis, most in ((ax.xaxis, 4), (ax.yaxis, 6)):
        label_log_axis(axis, (low, high), most, zero=zero if empty else None)
    ax.set(xlim=limits, ylim=limits)
    ax.set(xlabel="norm of the adapter's delta, ‖Δ‖", ylabel="norm of the task vector, ‖T‖")
    ax.set_title("Same length? (on the line)", size=TEXT, loc="left")


@style()
def norm_distribution(content: Document, path: Path) -> Figure:
    """Norms of the task vector by layer and as a distribution: shared against all others."""
    page = Page(titles.norm_distribution(content), 4.5)
    shared = [name for name, entry in adapted(content).items() if entry["nonzero_elements"]]
    others = list(only(content))
    still = [n for n, entry in content["parameters"].items() if not entry["nonzero_elements"]]
    left, width, foot, tall = MARGIN + 0.75, 5.9, 1.45, 2.85
    scatter = page.axes(left, foot, width, tall)
    margin = page.axes(left + width + 0.15, foot, WIDTH - MARGIN - left - width - 0.15, tall)
    strip = page.axes(left, foot - 0.42, width, 0.34)
    norms = {name: entry["task_vector_norm"] for name, entry in content["parameters"].items()}
    places = _Places(content, list(content["parameters"]))
    limits = decades([norms[name] for name in (*shared, *others)])
    for ax in (scatter, margin):
        ax.set(yscale="log", ylim=limits)
        label_log_axis(ax.yaxis, limits, 7)
        ax.grid(axis="y")
    heights = {name: max(norm, limits[0]) for name, norm in norms.items()}
    for names, look, what in (
        (shared, _SHARED, "shared (adapter and task vector)"),
        (others, _ONLY, "task vector only"),
    ):
        y = [heights[name] for name in names]
        scatter.scatter(places.of(names), y, s=24, label=f"{what}: {len(names):,}", lw=0, **look)
    _cross(scatter, content, [*shared, *others], places, heights)
    _draw_margin(margin, [heights[n] for n in shared], [heights[n] for n in others], limits)
    _draw_still(strip, content, still, places, scatter)
    scatter.set_ylabel("norm ‖T‖")
    places.label(strip, width)
    scatter.set_xlim(strip.get_xlim())
    handles = [
        *scatter.get_legend_handles_labels()[0],
        Patch(color=UNCHANGED, label=f"unchanged, ‖T‖ = 0: {len(still):,}"),
    ]
    if flagged(content):
        handles.append(cross_key())
    strip.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.02, -1.45),
        ncols=4,
        handletextpad=0.4,
        columnspacing=1.5,
    )
    if not shared and not others:
        scatter.text(0.5, 0.5, "no parameter changed", transform=scatter.transAxes, ha="center")
    return page.save(path)


_SHARED = {"marker": SHARED_MARKER, "color": PURPLE}
_ONLY = {"marker": ONLY_MARKER, "color": RED}


def _draw_margin(
    ax: Axes, shared: Sequence[float], others: Sequence[float], limits: tuple[float, float]
) -> None:
    """How many parameters have which norm: shared to the right, all others to the left."""
    edges = np.geomspace(*limits, 31)
    right, left = np.histogram(shared, edges)[0], np.histogram(others, edges)[0]
    ax.stairs(right, edges, orientation="horizontal", fill=True, color=PURPLE)
    ax.stairs(
        -left, edges, orientation="horizontal", fill=True, facecolor=LIGHT_RED, edgecolor=RED,
        hatch=HATCH,
    )  # fmt: skip
    ax.axvline(0, color=MUTED, linewidth=0.8)
    low, high = -int(left.max(initial=0)), int(right.max(initial=0))
    room = 0.06 * max(high - low, 1)
    ax.set_xlim(low - room, high + room)
    ax.set_xticks(sorted({low, 0, high}))
    ax.set_xticklabels([f"{abs(int(tick)):,}" for tick in ax.get_xticks()])
    ax.set_xlabel("parameters")
    ax.tick_params(axis="y", which="both", length=0, labelleft=False)
    ax.spines["left"].set_visible(False)


def _draw_still(
    ax: Axes, content: Document, names: Sequence[str], places: _Places, above: Axes
) -> None:
    """The strip at the foot of the log axis, where norms are zero."""
    ax.set_facecolor(UNCHANGED)
    ax.set(ylim=(0, 1))
    ax.set_yticks([0.5], ["0"])
    ax.spines[:].set_visible(False)
    above.tick_params(axis="x", which="both", length=0, labelbottom=False)
    above.spines["bottom"].set_visible(False)
    _cross(ax, content, names, places, dict.fromkeys(names, 0.5))
