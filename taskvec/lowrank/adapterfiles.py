"""A PEFT LoRA adapter from factors: its configuration and its tensors.

The names are those of PEFT's save_pretrained:

    base_model.model.<module>.lora_A.weight, .lora_B.weight      delta = B @ A, or its transpose
    base_model.model.<module>.lora_embedding_A, _B               delta = (B @ A)^T
    base_model.model.<module>.<leaf>                             modules_to_save
    base_model.model.<module>[.base_layer].bias                  biases, with bias = "all"
    base_model.model.<module>[.base_layer...].lora_A.weight, _B  stacks: target_parameters; of a
        module's several ones the last has its name, the one before it one more base_layer
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from taskvec.adapters.files import write_adapter
from taskvec.adapters.keys import PREFIX
from taskvec.lowrank.factors import Factors
from taskvec.lowrank.layout import CONV1D, EMBEDDING, Parameter
from taskvec.lowrank.stacks import Interleaved


@dataclass
class AdapterFiles:
    """The content of an adapter, until it is written.

    Attributes:
        base_model: what its configuration names as its base; None if that is not known.
        task_type: as PEFT has it.
        every_module: all modules that could be adapted, to find short names for the adapted ones.
        every_parameter: all parameters, for the same of stacks.
    """

    base_model: str | None
    task_type: str | None
    every_module: set[str]
    every_parameter: set[str]
    _ranks: dict[str, int] = field(default_factory=dict)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _biases: dict[str, torch.Tensor] = field(default_factory=dict)
    _saved: set[str] = field(default_factory=set)
    _conv1d: set[str] = field(default_factory=set)
    _stacks: dict[Parameter, Interleaved] = field(default_factory=dict)

    def add_factors(self, parameter: Parameter, factors: Factors) -> None:
        """A low-rank update of a module's weight."""
        module, name = parameter.module, PREFIX + parameter.module
        A, B = factors.right, factors.left
        if parameter.transposed:
            A, B = B.T.contiguous(), A.T.contiguous()
        self._ranks[module] = factors.rank
        if parameter.kind == CONV1D:
            self._conv1d.add(module)
        if parameter.kind == EMBEDDING:
            self._tensors |= {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
        else:
            self._tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}

    def add_stack(self, parameter: Parameter, factors: Interleaved) -> None:
        """A low-rank update of every matrix of a stack."""
        self._ranks[f"{parameter.module}.{parameter.leaf}"] = factors.rank
        self._stacks[parameter] = factors

    def add_bias(self, parameter: Parameter, value: torch.Tensor) -> None:
        """The new value of a bias, fp32."""
        self._biases[parameter.module] = value

    def add_saved(self, parameter: Parameter, value: torch.Tensor) -> None:
        """The new value, fp32, of a parameter of a module that is saved whole."""
        self._saved.add(parameter.module)
        self._tensors[f"{PREFIX}{parameter.module}.{parameter.leaf}"] = value

    def config(self) -> dict[str, Any]:
        """adapter_config.json: scaling 1 everywhere, the most frequent rank as r."""
        ranks = Counter(self._ranks.values())
        r = max(ranks, key=lambda rank: (ranks[rank], rank))
        others = {module: rank for module, rank in self._ranks.items() if rank != r}
        stacks = {f"{stack.module}.{stack.leaf}" for stack in self._stacks}
        modules = self._ranks.keys() - stacks
        return {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": r,
            "lora_alpha": r,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": short_names(modules, self.every_module),
            "target_parameters": short_names(stacks, self.every_parameter, 2) or None,
            "modules_to_save": sorted(self._saved) or None,
            "bias": "all" if self._biases else "none",
            "fan_in_fan_out": bool(self._conv1d),
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        }

    def write(self, directory: Path) -> int:
        """Write both files; returns the bytes of the tensors.

        Raises:
            ValueError: no factors were added.
        """
        if not self._ranks:
            raise ValueError("an adapter needs at least one module")
        self._name_stacks()
        for module, bias in self._biases.items():
            wrapped = ".base_layer" if module in self._ranks else ""
            self._tensors[f"{PREFIX}{module}{wrapped}.bias"] = bias
        write_adapter(directory, self.config(), self._tensors)
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _name_stacks(self) -> None:
        """Name their tensors as PEFT does, which wraps a module once for every parameter."""
        by_module: dict[str, list[Parameter]] = {}
        for parameter in sorted(self._stacks, key=lambda stack: -stack.index):
            by_module.setdefault(parameter.module, []).append(parameter)
        for module, parameters in by_module.items():
            for depth, parameter in enumerate(parameters):
                name = f"{PREFIX}{module}{'.base_layer' * depth}"
                pair = self._stacks[parameter]
                self._tensors |= {f"{name}.lora_A.weight": pair.A, f"{name}.lora_B.weight": pair.B}


def short_names(chosen: Iterable[str], every: set[str], parts: int = 1) -> list[str]:
    """Names that select exactly some modules: ``q_proj`` where each q_proj is one, else in full.

    Args:
        parts: of a name, from its end, that make a short one.
    """
    chosen = set(chosen)
    names = set()
    for name in chosen:
        last = ".".join(name.split(".")[-parts:])
        alike = {other for other in every if other == last or other.endswith(f".{last}")}
        names.add(last if alike <= chosen else name)
    return sorted(names)
