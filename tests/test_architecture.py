"""A parameter's place, read off its name, for the families that people adapt."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, Starcoder2Config

from taskvec.architecture import Place, fold_names, layer_split, place

PLACES = {
    # StarCoder2, Llama, Qwen2, Mistral
    "model.layers.3.self_attn.q_proj.weight": Place(3, "attention", "q_proj", "weight"),
    "model.layers.29.self_attn.o_proj.bias": Place(29, "attention", "o_proj", "bias"),
    "model.layers.0.mlp.c_fc.weight": Place(0, "mlp", "c_fc", "weight"),
    "model.layers.0.mlp.down_proj.weight": Place(0, "mlp", "down_proj", "weight"),
    "model.layers.7.input_layernorm.bias": Place(7, "norm", "input_layernorm", "bias"),
    "model.layers.7.self_attn.q_norm.weight": Place(7, "norm", "q_norm", "weight"),
    "model.embed_tokens.weight": Place(None, "embedding", "embed_tokens", "weight"),
    "model.norm.weight": Place(None, "norm", "norm", "weight"),
    "lm_head.weight": Place(None, "other", "lm_head", "weight"),
    # GPT-2, with and without the prefix of its head
    "transformer.h.11.attn.c_attn.weight": Place(11, "attention", "c_attn", "weight"),
    "h.11.attn.c_proj.weight": Place(11, "attention", "c_proj", "weight"),
    "h.0.mlp.c_proj.weight": Place(0, "mlp", "c_proj", "weight"),
    "h.0.ln_1.weight": Place(0, "norm", "ln_1", "weight"),
    "transformer.ln_f.bias": Place(None, "norm", "ln_f", "bias"),
    "wte.weight": Place(None, "embedding", "wte", "weight"),
    # Mixtures of experts: the layer is the first number
    "model.layers.5.block_sparse_moe.experts.7.w1.weight": Place(5, "mlp", "w1", "weight"),
    "model.layers.5.mlp.shared_expert.gate_proj.weight": Place(5, "mlp", "gate_proj", "weight"),
    # T5, BERT, Falcon
    "shared.weight": Place(None, "embedding", "shared", "weight"),
    "encoder.block.2.layer.0.SelfAttention.q.weight": Place(2, "attention", "q", "weight"),
    "encoder.block.2.layer.1.DenseReluDense.wi.weight": Place(2, "mlp", "wi", "weight"),
    "encoder.layer.4.attention.output.LayerNorm.bias": Place(4, "norm", "LayerNorm", "bias"),
    "transformer.h.1.self_attention.query_key_value.weight": Place(
        1, "attention", "query_key_value", "weight"
    ),
    # Names that say nothing
    "weight": Place(None, "other", "weight", "weight"),
    "0": Place(0, "other", "0", "0"),
    "": Place(None, "other", "", ""),
}


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    assert place(name) == PLACES[name]


def test_starcoder2_3b_has_the_483_parameters_that_are_documented():
    with torch.device("meta"):  # its real shapes, without its 12 GB
        model = AutoModelForCausalLM.from_config(Starcoder2Config())
    places = {name: place(name) for name, _ in model.named_parameters()}
    assert len(places) == 483
    assert Counter(found.block for found in places.values()) == {
        "attention": 30 * 8,
        "mlp": 30 * 4,
        "norm": 30 * 4 + 2,
        "embedding": 1,
    }
    layers = Counter(found.layer for found in places.values())
    assert layers[None] == 3
    assert all(layers[layer] == 16 for layer in range(30))


def test_a_name_is_cut_at_its_first_number():
    assert layer_split("decoder.block.3.layer.1.wi.weight") == (
        "decoder.block",
        3,
        "layer.1.wi.weight",
    )
    assert layer_split("h.0.w") == ("h", 0, "w")
    assert layer_split("model.norm.weight") is None
    assert layer_split("params.3") is None  # a number at the end is no layer


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["h.0.w", "h.1.w", "h.3.w", "b"], ["h.0-1,3.w", "b"]),
        ([f"l.{i}.{p}_proj" for i in range(30) for p in "qv"], ["l.0-29.q_proj", "l.0-29.v_proj"]),
        (["h.2.w"], ["h.2.w"]),
        (["h.2.w", "h.2.w"], ["h.2.w"]),
        ([], []),
    ],
)
def test_names_that_differ_in_numbers_only_fold_into_one(names, folded):
    assert fold_names(names) == folded
