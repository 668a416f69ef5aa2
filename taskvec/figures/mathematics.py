"""The figures of the mathematical analysis, drawn from mathematical_analysis.json alone.

Here are those about single elements; `taskvec.figures.spectra` has those about matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from taskvec.figures.spectra import norms, similarity, spectra
from taskvec.figures.style import (
    BLUE,
    LIGHT_RED,
    MARGIN,
    PURPLE,
    RED,
    SMALL,
    WIDTH,
    Finding,
    Page,
    label_log_axis,
    scientific,
    share,
    style,
)
from taskvec.streamstats import magnitude_edges
from taskvec.wording import percent

Document = dict[str, Any]

_RAMP = LinearSegmentedColormap.from_list("density", ["#EFE9F7", "#8B63C4", "#2A0B5E"])
_UNIFORM = 1 / math.sqrt(12)

CAPTIONS = {
    "task_vector_against_delta.png": "How often |Δ| and |T| occur together, over all elements. On "
    "the diagonal the two are equal; where |Δ| comes below the rounding error (red), T says "
    "nothing of Δ any more and the diagonal dissolves into a cloud.",
    "residual_distribution.png": "Left: the sizes of Δ, of T and of their difference; the gap "
    "between purple and red is the signal-to-noise ratio. Right: the difference in ulps of the "
    "merged weight; rounding once makes it a box from −½ to ½.",
    "singular_spectra.png": "Singular values of T (circles) and of Δ (purple line), medians over "
    "the layers with their range shaded. T follows Δ down to the floor that the number format "
    "predicts (blue) and goes on below it as noise, where Δ has nothing any more.",
    "subspace_similarity.png": "1 − φ(i, j): what share of the span of T's first i and Δ's first j "
    "singular vectors is not common to both, averaged over the layers, on a log scale. Light: the "
    "same directions in the same order. Dark cells on the diagonal: two singular values so close "
    "that noise mixes their vectors. Cell i = j = r tells whether T kept all of Δ's directions; "
    "near 10⁻¹⁶ only float64 itself is seen.",
    "norms_by_layer.png": "‖Δ‖, ‖T‖ and ‖T − Δ‖ of every parameter by layer. Circles on the purple "
    "line are updates that arrived whole; red shows what rounding put on top.",
}


def draw(document: Document, directory: Path) -> dict[str, str]:
    """Draw the figures that the document has the data for; returns their captions by file name."""
    figures: dict[str, Callable[[Document, Path], Figure]] = dict(
        zip(CAPTIONS, (joint_density, residuals, spectra, similarity, norms), strict=True)
    )
    if document["summary"]["spectra"] is None:
        del figures["singular_spectra.png"]
    if not any(module["left_similarity"] for module in document["modules"].values()):
        del figures["subspace_similarity.png"]
    for file, figure in figures.items():
        figure(document, directory / file)
    return {file: CAPTIONS[file] for file in figures}


@style()
def joint_density(document: Document, path: Path) -> Figure:
    """|T| against |delta|, as a two-dimensional histogram on log axes."""
    summary = document["summary"]
    error = summary["residual_norm"] / math.sqrt(max(1, summary["elements"]))
    same = summary["same_sign_share"]
    if same is None:
        title = "Δ is zero everywhere"
    else:
        title = (
            f"T follows Δ where Δ is above the rounding error of {scientific(error)}: "
            f"{percent(same)} of the elements have Δ's sign"
        )
    note = "Elements of all parameters by magnitude; darker is more. Both axes are logarithmic."
    page = Page(Finding(title, note), 5.8)
    ax = page.axes(MARGIN + 1.0, 0.75, 6.9, 4.9)
    counts, x, y = _joint(document["histograms"]["joint"])
    density = counts / np.outer(np.diff(np.log2(x)), np.diff(np.log2(y)))
    norm = LogNorm(10, max(100, float(density.max())))
    ax.pcolormesh(x, y, np.ma.masked_equal(density.T, 0), cmap=_RAMP, norm=norm)
    ax.set(xscale="log", yscale="log", xlabel="|Δ|, weight units", ylabel="|T|, weight units")
    ends = min(x[0], y[0]), max(x[-1], y[-1])
    ax.plot(ends, ends, color=PURPLE, linewidth=1, linestyle=":", label="|T| = |Δ|")
    if error and max(x[0], y[0]) <= error:
        ax.axvline(error, color=RED, linewidth=1.2, linestyle="--", label="rms(T − Δ)")
        ax.axhline(error, color=RED, linewidth=1.2, linestyle="--")
    elif error:
        below = f"rms(T − Δ) = {scientific(error)} lies below this picture"
        ax.text(0.02, 0.95, below, transform=ax.transAxes, color=RED, size=SMALL)
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    for axis, limits in ((ax.xaxis, (x[0], x[-1])), (ax.yaxis, (y[0], y[-1]))):
        label_log_axis(axis, limits, 6)
    ax.legend(loc="lower right")
    bar = page.axes(WIDTH - MARGIN - 0.95, 0.75, 0.22, 4.9)
    scale = page.figure.colorbar(ScalarMappable(norm, _RAMP), cax=bar)
    scale.set_label("elements per square octave", size=SMALL)
    label_log_axis(bar.yaxis, (float(norm.vmin or 1), float(norm.vmax or 2)), 6)
    return page.save(path)


def _joint(joint: dict[str, Any]) -> tuple[NDArray[np.int64], list[float], list[float]]:
    """Counts by (|delta|, |T|) and the bins' edges; what is below 2^-60 and the thin ends are left
    out."""
    counts = np.array([[int(c) for c in line.split()] for line in joint["counts"]], np.int64)
    counts = counts.reshape(len(joint["counts"]), -1)
    first_x, first_y = joint["delta_bins"][0], joint["task_vector_bins"][0]
    if first_x == 0:
        counts, first_x = counts[1:], 1
    if first_y == 0:
        counts, first_y = counts[:, 1:], 1
    if not counts.size or not counts.any():
        return np.zeros((1, 1), np.int64), [0.5, 1.0], [0.5, 1.0]
    left, right = _bulk(counts.sum(1))
    low, high = _bulk(counts.sum(0))
    edges = magnitude_edges()
    x = edges[first_x - 1 + left : first_x + right]
    y = edges[first_y - 1 + low : first_y + high]
    return counts[left:right, low:high], x, y


def _bulk(counts: NDArray[np.int64]) -> tuple[int, int]:
    """The bins that hold all but the rarest elements of each end."""
    rare = counts.sum() * 1e-3
    left = int(np.searchsorted(np.cumsum(counts), rare, side="right"))
    right = len(counts) - int(np.searchsorted(np.cumsum(counts[::-1]), counts.sum() * 1e-6))
    return min(left, right - 1), right


@style()
def residuals(document: Document, path: Path) -> Figure:
    """The distribution of T - delta: its size beside delta's, and in ulps of the merged weight."""
    ulps = document["histograms"]["residual_in_ulps"]
    note = "Left: sizes of elements on a log axis, as shares of all elements per octave."
    if ulps:
        note += " Right: T − Δ in ulps of the merged weight, and the box that one rounding makes."
    page = Page(Finding(_residual_title(document), note), 4.4)
    left = page.axes(MARGIN + 0.75, 0.8, 4.1 if ulps else 8.4, 3.2)
    _draw_sizes(left, document)
    if ulps:
        right = page.axes(WIDTH - MARGIN - 3.8, 0.8, 3.7, 3.2)
        _draw_ulps(right, document, ulps)
    return page.save(path)


def _residual_title(document: Document) -> str:
    summary = document["summary"]
    if not summary["residual_norm"]:
        return "T and Δ are equal in every element"
    if summary["relative_error"] is None:
        return "Δ is zero everywhere: T is not explained by it"
    ratio = f"T differs from Δ by {share(summary['relative_error'])} of ‖Δ‖"
    found = summary["residual_in_ulps"]
    if not found:
        return f"{ratio}, a signal-to-noise ratio of {summary['snr_db']:.1f} dB"
    inside = percent(found["share_within_half"])
    if found["share_within_half"] > 0.999:
        return (
            f"{ratio}, and that is rounding: {inside} of the elements are within half an ulp, "
            f"rms {found['rms']:.3f} where a box has {_UNIFORM:.3f}"
        )
    exact = summary["exact_share"]
    start = f"{percent(exact)} of the elements are exact, " if exact > 0.01 else ""
    return f"{ratio}; {start}{inside} within half an ulp, rms {found['rms']:.3g} ulps"


def _draw_sizes(ax: Axes, document: Document) -> None:
    """|delta|, |T| and |T - delta| on a log axis."""
    joint = document["histograms"]["joint"]
    counts = np.array([[int(c) for c in line.split()] for line in joint["counts"]], np.int64)
    counts = counts.reshape(len(joint["counts"]), -1)
    residual = document["histograms"]["residual_magnitude"]
    series = (
        ("Δ", joint["delta_bins"][0], counts.sum(1), PURPLE, "-"),
        ("T", joint["task_vector_bins"][0], counts.sum(0), PURPLE, ":"),
        ("T − Δ", residual["bins"][0], np.array(residual["counts"], np.int64), RED, "-"),
    )
    edges, total = magnitude_edges(), max(1, document["summary"]["elements"])
    bounds: list[float] = []
    for label, first, found, color, line in series:
        if first == 0:  # zeros, and what is below 2^-60: not on a log axis
            zeros, found, first = int(found[0]) / total, found[1:], 1
            label += f" ({percent(zeros)} are 0)" if zeros else ""
        if not found.sum():
            continue
        start, stop = _bulk(found)
        own = np.array(edges[first - 1 + start : first + stop])
        height = found[start:stop] / total / np.diff(np.log2(own))
        ax.stairs(height, own, color=color, linestyle=line, linewidth=1.8, label=label)
        if color == RED:
            ax.stairs(height, own, color=LIGHT_RED, fill=True, zorder=0)
        bounds += [own[0], own[-1]]
    limits = (min(bounds), max(bounds)) if bounds else (0.1, 1.0)
    ax.set(xscale="log", xlim=limits, xlabel="magnitude, weight units", ylabel="share per octave")
    label_log_axis(ax.xaxis, limits, 5)
    ax.set_ylim(bottom=0)
    if bounds:
        ax.legend(loc="upper left", borderaxespad=0, bbox_to_anchor=(0, 1.12), ncols=3)


def _draw_ulps(ax: Axes, document: Document, ulps: dict[str, Any]) -> None:
    """The distribution of the elements that are not exact, and the share of those that are."""
    counts, bins = np.array(ulps["counts"], np.float64), ulps["bins"]
    elements, exact = document["summary"]["elements"], document["summary"]["exact_share"]
    counts[bins // 2] = max(0.0, counts[bins // 2] - round(exact * elements))
    edges = np.linspace(-ulps["limit"], ulps["limit"], bins + 1)
    density = counts / max(1.0, (1 - exact) * elements) / np.diff(edges)
    ax.stairs(density, edges, color=LIGHT_RED, fill=True)
    ax.stairs(density, edges, color=RED, linewidth=1.5, label="measured, where not exact")
    ax.plot([-0.5, -0.5, 0.5, 0.5], [0, 1, 1, 0], color=BLUE, linewidth=1.5, linestyle="--")
    ax.plot([], [], color=BLUE, linewidth=1.5, linestyle="--", label="one rounding")
    reach = np.abs(edges[:-1][counts > 0]).max(initial=0.5)
    limit = ulps["limit"] if reach > 0.75 else 0.75
    ax.set(xlim=(-limit, limit), xlabel="(T − Δ) / ulp of the merged weight", ylabel="density")
    ax.set_ylim(0, max(1.15, 1.15 * float(density.max(initial=0))))
    if exact > 0.001:
        text = f"{percent(exact)} of the elements are exact"
        ax.text(0.98, 0.95, text, transform=ax.transAxes, ha="right", va="top", size=SMALL)
    ax.legend(loc="upper left", borderaxespad=0, bbox_to_anchor=(-0.05, 1.12), ncols=2)
