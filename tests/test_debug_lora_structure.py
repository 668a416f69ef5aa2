"""What debug_lora_structure.py says of an adapter is what merge_lora.py does with it."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import debug_lora_structure
import merge_lora
from taskvec import cli
from taskvec.adapter import open_adapter
from taskvec.adapters.check import AdapterReport, inspect_adapter
from taskvec.checkpoint import open_checkpoint
from tests.adapter_kinds import KINDS, make_kind
from tests.broken_adapters import (
    BROKEN,
    SOUND,
    V1,
    Edit,
    Tensors,
    added,
    config,
    dropped,
    factor,
    renamed,
    with_value,
)


@pytest.fixture
def edited(tmp_path: Path, llama_lora: Path) -> Callable[..., Path]:
    def make(*edits: Edit, adapter: Path = llama_lora) -> Path:
        target = tmp_path / "edited"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(adapter, target)
        tensors = load_file(target / "adapter_model.safetensors")
        values = json.loads((target / "adapter_config.json").read_text())
        for edit in edits:
            edit(tensors, values)
        save_file(tensors, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(values))
        return target

    return make


def merges(adapter: Path, base: Path, scratch: Path) -> bool:
    """What merge_lora.py does with it."""
    try:
        merge_lora.merge(str(base), str(adapter), scratch / "merged", device="cpu")
    except cli.UserError:
        return False
    return True


def check(adapter: Path, base: Path, scratch: Path) -> AdapterReport:
    """The report, whose verdict and errors are checked against merge_lora.py."""
    report = debug_lora_structure.debug(str(adapter), str(base))
    assert report.merges == merges(adapter, base, scratch)
    assert bool(report.errors) == (not report.merges)
    return report


def said(report: AdapterReport, kind: str) -> str:
    found = [problem for problem in report.problems if problem.kind == kind]
    assert found, [problem.kind for problem in report.problems]
    assert all(problem.what and problem.todo for problem in found)
    return " ".join(f"{problem.what} {problem.todo}" for problem in found)


@pytest.mark.parametrize("case", BROKEN)
def test_what_would_not_merge_is_named(case, edited, llama, tmp_path):
    edit, kind, words = BROKEN[case]
    report = check(edited(edit), llama, tmp_path)
    assert not report.merges
    assert words in said(report, kind)


@pytest.mark.parametrize("case", SOUND)
def test_what_merges_passes_with_its_warnings(case, edited, llama, tmp_path):
    edit, kind, words = SOUND[case]
    report = check(edited(edit), llama, tmp_path)
    assert report.merges
    if kind is None:
        assert report.problems == []
    else:
        assert words in said(report, kind)


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_of_defects_ends_as_in_merge_lora(seed, edited, llama, tmp_path):
    """Three edits at a time, in any order: every one that survives the others is listed."""
    cases = list({**BROKEN, **SOUND}.values())
    edits = [edit for edit, _, _ in random.Random(seed).sample(cases, 3)]

    def tolerant(edit: Edit) -> Edit:
        def apply(tensors: Tensors, values: dict[str, Any]) -> None:
            # an earlier edit may have left nothing that this one can change
            with contextlib.suppress(KeyError, IndexError, RuntimeError):
                edit(tensors, values)

        return apply

    check(edited(*map(tolerant, edits)), llama, tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
_SETTINGS = [
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora"),
    *("modules_to_save", "init_lora_weights", "base_model_name_or_path", "peft_type"),
]


@given(st.dictionaries(st.sampled_from(_SETTINGS), _JSON, min_size=1, max_size=4))
@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_configuration_ends_as_in_merge_lora(edited, llama, tmp_path, values):
    """Whatever JSON holds is described or refused, in the report and in strict JSON."""
    adapter = edited(config(**values))
    report = check(adapter, llama, tmp_path)
    json.dumps(report.as_json(), allow_nan=False)
    inspect_adapter(str(adapter))


def test_every_problem_is_listed_not_only_the_first(edited, llama, tmp_path):
    adapter = edited(
        config(layer_replication=[[0, 1]], init_lora_weights="pissa"),
        renamed("layers.0.self_attn.q_proj", "layers.0.self_attn.q_prj"),
        factor(f"{V1}.lora_B.weight", with_value(float("nan"))),
        dropped("layers.1.mlp.down_proj.lora_A"),
        added("thing", torch.ones(1)),
    )
    report = check(adapter, llama, tmp_path)
    kinds = [problem.kind for problem in report.errors]
    assert sorted(kinds) == sorted(
        ["config", "config", "no-module", "non-finite", "no-partner", "unknown-key"]
    )
    by_kind = {problem.kind: problem.names for problem in report.errors}
    assert by_kind["no-module"] == ["model.layers.0.self_attn.q_prj"]
    assert by_kind["no-partner"] == ["model.layers.1.mlp.down_proj"]
    assert by_kind["non-finite"] == ["model.layers.1.self_attn.v_proj"]


def test_one_misspelt_module_does_not_hide_that_the_others_fit(edited, tiny, tmp_path):
    """A base saved from its backbone lacks a prefix; the rest is matched all the same."""
    base = tiny.base("gpt2")
    backbone = tmp_path / "backbone"
    shutil.copytree(base, backbone)
    tensors = load_file(backbone / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        backbone / "model.safetensors",
    )
    adapter = tiny.adapter(base)
    assert check(adapter, backbone, tmp_path).merges
    broken = edited(renamed("h.1.attn.c_attn", "h.1.attn.c_atn"), adapter=adapter)
    report = check(broken, backbone, tmp_path)
    (problem,) = report.errors
    assert problem.names == ["transformer.h.1.attn.c_atn"]
    assert len(report.touched) == len(report.factors) - 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "starcoder2", "gpt2"])
def test_sound_adapters_of_every_family_have_no_problems(family, tiny, tmp_path):
    base = tiny.base(family)
    report = check(tiny.adapter(base), base, tmp_path)
    assert report.problems == []
    assert list(report.touched) != []


def test_a_wrong_fan_in_fan_out_is_an_error_where_square_weights_depend_on_it(
    edited, tiny, tmp_path
):
    base = tiny.base("gpt2")
    adapter = edited(config(fan_in_fan_out=False), adapter=tiny.adapter(base))
    report = check(adapter, base, tmp_path)
    assert "fan_in_fan_out is False" in said(report, "orientation")
    (problem,) = report.errors
    assert problem.names == [f"transformer.h.{layer}.attn.c_proj" for layer in (0, 1)]


def test_bases_that_cannot_be_added_to(edited, copied, llama, llama_lora, tmp_path):
    quantised = copied(llama)
    values = json.loads((quantised / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq"}
    (quantised / "config.json").write_text(json.dumps(values))
    assert "gptq" in said(check(llama_lora, quantised, tmp_path), "quantised-base")

    integers = tmp_path / "integers.safetensors"
    save_file(
        {
            name: tensor.to(torch.int8)
            for name, tensor in load_file(llama / "model.safetensors").items()
        },
        integers,
    )
    assert "int8, not a float" in said(check(llama_lora, integers, tmp_path), "not-a-float")


def test_lm_head_of_a_base_with_tied_embeddings_is_a_parameter_of_its_own(tiny, tmp_path):
    base = tiny.base("starcoder2")
    report = check(tiny.adapter(base, target_modules=["lm_head"]), base, tmp_path)
    assert report.merges and list(report.touched) == ["lm_head.weight"]
    assert report.factors[0].parameter == "lm_head.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_described(tiny, tmp_path, capsys, kind):
    base, adapter = make_kind(tiny, kind)
    report = check(adapter, base, tmp_path)
    with open_checkpoint(str(base)) as opened, open_adapter(str(adapter), opened) as mine:
        assert set(report.touched) == set(mine.parameters)
        squared = {
            name: float((mine.update(name, torch.device("cpu")).exact(0, info.rows) ** 2).sum())
            for name, info in opened.tensors.items()
            if name in mine.parameters
        }
    assert not report.errors
    for found in report.factors:
        if not report.config["use_dora"]:
            expected = math.sqrt(squared[found.parameter or ""])
            assert found.update_norm == pytest.approx(expected, rel=1e-6)
    assert debug_lora_structure.main(["--lora_path", str(adapter), "--base_model", str(base)]) == 0
    assert "Would merge" in capsys.readouterr().out


def test_norms_are_those_of_the_matrices(llama, llama_lora):
    report = debug_lora_structure.debug(str(llama_lora), str(llama))
    tensors = load_file(llama_lora / "adapter_model.safetensors")
    assert len(report.factors) == 6
    for found in report.factors:
        A, B = (
            tensors[f"base_model.model.{found.module}.lora_{side}.weight"]
            .numpy()
            .astype(np.float64)
            for side in "AB"
        )
        assert found.scaling == 2.0
        assert found.A_norm == pytest.approx(np.linalg.norm(A), rel=1e-12)
        assert found.B_norm == pytest.approx(np.linalg.norm(B), rel=1e-12)
        assert found.update_norm == pytest.approx(np.linalg.norm(2.0 * B @ A), rel=1e-12)


def test_without_a_base_the_file_is_judged_by_itself(edited, llama_lora, capsys):
    assert debug_lora_structure.main(["--lora_path", str(llama_lora)]) == 0
    assert "✅ Nothing is wrong with the file itself" in capsys.readouterr().out

    report = debug_lora_structure.debug(str(edited(config(r=8))))
    assert not report.merges
    assert "says 8" in said(report, "rank")

    unmatched = edited(config(target_modules=["q_proj", "v_proj", "down_proj", "o_prj"]))
    report = debug_lora_structure.debug(str(unmatched))
    assert report.merges
    assert "o_prj, which is no module of the adapter file" in said(report, "target-unmatched")


def test_exit_status_and_output(edited, llama, capsys, tmp_path):
    output = tmp_path / "out"
    adapter = edited(
        renamed("q_proj", "q_prj"), factor(f"{V1}.lora_A.weight", with_value(float("nan")))
    )
    flags = ["--lora_path", str(adapter), "--base_model", str(llama)]
    assert debug_lora_structure.main([*flags, "--output_dir", str(output)]) == 1
    text = capsys.readouterr().out
    assert (
        "✗ the base has no such module; the nearest is model.layers.#.self_attn.q_proj (2)" in text
    )
    assert "     model.layers.0-1.self_attn.q_prj\n" in text
    assert text.splitlines()[-1] == f"❌ Would not merge into {llama}: 2 problems (2 warnings)"

    document = json.loads((output / "lora_structure.json").read_text())
    assert document["merges"] is False
    assert len(document["factors"]) == 6
    broken = [found for found in document["factors"] if found["non_finite"]]
    assert [found["A_norm"] for found in broken] == [None]

    assert debug_lora_structure.main([*flags, "--quiet"]) == 1
    quiet = capsys.readouterr().out
    assert "🔎" not in quiet and "✗" in quiet


def test_settings_from_a_file(edited, llama, llama_lora, capsys, tmp_path):
    file = tmp_path / "settings.yml"
    file.write_text(f"lora_path: {llama_lora}\nbase_model: {llama}\nquiet: true\n")
    assert debug_lora_structure.main(["--config", str(file)]) == 0
    assert capsys.readouterr().out.strip() == f"✅ Would merge into {llama}"
    bad = edited(config(r=8))
    assert debug_lora_structure.main(["--config", str(file), "--lora_path", str(bad)]) == 1


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "no such"),
        (remove("adapter_config.json"), "holds no adapter_config.json"),
        (remove("adapter_model.safetensors"), "holds no adapter_model.safetensors"),
        (cut("adapter_config.json"), "not valid JSON"),
        (cut("adapter_model.safetensors"), "truncated"),
    ],
)
def test_what_cannot_be_read_is_status_2_here_and_in_merge_lora(
    damage, words, copied, llama, llama_lora, capsys, tmp_path
):
    adapter = copied(llama_lora)
    damage(adapter)
    flags = ["--lora_path", str(adapter), "--base_model", str(llama)]
    assert debug_lora_structure.main(flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert merge_lora.main([*flags, "--output_dir", str(tmp_path / "merged")]) == 2


def test_an_unreadable_base_is_status_2(llama_lora, tmp_path, capsys):
    flags = ["--lora_path", str(llama_lora), "--base_model", str(tmp_path / "nothing")]
    assert debug_lora_structure.main(flags) == 2
    assert "no such" in capsys.readouterr().err
    assert debug_lora_structure.main(["--lora_path", str(llama_lora), "--revision", "x"]) == 2
    assert "--base_model" in capsys.readouterr().err


def test_only_headers_of_the_base_are_read(llama, llama_lora, monkeypatch):
    from taskvec.checkpoint import Checkpoint

    def read(*_: object) -> None:
        raise AssertionError("tensor data of the base was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    assert debug_lora_structure.debug(str(llama_lora), str(llama)).merges
