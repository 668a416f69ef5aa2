"""Whether a figure can be read: no text on another one, none beyond the page."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.figure import Figure


def visible_boxes(figure: Figure) -> list[tuple[str, Any]]:
    """All texts that are drawn, with the boxes that they take."""
    figure.draw_without_rendering()
    texts = list(figure.texts)
    for ax in figure.axes:
        titles = (ax.title, ax._left_title, ax._right_title)
        texts += [*ax.texts, *titles, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if low <= tick.get_loc() <= high:
                    texts += [label for label in (tick.label1, tick.label2) if label.get_visible()]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
    return [
        (text.get_text(), text.get_window_extent())
        for text in texts
        if text.get_visible() and text.get_text().strip()
    ]


def assert_readable(figure: Figure) -> None:
    width, height = figure.canvas.get_width_height()
    boxes = visible_boxes(figure)
    for text, box in boxes:
        assert box.x0 >= 2 and box.y0 >= 2 and box.x1 <= width - 2 and box.y1 <= height - 2, text
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or along <= 1, f"{first!r} lies on {second!r}"
