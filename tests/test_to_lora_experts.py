"""A change of stacked experts as an adapter: PEFT's target_parameters, one rank for each stack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import analyze_task_vectors
import merge_lora
from taskvec.lowrank.adapterfiles import short_names
from tests.adapter_kinds import gpt_oss
from tests.checks import weights
from tests.models import load, peft_merge
from tests.test_to_lora import extract, peft_weights, ranks, to_lora, treated, tune

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral(tiny) -> Path:
    """Its file has the experts one by one, each in three pieces."""
    base: Path = tiny.base("mixtral")
    return base


def fused_mixtral(tiny) -> Path:
    """Its file has them as they are in memory, (experts, out, in)."""

    def make(directory: Path) -> Path:
        load(mixtral(tiny)).save_pretrained(directory, save_original_format=False)
        return directory

    base: Path = tiny.once("fused_mixtral", make)
    return base


BASES = {"in pieces": mixtral, "in a stack": fused_mixtral, "in a transposed stack": gpt_oss}


def assert_gives_back(base: Path, lora: Path, tuned: Path, directory: Path) -> None:
    """PEFT and the project alike merge an adapter into what a model is."""
    again, wanted = peft_weights(base, lora), load(tuned).state_dict()
    assert again.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=2e-6, msg=name)
    merge_lora.merge(str(base), str(lora), directory / "again", device="cpu")
    ours, theirs = weights(directory / "again"), weights(tuned)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-6, msg=name)


def config_of(lora: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((lora / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize("form", BASES)
def test_a_merged_adapter_comes_back_with_its_ranks(tiny, tmp_path, form):
    base = BASES[form](tiny)
    adapter = tiny.adapter(
        base,
        target_modules=["q_proj"],
        target_parameters=STACKS,
        rank_pattern={"down_proj": 3},
        scale=0.5,
    )
    peft_merge(base, adapter, torch.float32).save_pretrained(tmp_path / "merged")
    vector = extract(base, tmp_path / "merged", tmp_path / "vector")
    found = to_lora(tmp_path / "lora", task_vector=vector, base_model=base)
    by_leaf = {name.rpartition(".")[2]: rank for name, rank in ranks(found).items()}
    assert by_leaf == {"weight": 4, "gate_up_proj": 4, "down_proj": 3}
    assert len(ranks(found)) == 6
    assert found["parameters"]["model.layers.1.mlp.experts.down_proj"]["shape"][0] == 4
    assert not treated(found, "left_out") and found["summary"]["lost_share"] == 0
    assert config_of(tmp_path / "lora")["target_modules"] == ["q_proj"]
    targets = ["experts.down_proj", "experts.gate_up_proj"]
    assert config_of(tmp_path / "lora")["target_parameters"] == targets
    assert_gives_back(base, tmp_path / "lora", tmp_path / "merged", tmp_path)


PIECE = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"


def test_one_part_of_one_expert_changes_nothing_else(tiny, tmp_path):
    """Its stack gets the rank, the other matrices get zeros, and no other stack is named."""
    base = mixtral(tiny)

    def change(tensors):
        generator = torch.Generator().manual_seed(4)
        B, A = torch.randn(48, 2, generator=generator), torch.randn(2, 32, generator=generator)
        tensors[PIECE.format(2, "w3")] += 0.1 * B @ A

    tuned = tune(base, tmp_path / "tuned", change)
    found = to_lora(tmp_path / "lora", finetuned_model=tuned, base_model=base)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert ranks(found) == {name: 2}
    assert found["summary"]["factor_elements"] == 4 * 2 * (96 + 32)
    assert config_of(tmp_path / "lora")["target_parameters"] == [name]
    assert config_of(tmp_path / "lora")["target_modules"] == []
    stored = weights(tmp_path / "lora")
    A = stored["base_model.model.model.layers.1.mlp.experts.lora_A.weight"]
    B = stored["base_model.model.model.layers.1.mlp.experts.lora_B.weight"]
    assert (A.shape, B.shape) == ((4 * 2, 32), (96, 2 * 4))
    assert A.reshape(4, 2, 32)[[0, 1, 3]].count_nonzero() == 0
    assert B.reshape(96, 2, 4)[:, :, [0, 1, 3]].count_nonzero() == 0
    assert B[:48].count_nonzero() == 0 or float(B[:48].abs().max()) < 1e-6  # w1, above w3
    assert_gives_back(base, tmp_path / "lora", tuned, tmp_path)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("form", BASES)
def test_rounding_is_no_rank_of_an_expert(tiny, tmp_path, form, precision):
    """Half of the experts are adapted; what rounding did to the others is not taken over."""
    base = BASES[form](tiny)
    adapter = tiny.adapter(base, target_modules=[], target_parameters=STACKS[:1], scale=3.0)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    peft_merge(base, adapter, dtype).save_pretrained(tmp_path / "merged")
    found = to_lora(tmp_path / "lora", finetuned_model=tmp_path / "merged", base_model=base)
    assert ranks(found) == {f"model.layers.{i}.mlp.experts.gate_up_proj": 4 for i in (0, 1)}
    assert {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)} <= treated(found, "artifact")


def test_a_rank_that_was_asked_for_bounds_every_matrix_of_a_stack(tiny, tmp_path):
    base = fused_mixtral(tiny)
    adapter = tiny.adapter(base, target_modules=[], target_parameters=STACKS, scale=0.5)
    merge_lora.merge(str(base), str(adapter), tmp_path / "merged", device="cpu")
    inputs = {"finetuned_model": tmp_path / "merged", "base_model": base}
    for options in ({"rank": 2}, {"max_rank": 2}):
        found = to_lora(tmp_path / "lora", **inputs, **options)
        assert set(ranks(found).values()) == {2} and len(ranks(found)) == 4
        entry = found["parameters"]["model.layers.0.mlp.experts.down_proj"]
        name = "model.layers.0.mlp.experts.down_proj"
        change = (weights(tmp_path / "merged")[name] - weights(base)[name]).double()
        values = torch.linalg.svdvals(change)
        left = float((values[:, 2:] ** 2).sum().sqrt() / torch.linalg.norm(change))
        assert entry["relative_error"] == pytest.approx(left, rel=1e-4)
        assert entry["optimal_relative_error"] == pytest.approx(left, rel=1e-4)


def test_what_is_printed_of_experts(tiny, tmp_path, capsys):
    """A stack counts as one parameter; what was merged is compared where it is no stack."""
    base = mixtral(tiny)
    adapter = tiny.adapter(base, target_modules=["q_proj"], target_parameters=STACKS, scale=0.5)
    merge_lora.merge(str(base), str(adapter), tmp_path / "merged", device="cpu")
    words = ["to_lora", "--base_model", str(base), "--finetuned_model", str(tmp_path / "merged")]
    words += ["--lora_path", str(adapter), "--output_dir", str(tmp_path / "lora")]
    assert analyze_task_vectors.main([*words, "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    unfused = load(base).state_dict()
    assert f"6 of {len(unfused)} parameters as low-rank factors" in output
    assert "rank 4 (6 of them)" in output
    assert "in 2 of 2 parameters; its delta is recovered to" in output
    assert "experts.gate_up_proj" in output


def test_experts_whose_biases_changed_too_are_saved_whole(tiny, tmp_path):
    base = gpt_oss(tiny)

    def change(tensors):
        for kind in ("down_proj", "down_proj_bias"):
            tensors[f"model.layers.0.mlp.experts.{kind}"] += 0.25
        tensors["model.layers.1.self_attn.q_proj.weight"] += 0.25

    tuned = tune(base, tmp_path / "tuned", change)
    found = to_lora(tmp_path / "lora", finetuned_model=tuned, base_model=base)
    assert ranks(found) == {"model.layers.1.self_attn.q_proj.weight": 1}
    assert treated(found, "saved") == {
        f"model.layers.0.mlp.experts.{kind}" for kind in ("down_proj", "down_proj_bias")
    }
    assert config_of(tmp_path / "lora")["modules_to_save"] == ["model.layers.0.mlp.experts"]
    assert_gives_back(base, tmp_path / "lora", tuned, tmp_path)


def test_a_short_name_may_have_several_parts():
    every = {"a.experts.up", "b.experts.up", "c.other.up", "experts.up"}
    assert short_names({"a.experts.up", "b.experts.up", "experts.up"}, every, 2) == ["experts.up"]
    assert short_names({"c.other.up"}, every, 2) == ["other.up"]
    assert short_names({"a.experts.up"}, every, 2) == ["a.experts.up"]
