"""Adapters that are no LoRA, or not of this base: refused by name, never merged by guess."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import merge_lora
from taskvec.adapter import open_adapter
from taskvec.checkpoint import open_checkpoint
from taskvec.cli import UserError
from tests.adapter_kinds import make_kind
from tests.checks import edit_json, edit_tensors

CPU = torch.device("cpu")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}"
EMBEDDING = "base_model.model.model.embed_tokens"


def refused(base, adapter, message):
    """Opening the adapter, or reading its factors, ends in a message."""
    with pytest.raises(UserError, match=message):
        with open_checkpoint(str(base)) as model, open_adapter(str(adapter), model) as opened:
            for name in opened.parameters:
                opened.update(name, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type is 'LOHA': only LORA is supported; merge it with PEFT"),
        ({"peft_type": "LOKR"}, r"'LOKR': only LORA is supported"),
        ({"peft_type": "IA3"}, r"'IA3': only LORA is supported"),
        ({"peft_type": "ADALORA"}, r"'ADALORA': only LORA is supported"),
        (
            {"peft_type": "XLORA"},
            r"'XLORA': it mixes adapters anew for every token.*keep it beside",
        ),
        ({"peft_type": "PROMPT_TUNING"}, r"it adds inputs and changes no weight; keep it beside"),
        ({"peft_type": "PREFIX_TUNING"}, r"it adds inputs and changes no weight"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "has no lora_magnitude_vector, but use_dora is True"),
        ({"use_qalora": True}, "use_qalora is set: QA-LoRA"),
        ({"lora_bias": True}, "has no lora_B.bias, but lora_bias is True"),
        ({"bias": "some"}, "bias is 'some', not none, all or lora_only"),
        ({"modules_to_save": ["lm_head"]}, r"holds no lm_head\.weight, although modules_to_save"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', not a list of names"),
        ({"trainable_token_indices": [1]}, "but there are no rows of tokens"),
        (
            {"target_modules": [], "target_parameters": ["w"]},
            r"adapts model\.layers\.0.*_proj\.w, which .* has not got",
        ),
        ({"kasa_config": {"beta": 1}}, "kasa_config is set: KaSA takes singular values off"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set: aLoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        (
            {"init_lora_weights": "olora"},
            "'olora', which changes the base itself; save it as plain",
        ),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga'"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights is "),
        ({"r": 0}, r"r of model\.layers.* is 0, not a positive integer"),
        ({"r": -4}, "is -4, not a positive integer"),
        ({"r": "4"}, "is '4', not a positive integer"),
        ({"r": 4.0}, r"is 4\.0, not a positive integer"),
        ({"r": None}, "is None, not a positive integer"),
        ({"r": True}, "is True, not a positive integer"),
        ({"r": 10**400, "use_rslora": True}, "not a positive integer"),
        ({"r": 8}, r"down_proj: lora_A \(4, 48\) and lora_B \(32, 4\) do not have the rank 8"),
        ({"lora_alpha": "8"}, "lora_alpha of .* is '8', not a number"),
        ({"lora_alpha": None}, "lora_alpha of .* is None, not a number"),
        ({"lora_alpha": True}, "lora_alpha of .* is True, not a number"),
        ({"lora_alpha": math.inf}, "lora_alpha of .* is inf, not a number"),
        ({"lora_alpha": math.nan}, "lora_alpha of .* is nan, not a number"),
        ({"lora_alpha": -1e250}, "lora_alpha of .* is -1e\\+250, not a number up to 1e\\+60"),
        ({"lora_alpha": 10**400}, "lora_alpha of .*, not a number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*, not a mapping"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: '\('"),
        ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha of .*q_proj is '8'"),
    ],
)
def test_a_configuration_that_cannot_be_merged_is_refused_by_name(
    llama, llama_lora, copied, changes, message
):
    adapter = copied(llama_lora)
    edit_json(adapter / CONFIG, **changes)
    refused(llama, adapter, rf"adapter_config\.json.*{message}|adapter_model.*{message}")


def test_an_adapter_without_its_config_or_weights(llama, llama_lora, copied):
    adapter = copied(llama_lora)
    (adapter / "adapter_model.safetensors").unlink()
    refused(
        llama, adapter, r"holds no adapter_model\.safetensors; PEFT's save_pretrained\(\) writes"
    )
    (adapter / "adapter_config.json").unlink()
    refused(llama, adapter, r"holds no adapter_config\.json, so its scaling is unknown")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), rf"{Q0} has lora_A but no lora_B"),
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), rf"{Q0} has lora_B but no lora_A"),
        (lambda t: t.clear(), "holds no LoRA tensors"),
        (
            lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(32)}),
            "q_proj has lora_magnitude_vector, but use_dora is False",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
            r"norm\.weight: a whole tensor that neither modules_to_save nor bias of",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32)}),
            r"q_proj\.lora_A\.weight: not a tensor that PEFT's LoRA writes",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}),
            r"lora_A\.weight: torch\.int32 \(4, 32\) is no LoRA factor",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 32, 1, 1)}),
            r"q_proj: lora_A \(4, 32, 1, 1\) and lora_B \(32, 4\) are no factors of a matrix",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(3, 32)}),
            r"lora_A \(3, 32\) and lora_B \(32, 4\) do not have the rank 4",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 31)}),
            r"B @ A is \(32, 31\), but model\.layers\.0\.self_attn\.q_proj\.weight in .* is "
            r"\(32, 32\)",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(64, 4)}),
            r"B @ A is \(64, 32\), but .* is \(32, 32\)",
        ),
        (
            lambda t: t[f"{KEY}.lora_A.weight"][2, 5:7].fill_(math.nan),
            r"q_proj\.lora_A\.weight: 2 values are NaN or infinite",
        ),
        (
            lambda t: t[f"{KEY}.lora_B.weight"][0, 0].fill_(-math.inf),
            r"q_proj\.lora_B\.weight: 1 values are NaN or infinite",
        ),
    ],
)
def test_tensors_that_are_no_lora_are_refused_by_name(llama, llama_lora, copied, change, message):
    adapter = copied(llama_lora)
    edit_tensors(adapter / WEIGHTS, change)
    refused(llama, adapter, rf"adapter_model\.safetensors: .*{message}")


# What other software, and PEFT's own state_dict(), makes of base_model.model.X.lora_A.weight.
OTHER_KEYS = {
    "the adapter's name": (
        lambda key: key.replace("_A.weight", "_A.default.weight"),
        r"keys carry an adapter's name.*; write the adapter with save_pretrained\(\)",
    ),
    "no prefix": (
        lambda key: key.removeprefix("base_model.model."),
        r"keys lack the prefix.*; put base_model\.model\. before",
    ),
    "another tool's": (
        lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        r"another tool's\); convert the adapter",
    ),
    "wrapped twice": (
        lambda key: f"base_model.model.{key}",
        r"the keys have the prefix base_model\.model\. twice",
    ),
}


@pytest.mark.parametrize("case", OTHER_KEYS)
def test_keys_that_peft_would_skip_in_silence_are_refused(llama, llama_lora, copied, case):
    rename, message = OTHER_KEYS[case]
    adapter = copied(llama_lora)

    def change(tensors):
        renamed = {rename(key): value for key, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(adapter / WEIGHTS, change)
    refused(llama, adapter, message)


def test_a_base_parameter_that_is_no_float_is_refused(llama, llama_lora, copied):
    base = copied(llama)
    packed = torch.ones(32, 32, dtype=torch.int8)
    edit_tensors(base / "model.safetensors", lambda t: t.update({f"{Q0}.weight": packed}))
    refused(base, llama_lora, r"q_proj\.weight is torch\.int8, not a float")


def test_a_quantised_base_is_called_that_and_not_misshapen(llama, llama_lora, copied):
    base = copied(llama)
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(base / "config.json", quantization_config=quantisation)
    packed = torch.ones(512, 1, dtype=torch.uint8)  # as bitsandbytes packs it
    edit_tensors(base / "model.safetensors", lambda t: t.update({f"{Q0}.weight": packed}))
    refused(base, llama_lora, r"is quantised \(bitsandbytes\)")


WRONG_PARTS: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "token beyond the vocabulary": (
        "tokens",
        {"trainable_token_indices": [5, 1, 96]},
        None,
        r"token 96 is beyond the 96 of model\.embed_tokens\.weight; resize",
    ),
    "another number of tokens": (
        "tokens",
        {"trainable_token_indices": [5, 1]},
        None,
        r"rows \(3, 32\) do not fit the 2 token indices",
    ),
    "tokens twice": (
        "tokens",
        {"trainable_token_indices": [5, 5, 1]},
        None,
        "does not give the tokens of model.embed_tokens as different whole numbers",
    ),
    "magnitudes of another size": (
        "DoRA",
        {},
        lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(31)}),
        r"lora_magnitude_vector \(31,\) does not fit the 32 outputs",
    ),
    "an embedding of another size": (
        "embedding",
        {},
        lambda t: t.update({f"{EMBEDDING}.lora_embedding_A": torch.ones(4, 95)}),
        r"embed_tokens: B @ A is \(95, 32\), but .* is \(96, 32\)",
    ),
    "a bias of another size": (
        "lora_bias",
        {},
        lambda t: t.update({f"{KEY}.lora_B.bias": torch.ones(31)}),
        r"q_proj: B @ A is \(31,\), but .*q_proj\.bias in .* is \(32,\)",
    ),
    "experts of another rank": (
        "experts",
        {"r": 3},
        None,
        r"do not have the rank 3 of adapter_config\.json",
    ),
    "a saved tensor of another size": (
        "modules_to_save",
        {},
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(97, 32)}),
        r"is \(97, 32\), but lm_head\.weight in .* is \(96, 32\); resize the base",
    ),
    "a saved tensor that is not finite": (
        "modules_to_save",
        {},
        lambda t: t["base_model.model.lm_head.weight"][1, 1].fill_(math.nan),
        "lm_head.weight: 1 values are NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_parts_that_do_not_fit_are_named(tiny, copied, tmp_path, case):
    kind, changes, change, message = WRONG_PARTS[case]
    base, adapter = make_kind(tiny, kind)
    adapter = copied(adapter)
    edit_json(adapter / CONFIG, **changes)
    if change is not None:
        edit_tensors(adapter / WEIGHTS, change)
    with pytest.raises(UserError, match=message):
        merge_lora.merge(str(base), str(adapter), tmp_path / "m", device="cpu")
    assert not (tmp_path / "m").exists()
