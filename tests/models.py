"""Small models and adapters for the tests, made from their configurations with a fixed seed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Starcoder2Config,
)

_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_DECODER),
    "qwen2": Qwen2Config(**_DECODER),
    "mistral": MistralConfig(**_DECODER),
    "starcoder2": Starcoder2Config(**_DECODER, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "o_proj", "gate_proj"],
    "mistral": ["q_proj", "v_proj", "up_proj"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
}
FAMILIES = list(CONFIGS)


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
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
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
    fields = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], **config}
    fields.setdefault("fan_in_fan_out", family == "gpt2")
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)
    adapted.save_pretrained(directory)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model as transformers loads it in a dtype."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def peft_merge(
    base: Path, adapter: Path, dtype: torch.dtype, *, safe_merge: bool = False, **options: Any
) -> PreTrainedModel:
    """PEFT's own merge, the reference."""
    model = PeftModel.from_pretrained(load(base, dtype), adapter, **options)
    return model.merge_and_unload(safe_merge=safe_merge)


def save_byte_tokenizer(directory: Path, *, masked: bool = False) -> int:
    """Save a tokenizer whose tokens are bytes; returns how many there are.

    Args:
        masked: with [CLS], [SEP] and [MASK], as BERT has them; otherwise with an end of text.
    """
    special = ["<pad>", "<cls>", "<sep>", "<mask>"] if masked else ["<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if masked:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", special_tokens=[("<cls>", 1), ("<sep>", 2)]
        )
    names = ("pad_token", "cls_token", "sep_token", "mask_token") if masked else ("eos_token",)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, special, strict=True))
    ).save_pretrained(directory)
    return len(vocabulary)
