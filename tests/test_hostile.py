"""Inputs made to do harm, and places where an output must not go."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

import merge_lora
from tests import hostile, system_calls
from tests.checks import names
from tests.faults import Commands
from tests.hostile import CONFIG, Sandbox, file_bytes, header_and_data

MIB = 1 << 20


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path / "home")


# -- pickles -------------------------------------------------------------------


class Call:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def save_as_zip(mark, file):
    torch.save({"a.weight": Call(mark)}, file)


def save_as_before_1_6(mark, file):
    torch.save({"a.weight": Call(mark)}, file, _use_new_zipfile_serialization=False)


def save_as_pickle(mark, file):
    file.write_bytes(pickle.dumps({"a.weight": Call(mark)}))


SAVES = [save_as_zip, save_as_before_1_6, save_as_pickle]
BESIDE = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.pkl"]


def test_the_pickles_of_these_tests_do_what_they_are_made_for(tmp_path):
    for save in SAVES:
        save(tmp_path / "mark", tmp_path / "x.bin")
        if save is save_as_pickle:
            pickle.loads((tmp_path / "x.bin").read_bytes())
        else:
            torch.load(tmp_path / "x.bin", weights_only=False)
        (tmp_path / "mark").rmdir()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    ("script", "replaced", "name"),
    [
        ("merge_lora", "base/model.safetensors", "base/pytorch_model.bin"),
        ("merge_lora", "lora/adapter_model.safetensors", "lora/adapter_model.bin"),
        ("debug_lora_structure", "lora/adapter_model.safetensors", "lora/adapter_model.bin"),
        ("compare_lora_task_vector", "base/model.safetensors", "base/pytorch_model.bin"),
        ("compare_lora_task_vector", "lora/adapter_model.safetensors", "lora/adapter_model.bin"),
    ],
)
def test_a_pickle_that_calls_something_is_refused_and_not_run(
    sandbox, tmp_path, save, script, replaced, name
):
    (sandbox.home / replaced).unlink()
    save(tmp_path / "mark", sandbox.home / name)
    ending = sandbox.run(script)
    assert ending.status == 2
    assert Path(name).name in ending.err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("save", SAVES)
def test_pickles_beside_what_is_read_are_left_alone(sandbox, tmp_path, save):
    for directory in ("base", "lora"):
        for name in [*BESIDE, "pytorch_model.bin", "adapter_model.bin"]:
            save(tmp_path / "mark", sandbox.home / directory / name)
    for script in ("merge_lora", "compare_lora_task_vector", "debug_lora_structure"):
        assert sandbox.run(script).status == 0
        assert not (tmp_path / "mark").exists()
        sandbox.clear()


def test_a_bin_file_that_repeats_few_bytes_without_end_is_refused(sandbox):
    """A view of one element as 10^15: its file is small, its copy is not."""
    (sandbox.home / "base" / "model.safetensors").unlink()
    torch.save(
        {"a.weight": torch.ones(1).expand(10**9, 10**6)}, sandbox.home / "base/pytorch_model.bin"
    )
    ending = sandbox.run("merge_lora")
    assert ending.status == 2
    assert "a.weight: claims more elements than the file holds" in ending.err


# -- sizes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands():
    if reason := system_calls.why_not():
        pytest.skip(reason)
    with Commands() as server:
        yield server


def sparse(file, size, start=b""):
    with file.open("wb") as target:
        target.write(start)
        target.truncate(size)


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
    assert main(["--base_model", base, "--output_dir", str(sandbox.out)]) == 0
    shown = capsys.readouterr().out
    assert "?[31mb?.weight" in shown and "\x1b" not in shown


# -- links, names and places -----------------------------------------------------


def test_a_link_out_of_the_model_is_pointed_out(sandbox, capsys):
    secret = sandbox.put("secret", b"not for the model")
    (sandbox.home / "base" / "tokenizer.json").symlink_to(secret)
    ending = sandbox.run("merge_lora")
    assert ending.status == 0
    assert f"tokenizer.json is a link: what it leads to, {secret.resolve()}" in ending.err


def test_the_links_of_the_hubs_cache_need_no_remark(sandbox, hub, tmp_path, monkeypatch):
    sandbox.put("base/tokenizer.json", b"{}")
    base = hub(sandbox.home / "base", "tests/linked-base", "c" * 40)
    lora = hub(sandbox.home / "lora", "tests/linked-lora", "d" * 40)
    words = ["--base_model", base, "--lora_path", lora, "--output_dir", str(sandbox.out)]
    ending = hostile.run_main(merge_lora.main, [*words, "--device", "cpu", "--quiet"])
    assert (ending.status, ending.err) == (0, "")
    from_cache = {name: (sandbox.out / name).read_bytes() for name in names(sandbox.out)}
    assert sandbox.run("merge_lora").status == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert not (sandbox.out / name).is_symlink()
        assert (sandbox.out / name).read_bytes() == from_cache[name]


@pytest.mark.parametrize("place", ["with spaces in it", "größe-模型-🧪", "-dash", "a'b\"c$d"])
def test_any_name_that_a_directory_can_have(tmp_path, place):
    sandbox = Sandbox(tmp_path / place / "home")
    for script in ("merge_lora", "extract_task_vectors", "compare_lora_task_vector"):
        assert sandbox.run(script).status == 0
        assert sandbox.out.is_dir()


WRITERS = {
    "merge_lora": ["base", "lora"],
    "extract_task_vectors": ["base"],
    "compare_lora_task_vector": ["base", "lora"],
    "debug_lora_structure": ["base", "lora"],
    "visualize_model_structure": ["base", "lora"],
    "investigate_parameter_changes": ["base", "lora"],
    "quick_precision_test": ["base", "lora"],
    "analyze_lora_vs_task_vector_math": ["base"],
}


@pytest.mark.parametrize("script", WRITERS)
@pytest.mark.parametrize("where", ["{}", "{}/out", "{}/new/out", ".", "link-{}", "link-{}/out"])
def test_no_output_on_in_or_around_an_input(sandbox, script, where):
    for directory in WRITERS[script]:
        link = sandbox.home / f"link-{directory}"
        link.symlink_to(sandbox.home / directory)
        output = sandbox.home / where.format(directory)
        before = sandbox.contents()
        ending = hostile.run_main(
            importlib.import_module(script).main,
            [*sandbox.words(script)[:-2], "--output_dir", str(output)],
        )
        assert ending.status == 2
        assert "is, holds or lies inside the input" in ending.err
        assert sandbox.contents() == before
        link.unlink()


@pytest.mark.parametrize("where", ["base", "base/out", "link", "link/out", "lora/out"])
def test_the_whole_chain_writes_into_no_input(sandbox, where):
    (sandbox.home / "link").symlink_to(sandbox.home / "base")
    before = sandbox.contents()
    words = ["--base_model", str(sandbox.home / "base"), "--lora_path", str(sandbox.home / "lora")]
    ending = hostile.run_main(
        importlib.import_module("final_validation").main,
        [*words, "--output_dir", str(sandbox.home / where), "--device", "cpu", "--quiet"],
    )
    assert ending.status == 2
    assert "is, holds or lies inside the input" in ending.err
    assert sandbox.contents() == before


@pytest.mark.parametrize("architectures", [5, {"a": 1}, [[]], "x", [None], True])
def test_a_config_of_the_wrong_type_leaves_the_behaviour_out(sandbox, architectures):
    sandbox.put("base/config.json", json.dumps({**CONFIG, "architectures": architectures}).encode())
    import final_validation

    found = final_validation._behaviour(
        str(sandbox.home / "base"), str(sandbox.home / "lora"), [], None, "cpu", None
    )
    assert "no causal language model" in found["skipped"] or "not a causal" in found["skipped"]
