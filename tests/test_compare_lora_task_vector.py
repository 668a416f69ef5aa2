"""Step 3: numbers against numpy, the certificate's verdict, files, printed lines, exit status."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compare_lora_task_vector
from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec.cli import UserError
from taskvec.diagnose import diagnose
from tests.models import make_adapter, make_base

# DESIGN: the keys that every consumer of comparison_results.json may rely on.
SUMMARY_KEYS = {
    "total_parameters",
    "nonzero_parameters",
    "lora_parameters",
    "shared_parameters",
    "lora_only_parameters",
    "task_vector_only_parameters",
    "average_cosine_similarity",
    "min_cosine_similarity",
    "max_absolute_difference",
    "mean_max_difference",
    "mean_absolute_difference",
    "lora_coverage",
    "storage",
    "relative_error",
    "perfect_matches",
    "tolerance",
    "equivalent",
    "certificate",
}
FILES = {
    "comparison_results.json",
    "lora_deltas.safetensors",
    "detailed_comparison_report.txt",
    "cosine_similarity_analysis.png",
    "model_architecture_coverage.png",
    "norm_distribution_comparison.png",
    "parameter_modification_heatmap.png",
    "rounding_error_in_ulps.png",
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base/, lora/, and per precision merged_P/ and tv_P/."""
    root = tmp_path_factory.mktemp("chain")
    base = make_base(root / "base", "starcoder2")
    make_adapter(root / "lora", base)
    for precision in ("fp32", "fp16", "bf16"):
        merge(str(base), str(root / "lora"), root / f"merged_{precision}", precision=precision)
        extract(str(base), str(root / f"merged_{precision}"), root / f"tv_{precision}")
    return root


def run(chain: Path, out: Path, **options: Any) -> dict[str, Any]:
    options.setdefault("generate_plots", False)
    return compare(str(chain / "base"), str(chain / "lora"), out, **options).document


def exact_deltas(chain: Path) -> dict[str, np.ndarray]:
    """s * B @ A in float64, straight from the adapter's files."""
    config = json.loads((chain / "lora" / "adapter_config.json").read_text())
    factors = load_file(chain / "lora" / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    deltas = {}
    for name, A in factors.items():
        if ".lora_A." in name:
            B = factors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").replace(".lora_A", "")
            deltas[module] = scaling * B.double().numpy() @ A.double().numpy()
    return deltas


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_numbers_equal_numpy(chain: Path, tmp_path: Path, precision: str) -> None:
    document = run(chain, tmp_path / "out", task_vector_path=chain / f"tv_{precision}")
    vector = load_file(chain / f"tv_{precision}" / "task_vector.safetensors")
    deltas = exact_deltas(chain)
    cosines, maxima, total_error, total_delta = [], [], 0.0, 0.0
    for name, delta in deltas.items():
        T = vector[name].double().numpy()
        lora = document["parameters"][name]["lora"]
        cosine = (T * delta).sum() / np.sqrt((T * T).sum() * (delta * delta).sum())
        assert lora["cosine_similarity"] == pytest.approx(cosine, abs=1e-12)
        assert lora["slope"] == pytest.approx((T * delta).sum() / (delta * delta).sum(), rel=1e-12)
        assert lora["max_absolute_difference"] == pytest.approx(np.abs(T - delta).max(), rel=1e-12)
        assert lora["mean_absolute_difference"] == pytest.approx(np.abs(T - delta).mean(), rel=1e-9)
        assert lora["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        error = np.linalg.norm(T - delta) / np.linalg.norm(delta)
        assert lora["relative_error"] == pytest.approx(error, rel=1e-9)
        assert lora["snr_db"] == pytest.approx(-20 * np.log10(error), rel=1e-9)
        cosines.append(cosine)
        maxima.append(np.abs(T - delta).max())
        total_error += ((T - delta) ** 2).sum()
        total_delta += (delta**2).sum()
    summary = document["summary"]
    assert summary["average_cosine_similarity"] == pytest.approx(np.mean(cosines), abs=1e-12)
    assert summary["min_cosine_similarity"] == pytest.approx(np.min(cosines), abs=1e-12)
    assert summary["max_absolute_difference"] == pytest.approx(np.max(maxima), rel=1e-12)
    assert summary["mean_max_difference"] == pytest.approx(np.mean(maxima), rel=1e-12)
    assert summary["relative_error"] == pytest.approx(np.sqrt(total_error / total_delta), rel=1e-9)
    assert summary["average_cosine_similarity"] <= 1.0


@pytest.mark.parametrize(
    ("precision", "changed", "artifacts"), [("fp32", 8, 0), ("fp16", 35, 27), ("bf16", 35, 27)]
)
def test_every_changed_parameter_is_explained(
    chain: Path, tmp_path: Path, precision: str, changed: int, artifacts: int
) -> None:
    """fp32 changes what the adapter changes; narrower formats add the base's own rounding."""
    summary = run(chain, tmp_path / "out", task_vector_path=chain / f"tv_{precision}")["summary"]
    assert summary["total_parameters"] == 35
    assert summary["nonzero_parameters"] == changed
    assert summary["lora_parameters"] == summary["shared_parameters"] == 8
    assert summary["task_vector_only_parameters"] == artifacts
    attribution = summary["certificate"]["attribution"]
    assert attribution["lora"]["parameters"] == 8
    assert attribution["cast"]["parameters"] == artifacts
    assert attribution["unexplained"]["parameters"] == 0
    shares = sum(entry["squared_norm_share"] for entry in attribution.values())
    assert shares == pytest.approx(1.0)


@pytest.mark.parametrize("base_precision", ["fp16", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_that_was_rounded_for_the_subtraction_explains_what_that_left(
    chain: Path, tmp_path: Path, precision: str, base_precision: str
) -> None:
    """T = W - R(W) of a parameter that an fp32 merge leaves alone: nothing of it was trained."""
    base, merged = str(chain / "base"), str(chain / f"merged_{precision}")
    extract(base, merged, tmp_path / "tv", base_precision=base_precision)
    document = run(chain, tmp_path / "out", task_vector_path=tmp_path / "tv")
    certificate = document["summary"]["certificate"]
    assert certificate["verdict"] == "exact"
    assert certificate["unexplained_parameters"] == []
    casts = 0 if precision == base_precision else 27
    assert certificate["attribution"]["cast"]["parameters"] == casts
    shown = {entry["cast_format"] for entry in document["parameters"].values()} - {None}
    expected = base_precision if precision == "fp32" else precision
    assert shown == ({expected} if casts else set())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_merged_model_and_task_vector_are_judged_alike(
    chain: Path, tmp_path: Path, precision: str
) -> None:
    extracted = run(chain, tmp_path / "a", task_vector_path=chain / f"tv_{precision}")["summary"]
    direct = run(chain, tmp_path / "b", finetuned_model=str(chain / f"merged_{precision}"))[
        "summary"
    ]
    assert extracted["certificate"]["verdict"] == direct["certificate"]["verdict"] == "exact"
    for key in SUMMARY_KEYS - {"certificate", "storage"}:
        assert extracted[key] == direct[key], key
    for key in ("reproduced_by", "recipes", "attribution", "cost", "precision", "violations"):
        assert extracted["certificate"][key] == direct["certificate"][key], key


def test_a_task_vector_without_metadata_is_understood(chain: Path, tmp_path: Path) -> None:
    """Another tool's task vector says nothing of its format: the tensors do."""
    for precision in ("fp32", "fp16", "bf16"):
        tensors = load_file(chain / f"tv_{precision}" / "task_vector.safetensors")
        save_file(tensors, tmp_path / f"{precision}.safetensors")
        document = run(
            chain, tmp_path / precision, task_vector_path=tmp_path / f"{precision}.safetensors"
        )
        certificate = document["summary"]["certificate"]
        assert (certificate["verdict"], certificate["precision"]) == ("exact", precision)


def test_metadata_is_not_trusted_over_the_tensors(chain: Path, tmp_path: Path) -> None:
    """An fp32 merge that claims to be bf16 is still certified as what it is."""
    tensors = load_file(chain / "tv_fp32" / "task_vector.safetensors")
    save_file(tensors, tmp_path / "tv.safetensors", metadata={"merged_precision": "bf16"})
    certificate = run(chain, tmp_path / "out", task_vector_path=tmp_path / "tv.safetensors")[
        "summary"
    ]["certificate"]
    assert (certificate["verdict"], certificate["precision"]) == ("exact", "fp32")


def test_deltas_are_the_bits_of_peft(chain: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from tests.models import load

    run(chain, tmp_path / "out", task_vector_path=chain / "tv_fp32")
    deltas = load_file(tmp_path / "out" / "lora_deltas.safetensors")
    model = PeftModel.from_pretrained(load(chain / "base"), chain / "lora")
    seen = 0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            assert torch.equal(deltas[f"{name}.weight"], module.get_delta_weight("default")), name
            seen += 1
    assert seen == len(deltas) == 8


def test_summary_keys_and_json(chain: Path, tmp_path: Path) -> None:
    run(chain, tmp_path / "out", task_vector_path=chain / "tv_fp16")
    text = (tmp_path / "out" / "comparison_results.json").read_text()
    document = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert set(document["summary"]) >= SUMMARY_KEYS
    assert set(document) == {"inputs", "summary", "parameters", "figures"}
    assert len(document["parameters"]) == 35


def test_the_report_says_what_to_see_in_each_figure(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(chain, out, task_vector_path=chain / "tv_fp16")
    document = json.loads((out / "comparison_results.json").read_text())
    lines = (out / "detailed_comparison_report.txt").read_text().splitlines()
    figures = sorted(path.name for path in out.glob("*.png"))
    assert sorted(document["figures"]) == figures
    for file in figures:
        first = lines[lines.index(file) + 1].strip()
        assert document["figures"][file]["title"].startswith(first)
        assert len(document["figures"][file]["caption"]) > 60


def tampered(chain: Path, target: Path, change: Any) -> Path:
    tensors = load_file(chain / "tv_fp32" / "task_vector.safetensors")
    change(tensors)
    save_file(tensors, target)
    return target


NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_given_as_a_task_vector_is_told_from_one(
    chain: Path, tmp_path: Path, precision: str
) -> None:
    model = chain / f"merged_{precision}" / "model.safetensors"
    with pytest.raises(UserError, match=r"holds weights like the base's, not differences .*model"):
        run(chain, tmp_path / "out", task_vector_path=model)
    assert not (tmp_path / "out").exists()


def negate(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.neg_()


def zero_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME].zero_()


def two_ulps(tensors: dict[str, torch.Tensor]) -> None:
    bits = tensors[NAME].view(torch.int32)
    bits[3, 5] += 2**12  # T is small beside W: this many of its ulps are two of the weight's


@pytest.mark.parametrize("change", [negate, zero_one, two_ulps])
def test_a_wrong_task_vector_fails_and_is_named(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    path = tampered(chain, tmp_path / "tv.safetensors", change)
    status = compare_lora_task_vector.main(
        [
            *("--base_model", str(chain / "base"), "--lora_path", str(chain / "lora")),
            *("--task_vector_path", str(path), "--output_dir", str(tmp_path / "out")),
            "--no-generate_plots",
        ]
    )
    output = capsys.readouterr().out
    assert status == 1
    assert output.splitlines()[-1].startswith("❌ VALIDATION FAILED: ")
    assert NAME in output or NAME.replace(".0.", ".0-1.") in output  # the layers are folded
    document = json.loads((tmp_path / "out" / "comparison_results.json").read_text())
    assert document["summary"]["equivalent"] is False


def test_another_adapters_task_vector_fails(chain: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "other", chain / "base", seed=99)
    merge(str(chain / "base"), str(tmp_path / "other"), tmp_path / "merged")
    document = run(chain, tmp_path / "out", finetuned_model=str(tmp_path / "merged"))
    certificate = document["summary"]["certificate"]
    assert certificate["verdict"] == "violated"
    assert len(certificate["violated_parameters"]) == 8


def test_prints_the_documented_lines_last(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--base_model", str(chain / "base"), "--lora_path", str(chain / "lora")),
        *("--task_vector_path", str(chain / "tv_fp32"), "--output_dir", str(tmp_path / "out")),
    ]
    assert compare_lora_task_vector.main(arguments) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    lines = capsys.readouterr().out.splitlines()[-7:]
    assert lines[0] == "🔬 MATHEMATICAL EQUIVALENCE ANALYSIS:"
    assert lines[1] == "   Analyzing 8 shared parameters..."
    assert lines[2] == "   Average cosine similarity: 1.000000"
    assert lines[3].startswith("   Max absolute difference: ")
    assert lines[4] == "   Perfect matches (>0.9999): 8/8 (100.0%)"
    assert lines[5] == ""
    assert lines[6] == (
        "✅ VALIDATION SUCCESSFUL: LoRA and Task Vectors are mathematically equivalent!"
    )


def test_files_can_be_switched_off(chain: Path, tmp_path: Path) -> None:
    run(
        chain,
        tmp_path / "out",
        task_vector_path=chain / "tv_fp32",
        detailed_report=False,
        architecture_analysis=False,
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison_results.json",
        "lora_deltas.safetensors",
    }


def test_a_merged_model_with_another_integer_buffer_is_refused(chain: Path, tmp_path: Path) -> None:
    """No task vector can hold it, so that no certificate would be of the whole model."""
    for name, steps in (("base", torch.arange(3)), ("merged_fp32", torch.arange(3) + 1)):
        shutil.copytree(chain / name, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file(load_file(file) | {"model.steps": steps}, file)
    with pytest.raises(UserError, match=r"merged_fp32: model\.steps .* differs from the base's"):
        compare(
            str(tmp_path / "base"),
            str(chain / "lora"),
            tmp_path / "out",
            finetuned_model=str(tmp_path / "merged_fp32"),
        )
    assert not (tmp_path / "out").exists()


def test_both_subjects_at_once_are_refused(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = compare_lora_task_vector.main(
        [
            *("--base_model", str(chain / "base"), "--lora_path", str(chain / "lora")),
            *("--task_vector_path", "x", "--finetuned_model", "y"),
            *("--output_dir", str(tmp_path / "out")),
        ]
    )
    assert status == 2
    assert "either a task vector" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_with_other_shapes_is_refused(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "tv_fp32", tmp_path / "tv")
    tensors = load_file(tmp_path / "tv" / "task_vector.safetensors")
    tensors[NAME] = tensors[NAME][:, :-1].contiguous()
    save_file(tensors, tmp_path / "tv" / "task_vector.safetensors")
    with pytest.raises(UserError, match=r"q_proj.*\(32, 31\).*\(32, 32\)"):
        run(chain, tmp_path / "out", task_vector_path=tmp_path / "tv")


def keys_of(document: Any) -> set[str]:
    """Every key of a document, at any depth, but the names of files and parameters."""
    if isinstance(document, list):
        return set().union(*map(keys_of, document))
    if not isinstance(document, dict):
        return set()
    found = {key for key in document if "." not in key}
    return found.union(*map(keys_of, document.values()))


def test_every_key_and_cause_is_documented(chain: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "comparison_results.md").read_text("utf-8")
    named = set(re.findall(r"`([^`]+)`", text))
    document = run(chain, tmp_path / "out", task_vector_path=chain / "tv_fp16", generate_plots=True)
    recipes = set(document["summary"]["certificate"]["recipes"])
    assert keys_of(document) - recipes <= named
    causes = re.split(r"Their\s+names: ", str(diagnose.__doc__))[1].split(".\n")[0]
    in_table = re.findall(r"^\| `(\w+)` \|", text.split("## Causes")[1], re.M)
    assert sorted(in_table) == sorted(["cause", *re.split(r",\s+", causes)])
