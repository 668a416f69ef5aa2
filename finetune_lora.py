#!/usr/bin/env python3
"""Fine-tune a language model on your own text, by LoRA or fully.

    python finetune_lora.py --base_model bigcode/starcoder2-3b --text my_project/ --glob '*.c' \\
        --output_dir my_adapter --steps 500 --save_every 100

LoRA trains an adapter: W stays as it is, and a layer computes W x + (alpha / rank) B A x
(taskvec/lora.py; --backend peft leaves that to PEFT). It is saved in PEFT's format, for
merge_lora.py. --method full trains every weight and writes a model, for extract_task_vectors.py.

Part of the text is held out (whole files where there are ten or more, otherwise the end of each
file), and its loss is measured before, during and after. Causal models learn to predict the next
token, masked ones (BERT, RoBERTa) the tokens that are hidden from them. After an interruption the
same command goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli
from taskvec.output import output_directory, write_json
from taskvec.training.flags import add_flags
from taskvec.training.options import LEARNING_RATES, LoraOptions, TrainingOptions, versions

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    import torch

    from taskvec.training.footprint import Footprint
    from taskvec.training.loop import Run, TrainingHistory
    from taskvec.training.methods import Method

LOG_FILE, CURVE_FILE = "training_log.json", "loss_curve.png"
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class FinetuneResult:
    """What was trained, and how far it got."""

    footprint: Footprint
    history: TrainingHistory
    optimizer_bytes: int  # measured; 0 where no step was needed
    reached: bool  # false where --until_loss was not


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    cli.add_base_model(parser)
    add_flags(parser)
    return parser


def finetune_lora(
    base_model: str,
    text: Sequence[Path],
    output_dir: Path,
    *,
    pattern: str = "*.txt",
    revision: str | None = None,
    lora: LoraOptions | None = None,
    training: TrainingOptions | None = None,
    save_every: int | None = None,
    keep_checkpoints: int | None = None,
    device: torch.device | str = "cpu",
) -> FinetuneResult:
    """Train ``base_model``, or an adapter for it, on ``text`` and save what was trained.

    Args:
        base_model: directory or hub id of a causal or masked language model with its tokenizer.
        text: files, and folders in which files are found by ``pattern``.
        output_dir: absent, empty, or holding an earlier result, which is replaced when this one is
            complete, or the checkpoints of an interrupted run, which is gone on with.
        lora: the adapter; None for full fine-tuning.
        save_every: steps between checkpoints; none are written if None.
        keep_checkpoints: only the newest ones are kept; all if None.

    Raises:
        cli.UserError: no such base or text, too little text, a target module that the base has
            not got, an output directory that holds something else or checkpoints of other
            settings, a loss that diverges.
    """
    import torch

    from taskvec.training import checkpoints, models
    from taskvec.training.footprint import footprint, measured_optimizer_bytes
    from taskvec.training.loop import Run, train
    from taskvec.training.texts import read_corpus, read_texts

    started = time.monotonic()
    training = training or TrainingOptions()
    base_dir, base_hash = models.locate_base(base_model, revision)
    files = read_texts(text, pattern)
    with output_directory(output_dir, is_earlier_output, inputs=[base_dir, *text]) as folder:
        masked = models.is_masked(base_dir)
        tokenizer = models.load_tokenizer(base_dir)
        corpus = read_corpus(files, HELD_OUT_FRACTION, tokenizer, masked)
        settings = checkpoints.settings_of(base_hash, corpus.sha256, lora, training)
        checkpoint = checkpoints.newest(output_dir, settings, (output_dir / LOG_FILE).exists())

        start = checkpoint if checkpoint and lora is None else base_dir
        model = models.load_model(start, masked, torch.device(device))
        models.check_fit(model, corpus, training)
        method = _method(model, base_model, revision, masked, lora)
        model = method.prepare(model, training.seed, checkpoint)
        counted = footprint(model, full=lora is None)
        run = Run(model, training, models.objective(tokenizer, masked))
        if checkpoint:
            checkpoints.restore(run, checkpoint)
            cli.notice(f"going on from {checkpoint}")

        def after_step(run: Run) -> None:
            if save_every and run.step % save_every == 0:
                checkpoints.save(
                    run, output_dir, settings, lambda to: method.save(run.model, tokenizer, to)
                )
                checkpoints.remove_older(output_dir, keep_checkpoints)

        history = train(run, corpus.training, corpus.held_out, after_step)
        method.save(model, tokenizer, folder)
        result = FinetuneResult(
            counted, history, measured_optimizer_bytes(run.optimizer), run.reached
        )
        log = _log(base_model, lora, run, counted) | {"text": corpus.counts()}
        _finish(folder, log | {"seconds": round(time.monotonic() - started, 1)})
        checkpoints.carry_over(output_dir, folder, settings)
    return result


def count(base_model: str, revision: str | None, lora: LoraOptions | None) -> Footprint:
    """What training would take: the model's shapes come from its configuration, without weights.

    Raises:
        cli.UserError: no such configuration, a target module that the base has not got.
    """
    from taskvec.training.footprint import footprint
    from taskvec.training.models import empty_model

    model = empty_model(base_model, revision)
    method = _method(model, base_model, revision, False, lora)
    return footprint(method.prepare(model, 0, None), full=lora is None)


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _finetune, argv)


def _finetune(args: argparse.Namespace) -> int:
    from taskvec.training.footprint import describe

    if args.count_only:
        for line in describe(count(args.base_model, args.revision, _lora_options(args))):
            cli.result(line)
        return cli.EXIT_OK
    if not args.text:
        raise cli.UserError("--text: name a text file, or a folder of them")
    device = cli.pick_device(args.device)
    result = finetune_lora(
        args.base_model,
        [Path(path) for path in args.text],
        Path(args.output_dir),
        pattern=args.glob,
        revision=args.revision,
        lora=_lora_options(args),
        training=_training_options(args, device),
        save_every=args.save_every,
        keep_checkpoints=args.keep_checkpoints,
        device=device,
    )
    for line in describe(result.footprint, result.optimizer_bytes):
        cli.result(line)
    before, after = result.history.loss_before, result.history.loss_after
    steps = result.history.last_step
    cli.result(f"Held-out loss: {before:.4f} -> {after:.4f} nats per token in {steps:,} steps")
    what = "Adapter" if args.method == "lora" else "Model"
    cli.result(f"{what} saved to: {args.output_dir}")
    if not result.reached:
        cli.result(f"--until_loss {args.until_loss:g} was not reached")
        return cli.EXIT_DOES_NOT_HOLD
    return cli.EXIT_OK


def _lora_options(args: argparse.Namespace) -> LoraOptions | None:
    if args.method == "full":
        return None
    targets = tuple(args.target_modules) if args.target_modules else None
    return LoraOptions(
        args.rank, args.alpha, args.dropout, args.rslora, targets, backend=args.backend
    )


def _training_options(args: argparse.Namespace, device: torch.device) -> TrainingOptions:
    options = TrainingOptions(
        steps=args.steps,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        learning_rate=args.learning_rate or LEARNING_RATES[args.method],
        warmup_steps=args.steps // 20 if args.warmup_steps is None else args.warmup_steps,
        weight_decay=args.weight_decay,
        seed=args.seed,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        schedule=args.schedule,
        eval_every=args.eval_every,
        until_loss=args.until_loss,
        mixed_precision=args.mixed_precision,
    )
    if options.mixed_precision != "no" and device.type != "cuda":
        cli.notice(
            f"--mixed_precision {options.mixed_precision} applies to a GPU only: training in fp32 "
            f"on {device}"
        )
        return replace(options, mixed_precision="no")
    return options


def _method(
    model: Any, base_model: str, revision: str | None, masked: bool, lora: LoraOptions | None
) -> Method:
    from taskvec.lora import LoraSettings
    from taskvec.training.methods import Method
    from taskvec.training.models import pick_targets

    if lora is None:
        return Method(None, None, base_model, revision, masked)
    settings = LoraSettings(
        r=lora.rank,
        alpha=lora.alpha,
        target_modules=pick_targets(model, lora.target_modules),
        dropout=lora.dropout,
        rslora=lora.rslora,
    )
    return Method(settings, lora.backend, base_model, revision, masked)


def _log(base_model: str, lora: LoraOptions | None, run: Run, counted: Footprint) -> dict[str, Any]:
    """What `training_log.json` says of a run that is done."""
    from taskvec.training.footprint import memory

    history = run.history
    return {
        "base_model": base_model,
        "method": "lora" if lora else "full",
        "loss": {"before": history.loss_before, "after": history.loss_after},
        "parameters": {
            "trainable": counted.trainable,
            "total": counted.total,
            "trainable_share": counted.share,
        },
        "memory": memory(counted, run.optimizer, run.model.device),
        "lora": asdict(lora) if lora else None,
        "training": asdict(run.options),
        "versions": versions("torch", "transformers", "peft"),
        "history": asdict(history),
    }


def _finish(folder: Path, log: dict[str, Any]) -> None:
    """The loss curve and the log, which names the files of this output."""
    from taskvec.figures.training import loss_curve

    loss_curve(log["history"], folder / CURVE_FILE)
    names = sorted([*(path.name for path in folder.iterdir()), LOG_FILE])
    write_json(folder / LOG_FILE, log | {"files": names})


def is_earlier_output(folder: Path) -> bool:
    """True for what this script wrote: a result with its log, or checkpoints of its own."""
    from taskvec.checkpoint import read_json_object
    from taskvec.training.checkpoints import is_checkpoint

    found = {path.name for path in folder.iterdir() if not is_checkpoint(path)}
    if LOG_FILE not in found:
        return not found
    files = read_json_object(folder / LOG_FILE).get("files")
    return isinstance(files, list) and all(
        name in files and (folder / name).is_file() for name in found
    )


if __name__ == "__main__":
    sys.exit(main())
