"""Fine-tuned versions of one base, side by side: adapters and whole models."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from taskvec.adapter import Adapter, open_adapter
from taskvec.architecture import place
from taskvec.checkpoint import Checkpoint, open_checkpoint
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.names import aligned
from taskvec.updates.products import LowRank

# Models whose linear layers are transformers' Conv1D, which stores W^T (in, out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Tuned:
    """One fine-tuned version of a base.

    Attributes:
        label: what figures and tables call it.
        source: directory or hub id.
        base: what it was fine-tuned from.
        version: the adapter, or the whole model.
    """

    label: str
    source: str
    base: Checkpoint
    version: Adapter | Checkpoint

    @property
    def kind(self) -> str:
        return "lora" if isinstance(self.version, Adapter) else "model"

    @property
    def paths(self) -> list[Path]:
        """What it is read from."""
        return self.version.paths

    @property
    def parameters(self) -> list[str]:
        """Those that may differ from the base's; of a model only its values can tell."""
        if isinstance(self.version, Adapter):
            return self.version.parameters
        return list(self.base.tensors)

    def changes(self, name: str) -> bool:
        """Whether a parameter may differ from the base's."""
        return name in self.parameters

    def factors(self, name: str, device: torch.device) -> LowRank | None:
        """The low-rank update of a parameter, or None where it is not known as one."""
        if not isinstance(self.version, Adapter) or not self.version.is_low_rank(name):
            return None
        update = self.version.update(name, device)
        assert isinstance(update, LowRank)
        return update

    def rows(
        self, name: str, base: torch.Tensor, start: int, stop: int, device: torch.device
    ) -> torch.Tensor:
        """Rows of the tuned parameter as stored, float64.

        Args:
            base: the same rows of the base.
        """
        if isinstance(self.version, Checkpoint):
            return self.version.read(name, start, stop).to(device, torch.float64)
        rows = base.to(device, torch.float64)
        if not self.changes(name):
            return rows
        return rows + self.version.update(name, device).exact(start, stop)


@contextlib.contextmanager
def open_tuned(
    base: Checkpoint, lora_paths: Iterable[str], finetuned_models: Iterable[str]
) -> Iterator[list[Tuned]]:
    """Open adapters, then models, each given as a path or as LABEL=PATH.

    Without a label the last part of the path is the label.

    Raises:
        UserError: one of them is unusable or does not fit the base, or two have the same label.
    """
    with contextlib.ExitStack() as stack:
        found: list[Tuned] = []
        for word in lora_paths:
            label, source = _labelled(word)
            adapter = stack.enter_context(open_adapter(source, base))
            found.append(Tuned(label, source, base, adapter))
        for word in finetuned_models:
            label, source = _labelled(word)
            model = stack.enter_context(open_checkpoint(source))
            model.refuse_quantised()
            found.append(Tuned(label, source, base, aligned(base, model)))
        labels = [tuned.label for tuned in found]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(
                    f"two models are called {label!r}; name them: FIRST=PATH SECOND=PATH"
                )
        yield found


def is_stored_transposed(base: Checkpoint, name: str, tuned: Sequence[Tuned]) -> bool:
    """Whether a matrix is stored (in, out): an adapter knows, else the architecture tells."""
    for one in tuned:
        if one.changes(name) and (factors := one.factors(name, torch.device("cpu"))) is not None:
            return factors.transposed
    conv1d = base.config().get("model_type") in _CONV1D_MODELS
    return conv1d and place(name).block in ("attention", "mlp")


def linear_weights(base: Checkpoint, modules: Sequence[str] | None) -> list[str]:
    """The weights of linear layers, in the order of the files.

    Args:
        modules: only these, by the end of their names (q_proj, attention.output.dense); None: all
            matrices but embeddings and norms.

    Raises:
        UserError: a name that is no linear layer's, or a model without any.
    """
    found = [name for name, info in base.tensors.items() if _is_linear(name, info)]
    if modules is not None:
        for module in modules:
            if not any(_is_called(name, module) for name in found):
                known = sorted({place(name).module for name in found})
                near = difflib.get_close_matches(module, known, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"--modules {module}: no linear layer of {base.source}{hint}")
        found = [name for name in found if any(_is_called(name, module) for module in modules)]
    if not found:
        raise UserError(f"{base.source}: holds no linear layer")
    return found


def _is_linear(name: str, info: TensorInfo) -> bool:
    where = place(name)
    matrix = len(info.shape) == 2 and min(info.shape) > 0 and info.is_float
    return matrix and where.kind == "weight" and where.block not in ("embedding", "norm")


def _is_called(name: str, module: str) -> bool:
    full = name.removesuffix(".weight")
    return full == module or full.endswith(f".{module}")


def _labelled(word: str) -> tuple[str, str]:
    label, mark, source = word.partition("=")
    if not mark or Path(word).exists():
        return Path(word).name or word, word
    if not label or not source:
        raise UserError(f"{word}: give PATH or LABEL=PATH")
    return label, source
