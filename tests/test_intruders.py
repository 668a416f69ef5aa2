"""Intruder dimensions against two dense float64 SVDs by numpy, and against planted answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from taskvec.intruders import leading
from taskvec.intruders.basesvd import base_svd
from taskvec.intruders.directions import dense_directions, low_rank_directions, scaled_rows
from taskvec.intruders.leading import leading_triplets

SHAPES = [(90, 90), (60, 150), (150, 60)]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def orthonormal(rows, columns, seed):
    return np.linalg.qr(random(rows, columns, seed=seed))[0]


def with_values(m, n, values, seed=1):
    """A matrix with these singular values, and its singular vectors."""
    U, V = orthonormal(m, len(values), seed), orthonormal(n, len(values), seed + 1)
    return U * np.array(values) @ V.T, U, V


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def reference(W, T, k):
    """Algorithm 1 by two dense SVDs: max_i |cos(x_i, y_j)| for the first k vectors y_j."""
    U = np.linalg.svd(W, full_matrices=False)[0]
    Y = np.linalg.svd(T, full_matrices=False)[0]
    return np.abs(U.T @ Y[:, :k]).max(0)


@pytest.fixture
def krylov(monkeypatch):
    """Small matrices go the way of large ones."""
    monkeypatch.setattr(leading, "DENSE_SIDE", 0)
    monkeypatch.setattr(leading, "_STEPS", 3)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("r", [1, 3, 16, 70])
@pytest.mark.parametrize("strength", [0.02, 0.5, 3.0])
def test_both_routes_give_what_two_dense_svds_give(krylov, m, n, r, strength):
    W, B, A = random(m, n, seed=r), random(m, r, seed=5), random(r, n, seed=6)
    W *= 0.97 ** np.arange(n)  # a spectrum that decays, as trained weights have
    scaling = -strength / r**0.5
    T = W + scaling * B @ A
    expected = reference(W, T, 10)
    U, S, Vt = np.linalg.svd(T, full_matrices=False)
    svd = base_svd(tensor(W))
    for found in (
        low_rank_directions(svd, tensor(B), tensor(A), scaling, 10),
        dense_directions(svd, tensor(T), 10),
    ):
        np.testing.assert_allclose(found.similarity, expected, atol=1e-9)
        np.testing.assert_allclose(found.values, S[:10], rtol=1e-12)
        triplets = found.triplets(range(10))
        for vectors, expected_ones in ((triplets.left, U[:, :10]), (triplets.right, Vt[:10].T)):
            cosines = np.abs((vectors.numpy() * expected_ones).sum(0))
            np.testing.assert_allclose(cosines, 1, atol=1e-10)
        for epsilon in (0.2, 0.5, 0.6, 0.9):
            verdict = [j for j in range(10) if expected[j] < epsilon]
            assert found.intruders(epsilon, 10) == verdict
            assert found.intruders(epsilon, 4) == [j for j in verdict if j < 4]


@pytest.mark.parametrize("m, n", SHAPES)
def test_planted_intruders_are_found_and_nothing_else(m, n):
    """Two directions that are spread evenly over the base's, larger than all of them."""
    p = min(m, n)
    W, U, _ = with_values(m, n, 0.85 ** np.arange(p))
    spread = U @ orthonormal(p, p, seed=9)[:, :2]
    new_inputs = orthonormal(n, 2, seed=11)
    B, A = spread * np.array([900.0, 700.0]), new_inputs.T
    found = low_rank_directions(base_svd(tensor(W)), tensor(B), tensor(A), 1.0, 10)
    assert found.intruders(0.6, 10) == [0, 1]
    np.testing.assert_allclose(found.similarity, reference(W, W + B @ A, 10), atol=1e-9)


def test_a_change_of_the_singular_values_alone_makes_no_intruder():
    values = np.linspace(2.0, 1.0, 40)
    W, U, V = with_values(40, 50, values)
    T = U * values[::-1] @ V.T  # the last direction comes first now
    found = dense_directions(base_svd(tensor(W)), tensor(T), 10)
    np.testing.assert_allclose(found.similarity, 1, atol=1e-9)
    assert found.nearest.tolist() == list(range(39, 29, -1))


@pytest.mark.parametrize("degrees", [10, 59, 61])
def test_a_rotation_by_an_angle_has_its_cosine(degrees):
    """The first direction is turned into one that has no other base vector near it."""
    W, U, V = with_values(200, 200, np.linspace(3.0, 1.0, 200))
    even = U[:, 1:] @ np.full(199, 199**-0.5)  # 1/sqrt(199) from each of the others
    angle = np.radians(degrees)
    first = np.cos(angle) * U[:, 0] + np.sin(angle) * even
    T = W + np.outer(first, V[:, 0]) * 1e6
    found = dense_directions(base_svd(tensor(W)), tensor(T), 1)
    assert float(found.similarity[0]) == pytest.approx(np.cos(angle), abs=1e-5)
    assert found.intruders(0.5, 1) == ([0] if degrees > 60 else [])


def test_with_a_full_basis_the_maximum_is_at_least_one_over_root_m():
    found = dense_directions(base_svd(tensor(random(30, 40))), tensor(random(30, 40, seed=1)), 30)
    assert float(found.similarity.min()) >= 30**-0.5
    assert found.intruders(30**-0.5, 30) == []


def test_repeated_base_values_are_compared_as_a_space():
    """A tuned vector anywhere within five equal directions resembles the base entirely."""
    values = [4.0] * 5 + [1.0] * 3 + list(np.linspace(0.9, 0.1, 22))
    W, U, V = with_values(30, 40, values)
    mixed = U[:, :5] @ np.full(5, 5**-0.5)
    T = W + np.outer(mixed, V[:, 0]) * 5000
    found = dense_directions(base_svd(tensor(W)), tensor(T), 1)
    assert float(found.similarity[0]) == pytest.approx(1, abs=1e-9)
    # Basis by basis it need not: in the planted one its cosine is 1/sqrt(5) with each.
    assert np.abs(U.T @ found.triplets([0]).left.numpy()).max() < 0.46


@pytest.mark.parametrize("seed", range(4))
def test_repeated_tuned_values_do_not_depend_on_the_basis(seed):
    """Three equal tuned values: two of their directions are the base's, one is spread over 200."""
    W, U, _V = with_values(220, 220, np.linspace(2.0, 1.0, 220))
    spread = U[:, 20:] @ np.full(200, 200**-0.5)
    space = np.stack([U[:, 0], U[:, 7], spread], 1) @ orthonormal(3, 3, seed=seed)
    T = W + 0.0
    outside = np.eye(220) - space @ space.T
    T = 9.0 * space @ orthonormal(220, 3, seed=20).T + outside @ W @ (
        np.eye(220) - orthonormal(220, 3, seed=20) @ orthonormal(220, 3, seed=20).T
    )
    svd = base_svd(tensor(W))
    found = dense_directions(svd, tensor(T), 3)
    np.testing.assert_allclose(found.values, 9.0, rtol=1e-12)
    assert found.intruders(0.5, 3) == [2]
    np.testing.assert_allclose(found.similarity[:2], 1, atol=1e-9)
    assert float(found.similarity[2]) == pytest.approx(200**-0.5, abs=1e-9)
    overlap = found.triplets(range(3)).left.numpy().T @ space
    np.testing.assert_allclose(overlap @ overlap.T, np.eye(3), atol=1e-9)  # the same space


@pytest.mark.parametrize("gap", [1e-6, 1e-4])
def test_close_values_that_float64_tells_apart_are_vectors_of_their_own(krylov, gap):
    values = [3.0, 3.0 - gap, 3.0 - 2 * gap, *np.linspace(1.0, 0.1, 87)]
    W, _U, _V = with_values(90, 90, values)
    T, _, _ = with_values(90, 90, values, seed=31)
    svd = base_svd(tensor(W))
    for strength in (1e-3, 0.3):
        B, A = random(90, 2, seed=3) * strength, random(2, 90, seed=4)
        found = low_rank_directions(svd, tensor(B), tensor(A), 1.0, 10)
        np.testing.assert_allclose(found.similarity, reference(W, W + B @ A, 10), atol=1e-6)
    found = dense_directions(svd, tensor(T), 10)
    np.testing.assert_allclose(found.similarity, reference(W, T, 10), atol=1e-6)


def test_repeated_values_are_not_missed_by_the_krylov_route(krylov):
    """Six equal leading values, twelve wanted: LAPACK's subspace, whole."""
    values = [5.0] * 6 + [3.0] * 4 + list(np.linspace(2.0, 0.1, 190))
    W, U, _V = with_values(200, 200, values)
    found = leading_triplets(tensor(W), 12, tensor(np.eye(200)[:, :40]))
    np.testing.assert_allclose(found.values, values[:12], rtol=1e-12)
    for start, stop in ((0, 6), (6, 10)):
        overlap = U[:, start:stop].T @ found.left.numpy()[:, start:stop]
        np.testing.assert_allclose(np.linalg.svd(overlap, compute_uv=False), 1, atol=1e-10)


def test_a_group_that_the_count_cuts_is_taken_whole():
    """Four equal values, two wanted: which two of them are given is not left to chance."""
    W, U, _V = with_values(60, 60, np.linspace(2.0, 1.0, 60))
    space = np.stack([U[:, 3], U[:, 4], U[:, 20:] @ np.full(40, 40**-0.5), U[:, 5]], 1)
    inputs = orthonormal(60, 4, seed=8)
    T = 7.0 * space @ orthonormal(4, 4, seed=5) @ inputs.T
    found = dense_directions(base_svd(tensor(W)), tensor(T), 2)
    assert found.intruders(0.5, 2) == [] and len(found.values) == 2


def test_a_tall_matrix_says_what_its_base_does_not_reach():
    """A new output direction that the base never writes to."""
    W, U, _V = with_values(80, 30, np.linspace(2.0, 1.0, 30))
    new = orthonormal(80, 80, seed=77)[:, :1]
    new = new - U @ (U.T @ new)
    new /= np.linalg.norm(new)
    B, A = 10 * new, orthonormal(30, 1, seed=5).T
    svd = base_svd(tensor(W))
    for found in (
        low_rank_directions(svd, tensor(B), tensor(A), 1.0, 5),
        dense_directions(svd, tensor(W + B @ A), 5),
    ):
        expected = np.linalg.svd(W + B @ A)[0][:, :5]
        outside = np.linalg.norm(expected - U @ (U.T @ expected), axis=0)
        np.testing.assert_allclose(found.outside, outside, atol=1e-9)
        assert float(found.outside[0]) > 0.9 and found.intruders(0.5, 5) == [0]


def test_a_base_of_deficient_rank_has_no_directions_where_it_is_zero():
    W, U, _V = with_values(40, 60, [3.0, 2.0, 1.0])
    T = W + 10 * np.outer(orthonormal(40, 40, seed=3)[:, 0], orthonormal(60, 1, seed=4)[:, 0])
    found = dense_directions(base_svd(tensor(W)), tensor(T), 4)
    Y = np.linalg.svd(T)[0][:, :4]
    np.testing.assert_allclose(found.similarity, np.abs(U.T @ Y).max(0), atol=1e-9)
    np.testing.assert_allclose(found.outside, np.linalg.norm(Y - U @ (U.T @ Y), axis=0), atol=1e-9)


def test_a_zero_base_resembles_nothing_and_a_zero_matrix_has_no_directions():
    zero = torch.zeros(20, 30, dtype=torch.float64)
    found = dense_directions(base_svd(zero), tensor(random(20, 30)), 3)
    assert found.similarity.tolist() == [0, 0, 0] and found.intruders(0.5, 3) == [0, 1, 2]
    assert len(dense_directions(base_svd(tensor(random(20, 30))), zero, 3).values) == 0


def test_an_update_of_zero_changes_nothing():
    W = random(50, 70)
    svd = base_svd(tensor(W))
    B, A = torch.zeros(50, 4, dtype=torch.float64), tensor(random(4, 70))
    found = low_rank_directions(svd, B, A, 2.0, 10)
    np.testing.assert_allclose(found.similarity, 1, atol=1e-9)
    assert found.nearest.tolist() == list(range(10))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0])
def test_scaling_intruders_scales_their_singular_values_alone(transposed, factor):
    W, B, A = random(40, 60), random(40, 2, seed=1), random(2, 60, seed=2)
    T = W + 3 * B @ A
    found = low_rank_directions(base_svd(tensor(W)), tensor(B), tensor(A), 3.0, 10)
    chosen = [0, 1]
    rows = slice(5, 40)
    part = scaled_rows(found.triplets(chosen), factor, rows, transposed=transposed).numpy()
    U, S, Vt = np.linalg.svd(T, full_matrices=False)
    S[chosen] *= factor
    expected = U * S @ Vt - T
    np.testing.assert_allclose(part, (expected.T if transposed else expected)[rows], atol=1e-9)
