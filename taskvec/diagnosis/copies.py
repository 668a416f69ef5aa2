"""Is the adapter that was given a copy, rounded to 16 bits, of the one that was merged?

Much of what is published is saved in bf16 or fp16 after it was trained, and merged, in fp32. With
B + dB and A + dA in the adapter that was merged, and s B A in the one that was given, T is

    T = s (B + dB) (A + dA) + E = delta + s (dB A + B dA + dB dA) + E,

where |dB| and |dA| are within half a spacing of the format, h(B) and h(A), and E is the rounding of
the merge. So each element is within |s| (h(B) |A| + |B| h(A) + h(B) h(A)) of what rounding allows;
and what is more than E lies in the spans of B's columns and of A's rows:

    (I - P_B) (T - delta) (I - P_A) = (I - P_B) (s dB dA + E) (I - P_A),

with the orthogonal projections P on the two. Training, another base or noise would leave as much
beside the spans as in them, for each of their dimensions. Where a merge in 16 bits hides most of
that, what is left are elements that were rounded to another number than in a merge of the copy;
with their signs, more of them lies in the spans than signs by chance would put there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from taskvec.bounds import gamma
from taskvec.certificate import Block
from taskvec.compare import Comparison, ParameterResult
from taskvec.diagnosis.case import Case, worst_row
from taskvec.diagnosis.factors import factor_test, tolerance
from taskvec.diagnosis.remainder import noise_variance
from taskvec.header import row_shape
from taskvec.rounding import NARROW_FORMATS, U32, Format, half_ulp, subtract_rows
from taskvec.update import Update
from taskvec.updates.dora import Dora
from taskvec.updates.in_turn import InTurn
from taskvec.updates.products import Experts, LowRank
from taskvec.updates.replaced import Replacement, TokenRows

_MARGIN = 2.0  # how much larger than its estimate the energy of a few rounding errors can be
_SIGMAS = 5.0

# Rows of T and of delta -> how far rounding the adapter can have moved delta; None: what was given
# holds other numbers than the format's.
Spread = Callable[[Block, torch.Tensor], torch.Tensor | None]


@dataclass
class Split:
    """M less the merge of the adapter that was given, split by the spans of its factors.

    What rounding does to both is not in it, such as the loss of an update below half a spacing,
    which lies in the spans as well. All but the last two are sums of squares over elements.

    Attributes:
        within, beside: of what lies in the spans, and of the rest.
        by_chance: of what would lie in the spans if each element had either sign by chance.
        roundings: what the rounding of merges, and dB dA, are expected to leave beside them.
        dimensions, others: of the spans, and of the rest.
    """

    within: float = 0.0
    beside: float = 0.0
    by_chance: float = 0.0
    roundings: float = 0.0
    dimensions: int = 0
    others: int = 0

    def __add__(self, other: Split) -> Split:
        return Split(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def refutes(self) -> bool:
        """There is more beside the spans than rounding leaves there."""
        return self.beside > _MARGIN * self.roundings

    @property
    def tells(self) -> bool:
        """More lies in the spans than chance would put there."""
        return not self.refutes and self.within > self.by_chance * (1 + _SIGMAS * self._error)

    @property
    def share(self) -> float:
        """Of all, what lies in the spans."""
        return self._share(self.within)

    @property
    def share_by_chance(self) -> float:
        return self._share(self.by_chance)

    @property
    def error_of_chance(self) -> float:
        """The standard error of `share_by_chance`."""
        return self.share_by_chance * self._error if self.others else 0.0

    def _share(self, part: float) -> float:
        total = self.within + self.beside
        return part / total if total else 0.0

    @property
    def _error(self) -> float:
        return math.sqrt(2 / self.dimensions + 2 / self.others) if self.others else math.inf


@dataclass(frozen=True)
class _Factors:
    """A matrix L R of rank r as the parameter stores it, in float64.

    Attributes:
        first: its first row in the parameter.
        left, right: L (m, r), with the scaling in it, and R (r, n).
        left_error, right_error: half the format's spacing at each of their numbers.
    """

    first: int
    left: torch.Tensor
    right: torch.Tensor
    left_error: torch.Tensor
    right_error: torch.Tensor

    def spread(self, start: int, stop: int) -> torch.Tensor:
        """Rows of how far the rounding of both factors can have moved their product."""
        left, error = self.left[start:stop].abs(), self.left_error[start:stop]
        both = torch.cat([error, left + error], 1)
        moved = both @ torch.cat([self.right.abs(), self.right_error])
        return moved * (1 + gamma(self.right.shape[0] + 2))  # their matmul's bound moves as well

    def noise(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the variance of what a merge's matmul rounds, and of dB dA."""
        size = self.left[start:stop].abs() @ self.right.abs()
        second = (self.left_error[start:stop] ** 2 / 3) @ (self.right_error**2 / 3)
        return second + (self.right.shape[0] + 1) * (size * U32) ** 2 / 3


@dataclass(frozen=True)
class Copy:
    """A parameter that the rounding of its adapter to a format explains, and what is left of it."""

    format: Format
    split: Split


def rounded_copies(
    case: Case, pairs: Sequence[tuple[ParameterResult, Comparison]]
) -> tuple[dict[str, Copy], dict[str, Format]]:
    """The parameters whose factors may have been rounded after they were merged.

    Returns:
        those of which it is told, and the format of those where rounding hides it. A parameter
        alone may hold too little to tell; those that one format explains tell together.
    """
    found = {result.name: _rounded_copy(case, result, comparison) for result, comparison in pairs}
    copies = {name: copy for name, copy in found.items() if copy is not None}
    told: set[Format] = set()
    for format in NARROW_FORMATS:
        splits = [copy.split for copy in copies.values() if copy.format is format]
        if sum(splits, Split()).tells:
            of_format = [(r, c) for r, c in pairs if _is_of(copies.get(r.name), format)]
            worst = max(of_format, key=lambda pair: pair[1].certificate.violations)
            if factor_test(case, *worst) is None:  # nor is it delta times a factor near to 1
                told.add(format)
    return (
        {name: copy for name, copy in copies.items() if copy.format in told},
        {name: copy.format for name, copy in copies.items() if copy.format not in told},
    )


def _is_of(copy: Copy | None, format: Format) -> bool:
    return copy is not None and copy.format is format


def _rounded_copy(case: Case, result: ParameterResult, comparison: Comparison) -> Copy | None:
    """With the finest format whose rounding explains every element; None where none does."""
    if result.task_vector.non_finite:
        return None
    update = case.update(result.name)
    parts = update.parts if isinstance(update, InTurn) else (update,)
    stored = [part for part in parts if isinstance(part, Replacement | TokenRows)]
    products = _products([part for part in parts if part not in stored])
    for format in NARROW_FORMATS:
        if products is None or not _are_numbers_of(format, products):
            continue
        matrices = _matrices(update, products, format)
        spread: Spread | None = _spread(matrices, stored, format)
        if isinstance(update, Dora):
            spread = _spread_of_dora(update, _spread(matrices, [], format), format)
        blocks = case.probe_first(result.name, worst_row(comparison))
        if spread is not None and _allowed(update, comparison, spread, blocks):
            # Of numbers that are stored as they are, and of DoRA's, only their size is looked at.
            alone = not stored and not isinstance(update, Dora)
            split = _split(case, result.name, update, comparison, matrices) if alone else Split()
            return None if split.refutes else Copy(format, split)
    return None


def _products(parts: Sequence[Update]) -> list[LowRank] | None:
    """The products that parts of an update consist of.

    Returns:
        None where they are something else, or where their rows are not those of a matrix.
    """
    found: list[LowRank] = []
    for part in parts:
        part = part.direction if isinstance(part, Dora) and len(parts) == 1 else part
        if isinstance(part, Experts) and len(parts) == 1:
            found += part.experts
        elif isinstance(part, LowRank) and math.prod(row_shape(part.shape)) == part.matrix[1]:
            found.append(part)
        else:
            return None
    return found


def _are_numbers_of(format: Format, products: Sequence[LowRank]) -> bool:
    factors = [factor for product in products for factor in (product.A, product.B)]
    return all(torch.equal(format.round(factor), factor) for factor in factors)


def _matrices(update: Update, products: Sequence[LowRank], format: Format) -> list[_Factors]:
    """The matrices that a parameter consists of: experts, one below the other; else one.

    Adapters that are merged in turn are one product, of their factors side by side.
    """
    pieces = [_factors(product, format) for product in products]
    if isinstance(update, Experts):
        rows = update.experts[0].matrix[0]
        return [_Factors(i * rows, *piece) for i, piece in enumerate(pieces)]
    if not pieces:
        return []
    left, right, left_error, right_error = zip(*pieces, strict=True)
    return [
        _Factors(
            0,
            torch.cat(left, 1),
            torch.cat(right),
            torch.cat(left_error, 1),
            torch.cat(right_error),
        )
    ]


def _factors(
    update: LowRank, format: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left and right factor as the parameter is stored, and half a spacing at their numbers."""
    A, B = update.A.double(), update.B.double()
    left, left_error = B * update.scaling, half_ulp(B, format) * abs(update.scaling)
    right_error = half_ulp(A, format)
    if update.transposed:
        return A.T, left.T, right_error.T, left_error.T
    return left, A, left_error, right_error


def _spread(
    matrices: Sequence[_Factors], stored: Sequence[Replacement | TokenRows], format: Format
) -> Spread:
    """Of the products, and of what replaces the base's numbers, where it differs from them."""

    def spread(block: Block, delta: torch.Tensor) -> torch.Tensor | None:
        total = torch.zeros_like(delta)
        for part in stored:
            change = part.exact(block.start, block.stop)
            values, replaced = (block.base.double() + change).float(), change != 0
            if not torch.equal(format.round(values)[replaced], values[replaced]):
                return None
            total += torch.where(replaced, half_ulp(values.double(), format), 0.0)
        pieces = _pieces(matrices, block.start, block.stop)
        if rows := [factors.spread(start, stop) for factors, start, stop in pieces]:
            total += torch.cat(rows).reshape(delta.shape)
        return total

    return spread


def _spread_of_dora(update: Dora, of_product: Spread, format: Format) -> Spread | None:
    """Of diag(m / ‖V‖) V, V = W + s B A, where m was rounded as well; None where it was not."""
    m, A, B = update.m.double(), update.direction.A.double(), update.direction.B.double()
    if not torch.equal(format.round(m), m):
        return None
    of_A, of_B = half_ulp(A, format), half_ulp(B, format)
    of_norm = of_B @ torch.linalg.norm(A, dim=1) + (B.abs() + of_B) @ torch.linalg.norm(of_A, dim=1)
    of_norm *= abs(update.scaling)
    of_m = half_ulp(m, format)

    def spread(block: Block, delta: torch.Tensor) -> torch.Tensor | None:
        of_sum = of_product(block, delta)
        if of_sum is None:
            return None
        return update.moved_by(of_sum, of_norm, of_m, block.base.double() + delta, block.start)

    return spread


def _allowed(
    update: Update, comparison: Comparison, spread: Spread, blocks: Iterable[Block]
) -> bool:
    """Whether each element is within its bound and how far the adapter's rounding moves it."""
    certificate = comparison.certificate
    for block in blocks:
        delta = update.exact(block.start, block.stop)
        moved = spread(block, delta)
        if moved is None:
            return False
        bound = tolerance(
            update,
            block,
            delta=delta,
            base=block.base.double(),
            base_format=certificate.base_format,
            format=certificate.format,
            stored=block.base.dtype,
        )
        if not bool(((block.task_vector.double() - delta).abs() <= bound + moved).all()):
            return False
    return True


def _split(
    case: Case,
    name: str,
    update: Update,
    comparison: Comparison,
    matrices: Sequence[_Factors],
) -> Split:
    """What sets a parameter apart from the merge of this adapter, split by the spans."""
    format, recipe = case.format_of(name), comparison.certificate.best_recipe.recipe
    splits = {factors.first: _Splitting(factors) for factors in matrices}
    for block in case.blocks(name):
        merged = update.merged(recipe, block.base, block.start, block.stop, format)
        apart = block.task_vector.double() - subtract_rows(merged, block.subtracted).double()
        rows = torch.stack([apart, noise_variance(block, format)]).reshape(2, apart.shape[0], -1)
        done = 0
        for factors, start, stop in _pieces(matrices, block.start, block.stop):
            part, noise = rows[:, done : done + stop - start]
            splits[factors.first].add(start, part, noise + factors.noise(start, stop))
            done += stop - start
    return sum((splitting.conclude() for splitting in splits.values()), Split())


def _pieces(
    matrices: Sequence[_Factors], start: int, stop: int
) -> Iterator[tuple[_Factors, int, int]]:
    """The matrices that rows of a parameter belong to, in turn, and which of their rows."""
    for factors in matrices:
        low = max(start - factors.first, 0)
        high = min(stop - factors.first, factors.left.shape[0])
        if low < high:
            yield factors, low, high


class _Splitting:
    """Splits a matrix that comes in blocks of rows, in one pass.

    ‖(I - P_L) X (I - P_R)‖² = ‖Y‖² - ‖Q_L^T Y‖², with Y = X (I - P_R) and Q_L a basis of the span.
    """

    def __init__(self, factors: _Factors) -> None:
        self._left = torch.linalg.qr(factors.left).Q
        self._right = torch.linalg.qr(factors.right.T).Q
        m, n = factors.left.shape[0], factors.right.shape[1]
        self._others = (m - self._left.shape[1]) * (n - self._right.shape[1])
        self._dimensions = m * n - self._others
        self._along = factors.right.new_zeros(self._left.shape[1], n)
        self._outside = 1 - (self._right**2).sum(1)
        self._total = self._beside = self._beside_by_chance = self._roundings = 0.0

    def add(self, start: int, rows: torch.Tensor, noise: torch.Tensor) -> None:
        """Take rows from ``start`` on into account, and the variances of their rounding errors."""
        left = self._left[start : start + rows.shape[0]]
        beside = rows - (rows @ self._right) @ self._right.T
        self._total += float((rows * rows).sum())
        self._beside += float((beside * beside).sum())
        self._along += left.T @ beside
        outside = 1 - (left**2).sum(1)
        self._beside_by_chance += float(outside @ rows**2 @ self._outside)
        self._roundings += float(outside @ noise @ self._outside)

    def conclude(self) -> Split:
        if not self._others:
            return Split(within=self._total, by_chance=self._total)
        beside = max(self._beside - float((self._along**2).sum()), 0.0)
        return Split(
            within=self._total - beside,
            beside=beside,
            by_chance=self._total - self._beside_by_chance,
            roundings=self._roundings,
            dimensions=self._dimensions,
            others=self._others,
        )
