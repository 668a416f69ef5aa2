"""Two tensors to numbers, many tensors to totals and a verdict.

Everything is accumulated in float64 over blocks of rows; nothing larger than a block is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from taskvec.certificate import Block, ParameterCertificate
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.difference import Difference, count_differing, count_nonzero, is_zero
from taskvec.rounding import (
    FP32,
    NARROW_FORMATS,
    Format,
    all_finite,
    dtype_name,
    loses,
    subtract_rows,
)
from taskvec.taskvector import TaskVector
from taskvec.tensorfile import row_blocks, to_device
from taskvec.update import Update

PERFECT_COSINE = 0.9999
BLOCK_ELEMENTS = 1 << 18  # small enough for a core's own cache, which is most of the speed

LORA, UNCHANGED, CAST, UNEXPLAINED = "lora", "unchanged", "cast", "unexplained"
KINDS = (LORA, UNCHANGED, CAST, UNEXPLAINED)


@dataclass
class Magnitude:
    """What a tensor amounts to.

    Attributes:
        squared_norm: of its finite elements.
        max_abs: largest finite absolute value.
        nonzero: elements that are not zero.
        non_finite: NaN or infinite elements, which are in none of the other figures but nonzero.
    """

    squared_norm: float = 0.0
    max_abs: float = 0.0
    nonzero: int = 0
    non_finite: int = 0

    @property
    def norm(self) -> float:
        return math.sqrt(self.squared_norm)

    def add(self, rows: torch.Tensor) -> None:
        """Take rows of any shape and float dtype into account."""
        if not rows.numel():
            return
        self.nonzero += count_nonzero(rows)
        wide = rows.double().reshape(-1)
        squared = float(torch.dot(wide, wide))
        if math.isfinite(squared):  # then every element is finite
            largest = float(rows.abs().amax())
        else:
            finite = torch.isfinite(wide)
            self.non_finite += wide.numel() - int(torch.count_nonzero(finite))
            wide = torch.where(finite, wide, 0.0)
            squared, largest = float(torch.dot(wide, wide)), float(wide.abs().max())
        self.squared_norm += squared
        self.max_abs = max(self.max_abs, largest)

    def add_task_vector(self, difference: Difference) -> None:
        """Take the rows of T into account."""
        if not difference.elements:
            return
        self.nonzero += difference.nonzero
        if difference.non_finite is not None:
            bad = int(difference.non_finite.count_nonzero())
            self.nonzero += bad
            self.non_finite += bad
        self.squared_norm += difference.squared
        self.max_abs = max(self.max_abs, float(difference.size.amax()))


@dataclass
class PairSums:
    """Running sums over the elements of T and delta, from which every metric follows."""

    elements: int = 0
    delta_squared: float = 0.0
    product: float = 0.0
    difference_squared: float = 0.0
    difference_abs: float = 0.0
    difference_max: float = 0.0
    exact: int = 0

    def add(self, difference: Difference) -> None:
        """Take rows of T and delta into account, as far as they are finite."""
        if not difference.elements:
            return
        wide, delta, error = (
            rows.reshape(-1) for rows in (difference.wide, difference.delta, difference.error)
        )
        inexact = count_differing(difference.task_vector, difference.narrow)
        if difference.non_finite is not None:
            inexact += int(difference.non_finite.count_nonzero())
        found = torch.stack(  # one wait for all of them
            [
                torch.dot(delta, delta),
                torch.dot(wide, delta),
                torch.dot(error, error),
                error.sum(),
                error.amax(),
            ]
        )
        delta_squared, product, squared, total, largest = found.tolist()
        self.elements += difference.elements
        self.exact += difference.elements - inexact
        self.delta_squared += delta_squared
        self.product += product
        self.difference_squared += squared
        self.difference_abs += total
        self.difference_max = max(self.difference_max, largest)


@dataclass
class Comparison:
    """An adapter's delta against the task vector, for one parameter.

    Attributes:
        sums: the metrics' raw material.
        certificate: recipes and bounds.
        rank, scaling, update_kind: of the update; None where it has no such thing.
        stored: what M is stored in, where M itself is known.
    """

    sums: PairSums
    certificate: ParameterCertificate
    rank: int | None
    scaling: float | None
    update_kind: str = "LoRA"
    stored: torch.dtype | None = None

    @property
    def precision(self) -> str:
        """What M is stored in, by name; judged by the bounds of fp32 if that is wider."""
        return dtype_name(self.stored or self.certificate.format.dtype)


@dataclass
class ParameterResult:
    """What was found about one parameter of the model.

    Attributes:
        kind: "lora" (explained by the adapter), "unchanged" (zero), "cast" (the base's own
            rounding to the format that it is stored in or was subtracted in, bit for bit) or
            "unexplained".
        cast_format: the format whose rounding all of T is; of an "unexplained" one, a format that
            the model is not stored in.
        comparison: for parameters that the adapter changes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    task_vector: Magnitude
    cast_format: str | None = None
    comparison: Comparison | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def cosine(self) -> float | None:
        """cos(T, delta), None where one of them is zero. Cauchy-Schwarz up to float64 rounding."""
        if self.comparison is None:
            return None
        sums = self.comparison.sums
        norms = self.task_vector.norm * math.sqrt(sums.delta_squared)
        return max(-1.0, min(1.0, sums.product / norms)) if norms else None

    @property
    def slope(self) -> float | None:
        """Least-squares c of T = c * delta."""
        sums = self.comparison.sums if self.comparison else None
        return sums.product / sums.delta_squared if sums and sums.delta_squared else None

    @property
    def relative_error(self) -> float | None:
        """‖T - delta‖ / ‖delta‖."""
        sums = self.comparison.sums if self.comparison else None
        if sums is None or not sums.delta_squared:
            return None
        return math.sqrt(sums.difference_squared / sums.delta_squared)

    @property
    def missing(self) -> bool:
        """The adapter changes this parameter, but in the merged model not one element moved."""
        if self.comparison is None:
            return False
        certificate = self.comparison.certificate
        return 0 < certificate.lost == certificate.changed_by_update and certificate.violations > 0


def read_blocks(
    base: Checkpoint, vector: TaskVector, name: str, device: torch.device
) -> Iterator[Block]:
    """A parameter of the base and of the task vector, block by block, on the device."""
    info = base.tensors[name]
    for start, stop in row_blocks(info, BLOCK_ELEMENTS):
        yield vector.block(to_device(base.read(name, start, stop), device), name, start, stop)


def compare_parameter(
    base: Checkpoint, vector: TaskVector, name: str, update: Update, device: torch.device
) -> ParameterResult:
    """Compare one parameter that the adapter changes, in one pass over it.

    The formats it may have been merged in are tried in turn; a wrong one is left at its first
    block that no number of the format could have given.

    Raises:
        UserError: the base's own values are not finite, so no bound holds for a sum with them.
    """
    info = base.tensors[name]
    for format in vector.formats(name):
        magnitude, sums = Magnitude(), PairSums()
        certificate = ParameterCertificate(
            update,
            format,
            info.dtype,
            base_format=vector.base_format,
            elements=info.elements,
        )
        for block in read_blocks(base, vector, name, device):
            # What fp32 cannot hold is infinite in every sum of the merge.
            stored = block.base.float() if block.base.dtype is torch.float64 else block.base
            if not all_finite(stored):
                raise UserError(f"{info.path}: {name}: holds NaN or infinity, in fp32 at least")
            delta = update.exact(block.start, block.stop)
            difference = Difference(block.task_vector, delta)
            if not certificate.add(block, delta, difference):
                break
            magnitude.add_task_vector(difference)
            sums.add(difference)
        else:
            break
    certificate.conclude()
    kind = UNEXPLAINED if certificate.violations else LORA
    if kind == UNEXPLAINED and not magnitude.nonzero:
        kind = UNCHANGED
    comparison = Comparison(
        sums, certificate, update.rank, update.scaling, update.kind, vector.dtype(name)
    )
    return ParameterResult(name, info.shape, kind, magnitude, comparison=comparison)


def attribute_parameter(
    base: Checkpoint, vector: TaskVector, name: str, device: torch.device
) -> ParameterResult:
    """Say why a parameter that the adapter does not touch has the task vector that it has.

    Storing the base in a smaller format explains it, and so does having rounded the base before it
    was subtracted. Having passed through a format does not: a model stored in fp32 has no reason to
    hold weights that were rounded to fp16.
    """
    info, magnitude = base.tensors[name], Magnitude()
    if vector.is_zero(name):
        return ParameterResult(name, info.shape, UNCHANGED, magnitude)
    casts = list(NARROW_FORMATS)
    if vector.base_format is not None or loses(info.dtype, FP32):
        casts.append(FP32)  # elsewhere W in fp32 is W, and T would be zero
    for block in read_blocks(base, vector, name, device):
        casts = [format for format in casts if _is_cast(block, format)]
        if not is_zero(block.task_vector):
            magnitude.add(block.task_vector)
    if not magnitude.nonzero:
        return ParameterResult(name, info.shape, UNCHANGED, magnitude)
    if casts and not magnitude.non_finite:
        stored = [format for format in casts if format in vector.formats(name)]
        kind, cast = CAST if stored else UNEXPLAINED, (stored or casts)[0]
        if cast is FP32 and vector.base_format is not None:
            cast = vector.base_format  # M is W; what rounded it was the subtraction
        return ParameterResult(name, info.shape, kind, magnitude, cast.name)
    return ParameterResult(name, info.shape, UNEXPLAINED, magnitude)


def _is_cast(block: Block, format: Format) -> bool:
    rounded = format.round(block.base.to(torch.promote_types(block.base.dtype, torch.float32)))
    return torch.equal(subtract_rows(rounded, block.subtracted), block.task_vector)
