"""The kept SVDs of base matrices: exact, checked when read, and dispensable."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from taskvec import cli
from taskvec.intruders import basesvd
from taskvec.intruders.basesvd import SvdCache, default_cache_dir, svd_bytes
from tests.checks import edit_tensors, names


@pytest.fixture
def stored():
    return torch.randn(12, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def computed(monkeypatch):
    """How often an SVD was computed."""
    calls = []
    original = basesvd.base_svd

    def counting(matrix):
        calls.append(matrix.shape)
        return original(matrix)

    monkeypatch.setattr(basesvd, "base_svd", counting)
    return calls


def get(directory, stored, transposed=False):
    matrix = stored.double().T.contiguous() if transposed else stored.double()
    return SvdCache(directory).get(stored, matrix, transposed=transposed)


def assert_is_numpys(svd, matrix):
    np.testing.assert_allclose(svd.values, np.linalg.svd(matrix, compute_uv=False), rtol=1e-12)
    rebuilt = (svd.left * svd.values) @ svd.right.T
    np.testing.assert_allclose(rebuilt, matrix, atol=1e-12)


def test_it_is_computed_once_and_read_with_the_same_bits(tmp_path, stored, computed):
    first, second = get(tmp_path, stored), get(tmp_path, stored)
    assert len(computed) == 1
    for part in ("left", "values", "right"):
        assert torch.equal(getattr(first, part), getattr(second, part))
    assert_is_numpys(second, stored.double().numpy())
    assert len(names(tmp_path)) == 1
    size = (tmp_path / names(tmp_path)[0] / "svd.safetensors").stat().st_size
    assert 0 < size - svd_bytes((12, 20)) < 1000


def test_another_tensor_dtype_or_orientation_has_another_entry(tmp_path, stored, computed):
    changed = stored.clone()
    changed[3, 4] += 1e-6
    for tensor in (stored, changed, stored.half(), stored.reshape(20, 12)):
        get(tmp_path, tensor)
    found = get(tmp_path, stored, transposed=True)
    assert_is_numpys(found, stored.double().numpy().T)
    assert len(computed) == len(names(tmp_path)) == 5


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 0x40
    file.write_bytes(content)


DAMAGE = {
    "a bit": flip_byte,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "no header": lambda file: file.write_bytes(b"not a safetensors file"),
    "a pickle": lambda file: file.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "empty": lambda file: file.write_bytes(b""),
    "another dtype": lambda file: edit_tensors(file, lambda t: t.update(left=t["left"].float())),
    "another matrix": lambda file: edit_tensors(file, lambda t: t.update(values=t["values"] * 1.1)),
    "one element": lambda file: edit_tensors(file, lambda t: t["left"][2, 3].add_(1e-8)),
    "not a number": lambda file: edit_tensors(file, lambda t: t["right"][0].fill_(float("nan"))),
    "an infinity": lambda file: edit_tensors(file, lambda t: t["values"][0].fill_(float("inf"))),
    "out of order": lambda file: edit_tensors(file, lambda t: t.update(values=t["values"].flip(0))),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_computed_again_and_replaced(tmp_path, stored, computed, damage):
    get(tmp_path, stored)
    file = tmp_path / names(tmp_path)[0] / "svd.safetensors"
    damage(file)
    assert_is_numpys(get(tmp_path, stored), stored.double().numpy())
    assert len(computed) == 2
    get(tmp_path, stored)
    assert len(computed) == 2


def test_a_directory_that_cannot_be_written_costs_time_only(tmp_path, stored, capsys):
    (tmp_path / "file").write_text("in the way")
    cache = SvdCache(tmp_path / "file" / "below")
    for _ in range(2):
        found = cache.get(stored, stored.double(), transposed=False)
        assert_is_numpys(found, stored.double().numpy())
    assert capsys.readouterr().err.count("are not kept") == 1


def test_somebody_elses_files_are_left_alone(tmp_path, stored):
    get(tmp_path, stored)
    entry = tmp_path / names(tmp_path)[0]
    (entry / "svd.safetensors").unlink()
    (entry / "notes.txt").write_text("mine")
    assert_is_numpys(get(tmp_path, stored), stored.double().numpy())
    assert names(entry) == ["notes.txt"]


def test_nothing_is_kept_without_a_directory_or_room(tmp_path, stored, capsys):
    SvdCache(None).get(stored, stored.double(), transposed=False)
    cache = SvdCache(tmp_path / "cache")
    cache.refuse_if_full(1 << 60)
    cache.get(stored, stored.double(), transposed=False)
    assert "too little room" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_the_default_directory_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "taskvec" / "svd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "taskvec" / "svd"


def test_a_lock_of_another_run_costs_time_only(tmp_path, stored, monkeypatch):
    def locked(*_):
        raise cli.UserError("another run is writing it")

    monkeypatch.setattr(basesvd, "output_directory", locked)
    assert_is_numpys(get(tmp_path, stored), stored.double().numpy())
