"""analyze_task_vectors.py: what its commands write, against numpy, PEFT and transformers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import analyze_task_vectors
import extract_task_vectors
from analyze_task_vectors import main
from taskvec import cli
from taskvec.arithmetic import several
from taskvec.cli import UserError
from taskvec.tensorfile import TensorFile
from tests.checks import assert_same_bits, edit_tensors, names, weights
from tests.models import load, make_adapter, peft_merge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VECTOR = "task_vector.safetensors"


@pytest.fixture(scope="module")
def tuned(llama, llama_lora, tmp_path_factory) -> Path:
    """The Llama with its LoRA merged by PEFT, fp32."""
    directory: Path = tmp_path_factory.mktemp("tuned") / "model"
    peft_merge(llama, llama_lora, torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def vectors(llama, tuned, tmp_path_factory) -> list[Path]:
    """Three task vectors of the Llama, of different LoRAs on different modules."""
    directory = tmp_path_factory.mktemp("vectors")
    found = []
    for seed, targets in enumerate((["q_proj"], ["q_proj", "down_proj"], ["v_proj", "q_proj"])):
        adapter = make_adapter(directory / f"l{seed}", llama, seed=seed, target_modules=targets)
        merged = directory / f"m{seed}"
        peft_merge(llama, adapter, torch.float32).save_pretrained(merged)
        vector = directory / f"v{seed}"
        extract_task_vectors.extract(str(llama), str(merged), vector, device="cpu")
        found.append(vector)
    return found


def extract(base: Path, merged: Path, output: Path, **options) -> Path:
    extract_task_vectors.extract(str(base), str(merged), output, device="cpu", **options)
    return output


def run(*words: object) -> int:
    return main([*map(str, words), "--device", "cpu"])


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {n: t.numpy().astype(np.float64) for n, t in load_file(directory / VECTOR).items()}


# -- applying ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "starcoder2"])
def test_scale_one_gives_the_merged_model_back_bit_for_bit(tiny, tmp_path, family, precision):
    base = tiny.base(family)
    merged = peft_merge(base, tiny.adapter(base), DTYPES[precision])
    merged.save_pretrained(tmp_path / "merged")
    vector = extract(base, tmp_path / "merged", tmp_path / "vector")
    made = analyze_task_vectors.apply(
        str(base),
        vector,
        tmp_path / "again",
        precision=precision,
        finetuned_model=str(tmp_path / "merged"),
        device="cpu",
    )
    assert_same_bits(weights(tmp_path / "merged"), weights(tmp_path / "again"))
    assert made.holds and made.round_trip is not None
    assert made.round_trip["differing"] == made.round_trip["unexplained"] == 0
    again = load(tmp_path / "again", DTYPES[precision]).state_dict()
    assert_same_bits(merged.state_dict(), again)


def test_what_cannot_come_back_is_counted_and_explained(llama, tmp_path, capsys):
    """Weights that shrink to less than the last digit of their change."""

    def shrink(tensors):
        weight = tensors["model.layers.0.self_attn.q_proj.weight"]
        weight[:4] = weight[:4] * 1e-9 * 1.2345678

    merged = tmp_path / "merged"
    shutil.copytree(llama, merged)
    edit_tensors(merged / "model.safetensors", shrink)
    vector = extract(llama, merged, tmp_path / "vector")
    words = ["apply", "--base_model", llama, "--task_vector", vector]
    output = tmp_path / "again"
    assert run(*words, "--finetuned_model", merged, "--output_dir", output) == 0
    text = capsys.readouterr().out
    found = json.loads((output / "apply_manifest.json").read_text())["round_trip"]
    wanted, back = weights(merged), weights(output)
    differing = sum(int((wanted[name] != back[name]).sum()) for name in wanted)
    assert 100 < differing <= 4 * 32
    assert found["differing"] == differing and found["unexplained"] == 0
    assert f"{differing} differ because the task vector was rounded" in text
    assert run(*words, "--output_dir", output) == 0
    assert "--finetuned_model counts those that differ" in capsys.readouterr().out


def test_a_task_vector_of_other_models_does_not_hold(llama, tuned, vectors, tmp_path, capsys):
    output = tmp_path / "model"
    words = ["apply", "--base_model", llama, "--task_vector", vectors[1], "--output_dir", output]
    assert run(*words, "--finetuned_model", tuned) == 1
    assert "not the difference of these two models" in capsys.readouterr().out


@pytest.mark.parametrize("precision", DTYPES)
def test_a_grid_is_base_plus_scale_times_task_vector(llama, vectors, tmp_path, precision):
    scales = (0.2, -1.0, 1.7)
    made = analyze_task_vectors.apply(
        str(llama), vectors[1], tmp_path / "grid", scales=scales, precision=precision, device="cpu"
    )
    assert names(tmp_path / "grid") == [
        "apply_manifest.json", "scale_-1.0", "scale_0.2", "scale_1.7",
    ]  # fmt: skip
    base, vector = weights(llama), tensors_of(vectors[1])
    for scale in scales:
        model = load(made.models[scale], DTYPES[precision]).state_dict()
        for name, weight in base.items():
            exact = weight.numpy().astype(np.float64) + scale * vector[name]
            if precision == "fp32":
                assert np.array_equal(model[name].numpy(), exact.astype(np.float32)), name
            elif precision == "fp16":  # numpy rounds float64 to fp16 once
                assert np.array_equal(model[name].numpy(), exact.astype(np.float16)), name
            else:
                error = np.abs(model[name].double().numpy() - exact)
                assert (error <= np.abs(exact) * 2.0**-8).all(), name


def test_a_grid_reads_its_inputs_once(llama, vectors, tmp_path, monkeypatch):
    read = TensorFile.read
    counts: list[int] = []

    def counted(self, info, start=0, stop=None):
        counts[-1] += 1
        return read(self, info, start, stop)

    monkeypatch.setattr(TensorFile, "read", counted)
    for scales in ((1.0,), (0.5, 1.0, 1.5, 2.0)):
        counts.append(0)
        output = tmp_path / str(len(scales))
        analyze_task_vectors.apply(str(llama), vectors[0], output, scales=scales, device="cpu")
    assert counts[0] == counts[1] > 0


def test_shards_stay_those_of_the_base(tiny, vectors, tmp_path):
    base = tiny.base("llama", max_shard_size="40KB")
    made = analyze_task_vectors.apply(
        str(base), vectors[0], tmp_path / "grid", scales=(0.5, 2.0), device="cpu"
    )
    files = [name for name in names(base) if name.startswith("model")]
    assert len(files) > 2
    for directory in made.models.values():
        assert [name for name in names(directory) if name.startswith("model")] == files
        load(directory)


def test_a_base_that_was_rounded_before_is_rounded_again(llama, tmp_path, capsys):
    """A task vector of R(W) gives back M only when it is added to R(W)."""
    adapter = make_adapter(tmp_path / "adapter", llama)
    peft_merge(llama, adapter, torch.float16).save_pretrained(tmp_path / "merged")
    vector = extract(llama, tmp_path / "merged", tmp_path / "vector", base_precision="fp16")
    output = tmp_path / "again"
    analyze_task_vectors.apply(str(llama), vector, output, precision="fp16", device="cpu")
    assert_same_bits(weights(tmp_path / "merged"), weights(output))
    assert "rounded to fp16 when this task vector was extracted" in capsys.readouterr().err


def test_outputs_are_replaced_but_nothing_else_is(llama, vectors, tmp_path):
    output = tmp_path / "model"
    for scales in ((1.0,), (0.5, 2.0), (3.0,)):
        analyze_task_vectors.apply(str(llama), vectors[0], output, scales=scales, device="cpu")
    assert not any(name.startswith("scale_") for name in names(output))
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an output of this script"):
        analyze_task_vectors.apply(str(llama), vectors[0], output, device="cpu")
    assert (output / "notes.txt").read_text() == "mine"


def test_files_of_others_within_a_grid_are_kept(llama, vectors, tmp_path):
    def apply():
        return analyze_task_vectors.apply(
            str(llama), vectors[0], tmp_path / "grid", scales=(0.5, 2.0), device="cpu"
        )

    made = apply()
    notes = made.models[0.5] / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UserError, match="not an output of this script"):
        apply()
    assert notes.read_text() == "mine"


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (["nan"], "give finite numbers"),
        (["1", "1.0"], "given twice"),
        (["1e30"], "values overflow fp16"),
    ],
)
def test_scales_that_make_no_sense_are_refused(llama, vectors, tmp_path, capsys, scale, message):
    output = tmp_path / "model"
    words = ["apply", "--base_model", llama, "--task_vector", vectors[0], "--output_dir", output]
    assert run(*words, "--precision", "fp16", "--scale", *scale) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_another_models_task_vector_is_refused(tiny, vectors, tmp_path):
    with pytest.raises(UserError, match=r"has not got|has no .*, which|but .* in"):
        analyze_task_vectors.apply(
            str(tiny.base("gpt2")), vectors[0], tmp_path / "model", device="cpu"
        )
    assert names(tmp_path) == []


# -- putting together ------------------------------------------------------------------


def combined(output: Path, *words: object) -> dict[str, np.ndarray]:
    assert run(*words, "--output_dir", output) == 0
    return tensors_of(output)


def test_sums_multiples_and_analogies_are_numpys(vectors, tmp_path):
    a, b, c = map(tensors_of, vectors)
    made = {
        "add": combined(tmp_path / "add", "add", *vectors),
        "weighted": combined(tmp_path / "w", "add", *vectors, "--weights", 0.5, -2, 0.1),
        "negate": combined(tmp_path / "n", "negate", vectors[0]),
        "scale": combined(tmp_path / "s", "scale", vectors[0], "--factor", 0.3),
        "analogy": combined(tmp_path / "y", "analogy", *vectors),
    }
    for name in a:
        expected = {
            "add": a[name] + b[name] + c[name],
            "weighted": 0.5 * a[name] - 2 * b[name] + 0.1 * c[name],
            "negate": -a[name],
            "scale": 0.3 * a[name],
            "analogy": a[name] + b[name] - c[name],
        }
        for key, value in expected.items():
            assert np.allclose(made[key][name], value.astype(np.float32), rtol=1e-7, atol=0), key


def test_the_output_is_a_task_vector_like_any_other(llama, vectors, tmp_path, capsys):
    """Holes where it is zero, a summary, what was done in its header; the other scripts read it."""
    combined(tmp_path / "sum", "add", vectors[0], vectors[1])
    assert "📊 4 of 21 parameters are not zero" in capsys.readouterr().out
    assert names(tmp_path / "sum") == ["task_vector.safetensors", "task_vector_summary.json"]
    with TensorFile(tmp_path / "sum" / VECTOR) as mine, TensorFile(vectors[0] / VECTOR) as theirs:
        assert list(mine.tensors) == list(theirs.tensors)
    with safe_open(tmp_path / "sum" / VECTOR, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["operation"]) == "linear"
    assert json.loads(metadata["inputs"]) == [str(vectors[0]), str(vectors[1])]
    summary = json.loads((tmp_path / "sum" / "task_vector_summary.json").read_text())
    norms = {name: np.linalg.norm(t) for name, t in tensors_of(tmp_path / "sum").items()}
    assert summary["norm"] == pytest.approx(np.linalg.norm(list(norms.values())), rel=1e-12)
    assert summary["nonzero_parameters"] == sum(norm > 0 for norm in norms.values())
    both = tmp_path / "both"
    analyze_task_vectors.apply(str(llama), tmp_path / "sum", both, device="cpu")
    load(both)


@pytest.mark.parametrize("words", [("add",), ("ties", "--density", "1"), ("dare_ties",)])
def test_experts_that_one_of_the_vectors_leaves_out_have_not_changed_in_it(tmp_path, words):
    """A stack of matrices is read by the rows of all of them, also where it is not there."""
    experts = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    save_file({"experts": experts, "w": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    command, *flags = words
    flags = flags if command != "dare_ties" else ["--density", "1"]
    files = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for order in (files, files[::-1]):
        found = combined(tmp_path / "out", command, *order, *flags)
        assert np.array_equal(found["experts"], experts.numpy())
    assert run("show", *files, "--output_dir", tmp_path / "shown") == 0


def test_zero_blocks_take_no_disk(tmp_path):
    large = torch.zeros(4, 1 << 20)
    large[1, 5] = 1.0
    save_file({"w": large, "v": torch.zeros(1 << 20)}, tmp_path / VECTOR, {"format": "pt"})
    combined(tmp_path / "half", "scale", tmp_path / VECTOR, "--factor", 0.5)
    status = (tmp_path / "half" / VECTOR).stat()
    assert status.st_size > 20e6
    assert status.st_blocks * 512 < 6e6


@pytest.mark.parametrize(
    "words",
    [
        ("ties", "--density", "0.3"),
        ("ties", "--density", "0.3", "--sign_method", "frequency", "--definition", "mergekit"),
        ("dare_linear", "--density", "0.4", "--seed", "3"),
        ("dare_ties", "--density", "0.4", "--seed", "3", "--weights", "1", "2", "0.5"),
    ],
    ids=lambda words: " ".join(words),
)
def test_neither_blocks_nor_threads_matter(vectors, tmp_path, monkeypatch, words):
    whole = combined(tmp_path / "whole", words[0], *vectors, *words[1:])
    monkeypatch.setattr(several, "BLOCK_ELEMENTS", 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pieces = combined(tmp_path / "pieces", words[0], *vectors, *words[1:])
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(whole[name], pieces[name]) for name in whole)


def test_ties_of_files_is_pefts(vectors, tmp_path):
    from peft.utils import merge_utils

    weights = (1.0, 0.5, 2.0)
    made = combined(tmp_path / "t", "ties", *vectors, "--density", 0.2, "--weights", *weights)
    loaded = [load_file(vector / VECTOR) for vector in vectors]
    for name, mine in made.items():
        parts = [tensors[name].double() for tensors in loaded]
        theirs = merge_utils.ties(parts, torch.tensor(weights).double(), 0.2).float().numpy()
        assert np.allclose(mine, theirs, rtol=1e-7, atol=0), name


def test_dare_keeps_the_expectation(vectors, tmp_path):
    """The mean of many seeds is the task vector, within five deviations of such a mean."""
    single = tensors_of(vectors[0])
    name = "model.layers.0.self_attn.q_proj.weight"
    total, seeds, density = np.zeros_like(single[name]), 40, 0.5
    for seed in range(seeds):
        words = ("dare_linear", vectors[0], "--seed", seed, "--density", density)
        total = total + combined(tmp_path / "d", *words)[name]
    deviation = np.linalg.norm(single[name]) * np.sqrt((1 / density - 1) / seeds)
    assert np.linalg.norm(total / seeds - single[name]) == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("add", "{0}", "{1}", "--weights", "1"), "1 given for 2 task vectors"),
        (("ties", "{0}", "--density", "0"), "--density 0: give a share above 0 and up to 1"),
        (("add", "{0}", "nowhere/"), "no such task vector"),
        (("scale", "{0}", "--factor", "inf"), "give finite numbers"),
        (("scale", "{0}", "--factor", "1e45"), "the combination overflows fp32"),
        (("negate", "{0}", "{1}"), "unrecognized arguments"),
    ],
)
def test_what_makes_no_sense_is_refused(vectors, tmp_path, capsys, words, message):
    words = [word.format(*vectors) for word in words]
    assert run(*words, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1
    assert names(tmp_path) == []


def test_task_vectors_of_different_shapes_are_refused(vectors, tmp_path):
    save_file({"model.norm.weight": torch.ones(5)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight: \(5,\) in .* but \(32,\) in"):
        analyze_task_vectors.show([vectors[0], tmp_path / "other.safetensors"], tmp_path / "out")


def test_not_a_number_is_refused(tmp_path, capsys):
    for name, value in (("a", 1.0), ("b", float("nan"))):
        save_file({"w": torch.tensor([[value, 2.0]])}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert run("add", *files, "--output_dir", tmp_path / "out") == 2
    assert "b.safetensors: w: holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- showing ---------------------------------------------------------------------------


def test_show_is_numpys(vectors, tmp_path, capsys):
    assert run("show", *vectors, "--output_dir", tmp_path / "out") == 0
    assert names(tmp_path / "out") == [
        "task_vector_cosines.png",
        "task_vector_norms.png",
        "task_vectors.csv",
        "task_vectors.json",
    ]
    found = json.loads((tmp_path / "out" / "task_vectors.json").read_text())
    loaded = [tensors_of(vector) for vector in vectors]

    def cosine(i, j, part):
        one, other = (
            np.concatenate([t.ravel() for n, t in v.items() if part in n])
            for v in (loaded[i], loaded[j])
        )
        return one @ other / (np.linalg.norm(one) * np.linalg.norm(other))

    for i in range(3):
        entry = found["task_vectors"][i]
        assert entry["name"] == vectors[i].name
        flat = np.concatenate([t.ravel() for t in loaded[i].values()])
        assert entry["summary"]["norm"] == pytest.approx(np.linalg.norm(flat), rel=1e-12)
        assert entry["summary"]["sparsity"] == pytest.approx((flat == 0).mean(), rel=1e-12)
        for j in range(3):
            overall = found["cosines"]["overall"][i][j]
            assert overall == pytest.approx(cosine(i, j, ""), rel=1e-10)
            for layer in ("0", "1"):
                value = found["cosines"]["by_layer"][layer][i][j]
                assert value == pytest.approx(cosine(i, j, f"layers.{layer}."), rel=1e-10)
    name = "model.layers.1.self_attn.q_proj.weight"
    values = np.linalg.svd(loaded[0][name], compute_uv=False)
    stable = found["task_vectors"][0]["by_layer"]["1"]["median_stable_rank"]
    assert stable == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)
    output = capsys.readouterr().out
    assert f"{found['cosines']['overall'][0][1]:.4f}" in output
    rows = list(csv.DictReader((tmp_path / "out" / "task_vectors.csv").open(encoding="utf-8")))
    assert [row["layer"] for row in rows[:4]] == ["all", "0", "1", "outside the layers"]
    assert float(rows[0]["norm"]) == found["task_vectors"][0]["summary"]["norm"]


def test_one_task_vector_has_no_cosines_to_draw(vectors, tmp_path):
    found = analyze_task_vectors.show(
        [vectors[0]], tmp_path / "out", ranks=False, device="cpu"
    ).document
    assert "task_vector_cosines.png" not in names(tmp_path / "out")
    assert found["task_vectors"][0]["summary"]["median_stable_rank"] is None


def test_the_same_vectors_give_the_same_figures(vectors, tmp_path):
    for output in ("one", "two"):
        analyze_task_vectors.show(vectors, tmp_path / output, ranks=False, device="cpu")
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_zero_task_vector_is_shown(vectors, tmp_path):
    combined(tmp_path / "zero", "scale", vectors[0], "--factor", 0)
    found = analyze_task_vectors.show(
        [vectors[0], tmp_path / "zero"], tmp_path / "out", device="cpu"
    ).document
    assert found["cosines"]["overall"] == [[1.0, None], [None, None]]


# -- the command line -------------------------------------------------------------------

COMMANDS = (
    "show", "apply", "add", "negate", "scale", "analogy", "ties", "dare_linear", "dare_ties",
    "to_lora",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_the_common_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert all(flag in output for flag in ("--device", "--config", "--quiet", "--output_dir"))


def test_without_a_command_or_with_a_flag_before_it(capsys):
    assert main([]) == 2
    assert "the following arguments are required: COMMAND" in capsys.readouterr().err
    assert main(["--quiet", "show", "x"]) == 2
    assert "the command comes first" in capsys.readouterr().err
    assert main(["shew"]) == 2
    assert "invalid choice: 'shew'" in capsys.readouterr().err


def test_a_configuration_file_gives_a_commands_flags(llama, vectors, tmp_path, capsys):
    config = tmp_path / "apply.yml"
    config.write_text(
        f"base_model: {llama}\ntask_vector: {vectors[0]}\nscale: [0.5, 2]\nprecision: fp16\n"
        f"output_dir: {tmp_path / 'models'}\nquiet: true\n"
    )
    assert run("apply", "--config", config, "--precision", "bf16") == 0
    manifest = json.loads((tmp_path / "models" / "apply_manifest.json").read_text())
    assert manifest["scales"] == {"scale_0.5": 0.5, "scale_2.0": 2.0}
    assert manifest["precision"] == "bf16"  # the command line wins
    config.write_text("scales: 1\n")
    assert run("apply", "--config", config) == 2
    assert "unknown key 'scales'; did you mean 'scale'?" in capsys.readouterr().err


def test_a_list_in_a_configuration_file_does_not_swallow_what_follows(vectors, tmp_path):
    config = tmp_path / "add.yml"
    config.write_text("weights: [2, 3]\n")
    made = analyze_task_vectors.build_parser()
    args = cli.parse_args(made, ["add", "a", "b", "--config", str(config)])
    assert (args.task_vectors, args.weights) == (["a", "b"], [2.0, 3.0])
    config.write_text("rank: auto\nmax_rank: 3\n")
    args = cli.parse_args(made, ["to_lora", f"--config={config}"])
    assert (args.rank, args.max_rank) == (None, 3)


@pytest.mark.parametrize("rank", ["0", "-1", "two", "1.5"])
def test_a_rank_is_a_positive_number_or_auto(rank, capsys):
    assert main(["to_lora", "--rank", rank]) == 2
    assert f"{rank}: give a whole number, 1 or more" in capsys.readouterr().err
