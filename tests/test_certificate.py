"""The certificate: no false alarm, a tight bound, and no change to a merge that goes unnoticed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compare_lora_task_vector import compare
from merge_lora import merge
from taskvec.certificate import (
    HISTOGRAM_ELEMENTS,
    ULP_BINS,
    ULP_RANGE,
    Block,
    ParameterCertificate,
    common_recipes,
)
from taskvec.compare import Comparison, Magnitude, PairSums, ParameterResult
from taskvec.rounding import (
    BF16,
    FORMATS,
    FP16,
    FP32,
    ONCE,
    RECIPES,
    Format,
    Recipe,
    families,
    is_power_of_two,
    merge_rows,
    recipe_delta,
    subtract_rows,
)
from taskvec.updates.products import LowRank
from taskvec.verdict import judge, rounding_cost
from tests.checks import edit_tensors
from tests.models import peft_merge

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
    sums.add(T, update.exact(0, base.shape[0]))
    kind = "unexplained" if certificate.violations else "lora"
    comparison = Comparison(sums, certificate, update.rank, update.scaling)
    return ParameterResult("weight", tuple(base.shape), kind, magnitude, comparison=comparison)


def merged_by(recipe: Recipe, update: LowRank, base: torch.Tensor, format: Format) -> torch.Tensor:
    delta = recipe_delta(recipe, update, 0, base.shape[0], format)
    return merge_rows(recipe, base, delta, format)


# --- no false alarm ---------------------------------------------------------------------------


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


def in_halves_on_a_gpu(
    B: torch.Tensor, A: torch.Tensor, scaling: float, dtype: torch.dtype
) -> torch.Tensor:
    """B @ A leaves the matmul in the factors' own 16 bits, and is scaled after that."""
    product = (B.to(dtype).float() @ A.to(dtype).float()).to(dtype)
    return (product * scaling).float()


OTHER_MATMULS = [by_numpy, backwards, fused, in_pairs, permuted]

SHAPES = [(1, 1), (1, 17), (17, 1), (2, 3), (5, 4), (16, 24), (33, 7), (24, 48)]
RANKS = [1, 2, 3, 4, 8, 16, 33, 64]
SCALINGS = [1.0, 2.0, 0.5, -1.0, 0.3, 1 / 3, -0.7, 16 / math.sqrt(7), 1e-3, 37.5]
STORED = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Case:
    """A random parameter, adapter and merge. The seed decides everything."""

    def __init__(self, seed: int) -> None:
        self.pick, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        pick = self.pick
        out, into = pick.choice(SHAPES)
        rank = pick.choice(RANKS)
        A, B = self.tensor(rank, into), self.tensor(out, rank)
        if pick.random() < 0.1:  # nothing learned yet, at all or in half of the rows
            B[:: pick.choice([1, 2])] = 0
        self.update = LowRank("weight", A, B, pick.choice(SCALINGS), pick.random() < 0.3)
        self.format = pick.choice([FP32, FP16, BF16])
        stored = pick.choice(STORED)
        base = self.tensor(*self.update.shape).double()
        base *= 1 + 1e-9 * self.tensor(*self.update.shape).sign()  # more bits than fp32 has
        self.base = base.clamp(-6e4, 6e4).to(stored)
        self.base_format = pick.choice([None, None, self.format, FP16, BF16, FP32])
        self.recipe = pick.choice(RECIPES)
        self.matmul = pick.choice(OTHER_MATMULS) if pick.random() < 0.5 else None
        self.merged = self.merge()
        one_thin_column = 1 in (A.shape[1], B.shape[0])  # whose tiles have their own matmul
        self.rows = None if one_thin_column else pick.choice([None, 2, 3])
        if self.rows and base.shape[0] % self.rows == 1:
            self.rows = None

    def tensor(self, *shape: int) -> torch.Tensor:
        """Magnitudes from 1e-8 to 1e3; at times sparse, subnormal, or powers of two."""
        values = torch.randn(shape, generator=self.generator) * 10 ** self.pick.uniform(-8, 3)
        kind = self.pick.random()
        if kind < 0.1:
            values[torch.rand(shape, generator=self.generator) < 0.3] = 0
        elif kind < 0.15:
            values *= 1e-35
        elif kind < 0.2:
            exponent = torch.randint(-20, 3, shape, generator=self.generator)
            values = values.sign() * 2.0**exponent
        elif kind < 0.25:
            values[::2] = 0
        return values

    def merge(self) -> torch.Tensor:
        if self.matmul is None:
            return merged_by(self.recipe, self.update, self.base, self.format)
        update, recipe = self.update, self.recipe
        if recipe.round_factors:
            update = update.rounded_factors(self.format.dtype)
        if recipe.prescaled:
            D = self.matmul(update.B * update.scaling, update.A, 1.0)
        else:
            D = self.matmul(update.B, update.A, update.scaling)
        D = D.T if update.transposed else D
        D = self.format.round(D) if recipe.round_delta else D
        return merge_rows(recipe, self.base, D, self.format)

    @property
    def reproducible(self) -> bool:
        """By the recipe's name. A power of two folded into B is the same, unless it underflows."""
        factors = torch.cat([self.update.A.flatten(), self.update.B.flatten()]).abs()
        tiny = bool(((factors > 0) & (factors < 2.0**-60)).any())
        alike = self.recipe.prescaled and is_power_of_two(self.update.scaling)
        return self.matmul is None and not (alike and tiny)


@pytest.mark.parametrize("hundred", range(10))
def test_no_false_alarm_in_a_thousand_random_cases(hundred: int) -> None:
    """Each judged from the merged weights, and from the task vector alone."""
    for seed in range(100 * hundred, 100 * hundred + 100):
        case = Case(seed)
        T = subtract_rows(case.merged, subtracted_from(case.base, case.base_format))
        bad = int((~torch.isfinite(T)).sum())
        for given in (True, False):
            result = result_of(
                case.update,
                case.base,
                case.merged,
                case.format,
                base_format=case.base_format,
                given=given,
                rows=case.rows,
            )
            assert result.comparison is not None
            certificate = result.comparison.certificate
            assert certificate.violations == certificate.non_finite == bad, seed
            assert 0 <= certificate.tally.max_ratio <= 1, seed
            assert certificate.isolated == 0, seed
            if case.reproducible:
                assert case.recipe.name in certificate.reproduced_by, seed
            assert judge([result]).holds == (bad == 0), seed


@pytest.mark.parametrize("scaling", [1.0, 2.0, 16.0, 0.25, 0.7, 16 / math.sqrt(7)])
@pytest.mark.parametrize("format", [FP16, BF16], ids=lambda format: format.name)
def test_factors_in_16_bits_on_a_gpu_are_no_false_alarm(format: Format, scaling: float) -> None:
    """PEFT with autocast_adapter_dtype=False rounds once more there: B @ A, before s.

    fp16 is subnormal below 6e-5, which is the size of common updates; there even the multiplication
    by a power of two finds bits missing.
    """
    for size, unit in itertools.product((1e-3, 0.1, 1.0, 1e3), (1.0, 2e-4, 1e-6)):
        update, base = realistic(100, 120, 8, scaling, size=size)
        update = LowRank("weight", update.A, update.B * unit, scaling)
        base = (base * unit).to(format.dtype)
        D = in_halves_on_a_gpu(update.B, update.A, scaling, format.dtype)
        merged = merge_rows(RECIPE["peft-half"], base, D, format)
        result = result_of(update, base, merged, format)
        assert judge([result]).holds == bool(merged.isfinite().all()), (size, unit)


# --- a tight bound ----------------------------------------------------------------------------


def realistic(
    rows: int, columns: int, rank: int, scaling: float, *, size: float = 1.0, seed: int = 0
) -> tuple[LowRank, torch.Tensor]:
    """An update and a base whose update is ``size`` times 1/100 of it, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
    B = torch.randn(rows, rank, generator=generator) * size
    base = torch.randn(rows, columns, generator=generator) * 100 * abs(scaling)
    return LowRank("weight", A, B * math.sqrt(columns / rank), scaling), base


# Where D is far larger than W, so that its own roundings are what the bound has to allow for.
FAMILY_CASES = [
    (format, stored, level, recipe)
    for format in (FP16, BF16)
    for stored, level, recipe in (
        (torch.float32, 0, "once"),
        (torch.float32, 1, "peft"),
        (torch.float32, 2, "peft-safe"),
        (torch.float32, 3, "peft-half"),
        (format.dtype, 0, "peft"),
        (format.dtype, 1, "peft-safe"),
        (format.dtype, 2, "peft-half"),
    )
] + [(FP32, torch.float32, 0, "once"), (FP32, torch.float16, 0, "prescaled")]


@pytest.mark.parametrize(
    ("format", "stored", "level", "name"),
    FAMILY_CASES,
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_largest_ratio_to_the_bound_is_above_nine_tenths(
    format: Format, stored: torch.dtype, level: int, name: str
) -> None:
    """Random data comes as close to the bound of its family as that, and its recipe is named."""
    size = {"peft-safe": 60.0, "peft-half": 300.0}.get(name, 1.0)
    update, base = realistic(300, 400, 8, 2.0 if name != "prescaled" else 0.7, size=size)
    base = base.to(stored)
    merged = merged_by(RECIPE[name], update, base, format)
    for given in (True, False):
        certificate = certify(update, base, merged, format, given=given, rows=100)
        assert certificate.tally.family == families(format, stored)[level]
        assert certificate.violations == 0
        assert 0.9 < certificate.tally.max_ratio <= 1
        assert name in certificate.reproduced_by


@pytest.mark.parametrize("name", RECIPE)
@pytest.mark.parametrize("format", [FP16, BF16], ids=lambda format: format.name)
def test_a_recipe_is_told_from_all_the_others(format: Format, name: str) -> None:
    """Folding s into B moves D by an fp32 ulp, of which 16 bits of so few elements keep nothing."""
    update, base = realistic(64, 80, 8, 0.7)
    certificate = certify(update, base, merged_by(RECIPE[name], update, base, format), format)
    alike = ["once", "prescaled"]
    assert certificate.reproduced_by == (alike if name in alike else [name])


def test_recipes_that_do_the_same_are_named_together() -> None:
    update, base = realistic(40, 50, 4, 0.5)
    merged = merged_by(ONCE, update, base, FP32)
    assert certify(update, base, merged, FP32).reproduced_by == list(RECIPE)  # s is a power of two
    base = base.bfloat16()
    merged = merged_by(ONCE, update, base, BF16)
    assert certify(update, base, merged, BF16).reproduced_by == ["once", "peft", "prescaled"]


def test_common_recipes_are_those_of_every_parameter() -> None:
    update, base = realistic(40, 50, 4, 0.7)
    pair = [
        certify(
            update, base.bfloat16(), merged_by(RECIPE[name], update, base.bfloat16(), BF16), BF16
        )
        for name in ("once", "peft-safe")
    ]
    assert common_recipes(pair[:1]) == ["once", "peft", "prescaled"]
    assert common_recipes(pair[1:]) == ["peft-safe"]
    assert common_recipes(pair) == []
    assert common_recipes([]) == []


def test_the_largest_ratio_is_kept_where_a_later_block_needs_a_looser_bound() -> None:
    update, base = realistic(64, 80, 8, 0.7)
    once, peft = (merged_by(RECIPE[name], update, base, FP16) for name in ("once", "peft"))
    first = certify(update, base[:32], once[:32], FP16)
    both = certify(update, base, torch.cat([once[:32], peft[32:]]), FP16, rows=32)
    assert both.tally.family == families(FP16, base.dtype)[1]
    assert both.tally.max_ratio >= first.tally.max_ratio > 0.99


def test_another_computer_changes_few_elements_of_rounded_factors() -> None:
    """It is the same rounded factors that it sums in another order: few changes are nothing odd."""
    update, base = realistic(400, 400, 8, 2.0, size=3.0)
    rounded = update.rounded_factors(torch.float16)
    for name in ("peft-lowcpu", "peft-half"):
        D = backwards(rounded.B, rounded.A, 2.0)
        D = FP16.round(D) if RECIPE[name].round_delta else D
        result = result_of(update, base, merge_rows(RECIPE[name], base, D, FP16), FP16, rows=50)
        assert result.comparison is not None
        best = result.comparison.certificate.best_recipe
        assert best.names == (name,)
        assert 0 < best.mismatches <= 4
        assert judge([result]).name == "rounding"


# --- tampering --------------------------------------------------------------------------------


def moved(merged: torch.Tensor, row: int, column: int, steps: int) -> torch.Tensor:
    """A copy with one element moved by that many representable numbers."""
    changed = merged.clone()
    bits = changed.view(torch.int32 if merged.dtype == torch.float32 else torch.int16)
    bits[row, column] += steps
    return changed


def verdict_of(update: LowRank, base: torch.Tensor, merged: torch.Tensor, format: Format) -> str:
    return judge([result_of(update, base, merged, format)]).name


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("steps", [2, -2, 5])
def test_two_ulps_in_one_element_are_out_of_bounds_in_fp32(steps: int, given: bool) -> None:
    """Where the update is well below the weight, whichever element it is."""
    update, base = realistic(64, 80, 8, 2.0)
    base = base.sign() * (base.abs() + 100)  # an update of 1/100, nowhere larger than the weight
    merged = merged_by(ONCE, update, base, FP32)
    pick = random.Random(0)
    for _ in range(40):
        row, column = pick.randrange(64), pick.randrange(80)
        changed = moved(merged, row, column, steps)
        certificate = certify(update, base, changed, FP32, given=given, rows=16)
        assert certificate.violations == 1
        assert certificate.tally.violating_rows == {row}
        worst = certificate.tally.worst
        assert worst is not None
        assert (worst.row, worst.column) == (row, column)
        assert worst.task_vector == float(changed[row, column] - base[row, column])
        assert worst.delta == pytest.approx(float(update.exact(0, 64)[row, column]), rel=1e-15)
        assert abs(worst.task_vector - worst.delta) > worst.bound


@pytest.mark.parametrize("rank", [2, 3, 8, 64])
def test_other_orders_of_summation_change_as_many_elements_as_float64(rank: int) -> None:
    """So few deviations, where summing in float64 would change many, are no other computer's."""
    for size in (1.0, 100.0):
        update, base = realistic(400, 200, rank, 1.0, size=size)
        merged = merged_by(ONCE, update, base, FP32)
        effect = certify(update, base, merged, FP32).search.order_effect
        for matmul in (backwards, in_pairs, permuted, fused):
            D = matmul(update.B, update.A, 1.0)
            if not torch.equal(D, update.delta(0, 400)):  # the library's own order
                changed = int((merge_rows(ONCE, base, D, FP32) != merged).sum())
                assert 0.5 * effect < changed < 2 * effect, matmul


@pytest.mark.parametrize("steps", [1, -1, 2, -2])
def test_a_lone_deviation_within_the_bound_is_caught_in_fp32(steps: int) -> None:
    """Where the update is as large as the weight, the bound has room for an ulp or two: it must
    allow another computer's matmul. But that would have changed a thousand elements, not one."""
    update, base = realistic(64, 80, 8, 2.0, size=100.0)
    merged = merged_by(ONCE, update, base, FP32)
    within = 0
    for row, column in itertools.product(range(0, 64, 8), range(0, 80, 10)):
        changed = moved(merged, row, column, steps)
        certificate = certify(update, base, changed, FP32)
        within += certificate.violations == 0
        assert certificate.isolated == 1
        assert certificate.reproduced_by == []
        assert verdict_of(update, base, changed, FP32) == "violated"
    assert within > 50  # the bound alone would have let most of them through
    for row in range(12):  # a dozen could be the edge that another computer treats differently
        merged = moved(merged, row, row, steps) if abs(steps) == 1 else merged
    assert certify(update, base, merged, FP32).violations == 0
    assert verdict_of(update, base, merged, FP32) == ("rounding" if abs(steps) == 1 else "exact")
    for matmul in (by_numpy, backwards, in_pairs):  # which it has to
        D = matmul(update.B, update.A, update.scaling)
        elsewhere = merge_rows(ONCE, base, D, FP32)
        assert int((elsewhere != merged).sum()) > 500
        assert verdict_of(update, base, elsewhere, FP32) == "rounding"


@pytest.mark.parametrize("name", ["once", "peft", "peft-safe", "peft-half"])
@pytest.mark.parametrize("format", [FP16, BF16], ids=lambda format: format.name)
def test_one_ulp_in_one_element_is_caught_in_16_bits(format: Format, name: str) -> None:
    """The bounds of the looser families hold many of them; the recipe's own bits do not.

    A difference that only another rounding of D would explain does not come alone.
    """
    update, base = realistic(200, 160, 8, 0.7)
    merged = merged_by(RECIPE[name], update, base, format)
    assert verdict_of(update, base, merged, format) == "exact"
    caught = within = 0
    for row, column in itertools.product(range(0, 200, 40), range(0, 160, 20)):
        changed = moved(merged, row, column, 1)
        result = result_of(update, base, changed, format)
        assert result.comparison is not None
        certificate = result.comparison.certificate
        assert certificate.reproduced_by == []  # never "exact"
        within += certificate.violations == 0
        caught += judge([result]).name == "violated"
    assert caught >= 39  # of 40
    assert within > 5 or name == "once"


def test_what_16_bits_cannot_tell() -> None:
    """A tensor of a few hundred elements and an update as large as the weight: where rounding D
    in another place would change a few of them, one may be that. It is not called exact."""
    update, base = realistic(8, 12, 8, 0.7, size=100.0)
    merged = merged_by(RECIPE["peft-half"], update, base, BF16)
    assert verdict_of(update, base, merged, BF16) == "exact"
    verdicts = [
        verdict_of(update, base, moved(merged, row, column, 1), BF16)
        for row, column in itertools.product(range(8), range(12))
    ]
    assert verdicts.count("rounding") > 20
    assert "exact" not in verdicts


def zero_row(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    changed = merged.clone()
    changed[7] = 0
    return changed


def base_row(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    changed = merged.clone()
    changed[7] = base[7].to(merged.dtype)
    return changed


def swapped_rows(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    changed = merged.clone()
    changed[[3, 4]] = merged[[4, 3]]
    return changed


def swapped_updates(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The two rows' updates, not the rows: what a mix-up of heads does."""
    T = merged.double() - base.double()
    T[[3, 4]] = T[[4, 3]]
    return (base.double() + T).to(merged.dtype)


def update_times(factor: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def change(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        update, _ = realistic(64, 80, 8, 2.0)
        return (base.double() + factor * update.exact(0, 64)).to(merged.dtype)

    return change


TAMPERINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "zero row": zero_row,
    "row left out": base_row,
    "swapped rows": swapped_rows,
    "updates of two rows swapped": swapped_updates,
    "subtracted": update_times(-1),
    "twice": update_times(2),
    "scaling left out": update_times(0.5),
    "whole weight times 1.0001": lambda merged, base: (
        merged * 1.0001
        if merged.dtype == torch.float32
        else (merged.float() * 1.01).to(merged.dtype)
    ),
    "the base": lambda merged, base: base.to(merged.dtype),
}


@by_format
@pytest.mark.parametrize("what", TAMPERINGS)
def test_tampering_is_caught(what: str, format: Format) -> None:
    update, base = realistic(64, 80, 8, 2.0)
    for recipe in RECIPES:
        merged = merged_by(recipe, update, base, format)
        assert verdict_of(update, base, merged, format) == "exact"
        changed = TAMPERINGS[what](merged, base)
        assert verdict_of(update, base, changed, format) in ("violated", "incomplete")


def test_a_scaling_off_by_a_ten_thousandth_is_caught_in_fp32() -> None:
    update, base = realistic(64, 80, 8, 2.0)
    wrong = LowRank("weight", update.A, update.B, 2.0 * 1.0001)
    merged = merged_by(ONCE, wrong, base, FP32)
    certificate = certify(update, base, merged, FP32)
    assert certificate.violations > 1000
    assert verdict_of(update, base, merged, FP32) == "violated"
    # In 16 bits it moves elements by less than their rounding, and few of them to another number.
    for format in (FP16, BF16):
        merged = merged_by(ONCE, wrong, base, format)
        assert certify(update, base, merged, format).reproduced_by == []


def test_one_deviation_is_found_in_the_midst_of_exact_blocks() -> None:
    """Counts and places add up over blocks."""
    update, base = realistic(64, 80, 8, 2.0)
    merged = merged_by(ONCE, update, base, FP16)
    changed = moved(moved(merged, 11, 5, 3), 49, 70, -3)
    for rows in (None, 2, 10, 17):
        certificate = certify(update, base, changed, FP16, rows=rows)
        assert certificate.best_recipe.names[0] == "once"
        assert certificate.best_recipe.mismatches == certificate.isolated == 2


# --- not finite -------------------------------------------------------------------------------


def test_an_overflow_is_counted_by_itself() -> None:
    """fp16 ends at 65504: W + delta beyond that is infinite, and no part of any other number."""
    update = LowRank("weight", torch.tensor([[30.0, 1.0]]), torch.tensor([[10.0], [0.0]]), 1.0)
    base = torch.tensor([[65400.0, 1.0], [2.0, 3.0]])
    merged = merged_by(ONCE, update, base, FP16)
    assert merged.tolist() == [[math.inf, 11.0], [2.0, 3.0]]
    for given in (True, False):
        result = result_of(update, base, merged, FP16, given=given)
        assert result.comparison is not None
        certificate = result.comparison.certificate
        assert (certificate.non_finite, certificate.overflowed, certificate.violations) == (1, 1, 1)
        assert certificate.tally.violations == 0
        assert certificate.tally.max_ratio == 0
        assert "once" in certificate.reproduced_by  # it came about as it should have
        assert (certificate.changed_by_update, certificate.lost) == (1, 0)
        assert math.isfinite(result.task_vector.norm)
        assert result.relative_error == 0
        verdict = judge([result])
        assert verdict.name == "violated"
        assert "65504" in verdict.reason
        assert "infinite" in verdict.reason


@by_format
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_violation(format: Format, value: float) -> None:
    update, base = realistic(64, 80, 8, 2.0)
    merged = merged_by(ONCE, update, base, format)
    merged[5, 6] = value
    for given in (True, False):
        certificate = certify(update, base, merged, format, given=given)
        assert (certificate.non_finite, certificate.overflowed, certificate.violations) == (1, 0, 1)
        assert certificate.reproduced_by == []
        assert int(certificate.ulp_histogram.sum()) == base.numel()
    assert verdict_of(update, base, merged, format) == "violated"


def test_a_base_that_overflows_is_not_finite_either() -> None:
    """The base rounded to fp16 before it is subtracted: infinity less infinity."""
    update = LowRank("weight", torch.ones(1, 2), torch.zeros(2, 1), 1.0)
    base = torch.tensor([[7e4, 1.0], [2.0, 3.0]])
    merged = merged_by(ONCE, update, base, FP16)
    certificate = certify(update, base, merged, FP16, base_format=FP16, given=False)
    assert (certificate.non_finite, certificate.overflowed, certificate.violations) == (1, 1, 1)
    assert "once" in certificate.reproduced_by


# --- formats ----------------------------------------------------------------------------------


def test_a_task_vector_of_another_format_is_refused() -> None:
    """W + T is no number of bf16 if M was fp32."""
    update, base = realistic(20, 30, 4, 2.0)
    for format, asked, fits in (
        (FP32, BF16, False),
        (FP32, FP16, False),
        (FP16, BF16, False),
        (FP32, FP32, True),
        (FP16, FP16, True),
        (BF16, BF16, True),
        (BF16, FP16, True),  # what is in fp16's range: so bf16 is asked first
    ):
        T = subtract_rows(merged_by(ONCE, update, base, format), base)
        certificate = ParameterCertificate(
            update, asked, base.dtype, base_format=None, elements=base.numel()
        )
        block = Block(0, 20, base, base, T)
        assert certificate.add(block, update.exact(0, 20)) == fits, (format.name, asked.name)


def test_merged_weights_recovered_from_a_cancelling_task_vector() -> None:
    """T close to -W leaves a small M, of whose bits T keeps few: still no alarm, in any format."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(60, 50, generator=generator) + 0.5
    delta = -base + torch.randn(60, 50, generator=generator) * 1e-4
    update = LowRank("weight", delta, torch.eye(60), 1.0)
    for format, recipe in itertools.product(FORMATS.values(), RECIPES):
        merged = merged_by(recipe, update, base, format)
        for given in (True, False):
            certificate = certify(update, base, merged, format, given=given)
            assert certificate.violations == 0
            assert recipe.name in certificate.reproduced_by


def test_a_merged_weight_halfway_between_two_numbers_of_the_format() -> None:
    """T = 1 is both 258 and 257 parts less W, rounded; W + T is 257 of them, next to which lies 256
    as well as 258, and 256 parts less W is not T. M was 258 all the same."""
    part = 2.0**-24
    base = torch.tensor([[257 * part - 1, 0.5]])
    merged = torch.tensor([[258 * part, 1.5]]).bfloat16()
    update = LowRank("weight", torch.ones(1, 2), torch.ones(1, 1), 1.0)
    T = subtract_rows(merged, base)
    assert T.tolist() == [[1.0, 1.0]]
    assert (base + T).bfloat16().tolist() == [[256 * part, 1.5]]
    assert certify(update, base, merged, BF16, given=False).violations == 0


def test_products_that_underflow_are_no_false_alarm() -> None:
    """64 products of 0.4 subnormal spacings each: all of them are lost, and all are allowed for."""
    update = LowRank(
        "weight", torch.full((64, 3), 2.0**-75), torch.full((2, 64), 0.4 * 2.0**-74), 1.0
    )
    assert update.delta(0, 2).count_nonzero() == 0
    assert float(update.exact(0, 2)[0, 0]) == pytest.approx(25.6 * 2.0**-149, rel=1e-6)
    for format in FORMATS.values():
        base = torch.zeros(2, 3)
        assert verdict_of(update, base, merged_by(ONCE, update, base, format), format) == "exact"


# --- what rounding cost -----------------------------------------------------------------------


@by_format
@pytest.mark.parametrize("name", ["once", "peft"])
def test_what_was_lost_is_numpys_count(format: Format, name: str) -> None:
    update, base = realistic(64, 80, 4, 1.0, size=0.02)
    update.B[5] = 0
    merged = merged_by(RECIPE[name], update, base, format)
    W, M = base.double().numpy(), merged.double().numpy()
    delta = update.B.double().numpy() @ update.A.double().numpy()
    unmoved = base.to(format.dtype).double().numpy() == M
    touched = delta != 0
    for base_format in (None, format):
        result = result_of(update, base, merged, format, base_format=base_format)
        assert result.comparison is not None
        certificate = result.comparison.certificate
        assert certificate.changed_by_update == touched.sum() == 63 * 80
        assert certificate.lost == (unmoved & touched).sum()
        T = M - (W if base_format is None else base.to(format.dtype).double().numpy())
        error, size = np.linalg.norm(T - delta), np.linalg.norm(delta)
        cost = rounding_cost([result])
        assert cost.relative_error == pytest.approx(error / size, rel=1e-6)
        assert cost.snr_db == pytest.approx(20 * math.log10(size / error), rel=1e-6)
        assert cost.lost_share == pytest.approx((unmoved & touched).sum() / touched.sum())
    assert (certificate.lost > 100) == (format is not FP32)


def test_an_update_of_nothing_costs_nothing() -> None:
    update, base = realistic(20, 30, 4, 1.0, size=0.0)
    result = result_of(update, base, base.clone(), FP32)
    assert result.comparison is not None
    assert (
        result.comparison.certificate.changed_by_update,
        result.comparison.certificate.lost,
    ) == (0, 0)
    cost = rounding_cost([result])
    assert (cost.relative_error, cost.snr_db, cost.lost_share) == (None, None, 0.0)
    assert judge([result]).name == "exact"


@by_format
def test_histograms_count_every_element_in_ulps_of_the_merged_weight(format: Format) -> None:
    update, base = realistic(64, 80, 8, 0.7)
    merged = merged_by(RECIPE["peft"], update, base, format)
    certificate = certify(update, base, merged, format, rows=30)
    M = merged.double().numpy()
    ulp = 2.0 ** (np.floor(np.log2(np.abs(M))) - format.bits + 1)
    T = subtract_rows(merged, base).double().numpy()
    error = np.abs(T - update.exact(0, 64).numpy())
    expected, _ = np.histogram(error / ulp, ULP_BINS, (0, ULP_RANGE))
    mine = certificate.ulp_histogram.numpy()
    assert mine.sum() == certificate.bound_histogram.sum() == base.numel()
    assert mine[-1] == (error / ulp >= ULP_RANGE).sum()
    assert np.abs(mine[:-1] - expected).sum() <= 4  # on the edge of a bin, fp32 decides
    assert int(certificate.bound_histogram[: ULP_BINS // 6].sum()) == 0  # half an ulp at least


def test_histograms_of_large_parameters_sample_rows() -> None:
    rows = HISTOGRAM_ELEMENTS // 64
    update, base = realistic(2 * rows, 64, 2, 1.0)
    merged = merged_by(ONCE, update, base, FP32)
    certificate = certify(update, base, merged, FP32, rows=rows // 2)
    assert int(certificate.ulp_histogram.sum()) == HISTOGRAM_ELEMENTS
    whole = int((by_numpy(update.B, update.A, 1.0) + base != merged).sum())
    assert certificate.search.order_effect == pytest.approx(whole, rel=0.1)


# --- a whole model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged_models(tmp_path_factory, llama: Path, llama_lora: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("merged")
    for precision in FORMATS:
        merge(str(llama), str(llama_lora), root / precision, precision=precision)
    return {precision: root / precision for precision in FORMATS}


def judged(base: Path, lora: Path, model: Path, out: Path) -> dict[str, Any]:
    result = compare(str(base), str(lora), out, finetuned_model=str(model), generate_plots=False)
    certificate: dict[str, Any] = result.summary["certificate"]
    assert result.holds == (certificate["verdict"] in ("exact", "rounding"))
    return certificate


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("peft", {}),
        ("peft-safe", {"safe_merge": True}),
        ("peft-lowcpu", {"low_cpu_mem_usage": True}),
        ("peft-half", {"autocast_adapter_dtype": False}),
    ],
    ids=["default", "safe_merge", "low_cpu_mem_usage", "autocast off"],
)
@pytest.mark.parametrize(
    ("family", "precision"),
    [("llama", "fp16"), ("gpt2", "bf16"), ("starcoder2", "bf16"), ("gpt2", "fp32")],
)
def test_merges_by_peft_are_exact_and_their_recipe_is_named(
    tiny: Any,
    tmp_path: Path,
    family: str,
    precision: str,
    recipe: str,
    options: dict[str, Any],
) -> None:
    base = tiny.base(family)
    lora = tiny.adapter(base, use_rslora=True, r=6, lora_alpha=5)  # s is no power of two
    merged = peft_merge(base, lora, FORMATS[precision].dtype, **options)
    merged.save_pretrained(tmp_path / "merged")
    certificate = judged(base, lora, tmp_path / "merged", tmp_path / "out")
    assert certificate["verdict"] == "exact"
    assert certificate["violations"] == 0
    if precision == "fp32":
        assert set(certificate["reproduced_by"]) == set(RECIPE) - {"prescaled"}
    else:
        assert certificate["reproduced_by"] == [recipe]


Q, K, V = (f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkv")
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


def swap(one: str, other: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def one_element(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Two ulps in fp32, one in 16 bits."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[name]
        wide = tensor.dtype == torch.float32
        largest = int(tensor.abs().argmax())
        tensor.view(-1).view(torch.int32 if wide else torch.int16)[largest] += 2 if wide else 1

    return change


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize(
    ("change", "verdict", "named"),
    [
        (one_element(Q), "violated", Q),
        (one_element(NORM), "incomplete", NORM),
        (swap(K, V), "violated", V),
        (swap(Q, Q.replace("layers.1", "layers.0")), "violated", Q),
        (lambda tensors: tensors[DOWN].mul_(-1), "violated", DOWN),
        (lambda tensors: tensors[Q][5].zero_(), "violated", Q),
    ],
    ids=["an element", "an element of a norm", "k and v", "two layers", "negated", "a row"],
)
def test_a_tampered_model_does_not_pass(
    llama: Path,
    llama_lora: Path,
    merged_models: dict[str, Path],
    copied: Callable[[Path], Path],
    tmp_path: Path,
    precision: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    verdict: str,
    named: str,
) -> None:
    model = copied(merged_models[precision])
    edit_tensors(model / "model.safetensors", change)
    certificate = judged(llama, llama_lora, model, tmp_path / "out")
    assert certificate["verdict"] == verdict
    assert named in certificate["reason"]


@pytest.mark.parametrize("precision", FORMATS)
def test_attribution_names_the_cast_and_shares_add_up(
    llama: Path, llama_lora: Path, merged_models: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    certificate = judged(llama, llama_lora, merged_models[precision], tmp_path / "out")
    assert certificate["verdict"] == "exact"
    base, merged = (
        load_file(path / "model.safetensors") for path in (llama, merged_models[precision])
    )
    squares: dict[str, float] = {"lora": 0.0, "unchanged": 0.0, "cast": 0.0, "unexplained": 0.0}
    counts = dict.fromkeys(squares, 0)
    for name, W in base.items():
        T = merged[name].double().numpy() - W.double().numpy()
        adapted = any(part in name for part in ("q_proj", "v_proj", "down_proj"))
        kind = "lora" if adapted else "cast" if T.any() else "unchanged"
        squares[kind] += float((T * T).sum())
        counts[kind] += 1
    total = sum(squares.values())
    table = certificate["attribution"]
    assert {kind: entry["parameters"] for kind, entry in table.items()} == counts
    for kind, square in squares.items():
        assert table[kind]["squared_norm_share"] == pytest.approx(square / total, rel=1e-6)
    assert sum(entry["squared_norm_share"] for entry in table.values()) == pytest.approx(1)


def test_a_changed_parameter_that_nothing_explains_is_named(
    llama: Path,
    llama_lora: Path,
    merged_models: dict[str, Path],
    copied: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    model = copied(merged_models["bf16"])
    tensors = load_file(model / "model.safetensors")
    tensors[NORM] = load_file(llama / "model.safetensors")[NORM].half().bfloat16() * 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    certificate = judged(llama, llama_lora, model, tmp_path / "out")
    assert certificate["unexplained_parameters"] == [NORM]
    assert certificate["attribution"]["unexplained"]["parameters"] == 1
    assert certificate["verdict"] == "incomplete"
