"""A PEFT adapter: which parameters it changes, and by how much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from taskvec.adapter import open_adapter
from taskvec.checkpoint import open_checkpoint
from taskvec.cli import UserError
from taskvec.updates.products import LowRank
from tests.checks import edit_json, edit_tensors
from tests.models import FAMILIES, TARGETS, load

CPU = torch.device("cpu")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_layers(base, adapter):
    """PEFT's own LoRA layers by module name."""
    model = PeftModel.from_pretrained(load(base), adapter)
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def opened(base, adapter):
    """Scalings, parameters and full-size deltas of an adapter."""
    with open_checkpoint(str(base)) as model, open_adapter(str(adapter), model) as opened:
        return {name: opened.update(name, CPU) for name in opened.parameters}


def refused(base, adapter, message):
    with pytest.raises(UserError, match=message):
        opened(base, adapter)


# -- the delta ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [8, 10 / 3])
def test_the_delta_is_pefts_bit_for_bit_whole_and_in_rows(tiny, family, alpha):
    base = tiny.base(family)
    adapter = tiny.adapter(base, lora_alpha=alpha)
    layers, updates = peft_layers(base, adapter), opened(base, adapter)
    assert {f"{module}.weight" for module in layers} == set(updates)
    for module, layer in layers.items():
        theirs = layer.get_delta_weight("default").detach()
        mine = updates[f"{module}.weight"]
        assert mine.shape == theirs.shape
        assert mine.scaling == layer.scaling["default"]
        assert mine.rank == layer.r["default"]
        rows = theirs.shape[0]
        for start, stop in [(0, rows), (0, 2), (3, 8), (rows - 2, rows)]:
            assert torch.equal(mine.delta(start, stop), theirs[start:stop])


@pytest.mark.parametrize("rank", [1, 2, 8, 33, 64])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_rows_have_the_bits_of_the_whole_at_real_widths(rank, transposed):
    torch.manual_seed(rank)
    A, B = torch.randn(rank, 1000), torch.randn(1537, rank)
    update = LowRank("w", A, B, 4 / 3, transposed)
    product = (B @ A) * (4 / 3)  # as PEFT's Linear.get_delta_weight computes it
    whole = product.T if transposed else product
    assert update.shape == tuple(whole.shape)
    rows = whole.shape[0]
    blocks = [
        (start, min(start + step, rows)) for step in (341, 700) for start in range(0, rows, step)
    ]
    for start, stop in [(0, 2), (3, 5), (rows - 2, rows), *blocks]:
        assert torch.equal(update.delta(start, stop), whole[start:stop])


@pytest.mark.parametrize("transposed", [False, True])
def test_exact_and_magnitude_are_numpys_float64(transposed):
    torch.manual_seed(0)
    update = LowRank("w", torch.randn(5, 30), torch.randn(20, 5), -0.3, transposed)
    A, B = (factor.double().numpy() for factor in (update.A, update.B))
    exact, magnitude = -0.3 * (B @ A), 0.3 * (abs(B) @ abs(A))
    sums = 0.3 * (abs(B).sum(1)[:, None] + abs(A).sum(0)[None, :])
    if transposed:
        exact, magnitude, sums = exact.T, magnitude.T, sums.T
    for mine, reference in [
        (update.exact(2, 9), exact[2:9]),
        (update.magnitude(2, 9), magnitude[2:9]),
    ]:
        assert mine.dtype == torch.float64
        np.testing.assert_allclose(mine.numpy(), reference, rtol=1e-13, atol=1e-13)


def test_a_delta_worked_by_hand():
    update = LowRank("w", torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-2.0]]), 0.5)
    assert update.delta(0, 2).tolist() == [[0.5, 1.0, 1.5], [-1.0, -2.0, -3.0]]
    turned = LowRank("w", update.A, update.B, 0.5, transposed=True)
    assert turned.delta(1, 3).tolist() == [[1.0, -2.0], [1.5, -3.0]]


def test_prescaling_folds_the_scaling_into_b_before_the_product():
    torch.manual_seed(0)
    A, B = torch.randn(8, 40), torch.randn(30, 8)
    third = LowRank("w", A, B, 1 / 3)
    assert torch.equal(third.delta(0, 30, prescaled=True), (B * (1 / 3)) @ A)
    assert not torch.equal(third.delta(0, 30, prescaled=True), third.delta(0, 30))
    half = LowRank("w", A, B, 0.5)  # a power of two commutes with every rounding
    assert torch.equal(half.delta(0, 30, prescaled=True), half.delta(0, 30))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_factors_are_those_stored_in_that_dtype(dtype):
    torch.manual_seed(0)
    update = LowRank("w", torch.randn(4, 9), torch.randn(7, 4), 2.0, True)
    rounded = update.rounded_factors(dtype)
    assert torch.equal(rounded.A, update.A.to(dtype).float())
    assert torch.equal(rounded.B, update.B.to(dtype).float())
    assert (rounded.scaling, rounded.transposed) == (2.0, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_float_dtype_are_raised_to_fp32(llama, llama_lora, copied, dtype):
    adapter = copied(llama_lora)
    edit_tensors(
        adapter / WEIGHTS, lambda all: all.update({key: t.to(dtype) for key, t in all.items()})
    )
    stored = load_file(adapter / "adapter_model.safetensors")
    for name, update in opened(llama, adapter).items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        assert update.A.dtype == update.B.dtype == torch.float32
        assert torch.equal(update.A, stored[f"{key}.lora_A.weight"].float())
        assert torch.equal(update.B, stored[f"{key}.lora_B.weight"].float())


# -- scalings ----------------------------------------------------------------------

PATTERNS = {
    "alpha over r": {"r": 4, "lora_alpha": 7},
    "rsLoRA": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "alpha zero": {"lora_alpha": 0},
    "alpha negative": {"lora_alpha": -3},
    "alpha fractional": {"lora_alpha": 0.1},
    "rank one": {"r": 1, "lora_alpha": 3},
    "a module's own rank": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}},
    "a module's own alpha": {"alpha_pattern": {"v_proj": 5, "down_proj": 9}},
    "both, as regular expressions": {
        "rank_pattern": {r"layers\.0\..*_proj": 2, "q_proj": 6},
        "alpha_pattern": {"q_proj": 3, r".*\.1\..*": 11},
    },
    "the first match counts": {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "q_proj": 3}},
    "no match within a word": {"rank_pattern": {"proj": 2, "ayers.0.self_attn.q_proj": 2}},
    "rsLoRA with patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"layers.0.mlp.down_proj": 1},
    },
    "some layers only": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("settings", PATTERNS.values(), ids=PATTERNS)
def test_rank_scaling_and_coverage_are_pefts(tiny, llama, settings):
    adapter = tiny.adapter(llama, **settings)
    theirs = {
        f"{module}.weight": (layer.r["default"], layer.scaling["default"])
        for module, layer in peft_layers(llama, adapter).items()
    }
    mine = {name: (found.rank, found.scaling) for name, found in opened(llama, adapter).items()}
    assert mine == theirs


def test_parameters_come_in_the_order_of_the_base_with_their_scalings(llama, llama_lora):
    with open_checkpoint(str(llama)) as base, open_adapter(str(llama_lora), base) as adapter:
        assert adapter.parameters == [name for name in base.tensors if name in adapter.scalings]
        assert set(adapter.scalings.values()) == {2.0}
        stored = load_file(llama_lora / "adapter_model.safetensors").values()
        assert adapter.stored_elements == sum(tensor.numel() for tensor in stored)
        assert adapter.stored_bytes == 4 * adapter.stored_elements
        assert [file.name for file in adapter.files] == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]


def test_target_modules_may_name_modules_that_do_not_exist(llama, llama_lora, copied):
    adapter = copied(llama_lora)
    edit_json(adapter / CONFIG, target_modules=["q_proj", "no_such_module"])
    assert len(opened(llama, adapter)) == 6


@pytest.mark.parametrize("start", ["gaussian", "eva", "mica", False])
def test_initialisations_that_leave_the_base_alone_are_plain_lora(tiny, llama, copied, start):
    adapter = copied(tiny.adapter(llama))
    edit_json(adapter / CONFIG, init_lora_weights=start)
    updates = opened(llama, adapter)
    for module, layer in peft_layers(llama, adapter).items():
        theirs = layer.get_delta_weight("default").detach()
        assert torch.equal(updates[f"{module}.weight"].delta(0, theirs.shape[0]), theirs)


# -- orientation -------------------------------------------------------------------


def conv_gpt2(tmp_path, targets, **config):
    """A GPT-2 with an untied head and an adapter on some of its modules."""
    torch.manual_seed(0)
    settings = {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**settings, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    return tmp_path / "base", tmp_path / "lora"


@pytest.mark.parametrize(
    "targets", [["attn.c_proj"], ["c_attn"], ["c_attn", "attn.c_proj", "c_fc"], ["c_fc", "lm_head"]]
)
def test_conv1d_weights_are_transposed_as_in_peft(tmp_path, targets):
    base, adapter = conv_gpt2(tmp_path, targets)
    updates = opened(base, adapter)
    for module, layer in peft_layers(base, adapter).items():
        theirs = layer.get_delta_weight("default").detach()
        mine = updates[f"{module}.weight"]
        assert torch.equal(mine.delta(0, mine.shape[0]), theirs)


def test_a_rectangular_weight_shows_its_orientation_whatever_the_flag_says(tmp_path):
    base, adapter = conv_gpt2(tmp_path, ["c_attn"], fan_in_fan_out=True)
    right = opened(base, adapter)["transformer.h.0.attn.c_attn.weight"]
    edit_json(adapter / CONFIG, fan_in_fan_out=False)
    assert torch.equal(
        opened(base, adapter)["transformer.h.0.attn.c_attn.weight"].delta(0, 32),
        right.delta(0, 32),
    )


def test_a_square_weight_whose_orientation_is_in_doubt_is_refused(tmp_path):
    base, adapter = conv_gpt2(tmp_path, ["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    edit_json(adapter / CONFIG, fan_in_fan_out=False)
    refused(
        base,
        adapter,
        r"fan_in_fan_out is False, but transformer\.h\.0\.attn\.c_attn\.weight is stored the other "
        r"way, so the orientation of the square transformer\.h\.0\.attn\.c_proj\.weight is not "
        r"known; set it to True",
    )


def test_two_kinds_of_layers_under_one_flag_are_refused_where_a_square_depends_on_it(tmp_path):
    base, adapter = conv_gpt2(tmp_path, ["attn.c_proj", "c_attn", "lm_head"])
    refused(
        base, adapter, r"the orientation of the square .*c_proj\.weight is not known; save each"
    )


# -- names -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_saved_without_its_head_takes_an_adapter_trained_with_one(tiny, tmp_path, family):
    base = tiny.base(family)
    adapter = tiny.adapter(base)
    load(base).base_model.save_pretrained(tmp_path / "backbone")
    with_head, without = opened(base, adapter), opened(tmp_path / "backbone", adapter)
    assert [name.split(".", 1)[1] for name in with_head] == list(without)
    for name, update in with_head.items():
        assert torch.equal(without[name.split(".", 1)[1]].A, update.A)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_saved_with_its_head_takes_an_adapter_trained_without_one(tiny, tmp_path, family):
    base = tiny.base(family)
    backbone = AutoModel.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")
    get_peft_model(backbone, config).save_pretrained(tmp_path)
    head = "transformer" if family == "gpt2" else "model"
    names = list(opened(base, tmp_path))
    assert all(name.startswith(f"{head}.") for name in names)
    assert set(names) == set(opened(base, tiny.adapter(base)))


def test_a_module_that_the_base_has_not_got_is_named(tiny, llama):
    gpt2 = tiny.base("gpt2")
    message = r"adapts transformer\.h\.0\.attn\.c_attn, which .* has not got"
    refused(llama, tiny.adapter(gpt2), message)


def test_one_module_too_many_is_named(tiny, llama, llama_lora, copied):
    adapter = copied(llama_lora)

    def rename(tensors):
        for side in "AB":
            tensors[f"base_model.model.model.layers.9.mlp.down_proj.lora_{side}.weight"] = (
                tensors.pop(f"base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight")
            )

    edit_tensors(adapter / WEIGHTS, rename)
    refused(llama, adapter, r"adapts model\.layers\.9\.mlp\.down_proj, which .* has not got")
