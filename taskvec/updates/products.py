"""What adds s * B @ A to a parameter: LoRA in all its shapes.

Formulas: Hu et al., arXiv 2106.09685, section 4.1; scaling of rsLoRA: Kalajdzievski, arXiv
2312.03732; embeddings, convolutions and experts as PEFT's ``get_delta_weight`` of `lora.Embedding`,
`lora.Conv2d` and `lora.ParamWrapper`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from taskvec.bounds import Family, merged_interval, product_error, underflow_of_products
from taskvec.header import row_shape
from taskvec.rounding import (
    FP32,
    Format,
    Recipe,
    all_finite,
    is_power_of_two,
    loses,
    merge_rows,
    recipe_delta,
)
from taskvec.update import Update

# A product of few rows takes another path through the BLAS than the whole matrix does, and has
# other last bits: with MKL below 2 rows on Intel's processors, below 4 on AMD's; where it has fewer
# than 12 columns, so can any rows. More than twice that is computed, or the whole.
_FEWEST_ROWS, _FEWEST_COLUMNS = 16, 32


class Product(Update):
    """An update that is s times one or more products B @ A of rank r.

    Attributes:
        scaling: s.
        rounds_delta: PEFT rounds the delta to the base's format before it adds it.
    """

    scaling: float
    rounds_delta: bool

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def largest_factor(self) -> float:
        """The largest absolute value in A."""

    @abstractmethod
    def delta(self, start: int, stop: int, *, prescaled: bool = False) -> torch.Tensor:
        """Rows of fl32(fl32(B @ A) * s), fp32: the bits of PEFT's get_delta_weight.

        Args:
            start, stop: rows of the parameter as stored.
            prescaled: fold s into B before the product instead.

        Returns:
            rows in fp32.
        """

    @abstractmethod
    def magnitude(
        self, start: int, stop: int, dtype: torch.dtype = torch.float64, *, times: float = 1.0
    ) -> torch.Tensor:
        """Rows of |s| * (|B| @ |A|), to which matmul errors are relative.

        Args:
            dtype: fp32 or float64, which they are computed in.
            times: a factor, taken in first: the product may overflow where its share does not.
        """

    @abstractmethod
    def rounded_factors(self, dtype: torch.dtype) -> Product:
        """The update of an adapter whose factors were stored in ``dtype`` on the way."""

    def merged(
        self, recipe: Recipe, base: torch.Tensor, start: int, stop: int, format: Format
    ) -> torch.Tensor:
        delta = recipe_delta(self.followed(recipe), self, start, stop, format)
        return merge_rows(recipe, base, delta, format)

    def followed(self, recipe: Recipe) -> Recipe:
        """A recipe as it is followed for this parameter."""
        if recipe.round_base and self.rounds_delta:
            return replace(recipe, round_delta=True)
        return recipe

    def recipe_key(self, recipe: Recipe, format: Format, stored: torch.dtype) -> tuple[bool, ...]:
        narrow, recipe = format is not FP32, self.followed(recipe)
        return (
            recipe.round_base and loses(stored, format),
            recipe.round_factors and narrow,
            recipe.round_delta and narrow,
            recipe.prescaled and not is_power_of_two(self.scaling),
        )

    def variations(
        self,
        recipe: Recipe,
        base: torch.Tensor,
        start: int,
        stop: int,
        format: Format,
        exact: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        recipe = self.followed(recipe)
        if recipe.round_factors:
            exact = self.rounded_factors(format.dtype).exact(start, stop)
        exact = exact.float()
        narrowed = format.round(exact)
        in_order, in_format = (narrowed, exact) if recipe.round_delta else (exact, narrowed)
        return (
            merge_rows(recipe, base, in_order, format),
            merge_rows(recipe, base, in_format, format),
        )

    def interval(
        self,
        recipe: Recipe,
        start: int,
        stop: int,
        *,
        base: torch.Tensor,
        format: Format,
        where: torch.Tensor,
        rounded_anywhere: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return merged_interval(
            self.followed(recipe),
            self,
            start,
            stop,
            base=base,
            format=format,
            where=where,
            rounded_anywhere=rounded_anywhere,
        )

    def error(
        self,
        family: Family,
        start: int,
        stop: int,
        *,
        delta: torch.Tensor,
        base: torch.Tensor,
        format: Format,
    ) -> torch.Tensor:
        return product_error(
            family, self, start, stop, delta=delta, format=format, dtype=base.dtype
        )

    def underflow(self) -> float:
        return underflow_of_products(self)


@dataclass(frozen=True)
class LowRank(Product):
    """s * B @ A with both factors in memory, whatever shape the parameter is stored in.

    Attributes:
        parameter: the parameter's name in the base.
        A: (r, in) fp32.
        B: (out, r) fp32.
        scaling: s, a Python float as PEFT keeps it.
        transposed: the parameter is stored (in, out), as GPT-2's Conv1D and embeddings are.
        stored: the stored shape where that is not the matrix's: (out,) of a bias, (out, channels,
            height, width) of a convolution, whose A is (r, channels * height * width).
        rounds_delta: as PEFT does for embeddings and for parameters without a module.
    """

    parameter: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    transposed: bool = False
    stored: tuple[int, ...] | None = None
    rounds_delta: bool = False
    kind: str = "LoRA"
    _kept: dict[tuple[torch.dtype, float], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the delta as a matrix, as it is stored."""
        out, into = self.B.shape[0], self.A.shape[1]
        return (into, out) if self.transposed else (out, into)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix if self.stored is None else self.stored

    @cached_property
    def largest_factor(self) -> float:
        return float(self.A.abs().max()) if self.A.numel() else 0.0

    def delta(self, start: int, stop: int, *, prescaled: bool = False) -> torch.Tensor:
        return self._delta(start, stop, torch.float32, prescaled)

    def delta_in(self, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Rows of the delta as a matmul in ``dtype`` gives it, in fp32."""
        return self._delta(start, stop, dtype, False).float()

    def _delta(self, start: int, stop: int, dtype: torch.dtype, prescaled: bool) -> torch.Tensor:
        def compute(start: int, stop: int) -> torch.Tensor:
            low, high = _widened(start, stop, *self.matrix)
            B, A = (factor.to(dtype) for factor in self._rows(low, high))
            product = self._turned((B * self.scaling) @ A if prescaled else B @ A)
            rows = product[start - low : stop - low]
            return rows if prescaled else rows.mul_(self.scaling)

        return self._cut(compute, start, stop)

    def exact(self, start: int, stop: int) -> torch.Tensor:
        """Rows of s * B @ A computed in float64: exact to 2^-29 of what fp32 could lose."""

        return self._product(*self._scaled_factors, start, stop)

    def magnitude(
        self, start: int, stop: int, dtype: torch.dtype = torch.float64, *, times: float = 1.0
    ) -> torch.Tensor:
        return self._product(*self._absolute_factors(dtype, times), start, stop).to(dtype)

    @cached_property
    def _scaled_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """s * B and A in float64."""
        return self.B.double() * self.scaling, self.A.double()

    def _absolute_factors(
        self, dtype: torch.dtype, times: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """|times * s * B| and |A| in a dtype, or in float64 where they are too large for it."""
        if (dtype, times) not in self._kept:
            B, A = (factor.abs() for factor in self._scaled_factors)
            B *= times
            narrow = B.to(dtype)
            self._kept[dtype, times] = (narrow, A.to(dtype)) if all_finite(narrow) else (B, A)
        return self._kept[dtype, times]

    def _product(self, B: torch.Tensor, A: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows of B @ A, in whatever order of summation."""

        def compute(start: int, stop: int) -> torch.Tensor:
            if self.transposed:
                return (B @ A[:, start:stop]).T.contiguous()
            return B[start:stop] @ A

        return self._cut(compute, start, stop)

    def rounded_factors(self, dtype: torch.dtype) -> LowRank:
        return replace(self, A=self.A.to(dtype).float(), B=self.B.to(dtype).float())

    def _rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.transposed:
            return self.B, self.A[:, start:stop]
        return self.B[start:stop], self.A

    def _turned(self, product: torch.Tensor) -> torch.Tensor:
        return product.T if self.transposed else product

    def _cut(
        self, compute: Callable[[int, int], torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        """Rows of the parameter out of rows of the matrix, which can be longer."""
        if self.stored is None:
            return compute(start, stop)
        shape = row_shape(self.stored)
        size, columns = math.prod(shape), self.matrix[1]
        low = start * size // columns
        high = -(-stop * size // columns)
        flat = compute(low, high).flatten()
        flat = flat[start * size - low * columns : stop * size - low * columns]
        return flat.reshape(stop - start, *shape)


@dataclass(frozen=True)
class Experts(Product):
    """s * B @ A for each matrix of a stack, such as the experts of one layer.

    Attributes:
        parameter: the parameter's name in the base.
        experts: the update of each matrix, with one rank and scaling for all.
    """

    parameter: str
    scaling: float
    experts: tuple[LowRank, ...]
    rounds_delta: bool = True
    kind: str = "LoRA of experts"

    @property
    def rank(self) -> int:
        return self.experts[0].rank

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.experts), *self.experts[0].matrix)

    @cached_property
    def largest_factor(self) -> float:
        return max(expert.largest_factor for expert in self.experts)

    def delta(self, start: int, stop: int, *, prescaled: bool = False) -> torch.Tensor:
        return self._gather(
            lambda expert, start, stop: expert.delta(start, stop, prescaled=prescaled), start, stop
        )

    def exact(self, start: int, stop: int) -> torch.Tensor:
        return self._gather(LowRank.exact, start, stop)

    def magnitude(
        self, start: int, stop: int, dtype: torch.dtype = torch.float64, *, times: float = 1.0
    ) -> torch.Tensor:
        return self._gather(
            lambda expert, start, stop: expert.magnitude(start, stop, dtype, times=times),
            start,
            stop,
        )

    def recipe_key(self, recipe: Recipe, format: Format, stored: torch.dtype) -> tuple[bool, ...]:
        key = super().recipe_key(recipe, format, stored)
        return *key, recipe.in_format and format is not FP32

    def merged(
        self, recipe: Recipe, base: torch.Tensor, start: int, stop: int, format: Format
    ) -> torch.Tensor:
        if not recipe.in_format:
            return super().merged(recipe, base, start, stop, format)
        # PEFT raises the factors of modules to fp32 for their product on a CPU; not these.
        delta = self._gather(
            lambda expert, start, stop: expert.delta_in(format.dtype, start, stop), start, stop
        )
        return merge_rows(recipe, base, delta, format)

    def interval(
        self,
        recipe: Recipe,
        start: int,
        stop: int,
        *,
        base: torch.Tensor,
        format: Format,
        where: torch.Tensor,
        rounded_anywhere: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().interval(
            recipe,
            start,
            stop,
            base=base,
            format=format,
            where=where,
            rounded_anywhere=rounded_anywhere or recipe.in_format,
        )

    def rounded_factors(self, dtype: torch.dtype) -> Experts:
        experts = tuple(expert.rounded_factors(dtype) for expert in self.experts)
        return replace(self, experts=experts)

    def _gather(
        self, compute: Callable[[LowRank, int, int], torch.Tensor], start: int, stop: int
    ) -> torch.Tensor:
        """Rows of the stack, which may begin in one matrix and end in another."""
        rows = self.experts[0].matrix[0]
        pieces = [
            compute(
                self.experts[number],
                max(start - number * rows, 0),
                min(stop - number * rows, rows),
            )
            for number in range(start // rows, -(-stop // rows))
        ]
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def _widened(start: int, stop: int, rows: int, columns: int) -> tuple[int, int]:
    """The rows to compute so that ``start`` to ``stop`` come out as in the whole product."""
    if columns < _FEWEST_COLUMNS:
        return 0, rows
    high = min(rows, max(stop, start + _FEWEST_ROWS))
    return max(0, min(start, high - _FEWEST_ROWS)), high
