"""A task vector as an adapter: PEFT loads it, its ranks are the true ones, its error the least."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import analyze_task_vectors
import extract_task_vectors
from taskvec.cli import UserError
from taskvec.lowrank.adapterfiles import short_names
from tests.checks import edit_json, edit_tensors, names, weights
from tests.models import load, make_adapter, peft_merge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


def extract(base: Path, merged: Path, output: Path, **options) -> Path:
    extract_task_vectors.extract(str(base), str(merged), output, device="cpu", **options)
    return output


def to_lora(output: Path, **options):
    options = {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}
    return analyze_task_vectors.to_lora(output, device="cpu", **options).document


def chain(base: Path, adapter: Path, directory: Path, precision: str = "fp32", **options):
    """Base and adapter to a merged model (by PEFT), its task vector, and an adapter again."""
    peft_merge(base, adapter, DTYPES[precision]).save_pretrained(directory / "merged")
    vector = extract(base, directory / "merged", directory / "vector", **options)
    found = to_lora(directory / "lora", task_vector=vector, base_model=base)
    return found, directory / "lora"


def treated(found: dict[str, Any], treatment: str) -> set[str]:
    return {name for name, entry in found["parameters"].items() if entry["treatment"] == treatment}


def ranks(found: dict[str, Any]) -> dict[str, int]:
    return {name: found["parameters"][name]["rank"] for name in treated(found, "lora")}


def true_ranks(adapter: Path) -> dict[str, int]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight"): A.shape[0]
        for key, A in tensors.items()
        if ".lora_A." in key
    }


def peft_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Every weight of base + adapter as PEFT merges them, fp32, under the base's names."""
    merged: dict[str, torch.Tensor] = peft_merge(base, adapter, torch.float32).state_dict()
    return merged


# -- merged LoRAs -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_module_gets_its_true_rank_and_delta_back(tiny, llama, tmp_path, precision):
    ranks_set = {"q_proj": 2, "layers.1.mlp.down_proj": 7}
    adapter = tiny.adapter(llama, rank_pattern=ranks_set, alpha_pattern={"v_proj": 3}, scale=0.5)
    found, lora = chain(llama, adapter, tmp_path, precision)
    assert ranks(found) == true_ranks(adapter)
    assert set(ranks(found).values()) == {2, 4, 7}
    again, wanted = peft_weights(llama, lora), peft_weights(llama, adapter)
    plain = load(llama).state_dict()
    for name in ranks(found):
        delta = (wanted[name] - plain[name]).double()
        error = torch.linalg.norm(again[name] - wanted[name]) / torch.linalg.norm(delta)
        # Half an ulp of the merged weights (|M| < 1 here) beside the delta, element by element.
        size = float(wanted[name].abs().max() / delta.pow(2).mean().sqrt())
        assert error < 2 * UNIT[precision] * size, name


def test_bf16_finds_the_rank_where_the_signal_is_above_the_floor_and_says_where_not(
    tiny, llama, tmp_path
):
    loud = tiny.adapter(llama, scale=2.0)
    found, _ = chain(llama, loud, tmp_path / "loud", "bf16")
    assert ranks(found) == true_ranks(loud)
    quiet = tiny.adapter(llama, scale=1e-4)
    with pytest.raises(UserError, match="no matrix has a change above its rounding noise"):
        chain(llama, quiet, tmp_path / "quiet", "bf16")
    mixed = tmp_path / "mixed"
    shutil.copytree(loud, mixed)

    def weaken(tensors):
        for name, tensor in tensors.items():
            if "v_proj.lora_B" in name:
                tensor.mul_(1e-5)

    edit_tensors(mixed / "adapter_model.safetensors", weaken)
    found, _ = chain(llama, mixed, tmp_path / "part", "bf16")
    told = treated(found, "below_floor") | treated(found, "artifact")
    assert {name for name in true_ranks(mixed) if "v_proj" in name} == told & set(true_ranks(mixed))
    assert not any("v_proj" in name for name in ranks(found))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cast_artifacts_become_no_rank(tiny, llama, tmp_path, precision):
    adapter = tiny.adapter(llama, scale=2.0)
    found, lora = chain(llama, adapter, tmp_path, precision)
    adapted = set(true_ranks(adapter))
    assert treated(found, "lora") == adapted
    assert treated(found, "artifact") == set(found["parameters"]) - adapted
    assert len(load_file(lora / "adapter_model.safetensors")) == 2 * len(adapted)


def test_without_the_base_the_floor_is_measured_and_artifacts_are_noise(tiny, llama, tmp_path):
    adapter = tiny.adapter(llama, scale=0.5)
    peft_merge(llama, adapter, torch.float16).save_pretrained(tmp_path / "merged")
    vector = extract(llama, tmp_path / "merged", tmp_path / "vector")
    found = to_lora(tmp_path / "lora", task_vector=vector)
    assert ranks(found) == true_ranks(adapter)
    assert not found["modules_known"]
    assert all(found["parameters"][name]["noise_from"] == "measured" for name in ranks(found))
    norms = {name for name in found["parameters"] if "norm" in name}
    assert treated(found, "left_out") == norms
    assert all("--base_model" in found["parameters"][name]["reason"] for name in norms)


def test_a_base_rounded_for_the_subtraction(tiny, llama, tmp_path):
    adapter = tiny.adapter(llama, scale=0.5)
    found, _ = chain(llama, adapter, tmp_path, "fp16", base_precision="fp16")
    assert ranks(found) == true_ranks(adapter)
    assert treated(found, "unchanged") == set(found["parameters"]) - set(ranks(found))


def test_conv1d_and_embeddings(tiny, tmp_path):
    """GPT-2: weights stored (in, out), square ones too, and a token and a position embedding."""
    base = tiny.base("gpt2")
    adapter = tiny.adapter(base, target_modules=["c_attn", "attn.c_proj", "c_fc", "wte", "wpe"])
    edit = load_file(adapter / "adapter_model.safetensors")
    assert any("lora_embedding" in name for name in edit)
    for name, tensor in edit.items():
        if "lora_embedding" in name:  # PEFT starts with A = 0
            tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    save_file(edit, copy / "adapter_model.safetensors", {"format": "pt"})
    found, lora = chain(base, copy, tmp_path)
    assert set(ranks(found).values()) == {4}
    assert sum("wte" in name or "wpe" in name for name in ranks(found)) == 2
    assert json.loads((lora / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    again, wanted = peft_weights(base, lora), peft_weights(base, copy)
    for name, weight in wanted.items():
        assert torch.allclose(again[name], weight, rtol=0, atol=2e-7), name


def test_a_base_saved_without_its_head_gets_the_names_of_the_whole_model(tiny, tmp_path):
    base = tmp_path / "backbone"
    shutil.copytree(tiny.base("gpt2"), base)
    tensors = load_file(base / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    tuned = dict(plain)
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(32, 2, generator=generator) @ torch.randn(2, 96, generator=generator)
    tuned["h.0.attn.c_attn.weight"] = plain["h.0.attn.c_attn.weight"] + update
    save_file(tuned, tmp_path / "tuned.safetensors", {"format": "pt"})
    to_lora(tmp_path / "lora", finetuned_model=tmp_path / "tuned.safetensors", base_model=base)
    again = peft_weights(base, tmp_path / "lora")["transformer.h.0.attn.c_attn.weight"]
    assert torch.allclose(again, tuned["h.0.attn.c_attn.weight"], rtol=0, atol=1e-5)


# -- what is no matrix ----------------------------------------------------------------


def tune(base: Path, directory: Path, change) -> Path:
    """A copy of a base with some tensors changed."""
    shutil.copytree(base, directory)
    edit_tensors(directory / "model.safetensors", change)
    return directory


def test_norms_and_biases_are_stored_with_their_new_values(tiny, tmp_path):
    base = tiny.base("starcoder2")
    generator = torch.Generator().manual_seed(8)
    touched = (
        "model.layers.0.self_attn.q_proj.bias",  # of a module that gets factors
        "model.layers.1.mlp.c_fc.bias",  # of one that does not
        "model.layers.1.input_layernorm.weight",
        "model.norm.bias",
    )

    def change(tensors):
        B, A = torch.randn(32, 3, generator=generator), torch.randn(3, 32, generator=generator)
        tensors["model.layers.0.self_attn.q_proj.weight"] += 0.1 * B @ A
        for name in touched:
            tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=generator)

    tuned = tune(base, tmp_path / "tuned", change)
    found = to_lora(tmp_path / "lora", finetuned_model=tuned, base_model=base)
    assert treated(found, "bias") == set(touched[:2])
    assert treated(found, "saved") == set(touched[2:])
    assert found["summary"]["lost_share"] == 0
    again, wanted = peft_weights(base, tmp_path / "lora"), load(tuned).state_dict()
    for name, weight in wanted.items():
        assert torch.allclose(again[name], weight, rtol=0, atol=1e-6), name
        if name in touched:
            assert torch.equal(again[name], weight), name


def test_what_is_left_out_is_named(llama, tmp_path, capsys):
    def change(tensors):
        tensors["model.norm.weight"] += 1
        tensors["model.layers.0.self_attn.q_proj.weight"][:, 0] += torch.arange(32.0)

    tuned = tune(llama, tmp_path / "tuned", change)
    vector = extract(llama, tuned, tmp_path / "vector")
    words = ["to_lora", "--task_vector", str(vector), "--output_dir", str(tmp_path / "lora")]
    assert analyze_task_vectors.main([*words, "--rank", "1", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "⚠️ 1 left out:" in output
    assert "model.norm.weight: its new value needs the base: give --base_model." in output
    assert "What was left out holds" in output


# -- how good it is -------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 40])
@pytest.mark.parametrize("shape", [(90, 70), (700, 560)], ids=["dense", "krylov"])
def test_the_error_is_eckart_and_youngs_to_a_percent(tmp_path, shape, rank):
    """A spectrum without a gap, the hardest case; the reference is numpy's SVD in float64."""
    generator = torch.Generator().manual_seed(9)
    matrix = torch.randn(*shape, generator=generator)
    matrix *= torch.linspace(0.1, 1, shape[1])
    file = tmp_path / "task_vector.safetensors"
    save_file({"layers.0.w.weight": matrix}, file, {"format": "pt"})
    found = to_lora(tmp_path / "lora", task_vector=file, rank=rank)
    values = np.linalg.svd(matrix.numpy().astype(np.float64), compute_uv=False)
    optimum = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
    entry = found["parameters"]["layers.0.w.weight"]
    assert optimum * (1 - 1e-9) <= entry["relative_error"] <= 1.01 * optimum
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    key = "base_model.model.layers.0.w.lora_{}.weight"
    product = factors[key.format("B")].double() @ factors[key.format("A")].double()
    stated = np.linalg.norm(matrix.numpy() - product.numpy()) / np.linalg.norm(matrix.numpy())
    assert entry["relative_error"] == pytest.approx(stated, rel=1e-6)
    if entry["optimal_relative_error"] is not None:
        assert entry["optimal_relative_error"] == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("rank", [3, 40])
def test_a_rank_is_found_in_a_matrix_that_is_not_decomposed_whole(tmp_path, rank):
    """The first look is at sixteen singular values; the second, at more of them."""
    generator = torch.Generator().manual_seed(rank)
    W = torch.randn(600, 640, generator=generator) * 0.02
    B, A = torch.randn(600, rank, generator=generator), torch.randn(rank, 640, generator=generator)
    M = (W + 0.001 * B @ A).half()
    for name, weight in (("base", W), ("tuned", M)):
        save_file({"w.weight": weight}, tmp_path / f"{name}.safetensors", {"format": "pt"})
    found = to_lora(
        tmp_path / "lora",
        finetuned_model=tmp_path / "tuned.safetensors",
        base_model=tmp_path / "base.safetensors",
    )
    entry = found["parameters"]["w.weight"]
    assert (entry["rank"], entry["noise_from"]) == (rank, "formats")
    assert entry["noise_ratio"] == pytest.approx(1, abs=0.1)  # what is left is rounding


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(12, 300), (40, 40), (600, 520)])
@pytest.mark.parametrize("merged", ["fp16", "bf16"])
def test_rounding_alone_never_has_a_rank(tmp_path, shape, seed, merged):
    """Not a cast bit for bit, as a base rounded twice is not, and yet nothing but noise."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(*shape, generator=generator) * torch.logspace(-2, 0, shape[1])
    M = (W + 1e-9).to(DTYPES[merged])
    M[0, 0] = M[0, 0] * (1 + 2 * UNIT[merged])  # one element a step off, so that it is no cast
    for name, weight in (("base", W), ("tuned", M)):
        save_file({"w.weight": weight}, tmp_path / f"{name}.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="above its rounding noise"):
        to_lora(
            tmp_path / "lora",
            finetuned_model=tmp_path / "tuned.safetensors",
            base_model=tmp_path / "base.safetensors",
        )
    assert "lora" not in names(tmp_path)


# -- the files ------------------------------------------------------------------------


def test_the_directory_is_an_adapter_that_peft_saves_alike(llama, llama_lora, tmp_path):
    _, lora = chain(llama, llama_lora, tmp_path)
    assert names(lora) == ["adapter_config.json", "adapter_model.safetensors", "to_lora.json"]
    model = PeftModel.from_pretrained(load(llama), lora)
    model.save_pretrained(tmp_path / "saved")
    mine, theirs = weights(lora), weights(tmp_path / "saved")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    config = LoraConfig.from_pretrained(lora)
    assert config.base_model_name_or_path == str(llama)
    assert config.task_type == "CAUSAL_LM"
    assert set(config.target_modules) == {"q_proj", "v_proj", "down_proj"}
    fresh = get_peft_model(load(llama), config)
    assert {n for n, _ in fresh.named_modules() if n.endswith("lora_A")} == {
        n for n, _ in model.named_modules() if n.endswith("lora_A")
    }


def test_logits_are_those_of_the_merged_model(llama, llama_lora, tmp_path):
    _, lora = chain(llama, llama_lora, tmp_path)
    tokens = torch.arange(1, 20).view(1, -1)
    with torch.no_grad():
        mine = PeftModel.from_pretrained(load(llama), lora)(tokens).logits
        theirs = load(tmp_path / "merged")(tokens).logits
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_max_rank_bounds_auto_and_nothing_else(llama, llama_lora, tmp_path):
    merged = tmp_path / "merged"
    peft_merge(llama, llama_lora, torch.float32).save_pretrained(merged)
    options = {"finetuned_model": merged, "base_model": llama}
    found = to_lora(tmp_path / "lora", max_rank=2, **options)
    assert set(ranks(found).values()) == {2}
    assert all(found["parameters"][name]["rank_above_noise"] == 4 for name in ranks(found))
    with pytest.raises(UserError, match="--max_rank bounds --rank auto"):
        to_lora(tmp_path / "other", max_rank=2, rank=3, **options)


def test_a_rank_beyond_what_a_matrix_has_is_cut(llama, llama_lora, tmp_path):
    merged = tmp_path / "merged"
    peft_merge(llama, llama_lora, torch.float32).save_pretrained(merged)
    found = to_lora(tmp_path / "lora", rank=24, finetuned_model=merged, base_model=llama)
    assert {min(24, *e["shape"]) for e in found["parameters"].values() if "rank" in e} == set(
        ranks(found).values()
    )
    wanted, again = load(merged).state_dict(), peft_weights(llama, tmp_path / "lora")
    assert all(torch.allclose(again[name], wanted[name], rtol=0, atol=2e-7) for name in wanted)


def test_an_unknown_architecture_is_judged_by_names(llama, llama_lora, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    peft_merge(llama, llama_lora, torch.float32).save_pretrained(tmp_path / "merged")
    edit_json(base / "config.json", architectures=["NobodysModel"], model_type="nobody")
    found = to_lora(tmp_path / "lora", finetuned_model=tmp_path / "merged", base_model=base)
    assert ranks(found) == true_ranks(llama_lora)
    assert "transformers does not build this architecture" in capsys.readouterr().err


def test_not_a_number_is_refused(llama, tmp_path):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan

    tuned = tune(llama, tmp_path / "tuned", spoil)
    with pytest.raises(UserError, match=r"q_proj.weight: holds NaN or infinity"):
        to_lora(tmp_path / "lora", finetuned_model=tuned, base_model=llama)


def test_short_names_select_exactly_what_was_chosen():
    every = {"h.0.a", "h.1.a", "h.0.b", "h.1.b", "head"}
    assert short_names(["h.0.a", "h.1.a"], every) == ["a"]
    assert short_names(["h.0.a", "h.1.b", "head"], every) == ["h.0.a", "h.1.b", "head"]


def test_rslora_and_another_seed_come_back_as_plain_lora(llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama, seed=5, scale=0.3, use_rslora=True)
    found, lora = chain(llama, adapter, tmp_path)
    assert ranks(found) == true_ranks(adapter)
    config = json.loads((lora / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)


# -- beside the adapter that was merged -------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_recovered_delta_is_measured_against_the_true_one(
    tiny, llama, tmp_path, precision, capsys
):
    adapter = tiny.adapter(llama, scale=0.5)
    _, lora = chain(llama, adapter, tmp_path, precision)
    words = ["to_lora", "--task_vector", str(tmp_path / "vector"), "--base_model", str(llama)]
    words += ["--lora_path", str(adapter), "--output_dir", str(lora), "--device", "cpu"]
    assert analyze_task_vectors.main(words) == 0
    truth = json.loads((lora / "to_lora.json").read_text())["summary"]["truth"]
    assert truth["true_ranks"] == truth["parameters"] == 6

    def deltas(directory: Path, scaling: float) -> dict[str, np.ndarray]:
        tensors = load_file(directory / "adapter_model.safetensors")
        wide = {name: t.numpy().astype(np.float64) for name, t in tensors.items()}
        return {
            name: scaling * wide[name.replace("lora_A", "lora_B")] @ wide[name]
            for name in wide
            if "lora_A" in name
        }

    mine, theirs = deltas(lora, 1.0), deltas(adapter, 2.0)
    squared = sum(((mine[name] - theirs[name]) ** 2).sum() for name in theirs)
    size = sum((theirs[name] ** 2).sum() for name in theirs)
    assert truth["recovered_error"] == pytest.approx(np.sqrt(squared / size), rel=1e-6)
    if precision == "fp16":  # less noise than in T; in fp32 the factors' own rounding is as large
        assert truth["recovered_error"] < 0.9 * truth["task_vector_error"]
    assert f"recovered to {truth['recovered_error']:.3g}" in capsys.readouterr().out


def test_comparing_needs_the_base(tmp_path, llama, llama_lora):
    save_file({"w.weight": torch.eye(4)}, tmp_path / "task_vector.safetensors")
    with pytest.raises(UserError, match="--lora_path needs --base_model"):
        to_lora(tmp_path / "lora", task_vector=tmp_path, lora_path=str(llama_lora))


def test_a_rank_that_ends_near_the_noise_is_told(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(200, 220, generator=generator) * 0.02
    B, A = torch.randn(200, 6, generator=generator), torch.randn(6, 220, generator=generator)
    weak = (B * torch.logspace(0, -5, 6)) @ A
    for name, weight in (("base", W), ("tuned", (W + 0.01 * weak).half())):
        save_file({"w.weight": weight}, tmp_path / f"{name}.safetensors", {"format": "pt"})
    words = ["to_lora", "--device", "cpu", "--output_dir", str(tmp_path / "lora")]
    words += ["--base_model", str(tmp_path / "base.safetensors")]
    words += ["--finetuned_model", str(tmp_path / "tuned.safetensors")]
    assert analyze_task_vectors.main(words) == 0
    entry = json.loads((tmp_path / "lora" / "to_lora.json").read_text())["parameters"]["w.weight"]
    noise = np.linalg.svd((W.half().double() - W.double()).numpy(), compute_uv=False)[0]
    values = np.linalg.svd(0.01 * weak.double().numpy(), compute_uv=False)
    assert entry["rank"] == (values > 1.3 * noise).sum() < 6
    assert entry["noise"] < entry["weakest_kept"] < 3 * entry["noise"]
    assert "In 1 of them the weakest singular value" in capsys.readouterr().out


def test_a_change_of_full_rank_is_said_to_be_one(tmp_path, capsys):
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(60, 50, generator=generator)
    tuned = W + 0.1 * torch.randn(60, 50, generator=generator)
    for name, weight in (("base", W), ("tuned", tuned)):
        save_file({"w.weight": weight}, tmp_path / f"{name}.safetensors", {"format": "pt"})
    words = ["to_lora", "--device", "cpu", "--output_dir", str(tmp_path / "lora")]
    words += ["--base_model", str(tmp_path / "base.safetensors")]
    words += ["--finetuned_model", str(tmp_path / "tuned.safetensors")]
    assert analyze_task_vectors.main(words) == 0
    # 50 * (60 + 50) elements of factors for 60 * 50 of the matrix
    assert "The factors are 183.3 % of the size of the matrices" in capsys.readouterr().out
    assert analyze_task_vectors.main([*words, "--max_rank", "5"]) == 0
    assert "not of low rank" not in capsys.readouterr().out
