"""Edits of a small LoRA adapter's tensors and configuration: what breaks it, and what does not.

Made for the Llama of `tests.models`: r = 4 on q_proj, v_proj and down_proj of two layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
V1 = "base_model.model.model.layers.1.self_attn.v_proj"
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors, dict[str, Any]], object]


def config(**new: Any) -> Edit:
    return lambda tensors, values: values.update(new)


def factor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(tensors: Tensors, values: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return edit


def renamed(old: str, new: str) -> Edit:
    def edit(tensors: Tensors, values: dict[str, Any]) -> None:
        for name in list(tensors):
            if old in name:
                tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def dropped(part: str) -> Edit:
    def edit(tensors: Tensors, values: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return edit


def added(name: str, tensor: torch.Tensor) -> Edit:
    return lambda tensors, values: tensors.update({name: tensor})


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[1, 2] = value
        return tensor

    return change


def overflowing(tensors: Tensors, values: dict[str, Any]) -> None:
    tensors[f"{Q0}.lora_A.weight"] = torch.full((4, 32), 1e25)
    tensors[f"{Q0}.lora_B.weight"] = torch.full((32, 4), 1e25)


# (edit, kind of the problem, words that must be in what is said about it)
BROKEN: dict[str, tuple[Edit, str, str]] = {
    "another kind": (config(peft_type="LOHA"), "config", "'LOHA'"),
    "DoRA": (config(use_dora=True), "refused", "but use_dora is True"),
    "bias": (config(bias="some"), "config", "bias is 'some'"),
    "lora_bias": (config(lora_bias=True), "refused", "but lora_bias is True"),
    "modules_to_save": (
        config(modules_to_save=["lm_head"]),
        "refused",
        "modules_to_save of adapter_config.json names lm_head",
    ),
    "tokens": (config(trainable_token_indices=[1]), "refused", "no rows of tokens"),
    "experts": (config(target_modules=[], target_parameters=["w"]), "no-module", "no such module"),
    "PiSSA": (config(init_lora_weights="pissa"), "config", "changes the base itself"),
    "rank 0": (config(r=0), "scaling", "r of a module is 0"),
    "rank of text": (config(r="4"), "scaling", "r of a module is '4'"),
    "rank true": (config(r=True), "scaling", "r of a module is True"),
    "no rank": (lambda tensors, values: values.pop("r"), "scaling", "r of a module is None"),
    "alpha NaN": (config(lora_alpha=float("nan")), "scaling", "lora_alpha"),
    "alpha huge": (config(lora_alpha=10**400), "scaling", "lora_alpha"),
    "alpha of text": (config(lora_alpha="8"), "scaling", "lora_alpha"),
    "pattern no mapping": (config(rank_pattern=["q_proj"]), "scaling", "not a mapping"),
    "pattern no expression": (config(alpha_pattern={"(": 1}), "scaling", "alpha_pattern"),
    "another rank": (config(r=8), "rank", "lora_A has rank 4 and lora_B 4, but"),
    "another rank of some": (config(rank_pattern={"v_proj": 2}), "rank", "says 2"),
    "ranks differ": (
        factor(f"{Q0}.lora_A.weight", lambda A: A[:2].clone()),
        "rank",
        "lora_A has rank 2 and lora_B 4",
    ),
    "no A": (dropped(f"{Q0}.lora_A"), "no-partner", "lora_B but no lora_A"),
    "no B": (dropped("lora_B"), "no-partner", "lora_A but no lora_B"),
    "nothing": (lambda tensors, values: tensors.clear(), "no-factors", "no LoRA factors"),
    "vector": (factor(f"{Q0}.lora_A.weight", lambda A: A[0]), "no-factor-shape", "(32,)"),
    "integers": (factor(f"{Q0}.lora_A.weight", lambda A: A.int()), "no-factor-shape", "int32"),
    "NaN": (factor(f"{Q0}.lora_A.weight", with_value(float("nan"))), "non-finite", "1 values"),
    "infinity": (factor(f"{V1}.lora_B.weight", with_value(float("inf"))), "non-finite", "1 values"),
    "beyond fp32": (
        factor(f"{Q0}.lora_B.weight", lambda B: B.double() * 1e300),
        "non-finite",
        "NaN or infinite",
    ),
    "overflow": (overflowing, "refused", "overflows fp32"),
    "misspelt": (renamed("q_proj", "q_prj"), "no-module", "model.layers.#.self_attn.q_proj"),
    "too many layers": (renamed("layers.1.", "layers.7."), "no-module", "has layers 0-1 only"),
    "another model": (renamed("model.layers", "transformer.h"), "no-module", "no such module"),
    "another size": (
        factor(f"{V1}.lora_B.weight", lambda B: B[:8].clone()),
        "shape",
        "B @ A is (8, 32), but the base's weight is (16, 32)",
    ),
    "no prefix": (renamed("base_model.model.", ""), "unknown-key", "lack the prefix"),
    "name of adapter": (renamed(".weight", ".default.weight"), "unknown-key", "adapter's name"),
    "another tool's": (renamed("lora_A", "lora_down"), "unknown-key", "another tool's"),
    "embedding": (
        added("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 96)),
        "no-partner",
        "lora_A but no lora_B",
    ),
    "magnitudes": (
        added(f"{Q0}.lora_magnitude_vector", torch.ones(32)),
        "refused",
        "has lora_magnitude_vector, but use_dora is",
    ),
    "whole tensor": (
        added("base_model.model.model.norm.weight", torch.ones(32)),
        "unknown-key",
        "whole tensors",
    ),
    "bias of a factor": (
        added(f"{Q0}.lora_B.bias", torch.ones(32)),
        "refused",
        "has lora_B.bias, but lora_bias is",
    ),
    "strange": (added("thing", torch.ones(1)), "unknown-key", "not understood"),
}

SOUND: dict[str, tuple[Edit, str | None, str]] = {
    "as it is": (config(), None, ""),
    "rsLoRA": (config(use_rslora=True), None, ""),
    "half precision": (
        lambda tensors, values: tensors.update({n: t.half() for n, t in tensors.items()}),
        None,
        "",
    ),
    "dead pair": (factor(f"{Q0}.lora_B.weight", torch.zeros_like), "dead", "would not change"),
    "untrained": (
        lambda tensors, values: tensors.update(
            {n: t * 0 for n, t in tensors.items() if "lora_B" in n}
        ),
        "dead",
        "the merged model would be the base",
    ),
    "alpha 0": (config(lora_alpha=0), "zero-scaling", "scaling is 0"),
    "misspelt target": (
        config(target_modules=["q_proj", "v_proj", "down_prj"]),
        "target-unmatched",
        "down_prj, which is no module of the base",
    ),
    "misspelt expression": (
        config(target_modules=r".*\.q_prj"),
        "target-unmatched",
        "matches no module",
    ),
    "untargeted": (config(target_modules=["q_proj"]), "untargeted", "does not select them"),
    "incomplete": (dropped("layers.1.self_attn"), "not-adapted", "no factors in the file"),
    "another base's name": (
        config(base_model_name_or_path="bigcode/starcoder2-3b"),
        "base-name",
        "names bigcode/starcoder2-3b",
    ),
}
