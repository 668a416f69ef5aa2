#!/usr/bin/env python3
"""Pre-train the bundled base model: a narrow StarCoder2 with all of its 30 layers.

    python examples/pretrain_base.py --output_dir examples/starcoder2-mini

The architecture is transformers' own Starcoder2, so the model has StarCoder2-3B's 483 named
parameters; only its widths are small. It is trained from random initialisation on the sources
of the Python standard library that runs this script, with a byte-level BPE tokenizer trained on
the same text. Its loss on held-out files is measured beside that of the untrained model and of
a unigram model.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from taskvec import cli
from taskvec.flag_values import whole
from taskvec.output import output_directory, write_json
from taskvec.training.options import TrainingOptions, versions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Starcoder2ForCausalLM

    from taskvec.training.loop import TrainingHistory

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_FRACTION = 0.03
# Tests say little about a language; tables, generated files and help topics are not code.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

OPTIONS = TrainingOptions(
    steps=4000,
    batch_size=8,
    sequence_length=256,
    learning_rate=3e-3,
    warmup_steps=200,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    seed=0,
)
OUTPUT_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_log.json",
)

README = """\
# starcoder2-mini

A small causal language model of Python source, made so that everything in this project runs on
real trained weights in seconds. It is transformers' own `Starcoder2ForCausalLM` with all {layers}
layers, and so with the {named_parameters} named parameters of StarCoder2-3B; only the widths are
small. {parameters:,} parameters in fp32, with biases and tied embeddings: hidden {hidden},
intermediate {intermediate}, {heads} heads, {kv_heads} key-value heads, vocabulary {vocabulary}.

## How well it learned

Mean cross-entropy on the {held_out_tokens:,} tokens of {held_out_files} held-out files, in nats per
token (lower is better):

| model | held-out loss | perplexity |
|---|---|---|
| untrained (random initialisation) | {untrained:.4f} | {untrained_perplexity:.1f} |
| unigram (token frequencies of the training files) | {unigram:.4f} | {unigram_perplexity:.1f} |
| **this model** | **{trained:.4f}** | **{trained_perplexity:.1f}** |

Uniform guessing would cost ln {vocabulary} = {uniform:.4f}. The model is far too small to be of
use for writing code.

## How it was made

```
python examples/pretrain_base.py --output_dir examples/starcoder2-mini
```

- **Text:** the `.py` files of the Python {python} standard library, without tests, encoding
  tables, help topics and generated build data. {training_files} files ({training_tokens:,} tokens)
  are trained on. Files are held out whole, by the hash of their names; `training_log.json` lists
  them.
- **Tokenizer:** byte-level BPE with {vocabulary} entries, trained on the training files only.
- **Training:** {steps} steps of {batch_size} x {sequence_length} tokens; AdamW, weight decay
  {weight_decay}; learning rate {learning_rate}, {warmup_steps} warm-up steps, cosine decay;
  gradients clipped to norm 1; seed {seed}.
- **Time:** {minutes:.0f} minutes on {threads} CPU threads (wall clock, other programs included; a
  step takes about 0.4 s on two free cores).
- **Versions:** Python {python}, torch {torch}, transformers {transformers}, tokenizers
  {tokenizers}.

The same versions on the same kind of CPU repeat the training; another Python brings another
standard library, and with it slightly different numbers. All figures above, and the losses along
the way, are in `training_log.json`.

## Licence

The weights are part of this project and under its licence. They were trained on the Python
standard library, copyright the Python Software Foundation and contributors, under the
[PSF License Version 2](https://docs.python.org/3/license.html).
"""


def standard_library_texts() -> dict[str, str]:
    """File name relative to the standard library -> source, sorted by name."""
    library = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(library).as_posix(): path for path in library.rglob("*.py")}
    kept = sorted(name for name in files if not _is_skipped(name))
    # A few files are in Latin-1; their accents become the replacement character.
    texts = {name: files[name].read_bytes().decode("utf-8", errors="replace") for name in kept}
    return {name: text for name, text in texts.items() if text.strip()}


def _is_skipped(name: str) -> bool:
    return name.startswith(SKIPPED_PREFIXES) or not SKIPPED_FOLDERS.isdisjoint(name.split("/"))


def train_tokenizer(texts: dict[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE like StarCoder2's: digits stand alone, any text survives a round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=OPTIONS.sequence_length,
    )


def untrained_model(options: TrainingOptions) -> Starcoder2ForCausalLM:
    """StarCoder2 with 30 layers and a hidden size of 64, initialised from the seed."""
    import torch
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    config = Starcoder2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.sequence_length,
        initializer_range=0.06,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(options.seed)
    model = Starcoder2ForCausalLM(config)
    # Each layer adds two outputs to the residual stream; scaled so, their sum starts at the
    # size of one (GPT-2, section 2.3), and 30 layers learn as readily as a few.
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.c_proj):
                projection.weight /= math.sqrt(2 * config.num_hidden_layers)
    return model


def unigram_loss(training_tokens: torch.Tensor, held_out_tokens: torch.Tensor) -> float:
    """Nats per held-out token of a model that knows only how often each token occurs."""
    counts = training_tokens.bincount(minlength=VOCABULARY).double() + 1  # none is impossible
    return -(counts / counts.sum()).log()[held_out_tokens].mean().item()


def check_round_trip(folder: Path, texts: dict[str, str]) -> None:
    """Stop unless the saved tokenizer, loaded as users load it, gives every text back."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.decode(ids) != text:
            raise RuntimeError(f"{folder}: the tokenizer does not give {name} back")


def pretrain_base(output_dir: Path, options: TrainingOptions) -> TrainingHistory:
    """Train tokenizer and model, and write them with README.md and training_log.json."""
    from transformers.utils import logging

    from taskvec.training.loop import Run, train
    from taskvec.training.texts import split_held_out, tokenize

    logging.disable_progress_bar()
    with output_directory(output_dir, OUTPUT_FILES) as folder:
        started = time.monotonic()
        training, held_out = split_held_out(standard_library_texts(), HELD_OUT_FRACTION)
        tokenizer = train_tokenizer(training)
        tokenizer.save_pretrained(folder)
        check_round_trip(folder, held_out)
        training_tokens = tokenize(tokenizer, training)
        held_out_tokens = tokenize(tokenizer, held_out)
        cli.notice(f"{len(training)} files to train on: {len(training_tokens):,} tokens")

        model = untrained_model(options)
        history = train(Run(model, options), training_tokens, held_out_tokens)
        model.save_pretrained(folder)

        log = {
            "loss": {
                "untrained": history.loss_before,
                "unigram": unigram_loss(training_tokens, held_out_tokens),
                "trained": history.loss_after,
            },
            "text": {
                "training_files": len(training),
                "training_tokens": len(training_tokens),
                "held_out_files": list(held_out),
                "held_out_tokens": len(held_out_tokens),
            },
            "named_parameters": len(list(model.named_parameters())),
            "parameters": model.num_parameters(),
            "options": asdict(options),
            "seconds": round(time.monotonic() - started, 1),
            "versions": versions("torch", "transformers", "tokenizers"),
            "history": asdict(history),
        }
        write_json(folder / "training_log.json", log)
        (folder / "README.md").write_text(readme(log, model), encoding="utf-8")
    return history


def readme(log: dict[str, Any], model: Starcoder2ForCausalLM) -> str:
    """README.md with the numbers of the log."""
    config, loss, text = model.config, log["loss"], log["text"]
    return README.format(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        uniform=math.log(config.vocab_size),
        named_parameters=log["named_parameters"],
        parameters=log["parameters"],
        **loss,
        **{f"{name}_perplexity": math.exp(value) for name, value in loss.items()},
        **text | {"held_out_files": len(text["held_out_files"])},
        **log["options"],
        **log["versions"],
        minutes=log["seconds"] / 60,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    cli.add_output_dir(parser, "examples/starcoder2-mini", "where the model goes")
    steps, seed = OPTIONS.steps, OPTIONS.seed
    parser.add_argument("--steps", type=whole(1), default=steps, help="(default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), default=seed, help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _pretrain, argv)


def _pretrain(args: argparse.Namespace) -> int:
    options = replace(OPTIONS, steps=args.steps, seed=args.seed)
    history = pretrain_base(Path(args.output_dir), options)
    cli.result(f"Held-out loss: {history.loss_before:.4f} -> {history.loss_after:.4f}")
    cli.result(f"Saved: {args.output_dir}")
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
