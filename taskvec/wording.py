"""Numbers and lists as people read them, in tables, sentences and reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: list[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest]).rstrip()

    return [line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])]


def number(value: float | None, spec: str = ".3e") -> str:
    """A number, or a dash where it is undefined."""
    return "-" if value is None else format(value, spec)


def percent(share: float) -> str:
    """A share as a percentage; never "100 %" of something that is not whole."""
    value = 100 * share
    if 99.995 <= value < 100:
        return f"{math.floor(value * 1e6) / 1e6:.8g} %"
    return f"{value:.3g} %" if value < 10 else f"{value:.4g} %"


def size(nbytes: float) -> str:
    """Bytes in decimal units."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    exponent = min(3, int(math.log10(nbytes) // 3))
    return f"{nbytes / 1000**exponent:.2f} {('B', 'kB', 'MB', 'GB')[exponent]}"


def are(count: int, what: str) -> str:
    """A number of things, with the noun and the verb in its number: "1 element is"."""
    return f"1 {what} is" if count == 1 else f"{count:,} {what}s are"


def listed(names: Sequence[str], most: int = 3) -> str:
    """A few names, or the number of them and the first ones."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{len(names)} parameters ({shown}, ...)"
