"""Which parameters changed and why, and the elements that changed most, against numpy."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import investigate_parameter_changes as script
from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec import changes, subject
from taskvec.cli import UserError

ADAPTED, TOTAL = 8, 35


@pytest.fixture(scope="module")
def starcoder2(tiny):
    return tiny.base("starcoder2")


@pytest.fixture(scope="module")
def lora(tiny, starcoder2):
    return tiny.adapter(starcoder2, scale=0.005)


@pytest.fixture(scope="module")
def vectors(starcoder2, lora, tmp_path_factory):
    """Task vectors, merged models and comparisons of an fp32 and an fp16 merge."""
    folder = tmp_path_factory.mktemp("vectors")
    for name in ("fp32", "fp16"):
        merged, vector = folder / f"merged_{name}", folder / f"task_vectors_{name}"
        merge(str(starcoder2), str(lora), merged, precision=name, device="cpu")
        extract(str(starcoder2), str(merged), vector, device="cpu")
        compare(
            str(starcoder2),
            str(lora),
            folder / f"comparison_{name}",
            task_vector_path=vector,
            device="cpu",
            generate_plots=False,
            detailed_report=False,
        )
    return folder


def investigate(vectors, name, out, **options):
    return script.investigate(
        out, task_vector_path=vectors / f"task_vectors_{name}", device="cpu", **options
    )


def counts(result):
    return {kind: total["parameters"] for kind, total in result.summary["attribution"].items()}


def save(path, tensors):
    save_file({k: np.asarray(v, dtype=np.float32) for k, v in tensors.items()}, path)
    return path


def top_by_numpy(tensors, count):
    """(name, index, value) of the largest magnitudes, stable in name and element order."""
    found = []
    for name, tensor in tensors.items():
        finite = np.where(np.isfinite(tensor), tensor, 0)
        found += [(name, np.unravel_index(i, tensor.shape), v) for i, v in enumerate(finite.flat)]
    found.sort(key=lambda item: -abs(item[2]))
    return [(n, [int(i) for i in index], float(v)) for n, index, v in found[:count] if v]


def top_of(result):
    return [(e["parameter"], e["index"], e["change"]) for e in result.document["largest_changes"]]


def test_with_the_adapter_every_change_of_an_fp16_merge_has_its_reason(
    starcoder2, lora, vectors, tmp_path
):
    result = investigate(
        vectors, "fp16", tmp_path / "out", base_model=str(starcoder2), lora_path=str(lora)
    )
    assert counts(result) == {
        "lora": ADAPTED,
        "cast": TOTAL - ADAPTED,
        "unchanged": 0,
        "unexplained": 0,
    }
    for name, entry in result.document["parameters"].items():
        adapted = "_proj.weight" in name and "self_attn" in name
        assert entry["attribution"] == ("lora" if adapted else "cast")
        assert entry["cast_format"] == (None if adapted else "fp16")
    shares = [t["squared_norm_share"] for t in result.summary["attribution"].values()]
    assert sum(shares) == pytest.approx(1, rel=1e-12)


def test_an_fp32_merge_changes_the_adapters_parameters_alone(starcoder2, lora, vectors, tmp_path):
    result = investigate(
        vectors, "fp32", tmp_path / "out", base_model=str(starcoder2), lora_path=str(lora)
    )
    assert (counts(result)["lora"], counts(result)["unchanged"]) == (ADAPTED, TOTAL - ADAPTED)
    assert result.summary["changed_parameters"] == ADAPTED


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_comparison_gives_the_reasons_that_its_inputs_give(
    starcoder2, lora, vectors, tmp_path, name
):
    computed = investigate(
        vectors, name, tmp_path / "computed", base_model=str(starcoder2), lora_path=str(lora)
    )
    adopted = investigate(
        vectors,
        name,
        tmp_path / "adopted",
        comparison=vectors / f"comparison_{name}" / "comparison_results.json",
    )
    for kind, total in computed.summary["attribution"].items():
        assert adopted.summary["attribution"][kind] == pytest.approx(total, rel=1e-12)
    assert top_of(adopted) == top_of(computed)
    for key, entry in computed.document["parameters"].items():
        other = adopted.document["parameters"][key]
        for field in ("attribution", "cast_format", "relative_error", "nonzero_elements"):
            assert other[field] == entry[field]


def test_the_base_alone_tells_casts_from_changes(starcoder2, vectors, tmp_path):
    result = investigate(vectors, "fp16", tmp_path / "out", base_model=str(starcoder2))
    assert (counts(result)["cast"], counts(result)["unexplained"]) == (TOTAL - ADAPTED, ADAPTED)


def test_the_task_vector_alone_gives_no_reasons(vectors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(vectors / "task_vectors_fp16")
    assert script.main(["--task_vector_path", path]) == 0
    out = capsys.readouterr().out
    assert "35 of 35 parameters" in out
    assert "Why is not known from the task vector alone" in out
    document = json.loads((tmp_path / "parameter_changes" / script.RESULT).read_text())
    assert {entry["attribution"] for entry in document["parameters"].values()} == {None}
    assert document["summary"]["attribution"] == {}


def test_a_changed_element_makes_its_parameter_unexplained(starcoder2, lora, vectors, tmp_path):
    tensors = dict(load_file(vectors / "task_vectors_fp32" / "task_vector.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][3] = 1e-6
    path = save(tmp_path / "t.safetensors", tensors)
    result = script.investigate(
        tmp_path / "out",
        task_vector_path=path,
        base_model=str(starcoder2),
        lora_path=str(lora),
        device="cpu",
    )
    assert result.document["parameters"]["model.norm.weight"]["attribution"] == "unexplained"
    assert counts(result)["unexplained"] == 1


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("block", [64, 1 << 19])
def test_the_largest_elements_are_numpys(vectors, tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(subject, "BLOCK_ELEMENTS", block)
    result = investigate(vectors, name, tmp_path / "out", top_k=100)
    tensors = load_file(vectors / f"task_vectors_{name}" / "task_vector.safetensors")
    ordered = {key: tensors[key] for key in result.document["parameters"]}
    assert top_of(result) == top_by_numpy(ordered, 100)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.sampled_from([(), (5,), (4, 3), (2, 3, 2), (0, 3), (1, 7)]), min_size=1, max_size=4
    ),
    seed=st.integers(0, 1000),
    count=st.integers(1, 20),
    block=st.sampled_from([1, 4, 1000]),
)
def test_ties_zeros_and_odd_shapes_come_out_in_order(tmp_path_factory, shapes, seed, count, block):
    generator = np.random.default_rng(seed)
    values = np.array([0, 0, 1, -1, 2, -2, np.nan, np.inf], dtype=np.float32)
    tensors = {f"p{i}": generator.choice(values, size=shape) for i, shape in enumerate(shapes)}
    path = save(tmp_path_factory.mktemp("ties") / "t.safetensors", tensors)
    with pytest.MonkeyPatch.context() as patch, subject.open_subject(path) as opened:
        patch.setattr(subject, "BLOCK_ELEMENTS", block)
        ordered = {name: load_file(path)[name] for name in opened.tensors}
        cpu = torch.device("cpu")
        maxima = {name: opened.measure(name, cpu).max_abs for name in opened.tensors}
        found = changes.largest_changes(opened, maxima, count, cpu)
    assert [(c.parameter, list(c.index), c.value) for c in found] == top_by_numpy(ordered, count)


def test_only_parameters_that_can_hold_one_of_the_largest_are_read_again(tmp_path, monkeypatch):
    path = save(
        tmp_path / "t.safetensors",
        {"a": np.full((4, 4), 0.5), "b": np.arange(16.0).reshape(4, 4), "c": np.ones(9)},
    )
    with subject.open_subject(path) as opened:
        read, blocks = [], subject.Subject.blocks

        def watched(self, name, device):
            read.append(name)
            return blocks(self, name, device)

        monkeypatch.setattr(subject.Subject, "blocks", watched)
        maxima = {"a": 0.5, "b": 15.0, "c": 1.0}
        found = changes.largest_changes(opened, maxima, 3, torch.device("cpu"))
    assert [change.value for change in found] == [15, 14, 13]
    assert read == ["b"]


def test_the_largest_elements_show_base_and_adapter(starcoder2, lora, vectors, tmp_path):
    result = investigate(
        vectors, "fp16", tmp_path / "out", base_model=str(starcoder2), lora_path=str(lora), top_k=5
    )
    weights = load_file(starcoder2 / "model.safetensors")
    factors = load_file(lora / "adapter_model.safetensors")
    for entry in result.document["largest_changes"]:
        name, index = entry["parameter"], tuple(entry["index"])
        module = f"base_model.model.{name.removesuffix('.weight')}"
        A, B = (factors[f"{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        assert entry["base"] == weights[name][index]
        assert entry["adapter_delta"] == pytest.approx(2 * (B @ A)[index], rel=1e-12)
        assert entry["relative"] == pytest.approx(abs(entry["change"] / entry["base"]))
        assert entry["attribution"] == "lora"


def test_two_models_are_as_good_as_their_task_vector(starcoder2, lora, vectors, tmp_path):
    formed = script.investigate(
        tmp_path / "formed",
        finetuned_model=str(vectors / "merged_fp16"),
        base_model=str(starcoder2),
        lora_path=str(lora),
        device="cpu",
    )
    stored = investigate(
        vectors, "fp16", tmp_path / "stored", base_model=str(starcoder2), lora_path=str(lora)
    )
    assert formed.summary == stored.summary
    assert top_of(formed) == top_of(stored)


def test_without_arguments_it_takes_the_comparison_that_is_there(vectors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task_vectors_fp32").symlink_to(vectors / "task_vectors_fp32")
    (tmp_path / "comparison_results").symlink_to(vectors / "comparison_fp32")
    assert script.main([]) == 0
    document = json.loads((tmp_path / "parameter_changes" / script.RESULT).read_text())
    assert document["inputs"]["comparison"] == script.DEFAULT_COMPARISON
    assert document["summary"]["attribution"]["lora"]["parameters"] == ADAPTED
    assert sorted(path.name for path in (tmp_path / "parameter_changes").iterdir()) == sorted(
        [script.RESULT, script.TABLE, script.LARGEST_TABLE, script.FIGURE]
    )


def test_a_comparison_of_another_task_vector_is_left_out_or_refused(
    vectors, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "comparison_results").symlink_to(vectors / "comparison_fp32")
    path = str(vectors / "task_vectors_fp16")
    assert script.main(["--task_vector_path", path]) == 0
    captured = capsys.readouterr()
    assert "Not used: comparison_results/comparison_results.json: is about another" in captured.err
    assert "Why is not known" in captured.out
    argv = ["--task_vector_path", path, "--comparison", script.DEFAULT_COMPARISON]
    assert script.main([*argv, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is about another task vector" in error


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"parameters": {"x": 1}}'])
def test_a_file_that_is_no_comparison_is_refused(vectors, tmp_path, text):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"c\.json"):
        investigate(vectors, "fp32", tmp_path / "out", comparison=file)
    assert not (tmp_path / "out").exists()


def test_the_csv_sorts_to_what_the_json_holds(starcoder2, lora, vectors, tmp_path):
    result = investigate(
        vectors, "fp16", tmp_path / "out", base_model=str(starcoder2), lora_path=str(lora)
    )
    with (tmp_path / "out" / script.TABLE).open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["max_abs"]))
    parameters = result.document["parameters"]
    assert [row["name"] for row in rows] == sorted(
        parameters, key=lambda name: -parameters[name]["max_abs"]
    )
    assert rows[0]["attribution"] == "lora"
    with (tmp_path / "out" / script.LARGEST_TABLE).open(newline="") as file:
        largest = list(csv.DictReader(file))
    assert [row["index"] for row in largest] == [
        ", ".join(map(str, entry["index"])) for entry in result.document["largest_changes"]
    ]


def test_nothing_changed_is_said_plainly(starcoder2, tmp_path, capsys):
    argv = ["--base_model", str(starcoder2), "--finetuned_model", str(starcoder2)]
    assert script.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    assert "0 of 35 parameters and 0 of 16,032 elements changed" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        script.TABLE,
        script.RESULT,
    ]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--lora_path", "x"], "--lora_path needs --base_model"),
        (
            ["--lora_path", "x", "--base_model", "y", "--comparison", "z"],
            "either --comparison or --lora_path",
        ),
        (["--top_k", "0"], "give a whole number, from 1"),
        (["--finetuned_model", "x"], "--finetuned_model needs --base_model"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(argv, text, capsys):
    assert script.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and text in error


def test_values_come_from_yaml_too(vectors, tmp_path):
    config = tmp_path / "run.yml"
    config.write_text(
        f"task_vector_path: {vectors / 'task_vectors_fp32'}\ntop_k: 3\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    assert script.main(["--config", str(config)]) == 0
    document = json.loads((tmp_path / "out" / script.RESULT).read_text())
    assert len(document["largest_changes"]) == 3


def test_the_figure_counts_each_reason(starcoder2, lora, vectors, tmp_path):
    from taskvec.figures.task_vector import change_norms

    document = investigate(
        vectors, "fp16", tmp_path / "out", base_model=str(starcoder2), lora_path=str(lora)
    ).document
    figure = change_norms(document, tmp_path / "figure.png")
    assert figure.texts[0].get_text().startswith("35 of 35 parameters changed")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["the adapter (8)", "rounding the base (27)"]


def test_help_needs_no_torch():
    code = (
        "import sys, investigate_parameter_changes as script\n"
        "script.build_parser().format_help()\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(script.__file__).parent)
