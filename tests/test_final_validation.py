"""Everything in one command: the bundled example as a user runs it, and what already exists."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import final_validation
from extract_task_vectors import extract
from merge_lora import merge
from taskvec.adapter import open_adapter
from taskvec.checkpoint import open_checkpoint
from taskvec.reports import validation
from taskvec.rounding import FORMATS
from tests.checks import edit_json
from tests.models import make_adapter, make_base
from tests.test_compare_lora_task_vector import FILES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`python final_validation.py` without arguments but for the place: (directory, stdout)."""
    out = tmp_path_factory.mktemp("example") / "validation_results"
    done = subprocess.run(
        [sys.executable, "final_validation.py", "--output_dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_question_is_answered(example: tuple[Path, str]) -> None:
    """483 parameters; 120 changed in fp32, 483 = 120 + 363 in fp16 and bf16; cosine 1.000000."""
    out, _ = example
    document = json.loads((out / "validation_summary.json").read_text())
    assert document["valid"] is True
    for precision, changed, artifacts in (("fp32", 120, 0), ("fp16", 483, 363), ("bf16", 483, 363)):
        summary = document["precisions"][precision]
        attribution = summary["certificate"]["attribution"]
        assert summary["total_parameters"] == 483
        assert summary["nonzero_parameters"] == changed
        assert attribution["lora"]["parameters"] == 120
        assert attribution["cast"]["parameters"] == artifacts
        assert attribution["unexplained"]["parameters"] == 0
        assert summary["certificate"]["verdict"] == "exact"
        assert summary["average_cosine_similarity"] <= 1.0
    fp32 = document["precisions"]["fp32"]
    assert f"{fp32['average_cosine_similarity']:.6f}" == "1.000000"
    assert fp32["perfect_matches"] == 120


def test_behaviour_is_that_of_base_plus_adapter(example: tuple[Path, str]) -> None:
    out, _ = example
    checked = json.loads((out / "validation_summary.json").read_text())["behaviour"]
    assert set(checked) == {"fp32", "fp16", "bf16"}
    for model in ("merged", "base_plus_task_vector"):
        assert checked["fp32"][model]["max_kl"] < 1e-6
        assert checked["fp32"][model]["equal_top1"] == 1.0
        assert checked["fp32"][model]["mean_kl"] < checked["bf16"][model]["mean_kl"]


def test_prints_steps_table_and_verdict(example: tuple[Path, str]) -> None:
    _, output = example
    for number in range(1, 7):
        assert f"[{number}/6] " in output
    assert "[2/6] Extract task vectors" in output
    assert output.splitlines()[-2] == (
        "✅ VALIDATION SUCCESSFUL: LoRA and Task Vectors are mathematically equivalent!"
    )


def test_every_file_of_the_contract_is_written(example: tuple[Path, str]) -> None:
    out, _ = example
    directories = {
        f"{kind}_{precision}"
        for kind in ("merged_model", "task_vectors", "comparison_results")
        for precision in ("fp32", "fp16", "bf16")
    }
    files = {
        "validation_summary.json",
        "validation_report.txt",
        "validation_report.html",
        "precision_impact.png",
        "rounding_error_in_ulps.png",
    }
    assert {path.name for path in out.iterdir()} == directories | files
    for precision in ("fp32", "fp16", "bf16"):
        found = {path.name for path in (out / f"comparison_results_{precision}").iterdir()}
        assert found == FILES
        assert {path.name for path in (out / f"task_vectors_{precision}").iterdir()} == {
            "task_vector.safetensors",
            "task_vector_summary.json",
        }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    base = make_base(root / "base", "starcoder2")
    make_adapter(root / "lora", base)
    merge(str(base), str(root / "lora"), root / "merged")
    extract(str(base), str(root / "merged"), root / "tv")
    return root


def run(pair: Path, out: Path, *options: str) -> int:
    return final_validation.main(
        [
            *("--base_model", str(pair / "base"), "--lora_path", str(pair / "lora")),
            *("--output_dir", str(out), *options),
        ]
    )


def test_an_existing_task_vector_is_judged(pair: Path, tmp_path: Path) -> None:
    assert run(pair, tmp_path, "--task_vector_path", str(pair / "tv"), "--no-behaviour") == 0
    assert not list(tmp_path.glob("merged_model*"))


def test_an_existing_model_is_judged(pair: Path, tmp_path: Path) -> None:
    assert run(pair, tmp_path, "--finetuned_model", str(pair / "merged"), "--no-behaviour") == 0
    assert (tmp_path / "task_vectors" / "task_vector.safetensors").is_file()


def test_a_wrong_task_vector_fails_and_is_named(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(pair / "tv" / "task_vector.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name].zero_()
    save_file(tensors, tmp_path / "tv.safetensors")
    status = run(
        pair, tmp_path / "out", "--task_vector_path", str(tmp_path / "tv.safetensors"),
        "--no-behaviour",
    )  # fmt: skip
    output = capsys.readouterr().out
    assert status == 1
    assert "❌ VALIDATION FAILED" in output
    assert name in output
    assert json.loads((tmp_path / "out" / "validation_summary.json").read_text())["valid"] is False


def test_half_a_pair_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = final_validation.main(["--base_model", "x", "--output_dir", str(tmp_path / "out")])
    assert status == 2
    assert "both --base_model and --lora_path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_foreseen(
    pair: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = SimpleNamespace(total=10**6, used=10**6 - 1000, free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: small)
    assert run(pair, tmp_path / "out") == 2
    assert "are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_too_large_for_the_memory_is_said_to_be(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskvec.behaviour.available_memory", lambda device: 1000)
    assert run(pair, tmp_path, "--precisions", "fp32") == 0
    document = json.loads((tmp_path / "validation_summary.json").read_text())
    assert "GB are free" in document["behaviour"]["skipped"]


def test_the_room_asked_for_is_what_the_tensors_take(example: tuple[Path, str]) -> None:
    """The merged model, what is not zero of the task vector, and the deltas."""
    out, _ = example
    base, lora = ROOT / "examples/starcoder2-mini", ROOT / "examples/starcoder2-mini-lora"
    for precision in ("fp32", "bf16"):
        files = [
            out / f"merged_model_{precision}/model.safetensors",
            out / f"task_vectors_{precision}/task_vector.safetensors",
            out / f"comparison_results_{precision}/lora_deltas.safetensors",
        ]
        merged, vector, deltas = (load_file(file) for file in files)
        stored = [*merged.values(), *deltas.values(), *(t for t in vector.values() if t.any())]
        with open_checkpoint(str(base)) as opened, open_adapter(str(lora), opened) as adapter:
            needed = validation.output_bytes(opened, adapter, FORMATS[precision])
        assert needed == sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_a_tokenizer_is_validated_and_the_check_of_behaviour_said_to_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    base = make_base(tmp_path / "base", family)
    lora = make_adapter(tmp_path / "lora", base)
    status = final_validation.main(
        [
            *("--base_model", str(base), "--lora_path", str(lora), "--precisions", "fp32"),
            *("--output_dir", str(tmp_path / "out")),
        ]
    )
    output = capsys.readouterr().out
    assert status == 0
    assert f"skipped: {base} has no tokenizer" in output
    page = (tmp_path / "out" / "validation_report.html").read_text()
    assert f"Skipped: {base} has no tokenizer" in page


def test_a_model_that_transformers_cannot_load_is_validated_too(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that brings its own code, which nothing here runs."""
    base = tmp_path / "base"
    shutil.copytree(pair / "base", base)
    edit_json(base / "config.json", model_type="own", architectures=["OwnForCausalLM"])
    monkeypatch.setattr("taskvec.behaviour.tokenize", lambda directory, prompts: [[1, 2, 3]])
    status = final_validation.main(
        [
            *("--base_model", str(base), "--lora_path", str(pair / "lora")),
            *("--precisions", "fp32", "--output_dir", str(tmp_path / "out")),
        ]
    )
    document = json.loads((tmp_path / "out" / "validation_summary.json").read_text())
    assert status == 0
    assert document["behaviour"]["skipped"].startswith(f"transformers cannot load {base}: ")
