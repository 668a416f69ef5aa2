#!/usr/bin/env python3
"""Compare the speed and memory of training: this project's LoRA, PEFT's, and every weight.

    python benchmarks/training_speed.py --models mini 98M

Each way trains the same base on the same tokens in a process of its own, with the optimiser steps
of finetune_lora.py. mini is the bundled base, 98M a StarCoder2 of 12 layers and 768 dimensions with
random weights, which is made for the time of the run (390 MB of disk). Exit status: 0 both LoRAs
have the same losses, 1 they have not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from benchmarks.measure import measure
from taskvec import cli
from taskvec.flag_values import whole
from taskvec.wording import table

if TYPE_CHECKING:  # --help stays fast
    from transformers import Starcoder2Config

ROOT = Path(__file__).resolve().parent.parent
MINI, LARGER = MODELS = ("mini", "98M")
BATCH = {MINI: 4, LARGER: 2}
TARGETS = {
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}
SAME_LOSS = 1e-4  # the sum of both products is rounded in another order


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: both)"
    )
    parser.add_argument("--steps", type=whole(2), default=12, metavar="N", help="(default: 12)")
    return parser


def compare(model: str, steps: int, directory: Path) -> list[dict[str, Any]]:
    """One way of training after the other on one base.

    Returns:
        for each way: name, what `training_steps.time_steps` found, and the process's peak in bytes.
    """
    base = ROOT / "examples" / "starcoder2-mini"
    if model == LARGER:
        base = directory / LARGER
        write_larger_base(base)
    ways: dict[str, list[str]] = {}
    for name, modules in TARGETS.items():
        for backend, word in (("scratch", "this project"), ("peft", "PEFT")):
            flags = ["--backend", backend, "--target_modules", *modules]
            ways[f"LoRA on {name}: {word}"] = flags
    ways["full"] = []
    found = []
    for way, flags in ways.items():
        cli.notice(f"  {model}: {way} ...")
        script = [sys.executable, str(ROOT / "benchmarks" / "training_steps.py")]
        command = [*script, "--base_model", str(base), "--steps", str(steps)]
        measured = measure([*command, "--batch_size", str(BATCH[model]), *flags], directory)
        result = json.loads(measured.output)
        found.append({"way": way, "peak": measured.peak, **result})
    return found


def larger_config() -> Starcoder2Config:
    """A StarCoder2 of 97.6 M parameters."""
    from transformers import Starcoder2Config

    return Starcoder2Config(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        bos_token_id=0,
        eos_token_id=0,
    )


def write_larger_base(directory: Path) -> None:
    """The larger model with transformers' random weights."""
    import torch
    from transformers import Starcoder2ForCausalLM

    torch.manual_seed(0)
    Starcoder2ForCausalLM(larger_config()).save_pretrained(directory)


def same_losses(found: list[dict[str, Any]]) -> bool:
    """Whether this project's LoRA and PEFT's went the same way, step by step."""
    pairs = zip(found[0:-1:2], found[1:-1:2], strict=True)
    return all(
        abs(mine - theirs) <= SAME_LOSS * theirs
        for ours, peft in pairs
        for mine, theirs in zip(ours["losses"], peft["losses"], strict=True)
    )


def print_table(model: str, found: list[dict[str, Any]]) -> None:
    """Speed, peak and moments of every way, and their ratios to full fine-tuning."""
    full = found[-1]
    tokens = f"{BATCH[model]} × 128 tokens a step"
    cli.result(f"{model}, {full['trainable']:,} parameters, {tokens}")
    header = ("way", "trainable", "tokens/s", "÷ full", "peak MB", "÷ full", "AdamW MB", "÷ full")
    rows = [
        (
            one["way"],
            f"{one['trainable']:,}",
            f"{one['tokens_per_second']:.0f}",
            f"{one['tokens_per_second'] / full['tokens_per_second']:.2f}",
            f"{one['peak'] / 1e6:.0f}",
            f"{one['peak'] / full['peak']:.2f}",
            f"{one['optimizer_bytes'] / 1e6:.2f}",
            f"{one['optimizer_bytes'] / full['optimizer_bytes']:.3f}",
        )
        for one in found
    ]
    for line in table(header, rows):
        cli.result(line)
    cli.result(f"same losses: {'yes' if same_losses(found) else 'NO'}")
    cli.result()


def _body(args: argparse.Namespace) -> int:
    same = True
    with tempfile.TemporaryDirectory() as directory:
        for model in dict.fromkeys(args.models):
            found = compare(model, args.steps, Path(directory))
            print_table(model, found)
            same = same and same_losses(found)
    return cli.EXIT_OK if same else cli.EXIT_DOES_NOT_HOLD


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
