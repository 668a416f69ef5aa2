"""A LoRA adapter of a model in memory, to and from PEFT's files."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from taskvec.adapters.config import LoraConfig, read_config
from taskvec.adapters.files import WEIGHTS_FILE, write_adapter
from taskvec.adapters.keys import PREFIX
from taskvec.checkpoint import locate_adapter
from taskvec.cli import UserError
from taskvec.lora import (
    LoraSettings,
    add,
    factor_shapes,
    is_match,
    lora_layers,
    own_modules,
    refuse_kind,
    settings_of,
)
from taskvec.tensorfile import TensorFile

_FACTOR = re.compile(
    r"^base_model\.model\.(?P<module>.+)\.(?P<end>lora_[AB]\.weight|lora_embedding_[AB])$"
)


def save_adapter(
    model: nn.Module,
    directory: Path,
    name: str = "default",
    *,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them.

    Args:
        directory: made if absent; files of these names are replaced.
        base_model, revision: what the configuration says the adapter was trained on.
        task_type: PEFT's word, CAUSAL_LM for a causal language model.

    Raises:
        ValueError: no such adapter.
    """
    layers = lora_layers(model)
    settings = settings_of(layers, name)
    covered = {module: layer for module, layer in layers.items() if name in layer.adapters}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in covered.values()),
        **settings.peft_values(),
    }
    tensors = {
        f"{PREFIX}{module}.{end}": factor
        for module, layer in covered.items()
        for end, factor in layer.adapter(name).factors().items()
    }
    write_adapter(directory, config, tensors)


@torch.no_grad()
def load_adapter(model: nn.Module, source: str | Path, name: str = "default") -> None:
    """Put a saved adapter beside its modules and make it the active one; the model is frozen.

    What counts is what the tensors cover, as for PEFT. The factors are raised to fp32.

    Args:
        source: directory or hub id of a PEFT LoRA adapter.

    Raises:
        UserError: not a plain LoRA adapter, or one that does not fit the model; all by name.
        ValueError: an adapter of that name is there, or one is merged.
    """
    path = locate_adapter(str(source))
    config = read_config(path)
    factors = _read_factors(path / WEIGHTS_FILE)
    modules = dict(own_modules(model))
    for module, ends in factors.items():
        if module not in modules:
            raise UserError(f"{path}: adapts {module}, which the model has not got")
        refuse_kind(module, modules[module])
        found = {end: tuple(factor.shape) for end, factor in ends.items()}
        expected = factor_shapes(modules[module], config.scaling(module)[0])
        if found != expected:
            raise UserError(f"{path}: {module} has {found}; the model and r take {expected}")
    covered = [module for module in modules if module in factors]
    settings = _settings_from(config, list(modules), covered)
    add(model, {module: config.scaling(module) for module in covered}, settings, name)
    for module, layer in lora_layers(model).items():
        for end, factor in factors.get(module, {}).items():
            layer.adapter(name).factors()[end].copy_(factor)


def _settings_from(config: LoraConfig, modules: list[str], covered: list[str]) -> LoraSettings:
    """The settings of a configuration that was read.

    Its targets are kept where they pick what the tensors cover; they may be a pattern, name what
    does not exist, or be narrowed by other keys: then the covered modules are named.
    """
    values = config.values
    targets = values.get("target_modules")
    if not isinstance(targets, list) or covered != [
        module for module in modules if any(is_match(module, str(target)) for target in targets)
    ]:
        targets = covered
    return LoraSettings(
        r=values["r"],
        alpha=values["lora_alpha"],
        dropout=float(values.get("lora_dropout") or 0.0),
        target_modules=tuple(targets),
        rslora=bool(values.get("use_rslora")),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
    )


def _read_factors(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> what each factor's name ends with -> the factor, in its stored dtype."""
    if not file.is_file():
        raise UserError(f"{file.parent}: holds no {file.name}; save_adapter() writes one")
    factors: dict[str, dict[str, torch.Tensor]] = {}
    with TensorFile(file) as tensors:
        for name, info in tensors.tensors.items():
            match = _FACTOR.match(name)
            if match is None:
                raise UserError(f"{file}: {name}: not a tensor of a plain LoRA adapter")
            factors.setdefault(match["module"], {})[match["end"]] = tensors.read(info)
    return factors
