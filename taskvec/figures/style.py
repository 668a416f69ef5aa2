"""How every figure looks: page, palette, fonts, and how numbers are written.

A page is laid out in inches, so that a figure neither needs nor waits for a layout engine. Purple
is what the adapter changed and red what it did not; each has its own shape, so that no reader
depends on the colours. Black crosses are what fails the certificate, and nothing else is black.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from taskvec.cli import printable
from taskvec.wording import percent

# Purple and red differ in lightness too, and are told apart with every kind of colour blindness.
PURPLE, RED = "#54278F", "#E34A33"
LIGHT_PURPLE, LIGHT_RED = "#D9CCEB", "#FDD5C6"
BLUE = "#0072B2"  # what is allowed, as against what was measured
INK, MUTED, UNCHANGED, FAINT = "#1A1A1A", "#5F5F5F", "#DEDEDE", "#F4F1F8"
SHARED_MARKER, ONLY_MARKER = "o", "^"
CROSS: dict[str, Any] = {
    "marker": "X", "s": 80, "color": INK, "edgecolors": "white", "linewidths": 0.8, "zorder": 5,
    "clip_on": False,
}  # fmt: skip
HATCH = "////"

_UNBREAKABLE = re.compile(
    r" (?=[%×≥=])|(?<=[≥=‖]) |(?<=\blayer) |(?<=\blayer \d) |(?<=\blayer \d\d) "
)

_LONG_WORD, _LONGEST_WORD, _LONGEST = re.compile(r"\S{61,}"), 60, 600  # of a title, which has names

WIDTH, DPI, MARGIN = 10.0, 150, 0.3
TITLE, TEXT, SMALL = 15.0, 11.0, 9.5

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that it is the same everywhere
    "font.size": TEXT,
    "axes.labelsize": TEXT,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "savefig.dpi": DPI,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a $
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
}


@contextmanager
def style() -> Iterator[None]:
    """The project's look, whatever the user's matplotlibrc says; usable as a decorator."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@dataclass(frozen=True)
class Finding:
    """What a figure shows.

    Attributes:
        title: the finding in one sentence, with its numbers.
        note: how to read the figure, in one line.
        failed: the certificate does not hold.
    """

    title: str
    note: str
    failed: bool = False


class Page:
    """A figure with its finding on top and a body below it that is laid out in inches.

    Args:
        finding: title and note.
        height: of the body, in inches.
    """

    def __init__(self, finding: Finding, height: float) -> None:
        title = _wrapped(finding.title, TITLE, bold=True)
        note = _wrapped(finding.note, TEXT)
        badge = 0.36 if finding.failed else 0.0
        header = 0.78 + badge + 0.28 * title.count("\n") + 0.2 * note.count("\n")
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height + header))
        FigureCanvasAgg(self.figure)
        top = height + header - 0.18
        if finding.failed:
            self.text(
                MARGIN + 0.08,
                top - 0.04,
                "✗ VALIDATION FAILED",
                size=TEXT,
                weight="bold",
                color="white",
                va="top",
                bbox={"facecolor": INK, "edgecolor": INK, "boxstyle": "square,pad=0.28"},
            )
            top -= badge
        self.text(MARGIN, top, title, size=TITLE, weight="bold", va="top", linespacing=1.25)
        top -= 0.28 * title.count("\n") + 0.33
        self.text(MARGIN, top, note, size=TEXT, color=MUTED, va="top", linespacing=1.25)

    def axes(self, left: float, bottom: float, width: float, height: float, **options: Any) -> Axes:
        """Axes at a place in inches from the page's lower left corner."""
        page_width, page_height = self.figure.get_size_inches()
        place = (left / page_width, bottom / page_height, width / page_width, height / page_height)
        return self.figure.add_axes(place, **options)

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        """Text at a place in inches from the page's lower left corner."""
        page_width, page_height = self.figure.get_size_inches()
        self.figure.text(x / page_width, y / page_height, printable(text), **options)

    def save(self, path: Path) -> Figure:
        """Write the figure as PNG; the same document gives the same bytes."""
        self.figure.savefig(path, format="png", metadata={"Software": None})
        return self.figure


def cross_key() -> Line2D:
    """A legend's entry for the crosses."""
    return Line2D(
        [], [], linestyle="", marker="X", markersize=8, color=INK, markeredgewidth=0,
        label="fails the certificate",
    )  # fmt: skip


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of one line of text, in inches."""
    face = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    font = get_font(findfont(face))
    font.set_size(size, 72)
    font.set_text(printable(text), 0.0)
    return float(font.get_width_height()[0]) / 64 / 72


def _wrapped(text: str, size: float, *, bold: bool = False) -> str:
    """Text broken into lines of about equal length that fit the page."""
    text = elided(_LONG_WORD.sub(lambda word: elided(word[0], _LONGEST_WORD), text), _LONGEST)
    text = _UNBREAKABLE.sub("\N{NO-BREAK SPACE}", text)
    room = WIDTH - 2 * MARGIN
    fewest = max(1, math.ceil(text_width(text, size, bold=bold) / room))
    for count in range(fewest, fewest + 5):
        for characters in range(max(1, len(text) // count), len(text) + 1):
            lines = textwrap.wrap(text, characters, break_on_hyphens=False)
            if len(lines) <= count:
                break
        if all(text_width(line, size, bold=bold) <= room for line in lines):
            return "\n".join(lines)
    return text


def elided(text: str, most: int = 34) -> str:
    """A name out of a file as it may be drawn: one line, without control codes, cut in its middle.

    Args:
        most: characters.
    """
    text = printable(text.replace("\n", "?"))
    if len(text) <= most:
        return text
    head = (most - 1) // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def fitted(text: str, inches: float, size: float) -> str:
    """A name as it may be drawn, cut in its middle to a width."""
    text = elided(text)
    for most in range(len(text), 4, -1):
        if text_width(elided(text, most), size) <= inches:
            return elided(text, most)
    return elided(text, 4)


def tick_step(count: int, inches: float, smallest: float = 0.3) -> int:
    """Every how many of ``count`` ticks gets a label, so that labels keep their distance."""
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500):
        if inches * step >= smallest * count:
            return step
    return max(1, count)


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Limits for a log axis around positive values, a little wider than they are."""
    positive = [value for value in values if value > 0]
    if not positive:
        return 0.1, 10.0
    low, high = math.log10(min(positive)), math.log10(max(positive))
    room = max(0.12 * (high - low), 0.2)
    return float(10 ** (low - room)), float(10 ** (high + room))


def label_log_axis(
    axis: Axis, limits: tuple[float, float], most: int, *, zero: float | None = None
) -> None:
    """At most so many labels, at 1, 2 and 5 times powers of ten where decades alone are too few.

    Args:
        zero: where values of zero are drawn; labelled so.
    """
    low, high = (math.log10(limit) for limit in limits)
    powers = range(math.floor(low), math.ceil(high) + 1)

    def ticks(*factors: int) -> list[float]:
        values = [factor * 10.0**power for power in powers for factor in factors]
        return [value for value in values if limits[0] <= value <= limits[1]]

    inside = next((t for t in (ticks(1, 2, 5), ticks(1, 3)) if len(t) <= most), ticks(1))
    inside = inside[:: math.ceil(len(inside) / most) or 1]
    if len(inside) < 2:
        inside = ticks(1, 2, 3, 5, 7)
    labels = [scientific(tick, 0) for tick in inside]
    if zero is not None:
        inside, labels = [zero, *inside], ["0", *labels]
    axis.set_ticks(inside, labels=labels)
    axis.set_minor_locator(NullLocator())


def scientific(value: float, digits: int = 1) -> str:
    """A number as 1.2×10⁻⁵; plain where it is short enough."""
    if 100 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    if value == 0 or 1e-3 <= abs(value) < 100:
        return f"{float(f'{value:.{digits}e}'):g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    if mantissa == "1":
        return f"10{superscript(int(exponent))}"
    return f"{mantissa}×10{superscript(int(exponent))}"


def share(value: float | None) -> str:
    """A share as a percentage, a tiny one as 4.4×10⁻⁸, a dash where it is undefined."""
    if value is None:
        return "–"
    return scientific(value) if 0 < value < 1e-5 else percent(value)


def superscript(number: int) -> str:
    """An integer in raised digits."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def counted(number: float) -> str:
    """A count with three significant digits: 368,640, 614 M, 3.03 B."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
