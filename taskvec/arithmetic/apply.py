"""theta = base + lambda * T, rounded once, and what of a merged model comes back that way.

Ilharco et al., arXiv 2212.04089, section 2. With lambda = 1 this undoes T = fl32(M - W), unless
fp32 had no room for M - W. Let h(x) be half the spacing of a format's numbers at x. M and W are
both multiples of the smaller of their spacings, so T is exact wherever h(T) is no larger than half
of that. Otherwise W + T is off M by at most h(T), which does no harm where M is the only number of
its format within that distance, nor where it is lost in rounding. What is left are elements with
|T| larger than |M|, some of whose digits lie below the last one of T; without M nobody can tell
whether they were zero.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from taskvec.arithmetic.several import read_rows
from taskvec.certificate import Block
from taskvec.checkpoint import Checkpoint, read_json_object
from taskvec.cli import UserError
from taskvec.modelwriter import RowsFunction, stored_format
from taskvec.rounding import FORMATS, FP32, Format, half_ulp, round_once
from taskvec.taskvector import StoredTaskVector, TaskVector

APPLIED = "apply_manifest.json"


@dataclass
class RoundTrip:
    """How far adding a task vector to its base brings the merged model back.

    Attributes:
        elements: of the parameters in which T is not zero.
        may_differ: those at which T may have been rounded so that M does not come back exactly.
        differing: those that differ from the merged model, in value; None if it was not given.
        unexplained: those of them at which T had room for M - W.
    """

    elements: int = 0
    may_differ: int = 0
    differing: int | None = None
    unexplained: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, uncertain: torch.Tensor, wrong: torch.Tensor | None) -> None:
        """Take a block into account: bool each, of one shape."""
        with self._lock:
            self.elements += uncertain.numel()
            self.may_differ += int(uncertain.sum())
            if wrong is not None:
                self.differing = (self.differing or 0) + int(wrong.sum())
                self.unexplained = (self.unexplained or 0) + int((wrong & ~uncertain).sum())

    def as_json(self) -> dict[str, Any]:
        return {
            "elements": self.elements,
            "may_differ": self.may_differ,
            "differing": self.differing,
            "unexplained": self.unexplained,
        }


class Application:
    """A task vector added to a base, some number of times as large.

    Args:
        base, vector: they fit together.
        scales: every lambda.
        format: what the results are stored in.
        merged: the model that T was formed from, beside the base, to compare with where lambda is
            one.
        device: where the arithmetic runs.
    """

    def __init__(
        self,
        base: Checkpoint,
        vector: StoredTaskVector,
        scales: Sequence[float],
        format: Format,
        merged: TaskVector | None,
        device: torch.device,
    ) -> None:
        self._base, self._vector, self._merged = base, vector, merged
        self._scales, self._format, self._device = scales, format, device
        self._merged_format = vector.merged_format or FP32
        narrower = format is not FP32 and format is not self._merged_format
        self.round_trip = None if 1.0 not in scales or narrower else RoundTrip()
        if self.round_trip is not None and merged is not None:
            self.round_trip.differing = self.round_trip.unexplained = 0

    def edit(self, name: str) -> RowsFunction | None:
        """How a parameter's rows are made, for `write_models`; None where T is zero."""
        if self._vector.is_zero(name):
            return None
        info = self._vector.tensors[name]
        format = stored_format(self._base, name, self._format)

        def rows(base: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
            base = base.to(self._device)
            task_vector = read_rows(self._vector, info, start, stop, self._device)
            W = self._subtracted(base)
            made = [add_scaled(W, task_vector, scale, format) for scale in self._scales]
            if self.round_trip is not None:
                again = made[self._scales.index(1.0)]
                model = self._merged
                wrong = _differs(again, model.block(base, name, start, stop)) if model else None
                self.round_trip.add(self._may_differ(name, W, task_vector, format), wrong)
            return [new.cpu() for new in made]

        return rows

    def _subtracted(self, base: torch.Tensor) -> torch.Tensor:
        """What T is to be added to: the base as it was when T was formed."""
        rounded = self._vector.base_format
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        return rounded.round(wide) if rounded else wide

    def _may_differ(
        self, name: str, W: torch.Tensor, task_vector: torch.Tensor, format: Format
    ) -> torch.Tensor:
        stored = self._vector.base_format or _format_of(self._base.tensors[name].dtype)
        return may_differ(W, task_vector, stored, self._merged_format, format)


def add_scaled(
    base: torch.Tensor, task_vector: torch.Tensor, scale: float, format: Format
) -> torch.Tensor:
    """W + lambda T in float64, rounded once to a format; W's own bits where T is zero.

    Args:
        base: rows of W, fp32 or float64.
        task_vector: the same rows of T, fp32.

    Returns:
        the format's dtype.
    """
    W = base.double()
    total = torch.add(W, task_vector.double(), alpha=scale)
    unchanged = task_vector == 0  # where -0.0 + 0.0 would be 0.0
    return round_once(torch.where(unchanged, W, total, out=total), format)


def may_differ(
    base: torch.Tensor,
    task_vector: torch.Tensor,
    stored: Format | None,
    merged: Format,
    result: Format,
) -> torch.Tensor:
    """Where R(W + T) is not certain to be the M that T = fl32(M - W) was formed from.

    Args:
        base: rows of W as it was subtracted.
        task_vector: the same rows of T, fp32.
        stored: the format of which W's values are; None for one that is wider than fp32.
        merged: that of M.
        result: what the sum is rounded to; ``merged``, or wider.

    Returns:
        bool, of their shape.
    """
    found = (base + task_vector).abs() <= 4 * task_vector.abs()
    # Elsewhere T is less than a quarter of M, so that its spacing is finer than M's.
    W, T = base[found].double(), task_vector[found].double()
    total, own = W + T, half_ulp(T, FP32)
    least = (total.abs() - own).clamp(min=0)  # |M| is no less
    spacing = half_ulp(least, merged) * 2
    even = (task_vector[found].view(torch.int32) & 1) == 0  # an error of just h(T) leaves T even
    only = (own < spacing) | ((own == spacing) & ~even)
    is_number = merged.round(total) == total
    may = ~torch.where(is_number, only, own < half_ulp(least, result)) & (T != 0)
    if stored is not None:
        may &= own > torch.minimum(half_ulp(least, merged), half_ulp(W, stored))
    return found.masked_scatter(found, may)


def _differs(again: torch.Tensor, block: Block) -> torch.Tensor:
    assert block.merged is not None  # a model's own task vector has it
    return again.double() != block.merged.double()


def _format_of(dtype: torch.dtype) -> Format | None:
    return next((format for format in FORMATS.values() if format.dtype == dtype), None)


def scale_names(scales: Sequence[float], finetuned_model: str | None) -> list[str]:
    """The directory of each scale within the output: the output itself if there is only one."""
    if not all(map(math.isfinite, scales)):
        raise UserError(f"--scale {scales}: give finite numbers")
    if len(set(scales)) < len(scales):
        raise UserError(f"--scale {scales}: one of them is given twice")
    if finetuned_model is not None and 1.0 not in scales:
        raise UserError("--finetuned_model is compared at --scale 1, which is not among them")
    if len(scales) == 1:
        return ["."]
    return [f"scale_{scale}" for scale in scales]


def is_applied(directory: Path) -> bool:
    """True for a directory that holds an earlier output of `apply` and nothing else."""
    if not (directory / APPLIED).is_file():
        return False
    files = read_json_object(directory / APPLIED).get("files")
    return isinstance(files, list) and all(str(path) in files for path in files_inside(directory))


def files_inside(directory: Path) -> list[Path]:
    """Everything in a directory, by its path from there."""
    return [path.relative_to(directory) for path in directory.rglob("*")]
