"""A parameter's place, read off its name, for the families that people adapt."""

from __future__ import annotations

import dataclasses
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
    "decoder.block.2.layer.1.EncDecAttention.v.weight": Place(2, "attention", "v", "weight"),
    "decoder.block.2.layer.2.DenseReluDense.wo.weight": Place(2, "mlp", "wo", "weight"),
    "decoder.block.0.layer.0.layer_norm.weight": Place(0, "norm", "layer_norm", "weight"),
    "decoder.final_layer_norm.weight": Place(None, "norm", "final_layer_norm", "weight"),
    "bert.encoder.layer.4.attention.self.query.weight": Place(4, "attention", "query", "weight"),
    "bert.encoder.layer.4.attention.output.dense.bias": Place(4, "attention", "dense", "bias"),
    "bert.encoder.layer.4.intermediate.dense.weight": Place(4, "mlp", "dense", "weight"),
    "bert.encoder.layer.4.output.dense.weight": Place(4, "mlp", "dense", "weight"),
    "bert.embeddings.position_embeddings.weight": Place(
        None, "embedding", "position_embeddings", "weight"
    ),
    "cls.predictions.decoder.weight": Place(None, "other", "decoder", "weight"),
    # GPT-NeoX, OPT, Phi
    "gpt_neox.layers.1.attention.dense.weight": Place(1, "attention", "dense", "weight"),
    "gpt_neox.layers.1.mlp.dense_4h_to_h.bias": Place(1, "mlp", "dense_4h_to_h", "bias"),
    "gpt_neox.embed_in.weight": Place(None, "embedding", "embed_in", "weight"),
    "embed_out.weight": Place(None, "other", "embed_out", "weight"),
    "model.decoder.layers.1.fc1.weight": Place(1, "mlp", "fc1", "weight"),
    "model.decoder.layers.1.self_attn.out_proj.bias": Place(1, "attention", "out_proj", "bias"),
    "model.decoder.layers.1.self_attn_layer_norm.bias": Place(
        1, "norm", "self_attn_layer_norm", "bias"
    ),
    "model.decoder.embed_positions.weight": Place(None, "embedding", "embed_positions", "weight"),
    "model.layers.0.self_attn.dense.weight": Place(0, "attention", "dense", "weight"),
    # ViT, as in its files and as in memory
    "vit.encoder.layer.1.attention.attention.key.weight": Place(1, "attention", "key", "weight"),
    "vit.encoder.layer.1.output.dense.bias": Place(1, "mlp", "dense", "bias"),
    "vit.layers.1.mlp.fc2.weight": Place(1, "mlp", "fc2", "weight"),
    "vit.layers.1.layernorm_before.weight": Place(1, "norm", "layernorm_before", "weight"),
    "vit.embeddings.patch_embeddings.projection.weight": Place(
        None, "embedding", "projection", "weight"
    ),
    "vit.embeddings.cls_token": Place(None, "embedding", "embeddings", "cls_token"),
    "classifier.weight": Place(None, "other", "classifier", "weight"),
    # Names that say nothing
    "weight": Place(None, "other", "weight", "weight"),
    "0": Place(0, "other", "0", "0"),
    "": Place(None, "other", "", ""),
}


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    assert dataclasses.replace(place(name), stack="") == PLACES[name]


def test_layers_of_an_encoder_and_a_decoder_are_told_apart():
    assert place("encoder.block.0.layer.0.layer_norm.weight").stack == "encoder.block"
    assert place("decoder.block.0.layer.0.layer_norm.weight").stack == "decoder.block"
    assert place("model.layers.3.mlp.experts.7.w1.weight").stack == "model.layers"
    assert place("shared.weight").stack == ""


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
