"""LoRA by its definition: a frozen layer, and beside it a product of two small matrices.

A layer with the weight W (out, in) computes W x. LoRA (Hu et al., arXiv 2106.09685, section 4.1)
leaves W as it is and adds

    h = W x + s B A x        A (r, in), B (out, r), s = alpha / r

Only A and B are trained: r (in + out) numbers instead of in times out. A starts random and B at
zero, so that training starts from the very base. rsLoRA (Kalajdzievski, arXiv 2312.03732) scales by
alpha / sqrt(r). Because s B A has W's shape, an adapter can be added to W once it is trained, and
then costs nothing (`merge`), or stay beside it, with others, and be switched (`set_active`).

    settings = LoraSettings(r=8, alpha=16, target_modules=("q_proj", "v_proj"))
    inject(model, settings)                     # freezes the model, adds A and B
    ...                                         # train trainable_parameters(model)
    save_adapter(model, directory)              # in PEFT's format (taskvec/lora_files.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from taskvec.adapters.config import LoraConfig
from taskvec.adapters.files import CONFIG_FILE
from taskvec.cli import UserError


@dataclass(frozen=True)
class LoraSettings:
    """An adapter before it has values.

    Attributes:
        r: rank: rows of A, columns of B.
        alpha: B A is scaled by alpha / r.
        target_modules: full names of modules, or what their names end with after a dot.
        dropout: on the adapter's input, while training. Embeddings have none, as in PEFT.
        rslora: scale by alpha / sqrt(r) instead.
        rank_pattern, alpha_pattern: r and alpha of some modules, by PEFT's patterns.
    """

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def scaling(self, module: str) -> tuple[int, float]:
        """r and s of a module, by the rule that `merge_lora.py` reads from a configuration."""
        return LoraConfig(Path(CONFIG_FILE), self.peft_values()).scaling(module)

    def peft_values(self) -> dict[str, Any]:
        """The same as values of PEFT's adapter_config.json."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted(self.target_modules),
            "use_rslora": self.rslora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }


class LowRank(nn.Module):
    """x -> s B A x: what one adapter adds to one layer."""

    def __init__(self, inputs: int, outputs: int, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Linear(inputs, r, bias=False)
        self.B = nn.Linear(r, outputs, bias=False)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x.to(self.A.weight.dtype))
        return self.B(self.A(x)) * self.scaling  # type: ignore[no-any-return]

    def delta(self) -> torch.Tensor:
        """s B A (out, in)."""
        return self.B.weight @ self.A.weight * self.scaling

    def factors(self) -> dict[str, torch.Tensor]:
        """A (r, in) and B (out, r) by the end of PEFT's names for them."""
        return {"lora_A.weight": self.A.weight, "lora_B.weight": self.B.weight}


class LowRankEmbedding(nn.Module):
    """The same for an embedding, whose input x is one-hot: A x is a column of A.

    Here A starts at zero and B random, as in PEFT.
    """

    def __init__(self, base: nn.Embedding, r: int, scaling: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(r, base.num_embeddings))
        self.B = nn.Parameter(torch.randn(base.embedding_dim, r))
        self.scaling = scaling
        self.padding_idx = base.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        columns = functional.embedding(ids, self.A.T, self.padding_idx)
        return columns @ self.B.T * self.scaling

    def delta(self) -> torch.Tensor:
        """s B A (dimension, tokens)."""
        return self.B @ self.A * self.scaling

    def factors(self) -> dict[str, torch.Tensor]:
        return {"lora_embedding_A": self.A, "lora_embedding_B": self.B}


class LoraLayer(nn.Module):
    """A layer in the place of ``base``: the same, plus the active adapter.

    Attributes:
        base: the frozen layer: Linear, Conv1D (which stores its weight as (in, out)) or Embedding.
        adapters: by name; of all that the model has, those that cover this layer.
        active: the name of the adapter that is added; None, or one of another layer, adds nothing.
        merged: adapters that are merged in the model just now.
        settings: of each adapter.
        unmerged_weight: meanwhile, the weight without them.
    """

    unmerged_weight: nn.Parameter | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.merged: list[str] = []
        self.settings: dict[str, LoraSettings] = {}
        self.register_parameter("unmerged_weight", None)

    def add(self, name: str, r: int, scaling: float, dropout: float) -> None:
        """A new adapter: it changes nothing until it is trained or given values."""
        adapter: LowRank | LowRankEmbedding
        if isinstance(self.base, nn.Embedding):
            adapter = LowRankEmbedding(self.base, r, scaling)
        else:
            outputs, inputs = _out_in(self.base)
            adapter = LowRank(inputs, outputs, r, scaling, dropout)
        self.adapters[name] = adapter.to(self.weight.device).train(self.base.training)

    def adapter(self, name: str) -> LowRank | LowRankEmbedding:
        return self.adapters[name]  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x)
        if self.merged or self.active is None or self.active not in self.adapters:
            return result
        return (result + self.adapters[self.active](x)).to(result.dtype)  # type: ignore[no-any-return]

    def merge(self, name: str) -> None:
        """W + s B A takes W's place, added in fp32 and rounded to W's dtype, as PEFT does it."""
        self.merged.append(name)
        if name not in self.adapters:
            return
        delta = self.adapter(name).delta()
        if not isinstance(self.base, nn.Linear):  # stored (in, out)
            delta = delta.T
        if self.unmerged_weight is None:
            self.unmerged_weight = self.weight
        merged = (self.weight + delta).to(self.weight.dtype)
        self.base.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """The very W of before takes its place again.

        PEFT subtracts the delta, which leaves a rounding error in W each time. Here W is kept, at
        the price of its memory while an adapter is merged.
        """
        if self.unmerged_weight is not None:
            self.base.weight = self.unmerged_weight
            self.unmerged_weight = None
        self.merged.clear()

    @property
    def weight(self) -> nn.Parameter:
        """The base's, which some models read from outside."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias  # type: ignore[return-value]


def inject(model: nn.Module, settings: LoraSettings, name: str = "default") -> None:
    """Freeze ``model`` and put a new, active adapter beside every target module, in place.

    A is drawn from torch's generator on the CPU, in PEFT's order: the same seed gives the same A.

    Raises:
        UserError: a target without a module, or with one that LoRA is not defined for here.
        ValueError: an adapter of that name is there, or one is merged.
    """
    modules = matching_modules(model, settings.target_modules)
    add(model, {module: settings.scaling(module) for module in modules}, settings, name)


def set_active(model: nn.Module, name: str | None) -> None:
    """Compute with this adapter, or with the bare base; only the active adapter is trainable.

    Raises:
        ValueError: no such adapter, or one is merged.
    """
    layers = lora_layers(model)
    if name is not None:
        settings_of(layers, name)
    _refuse_merged(layers)
    for layer in layers.values():
        layer.active = name
        for other, adapter in layer.adapters.items():
            adapter.requires_grad_(other == name)


@torch.no_grad()
def merge(model: nn.Module, name: str) -> None:
    """Add an adapter to the base's weights, in place; another can follow, and is added in turn.

    While something is merged, the model computes with the merged weights alone. An output head that
    shares its weight with the embedding has one of its own meanwhile.

    Raises:
        ValueError: no such adapter, or it is merged already.
    """
    layers = lora_layers(model)
    settings_of(layers, name)
    if any(name in layer.merged for layer in layers.values()):
        raise ValueError(f"adapter {name!r} is merged already")
    for layer in layers.values():
        layer.merge(name)


def unmerge(model: nn.Module) -> None:
    """Give every weight back the bits that it had before `merge`; the active adapter acts again."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def unload(model: nn.Module) -> None:
    """Take the adapters out: the plain modules are back, with what is merged into them."""
    for name, layer in lora_layers(model).items():
        layer.register_parameter("unmerged_weight", None)
        _replace(model, name, layer.base)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimiser is given: A and B of every layer of the active adapter, in their order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every layer that has an adapter, by the name that its module has in the plain model."""
    return {n: module for n, module in own_modules(model) if isinstance(module, LoraLayer)}


def matching_modules(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Names of the modules that PEFT's rule for lists of targets picks, in the model's order.

    Raises:
        UserError: a target without a match (PEFT passes over it as long as another has one).
    """
    names = [name for name, _ in own_modules(model)]
    matches = {target: {name for name in names if is_match(name, target)} for target in targets}
    for target, found in matches.items():
        if not found:
            raise UserError(
                f"target module {target!r}: the model has no such module; its linear modules are "
                + ", ".join(linear_module_names(model))
            )
    matched = set().union(*matches.values())
    return [name for name in names if name in matched]


def is_match(module: str, target: str) -> bool:
    """PEFT's rule for a target in a list: the module's whole name, or its end after a dot."""
    return f".{module}".endswith(f".{target}")


def linear_module_names(model: nn.Module) -> list[str]:
    """What the names of linear modules end with, sorted: q_proj, v_proj, ..."""
    linear = (name for name, module in own_modules(model) if _is_linear(module))
    return sorted({name.rpartition(".")[2] for name in linear})


def add(
    model: nn.Module, scalings: dict[str, tuple[int, float]], settings: LoraSettings, name: str
) -> None:
    """A new adapter beside these modules, with r and s of each; it becomes the active one."""
    layers, modules = lora_layers(model), dict(own_modules(model))
    if any(name in layer.adapters for layer in layers.values()):
        raise ValueError(f"an adapter {name!r} is there already")
    _refuse_merged(layers)
    for module in scalings:
        refuse_kind(module, modules[module])
    conv1d = {isinstance(_plain(modules[module]), Conv1D) for module in scalings}
    linear = {isinstance(_plain(modules[module]), nn.Linear) for module in scalings}
    if True in conv1d and True in linear:
        raise UserError(
            "the targets are of two kinds, Linear and Conv1D, for which PEFT's format has one "
            "fan_in_fan_out; train one kind at a time"
        )
    model.requires_grad_(False)
    for module, (r, scaling) in scalings.items():
        layer = modules[module]
        if not isinstance(layer, LoraLayer):
            layer = LoraLayer(layer).train(layer.training)
            _replace(model, module, layer)
        layer.add(name, r, scaling, settings.dropout)
        layer.settings[name] = settings
    set_active(model, name)


def factor_shapes(module: nn.Module, r: int) -> dict[str, tuple[int, int]]:
    """The shapes of a module's factors by the ends of PEFT's names."""
    outputs, inputs = _out_in(_plain(module))
    a, b = ("lora_A.weight", "lora_B.weight")
    if isinstance(_plain(module), nn.Embedding):
        a, b = ("lora_embedding_A", "lora_embedding_B")
    return {a: (r, inputs), b: (outputs, r)}


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by the names that they have in the plain model; nothing of what `inject` added."""
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, LoraLayer) else ""
        yield name, module


def _plain(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, LoraLayer) else module


def _out_in(base: nn.Module) -> tuple[int, int]:
    """Sizes of a layer's output and input; only Linear stores its weight in this order."""
    rows, columns = base.weight.shape  # type: ignore[misc, union-attr]
    return (rows, columns) if isinstance(base, nn.Linear) else (columns, rows)


def _is_linear(module: nn.Module) -> bool:
    return type(_plain(module)) in (nn.Linear, Conv1D)


def refuse_kind(name: str, module: nn.Module) -> None:
    """Only layers that LoRA is defined for here; subclasses of them may compute something else.

    Raises:
        UserError: a quantised linear layer, a scaled embedding, a norm, ...
    """
    if not _is_linear(module) and type(_plain(module)) is not nn.Embedding:
        raise UserError(
            f"target module {name}: is a {type(module).__name__}; LoRA is defined here for Linear, "
            "Conv1D and Embedding"
        )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def settings_of(layers: dict[str, LoraLayer], name: str) -> LoraSettings:
    """The settings that an adapter was made with.

    Raises:
        ValueError: no such adapter.
    """
    for layer in layers.values():
        if name in layer.settings:
            return layer.settings[name]
    known = sorted({name for layer in layers.values() for name in layer.settings})
    raise ValueError(f"no adapter {name!r}; there are: {', '.join(known) or 'none'}")


def _refuse_merged(layers: dict[str, LoraLayer]) -> None:
    merged = next((layer.merged for layer in layers.values() if layer.merged), None)
    if merged:
        raise ValueError(f"{' and '.join(merged)} are merged; unmerge first")
