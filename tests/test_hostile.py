"""Inputs made to do harm, and places where an output must not go."""

from __future__ import annotations

import importlib
import json
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from tests import hostile
from tests.hostile import CONFIG, Sandbox, file_bytes, header_and_data

MIB = 1 << 20


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path / "home")


# -- sizes ---------------------------------------------------------------------


def sparse(file, size, start=b""):
    with file.open("wb") as target:
        target.write(start)
        target.truncate(size)


TALL = {
    "base_model.model.a.lora_A.weight": np.full((10**6, 3), 0.5, np.float32),
    "base_model.model.a.lora_B.weight": np.full((4, 10**6), 0.25, np.float32),
}


def test_a_rank_larger_than_the_matrix_is_measured_in_little_memory(sandbox, commands):
    sandbox.put("lora/adapter_model.safetensors", file_bytes(*header_and_data(TALL)))
    config = {"peft_type": "LORA", "r": 10**6, "lora_alpha": 10**6}
    sandbox.put("lora/adapter_config.json", json.dumps(config).encode())
    words = sandbox.words("debug_lora_structure")
    found = commands.run("debug_lora_structure", *words, memory=600 * MIB)
    assert found.status == 0, found.err
    (module,) = json.loads((sandbox.out / "lora_structure.json").read_text())["factors"]
    assert module["update_norm"] == pytest.approx(125_000 * 12**0.5, rel=1e-9)


def test_factors_without_elements_are_reported(sandbox):
    header = {
        "base_model.model.a.lora_A.weight": _entry([2**31, 0, 0], 0, 0),
        "base_model.model.a.lora_B.weight": _entry([0, 2**31, 0], 0, 0),
    }
    sandbox.put("lora/adapter_model.safetensors", file_bytes(header, b""))
    assert sandbox.run("debug_lora_structure").status == 1


HUGE = {
    "a header of 90 MB that is not there": lambda s: sparse(
        s.home / "base/model.safetensors", 10**12, (90_000_000).to_bytes(8, "little")
    ),
    "a header of 10^18 bytes": lambda s: sparse(
        s.home / "base/model.safetensors", 10**12, (10**18).to_bytes(8, "little")
    ),
    "a configuration of 10^12 bytes": lambda s: sparse(s.home / "base/config.json", 10**12),
    "an adapter's configuration of 10^12 bytes": lambda s: sparse(
        s.home / "lora/adapter_config.json", 10**12
    ),
    "10^18 rows without elements": lambda s: s.put(
        "base/model.safetensors",
        file_bytes(
            {**header_and_data(hostile.BASE)[0], "e": _entry([10**18, 0], 70, 70)},
            header_and_data(hostile.BASE)[1],
        ),
    ),
    "a rank of 10^18": lambda s: s.put(
        "lora/adapter_model.safetensors",
        file_bytes(
            {
                "base_model.model.a.lora_A.weight": _entry([10**18, 3], 0, 12 * 10**18),
                "base_model.model.a.lora_B.weight": _entry([4, 10**18], 12 * 10**18, 28 * 10**18),
            },
            b"",
        ),
    ),
}


def _entry(shape, begin, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", HUGE)
def test_what_a_file_claims_takes_no_memory(sandbox, commands, name):
    HUGE[name](sandbox)
    found = commands.run("merge_lora", *sandbox.words("merge_lora"), memory=600 * MIB)
    if name.endswith("elements"):
        assert found.status == 0, found.err
    else:
        assert found.status == 2
        assert found.err.count("\n") == 1 and ": error: " in found.err
        assert not sandbox.out.exists()


def test_memory_that_runs_out_is_one_line(sandbox, commands):
    found = commands.run("merge_lora", *sandbox.words("merge_lora"), memory=0)
    assert found.status in (0, 2)
    assert "Traceback" not in found.err


# -- what fuzzing found --------------------------------------------------------


def test_a_shard_named_like_a_file_of_the_tokenizer_is_not_overwritten(sandbox):
    header, data = header_and_data({"a.weight": hostile.BASE["a.weight"]})
    (sandbox.home / "base" / "model.safetensors").unlink()
    sandbox.put("base/vocab.safetensors", file_bytes(header, data))
    sandbox.put(
        "base/other.safetensors", file_bytes(*header_and_data({"b": hostile.BASE["b.weight"]}))
    )
    weight_map = {"a.weight": "vocab.safetensors", "b": "other.safetensors"}
    sandbox.put(
        "base/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode()
    )
    assert sandbox.run("merge_lora").status == 0
    merged = (sandbox.out / "vocab.safetensors").read_bytes()[-48:]
    assert merged == (hostile.BASE["a.weight"] + hostile.VECTOR["a.weight"]).tobytes()


@pytest.mark.parametrize("name", ["config.json", "merge_manifest.json", "x.model"])
def test_an_index_names_weight_files_only(sandbox, name):
    (sandbox.home / "base" / "model.safetensors").rename(sandbox.home / "base" / name)
    weight_map = dict.fromkeys(hostile.BASE, name)
    sandbox.put(
        "base/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode()
    )
    ending = sandbox.run("merge_lora")
    assert ending.status == 2
    assert f"'{name}' is not the name of a .safetensors file" in ending.err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_that_is_not_finite_is_certified_by_nobody(sandbox, value):
    header, data = header_and_data(hostile.BASE)
    bad = torch.tensor([value]).numpy().tobytes()
    sandbox.put("base/model.safetensors", file_bytes(header, bad + data[4:]))
    ending = sandbox.run("compare_lora_task_vector")
    assert ending.status == 2
    assert "a.weight: holds NaN or infinity" in ending.err


def test_a_base_beyond_fp32_is_certified_by_nobody(sandbox):
    header, data = header_and_data({**hostile.BASE, "a.weight": np.full((4, 3), 1e300)})
    sandbox.put("base/model.safetensors", file_bytes(header, data))
    for script in ("compare_lora_task_vector", "merge_lora"):
        ending = sandbox.run(script)
        assert ending.status == 2
        assert "a.weight: " in ending.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"r": 2, "r": 3}', "'r' appears twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (hostile.nested(101, "object").encode(), "nested more than 100 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    ],
)
def test_json_that_means_two_things_or_none(sandbox, text, message):
    sandbox.put("base/config.json", text)
    ending = sandbox.run("merge_lora")
    assert ending.status == 2
    assert message in ending.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: *a\n", "aliases (*name) are not read"),
        ("precision: fp16\nprecision: fp32\n", "a key appears twice"),
        ("max_shard_size: " + "9" * 5000, "not valid YAML"),
        ("revision: 2024-99-99\n", "not valid YAML"),
        ("max_shard_size: 0x" + "f" * 5000, "max_shard_size: a number that is too long"),
        ("revision: !!timestamp x\n", "not valid YAML"),
        ("# " + "x" * 100_000, "over 100,000 bytes"),
    ],
)
def test_yaml_that_is_a_trap(sandbox, text, message):
    file = sandbox.put("c.yml", text.encode())
    ending = sandbox.run("merge_lora", "--config", str(file))
    assert ending.status == 2
    assert message in ending.err


def test_names_print_no_control_codes(sandbox, capsys):
    """Results, not only errors, name tensors that anybody may have named."""
    header, data = header_and_data(hostile.BASE)
    text = json.dumps(header).replace("b.weight", "\\u001b[31mb\\u202e.weight")
    sandbox.put("base/model.safetensors", file_bytes(text.encode(), data))
    (sandbox.home / "lora").rename(sandbox.home / "unused")
    base = str(sandbox.home / "base")
    main = importlib.import_module("visualize_model_structure").main
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's show what it has no letter for
        assert main(["--base_model", base, "--output_dir", str(sandbox.out)]) == 0
    shown = capsys.readouterr().out
    assert "?[31mb?.weight" in shown and "\x1b" not in shown
    ElementTree.parse(sandbox.out / "model_structure.svg")  # where it would be no XML


@pytest.mark.parametrize("architectures", [5, {"a": 1}, [[]], "x", [None], True])
def test_a_config_of_the_wrong_type_leaves_the_behaviour_out(sandbox, architectures):
    sandbox.put("base/config.json", json.dumps({**CONFIG, "architectures": architectures}).encode())
    import final_validation

    found = final_validation._behaviour(
        str(sandbox.home / "base"), str(sandbox.home / "lora"), [], None, "cpu", None
    )
    assert "no causal language model" in found["skipped"] or "not a causal" in found["skipped"]
