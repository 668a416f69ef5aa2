"""The figure of the intruder experiment, from experiment.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from taskvec.figures.style import (
    BLUE,
    MARGIN,
    MUTED,
    PURPLE,
    RED,
    SMALL,
    TEXT,
    WIDTH,
    Finding,
    Page,
    style,
)

_SCHEDULES: dict[str, dict[str, Any]] = {
    "α = 2r": {"color": PURPLE, "marker": "o", "linestyle": "-"},
    "α = 8": {"color": BLUE, "marker": "s", "linestyle": "--"},
}
_FULL: dict[str, Any] = {"color": RED, "marker": "^", "linestyle": ":"}
_SLOW: dict[str, Any] = {
    "color": PURPLE, "marker": "o", "linestyle": "", "markerfacecolor": "white",
}  # fmt: skip
_CROWDED = 0.05  # of the axis: a number so near to the last one is left out
_RAMP = ("#B79BDD", "#54278F", "#1F0542", "#8B63C4")


@style()
def draw(content: dict[str, Any], path: Path) -> Figure:
    """Intruders against rank; forgetting against intruders; both losses against lambda."""
    page = Page(_finding(content), 4.15)
    wide = (WIDTH - 2 * MARGIN - 0.7 - 2 * 0.85) / 3
    axes = [page.axes(MARGIN + 0.6 + place * (wide + 0.85), 1.1, wide, 2.7) for place in range(3)]
    _draw_ranks(axes[0], content)
    _draw_forgetting(axes[1], content)
    _draw_scales(axes[2], content)
    handles = [
        *(Line2D([], [], label=label, **look) for label, look in _SCHEDULES.items()),
        Line2D(
            [], [], label=f"α = 2r at r = {_slow(content)['rank']}, a tenth of the rate", **_SLOW
        ),
        Line2D([], [], label="full fine-tuning", **_FULL),
    ]
    where = {"loc": "lower left", "bbox_to_anchor": ((MARGIN + 0.5) / WIDTH, 0)}
    page.figure.legend(handles=handles, ncols=4, **where)
    return page.save(path)


def _schedule(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [
        run
        for run in content["runs"]
        if run["rank"]
        and run["alpha"] == (2 * run["rank"] if name == "α = 2r" else 8)
        and not run["slow"]
    ]


def _full(content: dict[str, Any]) -> dict[str, Any]:
    return next(run for run in content["runs"] if not run["rank"])


def _intruders(run: dict[str, Any]) -> int:
    return int(next(iter(run["intruders"].values())))


def _slow(content: dict[str, Any]) -> dict[str, Any]:
    """The run of the largest rank at a tenth of the learning rate."""
    return next(run for run in content["runs"] if run["slow"])


def _most(content: dict[str, Any]) -> int:
    return max(_intruders(run) for run in content["runs"])


def _draw_ranks(ax: Axes, content: dict[str, Any]) -> None:
    for name, look in _SCHEDULES.items():
        runs = _schedule(content, name)
        ax.plot([run["rank"] for run in runs], [_intruders(run) for run in runs], **look)
    slow = _slow(content)
    ax.plot(slow["rank"], _intruders(slow), **_SLOW)
    full = _intruders(_full(content))
    ax.axhline(full, color=RED, linestyle=":")
    ax.plot(slow["rank"] * 2, full, **_FULL, clip_on=False)
    ranks = sorted({run["rank"] for run in content["runs"] if run["rank"]})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.minorticks_off()
    ax.set(xlabel="rank r", ylabel="intruder dimensions")
    ax.set_xlim(right=slow["rank"] * 2)
    ax.set_ylim(bottom=-0.04 * ax.get_ylim()[1])
    ax.set_title("at the same held-out loss", size=TEXT, loc="left")
    ax.grid(axis="y")


def _draw_forgetting(ax: Axes, content: dict[str, Any]) -> None:
    base = content["base_pretraining_loss"]
    for name, look in _SCHEDULES.items():
        above = name == "α = 2r"
        last = None
        for run in _schedule(content, name):
            point = _intruders(run), run["pretraining_loss"] - base
            ax.plot(*point, **{**look, "linestyle": ""})
            if last is not None and abs(point[0] - last) < _CROWDED * _most(content):
                continue
            last = point[0]
            ax.annotate(
                str(run["rank"]), point, xytext=(0, 5 if above else -12), size=SMALL - 1.5,
                textcoords="offset points", ha="center", color=look["color"],
            )  # fmt: skip
    slow, full = _slow(content), _full(content)
    ax.plot(_intruders(slow), slow["pretraining_loss"] - base, **_SLOW)
    ax.plot(_intruders(full), full["pretraining_loss"] - base, **{**_FULL, "linestyle": ""})
    ax.set(xlabel="intruder dimensions", ylabel="rise of the pre-training loss")
    ax.margins(x=0.12)
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.set_title("forgetting; numbers are ranks", size=TEXT, loc="left")
    ax.grid(axis="y")


def _draw_scales(ax: Axes, content: dict[str, Any]) -> None:
    for number, (label, found) in enumerate(content["scaled"].items()):
        color = _RAMP[number % len(_RAMP)]
        rank = label.split("_")[0].removeprefix("r")
        scales = [one["scale"] for one in found]
        for key, dash in (("held_out_loss", "-"), ("pretraining_loss", "--")):
            losses = [one[key] - found[-1][key] for one in found]
            ax.plot(scales, losses, dash, color=color, marker="o", markersize=3.5)
            if dash == "--":
                continue
            ax.annotate(
                rank, (scales[0], losses[0]), xytext=(-5, 0), textcoords="offset points",
                size=SMALL - 1.5, color=color, ha="right", va="center",
            )  # fmt: skip
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.set(
        xlabel="λ, scale of the intruders (α = 2r)", ylabel="change of the loss", xlim=(-0.12, 1.02)
    )
    ax.set_title("held-out —, pre-training - -", size=TEXT, loc="left")
    ax.grid(axis="y")


def _finding(content: dict[str, Any]) -> Finding:
    runs = _schedule(content, "α = 2r")
    counts = {run["rank"]: _intruders(run) for run in runs}
    full, low, high = _intruders(_full(content)), min(counts), max(counts)
    title = (
        f"{content['task'].capitalize()}: at α = 2r, rank {low} has {counts[low]} intruder "
        f"dimensions and rank {high} has {counts[high]}; full fine-tuning has {full}"
    )
    note = (
        f"{content['matrices']} matrices, the first 10 vectors of each, ε = 0.5. All runs end at a "
        f"held-out loss of {content['target_held_out_loss']:g} or just below."
    )
    return Finding(title, note)
