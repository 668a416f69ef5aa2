"""What an adapter does to one parameter: the questions that the rest of the project asks of it.

Each kind of adapter is one class in `taskvec.updates`. Notation as in `taskvec.rounding`: W the
base's weight, delta the exact change, M the merged weight in the format p, R rounding to p.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

import torch

from taskvec.bounds import Family
from taskvec.rounding import Format, Recipe, rounding_error


class Update(ABC):
    """What an adapter does to one parameter.

    Rows are counted as `taskvec.tensorfile` counts them, and come in the shape of the base's rows:
    (stop - start, *row_shape).

    Attributes:
        parameter: the parameter's name in the base.
        kind: what is done to it, in a word or two.
        scaling: what a product of factors is multiplied with; None where there is none.
    """

    parameter: str
    kind: str
    scaling: float | None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The parameter's stored shape."""

    @property
    def rank(self) -> int | None:
        """Rank of what is added to a matrix; None where that is not low."""
        return None

    @abstractmethod
    def exact(self, start: int, stop: int) -> torch.Tensor:
        """Rows of delta in float64."""

    def delta(self, start: int, stop: int) -> torch.Tensor:
        """Rows of delta in fp32: PEFT's bits where PEFT computes a delta, else `exact` rounded."""
        return self.exact(start, stop).float()

    @abstractmethod
    def merged(
        self, recipe: Recipe, base: torch.Tensor, start: int, stop: int, format: Format
    ) -> torch.Tensor:
        """Rows of M as a recipe computes them, bit for bit.

        Args:
            base: the same rows of W in their stored dtype.

        Returns:
            rows in the format's dtype.
        """

    @abstractmethod
    def recipe_key(self, recipe: Recipe, format: Format, stored: torch.dtype) -> Hashable:
        """What a recipe really does to this parameter: recipes with equal keys give equal bits."""

    @abstractmethod
    def variations(
        self,
        recipe: Recipe,
        base: torch.Tensor,
        start: int,
        stop: int,
        format: Format,
        exact: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """M by a recipe on another computer, to see how many elements that would change.

        Args:
            base: rows of W as stored.
            exact: the same rows of `exact`.

        Returns:
            rows of M with products summed in float64; and with the delta rounded to the format
            where the recipe does not round it, or not rounded where it does.
        """

    @abstractmethod
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
        """Between which values M must lie if it came about by a recipe, on whatever computer.

        Args:
            base: rows of W as stored.
            where: bool, like the rows: which elements to look at.
            rounded_anywhere: allow that what is added was rounded to the format on its way.

        Returns:
            in the format's dtype, as many elements as ``where`` selects.
        """

    @abstractmethod
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
        """How far what is stored in M, before it is rounded to p, can be from W + delta.

        Args:
            family: which roundings to the format to allow for.
            delta: rows of `exact`.
            base: the same rows of W, not of what was subtracted; float64 or fp32.

        Returns:
            rows in the dtype of ``base``. `base_error` comes on top.
        """

    def base_error(
        self, family: Family, base: torch.Tensor, base_format: Format | None, format: Format
    ) -> torch.Tensor | None:
        """How far W in the merge, and W as it was subtracted, can be apart; None: they are equal.

        Both are W; each may have been rounded, to the same format or not.
        """
        found = None
        if base_format is not None and base_format is not format:
            found = rounding_error(base, base_format)
        if family.round_base:
            rounded = rounding_error(base, format)
            found = rounded if found is None else found.add_(rounded)
        return found

    @abstractmethod
    def underflow(self) -> float:
        """What one element of delta can lose below fp32's smallest normal number."""
