"""T - delta over some rows, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from taskvec.compare import Magnitude, PairSums
from taskvec.difference import Difference, count_differing, count_nonzero, is_zero
from taskvec.updates.products import LowRank


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """T in fp32 and delta in float64, with zeros in both and some delta that rounds to T."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(40, 70, generator=generator, dtype=torch.float64) * 1e-3
    delta[torch.rand(40, 70, generator=generator) < 0.1] = 0.0
    T = delta.float()
    T[torch.rand(40, 70, generator=generator) < 0.5] *= 1.25
    T[torch.rand(40, 70, generator=generator) < 0.1] = 0.0
    return T, delta


def test_every_number_is_numpys() -> None:
    T, delta = rows(0)
    difference, sums, magnitude = Difference(T, delta), PairSums(), Magnitude()
    sums.add(difference)
    magnitude.add_task_vector(difference)
    t, d = T.double().numpy(), delta.numpy()
    error = np.abs(t - d)
    assert np.array_equal(difference.error.numpy(), error)
    assert (difference.nonzero, difference.nonzero_delta) == ((t != 0).sum(), (d != 0).sum())
    assert difference.non_finite is None
    assert (sums.elements, sums.exact) == (t.size, (T.numpy() == d.astype(np.float32)).sum())
    assert sums.delta_squared == pytest.approx((d * d).sum(), rel=1e-13)
    assert sums.product == pytest.approx((t * d).sum(), rel=1e-13)
    assert sums.difference_squared == pytest.approx((error * error).sum(), rel=1e-13)
    assert sums.difference_abs == pytest.approx(error.sum(), rel=1e-13)
    assert sums.difference_max == error.max()
    assert magnitude.squared_norm == pytest.approx((t * t).sum(), rel=1e-13)
    assert (magnitude.max_abs, magnitude.nonzero) == (abs(t).max(), (t != 0).sum())


def test_the_task_vectors_magnitude_is_the_same_by_itself_and_beside_a_delta() -> None:
    for spoilt in (False, True):
        T, delta = rows(1)
        if spoilt:
            T[3, 4:7] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        alone, beside = Magnitude(), Magnitude()
        alone.add(T)
        beside.add_task_vector(Difference(T, delta))
        assert alone == beside
        assert alone.non_finite == (3 if spoilt else 0)


def test_what_is_not_finite_is_left_out_and_is_not_exact() -> None:
    T, delta = rows(2)
    whole = PairSums()
    whole.add(Difference(T, delta))
    removed = int(T[0, 0] == delta[0, 0].float()) + int(T[5, 5] == delta[5, 5].float())
    T[0, 0], T[5, 5] = torch.nan, torch.inf
    difference, sums = Difference(T, delta), PairSums()
    sums.add(difference)
    assert difference.non_finite is not None and int(difference.non_finite.sum()) == 2
    assert sums.exact == whole.exact - removed
    keep = np.isfinite(T.numpy())
    t, d = T.double().numpy()[keep], delta.numpy()[keep]
    assert sums.difference_squared == pytest.approx(((t - d) ** 2).sum(), rel=1e-13)
    assert sums.delta_squared == pytest.approx((d * d).sum(), rel=1e-13)


def test_fp32s_largest_numbers_are_finite() -> None:
    T = torch.full((8, 8), torch.finfo(torch.float32).max)
    difference = Difference(T, torch.zeros(8, 8, dtype=torch.float64))
    assert difference.non_finite is None and difference.nonzero == 64


def test_a_delta_below_fp32s_smallest_number_is_not_zero() -> None:
    delta = torch.tensor([[1e-60, 0.0, 1.0]], dtype=torch.float64)
    assert Difference(torch.zeros(1, 3), delta).nonzero_delta == 2


def test_what_differs_is_counted_by_value() -> None:
    one = torch.tensor([0.0, 1.0, torch.nan, torch.inf, 2.0])
    other = torch.tensor([-0.0, 1.0, torch.nan, torch.inf, 3.0])
    assert count_differing(one, other) == 2  # NaN is not itself
    assert count_nonzero(one) == 4
    assert is_zero(torch.tensor([0.0, -0.0])) and is_zero(torch.zeros(0))
    assert not is_zero(torch.tensor([0.0, torch.nan])) and not is_zero(torch.tensor([0.0, 1e-45]))


def test_factors_beyond_fp32_leave_their_magnitude_finite() -> None:
    """|s B| is beyond fp32, the product is not: an infinite bound would allow everything."""
    update = LowRank("w", torch.full((2, 6), 1e-30), torch.full((4, 2), 1e30), 1e10)
    magnitude = update.magnitude(0, 4, torch.float32)
    assert magnitude.dtype == torch.float32
    np.testing.assert_allclose(magnitude.numpy(), np.full((4, 6), 2e10), rtol=1e-6)
