"""Bases as people have them: in which files, dtypes and under which names they are stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

import final_validation
from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec import behaviour
from taskvec.checkpoint import open_checkpoint
from taskvec.cli import UserError
from tests.checks import assert_same_bits, edit_json, edit_tensors, names, weights
from tests.models import auto_class, load, peft_merge

FAST: dict[str, Any] = {"generate_plots": False, "detailed_report": False, "device": "cpu"}
INDEX = "pytorch_model.bin.index.json"


def as_bin(source: Path, target: Path, tensors=None, *, shards=1, **options) -> Path:
    """A model directory whose weights are in pytorch_model.bin, or in shards of it."""
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    tensors = weights(source) if tensors is None else tensors
    order = list(tensors)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin", **options)
        return target
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in order[number::shards]}
        torch.save(part, target / file, **options)
        weight_map |= dict.fromkeys(part, file)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def certify(base: Path, adapter: Path, merged: Path, directory: Path) -> list[str]:
    """The verdict on a merged model, directly and through its extracted task vector."""
    extract(str(base), str(merged), directory / "tv", device="cpu")
    ways: tuple[dict[str, Any], ...] = (
        {"finetuned_model": str(merged)},
        {"task_vector_path": directory / "tv"},
    )
    return [
        compare(
            str(base),
            str(adapter),
            directory / "comparison",
            **given,
            **FAST,
        ).summary["certificate"]["verdict"]
        for given in ways
    ]


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
        ({"weight": torch.ones(3).to_sparse()}, "weight: is a torch.float32; only plain"),
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


# -- names -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "starcoder2", "opt", "bert"])
def test_models_whose_names_differ_by_their_heads_prefix_are_compared(tiny, tmp_path, family):
    base = tiny.base(family)
    adapter = tiny.adapter(base)
    merged = peft_merge(base, adapter, torch.float32)
    merged.save_pretrained(tmp_path / "with")
    backbone = load(base).base_model
    if family == "bert":  # its head's own weights have no counterpart: compare backbones
        merged.base_model.save_pretrained(tmp_path / "with")
    backbone.save_pretrained(tmp_path / "base")
    assert not names_of(tmp_path / "base") & names_of(base)
    assert certify(tmp_path / "base", adapter, tmp_path / "with", tmp_path) == ["exact"] * 2
    if family != "bert":
        merged.base_model.save_pretrained(tmp_path / "without")
        assert certify(base, adapter, tmp_path / "without", tmp_path) == ["exact"] * 2


def names_of(directory: Path) -> set[str]:
    return set(weights(directory))


def test_a_tied_head_that_only_one_file_stores_is_no_difference(tiny, tmp_path, capsys):
    base = tiny.base("gpt2")
    adapter = tiny.adapter(base)
    merged = peft_merge(base, adapter, torch.float32)
    merged.save_pretrained(tmp_path / "once")
    twice = as_bin(base, tmp_path / "twice", merged.state_dict())
    base_twice = as_bin(base, tmp_path / "base", load(base).state_dict())
    assert "lm_head.weight" in torch.load(base_twice / "pytorch_model.bin", weights_only=True)
    for one, other in ((base, twice), (base_twice, tmp_path / "once"), (base_twice, twice)):
        capsys.readouterr()
        assert certify(one, adapter, other, tmp_path) == ["exact", "exact"]
        said = "stores the tied lm_head.weight twice; it is one with transformer.wte.weight"
        assert said in capsys.readouterr().err
    merge(str(base_twice), str(adapter), tmp_path / "m", device="cpu")
    assert_same_bits(weights(tmp_path / "m"), weights(tmp_path / "once"))
    assert weights(tmp_path / "m").keys() == weights(tmp_path / "once").keys()


@pytest.mark.parametrize("module", ["lm_head", "wte"])
def test_a_head_that_was_trained_on_its_own_is_a_parameter_of_its_own(tiny, tmp_path, module):
    base = tiny.base("gpt2")
    adapter = tiny.adapter(base, modules_to_save=[module])
    peft_merge(base, adapter, torch.float32).save_pretrained(tmp_path / "m")
    merged, stored = weights(tmp_path / "m"), weights(base)
    assert "lm_head.weight" in merged and "lm_head.weight" not in stored
    extract(str(base), str(tmp_path / "m"), tmp_path / "tv", device="cpu")
    found = weights(tmp_path / "tv")
    embedding = stored["transformer.wte.weight"]
    assert found.keys() == merged.keys()
    assert_same_bits({"lm_head.weight": merged["lm_head.weight"] - embedding}, found)


def test_a_task_vector_of_both_copies_of_a_tied_tensor_is_read_as_one(tiny, tmp_path):
    base = tiny.base("gpt2")
    adapter = tiny.adapter(base)
    before = load(base).state_dict()
    after = peft_merge(base, adapter, torch.float32).state_dict()
    file = tmp_path / "task_vector.safetensors"
    save_file({name: (after[name] - before[name]).clone() for name in before}, file)
    found = compare(str(base), str(adapter), tmp_path / "c", task_vector_path=file, **FAST)
    assert found.summary["certificate"]["verdict"] == "exact"


def test_t5_with_every_copy_of_its_embedding_is_compared_with_one_of_them(tiny, tmp_path):
    base = tiny.base("t5")
    adapter = tiny.adapter(base)
    full = as_bin(base, tmp_path / "full", load(base).state_dict())
    peft_merge(base, adapter, torch.float32).save_pretrained(tmp_path / "m")
    assert certify(full, adapter, tmp_path / "m", tmp_path) == ["exact", "exact"]


def test_an_untied_head_that_only_one_file_stores_is_a_difference(llama, llama_lora, tmp_path):
    load(llama).base_model.save_pretrained(tmp_path / "base")
    merge(str(llama), str(llama_lora), tmp_path / "m", device="cpu")
    with pytest.raises(UserError, match=r"base: has no lm_head\.weight, which .*/m has"):
        certify(tmp_path / "base", llama_lora, tmp_path / "m", tmp_path)


def test_a_classification_head_is_merged_into_a_base_that_has_one(tiny, tmp_path):
    base = tiny.base("bert")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.save_pretrained(tmp_path / "headed")
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "headed"), str(tmp_path / "adapter"), tmp_path / "m", device="cpu")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "headed")
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    assert_same_bits(weights(tmp_path / "m"), theirs.state_dict())
    with pytest.raises(UserError, match=r"replaces classifier\.\w+, which .* save it, and merge"):
        merge(str(base), str(tmp_path / "adapter"), tmp_path / "m", device="cpu")


def test_names_in_memory_and_names_in_files_are_the_same_model(tiny, tmp_path):
    base = tiny.base("vit")
    adapter = tiny.adapter(base)
    merged = peft_merge(base, adapter, torch.float32)
    merged.save_pretrained(tmp_path / "old")
    merged.save_pretrained(tmp_path / "new", save_original_format=False)
    load(base).save_pretrained(tmp_path / "base", save_original_format=False)
    assert names_of(tmp_path / "new").isdisjoint(
        name for name in names_of(tmp_path / "old") if "encoder.layer" in name
    )
    for one in (base, tmp_path / "base"):
        for other in ("old", "new"):
            assert certify(one, adapter, tmp_path / other, tmp_path) == ["exact", "exact"]
    edit_old_names(adapter, tmp_path / "adapter")
    for one, theirs in ((base, "old"), (tmp_path / "base", "new")):
        merge(str(one), str(tmp_path / "adapter"), tmp_path / "m", device="cpu")
        assert_same_bits(weights(tmp_path / "m"), weights(tmp_path / theirs))
        AutoModel.from_pretrained(tmp_path / "m")


def edit_old_names(adapter: Path, target: Path) -> None:
    """An adapter as transformers 4 named ViT's modules."""
    shutil.copytree(adapter, target)
    file = target / "adapter_model.safetensors"
    old = {
        ".layers.": ".encoder.layer.",
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.o_proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.",
    }
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, was in old.items():
            name = name.replace(new, was)
        tensors[name] = tensor
    save_file(tensors, file)


def test_older_names_of_layer_norms_are_the_same_model(tiny, copied, tmp_path):
    base = tiny.base("bert")
    adapter = tiny.adapter(base)
    old = copied(base)
    file = old / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    peft_merge(base, adapter, torch.float32).save_pretrained(tmp_path / "m")
    assert certify(old, adapter, tmp_path / "m", tmp_path) == ["exact", "exact"]


# -- experts -----------------------------------------------------------------------


def test_experts_may_lie_one_by_one_in_one_model_and_fused_in_the_other(tiny, tmp_path):
    base = tiny.base("mixtral")
    adapter = tiny.adapter(base)
    merged = peft_merge(base, adapter, torch.float32)
    merged.save_pretrained(tmp_path / "apart")
    merged.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names_of(tmp_path / "fused")
    assert certify(base, adapter, tmp_path / "fused", tmp_path) == ["exact", "exact"]
    found = [weights(tmp_path / "tv")]
    assert certify(base, adapter, tmp_path / "apart", tmp_path) == ["exact", "exact"]
    assert_same_bits(found[0], weights(tmp_path / "tv"))
    load(base).save_pretrained(tmp_path / "base", save_original_format=False)
    assert certify(tmp_path / "base", adapter, tmp_path / "fused", tmp_path) == ["exact", "exact"]
    with pytest.raises(UserError, match=r"one by one, .*base fused; .*save_original_format"):
        certify(tmp_path / "base", adapter, tmp_path / "apart", tmp_path)


def test_one_element_of_one_expert_is_seen_in_a_fused_model(tiny, tmp_path):
    base = tiny.base("mixtral")
    adapter = tiny.adapter(base)
    merged = peft_merge(base, adapter, torch.float32)
    with torch.no_grad():
        merged.model.layers[1].mlp.experts.gate_up_proj[2, 48 + 5, 7] += 0.25
    merged.save_pretrained(tmp_path / "fused", save_original_format=False)
    extract(str(base), str(tmp_path / "fused"), tmp_path / "tv", device="cpu")
    changed = {name: t for name, t in weights(tmp_path / "tv").items() if t.any()}
    expert = changed["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert expert.nonzero().tolist() == [[5, 7]]
    assert sum("experts" in name for name in changed) == 1


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]


@pytest.fixture(scope="module")
def of_experts(tiny):
    """A Mixtral and an adapter of its fused experts and its router."""
    base = tiny.base("mixtral")
    return base, tiny.adapter(base, target_modules=["q_proj"], target_parameters=EXPERTS)


def named_one_by_one(adapter: Path, target: Path, experts: int) -> Path:
    """An adapter as transformers 4 named Mixtral's modules: each expert has its own."""
    shutil.copytree(adapter, target)
    edit_json(
        target / "adapter_config.json",
        target_parameters=None,
        target_modules=["q_proj", "w1", "w2", "w3", "gate"],
    )
    tensors = weights(adapter)
    torch.manual_seed(3)
    for name in list(tensors):
        module, _, factor = name.partition(".lora_")
        if ".mlp." not in module:
            continue
        tensor = tensors.pop(name)
        block = module.partition(".mlp.")[0] + ".block_sparse_moe."
        if module.endswith(".gate"):
            tensors[f"{block}gate.lora_{factor}"] = tensor
            continue
        for expert in range(experts):
            for part in ("w1", "w3") if "base_layer" in module else ("w2",):
                into, out = (48, 32) if part == "w2" else (32, 48)
                shape = (4, into) if factor.startswith("A") else (out, 4)
                key = f"{block}experts.{expert}.{part}.lora_{factor}"
                tensors[key] = torch.randn(shape) * 0.05
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("old", [False, True], ids=["fused names", "names one by one"])
def test_experts_merge_as_in_peft(of_experts, tmp_path, old):
    base, adapter = of_experts
    if old:
        adapter = named_one_by_one(adapter, tmp_path / "adapter", experts=4)
    for precision in ("fp32", "fp16", "bf16"):
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        merge(
            str(base),
            str(adapter),
            tmp_path / "m",
            precision=precision,
            rounding="peft",
            device="cpu",
        )
        peft_merge(base, adapter, dtype).save_pretrained(tmp_path / "theirs")
        assert_same_bits(weights(tmp_path / "m"), weights(tmp_path / "theirs"))
        assert certify(base, adapter, tmp_path / "theirs", tmp_path) == ["exact", "exact"]
    _, info = auto_class("mixtral").from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_experts_of_a_base_that_stores_them_fused_merge_the_same(of_experts, tmp_path):
    base, adapter = of_experts
    load(base).save_pretrained(tmp_path / "base", save_original_format=False)
    merge(str(tmp_path / "base"), str(adapter), tmp_path / "m", device="cpu")
    theirs = peft_merge(base, adapter, torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    assert_same_bits(weights(tmp_path / "m"), weights(tmp_path / "theirs"))
    assert certify(tmp_path / "base", adapter, tmp_path / "theirs", tmp_path) == ["exact"] * 2
    assert certify(base, adapter, tmp_path / "theirs", tmp_path) == ["exact"] * 2
    old = named_one_by_one(adapter, tmp_path / "adapter", experts=4)
    with pytest.raises(UserError, match=r"adapts model\.layers\.0\..* experts fused where"):
        merge(str(tmp_path / "base"), str(old), tmp_path / "m", device="cpu")


def test_a_base_without_one_of_its_experts_is_refused(of_experts, copied, tmp_path):
    base = copied(of_experts[0])
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.pop(name))
    message = r"some experts of model\.layers\.1\.mlp\.experts\.gate_up_proj are missing"
    with pytest.raises(UserError, match=message):
        merge(str(base), str(of_experts[1]), tmp_path / "m", device="cpu")


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


# -- behaviour ------------------------------------------------------------------------


def test_a_task_vector_is_added_to_fused_experts_and_to_tied_weights_once(
    of_experts, tiny, tmp_path
):
    tokens = [[5, 17, 42, 3], [60, 61]]
    tied = tiny.base("gpt2")
    twice = as_bin(tied, tmp_path / "twice", load(tied).state_dict())
    head = tiny.adapter(tied, target_modules=["wte"], fan_in_fan_out=False)
    for base, adapter in (of_experts, (twice, head)):
        merge(str(base), str(adapter), tmp_path / "m", device="cpu")
        extract(str(base), str(tmp_path / "m"), tmp_path / "tv", device="cpu")
        file = tmp_path / "tv" / "task_vector.safetensors"
        reference, *others = (
            behaviour.adapter_logits(str(base), str(adapter), tokens, torch.device("cpu")),
            behaviour.model_logits(str(tmp_path / "m"), tokens, torch.device("cpu")),
            behaviour.task_vector_logits(str(base), file, tokens, torch.device("cpu")),
        )
        for logits in others:
            assert behaviour.agreement(reference, logits).max_kl < behaviour.FP32_KL_LIMIT


# -- everything at once --------------------------------------------------------------


def test_the_whole_validation_of_a_model_that_is_no_causal_one_skips_its_behaviour(tiny, tmp_path):
    base = tiny.base("t5")
    adapter = tiny.adapter(base)
    result = final_validation.validate(
        str(base), str(adapter), tmp_path / "v", precisions=["fp16"], device="cpu"
    )
    assert result.holds
    assert "is not a causal language model" in result.document["behaviour"]["skipped"]
