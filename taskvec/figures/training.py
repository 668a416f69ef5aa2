"""The loss curve of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from taskvec.figures.style import MUTED, PURPLE, Finding, Page, style


@style()
def loss_curve(history: Mapping[str, Sequence[float]], path: Path) -> Figure:
    """Training and held-out loss against the step, from the ``history`` of training_log.json."""
    steps, held_out = history["held_out_steps"], history["held_out_loss"]
    finding = Finding(
        f"Held-out loss {held_out[0]:.3f} → {held_out[-1]:.3f} in {steps[-1]:,} steps",
        "Cross-entropy in nats per predicted token. The held-out text was not trained on; the "
        "training loss is a mean over the steps since the point before.",
    )
    page = Page(finding, 4.4)
    axes = page.axes(0.95, 0.7, 8.6, 3.5)
    axes.plot(
        history["steps"], history["training_loss"], color=MUTED, linewidth=1, label="training"
    )
    axes.plot(steps, held_out, "o-", color=PURPLE, markersize=5, label="held out", clip_on=False)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(0, max(1, steps[-1]))
    axes.grid(axis="y")
    axes.legend(loc="upper right")
    return page.save(path)
