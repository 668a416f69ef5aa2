"""Spectra, subspaces, noise floors and streamed statistics, against numpy and worked values."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec import spectrum as module
from taskvec.noisefloor import NoiseProfile, rounding_variance
from taskvec.rounding import BF16, FP16, FP32, half_ulp
from taskvec.spectrum import (
    amplification_factor,
    dense_spectrum,
    effective_rank,
    gram_step,
    krylov_spectrum,
    low_rank_spectrum,
    principal_angles,
    singular_values,
    spectral_norm,
    spectrum,
    stable_rank,
    streamed_spectrum,
    subspace_similarity,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows, columns, seed):
    return torch.from_numpy(np.linalg.qr(random(rows, columns, seed=seed).numpy())[0])


def signal(m, n, values, seed=1):
    """A matrix with these singular values."""
    left, right = orthonormal(m, len(values), seed), orthonormal(n, len(values), seed + 1)
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


def blocks(matrix, rows=50):
    return lambda: ((start, matrix[start : start + rows]) for start in range(0, len(matrix), rows))


def reference(matrix):
    return np.linalg.svd(matrix.numpy(), compute_uv=False)


# Singular values


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (1, 7)])
def test_the_dense_route_is_numpys(shape):
    matrix = random(*shape)
    found = dense_spectrum(matrix, 5)
    np.testing.assert_allclose(found.nodes, reference(matrix), rtol=1e-12)
    np.testing.assert_allclose(singular_values(matrix.float()), reference(matrix), rtol=1e-5)
    k = min(5, *shape)
    np.testing.assert_allclose(matrix @ found.right, found.left * found.values, atol=1e-12)
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(k), atol=1e-12)
    assert found.exact and found.squared_norm == pytest.approx(float((matrix**2).sum()))


@pytest.mark.parametrize("m, n, r", [(40, 25, 4), (25, 40, 4), (30, 30, 30), (6, 40, 9)])
@pytest.mark.parametrize("scaling", [2.0, -0.3])
def test_a_low_rank_product_needs_only_its_factors(m, n, r, scaling):
    B, A = random(m, r, seed=1), random(r, n, seed=2)
    product = scaling * B @ A
    found = low_rank_spectrum(B, A, scaling)
    expected = reference(product)[: min(m, n, r)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)
    np.testing.assert_allclose((found.left * found.values) @ found.right.T, product, atol=1e-11)


def test_the_factors_of_a_lower_rank_than_they_say_give_zeros():
    B, A = random(20, 3, seed=1), random(3, 10, seed=2)
    B[:, 2], A[2] = B[:, 1], -A[1]  # the second and third term cancel
    values = low_rank_spectrum(B, A).values
    assert values[0] > 1 and values[1:].max() < 1e-14 * values[0] * 10


@pytest.fixture(scope="module")
def noisy():
    """Rank 8 and noise: (700, 560), its singular values by numpy, and the noise alone."""
    noise = 1e-3 * random(700, 560, seed=5)
    matrix = signal(700, 560, np.geomspace(1, 0.1, 8)) + noise
    return matrix, reference(matrix), noise


@pytest.mark.parametrize("transposed", [False, True])
def test_krylov_finds_the_leading_values_and_knows_its_error(noisy, transposed):
    matrix, expected, _ = noisy
    found = spectrum(matrix.T if transposed else matrix, 16)
    assert not found.exact
    error = np.abs(found.values.numpy() - expected[:16])
    assert (error <= found.errors.numpy() + 1e-12).all()
    assert (error[:8] < 1e-12).all()
    tall = matrix.T if transposed else matrix
    np.testing.assert_allclose(
        tall @ found.right[:, :8], found.left[:, :8] * found.values[:8], atol=1e-9
    )


def test_krylov_estimates_the_rest_of_the_spectrum(noisy):
    matrix, expected, _ = noisy
    found = spectrum(matrix, 16)
    p = expected / expected.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=0.03)
    assert found.squared_norm == pytest.approx((expected**2).sum(), rel=0.01)
    assert float(found.weights.sum()) == pytest.approx(560)
    assert found.tail_norm(8) == pytest.approx(math.sqrt((expected[8:] ** 2).sum()), rel=0.02)
    for index in (1, 8, 100, 280, 420):
        assert found.value_at(index) == pytest.approx(expected[index - 1], rel=0.1)
    assert found.rank_above(0.06) == 8


def test_krylov_is_the_same_in_every_run(noisy):
    first, second = (krylov_spectrum(gram_step(noisy[0]), 560, 4) for _ in range(2))
    assert torch.equal(first.values, second.values) and torch.equal(first.nodes, second.nodes)


@pytest.mark.parametrize("values", [[3.0, 2.0, 1e-6], [3e-90, 2e-90], [1e-44], []])
def test_krylov_fills_up_what_has_less_rank_with_orthonormal_vectors(values):
    """Down to the smallest product of two fp32 numbers."""
    found = krylov_spectrum(gram_step(signal(700, 600, values)), 600, 6)
    np.testing.assert_allclose(found.right.T @ found.right, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(found.values[: len(values)], values, rtol=1e-6)


def test_krylov_of_an_exactly_low_rank_matrix():
    matrix = signal(700, 600, [3.0, 2.0, 1e-6])
    found = krylov_spectrum(gram_step(matrix), 600, 6)
    np.testing.assert_allclose(found.right.T @ found.right, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(found.values[:3], [3, 2, 1e-6], rtol=1e-9)
    assert found.values[3] < 1e-14 and found.rank_above(1e-9) == 3


def test_a_zero_matrix_has_no_rank_and_no_nan():
    for found in (
        dense_spectrum(torch.zeros(9, 5), 3),
        krylov_spectrum(gram_step(torch.zeros(600, 540, dtype=torch.float64)), 540, 3),
    ):
        assert found.largest == 0 and found.effective_rank == 0 and found.stable_rank == 0
        assert found.rank_above(0.0) == 0
        assert all(torch.isfinite(x).all() for x in (found.left, found.right, found.weights))


@pytest.mark.parametrize("shape", [(700, 560), (560, 700)])
def test_a_matrix_read_in_blocks_gives_what_it_gives_in_memory(noisy, shape, monkeypatch):
    matrix = noisy[0] if shape[0] > shape[1] else noisy[0].T.contiguous()
    in_memory = streamed_spectrum(blocks(matrix), shape, 8)
    monkeypatch.setattr(module, "DENSE_ELEMENTS", 1000)  # from here on it is never held whole
    streamed = streamed_spectrum(blocks(matrix), shape, 8)
    np.testing.assert_allclose(streamed.values, in_memory.values, rtol=1e-9)
    similar = subspace_similarity(streamed.left, in_memory.left)
    assert float(similar[7, 7]) == pytest.approx(1, abs=1e-9)
    assert streamed.left.shape == (shape[0], 8) and streamed.right.shape == (shape[1], 8)
    assert streamed.effective_rank == pytest.approx(in_memory.effective_rank, rel=1e-6)


def test_the_spectral_norm_of_pure_noise(noisy, monkeypatch):
    noise = noisy[2]
    expected = reference(noise)[0]
    assert 0.99 * expected < spectral_norm(blocks(noise), (700, 560)) <= expected * (1 + 1e-12)
    small = noise[:40, :30]
    assert spectral_norm(blocks(small), (40, 30)) == pytest.approx(reference(small)[0], rel=1e-12)


# Ranks


@pytest.mark.parametrize(
    "values, expected",
    [([3.0] * 5, 5.0), ([7.0], 1.0), ([7.0, 0.0], 1.0), ([2.0, 1.0, 1.0], 2**1.5), ([0.0], 0.0)],
)
def test_effective_rank_by_hand(values, expected):
    """(2, 1, 1): p = 1/2, 1/4, 1/4 has the entropy 3/2 ln 2."""
    assert effective_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected)


def test_a_weight_counts_a_value_so_many_times():
    values = torch.tensor([2.0, 1.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert effective_rank(values, weights) == pytest.approx(2**1.5)


def test_stable_rank_by_hand():
    assert stable_rank(squared_norm=9 + 4 + 4 + 1, largest=3) == 2
    assert stable_rank(0, 0) == 0


# Subspaces


def test_similarity_by_hand():
    """Spans of e1, e2 and of e1, e3: the first ones agree, and half of the second ones."""
    e = torch.eye(4, dtype=torch.float64)
    found = subspace_similarity(e[:, [0, 1]], e[:, [0, 2]])
    assert found.tolist() == [[1, 1], [1, 0.5]]


def test_similarity_of_random_spans_is_the_larger_dimension_over_d():
    d, i, j = 60, 12, 5
    found = [
        subspace_similarity(orthonormal(d, i, seed), orthonormal(d, j, 100 + seed))[-1, -1]
        for seed in range(40)
    ]
    assert np.mean(found) == pytest.approx(i / d, rel=0.05)


@pytest.mark.parametrize("angle", [1e-12, 1e-7, 0.3, math.pi / 3, math.pi / 2])
def test_principal_angles_of_a_rotation(angle):
    basis = orthonormal(10, 4, seed=3)
    left = basis[:, :2]
    turned = math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 2]
    right = torch.stack([basis[:, 0], turned], 1)
    found = principal_angles(left, right)
    assert found[1] == pytest.approx(angle, rel=1e-3 if angle < 1e-9 else 1e-8)
    assert found[0] < 1e-15 * 10


def test_principal_angles_between_spans_of_different_size():
    e = torch.eye(5, dtype=torch.float64)
    diagonal = (e[:, 2:3] + e[:, 4:5]) / math.sqrt(2)
    for pair in ((e[:, :3], diagonal), (diagonal, e[:, :3])):
        assert principal_angles(*pair).tolist() == pytest.approx([math.pi / 4])


def test_amplification_by_hand():
    """delta moves along e2 only, where W has 4: 2 / 4. Along e3, W has nothing."""
    e = torch.eye(3, dtype=torch.float64)
    W = torch.diag(torch.tensor([10.0, 4.0, 0.0], dtype=torch.float64))
    assert amplification_factor(2.0, e[:, 1:2], e[:, 1:2], blocks(W, 2)) == 0.5
    assert amplification_factor(2.0, e[:, 2:], e[:, 2:], blocks(W, 2)) is None


# The floor of rounding noise


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 64])
def test_the_variance_of_rounding_multiples_of_g_to_multiples_of_q(steps):
    """By enumeration: the distances of 0, g, 2g, ... (q = steps * g) to the nearest of 0 and q."""
    q = Fraction(1)
    distances = [min(Fraction(i, steps), 1 - Fraction(i, steps)) for i in range(steps)]
    expected = sum((d * q) ** 2 for d in distances) / steps
    half = torch.tensor([0.5], dtype=torch.float64)
    found = float(rounding_variance(half, half / steps))
    assert found == pytest.approx(float(expected), rel=1e-12, abs=0)


def test_the_variance_of_rounding_real_numbers_is_a_twelfth():
    half = torch.tensor([0.5, 4.0], dtype=torch.float64)
    np.testing.assert_allclose(rounding_variance(half), [1 / 12, 64 / 12])


def profile(variances):
    found = NoiseProfile(tuple(variances.shape))
    for start in range(0, len(variances), 7):
        found.add(start, variances[start : start + 7])
    return found.floor()


def test_the_floor_of_errors_of_one_size():
    """eps (sqrt m + sqrt n), and the largest row and column are as long as all the others."""
    floor = profile(torch.full((16, 25), 0.01, dtype=torch.float64))
    assert floor.rms == pytest.approx(0.1)
    assert floor.edge == pytest.approx(0.1 * (4 + 5))
    assert floor.threshold == pytest.approx(0.1 * (4 + 5))


def rounding_noise(format, shape, seed, spread=0.0):
    """What storing random weights in a format leaves, and the floor predicted for it."""
    rows = torch.exp(spread * random(shape[0], 1, seed=seed + 1))
    W = (0.02 * random(*shape, seed=seed) * rows).to(
        torch.float64 if format is FP32 else torch.float32
    )
    M = W.to(format.dtype).double()
    return M - W.double(), profile(rounding_variance(half_ulp(M, format)))


@pytest.mark.parametrize("format", [FP32, FP16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(64, 64), (32, 200), (300, 150)])
def test_the_floor_of_real_rounding(format, shape):
    for seed in range(5):
        noise, floor = rounding_noise(format, shape, seed=10 * seed)
        assert float((noise**2).mean().sqrt()) == pytest.approx(floor.rms, rel=0.05)
        assert 0.9 * floor.edge < reference(noise)[0] < 1.1 * floor.edge
        assert 0.7 * floor.threshold < reference(noise)[0] < floor.threshold


def test_where_rows_differ_in_size_only_the_threshold_holds():
    """A model's rows do differ; eps (sqrt m + sqrt n) would then count noise as rank."""
    for seed in range(5):
        noise, floor = rounding_noise(FP16, (128, 128), seed=10 * seed, spread=1.0)
        assert floor.edge < reference(noise)[0] < floor.threshold


@pytest.mark.parametrize("format", [FP32, FP16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("r", [1, 4, 16])
def test_the_rank_above_the_floor_is_the_deltas(format, r):
    """Wherever delta's smallest singular value stands above the floor, and none but those."""
    for seed in range(4):
        noise, floor = rounding_noise(format, (96, 72), seed=10 * seed, spread=0.5)
        delta = signal(96, 72, np.geomspace(30, 1.05, r) * floor.threshold, seed=seed)
        assert dense_spectrum(delta + noise, 0).rank_above(floor.threshold) == r


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 10**6))
def test_the_threshold_is_never_below_the_edge(m, n, seed):
    floor = profile(random(m, n, seed=seed) ** 2)
    assert floor.edge <= floor.threshold * (1 + 1e-12)


def test_the_threshold_of_two_noises_together_is_not_below_their_sums():
    """One noise in a row and one in a column: their thresholds add up where their edges do not."""
    row, column = torch.zeros(60, 90).double(), torch.zeros(60, 90).double()
    row[7], column[:, 3] = 1.0, 1.0
    floors = []
    for variances in (row, column, row + column):
        profile = NoiseProfile((60, 90))
        profile.add(0, variances)
        floors.append(profile.floor())
    one, other, both = floors
    assert one.plus(other).threshold >= both.threshold > math.hypot(one.threshold, other.threshold)
    assert one.plus(other).rms == pytest.approx(both.rms)
    assert one.plus(other).edge == pytest.approx(both.edge)
