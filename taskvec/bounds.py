"""How far a merged weight can be from W + delta: what floating-point arithmetic allows a merge.

Pure functions of tensors, in the notation of `taskvec.rounding`; LORA_VS_TASK_VECTOR_ANALYSIS.md
has the proof. What is particular to one kind of adapter is in `taskvec.updates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from taskvec.rounding import (
    FP32,
    U32,
    Format,
    Recipe,
    half_ulp,
    is_power_of_two,
    loses,
    merge_rows,
    rounding_error,
)

if TYPE_CHECKING:
    from taskvec.update import Update
    from taskvec.updates.products import Product

# Covers, by halves: the roundings of evaluating a bound (a dozen in fp32, all its terms being
# positive) and of the exact delta (2^-29 of its matmul term); and what underflow can do to a bound
# that is 2^20 times as large.
_EVALUATION_SLACK = 1 + 2.0**-19
_UNDERFLOW_FLOOR = 2.0**20


def gamma(terms: int, unit_roundoff: float = U32) -> float:
    """Higham's gamma_k = k u / (1 - k u): relative error of k chained roundings."""
    return terms * unit_roundoff / (1 - terms * unit_roundoff)


@dataclass(frozen=True)
class Family:
    """The recipes that one bound covers: which roundings to the merged format it allows for.

    Attributes:
        name: as reported.
        round_base: W was rounded in the merge but not when T was formed, or the reverse.
        round_delta: D was rounded before the sum.
        round_factors: so were A and B before the product.
    """

    name: str
    round_base: bool
    round_delta: bool
    round_factors: bool


AS_COMPUTED = Family("sum rounded", False, False, False)


def families(merged: Format, stored: torch.dtype) -> tuple[Family, ...]:
    """The families for a base of dtype ``stored`` merged into a format, the tightest first.

    Each covers the ones before it, because a bound that allows a rounding which did not happen is
    still a bound. What the format can hold is not rounded: a base stored in it, anything in fp32.
    """
    base = loses(stored, merged)
    chain = [AS_COMPUTED]
    if base:
        chain.append(Family("sum and base rounded", True, False, False))
    if merged is not FP32:
        chain.append(Family("sum, base and delta rounded", base, True, False))
        chain.append(Family("sum, base, delta and factors rounded", base, True, True))
    return tuple(chain)


def bound_rows(
    family: Family,
    update: Update,
    start: int,
    stop: int,
    *,
    delta: torch.Tensor,
    merged: torch.Tensor,
    base: torch.Tensor,
    base_format: Format | None,
    format: Format,
    moved: torch.Tensor | None = None,
    recovered: bool = False,
) -> torch.Tensor:
    """What |T - delta| may be, element by element, if M was merged by a recipe of the family.

    |T - delta| <= h_p(M)                          the merged weight is stored in p
                 + u32 |T|                         T = fl32(M - W), of W as it was subtracted
                 + `Update.error`                  what is added is computed in fp32
                 + `Update.base_error`             W was rounded in the merge or for T, not in both

    h is the half ulp and the fp32 rounding that may come before it. All of it times 1 + 2^-19 for
    evaluating it, and no less than 2^20 `Update.underflow`. LORA_VS_TASK_VECTOR_ANALYSIS.md has the
    proof.

    Args:
        delta: rows of the update in float64.
        merged, base: rows of M and of W as it is stored, both float64 or both fp32, which is also
            what the bound is computed in.
        base_format: what W was rounded to before it was subtracted; None: as stored.
        moved: |T| in their dtype, where it is at hand: it bounds the rounding of T as |M - W| does,
            by which it is replaced otherwise.
        recovered: M is not known but by its difference from W; then |T| counts eight times, which
            is more than the half ulp of M can be off by.

    Returns:
        rows in their dtype, positive.
    """
    bound = rounding_error(merged, format)
    if moved is None:
        moved = (merged - (base if base_format is None else base_format.round(base))).abs_()
    bound.add_(moved, alpha=8 * U32 if recovered else U32)
    bound += update.error(family, start, stop, delta=delta, base=base, format=format)
    of_base = update.base_error(family, base, base_format, format)
    if of_base is not None:
        bound += of_base
    # Adding what underflow can do would put subnormal numbers, which are slow, into every element.
    floor = min(update.underflow() * _UNDERFLOW_FLOOR, FP32.largest)
    return bound.mul_(_EVALUATION_SLACK).clamp_min_(floor)


def product_error(
    family: Family,
    update: Product,
    start: int,
    stop: int,
    *,
    delta: torch.Tensor,
    format: Format,
    dtype: torch.dtype,
) -> torch.Tensor:
    """How far what is added for s * B @ A can be from it, by a recipe of the family.

    g |s| (|B| @ |A|)               D is computed in fp32 (`delta_error`)
    + h_p(D)                        the delta was rounded first
    + |s (R(B) @ R(A) - B @ A)|     the factors were rounded first; then g is relative to R(B), R(A)
    + |s| h_p(D / s)                so was B @ A, before s, as a GPU does

    Args:
        delta: rows of s * B @ A, float64.

    Returns:
        rows in ``dtype``.
    """
    used = update.rounded_factors(format.dtype) if family.round_factors else update
    found = delta_error(used, start, stop, dtype)
    if family.round_factors:
        found += (used.exact(start, stop) - delta).abs_().to(dtype)
    # What is rounded to fp32 anyway needs no term; PEFT may round a delta in every family.
    if family.round_delta or (update.rounds_delta and format is not FP32):
        size = found + delta.abs().to(dtype)
        if family.round_factors and update.scaling:
            product = _rounding_before_scaling(size, update.scaling, format)
            found += product
            size += product
        found += rounding_error(size, format)
    return found


def delta_error(
    update: Product, start: int, stop: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """How far D, computed in fp32 in any order of summation, can be from s * B @ A.

    gamma_k |s| (|B| @ |A|), k = r + 1, or r + 2 where s is not an fp32 number (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.5). `underflow_of_products` comes on top.

    Returns:
        rows (stop - start, columns) in ``dtype``, fp32 or float64.
    """
    relative = gamma(update.rank + (1 if _is_fp32(update.scaling) else 2))
    relative *= 1 + 2 * relative  # |B| @ |A| may itself be computed in fp32
    return update.magnitude(start, stop, dtype, times=relative)


def underflow_of_products(update: Product) -> float:
    """What all the products of one element of D can lose below fp32's smallest normal number."""
    largest = max(1.0, abs(update.scaling), update.largest_factor)
    return (update.rank + 3) * 2.0**-149 * largest


def merged_interval(
    recipe: Recipe,
    update: Product,
    start: int,
    stop: int,
    *,
    base: torch.Tensor,
    format: Format,
    where: torch.Tensor,
    rounded_anywhere: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Between which values M must lie if it came about by a recipe, on whatever computer.

    Rounding is monotone, so the ends of what D may be give the ends of what M may be: by
    `delta_error`, and in a narrow format with the sum rounded to fp32 first or not.

    Args:
        base: rows of W as stored.
        where: bool, (stop - start, columns): which elements to look at.
        rounded_anywhere: allow that D was rounded to the format wherever it can be: its factors,
            also folded with s, B @ A, and D.

    Returns:
        in the format's dtype, as many elements as ``where`` selects.
    """
    if recipe.round_factors:
        update = update.rounded_factors(format.dtype)
    narrow = format is not FP32
    base, center = base[where], update.exact(start, stop)[where]
    reach = delta_error(update, start, stop)[where] + underflow_of_products(update)
    if narrow and rounded_anywhere:
        rounded = update.rounded_factors(format.dtype)
        reach += update.magnitude(start, stop)[where] * (4 * format.unit_roundoff)
        reach += (rounded.exact(start, stop)[where] - center).abs_()
        size = center.abs() + reach
        if update.scaling:
            size += _rounding_before_scaling(size, update.scaling, format)
        reach = size - center.abs() + half_ulp(size, format)
    ends = [(center - reach).float(), (center + reach).float()]
    if narrow and recipe.round_delta and not rounded_anywhere:
        ends = [format.round(end) for end in ends]
    if narrow:
        sum_error = ((base.double().abs() + center.abs()) * (2 * U32)).float()
        ends = [ends[0] - sum_error, ends[1] + sum_error]
    low, high = (merge_rows(recipe, base, end, format) for end in ends)
    return low, high


def _rounding_before_scaling(size: torch.Tensor, scaling: float, format: Format) -> torch.Tensor:
    """What rounding D / s can do to a D of up to ``size``; nothing where that rounds D itself.

    A power of two commutes with rounding, but for numbers that are subnormal before or after it.
    """
    scale = abs(scaling)
    product = rounding_error(size / scale, format).mul_(scale)
    if is_power_of_two(scaling):
        product.masked_fill_(product == rounding_error(size, format), 0.0)
    return product


@cache
def _is_fp32(value: float) -> bool:
    return float(torch.tensor(value, dtype=torch.float32)) == value
