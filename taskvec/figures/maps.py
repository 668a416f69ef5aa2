"""The figures that map the model: what changed and by how much, and what the adapter covers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from taskvec.figures import titles as titles
from taskvec.figures.grid import STILL, GridPage
from taskvec.figures.style import (
    INK,
    MUTED,
    PURPLE,
    RED,
    SMALL,
    UNCHANGED,
    counted,
    scientific,
    style,
)
from taskvec.figures.titles import Document
from taskvec.wording import percent, size

# The two ramps share one scale: light is a small change and dark a large one.
_SHARED_RAMP = LinearSegmentedColormap.from_list("shared", ["#BFA8DF", "#8B63C4", "#3B1370"])
_ONLY_RAMP = LinearSegmentedColormap.from_list("only", ["#FBBBA4", "#F2654A", "#9C1A0E"])
_SCALES = ("● changed by the adapter", "▲ changed without it")
_STILL = "#F0F0F0"


@style()
def modification_heatmap(content: Document, path: Path) -> Figure:
    """Root mean square of the task vector of every parameter, by kind of parameter and layer."""
    parameters = content["parameters"]
    changes = {name: _rms(entry) for name, entry in parameters.items()}
    low, high = _whole_decades([change for change in changes.values() if change > 0])

    def painter(name: str) -> Sequence[float]:
        if not parameters[name]["nonzero_elements"]:
            return _rgb(_STILL)
        ramp = _SHARED_RAMP if parameters[name]["lora"] else _ONLY_RAMP
        position = math.log10(max(changes[name], low) / low) / math.log10(high / low)
        return _rgb(ramp(position))

    failed = titles.flagged(content)
    sheet = GridPage(
        titles.modification_heatmap(content),
        parameters,
        below=1.35,
        row_note=lambda names: _cause(content, names, failed),
        foot=_SCALES,
    )
    still = [name for name, entry in parameters.items() if not entry["nonzero_elements"]]
    sheet.paint(painter, failed, still)
    _draw_scale(sheet, low, high)
    return sheet.page.save(path)


def _cause(content: Document, names: Sequence[str], failed: Sequence[str]) -> tuple[str, str]:
    """Why the parameters of a row changed, for readers who cannot tell the colours apart."""
    wrong = len(set(names) & set(failed))
    if wrong:
        return "✗ failed" if len(names) == 1 else f"✗ {wrong} of {len(names)} failed", INK
    changed = [
        entry for entry in map(content["parameters"].get, names) if entry["nonzero_elements"]
    ]
    if not changed:
        return "unchanged", MUTED
    return ("● adapter", PURPLE) if any(e["lora"] for e in changed) else ("▲ rounding", RED)


def _rgb(color: Any) -> Sequence[float]:
    red, green, blue = to_rgb(color)
    return red, green, blue


def _rms(entry: dict[str, Any]) -> float:
    """‖T‖ / √n: the root mean square change of one weight of a parameter."""
    return float(entry["task_vector_norm"] / math.sqrt(max(entry["elements"], 1)))


def _whole_decades(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 1e-6, 1e-3
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return float(10.0**low), float(10.0 ** max(high, low + 1))


def _draw_scale(sheet: GridPage, low: float, high: float) -> None:
    """Both ramps on one log axis, and what a grey cell and a cross mean."""
    width = min(sheet.width, 4.2)
    ax = sheet.page.axes(sheet.left, 0.55, width, 0.44)
    steps = np.linspace(0, 1, 128)
    ramps = np.stack([_SHARED_RAMP(steps), _ONLY_RAMP(steps)])
    span = (math.log10(low), math.log10(high))
    ax.imshow(ramps, aspect="auto", extent=(*span, 1.5, -0.5))
    ax.set_yticks([0, 1], _SCALES)
    every = max(1, math.ceil((span[1] - span[0]) / 6))
    ticks = range(round(span[0]), round(span[1]) + 1, every)
    ax.set_xticks(ticks, [scientific(10.0**tick, 0) for tick in ticks])
    ax.set_xlabel("root mean square change of one weight")
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    key = sheet.page.axes(sheet.left + width + 0.35, 0.77, 0.22, 0.22, facecolor=_STILL)
    key.scatter([0.5], [0.5], **STILL)
    key.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    key.spines[:].set_visible(False)
    sheet.page.text(sheet.left + width + 0.65, 0.88, "unchanged", size=SMALL, va="center")


_SHARES = ("tensors touched", "elements touched", "bytes stored")


@style()
def architecture_coverage(content: Document, path: Path) -> Figure:
    """What of the model the adapter touches, cell by cell, and the shares in one view."""
    parameters = content["parameters"]
    chosen = titles.adapted(content)

    failed = set(titles.flagged(content))

    def row_note(names: Sequence[str]) -> tuple[str, str]:
        shapes = _shapes(parameters, names)
        wrong, touched = failed.intersection(names), chosen.keys() & set(names)
        if wrong:
            return f"{shapes}  ✗ {len(wrong)} of {len(names)} failed", INK
        if not touched:
            return shapes, MUTED
        ranks = sorted({rank for name in touched if (rank := chosen[name]["lora"]["rank"])})
        if not ranks:
            kinds = sorted({chosen[name]["lora"]["kind"] for name in touched})
            return f"{shapes}  ● {len(touched)} {', '.join(kinds)}", PURPLE
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        return f"{shapes}  ● {len(touched)} at rank {rank}", PURPLE

    sheet = GridPage(
        titles.architecture_coverage(content),
        parameters,
        below=1.95,
        row_note=row_note,
        foot=_SHARES,
    )
    sheet.paint(lambda name: _rgb(PURPLE if name in chosen else UNCHANGED), list(failed))
    _draw_shares(sheet, content)
    return sheet.page.save(path)


def _shapes(parameters: Mapping[str, dict[str, Any]], names: Sequence[str]) -> str:
    shapes = {tuple(parameters[name]["shape"]) for name in names}
    return "×".join(map(str, shapes.pop())) if len(shapes) == 1 else "several shapes"


def _draw_shares(sheet: GridPage, content: Document) -> None:
    """Three bars: the adapter's share of the tensors, of the elements and of the bytes."""
    storage, parameters = content["summary"]["storage"], content["parameters"]
    chosen = titles.adapted(content)
    elements = sum(entry["elements"] for entry in parameters.values())
    touched = sum(entry["elements"] for entry in chosen.values())
    adapter, dense = storage["adapter_bytes"], storage["dense_task_vector_bytes"]
    bars = {
        "tensors touched": (
            len(chosen),
            len(parameters),
            f"{len(chosen):,}",
            f"{len(parameters):,}",
        ),
        _SHARES[1]: (touched, elements, counted(touched), counted(elements)),
        _SHARES[2]: (adapter, dense, size(adapter), size(dense)),
    }
    ax = sheet.page.axes(sheet.left, 0.6, sheet.width, 0.9)
    for row, (part, whole, part_text, whole_text) in enumerate(bars.values()):
        share = part / whole if whole else 0.0
        filled = min(100 * share, 100.0)
        ax.barh(row, 100, height=0.7, color=UNCHANGED)
        ax.barh(row, filled, height=0.7, color=PURPLE)
        text = f"{percent(share)}   {part_text} of {whole_text}"
        if filled < 45:
            ax.text(filled + 1.2, row, text, va="center")
        else:
            ax.text(filled - 1.2, row, text, va="center", ha="right", color="white")
    ax.set_yticks(range(len(bars)), list(bars))
    ax.set(xlim=(0, 100), ylim=(2.5, -0.5), xlabel="adapter's share of the model, %")
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
