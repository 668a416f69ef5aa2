"""A model drawn as a grid: a row per kind of parameter, a column per layer, a cell per parameter.

Works from names alone, so for any architecture: what stands outside numbered layers is drawn in
cells of its own below the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from taskvec.architecture import is_index
from taskvec.figures import titles as titles
from taskvec.figures.style import (
    CROSS,
    MARGIN,
    MUTED,
    SMALL,
    WIDTH,
    Finding,
    Page,
    elided,
    text_width,
    tick_step,
)

_BLOCKS = ("attention", "mlp", "norm", "embedding", "other")
_MOST_LABELLED = 16  # more parameters than this outside the layers get cells without names
_ROW, _TALLEST, _AXIS, _GAP = 0.235, 8.0, 0.5, 0.3  # in inches


@dataclass(frozen=True)
class Grid:
    """Where each parameter is drawn.

    Attributes:
        labels: one per row.
        layers: the layer of each column.
        cells: (row, column) of each parameter inside a layer, by name.
        breaks: rows before which another block of the layer begins.
        outside: the parameters outside numbered layers.
    """

    labels: list[str]
    layers: list[int]
    cells: dict[str, tuple[int, int]]
    breaks: list[int]
    outside: list[str]

    def members(self) -> list[list[str]]:
        """The parameters of each row."""
        rows: list[list[str]] = [[] for _ in self.labels]
        for name, (row, _) in self.cells.items():
            rows[row].append(name)
        return rows


def layer_grid(parameters: Mapping[str, dict[str, Any]]) -> Grid:
    """The grid of a model's parameters, attention first and weights before biases."""
    layers = sorted({entry["layer"] for entry in parameters.values()} - {None})
    column = {layer: index for index, layer in enumerate(layers)}
    blocks: dict[str, str] = {}
    for name, entry in parameters.items():
        if entry["layer"] is not None:
            blocks.setdefault(row_key(name), entry["block"])
    rows = sorted(blocks, key=lambda key: _rank(key, blocks[key]))
    index = {key: position for position, key in enumerate(rows)}
    return Grid(
        labels=_labels(rows),
        layers=layers,
        cells={
            name: (index[row_key(name)], column[entry["layer"]])
            for name, entry in parameters.items()
            if entry["layer"] is not None
        },
        breaks=[
            position
            for position in range(1, len(rows))
            if blocks[rows[position]] != blocks[rows[position - 1]]
        ],
        outside=[name for name, entry in parameters.items() if entry["layer"] is None],
    )


def row_key(name: str) -> str:
    """A parameter's name with its layer's number left open: equal in all layers."""
    parts = name.split(".")
    layer = next((index for index, part in enumerate(parts) if is_index(part)), None)
    if layer is not None:
        parts[layer] = "*"
    return ".".join(parts)


def projection_rank(key: str) -> int:
    """Where a row's projection comes in the order in which a layer computes them."""
    known = titles.PROJECTIONS
    return next((i for i, name in enumerate(known) if name in key.split(".")), len(known))


def _rank(key: str, block: str) -> tuple[int, bool, int]:
    order = _BLOCKS.index(block) if block in _BLOCKS else len(_BLOCKS)
    return order, not key.endswith("weight"), projection_rank(key)


def _labels(keys: Sequence[str]) -> list[str]:
    """What tells the rows apart: what follows the layer's number, if that is enough.

    Where there are several stacks of layers, what tells those apart comes first.
    """
    tails = [key.split("*", 1)[1].lstrip(".") or key for key in keys]
    stacks = [key.split("*", 1)[0].split(".") for key in keys]
    same = 0
    while len({tuple(stack[: same + 1]) for stack in stacks}) == 1 and same < len(stacks[0]) - 1:
        same += 1
    if len(set(tails)) < len(keys):
        tails = [
            f"{stack[min(same, len(stack) - 1)]} {tail.removeprefix('layer.')}"
            for stack, tail in zip(stacks, tails, strict=True)
        ]
    return tails if len(set(tails)) == len(keys) else list(keys)


Painter = Callable[[str], Sequence[float]]  # a parameter's name to the colour of its cell
RowNote = Callable[[Sequence[str]], tuple[str, str]]  # a row's names to a text and its colour

_Marks = Sequence[tuple[set[str], dict[str, Any]]]  # names, and how their mark looks
STILL = {"marker": "_", "s": 18, "color": MUTED, "linewidths": 0.8}


class GridPage:
    """A page with a model's grid, cells coloured by a function of the parameter's name.

    Args:
        finding: title and note.
        parameters: of the document.
        below: inches to leave free at the foot of the page.
        row_note: what to write at the right of a row, given its parameters.
        foot: labels that the foot of the page has on its left.
    """

    def __init__(
        self,
        finding: Finding,
        parameters: Mapping[str, dict[str, Any]],
        *,
        below: float,
        row_note: RowNote,
        foot: Sequence[str] = (),
    ) -> None:
        self.grid = layer_grid(parameters)
        outside, rows = self.grid.outside, len(self.grid.labels)
        self._cell_height = min(_ROW, _TALLEST / max(rows, 1))
        self._labelled = len(outside) <= _MOST_LABELLED
        self._notes = [row_note(names) for names in self.grid.members()]
        self._outside_notes = [row_note([name]) for name in outside] if self._labelled else []
        labels = [elided(text) for text in (*self.grid.labels, *outside, *foot)]
        notes = [text for text, _ in (*self._notes, *self._outside_notes)]
        self.left = MARGIN + 0.12 + max((text_width(text, SMALL) for text in labels), default=0)
        right = 0.15 + max((text_width(text, SMALL) for text in notes), default=0)
        self.width = WIDTH - self.left - right - MARGIN
        columns = 1 if self._labelled else max(1, int(self.width / _ROW))
        self._outside_shape = (math.ceil(len(outside) / columns), columns)
        self._rows_height = rows * self._cell_height
        outside_room = self._outside_shape[0] * _ROW + _GAP if outside else 0.0
        self.page = Page(finding, below + outside_room + (self._rows_height + _AXIS if rows else 0))
        self._outside_bottom = below
        self._grid_bottom = below + outside_room
        self.axes: list[Axes] = []

    def paint(self, painter: Painter, failed: Collection[str], still: Collection[str] = ()) -> None:
        """Draw every parameter's cell, a cross on those that failed and a dash on still ones."""
        marks = ((set(still), STILL), (set(failed), CROSS))
        if self.grid.labels:
            self._paint_layers(painter, marks)
        if self.grid.outside:
            self._paint_outside(painter, marks)

    def _paint_layers(self, painter: Painter, marks: _Marks) -> None:
        grid = self.grid
        ax = self.page.axes(self.left, self._grid_bottom, self.width, self._rows_height)
        cells = _no_cells(len(grid.labels), len(grid.layers))
        for name, (row, column) in grid.cells.items():
            cells[row, column] = (*painter(name), 1.0)
        _show(ax, cells)
        for row in grid.breaks:
            ax.axhline(row - 0.5, color=MUTED, linewidth=0.8)
        _mark(ax, grid.cells, marks)
        self._name_rows(ax)
        step = tick_step(len(grid.layers), self.width)
        ticks = range(0, len(grid.layers), step)
        ax.xaxis.tick_top()
        ax.xaxis.set_label_position("top")
        ax.set_xticks(ticks, [str(grid.layers[tick]) for tick in ticks])
        ax.set_xlabel("layer")
        self.axes.append(ax)

    def _name_rows(self, ax: Axes) -> None:
        """Row names on the left and notes on the right, as many as find room."""
        labels = self.grid.labels
        chosen = range(0, len(labels), math.ceil(0.17 / self._cell_height))
        ax.set_yticks(chosen, [elided(labels[row]) for row in chosen])
        for row in chosen:
            _note_row(ax, len(self.grid.layers), row, self._notes[row])

    def _paint_outside(self, painter: Painter, marks: _Marks) -> None:
        names, (rows, columns) = self.grid.outside, self._outside_shape
        ax = self.page.axes(self.left, self._outside_bottom, _ROW * columns, _ROW * rows)
        cells = _no_cells(rows, columns)
        for index, name in enumerate(names):
            cells[divmod(index, columns)] = (*painter(name), 1.0)
        _show(ax, cells)
        _mark(ax, {name: divmod(i, columns) for i, name in enumerate(names)}, marks)
        ax.set_yticks(
            range(len(names) if self._labelled else 0), map(elided, names if self._labelled else [])
        )
        for row, note in enumerate(self._outside_notes):
            _note_row(ax, 1, row, note)
        where = "outside the layers" if self.grid.layers else "parameters"
        ax.set_title(where, size=SMALL, color=MUTED, loc="left", pad=3)
        ax.set_xticks([])
        self.axes.append(ax)


def _no_cells(rows: int, columns: int) -> NDArray[np.float64]:
    """RGBA of cells that no parameter has filled yet: transparent."""
    return np.zeros((rows, columns, 4))


def _show(ax: Axes, cells: NDArray[np.float64]) -> None:
    """Cells with white lines between them, as far as they are large enough to have some."""
    rows, columns = cells.shape[:2]
    ax.imshow(cells, aspect="auto", interpolation="nearest")
    if rows <= 60 and columns <= 120:
        ax.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, color="white", linewidth=1)
        ax.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, color="white", linewidth=1)
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _mark(ax: Axes, cells: Mapping[str, tuple[int, int]], marks: _Marks) -> None:
    for chosen, look in marks:
        places = [place for name, place in cells.items() if name in chosen]
        if places:
            rows, columns = zip(*places, strict=True)
            ax.scatter(columns, rows, **look)


def _note_row(ax: Axes, columns: int, row: int, note: tuple[str, str]) -> None:
    text, color = note
    ax.annotate(
        text,
        (columns - 0.5, row),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        size=SMALL,
        color=color,
        annotation_clip=False,
    )
