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
import extract_task_vectors
import merge_lora
from taskvec.adapter import open_adapter
from taskvec.checkpoint import open_checkpoint
from taskvec.compare import attribute_parameter, compare_parameter
from taskvec.diagnose import diagnose
from taskvec.taskvector import FormedTaskVector
from tests.models import load, peft_merge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
everywhere = pytest.mark.parametrize(
    ("family", "precision", "extracted"),
    [
        ("llama", "fp32", True),
        ("llama", "bf16", False),
        ("gpt2", "fp32", False),
        ("gpt2", "fp16", True),
    ],
)


def read_deltas(adapter):
    """s * B @ A by parameter, float64, as the parameter is stored."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, A in factors.items():
        if "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = factors[name.replace("lora_A", "lora_B")]
        r = A.shape[0]
        scaling = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
        delta = scaling * (B.double() @ A.double())
        found[f"{module}.weight"] = delta.T if config["fan_in_fan_out"] else delta
    return found


class Lab:
    """A base and an adapter, and models made of them in any way."""

    def __init__(self, tmp_path, tiny, family="llama", precision="fp32", stored="fp32", **adapter):
        self.tmp_path, self.dtype = tmp_path, DTYPES[precision]
        self.base = tiny.base(family, dtype=DTYPES[stored])
        self.lora = tiny.adapter(self.base, **adapter)
        self.weights = load_file(self.base / "model.safetensors")
        self.deltas = read_deltas(self.lora)
        self.names = list(self.deltas)
        self._made = 0

    def path(self):
        self._made += 1
        return self.tmp_path / str(self._made)

    def write(self, tensors):
        """A model directory that holds these tensors."""
        path = self.path()
        path.mkdir()
        shutil.copyfile(self.base / "config.json", path / "config.json")
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    def merged(self, change=None, dtype=None):
        """Base + adapter with one rounding, or with ``change(name)`` in the delta's place."""
        change = change or self.deltas.get
        tensors = {}
        for name, weight in self.weights.items():
            added = change(name)
            wide = weight.double() if added is None else weight.double() + added
            tensors[name] = wide.to(dtype or self.dtype)
        return tensors

    def model(self, change=None):
        return self.write(self.merged(change))

    def compare(self, model, *, extracted=False, **extraction):
        vector = self.path() if extracted else None
        if vector:
            extract_task_vectors.extract(str(self.base), str(model), vector, **extraction)
        result = compare_lora_task_vector.compare(
            str(self.base),
            str(self.lora),
            self.path(),
            task_vector_path=vector,
            finetuned_model=None if vector else str(model),
            generate_plots=False,
            detailed_report=False,
            device="cpu",
        )
        return result.summary["certificate"]

    def causes(self, model, **options):
        certificate = self.compare(model, **options)
        assert certificate["verdict"] in ("violated", "incomplete")
        return certificate["diagnosis"]

    def cause(self, model, **options):
        """The only one."""
        causes = self.causes(model, **options)
        assert len(causes) == 1, [cause["sentence"] for cause in causes]
        return causes[0]


@pytest.fixture
def lab(tmp_path, tiny):
    """Labs for one test: lab(family, precision, ...)."""

    def make(*args, **settings):
        path = tmp_path / f"lab{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        return Lab(path, tiny, *args, **settings)

    return make


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
