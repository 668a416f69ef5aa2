"""Intruder dimensions: leading directions of a fine-tuned matrix that its base does not have.

Shuttleworth, Andreas, Torralba and Sharma, LoRA vs full fine-tuning: an illusion of equivalence,
arXiv 2410.21228, Definition 3.1 and Algorithm 1: a left singular vector y_j of the tuned matrix,
among its first k, is an intruder where max_i |cos(y_j, x_i)| < epsilon over all left singular
vectors x_i of the base matrix.

What the definition leaves open is settled so:

- Singular vectors whose singular values are equal (closer than 1e-8 of the largest) are arbitrary
  within the space that they span. A vector's cosine with such a space is that with the nearest
  vector in it, and of a tuned space those vectors are taken that lie nearest to the base's, so that
  no verdict depends on which basis LAPACK happened to return.
- Output directions in which the base does nothing (W^T x = 0) are no direction of the base: any
  vector among them could be called a singular vector, and then nothing new could be found there.
  They are left out of the maximum, and ``outside`` says how much of y_j lies there. This concerns
  tall matrices, whose U does not span all outputs, and those of deficient rank.

Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from taskvec.intruders.basesvd import EQUAL, BaseSVD, repeated, steps_down
from taskvec.intruders.bracket import Bracket, bracket_triplets
from taskvec.intruders.leading import Triplets, leading_triplets

_BEYOND = 4  # triplets beyond those wanted, to see where a group of equal ones ends


@dataclass(frozen=True)
class Span:
    """An orthonormal basis: the base's own vectors (d, p), and what they lack (d, e)."""

    base: torch.Tensor
    more: torch.Tensor

    def vectors(self, coordinates: torch.Tensor) -> torch.Tensor:
        """(d, c) of coordinates (p + e, c)."""
        p = self.base.shape[1]
        found: torch.Tensor = self.base @ coordinates[:p] + self.more @ coordinates[p:]
        return found


@dataclass(frozen=True)
class TunedDirections:
    """The first L singular triplets of a tuned matrix, seen from its base.

    Attributes:
        values: (L,) singular values; fewer than asked for where the matrix has no more.
        coordinates: (p, L) cosines of y_j with every base vector x_i, signed.
        similarity: (L,) max_i |cos(y_j, x_i)|, as the module's text defines it.
        nearest: (L,) the i, counted from 0, at which it is attained; the first of equal ones.
        outside: (L,) ‖part of y_j where the base does nothing‖.
        found: the triplets in the coordinates of ``spans``; as they are where that is None.
        spans: of the outputs and of the inputs.
    """

    values: torch.Tensor
    coordinates: torch.Tensor
    similarity: torch.Tensor
    nearest: torch.Tensor
    outside: torch.Tensor
    found: Triplets
    spans: tuple[Span, Span] | None = None

    def intruders(self, epsilon: float, top_k: int) -> list[int]:
        """Which of the first ``top_k`` are intruders, counted from 0."""
        below = self.similarity[:top_k] < epsilon
        return [int(j) for j in torch.nonzero(below).flatten()]

    def triplets(self, chosen: Sequence[int]) -> Triplets:
        """Some of them, counted from 0: y_j (m, c), sigma_j (c,) and the right vectors (n, c)."""
        columns = torch.tensor(list(chosen), dtype=torch.int64, device=self.values.device)
        left, right = self.found.left[:, columns], self.found.right[:, columns]
        if self.spans is not None:
            left, right = self.spans[0].vectors(left), self.spans[1].vectors(right)
        return Triplets(left, self.values[columns], right)


def low_rank_directions(
    base: BaseSVD, B: torch.Tensor, A: torch.Tensor, scaling: float, count: int
) -> TunedDirections:
    """The directions of W + s B A, in the base's own coordinates.

    U^T (W + s B A) V = S + s (U^T B)(A V): a diagonal and a product of rank r, of which a
    multiplication costs O((m + n) r). Where B reaches outputs that U does not span, or A inputs
    that V does not, an orthonormal basis of what is missing is added.

    Args:
        base: of W (m, n).
        B: (m, r), A: (r, n), float64.
        scaling: s.
        count: L.
    """
    outputs, near = _coordinates_of(base.left, B * scaling)
    inputs, far = _coordinates_of(base.right, A.T)
    matrix = Bracket(base.values, near, far)
    found = _whole_groups(lambda wanted: bracket_triplets(matrix, wanted), count, matrix.shape)
    inside, rest = found.left[: len(base.values)], found.left[len(base.values) :]
    beyond = torch.linalg.vector_norm(rest, dim=0)
    return _directions(base, found, inside, beyond, count, (outputs, inputs))


def dense_directions(base: BaseSVD, tuned: torch.Tensor, count: int) -> TunedDirections:
    """The directions of any tuned matrix. tuned: (m, n) float64; otherwise as above."""
    found = _whole_groups(
        lambda wanted: leading_triplets(tuned, wanted, base.right), count, tuned.shape
    )
    coordinates = base.left.T @ found.left
    tall = tuned.shape[0] > tuned.shape[1]
    rest = found.left - base.left @ coordinates if tall else found.left[:0]
    return _directions(base, found, coordinates, torch.linalg.vector_norm(rest, dim=0), count)


def _coordinates_of(basis: torch.Tensor, columns: torch.Tensor) -> tuple[Span, torch.Tensor]:
    """A basis (d, p) with what it lacks to span some columns (d, r), and their coordinates."""
    inside = basis.T @ columns
    if basis.shape[0] == basis.shape[1]:
        return Span(basis, basis[:, :0]), inside
    more, rest = torch.linalg.qr(columns - basis @ inside)
    more, again = torch.linalg.qr(more - basis @ (basis.T @ more))
    return Span(basis, more), torch.cat([inside, again @ rest])


def _whole_groups(leading: Callable[[int], Triplets], count: int, shape: Sequence[int]) -> Triplets:
    """At least the first ``count`` triplets, cut where a group of equal singular values ends.

    Those that are zero are left out: their vectors are no directions of the matrix.

    Args:
        leading: gives that many of the first triplets.
        shape: of the matrix.
    """
    most = min(shape)
    wanted = min(count + _BEYOND, most)
    while True:
        found = leading(wanted)
        ends = [end for end in steps_down(found.values) if end >= count]
        if ends or wanted == most:
            break
        wanted = min(2 * wanted, most)
    cut = ends[0] if ends else wanted
    cut = min(cut, int((found.values > EQUAL * found.values[:1]).sum()))
    return Triplets(found.left[:, :cut], found.values[:cut], found.right[:, :cut])


def _directions(
    base: BaseSVD,
    found: Triplets,
    coordinates: torch.Tensor,
    beyond: torch.Tensor,
    count: int,
    spans: tuple[Span, Span] | None = None,
) -> TunedDirections:
    """Similarities, with the basis of every group of equal tuned values turned towards the base.

    Args:
        coordinates: (p, L') in the base's basis; beyond: (L',) norms of what that does not span.
    """
    left, right = found.left, found.right
    groups = repeated(found.values)
    if groups:
        left, right, coordinates, beyond = (x.clone() for x in (left, right, coordinates, beyond))
    for start, stop in groups:
        turn = _towards_base(coordinates[:, start:stop], base)
        for columns in (coordinates, left, right):
            columns[:, start:stop] = columns[:, start:stop] @ turn
        beyond[start:stop] = _norms_after(beyond[start:stop], coordinates[:, start:stop])
    similarity, nearest = _similarity(coordinates, base)
    unreached = torch.linalg.vector_norm(coordinates[base.rank :], dim=0)
    outside = torch.hypot(beyond, unreached).clamp(max=1.0)
    kept = slice(0, min(count, len(found.values)))
    return TunedDirections(
        values=found.values[kept],
        coordinates=coordinates[:, kept],
        similarity=similarity[kept],
        nearest=nearest[kept],
        outside=outside[kept],
        found=Triplets(left[:, kept], found.values[kept], right[:, kept]),
        spans=spans,
    )


def _norms_after(beyond: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """Norms of the parts beyond the base's basis, of vectors that were turned among themselves."""
    if not bool(beyond.any()):
        return beyond
    return torch.sqrt((1 - (coordinates**2).sum(0)).clamp(min=0.0))


def _similarity(coordinates: torch.Tensor, base: BaseSVD) -> tuple[torch.Tensor, torch.Tensor]:
    """max over the base's groups of ‖coordinates within the group‖, and the group's first index."""
    if not base.rank:
        zeros = coordinates.new_zeros(coordinates.shape[1])
        return zeros, zeros.long()
    squares = coordinates[: base.rank] ** 2
    for start, stop in base.repeated:
        squares[start] = squares[start:stop].sum(0)
    best, first = squares.max(0)
    return best.sqrt().clamp(max=1.0), first


def _towards_base(coordinates: torch.Tensor, base: BaseSVD) -> torch.Tensor:
    """The basis of a tuned space (coordinates (p, c)) that lies nearest to the base's directions.

    Greedily: the vector of the space with the largest cosine to any base direction, then the same
    of what is left of the space. Returns the rotation (c, c).
    """
    size = coordinates.shape[1]
    left_over = torch.eye(size, dtype=torch.float64, device=coordinates.device)
    chosen: list[torch.Tensor] = []
    while left_over.shape[1] > 1:
        weight, vector = _nearest_vector(coordinates[: base.rank] @ left_over, base.repeated)
        if weight == 0:
            break
        chosen.append(left_over @ vector[:, None])
        complement = torch.linalg.qr(vector[:, None], mode="complete").Q[:, 1:]
        left_over = left_over @ complement
    return torch.cat([*chosen, left_over], 1)


def _nearest_vector(
    rest: torch.Tensor, groups: Sequence[tuple[int, int]]
) -> tuple[float, torch.Tensor]:
    """max over rows and groups of rows g of ‖rest[g]‖_2, and the right singular vector of it."""
    if not len(rest):
        return 0.0, rest.new_zeros(rest.shape[1])
    norms = torch.linalg.vector_norm(rest, dim=1)
    row = int(norms.argmax())
    best = float(norms[row])
    vector = rest[row] / best if best else rest[row]
    for start, stop in groups:
        values, right = torch.linalg.svd(rest[start:stop], full_matrices=False)[1:]
        if float(values[0]) > best:
            best, vector = float(values[0]), right[0]
    return best, vector


def similarity_picture(directions: TunedDirections, size: int) -> torch.Tensor:
    """|cos(x_i, y_j)| of the first vectors of both: row i, column j, up to ``size`` of each."""
    return directions.coordinates[:size, :size].abs()


def scaled_rows(
    triplets: Triplets, factor: float, rows: slice, *, transposed: bool
) -> torch.Tensor:
    """Rows of (factor - 1) * sum_j sigma_j u_j v_j^T over some triplets, float64.

    Added to the tuned matrix this scales its intruders (arXiv 2410.21228, the intervention on
    intruder dimensions).

    Args:
        rows: of the parameter as stored.
        transposed: the parameter is stored (in, out).
    """
    left, right = triplets.left, triplets.right
    if transposed:
        left, right = right, left
    product: torch.Tensor = (left[rows] * ((factor - 1.0) * triplets.values)) @ right.T
    return product
