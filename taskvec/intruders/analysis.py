"""Intruder dimensions of several fine-tuned versions of one base, matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from taskvec.architecture import place
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.intruders.basesvd import BaseSVD, SvdCache
from taskvec.intruders.directions import (
    dense_directions,
    low_rank_directions,
    similarity_picture,
)
from taskvec.intruders.leading import Triplets
from taskvec.intruders.tuned import Tuned, is_stored_transposed


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        top_k: how many leading vectors of a tuned matrix are tested.
        epsilons: thresholds of the similarity; the first is the one that is reported first.
        leading: how many vectors are looked at for the figures, at least top_k.
    """

    top_k: int
    epsilons: tuple[float, ...]
    leading: int


@dataclass(frozen=True)
class Finding:
    """One matrix of one tuned version.

    Attributes:
        entry: what the JSON document says of it.
        picture: |cos(x_i, y_j)| of the leading vectors; None where the matrix has not changed.
        intruders: their triplets at the first epsilon; None where there are none.
    """

    entry: dict[str, Any]
    picture: torch.Tensor | None = None
    intruders: Triplets | None = None


@dataclass(frozen=True)
class MatrixFindings:
    """One matrix of the base and what became of it: a finding for each tuned version, by label."""

    name: str
    base: dict[str, Any]
    versions: dict[str, Finding]


def analyze_matrices(
    base: Checkpoint,
    tuned: Sequence[Tuned],
    names: Sequence[str],
    settings: Settings,
    cache: SvdCache,
    device: torch.device,
) -> Iterator[MatrixFindings | None]:
    """The findings of each matrix in turn; None for one that no version has changed.

    One matrix of the base with its SVD, and one tuned matrix, are in memory at a time.

    Raises:
        UserError: a matrix holds NaN or infinity.
    """
    for name in names:
        yield _analyze(base, tuned, name, settings, cache, device)


def _analyze(
    base: Checkpoint,
    tuned: Sequence[Tuned],
    name: str,
    settings: Settings,
    cache: SvdCache,
    device: torch.device,
) -> MatrixFindings | None:
    stored = base.read(name)
    changed = [one for one in tuned if _has_changed(one, name, stored)]
    if not changed:
        return None
    transposed = is_stored_transposed(base, name, tuned)
    matrix = _oriented(stored.to(device, torch.float64), transposed)
    _refuse_non_finite(base.source, name, matrix)
    svd = cache.get(stored, matrix, transposed=transposed)
    versions = {
        one.label: _finding(one, name, stored, transposed, svd, settings)
        if one in changed
        else Finding({"changed": False, "intruders": {_key(e): [] for e in settings.epsilons}})
        for one in tuned
    }
    return MatrixFindings(name, _base_entry(name, svd, transposed, settings), versions)


def _has_changed(one: Tuned, name: str, stored: torch.Tensor) -> bool:
    if not one.changes(name) or one.kind == "lora":
        return one.changes(name)
    theirs = one.rows(name, stored, 0, len(stored), torch.device("cpu"))
    return not torch.equal(theirs, stored.double())


def _finding(
    one: Tuned,
    name: str,
    stored: torch.Tensor,
    transposed: bool,
    svd: BaseSVD,
    settings: Settings,
) -> Finding:
    device = svd.values.device
    factors = one.factors(name, device)
    if factors is not None:
        B, A = factors.B.double(), factors.A.double()
        found = low_rank_directions(svd, B, A, factors.scaling, settings.leading)
    else:
        matrix = _oriented(one.rows(name, stored, 0, len(stored), device), transposed)
        _refuse_non_finite(one.source, name, matrix)
        found = dense_directions(svd, matrix, settings.leading)
    intruders = {_key(e): found.intruders(e, settings.top_k) for e in settings.epsilons}
    chosen = intruders[_key(settings.epsilons[0])]
    entry = {
        "changed": True,
        "route": "dense" if factors is None else "low rank",
        "intruders": {key: [j + 1 for j in found] for key, found in intruders.items()},
        "singular_values": found.values.tolist(),
        "max_similarity": found.similarity.tolist(),
        "nearest_base_vector": (found.nearest + 1).tolist(),
        "outside": found.outside.tolist(),
    }
    picture = similarity_picture(found, settings.leading).float().cpu()
    return Finding(entry, picture, found.triplets(chosen) if chosen else None)


def _base_entry(name: str, svd: BaseSVD, transposed: bool, settings: Settings) -> dict[str, Any]:
    where = place(name)
    m, n = len(svd.left), len(svd.right)
    return {
        "layer": where.layer,
        "block": where.block,
        "module": where.module,
        "shape": [m, n],
        "stored_transposed": transposed,
        "outputs_without_base": m - svd.rank,
        "base_singular_values": svd.values[: settings.leading].tolist(),
    }


def _oriented(matrix: torch.Tensor, transposed: bool) -> torch.Tensor:
    """(out, in), whichever way it is stored."""
    return matrix.T.contiguous() if transposed else matrix


def _refuse_non_finite(source: str, name: str, matrix: torch.Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise UserError(f"{source}: {name}: holds NaN or infinity; it has no singular vectors")


def _key(epsilon: float) -> str:
    return f"{epsilon:g}"
