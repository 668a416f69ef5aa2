"""The figures of the intruder experiment, from experiment.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intruder_tables import COMPARED_SCALE, by_label, by_rate, intruders, mean, trade
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from taskvec.figures.style import (
    BLUE,
    INK,
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

Runs = list[dict[str, Any]]

_SCHEDULES: dict[str, dict[str, Any]] = {
    "α = 2r": {"color": PURPLE, "marker": "o", "linestyle": "-"},
    "α = 8": {"color": BLUE, "marker": "s", "linestyle": "--"},
}
_FULL: dict[str, Any] = {"color": RED, "marker": "^", "linestyle": ":"}
_SLOW: dict[str, Any] = {
    "color": PURPLE, "marker": "o", "linestyle": "", "markerfacecolor": "white",
}  # fmt: skip
_SMALL_MARK = {"markersize": 3.5, "alpha": 0.55, "markeredgewidth": 0}
_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "intruders": ("intruders", {"color": PURPLE, "marker": "o", "linestyle": "-"}),
    "others": ("as many other directions", {"color": BLUE, "marker": "s", "linestyle": "--"}),
    "update": ("the whole update", {"color": RED, "marker": "^", "linestyle": ":"}),
}
_FEW = 3  # intruders in all matrices: differences between ranks mean nothing
_CROWDED = 0.1  # of the axis: a number so near to the last one is left out


@style()
def draw(content: dict[str, Any], path: Path) -> Figure:
    """Intruders against rank and against learning rate; forgetting against intruders."""
    page = Page(_finding(content), 4.15)
    axes = _three_axes(page)
    _draw_ranks(axes[0], content)
    _draw_rates(axes[1], content)
    _draw_forgetting(axes[2], content)
    top = max(run["rank"] for run in content["runs"])
    handles = [
        *(Line2D([], [], label=label, **look) for label, look in _SCHEDULES.items()),
        Line2D([], [], label=f"α = 2r at r = {top}, a tenth of the rate", **_SLOW),
        Line2D([], [], label="full fine-tuning", **_FULL),
    ]
    where = {"loc": "lower left", "bbox_to_anchor": ((MARGIN + 0.5) / WIDTH, 0)}
    page.figure.legend(handles=handles, ncols=4, **where)
    return page.save(path)


@style()
def draw_scaling(content: dict[str, Any], path: Path) -> Figure:
    """Pre-training loss against held-out loss, while lambda scales each part: a panel per rank."""
    page = Page(_scaling_finding(content), 4.15)
    panels = by_label(content["scaled"])
    for ax, same in zip(_three_axes(page), list(panels.values())[:3], strict=False):
        _draw_trade(ax, same)
        ax.axhline(content["base_pretraining_loss"], color=MUTED, linewidth=0.8)
        ax.set_title(f"r = {same[0]['rank']}, α = {2 * same[0]['rank']}", size=TEXT, loc="left")
    handles = [Line2D([], [], label=name, **look) for name, look in _ARMS.values()]
    handles.append(Line2D([], [], label="λ = 1: nothing scaled", **_WHOLE))
    handles.append(Line2D([], [], label="the base", color=MUTED, linewidth=0.8))
    where = {"loc": "lower left", "bbox_to_anchor": ((MARGIN + 0.2) / WIDTH, 0)}
    page.figure.legend(handles=handles, ncols=5, **where)
    return page.save(path)


def _three_axes(page: Page) -> list[Axes]:
    wide = (WIDTH - 2 * MARGIN - 0.7 - 2 * 0.85) / 3
    return [page.axes(MARGIN + 0.6 + place * (wide + 0.85), 1.1, wide, 2.7) for place in range(3)]


def _schedule(content: dict[str, Any], name: str) -> list[Runs]:
    """The runs of a schedule of alpha, by rising rank, each with all of its seeds."""
    runs = [
        run
        for run in content["runs"]
        if run["rank"]
        and run["alpha"] == (2 * run["rank"] if name == "α = 2r" else 8)
        and run["rate"] == 1
    ]
    return list(by_label(runs).values())


def _full(content: dict[str, Any]) -> Runs:
    return [run for run in content["runs"] if not run["rank"]]


def _slow(content: dict[str, Any]) -> Runs:
    """The runs of the largest rank at a tenth of the learning rate."""
    return [run for run in content["runs"] if run["rate"] != 1]


def _mean_intruders(same: Runs) -> float:
    return mean([intruders(run) for run in same])


def _draw_ranks(ax: Axes, content: dict[str, Any]) -> None:
    for name, look in _SCHEDULES.items():
        groups = _schedule(content, name)
        ranks = [same[0]["rank"] for same in groups]
        ax.plot(ranks, [_mean_intruders(same) for same in groups], **look)
        _draw_ranges(ax, ranks, groups, look["color"])
    slow, full = _slow(content), _full(content)
    top = slow[0]["rank"]
    ax.plot(top, _mean_intruders(slow), **_SLOW)
    ax.axhline(_mean_intruders(full), color=RED, linestyle=":")
    ax.plot(top * 2, _mean_intruders(full), **_FULL, clip_on=False)
    ranks = sorted({run["rank"] for run in content["runs"] if run["rank"]})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.minorticks_off()
    ax.set(xlabel="rank r", ylabel="intruder dimensions")
    ax.set_xlim(right=top * 2)
    _count_upwards(ax)
    ax.set_title("at the same held-out loss", size=TEXT, loc="left")
    ax.grid(axis="y")


def _count_upwards(ax: Axes) -> None:
    """From zero, which is not on the edge, to one at least."""
    top = max(1.0, ax.get_ylim()[1])
    ax.set_ylim(-0.04 * top, top)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_ranges(ax: Axes, places: Sequence[float], groups: list[Runs], color: str) -> None:
    """A bar from the fewest to the most of any seed."""
    for x, same in zip(places, groups, strict=True):
        counts = [intruders(run) for run in same]
        ax.plot([x, x], [min(counts), max(counts)], color=color, linewidth=3, alpha=0.35, zorder=1)


def _draw_rates(ax: Axes, content: dict[str, Any]) -> None:
    """One line per rank at alpha = 2r, and one for full fine-tuning, of the first seed.

    What did not come down to the target is left out; the note says so.
    """
    target = content["target_held_out_loss"]
    groups = [
        [run for run in runs if run["held_out_loss"] <= target]
        for runs in by_rate(content).values()
    ]
    ends: dict[tuple[float, int], list[str]] = {}
    for runs in filter(None, groups):
        look = _SCHEDULES["α = 2r"] if runs[0]["rank"] else _FULL
        rates, counts = [run["rate"] for run in runs], [intruders(run) for run in runs]
        ax.plot(rates, counts, **look)
        if runs[0]["rank"]:
            ends.setdefault((rates[-1], counts[-1]), []).append(str(runs[0]["rank"]))
    for end, ranks in ends.items():
        ax.annotate(
            ", ".join(ranks), end, xytext=(6, 0), size=SMALL - 1.5,
            textcoords="offset points", va="center", color=PURPLE,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    rates = sorted({run["rate"] for runs in groups for run in runs})
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    ax.margins(x=0.12)
    _count_upwards(ax)
    ax.set(xlabel="learning rate (1: as on the left)", ylabel="intruder dimensions")
    ax.set_title("other rates; numbers are ranks", size=TEXT, loc="left")
    ax.grid(axis="y")


def _draw_forgetting(ax: Axes, content: dict[str, Any]) -> None:
    base = content["base_pretraining_loss"]
    most = max(intruders(run) for run in content["runs"])

    def point(same: Runs) -> tuple[float, float]:
        return _mean_intruders(same), mean([run["pretraining_loss"] for run in same]) - base

    def seeds(same: Runs, look: dict[str, Any]) -> None:
        for run in same:
            place = intruders(run), run["pretraining_loss"] - base
            ax.plot(*place, **{**look, "linestyle": "", **_SMALL_MARK})

    for name, look in _SCHEDULES.items():
        above, last = name == "α = 2r", None
        for same in _schedule(content, name):
            seeds(same, look)
            x, y = point(same)
            ax.plot(x, y, **{**look, "linestyle": ""})
            if last is not None and abs(x - last) < _CROWDED * most:
                continue
            last = x
            ax.annotate(
                str(same[0]["rank"]), (x, y), xytext=(0, 5 if above else -12), size=SMALL - 1.5,
                textcoords="offset points", ha="center", color=look["color"],
            )  # fmt: skip
    for same, look in ((_slow(content), _SLOW), (_full(content), _FULL)):
        seeds(same, look)
        ax.plot(*point(same), **{**look, "linestyle": ""})
    ax.set(xlabel="intruder dimensions", ylabel="rise of the pre-training loss")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    ax.margins(x=0.12)
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.set_title("forgetting; numbers are ranks", size=TEXT, loc="left")
    ax.grid(axis="y")


_WHOLE: dict[str, Any] = {"color": INK, "marker": "o", "linestyle": "", "markersize": 5}


def _draw_trade(ax: Axes, same: Runs) -> None:
    for number, (arm, (_, look)) in enumerate(_ARMS.items()):
        curves = [
            [(one["held_out_loss"], one["pretraining_loss"]) for one in part["losses"]]
            for run in same
            for part in run["parts"]
            if part["arm"] == arm
        ]
        for curve in curves:
            ax.plot(*zip(*curve, strict=True), color=look["color"], linewidth=0.7, alpha=0.4)
        points = [
            tuple(mean([point[axis] for point in column]) for axis in (0, 1))
            for column in zip(*curves, strict=True)
        ]
        ax.plot(*zip(*points, strict=True), **look, markersize=4.5, zorder=3 + number / 10)
        if arm != "update":
            ax.annotate(
                "λ = 0", points[0], xytext=(5, 2), textcoords="offset points", size=SMALL - 1.5,
                color=look["color"],
            )  # fmt: skip
        if number == 0:
            ax.plot(*points[-1], **_WHOLE, zorder=5)
    ax.set(xlabel="held-out loss", ylabel="pre-training loss")
    ax.grid()


def _finding(content: dict[str, Any]) -> Finding:
    groups = _schedule(content, "α = 2r")
    low, high = groups[0], groups[-1]
    most = max(intruders(run) for run in content["runs"])
    if most < _FEW:
        what = f"more than {most} intruder dimension" if most else "an intruder dimension"
        title = (
            f"{content['task'].capitalize()}: no run of LoRA, and none of full fine-tuning, has "
            f"{what}{'s' if most > 1 else ''}"
        )
    else:
        title = (
            f"{content['task'].capitalize()}: at α = 2r, rank {low[0]['rank']} has "
            f"{_mean_intruders(low):.0f} intruder dimensions and rank {high[0]['rank']} has "
            f"{_mean_intruders(high):.0f}; full fine-tuning has "
            f"{_mean_intruders(_full(content)):.0f}"
        )
    target = content["target_held_out_loss"]
    short = sum(run["held_out_loss"] > target for run in content["runs"])
    all_runs = f"All runs but {short}" if short else "All runs"
    note = (
        f"{content['matrices']} matrices, the first 10 vectors of each, ε = 0.5. {all_runs} end at "
        f"a held-out loss of {target:g} or just below."
    )
    missed = [run for run in content["rates"] if run["held_out_loss"] > target]
    for run in missed:
        what = f"r = {run['rank']}" if run["rank"] else "full fine-tuning"
        note += f" Left out, as it never came there: {what} at {run['rate']:g} times the rate."
    count = len(content["seeds"])
    if count > 1:
        note += (
            f" Means of {count} seeds; bars are their ranges, small marks single seeds. Learning "
            f"rates: seed {content['seeds'][0]}."
        )
    return Finding(title, note)


def _scaling_finding(content: dict[str, Any]) -> Finding:
    same = next(iter(by_label(content["scaled"]).values()))
    trades = [trade(one) for one in same]
    gains = {arm: [value for one in trades if (value := one[arm]) is not None] for arm in _ARMS}
    title = (
        f"Scaling the intruders of rank {same[0]['rank']} by {COMPARED_SCALE:g} changes the "
        f"pre-training loss by {_signed(-mean(gains['intruders']))}"
    )
    if len(gains["update"]) == len(same):
        title += (
            "; scaling the whole update, to the same held-out loss, by "
            f"{_signed(-mean(gains['update']))}"
        )
    scales = [one["scale"] for one in same[0]["parts"][0]["losses"]]
    falling = ", ".join(f"{scale:g}" for scale in reversed(scales[:-1]))
    note = (
        f"{content['task'].capitalize()}. Down and to the left is better. From the black mark on, "
        f"λ = {falling}; the whole update at λ = 0 is the base."
    )
    if len(content["seeds"]) > 1:
        note += f" Means of {len(content['seeds'])} seeds, thin lines single ones."
    return Finding(title, note)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
