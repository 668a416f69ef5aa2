"""What diagnose says of an adapter that was rounded, or cut in rank, after it was merged.

PEFT merges the adapter in fp32, or a float64 sum does; the copy is saved with safetensors.
"""

import json
import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import compare_lora_task_vector
from tests.adapter_kinds import make_kind
from tests.lab import DTYPES, read_deltas
from tests.models import peft_merge


def copy_of(lora, path, change):
    """A copy of an adapter whose tensors are ``change(name, tensor)``."""
    shutil.copytree(lora, path)
    tensors = load_file(lora / "adapter_model.safetensors")
    tensors = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def rounded(lora, path, lower, *, widened=False):
    def change(name, tensor):
        narrow = tensor.to(DTYPES[lower])
        return narrow.float() if widened else narrow

    return copy_of(lora, path, change)


def merged_by_peft(here):
    path = here.path()
    peft_merge(here.base, here.lora, here.dtype).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("family", "precision", "extracted", "lower"),
    [
        ("llama", "fp32", True, "bf16"),
        ("llama", "fp16", False, "fp16"),
        ("llama", "bf16", False, "bf16"),  # of an fp16 adapter, a bf16 merge covers the rounding
        ("gpt2", "fp32", False, "fp16"),
        ("gpt2", "fp16", True, "bf16"),
    ],
)
def test_a_copy_of_the_adapter_that_was_merged(lab, family, precision, extracted, lower):
    here = lab(family, precision, scale=1.0)
    model = merged_by_peft(here)
    here.lora = rounded(here.lora, here.path(), lower)
    cause = here.cause(model, extracted=extracted)
    assert cause["cause"] == "adapter_rounded"
    assert set(cause["evidence"]["parameters"]) == set(here.names)
    assert cause["evidence"]["format"] == lower
    assert f"it holds {lower} numbers" in cause["sentence"]
    # of 32 rows and 32 columns, four each are the spans': of noise 1 - (28 / 32)^2 lies there
    assert cause["evidence"]["share_by_chance"] < 0.4 < cause["evidence"]["share_in_factor_spans"]


def test_a_copy_that_is_stored_in_fp32_again(lab):
    here = lab()
    model = merged_by_peft(here)
    here.lora = rounded(here.lora, here.path(), "bf16", widened=True)
    cause = here.cause(model)
    assert (cause["cause"], cause["evidence"]["format"]) == ("adapter_rounded", "bf16")
    assert cause["evidence"]["share_in_factor_spans"] > 0.9999


def test_numbers_that_are_below_what_fp16_holds(lab):
    here = lab()
    here.lora = copy_of(
        here.lora, here.path(), lambda name, tensor: tensor * (2e-6 if "lora_B" in name else 1)
    )
    model = merged_by_peft(here)
    here.lora = rounded(here.lora, here.path(), "fp16")
    factors = load_file(here.lora / "adapter_model.safetensors")
    lost = sum(int((B == 0).sum()) for name, B in factors.items() if "lora_B" in name)
    assert lost > 100
    cause = here.cause(model)
    assert (cause["cause"], cause["evidence"]["format"]) == ("adapter_rounded", "fp16")


@pytest.mark.parametrize(
    "kind",
    [
        "patterns",
        "embedding",
        "lora_bias",
        "bias all",
        "modules_to_save",
        "tokens",
        "experts",
        "convolution",
    ],
)
def test_adapters_of_other_kinds(tiny, tmp_path, kind):
    base, lora = make_kind(tiny, kind)
    peft_merge(base, lora, torch.float32).save_pretrained(tmp_path / "merged")
    copy = rounded(lora, tmp_path / "copy", "bf16")
    certificate = compare(base, copy, tmp_path)
    (cause,) = certificate["diagnosis"]
    assert cause["cause"] == "adapter_rounded"
    assert set(cause["evidence"]["parameters"]) == set(certificate["violated_parameters"])


def compare(base, lora, tmp_path):
    result = compare_lora_task_vector.compare(
        str(base),
        lora if isinstance(lora, list) else str(lora),
        tmp_path / "results",
        finetuned_model=str(tmp_path / "merged"),
        generate_plots=False,
        detailed_report=False,
        device="cpu",
    )
    return result.summary["certificate"]


def test_two_adapters_that_were_merged_in_turn(tiny, llama, tmp_path):
    adapters = [tiny.adapter(llama), tiny.adapter(llama, seed=11, r=2)]
    first = peft_merge(llama, adapters[0], torch.float32)
    first.save_pretrained(tmp_path / "first")
    peft_merge(tmp_path / "first", adapters[1], torch.float32).save_pretrained(tmp_path / "merged")
    copies = [rounded(lora, tmp_path / f"{i}", "bf16") for i, lora in enumerate(adapters)]
    (cause,) = compare(llama, [str(copy) for copy in copies], tmp_path)["diagnosis"]
    assert cause["cause"] == "adapter_rounded"


# --- what is something else -----------------------------------------------------------------


def rounded_lab(lab, precision="fp32", **settings):
    """A base and an adapter that holds bf16 numbers from the start."""
    here = lab("llama", precision, **settings)
    here.lora = rounded(here.lora, here.path(), "bf16", widened=True)
    here.deltas = read_deltas(here.lora)
    return here


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
def test_noise_of_the_size_of_rounding_is_not_taken_for_it(lab, size):
    """Each element is as near to the delta as the rounding of the factors would leave it."""
    here = rounded_lab(lab)
    torch.manual_seed(0)
    moved = {name: d + size * d.std() * torch.randn_like(d) for name, d in here.deltas.items()}
    cause = here.cause(here.model(moved.get))
    assert cause["cause"] == "further_training"


@pytest.mark.parametrize("times", [2, 4, 16])
def test_factors_that_moved_by_more_than_rounding(lab, times):
    """Within the spans as a copy's, but some elements of the factors are a few roundings off."""
    here = lab()
    torch.manual_seed(0)
    trained = here.lora

    def off(name, tensor):
        spacing = torch.finfo(torch.bfloat16).eps * tensor.abs()
        return tensor + times * spacing * (2 * torch.rand_like(tensor) - 1)

    here.lora = copy_of(trained, here.path(), off)
    model = merged_by_peft(here)
    here.lora = rounded(trained, here.path(), "bf16")
    cause = here.cause(model)
    assert cause["cause"] == "other_adapter"
    assert "another checkpoint of the same training" in cause["sentence"]


def test_a_factor_near_to_one(lab):
    """The delta times 1.001: in the spans, and within the rounding of bf16 factors."""
    here = rounded_lab(lab)
    cause = here.cause(here.model(lambda name: scaled(here, name, 1.001)))
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["factor"] == pytest.approx(1.001, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_one_element_that_is_off(lab, precision):
    here = rounded_lab(lab, precision)
    tensors, name = load_file(merged_by_peft(here) / "model.safetensors"), here.names[0]
    tensors[name].view(torch.int32 if precision == "fp32" else torch.int16)[4, 7] += 2
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "corrupted"
    assert cause["evidence"]["elements"] == 1


def test_a_product_in_bf16(lab):
    """The factors hold bf16 numbers, and so was their product rounded: not in their spans."""
    here = rounded_lab(lab)
    products = {name: d.to(torch.bfloat16).double() for name, d in here.deltas.items()}
    cause = here.cause(here.model(products.get))
    assert cause["cause"] == "lower_precision_adapter"


@pytest.mark.parametrize("what", ["alpha", "further", "twice"])
def test_other_accidents_of_an_adapter_in_bf16(lab, tiny, what):
    here = rounded_lab(lab)
    if what == "twice":
        model, expected = here.model(lambda name: scaled(here, name, 2)), "scaled"
    elif what == "further":
        other = read_deltas(tiny.adapter(here.base, seed=11, r=2))
        both = {name: delta + 1e-3 * other[name] for name, delta in here.deltas.items()}
        model, expected = here.model(both.get), "additional_adapter"
    else:
        model, expected = here.model(), "scaled"
        path = here.lora / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"lora_alpha": 16}))
    assert here.cause(model)["cause"] == expected


def scaled(here, name, times):
    return times * here.deltas[name] if name in here.deltas else None


@pytest.mark.parametrize("size", [3e-4, 1e-3])
def test_updates_that_a_merge_in_bf16_mostly_lost(lab, size):
    """What is lost lies in the spans of the factors, whatever was added besides."""
    here = rounded_lab(lab, "bf16", stored="bf16", scale=0.002)
    torch.manual_seed(0)
    moved = {name: d + size * d.std() * torch.randn_like(d) for name, d in here.deltas.items()}
    certificate = here.compare(here.model(moved.get))
    causes = [cause["cause"] for cause in certificate["diagnosis"]]
    assert "adapter_rounded" not in causes
    assert certificate["verdict"] == "rounding" or causes == ["unknown"]


@pytest.mark.parametrize("kind", ["DoRA", "DoRA of Conv1D"])
def test_a_dora_may_have_been_rounded(tiny, tmp_path, kind):
    base, lora = make_kind(tiny, kind)
    peft_merge(base, lora, torch.float32).save_pretrained(tmp_path / "merged")
    certificate = compare(base, rounded(lora, tmp_path / "copy", "bf16"), tmp_path)
    (cause,) = certificate["diagnosis"]
    assert cause["cause"] == "unknown"
    assert set(cause["evidence"]["parameters"]) == set(certificate["violated_parameters"])
    assert "within what rounding the adapter to bf16 after the merge would do" in cause["sentence"]


@pytest.mark.parametrize(("alpha", "factor"), [(24, 1 / 3), (5, 1.6)])
def test_an_alpha_that_was_edited_after_the_merge(lab, alpha, factor):
    here = lab(lora_alpha=8)
    model = merged_by_peft(here)
    here.lora = copy_of(here.lora, here.path(), lambda name, tensor: tensor)
    path = here.lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))
    cause = here.cause(model)
    assert cause["cause"] == "scaled"
    assert cause["evidence"]["factor"] == pytest.approx(factor, rel=1e-5)
    words = f"as lora_alpha 8 would do, where adapter_config.json has {alpha}."
    assert words in cause["sentence"]


# --- other adapters of the same training -----------------------------------------------------


def cut_in_rank(lora, path, rank):
    """The adapter's best approximation of a rank, by numpy."""
    shutil.copytree(lora, path)
    factors = load_file(lora / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text())
    for name in [name for name in factors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        left, values, right = numpy.linalg.svd(
            factors[other].double().numpy() @ factors[name].double().numpy(), full_matrices=False
        )
        scaled = left[:, :rank] * values[:rank]
        factors[name] = torch.from_numpy(right[:rank]).float().contiguous()
        factors[other] = torch.from_numpy(scaled).float().contiguous()
    save_file(factors, path / "adapter_model.safetensors")
    alpha = config["lora_alpha"] * rank / config["r"]
    text = json.dumps(config | {"r": rank, "lora_alpha": alpha})
    (path / "adapter_config.json").write_text(text)
    return path


@pytest.mark.parametrize(("precision", "rank"), [("fp32", 4), ("fp32", 6), ("bf16", 4)])
def test_an_adapter_that_was_cut_in_rank_after_the_merge(lab, precision, rank):
    here = lab("llama", precision, r=8, scale=1.0)
    model, whole = merged_by_peft(here), here.lora
    here.lora = cut_in_rank(whole, here.path(), rank)
    cause = here.cause(model)
    assert cause["cause"] == "adapter_truncated"
    for sampled in cause["evidence"]["sampled"].values():
        assert (sampled["adapter_rank"], sampled["rank_without_delta"]) == (rank, 8 - rank)


@pytest.mark.parametrize("rank", [4, 6])
def test_an_adapter_that_was_cut_in_rank_before_the_merge(lab, rank):
    """Also where what is missing is of a lower rank than what is there."""
    here = lab("llama", r=8)
    whole = here.lora
    here.lora = cut_in_rank(whole, here.path(), rank)
    model = merged_by_peft(here)
    here.lora = whole
    cause = here.cause(model)
    assert cause["cause"] == "truncated"
    assert cause["evidence"]["sampled"][here.names[0]]["rank"] == rank
