"""What stands in for a parameter, or for some of its rows, instead of being added to it.

A whole tensor is what ``modules_to_save`` and trained biases leave in an adapter; rows are its
trainable tokens (PEFT: ``ModulesToSaveWrapper``, ``TrainableTokensLayer``). The merged weight is
the stored one, rounded to the format once; what the base holds there does not enter it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from taskvec.bounds import Family
from taskvec.rounding import Format, Recipe, rounding_error
from taskvec.update import Update

# (start, stop) -> those rows of a tensor in its stored dtype, on the device of the arithmetic.
RowReader = Callable[[int, int], torch.Tensor]


class _Stored(Update):
    """An update whose merged weight is stored, so that every recipe gives the same bits.

    Attributes:
        base: reads rows of W, which delta is relative to.
    """

    base: RowReader

    @abstractmethod
    def _replace(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows of W with the stored values in their place, in the dtype of the rows."""

    def exact(self, start: int, stop: int) -> torch.Tensor:
        base = self.base(start, stop).double()
        return self._replace(base.clone(), start, stop) - base

    def merged(
        self, recipe: Recipe, base: torch.Tensor, start: int, stop: int, format: Format
    ) -> torch.Tensor:
        wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
        return self._replace(wide, start, stop).to(format.dtype)

    def recipe_key(self, recipe: Recipe, format: Format, stored: torch.dtype) -> Hashable:
        return None

    def variations(
        self,
        recipe: Recipe,
        base: torch.Tensor,
        start: int,
        stop: int,
        format: Format,
        exact: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        merged = self.merged(recipe, base, start, stop, format)
        return merged, merged

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
        chosen = self.merged(recipe, base, start, stop, format)[where]
        return chosen, chosen

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
        return torch.zeros_like(base)

    def base_error(
        self, family: Family, base: torch.Tensor, base_format: Format | None, format: Format
    ) -> torch.Tensor | None:
        # No rounding of W in the merge cancels that of the subtraction: what is replaced is not
        # made from W, and of rows that stay, R(W) is within the half ulp that the bound has for M.
        return None if base_format is None else rounding_error(base, base_format)

    def underflow(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Replacement(_Stored):
    """The whole parameter is replaced.

    Attributes:
        parameter: the parameter's name in the base.
        stored: its shape.
        values: reads rows of what replaces it.
        base: reads rows of W.
    """

    parameter: str
    stored: tuple[int, ...]
    values: RowReader
    base: RowReader
    scaling: None = None
    kind: str = "replaced"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored

    def _replace(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return self.values(start, stop).to(rows.dtype)


@dataclass(frozen=True)
class TokenRows(_Stored):
    """Some rows of an embedding are replaced.

    Attributes:
        parameter: the parameter's name in the base.
        stored: its shape (tokens, width).
        tokens: (n,) int64: which rows.
        values: (n, width) fp32: what replaces them.
        base: reads rows of W.
    """

    parameter: str
    stored: tuple[int, ...]
    tokens: torch.Tensor
    values: torch.Tensor
    base: RowReader
    scaling: None = None
    kind: str = "token rows"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored

    def _replace(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        here = (self.tokens >= start) & (self.tokens < stop)
        rows[self.tokens[here] - start] = self.values[here].to(rows.dtype)
        return rows
