#!/usr/bin/env python3
"""Fine-tune a causal language model with LoRA on your own text; the adapter is saved as PEFT's.

    python finetune_lora.py --base_model bigcode/starcoder2-3b --text my_project/ --glob '*.c' \\
        --output_dir my_adapter --steps 500

Only the adapter is trained: W stays as it is, and a layer computes W x + (alpha / rank) B A x.
Part of the text is held out (whole files where there are ten or more, otherwise the end of each
file), and its loss is measured before, during and after.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli
from taskvec.output import output_directory, write_json

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LOG_FILE, CURVE_FILE = "training_log.json", "loss_curve.png"

HELD_OUT_FRACTION = 0.1
# With fewer files than this, holding out whole files would take too much, or nothing.
MIN_FILES_TO_SPLIT = 10
MAX_GRADIENT_NORM = 1.0
LOGGED_POINTS = 100
HELD_OUT_CHECKS = 10


@dataclass(frozen=True)
class LoraOptions:
    """The adapter: W + (alpha / rank) B A for every module that a target names."""

    rank: int = 8
    alpha: int = 8
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class TrainingOptions:
    """AdamW with linear warm-up and cosine decay to zero."""

    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0


@dataclass(frozen=True)
class TrainingHistory:
    """What `train` saw. Losses are mean cross-entropies in nats per token."""

    steps: list[int]  # the last step of each averaged stretch
    training_loss: list[float]  # mean over the stretch
    held_out_steps: list[int]  # 0 is before training
    held_out_loss: list[float]

    @property
    def loss_before(self) -> float:
        return self.held_out_loss[0]

    @property
    def loss_after(self) -> float:
        return self.held_out_loss[-1]


@dataclass(frozen=True)
class FinetuneResult:
    """What was trained, and how far it got."""

    trainable_parameters: int
    total_parameters: int  # base and adapter
    history: TrainingHistory

    @property
    def trainable_share(self) -> float:
        return self.trainable_parameters / self.total_parameters


def build_parser() -> argparse.ArgumentParser:
    lora, training = LoraOptions(), TrainingOptions()
    parser = cli.new_parser(__doc__)
    cli.add_base_model(parser)

    def add(group: Any, flag: str, default: Any, help: str, **kwargs: Any) -> None:
        shown = " ".join(default) if isinstance(default, tuple) else default
        group.add_argument(flag, default=default, help=f"{help} (default: {shown})", **kwargs)

    data = parser.add_argument_group("text")
    data.add_argument(
        "--text", nargs="+", metavar="PATH", help="files, or folders that are searched with --glob"
    )
    add(data, "--glob", "*.txt", "names to look for in a folder", metavar="PATTERN")
    length = training.sequence_length
    add(data, "--sequence_length", length, "tokens in a window", type=at_least(2), metavar="N")

    adapter = parser.add_argument_group("adapter")
    add(adapter, "--output_dir", "lora_adapter", "where the adapter goes", metavar="DIR")
    add(adapter, "--rank", lora.rank, "rows of A, columns of B", type=at_least(1), metavar="R")
    add(adapter, "--alpha", lora.alpha, "B A is scaled by alpha / rank", type=at_least(1))
    add(adapter, "--dropout", lora.dropout, "on the adapter's input", type=_below_one)
    modules = lora.target_modules
    add(adapter, "--target_modules", modules, "what gets an adapter", nargs="+", metavar="MODULE")

    group = parser.add_argument_group("training")
    add(group, "--steps", training.steps, "optimiser steps", type=at_least(1), metavar="N")
    size = training.batch_size
    add(group, "--batch_size", size, "windows in a step", type=at_least(1), metavar="N")
    add(group, "--learning_rate", training.learning_rate, "at its peak", type=_positive)
    group.add_argument(
        "--warmup_steps",
        type=at_least(0),
        metavar="N",
        help="steps until the peak (default: one in twenty)",
    )
    decay = training.weight_decay
    add(group, "--weight_decay", decay, "AdamW's, on A and B", type=_not_negative)
    add(group, "--seed", training.seed, "of A and of the batches", type=at_least(0), metavar="N")
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
    device: torch.device | str = "cpu",
) -> FinetuneResult:
    """Train an adapter for ``base_model`` on ``text`` and save it to ``output_dir``.

    Args:
        base_model: directory or hub id of a causal language model with its tokenizer.
        text: files, and folders in which files are found by ``pattern``.
        output_dir: absent, empty, or holding an earlier result, which is replaced.

    Raises:
        cli.UserError: no such base or text, too little text, a target module that the base has
            not got, an output directory that holds something else, a loss that diverges.
    """
    lora, training = lora or LoraOptions(), training or TrainingOptions()
    base_dir = locate_base(base_model, revision)
    training_texts, held_out_texts = split_held_out(read_texts(text, pattern), HELD_OUT_FRACTION)
    with output_directory(output_dir, is_earlier_output, inputs=[base_dir]) as folder:
        started = time.monotonic()
        base, tokenizer = load_base(base_dir, device)
        training_tokens = tokenize(tokenizer, training_texts)
        held_out_tokens = tokenize(tokenizer, held_out_texts)
        check_fit(base, training_tokens, held_out_tokens, training)

        model = add_adapter(base, lora, training.seed, base_model, revision)
        history = train(model, training_tokens, held_out_tokens, training)
        trainable, total = model.get_nb_trainable_parameters()
        result = FinetuneResult(trainable, total, history)
        save_adapter(model, folder)
        log = {
            "base_model": base_model,
            "loss": {"before": history.loss_before, "after": history.loss_after},
            "parameters": {
                "trainable": trainable,
                "total": total,
                "trainable_share": result.trainable_share,
            },
            "text": {
                "training_files": len(training_texts),
                "training_tokens": len(training_tokens),
                "held_out_files": list(held_out_texts),
                "held_out_tokens": len(held_out_tokens),
            },
            "lora": asdict(lora),
            "training": asdict(training),
            "seconds": round(time.monotonic() - started, 1),
            "versions": versions("torch", "transformers", "peft"),
            "history": asdict(history),
        }
        write_json(folder / LOG_FILE, log)
        plot_loss_curve(history, folder / CURVE_FILE)
    return result


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser(), _finetune, argv)


def _finetune(args: argparse.Namespace) -> int:
    if not args.text:
        raise cli.UserError("--text: name a text file, or a folder of them")
    warmup_steps = args.steps // 20 if args.warmup_steps is None else args.warmup_steps
    result = finetune_lora(
        args.base_model,
        [Path(path) for path in args.text],
        Path(args.output_dir),
        pattern=args.glob,
        revision=args.revision,
        lora=LoraOptions(args.rank, args.alpha, args.dropout, tuple(args.target_modules)),
        training=TrainingOptions(
            steps=args.steps,
            batch_size=args.batch_size,
            sequence_length=args.sequence_length,
            learning_rate=args.learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=args.weight_decay,
            seed=args.seed,
        ),
        device=cli.pick_device(args.device),
    )
    before, after = result.history.loss_before, result.history.loss_after
    cli.result(
        f"Trainable parameters: {result.trainable_parameters:,} of {result.total_parameters:,} "
        f"({result.trainable_share:.3%})"
    )
    cli.result(f"Held-out loss: {before:.4f} -> {after:.4f} nats per token")
    cli.result(f"Adapter saved to: {args.output_dir}")
    return cli.EXIT_OK


# ---- text -------------------------------------------------------------------------------------


def read_texts(paths: Sequence[Path], pattern: str) -> dict[str, str]:
    """The text of each file, and of each file below a folder whose name matches ``pattern``.

    Returns:
        Name -> text, sorted by name. Names are relative to the folder where ``paths`` is a single
        one, so that the same texts are named, and split, alike wherever the folder lies.

    Raises:
        cli.UserError: a path that is not there, a folder without a match, files without text.
    """
    texts: dict[str, str] = {}
    for path in paths:
        root = path if path.is_dir() else path.parent
        for file in _find_files(path, pattern):
            name = file.relative_to(root) if len(paths) == 1 else file
            texts[name.as_posix()] = _read_text(file)
    if not any(text.strip() for text in texts.values()):
        raise cli.UserError(f"--text {' '.join(map(str, paths))}: there is no text in it")
    return dict(sorted(texts.items()))


def _find_files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise cli.UserError(f"--text {path}: no such file or folder")
    try:
        files = [file for file in path.rglob(pattern) if file.is_file()]
    except (ValueError, NotImplementedError):  # pathlib's words for '' and '/abs'
        raise cli.UserError(f"--glob {pattern!r}: not a pattern of names, like '*.txt'") from None
    if not files:
        raise cli.UserError(f"--text {path}: no file matches --glob {pattern!r}")
    return files


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data:
        raise cli.UserError(f"--text {path}: a binary file, not text (narrow it with --glob)")
    return data.decode("utf-8", errors="replace")


def split_held_out(texts: dict[str, str], fraction: float) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out texts by name; the same texts are always split in the same way.

    Files are held out whole, in the order of the hash of their names, until ``fraction`` of the
    characters is reached. Of fewer than `MIN_FILES_TO_SPLIT` files the last part is held out.
    """
    if len(texts) < MIN_FILES_TO_SPLIT:
        cuts = {name: len(text) - round(fraction * len(text)) for name, text in texts.items()}
        return (
            {name: text[: cuts[name]] for name, text in texts.items()},
            {name: text[cuts[name] :] for name, text in texts.items()},
        )
    budget = fraction * sum(map(len, texts.values()))
    training, held_out = dict(texts), {}
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(texts[name]) <= budget:
            held_out[name] = training.pop(name)
            budget -= len(held_out[name])
    return training, held_out


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: dict[str, str]) -> torch.Tensor:
    """All texts as one row of token ids (tokens,) int64, each ended by the end-of-text token."""
    import torch

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts.values():
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    return torch.tensor(ids, dtype=torch.int64)


# ---- training ---------------------------------------------------------------------------------


def held_out_loss(
    model: PreTrainedModel, tokens: torch.Tensor, sequence_length: int, batch_size: int = 16
) -> float:
    """Mean cross-entropy in nats per token over consecutive windows of ``tokens`` (tokens,)."""
    import torch

    windows = tokens[: len(tokens) // sequence_length * sequence_length].view(-1, sequence_length)
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for batch in torch.split(windows.to(model.device), batch_size):
            total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    model.train(was_training)
    return total / len(windows)


def draw_batch(
    tokens: torch.Tensor, options: TrainingOptions, generator: torch.Generator
) -> torch.Tensor:
    """Windows of ``tokens`` (tokens,) that begin at random: (batch, sequence) int64."""
    import torch

    last_start = len(tokens) - options.sequence_length
    starts = torch.randint(last_start + 1, (options.batch_size, 1), generator=generator)
    return tokens[starts + torch.arange(options.sequence_length)]


def make_optimizer(model: torch.nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW on what is trainable; biases and norms (one dimension) are not decayed."""
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas)


def train(
    model: PreTrainedModel,
    training_tokens: torch.Tensor,
    held_out_tokens: torch.Tensor,
    options: TrainingOptions,
) -> TrainingHistory:
    """Train what is trainable in ``model``, in place, on random windows of the training tokens.

    Raises:
        cli.UserError: the loss is no longer finite.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = make_optimizer(model, options)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    log_every = max(1, options.steps // LOGGED_POINTS)
    check_every = max(1, options.steps // HELD_OUT_CHECKS)
    before = held_out_loss(model, held_out_tokens, options.sequence_length)
    history = TrainingHistory([], [], [0], [before])

    model.train()
    stretch: list[float] = []
    with cli.progress(options.steps, "training", unit="step") as bar:
        for step in range(1, options.steps + 1):
            batch = draw_batch(training_tokens, options, generator).to(model.device)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

            stretch.append(loss.item())
            if not math.isfinite(stretch[-1]):
                raise cli.UserError(
                    f"the loss is {stretch[-1]} at step {step}: lower the learning rate"
                )
            last = step == options.steps
            if step % log_every == 0 or last:
                history.steps.append(step)
                history.training_loss.append(sum(stretch) / len(stretch))
                stretch.clear()
                bar.set_postfix(loss=f"{history.training_loss[-1]:.3f}")
            if step % check_every == 0 or last:
                history.held_out_steps.append(step)
                history.held_out_loss.append(
                    held_out_loss(model, held_out_tokens, options.sequence_length)
                )
                cli.notice(f"step {step}/{options.steps}: held-out loss {history.loss_after:.4f}")
            bar.update()
    return history


# ---- base and adapter -------------------------------------------------------------------------


def locate_base(base_model: str, revision: str | None) -> Path:
    """The directory of a base model that is named by directory or hub id.

    Raises:
        cli.UserError: nothing there, damaged weights, or weights without configuration.
    """
    from taskvec.checkpoint import open_checkpoint

    with open_checkpoint(base_model, revision) as base:
        if base.directory is None:
            raise cli.UserError(f"--base_model {base_model}: has no config.json beside it")
        if not base.config():
            raise cli.UserError(f"--base_model {base_model}: has no config.json")
        return base.directory


def load_base(
    directory: Path, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in fp32 on ``device``, and its tokenizer.

    Raises:
        cli.UserError: not a causal language model, missing tensors, no tokenizer.
    """
    import torch
    from transformers import (
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModelForCausalLM,
        AutoTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what matters of its warnings is an error below
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise cli.UserError(f"{directory}: not a causal language model: {error}") from None
    is_decoder = getattr(model.config, "is_decoder", False)
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not is_decoder:
        raise cli.UserError(
            f"{directory}: not a causal language model: {model.config.model_type} also reads the "
            "tokens that it is to predict"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise cli.UserError(f"{directory}: {len(missing)} missing tensors, such as {missing[0]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise cli.UserError(f"{directory}: no tokenizer that loads: {error}") from None
    return model.to(device), tokenizer


def check_fit(
    base: PreTrainedModel,
    training_tokens: torch.Tensor,
    held_out_tokens: torch.Tensor,
    options: TrainingOptions,
) -> None:
    """Stop where the text, the windows and the model do not go together.

    Raises:
        cli.UserError: too little text, windows longer than the model takes, unknown token ids.
    """
    length, batch = options.sequence_length, options.batch_size
    if len(training_tokens) < batch * length or len(held_out_tokens) < length:
        raise cli.UserError(
            f"--text: too little text: {len(training_tokens)} tokens to train on and "
            f"{len(held_out_tokens)} held out; a batch takes {batch} x {length}, the held-out part "
            f"at least {length}. Give more text or a smaller --sequence_length"
        )
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise cli.UserError(f"--sequence_length {length}: the base takes at most {longest}")
    vocabulary = base.get_input_embeddings().num_embeddings
    largest = int(max(training_tokens.max(), held_out_tokens.max()))
    if largest >= vocabulary:
        raise cli.UserError(
            f"the tokenizer gives token {largest}, but the base has {vocabulary} embeddings"
        )


def add_adapter(
    base: PreTrainedModel,
    options: LoraOptions,
    seed: int,
    base_model: str,
    revision: str | None = None,
) -> PeftModel:
    """The base, frozen, with a new adapter: A drawn from ``seed``, B zero.

    Raises:
        cli.UserError: a target module that the base has not got.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    check_targets(base, options.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=revision,
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.target_modules),
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # PEFT says here what it adapts to by itself
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    # PEFT takes the directory that the base was read from; the name is what others can use.
    config.base_model_name_or_path = base_model
    return model


def check_targets(base: PreTrainedModel, targets: Iterable[str]) -> None:
    """PEFT passes over a name without a match as long as another has one; a typo should not."""
    import torch
    from transformers.pytorch_utils import Conv1D

    modules = dict(base.named_modules())
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            kinds = (torch.nn.Linear, Conv1D)
            linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, kinds)}
            raise cli.UserError(
                f"--target_modules {target}: the base has no such module; its linear modules are "
                + ", ".join(sorted(linear))
            )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them."""
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set: its order changes between runs
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in


def is_earlier_output(folder: Path) -> bool:
    """True for what this script wrote; an adapter without its log is somebody's own."""
    found = {path.name for path in folder.iterdir()}
    return LOG_FILE in found and found <= {*ADAPTER_FILES, LOG_FILE, CURVE_FILE}


def versions(*packages: str) -> dict[str, str | int]:
    """What the numbers of a run may depend on."""
    import torch

    numbers = {package: version(package).split("+")[0] for package in packages}
    return {"python": platform.python_version(), **numbers, "threads": torch.get_num_threads()}


def plot_loss_curve(history: TrainingHistory, path: Path) -> None:
    """Training and held-out loss against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(history.steps, history.training_loss, color="#999999", label="training (mean)")
    axes.plot(
        history.held_out_steps, history.held_out_loss, "o-", color="#0072B2", label="held out"
    )
    axes.set_title(f"Held-out loss {history.loss_before:.2f} → {history.loss_after:.2f}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


# ---- values of flags --------------------------------------------------------------------------


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below ``least``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    parse.__name__ = "whole number"  # argparse's word for it in "invalid ... value"
    return parse


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _positive(text: str) -> float:
    value = _real(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _not_negative(text: str) -> float:
    value = _real(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _below_one(text: str) -> float:
    value = _not_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
