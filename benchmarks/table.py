"""What was measured, as a markdown table."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from benchmarks.measure import Measured

HEADER = (
    "step",
    "way",
    "seconds",
    "÷ obvious",
    "÷ cp",
    "limit, s",
    "÷ limit",
    "then to disk, s",
    "peak MB",
    "above torch, MB",
    "read MB",
    "from disk MB",
    "written MB",
)

_EXACT = {"merge": "the merged model", "extract": "the task vector"}


@dataclass(frozen=True)
class Row:
    """One process: which step, which way, what it took.

    Attributes:
        flushed: seconds for the system to put on disk what the process had not put there itself.
    """

    step: str
    way: str
    measured: Measured
    flushed: float


@dataclass(frozen=True)
class WidthResult:
    """Everything that was measured at one width.

    Attributes:
        width: as a fraction of StarCoder2-3B's.
        elements: of the base.
        torch_alone: a process that imports torch and ends.
        moves: bytes that each step cannot but read, and write.
        disagreements: one sentence for each result that the two ways do not share.
    """

    width: float
    elements: int
    precision: str
    torch_alone: Measured
    rows: list[Row]
    moves: dict[str, tuple[int, int]]
    disagreements: list[str]

    def row(self, step: str, way: str | None = None) -> Row | None:
        """What was measured of a step, done in one way or in any."""
        found = (row for row in self.rows if row.step == step and way in (None, row.way))
        return next(found, None)

    def limit(self, step: str) -> float | None:
        """Seconds that a step's bytes take, read as `cat` and written as `cp` does here.

        What a step writes it has read before, as cp does, so that only what it reads beyond that
        is counted at the speed of reading.
        """
        read, copy = self.row("read"), self.row("copy")
        if step not in self.moves or read is None or copy is None:
            return None
        into, out = self.moves[step]
        base = 4 * self.elements
        copied = out / base * (copy.measured.seconds + copy.flushed)
        return copied + max(0, into - out) / base * read.measured.seconds


def markdown(results: list[WidthResult]) -> str:
    """A line about the machine, a table for each width, and one over the widths."""
    parts = [_machine(), *(_width_table(result) for result in results)]
    if len(results) > 1:
        parts.append(_over_widths(results))
    return "\n\n".join(parts)


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    software = ", ".join(
        f"{name} {_version(name)}" for name in ("torch", "transformers", "peft", "safetensors")
    )
    return (
        f"{os.cpu_count()} CPU cores, {memory:.0f} GiB of memory, {platform.system()}, "
        f"Python {platform.python_version()}, {software}."
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _width_table(result: WidthResult) -> str:
    obvious = {row.step: row.measured.seconds for row in result.rows if row.way == "obvious"}
    copy = next(row.measured.seconds for row in result.rows if row.step == "copy")
    lines = [
        f"### Width {result.width:g}: {result.elements:,} parameters, base of "
        f"{4 * result.elements / 1e9:.2f} GB, merged in {result.precision}",
        "",
        _line(HEADER),
        _line(["---"] * 2 + ["---:"] * (len(HEADER) - 2)),
    ]
    lines += [_row(row, obvious, copy, result) for row in result.rows]
    lines += _chain(result, obvious, copy)
    exact = [what for step, what in _EXACT.items() if step in obvious]
    if result.disagreements:
        lines += ["", *(f"**Disagreement:** {sentence}." for sentence in result.disagreements)]
    elif exact:
        lines += ["", f"The two ways agree: the same bits in {' and '.join(exact)}."]
    alone = result.torch_alone
    lines += [
        "",
        f"`import torch` alone: {alone.seconds:.1f} s, peak {alone.peak / 1e6:.0f} MB.",
    ]
    return "\n".join(lines)


def _row(row: Row, obvious: dict[str, float], copy: float, result: WidthResult) -> str:
    measured = row.measured
    compared = row.way != "obvious" and row.step in obvious
    above = (measured.peak - result.torch_alone.peak) / 1e6
    limit = result.limit(row.step)
    return _line(
        [
            row.step,
            row.way,
            f"{measured.seconds:.2f}",
            f"{measured.seconds / obvious[row.step]:.2f}" if compared else "",
            f"{measured.seconds / copy:.2f}",
            *_against(limit, measured.seconds),
            f"{row.flushed:.2f}",
            f"{measured.peak / 1e6:.0f}",
            "" if row.step in ("read", "copy") else f"{above:.0f}",
            *(
                "?" if moved is None else f"{moved / 1e6:.0f}"
                for moved in (measured.read_calls, measured.read_disk, measured.written)
            ),
        ]
    )


def _chain(result: WidthResult, obvious: dict[str, float], copy: float) -> list[str]:
    """The three steps together, where all of them were measured."""
    lines = []
    ways = dict.fromkeys(row.way for row in result.rows if row.step in result.moves)
    for way in ways:
        rows = [row for row in result.rows if row.way == way]
        if len(rows) < 3:
            continue
        seconds = sum(row.measured.seconds for row in rows)
        ratio = f"{seconds / sum(obvious.values()):.2f}" if obvious and way != "obvious" else ""
        limit = sum(result.limit(row.step) or 0.0 for row in rows)
        flushed, peak = sum(row.flushed for row in rows), max(row.measured.peak for row in rows)
        cells = [
            "chain",
            way,
            f"{seconds:.2f}",
            ratio,
            f"{seconds / copy:.2f}",
            *_against(limit, seconds),
            f"{flushed:.2f}",
            f"{peak / 1e6:.0f}",
            f"{(peak - result.torch_alone.peak) / 1e6:.0f}",
            *(_total(rows, pick) for pick in _MOVED),
        ]
        lines.append(_line(cells))
    return lines


def _against(limit: float | None, seconds: float) -> tuple[str, str]:
    return (f"{limit:.2f}", f"{seconds / limit:.2f}") if limit else ("", "")


_MOVED: tuple[Callable[[Measured], int | None], ...] = (
    lambda measured: measured.read_calls,
    lambda measured: measured.read_disk,
    lambda measured: measured.written,
)


def _total(rows: list[Row], pick: Callable[[Measured], int | None]) -> str:
    values = [pick(row.measured) for row in rows]
    known = [value for value in values if value is not None]
    return f"{sum(known) / 1e6:.0f}" if len(known) == len(values) else "?"


def _over_widths(results: list[WidthResult]) -> str:
    """Seconds and peak memory of every step at every width: is time linear, is memory constant?"""
    lines = [
        "### Over the widths: seconds for a GB of the base, and peak MB",
        "",
        _line(["step", "way", *(f"{4 * r.elements / 1e9:.2f} GB" for r in results)]),
        _line(["---"] * 2 + ["---:"] * len(results)),
    ]
    for step, way in dict.fromkeys((row.step, row.way) for r in results for row in r.rows):
        cells = []
        for result in results:
            row = result.row(step, way)
            if row is None:
                cells.append("")
                continue
            per_gb = row.measured.seconds / (4 * result.elements / 1e9)
            cells.append(f"{per_gb:.2f} s, {row.measured.peak / 1e6:.0f} MB")
        lines.append(_line([step, way, *cells]))
    return "\n".join(lines)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
