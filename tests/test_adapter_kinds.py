"""Every supported kind of adapter against PEFT: the same bits, and a certificate that holds."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import analyze_lora_vs_task_vector_math
import final_validation
import investigate_parameter_changes
import merge_lora
import quick_precision_test
from compare_lora_task_vector import compare
from extract_task_vectors import extract
from taskvec.adapter import open_adapter
from taskvec.adapters.check import inspect_adapter
from taskvec.checkpoint import open_checkpoint
from tests.adapter_kinds import KINDS, gpt_oss, make_kind
from tests.checks import assert_same_bits, edit_tensors, weights
from tests.models import load, peft_merge

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def merge(base, adapter, output, **options):
    return merge_lora.merge(str(base), str(adapter), output, device="cpu", **options)


def peft_weights(base, adapter, dtype, directory, **options):
    """What PEFT's merge saves, by the names of the files."""
    peft_merge(base, adapter, dtype, **options).save_pretrained(directory)
    return weights(directory)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_tensors_are_pefts_bit_for_bit(tiny, tmp_path, kind, precision):
    base, adapter = make_kind(tiny, kind)
    result = merge(base, adapter, tmp_path / "m", precision=precision, rounding="peft")
    theirs = peft_weights(base, adapter, DTYPES[precision], tmp_path / "p")
    before, mine = weights(base), weights(tmp_path / "m")
    assert_same_bits(mine, theirs)
    if precision == "fp32":
        moved = {name for name in mine if not torch.equal(before[name], theirs[name])}
        assert set(result.changed_parameters) == moved
        merge(base, adapter, tmp_path / "m", precision=precision, rounding="once")
        assert_same_bits(weights(tmp_path / "m"), theirs)


@pytest.mark.parametrize("named", ["down_proj", "w"])
def test_a_parameter_named_by_its_last_part_alone_beside_modules(tiny, tmp_path, named):
    """``q_proj.down_proj`` ends like the name too, and is none; of "w" there is none anywhere."""
    base = gpt_oss(tiny) if named == "down_proj" else tiny.base("llama")
    adapter = tiny.adapter(base, target_modules=["q_proj"], target_parameters=[named])
    for precision in ("fp32", "bf16"):
        found = merge(base, adapter, tmp_path / "m", precision=precision, rounding="peft")
        theirs = peft_weights(base, adapter, DTYPES[precision], tmp_path / "p")
        assert_same_bits(weights(tmp_path / "m"), theirs)
        assert len(found.changed_parameters) == (4 if named == "down_proj" else 2)
    with open_checkpoint(str(base)) as opened:
        assert inspect_adapter(str(adapter), opened).refusal is None


@pytest.mark.parametrize("rounding", ["once", "peft"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_names_the_recipe(tiny, tmp_path, kind, precision, rounding):
    base, adapter = make_kind(tiny, kind)
    merge(base, adapter, tmp_path / "m", precision=precision, rounding=rounding)
    found = compare(
        str(base),
        str(adapter),
        tmp_path / "c",
        finetuned_model=str(tmp_path / "m"),
        device="cpu",
        generate_plots=False,
    ).summary
    certificate = found["certificate"]
    assert certificate["verdict"] == "exact"
    assert rounding in certificate["reproduced_by"]
    assert certificate["violations"] == 0 and certificate["max_ratio_to_bound"] <= 1
    assert found["min_cosine_similarity"] > (0.9999 if precision == "fp32" else 0.9)


@pytest.mark.parametrize("kind", ["LoRA", "Conv1D", "embedding", "experts", "convolution"])
def test_deltas_are_pefts(tiny, kind):
    base, adapter = make_kind(tiny, kind)
    model = PeftModel.from_pretrained(load(base), adapter)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    theirs = [layer.get_delta_weight("default").detach() for layer in layers]
    with open_checkpoint(str(base)) as opened, open_adapter(str(adapter), opened) as mine:
        assert len(mine.parameters) == len(theirs)
        for name in mine.parameters:
            update, info = mine.update(name, CPU), opened.tensors[name]
            delta = update.delta(0, info.rows).reshape(info.shape)
            assert any(torch.equal(delta, their) for their in theirs if their.shape == delta.shape)
            for start, stop in [(0, 3), (5, info.rows - 1)]:  # in blocks as in whole
                rows = delta.reshape(info.rows, *info.row_shape)[start:stop]
                assert torch.equal(update.delta(start, stop), rows)


OPTIONS = {
    "safe_merge": {"safe_merge": True},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "no autocast": {"autocast_adapter_dtype": False},
}
# In half precision, PEFT's norm over an embedding sums in the half precision's own order.
NOT_BY_BITS = [("DoRA of an embedding", "no autocast")]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "kind", ["embedding", "DoRA", "DoRA of an embedding", "experts", "convolution", "tokens"]
)
def test_other_ways_of_merging_in_peft_are_recognised(tiny, tmp_path, kind, option):
    base, adapter = make_kind(tiny, kind)
    for dtype in (torch.float16, torch.bfloat16):
        peft_weights(base, adapter, dtype, tmp_path / "p", **OPTIONS[option])
        certificate = judged(base, adapter, tmp_path / "p", tmp_path / "c")
        expected = "rounding" if (kind, option) in NOT_BY_BITS else "exact"
        assert certificate["verdict"] == expected


def judged(base, adapter, merged, directory):
    """The certificate of a merged model."""
    sources = adapter if isinstance(adapter, list) else str(adapter)
    return compare(
        str(base),
        sources,
        directory,
        finetuned_model=str(merged),
        device="cpu",
        generate_plots=False,
    ).summary["certificate"]


@pytest.mark.parametrize(
    "kind", ["embedding", "DoRA", "DoRA of Conv1D", "lora_bias", "tokens", "experts", "convolution"]
)
def test_damage_to_one_element_is_caught_in_every_kind(tiny, tmp_path, kind):
    base, adapter = make_kind(tiny, kind)
    result = merge(base, adapter, tmp_path / "m", precision="bf16")
    for name in result.changed_parameters[:2]:

        def damage(tensors, name=name):
            value = tensors[name].view(torch.int16).reshape(-1)
            value[value.numel() // 2] += 3  # three ulps

        edit_tensors(tmp_path / "m" / "model.safetensors", damage)
    certificate = judged(base, adapter, tmp_path / "m", tmp_path / "c")
    assert certificate["verdict"] == "violated"
    wrong = {*certificate["violated_parameters"], *certificate["isolated_deviations"]}
    assert wrong == set(result.changed_parameters[:2])


@pytest.mark.parametrize("kind", ["DoRA", "embedding", "bias all", "experts", "modules_to_save"])
def test_a_task_vector_alone_is_certified_too(tiny, tmp_path, kind):
    base, adapter = make_kind(tiny, kind)
    for precision, rounded in (("fp32", None), ("fp16", None), ("bf16", "bf16")):
        merge(base, adapter, tmp_path / "m", precision=precision)
        extract(str(base), str(tmp_path / "m"), tmp_path / "t", base_precision=rounded or "stored")
        found = compare(
            str(base),
            str(adapter),
            tmp_path / "c",
            task_vector_path=tmp_path / "t",
            device="cpu",
            generate_plots=False,
        )
        assert found.holds
        assert found.summary["certificate"]["verdict"] == "exact"
        assert found.summary["certificate"]["unexplained_parameters"] == []


@pytest.mark.parametrize("kind", ["DoRA of Conv1D", "experts", "bias all", "convolution"])
def test_the_whole_chain_takes_it(tiny, tmp_path, monkeypatch, capsys, kind):
    base, adapter = make_kind(tiny, kind)
    monkeypatch.chdir(tmp_path)
    pair = ["--base_model", str(base), "--lora_path", str(adapter), "--device", "cpu"]
    made = "validation_results"
    assert final_validation.main([*pair, "--precisions", "bf16", "--no-behaviour"]) == 0
    assert quick_precision_test.main([*pair, "--output_dir", "precision"]) == 0
    vector = ["--task_vector_path", f"{made}/task_vectors_bf16", "--output_dir", "changes"]
    assert investigate_parameter_changes.main([*pair, *vector]) == 0
    files = {
        "lora": f"{made}/comparison_results_bf16/lora_deltas.safetensors",
        "task_vector": f"{made}/task_vectors_bf16/task_vector.safetensors",
    }
    flags = [word for name, file in files.items() for word in (f"--{name}_file", file)]
    assert analyze_lora_vs_task_vector_math.main([*flags, "--device", "cpu"]) == 0
    assert "VALIDATION SUCCESSFUL" in capsys.readouterr().out
