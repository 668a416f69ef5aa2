"""Certificates of single parameters, and parameters to certify."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from taskvec.certificate import (
    Block,
    ParameterCertificate,
)
from taskvec.compare import Comparison, Magnitude, PairSums, ParameterResult
from taskvec.difference import Difference
from taskvec.rounding import (
    FORMATS,
    RECIPES,
    Format,
    Recipe,
    merge_rows,
    recipe_delta,
    subtract_rows,
)
from taskvec.updates.products import LowRank
from taskvec.verdict import judge

RECIPE = {recipe.name: recipe for recipe in RECIPES}
by_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)


def subtracted_from(base: torch.Tensor, base_format: Format | None) -> torch.Tensor:
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    return base_format.round(wide) if base_format else wide


def certify(
    update: LowRank,
    base: torch.Tensor,
    merged: torch.Tensor,
    format: Format,
    *,
    base_format: Format | None = None,
    given: bool = True,
    rows: int | None = None,
) -> ParameterCertificate:
    """The certificate of one parameter.

    Args:
        given: M is at hand; otherwise only its difference from W is.
        rows: of a block; all of them if None.
    """
    certificate = ParameterCertificate(
        update, format, base.dtype, base_format=base_format, elements=base.numel()
    )
    for start in range(0, base.shape[0], rows or base.shape[0]):
        stop = min(base.shape[0], start + (rows or base.shape[0]))
        W, M = base[start:stop], merged[start:stop]
        subtracted = subtracted_from(W, base_format)
        T = subtract_rows(M, subtracted)
        block = Block(start, stop, W, subtracted, T, M if given else None)
        assert certificate.add(block, update.exact(start, stop))
    return certificate


def result_of(
    update: LowRank, base: torch.Tensor, merged: torch.Tensor, format: Format, **options: Any
) -> ParameterResult:
    """What the verdict is told of one parameter."""
    certificate = certify(update, base, merged, format, **options)
    T = subtract_rows(merged, subtracted_from(base, options.get("base_format")))
    magnitude, sums = Magnitude(), PairSums()
    magnitude.add(T)
    sums.add(Difference(T, update.exact(0, base.shape[0])))
    kind = "unexplained" if certificate.violations else "lora"
    comparison = Comparison(sums, certificate, update.rank, update.scaling)
    return ParameterResult("weight", tuple(base.shape), kind, magnitude, comparison=comparison)


def merged_by(recipe: Recipe, update: LowRank, base: torch.Tensor, format: Format) -> torch.Tensor:
    delta = recipe_delta(recipe, update, 0, base.shape[0], format)
    return merge_rows(recipe, base, delta, format)


def update_of(rows: int, columns: int, rank: int, scaling: float, *, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=generator) * 0.05
    B = torch.randn(rows, rank, generator=generator) * 0.02
    return LowRank("weight", A, B, scaling)


def realistic(
    rows: int, columns: int, rank: int, scaling: float, *, size: float = 1.0, seed: int = 0
) -> tuple[LowRank, torch.Tensor]:
    """An update and a base whose update is ``size`` times 1/100 of it, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
    B = torch.randn(rows, rank, generator=generator) * size
    base = torch.randn(rows, columns, generator=generator) * 100 * abs(scaling)
    return LowRank("weight", A, B * math.sqrt(columns / rank), scaling), base


def by_numpy(B: torch.Tensor, A: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.from_numpy(B.double().numpy() @ A.double().numpy()).float() * scaling


def backwards(B: torch.Tensor, A: torch.Tensor, scaling: float) -> torch.Tensor:
    D = torch.zeros(B.shape[0], A.shape[1])
    for k in reversed(range(A.shape[0])):
        D = D + B[:, k : k + 1] * A[k : k + 1]
    return D * scaling


def fused(B: torch.Tensor, A: torch.Tensor, scaling: float) -> torch.Tensor:
    D = torch.zeros(B.shape[0], A.shape[1])
    for k in range(A.shape[0]):
        D = (D.double() + B[:, k : k + 1].double() * A[k : k + 1].double()).float()
    return D * scaling


def in_pairs(B: torch.Tensor, A: torch.Tensor, scaling: float) -> torch.Tensor:
    terms = [B[:, k : k + 1] * A[k : k + 1] for k in range(A.shape[0])]
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0] * scaling


def permuted(B: torch.Tensor, A: torch.Tensor, scaling: float) -> torch.Tensor:
    order = torch.arange(A.shape[0]).roll(A.shape[0] // 2)
    return (B[:, order] @ A[order]) * scaling


def verdict_of(update: LowRank, base: torch.Tensor, merged: torch.Tensor, format: Format) -> str:
    return judge([result_of(update, base, merged, format)]).name
