"""Floating-point formats, rounding to them, and the recipes by which a merge can be computed.

Pure functions of tensors. The notation is that of LORA_VS_TASK_VECTOR_ANALYSIS.md: W the base's
weight, D the delta as computed in fp32, M the merged weight as stored in the format p, R rounding
to p (nearest, ties to even), T = fl32(M - W) the task vector and delta the exact change, of LoRA
s * B @ A. How far apart these can be is in `taskvec.bounds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from taskvec.updates.products import Product

U32 = 2.0**-24


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


def dtype_name(dtype: torch.dtype) -> str:
    """A float dtype as reports name it: fp32, fp16, bf16, fp64, or as PyTorch does."""
    names = {format.dtype: format.name for format in FORMATS.values()} | {torch.float64: "fp64"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


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


def loses(stored: torch.dtype, format: Format) -> bool:
    """Whether rounding numbers of a dtype to a format can change them."""
    return torch.promote_types(stored, format.dtype) != format.dtype


def is_power_of_two(value: float) -> bool:
    return abs(math.frexp(value)[0]) == 0.5


def rounding_error(values: torch.Tensor, format: Format) -> torch.Tensor:
    """What rounding to a format can do, with an fp32 rounding before it where that is wider.

    The fp32 rounding is within u32 (|v| + h), and |v| < 2^(bits + 1) h, where h is the half ulp.
    """
    half = half_ulp(values, format)
    return half if format is FP32 else half.mul_(1 + U32 * (2.0 ** (format.bits + 1) + 1))
