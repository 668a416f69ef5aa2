"""An adapter on a model whose output head is tied to its embedding: are they one afterwards?

PEFT adds the delta of an adapted head to the memory that it shares with the embedding, and the
reverse, so that both change: not what was trained. Here the head becomes a parameter of its own
where the adapter changes one of the two alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from taskvec.adapters.config import LoraConfig
from taskvec.adapters.keys import TOKENS, A, B, Group
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.tensorfile import TensorFile
from taskvec.ties import tied_to, untie

_HEAD = "lm_head.weight"  # what a tied head is called where the adapter does not say


def settle_ties(
    file: TensorFile,
    config: LoraConfig,
    base: Checkpoint,
    groups: Sequence[Group],
    whole: dict[str, TensorInfo],
    rename: Callable[[str], str],
) -> None:
    """Make a tied head a parameter of the base where the adapter separates it from the embedding.

    Trainable tokens of the embedding count for both, as in PEFT. So does what ensure_weight_tying
    keeps alike, which PEFT writes twice: the second is taken out of ``groups`` or ``whole``.

    Raises:
        UserError: the second is not the same as the first.
    """
    changed = {f"{group.module}.weight": group for group in groups}
    modules = list(dict.fromkeys([*changed, *whole]))
    heads = [name for name in modules if tied_to(base, name)]
    embedding = tied_to(base, heads[0] if heads else _HEAD)
    if embedding is None:
        return
    ours = next((n for n in modules if n not in heads and rename(n) == embedding), None)
    if config.values.get("ensure_weight_tying") and ours is not None:
        for head in heads:
            _drop_twin(file, config, changed, whole, head, ours)
        return
    both = ours in changed and TOKENS in changed[ours].tensors if ours else False
    for head in heads or ([_HEAD] if ours is not None and not both else []):
        untie(base, head)


def _drop_twin(
    file: TensorFile,
    config: LoraConfig,
    changed: dict[str, Group],
    whole: dict[str, TensorInfo],
    head: str,
    embedding: str,
) -> None:
    pairs: list[tuple[TensorInfo, TensorInfo]] = []
    if head in changed and embedding in changed:
        twin, source = changed[head].tensors, changed[embedding].tensors
        pairs = [(twin[A], source[B]), (twin[B], source[A])]
        changed[head].tensors.clear()
    elif head in whole and embedding in whole:
        pairs = [(whole[head], whole[embedding])]
    whole.pop(head, None)
    for info, original in pairs:
        mine, other = file.read(info), file.read(original)
        if not torch.equal(mine, other.T if mine.shape != other.shape else other):
            raise UserError(
                f"{file.path}: {info.name} is not {original.name}, although ensure_weight_tying is "
                f"set in {config.file.name}"
            )
