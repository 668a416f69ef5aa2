"""An adapter of every kind that is supported, on a small model each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from tests.conftest import TinyModels

# kind -> family and what LoraConfig has for it
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True, "r": 5}),
    "some layers": ("llama", {"layers_to_transform": [1]}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "Conv1D": ("gpt2", {}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "untied head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA, rsLoRA": ("qwen2", {"use_dora": True, "use_rslora": True, "r": 3, "lora_alpha": 5}),
    "DoRA of Conv1D": ("gpt2", {"use_dora": True}),
    "DoRA of an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "lora_bias": ("starcoder2", {"lora_bias": True, "lora_alpha": 7}),
    "lora_bias of Conv1D": ("gpt2", {"lora_bias": True}),
    "bias all": ("starcoder2", {"bias": "all"}),
    "bias lora_only": ("qwen2", {"bias": "lora_only"}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "tokens": ("llama", {"trainable_token_indices": [5, 1, 90]}),
    "tokens by module": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [2, 7], "lm_head": [3]}},
    ),
    "tokens of a tied embedding": ("starcoder2", {"trainable_token_indices": [0, 95]}),
    "experts": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        },
    ),
    "a parameter": ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "convolution": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "DoRA of a convolution": ("vit", {"target_modules": ["projection"], "use_dora": True}),
    "MiCA": ("llama", {"init_lora_weights": "mica"}),
}


def make_kind(tiny: TinyModels, kind: str, **settings: Any) -> tuple[Path, Path]:
    """A base and an adapter of a kind for it."""
    family, config = KINDS[kind]
    base = gpt_oss(tiny) if family == "gpt_oss" else tiny.base(family)
    return base, tiny.adapter(base, **config, **settings)


def gpt_oss(tiny: TinyModels) -> Path:
    """A small model whose experts are stacked in its file, (expert, in, out)."""

    def make(directory: Path) -> Path:
        torch.manual_seed(0)
        config = GptOssConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            head_dim=8,
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        model.save_pretrained(directory)
        return directory

    return tiny.once("gpt_oss", make)
