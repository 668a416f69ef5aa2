"""The figures that are made of bars: what each precision changes, and rounding errors in ulps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from taskvec.figures import titles as titles
from taskvec.figures.style import (
    BLUE,
    HATCH,
    INK,
    LIGHT_PURPLE,
    LIGHT_RED,
    MARGIN,
    MUTED,
    PURPLE,
    RED,
    SMALL,
    TEXT,
    UNCHANGED,
    WIDTH,
    Page,
    elided,
    label_log_axis,
    style,
    text_width,
)
from taskvec.figures.titles import Document


@style()
def precision_impact(contents: Mapping[str, Document], path: Path) -> Figure:
    """Per precision: which parameters changed and why, and what the merge kept of the update.

    Args:
        contents: the document of the same merge in each precision, by its name.
        path: of the PNG.
    """
    labels = [
        f"{'' if content['summary']['equivalent'] else '✗ '}{elided(name, 24)}\n"
        f"{content['summary']['nonzero_parameters']:,} changed"
        for name, content in contents.items()
    ]
    lines = [line for label in labels for line in label.split("\n")]
    start = MARGIN + 0.1 + max((text_width(line, TEXT, bold=True) for line in lines), default=0)
    tall, foot = 0.72 * max(len(contents), 1), 0.75
    page = Page(titles.precision_impact(contents), tall + foot + 0.4)
    left = page.axes(start, foot, 6.55 - start, tall)
    right = page.axes(MARGIN + 6.65, foot, 1.6, tall)
    total = max((len(content["parameters"]) for content in contents.values()), default=0)
    for row, content in enumerate(contents.values()):
        _draw_composition(left, row, content, (6.55 - start) / max(total, 1))
        summary = content["summary"]
        _draw_kept(right, row, summary["relative_error"] if summary["equivalent"] else None)
    left.set(xlim=(0, max(total, 1)), xlabel=f"parameters of the model (all: {total:,})")
    left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    left.set_yticks(range(len(contents)), labels, size=TEXT, weight="bold")
    right.set(xlim=(0, 100), xlabel="% of the update")
    right.set_yticks([])
    for ax, heading in ((left, "Parameters that changed"), (right, "What the merge kept")):
        ax.set_ylim(len(contents) - 0.5, -0.5)
        ax.spines[["left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.set_title(heading, size=TEXT, weight="bold", loc="left", pad=7)
    return page.save(path)


def _draw_composition(ax: Axes, row: int, content: Document, inches: float) -> None:
    """One stacked bar: the adapter's parameters, artifacts, unexplained ones, unchanged ones.

    Args:
        inches: of the page per parameter.
    """
    changed = [entry for entry in content["parameters"].values() if entry["nonzero_elements"]]
    counts = {
        kind: sum(entry["attribution"] == kind for entry in changed)
        for kind in ("lora", "cast", "unexplained")
    }
    segments = (
        (counts["lora"], "adapter", {"color": PURPLE}, "white"),
        (
            counts["cast"],
            "artifacts: the base's own rounding",
            {"facecolor": LIGHT_RED, "edgecolor": RED, "hatch": HATCH},
            INK,
        ),
        (counts["unexplained"], "unexplained", {"color": INK}, "white"),
        (len(content["parameters"]) - len(changed), "unchanged", {"color": UNCHANGED}, MUTED),
    )
    start = 0
    for count, name, look, ink in segments:
        if not count:
            continue
        ax.barh(row, count, left=start, height=0.62, **look)
        texts = [f"{count:,} {name}", f"{count:,} {name.split(':')[0]}", f"{count:,}"]
        text = _fitting(texts, inches * count)
        box = {"facecolor": LIGHT_RED, "edgecolor": "none", "pad": 1.5} if ink == INK else None
        ax.text(start + count / 2, row, text, color=ink, ha="center", va="center", bbox=box)
        if name == "unexplained" and text != texts[0]:  # a failure is named however thin its bar is
            ax.text(start + count, row - 0.33, f"✗ {texts[0]}", ha="right", va="bottom", size=SMALL)
        start += count


def _draw_kept(ax: Axes, row: int, relative_error: float | None) -> None:
    percent = 0.0 if relative_error is None else max(0.0, 100 * (1 - relative_error))
    ax.barh(row, 100, height=0.62, color=UNCHANGED)
    ax.barh(row, percent, height=0.62, color=PURPLE)
    ax.text(104, row, titles.kept(relative_error), va="center", size=TEXT, weight="bold")


def _fitting(texts: Sequence[str], inches: float) -> str:
    """The first of some texts that fits a width, or none."""
    return next((text for text in texts if text_width(text, TEXT) + 0.12 <= inches), "")


# What a stack of bars of |T - delta| ends with: one bar for all beyond the histogram, and one for
# all elements beyond their own bound, which no place along the axis could show.
_BEYOND, _VIOLATIONS, _RIGHT_END = 3.1, 3.55, 3.95
_FLOOR = 0.7  # of the log axis: a bar of one weight can be seen
_ERROR = {"fill": True, "color": LIGHT_PURPLE, "edgecolor": PURPLE, "label": "error |T − Δ|"}
_BOUND = {"fill": False, "edgecolor": BLUE, "linewidth": 1.4, "label": "its bound"}


@style()
def rounding_errors(contents: Mapping[str, Document], path: Path) -> Figure:
    """Histograms of |T - delta| and of its bound in ulps of the merged weight, per precision.

    Args:
        contents: the document of each precision, by its name.
        path: of the PNG.
    """
    count, foot, gap = max(len(contents), 1), 1.3, 0.75
    tall = 2.9 if count == 1 else 1.6
    page = Page(titles.rounding_errors(contents), foot + count * (tall + gap) - 0.35)
    for index, (precision, content) in enumerate(contents.items()):
        bottom = foot + (count - 1 - index) * (tall + gap)
        ax = page.axes(MARGIN + 0.85, bottom, WIDTH - 2 * MARGIN - 0.9, tall)
        _draw_ulps(ax, precision, content["summary"]["certificate"])
        if index == count - 1:
            ax.set_xlabel("ulps: spacings of the format's numbers at the merged weight")
            ax.legend(loc="upper left", bbox_to_anchor=(-0.01, -0.68 / tall), ncols=3)
    return page.save(path)


def _draw_ulps(ax: Axes, precision: str, certificate: dict[str, Any]) -> None:
    histogram, violations = certificate["ulp_histogram"], certificate["violations"]
    error, bound = histogram["error"], histogram["bound"]
    edges = np.arange(max(len(error), 2)) * histogram["bin_width"]
    for counts, look in ((error, _ERROR), (bound, _BOUND)):
        if counts:
            _bars(ax, counts[:-1], edges, look)
            _bars(ax, counts[-1:], [_BEYOND, _BEYOND + 0.2], {**look, "label": None})
    if violations:
        _bars(ax, [violations], [_VIOLATIONS, _VIOLATIONS + 0.25], {"fill": True, "color": INK})
    top = max([1, violations, *error, *bound]) * 8.0
    ax.axvline(0.5, color=MUTED, linewidth=1.2, linestyle="--", label="½ ulp: one rounding")
    ax.set(yscale="log", ylim=(_FLOOR, top), xlim=(0, _RIGHT_END), ylabel="weights")
    label_log_axis(ax.yaxis, (_FLOOR, top), 5)
    labels = {**{x: f"{x:g}" for x in (0, 0.5, 1, 1.5, 2, 2.5, 3)}}
    labels |= {_BEYOND + 0.1: "> 3", _VIOLATIONS + 0.125: "beyond\nits bound"}
    ax.set_xticks(list(labels), list(labels.values()))
    ax.text(
        _VIOLATIONS + 0.125, max(violations, 1) * 1.3, f"{violations:,}",
        ha="center", va="bottom", weight="bold",
    )  # fmt: skip
    ax.set_title(_panel_title(precision, certificate), size=TEXT, weight="bold", loc="left", pad=4)


def _bars(ax: Axes, counts: Sequence[int], edges: Any, look: dict[str, Any]) -> None:
    """Bars on a log axis, on which an empty bin has none."""
    values = np.where(np.array(counts) > 0, np.array(counts, dtype=float), np.nan)
    ax.stairs(values, edges, baseline=_FLOOR, **look)


def _panel_title(precision: str, certificate: dict[str, Any]) -> str:
    checked, violations = certificate["elements_checked"], certificate["violations"]
    where = titles.format_name(precision)
    if not checked:
        return f"{where}: no adapted weight"
    if violations:
        return f"{where}: ✗ {violations:,} of {checked:,} weights beyond their bound"
    ratio = titles.ratio_text(certificate["max_ratio_to_bound"])
    return f"{where}: {checked:,} weights, the largest error is {ratio} of its bound"
