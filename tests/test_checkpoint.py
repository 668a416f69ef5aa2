"""Opening a model by directory, file or hub id, and refusing what is not one."""

from __future__ import annotations

import hashlib
import json
import shutil
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from taskvec.checkpoint import (
    file_sha256,
    locate_adapter,
    open_checkpoint,
    read_json_object,
)
from taskvec.cli import UserError
from tests.checks import edit_json

INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sharded(tiny):
    return tiny.base("llama", max_shard_size="20KB")


def everything(checkpoint):
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


# -- what opens ----------------------------------------------------------------


def test_a_directory_with_one_file(llama):
    with open_checkpoint(str(llama)) as model:
        assert same(everything(model), load_file(llama / "model.safetensors"))
        assert (model.directory, model.revision, model.paths) == (llama, None, [llama])
        assert model.config()["model_type"] == "llama"


def test_a_directory_with_shards(sharded, llama):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 3
    with open_checkpoint(str(sharded)) as model:
        assert same(everything(model), load_file(llama / "model.safetensors"))
        assert list(model.shards) == shards
        assert model.nbytes == json.loads((sharded / INDEX).read_text())["metadata"]["total_size"]
        order = [name for shard in shards for name in load_file(shard)]
        assert set(model.tensors) == set(order)


def test_a_single_file_without_anything_beside_it(llama, tmp_path):
    file = tmp_path / "weights.safetensors"
    shutil.copyfile(llama / "model.safetensors", file)
    with open_checkpoint(str(file)) as model:
        assert same(everything(model), load_file(file))
        assert (model.directory, model.config(), model.paths) == (None, {}, [file])


def test_a_single_file_in_a_model_directory_brings_its_config(llama):
    with open_checkpoint(str(llama / "model.safetensors")) as model:
        assert model.directory == llama
        assert model.config()["model_type"] == "llama"


def test_rows_are_read_in_the_stored_dtype(tiny):
    base = tiny.base("llama", dtype=torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    with open_checkpoint(str(base)) as model:
        rows = model.read(name, 3, 9)
    assert torch.equal(rows, load_file(base / "model.safetensors")[name][3:9])
    assert rows.dtype == torch.bfloat16


def test_with_both_a_single_file_and_an_index_the_file_is_taken_as_transformers_does(
    tiny, sharded, copied
):
    both = copied(sharded)
    shutil.copyfile(tiny.base("llama", seed=5) / "model.safetensors", both / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(both).state_dict()
    with open_checkpoint(str(both)) as model:
        assert same(everything(model), {name: theirs[name] for name in model.tensors})


def test_identity_names_sizes_and_header_hashes(sharded):
    with open_checkpoint(str(sharded)) as model:
        identity = model.identity()
    assert (identity["source"], identity["revision"]) == (str(sharded), None)
    assert sorted(identity["files"]) == sorted(path.name for path in sharded.glob("*.safetensors"))
    for name, found in identity["files"].items():
        content = (sharded / name).read_bytes()
        header = content[: 8 + int.from_bytes(content[:8], "little")]
        assert found == {
            "bytes": len(content),
            "header_sha256": hashlib.sha256(header).hexdigest(),
        }


def test_file_sha256_is_that_of_the_whole_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 700_000)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 700_000).hexdigest()
    (tmp_path / "empty").write_bytes(b"")
    assert file_sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")


# -- what does not open --------------------------------------------------------


def refused(source, message, **options):
    with pytest.raises(UserError, match=message):
        with open_checkpoint(str(source), **options):
            pass


@pytest.mark.parametrize(
    "source", ["/nowhere/model", "./nowhere", "nowhere/", "a/b/c", "~/model", "x.safetensors"]
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch, source):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # calling it would raise
    refused(source, rf"{source}: no such file or directory\. `python final_validation.py`")


def test_a_revision_of_a_local_model_is_refused_rather_than_ignored(llama):
    refused(llama, "--revision v2: only a hub id has revisions", revision="v2")


def test_a_directory_without_weights(tmp_path):
    refused(tmp_path, "holds neither model.safetensors nor model.safetensors.index.json")


def test_a_model_without_tensors(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    refused(tmp_path, "holds no tensors")


def test_a_file_that_is_no_safetensors_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"ONNX" + bytes(100))
    refused(tmp_path / "model.onnx", r"model\.onnx: truncated, or not a safetensors file")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", 3]
)
def test_an_index_may_not_name_a_file_outside_its_directory(sharded, copied, name):
    model = copied(sharded)
    shutil.copyfile(next(model.glob("model-*")), model.parent / "outside.safetensors")
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    weight_map["model.norm.weight"] = name
    edit_json(model / INDEX, weight_map=weight_map)
    refused(model, rf"{INDEX}: model\.norm\.weight: .* is not the name of a file beside it")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_weight_map(sharded, copied, weight_map):
    model = copied(sharded)
    edit_json(model / INDEX, weight_map=weight_map)
    refused(model, rf"{INDEX}: has no weight_map")


def test_a_missing_shard_is_named(sharded, copied):
    model = copied(sharded)
    shard = sorted(model.glob("model-*"))[1]
    shard.unlink()
    refused(model, rf"{shard.name}: named in {INDEX} but not there")


def test_a_truncated_shard_is_named(sharded, copied):
    model = copied(sharded)
    shard = sorted(model.glob("model-*"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(model, rf"{shard.name}: truncated")


def test_an_index_and_its_shards_must_agree(sharded, copied):
    model = copied(sharded)
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    edit_json(model / INDEX, weight_map=weight_map | {"ghost": weight_map["model.norm.weight"]})
    refused(model, "ghost is said to lie in model-.*, but does not")
    del weight_map["model.norm.weight"]
    edit_json(model / INDEX, weight_map=weight_map)
    refused(model, rf"model\.norm\.weight is not named in {INDEX}")


def test_a_tensor_in_two_shards_is_refused(sharded, copied):
    model = copied(sharded)
    first, second = sorted(model.glob("model-*"))[:2]
    save_file(load_file(first) | load_file(second), second)
    refused(model, rf"{second.name}: .* also lies in {first.name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_an_index_that_is_no_json_object(sharded, copied, text, message):
    model = copied(sharded)
    (model / INDEX).write_text(text)
    refused(model, rf"{INDEX}: {message}")
    with pytest.raises(UserError, match=message):
        read_json_object(model / INDEX)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"load_in_8bit": True}, "quantization_config"),
    ],
)
def test_a_quantised_model_says_so(llama, copied, config, word):
    model = copied(llama)
    edit_json(model / "config.json", quantization_config=config)
    with open_checkpoint(str(model)) as opened:
        with pytest.raises(UserError, match=rf"is quantised \({word}\); use the unquantised base"):
            opened.refuse_quantised()
    with open_checkpoint(str(llama)) as plain:
        plain.refuse_quantised()


# -- the hub -------------------------------------------------------------------


@pytest.mark.parametrize("hub_id", ["tiny/llama", "tiny-llama"])
def test_a_cached_hub_model_opens_offline_with_its_commit(hub, sharded, llama, hub_id):
    hub(sharded, hub_id, COMMIT)
    with open_checkpoint(hub_id) as model:
        assert (model.source, model.revision) == (hub_id, COMMIT)
        assert model.identity()["revision"] == COMMIT
        assert same(everything(model), load_file(llama / "model.safetensors"))


def test_a_revision_picks_its_snapshot(hub, tiny, llama):
    other = tiny.base("llama", seed=5)
    hub(llama, "tiny/two", COMMIT)
    hub(other, "tiny/two", COMMIT[::-1], ref="v2")
    for revision, commit, source in [
        (None, COMMIT, llama),
        ("main", COMMIT, llama),
        ("v2", COMMIT[::-1], other),
        (COMMIT[::-1], COMMIT[::-1], other),
    ]:
        with open_checkpoint("tiny/two", revision) as model:
            assert model.revision == commit
            assert same(everything(model), load_file(source / "model.safetensors"))
    refused("tiny/two", "tiny/two: no such directory, and the hub cannot", revision="v3")


def test_a_directory_is_preferred_to_a_hub_id_of_its_name(hub, tiny, llama, tmp_path, monkeypatch):
    hub(tiny.base("llama", seed=5), "here/model", COMMIT)
    shutil.copytree(llama, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path)
    with open_checkpoint("here/model") as model:
        assert model.revision is None
        assert same(everything(model), load_file(llama / "model.safetensors"))


def test_an_adapter_is_found_in_the_cache_too(hub, llama_lora):
    hub(llama_lora, "tiny/lora", COMMIT)
    found = locate_adapter("tiny/lora")
    assert (found / "adapter_config.json").is_file()
    assert found.name == COMMIT


def test_offline_the_message_names_the_files_and_the_way_out():
    refused(
        "bigcode/starcoder2-3b",
        r"bigcode/starcoder2-3b: no such directory, and the hub cannot be reached; needed from "
        r"https://huggingface\.co/bigcode/starcoder2-3b are \*\.json.*model\*\.safetensors\. "
        r"`python final_validation\.py` without arguments runs the bundled example",
    )
    with pytest.raises(
        UserError,
        match=r"are adapter_config\.json, adapter_model\.safetensors, adapter_model\.bin\. `",
    ):
        locate_adapter("somebody/adapter")


@pytest.mark.parametrize("hub_id", ["a b/c", "-x/y", "a/b..c", "ünï/cödé"])
def test_what_can_be_no_hub_id(hub_id):
    refused(hub_id, "no such directory, and not a valid hub id")


class ProxyError(Exception):
    """Like those of the HTTP library under the hub's client, which is not always the same one."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HfHubHTTPError("401 Unauthorized", response=Mock()), "the hub answered: 401 Unauthorized"),
        (ProxyError("407 Proxy"), "the download failed: ProxyError: 407 Proxy"),
        (OSError(28, "No space left"), r"the download failed: OSError: .*No space left"),
    ],
)
def test_what_the_hub_answers_is_passed_on(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("some/model", rf"some/model: no such directory, and {message}")


def test_an_adapter_is_a_directory(llama_lora):
    with pytest.raises(UserError, match="is a file; give the adapter's directory"):
        locate_adapter(str(llama_lora / "adapter_model.safetensors"))
    assert locate_adapter(str(llama_lora)) == llama_lora
