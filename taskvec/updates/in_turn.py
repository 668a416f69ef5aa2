"""Several updates of one parameter, merged one after the other."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from taskvec.bounds import Family
from taskvec.rounding import FP32, Format, Recipe, rounding_error
from taskvec.update import Update


@dataclass(frozen=True)
class InTurn(Update):
    """Each update is merged into the result of the one before.

    A recipe that rounds the base to the format rounds every result to it, as PEFT does; the others
    keep the sums in fp32 and round the last.

    Attributes:
        parameter: the parameter's name in the base.
        parts: in the order of merging; what comes after the first only adds to it.
    """

    parameter: str
    parts: tuple[Update, ...]
    scaling: None = None
    kind: str = "several"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def rank(self) -> int | None:
        """The sum of the ranks: what the rank of all of it cannot exceed."""
        ranks = [part.rank for part in self.parts]
        return None if None in ranks else sum(rank for rank in ranks if rank is not None)

    def exact(self, start: int, stop: int) -> torch.Tensor:
        total = self.parts[0].exact(start, stop)
        for part in self.parts[1:]:
            total = total + part.exact(start, stop)
        return total

    def merged(
        self, recipe: Recipe, base: torch.Tensor, start: int, stop: int, format: Format
    ) -> torch.Tensor:
        between = _between(recipe, format)
        for part in self.parts[:-1]:
            base = part.merged(recipe, base, start, stop, between)
        return self.parts[-1].merged(recipe, base, start, stop, format)

    def recipe_key(self, recipe: Recipe, format: Format, stored: torch.dtype) -> Hashable:
        keys = tuple(part.recipe_key(recipe, format, stored) for part in self.parts)
        return keys, _between(recipe, format)

    def variations(
        self,
        recipe: Recipe,
        base: torch.Tensor,
        start: int,
        stop: int,
        format: Format,
        exact: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        in_order = in_format = base
        for number, part in enumerate(self.parts, 1):
            last = number == len(self.parts)
            to = format if last else _between(recipe, format)
            delta = part.exact(start, stop)
            in_order = part.variations(recipe, in_order, start, stop, to, delta)[0]
            in_format = part.variations(recipe, in_format, start, stop, to, delta)[1]
        return in_order, in_format

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
        """As far as any order and any rounding of the deltas can take it."""
        wide, delta = base.double(), self.exact(start, stop)
        narrow = format is not FP32
        family = Family("", recipe.round_base, narrow, narrow and recipe.round_factors)
        reach = self.error(family, start, stop, delta=delta, base=wide, format=format)
        of_base = self.base_error(family, wide, None, format)
        reach = reach if of_base is None else reach + of_base
        center = (wide + delta)[where]
        reach = reach[where] + center.abs() * 2.0**-22 + self.underflow()
        return (
            (center - reach).float().to(format.dtype),
            (center + reach).float().to(format.dtype),
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
        """The errors add up; every result but the last is rounded to the format once more."""
        found = torch.zeros_like(base)
        value = base.double()
        for number, part in enumerate(self.parts, 1):
            exact = part.exact(start, stop)
            found += part.error(family, start, stop, delta=exact, base=base, format=format)
            value = value + exact
            if number < len(self.parts):
                size = value.abs().to(base.dtype) + found
                if family.round_base:
                    size += rounding_error(base, format)
                found += rounding_error(size, format)
        return found

    def base_error(
        self, family: Family, base: torch.Tensor, base_format: Format | None, format: Format
    ) -> torch.Tensor | None:
        return self.parts[0].base_error(family, base, base_format, format)

    def underflow(self) -> float:
        return sum(part.underflow() for part in self.parts)


def _between(recipe: Recipe, format: Format) -> Format:
    """What every result but the last is rounded to."""
    return format if recipe.round_base else FP32
