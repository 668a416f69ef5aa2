"""A tuned matrix in its base's coordinates, by each of the ways that its size and rank decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from taskvec.intruders import bracket as module
from taskvec.intruders.basesvd import base_svd
from taskvec.intruders.bracket import Bracket, bracket_triplets
from taskvec.intruders.directions import low_rank_directions
from tests.test_intruders import orthonormal, random, reference, tensor, with_values

# Which of LAPACK's SVD, the Gram matrix (in float32 where large) and the diagonal is the way.
WAYS = {"whole": (50, 0), "gram": (0, 1000), "diagonal": (2, 0)}


@pytest.fixture(params=list(WAYS))
def way(request, monkeypatch):
    whole, gram = WAYS[request.param]
    monkeypatch.setattr(module, "_WHOLE", whole)
    monkeypatch.setattr(module, "_GRAM", gram)
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "_SINGLE", 100)
    return request.param


@pytest.fixture
def refuse_lapack(monkeypatch):
    """The way that is asked for, or none."""

    def refused(matrix, count):
        raise AssertionError("left to LAPACK")

    monkeypatch.setattr(module, "_whole", refused)


def factors(m, n, rank, strength=1.0, seed=5):
    return random(m, rank, seed=seed) * strength, random(rank, n, seed=seed + 1)


def directions(W, B, A, count=10, scaling=1.0):
    return low_rank_directions(base_svd(tensor(W)), tensor(B), tensor(A), scaling, count)


SPECTRA = {
    "decaying": lambda p: 0.97 ** np.arange(p),
    "flat": lambda p: np.linspace(1.0, 0.9, p),
    "power": lambda p: np.arange(1, p + 1) ** -0.5,
    "an outlier": lambda p: np.concatenate([[1000.0], np.linspace(1.0, 0.1, p - 1)]),
    "a far outlier": lambda p: np.concatenate([[1e4], np.linspace(1.0, 0.1, p - 1)]),
    "two scales": lambda p: (
        np.concatenate([np.linspace(1e4, 2e3, p // 10), np.ones(p - p // 10)])
        * np.linspace(1.1, 1.0, p)
    ),
}


@pytest.mark.parametrize("spectrum", list(SPECTRA))
@pytest.mark.parametrize("m, n", [(96, 96), (150, 150), (80, 200), (200, 80)])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_verdicts_are_those_of_two_dense_svds(way, spectrum, m, n, rank):
    values = SPECTRA[spectrum](min(m, n))
    W, _, _ = with_values(m, n, values)
    for strength in (1e-3, 0.1):
        B, A = factors(m, n, rank, strength)
        T = W + B @ A
        found, expected = directions(W, B, A), reference(W, T, 10)
        sigma = np.linalg.svd(T, compute_uv=False)
        gap = np.abs(np.diff(sigma[:11])).min() / sigma[0]
        np.testing.assert_allclose(found.values, sigma[:10], atol=1e-13 * sigma[0])
        np.testing.assert_allclose(found.similarity, expected, atol=1e-12 / gap)
        verdict = [j for j in range(10) if expected[j] < 0.5]
        assert found.intruders(0.5, 10) == verdict


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("size", [64, 128, 256, 400])
def test_no_usual_matrix_is_left_to_lapack(refuse_lapack, size, rank):
    W, (B, A) = random(size, size) / size**0.5, factors(size, size, rank, 1 / size)
    expected = reference(W, W + B @ A, 10)
    found = directions(W, B, A)
    np.testing.assert_allclose(found.similarity, expected, atol=1e-8)
    assert found.intruders(0.5, 10) == [j for j in range(10) if expected[j] < 0.5]


@pytest.mark.parametrize("gap", [1e-6, 1e-5])
def test_a_crowd_of_close_values_gives_its_first_ones(way, gap):
    """Forty values that float32 hardly tells apart, of which the first ten are wanted."""
    values = np.concatenate([2.0 - gap * np.arange(40), np.linspace(1.0, 0.1, 110)])
    W, U, _ = with_values(150, 150, values)
    B, A = U[:, 100:101] * 5, orthonormal(150, 1, seed=9).T
    T = W + B @ A
    found = directions(W, B, A)
    np.testing.assert_allclose(found.values, np.linalg.svd(T)[1][:10], rtol=1e-13)
    np.testing.assert_allclose(found.similarity, reference(W, T, 10), atol=1e-13 / gap)


@pytest.mark.parametrize("gap", [0.0, 1e-13, 1e-10])
def test_values_that_are_equal_to_rounding_are_compared_as_spaces(way, gap):
    """Ten values of the base are equal: six of the tuned matrix's still are, within their space."""
    values = np.concatenate([4.0 - gap * np.arange(10), np.linspace(2.0, 0.1, 140)])
    W, U, _ = with_values(150, 150, values)
    B, A = factors(150, 150, 2, 0.004)
    found = directions(W, B, A, 14)
    Y, sigma, _ = np.linalg.svd(W + B @ A)
    equal = np.abs(sigma - 4.0) < 1e-8
    assert equal.sum() == 6
    np.testing.assert_allclose(found.values, sigma[:14], rtol=1e-12)
    group = found.triplets(np.flatnonzero(equal[:14])).left.numpy()
    overlap = np.linalg.svd(Y[:, equal].T @ group, compute_uv=False)
    np.testing.assert_allclose(overlap, 1, atol=1e-9)  # the same space
    np.testing.assert_allclose(found.similarity[equal[:14]], 1, atol=1e-9)
    for j in np.flatnonzero(~equal[:14]):
        spaces = [np.linalg.norm(U[:, :10].T @ Y[:, j]), np.abs(U[:, 10:].T @ Y[:, j]).max()]
        assert float(found.similarity[j]) == pytest.approx(max(spaces), abs=1e-7)


def test_a_repeated_value_that_the_count_cuts_comes_whole(way):
    """Thirty equal tuned values and ten wanted."""
    W, U, _ = with_values(150, 150, np.concatenate([np.full(30, 3.0), np.linspace(1, 0.1, 120)]))
    found = directions(W, np.zeros((150, 1)), np.zeros((1, 150)))
    np.testing.assert_allclose(found.similarity, 1, atol=1e-9)
    inside = np.linalg.norm(U[:, :30].T @ found.triplets(range(10)).left.numpy(), axis=0)
    np.testing.assert_allclose(inside, 1, atol=1e-9)


@pytest.mark.parametrize("m, n", [(150, 150), (90, 160), (160, 90)])
def test_a_base_of_deficient_rank(way, m, n):
    W, U, _ = with_values(m, n, [5.0, 4.0, 3.0, 2.0, 1.0])
    B, A = factors(m, n, 2, 0.01)
    found = directions(W, B, A)
    Y, sigma, _ = np.linalg.svd(W + B @ A, full_matrices=False)
    assert len(found.values) == 7
    np.testing.assert_allclose(found.values, sigma[:7], rtol=1e-11)
    np.testing.assert_allclose(found.similarity, np.abs(U.T @ Y[:, :7]).max(0), atol=1e-9)
    outside = np.linalg.norm(Y[:, :7] - U @ (U.T @ Y[:, :7]), axis=0)
    np.testing.assert_allclose(found.outside, outside, atol=1e-7)


def test_a_zero_base_has_the_directions_of_the_update_alone(way):
    B, A = factors(120, 150, 3)
    found = directions(np.zeros((120, 150)), B, A)
    np.testing.assert_allclose(found.values, np.linalg.svd(B @ A)[1][:3], rtol=1e-11)
    assert found.similarity.tolist() == [0, 0, 0]


def test_an_update_of_zero_and_one_that_takes_directions_away(way):
    W, U, V = with_values(120, 120, np.linspace(3, 1, 120))
    B, A = factors(120, 120, 3)
    found = directions(W, B, A, scaling=0.0)
    assert found.nearest.tolist() == list(range(10))
    np.testing.assert_allclose(found.similarity, 1, atol=1e-9)
    found = directions(W, -U[:, :3] * np.linspace(3, 1, 120)[:3], V[:, :3].T)  # its first three
    assert found.nearest.tolist() == list(range(3, 13))


def test_more_vectors_than_the_matrix_has(way):
    W, (B, A) = random(30, 50), factors(30, 50, 4)
    found = directions(W, B, A, 40)
    assert len(found.values) == 30
    np.testing.assert_allclose(found.similarity, reference(W, W + B @ A, 30), atol=1e-9)


def test_a_strong_update_of_the_last_directions_alone(way):
    """What the first coordinates do not know of: a hundred directions, far down, made the first."""
    W, U, V = with_values(300, 300, np.linspace(3.0, 1.0, 300))
    B, A = U[:, 200:] * np.linspace(20.0, 10.0, 100), V[:, 200:].T
    found = directions(W, B, A)
    assert found.nearest.tolist() == list(range(200, 210))
    np.testing.assert_allclose(found.values, np.linalg.svd(W + B @ A)[1][:10], rtol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_scale_of_a_matrix_does_not_matter(way, size):
    W, (B, A) = random(150, 150), factors(150, 150, 4)
    found = directions(W * size, B * size, A)
    np.testing.assert_allclose(found.similarity, reference(W, W + B @ A, 10), atol=1e-9)


@pytest.mark.parametrize("m, n", [(90, 90), (60, 110), (110, 60)])
@pytest.mark.parametrize("rank", [0, 1, 7, 70])
def test_how_many_values_lie_above_a_gap_is_counted(m, n, rank):
    S, P, Q = np.linspace(3.0, 0.5, 50), random(m, rank) * 1e4, random(n, rank, seed=1) * 2e-5
    M = P @ Q.T
    M[range(50), range(50)] += S
    sigma = np.linalg.svd(M, compute_uv=False)
    matrix = Bracket(tensor(S), tensor(P), tensor(Q))
    for i in (0, 1, 9, 30, 48):
        assert module._number_above(matrix, sigma[i + 1], sigma[i]) == i + 1


def test_a_triplet_that_was_passed_over_is_found_by_lapack(monkeypatch):
    """The rounds are made to begin where the strongest direction is not, and to stop at once."""
    P, Q = np.zeros((200, 1)), np.zeros((200, 1))
    P[150], Q[150] = 50.0, 1.0
    matrix = Bracket(tensor(np.linspace(3.0, 1.0, 200)), tensor(P), tensor(Q))

    def blind(matrix, count):
        zeros = torch.zeros(200, 1, dtype=torch.float64)
        return module._Guess(torch.eye(200, 60, dtype=torch.float64), zeros)

    monkeypatch.setattr(module, "_diagonal_guess", blind)
    found = bracket_triplets(matrix, 14)
    expected = [50.0 + float(np.linspace(3.0, 1.0, 200)[150]), *np.linspace(3.0, 1.0, 200)[:13]]
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)
    assert float(found.right[150, 0].abs()) == pytest.approx(1)


def test_factors_that_repeat_themselves_have_the_rank_of_their_product():
    P, Q = random(40, 1).repeat(5, 1), random(50, 1, seed=1).repeat(5, 1)
    zeros = torch.zeros(40, dtype=torch.float64)
    found = module._strongest_first(Bracket(zeros, tensor(P), tensor(Q)))
    assert found.near.shape == (40, 1)
    np.testing.assert_allclose(found.whole(), P @ Q.T, atol=1e-12)
    assert module._strongest_first(Bracket(zeros, tensor(P * 0), tensor(Q))).far.shape == (50, 0)


def test_the_same_input_gives_the_same_bits(way):
    W, (B, A) = random(150, 150), factors(150, 150, 4)
    once, again = directions(W, B, A), directions(W, B, A)
    assert torch.equal(once.coordinates, again.coordinates) and torch.equal(
        once.similarity, again.similarity
    )
