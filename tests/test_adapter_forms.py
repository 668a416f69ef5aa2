"""The forms in which adapters come: files, folders, several at once, and on tied embeddings."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import merge_lora
from compare_lora_task_vector import compare
from extract_task_vectors import extract
from taskvec.adapter import open_adapter
from taskvec.checkpoint import open_checkpoint
from taskvec.cli import UserError
from taskvec.rounding import FP32, ROUNDINGS
from tests.adapter_kinds import make_kind
from tests.checks import assert_same_bits, edit_json, edit_tensors, weights
from tests.models import load, peft_merge

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def merge(base, adapter, output, **options):
    source = adapter if isinstance(adapter, list) else str(adapter)
    return merge_lora.merge(str(base), source, output, device="cpu", **options)


def certificate_of(base, adapter, merged, directory):
    source = adapter if isinstance(adapter, list) else str(adapter)
    return compare(
        str(base),
        source,
        directory,
        finetuned_model=str(merged),
        device="cpu",
        generate_plots=False,
    ).summary["certificate"]


# -- files and folders -------------------------------------------------------------


def test_a_pickled_adapter_gives_the_same_bits(llama, llama_lora, copied, tmp_path):
    adapter = copied(llama_lora)
    torch.save(load_file(adapter / WEIGHTS), adapter / PICKLED)
    (adapter / WEIGHTS).unlink()
    merge(llama, adapter, tmp_path / "m")
    assert_same_bits(
        weights(tmp_path / "m"), peft_merge(llama, adapter, torch.float32).state_dict()
    )
    manifest = json.loads((tmp_path / "m" / "merge_manifest.json").read_text())
    assert list(manifest["adapter"]) == [CONFIG, PICKLED]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_refused_and_not_executed(llama, llama_lora, copied, tmp_path):
    adapter, trap = copied(llama_lora), tmp_path / "executed"
    torch.save({**load_file(adapter / WEIGHTS), "x": Trap(str(trap))}, adapter / PICKLED)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin: .*not unpickled"):
        merge(llama, adapter, tmp_path / "m")
    assert not trap.exists()


def test_an_adapter_in_a_named_folder(llama, llama_lora, tmp_path, monkeypatch, capsys):
    shutil.copytree(llama_lora, tmp_path / "run" / "first")
    flags = ["--base_model", str(llama), "--lora_path", str(tmp_path / "run"), "--device", "cpu"]
    flags += ["--output_dir", str(tmp_path / "m")]
    assert merge_lora.main(flags) == 2
    error = capsys.readouterr().err
    assert "there are adapters by name: --adapter_name first" in error
    assert merge_lora.main([*flags, "--adapter_name", "first"]) == 0
    theirs = peft_merge(llama, llama_lora, torch.float32).state_dict()
    assert_same_bits(weights(tmp_path / "m"), theirs)


def test_an_adapter_on_the_hub_alone_and_in_a_folder(hub, llama, llama_lora, tmp_path):
    hub(llama_lora, "tiny/alone", "ab" * 20)
    repository = tmp_path / "repository"
    (repository / "inner").mkdir(parents=True)
    hub_id = hub(llama_lora, "tiny/folders", "cd" * 20)
    snapshot = os.path.join(os.environ["HF_HOME"], "hub", "models--tiny--folders", "snapshots")
    shutil.copytree(llama_lora, os.path.join(snapshot, "cd" * 20, "inner"))
    theirs = peft_merge(llama, llama_lora, torch.float32).state_dict()
    for source in ("tiny/alone", f"{hub_id}/inner"):
        merge(llama, source, tmp_path / "m")
        assert_same_bits(weights(tmp_path / "m"), theirs)


def test_a_trainers_checkpoint_with_its_optimizer_beside_it(llama, llama_lora, copied, tmp_path):
    checkpoint = copied(llama_lora)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (checkpoint / name).write_bytes(b"not to be read")
    (checkpoint / "trainer_state.json").write_text("{}")
    merge(llama, checkpoint, tmp_path / "m")
    theirs = peft_merge(llama, llama_lora, torch.float32).state_dict()
    assert_same_bits(weights(tmp_path / "m"), theirs)


@pytest.mark.parametrize("stored", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["DoRA", "embedding", "experts", "modules_to_save", "tokens"])
def test_adapters_of_every_kind_stored_in_half_precision(tiny, tmp_path, kind, stored):
    base, adapter = make_kind(tiny, kind)
    shutil.copytree(adapter, tmp_path / "a")
    tensors = load_file(adapter / WEIGHTS)
    save_file({n: t.to(DTYPES[stored]) for n, t in tensors.items()}, tmp_path / "a" / WEIGHTS)
    for precision in ("fp32", stored):
        merge(base, tmp_path / "a", tmp_path / "m", precision=precision, rounding="peft")
        peft_merge(base, tmp_path / "a", DTYPES[precision]).save_pretrained(tmp_path / "p")
        assert_same_bits(weights(tmp_path / "m"), weights(tmp_path / "p"))


# -- several adapters ---------------------------------------------------------------


def in_peft(base, adapters, dtype):
    """PEFT's merge of several adapters in one call."""
    model = PeftModel.from_pretrained(load(base, dtype), adapters[0], adapter_name="0")
    for number, path in enumerate(adapters[1:], 1):
        model.load_adapter(path, str(number))
    return model.merge_and_unload(adapter_names=[str(n) for n in range(len(adapters))])


@pytest.mark.parametrize("precision", DTYPES)
def test_several_adapters_are_merged_in_turn_as_in_peft(tiny, llama, tmp_path, precision):
    adapters = [
        str(tiny.adapter(llama)),
        str(tiny.adapter(llama, seed=2, r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"])),
        str(tiny.adapter(llama, seed=3, use_rslora=True, target_modules=["v_proj", "q_proj"])),
    ]
    result = merge(llama, adapters, tmp_path / "m", precision=precision, rounding="peft")
    theirs = in_peft(llama, adapters, DTYPES[precision]).state_dict()
    assert_same_bits(weights(tmp_path / "m"), theirs)
    assert "lm_head.weight" in result.changed_parameters
    certificate = certificate_of(llama, adapters, tmp_path / "m", tmp_path / "c")
    assert certificate["verdict"] == "exact" and "peft" in certificate["reproduced_by"]
    manifest = json.loads((tmp_path / "m" / "merge_manifest.json").read_text())
    assert [list(files) for files in manifest["adapters"]] == [[CONFIG, WEIGHTS]] * 3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_once_rounds_only_the_sum_of_several(tiny, llama, tmp_path, precision):
    adapters = [str(tiny.adapter(llama, scale=0.05)), str(tiny.adapter(llama, seed=2, scale=0.05))]
    result = merge(llama, adapters, tmp_path / "m", precision=precision)
    factors, stored, mine = (
        [weights(tmp_path / a) for a in adapters],
        weights(llama),
        weights(tmp_path / "m"),
    )
    for name in result.changed_parameters:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        total = stored[name]
        for tensors in factors:
            total = total + (tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]) * 2
        assert torch.equal(mine[name], total.to(DTYPES[precision]))
    certificate = certificate_of(llama, adapters, tmp_path / "m", tmp_path / "c")
    assert certificate["verdict"] == "exact" and certificate["reproduced_by"][0] == "once"


def test_a_second_adapter_that_replaces_or_rescales_what_the_first_changed_is_refused(
    tiny, llama, llama_lora, tmp_path
):
    second = tiny.adapter(llama, target_modules=["k_proj"], modules_to_save=["q_proj"])
    dora = tiny.adapter(llama, use_dora=True)
    for adapter, verb in ((second, "replaces"), (dora, r"rescales \(DoRA\)")):
        with pytest.raises(
            UserError, match=rf"{verb} model\.layers.*; if the second was trained on"
        ):
            merge(llama, [str(llama_lora), str(adapter)], tmp_path / "m")


# -- tied embeddings ----------------------------------------------------------------

TIED: dict[str, dict[str, Any]] = {
    "LoRA of the head": {"target_modules": ["lm_head"]},
    "LoRA of the embedding": {"target_modules": ["embed_tokens"]},
    "LoRA of both": {"target_modules": ["embed_tokens", "lm_head"]},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "a saved embedding": {"modules_to_save": ["embed_tokens"]},
    "other tokens in each": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}},
    "the same tokens": {"trainable_token_indices": [1, 5]},
    "a saved pair kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA kept tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
}
STAY_TIED = ["the same tokens", "a saved pair kept tied", "LoRA kept tied"]


@pytest.mark.parametrize("case", TIED)
def test_a_merge_on_tied_embeddings_computes_what_base_and_adapter_do(tiny, tmp_path, case):
    """PEFT changes both of a pair when it merges into one: that is not what was trained."""
    base = tiny.base("starcoder2")
    adapter = tiny.adapter(base, scale=0.2, **TIED[case])
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(base), adapter).eval()(tokens).logits
        before = load(base).eval()(tokens).logits
        merge(base, adapter, tmp_path / "m")
        found = load(tmp_path / "m").eval()(tokens).logits
    assert (expected - before).abs().max() > 0.01
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    tied = load(tmp_path / "m").config.tie_word_embeddings
    assert tied == (case in STAY_TIED)
    assert ("lm_head.weight" in weights(tmp_path / "m")) != tied


@pytest.mark.parametrize("case", ["LoRA of the head", "a saved embedding", "LoRA kept tied"])
def test_the_chain_follows_a_head_that_was_untied(tiny, tmp_path, case):
    base = tiny.base("starcoder2")
    adapter = tiny.adapter(base, scale=0.2, **TIED[case])
    merge(base, adapter, tmp_path / "m", precision="bf16")
    extract(str(base), str(tmp_path / "m"), tmp_path / "t")
    found = compare(
        str(base),
        str(adapter),
        tmp_path / "c",
        task_vector_path=tmp_path / "t",
        device="cpu",
        generate_plots=False,
    )
    assert found.summary["certificate"]["verdict"] == "exact"


def test_peft_agrees_where_the_pair_is_saved_apart(tiny, tmp_path):
    base = tiny.base("starcoder2")
    for case in ("a saved head", "a saved embedding", "a saved pair kept tied"):
        adapter = tiny.adapter(base, scale=0.2, **TIED[case])
        merge(base, adapter, tmp_path / "m")
        peft_merge(base, adapter, torch.float32).save_pretrained(tmp_path / "p")
        assert_same_bits(weights(tmp_path / "m"), weights(tmp_path / "p"))


# -- the embedding that PEFT saves along -------------------------------------------------


def test_an_embedding_saved_along_takes_the_place_of_the_bases(tiny, llama, copied, tmp_path):
    adapter = copied(tiny.adapter(llama, target_modules=["embed_tokens"]))
    key = "base_model.model.model.embed_tokens.base_layer.weight"

    def train(tensors):
        tensors[key] = tensors[key] + 0.01

    edit_tensors(adapter / WEIGHTS, train)
    for precision, dtype in DTYPES.items():
        merge(llama, adapter, tmp_path / "m", precision=precision, rounding="peft")
        assert_same_bits(weights(tmp_path / "m"), peft_merge(llama, adapter, dtype).state_dict())
    assert certificate_of(llama, adapter, tmp_path / "m", tmp_path / "c")["verdict"] == "exact"


# What PEFT saves along after a change of the vocabulary, and whether a tied pair stays one.
RESIZED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "LoRA elsewhere": ("llama", {}, False),
    "both saved": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "new tokens": ("llama", {"trainable_token_indices": [96, 97, 98, 99]}, False),
    "some of the new tokens": ("llama", {"trainable_token_indices": [3, 97]}, False),
    "tied, LoRA elsewhere": ("starcoder2", {}, True),
    "tied, some of the new tokens": ("starcoder2", {"trainable_token_indices": [97, 3]}, True),
    "tied, both saved": ("starcoder2", {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "tied, new tokens": ("starcoder2", {"trainable_token_indices": [96, 97, 98, 99]}, True),
    "tied, new tokens by module": (
        "starcoder2",
        {"trainable_token_indices": {"embed_tokens": [96, 97, 98, 99]}},
        True,
    ),
}


def with_100_rows(base, directory, seed):
    """A base with four rows more than its 96; a seed decides what is in them."""
    model = load(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(100)
    model.save_pretrained(directory)
    return directory


def adapter_with_100_rows(base, directory, **config):
    """Trained on the base with four rows more, without saying so in its configuration."""
    model = load(base)
    torch.manual_seed(1)
    model.resize_token_embeddings(100)
    fields = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **config}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", RESIZED)
def test_an_adapter_with_a_changed_vocabulary_goes_on_a_base_that_was_resized(tiny, tmp_path, case):
    """PEFT writes trained tensors twice then, and what they stand in for: all of it is known."""
    family, config, stays_tied = RESIZED[case]
    base = tiny.base(family)
    adapter = adapter_with_100_rows(base, tmp_path / "a", **config)
    resized = with_100_rows(base, tmp_path / "b", seed=2)  # other new rows: the adapter has them
    for precision, dtype in DTYPES.items():
        merge(resized, adapter, tmp_path / "m", precision=precision, rounding="peft")
        peft_merge(resized, adapter, dtype).save_pretrained(tmp_path / "p")
        found, expected = weights(tmp_path / "m"), weights(tmp_path / "p")
        assert found["model.embed_tokens.weight"].shape == (100, 32)
        assert ("lm_head.weight" in found) != stays_tied
        assert_same_bits(found, expected)
    verdict = certificate_of(resized, adapter, tmp_path / "p", tmp_path / "c")["verdict"]
    assert verdict == "exact"


@pytest.mark.parametrize("adapted", ["lm_head", "embed_tokens"])
def test_both_of_a_pair_start_from_what_was_saved_of_one(tiny, tmp_path, adapted):
    """PEFT saves the adapted one's weight alone, and loads it into the memory of both."""
    base = tiny.base("starcoder2")
    adapter = adapter_with_100_rows(base, tmp_path / "a", target_modules=[adapted])

    def start(tensors):
        key = next(key for key in tensors if key.endswith("base_layer.weight"))
        tensors[key][96:] = 0.5

    edit_tensors(adapter / WEIGHTS, start)
    resized = with_100_rows(base, tmp_path / "b", seed=2)
    merge(resized, adapter, tmp_path / "m")
    tokens = torch.arange(90, 100)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(resized), adapter).eval()(tokens).logits
        found = load(tmp_path / "m").eval()(tokens).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert certificate_of(resized, adapter, tmp_path / "m", tmp_path / "c")["verdict"] == "exact"


def test_rows_that_are_trained_lie_in_whatever_block_is_read(llama, tmp_path):
    adapter = adapter_with_100_rows(llama, tmp_path / "a", trainable_token_indices=[3, 97])
    resized = with_100_rows(llama, tmp_path / "b", seed=2)
    stored = load_file(adapter / WEIGHTS)
    key = "base_model.model.model.embed_tokens.token_adapter"
    expected = stored[f"{key}.base_layer.weight"].clone()
    expected[[3, 97]] = stored[f"{key}.trainable_tokens_delta"]
    with open_checkpoint(str(resized)) as base, open_adapter(str(adapter), base) as found:
        update = found.update("model.embed_tokens.weight", torch.device("cpu"))
        rows = base.read("model.embed_tokens.weight")
        for step in (1, 3, 100):
            blocks = [(start, min(start + step, 100)) for start in range(0, 100, step)]
            merged = [update.merged(ROUNDINGS["once"], rows[a:b], a, b, FP32) for a, b in blocks]
            assert torch.equal(torch.cat(merged), expected)


@pytest.mark.parametrize("case", RESIZED)
def test_on_the_base_from_before_it_is_refused_with_what_to_do(tiny, tmp_path, case):
    family, config, _ = RESIZED[case]
    base = tiny.base(family)
    adapter = adapter_with_100_rows(base, tmp_path / "a", **config)
    with pytest.raises(UserError, match=r"; resize the base as it was for training and save it"):
        merge(base, adapter, tmp_path / "m")


def test_two_names_for_one_tensor_must_have_one_value(llama, tmp_path):
    config = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = adapter_with_100_rows(llama, tmp_path / "a", **config)

    def change(tensors):
        tensors["base_model.model.lm_head.modules_to_save.weight"][3, 4] += 1

    edit_tensors(adapter / WEIGHTS, change)
    resized = with_100_rows(llama, tmp_path / "b", seed=1)
    with pytest.raises(UserError, match=r"lm_head\.weight and .* are the same thing"):
        merge(resized, adapter, tmp_path / "m")


def test_whole_tensors_that_the_configuration_does_not_name_are_refused(
    tiny, llama, copied, tmp_path
):
    adapter = copied(tiny.adapter(llama, modules_to_save=["input_layernorm"]))
    edit_json(adapter / CONFIG, modules_to_save=None)
    with pytest.raises(
        UserError, match=r"neither modules_to_save nor bias of adapter_config\.json"
    ):
        merge(llama, adapter, tmp_path / "m")


def test_a_fine_tuned_model_with_more_tokens_says_how_to_resize_the_base(llama, tmp_path):
    tuned = with_100_rows(llama, tmp_path / "tuned", seed=1)
    with pytest.raises(UserError, match=r"\(100, 32\) in .*; resize .*embeddings\(100\), save_pre"):
        extract(str(llama), str(tuned), tmp_path / "t")
    resized = with_100_rows(llama, tmp_path / "base", seed=1)
    assert extract(str(resized), str(tuned), tmp_path / "t").nonzero_parameters == 0


def test_only_embeddings_and_heads_are_a_matter_of_the_vocabulary(llama, copied, tmp_path):
    other = copied(llama)
    key = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(other / "model.safetensors", lambda t: t.update({key: torch.ones(32, 32)}))
    with pytest.raises(UserError) as refusal:
        extract(str(llama), str(other), tmp_path / "t")
    assert key in str(refusal.value) and "resize" not in str(refusal.value)
