"""Formats and recipes against bit patterns, numpy, and PEFT itself."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from taskvec.rounding import (
    BF16,
    FORMATS,
    FP16,
    FP32,
    ONCE,
    PEFT,
    RECIPES,
    half_ulp,
    is_power_of_two,
    merge_rows,
    recipe_delta,
    subtract_rows,
)
from taskvec.updates.products import LowRank
from tests.certified import RECIPE, update_of


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite positive numbers of a 16-bit format and zero, in order, as float64."""
    infinity = int(torch.tensor(math.inf, dtype=dtype).view(torch.int16))
    return torch.arange(infinity, dtype=torch.int16).view(dtype).double()


# --- formats ----------------------------------------------------------------------------------


def test_formats_are_those_of_numpy_and_ieee() -> None:
    for format, numpy_type in ((FP32, np.float32), (FP16, np.float16)):
        info = np.finfo(numpy_type)
        assert format.bits == info.nmant + 1
        assert format.largest == float(info.max)
        assert format.unit_roundoff == float(info.eps) / 2
        assert format.smallest_half_ulp == float(info.smallest_subnormal) / 2
    numbers = every_number(torch.bfloat16)
    assert (BF16.bits, BF16.unit_roundoff) == (8, 2.0**-8)
    assert BF16.largest == float(numbers[-1])
    assert BF16.smallest_half_ulp == float(numbers[1]) / 2
    assert float(torch.tensor(1 + 2.0**-7).bfloat16()) == 1 + 2.0**-7  # 8 bits hold it,
    assert float(torch.tensor(1 + 2.0**-8).bfloat16()) == 1.0  # but not this


@pytest.mark.parametrize("format", [FP16, BF16], ids=lambda format: format.name)
def test_half_ulp_is_half_the_gap_to_the_next_number(format) -> None:
    """For every number of a 16-bit format: the next bit pattern says where the next number is."""
    numbers = every_number(format.dtype)
    beyond = 2.0 ** (math.floor(math.log2(format.largest)) + 1)
    following = torch.cat([numbers[1:], torch.tensor([beyond], dtype=torch.float64)])
    expected = (following - numbers) / 2
    for sign in (1, -1):
        assert torch.equal(half_ulp(sign * numbers, format), expected)
        assert torch.equal(half_ulp(sign * numbers.float(), format), expected.float())


def test_half_ulp_of_fp32_is_half_of_numpys_spacing() -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F800000, 20_000, dtype=np.int32)
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    numbers = np.concatenate([bits.view(np.float32), powers, [np.float32(0)]])
    numbers = numbers[np.isfinite(np.nextafter(numbers, np.float32(np.inf)))]
    expected = np.spacing(numbers).astype(np.float64) / 2
    assert np.array_equal(half_ulp(torch.tensor(numbers).double(), FP32).numpy(), expected)
    in_fp32 = half_ulp(torch.tensor(numbers), FP32).double().numpy()
    assert np.array_equal(in_fp32, np.maximum(expected, 2.0**-149))


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_no_rounding_errs_by_more_than_half_an_ulp_and_ties_err_by_that(format) -> None:
    generator = torch.Generator().manual_seed(0)
    largest_exponent = math.floor(math.log2(format.largest)) - 1
    exponent = torch.randint(-160, largest_exponent, (50_000,), generator=generator)
    values = torch.randn(50_000, generator=generator, dtype=torch.float64) * 2.0**exponent
    if format is not FP32:
        values = values.float().double()  # what is rounded to 16 bits was fp32 before
    rounded = values.to(format.dtype).double()
    error = (rounded - values).abs()
    for at in (rounded, values):  # before or after the rounding, the half ulp is a bound
        assert bool((error <= half_ulp(at, format)).all())
    normal = rounded[rounded.abs() > 2.0**-100 if format is not FP16 else rounded.abs() > 2.0**-13]
    tie = normal + torch.sign(normal) * half_ulp(normal, format)
    error = (tie.to(format.dtype).double() - tie).abs()
    assert torch.equal(error, half_ulp(normal, format))


def test_rounding_is_to_nearest_even() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, generator=generator) * 2.0 ** torch.randint(
        -30, 15, (20_000,), generator=generator
    )
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25, 65519.0, 65520.0])
    values = torch.cat([values, ties, -ties])
    with np.errstate(over="ignore"):
        assert np.array_equal(FP16.round(values).numpy(), values.numpy().astype(np.float16))
    bits = values.numpy().view(np.uint32).astype(np.uint64)  # bf16 is the upper half of fp32
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    assert np.array_equal(BF16.round(values).numpy(), upper.astype(np.uint32).view(np.float32))


def test_power_of_two() -> None:
    assert all(is_power_of_two(sign * 2.0**k) for k in (-30, -1, 0, 1, 5) for sign in (1, -1))
    assert not any(is_power_of_two(value) for value in (0.0, 3.0, 0.3, 1.5, 16 / math.sqrt(8)))


# --- merges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", RECIPE)
def test_merge_rows_is_numpys_arithmetic(name: str, stored: torch.dtype) -> None:
    """Into fp16 and fp32, step by step in numpy's own types; the product comes from torch."""
    recipe, update = RECIPE[name], update_of(40, 30, 8, 0.3)
    base = (torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) * 0.02).to(stored)
    for format, narrow in ((FP16, np.float16), (FP32, np.float32)):
        A, B = update.A.numpy(), update.B.numpy()
        if recipe.round_factors:
            A, B = (factor.astype(narrow).astype(np.float32) for factor in (A, B))
        s = np.float32(update.scaling)
        if recipe.prescaled:
            D = (torch.from_numpy(B * s) @ torch.from_numpy(A)).numpy()
        else:
            D = (torch.from_numpy(B) @ torch.from_numpy(A)).numpy() * s
        W = base.numpy().astype(np.float32)
        if recipe.round_base:
            W = W.astype(narrow).astype(np.float32)
        if recipe.round_delta:
            D = D.astype(narrow).astype(np.float32)
        expected = (W + D).astype(narrow)
        delta = recipe_delta(recipe, update, 0, 40, format)
        merged = merge_rows(recipe, base, delta, format)
        assert merged.dtype == format.dtype
        assert np.array_equal(merged.numpy(), expected)
        T = subtract_rows(merged, base)
        assert T.dtype == torch.float32
        assert np.array_equal(
            T.numpy(), expected.astype(np.float32) - base.numpy().astype(np.float32)
        )


def test_a_float64_base_is_added_and_subtracted_in_float64() -> None:
    base = torch.tensor([[1 + 2.0**-30, 1 / 3]], dtype=torch.float64)
    delta = torch.tensor([[2.0**-25, 1e-9]])
    merged = merge_rows(ONCE, base, delta, FP32)
    assert merged.tolist() == (base + delta.double()).float().tolist()
    assert subtract_rows(merged, base).tolist() == (merged.double() - base).float().tolist()
    assert merge_rows(PEFT, base, delta, FP32).tolist() == (base.float() + delta).tolist()


class Layers(torch.nn.Module):
    """A linear layer and GPT-2's kind of it, which stores its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(48, 40, bias=False)
        self.conv = Conv1D(56, 24)


@pytest.fixture(scope="module")
def peft_case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layers, dict[str, Path]]:
    """The layers, and a saved fp32 adapter for each of them (rsLoRA: s is no power of two)."""
    torch.manual_seed(0)
    layers, adapters = Layers(), {}
    for target in ("linear", "conv"):
        config = LoraConfig(
            r=5,
            lora_alpha=12,
            use_rslora=True,
            target_modules=[target],
            fan_in_fan_out=target == "conv",
        )
        model = get_peft_model(copy.deepcopy(layers), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        adapters[target] = tmp_path_factory.mktemp(target)
        model.save_pretrained(adapters[target])
    return layers, adapters


def peft_weights(
    case: tuple[Layers, dict[str, Path]], target: str, dtype: torch.dtype, safe: bool, **options
) -> tuple[LowRank, torch.Tensor, torch.Tensor]:
    """The update in fp32, the base's weight in fp32, and what PEFT merges the two to."""
    layers, adapters = case
    reference = PeftModel.from_pretrained(copy.deepcopy(layers), adapters[target])
    module = next(m for m in reference.modules() if isinstance(m, LoraLayer))
    A, B = (side["default"].weight.detach() for side in (module.lora_A, module.lora_B))
    update = LowRank(target, A, B, module.scaling["default"], target == "conv")
    model = PeftModel.from_pretrained(copy.deepcopy(layers).to(dtype), adapters[target], **options)
    merged = model.merge_and_unload(safe_merge=safe)
    return update, getattr(layers, target).weight.detach(), getattr(merged, target).weight.detach()


PEFT_WAYS: dict[str, list[dict[str, Any]]] = {
    "peft": [{}],
    "peft-safe": [{"safe": True}],
    "peft-lowcpu": [{"low_cpu_mem_usage": True}],
    "peft-half": [
        {"autocast_adapter_dtype": False},
        {"autocast_adapter_dtype": False, "safe": True},
        {"low_cpu_mem_usage": True, "safe": True},
    ],
}


@pytest.mark.parametrize("target", ["linear", "conv"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
@pytest.mark.parametrize("name", PEFT_WAYS)
def test_recipes_are_the_bits_of_peft(peft_case, target: str, format, name: str) -> None:
    for options in copy.deepcopy(PEFT_WAYS[name]):
        safe = options.pop("safe", False)
        update, base, merged = peft_weights(peft_case, target, format.dtype, safe, **options)
        rows = update.shape[0]

        predicted = {
            recipe.name: merge_rows(
                recipe, base, recipe_delta(recipe, update, 0, rows, format), format
            )
            for recipe in RECIPES
        }
        assert torch.equal(predicted.pop(name), merged), options
        if format is not FP32:  # and of no other recipe
            assert not any(torch.equal(other, merged) for other in predicted.values()), options


# --- the same bits, block by block ------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_rows_have_the_bits_of_the_whole_product(threads: int, transposed: bool) -> None:
    """Also of a single row, which the BLAS would compute on another path than the whole."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for (out, into), rank in itertools.product(
            [(3072, 256), (256, 3072), (33, 65), (50, 2)], [1, 2, 8, 17, 64]
        ):
            generator = torch.Generator().manual_seed(rank)
            A = torch.randn(rank, into, generator=generator)
            B = torch.randn(out, rank, generator=generator)
            update = LowRank("weight", A, B, 1.37, transposed)
            rows = update.shape[0]
            whole = (B @ A).T * 1.37 if transposed else B @ A * 1.37
            for size, place in itertools.product((1, 2, 3, 4, 16, 42), (0, 0.37, 1)):
                start = int(place * max(0, rows - size))
                stop = min(rows, start + size)
                assert torch.equal(update.delta(start, stop), whole[start:stop])
    finally:
        torch.set_num_threads(before)
