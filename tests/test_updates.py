"""The bound of every kind of update: no violation by any recipe, in any order of summation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from taskvec.bounds import bound_rows, families
from taskvec.certificate import Block, ParameterCertificate
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.rounding import BF16, FORMATS, FP16, FP32, RECIPES, Format, subtract_rows
from taskvec.update import Update
from taskvec.updates.dora import Dora
from taskvec.updates.in_turn import InTurn
from taskvec.updates.products import Experts, LowRank
from taskvec.updates.replaced import Replacement, RowReader, TokenRows

STORED = (torch.float32, torch.float16, torch.bfloat16)


def reader(tensor: torch.Tensor) -> RowReader:
    return lambda start, stop: tensor[start:stop]


def low_rank(
    pick: random.Random, rows: int, columns: int, *, size: float, transposed: bool = False
) -> LowRank:
    rank = pick.choice([1, 2, 5, 16])
    out, into = (columns, rows) if transposed else (rows, columns)
    A, B = torch.randn(rank, into), torch.randn(out, rank) * size
    return LowRank("w", A, B, pick.choice([2.0, 1 / 3, 0.7, -1.5]), transposed)


def dora(pick: random.Random, base: torch.Tensor, size: float) -> Dora:
    transposed = pick.random() < 0.4
    direction = low_rank(pick, *base.shape, size=size, transposed=transposed)
    total = base.double() + direction.exact(0, base.shape[0])
    m = torch.linalg.norm(total, dim=0 if transposed else 1) * (1 + 0.1 * torch.randn(1))
    return Dora("w", direction, m.float(), reader(base), direction.scaling)


def experts(pick: random.Random, base: torch.Tensor, size: float) -> Experts:
    rows = base.shape[0] // 3
    first = low_rank(pick, rows, base.shape[1], size=size)
    others = [
        LowRank("w", torch.randn_like(first.A), torch.randn_like(first.B) * size, first.scaling)
        for _ in range(2)
    ]
    return Experts("w", first.scaling, (first, *others))


def tokens(pick: random.Random, base: torch.Tensor, size: float) -> TokenRows:
    chosen = torch.tensor(pick.sample(range(base.shape[0]), 4))
    values = torch.randn(4, base.shape[1]) * base.float().std()
    return TokenRows("w", tuple(base.shape), chosen, values, reader(base))


def replacement(pick: random.Random, base: torch.Tensor, size: float) -> Replacement:
    values = base.float() + torch.randn(base.shape) * size
    return Replacement("w", tuple(base.shape), reader(values), reader(base))


def in_turn(pick: random.Random, base: torch.Tensor, size: float) -> InTurn:
    first = pick.choice([replacement, dora])(pick, base, size)
    more = [low_rank(pick, *base.shape, size=size) for _ in range(pick.choice([1, 2]))]
    return InTurn("w", (first, *more) if pick.random() < 0.5 else tuple(more + more[:1]))


KINDS: dict[str, Callable[[random.Random, torch.Tensor, float], Update]] = {
    "DoRA": dora,
    "experts": experts,
    "token rows": tokens,
    "replaced": replacement,
    "in turn": in_turn,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_no_element_is_out_of_its_bound_by_any_recipe(kind: str, format: Format) -> None:
    pick, largest = random.Random(f"{kind} {format.name}"), 0.0
    for case in range(24):
        torch.manual_seed(case)
        scale = 10.0 ** pick.choice([-3, -2, 0, 1])
        base = (torch.randn(36, pick.choice([20, 64, 200])) * scale).to(pick.choice(STORED))
        update = KINDS[kind](pick, base, scale * 10.0 ** pick.choice([-4, -2, -1, 0]))
        delta = update.exact(0, 36)
        family = families(format, base.dtype)[-1]
        for recipe in RECIPES:
            merged = update.merged(recipe, base, 0, 36, format)
            others = update.variations(recipe, base, 0, 36, format, delta)
            for made in (merged, *others):
                for base_format in (None, BF16 if format is FP32 else format):
                    wide = base.float() if base_format is None else base_format.round(base.float())
                    bound = bound_rows(
                        family,
                        update,
                        0,
                        36,
                        delta=delta,
                        merged=made.double(),
                        base=base.double(),
                        base_format=base_format,
                        format=format,
                    )
                    error = (subtract_rows(made, wide).double() - delta).abs()
                    assert bool((error <= bound).all()), (case, recipe.name, base_format)
                    largest = max(largest, float((error / bound).max()))
    assert largest > 0.2  # the bound is not so wide that it says nothing


def certified(
    update: Update, W: list[float], M: list[float], subtracted: Format, format: Format
) -> tuple[float, float]:
    """The error of the first of two elements of a row, in float64, and its bound.

    W is rounded before it is subtracted; the certificate holds, and this element is the worst.
    """
    base, merged = torch.tensor([W]), torch.tensor([M]).to(format.dtype)
    wide, delta = subtracted.round(base), update.exact(0, 1)
    T = subtract_rows(merged, wide)
    certificate = ParameterCertificate(
        update, format, torch.float32, base_format=subtracted, elements=len(W)
    )
    assert certificate.add(Block(0, 1, base, wide, T, merged), delta)
    assert certificate.violations == 0
    worst = certificate.tally.worst
    assert worst is not None and worst.column == 0
    return abs(float(merged[0, 0]) - float(wide[0, 0]) - float(delta[0, 0])), worst.bound


def test_doras_bound_is_that_of_the_base_as_stored_whatever_was_subtracted() -> None:
    """f V is as large as what rounding W takes, so that R(W) + delta is next to nothing.

    M is peft-half's in bf16, step by step below; what was subtracted was rounded to fp16.
    """
    W, D = [1.91259765625, 4.159482955932617], [-0.018456177785992622, -0.0780310407280922]
    m = 0.001110220211558044
    V = [1.8984375, 4.0625]  # R(1.9140625 - 0.0184326171875), R(4.15625 - 0.078125)
    factor = 0.0002498626708984375  # R(0.0011138916015625 / 4.46875): R(m), and R(4.4842..)
    M = [0.0004749298095703125, 0.00101470947265625]  # R(factor * V)
    base, direction = torch.tensor([W]), LowRank("w", torch.eye(2), torch.tensor([D]), 1.0)
    update = Dora("w", direction, torch.tensor([m]), reader(base), 1.0)
    assert [float(torch.tensor(factor * v).bfloat16()) for v in V] == M
    assert update.merged(RECIPES[4], base, 0, 1, BF16).tolist() == [M]
    error, bound = certified(update, W, M, FP16, BF16)
    assert 0.97 * bound < error <= bound


def test_a_sum_in_between_is_bounded_from_the_base_as_stored() -> None:
    """W + d1 is past 1, where fp32's spacing doubles, and what was subtracted, plus d1, is not."""
    W, tiny = 1 - 1.5 * 2.0**-8, 2.0**-30  # halfway between two of bf16, the lower one is even
    first, second = 1.5 * 2.0**-8 + 2.0**-24 + tiny, 2.0**-24
    parts = tuple(LowRank("w", torch.ones(1, 1), torch.tensor([[d]]), 1.0) for d in (first, second))
    update = InTurn("w", parts)
    M = 1 + 2 * 2.0**-23  # W + d1 goes up to 1 + 2^-23, from where d2 is half a spacing: up, again
    merged = update.merged(RECIPES[0], torch.tensor([[W]]), 0, 1, FP32)
    assert float(merged) == M
    error, bound = certified(update, [W], [M], BF16, FP32)
    assert error == pytest.approx(2.0**-9 + 2.0**-23, abs=2.0**-29)
    of_base, of_sums = 2.0**-9 * (1 + 513 * 2.0**-24), 2 * 2.0**-24  # as the proof has them
    assert of_base + of_sums <= bound <= of_base + of_sums + 2.0**-27


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_what_a_recipe_gives_lies_in_its_interval_and_damage_does_not(
    kind: str, format: Format
) -> None:
    pick = random.Random(kind)
    for case in range(12):
        torch.manual_seed(case)
        base = (torch.randn(36, 40) * 0.05).to(pick.choice(STORED))
        update = KINDS[kind](pick, base, 0.01)
        everywhere = torch.ones(36, 40, dtype=torch.bool)
        for recipe in RECIPES:
            if recipe.in_format and kind in ("DoRA", "in turn"):
                continue  # the norm in half precision has a bound of its own, tested above
            merged = update.merged(recipe, base, 0, 36, format)
            for anywhere in (False, True):
                low, high = update.interval(
                    recipe,
                    0,
                    36,
                    base=base,
                    format=format,
                    where=everywhere,
                    rounded_anywhere=anywhere,
                )
                found = merged.flatten()
                assert bool(((low <= found) & (found <= high)).all()), (case, recipe.name)
            far = found.float() + 0.5
            assert bool(((far < low) | (far > high)).all())


def test_rows_of_dora_do_not_depend_on_how_it_is_cut() -> None:
    pick = random.Random(0)
    for case in range(6):
        torch.manual_seed(case)
        base = torch.randn(36, 50)
        update = dora(pick, base, 0.1)
        whole = update.merged(RECIPES[0], base, 0, 36, FP32)
        pieces = [update.merged(RECIPES[0], base[s : s + 5], s, s + 5, FP32) for s in (0, 5, 10)]
        assert torch.equal(torch.cat(pieces), whole[:15])
        assert torch.equal(update.exact(7, 9), update.exact(0, 36)[7:9])


def test_dora_is_its_formula_in_float64() -> None:
    """m / ‖W + s B A‖ (W + s B A), row by row, worked out in numpy."""
    torch.manual_seed(0)
    base, A, B = torch.randn(6, 9), torch.randn(2, 9), torch.randn(6, 2)
    m = torch.rand(6) + 0.5
    update = Dora("w", LowRank("w", A, B, 0.75), m, reader(base), 0.75)
    W, total = base.double().numpy(), (base.double() + 0.75 * B.double() @ A.double()).numpy()
    expected = m.double().numpy()[:, None] * total / ((total**2).sum(1) ** 0.5)[:, None] - W
    assert abs(update.exact(0, 6).numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("kernel", [(3,), (1,), (3, 5), (1, 1)])
def test_convolutions_have_pefts_bits_however_they_are_cut(kernel: tuple[int, ...]) -> None:
    """As `lora.Conv1d` and `lora.Conv2d` compute it: lora_B, of kernel 1, over lora_A."""
    torch.manual_seed(0)
    A, B = torch.randn(4, 40, *kernel), torch.randn(10, 4, *[1] * len(kernel))
    convolve = F.conv1d if len(kernel) == 1 else F.conv2d
    theirs = convolve(A.transpose(0, 1), B).transpose(0, 1) * 0.7
    if kernel == (1, 1):
        theirs = (B.flatten(1) @ A.flatten(1))[:, :, None, None] * 0.7
    update = LowRank("w", A.flatten(1), B.flatten(1), 0.7, stored=(10, 40, *kernel))
    info = TensorInfo("w", torch.float32, update.shape, Path("w"), 0, 0)
    whole = theirs.reshape(info.rows, *info.row_shape)
    for start, stop in [(0, info.rows), (3, 4), (5, 9)]:
        assert torch.equal(update.delta(start, stop), whole[start:stop])
    base = torch.randn(10, 40, *kernel)
    m = torch.rand(10) + 0.5
    read = reader(base.reshape(info.rows, *info.row_shape))
    scaled = Dora("w", update, m, read, 0.7)
    total = base.double() + theirs.double()
    norm = total.flatten(1).norm(dim=1).reshape(-1, 1, *[1] * len(kernel))
    expected = (m.double().reshape(norm.shape) / norm * total).reshape(whole.shape)
    for start, stop in [(0, info.rows), (4, 10)]:
        merged = scaled.merged(RECIPES[0], read(start, stop), start, stop, FP32)
        assert torch.allclose(merged.double(), expected[start:stop], rtol=1e-5, atol=1e-6)


def test_an_output_of_zeros_has_no_direction() -> None:
    base = torch.zeros(3, 4)
    base[0] = 1
    direction = LowRank("w", torch.ones(1, 4), torch.zeros(3, 1), 1.0)
    update = Dora("w", direction, torch.ones(3), reader(base), 1.0)
    with pytest.raises(UserError, match=r"w: output 1 of W \+ s B A is zero"):
        update.exact(0, 3)


def test_a_single_number_is_replaced_as_well() -> None:
    base, value = torch.tensor(2.6592), torch.tensor(4.605)  # such as CLIP's logit_scale
    update = Replacement("w", (), lambda start, stop: value, lambda start, stop: base)
    merged = update.merged(RECIPES[0], base, 0, 1, FORMATS["bf16"])
    assert merged.shape == () and merged == value.bfloat16()
    assert update.exact(0, 1) == value.double() - base.double()
    certificate = ParameterCertificate(
        update, FORMATS["bf16"], torch.float32, base_format=None, elements=1
    )
    T = subtract_rows(merged, base)
    assert certificate.add(Block(0, 1, base, base, T, merged), update.exact(0, 1))
    assert certificate.violations == 0 and certificate.reproduced_by
