"""A PEFT LoRA adapter from factors: its configuration and its tensors.

The names are those of PEFT's save_pretrained:

    base_model.model.<module>.lora_A.weight, .lora_B.weight      delta = B @ A, or its transpose
    base_model.model.<module>.lora_embedding_A, _B               delta = (B @ A)^T
    base_model.model.<module>.<leaf>                             modules_to_save
    base_model.model.<module>[.base_layer].bias                  biases, with bias = "all"
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


@dataclass
class AdapterFiles:
    """The content of an adapter, until it is written.

    Attributes:
        base_model: what its configuration names as its base; None if that is not known.
        task_type: as PEFT has it.
        every_module: all modules that could be adapted, to find short names for the adapted ones.
    """

    base_model: str | None
    task_type: str | None
    every_module: set[str]
    _ranks: dict[str, int] = field(default_factory=dict)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _biases: dict[str, torch.Tensor] = field(default_factory=dict)
    _saved: set[str] = field(default_factory=set)
    _conv1d: set[str] = field(default_factory=set)

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
        return {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": r,
            "lora_alpha": r,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": short_names(self._ranks, self.every_module),
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
        for module, bias in self._biases.items():
            wrapped = ".base_layer" if module in self._ranks else ""
            self._tensors[f"{PREFIX}{module}{wrapped}.bias"] = bias
        write_adapter(directory, self.config(), self._tensors)
        return sum(tensor.nbytes for tensor in self._tensors.values())


def short_names(chosen: Iterable[str], every: set[str]) -> list[str]:
    """Names that select exactly some modules: ``q_proj`` where each q_proj is one, else in full."""
    chosen = set(chosen)
    names = set()
    for module in chosen:
        last = module.rpartition(".")[2]
        alike = {other for other in every if other.rpartition(".")[2] == last}
        names.add(last if alike <= chosen else module)
    return sorted(names)
