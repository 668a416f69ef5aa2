"""The certificate: no false alarm, a tight bound, and what rounding cost."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from taskvec.bounds import families
from taskvec.certificate import (
    HISTOGRAM_ELEMENTS,
    ULP_BINS,
    ULP_RANGE,
    Block,
    ParameterCertificate,
    common_recipes,
)
from taskvec.rounding import (
    BF16,
    FORMATS,
    FP16,
    FP32,
    ONCE,
    RECIPES,
    Format,
    is_power_of_two,
    merge_rows,
    subtract_rows,
)
from taskvec.updates.products import LowRank
from taskvec.verdict import judge, rounding_cost
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
    subtracted_from,
    verdict_of,
)

# --- no false alarm ---------------------------------------------------------------------------


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
