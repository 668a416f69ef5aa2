"""Bounds of what rounding can do to a merge: exact rationals, and every order of summation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from taskvec.bounds import Family, bound_rows, delta_error, families, gamma, merged_interval
from taskvec.rounding import (
    BF16,
    FORMATS,
    FP16,
    FP32,
    ONCE,
    RECIPES,
    Format,
    is_power_of_two,
    loses,
    merge_rows,
    recipe_delta,
    subtract_rows,
)
from taskvec.updates.products import LowRank
from tests.certified import RECIPE, update_of

SCALINGS = (1.0, -2.0, 0.3, 16 / math.sqrt(8))


def test_gamma_bounds_a_chain_of_roundings() -> None:
    """(1 + u)^k - 1 and 1 - (1 - u)^k are within gamma_k = k u / (1 - k u), exactly."""
    u = Fraction(1, 2**24)
    for k in (1, 2, 9, 65, 1025):
        exact = k * u / (1 - k * u)
        assert abs(Fraction(gamma(k)) / exact - 1) < Fraction(1, 2**50)
        assert (1 + u) ** k - 1 <= exact
        assert 1 - (1 - u) ** k <= exact


def exactly(tensor: torch.Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in tensor.double().tolist()]


def flat(rows: list[list[Fraction]]) -> list[Fraction]:
    return list(itertools.chain.from_iterable(rows))


def product(B: torch.Tensor, A: torch.Tensor, scaling: float) -> list[list[Fraction]]:
    """s * B @ A in exact rationals."""
    left, right, s = exactly(B), exactly(A), Fraction(scaling)
    return [
        [
            s * sum((b * a for b, a in zip(row, column, strict=True)), Fraction(0))
            for column in zip(*right, strict=True)
        ]
        for row in left
    ]


def half(value: Fraction, format: Format) -> Fraction:
    """Half an ulp of a format at a rational number, from its binary exponent."""
    if value == 0:
        return Fraction(format.smallest_half_ulp)
    numerator, denominator = abs(value).as_integer_ratio()
    exponent = numerator.bit_length() - denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    return max(Fraction(2) ** (exponent - format.bits), Fraction(format.smallest_half_ulp))


def reference_bound(
    family: Family,
    update: LowRank,
    merged: Any,
    base: Any,
    subtracted: Any,
    base_format: Any,
    format: Any,
) -> list[list[Fraction]]:
    """The bound of LORA_VS_TASK_VECTOR_ANALYSIS.md, term by term in rationals."""
    u = Fraction(1, 2**24)
    used = update.rounded_factors(format.dtype) if family.round_factors else update
    plain = float(np.float32(update.scaling)) == update.scaling
    k = update.rank + (1 if plain else 2)
    error = k * u / (1 - k * u)
    M, W, delta = exactly(merged), exactly(base), product(update.B, update.A, update.scaling)
    from_W = exactly(subtracted)
    moved = product(used.B, used.A, used.scaling)
    size = product(used.B.abs(), used.A.abs(), abs(used.scaling))

    def h(value: Fraction, p: Format) -> Fraction:
        before = 0 if p is FP32 else u * (2 ** (p.bits + 1) + 1)
        return half(value, p) * (1 + before)

    def element(i: int, j: int) -> Fraction:
        bound = h(M[i][j], format) + u * abs(M[i][j] - from_W[i][j])
        computed = error * size[i][j] + abs(moved[i][j] - delta[i][j])
        bound += computed
        if base_format is not None and base_format is not format:
            bound += h(W[i][j], base_format)
        if family.round_base:
            bound += h(W[i][j], format)
        if family.round_delta:
            D, s = abs(delta[i][j]) + computed, abs(Fraction(update.scaling))
            if family.round_factors and not is_power_of_two(update.scaling):
                first = s * h(D / s, format)
                bound, D = bound + first, D + first
            bound += h(D, format)
        return bound

    return [[element(i, j) for j in range(len(W[0]))] for i in range(len(W))]


BASES = [  # dtype of the base, and what it is rounded to before it is subtracted
    (torch.float32, None),
    (torch.float32, FP16),
    (torch.float32, BF16),
    (torch.bfloat16, None),
    (torch.float64, None),
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_bounds_hold_and_are_what_the_proof_says_in_exact_rationals(format, scaling) -> None:
    """|T - delta| without any rounding, against the bound, which is itself rebuilt in rationals."""
    update = update_of(4, 3, 6, scaling)
    delta, exact = update.exact(0, 4), flat(product(update.B, update.A, scaling))
    generator = torch.Generator().manual_seed(2)
    for (stored, base_format), recipe in itertools.product(BASES, RECIPES):
        base = (torch.randn(4, 3, generator=generator).double() * 0.02 / 3).to(stored)
        wide = base.to(torch.promote_types(stored, torch.float32))
        subtracted = wide if base_format is None else base_format.round(wide)
        merged = merge_rows(recipe, base, recipe_delta(recipe, update, 0, 4, format), format)
        T = flat(exactly(subtract_rows(merged, subtracted)))
        error = [abs(t - d) for t, d in zip(T, exact, strict=True)]
        holds = []
        for family in families(format, stored):
            right = flat(
                reference_bound(family, update, merged, wide, subtracted, base_format, format)
            )
            for dtype in (torch.float64, torch.float32):
                bound = bound_rows(
                    family,
                    update,
                    0,
                    4,
                    delta=delta,
                    merged=merged.to(dtype),
                    base=wide.to(dtype),
                    base_format=base_format,
                    format=format,
                )
                assert bound.dtype == dtype
                mine = flat(exactly(bound))
                for value, expected in zip(mine, right, strict=True):
                    assert expected <= value <= expected * (1 + Fraction(1, 2**17))
            holds.append(all(e <= b for e, b in zip(error, mine, strict=True)))
        assert holds[-1], (recipe.name, stored, base_format)  # the loosest covers every recipe,
        assert holds == sorted(holds)  # and what one covers, those after it do


def test_each_family_allows_what_the_one_before_allows() -> None:
    update = update_of(30, 20, 4, 0.7)
    base = torch.randn(30, 20, generator=torch.Generator().manual_seed(3)) * 0.02
    for format in (FP16, BF16):
        merged = merge_rows(ONCE, base, update.delta(0, 30), format)
        for base_format in (None, FP16, BF16):
            bounds = [
                bound_rows(
                    family,
                    update,
                    0,
                    30,
                    delta=update.exact(0, 30),
                    merged=merged.double(),
                    base=base.double(),
                    base_format=base_format,
                    format=format,
                )
                for family in families(format, torch.float32)
            ]
            assert len(bounds) == 4
            for tight, loose in itertools.pairwise(bounds):
                # the last one measures from the rounded factors, a different |B| |A|
                assert bool((loose >= tight * (1 - 2.0**-10)).all())


def test_what_a_format_holds_is_not_rounded() -> None:
    assert not loses(torch.bfloat16, FP32)
    assert not loses(torch.float16, FP16)
    assert loses(torch.float16, BF16)
    assert loses(torch.bfloat16, FP16)
    assert loses(torch.float64, FP32)
    assert [len(families(FP32, dtype)) for dtype in (torch.float16, torch.float32)] == [1, 1]
    assert [f.round_base for f in families(FP32, torch.float64)] == [False, True]
    assert not any(family.round_base for family in families(BF16, torch.bfloat16))


def summations(B: torch.Tensor, A: torch.Tensor) -> dict[str, torch.Tensor]:
    """B @ A in fp32 in other orders than the library's, with and without fused multiply-add."""
    terms = [B[:, k : k + 1] * A[k : k + 1] for k in range(A.shape[0])]
    pairs = terms
    while len(pairs) > 1:
        pairs = [sum(pairs[i + 1 : i + 2], pairs[i]) for i in range(0, len(pairs), 2)]
    fused = torch.zeros_like(terms[0])
    for k in range(A.shape[0]):
        fused = (fused.double() + B[:, k : k + 1].double() * A[k : k + 1].double()).float()
    return {
        "library": B @ A,
        "forward": sum(terms[1:], terms[0]),
        "backward": sum(terms[-2::-1], terms[-1]),
        "pairwise": pairs[0],
        "fused": fused,
        "float64": (B.double() @ A.double()).float(),
    }


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_delta_error_covers_every_order_of_summation(rank: int, scaling: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    A, B = torch.randn(rank, 9, generator=generator), torch.randn(11, rank, generator=generator)
    B[:, rank // 2 :] *= -1 + 1e-6  # sums that cancel
    update = LowRank("weight", A, B, scaling)
    exact, bound = product(B, A, scaling), exactly(delta_error(update, 0, 11))
    for way, sums in summations(B, A).items():
        for D in (sums * scaling, summations(B * scaling, A)[way]):
            for mine, right, limit in zip(exactly(D), exact, bound, strict=True):
                for d, e, b in zip(mine, right, limit, strict=True):
                    assert abs(d - e) <= b, way
    double = exactly(update.exact(0, 11))
    for mine, right, limit in zip(double, exact, bound, strict=True):
        for d, e, b in zip(mine, right, limit, strict=True):
            assert abs(d - e) <= b / 2**27  # what `exact` lacks is nothing beside that


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
@pytest.mark.parametrize("name", RECIPE)
def test_other_computers_stay_in_the_interval_and_changed_elements_do_not(format, name) -> None:
    """Where |D| is well below |W|, one step to the next number is out of what T may be."""
    recipe, update = RECIPE[name], update_of(40, 30, 8, 0.03)
    generator = torch.Generator().manual_seed(4)
    base = (
        torch.randn(40, 30, generator=generator).sign()
        * 0.02
        * (1 + torch.rand(40, 30, generator=generator))
    )
    used = update.rounded_factors(format.dtype) if recipe.round_factors else update
    everywhere = torch.ones(40, 30, dtype=torch.bool)
    strict, lenient = (
        merged_interval(
            recipe,
            update,
            0,
            40,
            base=base,
            format=format,
            where=everywhere,
            rounded_anywhere=anywhere,
        )
        for anywhere in (False, True)
    )
    assert bool((lenient[0] <= strict[0]).all() and (strict[1] <= lenient[1]).all())
    for way, sums in summations(used.B, used.A).items():
        D = sums * update.scaling
        D = format.round(D) if recipe.round_delta else D
        merged = merge_rows(recipe, base, D, format)
        assert inside(merged, strict).all(), way
        for step in (1, -1):
            bits = torch.int32 if format is FP32 else torch.int16
            changed = (merged.view(bits) + step).view(format.dtype)
            assert float(inside(changed, strict).float().mean()) < 0.1
            assert float(inside(changed, lenient).float().mean()) < 0.1


def inside(merged: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (ends[0] <= merged.flatten()) & (ends[1] >= merged.flatten())


@pytest.mark.parametrize("format", [FP16, BF16], ids=lambda format: format.name)
def test_rounding_the_delta_anywhere_stays_in_the_lenient_interval(format: Format) -> None:
    """Arithmetic in 16 bits that is no recipe: s B rounded, s A rounded, B @ A and then s B @ A."""
    for scaling, name in itertools.product((0.7, 3.0), ("once", "peft", "peft-half")):
        update, recipe = update_of(40, 30, 8, scaling), RECIPE[name]
        base = torch.randn(40, 30, generator=torch.Generator().manual_seed(5)) * 0.01
        A, B = format.round(update.A), format.round(update.B)
        ends = merged_interval(
            recipe,
            update,
            0,
            40,
            base=base,
            format=format,
            where=torch.ones(40, 30, dtype=torch.bool),
            rounded_anywhere=True,
        )
        for D in (
            format.round(B * scaling) @ A,
            B @ format.round(A * scaling),
            format.round(format.round(B @ A) * scaling),
            format.round(update.B @ update.A) * scaling,
        ):
            assert inside(merge_rows(recipe, base, D, format), ends).all()


def test_rounding_a_subnormal_delta_stays_in_the_lenient_interval() -> None:
    """Down there half an ulp of D is far more than any unit roundoff of it."""
    update, recipe = update_of(40, 30, 8, 0.7), RECIPE["once"]
    update = LowRank("weight", update.A, update.B * 2.0**-12, 0.7)
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(6)) * 1e-6
    ends = merged_interval(
        recipe,
        update,
        0,
        40,
        base=base,
        format=FP16,
        where=torch.ones(40, 30, dtype=torch.bool),
        rounded_anywhere=True,
    )
    D = FP16.round(FP16.round(update.B @ update.A) * 0.7)
    merged = merge_rows(recipe, base, D, FP16)
    assert not torch.equal(merged, merge_rows(recipe, base, update.delta(0, 40), FP16))
    assert inside(merged, ends).all()


@pytest.mark.parametrize("format", [FP16, BF16], ids=lambda format: format.name)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_that_is_not_rounded_to_fp32_first_stays_in_the_interval(
    format: Format, sign: float
) -> None:
    """W + D lies a little beyond a tie, less than fp32 can tell: there it is the tie, and even."""
    tie, little = 1 + format.unit_roundoff, 2.0**-27
    D = format.unit_roundoff / 4 + little
    update = LowRank("weight", torch.ones(1, 1), torch.tensor([[sign * D]]), 1.0)
    base = torch.tensor([[sign * (tie + little - D)]])
    assert float(update.delta(0, 1)) == sign * D and float(base) + sign * D == sign * (tie + little)
    by_fp32 = merge_rows(ONCE, base, update.delta(0, 1), format)
    at_once = torch.tensor([[sign * (1 + 2 * format.unit_roundoff)]]).to(format.dtype)
    assert float(by_fp32) == sign
    low, high = merged_interval(
        ONCE,
        update,
        0,
        1,
        base=base,
        format=format,
        where=torch.ones(1, 1, dtype=torch.bool),
        rounded_anywhere=False,
    )
    for merged in (by_fp32, at_once):
        assert low <= merged <= high
