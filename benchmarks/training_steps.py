#!/usr/bin/env python3
"""Time the optimiser steps of one way of training, in this process, and print JSON.

    python benchmarks/training_steps.py --base_model examples/starcoder2-mini --backend scratch

The steps are those of finetune_lora.py, on random token ids. training_speed.py runs this for
several ways and compares them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from taskvec import cli
from taskvec.flag_values import whole

RANK = 8


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    parser.add_argument("--base_model", required=True, metavar="DIR", help="what is trained")
    parser.add_argument("--backend", choices=["scratch", "peft"], help="of LoRA (default: full)")
    parser.add_argument("--target_modules", nargs="+", default=["q_proj", "v_proj"], metavar="NAME")
    parser.add_argument("--steps", type=whole(2), default=10, metavar="N", help="(default: 10)")
    parser.add_argument("--batch_size", type=whole(1), default=4, metavar="N", help="(default: 4)")
    parser.add_argument(
        "--sequence_length", type=whole(2), default=128, metavar="N", help="(default: 128)"
    )
    return parser


def time_steps(
    base_model: str,
    backend: str | None,
    target_modules: list[str],
    steps: int,
    batch_size: int,
    sequence_length: int,
) -> dict[str, Any]:
    """Train for some steps, of which the first, which also makes the moments, is not counted.

    Returns:
        tokens per second by the median step, trainable parameters, bytes of the moments, and the
        loss of every step.
    """
    import torch

    from taskvec.lora import LoraSettings
    from taskvec.training.footprint import measured_optimizer_bytes
    from taskvec.training.loop import Run
    from taskvec.training.methods import Method
    from taskvec.training.models import load_model
    from taskvec.training.options import TrainingOptions

    lora = LoraSettings(RANK, 2 * RANK, tuple(target_modules)) if backend else None
    options = TrainingOptions(steps=steps, batch_size=batch_size, sequence_length=sequence_length)
    model = load_model(Path(base_model), False, torch.device("cpu"))
    vocabulary = model.config.vocab_size
    model = Method(lora, backend, base_model, None, False).prepare(model, options.seed, None)
    run = Run(model, options)
    count = 64 * sequence_length
    tokens = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))
    model.train()
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(run.advance(tokens))
        seconds.append(time.perf_counter() - start)
    return {
        "tokens_per_second": batch_size * sequence_length / statistics.median(seconds[1:]),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer_bytes": measured_optimizer_bytes(run.optimizer),
        "losses": losses,
    }


def _body(args: argparse.Namespace) -> int:
    found = time_steps(
        args.base_model,
        args.backend,
        args.target_modules,
        args.steps,
        args.batch_size,
        args.sequence_length,
    )
    cli.result(json.dumps(found))
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
