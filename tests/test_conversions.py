"""The tables of names against what transformers itself does to them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from taskvec.conversions import (
    CONVERSIONS,
    KEPT,
    KEPT_FROM_FP16,
    Conversion,
    Key,
    conversion_of,
    stays_in_fp32,
)

VLM = ("llava", "llava_next", "paligemma", "gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl")
SMALL = {
    "num_hidden_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "depths": [1, 1, 1, 1],
    "num_experts": 3,
    "num_local_experts": 3,
    "n_routed_experts": 3,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
}
# What a configuration has no usable default for.
NEEDED: dict[str, dict[str, Any]] = {
    "lfm2_moe": {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "dots1": {"n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 128},
}


def small(config):
    """A config of two layers and three experts, and so its parts."""
    for key, value in SMALL.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if isinstance(vars(config).get("layer_types"), list):
        config.layer_types = config.layer_types[:2]
    for part in ("text_config", "vision_config"):
        if getattr(config, part, None) is not None:
            small(getattr(config, part))
    return config


def skeleton(model_type):
    config = small(AutoConfig.for_model(model_type, **NEEDED.get(model_type, {})))
    if model_type in VLM:
        auto = AutoModelForImageTextToText
    else:
        auto = (
            AutoModelForCausalLM
            if type(config) in AutoModelForCausalLM._model_mapping
            else AutoModel
        )
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("model_type", CONVERSIONS)
def test_names_in_files_and_in_memory_have_the_same_key(model_type):
    model = skeleton(model_type)
    memory = model.state_dict()
    files = revert_weight_conversion(model, dict(memory))
    conversion = conversion_of({"model_type": model_type})
    found = {}
    for name, tensor in files.items():
        key = conversion.key(name)
        assert key.name in memory, name
        assert key not in found, name
        found[key] = tensor
    assert {key.name for key in found} == set(memory)
    assert files.keys() != memory.keys()
    for name, tensor in memory.items():
        assert conversion.key(name) == Key(name)  # a name in memory is its own
        parts = conversion.parts(name)
        pieces = {key: piece for key, piece in found.items() if key.name == name}
        if not parts or Key(name) in pieces:
            assert [piece.shape for piece in pieces.values()] == [tensor.shape], name
        else:  # experts by parts, in the order in which they are stacked
            experts, rows, columns = tensor.shape
            wanted = {Key(name, expert, part) for expert in range(experts) for part in range(parts)}
            assert set(pieces) == wanted
            assert all(piece.shape == (rows // parts, columns) for piece in pieces.values())


@pytest.mark.parametrize("model_type", sorted(KEPT | KEPT_FROM_FP16))
def test_what_stays_in_fp32_is_what_transformers_keeps_so(model_type):
    model = skeleton(model_type)
    config = {"model_type": model_type}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        plan = model._get_dtype_plan(dtype)
        for name in model.state_dict():
            wanted = any(re.search(pattern, name) for pattern in plan)
            assert stays_in_fp32(config, name, dtype) == wanted, name


def test_what_is_not_converted_keeps_its_names():
    for config in ({}, {"model_type": "llama"}, {"model_type": ["vit"]}):
        assert conversion_of(config) == Conversion()
    plain = Conversion()
    for name in ("model.layers.0.mlp.experts.3.w1.weight", "vit.encoder.layer.0.output.dense.bias"):
        assert plain.key(name) == Key(name)


def test_the_old_names_of_layer_norms_are_known_in_every_architecture():
    key = Conversion().key
    assert key("bert.embeddings.LayerNorm.gamma") == Key("bert.embeddings.LayerNorm.weight")
    assert key("bert.embeddings.LayerNorm.beta") == Key("bert.embeddings.LayerNorm.bias")
