"""Merges that took part of the update, weights in the wrong place, and weights quantised after."""

import pytest
import torch
from safetensors.torch import load_file

import compare_lora_task_vector
import merge_lora
from tests.adapter_kinds import make_kind
from tests.checks import edit_tensors
from tests.lab import Lab

in_both = pytest.mark.parametrize("precision", ["fp32", "bf16"])
either_way = pytest.mark.parametrize("extracted", [False, True])


@pytest.fixture
def lab(tiny, tmp_path):
    return lambda *args, **kwargs: Lab(tmp_path, tiny, *args, scale=0.2, **kwargs)


def swap_layers(name):
    return {"0": name.replace("layers.0", "layers.1"), "1": name.replace("layers.1", "layers.0")}[
        name.split(".")[2]
    ]


@in_both
@either_way
@pytest.mark.parametrize("density", [0.25, 0.5])
def test_elements_dropped_at_random_and_the_others_rescaled(lab, precision, extracted, density):
    here, generator = lab(precision=precision), torch.Generator().manual_seed(0)

    def dare(name):
        delta = here.deltas.get(name)
        if delta is not None:
            return delta * (torch.rand(delta.shape, generator=generator) < density) / density

    cause = here.cause(here.model(dare), extracted=extracted)
    assert cause["cause"] == "thinned_out"
    assert cause["evidence"]["factor"] == pytest.approx(1 / density, rel=1e-3)
    assert cause["evidence"]["density"] == pytest.approx(density, abs=0.05)
    assert f"as DARE with a density of {density} leaves it" in cause["sentence"]
    assert sorted(cause["evidence"]["parameters"]) == sorted(here.names)


@in_both
def test_only_the_largest_elements_of_the_update(lab, precision):
    here = lab(precision=precision)

    def largest(name):
        delta = here.deltas.get(name)
        if delta is not None:
            return delta * (delta.abs() > delta.abs().flatten().quantile(0.8))

    cause = here.cause(here.model(largest))
    assert cause["cause"] == "thinned_out"
    assert cause["evidence"]["largest_elements"] is True
    assert cause["evidence"]["density"] == pytest.approx(0.2, abs=0.02)
    assert "about 20" in cause["sentence"] and "as TIES or pruning by size" in cause["sentence"]


def test_a_few_elements_left_out_are_damage_and_half_of_the_columns_no_thinning(lab):
    here = lab()
    name = next(name for name in here.names if "q_proj" in name)

    def without(chosen):
        def change(other):
            delta = here.deltas.get(other)
            if other != name or delta is None:
                return delta
            delta = delta.clone()
            delta[chosen] = 0
            return delta

        return here.cause(here.model(change))

    assert without((slice(0, 4), 3))["cause"] == "corrupted"
    assert without((slice(None), slice(0, 16)))["cause"] != "thinned_out"


@in_both
def test_weights_pruned_after_the_merge(lab, precision):
    here = lab(precision=precision)
    tensors = here.merged()
    for name, tensor in tensors.items():
        if "proj" in name:
            tensors[name] = tensor * (tensor.abs() > tensor.float().abs().median())
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "pruned"
    assert sorted(cause["evidence"]["parameters"]) == sorted(here.names)
    others = {name for name in tensors if "proj" in name} - set(here.names)
    assert set(cause["evidence"]["unadapted_parameters"]) == others
    assert cause["evidence"]["zero_share"] == pytest.approx(0.5, abs=0.02)


@in_both
@either_way
def test_two_layers_swapped_with_all_that_is_in_them(lab, precision, extracted):
    here = lab(precision=precision)
    merged = here.merged()
    swapped = {n: merged[swap_layers(n) if ".layers." in n else n] for n in merged}
    cause = here.cause(here.write(swapped), extracted=extracted)
    assert cause["cause"] == "reordered"
    of_layers = [name for name in merged if ".layers." in name]
    assert cause["evidence"]["weights_of"] == {name: swap_layers(name) for name in of_layers}
    assert "Weights are in the wrong place" in cause["sentence"]


@in_both
def test_rows_of_the_weights_in_another_order(lab, precision):
    here = lab(precision=precision)
    merged = here.merged()
    names = [name for name in merged if "q_proj" in name]
    for name in names:  # as convert_llama_weights_to_hf permutes the rotary halves of a head
        heads = merged[name].view(4, 2, 4, 32)
        merged[name] = heads.transpose(1, 2).reshape(32, 32)
    cause = here.cause(here.write(merged))
    assert cause["cause"] == "reordered"
    assert sorted(cause["evidence"]["rows_of"]) == sorted(names)


@in_both
@either_way
def test_whole_weights_stored_transposed(lab, precision, extracted):
    here = lab(precision=precision)
    tensors = here.merged()
    square = [name for name in tensors if tensors[name].shape == (32, 32)]
    assert {"q_proj", "o_proj"} == {name.split(".")[-2] for name in square}  # o_proj: not adapted
    tensors |= {name: tensors[name].T for name in square}
    cause = here.cause(here.write(tensors), extracted=extracted)
    assert cause["cause"] == "transposed" and cause["evidence"]["whole_weights"]
    assert sorted(cause["evidence"]["parameters"]) == sorted(square)
    assert "The weights are stored transposed in" in cause["sentence"]


def test_tokens_in_another_order(lab):
    here = lab(precision="bf16")
    tensors = here.merged()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "reordered"
    assert cause["sentence"].endswith("as where the tokens are numbered otherwise.")


@pytest.mark.parametrize(("lines", "axis"), [("rows", 0), ("columns", 1)])
@pytest.mark.parametrize(
    ("family", "precision", "scale"),
    [("llama", "fp32", 0.2), ("gpt2", "bf16", 0.02), ("llama", "bf16", 1e-3)],
)
@either_way
def test_rows_and_columns_of_the_update_in_another_order(
    tmp_path, tiny, family, precision, scale, lines, axis, extracted
):
    """The last of these updates are about as large as what bf16's rounding makes of them."""
    here, generator = Lab(tmp_path, tiny, family, precision, scale=scale), torch.Generator()
    generator.manual_seed(0)

    def change(name):
        if (delta := here.deltas.get(name)) is not None:
            order = torch.randperm(delta.shape[axis], generator=generator)
            return delta.index_select(axis, order)

    cause = here.cause(here.model(change), extracted=extracted)
    assert cause["cause"] == "reordered"
    assert sorted(cause["evidence"][f"{lines}_of"]) == sorted(here.names)
    assert f"The {lines} of the update alone are in another order" in cause["sentence"]


@pytest.mark.parametrize("size", [1e-4, 3e-4])
def test_noise_in_bf16_is_no_other_order(lab, size):
    """Rows of the update that are nearly alike change places by noise of the size of rounding."""
    here, generator = lab(precision="bf16"), torch.Generator().manual_seed(0)

    def noisy(name):
        if (delta := here.deltas.get(name)) is not None:
            return delta + size * torch.randn(delta.shape, generator=generator)

    cause = here.cause(here.model(noisy))
    assert cause["cause"] == "further_training"


@in_both
def test_columns_of_the_weights_in_another_order(lab, precision):
    here = lab(precision=precision)
    merged, order = here.merged(), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    names = [name for name in merged if "o_proj" in name or "q_proj" in name]
    for name in names:  # of the adapter, and of what it leaves alone
        merged[name] = merged[name][:, order]
    cause = here.cause(here.write(merged))
    assert cause["cause"] == "reordered"
    assert sorted(cause["evidence"]["columns_of"]) == sorted(names)


@in_both
def test_an_update_cut_in_rank(lab, precision):
    here = lab(precision=precision)

    def truncated(name):
        if (delta := here.deltas.get(name)) is not None:
            U, S, V = torch.linalg.svd(delta)
            return (U[:, :2] * S[:2]) @ V[:2]

    cause = here.cause(here.model(truncated))
    assert cause["cause"] == "truncated"
    for found in cause["evidence"]["sampled"].values():
        assert found["rank"] == 2 and found["adapter_rank"] == 4 and found["best_of_its_rank"]


@in_both
def test_a_weighted_sum_of_two_adapters(lab, tiny, tmp_path, precision):
    here = lab(precision=precision)
    other = Lab(tmp_path / "other", tiny, scale=0.2, seed=9)
    assert other.names == here.names

    cause = here.cause(
        here.model(
            lambda n: 0.3 * here.deltas[n] + 0.7 * other.deltas[n] if n in here.deltas else None
        )
    )
    assert cause["cause"] == "additional_adapter"
    assert "mixture of adapters" in cause["sentence"]
    for found in cause["evidence"]["sampled"].values():
        assert found["factor"] == pytest.approx(0.3, rel=0.1)
        assert found["rank_without_delta"] == 4


@pytest.mark.parametrize("group", [32, "row"])
@in_both
def test_a_merged_model_that_went_through_eight_bits(lab, precision, group):
    here = lab(precision=precision)
    tensors = here.merged(dtype=torch.float32)
    for name, tensor in tensors.items():
        if "proj" in name:
            runs = tensor.reshape(-1, tensor.shape[1] if group == "row" else group)
            step = runs.abs().amax(1, keepdim=True) / 127
            tensors[name] = ((runs / step).round() * step).reshape(tensor.shape)
    tensors = {name: tensor.to(here.dtype) for name, tensor in tensors.items()}
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "quantised"
    assert cause["evidence"]["format"] == "8-bit"
    assert "The merged model was quantised" in cause["sentence"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("scale", [1.0, 0.0123])
def test_a_merged_model_that_went_through_fp8(lab, precision, scale):
    here = lab(precision=precision)
    tensors = here.merged()
    for name, tensor in tensors.items():
        if "proj" in name:
            stored = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[name] = (stored.float() * scale).to(here.dtype)
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "quantised"
    assert cause["evidence"]["format"] == "8-bit"


def test_what_a_failed_merge_is_off_by_is_not_called_rounding(lab):
    here = lab()
    cost = here.compare(here.model(lambda n: 3 * here.deltas[n] if n in here.deltas else None))
    assert "off the adapter's delta by 200 % of the delta's norm" in cost["cost"]["sentence"]
    assert "keeps" not in cost["cost"]["sentence"]
    held = here.compare(here.model())
    assert "this merge keeps 99.9" in held["cost"]["sentence"]


@in_both
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_dora_merged_as_if_it_were_a_plain_lora(lab, precision, factor):
    here = lab(precision=precision, use_dora=True)
    cause = here.cause(here.model(lambda n: factor * here.deltas[n] if n in here.deltas else None))
    assert cause["cause"] == "magnitudes_left_out"
    assert sorted(cause["evidence"]["parameters"]) == sorted(here.names)
    for found in cause["evidence"]["factors"].values():
        assert found == pytest.approx(factor, rel=0.01)
    assert ("times about 0.5" in cause["sentence"]) == (factor == 0.5)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("other axis", "divided by the norm of each input's weights instead of each output's"),
        ("base", "divided by the norm of W alone"),
        ("inputs", "normed and scaled input by input instead of output by output"),
        ("mixed", "normed output by output but scaled input by input"),
    ],
)
@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("gpt2", "bf16")])
def test_a_dora_normed_or_scaled_along_the_wrong_axis(lab, family, precision, way, words):
    here = lab(family, precision, use_dora=True)
    factors = load_file(here.lora / "adapter_model.safetensors")
    square = [name for name in here.names if len(set(here.weights[name].shape)) == 1]
    wrong = square if way in ("inputs", "mixed") else here.names
    tensors = here.merged()
    for name in here.names:
        W = here.weights[name].double()
        V = W + here.deltas[name]
        module = name.removesuffix(".weight")
        m = factors[f"base_model.model.{module}.lora_magnitude_vector"].double().flatten()
        outputs, inputs = (1, 0) if family == "gpt2" else (0, 1)  # which axis is which

        def along(values, axis):
            return values[None] if axis else values[:, None]

        by_output = along(m / V.norm(dim=inputs), outputs)
        factor = {
            "other axis": along(m, outputs) / V.norm(dim=outputs, keepdim=True),
            "base": along(m / W.norm(dim=inputs), outputs),
            "inputs": along(m, inputs) / V.norm(dim=outputs, keepdim=True) if name in square else 0,
            "mixed": along(m / V.norm(dim=inputs), inputs),
        }[way]
        tensors[name] = ((factor if name in wrong else by_output) * V).to(here.dtype)
    cause = here.cause(here.write(tensors), extracted=precision == "bf16")
    assert cause["cause"] == "magnitudes_misapplied"
    assert cause["evidence"]["parameters"] == wrong
    assert words in cause["sentence"]


# --- the weights themselves -------------------------------------------------------------------


def slerp(W, total, t):
    """On the sphere through both, as mergekit does it tensor by tensor."""
    cosine = (W * total).sum() / W.norm() / total.norm()
    angle = torch.acos(cosine.clamp(-1, 1))
    return (torch.sin((1 - t) * angle) * W + torch.sin(t * angle) * total) / torch.sin(angle)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_adapted_weights_interpolated_on_a_sphere(lab, precision):
    here = lab(precision=precision)
    tensors = here.merged()
    for name, delta in here.deltas.items():
        W = here.weights[name].double()
        tensors[name] = slerp(W, W + delta, 0.3).to(here.dtype)
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "weights_scaled"
    assert sorted(cause["evidence"]["parameters"]) == sorted(here.names)
    for name, (of_base, of_delta) in cause["evidence"]["factors"].items():
        W, delta = here.weights[name].double(), here.deltas[name]
        angle = torch.acos((W * (W + delta)).sum() / W.norm() / (W + delta).norm())
        b = float(torch.sin(0.3 * angle) / torch.sin(angle))
        assert of_delta == pytest.approx(b, rel=1e-3)
        assert of_base == pytest.approx(float(torch.sin(0.7 * angle) / torch.sin(angle)) + b, 1e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@either_way
def test_all_weights_decayed_after_the_merge(lab, precision, extracted):
    here = lab(precision=precision)
    merged = here.merged(dtype=torch.float64)
    tensors = {name: (0.99 * tensor).to(here.dtype) for name, tensor in merged.items()}
    cause = here.cause(here.write(tensors), extracted=extracted)
    assert cause["cause"] == "weights_scaled"
    assert sorted(cause["evidence"]["parameters"]) == sorted(tensors)
    for of_base, _ in cause["evidence"]["factors"].values():
        assert of_base == pytest.approx(0.99, abs=1e-3)


@in_both
@pytest.mark.parametrize(("lines", "axis"), [("columns", 1), ("rows", 0)])
def test_weights_scaled_line_by_line(lab, precision, lines, axis):
    here = lab(precision=precision)
    factors = torch.exp(torch.randn(32, generator=torch.Generator().manual_seed(0)) * 0.3).double()
    tensors = here.merged(dtype=torch.float64)
    scaled = [name for name in tensors if tensors[name].shape == (32, 32)]
    for name in scaled:  # q_proj is adapted, o_proj is not
        tensors[name] = tensors[name] * (factors if axis else factors[:, None])
    tensors = {name: tensor.to(here.dtype) for name, tensor in tensors.items()}
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "weights_scaled"
    assert cause["evidence"]["lines"] == lines
    assert sorted(cause["evidence"]["parameters"]) == sorted(scaled)
    for low, high in cause["evidence"]["factors"].values():
        assert low == pytest.approx(float(factors.min()), rel=2e-3)
        assert high == pytest.approx(float(factors.max()), rel=2e-3)


@in_both
def test_the_delta_alone_stored_as_a_model(lab, precision):
    here = lab(precision=precision)
    tensors = here.merged()
    tensors |= {name: delta.to(here.dtype) for name, delta in here.deltas.items()}
    cause = here.cause(here.write(tensors))
    assert cause["cause"] == "weights_scaled"
    assert "The base is missing in all 6 adapted parameters" in cause["sentence"]


def toward_zero(tensor, dtype):
    """The number of a 16-bit format next to each fp32 number that is no larger in size."""
    nearest = tensor.to(dtype)
    too_far = nearest.float().abs() > tensor.abs()
    return torch.where(too_far, nearest.view(torch.int16) - 1, nearest.view(torch.int16)).view(
        dtype
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("way", ["cut off", "stochastic"])
@either_way
def test_weights_rounded_otherwise_than_to_the_nearest(lab, precision, way, extracted):
    here, generator = lab(precision=precision), torch.Generator().manual_seed(0)
    tensors = {}
    for name, merged in here.merged(dtype=torch.float32).items():
        low = toward_zero(merged, here.dtype)
        high = (low.view(torch.int16) + 1).view(here.dtype)
        share = (merged - low.float()) / (high.float() - low.float())
        up = torch.rand(share.shape, generator=generator) < share
        tensors[name] = torch.where(up, high, low) if way == "stochastic" else low
    causes = here.causes(here.write(tensors), extracted=extracted)
    assert causes[0]["cause"] == "rounded_otherwise"
    assert all(cause["cause"] in ("rounded_otherwise", "corrupted") for cause in causes)
    assert ("toward zero, as by cutting" in causes[0]["sentence"]) == (way == "cut off")
    matrices = {name for name in set(tensors) - set(here.names) if tensors[name].dim() > 1}
    assert matrices <= set(causes[0]["evidence"]["parameters"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@either_way
def test_weights_clipped_to_a_largest_value(lab, precision, extracted):
    here = lab(precision=precision)
    whole = here.merged()
    matrices = {name: weight for name, weight in whole.items() if weight.dim() > 1}
    tensors = {name: weight.clamp(-0.15, 0.15) for name, weight in matrices.items()}
    cut = {name for name in tensors if bool((tensors[name] != whole[name]).any())}
    cause = here.cause(here.write({**whole, **tensors}), extracted=extracted)
    assert cause["cause"] == "clipped"
    assert set(cause["evidence"]["parameters"]) == cut
    count = sum(int((tensors[name] != whole[name]).sum()) for name in cut)
    # in 16 bits some lie so near to the limit that rounding alone may have taken them there
    assert 0.95 * count <= cause["evidence"]["elements"] <= count
    assert f"Clipped: {cause['evidence']['elements']:,} elements of" in cause["sentence"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dora_merged_twice(lab, precision):
    here = lab(precision=precision, use_dora=True)
    once, twice = here.path(), here.path()
    merge_lora.merge(str(here.base), str(here.lora), once, precision=precision, device="cpu")
    merge_lora.merge(str(once), str(here.lora), twice, precision=precision, device="cpu")
    cause = here.cause(twice)
    assert cause["cause"] == "scaled"
    assert "merged twice, the second time with the norms of the first result" in cause["sentence"]
    assert sorted(cause["evidence"]["parameters"]) == sorted(here.names)


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_a_rounded_task_vector_that_was_scaled(lab, factor):
    """What bf16 took in the merge is scaled with it: no bound of one sum holds."""
    here = lab(precision="bf16", stored="bf16")
    tensors = here.merged()
    for name in here.names:
        T = tensors[name].double() - here.weights[name].double()
        tensors[name] = (here.weights[name].double() + factor * T).bfloat16()
    for cause in here.causes(here.write(tensors)):
        assert cause["cause"] == "scaled"
        assert cause["evidence"]["factor"] == pytest.approx(factor, rel=0.02)


def test_experts_whose_rounded_task_vector_was_scaled(tiny, tmp_path):
    base, adapter = make_kind(tiny, "experts")
    model = tmp_path / "m"
    merged = merge_lora.merge(str(base), str(adapter), model, precision="bf16", device="cpu")
    W = load_file(base / "model.safetensors")

    def scale(tensors):
        for name in merged.changed_parameters:
            T = tensors[name].double() - W[name].double()
            tensors[name] = (W[name].double() + 2 * T).bfloat16()

    edit_tensors(model / "model.safetensors", scale)
    found = compare_lora_task_vector.compare(
        str(base),
        str(adapter),
        tmp_path / "c",
        finetuned_model=str(model),
        generate_plots=False,
        device="cpu",
    )
    assert found.summary["certificate"]["verdict"] == "violated"
    for cause in found.summary["certificate"]["diagnosis"]:
        assert cause["cause"] == "scaled"
        assert cause["evidence"]["factor"] == pytest.approx(2, rel=0.1)
