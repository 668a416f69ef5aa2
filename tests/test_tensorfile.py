"""Safetensors files: what is written here the library reads, and the other way round."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file

from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.tensorfile import TensorFile, TensorFileWriter, row_blocks, same_bits
from tests.checks import raw_bytes

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (1,), (7,), (5, 3), (2, 3, 4), (0,), (0, 4), (4, 0)]


def pattern(dtype, shape):
    """A tensor of any dtype whose bytes are not all alike."""
    count = math.prod(shape)
    if dtype == torch.bool:
        return (torch.arange(count) % 3 == 1).reshape(shape)
    raw = torch.arange(1, count * dtype.itemsize + 1, dtype=torch.int64) * 37 % 101
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def everything():
    return {f"{dtype}.{shape}": pattern(dtype, shape) for dtype in DTYPES for shape in SHAPES}


def specs_of(tensors):
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(path, tensors, metadata=None):
    with TensorFileWriter(path, specs_of(tensors), metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


def test_the_library_reads_every_dtype_and_shape_that_is_written_here(tmp_path):
    tensors = everything()
    loaded = load_file(write(tmp_path / "mine.safetensors", tensors))
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(loaded[name]) == raw_bytes(tensor)


def test_every_dtype_and_shape_that_the_library_writes_is_read_here(tmp_path):
    tensors = everything()
    save_file(tensors, tmp_path / "theirs.safetensors")
    with TensorFile(tmp_path / "theirs.safetensors") as file:
        assert set(file.tensors) == set(tensors)
        for name, tensor in tensors.items():
            read = file.read(file.tensors[name])
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert raw_bytes(read) == raw_bytes(tensor)


def test_metadata_carries_format_pt_and_the_strings_given(tmp_path):
    path = write(tmp_path / "m.safetensors", {"a": torch.ones(2)}, {"base_precision": "größer"})
    with safe_open(path, "pt") as theirs:
        assert theirs.metadata() == {"format": "pt", "base_precision": "größer"}
    with TensorFile(path) as mine:
        assert mine.metadata == {"format": "pt", "base_precision": "größer"}


def test_tensor_data_starts_at_a_multiple_of_eight(tmp_path):
    for length in range(1, 10):
        path = write(tmp_path / f"{length}.safetensors", {"n" * length: torch.ones(1)})
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_rows_are_the_rows_of_the_whole(tmp_path):
    matrix = torch.arange(35.0).reshape(7, 5)
    path = write(tmp_path / "rows.safetensors", {"before": torch.ones(3), "m": matrix})
    with TensorFile(path) as file:
        for start in range(8):
            for stop in range(start, 8):
                assert torch.equal(file.read(file.tensors["m"], start, stop), matrix[start:stop])


def test_what_is_read_can_be_written_to_without_touching_the_file(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": torch.ones(4)})
    with TensorFile(path) as file:
        file.read(file.tensors["a"]).zero_()
    assert torch.equal(load_file(path)["a"], torch.ones(4))


def test_rows_may_be_written_in_any_order(tmp_path):
    matrix = torch.arange(12.0).reshape(6, 2)
    path = tmp_path / "x.safetensors"
    with TensorFileWriter(path, [("m", torch.float32, (6, 2))]) as writer:
        for start, stop in ((4, 6), (0, 1), (1, 4)):
            writer.write("m", matrix[start:stop], start)
    assert torch.equal(load_file(path)["m"], matrix)


def test_a_transposed_view_is_written_as_it_reads(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3)
    path = write(tmp_path / "x.safetensors", {"t": matrix.T})
    np.testing.assert_array_equal(load_file(path)["t"].numpy(), [[0, 3], [1, 4], [2, 5]])


def test_what_is_never_written_is_a_hole_and_reads_as_zeros(tmp_path):
    path, names = tmp_path / "holes.safetensors", ["a", "within", "b", "ones", "c", "last"]
    with TensorFileWriter(path, [(name, torch.float32, (512, 512)) for name in names]) as writer:
        writer.write("ones", torch.ones(512, 512))
    assert path.stat().st_size > 6 * 2**20
    assert path.stat().st_blocks * 512 < 1.2 * 2**20
    loaded = load_file(path)
    assert all(bool(loaded[name].any()) == (name == "ones") for name in names)
    with TensorFile(path) as file:
        assert not file.read(file.tensors["within"]).any()
        assert file.is_hole(file.tensors["within"])
        assert file.is_hole(file.tensors["last"])
        assert not file.is_hole(file.tensors["ones"])


def test_a_hole_may_share_its_first_and_last_block_with_what_was_written(tmp_path):
    """The header lies before the first tensor, and few tensors end where a block does."""
    path = tmp_path / "shared.safetensors"
    specs = [(name, torch.float32, (9001,)) for name in ("first", "ones", "hole", "edge", "last")]
    with TensorFileWriter(path, specs) as writer:
        writer.write("ones", torch.ones(9001))
        writer.write("edge", torch.ones(1), 9000)
    with TensorFile(path) as file:
        found = {name: file.is_hole(info) for name, info in file.tensors.items()}
        zero = {name: not file.read(info).any() for name, info in file.tensors.items()}
    assert zero == {"first": True, "ones": False, "hole": True, "edge": False, "last": True}
    assert found == zero


def test_a_written_zero_is_no_hole_where_holes_are_not_known(tmp_path, monkeypatch):
    path = write(tmp_path / "x.safetensors", {"a": torch.zeros(4096)})
    monkeypatch.delattr(os, "SEEK_DATA")
    with TensorFile(path) as file:
        assert not file.is_hole(file.tensors["a"])


def refuse(*_):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("kernel", ["copies", "refuses", "has no such call", "answers nothing"])
def test_copied_tensors_are_equal_bytes_whatever_the_system_offers(tmp_path, monkeypatch, kernel):
    if kernel == "refuses":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    elif kernel == "has no such call":  # macOS
        monkeypatch.delattr(os, "copy_file_range")
    elif kernel == "answers nothing":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    tensors = {**everything(), "big": torch.arange(2_500_000.0)}
    save_file(tensors, tmp_path / "source.safetensors")
    order = dict(reversed(list(tensors.items())))
    with TensorFile(tmp_path / "source.safetensors") as source:
        with TensorFileWriter(tmp_path / "copy.safetensors", specs_of(order)) as writer:
            for name in order:
                writer.copy(source, source.tensors[name])
    copied = load_file(tmp_path / "copy.safetensors")
    assert all(raw_bytes(copied[name]) == raw_bytes(tensors[name]) for name in tensors)


@pytest.mark.parametrize("kernel", ["copies", "refuses"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, monkeypatch, kernel):
    if kernel == "refuses":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    path = write(tmp_path / "x.safetensors", {"a": torch.ones(1000)})
    with TensorFile(path) as file:
        os.truncate(path, 2000)
        with pytest.raises(UserError, match=r"x\.safetensors: the file ended at byte 2000"):
            file.read(file.tensors["a"])
        with TensorFileWriter(
            tmp_path / "y.safetensors", [("a", torch.float32, (1000,))]
        ) as writer:
            with pytest.raises(UserError, match="the file ended at byte 2000"):
                writer.copy(file, file.tensors["a"])


def test_bytes_are_compared_as_bytes():
    one = torch.tensor([1.0, torch.nan, 0.0])
    assert same_bits(one, one.clone())
    assert not same_bits(one, torch.tensor([1.0, torch.nan, -0.0]))
    assert not same_bits(torch.zeros(4), torch.zeros(4, dtype=torch.int32))
    assert same_bits(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("answer", [BlockingIOError(), OSError(errno.EOPNOTSUPP, ""), None])
def test_only_what_the_system_would_have_to_fetch_is_not_in_memory(tmp_path, monkeypatch, answer):
    save_file({"a": torch.ones(100)}, tmp_path / "one.safetensors")
    asked = []

    def ask(fd: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        asked.append((offset, flags))
        if answer is not None:
            raise answer
        return 1

    with TensorFile(tmp_path / "one.safetensors") as file:
        info = file.tensors["a"]
        monkeypatch.setattr(os, "preadv", ask)
        monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
        assert file.is_cached(info) is not isinstance(answer, BlockingIOError)
    assert asked == [(info.offset + 200, 8)]


def test_what_is_let_go_of_is_dropped_as_it_is_read(tmp_path, monkeypatch):
    save_file({"a": torch.arange(100.0), "b": torch.ones(9)}, tmp_path / "one.safetensors")
    dropped = []

    def advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((offset, nbytes))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with TensorFile(tmp_path / "one.safetensors") as file:
        info = file.tensors["a"]
        file.let_go(info)
        assert torch.equal(file.read(info, 10, 30), torch.arange(10.0, 30.0))
        file.read(file.tensors["b"])
    assert dropped == [(info.offset + 40, 80)]


def test_a_write_that_does_not_fit_is_refused(tmp_path):
    with TensorFileWriter(tmp_path / "x.safetensors", [("a", torch.float32, (4, 3))]) as writer:
        with pytest.raises(ValueError, match=r"a: torch\.float16"):
            writer.write("a", torch.ones(4, 3, dtype=torch.float16))
        with pytest.raises(ValueError, match="does not fit"):
            writer.write("a", torch.ones(4, 2))


def test_an_existing_file_is_never_written_over(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        TensorFileWriter(path, [("a", torch.float32, (2,))])
    assert path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.safetensors: no such file"):
        TensorFile(tmp_path / "nowhere.safetensors")


# -- damaged headers -----------------------------------------------------------


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def without(key):
    return {name: value for name, value in entry().items() if name != key}


def raw(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


DAMAGED = {
    "empty file": (b"", "truncated, or not a safetensors file"),
    "seven bytes": (b"\1" + b"\0" * 6, "truncated, or not a safetensors file"),
    "text, not safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "truncated, or not"),
    "header longer than the file": (raw({"a": entry()})[:30], "truncated, or not"),
    "no JSON": (raw(b"{nonsense}"), "damaged safetensors header"),
    "no object": (raw(b"[1, 2]"), "not a JSON object"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "damaged safetensors header"),
    "nested without end": (raw(b"[" * 100_000), "damaged safetensors header"),
    "half a surrogate": (raw({"\ud800": entry()}), "damaged safetensors header"),
    "name twice": (
        raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}'),
        "'a' appears twice",
    ),
    "key twice": (
        raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "'dtype' appears twice",
    ),
    "metadata a list": (raw({"__metadata__": [], "a": entry()}), "__metadata__ must map strings"),
    "metadata with a number": (raw({"__metadata__": {"x": 1}, "a": entry()}), "must map strings"),
    "metadata with half a surrogate": (
        raw({"__metadata__": {"x": "\ud800"}, "a": entry()}),
        "must map strings",
    ),
    "entry with more": (
        raw({"a": {**entry(), "x": 10**400}}),
        "a: header entry with the unknown key",
    ),
    "entry a list": (raw({"a": [1]}), "a: damaged header entry"),
    "dtype missing": (raw({"a": without("dtype")}), "a: unsupported dtype None"),
    "dtype unknown": (raw({"a": entry("F4711")}), "a: unsupported dtype 'F4711'"),
    "dtype a list": (raw({"a": entry(["F32"])}), "a: unsupported dtype"),
    "shape missing": (raw({"a": without("shape")}), "a: damaged shape"),
    "shape a number": (raw({"a": {**entry(), "shape": 2}}), "a: damaged shape"),
    "shape negative": (raw({"a": entry(shape=(-2, -1))}), "a: damaged shape"),
    "shape fractional": (raw({"a": entry(shape=(2.0,))}), "a: damaged shape"),
    "shape true": (raw({"a": entry(shape=(True, 2))}), "a: damaged shape"),
    "shape a text": (raw({"a": entry(shape=("2",))}), "a: damaged shape"),
    "shape enormous": (raw({"a": entry(shape=(2**62,))}), "a: damaged shape"),
    "shape overflowing": (raw({"a": entry(shape=(2**61, 2**61))}), "a: F32 .* takes"),
    "shape overflowing with an extent of 0": (
        raw({"a": entry(shape=(2**61, 12, 0), offsets=(0, 0)), "b": entry()}),
        "a: damaged shape",
    ),
    "33 dimensions": (raw({"a": entry(shape=(1,) * 32 + (2,))}), "a: damaged shape"),
    "offsets missing": (raw({"a": without("data_offsets")}), "a: damaged byte range"),
    "one offset": (raw({"a": entry(offsets=(0,))}), "a: damaged byte range"),
    "three offsets": (raw({"a": entry(offsets=(0, 8, 8))}), "a: damaged byte range"),
    "offset negative": (raw({"a": entry(offsets=(-8, 0))}), "a: damaged byte range"),
    "offset fractional": (raw({"a": entry(offsets=(0, 8.0))}), "a: damaged byte range"),
    "offsets reversed": (raw({"a": entry(offsets=(8, 0))}), "a: F32 .* takes 8 bytes"),
    "fewer bytes than the shape": (raw({"a": entry(shape=(3,))}), "takes 12 bytes, .* gives 8"),
    "overlap": (raw({"a": entry(), "b": entry()}), "b: its byte range overlaps another tensor"),
    "gap at the start": (raw({"a": entry(offsets=(8, 16))}, b"\0" * 16), "a: .* leaves a gap"),
    "gap between": (
        raw({"a": entry(), "b": entry(offsets=(16, 24))}, b"\0" * 24),
        "b: its byte range leaves a gap",
    ),
    "data truncated": (raw({"a": entry()}, b"\0" * 7), "truncated: .* bytes, the header describes"),
    "data too long": (raw({"a": entry()}, b"\0" * 9), "longer than its header says"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_by_name_before_anything_is_read(tmp_path, damage):
    content, message = DAMAGED[damage]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged\.safetensors: .*{message}"):
        TensorFile(path)


def test_a_header_over_the_formats_limit_is_refused_without_being_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 100_000_100)  # a hole: takes no disk
    with pytest.raises(UserError, match="header of 100000001 bytes is over the format's limit"):
        TensorFile(path)


GOOD = save({"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2, 3])})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, 8))
def test_a_changed_byte_is_either_refused_or_read_as_the_library_reads_it(at, value, cut):
    damaged = GOOD[:at] + bytes([value]) + GOOD[at + 1 : len(GOOD) - cut]
    with tempfile.NamedTemporaryFile() as temporary:
        Path(temporary.name).write_bytes(damaged)
        try:
            with TensorFile(Path(temporary.name)) as file:
                read = {name: file.read(info) for name, info in file.tensors.items()}
        except UserError:
            return
    theirs = load(damaged)
    assert {name: raw_bytes(tensor) for name, tensor in read.items()} == {
        name: raw_bytes(tensor) for name, tensor in theirs.items()
    }


# Where this reader is stricter than the library: it will not carry on what it could not rewrite.
STRICTER = {"33 dimensions"}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_library_refuses_the_same_files(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    path.write_bytes(DAMAGED[damage][0])
    if damage in STRICTER:
        assert set(load_file(path)) == {"a"}
    else:
        with pytest.raises((SafetensorError, OSError)):
            load_file(path)


# -- blocks of rows ------------------------------------------------------------


def info(*shape):
    return TensorInfo("a", torch.float32, shape, Path(), 0, 4 * math.prod(shape))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 200), st.integers(0, 50), st.integers(1, 3000))
def test_blocks_cover_every_row_once(rows, columns, elements):
    blocks = list(row_blocks(info(rows, columns), elements))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    most = max(1, elements // columns if columns else rows)  # rows of nothing are one block
    assert all(stop - start <= most for start, stop in blocks)


def test_a_scalar_and_a_vector_are_cut_too():
    assert list(row_blocks(info(), 10)) == [(0, 1)]
    assert list(row_blocks(info(7), 3)) == [(0, 3), (3, 6), (6, 7)]
    assert list(row_blocks(info(1, 100), 3)) == [(0, 1)]
    assert list(row_blocks(info(0, 4), 3)) == []
