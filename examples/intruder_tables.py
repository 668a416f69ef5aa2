"""The tables of the intruder experiment, from experiment.json alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from taskvec import cli
from taskvec.wording import table

COMPARED_SCALE = 0.5  # of the intruders, at whose cost the parts are compared


def print_result(content: dict[str, Any]) -> None:
    """Runs, other learning rates and interventions; over several seeds mean and range."""
    seeds = ", ".join(str(seed) for seed in content["seeds"])
    cli.result(
        f"{content['task']}, seeds {seeds}: {content['matrices']} matrices; the base's "
        f"pre-training loss is {content['base_pretraining_loss']:.3f}"
    )
    _print(_runs(content["runs"]))
    correlations = [
        rank_correlation([run for run in content["runs"] if run["seed"] == seed])
        for seed in content["seeds"]
    ]
    shown = ["none" if one is None else f"{one:.2f}" for one in correlations]
    cli.result(
        "Rank correlation of intruders and pre-training loss over the LoRA runs of each seed: "
        + ", ".join(shown)
    )
    cli.result()
    if content["rates"]:
        _print(_rates(content))
        cli.result()
    if content["scaled"]:
        for title, key in (("held-out", "held_out_loss"), ("pre-training", "pretraining_loss")):
            _print(_scales(content["scaled"], title, key))
            cli.result()
        _print(_trade(content["scaled"]))
        cli.result()


def by_label(runs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs that differ in nothing but the seed, together."""
    found = defaultdict(list)
    for run in runs:
        found[run["label"]].append(run)
    return dict(found)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], spec: str) -> str:
    """Mean and, of several values, range: 12.3 (11.0 to 14.5)."""
    shown = format(mean(values), spec)
    if len(values) == 1:
        return shown
    return f"{shown} ({min(values):{spec}} to {max(values):{spec}})"


def rank_correlation(runs: list[dict[str, Any]]) -> float | None:
    """Spearman's, of the intruders at the first epsilon and the pre-training loss, LoRA only.

    None where all runs have the same number of intruders.
    """
    import numpy as np

    lora = [run for run in runs if run["rank"]]
    columns = [[intruders(run) for run in lora], [run["pretraining_loss"] for run in lora]]
    if len(set(columns[0])) == 1:
        return None
    # The rank of a value is its place in order; equal ones share the mean of theirs.
    ranks = [
        [
            (np.array(column) < value).sum() + (np.array(column) == value).sum() / 2
            for value in column
        ]
        for column in columns
    ]
    return float(np.corrcoef(ranks)[0, 1])


def intruders(run: dict[str, Any]) -> int:
    """Their number at the first epsilon."""
    return int(next(iter(run["intruders"].values())))


def gain_at_cost(losses: Sequence[dict[str, float]], cost: float) -> float | None:
    """How far the pre-training loss has fallen where the held-out loss has risen by ``cost``.

    Down from lambda = 1, and linearly between two of them.

    Args:
        losses: by rising lambda, up to 1.

    Returns:
        None where no lambda costs as much, or a cost that is none.
    """
    if cost <= 0:
        return None
    whole = losses[-1]
    before = (0.0, 0.0)
    for one in reversed(losses):
        here = (
            one["held_out_loss"] - whole["held_out_loss"],
            whole["pretraining_loss"] - one["pretraining_loss"],
        )
        if here[0] >= cost:
            share = (cost - before[0]) / (here[0] - before[0])
            return before[1] + share * (here[1] - before[1])
        before = here
    return None


def trade(scaled: dict[str, Any]) -> dict[str, float | None]:
    """Of a run: what its intruders cost and gain at `COMPARED_SCALE`, and the others for that.

    Returns:
        ``cost``, rise of the held-out loss; for each part the fall of the pre-training loss, None
        as by `gain_at_cost`.
    """
    losses = {part["arm"]: part["losses"] for part in scaled["parts"]}
    whole = losses["intruders"][-1]
    half = next(one for one in losses["intruders"] if one["scale"] == COMPARED_SCALE)
    cost = half["held_out_loss"] - whole["held_out_loss"]
    gains: dict[str, float | None] = {arm: gain_at_cost(losses[arm], cost) for arm in losses}
    return {
        "cost": cost,
        **gains,
        "intruders": whole["pretraining_loss"] - half["pretraining_loss"],
    }


def _print(lines: tuple[Sequence[str], list[Sequence[str]]]) -> None:
    for line in table(*lines):
        cli.result(line)


def _runs(runs: list[dict[str, Any]]) -> tuple[Sequence[str], list[Sequence[str]]]:
    epsilons = list(runs[0]["intruders"])
    header = ("run", "steps", "held-out", "pre-training", *(f"ε = {e}" for e in epsilons), "mean")
    rows = [
        (
            label,
            f"{mean([run['steps'] for run in same]):.0f}",
            f"{mean([run['held_out_loss'] for run in same]):.3f}",
            spread([run["pretraining_loss"] for run in same], ".3f"),
            *(spread([run["intruders"][e] for run in same], ".0f") for e in epsilons),
            f"{mean([run['mean_max_similarity'] for run in same]):.3f}",
        )
        for label, same in by_label(runs).items()
    ]
    return header, list(rows)


def _rates(content: dict[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    epsilons = list(content["rates"][0]["intruders"])
    header = (
        f"seed {content['seeds'][0]}", "learning rate", "steps", "held-out", "pre-training",
        *(f"ε = {e}" for e in epsilons),
    )  # fmt: skip
    rows = [
        (
            name,
            f"{run['learning_rate']:g}",
            str(run["steps"]),
            f"{run['held_out_loss']:.3f}",
            f"{run['pretraining_loss']:.3f}",
            *(str(run["intruders"][e]) for e in epsilons),
        )
        for name, runs in by_rate(content).items()
        for run in runs
    ]
    return header, list(rows)


def by_rate(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What was trained at several learning rates, with the first seed, by rising rate."""
    found = {}
    for other in content["rates"]:
        name = other["label"].split("_rate")[0]
        same = [
            run
            for run in (*content["runs"], *content["rates"])
            if run["label"].split("_rate")[0] == name and run["seed"] == content["seeds"][0]
        ]
        found[name] = sorted(same, key=lambda run: float(run["learning_rate"]))
    return found


def _scales(
    scaled: list[dict[str, Any]], title: str, key: str
) -> tuple[Sequence[str], list[Sequence[str]]]:
    scales = [one["scale"] for one in scaled[0]["parts"][0]["losses"]]
    header = (f"{title} loss", "triplets", "norm", *(f"λ = {scale:g}" for scale in scales))
    rows = []
    for label, same in by_label(scaled).items():
        for arm in _arms(scaled):
            parts = [part for one in same for part in one["parts"] if part["arm"] == arm]
            triplets, norm = (mean([part[what] for part in parts]) for what in ("triplets", "norm"))
            columns = zip(*(part["losses"] for part in parts), strict=True)
            means = [f"{mean([one[key] for one in column]):.3f}" for column in columns]
            rows.append((f"{label}, {arm}", f"{triplets:.0f}", f"{norm:.1f}", *means))
    return header, list(rows)


def _arms(scaled: list[dict[str, Any]]) -> list[str]:
    return [part["arm"] for part in scaled[0]["parts"]]


def _trade(scaled: list[dict[str, Any]]) -> tuple[Sequence[str], list[Sequence[str]]]:
    header = (
        f"as intruders at λ = {COMPARED_SCALE:g}",
        "rise of held-out",
        *(f"fall by {arm}" for arm in _arms(scaled)),
    )
    rows = []
    for label, same in by_label(scaled).items():
        found = [trade(one) for one in same]
        cells = []
        for key in ("cost", *_arms(scaled)):
            values = [value for one in found if (value := one[key]) is not None]
            cells.append(spread(values, ".3f") if len(values) == len(found) else "-")
        rows.append((label, *cells))
    return header, list(rows)
