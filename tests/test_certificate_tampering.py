"""No change to a merge goes unnoticed that its format can show."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch

from taskvec.rounding import (
    BF16,
    FP16,
    FP32,
    ONCE,
    RECIPES,
    Format,
    merge_rows,
)
from taskvec.updates.products import LowRank
from taskvec.verdict import judge
from tests.certified import (
    RECIPE,
    backwards,
    by_format,
    by_numpy,
    certify,
    fused,
    in_pairs,
    merged_by,
    permuted,
    realistic,
    result_of,
    verdict_of,
)


def moved(merged: torch.Tensor, row: int, column: int, steps: int) -> torch.Tensor:
    """A copy with one element moved by that many representable numbers."""
    changed = merged.clone()
    bits = changed.view(torch.int32 if merged.dtype == torch.float32 else torch.int16)
    bits[row, column] += steps
    return changed


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


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("format", "factor", "scaling"),
    [
        (FP16, 1e10, 1.0),  # a factor beyond fp16: rounded to it, it is infinite
        (BF16, 1e10, 1e20),  # a product beyond fp32
        (FP32, 1e10, 1e20),
        (FP32, 1e19, 1.0),  # each of two terms is an fp32 number, their sum is not
        (FP32, 1e38, 1e60),  # the product is beyond fp32's square, too
    ],
)
def test_what_overflows_on_its_way_does_not_pass_for_rounding(
    format: Format, factor: float, scaling: float, given: bool
) -> None:
    """A merge through infinity leaves no finite weight, so finite ones were not merged that way."""
    update = LowRank("weight", torch.full((4, 3), factor), torch.full((2, 4), factor), scaling)
    base = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 7.0]])
    for merged in (base, base + 1):
        result = result_of(update, base, merged.to(format.dtype), format, given=given)
        assert result.comparison is not None
        certificate = result.comparison.certificate
        assert certificate.violations == base.numel()
        assert 1 < certificate.tally.max_ratio < math.inf
        assert not judge([result]).holds


def test_elements_beyond_fp32_leave_the_others_to_their_bounds() -> None:
    A, B = torch.tensor([[1e20, 1.0]]), torch.tensor([[1e20], [0.0]])
    update, base = LowRank("weight", A, B, 2.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    merged = merged_by(ONCE, update, base, FP32)
    assert torch.isinf(merged).tolist() == [[True, False], [False, False]]
    certificate = certify(update, base, merged, FP32)
    assert (certificate.non_finite, certificate.overflowed) == (1, 1)
    assert certificate.tally.violations == 0
    merged[1, 0] += 1
    assert certify(update, base, merged, FP32).tally.violations == 1


@by_format
def test_a_change_that_the_adapter_does_not_make_is_not_a_change_that_is_missing(
    format: Format,
) -> None:
    """B is zero as long as nothing was learned: there is nothing that T could lack."""
    update, base = realistic(8, 12, 4, 2.0)
    update = LowRank("weight", update.A, torch.zeros_like(update.B), 2.0)
    base = base.to(format.dtype)
    for merged in (base + 8, base * math.nan):
        verdict = judge([result_of(update, base, merged, format)])
        assert (verdict.name, verdict.missing, verdict.violated) == ("violated", [], ["weight"])
        assert "the task vector does not" not in verdict.reason
    assert judge([result_of(update, base, base, format)]).name == "exact"
