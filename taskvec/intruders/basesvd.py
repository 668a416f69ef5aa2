"""The SVD of a base matrix, computed once and kept on disk.

A file per matrix, named by a hash of the tensor, in a directory that is safe to delete. What is
read from it is checked against the matrix before it is believed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from taskvec import cli
from taskvec.header import TensorInfo
from taskvec.output import output_directory
from taskvec.tensorfile import TensorFile, TensorFileWriter

# Of the largest singular value: closer ones count as equal, smaller ones as zero. Float64 still
# tells vectors apart to 1e-6 there, and no verdict hangs on less.
EQUAL = 1e-8

_VERSION = "taskvec base SVD 1"
_FILE = "svd.safetensors"
_PARTS = ("left", "values", "right")
# ‖(W - U S V^T) x‖ and ‖(U^T U - 1) x‖ for random x: LAPACK stays below 1e-13 at any size.
_ACCURACY = 1e-11


@dataclass(frozen=True)
class BaseSVD:
    """W = U diag(S) V^T of a base matrix (m, n), in float64; p = min(m, n).

    Attributes:
        left: U (m, p), orthonormal columns. Square, a basis of all outputs, where m <= n.
        values: S (p,), descending.
        right: V (n, p), orthonormal columns.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    @cached_property
    def rank(self) -> int:
        """How many singular values are not zero: the first ones."""
        return int((self.values > EQUAL * self.values[:1]).sum())

    @cached_property
    def repeated(self) -> list[tuple[int, int]]:
        """(start, stop) of every group of two and more that are equal and not zero."""
        return repeated(self.values[: self.rank])


def repeated(values: torch.Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every group of two and more equal values; values (p,) descending."""
    bounds = [0, *steps_down(values), len(values)]
    return [(start, stop) for start, stop in itertools.pairwise(bounds) if stop - start > 1]


def steps_down(values: torch.Tensor) -> list[int]:
    """The i for which values[i] is no longer equal to values[i - 1]; values (p,) descending."""
    listed: list[float] = values.tolist()
    return [i for i in range(1, len(listed)) if listed[i - 1] - listed[i] > EQUAL * listed[0]]


def base_svd(matrix: torch.Tensor) -> BaseSVD:
    """The SVD by LAPACK (on a GPU, cuSOLVER). matrix: (m, n) float64."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return BaseSVD(left, values, right.T.contiguous())


def svd_bytes(shape: tuple[int, int]) -> int:
    """What the SVD of a matrix takes on disk, but for the header."""
    return 8 * min(shape) * (sum(shape) + 1)


def default_cache_dir() -> Path:
    """``taskvec/svd`` in the user's cache directory (XDG_CACHE_HOME, else ~/.cache)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "taskvec" / "svd"


class SvdCache:
    """Keeps the SVDs of base matrices in a directory; None keeps none.

    Nothing that happens to the directory is an error: what cannot be read or does not fit its
    matrix is computed again, and what cannot be written is not kept. One notice says so.

    Attributes:
        hits: how many were found.
        written: bytes that were added.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.hits = 0
        self.written = 0

    def get(self, stored: torch.Tensor, matrix: torch.Tensor, *, transposed: bool) -> BaseSVD:
        """The SVD of a matrix.

        Args:
            stored: the tensor as the file holds it, on the CPU, by which it is recognised.
            matrix: (m, n) float64, what the SVD is of: the tensor, or its transpose.
            transposed: which of the two.
        """
        if self.directory is None:
            return base_svd(matrix)
        entry = self.directory / _key(stored, transposed)
        found = _read(entry / _FILE, matrix)
        if found is not None:
            self.hits += 1
            return found
        found = base_svd(matrix)
        self._keep(entry, found)
        return found

    def refuse_if_full(self, nbytes: int) -> None:
        """Keep nothing where there is no room for it and as much again."""
        if self.directory is None:
            return
        parent = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        if shutil.disk_usage(parent).free < 2 * nbytes:
            cli.notice(f"{self.directory}: too little room to keep the base's SVDs; none is kept.")
            self.directory = None

    def _keep(self, entry: Path, svd: BaseSVD) -> None:
        try:
            with output_directory(entry, [_FILE]) as partial:
                parts = {name: getattr(svd, name) for name in _PARTS}
                specs = [(name, part.dtype, tuple(part.shape)) for name, part in parts.items()]
                with TensorFileWriter(partial / _FILE, specs, {"content": _VERSION}) as file:
                    for name, part in parts.items():
                        file.write(name, part)
            self.written += (entry / _FILE).stat().st_size
        except (OSError, cli.UserError) as error:
            cli.notice(f"{entry.parent}: the base's SVDs are not kept: {error}")
            self.directory = None


def _key(stored: torch.Tensor, transposed: bool) -> str:
    what = f"{_VERSION} {stored.dtype} {tuple(stored.shape)} {transposed} "
    digest = hashlib.sha256(what.encode())
    flat = stored.contiguous().view(-1).view(torch.uint8)
    digest.update(memoryview(flat.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _read(path: Path, matrix: torch.Tensor) -> BaseSVD | None:
    """A kept SVD, or None where there is none or it is not this matrix's."""
    m, n = matrix.shape
    p = min(m, n)
    shapes = {"left": (m, p), "values": (p,), "right": (n, p)}
    if not path.is_file():
        return None
    try:
        with TensorFile(path) as file:
            if not _are_shaped(file.tensors, shapes):
                return None
            parts = [file.read(file.tensors[name]).to(matrix.device) for name in _PARTS]
    except (OSError, cli.UserError):
        return None
    svd = BaseSVD(*parts)
    return svd if _is_svd_of(svd, matrix) else None


def _are_shaped(found: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]]) -> bool:
    return {name: info.shape for name, info in found.items()} == shapes and all(
        info.dtype == torch.float64 for info in found.values()
    )


def _is_svd_of(svd: BaseSVD, matrix: torch.Tensor) -> bool:
    """Whether random vectors are mapped as the matrix maps them, through orthonormal bases.

    A single wrong element moves a random vector by its own size, so this finds any damage that
    could be seen in a result.
    """
    values = svd.values
    if not bool(torch.isfinite(values).all()) or bool((values.diff() > 0).any()):
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], 2, generator=generator, dtype=torch.float64)
    probe = probe.to(matrix.device)
    size = float(torch.linalg.vector_norm(probe))
    image = matrix @ probe
    rebuilt = svd.left @ (values[:, None] * (svd.right.T @ probe))
    errors = [_distance(rebuilt, image) / (size * max(float(values[:1].sum()), 1e-300))]
    core = torch.randn(len(values), 2, generator=generator, dtype=torch.float64).to(matrix.device)
    for basis in (svd.left, svd.right):
        again = basis.T @ (basis @ core)
        errors.append(_distance(again, core) / float(torch.linalg.vector_norm(core)))
    return all(error <= _ACCURACY for error in errors)


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(left - right))
