"""Step 2 against numpy: the difference of two models, zeros that take no disk, and the summary."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import extract_task_vectors
import merge_lora
from taskvec import cli
from taskvec.cli import UserError
from taskvec.tensorfile import TensorFile
from tests.checks import names, weights
from tests.models import FAMILIES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VECTOR, SUMMARY = "task_vector.safetensors", "task_vector_summary.json"


def extract(base, merged, output, **options):
    return extract_task_vectors.extract(str(base), str(merged), output, device="cpu", **options)


def subtracted(merged, base):
    """fl32(M - W) by numpy, from whatever the two are stored in."""
    return merged.float().numpy() - base.float().numpy()


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory):
    """Merges of a family's model and adapter, each made once."""
    directory, made = tmp_path_factory.mktemp("merged"), {}

    def make(family="llama", precision="fp32", rounding="once"):
        base = tiny.base(family)
        key = f"{family}-{precision}-{rounding}"
        if key not in made:
            options = {"precision": precision, "rounding": rounding, "device": "cpu"}
            merge_lora.merge(str(base), str(tiny.adapter(base)), directory / key, **options)
            made[key] = directory / key
        return base, made[key]

    return make


# -- the vector --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", DTYPES)
def test_the_task_vector_is_numpys_difference_in_fp32(merged, tmp_path, family, precision):
    base, tuned = merged(family, precision)
    result = extract(base, tuned, tmp_path / "tv")
    assert names(tmp_path) == ["tv"] and names(tmp_path / "tv") == [VECTOR, SUMMARY]
    vector, before, after = (weights(path) for path in (tmp_path / "tv", base, tuned))
    assert set(vector) == set(before)
    nonzero = 0
    for name, rows in vector.items():
        assert rows.dtype == torch.float32
        reference = subtracted(after[name], before[name])
        np.testing.assert_array_equal(rows.numpy(), reference)
        nonzero += bool(reference.any())
    assert (result.total_parameters, result.nonzero_parameters) == (len(before), nonzero)


def test_in_fp32_only_what_the_adapter_touches_is_there(merged, tmp_path):
    base, tuned = merged("starcoder2")
    result = extract(base, tuned, tmp_path / "tv")
    touched = json.loads((tuned / "merge_manifest.json").read_text())["scaling"]
    found = {name for name, rows in weights(tmp_path / "tv").items() if rows.any()}
    assert found == set(touched)
    assert (result.total_parameters, result.nonzero_parameters) == (16 * 2 + 3, 4 * 2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_the_base_first_makes_every_artifact_vanish(merged, tmp_path, precision):
    base, tuned = merged("llama", precision, "peft")
    touched = set(json.loads((tuned / "merge_manifest.json").read_text())["scaling"])
    as_stored = extract(base, tuned, tmp_path / "stored")
    assert as_stored.nonzero_parameters == as_stored.total_parameters
    rounded = extract(base, tuned, tmp_path / "rounded", base_precision=precision)
    vector = weights(tmp_path / "rounded")
    assert {name for name, rows in vector.items() if rows.any()} == touched
    assert rounded.nonzero_parameters == len(touched)
    before, after = weights(base), weights(tuned)
    for name in touched:
        reference = subtracted(after[name], before[name].to(DTYPES[precision]))
        np.testing.assert_array_equal(vector[name].numpy(), reference)


def test_base_precision_fp32_is_as_stored_for_an_fp32_base(merged, tmp_path):
    base, tuned = merged("llama", "fp16")
    extract(base, tuned, tmp_path / "a")
    extract(base, tuned, tmp_path / "b", base_precision="fp32")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_float64_base_is_subtracted_before_it_is_rounded(llama, copied, tmp_path):
    base = copied(llama)
    before = {name: tensor.double() for name, tensor in weights(llama).items()}
    save_file({name: t * (1 + 2.0**-40) for name, t in before.items()}, base / "model.safetensors")
    extract(base, llama, tmp_path / "tv")
    for name, rows in weights(tmp_path / "tv").items():
        exact = before[name].numpy() - before[name].numpy() * (1 + 2.0**-40)
        np.testing.assert_array_equal(rows.numpy(), exact.astype(np.float32))
        assert rows.any()


def test_blocks_of_a_few_rows_give_the_same_vector(merged, tmp_path, monkeypatch):
    base, tuned = merged("gpt2", "bf16")
    extract(base, tuned, tmp_path / "whole")
    monkeypatch.setattr(extract_task_vectors, "BLOCK_ELEMENTS", 100)
    extract(base, tuned, tmp_path / "blocks")
    whole, blocks = ((tmp_path / name / VECTOR).read_bytes() for name in ("whole", "blocks"))
    assert whole == blocks


def test_two_equal_models_have_no_task_vector(llama, tmp_path):
    result = extract(llama, llama, tmp_path / "tv")
    assert result.nonzero_parameters == 0
    assert not any(rows.any() for rows in weights(tmp_path / "tv").values())


# -- zeros -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two models of a megabyte per tensor, of which one tensor and a part of another differ."""
    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    before = {f"layers.{i}.weight": torch.randn(512, 512) for i in range(8)}
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["layers.3.weight"] += 1
    after["layers.6.weight"][0, 0] += 1
    for name, tensors in (("base", before), ("tuned", after)):
        (directory / name).mkdir()
        save_file(tensors, directory / name / "model.safetensors")
    return directory / "base", directory / "tuned"


def test_zero_tensors_take_no_disk_and_read_as_zeros(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(extract_task_vectors, "BLOCK_ELEMENTS", 1 << 15)
    base, tuned = wide
    extract(base, tuned, tmp_path / "tv")
    file = tmp_path / "tv" / VECTOR
    assert file.stat().st_size > 8 * 2**20
    assert file.stat().st_blocks * 512 < 1.5 * 2**20  # layers.3 and one block of layers.6
    for loaded in (load_file(file), {k: get(file, k) for k in load_file(file)}):
        assert len(loaded) == 8
        nonzero = {name for name, rows in loaded.items() if rows.any()}
        assert nonzero == {"layers.3.weight", "layers.6.weight"}
        assert torch.count_nonzero(loaded["layers.6.weight"]) == 1
    with TensorFile(file) as opened:
        assert opened.is_hole(opened.tensors["layers.1.weight"])
        assert not opened.is_hole(opened.tensors["layers.6.weight"])


def get(file, name):
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


# -- metadata and summary ----------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("base_precision", ["stored", "fp16"])
def test_the_file_says_what_was_subtracted(merged, tmp_path, precision, base_precision):
    base, tuned = merged("llama", precision)
    extract(base, tuned, tmp_path / "tv", base_precision=base_precision)
    with safe_open(tmp_path / "tv" / VECTOR, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "base_precision": base_precision,
            "merged_precision": precision,
        }


@pytest.mark.parametrize("precision", DTYPES)
def test_the_summary_is_numpys(merged, tmp_path, precision):
    base, tuned = merged("qwen2", precision)
    extract(base, tuned, tmp_path / "tv")
    summary = json.loads((tmp_path / "tv" / SUMMARY).read_text())
    vector = {
        name: subtracted(after, before).astype(np.float64)
        for (name, after), before in zip(
            sorted(weights(tuned).items()),
            [tensor for _, tensor in sorted(weights(base).items())],
            strict=True,
        )
    }
    assert set(summary["parameters"]) == set(vector)
    for name, rows in vector.items():
        found = summary["parameters"][name]
        assert found["shape"] == list(rows.shape)
        assert found["nonzero_elements"] == np.count_nonzero(rows)
        assert found["non_finite_elements"] == 0
        assert found["norm"] == pytest.approx(np.linalg.norm(rows), rel=1e-12)
        assert found["max_abs"] == abs(rows).max()
    flat = np.concatenate([rows.ravel() for rows in vector.values()])
    assert summary["total_parameters"] == len(vector)
    assert summary["nonzero_parameters"] == sum(bool(rows.any()) for rows in vector.values())
    assert summary["total_elements"] == flat.size
    assert summary["nonzero_elements"] == np.count_nonzero(flat)
    assert summary["norm"] == pytest.approx(np.linalg.norm(flat), rel=1e-12)
    assert summary["max_abs"] == abs(flat).max()
    assert (summary["base_precision"], summary["merged_precision"]) == ("stored", precision)


def test_nan_and_infinity_are_counted_kept_and_mentioned(llama, copied, tmp_path, capsys):
    tuned, name = copied(llama), "model.norm.weight"
    tensors = weights(llama)
    tensors[name][:3] = torch.tensor([math.nan, math.inf, 7.0])
    save_file(tensors, tuned / "model.safetensors")
    extract(llama, tuned, tmp_path / "tv")
    assert "2 elements are NaN or infinite" in capsys.readouterr().err
    text = (tmp_path / "tv" / SUMMARY).read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = json.loads(text)["parameters"][name]
    assert (found["nonzero_elements"], found["non_finite_elements"]) == (3, 2)
    assert found["max_abs"] == found["norm"] == np.float32(7.0) - weights(llama)[name].numpy()[2]
    vector = weights(tmp_path / "tv")[name]
    assert vector[0].isnan() and vector[1].isinf()


def test_what_is_not_finite_in_both_models_has_no_difference_that_is(llama, copied, tmp_path):
    """Equal bytes are a task vector of zeros, but for NaN - NaN and inf - inf."""
    models, name = [copied(llama), tmp_path / "tuned"], "model.norm.weight"
    tensors = weights(llama)
    tensors[name][:3] = torch.tensor([math.nan, math.inf, -0.0])
    save_file(tensors, models[0] / "model.safetensors")
    shutil.copytree(models[0], models[1])
    extract(models[0], models[1], tmp_path / "tv")
    vector = weights(tmp_path / "tv")[name]
    assert vector[:2].isnan().all() and not vector[2:].any()
    summary = json.loads((tmp_path / "tv" / SUMMARY).read_text())
    assert (summary["non_finite_elements"], summary["nonzero_elements"]) == (2, 2)


# -- tensors that are no floats ------------------------------------------------------


@pytest.fixture
def with_steps(llama, tmp_path):
    """Copies of a model with an integer buffer of the given values."""

    def make(name, steps):
        shutil.copytree(llama, tmp_path / name)
        tensors = weights(llama) | {"steps": steps}
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    return make


def test_equal_integer_buffers_are_no_part_of_the_vector(llama, with_steps, tmp_path):
    a, b = with_steps("a", torch.arange(5)), with_steps("b", torch.arange(5))
    result = extract(a, b, tmp_path / "tv")
    assert result.total_parameters == len(weights(llama))
    assert "steps" not in weights(tmp_path / "tv")


DIFFERS = r"steps \(torch\.int\d+\) differs from the base's \(torch\.int\d+\); only float tensors"
NO_FLOAT = r"steps: torch\.\w+ in \S+, but torch\.\w+ in \S+; only float tensors can be subtracted"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 5]), DIFFERS),
        (torch.arange(5, dtype=torch.int32), DIFFERS),
        (torch.arange(5.0), NO_FLOAT),
    ],
    ids=["values", "dtype", "float"],
)
def test_other_integer_buffers_are_refused(with_steps, tmp_path, other, message):
    a, b = with_steps("a", torch.arange(5)), with_steps("b", other)
    for base, tuned in ((a, b), (b, a)):
        with pytest.raises(UserError, match=message):
            extract(base, tuned, tmp_path / "tv")
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_buffers_of_dtypes_without_arithmetic_are_compared_by_their_bytes(
    with_steps, tmp_path, dtype
):
    steps = torch.tensor([1.0, 2.0, 4.0]).to(dtype)
    a, b = with_steps("a", steps), with_steps("b", steps)
    extract(a, b, tmp_path / "tv")
    assert "steps" not in weights(tmp_path / "tv")
    with pytest.raises(UserError, match=r"steps \(torch\.\w+\) differs from the base's"):
        extract(a, with_steps("c", torch.ones(3).to(dtype)), tmp_path / "other")


def test_models_without_a_float_have_an_empty_vector(tmp_path):
    for name in ("a", "b"):
        save_file({"steps": torch.arange(3)}, tmp_path / f"{name}.safetensors")
    result = extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "tv")
    assert (result.total_parameters, result.nonzero_parameters) == (0, 0)
    assert weights(tmp_path / "tv") == {}


# -- two models that are not two of a kind -------------------------------------------


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(llama, copied, tmp_path):
    tuned, name = copied(llama), "model.layers.1.mlp.up_proj.weight"
    tensors = weights(llama)
    for change, message in [
        (lambda t: t.pop(name), rf"has no {name}, which {llama} has"),
        (lambda t: t.update(extra=torch.ones(1)), rf"{llama}: has no extra, which {tuned} has"),
        (
            lambda t: t.update({name: t[name].T.contiguous()}),
            rf"{name}: \(32, 48\) in .* \(48, 32\)",
        ),
    ]:
        changed = dict(tensors)
        change(changed)
        save_file(changed, tuned / "model.safetensors")
        with pytest.raises(UserError, match=message):
            extract(llama, tuned, tmp_path / "tv")
    assert names(tmp_path) == [tuned.name]


# -- shards, files, replacing --------------------------------------------------------


def test_layouts_of_base_and_tuned_may_differ(tiny, merged, tmp_path):
    base, tuned = merged("llama", "bf16")
    extract(base, tuned, tmp_path / "one")
    sharded = tiny.base("llama", max_shard_size="20KB")
    extract(sharded, tuned / "model.safetensors", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_new_vector_replaces_the_earlier_one(merged, tmp_path):
    for precision in ("fp16", "fp32"):
        base, tuned = merged("llama", precision)
        extract(base, tuned, tmp_path / "tv")
    assert names(tmp_path / "tv") == [VECTOR, SUMMARY]
    summary = json.loads((tmp_path / "tv" / SUMMARY).read_text())
    assert summary["merged_precision"] == "fp32"


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_an_input_is_never_written_to(wide, tmp_path, which):
    for name, source in zip(("base", "tuned"), wide, strict=True):
        shutil.copytree(source, tmp_path / name)
    before = (tmp_path / which / "model.safetensors").read_bytes()
    for output in (tmp_path / which, tmp_path / which / "tv", tmp_path):
        with pytest.raises(UserError, match="is, holds or lies inside the input"):
            extract(tmp_path / "base", tmp_path / "tuned", output)
    assert names(tmp_path / which) == ["model.safetensors"]
    assert (tmp_path / which / "model.safetensors").read_bytes() == before


def test_a_disk_that_fills_up_leaves_the_earlier_vector(merged, tmp_path, monkeypatch, capsys):
    base, tuned = merged("llama", "fp16")
    extract(base, tuned, tmp_path / "tv")
    before = {path: path.read_bytes() for path in (tmp_path / "tv").iterdir()}
    count, pwrite = 0, os.pwrite

    def full(fd, data, offset):
        nonlocal count
        count += 1
        if count > 5:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    flags = ["--base_model", str(base), "--finetuned_model", str(tuned), "--device", "cpu"]
    assert extract_task_vectors.main([*flags, "--output_dir", str(tmp_path / "tv")]) == 2
    assert re.search(r": error: No space left on device: .*\n$", capsys.readouterr().err)
    assert names(tmp_path) == ["tv"]
    assert {path: path.read_bytes() for path in (tmp_path / "tv").iterdir()} == before


def test_the_progress_bar_ends_at_its_total(with_steps, merged, tmp_path, monkeypatch):
    seen: list[tuple[int, Mock]] = []

    @contextlib.contextmanager
    def record(total, *_):
        seen.append((total, Mock()))
        yield seen[-1][1]

    monkeypatch.setattr(cli, "progress", record)
    extract(with_steps("a", torch.arange(5)), with_steps("b", torch.arange(5)), tmp_path / "one")
    base, tuned = merged("gpt2", "bf16")
    extract(base, tuned, tmp_path / "two")
    for total, bar in seen:
        assert sum(call.args[0] for call in bar.update.call_args_list) == total > 0


# -- what is printed ---------------------------------------------------------------


def test_the_last_lines_are_those_documented(merged, tmp_path, monkeypatch, capsys):
    base, tuned = merged("starcoder2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yml").write_text(
        f"base_model: {base}\nfinetuned_model: {tuned}\noutput_dir: task_vectors_fp32/\n"
        "device: cpu\ntrust_remote_code: false\n"
    )
    assert extract_task_vectors.main(["--config", "c.yml"]) == 0
    lines = (
        "📁 Task vectors saved to: task_vectors_fp32/\n"
        "📊 Found 8 non-zero parameters (vs 35 total architecture parameters)\n"
        "💾 Saved: task_vector.safetensors\n"
    )
    assert capsys.readouterr().out.endswith(lines)
    assert extract_task_vectors.main(["--config", "c.yml", "--quiet", "--trust_remote_code"]) == 0
    assert capsys.readouterr() == (lines, "")
