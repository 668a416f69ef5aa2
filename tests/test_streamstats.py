"""Statistics of streams, against numpy on all the values at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.streamstats import (
    EXACT_ELEMENTS,
    KEY_RESOLUTION,
    MAGNITUDE_BINS,
    QUANTILES,
    JointMagnitudes,
    MagnitudeHistogram,
    Moments,
    Quantiles,
    Regression,
    keys,
    magnitude_bins,
    magnitude_edges,
)

CUTS = [0, 1, 4, 4, 1000, 1500, 5000]  # uneven blocks, one of them empty, one of one element


def samples(kind, n=5000, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "normal": lambda: rng.standard_normal(n),
        "far from zero": lambda: 1e6 + rng.standard_normal(n),
        "skewed": lambda: rng.lognormal(0, 1, n),
        "uniform": lambda: rng.uniform(-0.5, 0.5, n),
    }[kind]()


def joined(make, *columns):
    """One object fed block by block, and one merged from an object per block."""
    fed, merged = make(), make()
    for start, stop in itertools.pairwise(CUTS):
        parts = [torch.from_numpy(column[start:stop]) for column in columns]
        fed.add(*parts)
        alone = make()
        alone.add(*parts)
        merged.merge(alone)
    return fed, merged


@pytest.mark.parametrize("kind", ["normal", "far from zero", "skewed", "uniform"])
def test_moments_are_numpys_however_the_stream_is_cut(kind):
    x = samples(kind)
    centred = x - x.mean()
    std = np.sqrt((centred**2).mean())
    for found in joined(Moments, x):
        assert found.count == len(x)
        assert found.mean == pytest.approx(x.mean(), rel=1e-13, abs=1e-16)
        assert found.std == pytest.approx(std, rel=1e-10)
        assert found.skewness == pytest.approx((centred**3).mean() / std**3, rel=1e-8, abs=1e-9)
        assert found.kurtosis == pytest.approx((centred**4).mean() / std**4, rel=1e-8)


def test_moments_by_hand():
    """0 and 1, three to one: mean 1/4, variance 3/16, skewness 2/sqrt(3), kurtosis 7/3."""
    found = Moments()
    found.add(torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    assert found.mean == 0.25 and found.std == pytest.approx(np.sqrt(3) / 4)
    assert found.skewness == pytest.approx(2 / np.sqrt(3))
    assert found.kurtosis == pytest.approx(7 / 3)


def test_moments_of_a_constant_and_of_nothing():
    constant, nothing = Moments(), Moments()
    constant.add(torch.full((9,), 3.0, dtype=torch.float64))
    assert constant.mean == 3 and constant.std == 0
    for found in (constant, nothing):
        assert found.skewness is None and found.kurtosis is None


@pytest.mark.parametrize("kind", ["normal", "far from zero", "skewed"])
def test_regression_is_numpys_however_the_stream_is_cut(kind):
    x = samples(kind)
    y = 0.3 * x - 2 + np.random.default_rng(1).standard_normal(len(x))
    cx, cy = x - x.mean(), y - y.mean()
    slope = (cx @ cy) / (cx @ cx)
    for found in joined(Regression, x, y):
        assert found.slope == pytest.approx(slope, rel=1e-9)
        assert found.intercept == pytest.approx(y.mean() - slope * x.mean(), rel=1e-8)
        assert found.pearson == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)


def test_regression_of_a_constant_is_undefined():
    found = Regression()
    ones = torch.ones(5, dtype=torch.float64)
    found.add(ones, ones)
    assert found.slope is None and found.intercept is None and found.pearson is None


def test_few_values_have_exact_quantiles():
    x = samples("normal").astype(np.float32)
    found = Quantiles()
    for start in range(0, len(x), 700):
        found.add(torch.from_numpy(x[start : start + 700]))
    assert found.method == "exact"
    exact = np.quantile(x.astype(float), QUANTILES)
    assert found.at(QUANTILES) == pytest.approx(exact.tolist(), rel=1e-12)


@pytest.mark.parametrize("kind", ["normal", "skewed", "uniform"])
def test_many_values_have_quantiles_within_the_resolution(kind):
    x = (1e-4 * samples(kind, n=EXACT_ELEMENTS + 50_000)).astype(np.float32)
    found = Quantiles()
    for part in np.array_split(x, 7):
        found.add(torch.from_numpy(part.copy()))
    assert found.method == "histogram"
    exact = np.quantile(x.astype(float), QUANTILES)
    assert found.at(QUANTILES) == pytest.approx(exact.tolist(), rel=KEY_RESOLUTION, abs=1e-8)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_number_alone_in_its_bin_is_taken_for_its_middle(sign):
    """So that it is off by half the bin at most, wherever in it the number lies."""
    for alone in (1.0, 1 + KEY_RESOLUTION - 2.0**-23):
        found = Quantiles()
        found.add(torch.zeros(EXACT_ELEMENTS))
        found.add(torch.tensor([sign * alone]))
        end = found.at([1.0 if sign > 0 else 0.0])[0]
        assert end == pytest.approx(sign * alone, abs=KEY_RESOLUTION / 2 + 1e-6)


def test_quantiles_join_in_any_order():
    x = samples("normal", n=EXACT_ELEMENTS + 10).astype(np.float32)
    many, few = Quantiles(), Quantiles()
    many.add(torch.from_numpy(x))
    few.add(torch.tensor([5.0, -5.0]))
    one, other = Quantiles(), Quantiles()
    for target, order in ((one, (many, few)), (other, (few, many))):
        for part in order:
            target.merge(part)
    assert one.at(QUANTILES) == other.at(QUANTILES)
    assert one.at([0.0])[0] == pytest.approx(-5, rel=KEY_RESOLUTION)
    assert one.at([1.0])[0] == pytest.approx(5, rel=KEY_RESOLUTION)


def test_zeros_stay_zeros_and_nothing_has_no_quantiles():
    zeros = Quantiles()
    zeros.add(torch.zeros(EXACT_ELEMENTS + 1))
    zeros.add(torch.tensor([-0.0]))
    assert zeros.method == "histogram" and zeros.at([0.0, 0.5, 1.0]) == [0.0, 0.0, 0.0]
    assert Quantiles().at([0.5]) == [None]


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-59, 2.0**15, width=32), st.sampled_from([-1.0, 1.0]))
def test_a_magnitude_lies_within_the_edges_of_its_bin(size, sign):
    place = int(magnitude_bins(keys(torch.tensor([sign * size])))[0])
    edges = magnitude_edges()
    assert edges[place - 1] <= size < edges[place]


def test_the_bins_are_quarters_of_octaves_and_the_first_holds_the_rest():
    edges = magnitude_edges()
    assert len(edges) == MAGNITUDE_BINS
    steps = np.diff(np.log2(edges))
    assert steps.min() > 0.2 and steps.max() < 0.3
    tiny = magnitude_bins(keys(torch.tensor([0.0, -0.0, 2.0**-61, 1e-40])))
    assert tiny.tolist() == [0, 0, 0, 0]


def test_histograms_count_every_element():
    x = torch.from_numpy(samples("normal").astype(np.float32))
    y = x * 1.5
    joint, alone = JointMagnitudes(), MagnitudeHistogram()
    for half in (slice(0, 2000), slice(2000, None)):
        joint.add(keys(x[half]), keys(y[half]))
        alone.add(keys(y[half]))
    assert int(joint.counts.sum()) == len(x)
    assert torch.equal(joint.counts.sum(0), alone.counts)
    edges = np.array(magnitude_edges())
    expected = np.histogram(y.abs().numpy(), edges)[0]
    np.testing.assert_array_equal(alone.counts[1:], expected)
