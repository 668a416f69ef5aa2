"""The merged directory: it loads in transformers, in the base's shards, with its other bytes."""

from __future__ import annotations

import itertools
import json
import shutil
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import merge_lora
from taskvec import cli
from taskvec.tensorfile import TensorFile
from tests.checks import assert_same_bits, names, raw_bytes, weights
from tests.models import FAMILIES, peft_merge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
MANIFEST = "merge_manifest.json"


def merge(base, adapter, output, **options):
    return merge_lora.merge(str(base), str(adapter), output, device="cpu", **options)


# -- the directory -----------------------------------------------------------------


@pytest.fixture(scope="module")
def complete_base(llama, tmp_path_factory):
    """A Llama as people have it: tokenizer, generation config, and files that are no part of it."""
    base = tmp_path_factory.mktemp("complete") / "base"
    shutil.copytree(llama, base)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:94]
    vocabulary = {"<end>": 0} | {byte: number for number, byte in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(base)
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=0).save_pretrained(base)
    for extra in ("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json"):
        (base / extra).write_text("not part of the model")
    return base


@pytest.mark.parametrize("precision", DTYPES)
def test_the_directory_holds_exactly_the_model(complete_base, llama_lora, tmp_path, precision):
    merge(complete_base, llama_lora, tmp_path / "m", precision=precision)
    assert names(tmp_path) == ["m"]
    assert names(tmp_path / "m") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        MANIFEST,
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert AutoConfig.from_pretrained(tmp_path / "m").dtype == DTYPES[precision]
    mine = json.loads((tmp_path / "m" / "config.json").read_text())
    theirs = json.loads((complete_base / "config.json").read_text())
    assert {**mine, "dtype": None} == {**theirs, "dtype": None}
    assert GenerationConfig.from_pretrained(tmp_path / "m").temperature == 0.25
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "def f(x): return x"
    assert (
        tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(complete_base)(text).input_ids
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_transformers_loads_it_without_missing_or_unexpected_keys(
    tiny, tmp_path, family, precision
):
    base = tiny.base(family)
    adapter = tiny.adapter(base)
    merge(base, adapter, tmp_path / "m", precision=precision, rounding="peft")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[precision]}
    theirs = peft_merge(base, adapter, DTYPES[precision])
    prompt = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, theirs(prompt).logits)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in ("starcoder2", "gpt2"))
    assert ("lm_head.weight" in weights(tmp_path / "m")) == (not tied)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype", "both", "neither"])
def test_the_dtype_is_set_however_the_config_spells_it(llama, llama_lora, copied, tmp_path, key):
    base = copied(llama)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    config["text_config"] = {"dtype": "float32", "hidden_size": 32}
    keys = {"both": ["dtype", "torch_dtype"], "neither": []}.get(key, [key])
    (base / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "float32")))
    merge(base, llama_lora, tmp_path / "m", precision="bf16")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    found = {name: written[name] for name in ("dtype", "torch_dtype") if name in written}
    assert found == dict.fromkeys(keys or ["dtype"], "bfloat16")
    assert written["text_config"] == {"dtype": "bfloat16", "hidden_size": 32}


def test_a_single_file_as_base_gives_the_same_weights(llama, llama_lora, tmp_path):
    file = tmp_path / "weights.safetensors"
    shutil.copyfile(llama / "model.safetensors", file)
    merge(llama, llama_lora, tmp_path / "from-directory")
    merge(file, llama_lora, tmp_path / "from-file")
    assert names(tmp_path / "from-file") == [MANIFEST, "model.safetensors"]
    mine, theirs = (weights(tmp_path / name) for name in ("from-file", "from-directory"))
    assert_same_bits(mine, theirs)


# -- shards ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tiny):
    return tiny.base("llama", max_shard_size="20KB")


@pytest.mark.parametrize("precision", DTYPES)
def test_shards_follow_the_bases_own(sharded, llama_lora, tmp_path, precision):
    merge(sharded, llama_lora, tmp_path / "m", precision=precision, rounding="peft")
    theirs = json.loads((sharded / INDEX).read_text())
    mine = json.loads((tmp_path / "m" / INDEX).read_text())
    assert mine["weight_map"] == theirs["weight_map"]
    for shard in set(mine["weight_map"].values()):
        assert set(load_file(tmp_path / "m" / shard)) == set(load_file(sharded / shard))
    width = DTYPES[precision].itemsize
    assert mine["metadata"]["total_size"] == theirs["metadata"]["total_size"] * width // 4
    total = sum(tensor.nbytes for tensor in weights(tmp_path / "m").values())
    assert mine["metadata"]["total_size"] == total
    info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)[1]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    peft = peft_merge(sharded, llama_lora, DTYPES[precision])
    assert_same_bits(weights(tmp_path / "m"), peft.state_dict())


@pytest.mark.parametrize(("text", "limit"), [("10KB", 10_000), ("8 kib", 8192), ("0.02mb", 20_000)])
def test_max_shard_size_cuts_anew(sharded, llama, llama_lora, tmp_path, text, limit):
    for base in (llama, sharded):
        merge(base, llama_lora, tmp_path / "m", max_shard_size=text)
        shards = sorted((tmp_path / "m").glob("*.safetensors"))
        count = len(shards)
        assert [shard.name for shard in shards] == [
            f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
        ]
        sizes = [[tensor.nbytes for tensor in load_file(shard).values()] for shard in shards]
        assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
        # no file could have taken the next one's first tensor as well
        assert all(sum(here) + max(there) > limit for here, there in itertools.pairwise(sizes))
        index = json.loads((tmp_path / "m" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes))
        assert set(index["weight_map"]) == set(weights(tmp_path / "m"))
        assert_same_bits(
            weights(tmp_path / "m"), peft_merge(llama, llama_lora, torch.float32).state_dict()
        )
        info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)[1]
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_large_max_shard_size_gives_one_file_without_an_index(sharded, llama_lora, tmp_path):
    merge(sharded, llama_lora, tmp_path / "m", max_shard_size="5GB")
    assert names(tmp_path / "m") == [
        "config.json",
        "generation_config.json",
        MANIFEST,
        "model.safetensors",
    ]


# -- what is not changed -----------------------------------------------------------


@pytest.fixture(scope="module")
def odd_base(llama, tmp_path_factory):
    """A base with tensors of other dtypes, and with values that arithmetic would not keep."""
    base = tmp_path_factory.mktemp("odd") / "base"
    shutil.copytree(llama, base)
    tensors = load_file(llama / "model.safetensors")
    payload = torch.tensor([0x7FC01234, 0xFFC00001 - 2**32], dtype=torch.int32).view(torch.float32)
    extra = {
        "nan_payload": payload,
        "negative_zero": torch.tensor([-0.0, 0.0, 1e-45]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "steps": torch.tensor(2**53 + 1),
        "mask": torch.tensor([[True, False], [False, True]]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "scales": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    }
    save_file(tensors | extra, base / "model.safetensors")
    return base


def test_in_the_bases_precision_untouched_tensors_are_the_same_bytes(
    odd_base, llama_lora, tmp_path
):
    result = merge(odd_base, llama_lora, tmp_path / "m")
    mine, base = weights(tmp_path / "m"), weights(odd_base)
    assert file_order(tmp_path / "m") == file_order(odd_base)
    untouched = set(base) - set(result.changed_parameters)
    assert len(untouched) == 23
    assert_same_bits(mine, base, untouched)


def file_order(directory):
    with TensorFile(directory / "model.safetensors") as file:
        return sorted(file.tensors, key=lambda name: file.tensors[name].offset)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tensors_that_are_no_floats_are_carried_through(
    odd_base, llama_lora, copied, tmp_path, precision
):
    base = copied(odd_base)
    tensors = {name: tensor for name, tensor in weights(base).items() if name != "nan_payload"}
    save_file(tensors, base / "model.safetensors")
    merge(base, llama_lora, tmp_path / "m", precision=precision)
    mine = weights(tmp_path / "m")
    assert_same_bits(mine, tensors, ["steps", "mask", "bytes", "scales"])
    for name in ("negative_zero", "scalar", "empty", "model.norm.weight"):
        assert raw_bytes(mine[name]) == raw_bytes(tensors[name].to(DTYPES[precision]))


def test_a_factor_of_zeros_changes_nothing(tiny, llama, tmp_path):
    merge(llama, tiny.adapter(llama, scale=0.0), tmp_path / "m")
    assert_same_bits(weights(tmp_path / "m"), load_file(llama / "model.safetensors"))


def test_the_progress_bar_ends_at_its_total(odd_base, llama_lora, tmp_path, monkeypatch):
    bar = MagicMock()
    monkeypatch.setattr(cli, "progress", bar)
    merge(odd_base, llama_lora, tmp_path / "m")
    (total, _), _ = bar.call_args
    updates = bar.return_value.__enter__.return_value.update.call_args_list
    assert sum(call.args[0] for call in updates) == total > 0
