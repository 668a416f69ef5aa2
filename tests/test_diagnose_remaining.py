"""What diagnose says of merges that no simple mistake explains: adapters, training, damage.

Deltas are taken from the adapter's files here, in float64 and without taskvec, and the wrong merges
are computed with plain torch, PEFT or a few steps of training.
"""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
from tests.lab import DTYPES, everywhere, read_deltas
from tests.models import load, peft_merge

# --- the adapter itself -----------------------------------------------------------------------


@everywhere
def test_another_adapter_of_the_same_rank(lab, tiny, family, precision, extracted):
    here = lab(family, precision)
    other = read_deltas(tiny.adapter(here.base, seed=11))
    cause = here.cause(here.model(other.get), extracted=extracted)
    assert cause["cause"] == "other_adapter"
    assert len(cause["evidence"]["sampled"]) == 3
    for sampled in cause["evidence"]["sampled"].values():
        assert sampled["rank"] == sampled["adapter_rank"] == 4
        assert sampled["subspace_overlap"] < 0.5


def test_another_checkpoint_of_the_same_training(lab):
    here = lab("llama", "bf16")
    torch.manual_seed(0)
    factors = load_file(here.lora / "adapter_model.safetensors")
    later = here.path()
    shutil.copytree(here.lora, later)
    for factor in factors.values():
        factor += 0.3 * factor.std() * torch.randn_like(factor)
    save_file(factors, later / "adapter_model.safetensors")
    cause = here.cause(here.model(read_deltas(later).get))
    assert cause["cause"] == "other_adapter"
    assert "another checkpoint of the same training" in cause["sentence"]


def test_another_adapter_with_other_modules(lab, tiny):
    here = lab()
    other = read_deltas(tiny.adapter(here.base, seed=11, target_modules=["q_proj", "o_proj"]))
    evidence = here.cause(here.model(other.get))["evidence"]
    assert evidence["parameters"] == [name for name in here.names if "q_proj" in name]
    assert evidence["unadapted_parameters"] == [name for name in here.weights if "o_proj" in name]
    assert set(evidence["unmerged_parameters"]) == {n for n in here.names if "q_proj" not in n}


@everywhere
def test_a_second_adapter_on_top(lab, tiny, family, precision, extracted):
    here = lab(family, precision)
    other = read_deltas(tiny.adapter(here.base, seed=11, r=2))
    both = {name: delta + other[name] for name, delta in here.deltas.items()}
    cause = here.cause(here.model(both.get), extracted=extracted)
    assert cause["cause"] == "additional_adapter"
    for sampled in cause["evidence"]["sampled"].values():
        assert (sampled["rank"], sampled["rank_without_delta"]) == (6, 2)


def test_an_adapter_that_lacks_modules_of_the_merged_one(lab, tiny):
    here = lab()
    other = read_deltas(tiny.adapter(here.base, seed=11, target_modules=["o_proj"]))
    cause = here.cause(here.model({**here.deltas, **other}.get))
    assert cause["cause"] == "additional_adapter"
    assert cause["evidence"]["unadapted_parameters"] == list(other)
    assert {item["rank"] for item in cause["evidence"]["sampled"].values()} == {4}


@pytest.mark.parametrize("lower", ["fp16", "bf16"])
def test_factors_that_were_rounded_before_an_fp32_merge(lab, lower):
    here = lab()
    factors = load_file(here.lora / "adapter_model.safetensors")
    rounded = here.path()
    shutil.copytree(here.lora, rounded)
    factors = {name: factor.to(DTYPES[lower]) for name, factor in factors.items()}
    save_file(factors, rounded / "adapter_model.safetensors")
    cause = here.cause(peft_saved(here, rounded))
    assert cause["cause"] == "lower_precision_adapter"
    assert lower in cause["evidence"]["format"]


def peft_saved(here, lora):
    path = here.path()
    peft_merge(here.base, lora, torch.float32).save_pretrained(path)
    return path


def test_a_product_in_tf32(lab):
    """The factors cut to 10 stored significand bits, their product summed in fp32 or better."""
    here = lab(r=16, lora_alpha=16)
    factors = load_file(here.lora / "adapter_model.safetensors")

    def cut(factor):
        return (factor.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    def change(name):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in factors:
            return cut(factors[f"{key}B.weight"]) @ cut(factors[f"{key}A.weight"])

    cause = here.cause(here.model(change))
    assert cause["cause"] == "lower_precision_adapter"
    assert cause["evidence"]["format"] == "TF32"


# --- training on top --------------------------------------------------------------------------


def train(here, model, trained):
    """Three steps of AdamW on the parameters for which ``trained(name)``, in fp32."""
    torch.manual_seed(0)
    network = load(model)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trained(name))
    chosen = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-4)
    for _ in range(3):
        tokens = torch.randint(0, 96, (8, 32))
        optimizer.zero_grad()
        network(tokens, labels=tokens).loss.backward()
        optimizer.step()
    path = here.path()
    network.to(here.dtype).save_pretrained(path)
    return path


@everywhere
def test_the_adapted_parameters_trained_further(lab, family, precision, extracted):
    here = lab(family, precision)
    cause = here.cause(
        train(here, here.model(), lambda name: name in here.names), extracted=extracted
    )
    assert cause["cause"] == "further_training"
    assert set(cause["evidence"]["parameters"]) == set(here.names)
    assert cause["evidence"]["slope"] == pytest.approx(1, abs=0.1)
    assert not any(s["low_rank_without_delta"] for s in cause["evidence"]["sampled"].values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_whole_model_trained_further(lab, family):
    here = lab(family)
    cause = here.cause(train(here, here.model(), lambda name: True))
    assert cause["cause"] == "further_training"
    assert cause["evidence"]["relative_change"] < 0.1
    assert set(cause["evidence"]["changed_parameters"]) >= {
        name for name in here.weights if name not in here.names and here.weights[name].dim() > 1
    }


def test_norms_trained_beside_the_adapter(lab):
    here = lab()
    cause = here.cause(train(here, here.model(), lambda name: "norm" in name))
    assert cause["cause"] == "further_training"
    norms = [name for name in here.weights if "norm" in name]
    assert sorted(cause["evidence"]["unadapted_parameters"]) == sorted(norms)


def test_training_that_moves_weights_by_a_thousandth_of_the_update(lab):
    here = lab()
    torch.manual_seed(0)
    moved = {n: d + 1e-3 * d.std() * torch.randn_like(d) for n, d in here.deltas.items()}
    cause = here.cause(here.model(moved.get))
    assert cause["cause"] == "further_training"
    for sampled in cause["evidence"]["sampled"].values():
        assert sampled["relative_residual"] == pytest.approx(1e-3, rel=0.1)


# --- damage -----------------------------------------------------------------------------------


def damage(here, name, change):
    tensors = here.merged()
    change(tensors[name])
    return here.write(tensors), tensors[name]


@everywhere
def test_one_element(lab, family, precision, extracted):
    here = lab(family, precision)
    name = here.names[2]
    expected = float(here.merged()[name][3, 5])

    def change(weight):
        weight[3, 5] += 0.1

    model, weight = damage(here, name, change)
    cause = here.cause(model, extracted=extracted)
    assert cause["cause"] == "corrupted"
    (place,) = cause["evidence"]["places"]
    assert place["parameter"] == name
    (element,) = place["first_elements"]
    assert (element["row"], element["column"]) == (3, 5)
    assert element["merged"] == pytest.approx(float(weight[3, 5]), abs=1e-7)
    assert element["expected"] == pytest.approx(expected, abs=2e-3)
    assert f"{name} (row 3, column 5)" in cause["sentence"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_one_element_by_two_ulps(lab, precision):
    here = lab("llama", precision)
    path = here.path()
    merge_lora.merge(str(here.base), str(here.lora), path, precision=precision, device="cpu")
    tensors, name = load_file(path / "model.safetensors"), here.names[0]
    tensors[name].view(torch.int32 if precision == "fp32" else torch.int16)[4, 7] += 2
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "corrupted"
    assert cause["evidence"]["elements"] == 1
    assert f"{name} (row 4, column 7)" in cause["sentence"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("precision", "scale"), [("fp32", 1.0), ("fp32", 0.02), ("bf16", 0.02)])
def test_elements_off_by_an_ulp_are_named_though_not_all_are_out_of_their_bounds(
    lab, precision, scale, count
):
    here = lab("llama", precision, scale=scale)
    path = here.path()
    merge_lora.merge(str(here.base), str(here.lora), path, precision=precision, device="cpu")
    tensors, name = load_file(path / "model.safetensors"), here.names[0]
    tensors[name].view(torch.int32 if precision == "fp32" else torch.int16)[4, 7 : 7 + count] += 1
    certificate = here.compare(here.write(tensors))
    assert certificate["verdict"] == "violated"
    (cause,) = certificate["diagnosis"]
    assert cause["cause"] == "corrupted"
    (place,) = cause["evidence"]["places"]
    found = [(element["row"], element["column"]) for element in place["first_elements"]]
    assert found == [(4, column) for column in range(7, 7 + count)]
    assert "the rest is, bit for bit (recipe 'once')" in cause["sentence"]
    if not certificate["violations"]:
        places = "; ".join(f"row 4, column {column}" for column in range(7, 7 + count))
        assert certificate["reason"] == (
            f"all but {count} of {tensors[name].numel():,} elements of {name} are recipe 'once' "
            f"bit for bit ({places})"
        )


def test_an_element_a_few_ulps_off_where_no_recipe_gives_the_others(lab):
    """Not enough to tell what happened; but one element is not what training would leave."""
    here = lab("llama", "fp32", scale=0.02)
    tensors, name = here.merged(), here.names[0]
    tensors[name].view(torch.int32)[4, 7] += 3
    certificate = here.compare(here.write(tensors))
    assert certificate["violations"] == 1 and certificate["worst"]["parameter"] == name
    (cause,) = certificate["diagnosis"]
    assert cause["cause"] == "unknown"
    assert f"1 element of {name} is out of its bound, by a factor of" in cause["sentence"]
    assert f"at {name}, row 4, column 7, and no recipe" in cause["sentence"]


def test_how_near_the_nearest_recipe_comes_where_none_gives_every_bit(lab):
    here = lab("llama", "bf16", scale=1.0)
    path = here.path()
    merge_lora.merge(str(here.base), str(here.lora), path, precision="bf16", device="cpu")
    ours, model = load_file(path / "model.safetensors"), here.model()  # by sums in float64
    theirs = load_file(model / "model.safetensors")
    missed = sum(int((ours[name] != theirs[name]).sum()) for name in here.names)
    total = sum(ours[name].numel() for name in here.names)
    certificate = here.compare(model)
    assert certificate["verdict"] == "rounding" and missed > 0
    near = f"recipe 'once' gives all but {missed:,} of {total:,} elements bit for bit"
    assert near in certificate["reason"]


@everywhere
def test_a_row_a_column_and_a_run(lab, family, precision, extracted):
    here = lab(family, precision)
    row, column, run = here.names[:3]
    tensors = here.merged()
    tensors[row][2] = 0
    tensors[column][:, 6] *= 2
    tensors[run].view(-1)[100:300] = 0
    (cause,) = here.causes(here.write(tensors), extracted=extracted)
    assert cause["cause"] == "corrupted"
    places = {place["parameter"]: place for place in cause["evidence"]["places"]}
    assert (places[row]["rows"], places[row]["first_row"]) == (1, 2)
    assert (places[column]["columns"], places[column]["first_column"]) == (1, 6)
    assert places[run]["elements"] in (199, 200)  # one of them may have been nearly zero


def test_an_element_that_is_no_number(lab):
    here = lab("llama", "bf16")

    def change(weight):
        weight[1, 1], weight[1, 2] = math.nan, math.inf

    cause = here.cause(damage(here, here.names[0], change)[0])
    assert cause["cause"] == "corrupted"
    first, second = cause["evidence"]["places"][0]["first_elements"]
    assert (first["merged"], second["merged"]) == ("nan", "inf")


def test_a_parameter_without_a_single_number(lab):
    here, name = lab(), "model.layers.1.self_attn.q_proj.weight"
    cause = here.cause(damage(here, name, lambda weight: weight.fill_(math.nan))[0])
    assert cause["cause"] == "corrupted"
    assert cause["evidence"]["parameters"] == [name]
    assert cause["evidence"]["elements"] == here.weights[name].numel()


@pytest.mark.parametrize("extracted", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_damage_to_a_parameter_that_the_adapter_leaves_alone(lab, precision, extracted):
    here = lab("llama", precision)
    name = "model.embed_tokens.weight"

    def change(weight):
        weight[9] = 3

    cause = here.cause(damage(here, name, change)[0], extracted=extracted)
    assert cause["cause"] == "corrupted"
    (place,) = cause["evidence"]["places"]
    assert (place["parameter"], place["elements"], place["first_row"]) == (name, 32, 9)


def test_damage_where_no_recipe_gives_the_bits(lab):
    """Another matmul's sums, one of them damaged; nothing is reproduced bit for bit."""
    here = lab("llama", "fp32", scale=3.0)

    def change(weight):
        weight[3, 5] = 1.0

    model, _ = damage(here, here.names[0], change)
    certificate = here.compare(model)
    assert certificate["reproduced_by"] == []
    (cause,) = certificate["diagnosis"]
    assert cause["cause"] == "corrupted"
    assert cause["evidence"]["elements"] == 1


@pytest.mark.parametrize("extracted", [False, True])
def test_weights_beyond_fp16(lab, copied, extracted):
    here = lab("llama", "fp16")
    name = here.names[0]
    here.base = copied(here.base)
    here.weights[name][2, 2] = 70000.0
    here.weights["model.embed_tokens.weight"][1, 1] = -1e6
    save_file(here.weights, here.base / "model.safetensors", metadata={"format": "pt"})
    cause = here.cause(here.model(), extracted=extracted)
    assert cause["cause"] == "overflow"
    assert cause["evidence"]["elements"] == 2
    assert "beyond what fp16 holds (65504)" in cause["sentence"]
    assert f"{name}, row 2, column 2" in cause["sentence"]


# --- what is not known ------------------------------------------------------------------------


@everywhere
def test_a_change_of_full_rank_without_the_delta_is_not_guessed_at(
    lab, family, precision, extracted
):
    here = lab(family, precision)
    torch.manual_seed(0)
    noise = {name: delta.std() * torch.randn_like(delta) for name, delta in here.deltas.items()}
    cause = here.cause(here.model(noise.get), extracted=extracted)
    assert cause["cause"] == "unknown"
    assert "the adapter's delta is not in it" in cause["sentence"]
    assert abs(cause["evidence"]["slope"]) < 4 * cause["evidence"]["slope_standard_error"]


def test_too_little_to_tell_is_said(lab):
    """Noise of a fraction of an ulp turns bits over everywhere; few elements leave their bounds."""
    here = lab("gpt2", "bf16")
    torch.manual_seed(3)
    moved = {n: d + 2e-6 * torch.randn_like(d) for n, d in here.deltas.items()}
    certificate = here.compare(here.model(moved.get))
    assert 0 < certificate["violations"] < 5
    (cause,) = certificate["diagnosis"]
    assert cause["cause"] == "unknown"
    assert "too little to tell damage" in cause["sentence"]


# --- two things at once, and vectors of a rounded base -----------------------------------------


def test_two_things_that_happened_are_two_causes_the_larger_first(lab):
    here = lab("llama", "fp16")
    tensors = here.merged(lambda n: -here.deltas[n] if "q_proj" in n else here.deltas.get(n))
    tensors["lm_head.weight"][0, 0] = 1
    first, second = here.causes(here.write(tensors))
    assert (first["cause"], second["cause"]) == ("scaled", "corrupted")
    assert all("q_proj" in name for name in first["evidence"]["parameters"])
    assert second["evidence"]["parameters"] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("factor", "expected"), [(0, "nothing_merged"), (2, "scaled"), (-1, "scaled")]
)
def test_a_task_vector_whose_base_was_rounded_first(lab, factor, expected):
    here = lab("llama", "fp16")
    model = here.model(lambda name: factor * here.deltas[name] if name in here.deltas else None)
    cause = here.cause(model, extracted=True, base_precision="fp16")
    assert cause["cause"] == expected
    if factor:
        assert cause["evidence"]["factor"] == pytest.approx(factor, rel=1e-2)


def test_an_adapter_without_an_update(lab):
    """B = 0, so that nothing can be said in terms of a delta; the model changed all the same."""
    here = lab(scale=0.0)
    torch.manual_seed(0)
    moved = {name: 0.01 * torch.randn_like(delta) for name, delta in here.deltas.items()}
    cause = here.cause(here.model(moved.get))
    assert cause["cause"] == "unknown"
    assert cause["evidence"]["slope"] is None
