"""What an adapter holds for one parameter of a base, before it is read: one class for each kind.

A part knows its tensors, all shapes are checked; `update` reads them and makes the `Update`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.names import Piece
from taskvec.tensorfile import TensorFile
from taskvec.update import Update
from taskvec.updates.dora import Dora
from taskvec.updates.products import Experts, LowRank
from taskvec.updates.replaced import Replacement, RowReader, TokenRows


class Part(Protocol):
    """What one adapter does to one parameter.

    Attributes:
        scaling: of the product; None where there is none.
        source: the tensor to name in messages.
    """

    @property
    def scaling(self) -> float | None: ...

    @property
    def source(self) -> TensorInfo: ...

    def update(self, parameter: str, base: Checkpoint, device: torch.device) -> Update:
        """Read it, raised to fp32, onto the device.

        Raises:
            UserError: it holds NaN or infinity.
        """


@dataclass(frozen=True)
class LowRankPart:
    """A product of two factors, on a weight of any shape.

    Attributes:
        A, B: where the factors lie.
        stored: the parameter's shape where it is not the product's.
        magnitude: of DoRA.
    """

    file: TensorFile
    A: TensorInfo
    B: TensorInfo
    scaling: float
    transposed: bool
    stored: tuple[int, ...] | None = None
    rounds_delta: bool = False
    magnitude: TensorInfo | None = None

    @property
    def source(self) -> TensorInfo:
        return self.A

    def update(self, parameter: str, base: Checkpoint, device: torch.device) -> Update:
        A, B = (_factor(self.file, info, device) for info in (self.A, self.B))
        product = LowRank(
            parameter,
            A.flatten(1),
            B.flatten(1),
            self.scaling,
            self.transposed,
            self.stored,
            self.rounds_delta,
        )
        if self.magnitude is None:
            return product
        m = _factor(self.file, self.magnitude, device).flatten()
        return Dora(parameter, product, m, _reader(base, parameter, device), self.scaling)


@dataclass(frozen=True)
class BiasPart:
    """The bias of lora_B, which is added to the module's own, times the scaling."""

    file: TensorFile
    source: TensorInfo
    scaling: float

    def update(self, parameter: str, base: Checkpoint, device: torch.device) -> Update:
        bias = _factor(self.file, self.source, device)
        one = torch.ones(1, 1, device=device)
        return LowRank(
            parameter, one, bias[:, None], self.scaling, stored=self.source.shape, kind="LoRA bias"
        )


@dataclass(frozen=True)
class ExpertsPart:
    """A product for each matrix of a stack: A (experts * r, in), B (out, r * experts).

    The matrices' factors are interleaved as PEFT's ``ParamWrapper.get_delta_weight`` takes them
    apart.
    """

    file: TensorFile
    A: TensorInfo
    B: TensorInfo
    scaling: float
    experts: int
    transposed: bool

    @property
    def source(self) -> TensorInfo:
        return self.A

    def update(self, parameter: str, base: Checkpoint, device: torch.device) -> Update:
        A, B = (_factor(self.file, info, device) for info in (self.A, self.B))
        each_A = A.reshape(self.experts, -1, A.shape[1])
        each_B = B.reshape(B.shape[0], -1, self.experts)
        return Experts(
            parameter,
            self.scaling,
            tuple(
                LowRank(parameter, each_A[e], each_B[:, :, e], self.scaling, self.transposed)
                for e in range(self.experts)
            ),
        )


@dataclass(frozen=True)
class ExpertPart:
    """One matrix's share of an `ExpertsPart`, where the base keeps the matrices one by one.

    Attributes:
        piece: which matrix, and which of its rows.
    """

    whole: ExpertsPart
    piece: Piece

    @property
    def scaling(self) -> float:
        return self.whole.scaling

    @property
    def source(self) -> TensorInfo:
        return self.whole.A

    def update(self, parameter: str, base: Checkpoint, device: torch.device) -> Update:
        whole, piece = self.whole, self.piece
        rank, rows = whole.A.rows // whole.experts, whole.B.rows // piece.parts
        A = whole.file.read(whole.A, piece.expert * rank, (piece.expert + 1) * rank)
        B = whole.file.read(whole.B, piece.part * rows, (piece.part + 1) * rows)
        A, B = A.to(device, torch.float32), B.to(device, torch.float32)
        for info, factor in ((whole.A, A), (whole.B, B)):
            _refuse_non_finite(info, factor)
        B = B.reshape(rows, -1, whole.experts)[:, :, piece.expert].contiguous()
        return LowRank(parameter, A, B, whole.scaling, rounds_delta=True, kind="LoRA of experts")


@dataclass(frozen=True)
class ReplacementPart:
    """A whole tensor that replaces the base's.

    Attributes:
        tokens: rows of it that are replaced in turn.
    """

    file: TensorFile
    source: TensorInfo
    tokens: TokensPart | None = None
    scaling: None = None

    def update(self, parameter: str, base: Checkpoint, device: torch.device) -> Update:
        tokens = self.tokens.tokens if self.tokens else ()
        trained = _factor(self.file, self.tokens.source, device) if self.tokens else None

        def values(start: int, stop: int) -> torch.Tensor:
            rows = self.file.read(self.source, start, stop).to(device)
            _refuse_non_finite(self.source, rows)
            if trained is not None:
                inside = [i for i, token in enumerate(tokens) if start <= token < stop]
                rows = rows.to(torch.promote_types(rows.dtype, trained.dtype))
                rows[[tokens[i] - start for i in inside]] = trained[inside].to(rows.dtype)
            return rows

        reader = _reader(base, parameter, device)
        return Replacement(parameter, self.source.shape, values, reader)


@dataclass(frozen=True)
class TokensPart:
    """Rows of an embedding that replace the base's."""

    file: TensorFile
    source: TensorInfo
    tokens: tuple[int, ...]
    scaling: None = None

    def update(self, parameter: str, base: Checkpoint, device: torch.device) -> Update:
        return TokenRows(
            parameter,
            base.tensors[parameter].shape,
            torch.tensor(self.tokens, dtype=torch.int64, device=device),
            _factor(self.file, self.source, device),
            _reader(base, parameter, device),
        )


def _reader(base: Checkpoint, parameter: str, device: torch.device) -> RowReader:
    return lambda start, stop: base.read(parameter, start, stop).to(device)


def _factor(file: TensorFile, info: TensorInfo, device: torch.device) -> torch.Tensor:
    factor = file.read(info).to(device, torch.float32)
    _refuse_non_finite(info, factor)
    return factor


def _refuse_non_finite(info: TensorInfo, values: torch.Tensor) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = values.numel() - int(finite.sum())
        raise UserError(f"{info.path}: {info.name}: {bad} values are NaN or infinite")
