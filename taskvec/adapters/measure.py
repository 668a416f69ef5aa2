"""What the factors of one module amount to, as they lie in an adapter file."""

from __future__ import annotations

import math

import torch

from taskvec.adapters.config import LoraConfig
from taskvec.adapters.problems import Factors, dtype_name
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.tensorfile import TensorFile


def measure(
    file: TensorFile,
    module: str,
    matrices: int,
    sides: dict[str, TensorInfo],
    config: LoraConfig,
    parameter: str | None,
) -> Factors:
    """Read a module's factors and say what they amount to."""
    try:
        rank, scaling = config.scaling(module)
    except UserError:
        rank, scaling = None, None
    read = {
        side: file.read(info).float().double()  # fp32 first: what the merge computes with
        for side, info in sides.items()
        if info.is_float
    }
    values = list(read.values())
    return Factors(
        module=module,
        parameter=parameter,
        A_shape=sides["A"].shape if "A" in sides else None,
        B_shape=sides["B"].shape if "B" in sides else None,
        rank=rank,
        scaling=scaling,
        dtypes=[dtype_name(sides[side]) for side in "AB" if side in sides],
        A_norm=_norm(read.get("A")),
        B_norm=_norm(read.get("B")),
        update_norm=_update_norm(read.get("A"), read.get("B"), scaling, matrices),
        non_finite=sum(int((~torch.isfinite(value)).sum()) for value in values),
        dead=any(not bool(value.any()) for value in values),
        matrices=matrices,
        embedding=any(".lora_embedding_" in info.name for info in sides.values()),
    )


def _norm(factor: torch.Tensor | None) -> float | None:
    return None if factor is None else _finite(float(torch.linalg.vector_norm(factor)))


def _update_norm(
    A: torch.Tensor | None, B: torch.Tensor | None, scaling: float | None, matrices: int
) -> float | None:
    """‖s B A‖ without forming B A: ‖B A‖² = tr((Bᵀ B)(A Aᵀ)), r x r matrices in float64.

    Where the rank is larger than both sides of B A, it is B A that takes less memory.
    """
    if A is None or B is None or scaling is None or A.ndim < 2 or B.ndim < 2:
        return None
    if A.shape[0] != B.shape[1] or A.shape[0] % matrices or not A.numel() or not B.numel():
        return None
    each_A = A.reshape(matrices, -1, A[0].numel())
    each_B = B.reshape(B.shape[0], -1, matrices).permute(2, 0, 1)
    if each_A.shape[1] > max(each_A.shape[2], each_B.shape[1]):
        squared = float((each_B @ each_A).square().sum())
    else:
        squared = float(((each_B.mT @ each_B) * (each_A @ each_A.mT)).sum())
    return _finite(abs(scaling) * math.sqrt(max(0.0, squared))) if squared == squared else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
