"""The figures of `analyze_task_vectors.py show`, drawn from the document written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from taskvec.breakdown import OUTSIDE
from taskvec.figures.style import (
    BLUE,
    INK,
    MARGIN,
    MUTED,
    PURPLE,
    RED,
    SMALL,
    UNCHANGED,
    WIDTH,
    Finding,
    Page,
    decades,
    elided,
    label_log_axis,
    style,
    text_width,
    tick_step,
)

_COSINES = LinearSegmentedColormap.from_list("cosines", [RED, "#FFFFFF", PURPLE])
_MOST_PAIRS = 15  # that are drawn by layer: those that agree or disagree most
_CELL, _WIDEST, _ROW = 0.62, 5.2, 0.3  # inches
_NUMBERED = 0.42  # a cell of at least this size has room for its number
# Alternating with the markers below, so that eight lines are told apart without their colours.
_COLOURS = (PURPLE, RED, BLUE, MUTED)
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")

Document = dict[str, Any]
Pair = tuple[int, int]


@style()
def cosines(document: Document, path: Path) -> Figure:
    """The cosine matrix of the task vectors, and each pair's cosine layer by layer."""
    names = [elided(entry["name"], 24) for entry in document["task_vectors"]]
    pairs = _telling_pairs(document)
    layers = list(document["cosines"]["by_layer"])
    cell = min(_CELL, _WIDEST / len(names))
    size, rows = cell * len(names), _ROW * len(pairs)
    page = Page(_cosines_finding(document), size + rows + 1.6)
    left = MARGIN + 0.15 + max(text_width(name, SMALL) for name in names)
    matrix = page.axes(left, page.height - size - 0.35, size, size)
    _draw_matrix(matrix, document["cosines"]["overall"], names, numbers=cell >= _NUMBERED)
    bar = page.axes(WIDTH - MARGIN - 2.4, page.height - 0.51, 2.1, 0.16)
    scale = ScalarMappable(Normalize(-1, 1), _COSINES)
    page.figure.colorbar(scale, bar, orientation="horizontal", ticks=[-1, 0, 1])
    bar.set_xlabel("cosine: opposite, orthogonal, same", size=SMALL)
    labels = [f"{i + 1} · {j + 1}" for i, j in pairs]
    by_layer = page.axes(left, 0.75, WIDTH - left - MARGIN, rows)
    _draw_layers(by_layer, document, pairs, labels, layers)
    return page.save(path)


def _draw_matrix(
    axes: Axes, values: list[list[float | None]], names: list[str], *, numbers: bool
) -> None:
    """Cells with their numbers; rows have names, columns the rows' numbers."""
    axes.imshow(_filled(values), cmap=_COSINES, vmin=-1, vmax=1, aspect="auto")
    for i, row in enumerate(values if numbers else []):
        for j, value in enumerate(row):
            text = "–" if value is None else _signed(value, 2)
            colour = "white" if value is not None and abs(value) > 0.6 else INK
            axes.text(j, i, text, ha="center", va="center", size=SMALL, color=colour)
    places = range(len(names))
    axes.set_yticks(places, [f"{name}  {number}" for number, name in enumerate(names, 1)])
    axes.set_xticks(places, [str(number) for number in range(1, len(names) + 1)])
    axes.xaxis.tick_top()
    _frameless(axes)


def _draw_layers(
    axes: Axes, document: Document, pairs: Sequence[Pair], labels: list[str], layers: list[str]
) -> None:
    matrices = [document["cosines"]["by_layer"][layer] for layer in layers]
    values = [[matrix[i][j] for matrix in matrices] for i, j in pairs]
    axes.imshow(_filled(values), cmap=_COSINES, vmin=-1, vmax=1, aspect="auto")
    axes.set_facecolor(UNCHANGED)
    axes.set_yticks(range(len(pairs)), labels)
    inside = [layer for layer in layers if layer != OUTSIDE]
    step = tick_step(len(layers), axes.get_position().width * WIDTH, 0.35)
    places = list(range(0, len(inside), step))
    names = [inside[place] for place in places]
    if len(inside) < len(layers):
        places.append(len(layers) - 1)
        names.append("outside")
    axes.set_xticks(places, names)
    axes.set_xlabel("layer; grey where one of the two did not change")
    axes.set_ylabel("pair")
    _frameless(axes)


def _signed(value: float, digits: int) -> str:
    """With a minus sign, and no sign before a zero."""
    return f"{value:.{digits}f}".replace("-", "−").replace(
        "−0." + "0" * digits, "0." + "0" * digits
    )


def _frameless(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for axis, low, high in ((axes.xaxis, *axes.get_xlim()), (axes.yaxis, *axes.get_ylim())):
        edges = np.arange(min(low, high) + 1, max(low, high))
        axis.set_ticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def _filled(values: Sequence[Sequence[float | None]]) -> Any:
    rows = [[np.nan if value is None else value for value in row] for row in values]
    return np.ma.masked_invalid(np.array(rows, dtype=float))


def _pairs(count: int) -> list[Pair]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def _telling_pairs(document: Document) -> list[Pair]:
    """All pairs, or those with the cosines that are largest in absolute value."""
    overall = document["cosines"]["overall"]
    pairs = _pairs(len(overall))
    loudest = sorted(pairs, key=lambda pair: -abs(overall[pair[0]][pair[1]] or 0.0))
    return sorted(loudest[:_MOST_PAIRS])


def _cosines_finding(document: Document) -> Finding:
    names = [entry["name"] for entry in document["task_vectors"]]
    overall = document["cosines"]["overall"]
    note = "Cosines. Above: of the whole task vectors. Below: of the same pairs layer by layer"
    pairs = _pairs(len(names))
    note += f", the {_MOST_PAIRS} with the largest |cosine|." if len(pairs) > _MOST_PAIRS else "."
    known = [pair for pair in pairs if overall[pair[0]][pair[1]] is not None]
    if not known:
        return Finding("No two of the task vectors are both non-zero", note)
    ranked = sorted(known, key=lambda pair: overall[pair[0]][pair[1]])

    def told(pair: Pair, words: str) -> str:
        i, j = pair
        value = _signed(overall[i][j], 3)
        return f"{elided(names[i], 22)} and {elided(names[j], 22)} {words} {value}"

    nearest, furthest = (_signed(overall[i][j], 3) for i, j in (ranked[-1], ranked[0]))
    if len(ranked) == 1:
        return Finding(told(ranked[0], "have the cosine"), note)
    if nearest == furthest:
        return Finding(f"All pairs of the task vectors have the cosine {nearest}", note)
    closest = told(ranked[-1], "are closest, with")
    return Finding(f"{closest}; {told(ranked[0], 'furthest, with')}", note)


@style()
def norms(document: Document, path: Path) -> Figure:
    """The size of every task vector layer by layer."""
    vectors = document["task_vectors"]
    layers = list(dict.fromkeys(layer for entry in vectors for layer in entry["by_layer"]))
    layers = [layer for layer in layers if layer != OUTSIDE] + [OUTSIDE] * (OUTSIDE in layers)
    columns = 2
    legend = 0.24 * -(-len(vectors) // columns)
    page = Page(_norms_finding(document), 4.2 + legend)
    axes = page.axes(1.05, 0.75, WIDTH - 1.05 - MARGIN, 3.3)
    shown = []
    for number, entry in enumerate(vectors):
        rms = [entry["by_layer"].get(layer, {}).get("rms", 0.0) for layer in layers]
        places = [place for place, value in enumerate(rms) if value > 0]
        shown += [rms[place] for place in places]
        inside = [place for place in places if layers[place] != OUTSIDE]
        look: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 5.5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }
        label = f"{elided(entry['name'])} (norm {entry['summary']['norm']:.3g})"
        axes.plot(inside, [rms[place] for place in inside], linewidth=1.2, label=label, **look)
        outside = [place for place in places if layers[place] == OUTSIDE]
        axes.plot(outside, [rms[place] for place in outside], linestyle="", **look)
    limits = decades(shown)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    label_log_axis(axes.yaxis, limits, 8)
    step = tick_step(len(layers), axes.get_position().width * WIDTH, 0.35)
    inside = [place for place, layer in enumerate(layers) if layer != OUTSIDE]
    ticks = inside[::step] + [place for place, layer in enumerate(layers) if layer == OUTSIDE]
    axes.set_xticks(ticks, ["outside" if layers[t] == OUTSIDE else layers[t] for t in ticks])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.grid(axis="y")
    axes.set_xlabel("layer")
    axes.set_ylabel("root mean square of T (log)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2)
    return page.save(path)


def _norms_finding(document: Document) -> Finding:
    vectors = document["task_vectors"]
    note = "A mark per layer that changed: the size of the change per element, ‖T‖ / √n."
    sized = sorted(vectors, key=lambda entry: -entry["summary"]["norm"])
    if len(vectors) == 1:
        layer, group = _largest_layer(sized[0])
        share = 100 * group["squared_norm_share"]
        where = layer if layer == OUTSIDE else f"layer {layer}"
        return Finding(f"{where[0].upper()}{where[1:]} holds most, {share:.3g} % of ‖T‖²", note)
    first, last = sized[0], sized[-1]
    if not last["summary"]["norm"]:
        return Finding(f"{elided(last['name'], 40)} is zero everywhere", note)
    ratio = first["summary"]["norm"] / last["summary"]["norm"]
    if ratio < 1.005:
        return Finding("The task vectors are of the same size", note)
    title = f"{elided(first['name'], 30)} is the largest change, {ratio:.3g} times the smallest"
    return Finding(title, note)


def _largest_layer(entry: Document) -> tuple[str, Document]:
    layer, group = max(entry["by_layer"].items(), key=lambda item: item[1]["squared_norm_share"])
    return str(layer), dict(group)
