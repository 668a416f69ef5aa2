"""A validation's JSON documents as one HTML page that needs no other file and no network.

`page/report.html` is the template, with `report.css` and `report.js` beside it; they go into the
page, as do the figures. Every value is escaped: names of parameters come out of files that anybody
may have made. Without JavaScript everything can be read; with it the table of parameters sorts and
filters.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.architecture import fold_names, natural_key
from taskvec.wording import number, percent, size

Document = dict[str, Any]

MOST_ROWS = 20_000  # of parameters; a page of more is too heavy to open
_PAGE = Path(__file__).parent / "page"
_DASH = "–"

KINDS = {
    "lora": "adapter",
    "cast": "base rounded",
    "unchanged": "unchanged",
    "unexplained": "unexplained",
}
_FAILURES = {
    "violated_parameters": "out of bounds",
    "isolated_deviations": "off the recipe",
    "missing_parameters": "not merged",
    "unexplained_parameters": "unexplained",
}


@dataclass(frozen=True)
class Column:
    """A column of the table of parameters.

    Attributes:
        title: of the column, short.
        meaning: what it holds, in a sentence.
        is_number: right-aligned, and sorted by size instead of by name.
    """

    title: str
    meaning: str
    is_number: bool = True


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what it is sorted by (None: it has no value and comes last)."""

    text: str
    key: str | float | None


@dataclass(frozen=True)
class Row:
    """One parameter in one precision."""

    name: str
    label: str
    kind: str
    failed: bool
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI with its size in pixels, and what JSON says of it."""

    file: str
    uri: str
    width: int
    height: int
    text: Mapping[str, str]


# The name of the parameter is the first column, a row's heading.
COLUMNS = (
    Column("Precision", "what was merged, or judged", False),
    Column(
        "Why it changed",
        "by the adapter, because the base was rounded, not at all, or unexplained",
        False,
    ),
    Column(
        "Proof",
        "the recipe that reproduces every bit, or the bound that every element keeps",
        False,
    ),
    Column("Shape", "sorted by elements"),
    Column("Changed", "share of the elements that differ from the base"),
    Column("‖T‖", "norm of the task vector, merged − base"),
    Column("‖Δ‖", "norm of the adapter's delta"),
    Column("Cosine", "of T and Δ"),
    Column("Largest |T−Δ|", "largest absolute difference"),
    Column("Error", "‖T−Δ‖ / ‖Δ‖"),
    Column("Lost", "share of the update's elements that did not move at all"),
    Column("Of bound", "largest |T−Δ| relative to its own bound; above 100 % is no rounding"),
    Column("Outside", "elements beyond their bound"),
)


def validation_page(
    document: Document, comparisons: Mapping[str, Document], images: Mapping[str, bytes]
) -> str:
    """validation_report.html.

    Args:
        document: validation_summary.json (`taskvec.reports.validation.document`).
        comparisons: comparison_results.json by the labels of ``document["precisions"]``.
        images: the PNG of each of ``document["figures"]``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "ratio": _ratio,
        "short": _short,
        "size": size,
    }
    css, js = ((_PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    titles = {label: _title(label, found) for label, found in document["precisions"].items()}
    every = rows(comparisons)
    kept = every[:MOST_ROWS]
    return environment.get_template("report.html").render(
        document=document,
        css=Markup(css),
        js=Markup(js),
        css_hash=_sha256(css),
        js_hash=_sha256(js),
        pictures=_pictures(document["figures"], images),
        columns=COLUMNS,
        rows=kept,
        left_out=len(every) - len(kept),
        kinds={kind: text for kind, text in KINDS.items() if any(r.kind == kind for r in kept)},
        any_failed=any(row.failed for row in every),
        kind_names=KINDS,
        failures=_FAILURES,
        titles=titles,
        precisions=_and(list(titles.values())),
    )


def rows(comparisons: Mapping[str, Document]) -> list[Row]:
    """All parameters in all precisions; those that fail first, layer 2 before layer 10."""
    found = []
    for label, content in comparisons.items():
        certificate = content["summary"]["certificate"]
        failures = {name: text for key, text in _FAILURES.items() for name in certificate[key]}
        title = _title(label, content["summary"])
        parameters = content["parameters"]
        for name in sorted(parameters, key=natural_key):
            entry = parameters[name]
            failure = failures.get(name)
            cells = _cells(title, entry, failure)
            found.append(Row(name, title, entry["attribution"], failure is not None, cells))
    return sorted(found, key=lambda row: not row.failed)


def visible(value: Any) -> Any:
    """Text whose control codes, direction marks and lone surrogates are written out."""
    if not isinstance(value, str) or value.isprintable():
        return value
    # Markup is the page's own: the style sheet and the script, which have line ends.
    if hasattr(value, "__html__"):
        return value
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in value
    )


def _cells(label: str, entry: Document, failure: str | None) -> list[Cell]:
    lora = entry["lora"] or {}
    kind = KINDS[entry["attribution"]]
    if entry["cast_format"]:
        kind = f"{kind} to {entry['cast_format']}"
    elements = entry["elements"]
    share = entry["nonzero_elements"] / elements if elements else 0.0
    shape = "×".join(map(str, entry["shape"])) or "scalar"
    proof = failure or _proof(lora, entry["attribution"])
    return [
        Cell(label, label),
        Cell(kind, kind),
        Cell(proof, proof),
        Cell(shape, elements),
        Cell(percent(share), share),
        _number(entry["task_vector_norm"], ".3e"),
        _number(lora.get("delta_norm"), ".3e"),
        _number(lora.get("cosine_similarity"), ".9f"),
        _number(lora.get("max_absolute_difference"), ".2e"),
        _number(lora.get("relative_error"), ".2e"),
        _share(lora.get("lost_share")),
        _share(lora.get("max_ratio_to_bound")),
        _number(lora.get("violations"), ",d"),
    ]


def _proof(lora: Document, kind: str) -> str:
    if not lora:
        return "bit for bit" if kind in ("cast", "unchanged") else _DASH
    return f"exact: {lora['reproduced_by'][0]}" if lora["reproduced_by"] else "rounding"


def _number(value: float | None, spec: str) -> Cell:
    if value is None:
        return Cell(_DASH, None)
    return Cell("0" if value == 0 else format(value, spec), value)


def _share(value: float | None) -> Cell:
    if value is None:
        return Cell(_DASH, None)
    return Cell(percent(value) if value < 100 else f"{100 * value:.2e} %", value)


def _title(label: str, summary: Document) -> str:
    """A label as people read it: what was given is named by its precision too."""
    precision = str(summary["certificate"]["precision"])
    return precision if label == precision else f"{label}, {precision}"


def _ratio(value: float) -> str:
    """An error relative to its bound; rounded down, so that what holds is never 100 %."""
    return f"{math.floor(value * 1e4) / 100:.2f} % of" if value <= 1 else f"{value:.3g} times"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _pictures(figures: Document, images: Mapping[str, bytes]) -> dict[str | None, list[Picture]]:
    """Figures by the label that they belong to; None has those of all precisions.

    A figure that every precision has alike, or that the figures of all precisions hold too, is
    shown once.
    """
    found: dict[str | None, list[Picture]] = {}
    shown: set[str | bytes] = set()
    for file, text in figures.items():
        data, name = images[file], Path(file).name
        if data in shown or name in shown:
            continue
        shown.add(data)
        if text["label"] is None:
            shown.add(name)
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))  # PNG: IHDR
        uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
        found.setdefault(text["label"], []).append(Picture(file, uri, width, height, text))
    return found


def _short(names: Iterable[str], most: int = 12) -> list[str]:
    """The first names of a list, those of several layers as one, and how many more there are."""
    every = fold_names(names)
    more = len(every) - most
    return [*every[:most], f"… and {more:,} more"] if more > 0 else every


def _sha256(text: str) -> str:
    """A style sheet's or script's hash, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
