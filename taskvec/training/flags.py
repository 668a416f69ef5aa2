"""The command line of finetune_lora.py."""

from __future__ import annotations

import argparse
from typing import Any

from taskvec.flag_values import below_one, not_negative, positive, whole
from taskvec.training.options import (
    BACKENDS,
    LEARNING_RATES,
    METHODS,
    PRECISIONS,
    SCHEDULES,
    LoraOptions,
    TrainingOptions,
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All but those that every script has, in groups."""
    lora, training = LoraOptions(), TrainingOptions()
    _add_text(parser.add_argument_group("text"), training)
    _add_output(parser.add_argument_group("output"))
    _add_adapter(parser.add_argument_group("adapter"), lora)
    _add_training(parser.add_argument_group("training"), training)


def _add(group: argparse._ArgumentGroup, flag: str, default: Any, help: str, **kwargs: Any) -> None:
    group.add_argument(flag, default=default, help=f"{help} (default: {default})", **kwargs)


def _add_text(group: argparse._ArgumentGroup, training: TrainingOptions) -> None:
    group.add_argument(
        "--text", nargs="+", metavar="PATH", help="files, or folders that are searched with --glob"
    )
    _add(group, "--glob", "*.txt", "names to look for in a folder", metavar="PATTERN")
    length = training.sequence_length
    _add(group, "--sequence_length", length, "tokens in a window", type=whole(2), metavar="N")


def _add_output(group: argparse._ArgumentGroup) -> None:
    _add(group, "--output_dir", "lora_adapter", "where the adapter or model goes", metavar="DIR")
    group.add_argument(
        "--save_every",
        type=whole(1),
        metavar="N",
        help="steps between checkpoints, OUTPUT_DIR/checkpoint-N (default: none are written)",
    )
    group.add_argument(
        "--keep_checkpoints",
        type=whole(1),
        metavar="N",
        help="only the newest ones (default: all)",
    )
    group.add_argument(
        "--count_only",
        action="store_true",
        help="say what training would take, from the base's config.json alone, and stop",
    )


def _add_adapter(group: argparse._ArgumentGroup, lora: LoraOptions) -> None:
    _add(group, "--method", METHODS[0], "train an adapter or every weight", choices=METHODS)
    _add(group, "--backend", lora.backend, "whose LoRA: the project's or PEFT's", choices=BACKENDS)
    _add(group, "--rank", lora.rank, "rows of A, columns of B", type=whole(1), metavar="R")
    _add(group, "--alpha", lora.alpha, "B A is scaled by alpha / rank", type=whole(1))
    _add(group, "--dropout", lora.dropout, "on the adapter's input", type=below_one)
    group.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank) instead")
    group.add_argument(
        "--target_modules",
        nargs="+",
        metavar="MODULE",
        help="what gets an adapter; all-linear: every linear module but the output head "
        "(default: the attention's projections)",
    )


def _add_training(group: argparse._ArgumentGroup, training: TrainingOptions) -> None:
    _add(group, "--steps", training.steps, "optimiser steps, at most", type=whole(1), metavar="N")
    batch = training.batch_size
    _add(group, "--batch_size", batch, "windows at once", type=whole(1), metavar="N")
    _add(
        group,
        "--gradient_accumulation_steps",
        training.gradient_accumulation_steps,
        "batches in an optimiser step",
        type=whole(1),
        metavar="N",
    )
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    group.add_argument(
        "--learning_rate", type=positive, metavar="RATE", help=f"at its peak (default: {rates})"
    )
    _add(group, "--schedule", training.schedule, "after the warm-up", choices=SCHEDULES)
    group.add_argument(
        "--warmup_steps",
        type=whole(0),
        metavar="N",
        help="steps until the peak (default: one in twenty)",
    )
    decay = training.weight_decay
    _add(group, "--weight_decay", decay, "AdamW's, on matrices", type=not_negative)
    group.add_argument(
        "--eval_every",
        type=whole(1),
        metavar="N",
        help="steps between measurements of the held-out loss (default: a tenth of --steps)",
    )
    group.add_argument(
        "--until_loss",
        type=positive,
        metavar="LOSS",
        help="stop when the held-out loss is measured at or below this; exit status 1 if it never "
        "is",
    )
    _add(
        group,
        "--mixed_precision",
        training.mixed_precision,
        "format of the matmuls, on a GPU",
        choices=PRECISIONS,
    )
    _add(group, "--seed", training.seed, "of A and of the batches", type=whole(0), metavar="N")
