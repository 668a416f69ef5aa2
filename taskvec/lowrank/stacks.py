"""Parameters that are stacks of matrices, such as fused experts, and the factors of each matrix.

PEFT adapts such a parameter by name (``target_parameters``) with factors of one rank for all of its
matrices. transformers stacks in memory what many a checkpoint keeps one by one
(taskvec/conversions.py), so a stack may be one tensor of the file or many.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from taskvec.checkpoint import Checkpoint
from taskvec.compare import CAST, Magnitude, attribute_parameter
from taskvec.header import TensorInfo
from taskvec.lowrank.factors import Factors
from taskvec.names import pieces
from taskvec.subject import Subject
from taskvec.taskvector import FormedTaskVector, StoredTaskVector


@dataclass(frozen=True)
class Stack:
    """A stack of matrices, by its name in memory.

    Attributes:
        shape: in memory: (matrices, m, n).
        tensors: what the base's file has of it: the stack itself, or pieces of its matrices.
        matrices: of each matrix the tensors that it is, one below the other; of a stack that is a
            tensor of the file these are `apart`'s.
    """

    shape: tuple[int, int, int]
    tensors: tuple[str, ...]
    matrices: tuple[tuple[str, ...], ...]


def stack_in_file(name: str, info: TensorInfo) -> Stack | None:
    """A tensor that is a stack of matrices; None if it is not one of several."""
    if len(info.shape) != 3 or min(info.shape) < 2:
        return None
    count, m, n = info.shape
    return Stack((count, m, n), (name,), tuple((_matrix(name, i),) for i in range(count)))


def stacks_in_pieces(base: Checkpoint) -> dict[str, Stack]:
    """The stacks that a base's file keeps in pieces, by their names in memory."""
    found = {}
    for name, apart in pieces(base).items():
        parts, (rows, columns) = apart[0].parts, base.tensors[apart[0].name].shape
        names = [piece.name for piece in apart]
        matrices = [tuple(names[i : i + parts]) for i in range(0, len(names), parts)]
        shape = (len(matrices), parts * rows, columns)
        found[name] = Stack(shape, tuple(names), tuple(matrices))
    return found


def apart(subject: Subject, stack: Stack) -> Subject:
    """The task vector with each tensor of a stack's matrices as a tensor of its own."""
    if stack.tensors == tuple(name for names in stack.matrices for name in names):
        return subject
    (whole,) = stack.tensors
    count = stack.shape[0]
    assert subject.base is not None
    base = dataclasses.replace(subject.base, tensors=_unstacked(subject.base.tensors, whole, count))
    vector = subject.vector
    if isinstance(vector, FormedTaskVector):
        tensors = _unstacked(vector.merged.tensors, whole, count)
        vector = dataclasses.replace(
            vector, merged=dataclasses.replace(vector.merged, tensors=tensors)
        )
    elif isinstance(vector, StoredTaskVector):
        file = copy.copy(vector.file)  # of the same open file
        file.tensors = _unstacked(file.tensors, whole, count)
        vector = dataclasses.replace(vector, file=file)
    tensors = _unstacked(subject.tensors, whole, count)
    return dataclasses.replace(subject, vector=vector, base=base, tensors=tensors)


def magnitude_of(
    subject: Subject, names: Sequence[str], device: torch.device
) -> tuple[Magnitude, bool]:
    """How large T is in some tensors, and whether it is nothing but the base's own rounding."""
    whole, artifact = Magnitude(), True
    assert subject.base is not None
    for name in names:
        result = attribute_parameter(subject.base, subject.vector, name, device)
        own = result.task_vector
        whole.squared_norm += own.squared_norm
        whole.max_abs = max(whole.max_abs, own.max_abs)
        whole.nonzero += own.nonzero
        whole.non_finite += own.non_finite
        artifact &= result.kind == CAST or not own.nonzero
    return whole, artifact and bool(whole.nonzero)


@dataclass(frozen=True)
class Interleaved:
    """The factors of a stack as PEFT's ``ParamWrapper`` keeps them, of one rank r for all matrices.

    Matrix e of the delta is B[:, e :: matrices] @ A[e * r : (e + 1) * r], or its transpose where
    the stack's are stored (in, out).

    Attributes:
        A: (matrices * r, in) fp32, B: (out, r * matrices) fp32.
    """

    rank: int
    A: torch.Tensor
    B: torch.Tensor


def interleaved(
    factors: Sequence[Factors | None], shape: tuple[int, int, int], transposed: bool
) -> Interleaved:
    """Put the factors of a stack's matrices together; smaller ranks are filled up with zeros.

    Args:
        factors: of each matrix (m, n) as it is stored; None for one of zeros.
        transposed: the matrices are stored (in, out).
    """
    count, m, n = shape
    r = max(found.rank for found in factors if found is not None)
    left, right = torch.zeros(count, m, r), torch.zeros(count, r, n)
    for place, found in enumerate(factors):
        if found is not None:
            left[place, :, : found.rank] = found.left
            right[place, : found.rank] = found.right
    if transposed:
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    A, B = right.reshape(count * r, -1), left.permute(1, 2, 0).reshape(-1, r * count)
    return Interleaved(r, A.contiguous(), B.contiguous())


def described_stack(
    factors: Sequence[Factors | None], kept: Sequence[Factors | None], norms: Sequence[float]
) -> dict[str, Any]:
    """What is known of a stack's factors, ready for JSON: of the matrix where each is worst.

    Args:
        factors: of each matrix; None for one without a change.
        kept: the same, without what is noise.
        norms: ‖T‖ of each matrix, all of which is lost where nothing is kept.
    """
    found, stored = [f for f in factors if f is not None], [f for f in kept if f is not None]
    norm = math.hypot(*norms)
    lost = [n if own is None else own.error for own, n in zip(kept, norms, strict=True)]
    least = [n if own is None else own.optimum for own, n in zip(kept, norms, strict=True)]
    known = [optimum for optimum in least if optimum is not None]
    return {
        "rank": max((own.rank for own in stored), default=0),
        "rank_above_noise": max(own.finding.rank for own in found),
        "noise": max(own.finding.threshold for own in found),
        "noise_from": found[0].finding.source,
        "noise_ratio": _most(own.finding.noise_ratio for own in found),
        "weakest_kept": min((own.weakest_kept or 0.0 for own in stored), default=None),
        "strongest_left": _most(own.strongest_left for own in found),
        "relative_error": math.hypot(*lost) / norm,
        "optimal_relative_error": math.hypot(*known) / norm if len(known) == len(least) else None,
    }


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _matrix(name: str, index: int) -> str:
    return f"{name}[{index}]"


def _unstacked(tensors: Mapping[str, TensorInfo], whole: str, count: int) -> dict[str, TensorInfo]:
    """Where each matrix of a stack lies; none where the file leaves the stack out."""
    if whole not in tensors:
        return {}
    info = tensors[whole]
    nbytes = info.nbytes // count
    return {
        _matrix(whole, index): dataclasses.replace(
            info,
            name=_matrix(whole, index),
            shape=info.shape[1:],
            offset=info.offset + index * nbytes,
            nbytes=nbytes,
        )
        for index in range(count)
    }
