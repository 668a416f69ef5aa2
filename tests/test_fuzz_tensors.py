"""Fuzzed safetensors files and indexes: refused with one line, or read as the library reads them.

How many cases: `tests.hostile.cases`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests import hostile
from tests.hostile import BASE, LORA, VECTOR, Sandbox, cases, file_bytes, header_and_data

INDEX = "base/model.safetensors.index.json"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        import taskvec.figures.architecture
        import taskvec.figures.task_vector

        # The figures take half a second each, and see numbers only.
        patch.setattr(taskvec.figures.architecture, "model_structure", lambda *_: None)
        for figure in ("artifacts_by_precision", "change_norms", "shares", "ranks"):
            patch.setattr(taskvec.figures.task_vector, figure, lambda *_: None)
        yield Sandbox(tmp_path_factory.mktemp("fuzz") / "home")


# -- headers -------------------------------------------------------------------

SIZES = st.one_of(st.integers(0, 6), st.sampled_from([12, 48, 2**31, 2**61, 2**62, 2**63]))


@st.composite
def consistent_entries(draw: st.DrawFn, tensors: dict[str, Any]) -> bytes:
    """A file whose entries have other names, dtypes and shapes, but fit the bytes that follow."""
    entries, data = {}, b""
    for name, array in tensors.items():
        dtype, itemsize = draw(
            st.sampled_from(
                [
                    ("F32", 4),
                    ("F16", 2),
                    ("BF16", 2),
                    ("F64", 8),
                    ("I8", 1),
                    ("BOOL", 1),
                    ("U64", 8),
                ]
            )
        )
        shape = draw(
            st.one_of(
                st.just(list(array.shape)),
                st.lists(st.integers(0, 5), max_size=4),
                st.permutations([0, draw(SIZES), draw(SIZES)]),
            )
        )
        size = itemsize * int(np.prod([min(extent, 6) for extent in shape], dtype=object))
        begin, data = len(data), data + draw(st.binary(min_size=size, max_size=size))
        entries[draw(st.one_of(st.just(name), hostile.TEXTS))] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [begin, len(data)],
        }
    return file_bytes(entries, data)


@st.composite
def spoilt_files(draw: st.DrawFn, tensors: dict[str, Any]) -> bytes:
    """A safetensors file that is damaged in one of many ways."""
    header, data = header_and_data(tensors)
    kind = draw(st.sampled_from(["entries", "entries", "bytes", "length", "text", "fit", "values"]))
    if kind == "entries":
        return file_bytes(draw(hostile.spoilt_json(header)), data)
    if kind == "bytes":
        return draw(hostile.spoilt_bytes(file_bytes(header, data)))
    if kind == "length":
        content = file_bytes(header, data)
        length = draw(st.one_of(st.integers(0, 400), st.sampled_from([2**31, 2**40, 2**64 - 1])))
        return length.to_bytes(8, "little") + content[8:]
    if kind == "fit":
        return draw(consistent_entries(tensors))
    if kind == "values":
        values = draw(st.binary(min_size=len(data), max_size=len(data)))
        return file_bytes(header, values)
    text = json.dumps(header)
    first = next(iter(tensors))
    return file_bytes(
        draw(
            st.sampled_from(
                [
                    text.encode("utf-16"),
                    text.encode("utf-8-sig"),
                    b" " * 9 + text.encode() + b"\n\t ",
                    text.encode() + b"\0" * 7,
                    (text[:-1] + "," + text[1:]).encode(),
                    text.replace(first, "\\ud800").encode(),
                    text.replace(first, "\\u0000").encode(),
                    text.replace('"pt"', hostile.nested(3000, "list")).encode(),
                    hostile.nested(100_000, "list").encode(),
                    hostile.nested(100_000, "object").encode(),
                    text.replace("3]", "3.0]").encode(),
                    text.replace("0, ", "0" * 5000 + "1, ").encode(),
                    text.replace("0, ", "1" * 5000 + ", ").encode(),
                    text.replace("0, ", "0e1, ").encode(),
                    b"",
                    b"{}",
                    b"null",
                    b"\xff" * 20,
                ]
            )
        ),
        data,
    )


def assert_read_alike(sandbox: Sandbox, name: str) -> None:
    """What was accepted is a file that the safetensors library reads."""
    try:
        load_file(sandbox.home / name)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that it does not map to torch
        pytest.fail(f"the safetensors library does not read what was accepted: {error}")


@cases(900)
@given(content=spoilt_files(BASE), script=st.sampled_from(["merge", "extract", "compare", "see"]))
def test_a_spoilt_base(sandbox, content, script):
    names = {
        "merge": "merge_lora",
        "extract": "extract_task_vectors",
        "compare": "compare_lora_task_vector",
        "see": "visualize_model_structure",
    }
    with sandbox.with_file("base/model.safetensors", content):
        ending = sandbox.run(names[script])
        if ending.status != 2:
            assert_read_alike(sandbox, "base/model.safetensors")
        if ending.status == 0 and script == "merge":
            check_merged(sandbox)
    sandbox.clear()


def check_merged(sandbox: Sandbox) -> None:
    """The output is base + s B A, in numpy's float64, and holds every tensor of the base."""
    base = load_file(sandbox.home / "base" / "model.safetensors")
    merged = load_file(sandbox.out / "model.safetensors")
    assert list(merged) == list(base)
    factors = load_file(sandbox.home / "lora" / "adapter_model.safetensors")
    A, B = (factors[name].double().numpy() for name in sorted(factors))
    for name, tensor in base.items():
        expected = tensor.double().numpy()
        if name == "a.weight":
            delta = 2 * (B @ A)
            expected = expected + (delta if delta.shape == expected.shape else delta.T)
        found = merged[name].double().numpy()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@cases(700)
@given(
    content=spoilt_files(LORA),
    script=st.sampled_from(["merge_lora", "debug_lora_structure", "quick_precision_test"]),
)
def test_a_spoilt_adapter(sandbox, content, script):
    with sandbox.with_file("lora/adapter_model.safetensors", content):
        ending = sandbox.run(script)
        if ending.status == 0:
            assert_read_alike(sandbox, "lora/adapter_model.safetensors")
            if script == "merge_lora":
                check_merged(sandbox)
    sandbox.clear()


@cases(700)
@given(
    content=spoilt_files(VECTOR),
    metadata=st.none() | st.dictionaries(hostile.TEXTS, hostile.VALUES, max_size=2),
    precision=hostile.VALUES | st.sampled_from(["fp32", "fp16", "bf16", "mixed", "stored"]),
    script=st.sampled_from(
        [
            "compare_lora_task_vector",
            "investigate_parameter_changes",
            "analyze_task_vector_structure",
        ]
    ),
)
def test_a_spoilt_task_vector(sandbox, content, metadata, precision, script):
    if metadata is not None:
        header, data = header_and_data(VECTOR)
        header["__metadata__"] = {
            **metadata,
            "base_precision": precision,
            "merged_precision": precision,
        }
        content = file_bytes(header, data)
    with sandbox.with_file("vector/task_vector.safetensors", content):
        if sandbox.run(script).status != 2:
            assert_read_alike(sandbox, "vector/task_vector.safetensors")
    sandbox.clear()


# -- .bin files ----------------------------------------------------------------


def bin_bytes(tensors: dict[str, Any], zipped: bool) -> bytes:
    """What torch.save writes, in its present format or in the one from before torch 1.6."""
    buffer = io.BytesIO()
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


BINS = {
    (name, zipped): bin_bytes(tensors, zipped)
    for name, tensors in (("base", BASE), ("lora", LORA))
    for zipped in (True, False)
}


@cases(500)
@given(data=st.data(), which=st.sampled_from(list(BINS)))
def test_a_spoilt_bin_file(sandbox, data, which):
    """Damaged archives and pickles; whether the values are right, a checksum would have to say."""
    content = data.draw(hostile.spoilt_bytes(BINS[which]))
    name = {"base": "pytorch_model", "lora": "adapter_model"}[which[0]]
    safe = {"base": "base/model.safetensors", "lora": "lora/adapter_model.safetensors"}[which[0]]
    (sandbox.home / safe).unlink()
    try:
        with sandbox.with_file(f"{which[0]}/{name}.bin", content):
            sandbox.run("merge_lora")
    finally:
        sandbox.put(safe, hostile.GOOD[safe])
    sandbox.clear()


# -- indexes -------------------------------------------------------------------

SHARDS = {
    "base/model-1.safetensors": file_bytes(*header_and_data({"a.weight": BASE["a.weight"]})),
    "base/model-2.safetensors": file_bytes(
        *header_and_data({"b.weight": BASE["b.weight"], "ids": BASE["ids"]})
    ),
}
WEIGHT_MAP = {
    "a.weight": "model-1.safetensors",
    "b.weight": "model-2.safetensors",
    "ids": "model-2.safetensors",
}
FILE_NAMES = st.one_of(
    hostile.VALUES,
    st.sampled_from(
        [
            *("../outside.safetensors", "./model-1.safetensors", "sub/../model-1.safetensors"),
            *("..\\outside.safetensors", "model-1.safetensors/", "/dev/zero", "/dev/stdin"),
            *("config.json", "model.safetensors.index.json", "merge_manifest.json", "MODEL-1"),
            *("tokenizer.safetensors", "vocab.safetensors", "x.model", "sub", "link.safetensors"),
        ]
    ),
)


@pytest.fixture(scope="module")
def sharded(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The sandbox with a base in two shards, a directory and a dangling link beside them."""
    sandbox.restore()
    (sandbox.home / "base" / "model.safetensors").unlink()
    for name, content in SHARDS.items():
        sandbox.put(name, content)
    # A name that the tokenizer's files have, for the very bytes of a shard.
    for name in ("vocab.safetensors", "tokenizer.safetensors", "x.model", "merge_manifest.json"):
        sandbox.put(f"base/{name}", SHARDS["base/model-1.safetensors"])
    (sandbox.home / "base" / "sub").mkdir()
    (sandbox.home / "base" / "link.safetensors").symlink_to("nowhere")
    yield sandbox
    sandbox.restore()


@cases(600)
@given(
    content=st.one_of(
        hostile.spoilt_json({"weight_map": WEIGHT_MAP}, FILE_NAMES).map(hostile.json_bytes),
        hostile.spoilt_json({"metadata": {"total_size": 70}, "weight_map": WEIGHT_MAP}).map(
            hostile.json_bytes
        ),
        hostile.spoilt_bytes(hostile.json_bytes({"weight_map": WEIGHT_MAP})),
    )
)
def test_a_spoilt_index(sharded, content):
    with sharded.with_file(INDEX, content):
        ending = sharded.run("merge_lora")
        if ending.status == 0:
            index = sharded.out / Path(INDEX).name
            files = json.loads(index.read_bytes())["weight_map"].values() if index.exists() else ()
            merged: dict[str, torch.Tensor] = {}
            for file in set(files) or ["model.safetensors"]:
                merged |= load_file(sharded.out / file)
            assert sorted(merged) == sorted(json.loads(content)["weight_map"])
            if "a.weight" in merged:
                expected = (BASE["a.weight"] + VECTOR["a.weight"]).astype(np.float64)
                np.testing.assert_array_equal(merged["a.weight"].double().numpy(), expected)
    sharded.clear()
