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
    keeps alike, and an embedding that is saved along: PEFT writes them twice, and the second is
    taken out of ``groups`` or ``whole``.

    Raises:
        UserError: ensure_weight_tying is set, and the second is not the same as the first.
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
            for twin, original in _drop_twin(changed, whole, head, ours):
                _check_twin(file, config, twin, original)
        return
    both = ours in changed and TOKENS in changed[ours].tensors if ours else False
    for head in heads or ([_HEAD] if ours is not None and not both else []):
        if ours is not None and _is_copy(file, config, changed, whole, head, ours):
            _drop_twin(changed, whole, head, ours)
        elif untie(base, head):
            _share_original(whole, head, ours or embedding)


_Pairs = list[tuple[TensorInfo, TensorInfo | None]]


def _twins(
    changed: dict[str, Group], whole: dict[str, TensorInfo], head: str, embedding: str
) -> _Pairs:
    """What the head has, each with the embedding's own, whose factors are the other way round."""
    pairs: _Pairs = []
    if head in changed and embedding in changed:
        source = changed[embedding].tensors
        for role, twin in changed[head].tensors.items():
            pairs.append((twin, source.get({A: B, B: A}.get(role, role))))
    if head in whole:
        pairs.append((whole[head], whole.get(embedding)))
    return pairs


def _share_original(whole: dict[str, TensorInfo], head: str, embedding: str) -> None:
    """What an adapted one of the pair was before, where it is saved along, the other was too."""
    for name, other in ((head, embedding), (embedding, head)):
        if name in whole and ".base_layer." in whole[name].name:
            whole.setdefault(other, whole[name])


def _is_copy(
    file: TensorFile,
    config: LoraConfig,
    changed: dict[str, Group],
    whole: dict[str, TensorInfo],
    head: str,
    embedding: str,
) -> bool:
    """Whether the head has rows of tokens, and a whole tensor, that are the embedding's."""
    roles = set(changed[head].tensors) if head in changed else set()
    tokens = config.values.get("trainable_token_indices")
    apart = isinstance(tokens, dict) and any(
        head.removesuffix(".weight").endswith(name) for name in tokens
    )
    if apart or not roles <= {TOKENS} or (head in changed) != (embedding in changed):
        return False
    pairs = _twins(changed, whole, head, embedding)
    return bool(pairs) and all(other and file.same(twin, other) for twin, other in pairs)


def _drop_twin(
    changed: dict[str, Group], whole: dict[str, TensorInfo], head: str, embedding: str
) -> _Pairs:
    pairs = _twins(changed, whole, head, embedding)
    if head in changed and embedding in changed:
        changed[head].tensors.clear()
    whole.pop(head, None)
    return pairs


def _check_twin(
    file: TensorFile, config: LoraConfig, twin: TensorInfo, original: TensorInfo | None
) -> None:
    if original is None:
        return
    if twin.shape == original.shape:
        same = file.same(twin, original)
    else:
        same = torch.equal(file.read(twin), file.read(original).T)
    if not same:
        raise UserError(
            f"{file.path}: {twin.name} is not {original.name}, although ensure_weight_tying is "
            f"set in {config.file.name}"
        )
