"""The script: whole models and adapters, against numpy on PEFT's merges; files, figures, errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import find_intruder_dimensions as script
from taskvec.cli import UserError
from tests.checks import names, weights
from tests.models import load, peft_merge

FILES = sorted(
    [
        "intruder_dimensions.csv",
        "intruder_dimensions.json",
        "intruder_counts.png",
        "intruders_by_layer.png",
        "similarity_diagonal.png",
        "similarity_matrices.png",
    ]
)
EPSILONS = (0.6, 0.8, 0.3)


@pytest.fixture
def no_figures(monkeypatch):
    """For tests that are not about figures, which take most of a small run's time."""
    from taskvec.figures import intruders

    for name in ("similarity", "places", "counts"):
        monkeypatch.setattr(intruders, name, lambda *_: None)


@pytest.fixture(scope="module")
def adapter(tiny, llama):
    """One that changes its weights a lot: r = 2, alpha = 4."""
    return tiny.adapter(llama, r=2, lora_alpha=4, scale=0.5)


@pytest.fixture(scope="module")
def merged(llama, adapter, tmp_path_factory):
    """PEFT's merge of the two."""
    directory = tmp_path_factory.mktemp("merged")
    peft_merge(llama, adapter, torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def found(tiny, llama, adapter, merged, tmp_path_factory):
    """Two adapters and a model in one run."""
    small = tiny.adapter(llama, scale=1e-5)
    out = tmp_path_factory.mktemp("found") / "out"
    return script.find_intruders(
        str(llama),
        out,
        lora_paths=[f"small={small}", f"large={adapter}"],
        finetuned_models=[f"merged={merged}"],
        top_k=6,
        epsilons=EPSILONS,
        leading=20,
        device="cpu",
    )


def expected(base, tuned, k):
    """Algorithm 1 by two dense SVDs in float64, by name, of the matrices that differ."""
    result = {}
    for name, weight in base.items():
        W, T = weight.double().numpy(), tuned[name].double().numpy()
        if W.ndim == 2 and "embed" not in name and not np.array_equal(W, T):
            U = np.linalg.svd(W, full_matrices=False)[0]
            Y = np.linalg.svd(T, full_matrices=False)[0]
            result[name] = np.abs(U.T @ Y[:, :k]).max(0)
    return result


def test_a_model_has_the_intruders_that_two_dense_svds_find(found, llama, merged):
    reference = expected(weights(llama), weights(merged), 20)
    entries = found.document["versions"]["merged"]["matrices"]
    assert {name for name, entry in entries.items() if entry["changed"]} == set(reference)
    for name, values in reference.items():
        np.testing.assert_allclose(entries[name]["max_similarity"], values, atol=1e-9)
        for epsilon in EPSILONS:
            verdict = [j + 1 for j in range(6) if values[j] < epsilon]
            assert entries[name]["intruders"][f"{epsilon:g}"] == verdict
    summary = found.summary["versions"]["merged"]
    for epsilon in EPSILONS:
        number = sum((values[:6] < epsilon).sum() for values in reference.values())
        assert summary["intruders"][f"{epsilon:g}"] == number
    assert summary["intruders"]["0.6"] > 0


def test_an_adapter_has_the_intruders_of_its_merged_model(found):
    adapter, merged = (
        found.document["versions"][label]["matrices"] for label in ("large", "merged")
    )
    for name, entry in adapter.items():
        assert entry["route"] == "low rank" and merged[name]["route"] == "dense"
        assert entry["intruders"] == merged[name]["intruders"]
        np.testing.assert_allclose(
            entry["singular_values"], merged[name]["singular_values"], rtol=1e-6
        )


def test_a_small_update_makes_none(found):
    assert found.summary["versions"]["small"]["intruders"] == {"0.6": 0, "0.8": 0, "0.3": 0}
    assert found.summary["versions"]["small"]["mean_max_similarity"] > 0.95


def test_places_and_totals_agree(found):
    document = found.document
    summary = found.summary["versions"]["large"]
    assert found.summary["matrices"] == summary["changed_matrices"] == 6
    assert summary["tested_vectors"] == 36
    assert sum(summary["intruders_by_layer"].values()) == summary["intruders"]["0.6"]
    tall = [m for m in document["matrices"].values() if m["shape"][0] > m["shape"][1]]
    assert found.summary["matrices_with_outputs_without_base"] == len(tall)
    for matrix in document["matrices"].values():
        out, into = matrix["shape"]
        assert matrix["outputs_without_base"] == max(0, out - into)


def test_the_files_hold_the_same(found):
    assert names(found.output_dir) == FILES
    stored = json.loads((found.output_dir / "intruder_dimensions.json").read_text())
    assert stored == found.document
    with (found.output_dir / "intruder_dimensions.csv").open() as file:
        lines = list(csv.DictReader(file))
    for label, version in stored["summary"]["versions"].items():
        mine = [line for line in lines if line["version"] == label]
        assert sum(line["intruder"] == "True" for line in mine) == version["intruders"]["0.6"]
        assert sum(line["tested"] == "True" for line in mine) == version["tested_vectors"]
    line = lines[0]
    entry = stored["versions"][line["version"]]["matrices"][line["matrix"]]
    assert float(line["max_similarity"]) == entry["max_similarity"][int(line["j"]) - 1]


def test_gpt2_is_read_as_out_by_in(no_figures, tiny, tmp_path):
    """Conv1D stores (in, out): the output directions are the right singular vectors of the file."""
    base = tiny.base("gpt2")
    lora = tiny.adapter(base, r=2, scale=0.5)
    merged = tmp_path / "merged"
    peft_merge(base, lora, torch.float32).save_pretrained(merged)
    result = script.find_intruders(
        str(base),
        tmp_path / "out",
        lora_paths=[f"lora={lora}"],
        finetuned_models=[f"model={merged}"],
        device="cpu",
    )
    theirs = weights(merged)
    for name, weight in weights(base).items():
        entry = result.document["matrices"].get(name)
        if entry is None:
            continue
        W, T = weight.double().numpy().T, theirs[name].double().numpy().T
        assert entry["shape"] == list(W.shape) and entry["stored_transposed"]
        U, Y = (np.linalg.svd(matrix, full_matrices=False)[0] for matrix in (W, T))
        for label in ("lora", "model"):
            values = result.document["versions"][label]["matrices"][name]["max_similarity"]
            # The merge rounded the adapter's sum to fp32, which turns close vectors a little.
            exact = 1e-9 if label == "model" else 1e-4
            np.testing.assert_allclose(values, np.abs(U.T @ Y[:, :40]).max(0), atol=exact)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "model"])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_the_scaled_model_is_the_formula_and_loads(
    no_figures, tiny, tmp_path, family, kind, factor
):
    """W_0 + delta + (lambda - 1) sum of u sigma v^T over the intruders, by numpy."""
    base = tiny.base(family)
    lora = tiny.adapter(base, r=2, lora_alpha=4, scale=0.5)
    merged = tmp_path / "merged"
    peft_merge(base, lora, torch.float32).save_pretrained(merged)
    result = script.find_intruders(
        str(base),
        tmp_path / "out",
        lora_paths=[str(lora)] if kind == "lora" else [],
        finetuned_models=[str(merged)] if kind == "model" else [],
        epsilons=(0.7,),
        device="cpu",
        scale_intruders=factor,
        scaled_model_dir=tmp_path / "scaled",
    )
    scaled, tuned, stored = weights(tmp_path / "scaled"), weights(merged), weights(base)
    assert set(scaled) == set(stored)
    count = 0
    for name in scaled:
        T = tuned[name].double().numpy()
        entry = result.document["matrices"].get(name)
        if entry is not None:
            flip = entry["stored_transposed"]
            W = stored[name].double().numpy()
            U = np.linalg.svd(W.T if flip else W, full_matrices=False)[0]
            Y, S, Vt = np.linalg.svd(T.T if flip else T, full_matrices=False)
            chosen = [j for j in range(10) if np.abs(U.T @ Y[:, j]).max() < 0.7]
            count += len(chosen)
            part = (factor - 1) * (Y[:, chosen] * S[chosen]) @ Vt[chosen]
            T = T + (part.T if flip else part)
        np.testing.assert_allclose(scaled[name].double().numpy(), T, atol=2e-6)
    assert (
        count
        == result.summary["versions"][next(iter(result.summary["versions"]))]["intruders"]["0.7"]
    )
    assert count > 0
    model = load(tmp_path / "scaled")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_the_scaled_model_can_be_replaced_but_nothing_else(no_figures, llama, adapter, tmp_path):
    run = {"lora_paths": [str(adapter)], "device": "cpu", "scaled_model_dir": tmp_path / "scaled"}
    for factor in (0.0, 0.5):
        script.find_intruders(str(llama), tmp_path / "out", scale_intruders=factor, **run)
    manifest = json.loads((tmp_path / "scaled" / "scaling_manifest.json").read_text())
    assert manifest["scale"] == 0.5
    (tmp_path / "scaled" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an output of this script"):
        script.find_intruders(str(llama), tmp_path / "out", scale_intruders=1.0, **run)


def test_the_last_line_and_the_table(no_figures, llama, adapter, llama_lora, tmp_path, capsys):
    flags = ["--base_model", str(llama), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert script.main([*flags, "--lora_path", str(adapter), "--epsilon", "0.6", "0.5"]) == 0
    result = json.loads((tmp_path / "out" / "intruder_dimensions.json").read_text())
    number = result["summary"]["versions"][adapter.name]["intruders"]["0.6"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"🔎 {number} intruder dimensions in 6 matrices (top 10, ε = 0.6)"
    two = ["--lora_path", f"a={adapter}", "--lora_path", f"b={llama_lora}", "--quiet"]
    assert script.main([*flags, *two, "--modules", "q_proj", "--top_k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["🔎 a", "🔎 b"]
    assert all(line.endswith("in 2 matrices (top 3, ε = 0.5)") for line in lines)


def test_values_of_a_config_file_do_not_join_those_of_the_command_line(
    no_figures, llama, adapter, llama_lora, tmp_path, capsys
):
    config = tmp_path / "config.yml"
    config.write_text(
        f"base_model: {llama}\nlora_path: [one={adapter}, two={llama_lora}]\n"
        f"output_dir: {tmp_path / 'out'}\ndevice: cpu\nepsilon: [0.9]\n"
    )
    flags = ["--config", str(config), "--quiet"]
    assert script.main(flags) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert script.main([*flags, "--lora_path", f"three={adapter}"]) == 0
    assert "ε = 0.9" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "intruder_dimensions.json").read_text())
    assert list(result["versions"]) == ["three"]


def test_the_bases_svds_are_kept_where_told(no_figures, llama, adapter, tmp_path, capsys):
    cache = tmp_path / "cache"
    flags = ["--base_model", str(llama), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    flags += ["--lora_path", str(adapter), "--cache_dir"]
    assert script.main([*flags, str(cache)]) == 0
    first = (tmp_path / "out" / "intruder_dimensions.json").read_text()
    assert len(names(cache)) == 6 and str(cache) in capsys.readouterr().err
    assert script.main([*flags, str(cache)]) == 0
    assert (tmp_path / "out" / "intruder_dimensions.json").read_text() == first
    assert script.main([*flags, "none"]) == 0
    assert (tmp_path / "out" / "intruder_dimensions.json").read_text() == first
    assert not Path("none").exists()


def refused(llama, tmp_path, *flags):
    base = ["--base_model", str(llama), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    return script.main([*base, *flags])


def test_what_cannot_be_answered_is_refused(llama, llama_lora, adapter, tiny, tmp_path, capsys):
    lora = str(llama_lora)
    other = str(tiny.base("starcoder2"))
    cases = {
        (): "give what was fine-tuned",
        ("--lora_path", lora, "--modules", "q_pro"): "did you mean 'q_proj'",
        ("--lora_path", lora, "--modules", "o_proj"): "no version changes any of these",
        ("--finetuned_model", str(llama)): "no linear layer differs",
        ("--finetuned_model", other): "",
        ("--lora_path", lora, lora): "two models are called",
        ("--lora_path", lora, str(adapter), "--scale_intruders", "0"): "give one version",
        ("--lora_path", f"={lora}"): "PATH or LABEL=PATH",
        ("--lora_path", lora, "--epsilon", "1.5"): "between 0 and 1",
        ("--lora_path", lora, "--top_k", "0"): "0: give a whole number, 1 or more",
        ("--lora_path", lora, "--scale_intruders", "nan"): "nan is not a finite number",
        ("--lora_path", lora, "--output_dir", str(llama)): "input",
    }
    for flags, message in cases.items():
        assert refused(llama, tmp_path, *flags) == 2, flags
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and "Traceback" not in error, flags
    assert names(tmp_path) == []


def test_not_a_number_has_no_singular_vectors(no_figures, llama, merged, copied, tmp_path, capsys):
    broken = copied(merged)
    file = broken / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    assert refused(llama, tmp_path, "--finetuned_model", str(broken)) == 2
    assert "layers.1.self_attn.q_proj.weight: holds NaN" in capsys.readouterr().err


def test_help_is_quick_and_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, find_intruder_dimensions as s; s.build_parser(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_same_verdicts(no_figures, found, llama, adapter, merged, tmp_path):
    result = script.find_intruders(
        str(llama),
        tmp_path / "out",
        lora_paths=[f"small={found.document['inputs']['small']}", f"large={adapter}"],
        finetuned_models=[f"merged={merged}"],
        top_k=6,
        epsilons=EPSILONS,
        leading=20,
        cache_dir="none",
        device="cuda:0",
    )
    for label, version in found.document["versions"].items():
        for name, entry in version["matrices"].items():
            theirs = result.document["versions"][label]["matrices"][name]
            assert theirs["intruders"] == entry["intruders"]


def test_dora_takes_the_dense_route_and_its_merged_model_says_the_same(
    no_figures, tiny, llama, tmp_path
):
    lora = tiny.adapter(llama, r=2, scale=0.5, use_dora=True)
    merged = tmp_path / "merged"
    peft_merge(llama, lora, torch.float32).save_pretrained(merged)
    result = script.find_intruders(
        str(llama),
        tmp_path / "out",
        lora_paths=[f"lora={lora}"],
        finetuned_models=[f"model={merged}"],
        epsilons=(0.7,),
        device="cpu",
    )
    versions = result.document["versions"]
    assert versions["lora"]["matrices"].keys() == versions["model"]["matrices"].keys()
    for name, entry in versions["lora"]["matrices"].items():
        theirs = versions["model"]["matrices"][name]
        assert entry["route"] == "dense" and entry["intruders"] == theirs["intruders"]
        np.testing.assert_allclose(entry["singular_values"], theirs["singular_values"], atol=1e-6)


def test_what_else_an_adapter_changes_is_said(no_figures, tiny, llama, tmp_path, capsys):
    lora = tiny.adapter(llama, target_modules=["q_proj", "embed_tokens"])
    script.find_intruders(str(llama), tmp_path / "out", lora_paths=[str(lora)], device="cpu")
    assert "also changes model.embed_tokens.weight: no linear layer" in capsys.readouterr().err


# Figures


def texts(figure):
    return (
        " ".join(text.get_text() for text in figure.texts).replace("\n", " ").replace("\xa0", " ")
    )


def test_the_figures_say_what_the_document_says(found, tmp_path):
    from taskvec.figures import intruders as figures

    content = found.document
    total = sum(v["intruders"]["0.6"] for v in content["summary"]["versions"].values())
    figure = figures.places(content, tmp_path / "places.png")
    assert f"{total} intruder dimensions in 6 matrices of 3 versions" in texts(figure)
    figure = figures.counts(content, tmp_path / "counts.png")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    for label, version in content["summary"]["versions"].items():
        at = list(lines[label].get_xdata()).index(pytest.approx(0.6))
        assert lines[label].get_ydata()[at] == version["intruders"]["0.6"]
    figure = figures.similarity(content, 6, tmp_path / "similarity.png")
    panels = [ax for ax in figure.axes if ax.get_images()]
    assert [ax.get_title(loc="left") for ax in panels] == ["small", "large", "merged"]
    picture = content["picture"]
    drawn = panels[1].get_images()[0].get_array()
    np.testing.assert_allclose(drawn, np.array(picture["similarity"]["large"])[:6, :6])
    marks = panels[1].get_lines()[0].get_xdata()
    entry = content["versions"]["large"]["matrices"][picture["matrix"]]
    assert list(marks) == entry["intruders"]["0.6"] and len(marks) > 0


def test_many_versions_and_no_intruders_can_be_drawn(found, tmp_path):
    import copy

    from taskvec.figures import intruders as figures

    content = copy.deepcopy(found.document)
    small = content["versions"]["small"]
    labels = [f"a rather long name of version number {number}" for number in range(14)]
    content["versions"] = dict.fromkeys(labels, small)
    content["summary"]["versions"] = dict.fromkeys(labels, found.summary["versions"]["small"])
    content["picture"]["similarity"] = dict.fromkeys(
        labels, content["picture"]["similarity"]["small"]
    )
    figure = figures.similarity(content, 20, tmp_path / "similarity.png")
    assert "8 of 14 versions are shown" in texts(figure) and "is not shifted" in texts(figure)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_images()]
    assert len(titles) == 8
    figure = figures.similarity(content, 6, tmp_path / "similarity.png")
    assert "every leading direction resembles one of the base's" in texts(figure)
    assert "No intruder dimension in 6 matrices" in texts(
        figures.places(content, tmp_path / "places.png")
    )
    assert "All versions have 0 intruders" in texts(
        figures.counts(content, tmp_path / "counts.png")
    )
