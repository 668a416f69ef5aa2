"""From files of text to the tokens that a model is trained on, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taskvec.cli import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With fewer files than this, holding out whole files would take too much, or nothing.
MIN_FILES_TO_SPLIT = 10
IGNORED = -100  # the label of a position that is not in the loss


def read_texts(paths: Sequence[Path], pattern: str) -> dict[str, str]:
    """The text of each file, and of each file below a folder whose name matches ``pattern``.

    Returns:
        Name -> text, sorted by name. Names are relative to the folder where ``paths`` is a single
        one, so that the same texts are named, and split, alike wherever the folder lies.

    Raises:
        UserError: a path that is not there, a folder without a match, files without text.
    """
    texts: dict[str, str] = {}
    for path in paths:
        root = path if path.is_dir() else path.parent
        for file in _find_files(path, pattern):
            name = file.relative_to(root) if len(paths) == 1 else file
            texts[name.as_posix()] = _read_text(file)
    if not any(text.strip() for text in texts.values()):
        raise UserError(f"--text {' '.join(map(str, paths))}: there is no text in it")
    return dict(sorted(texts.items()))


def _find_files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--text {path}: no such file or folder")
    try:
        files = [file for file in path.rglob(pattern) if file.is_file()]
    except (ValueError, NotImplementedError):  # pathlib's words for '' and '/abs'
        raise UserError(f"--glob {pattern!r}: not a pattern of names, like '*.txt'") from None
    if not files:
        raise UserError(f"--text {path}: no file matches --glob {pattern!r}")
    return files


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data:
        raise UserError(f"--text {path}: a binary file, not text (narrow it with --glob)")
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


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], *, masked: bool = False
) -> torch.Tensor:
    """All texts as one row of token ids (tokens,) int64.

    Each is ended by the end-of-text token; for a masked language model it has instead the special
    tokens that its tokenizer puts around a text.
    """
    end = [] if masked or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts.values():
        ids += tokenizer(text, add_special_tokens=masked, verbose=False)["input_ids"] + end
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True)
class Corpus:
    """What a model is trained on and judged by.

    Attributes:
        training, held_out: token ids (tokens,) int64.
        training_files: how many files the first is from.
        held_out_files: the names of the second's.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    training_files: int
    held_out_files: list[str]

    @property
    def sha256(self) -> str:
        tokens = (self.training, self.held_out)
        return hashlib.sha256(b"|".join(part.numpy().tobytes() for part in tokens)).hexdigest()

    def counts(self) -> dict[str, Any]:
        """What there is of it, as JSON."""
        return {
            "training_files": self.training_files,
            "training_tokens": len(self.training),
            "held_out_files": self.held_out_files,
            "held_out_tokens": len(self.held_out),
        }


def read_corpus(
    texts: dict[str, str], fraction: float, tokenizer: PreTrainedTokenizerBase, masked: bool
) -> Corpus:
    """Texts by name, split and tokenized; ``fraction`` of them is held out."""
    training, held_out = split_held_out(texts, fraction)
    return Corpus(
        tokenize(tokenizer, training, masked=masked),
        tokenize(tokenizer, held_out, masked=masked),
        len(training),
        list(held_out),
    )


@dataclass(frozen=True)
class Objective:
    """What a model learns to predict: the next token, or those that are masked.

    Attributes:
        collator: transformers' for masked language models, which hides 15 % of the tokens
            (Devlin et al., arXiv 1810.04805, section 3.1); None for a causal one.
    """

    collator: Any = None

    def inputs(self, windows: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """What the model is called with for windows (batch, sequence) of tokens."""
        if self.collator is None:
            return {"input_ids": windows, "labels": windows}
        self.collator.generator = generator
        input_ids, labels = self.collator.torch_mask_tokens(windows.clone())
        return {"input_ids": input_ids, "labels": labels}

    def predicted(self, inputs: dict[str, torch.Tensor]) -> int:
        """How many tokens the mean in the loss is taken over."""
        labels = inputs["labels"] if self.collator is not None else inputs["labels"][:, 1:]
        return int((labels != IGNORED).sum())


CAUSAL = Objective()


def draw_windows(
    tokens: torch.Tensor, count: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Windows of ``tokens`` (tokens,) that begin at random: (count, length) int64."""
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def consecutive_windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """All of ``tokens`` (tokens,) but a last part that is too short: (count, length) int64."""
    return tokens[: len(tokens) // length * length].view(-1, length)
