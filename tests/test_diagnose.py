"""What diagnose says of merges that went wrong in ways that are known, because they were made so.

Deltas are taken from the adapter's files here, in float64 and without taskvec, and the wrong merges
are computed with plain torch, PEFT or a few steps of training.
"""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import compare_lora_task_vector
import merge_lora
from taskvec.adapter import open_adapter
from taskvec.checkpoint import open_checkpoint
from taskvec.compare import attribute_parameter, compare_parameter
from taskvec.diagnose import diagnose
from taskvec.diagnosis.outliers import Outliers
from taskvec.taskvector import FormedTaskVector
from tests.lab import DTYPES, everywhere
from tests.models import load, peft_merge

# --- merges that hold -------------------------------------------------------------------------


@everywhere
def test_a_merge_that_holds_has_no_cause(lab, family, precision, extracted):
    here = lab(family, precision)
    path = here.path()
    merge_lora.merge(str(here.base), str(here.lora), path, precision=precision, device="cpu")
    assert here.compare(path, extracted=extracted)["diagnosis"] == []


@pytest.mark.parametrize("options", [{}, {"safe_merge": True}, {"low_cpu_mem_usage": True}])
def test_merges_of_peft_have_no_cause(lab, options):
    here = lab("llama", "bf16")
    path = here.path()
    peft_merge(here.base, here.lora, torch.bfloat16, **options).save_pretrained(path)
    assert here.compare(path)["diagnosis"] == []


def test_diagnose_of_a_merge_that_holds_is_empty(lab):
    here, cpu = lab(), torch.device("cpu")
    with (
        open_checkpoint(str(here.base)) as base,
        open_adapter(str(here.lora), base) as adapter,
        open_checkpoint(str(here.model())) as merged,
    ):
        vector = FormedTaskVector("merged", merged)
        results = [
            compare_parameter(base, vector, name, adapter.update(name, cpu), cpu)
            if name in adapter.scalings
            else attribute_parameter(base, vector, name, cpu)
            for name in base.tensors
        ]
        assert diagnose(base, adapter, vector, results, cpu) == []


# --- nothing merged, or not everything --------------------------------------------------------


@everywhere
def test_a_base_that_was_only_stored_again(lab, family, precision, extracted):
    here = lab(family, precision)
    cause = here.cause(here.model(lambda name: None), extracted=extracted)
    assert cause["cause"] == "nothing_merged"
    assert sorted(cause["evidence"]["parameters"]) == sorted(here.names)
    assert cause["evidence"]["rounded_to"] == ([] if precision == "fp32" else [precision])


def test_a_directory_that_is_byte_identical_to_the_base(lab):
    here = lab()
    copy = here.path()
    shutil.copytree(here.base, copy)
    assert here.cause(copy)["cause"] == "nothing_merged"


def test_a_base_of_lower_precision_stored_as_fp32_and_nothing_merged(lab):
    here = lab()
    rounded = {name: weight.half().float() for name, weight in here.weights.items()}
    cause = here.cause(here.write(rounded))
    assert cause["cause"] == "nothing_merged"
    assert cause["evidence"]["rounded_to"] == ["fp16"]


def test_a_base_that_was_stored_again_in_two_formats(lab):
    here = lab("llama", "bf16")
    tensors = here.merged(lambda name: None)
    for name in (here.names[0], "lm_head.weight"):
        tensors[name] = here.weights[name]
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "nothing_merged"
    assert set(cause["evidence"]["parameters"]) == set(here.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_merged_into_the_embedding_that_it_is_tied_to(tiny, tmp_path, dtype):
    """As PEFT does it: one memory for both, so that the embedding changes too."""
    base = tiny.base("starcoder2")
    lora = tiny.adapter(base, target_modules=["q_proj", "lm_head"])
    peft_merge(base, lora, dtype).save_pretrained(tmp_path / "merged")
    found = compare_lora_task_vector.compare(
        str(base),
        str(lora),
        tmp_path / "comparison",
        finetuned_model=str(tmp_path / "merged"),
        generate_plots=False,
    )
    assert found.summary["certificate"]["verdict"] == "incomplete"
    (cause,) = found.summary["certificate"]["diagnosis"]
    assert cause["cause"] == "tied"
    assert "lm_head.weight was added to model.embed_tokens.weight as well" in cause["sentence"]


@everywhere
def test_one_kind_of_module_left_out(lab, family, precision, extracted):
    here = lab(family, precision)
    module = "v_proj" if family == "llama" else "c_fc"
    left_out = [name for name in here.names if module in name]
    cause = here.cause(
        here.model(lambda n: None if n in left_out else here.deltas.get(n)), extracted=extracted
    )
    assert cause["cause"] == "some_modules_not_merged"
    assert cause["evidence"]["parameters"] == left_out
    assert f"0-1.{'self_attn' if family == 'llama' else 'mlp'}.{module}" in cause["sentence"]
    assert f"2 of {len(here.names)} adapted parameters" in cause["sentence"]


def test_layers_left_out(lab):
    here = lab("llama", "bf16")
    left_out = [name for name in here.names if ".layers.0." in name]
    model = here.model(lambda name: None if name in left_out else here.deltas.get(name))
    cause = here.cause(model, extracted=True)
    assert cause["cause"] == "some_modules_not_merged"
    assert cause["evidence"]["parameters"] == left_out


def test_half_of_the_rows_of_one_parameter_left_out(lab):
    here = lab()
    tensors, name = here.merged(), here.names[0]
    tensors[name][:16] = here.weights[name][:16]
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "some_modules_not_merged"
    (part,) = cause["evidence"]["places"]
    assert (part["parameter"], part["first_row"], part["last_row"]) == (name, 0, 15)


# --- the wrong factor -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (2.0, "merged twice, or alpha doubled"),
        (-1.0, "subtracted"),
        (1 / 2, "scaling left out: B @ A was added as it is"),
        (4.0, "scaling left out: alpha was not divided"),
    ],
)
@everywhere
def test_a_wrong_factor_is_found_and_named(lab, family, precision, extracted, factor, words):
    here = lab(family, precision)  # r = 4, alpha = 8, s = 2
    model = here.model(lambda name: factor * here.deltas[name] if name in here.deltas else None)
    cause = here.cause(model, extracted=extracted)
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["factor"] == pytest.approx(factor, rel=1e-5)
    assert set(cause["evidence"]["parameters"]) == set(here.names)
    assert words in cause["sentence"]


@pytest.mark.parametrize("factor", [37.0, 1.3, -0.4, 0.01])
@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("gpt2", "bf16")])
def test_any_other_factor_is_measured(lab, family, precision, factor):
    here = lab(family, precision)
    model = here.model(lambda name: factor * here.deltas[name] if name in here.deltas else None)
    cause = here.cause(model)
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["readings"] == []
    for found in cause["evidence"]["factors"].values():
        assert found == pytest.approx(factor, rel=1e-6 if precision == "fp32" else 0.02)


@pytest.mark.parametrize(
    ("use_rslora", "factor"), [(False, math.sqrt(8)), (True, 1 / math.sqrt(8))]
)
def test_the_two_scalings_confused(lab, use_rslora, factor):
    here = lab("llama", "bf16", r=8, lora_alpha=12, use_rslora=use_rslora)
    model = here.model(lambda name: factor * here.deltas[name] if name in here.deltas else None)
    cause = here.cause(model)
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["factor"] == pytest.approx(factor, rel=1e-3)
    assert "rsLoRA" in cause["sentence"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_merged_twice_by_the_merge_script(lab, precision):
    here = lab("llama", precision)
    once, twice = here.path(), here.path()
    merge_lora.merge(str(here.base), str(here.lora), once, precision=precision, device="cpu")
    merge_lora.merge(str(once), str(here.lora), twice, precision=precision, device="cpu")
    cause = here.cause(twice)
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["factor"] == 2
    assert cause["evidence"]["reproduced_share"] == 1
    assert cause["evidence"]["readings"] == ["merged twice, or alpha doubled"]


def test_twice_by_sums_in_another_order_and_precision(lab):
    here = lab()
    tensors = here.merged()
    for name, delta in here.deltas.items():
        tensors[name] = (tensors[name].double() + delta).float()
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["factor"] == pytest.approx(2)


def test_merged_twice_where_bf16_loses_most_of_the_update(lab):
    """Deltas of half an ulp and less: the slope of T on delta says nothing, the bits do."""
    here = lab("llama", "bf16", stored="bf16", scale=2e-4)
    tensors = here.merged()
    for name, delta in here.deltas.items():
        tensors[name] = (tensors[name].double() + delta).bfloat16()
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["factor"] == 2


def test_a_factor_in_two_sums_that_bf16_rounds_each(lab):
    """No bound of one sum holds and no named factor fits: the subspace and the slope tell."""
    here = lab("llama", "bf16", stored="bf16")
    tensors = here.merged()
    for name, delta in here.deltas.items():
        tensors[name] = (tensors[name].double() + 0.7 * delta).bfloat16()
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["factor"] == pytest.approx(1.7, rel=0.02)
    assert all(found["subspace_overlap"] > 0.99 for found in cause["evidence"]["sampled"].values())


def test_each_factor_is_a_cause_of_its_own(lab):
    here = lab()
    factors = {"q_proj": 3.5, "v_proj": 0.7, "down_proj": 1.0}
    module = {name: name.split(".")[-2] for name in here.names}
    model = here.model(lambda n: factors[module[n]] * here.deltas[n] if n in module else None)
    found = {cause["evidence"]["factor"]: cause["evidence"] for cause in here.causes(model)}
    assert sorted(found) == pytest.approx([0.7, 3.5])
    assert all("v_proj" in name for name in found[min(found)]["parameters"])
    assert all("q_proj" in name for name in found[max(found)]["parameters"])


def test_scaling_left_out_is_one_cause_though_the_factors_differ(lab):
    here = lab("llama", "fp32", alpha_pattern={"q_proj": 20.0})
    factors = load_file(here.lora / "adapter_model.safetensors")

    def unscaled(name):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in factors:
            return factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()

    cause = here.cause(here.model(unscaled))
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["readings"] == ["scaling left out: B @ A was added as it is"]
    found = cause["evidence"]["factors"]
    assert {round(value, 6) for value in found.values()} == {0.5, 0.2}


@pytest.mark.parametrize("extracted", [False, True])
@pytest.mark.parametrize(
    ("precision", "settings"),
    [("fp32", {}), ("fp16", {}), ("bf16", {"stored": "bf16"}), ("fp32", {"use_dora": True})],
)
def test_base_and_merged_model_given_for_each_other(lab, precision, settings, extracted):
    here = lab("llama", precision, **settings)
    merged = here.path()
    merge_lora.merge(str(here.base), str(here.lora), merged, precision=precision, device="cpu")
    here.base, base = merged, here.base
    if extracted and precision == "fp32":  # T does not show the last bits of the merged model
        assert all(cause["cause"] != "swapped" for cause in here.causes(base, extracted=True))
        return
    cause = here.cause(base, extracted=extracted)
    assert cause["cause"] == "swapped"
    assert len(cause["evidence"]["parameters"]) == 6
    assert "Swap the two" in cause["sentence"]


def test_an_update_that_was_subtracted_is_not_taken_for_a_swap(lab):
    """By fl(W - D), as PEFT's unmerge computes it; but for the few where that rounds, fl(M + D)
    is W again.
    """
    here = lab("llama", "fp32", scale=1e-4)
    deltas = {name: delta.float() for name, delta in here.deltas.items()}
    tensors = {n: w - deltas[n] if n in deltas else w for n, w in here.weights.items()}
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "scaled"
    assert "subtracted instead of added, or base and merged model swapped" in cause["sentence"]


# --- the right delta in the wrong way ---------------------------------------------------------


@everywhere
def test_a_transposed_delta(lab, family, precision, extracted):
    here = lab(family, precision)
    square = [name for name, delta in here.deltas.items() if delta.shape[0] == delta.shape[1]]
    assert square
    model = here.model(lambda n: here.deltas[n].T if n in square else here.deltas.get(n))
    cause = here.cause(model, extracted=extracted)
    assert cause["cause"] == "transposed"
    assert cause["evidence"]["parameters"] == square


@everywhere
def test_a_transposed_delta_read_in_the_shape_of_the_weight(lab, family, precision, extracted):
    here = lab(family, precision)
    turned = {name: delta.T.reshape(delta.shape) for name, delta in here.deltas.items()}
    cause = here.cause(here.model(turned.get), extracted=extracted)
    assert cause["cause"] == "transposed"
    assert sorted(cause["evidence"]["parameters"]) == sorted(here.names)
    oblong = [name for name, delta in here.deltas.items() if delta.shape[0] != delta.shape[1]]
    assert cause["evidence"]["reshaped_parameters"] == oblong != []
    assert "its transpose, reshaped where that is not square, explains" in cause["sentence"]


@everywhere
def test_updates_of_two_layers_swapped(lab, family, precision, extracted):
    here = lab(family, precision)
    module = "q_proj" if family == "llama" else "c_attn"
    first, second = (name for name in here.names if module in name)
    other = {first: second, second: first}
    cause = here.cause(
        here.model(lambda name: here.deltas.get(other.get(name, name))), extracted=extracted
    )
    assert cause["cause"] == "misplaced"
    assert cause["evidence"]["update_of"] == other


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_and_unmerged_by_peft(lab, precision):
    here = lab("llama", precision)
    model = PeftModel.from_pretrained(load(here.base, here.dtype), here.lora)
    model.merge_adapter()
    model.unmerge_adapter()
    path = here.path()
    model.unload().save_pretrained(path)
    cause = here.cause(path)
    assert cause["cause"] == "merged_and_unmerged"
    assert sorted(cause["evidence"]["parameters"]) == sorted(here.names)


def test_noise_of_the_size_of_rounding_is_not_guessed_at(lab):
    """The adapted weights rounded up or down by chance: neither the base's bits nor the delta."""
    here = lab("llama", "bf16")
    torch.manual_seed(0)
    tensors = here.merged(lambda name: None)
    for name in here.names:
        chance = torch.rand(tensors[name].shape)
        step = (chance < 0.04).to(torch.int16) - (chance > 0.96).to(torch.int16)
        tensors[name].view(torch.int16).add_(step)
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "unknown"
    assert "only noise of the size of rounding" in cause["sentence"]


# --- the wrong base ---------------------------------------------------------------------------


@everywhere
def test_another_base(lab, tiny, family, precision, extracted):
    here = lab(family, precision)
    other = load_file(tiny.base(family, seed=5) / "model.safetensors")
    tensors = {n: (w.double() + here.deltas.get(n, 0)).to(here.dtype) for n, w in other.items()}
    cause = here.cause(here.write(tensors), extracted=extracted)
    assert cause["cause"] == "wrong_base"
    assert set(cause["evidence"]["changed_parameters"]) == set(here.weights) - set(here.names)
    assert cause["evidence"]["relative_change"] == pytest.approx(math.sqrt(2), rel=0.1)
    assert "the adapter's delta is in it" in cause["sentence"]


def test_another_base_without_the_adapter(lab, tiny):
    here = lab(scale=0.2)
    other = load_file(tiny.base("llama", seed=5) / "model.safetensors")
    cause = here.cause(here.write(other))
    assert cause["cause"] == "wrong_base"
    assert "the adapter's delta is not in it" in cause["sentence"]


@pytest.mark.parametrize("extracted", [False, True])
@pytest.mark.parametrize("lower", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_rounded_before_an_fp32_merge(lab, family, lower, extracted):
    here = lab(family)
    tensors = {}
    for name, weight in here.weights.items():
        rounded = weight.to(DTYPES[lower]).float()
        tensors[name] = (rounded.double() + here.deltas.get(name, 0)).float()
    cause = here.cause(here.write(tensors), extracted=extracted)
    assert cause["cause"] == "lower_precision_base"
    assert cause["evidence"]["format"] == lower
    assert cause["evidence"]["computed_in"] == "fp32"
    assert set(cause["evidence"]["parameters"]) == set(here.names)
    assert set(cause["evidence"]["cast_parameters"]) == set(here.weights) - set(here.names)


@pytest.mark.parametrize("extracted", [False, True])
@pytest.mark.parametrize("lower", ["fp16", "bf16"])
def test_only_what_the_adapter_leaves_alone_was_rounded(lab, lower, extracted):
    """Every adapted parameter is exact; all the same this is not base + adapter in fp32."""
    here = lab()
    tensors = here.merged()
    others = set(here.weights) - set(here.names)
    for name in others:
        tensors[name] = here.weights[name].to(DTYPES[lower]).float()
    cause = here.cause(here.write(tensors), extracted=extracted)
    assert cause["cause"] == "lower_precision_base"
    assert f"leaves alone was rounded to {lower} and stored as fp32" in cause["sentence"]
    assert cause["evidence"]["parameters"] == []
    changed = {name for name in others if not torch.equal(tensors[name], here.weights[name])}
    assert changed and set(cause["evidence"]["cast_parameters"]) == changed


@pytest.mark.parametrize("extracted", [False, True])
@pytest.mark.parametrize("lower", ["fp16", "bf16"])
def test_a_merge_by_peft_in_half_precision_stored_as_fp32(lab, lower, extracted):
    here = lab()
    path = here.path()
    peft_merge(here.base, here.lora, DTYPES[lower]).float().save_pretrained(path)
    cause = here.cause(path, extracted=extracted)
    assert cause["cause"] == "lower_precision_base"
    assert cause["evidence"]["format"] == lower
    assert cause["evidence"]["computed_in"] == lower


def test_a_bf16_merge_stored_as_fp16(lab):
    here = lab("llama", "fp16")
    tensors = {name: tensor.half() for name, tensor in here.merged(dtype=torch.bfloat16).items()}
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "lower_precision_base"
    assert (cause["evidence"]["format"], cause["evidence"]["stored_as"]) == ("bf16", "fp16")


def test_a_rounded_base_and_a_wrong_factor_are_two_causes(lab):
    here = lab()
    tensors = {}
    for name, weight in here.weights.items():
        tensors[name] = (weight.half().double() - here.deltas.get(name, 0)).float()
    found = {cause["cause"]: cause["evidence"] for cause in here.causes(here.write(tensors))}
    assert sorted(found) == ["lower_precision_base", "scaled"]
    assert found["lower_precision_base"]["format"] == "fp16"
    assert found["scaled"]["factor"] == pytest.approx(-1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_of_four_bits(lab, precision):
    """16 levels per 64 weights, as bitsandbytes keeps the linear layers; the rest stays."""
    here = lab("llama", precision)
    tensors = here.merged()
    for name, weight in here.weights.items():
        if "_proj" in name:
            blocks = weight.reshape(-1, 64).double()
            scale = blocks.abs().amax(1, keepdim=True) / 7
            levels = ((blocks / scale).round() * scale).reshape(weight.shape)
            tensors[name] = (levels + here.deltas.get(name, 0)).to(here.dtype)
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "lower_precision_base"
    assert cause["evidence"]["format"] == "4-bit"


def test_a_base_of_eight_bits(tmp_path):
    """255 levels per row, as bitsandbytes' int8 has them, in a base of one wide matrix."""
    torch.manual_seed(0)
    W, A, B = torch.randn(64, 1024) * 0.02, torch.randn(4, 1024) * 0.1, torch.randn(64, 4) * 0.02
    scale = W.abs().amax(1, keepdim=True) / 127
    levels = (W / scale).round() * scale
    for name, weight in (("base", W), ("merged", levels + B @ A)):
        (tmp_path / name).mkdir()
        save_file({"m.weight": weight}, tmp_path / name / "model.safetensors")
    lora = tmp_path / "lora"
    lora.mkdir()
    factors = {"base_model.model.m.lora_A.weight": A, "base_model.model.m.lora_B.weight": B}
    save_file(factors, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    result = compare_lora_task_vector.compare(
        str(tmp_path / "base"),
        str(lora),
        tmp_path / "out",
        finetuned_model=str(tmp_path / "merged"),
        generate_plots=False,
        detailed_report=False,
        device="cpu",
    )
    (cause,) = result.summary["certificate"]["diagnosis"]
    assert cause["cause"] == "lower_precision_base"
    assert cause["evidence"]["format"] == "8-bit"


@pytest.mark.parametrize(
    ("count", "first", "last", "together"),
    [
        (20, 5, 44, True),  # half of a run
        (20, 5, 45, False),
        (1, 5, 5, False),
        (301, 0, 300, False),  # over half of the parameter: then the others are the odd ones
    ],
)
def test_elements_lie_together_where_they_fill_half_of_a_run(count, first, last, together):
    found = Outliers("w", (20, 30), count, {0, 1}, {4, 5}, first, last)
    assert found.together == together
