"""Step 1 against PEFT: the same bits, an error that is never larger, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import merge_lora
from taskvec import modelwriter
from taskvec.cli import UserError
from tests.checks import assert_same_bits, names, weights
from tests.models import FAMILIES, TARGETS, load, peft_merge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MANIFEST = "merge_manifest.json"


def merge(base, adapter, output, **options):
    return merge_lora.merge(str(base), str(adapter), output, device="cpu", **options)


# -- the same bits as PEFT ---------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", DTYPES)
def test_merged_tensors_are_pefts_bit_for_bit(tiny, tmp_path, family, precision):
    base = tiny.base(family)
    adapter = tiny.adapter(base)
    result = merge(base, adapter, tmp_path / "m", precision=precision, rounding="peft")
    theirs = peft_merge(base, adapter, DTYPES[precision]).state_dict()
    mine = weights(tmp_path / "m")
    assert set(mine) == set(load_file(base / "model.safetensors"))
    assert_same_bits(mine, theirs)
    changed = {name for name in mine if name in result.changed_parameters}
    assert len(changed) == 2 * len(TARGETS[family])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stored", ["fp16", "bf16"])
@pytest.mark.parametrize("precision", DTYPES)
def test_bases_stored_in_half_precision_merge_as_in_peft(tiny, tmp_path, family, stored, precision):
    base = tiny.base(family, dtype=DTYPES[stored])
    adapter = tiny.adapter(base)
    merge(base, adapter, tmp_path / "m", precision=precision, rounding="peft")
    theirs = peft_merge(base, adapter, DTYPES[precision]).state_dict()
    assert_same_bits(weights(tmp_path / "m"), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_both_roundings_are_pefts(tiny, tmp_path, family):
    base = tiny.base(family)
    adapter = tiny.adapter(base, lora_alpha=3)
    merge(base, adapter, tmp_path / "m")
    assert_same_bits(weights(tmp_path / "m"), peft_merge(base, adapter, torch.float32).state_dict())


SETTINGS = {
    "rsLoRA": {"use_rslora": True, "r": 5},
    "a scaling that is no power of two": {"r": 3, "lora_alpha": 10},
    "a scaling that is no fp32 number": {"r": 3, "lora_alpha": 0.1},
    "a negative alpha": {"lora_alpha": -5},
    "alpha zero": {"lora_alpha": 0},
    "rank one": {"r": 1},
    "a rank above the width": {"r": 40},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"v_proj": 3, r"layers\.0\..*": 11},
    },
    "large updates": {"scale": 30.0},
    "updates below half an ulp of the weights": {"scale": 1e-9},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_of_the_adapter_merges_as_in_peft(tiny, llama, tmp_path, settings):
    adapter = tiny.adapter(llama, **settings)
    for precision, dtype in DTYPES.items():
        merge(llama, adapter, tmp_path / "m", precision=precision, rounding="peft")
        assert_same_bits(weights(tmp_path / "m"), peft_merge(llama, adapter, dtype).state_dict())


@pytest.mark.parametrize("stored", ["fp16", "bf16"])
def test_adapters_stored_in_half_precision_merge_as_in_peft(
    llama, llama_lora, copied, tmp_path, stored
):
    adapter = copied(llama_lora)
    file = adapter / "adapter_model.safetensors"
    save_file({key: t.to(DTYPES[stored]) for key, t in load_file(file).items()}, file)
    for precision, dtype in DTYPES.items():
        merge(llama, adapter, tmp_path / "m", precision=precision, rounding="peft")
        assert_same_bits(weights(tmp_path / "m"), peft_merge(llama, adapter, dtype).state_dict())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_of_a_few_rows_give_the_same_bits(tiny, tmp_path, monkeypatch, family):
    base = tiny.base(family)
    adapter = tiny.adapter(base, lora_alpha=3)
    monkeypatch.setattr(modelwriter, "BLOCK_ELEMENTS", 100)
    merge(base, adapter, tmp_path / "m", precision="bf16", rounding="peft")
    theirs = peft_merge(base, adapter, torch.bfloat16).state_dict()
    assert_same_bits(weights(tmp_path / "m"), theirs)


def test_a_base_without_its_head_merges_with_an_adapter_trained_with_one(tiny, tmp_path):
    for family in ("llama", "gpt2"):
        base = tiny.base(family)
        adapter = tiny.adapter(base)
        load(base).base_model.save_pretrained(tmp_path / family)
        result = merge(tmp_path / family, adapter, tmp_path / "m")
        theirs = peft_merge(base, adapter, torch.float32).base_model.state_dict()
        assert_same_bits(weights(tmp_path / "m"), theirs)
        assert all(name in theirs for name in result.changed_parameters)
        info = AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)[1]
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_base_with_its_head_merges_with_an_adapter_trained_without_one(tiny, tmp_path):
    for family in ("llama", "gpt2"):
        base = tiny.base(family)
        config = LoraConfig(r=2, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")
        adapted = get_peft_model(AutoModel.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        adapted.save_pretrained(tmp_path / family)
        merge(base, tmp_path / family, tmp_path / "m")
        backbone = AutoModel.from_pretrained(base)
        theirs = PeftModel.from_pretrained(backbone, tmp_path / family).merge_and_unload()
        prefix = "transformer." if family == "gpt2" else "model."
        mine = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights(tmp_path / "m").items()
            if name.startswith(prefix)
        }
        assert_same_bits(mine, theirs.state_dict())


# -- rounding once -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("scale", [0.02, 0.0005])
def test_rounding_once_never_errs_more_than_peft(tiny, tmp_path, family, precision, scale):
    base = tiny.base(family)
    adapter = tiny.adapter(base, scale=scale)
    result = merge(base, adapter, tmp_path / "m", precision=precision)
    mine, theirs = (
        weights(tmp_path / "m"),
        peft_merge(base, adapter, DTYPES[precision]).state_dict(),
    )
    stored, factors = load_file(base / "model.safetensors"), weights(adapter)

    def error(merged, exact):
        return np.linalg.norm(merged.double().numpy() - exact)

    better = 0
    for name in result.changed_parameters:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        A, B = (factors[f"{key}.lora_{side}.weight"].double().numpy() for side in "AB")
        delta = 2.0 * (B @ A)
        exact = stored[name].double().numpy() + (delta.T if family == "gpt2" else delta)
        assert error(mine[name], exact) <= error(theirs[name], exact)
        better += error(mine[name], exact) < error(theirs[name], exact)
    assert better == len(result.changed_parameters)  # a base rounded first always costs something


def test_a_base_that_is_wider_than_fp32_is_added_in_its_own_width(llama, llama_lora, tmp_path):
    base = tmp_path / "double"
    shutil.copytree(llama, base)
    tensors = load_file(llama / "model.safetensors")
    wide = {name: tensor.double() * (1 + 2.0**-40) for name, tensor in tensors.items()}
    save_file(wide, base / "model.safetensors")
    result = merge(base, llama_lora, tmp_path / "m")
    factors, mine = weights(llama_lora), weights(tmp_path / "m")
    for name in result.changed_parameters:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        delta = (factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]) * 2.0
        assert torch.equal(mine[name], (wide[name] + delta.double()).float())


# -- the manifest ------------------------------------------------------------------


def test_the_manifest_says_what_was_merged(llama, llama_lora, tmp_path):
    result = merge(llama, llama_lora, tmp_path / "m", precision="bf16", rounding="peft")
    manifest = json.loads((tmp_path / "m" / MANIFEST).read_text())
    assert manifest["adapter"] == {
        name: {"sha256": hashlib.sha256((llama_lora / name).read_bytes()).hexdigest()}
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    file = llama / "model.safetensors"
    assert manifest["base"]["source"] == str(llama)
    assert manifest["base"]["files"]["model.safetensors"]["bytes"] == file.stat().st_size
    assert (manifest["precision"], manifest["rounding"]) == ("bf16", "peft")
    assert manifest["scaling"] == dict.fromkeys(result.changed_parameters, 2.0)
    assert manifest["parameters_changed"] == len(result.changed_parameters) == 6
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["files"] == names(tmp_path / "m")
    assert result.nbytes == sum(tensor.nbytes for tensor in weights(tmp_path / "m").values())


def test_the_manifest_records_the_hub_commit(hub, llama, llama_lora, tmp_path):
    commit = "89abcdef" * 5
    hub(llama, "tiny/merge-base", commit)
    hub(llama_lora, "tiny/merge-lora", commit)
    merge("tiny/merge-base", "tiny/merge-lora", tmp_path / "m", revision="main")
    manifest = json.loads((tmp_path / "m" / MANIFEST).read_text())
    assert manifest["base"]["source"] == "tiny/merge-base"
    assert manifest["base"]["revision"] == commit
    theirs = peft_merge(llama, llama_lora, torch.float32).state_dict()
    assert_same_bits(weights(tmp_path / "m"), theirs)


def test_a_new_merge_replaces_the_earlier_one_as_a_whole(tiny, llama, llama_lora, tmp_path):
    merge(tiny.base("llama", max_shard_size="20KB"), llama_lora, tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    merge(llama, llama_lora, tmp_path / "m", precision="fp16")
    assert names(tmp_path) == ["m"]
    assert names(tmp_path / "m") == [
        "config.json",
        "generation_config.json",
        MANIFEST,
        "model.safetensors",
    ]


def test_a_merge_to_which_somebody_added_a_file_is_not_replaced(llama, llama_lora, tmp_path):
    merge(llama, llama_lora, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    before = (tmp_path / "m" / "model.safetensors").stat()
    with pytest.raises(UserError, match="not an output of this script"):
        merge(llama, llama_lora, tmp_path / "m", precision="fp16")
    assert (tmp_path / "m" / "model.safetensors").stat() == before


# -- failures ----------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [False, True])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    llama, llama_lora, tmp_path, monkeypatch, capsys, earlier
):
    output = tmp_path / "out" / "m"
    output.parent.mkdir()
    if earlier:
        merge(llama, llama_lora, output)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written, pwrite = 0, os.pwrite

    def full(fd, data, offset):
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    flags = ["--base_model", str(llama), "--lora_path", str(llama_lora), "--device", "cpu"]
    assert merge_lora.main([*flags, "--output_dir", str(output)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f": error: No space left on device: {output}\n") and err.count("\n") == 1
    assert written > 5
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(output.parent) == (["m"] if earlier else [])


@pytest.mark.parametrize(
    ("precision", "alpha", "advice"),
    [
        ("fp16", 1e8, r"65504; use --precision bf16 or fp32"),
        ("bf16", 1e43, r"3\.38953e\+38; check the adapter's scaling"),
        ("fp32", 1e43, r"3\.40282e\+38; check the adapter's scaling"),
    ],
)
def test_a_sum_that_overflows_is_refused_by_name(llama, tiny, tmp_path, precision, alpha, advice):
    adapter = tiny.adapter(llama, lora_alpha=alpha)
    message = rf"_proj\.weight: \d+ values overflow {precision}, whose largest is {advice}"
    with pytest.raises(UserError, match=message):
        merge(llama, adapter, tmp_path / "m", precision=precision)
    assert names(tmp_path) == []


def test_a_base_weight_that_overflows_fp16_is_refused_by_name(llama, llama_lora, copied, tmp_path):
    base = copied(llama)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 65520.0  # rounds to infinity; 65519 would round to 65504
    save_file(tensors, base / "model.safetensors")
    message = (
        r"model\.norm\.weight: 1 values overflow fp16, whose largest is 65504; use --precision"
    )
    with pytest.raises(UserError, match=message):
        merge(base, llama_lora, tmp_path / "m", precision="fp16")
    tensors["model.norm.weight"][3] = 65519.0
    save_file(tensors, base / "model.safetensors")
    merge(base, llama_lora, tmp_path / "m", precision="fp16")
    assert weights(tmp_path / "m")["model.norm.weight"][3] == 65504.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_changed_weight_that_is_not_finite_in_the_base_is_refused(
    llama, llama_lora, copied, tmp_path, value
):
    base = copied(llama)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][1, 1] = value
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(
        UserError, match=r"model\.safetensors: .*q_proj\.weight: holds NaN or infini"
    ):
        merge(base, llama_lora, tmp_path / "m")
    assert names(tmp_path) == [base.name]


# -- what is printed ---------------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPES)
def test_the_last_lines_are_those_documented(
    llama, llama_lora, tmp_path, monkeypatch, capsys, precision
):
    monkeypatch.chdir(tmp_path)
    flags = ["--base_model", str(llama), "--lora_path", str(llama_lora), "--device", "cpu"]
    flags += ["--output_dir", f"merged_model_{precision}/", "--precision", precision]
    assert merge_lora.main(flags) == 0
    out = capsys.readouterr().out
    lines = (
        "✅ Model merging completed successfully!\n"
        f"📊 Model precision: {precision.upper()}\n"
        f"📁 Merged model saved to: merged_model_{precision}/\n"
    )
    assert out.endswith(lines)
    assert merge_lora.main([*flags, "--quiet"]) == 0
    assert capsys.readouterr() == (lines, "")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_base_of_16_bits_is_told_what_fp32_takes(tiny, tmp_path, capsys, stored):
    """People are surprised by merged models twice as large as the base."""
    base, other = tiny.base(dtype=stored), tiny.base()
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[stored]
    for source, precision, told in ((base, "fp32", 1), (base, name, 0), (other, "fp32", 0)):
        merge(source, tiny.adapter(other), tmp_path / "m", precision=precision)
        assert capsys.readouterr().err.count(f"stored in {name}, and fp32 takes twice") == told
        if source == base:
            sizes = [(d / "model.safetensors").stat().st_size for d in (tmp_path / "m", base)]
            assert sizes[0] / sizes[1] == pytest.approx(2 if told else 1, rel=0.1)


def test_it_runs_from_any_directory_as_a_program(llama, llama_lora, tmp_path):
    script = Path(merge_lora.__file__)
    command = [sys.executable, str(script), "--base_model", str(llama), "--quiet"]
    command += ["--lora_path", str(llama_lora), "--output_dir", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"✅ .*\n📊 .*: FP32\n📁 .*: here/\n", done.stdout)
    assert names(tmp_path) == ["here"]
