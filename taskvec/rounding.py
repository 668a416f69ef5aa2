"""Floating-point formats, the recipes by which a merge can have been computed, and error bounds.

Pure functions of tensors. The notation is that of LORA_VS_TASK_VECTOR_ANALYSIS.md: W the base's
weight, D the delta as computed in fp32, M the merged weight as stored in the format p, R rounding
to p (nearest, ties to even), T = fl32(M - W) the task vector and delta the exact s * B @ A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from taskvec.adapter import Update

U32 = 2.0**-24
# Covers the float64 roundings of evaluating a bound, and those of the exact delta (2^-29 of the
# matmul term), with room to spare.
_EVALUATION_SLACK = 1 + 2.0**-20


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


FP32 = Format("fp32", torch.float32, 24, 2.0**-150, torch.finfo(torch.float32).max)
FP16 = Format("fp16", torch.float16, 11, 2.0**-25, 65504.0)
BF16 = Format("bf16", torch.bfloat16, 8, 2.0**-134, torch.finfo(torch.bfloat16).max)
FORMATS = {format.name: format for format in (FP32, FP16, BF16)}
NARROW_FORMATS = (FP16, BF16)


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
    recipe: Recipe, update: Update, start: int, stop: int, format: Format
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


def half_ulp(values: torch.Tensor, format: Format) -> torch.Tensor:
    """Half the spacing of a format's numbers at each value: no rounding to it errs by more.

    Args:
        values: float64, of any sign; the value that the rounding resulted in.

    Returns:
        float64 of the same shape, 2^(e - bits) for |value| in [2^e, 2^(e+1)).
    """
    exponent = values.view(torch.int64) & 0x7FF0000000000000
    return (exponent.view(torch.float64) * format.unit_roundoff).clamp_min(format.smallest_half_ulp)


def gamma(terms: int, unit_roundoff: float = U32) -> float:
    """Higham's gamma_k = k u / (1 - k u): relative error of k chained roundings."""
    return terms * unit_roundoff / (1 - terms * unit_roundoff)


@dataclass(frozen=True)
class Family:
    """The recipes that one bound covers, from the tightest bound to the loosest.

    A bound that allows a rounding which did not happen is still a bound, so each family covers the
    ones before it.
    """

    name: str
    round_base: bool
    round_delta: bool
    round_factors: bool


FAMILIES = (
    Family("one rounding", False, False, False),
    Family("base rounded first", True, False, False),
    Family("base and delta rounded first", True, True, False),
    Family("base, delta and factors rounded first", True, True, True),
)


def families(merged: Format, stored: torch.dtype) -> tuple[Family, ...]:
    """The families that differ for a base of dtype ``stored`` merged into a format.

    In fp32 nothing is rounded first. A base that is stored in the merged format has no rounding of
    its own.
    """
    if merged is FP32:
        return FAMILIES[:1]
    if stored == merged.dtype:
        return (FAMILIES[0], *FAMILIES[2:])
    return FAMILIES


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
) -> torch.Tensor:
    """What |T - delta| may be, element by element, if M was merged by a recipe of the family.

    |T - delta| <= half_ulp_p(M)                      the merged weight is stored in p
                 + u32 (|M| + half_ulp_p(M))          the sum was taken in fp32 (p not fp32)
                 + u32 |T|                            the task vector is stored in fp32
                 + gamma_k |s| (|B| @ |A|)            B @ A and its scaling in fp32, k = r + 1, or
                                                      r + 2 where s is not an fp32 number
                 + (r + 1) 2^-150 max(1, |s|)         products that underflow
                 + half_ulp(W)                        W was rounded, in the merge or the subtraction
                 + |s| (|R(B)| @ |R(A)| - |B| @ |A|)  the factors were rounded first
                 + half_ulp_p(D)                      the delta was rounded first

    Args:
        delta, merged, base: rows of s * B @ A, of M and of the base that was subtracted, float64.
        base_format: what that base was rounded to before; None: as stored.

    Returns:
        (stop - start, columns) float64, positive.
    """
    magnitude = update.magnitude(start, stop)
    stored = half_ulp(merged, format)
    bound = stored.clone()
    if format is not FP32:
        bound += (merged.abs() + stored) * U32
    bound += (merged - base).abs_() * U32
    matmul = gamma(update.rank + (1 if _is_fp32(update.scaling) else 2))
    computed = magnitude * matmul
    if family.round_factors:
        computed += _factor_rounding(update, magnitude, start, stop, format) * (1 + matmul)
    computed += (update.rank + 1) * 2.0**-150 * max(1.0, abs(update.scaling))
    bound += computed
    merged_base_format = format if family.round_base else None
    if merged_base_format is not base_format:
        for rounded_to in filter(None, (merged_base_format, base_format)):
            bound += half_ulp(base, rounded_to)
    if family.round_delta:
        bound += half_ulp((delta.abs() + computed) * (1 + format.unit_roundoff), format)
    return bound.mul_(_EVALUATION_SLACK)


def _factor_rounding(
    update: Update, magnitude: torch.Tensor, start: int, stop: int, format: Format
) -> torch.Tensor:
    """|s| times how far |R(B)| |R(A)| can be from |B| |A|: a unit roundoff or underflow each."""
    unit, tiny = format.unit_roundoff, format.smallest_half_ulp
    relative = magnitude * (2 * unit + unit**2)
    underflow = update.magnitude_sums(start, stop) * (tiny * (1 + unit))
    return relative + underflow + update.rank * abs(update.scaling) * tiny**2


def _is_fp32(value: float) -> bool:
    return float(torch.tensor(value, dtype=torch.float32)) == value
