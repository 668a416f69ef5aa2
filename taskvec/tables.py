"""Rows of values as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV: UTF-8, commas, the columns' names first; None is an empty cell.

    Numbers are written in full, so that a spreadsheet sorts exactly what the JSON holds; lists,
    such as shapes, are written as ``3072x256``. Keys of a row that are no column are left out.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell(row[column]) for column in columns])


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list) else value
