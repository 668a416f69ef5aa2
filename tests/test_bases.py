"""Bases as people have them: in which files, dtypes and under which names they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import final_validation
from extract_task_vectors import extract
from merge_lora import merge
from taskvec.checkpoint import open_checkpoint
from taskvec.cli import UserError
from tests.checks import assert_same_bits, edit_json, edit_tensors, names, weights
from tests.models import load, peft_merge
from tests.stored import as_bin, certify

# -- pickled weights ---------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_file_merges_like_the_same_weights_in_safetensors(
    llama, llama_lora, tmp_path, shards, zipped
):
    base = as_bin(llama, tmp_path / "bin", shards=shards, _use_new_zipfile_serialization=zipped)
    merge(str(base), str(llama_lora), tmp_path / "m", precision="bf16", device="cpu")
    merge(str(llama), str(llama_lora), tmp_path / "safe", precision="bf16", device="cpu")
    mine = weights(tmp_path / "m")
    assert mine.keys() == weights(tmp_path / "safe").keys()
    assert_same_bits(mine, weights(tmp_path / "safe"))
    files = [name for name in names(tmp_path / "m") if name.endswith(".safetensors")]
    assert files == (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    )
    assert_same_bits(mine, load(tmp_path / "m", torch.bfloat16).state_dict())
    assert certify(base, llama_lora, tmp_path / "m", tmp_path) == ["exact", "exact"]


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_a_bin_file_are_read_row_by_row(tmp_path, zipped):
    weight = torch.randn(40, 6)
    tensors = {
        "weight": weight,
        "shared": weight[3:9],  # part of another's memory
        "columns": weight.T if not zipped else weight.T.contiguous(),
        "parameter": torch.nn.Parameter(torch.randn(5).half()),
        "scalar": torch.tensor(7),
        "mask": torch.ones(3, 3, dtype=torch.bool),
        "empty": torch.zeros(0, 4),
        "bfloat16": torch.randn(9).bfloat16(),
    }
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(str(file)) as model:
        assert list(model.tensors) == list(tensors)
        for name, wanted in tensors.items():
            found = model.read(name)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
        assert torch.equal(model.read("weight", 7, 11), weight[7:11])
        assert torch.equal(model.read("shared", 1, 2), weight[4:5])


def test_transposed_tensors_in_a_bin_file_are_read_as_they_are_indexed(tmp_path):
    weight = torch.randn(4, 6)
    torch.save({"weight": weight.T}, tmp_path / "pytorch_model.bin")
    with open_checkpoint(str(tmp_path / "pytorch_model.bin")) as model:
        assert torch.equal(model.read("weight", 2, 5), weight.T[2:5])


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(llama, tmp_path, zipped):
    mark = tmp_path / "it ran"
    tensors = weights(llama) | {"model.extra": Harmful(mark)}
    base = as_bin(llama, tmp_path / "bin", tensors, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: .*is not unpickled; get the model"):
        with open_checkpoint(str(base)):
            pass
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no state dict that torch can read"),
        (b"\x80\x04", "no state dict that torch can read"),
        (b"PK\x03\x04" + bytes(100), "no state dict that torch can read"),
        ([torch.ones(3)], "holds a list, not tensors by name"),
        ({"step": 3}, "step: is a int; only plain tensors by name"),
        ({"model": {"weight": torch.ones(3)}}, "model: is a dict; only plain tensors by name"),
        (
            {"weight": torch.ones(3).to_sparse()},
            r"wants to call torch\._utils\._rebuild_sparse_tensor",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, message):
    file = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=rf"pytorch_model\.bin: {message}"):
        with open_checkpoint(str(tmp_path)):
            pass


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.9, 0.999])
def test_a_truncated_bin_file_is_refused(llama, tmp_path, kept):
    base = as_bin(llama, tmp_path / "bin")
    file = base / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(UserError, match="no state dict that torch can read"):
        with open_checkpoint(str(base)):
            pass


def test_safetensors_are_preferred_to_a_bin_file_beside_them(llama, tiny, copied):
    base = copied(llama)
    torch.save(weights(tiny.base("llama", seed=5)), base / "pytorch_model.bin")
    with open_checkpoint(str(base)) as model:
        assert [path.name for path in model.paths[0].glob("*.bin")] == ["pytorch_model.bin"]
        assert all(torch.equal(model.read(name), wanted) for name, wanted in weights(llama).items())


def test_a_hub_model_without_safetensors_is_read_from_its_bin_file(hub, llama, tmp_path):
    hub(as_bin(llama, tmp_path / "bin"), "tiny/bin", "3" * 40)
    with open_checkpoint("tiny/bin") as model:
        assert torch.equal(model.read("model.norm.weight"), weights(llama)["model.norm.weight"])


# -- dtypes ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_base_of_several_dtypes_merges_as_in_peft(llama, llama_lora, copied, tmp_path, precision):
    base = copied(llama)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    file = base / "model.safetensors"
    mixed = {
        name: tensor.to(dtypes[index % 3])
        for index, (name, tensor) in enumerate(load_file(file).items())
    }
    save_file(mixed, file, metadata={"format": "pt"})
    merge(
        str(base),
        str(llama_lora),
        tmp_path / "m",
        precision=precision,
        rounding="peft",
        device="cpu",
    )
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert_same_bits(weights(tmp_path / "m"), peft_merge(base, llama_lora, dtype).state_dict())
    assert certify(base, llama_lora, tmp_path / "m", tmp_path) == ["exact", "exact"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_storing_a_float64_base_in_any_format_is_a_cast(
    llama, llama_lora, copied, tmp_path, precision
):
    base = copied(llama)
    edit_tensors(
        base / "model.safetensors",
        lambda tensors: tensors.update({n: t.double() * (1 + 1e-9) for n, t in tensors.items()}),
    )
    merge(str(base), str(llama_lora), tmp_path / "m", precision=precision, device="cpu")
    assert certify(base, llama_lora, tmp_path / "m", tmp_path) == ["exact", "exact"]


def test_what_transformers_keeps_in_fp32_stays_in_fp32(tiny, tmp_path):
    base = tiny.base("t5")
    adapter = tiny.adapter(base)
    for precision, kept in (("fp16", torch.float32), ("bf16", torch.bfloat16)):
        merge(str(base), str(adapter), tmp_path / precision, precision=precision, device="cpu")
        found = weights(tmp_path / precision)
        wo = {tensor.dtype for name, tensor in found.items() if name.endswith(".wo.weight")}
        assert wo == {kept}
        assert {t.dtype for name, t in found.items() if ".wo." not in name} == {
            torch.float16 if precision == "fp16" else torch.bfloat16
        }


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "model.position_ids": torch.arange(9)[None],
    "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
    "model.layers.1.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
}


@pytest.mark.parametrize("shards", [1, 2])
def test_buffers_are_carried_through_and_may_be_missing_in_one_of_the_models(
    llama, llama_lora, tmp_path, capsys, shards
):
    base = as_bin(llama, tmp_path / "bin", weights(llama) | BUFFERS, shards=shards)
    merge(str(base), str(llama_lora), tmp_path / "m", device="cpu")
    assert_same_bits(BUFFERS, weights(tmp_path / "m"))
    assert certify(base, llama_lora, tmp_path / "m", tmp_path) == ["exact", "exact"]
    peft_merge(llama, llama_lora, torch.float32).save_pretrained(tmp_path / "theirs")
    capsys.readouterr()
    for one, other in ((base, tmp_path / "theirs"), (llama, tmp_path / "m")):
        assert certify(one, llama_lora, other, tmp_path) == ["exact", "exact"]
        assert "leaves out the buffer model." in capsys.readouterr().err


def test_a_trained_bias_with_the_name_of_a_mask_is_not_taken_for_one(llama, tmp_path):
    extra = {"model.layers.0.attn.bias": torch.ones(32)}
    base = as_bin(llama, tmp_path / "bin", weights(llama) | extra)
    with pytest.raises(UserError, match=r"has no model\.layers\.0\.attn\.bias, which"):
        extract(str(base), str(llama), tmp_path / "tv", device="cpu")
    with pytest.raises(UserError, match=r"has no model\.layers\.0\.attn\.bias, which"):
        extract(str(llama), str(base), tmp_path / "tv", device="cpu")


# -- quantised bases ---------------------------------------------------------------

QUANTISED = {
    "model.layers.0.self_attn.q_proj.qweight": (torch.ones(4, 32, dtype=torch.int32), "GPTQ or"),
    "model.layers.0.self_attn.q_proj.weight.absmax": (torch.ones(9), "bitsandbytes, 4 bits"),
    "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4": (
        torch.ones(9, dtype=torch.uint8),
        "bitsandbytes, 4 bits",
    ),
    "model.layers.0.self_attn.q_proj.SCB": (torch.ones(9), "bitsandbytes, 8 bits"),
    "model.layers.0.self_attn.q_proj.weight_packed": (
        torch.ones(9, dtype=torch.int32),
        "compressed-tensors",
    ),
    "model.layers.0.self_attn.q_proj.weight_scale_inv": (torch.ones(1, 1), "fp8 or"),
    "model.layers.0.self_attn.q_proj.weight": (torch.ones(32, 32).to(torch.float8_e4m3fn), "fp8"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_is_recognised_by_its_tensors(llama, llama_lora, copied, tmp_path, name):
    base = copied(llama)
    tensor, method = QUANTISED[name]
    save_file(load_file(llama / "model.safetensors") | {name: tensor}, base / "model.safetensors")
    message = rf"is quantised \({method}.*\); use the unquantised base that it was made from"
    with pytest.raises(UserError, match=message):
        merge(str(base), str(llama_lora), tmp_path / "m", device="cpu")
    for one, other in ((base, llama), (llama, base)):
        with pytest.raises(UserError, match=message):
            extract(str(one), str(other), tmp_path / "tv", device="cpu")


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors"])
def test_a_quantised_base_is_recognised_by_its_config(llama, llama_lora, copied, part, method):
    base = copied(llama)
    found = {"quantization_config": {"quant_method": method}}
    edit_json(base / "config.json", **({part: found} if part else found))
    with pytest.raises(UserError, match=rf"is quantised \({method}\); use the unquantised base"):
        merge(str(base), str(llama_lora), base.parent / "m", device="cpu")


@pytest.mark.parametrize("given", ["directory", "file"])
def test_a_gguf_file_is_recognised(tmp_path, given):
    file = tmp_path / "model-q4_k_m.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"q4_k_m\.gguf: is a GGUF file.* use the unquantised base"):
        with open_checkpoint(str(file if given == "file" else tmp_path)):
            pass


# -- everything at once --------------------------------------------------------------


def test_the_whole_validation_of_a_model_that_is_no_causal_one_skips_its_behaviour(tiny, tmp_path):
    base = tiny.base("t5")
    adapter = tiny.adapter(base)
    result = final_validation.validate(
        str(base), str(adapter), tmp_path / "v", precisions=["fp16"], device="cpu"
    )
    assert result.holds
    assert "is not a causal language model" in result.document["behaviour"]["skipped"]
