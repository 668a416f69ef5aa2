"""What a storage format makes of an update: which parameters change, and how much of it arrives.

One `Impact` is one way to get a task vector: the format that the merged model is stored in, and
what is subtracted from it. It can be measured for a merge that nobody writes (`measure_merges`),
or from task vectors that were extracted before (`measure_task_vectors`).

Notation: W the base, M the merged model, T = fl32(M - W), delta the exact s * B @ A, R rounding to
the format. A parameter that the adapter does not touch has M = R(W), so T = R(W) - W: an artifact
of rounding the base, wherever the format cannot hold W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from taskvec.adapter import Adapter
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.compare import BLOCK_ELEMENTS, Magnitude, PairSums
from taskvec.difference import Difference
from taskvec.header import TensorInfo
from taskvec.kinds import BASE_PRECISION
from taskvec.modelwriter import stored_format
from taskvec.rounding import (
    FORMATS,
    FP32,
    Format,
    Recipe,
    subtract_rows,
)
from taskvec.subject import stored_blocks
from taskvec.taskvector import StoredTaskVector
from taskvec.tensorfile import row_blocks
from taskvec.update import Update

STORED = "stored"


@dataclass
class Impact:
    """What was found for one format and one way of subtracting the base.

    Attributes:
        precision: the format that the merged model is stored in.
        base: what was subtracted: "stored" (the base as it is) or the format it was rounded to.
        real: changed parameters whose update is not zero.
        artifacts: changed parameters in which nothing was trained.
        unmoved: parameters whose update is not zero, but which this task vector leaves at zero.
        nonzero: elements of T that are not zero.
        non_finite: elements of T that are NaN or infinite: W or W + delta is beyond the format.
        artifact_squared, squared: the artifacts' share of squared norm, and that of all T.
        sums: T against the update, over the parameters that the update changes.
        touched, lost: elements with an update, and those of them whose merged value is R(W), as if
            there were none; lost is None where it cannot be known.
    """

    precision: str
    base: str
    real: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    unmoved: list[str] = field(default_factory=list)
    nonzero: int = 0
    non_finite: int = 0
    squared: float = 0.0
    artifact_squared: float = 0.0
    sums: PairSums = field(default_factory=PairSums)
    touched: int = 0
    lost: int | None = 0

    @property
    def changed(self) -> int:
        """Parameters with any element of T that is not zero."""
        return len(self.real) + len(self.artifacts)

    @property
    def relative_error(self) -> float | None:
        """‖T - delta‖ / ‖delta‖; None without an update to compare with."""
        sums = self.sums
        if not sums.delta_squared:
            return None
        return math.sqrt(sums.difference_squared / sums.delta_squared)

    def note(self, name: str, magnitude: Magnitude, *, expected: bool) -> None:
        """Take a finished parameter into account; ``expected``: the update changes it."""
        self.nonzero += magnitude.nonzero
        self.non_finite += magnitude.non_finite
        self.squared += magnitude.squared_norm
        if magnitude.nonzero:
            (self.real if expected else self.artifacts).append(name)
            self.artifact_squared += 0.0 if expected else magnitude.squared_norm
        elif expected:
            self.unmoved.append(name)

    def as_json(self) -> dict[str, Any]:
        """One row of the table. Shares are of 1; what is undefined is null."""
        error = self.relative_error
        known = self.lost is not None and self.touched
        return {
            "precision": self.precision,
            "base_precision": self.base,
            "changed_parameters": self.changed,
            "real_parameters": len(self.real),
            "artifact_parameters": len(self.artifacts),
            "unmoved_parameters": len(self.unmoved),
            "nonzero_elements": self.nonzero,
            "non_finite_elements": self.non_finite,
            "artifact_share_of_squared_norm": (
                self.artifact_squared / self.squared if self.squared else 0.0
            ),
            "relative_error": error,
            "snr_db": -20 * math.log10(error) if error else None,
            "lost_share": (self.lost or 0) / self.touched if known else None,
            "artifacts": self.artifacts,
            "unmoved": self.unmoved,
        }


def measure_merges(
    base: Checkpoint,
    adapter: Adapter,
    recipe: Recipe,
    device: torch.device,
    advance: Callable[[int], object],
) -> list[Impact]:
    """Merge in every format and subtract the base both ways, block by block, writing nothing.

    Args:
        recipe: how the merge is computed.
        device: where.
        advance: told the bytes of each block of the base that is done.

    Returns:
        for fp32, fp16 and bf16 in turn: the base subtracted as stored, then rounded first.
    """
    impacts = {
        format: (Impact(format.name, STORED), Impact(format.name, format.name))
        for format in FORMATS.values()
    }
    for name, info in base.tensors.items():
        if info.is_float:
            update = adapter.update(name, device) if name in adapter.scalings else None
            _measure_merged(base, info, update, recipe, device, impacts, advance)
        else:
            advance(info.nbytes)
    return [impact for pair in impacts.values() for impact in pair]


def _measure_merged(
    base: Checkpoint,
    info: TensorInfo,
    update: Update | None,
    recipe: Recipe,
    device: torch.device,
    impacts: Mapping[Format, tuple[Impact, Impact]],
    advance: Callable[[int], object],
) -> None:
    magnitudes = {format: (Magnitude(), Magnitude()) for format in impacts}
    trained = False  # a pair whose B is zero trains nothing
    for start, stop in row_blocks(info, BLOCK_ELEMENTS):
        rows = base.read(info.name, start, stop).to(device)
        exact = update.exact(start, stop) if update else None
        trained = trained or (exact is not None and bool(exact.any()))
        for column, pair in impacts.items():
            format = stored_format(base, info.name, column)
            rounded = rows.to(format.dtype)
            merged = rounded
            if update is not None:
                merged = update.merged(recipe, rows, start, stop, format)
            for impact, magnitude, subtracted in zip(
                pair, magnitudes[column], (rows, rounded), strict=True
            ):
                vector = subtract_rows(merged, subtracted)
                if bool(vector.any()):
                    magnitude.add(vector)
                if exact is not None:
                    impact.sums.add(Difference(vector, exact))
            if exact is not None:
                _count_lost(pair, exact, merged == rounded)
        advance(rows.nbytes)
    for format, pair in impacts.items():
        for impact, magnitude in zip(pair, magnitudes[format], strict=True):
            impact.note(info.name, magnitude, expected=trained)


def _count_lost(impacts: Iterable[Impact], update: torch.Tensor, same: torch.Tensor) -> None:
    """Count the elements with an update, and of them those where M is R(W): ``same``."""
    touched = update != 0
    count, lost = int(touched.count_nonzero()), int((touched & same).count_nonzero())
    for impact in impacts:
        impact.touched += count
        if impact.lost is not None:
            impact.lost += lost


def measure_task_vectors(
    vectors: Mapping[Format, StoredTaskVector],
    device: torch.device,
    advance: Callable[[int], object],
) -> tuple[list[Impact], dict[str, TensorInfo]]:
    """Set extracted task vectors of one merge against the fp32 one.

    What fp32 changes is real: it holds the base exactly, so nothing else is left there. What
    changes in another format alone was not trained. The fp32 task vector stands for the delta in
    the relative error: it is off by about 1e-5 of it.

    Args:
        vectors: by format of the merged model; FP32 must be among them.
        advance: told the bytes of each parameter that is done.

    Returns:
        one impact per format, and the parameters that they were measured on.

    Raises:
        UserError: the task vectors are of different architectures.
    """
    tensors = common_tensors(vectors)
    impacts = {format: _stored_impact(format, vector) for format, vector in vectors.items()}
    for name in tensors:
        reference = _magnitude(vectors[FP32], name, device)
        expected = reference.nonzero > 0
        for format, vector in vectors.items():
            impact = impacts[format]
            magnitude = reference
            if format is not FP32:
                magnitude = _magnitude(vector, name, device)
                if expected:
                    _compare_stored(impact, vector, vectors[FP32], tensors[name], device)
            impact.note(name, magnitude, expected=expected)
        advance(sum(v.file.tensors[name].nbytes for v in vectors.values() if _holds(v, name)))
    return list(impacts.values()), tensors


def common_tensors(vectors: Mapping[Format, StoredTaskVector]) -> dict[str, TensorInfo]:
    """The parameters of the task vectors; one that a file leaves out has not changed.

    Raises:
        UserError: the files are of different architectures: names the first tensor that one of
            them lacks or has in another shape.
    """
    largest = max((vector.file for vector in vectors.values()), key=lambda file: len(file.tensors))
    for vector in vectors.values():
        for name, info in vector.file.tensors.items():
            if name not in largest.tensors:
                raise UserError(f"{info.path}: holds {name}, which {largest.path} has not got")
            if info.shape != largest.tensors[name].shape:
                raise UserError(
                    f"{name}: {info.shape} in {info.path}, but {largest.tensors[name].shape} in "
                    f"{largest.path}"
                )
    return largest.tensors


def _compare_stored(
    impact: Impact,
    vector: StoredTaskVector,
    reference: StoredTaskVector,
    info: TensorInfo,
    device: torch.device,
) -> None:
    """T against the fp32 task vector, for one parameter."""
    for (_, rows), (_, wanted) in zip(
        _blocks(vector, info, device), _blocks(reference, info, device), strict=True
    ):
        impact.sums.add(Difference(rows, wanted.double()))
        _count_lost([impact], wanted, rows == 0)


def _blocks(
    vector: StoredTaskVector, info: TensorInfo, device: torch.device
) -> Iterable[tuple[int, torch.Tensor]]:
    """Rows of a parameter; zeros for one that the file leaves out."""
    if _holds(vector, info.name):
        return stored_blocks(vector, vector.file.tensors[info.name], device)
    return (
        (start, torch.zeros(stop - start, *info.row_shape, device=device))
        for start, stop in row_blocks(info, BLOCK_ELEMENTS)
    )


def _magnitude(vector: StoredTaskVector, name: str, device: torch.device) -> Magnitude:
    magnitude = Magnitude()
    if not vector.is_zero(name):
        for _, rows in stored_blocks(vector, vector.file.tensors[name], device):
            if bool(rows.any()):
                magnitude.add(rows)
    return magnitude


def _holds(vector: StoredTaskVector, name: str) -> bool:
    return name in vector.file.tensors


def _stored_impact(format: Format, vector: StoredTaskVector) -> Impact:
    # Files that extract_task_vectors.py did not write do not say what they subtracted.
    base = vector.file.metadata.get(BASE_PRECISION, STORED)
    # T is zero where nothing moved only if the base was rounded as the merged model was.
    return Impact(format.name, base, lost=0 if base == format.name else None)


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """What the table of a merge says, one sentence per thing worth knowing.

    Args:
        rows: `Impact.as_json` of `measure_merges`.
    """
    stored = [row for row in rows if row["base_precision"] == STORED]
    rounded = [row for row in rows if row["base_precision"] != STORED]
    sentences = []
    if any(row["artifact_parameters"] for row in stored):
        sentences.append(
            "Artifacts come from rounding the base, not from the merge: parameters that the "
            f"adapter does not touch change in {_counts(stored, 'artifact_parameters')}; "
            f"subtract the base rounded the same way and {_left(rounded)}."
        )
    else:
        sentences.append(
            "No artifacts: every format holds the parameters that the adapter does not touch."
        )
    if any(row["non_finite_elements"] for row in stored):
        sentences.append(
            "NaN or infinity, so merge_lora.py refuses it: "
            f"{_counts(stored, 'non_finite_elements')} elements."
        )
    if any(row["unmoved_parameters"] for row in rounded):
        sentences.append(
            "Parameters that the adapter changes, but that did not move at all: "
            f"{_counts(rounded, 'unmoved_parameters')}."
        )
    return sentences


def stored_findings(rows: list[dict[str, Any]], total: int) -> list[str]:
    """The same for `measure_task_vectors`, whose reference is the fp32 task vector."""
    reference = next(row for row in rows if row["precision"] == FP32.name)
    if reference["changed_parameters"] == total:
        return [
            f"fp32 changes all {total} parameters: this is no adapter that leaves parts of the "
            "model alone, so no artifact can be told from a change."
        ]
    sentences = []
    for row in rows:
        name, count = row["precision"], row["artifact_parameters"]
        if row is reference:
            continue
        if count:
            sentences.append(
                f"{name}: {row['changed_parameters']} = {row['real_parameters']} real + {count} "
                "artifacts. fp32 leaves those at zero, so nothing was trained in them: they show "
                f"the base being rounded to {name}. Extracted with --base_precision {name} they "
                "vanish."
            )
        else:
            sentences.append(f"No artifacts in {name}: it changes nothing that fp32 does not.")
        if row["unmoved_parameters"]:
            sentences.append(
                f"{row['unmoved_parameters']} parameters changed in fp32, but not in {name}: their "
                "whole update was lost."
            )
    return sentences


def _counts(rows: list[dict[str, Any]], key: str) -> str:
    """``fp16 (363) and bf16 (363)``."""
    parts = [f"{row['precision']} ({row[key]:,})" for row in rows if row[key]]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def _left(rounded: list[dict[str, Any]]) -> str:
    if any(row["artifact_parameters"] for row in rounded):
        return f"there are left those that overflow: {_counts(rounded, 'artifact_parameters')}"
    return "none is left"
