"""``.bin`` files made to do harm: pickles that call something, and a few bytes that claim many."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taskvec.torchfile import TorchFile
from tests import hostile
from tests.hostile import Sandbox

MIB = 1 << 20


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path / "home")


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


READERS = {
    "merge_lora": "base lora",
    "extract_task_vectors": "base",
    "compare_lora_task_vector": "base lora",
    "debug_lora_structure": "base lora",
    "visualize_model_structure": "base lora",
    "investigate_parameter_changes": "base lora",
    "quick_precision_test": "base lora",
    "analyze_lora_vs_task_vector_math": "base",
    "find_intruder_dimensions": "base lora",
    "finetune_lora": "base",
    "final_validation": "base lora",
    "analyze_task_vectors apply": "base",
    "analyze_task_vectors to_lora": "base lora",
}
FILES = {
    "base": ("base/model.safetensors", "base/pytorch_model.bin"),
    "lora": ("lora/adapter_model.safetensors", "lora/adapter_model.bin"),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    ("script", "which"),
    [(script, which) for script in READERS for which in READERS[script].split()],
)
def test_a_pickle_that_calls_something_is_refused_and_not_run(
    sandbox, tmp_path, save, script, which
):
    replaced, name = FILES[which]
    (sandbox.home / replaced).unlink()
    save(tmp_path / "mark", sandbox.home / name)
    ending = sandbox.run(script)
    assert ending.status == 2
    assert Path(name).name in ending.err
    assert not (tmp_path / "mark").exists()


TUNED = {
    "extract_task_vectors": "--base_model {base}",
    "compare_lora_task_vector": "--base_model {base} --lora_path {lora}",
    "analyze_task_vector_structure": "--base_model {base}",
    "investigate_parameter_changes": "--base_model {base}",
    "find_intruder_dimensions": "--base_model {base} --cache_dir none",
    "final_validation": "--base_model {base} --lora_path {lora} --quiet",
    "analyze_task_vectors apply": "apply --base_model {base} --task_vector {vector}",
    "analyze_task_vectors to_lora": "to_lora --base_model {base}",
}


@pytest.mark.parametrize("script", TUNED)
def test_nor_is_one_that_stands_for_the_finetuned_model(sandbox, tmp_path, script):
    folder = sandbox.home / "tuned"
    folder.mkdir()
    save_as_zip(tmp_path / "mark", folder / "pytorch_model.bin")
    places = {name: str(sandbox.home / name) for name in ("base", "lora", "vector")}
    words = [word.format(**places) for word in TUNED[script].split()]
    words += ["--finetuned_model", str(folder), "--output_dir", str(sandbox.out)]
    ending = hostile.run_main(hostile.main_of(script), [*words, "--device", "cpu"])
    assert ending.status == 2
    assert "pytorch_model.bin: wants to call" in ending.err
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


# -- bytes that claim more bytes ------------------------------------------------------------


class Calls:
    """Unpickled, it calls something with some arguments."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = what, arguments

    def __reduce__(self):
        return self.call


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(change: Callable[[zipfile.ZipInfo, bytes], bytes] = lambda _, data: data) -> bytes:
    """A sound file, put together again by zipfile after a change of its records."""
    source = zipfile.ZipFile(io.BytesIO(saved({"a.weight": torch.zeros(4, 3)})))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for old in source.infolist():
            new = zipfile.ZipInfo(old.filename)
            target.writestr(new, change(new, source.read(old)))
    return buffer.getvalue()


def compressed_zeros(info: zipfile.ZipInfo, data: bytes) -> bytes:
    if not info.filename.endswith("data/0"):
        return data
    info.compress_type = zipfile.ZIP_DEFLATED
    return bytes(100 * MIB)


BOMBS = {
    "bytes": (saved({"a": Calls(bytearray, 10**12)}), "wants to call __builtin__.bytearray"),
    "a tensor": (saved({"a": Calls(torch.FloatTensor, 10**10)}), "wants to call torch.FloatTensor"),
    "one of no device": (
        saved(
            {"a": Calls(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (9,), (1,), 0)}
        ),
        "wants to call torch._utils._rebuild_meta_tensor_no_storage",
    ),
    "bytes, as before torch 1.6": (
        saved({"a": Calls(bytearray, 10**12)}, _use_new_zipfile_serialization=False),
        "wants to call __builtin__.bytearray",
    ),
    "a storage": (
        saved(
            {
                "a": Calls(
                    torch._utils._rebuild_tensor_v2,
                    *(Calls(torch.UntypedStorage, 10**10), 0, (10**9,), (1,), False, {}),
                )
            }
        ),
        "pytorch_model.bin: ",
    ),
    "compressed zeros": (zipped(compressed_zeros), "data/0 is compressed"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_bin_file_takes_no_memory(sandbox, commands, name):
    content, message = BOMBS[name]
    assert len(content) < MIB
    (sandbox.home / "base" / "model.safetensors").unlink()
    sandbox.put("base/pytorch_model.bin", content)
    found = commands.run("merge_lora", *sandbox.words("merge_lora"), memory=600 * MIB)
    assert found.status == 2
    assert found.err.count("\n") == 1 and message in found.err, found.err
    assert not sandbox.out.exists()


# -- few bytes that take long ---------------------------------------------------------------

FORTY = 40


def doubled(depth: int) -> bytes:
    """Opcodes of a tuple of twice the same tuple of twice ...: 2^depth for whoever walks it."""
    return b")q\0" + b"h\0\x86q\0" * depth


def doubled_list(depth: int) -> bytes:
    """The same of lists, which no dictionary takes as a key, but an error message prints."""
    return b"]q\0" + b"]q\1h\0ah\0aq\0" * depth


def storage_of_key(key: bytes) -> bytes:
    """Opcodes of a storage's reference, its key given as opcodes."""
    start = b"(X\x07\0\0\0storage" + b"ctorch\nFloatStorage\n"
    return start + key + b"X\3\0\0\0cpuK\1tQ"


A = b"X\1\0\0\0a"
ORDERED_DICT = b"ccollections\nOrderedDict\n"
BUSY: dict[str, Callable[[int], bytes]] = {
    "a key": lambda depth: b"}" + doubled(depth) + b"K\1s",
    "one of several keys": lambda depth: b"}(" + A + b"K\1" + doubled(depth) + b"K\1u",
    "a key in a list of pairs": lambda depth: (
        ORDERED_DICT + b"]" + doubled(depth) + b"K\1\x86a\x85R"
    ),
    "a key of attributes": lambda depth: ORDERED_DICT + b")R]" + doubled(depth) + b"K\1\x86ab",
    "a storage's key": lambda depth: b"}" + A + storage_of_key(doubled(depth)) + b"s",
    "a key as deep as the stack": lambda depth: b"})" + b"\x85" * 25_000 * depth + b"K\1s",
    "a function": lambda depth: doubled_list(depth) + b")R",
    "a number as a key": lambda depth: b"}K\1K\1s",
}


def as_archive(pickled: bytes) -> bytes:
    return zipped(lambda info, data: pickled if info.filename.endswith("data.pkl") else data)


def as_before_1_6(pickled: bytes) -> bytes:
    content = saved({"a": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    end = 0
    for _ in range(3):  # magic number, protocol, system
        end = content.index(b".", content.index(b"\x80\2", end)) + 1
    return content[:end] + pickled + b"\x80\2]."


@pytest.mark.parametrize("form", [as_archive, as_before_1_6])
@pytest.mark.parametrize("what", BUSY)
def test_a_small_bin_file_takes_no_time(sandbox, what, form):
    ending = bin_base(sandbox, form(b"\x80\2" + BUSY[what](FORTY) + b"."))
    assert ending.status == 2
    assert "pytorch_model.bin: holds more than tensors: " in ending.err


@pytest.mark.parametrize("form", [as_archive, as_before_1_6])
@pytest.mark.parametrize("what", ["a key", "one of several keys"])
def test_torch_reads_the_same_file_where_it_takes_no_time(tmp_path, what, form):
    """So that it is not refused for something else."""
    (tmp_path / "x.bin").write_bytes(form(b"\x80\2" + BUSY[what](3) + b"."))
    two = ((), ())
    read = torch.load(tmp_path / "x.bin", weights_only=True)
    assert ((two, two), (two, two)) in read


class Named(torch.nn.Module):
    """With tied weights, a buffer, and what its state dict keeps for each module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.register_buffer("scalar", torch.tensor(2.5))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        Named().state_dict(),
        dict(Named().named_parameters(remove_duplicate=False)),
        {
            "a.weight": torch.zeros(4, 3, dtype=torch.bfloat16).T,
            "i": torch.ones(2, dtype=torch.int8),
        },
        {},
    ],
    ids=["state dict", "parameters", "types and strides", "nothing"],
)
def test_what_torch_saves_of_tensors_is_read(tmp_path, content, zipped):
    path = tmp_path / "x.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with TorchFile(path) as file:
        assert list(file.tensors) == list(content)
        for name, tensor in content.items():
            assert torch.equal(file.read(file.tensors[name]), tensor)


def bin_base(sandbox: Sandbox, content: bytes) -> hostile.Ending:
    (sandbox.home / "base" / "model.safetensors").unlink()
    sandbox.put("base/pytorch_model.bin", content)
    return sandbox.run("merge_lora")


def test_an_archive_that_zipfile_wrote_is_read(sandbox):
    """So that what the others are refused for is what was changed in them."""
    assert bin_base(sandbox, zipped()).status == 0


def test_overlapping_views_of_one_storage_may_not_fill_the_disk(sandbox):
    row = torch.arange(100_000, dtype=torch.float32)
    views = {f"v{n}": row[n:] for n in range(20)}
    ending = bin_base(sandbox, saved({"a.weight": torch.zeros(3, 4).T, **views}))
    assert ending.status == 2
    assert "its tensors are over 4 times as large" in ending.err


def test_a_storage_that_many_names_share_is_spooled_once(sandbox):
    one = torch.ones(100, 1000)
    ending = bin_base(
        sandbox,
        saved({"a.weight": torch.zeros(3, 4).T, **{f"same{n}": one for n in range(20)}}),
    )
    assert ending.status == 0, ending.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"archive/data/1", b"archive/data/0", "two records of one name"),
        (b"PK\x06\x07\0\0\0\0", b"PK\x06\x07\1\0\0\0", "multiple disks"),
    ],
)
def test_an_archive_that_means_two_things(sandbox, old, new, message):
    content = saved({"a.weight": torch.zeros(4, 3), "b.weight": torch.zeros(3)})
    assert old in content
    ending = bin_base(sandbox, content.replace(old, new))
    assert ending.status == 2
    assert message in ending.err
