"""What a task vector consists of, against numpy on the whole tensors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import analyze_task_vector_structure as script
from extract_task_vectors import extract
from merge_lora import merge
from taskvec import breakdown
from taskvec.cli import UserError

GROUPS = ("by_layer", "by_block", "by_module", "by_kind")


@pytest.fixture(scope="module")
def starcoder2(tiny):
    return tiny.base("starcoder2")


@pytest.fixture(scope="module")
def vectors(tiny, starcoder2, tmp_path_factory):
    """Task vectors of an fp32 and an fp16 merge, and the merged models."""
    folder = tmp_path_factory.mktemp("vectors")
    lora = tiny.adapter(starcoder2)
    for name in ("fp32", "fp16"):
        merged = folder / f"merged_{name}"
        merge(str(starcoder2), str(lora), merged, precision=name, device="cpu")
        extract(str(starcoder2), str(merged), folder / f"task_vectors_{name}", device="cpu")
    return folder


@pytest.fixture(scope="module")
def fp16(vectors, tmp_path_factory):
    out = tmp_path_factory.mktemp("fp16") / "out"
    return script.analyze(out, task_vector_path=vectors / "task_vectors_fp16", device="cpu")


@pytest.fixture(scope="module")
def tensors(vectors):
    """The fp16 merge's task vector in float64."""
    loaded = load_file(vectors / "task_vectors_fp16" / "task_vector.safetensors")
    return {name: tensor.astype(np.float64) for name, tensor in loaded.items()}


def save(path, tensors):
    save_file({k: np.asarray(v, dtype=np.float32) for k, v in tensors.items()}, path)
    return path


def test_every_tensor_is_what_numpy_says(fp16, tensors):
    parameters = fp16.document["parameters"]
    assert set(parameters) == set(tensors)
    total = sum((tensor**2).sum() for tensor in tensors.values())
    for name, tensor in tensors.items():
        entry = parameters[name]
        assert entry["shape"] == list(tensor.shape)
        assert entry["nonzero_elements"] == np.count_nonzero(tensor)
        assert entry["sparsity"] == pytest.approx((tensor == 0).mean(), abs=1e-12)
        assert entry["norm"] == pytest.approx(np.linalg.norm(tensor), rel=1e-12)
        assert entry["rms"] == pytest.approx(np.sqrt((tensor**2).mean()), rel=1e-12)
        assert entry["max_abs"] == np.abs(tensor).max()
        assert entry["squared_norm_share"] == pytest.approx((tensor**2).sum() / total, rel=1e-12)


def test_ranks_are_those_of_numpys_singular_values(fp16, tensors):
    for name, tensor in tensors.items():
        entry = fp16.document["parameters"][name]
        if tensor.ndim != 2:
            assert entry["stable_rank"] is None and entry["effective_rank"] is None
            continue
        values = np.linalg.svd(tensor, compute_uv=False)
        p = values[values > 0] / values.sum()
        assert entry["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)
        assert entry["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
        assert entry["ranks_exact"] is True


def test_each_way_of_grouping_holds_everything_once(fp16):
    summary = fp16.summary
    for by in GROUPS:
        groups = fp16.document[by].values()
        for key in ("tensors", "nonzero_tensors", "elements", "nonzero_elements"):
            assert sum(group[key] for group in groups) == summary[key]
        assert sum(group["squared_norm_share"] for group in groups) == pytest.approx(1, rel=1e-12)
        assert sum(group["norm"] ** 2 for group in groups) == pytest.approx(summary["norm"] ** 2)
        assert max(group["max_abs"] for group in groups) == summary["max_abs"]


def test_groups_are_where_the_names_say(fp16, tensors):
    document = fp16.document
    assert list(document["by_layer"]) == ["0", "1", breakdown.OUTSIDE]
    assert document["by_layer"][breakdown.OUTSIDE]["tensors"] == 3
    assert set(document["by_block"]) == {"attention", "mlp", "norm", "embedding"}
    assert document["by_module"]["attention.q_proj"]["tensors"] == 4  # weight and bias, 2 layers
    assert document["by_kind"]["bias"]["tensors"] == 17
    mlp = sum((tensor**2).sum() for name, tensor in tensors.items() if ".mlp." in name)
    assert document["by_block"]["mlp"]["norm"] == pytest.approx(np.sqrt(mlp), rel=1e-12)


def test_an_fp32_merge_lies_in_the_adapted_modules_alone(vectors, tmp_path):
    result = script.analyze(
        tmp_path / "out", task_vector_path=vectors / "task_vectors_fp32", device="cpu"
    )
    assert (result.summary["nonzero_tensors"], result.summary["tensors"]) == (8, 35)
    assert result.document["by_block"]["attention"]["squared_norm_share"] == 1
    assert result.document["by_block"]["mlp"]["norm"] == 0
    # r = 4: no matrix can have a stable rank above it, and rounding adds little to the other.
    for entry in result.document["parameters"].values():
        if entry["nonzero_elements"]:
            assert 1 <= entry["stable_rank"] <= 4.001
            assert 1 <= entry["effective_rank"] <= 4.01
        else:
            assert entry["stable_rank"] is None


def test_two_models_give_what_their_extracted_task_vector_gives(
    starcoder2, vectors, fp16, tmp_path
):
    formed = script.analyze(
        tmp_path / "out",
        base_model=str(starcoder2),
        finetuned_model=str(vectors / "merged_fp16"),
        device="cpu",
    )
    for by in GROUPS:
        assert formed.document[by] == fp16.document[by]
    assert formed.document["parameters"] == fp16.document["parameters"]


@pytest.mark.parametrize("shape", [(150, 180), (180, 150)])
def test_a_large_matrix_is_estimated_from_disk_closely(tmp_path, monkeypatch, shape):
    generator = np.random.default_rng(0)
    low_rank = generator.normal(size=(shape[0], 6)) @ generator.normal(size=(6, shape[1]))
    matrix = (low_rank + 0.02 * generator.normal(size=shape)).astype(np.float32)
    path = save(tmp_path / "t.safetensors", {"layers.0.mlp.w.weight": matrix})
    monkeypatch.setattr(breakdown, "DENSE_SIDE", 64)
    monkeypatch.setattr("taskvec.subject.BLOCK_ELEMENTS", 1 << 12)  # several blocks
    result = script.analyze(tmp_path / "out", task_vector_path=path, device="cpu")
    entry = result.document["parameters"]["layers.0.mlp.w.weight"]
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    p = values / values.sum()
    assert entry["ranks_exact"] is False
    assert entry["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)
    assert entry["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=0.05)


def test_layers_are_in_order_and_stacks_are_kept_apart(tmp_path):
    one = np.ones((2, 2))
    names = [
        "decoder.block.10.w.weight",
        "decoder.block.2.w.weight",
        "encoder.block.2.w.weight",
        "shared.weight",
    ]
    path = save(tmp_path / "t.safetensors", dict.fromkeys(names, one))
    document = script.analyze(tmp_path / "out", task_vector_path=path, device="cpu").document
    assert list(document["by_layer"]) == [
        "decoder.block.2",
        "decoder.block.10",
        "encoder.block.2",
        breakdown.OUTSIDE,
    ]
    assert document["by_layer"]["encoder.block.2"]["squared_norm_share"] == 0.25
    assert document["parameters"]["shared.weight"]["stable_rank"] == pytest.approx(1)


def test_values_worked_by_hand(tmp_path):
    path = save(
        tmp_path / "t.safetensors",
        {
            "layers.0.mlp.w.weight": np.diag([3.0, 4.0, 0.0]),
            "layers.0.norm.bias": np.array([0.0, 0.0, 5.0, np.inf]),
            "empty.weight": np.zeros((0, 4)),
            "scalar": np.array(0.0),
        },
    )
    document = script.analyze(tmp_path / "out", task_vector_path=path, device="cpu").document
    matrix, bias = (document["parameters"][f"layers.0.{n}"] for n in ("mlp.w.weight", "norm.bias"))
    assert (matrix["norm"], matrix["nonzero_elements"], matrix["sparsity"]) == (5, 2, 1 - 2 / 9)
    assert matrix["stable_rank"] == pytest.approx(25 / 16)
    p = np.array([4, 3]) / 7
    assert matrix["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert (bias["norm"], bias["max_abs"], bias["non_finite_elements"]) == (5, 5, 1)
    assert matrix["squared_norm_share"] == bias["squared_norm_share"] == 0.5
    assert document["summary"]["tensors"] == 4


def test_a_zero_task_vector_is_said_to_be_zero(starcoder2, tmp_path, capsys):
    argv = ["--base_model", str(starcoder2), "--finetuned_model", str(starcoder2)]
    assert script.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    assert "0 of 35 tensors and 0 of 16,032 elements" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        script.SHARES_FIGURE,
        script.TABLE,
        script.RESULT,
    ]


def test_the_command_writes_json_csv_and_figures(vectors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(vectors)
    assert script.main(["--output_dir", str(tmp_path / "out")]) == 0  # task_vectors_fp32/
    out = capsys.readouterr().out
    assert "8 of 35 tensors and 6,144 of 16,032 elements are not zero" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [script.RESULT, script.TABLE, script.SHARES_FIGURE, script.RANKS_FIGURE]
    )
    document = json.loads((tmp_path / "out" / script.RESULT).read_text())
    for file in (script.SHARES_FIGURE, script.RANKS_FIGURE):
        assert f"🖼️ {file}: {document['figures'][file]['caption']}" in out
    with (tmp_path / "out" / script.TABLE).open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(document["parameters"])
    for name, row in rows.items():
        entry = document["parameters"][name]
        assert float(row["norm"]) == entry["norm"]
        assert row["shape"] == "x".join(map(str, entry["shape"]))
        assert row["stable_rank"] == (str(entry["stable_rank"]) if entry["stable_rank"] else "")


def test_ranks_can_be_left_out(vectors, tmp_path):
    argv = ["--task_vector_path", str(vectors / "task_vectors_fp16"), "--no-ranks"]
    assert script.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out" / script.RESULT).read_text())
    assert document["summary"]["median_stable_rank"] is None
    assert not (tmp_path / "out" / script.RANKS_FIGURE).exists()
    assert list(document["figures"]) == [script.SHARES_FIGURE]


def test_the_figures_state_their_findings(fp16, tmp_path):
    from taskvec.figures import task_vector as figures

    shares = figures.shares(fp16.document, tmp_path / "shares.png")
    assert 0.9995 < fp16.document["by_block"]["attention"]["squared_norm_share"] < 1
    assert _title(shares).startswith(">99.9 % of the change is in attention")
    ranks = figures.ranks(fp16.document, tmp_path / "ranks.png")
    assert _title(ranks).startswith(
        f"Median stable rank {fp16.summary['median_stable_rank']:.3g} and effective rank"
    )


def _title(figure):
    return " ".join(figure.texts[0].get_text().split())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give either a task vector"),
        ({"finetuned_model": "x"}, "--finetuned_model needs --base_model"),
        ({"task_vector_path": "x", "finetuned_model": "y"}, "give either a task vector"),
        ({"task_vector_path": "x", "revision": "main"}, "--revision is that of the base"),
        ({"task_vector_path": "nowhere"}, "nowhere: no such task vector"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(options, text, tmp_path):
    with pytest.raises(UserError, match=text):
        script.analyze(tmp_path / "out", device="cpu", **options)
    assert not (tmp_path / "out").exists()


def test_the_missing_default_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "task_vectors_fp32" in error and "extract_task_vectors.py" in error


def test_the_model_that_is_read_is_never_overwritten(starcoder2, vectors):
    before = (vectors / "task_vectors_fp32" / "task_vector.safetensors").read_bytes()
    with pytest.raises(UserError):
        script.analyze(
            vectors / "task_vectors_fp32", task_vector_path=vectors / "task_vectors_fp32"
        )
    assert (vectors / "task_vectors_fp32" / "task_vector.safetensors").read_bytes() == before


def test_help_needs_no_torch():
    code = (
        "import sys, analyze_task_vector_structure as script\n"
        "script.build_parser().format_help()\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(script.__file__).parent)


def test_a_bf16_base_and_its_tuned_model_can_be_analysed(tiny, tmp_path):
    base, tuned = (tiny.base("gpt2", seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    result = script.analyze(
        tmp_path / "out", base_model=str(base), finetuned_model=str(tuned), device="cpu"
    )
    assert result.summary["nonzero_tensors"] == result.summary["tensors"]
    assert sum(g["squared_norm_share"] for g in result.document["by_layer"].values()) == (
        pytest.approx(1)
    )
