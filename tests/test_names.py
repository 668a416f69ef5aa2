"""One tensor under many names: heads, converted architectures, tied weights and experts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec import behaviour
from taskvec.cli import UserError
from tests.checks import assert_same_bits, edit_json, edit_tensors, weights
from tests.models import auto_class, load, peft_merge
from tests.stored import FAST, as_bin, certify, names_of

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


def test_a_model_of_pictures_and_text_has_its_names_converted_in_both_parts(tmp_path):
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names_of(tmp_path / "base")

    def opened():
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "base")

    adapted = get_peft_model(opened(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "m", device="cpu")
    theirs = PeftModel.from_pretrained(opened(), tmp_path / "adapter").merge_and_unload()
    for name, options in (("old", {}), ("new", {"save_original_format": False})):
        theirs.save_pretrained(tmp_path / name, **options)
        verdicts = certify(tmp_path / "base", tmp_path / "adapter", tmp_path / name, tmp_path)
        assert verdicts == ["exact", "exact"]
    assert_same_bits(weights(tmp_path / "m"), weights(tmp_path / "old"))


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
