"""Floating-point formats, the recipes by which a merge can have been computed, and error bounds.

Pure functions of tensors. The notation is that of LORA_VS_TASK_VECTOR_ANALYSIS.md: W the base's
weight, D the delta as computed in fp32, M the merged weight as stored in the format p, R rounding
to p (nearest, ties to even), T = fl32(M - W) the task vector and delta the exact change, of LoRA
s * B @ A. What is particular to one kind of adapter is in `taskvec.updates`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from taskvec.update import Update
    from taskvec.updates.products import Product

U32 = 2.0**-24
# Covers, by halves: the roundings of evaluating a bound (a dozen in fp32, all its terms being
# positive) and of the exact delta (2^-29 of its matmul term); and what underflow can do to a bound
# that is 2^20 times as large.
_EVALUATION_SLACK = 1 + 2.0**-19
_UNDERFLOW_FLOOR = 2.0**20


@dataclass(frozen=True)
class Format:
    """A storage format.

    Attributes:
        name: as ``--precision`` spells it.
        dtype: its torch dtype.
        bits: significand bits, the implicit one included; the unit roundoff is 2^-bits.
        smallest_half_ulp: half the spacing of its subnormal numbers.
        largest: its largest finite value.
    """

    name: str
    dtype: torch.dtype
    bits: int
    smallest_half_ulp: float
    largest: float

    @property
    def unit_roundoff(self) -> float:
        return 2.0**-self.bits

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Values rounded to this format and back to fp32 (or kept in float64 if they are)."""
        return values.to(self.dtype).to(torch.promote_types(values.dtype, torch.float32))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name: a format is compared by identity, also after it has travelled."""
        return _format_of_name, (self.name,)


FP32 = Format("fp32", torch.float32, 24, 2.0**-150, torch.finfo(torch.float32).max)
FP16 = Format("fp16", torch.float16, 11, 2.0**-25, 65504.0)
BF16 = Format("bf16", torch.bfloat16, 8, 2.0**-134, torch.finfo(torch.bfloat16).max)
FORMATS = {format.name: format for format in (FP32, FP16, BF16)}
NARROW_FORMATS = (FP16, BF16)


def _format_of_name(name: str) -> Format:
    return FORMATS[name]


@dataclass(frozen=True)
class Recipe:
    """One way in which R(W + delta) comes to be computed.

    Attributes:
        name: as reported.
        round_base: W is rounded to p before the sum (the base was loaded in p).
        round_factors: A and B are rounded to p before the product.
        round_delta: D is rounded to p before the sum.
        prescaled: s is folded into B before the product.
        maker: software that works this way.
    """

    name: str
    round_base: bool
    round_factors: bool
    round_delta: bool
    prescaled: bool
    maker: str

    @property
    def in_format(self) -> bool:
        """Everything is in the format, as in PEFT without autocast; some products too."""
        return self.round_base and self.round_factors and self.round_delta


ONCE = Recipe("once", False, False, False, False, "merge_lora.py --rounding once, axolotl")
PEFT = Recipe("peft", True, False, False, False, "PEFT merge_and_unload()")
RECIPES = (
    ONCE,
    PEFT,
    Recipe("peft-safe", True, False, True, False, "PEFT merge_and_unload(safe_merge=True)"),
    Recipe("peft-lowcpu", True, True, False, False, "PEFT from_pretrained(low_cpu_mem_usage=True)"),
    Recipe("peft-half", True, True, True, False, "PEFT with autocast_adapter_dtype=False"),
    Recipe("prescaled", False, False, False, True, "scaling folded into B, as tinker-cookbook"),
)
ROUNDINGS = {recipe.name: recipe for recipe in (ONCE, PEFT)}


def recipe_delta(
    recipe: Recipe, update: Product, start: int, stop: int, format: Format
) -> torch.Tensor:
    """The rows of D that a recipe adds: (stop - start, columns) fp32."""
    if recipe.round_factors:
        update = update.rounded_factors(format.dtype)
    delta = update.delta(start, stop, prescaled=recipe.prescaled)
    return format.round(delta) if recipe.round_delta else delta


def merge_rows(
    recipe: Recipe, base: torch.Tensor, delta: torch.Tensor, format: Format
) -> torch.Tensor:
    """R(W + D) by a recipe: the sum in fp32 (float64 for a float64 base), rounded once.

    Args:
        base: rows of W in their stored dtype.
        delta: the same rows of `recipe_delta`, fp32.

    Returns:
        the rows of M in the format's dtype.
    """
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    if recipe.round_base:
        wide = format.round(wide)
    return (wide + delta).to(format.dtype)


def subtract_rows(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """T = fl32(M - W): rows of two weights in any float dtype to fp32."""
    wide = torch.promote_types(torch.promote_types(merged.dtype, base.dtype), torch.float32)
    return (merged.to(wide) - base.to(wide)).float()


def round_once(values: torch.Tensor, format: Format) -> torch.Tensor:
    """Float64 values to a format's dtype with a single rounding, to nearest, ties to even.

    PyTorch goes from float64 to a narrow format by way of fp32, which rounds twice. That goes wrong
    only where the fp32 number lies halfway between two of the format; there fp32 is reached by
    rounding to odd, after which the second rounding is the only one that counts (Boldo and
    Melquiond, Emulation of FMA and correctly rounded sums, IEEE TC 57 (2008)).
    """
    nearest = values.float()
    if format is FP32:
        return nearest
    halfway = (nearest.view(torch.int32) & ((1 << (FP32.bits - format.bits - 1)) - 1)) == 0
    nearest[halfway] = _rounded_to_odd(values[halfway])
    return nearest.to(format.dtype)


def _rounded_to_odd(values: torch.Tensor) -> torch.Tensor:
    """Float64 to fp32: what is no fp32 number goes to the neighbour whose last bit is set."""
    nearest = values.float()
    bits = nearest.view(torch.int32)
    truncated = bits - (nearest.double().abs() > values.abs()).int()
    inexact = (nearest.double() != values) & torch.isfinite(values)
    return torch.where(inexact, truncated | 1, bits).view(torch.float32)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite: by one sum, which any of them would have spoilt."""
    total = float(values.sum(dtype=torch.float32))  # in float64 it takes twenty times as long
    return math.isfinite(total) or bool(torch.isfinite(values).all())


def half_ulp(values: torch.Tensor, format: Format) -> torch.Tensor:
    """Half the spacing of a format's numbers at each value: no rounding to it errs by more.

    Args:
        values: float64 or fp32, of any sign: what is rounded, or what it was rounded to.

    Returns:
        the same dtype and shape: 2^(e - bits) for |value| in [2^e, 2^(e+1)). In fp32, which has
        nothing smaller to say it with, at least 2^-149.
    """
    wide = values.dtype == torch.float64
    integer, exponent = (torch.int64, 0x7FF0000000000000) if wide else (torch.int32, 0x7F800000)
    power = (values.view(integer) & exponent).view(values.dtype)
    smallest = format.smallest_half_ulp if wide else max(format.smallest_half_ulp, 2.0**-149)
    return power.mul_(format.unit_roundoff).clamp_min_(smallest)


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


def loses(stored: torch.dtype, format: Format) -> bool:
    """Whether rounding numbers of a dtype to a format can change them."""
    return torch.promote_types(stored, format.dtype) != format.dtype


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
                 + u32 |T|                         T = fl32(M - W)
                 + `Update.error`                  what is added is computed in fp32
                 + `Update.base_error`             W was rounded in the merge or for T, not in both

    h is the half ulp and the fp32 rounding that may come before it. All of it times 1 + 2^-19 for
    evaluating it, and no less than 2^20 `Update.underflow`. LORA_VS_TASK_VECTOR_ANALYSIS.md has the
    proof.

    Args:
        delta: rows of the update in float64.
        merged, base: rows of M and of what was subtracted from it, both float64 or both fp32,
            which is also what the bound is computed in.
        base_format: what that base was rounded to before; None: as stored.
        moved: |T| in their dtype, where it is at hand: it bounds the rounding of T as |M - W| does,
            by which it is replaced otherwise.
        recovered: M is not known but by its difference from W; then |T| counts eight times, which
            is more than the half ulp of M can be off by.

    Returns:
        rows in their dtype, positive.
    """
    bound = rounding_error(merged, format)
    moved = (merged - base).abs_() if moved is None else moved
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


def is_power_of_two(value: float) -> bool:
    return abs(math.frexp(value)[0]) == 0.5


def rounding_error(values: torch.Tensor, format: Format) -> torch.Tensor:
    """What rounding to a format can do, with an fp32 rounding before it where that is wider.

    The fp32 rounding is within u32 (|v| + h), and |v| < 2^(bits + 1) h, where h is the half ulp.
    """
    half = half_ulp(values, format)
    return half if format is FP32 else half.mul_(1 + U32 * (2.0 ** (format.bits + 1) + 1))


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
