"""What a user can get wrong in steps 1 and 2: one clear line, status 2, and nothing written."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import extract_task_vectors
import merge_lora
from tests.checks import edit_json, edit_tensors

ROOT = Path(__file__).parents[1]
INDEX = "model.safetensors.index.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


class World:
    """A directory with a good base, adapter and tuned model, and the ways to spoil them.

    Every method returns the flags of the command that is to fail.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.base, self.lora, self.tuned, self.out = (
            home / name for name in ("base", "lora", "tuned", "out")
        )

    def merge(self, **flags):
        return self._flags({"base_model": self.base, "lora_path": self.lora} | flags)

    def extract(self, **flags):
        return self._flags({"base_model": self.base, "finetuned_model": self.tuned} | flags)

    def _flags(self, flags):
        flags = {"output_dir": self.out, "device": "cpu"} | flags
        return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]

    def lora_config(self, **changes):
        return self._edit_json(self.lora / "adapter_config.json", changes)

    def base_config(self, **changes):
        return self._edit_json(self.base / "config.json", changes)

    def index(self, **changes):
        return self._edit_json(self.base / INDEX, changes)

    def _edit_json(self, file, changes):
        edit_json(file, **changes)
        return self.merge()

    def factors(self, change):
        """Change the adapter's tensors in place."""
        edit_tensors(self.lora / "adapter_model.safetensors", change)
        return self.merge()

    def shard(self, keep):
        """Keep so many bytes of the base's second shard; None: remove it."""
        file = sorted(self.base.glob("model-*"))[1]
        if keep is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:keep])
        return self.merge()

    def put(self, path, content=""):
        """Write a text file; returns its path."""
        file = self.home / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        return file

    def with_file(self, path, content, script, **flags):
        self.put(path, content)
        return getattr(self, script)(**flags)

    def snapshot(self):
        """Every path and, for a file, its content."""
        paths = self.home.rglob("*")
        return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def world(tiny, llama_lora, tmp_path):
    sharded = tiny.base("llama", max_shard_size="20KB")
    for source, name in ((sharded, "base"), (sharded, "tuned"), (llama_lora, "lora")):
        shutil.copytree(source, tmp_path / name)
    return World(tmp_path)


def a_module_too_many(tensors):
    for side in "AB":
        new = f"base_model.model.model.layers.7.mlp.up_proj.lora_{side}.weight"
        tensors[new] = tensors[f"{Q0}.lora_{side}.weight"].clone()


def linked(world):
    (world.home / "link").symlink_to(world.base)
    return world.merge(output_dir=world.home / "link")


def a_model_as_output(world):
    shutil.copytree(world.base, world.out)
    return world.merge()


def with_shard_size(size, world):
    return [*world.merge(), f"--max_shard_size={size}"]


def on_device(device, world, script):
    return getattr(world, script)(device=device)


def truncated(world, script, file):
    file.write_bytes(file.read_bytes()[:-2])
    return getattr(world, script)()


SHARD = r"base/model-00002-of-\d+\.safetensors"
NO_REAL_SIZE = "give a size such as 5GB or 500MB"

# What the user did, and what the line must say.
MERGE: dict[str, tuple[Any, str]] = {
    # paths
    "base not there": (
        lambda w: w.merge(base_model="/nowhere"),
        r"/nowhere: no such file or directory\. `python final_validation\.py` without arguments",
    ),
    "adapter not there": (
        lambda w: w.merge(lora_path="./nolora"),
        r"\./nolora: no such file or directory",
    ),
    "adapter a file": (
        lambda w: w.merge(lora_path=w.lora / "adapter_model.safetensors"),
        r"adapter_model\.safetensors: is a file; give the adapter's directory",
    ),
    "base on an offline hub": (
        lambda w: w.merge(base_model="bigcode/starcoder2-3b"),
        r"bigcode/starcoder2-3b: no such directory, and the hub cannot be reached; needed from .* "
        r"are .*model\*\.safetensors\. `python final_validation\.py` without arguments runs the",
    ),
    "adapter on an offline hub": (
        lambda w: w.merge(lora_path="a/b"),
        r"a/b: .* needed from https://huggingface\.co/a/b are adapter_config\.json, adapter_model",
    ),
    "impossible hub id": (
        lambda w: w.merge(base_model="a b/c"),
        "a b/c: no such directory, and not a valid hub id",
    ),
    "revision of a local base": (
        lambda w: w.merge(revision="main"),
        "--revision main: only a hub id has revisions",
    ),
    "adapter as base": (
        lambda w: w.merge(base_model=w.lora),
        "lora: is an adapter, not a model; give it as --lora_path",
    ),
    "empty .bin base": (
        lambda w: w.merge(base_model=w.put("pickled/pytorch_model.bin").parent),
        r"pytorch_model\.bin: no state dict that torch can read: ",
    ),
    # damaged bases
    "shard missing": (lambda w: w.shard(None), rf"{SHARD}: named in {INDEX} but not there"),
    "shard truncated": (
        lambda w: w.shard(-1),
        rf"{SHARD}: truncated: \d+ bytes, the header descri",
    ),
    "shard cut in its header": (
        lambda w: w.shard(20),
        rf"{SHARD}: truncated, or not a safetensors",
    ),
    "shard empty": (lambda w: w.shard(0), rf"{SHARD}: truncated, or not .* \(0 bytes\)"),
    "index to another directory": (
        lambda w: w.index(weight_map={"a": "../lora/x"}),
        r"'\.\./lora/x' is not the name of a file beside it",
    ),
    "index to the root": (
        lambda w: w.index(weight_map={"a": "/etc/passwd"}),
        "'/etc/passwd' is not the name of a file beside it",
    ),
    "index without a map": (lambda w: w.index(weight_map={}), rf"{INDEX}: has no weight_map"),
    "index not JSON": (
        lambda w: w.with_file(f"base/{INDEX}", "{]", "merge"),
        rf"base/{INDEX}: not valid JSON",
    ),
    "config not JSON": (
        lambda w: w.with_file("base/config.json", "{]", "merge"),
        r"base/config\.json: not valid JSON",
    ),
    "base quantised": (
        lambda w: w.base_config(quantization_config={"quant_method": "gptq"}),
        r"base: is quantised \(gptq\); use the unquantised base that it was made from",
    ),
    # unsuitable adapters
    "adapter without config": (
        lambda w: (w.lora / "adapter_config.json").unlink() or w.merge(),
        r"lora: holds no adapter_config\.json, so its scaling is unknown",
    ),
    "adapter without weights": (
        lambda w: (w.lora / "adapter_model.safetensors").unlink() or w.merge(),
        r"lora: holds no adapter_model\.safetensors; PEFT's save_pretrained\(\) writes one",
    ),
    "adapter config not JSON": (
        lambda w: w.with_file("lora/adapter_config.json", "r: 8", "merge"),
        r"adapter_config\.json: not valid JSON",
    ),
    "adapter truncated": (
        lambda w: truncated(w, "merge", w.lora / "adapter_model.safetensors"),
        r"adapter_model\.safetensors: truncated",
    ),
    "A without its B": (
        lambda w: w.factors(lambda t: t.pop(f"{Q0}.lora_B.weight")),
        r"adapter_model\.safetensors: .*q_proj has lora_A but no lora_B",
    ),
    "shapes that do not fit": (
        lambda w: w.factors(lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 30)})),
        r"q_proj: B @ A is \(32, 30\), but model\.layers\.0\.self_attn\.q_proj\.weight in \S+ is "
        r"\(32, 32\)",
    ),
    "another rank than configured": (
        lambda w: w.lora_config(rank_pattern={"q_proj": 2}),
        r"q_proj: lora_A \(4, 32\) and lora_B \(32, 4\) do not have the rank 2 of adapter_config",
    ),
    "module that the base has not got": (
        lambda w: w.factors(a_module_too_many),
        r"adapts model\.layers\.7\.mlp\.up_proj, which \S+base has not got",
    ),
    "NaN in an adapter": (
        lambda w: w.factors(lambda t: t[f"{Q0}.lora_B.weight"][5, 1].fill_(math.nan)),
        r"q_proj\.lora_B\.weight: 1 values are NaN or infinite",
    ),
    "infinity in an adapter": (
        lambda w: w.factors(lambda t: t[f"{Q0}.lora_A.weight"][0].fill_(math.inf)),
        r"q_proj\.lora_A\.weight: 32 values are NaN or infinite",
    ),
    "DoRA without magnitudes": (
        lambda w: w.lora_config(use_dora=True),
        "has no lora_magnitude_vector, but use_dora is True",
    ),
    "PiSSA": (
        lambda w: w.lora_config(init_lora_weights="pissa"),
        "init_lora_weights is 'pissa', which changes the base itself; save it as plain LoRA first",
    ),
    "IA3": (lambda w: w.lora_config(peft_type="IA3"), "peft_type is 'IA3': only LORA is supported"),
    "biases of some": (lambda w: w.lora_config(bias="some"), "bias is 'some', not none, all or"),
    "fp16 overflow": (
        lambda w: [*w.lora_config(lora_alpha=1e9), "--precision", "fp16"],
        r"_proj\.weight: \d+ values overflow fp16, whose .* use --precision bf16 or fp32",
    ),
    # flags
    "precision unknown": (
        lambda w: w.merge(precision="fp8"),
        r"argument --precision: invalid choice: 'fp8' .*\(--help lists the flags\)",
    ),
    "rounding unknown": (
        lambda w: w.merge(rounding="twice"),
        "argument --rounding: invalid choice: 'twice'",
    ),
    "flag without its value": (lambda w: ["--precision"], "--precision: expected one argument"),
    "word too many": (lambda w: ["out", *w.merge()], "unrecognized arguments: out"),
    "second adapter missing": (
        lambda w: [*w.merge(), "--lora_path", str(w.lora), f"{w.home}/no"],
        "no: no such",
    ),
    **{
        f"max_shard_size {size:.9}": (
            partial(with_shard_size, size),
            NO_REAL_SIZE,
        )
        for size in ("", "0", "-1GB", "1XB", "GB", "5 G B", "1e9", "nan", "inf", ".1B", "9" * 400)
    },
    "YAML key unknown": (
        lambda w: w.merge(config=w.put("c.yml", "presicion: fp16\n")),
        r"c\.yml: unknown key 'presicion'; did you mean 'precision'\?",
    ),
    "config not there": (lambda w: w.merge(config=w.home / "c.yml"), r"c\.yml: no such file"),
    # outputs
    "output holds something else": (
        lambda w: w.with_file("out/thesis.tex", "years of work", "merge"),
        r"out: holds thesis\.tex, which is not an output of this script; choose another --output",
    ),
    "output holds another model": (
        a_model_as_output,
        r"out: holds config\.json, which is not an output of this script",
    ),
    "output holds a damaged manifest": (
        lambda w: w.with_file("out/merge_manifest.json", "{", "merge"),
        r"out/merge_manifest\.json: not valid JSON",
    ),
    "output holds a manifest of another kind": (
        lambda w: w.with_file("out/merge_manifest.json", '{"files": [["x"]]}', "merge"),
        r"out: holds merge_manifest\.json, which is not an output of this script",
    ),
    "output the adapter": (lambda w: w.merge(output_dir=w.lora), "lora: is, holds or lies inside"),
    "output the base by a link": (linked, "base: is, holds or lies inside the input"),
}

EXTRACT: dict[str, tuple[Any, str]] = {
    "tuned not there": (
        lambda w: w.extract(finetuned_model="/nowhere"),
        "/nowhere: no such file or directory",
    ),
    "tuned truncated": (
        lambda w: truncated(w, "extract", sorted(w.tuned.glob("model-*"))[0]),
        r"tuned/model-00001-of-\d+\.safetensors: truncated",
    ),
    "adapter as tuned model": (
        lambda w: w.extract(finetuned_model=w.lora / "adapter_model.safetensors"),
        r"adapter_model\.safetensors: is an adapter, not a model; give it as --lora_path",
    ),
    "base precision unknown": (
        lambda w: w.extract(base_precision="int8"),
        "argument --base_precision: invalid choice: 'int8'",
    ),
    "flag of another script": (
        lambda w: w.extract(lora_path="x"),
        "unrecognized arguments: --lora_path x",
    ),
    "YAML value unknown": (
        lambda w: w.extract(config=w.put("c.yml", "base_precision: fp64\n")),
        "argument --base_precision: invalid choice: 'fp64'",
    ),
    "YAML switch no boolean": (
        lambda w: w.extract(config=w.put("c.yml", "trust_remote_code: maybe\n")),
        r"c\.yml: trust_remote_code is true or false, not 'maybe'",
    ),
    "output holds something else": (
        lambda w: w.with_file("out/thesis.tex", "years of work", "extract"),
        r"out: holds thesis\.tex, which is not an output of this script",
    ),
    "output the tuned model": (
        lambda w: w.extract(output_dir=w.tuned),
        "tuned: is, holds or lies inside the input",
    ),
}

BOTH: dict[str, tuple[Any, str]] = {
    "output a file": (
        lambda w, script: w.with_file("out", "mine", script),
        "out: is a file; choose another --output_dir",
    ),
    "output below a file": (
        lambda w, script: w.with_file("file", "mine", script, output_dir=w.home / "file" / "out"),
        r"(Not a directory|File exists): \S*/file",
    ),
    "output the base": (
        lambda w, script: getattr(w, script)(output_dir=w.base),
        "base: is, holds or lies inside the input",
    ),
    "output inside the base": (
        lambda w, script: getattr(w, script)(output_dir=w.base / "out"),
        "base/out: is, holds or lies inside the input",
    ),
    "output around the base": (
        lambda w, script: getattr(w, script)(output_dir=w.home),
        "is, holds or lies inside the input",
    ),
    **{
        f"device {device!r}": (
            partial(on_device, device),
            rf"--device {device}: (PyTorch sees \d+ GPU|not a device; use|only cpu and cuda)",
        )
        for device in ("cuda:99", "nonsense", "mps", "")
    },
}


def check(main, argv, message, world, before, capsys):
    status = main(argv)
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert re.search(rf": error: .*({message})", err), err
    assert world.snapshot() == before


@pytest.mark.parametrize("name", [*MERGE, *BOTH])
def test_merging_stops_with_one_line_and_writes_nothing(name, world, capsys):
    prepare, message = (MERGE | BOTH)[name]
    argv = prepare(world) if name in MERGE else prepare(world, "merge")
    check(merge_lora.main, argv, message, world, world.snapshot(), capsys)


@pytest.mark.parametrize("name", [*EXTRACT, *BOTH])
def test_extracting_stops_with_one_line_and_writes_nothing(name, world, capsys):
    prepare, message = (EXTRACT | BOTH)[name]
    argv = prepare(world) if name in EXTRACT else prepare(world, "extract")
    check(extract_task_vectors.main, argv, message, world, world.snapshot(), capsys)


def test_without_a_mistake_both_steps_succeed(world, capsys):
    """Else the cases above could fail for another reason than the one they are about."""
    assert merge_lora.main(world.merge()) == 0
    assert extract_task_vectors.main(world.extract(output_dir=world.home / "vector")) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["base not there", "shapes that do not fit", "YAML key unknown"])
def test_the_program_itself_shows_no_traceback(name, world):
    prepare, message = MERGE[name]
    command = [sys.executable, str(ROOT / "merge_lora.py"), *prepare(world)]
    done = subprocess.run(command, cwd=world.home, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"merge_lora\.py: error: .*({message}).*\n", done.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_a_gpu_that_is_not_there(world, capsys):
    assert merge_lora.main(world.merge(device="cuda:0")) == 2
    err = capsys.readouterr().err
    assert "--device cuda:0: PyTorch sees 0 GPU(s); use --device cpu or install a CUDA build" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_to(world, capsys):
    locked = world.home / "locked"
    locked.mkdir(mode=0o555)
    assert merge_lora.main(world.merge(output_dir=locked / "out")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Permission denied: " in err
    assert not any(locked.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(world, capsys):
    file = world.lora / "adapter_model.safetensors"
    file.chmod(0)
    assert merge_lora.main(world.merge()) == 2
    assert capsys.readouterr().err.endswith(f": error: Permission denied: {file}\n")
