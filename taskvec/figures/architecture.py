"""The figure of a model's structure, drawn from the document of visualize_model_structure.py.

A row per parameter of a layer, a column per layer: shape on the left, share of the model's elements
on the right. What an adapter changes differs from the rest in colour, in shape and by a mark.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskvec.architecture import fold_numbers
from taskvec.cli import printable
from taskvec.figures.style import (
    HATCH,
    LIGHT_PURPLE,
    MARGIN,
    MUTED,
    ONLY_MARKER,
    PURPLE,
    SHARED_MARKER,
    SMALL,
    TEXT,
    UNCHANGED,
    WIDTH,
    Finding,
    Page,
    elided,
    style,
    text_width,
    tick_step,
)
from taskvec.structure import shape_text, sizes_text
from taskvec.wording import percent, size

MOST_ROWS = 150  # a page of more rows cannot be read; the rest is counted below them
_UNCHANGED_EDGE = "#A8A8A8"
_MOST_COLUMNS, _FEW_RUNS = 48, 6
_LABEL = 38  # characters of a name that are shown
_ROW, _HEAD, _AXIS, _WIDEST_CELL = 0.24, 0.34, 0.46, 0.5
_GAP, _BARS, _SHARE, _ELEMENTS, _LEGEND = 0.16, 0.75, 0.62, 1.1, 0.6


@dataclass(frozen=True)
class _Section:
    """Rows that share their columns: a stack of layers, or what stands outside of them."""

    title: str
    rows: list[dict[str, Any]]
    columns: list[list[int]]

    @property
    def height(self) -> float:
        return _HEAD + _ROW * len(self.rows) + (_AXIS if self.columns else 0.15)


@dataclass(frozen=True)
class _Columns:
    """Left edges and widths of the page's columns, in inches."""

    shape_right: float
    grid: float
    grid_width: float
    bars: float
    elements_right: float


@style()
def model_structure(document: dict[str, Any], paths: Sequence[Path]) -> Figure:
    """Draw the structure and write it in the format of each path's suffix (.png, .svg).

    Args:
        document: `taskvec.structure.describe`, with ``adapter`` (None, or its ``stored_share``).
    """
    matplotlib.rcParams["svg.hashsalt"] = "model_structure"  # the same document, the same bytes
    sections, left_out = _sections(document)
    foot = _LEGEND + (0.3 if left_out else 0.0)
    page = Page(_finding(document), sum(section.height for section in sections) + foot)
    columns = _columns(sections)
    largest = max((row["elements"] for section in sections for row in section.rows), default=1)
    total = document["totals"]["elements"] or 1
    top = page.height
    for section in sections:
        _draw_section(page, section, columns, top, largest, total)
        top -= section.height
    if left_out:
        page.text(MARGIN, top - 0.05, left_out, size=SMALL, color=MUTED, va="top")
    _draw_legend(page, document)
    for path in paths:
        if path.suffix == ".svg":
            drawn = io.StringIO()
            page.figure.savefig(drawn, format="svg", metadata={"Date": None})
            path.write_text(printable(drawn.getvalue()), encoding="utf-8")
        else:
            page.save(path)
    return page.figure


def title(document: dict[str, Any]) -> str:
    """The finding in one sentence."""
    totals, adapter = document["totals"], document["adapter"]
    if adapter is None:
        block, share = max(
            ((name, entry["elements"]) for name, entry in document["blocks"].items()),
            key=lambda item: item[1],
        )
        part = percent(share / totals["elements"] if totals["elements"] else 0.0)
        return f"{elided(document['formula'], 160)}; {block} tensors hold {part} of the elements"
    blocks = [name for name, entry in document["blocks"].items() if entry["touched_tensors"]]
    where = f"all {blocks[0]}" if len(blocks) == 1 else " and ".join(blocks)
    return (
        f"The adapter changes {totals['touched_tensors']} of {totals['tensors']} tensors "
        f"({percent(totals['touched_tensor_share'])}, {where}): "
        f"{percent(totals['touched_element_share'])} of the elements, for "
        f"{percent(adapter['stored_share'])} stored"
    )


def _finding(document: dict[str, Any]) -> Finding:
    totals = document["totals"]
    dtypes = ", ".join(totals["dtypes"])
    contents = f"{totals['elements']:,} elements, {size(totals['nbytes'])} in {dtypes}"
    formula = elided(document["formula"], 160)
    note = contents if document["adapter"] is None else f"{formula}; {contents}"
    return Finding(title(document), note)


def _sections(document: dict[str, Any]) -> tuple[list[_Section], str]:
    """What is drawn, and a line about the rows that are not."""
    sections, hidden, room = [], [], MOST_ROWS
    for stack in document["stacks"]:
        sizes = sizes_text(stack["sizes"])
        name = elided(stack["name"] or "layers", _LABEL)
        shown = stack["rows"][:room]
        hidden += stack["rows"][room:]
        room -= len(shown)
        if shown:
            columns = _runs(stack["layers"], shown)
            sections.append(_Section(f"{name}: {elided(sizes)}", shown, columns))
    shown = document["global"][:room]
    hidden += document["global"][room:]
    if shown:
        sections.append(_Section(f"outside of layers: {len(document['global'])}", shown, []))
    if not hidden:
        return sections, ""
    elements = sum(row["elements"] for row in hidden)
    tensors = sum(row["tensors"] for row in hidden)
    return sections, f"… and {tensors} more tensors with {elements:,} elements: see the JSON"


def _runs(layers: list[int], rows: list[dict[str, Any]]) -> list[list[int]]:
    """The layers of each column: one each, or runs of equal layers where they are many."""
    single = [[layer] for layer in layers]
    if len(layers) <= _MOST_COLUMNS:
        return single
    states = [[_state(row, layer) for row in rows] for layer in layers]
    runs: list[list[int]] = []
    for index, layer in enumerate(layers):
        if runs and states[index] == states[index - 1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs if len(runs) <= _FEW_RUNS else single


def _state(row: dict[str, Any], layer: int) -> str:
    if layer not in row["layers"]:
        return "absent"
    if layer in row["touched_layers"]:
        return "touched"
    return "partly" if layer in row["partly_touched_layers"] else "untouched"


def _columns(sections: list[_Section]) -> _Columns:
    rows = [row for section in sections for row in section.rows]
    label = max((text_width(elided(row["name"], _LABEL), SMALL) for row in rows), default=0.0)
    shape = max((text_width(shape_text(row["shapes"]), SMALL) for row in rows), default=0.0)
    heads = (text_width(section.title, TEXT, bold=True) for section in sections)
    left = max(label + _GAP + max(shape, 0.5), max(heads, default=0.0) + _GAP + 0.5)
    shape_right = MARGIN + left
    grid = shape_right + _GAP
    elements_right = WIDTH - MARGIN
    bars = elements_right - _ELEMENTS - _SHARE - _BARS
    return _Columns(shape_right, grid, bars - _GAP - grid, bars, elements_right)


def _draw_section(
    page: Page, section: _Section, columns: _Columns, top: float, largest: int, total: int
) -> None:
    heading = {"size": SMALL, "color": MUTED, "va": "center"}
    page.text(MARGIN, top - 0.17, section.title, size=TEXT, weight="bold", va="center")
    page.text(columns.shape_right, top - 0.17, "shape", ha="right", **heading)
    if section.columns:
        folded = any(len(column) > 1 for column in section.columns)
        what = "a cell per run of equal layers" if folded else "a cell per layer"
        page.text(columns.grid, top - 0.17, what, **heading)
    page.text(columns.bars, top - 0.17, "share of elements", **heading)
    page.text(columns.elements_right, top - 0.17, "elements", ha="right", **heading)
    height = _ROW * len(section.rows)
    bottom = top - _HEAD - height
    for index, row in enumerate(section.rows):
        middle = top - _HEAD - _ROW * (index + 0.5)
        text = {"size": SMALL, "va": "center"}
        page.text(MARGIN, middle, elided(row["name"], _LABEL), **text)
        page.text(columns.shape_right, middle, shape_text(row["shapes"]), ha="right", **text)
        page.text(columns.elements_right, middle, f"{row['elements']:,}", ha="right", **text)
    count = max(1, len(section.columns))
    width = count * min(columns.grid_width / count, _WIDEST_CELL)
    grid = page.axes(columns.grid, bottom, width, height)
    _draw_cells(grid, section, width)
    bars = page.axes(columns.bars, bottom, _BARS + _SHARE, height)
    _draw_bars(bars, section.rows, largest, total)


def _draw_cells(axes: Axes, section: _Section, width: float) -> None:
    count = max(1, len(section.columns))
    inches = min(width / count, _ROW)
    area = (0.62 * 72 * inches) ** 2
    points: dict[str, tuple[list[int], list[int]]] = {}
    for y, row in enumerate(section.rows):
        states = [_state(row, column[0]) for column in section.columns] or [_outside_state(row)]
        for x, state in enumerate(states):
            xs, ys = points.setdefault(state, ([], []))
            xs.append(x)
            ys.append(y)
    for state, (xs, ys) in points.items():
        _mark(axes, state, xs, ys, area)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(len(section.rows) - 0.5, -0.5)
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    labels = [fold_numbers(column) for column in section.columns]
    step = tick_step(count, width)
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    axes.tick_params(length=2)
    if section.columns:
        axes.set_xlabel("layer", fontsize=SMALL, labelpad=1)


def _outside_state(row: dict[str, Any]) -> str:
    return "touched" if row["touched_tensors"] else "untouched"


def _mark(axes: Axes, state: str, xs: list[int], ys: list[int], area: float) -> None:
    """A purple disc with a white core is changed, a pale triangle partly, a grey square not."""
    if state == "touched":
        axes.scatter(xs, ys, s=1.25 * area, c=PURPLE, marker=SHARED_MARKER, linewidths=0)
        axes.scatter(xs, ys, s=0.14 * area, c="white", marker=SHARED_MARKER, linewidths=0)
    elif state == "partly":
        axes.scatter(
            xs, ys, s=area, c=LIGHT_PURPLE, marker=ONLY_MARKER, linewidths=0.8, edgecolors=PURPLE
        )
    elif state == "untouched":
        axes.scatter(
            xs, ys, s=area, c=UNCHANGED, marker="s", linewidths=0.5, edgecolors=_UNCHANGED_EDGE
        )


def _draw_bars(axes: Axes, rows: list[dict[str, Any]], largest: int, total: int) -> None:
    """Each row's share of the model's elements; the changed part is purple and hatched."""
    scale = _BARS / (_BARS + _SHARE) / max(1, largest)
    for y, row in enumerate(rows):
        touched, rest = row["touched_elements"] * scale, row["elements"] * scale
        axes.barh(y, rest, height=0.62, color=UNCHANGED)
        axes.barh(
            y, touched, height=0.62, color=PURPLE, hatch=HATCH, edgecolor=LIGHT_PURPLE, linewidth=0
        )
        share = 100 * row["elements"] / total
        text = f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"
        axes.text(rest + 0.03, y, text, size=SMALL, va="center")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_axis_off()


def _draw_legend(page: Page, document: dict[str, Any]) -> None:
    if document["adapter"] is None:
        return
    totals = document["totals"]
    touched, all_tensors = totals["touched_tensors"], totals["tensors"]
    rows = [row for stack in document["stacks"] for row in stack["rows"]]
    entries = [
        ("touched", f"changed by the adapter ({touched} tensors)"),
        ("untouched", f"not changed ({all_tensors - touched} tensors)"),
    ]
    if any(row["partly_touched_layers"] for row in rows):
        entries.insert(1, ("partly", "some of the cell's tensors changed"))
    axes = page.axes(MARGIN, 0.12, WIDTH - 2 * MARGIN, 0.3)
    axes.set_xlim(0, WIDTH - 2 * MARGIN)
    axes.set_ylim(1, -1)
    axes.set_axis_off()
    left = 0.1
    for state, text in entries:
        _mark(axes, state, [left], [0], 110)  # type: ignore[list-item]
        axes.text(left + 0.16, 0, text, size=SMALL, va="center")
        left += 0.6 + text_width(text, SMALL)
