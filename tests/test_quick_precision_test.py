"""Which changes of a merge are real and which are artifacts of rounding the base."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

import quick_precision_test as script
from extract_task_vectors import extract
from merge_lora import merge
from taskvec import precision
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError

ADAPTED = 8  # q, k, v and o of two layers
TOTAL = 35  # 2 x 16 + 3
PRECISIONS = ("fp32", "fp16", "bf16")


@pytest.fixture(scope="module")
def starcoder2(tiny):
    return tiny.base("starcoder2")


@pytest.fixture(scope="module")
def lora(tiny, starcoder2):
    return tiny.adapter(starcoder2, scale=0.005)


@pytest.fixture(scope="module")
def vectors(starcoder2, lora, tmp_path_factory):
    """Task vectors of the merges that merge_lora.py writes, by precision."""
    folder = tmp_path_factory.mktemp("vectors")
    for name in PRECISIONS:
        merged = folder / f"merged_model_{name}"
        merge(str(starcoder2), str(lora), merged, precision=name, device="cpu")
        extract(str(starcoder2), str(merged), folder / f"task_vectors_{name}", device="cpu")
    return folder


def rows_of(result):
    return {(row["precision"], row["base_precision"]): row for row in result.rows}


def run_merges(base, lora, directory, **options):
    return script.compare_merges(str(base), str(lora), directory, device="cpu", **options)


def rounded(values, name):
    """numpy's own fp16, and bf16 by round-to-nearest-even on the bits."""
    if name == "fp16":
        return values.astype(np.float16).astype(np.float32)
    if name == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def reference(base, lora, name, *, base_rounded, rounding="once"):
    """Relative error and lost share, computed by numpy from the two files."""
    weights = load_file(base / "model.safetensors")
    factors = load_file(lora / "adapter_model.safetensors")
    error = norm = lost = touched = 0.0
    for key in (key for key in factors if ".lora_A." in key):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = factors[key], factors[key.replace("lora_A", "lora_B")]
        W = weights[f"{module}.weight"]
        delta = 2.0 * (B.astype(np.float64) @ A.astype(np.float64))  # alpha / r = 8 / 4
        start = rounded(W, name) if rounding == "peft" else W
        M = rounded(start + (B @ A) * np.float32(2), name)
        T = M - (rounded(W, name) if base_rounded else W)
        error += ((T - delta) ** 2).sum()
        norm += (delta**2).sum()
        lost += ((rounded(W, name) == M) & (delta != 0)).sum()
        touched += (delta != 0).sum()
    return math.sqrt(error / norm), lost / touched


def test_fp32_changes_what_the_adapter_changes_and_nothing_else(starcoder2, lora, tmp_path):
    row = rows_of(run_merges(starcoder2, lora, tmp_path / "out"))["fp32", "stored"]
    assert (row["changed_parameters"], row["artifact_parameters"]) == (ADAPTED, 0)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_rounding_makes_every_parameter_change_and_rounding_the_base_first_undoes_it(
    starcoder2, lora, tmp_path, name
):
    rows = rows_of(run_merges(starcoder2, lora, tmp_path / "out"))
    assert rows[name, "stored"]["changed_parameters"] == TOTAL
    assert rows[name, "stored"]["artifact_parameters"] == TOTAL - ADAPTED
    assert rows[name, name]["changed_parameters"] == ADAPTED
    assert rows[name, name]["artifact_parameters"] == 0
    assert rows[name, name]["artifact_share_of_squared_norm"] == 0


@pytest.mark.parametrize("rounding", ["once", "peft"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_error_and_loss_are_numpys(starcoder2, lora, tmp_path, name, rounding):
    rows = rows_of(run_merges(starcoder2, lora, tmp_path / "out", rounding=rounding))
    for base in ("stored", name):
        error, lost = reference(
            starcoder2, lora, name, base_rounded=base != "stored", rounding=rounding
        )
        # fp32's error hangs on the last bit of B @ A, which two libraries may give differently.
        assert rows[name, base]["relative_error"] == pytest.approx(
            error, rel=0.05 if name == "fp32" else 1e-4
        )
        assert rows[name, base]["snr_db"] == pytest.approx(
            -20 * math.log10(rows[name, base]["relative_error"])
        )
        assert rows[name, base]["lost_share"] == pytest.approx(lost, abs=2e-4)


def test_subtracting_what_the_merge_started_from_errs_least(starcoder2, lora, tmp_path):
    once = rows_of(run_merges(starcoder2, lora, tmp_path / "once", rounding="once"))
    peft = rows_of(run_merges(starcoder2, lora, tmp_path / "peft", rounding="peft"))
    assert once["bf16", "stored"]["relative_error"] < once["bf16", "bf16"]["relative_error"]
    assert peft["bf16", "bf16"]["relative_error"] < peft["bf16", "stored"]["relative_error"]


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_merge_in_memory_is_the_merge_that_is_written(
    starcoder2, lora, vectors, tmp_path, name
):
    row = rows_of(run_merges(starcoder2, lora, tmp_path / "out"))[name, "stored"]
    summary = json.loads((vectors / f"task_vectors_{name}/task_vector_summary.json").read_text())
    assert row["changed_parameters"] == summary["nonzero_parameters"]
    assert row["nonzero_elements"] == summary["nonzero_elements"]


def test_a_base_in_bf16_has_no_artifacts_in_bf16_or_fp32(tiny, tmp_path):
    base = tiny.base("llama", dtype=torch.bfloat16)
    rows = rows_of(run_merges(base, tiny.adapter(base), tmp_path / "out"))
    for name in ("bf16", "fp32"):
        assert rows[name, "stored"]["artifact_parameters"] == 0
        assert rows[name, "stored"]["changed_parameters"] == 6
        assert rows[name, "stored"]["relative_error"] == rows[name, name]["relative_error"]


def test_a_sharded_gpt2_gives_the_same_table_as_the_model_in_one_file(tiny, tmp_path):
    whole = tiny.base("gpt2")
    sharded = tiny.base("gpt2", max_shard_size="20KB")
    lora = tiny.adapter(whole)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    first, second = (rows_of(run_merges(b, lora, tmp_path / b.name)) for b in (whole, sharded))
    for key, row in first.items():
        assert second[key]["artifact_parameters"] == row["artifact_parameters"] > 0 or (
            "stored" not in key or key[0] == "fp32"
        )
        assert second[key]["relative_error"] == pytest.approx(row["relative_error"], rel=1e-12)


def test_memory_is_bounded_by_a_block_and_the_table_does_not_depend_on_it(
    starcoder2, lora, tmp_path, monkeypatch
):
    whole = rows_of(run_merges(starcoder2, lora, tmp_path / "whole"))
    read, sizes = Checkpoint.read, []

    def watched(self, name, start=0, stop=None):
        rows = read(self, name, start, stop)
        sizes.append(rows.numel())
        return rows

    monkeypatch.setattr(precision, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(Checkpoint, "read", watched)
    blocks = rows_of(run_merges(starcoder2, lora, tmp_path / "blocks"))
    assert max(sizes) <= 256 + 48  # a last row alone joins the block before it
    assert sum(sizes) == 16032  # one pass over the model's elements
    for key, row in whole.items():
        assert blocks[key]["changed_parameters"] == row["changed_parameters"]
        assert blocks[key]["relative_error"] == pytest.approx(row["relative_error"], rel=1e-9)


def test_a_pair_whose_b_is_zero_trains_nothing(starcoder2, lora, copied, tmp_path):
    dead = copied(lora)
    tensors = load_torch(dead / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name].zero_()
    save_file(tensors, dead / "adapter_model.safetensors", metadata={"format": "pt"})
    rows = rows_of(run_merges(starcoder2, dead, tmp_path / "out"))
    assert rows["fp32", "stored"]["changed_parameters"] == ADAPTED - 1
    assert rows["fp32", "stored"]["unmoved_parameters"] == 0
    assert "model.layers.1.self_attn.v_proj.weight" in rows["fp16", "stored"]["artifacts"]


def test_values_beyond_fp16_are_counted_and_named(tiny, copied, tmp_path):
    base = copied(tiny.base("llama"))
    tensors = load_torch(base / "model.safetensors")
    tensors["model.norm.weight"][:3] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = run_merges(base, tiny.adapter(tiny.base("llama")), tmp_path / "out")
    rows = rows_of(result)
    assert rows["fp16", "stored"]["non_finite_elements"] == 3
    assert rows["bf16", "stored"]["non_finite_elements"] == 0
    assert any("fp16 (3)" in sentence for sentence in result.document["findings"])


def test_without_arguments_it_explains_the_fp16_count(vectors, monkeypatch, capsys):
    monkeypatch.chdir(vectors)
    assert script.main([]) == 0
    out = capsys.readouterr().out
    assert "fp16: 35 = 8 real + 27 artifacts" in out
    assert "Artifacts come from" not in out  # nothing here has seen the base
    files = sorted(path.name for path in Path("precision_test").iterdir())
    assert files == ["precision_impact.json", "precision_impact.png"]
    document = json.loads(Path("precision_test/precision_impact.json").read_text())
    assert document["total_parameters"] == TOTAL
    fp32, fp16 = document["impacts"]
    assert (fp32["changed_parameters"], fp16["changed_parameters"]) == (ADAPTED, TOTAL)
    assert (fp16["real_parameters"], fp16["artifact_parameters"]) == (ADAPTED, TOTAL - ADAPTED)
    assert set(fp16["artifacts"]) == set(
        json.loads(Path("task_vectors_fp32/task_vector_summary.json").read_text())["parameters"]
    ) - {
        name
        for name, entry in json.loads(
            Path("task_vectors_fp32/task_vector_summary.json").read_text()
        )["parameters"].items()
        if entry["nonzero_elements"]
    }


def test_the_extracted_vectors_tell_the_error_that_the_merge_makes(
    starcoder2, lora, vectors, tmp_path
):
    exact = rows_of(run_merges(starcoder2, lora, tmp_path / "merges"))
    paths = {name: str(vectors / f"task_vectors_{name}") for name in PRECISIONS}
    stored = rows_of(script.compare_task_vectors(paths, tmp_path / "out", device="cpu"))
    for name in ("fp16", "bf16"):
        error = stored[name, "stored"]["relative_error"]
        assert error == pytest.approx(exact[name, "stored"]["relative_error"], rel=1e-3)
        assert stored[name, "stored"]["lost_share"] is None  # unknown without the base
    assert stored["fp32", "stored"]["relative_error"] is None  # it is the reference


def test_a_vector_extracted_from_the_rounded_base_has_no_artifacts(
    starcoder2, lora, vectors, tmp_path
):
    extract(
        str(starcoder2),
        str(vectors / "merged_model_bf16"),
        tmp_path / "rounded",
        base_precision="bf16",
        device="cpu",
    )
    paths = {"fp32": str(vectors / "task_vectors_fp32"), "bf16": str(tmp_path / "rounded")}
    row = rows_of(script.compare_task_vectors(paths, tmp_path / "out"))["bf16", "bf16"]
    _, lost = reference(starcoder2, lora, "bf16", base_rounded=True)
    assert (row["changed_parameters"], row["artifact_parameters"]) == (ADAPTED, 0)
    assert row["lost_share"] == pytest.approx(lost, abs=2e-4)


def test_full_fine_tuning_has_no_artifacts_to_tell_apart(tiny, tmp_path):
    base, tuned = tiny.base("llama"), tiny.base("llama", seed=7)
    extract(str(base), str(tuned), tmp_path / "fp32", device="cpu")
    half = tiny.base("llama", seed=7, dtype=torch.float16)
    extract(str(base), str(half), tmp_path / "fp16", device="cpu")
    paths = {"fp32": str(tmp_path / "fp32"), "fp16": str(tmp_path / "fp16")}
    result = script.compare_task_vectors(paths, tmp_path / "out")
    assert rows_of(result)["fp16", "stored"]["artifact_parameters"] == 0
    assert result.document["findings"][0].startswith("fp32 changes all 21 parameters")


def fails(capsys, argv):
    """The one line that a refused command prints."""
    assert script.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_missing_task_vectors_name_the_commands_that_make_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, [])
    for text in (
        "task_vectors_fp16/",
        "task_vectors_fp32/",
        "merge_lora.py --precision fp16 --output_dir merged_model_fp16",
        "extract_task_vectors.py --finetuned_model merged_model_fp16/ --output_dir "
        "task_vectors_fp16/",
        "quick_precision_test.py --base_model MODEL --lora_path ADAPTER",
    ):
        assert text in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--base_model", "x"], "--base_model and --lora_path go together"),
        (["--lora_path", "x"], "--base_model and --lora_path go together"),
        (["--rounding", "peft"], "--rounding needs --base_model and --lora_path"),
        (["--revision", "main"], "--revision needs --base_model and --lora_path"),
        (["--base_model", "x", "--lora_path", "y", "--bf16_path", "z"], "either --bf16_path"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(argv, text, capsys):
    assert text in fails(capsys, argv)


def test_a_vector_of_another_format_than_its_flag_is_refused(vectors, starcoder2, tmp_path):
    paths = {"fp32": str(vectors / "task_vectors_fp16")}
    with pytest.raises(UserError, match=r"--fp32_path .*: was extracted from a model in fp16"):
        script.compare_task_vectors(paths, tmp_path / "out")
    merged = str(vectors / "merged_model_fp32")
    extract(str(starcoder2), merged, tmp_path / "rounded", base_precision="fp16", device="cpu")
    with pytest.raises(UserError, match="was extracted with --base_precision fp16"):
        script.compare_task_vectors({"fp32": str(tmp_path / "rounded")}, tmp_path / "out")


def test_vectors_of_different_models_are_refused(vectors, tiny, tmp_path):
    base = tiny.base("llama")
    extract(str(base), str(base), tmp_path / "fp16", device="cpu")
    (tmp_path / "fp16" / "task_vector.safetensors").rename(tmp_path / "other.safetensors")
    tensors = load_torch(tmp_path / "other.safetensors")
    save_file(tensors, tmp_path / "other.safetensors")  # without the metadata
    paths = {
        "fp32": str(vectors / "task_vectors_fp32"),
        "fp16": str(tmp_path / "other.safetensors"),
    }
    with pytest.raises(UserError, match=r"holds lm_head\.weight, which .* has not got"):
        script.compare_task_vectors(paths, tmp_path / "out")


def test_values_come_from_yaml_too(starcoder2, lora, tmp_path, capsys):
    config = tmp_path / "run.yml"
    config.write_text(
        f"base_model: {starcoder2}\nlora_path: {lora}\nrounding: peft\n"
        f"output_dir: {tmp_path / 'out'}\nquiet: true\n"
    )
    assert script.main(["--config", str(config)]) == 0
    assert "Artifacts come from rounding the base, not from the merge" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / script.RESULT).read_text())
    assert document["inputs"]["rounding"] == "peft"


def test_the_figure_states_the_finding_of_its_document(starcoder2, lora, tmp_path):
    from taskvec.figures.task_vector import artifacts_by_precision

    document = run_merges(starcoder2, lora, tmp_path / "out").document
    figure = artifacts_by_precision(document, tmp_path / "figure.png")
    title = " ".join(figure.texts[0].get_text().split())
    assert title.startswith("Artifacts come from rounding the base: 27 in fp16 and 27 in bf16")
    drawn = [text.get_text() for text in figure.axes[0].texts]
    assert drawn == ["8", "8", "35 = 8 + 27", "8", "35 = 8 + 27", "8"]
    assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "out" / script.FIGURE).read_bytes()


def test_help_needs_no_torch():
    code = (
        "import sys, quick_precision_test as script\n"
        "script.build_parser().format_help()\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(script.__file__).parent)
