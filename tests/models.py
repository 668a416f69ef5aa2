"""Small models and adapters for the tests, made from their configurations with a fixed seed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
    Starcoder2Config,
    T5Config,
    ViTConfig,
)

_FACTOR = re.compile(r"lora_(embedding_)?[AB]\b")

_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ENCODER = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_DECODER),
    "qwen2": Qwen2Config(**_DECODER),
    "mistral": MistralConfig(**_DECODER),
    "starcoder2": Starcoder2Config(**_DECODER, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma": GemmaConfig(**_DECODER, head_dim=8),
    "phi": PhiConfig(**_DECODER),
    "gpt_neox": GPTNeoXConfig(**_ENCODER),
    "opt": OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "mixtral": MixtralConfig(**_DECODER, num_local_experts=4),
    "bert": BertConfig(**_ENCODER),
    "roberta": RobertaConfig(**_ENCODER),
    "t5": T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "vit": ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    ),
}
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "o_proj", "gate_proj"],
    "mistral": ["q_proj", "v_proj", "up_proj"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "gemma": ["q_proj", "o_proj", "up_proj"],
    "phi": ["q_proj", "dense", "fc2"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "opt": ["k_proj", "out_proj", "fc1"],
    "mixtral": ["q_proj", "v_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "roberta": ["key", "output.dense"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "o_proj", "fc1"],
}
FAMILIES = ["llama", "qwen2", "mistral", "starcoder2", "gpt2"]  # those that most tests are about
ALL_FAMILIES = list(CONFIGS)

_AUTO: dict[str, Any] = {
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
}


def make_base(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a small random model; returns its directory."""
    torch.manual_seed(seed)
    model = auto_class(family).from_config(copy.deepcopy(CONFIGS[family]))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: nothing is exactly 0 or 1
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def make_adapter(
    directory: Path,
    base: Path,
    *,
    seed: int = 1,
    scale: float = 0.02,
    **config: Any,
) -> Path:
    """Save a LoRA adapter with random A and B for a base; returns its directory.

    Args:
        scale: standard deviation of B; A keeps PEFT's initialisation.
        config: fields of LoraConfig, over r = 4, alpha = 8 and the family's target modules.
    """
    model = load(base)
    family = model.config.model_type
    fields = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS.get(family), **config}
    fields.setdefault("fan_in_fan_out", family == "gpt2")
    if family not in _AUTO:
        fields.setdefault("task_type", "CAUSAL_LM")
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or (_FACTOR.search(name) and not parameter.any()):
                parameter.normal_(0, scale)
            elif parameter.requires_grad and not _FACTOR.search(name):  # whole tensors, magnitudes
                parameter.add_(torch.randn_like(parameter) * scale)
    adapted.save_pretrained(directory)
    return directory


def auto_class(family: str) -> Any:
    """The auto class of a family's usual head: causal, masked or sequence-to-sequence, ..."""
    return _AUTO.get(family, AutoModelForCausalLM)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model as transformers loads it in a dtype."""
    family = AutoConfig.from_pretrained(directory).model_type
    return auto_class(family).from_pretrained(directory, dtype=dtype)


def peft_merge(
    base: Path, adapter: Path, dtype: torch.dtype, *, safe_merge: bool = False, **options: Any
) -> PreTrainedModel:
    """PEFT's own merge, the reference."""
    model = PeftModel.from_pretrained(load(base, dtype), adapter, **options)
    return model.merge_and_unload(safe_merge=safe_merge)
