"""The certificate of whole models: merged by PEFT, tampered with, cast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compare_lora_task_vector import compare
from merge_lora import merge
from taskvec.rounding import (
    FORMATS,
)
from tests.certified import RECIPE
from tests.checks import edit_tensors
from tests.models import peft_merge


@pytest.fixture(scope="module")
def merged_models(tmp_path_factory, llama: Path, llama_lora: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("merged")
    for precision in FORMATS:
        merge(str(llama), str(llama_lora), root / precision, precision=precision)
    return {precision: root / precision for precision in FORMATS}


def judged(base: Path, lora: Path, model: Path, out: Path) -> dict[str, Any]:
    result = compare(str(base), str(lora), out, finetuned_model=str(model), generate_plots=False)
    certificate: dict[str, Any] = result.summary["certificate"]
    assert result.holds == (certificate["verdict"] in ("exact", "rounding"))
    return certificate


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("peft", {}),
        ("peft-safe", {"safe_merge": True}),
        ("peft-lowcpu", {"low_cpu_mem_usage": True}),
        ("peft-half", {"autocast_adapter_dtype": False}),
    ],
    ids=["default", "safe_merge", "low_cpu_mem_usage", "autocast off"],
)
@pytest.mark.parametrize(
    ("family", "precision"),
    [("llama", "fp16"), ("gpt2", "bf16"), ("starcoder2", "bf16"), ("gpt2", "fp32")],
)
def test_merges_by_peft_are_exact_and_their_recipe_is_named(
    tiny: Any,
    tmp_path: Path,
    family: str,
    precision: str,
    recipe: str,
    options: dict[str, Any],
) -> None:
    base = tiny.base(family)
    lora = tiny.adapter(base, use_rslora=True, r=6, lora_alpha=5)  # s is no power of two
    merged = peft_merge(base, lora, FORMATS[precision].dtype, **options)
    merged.save_pretrained(tmp_path / "merged")
    certificate = judged(base, lora, tmp_path / "merged", tmp_path / "out")
    assert certificate["verdict"] == "exact"
    assert certificate["violations"] == 0
    if precision == "fp32":
        assert set(certificate["reproduced_by"]) == set(RECIPE) - {"prescaled"}
    else:
        assert certificate["reproduced_by"] == [recipe]


Q, K, V = (f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv")
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


def swap(one: str, other: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def one_element(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Two ulps in fp32, one in 16 bits."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[name]
        wide = tensor.dtype == torch.float32
        largest = int(tensor.abs().argmax())
        tensor.view(-1).view(torch.int32 if wide else torch.int16)[largest] += 2 if wide else 1

    return change


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize(
    ("change", "verdict", "named"),
    [
        (one_element(Q), "violated", Q),
        (one_element(NORM), "incomplete", NORM),
        (swap(K, V), "violated", V),
        (swap(Q, Q.replace("layers.1", "layers.0")), "violated", Q),
        (lambda tensors: tensors[DOWN].mul_(-1), "violated", DOWN),
        (lambda tensors: tensors[Q][5].zero_(), "violated", Q),
    ],
    ids=["an element", "an element of a norm", "k and v", "two layers", "negated", "a row"],
)
def test_a_tampered_model_does_not_pass(
    llama: Path,
    llama_lora: Path,
    merged_models: dict[str, Path],
    copied: Callable[[Path], Path],
    tmp_path: Path,
    precision: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    verdict: str,
    named: str,
) -> None:
    model = copied(merged_models[precision])
    edit_tensors(model / "model.safetensors", change)
    certificate = judged(llama, llama_lora, model, tmp_path / "out")
    assert certificate["verdict"] == verdict
    assert named in certificate["reason"]


@pytest.mark.parametrize("precision", FORMATS)
def test_attribution_names_the_cast_and_shares_add_up(
    llama: Path, llama_lora: Path, merged_models: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    certificate = judged(llama, llama_lora, merged_models[precision], tmp_path / "out")
    assert certificate["verdict"] == "exact"
    base, merged = (
        load_file(path / "model.safetensors") for path in (llama, merged_models[precision])
    )
    squares: dict[str, float] = {"lora": 0.0, "unchanged": 0.0, "cast": 0.0, "unexplained": 0.0}
    counts = dict.fromkeys(squares, 0)
    for name, W in base.items():
        T = merged[name].double().numpy() - W.double().numpy()
        adapted = any(part in name for part in ("q_proj", "v_proj", "down_proj"))
        kind = "lora" if adapted else "cast" if T.any() else "unchanged"
        squares[kind] += float((T * T).sum())
        counts[kind] += 1
    total = sum(squares.values())
    table = certificate["attribution"]
    assert {kind: entry["parameters"] for kind, entry in table.items()} == counts
    for kind, square in squares.items():
        assert table[kind]["squared_norm_share"] == pytest.approx(square / total, rel=1e-6)
    assert sum(entry["squared_norm_share"] for entry in table.values()) == pytest.approx(1)


def test_a_changed_parameter_that_nothing_explains_is_named(
    llama: Path,
    llama_lora: Path,
    merged_models: dict[str, Path],
    copied: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    model = copied(merged_models["bf16"])
    tensors = load_file(model / "model.safetensors")
    tensors[NORM] = load_file(llama / "model.safetensors")[NORM].half().bfloat16() * 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    certificate = judged(llama, llama_lora, model, tmp_path / "out")
    assert certificate["unexplained_parameters"] == [NORM]
    assert certificate["attribution"]["unexplained"]["parameters"] == 1
    assert certificate["verdict"] == "incomplete"


def test_a_model_in_fp64_is_called_that_and_exact_only_if_all_of_its_bits_are_a_recipes(
    llama: Path, llama_lora: Path, merged_models: dict[str, Path], copied: Any, tmp_path: Path
) -> None:
    model = copied(merged_models["fp32"])
    file = model / "model.safetensors"
    tensors = {name: tensor.double() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    certificate = judged(llama, llama_lora, model, tmp_path / "raised")
    assert certificate["precision"] == "fp64" and certificate["verdict"] == "exact"
    assert certificate["cost"]["sentence"].startswith("In fp64, this merge keeps 99.99")
    report = (tmp_path / "raised" / "detailed_comparison_report.txt").read_text()
    assert "checked against their own bound (fp64)" in report

    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][3, 5] *= 1 + 2.0**-40  # less than fp32 can hold
    save_file(tensors, file, metadata={"format": "pt"})
    certificate = judged(llama, llama_lora, model, tmp_path / "off")
    assert certificate["verdict"] != "exact"
    assert "(row 3, column 5)" in certificate["reason"]


@pytest.mark.parametrize("everything", [False, True])
def test_the_cost_says_what_it_does_not_count(
    llama: Path,
    llama_lora: Path,
    merged_models: dict[str, Path],
    copied: Any,
    tmp_path: Path,
    everything: bool,
) -> None:
    model, names = copied(merged_models["fp16"]), []

    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if any(module in name for module in ("q_proj", "v_proj", "down_proj")):
                names.append(name)
                tensors[name][slice(None) if everything else 0] = float("inf")

    edit_tensors(model / "model.safetensors", overflow)
    found = judged(llama, llama_lora, model, tmp_path / "out")
    lost = found["elements_checked"] if everything else 2 * (32 + 32 + 48)
    assert found["non_finite_elements"] >= lost > 0 and len(names) == 6
    sentence = found["cost"]["sentence"]
    if everything:
        assert sentence.startswith("Nothing to measure: 6,144 elements are NaN or infinite")
    else:
        assert sentence.endswith("; 224 elements are NaN or infinite and in none of these figures.")
