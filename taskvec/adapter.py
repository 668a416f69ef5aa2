"""A PEFT adapter on disk, bound to the base that it will be merged into.

Coverage is what the tensors say, not ``target_modules``. What is not understood is refused by
name: nothing is merged by guess.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from taskvec.checkpoint import Checkpoint, locate_adapter
from taskvec.cli import UserError
from taskvec.lora_config import CONFIG_FILE, LoraConfig, read_config
from taskvec.names import renaming
from taskvec.tensorfile import TensorFile, TensorInfo
from taskvec.update import Update
from taskvec.updates.products import LowRank

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclass(frozen=True)
class _Pair:
    """The two tensors of a module, before the base is known."""

    module: str
    A: TensorInfo
    B: TensorInfo
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter opened for reading and bound to a base: parameter names are the base's.

    Attributes:
        path: its directory.
        config: its adapter_config.json.
        scalings: s of each parameter that it changes, in the order of the base.
        stored_bytes: size of its tensors.
    """

    path: Path
    config: LoraConfig
    scalings: dict[str, float]
    stored_elements: int
    stored_bytes: int
    _file: TensorFile
    _pairs: dict[str, _Pair]
    _transposed: dict[str, bool]

    @property
    def parameters(self) -> list[str]:
        """Names, in the base, of the parameters that this adapter changes."""
        return list(self._pairs)

    @property
    def files(self) -> list[Path]:
        return [self.path / CONFIG_FILE, self.path / WEIGHTS_FILE]

    def update(self, parameter: str, device: torch.device) -> Update:
        """What the adapter does to one parameter, its factors raised to fp32 on ``device``.

        Raises:
            UserError: a factor holds NaN or infinity.
        """
        pair = self._pairs[parameter]
        A, B = (self._factor(info, device) for info in (pair.A, pair.B))
        return LowRank(parameter, A, B, pair.scaling, self._transposed[parameter])

    def _factor(self, info: TensorInfo, device: torch.device) -> torch.Tensor:
        factor = self._file.read(info).to(device, torch.float32)
        if not torch.isfinite(factor).all():
            bad = int((~torch.isfinite(factor)).sum())
            raise UserError(f"{info.path}: {info.name}: {bad} values are NaN or infinite")
        return factor


@contextlib.contextmanager
def open_adapter(source: str, base: Checkpoint) -> Iterator[Adapter]:
    """Open an adapter and match it with the base it will be merged into.

    Args:
        source: directory or hub id of a PEFT LoRA adapter.
        base: the base model.

    Raises:
        UserError: not a plain LoRA adapter, a factor without its partner, a module that the base
            has not got, shapes that do not fit (all named); a quantised base.

    Example:
        with open_checkpoint(b) as base, open_adapter(l, base) as adapter:
            for name in adapter.parameters:
                update = adapter.update(name, torch.device("cpu"))
                rows = update.delta(0, 10)   # (10, in) fp32
    """
    base.refuse_quantised()  # first: its packed weights would look like wrong shapes
    path = locate_adapter(source)
    config = read_config(path)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{path}: holds no {WEIGHTS_FILE}; PEFT's save_pretrained() writes one")
    with TensorFile(weights) as file:
        pairs = _bind(_pairs(file, config), base)
        yield Adapter(
            path=path,
            config=config,
            scalings={name: pair.scaling for name, pair in pairs.items()},
            stored_elements=sum(info.elements for info in file.tensors.values()),
            stored_bytes=sum(info.nbytes for info in file.tensors.values()),
            _file=file,
            _pairs=pairs,
            _transposed=_orientations(pairs, base, config),
        )


def factor_of(name: str) -> tuple[str, str] | None:
    """The module and side ("A" or "B") of an adapter tensor; None if it is no LoRA factor."""
    match = _FACTOR.match(name.removeprefix(_PREFIX))
    if not name.startswith(_PREFIX) or match is None:
        return None
    return match["module"], match["side"]


def _pairs(file: TensorFile, config: LoraConfig) -> list[_Pair]:
    """The A and B of every module, checked against each other and the configured rank."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    for name, info in file.tensors.items():
        factor = factor_of(name)
        if factor is None:
            raise UserError(f"{file.path}: {name}: not a tensor of a plain LoRA adapter")
        if not info.is_float or len(info.shape) != 2:
            raise UserError(f"{file.path}: {name}: {info.dtype} {info.shape} is no LoRA factor")
        sides.setdefault(factor[0], {})[factor[1]] = info
    if not sides:
        raise UserError(f"{file.path}: holds no LoRA tensors")
    return [_pair(file.path, module, factors, config) for module, factors in sides.items()]


def _pair(path: Path, module: str, factors: dict[str, TensorInfo], config: LoraConfig) -> _Pair:
    if len(factors) == 1:
        present, missing = ("A", "B") if "A" in factors else ("B", "A")
        raise UserError(f"{path}: {module} has lora_{present} but no lora_{missing}")
    A, B = factors["A"], factors["B"]
    rank, scaling = config.scaling(module)
    if A.shape[0] != rank or B.shape[1] != rank:
        raise UserError(
            f"{path}: {module}: lora_A {A.shape} and lora_B {B.shape} do not have the rank {rank} "
            f"of {config.file.name}"
        )
    return _Pair(module, A, B, scaling)


def _bind(pairs: list[_Pair], base: Checkpoint) -> dict[str, _Pair]:
    """Pairs by the base's name for their parameter, in the order of the base's files."""
    rename = renaming([pair.module for pair in pairs], base)
    bound = {}
    for pair in pairs:
        name = rename(f"{pair.module}.weight")
        if name not in base.tensors:
            raise UserError(f"{pair.A.path}: adapts {pair.module}, which {base.source} has not got")
        bound[name] = pair
    return {name: bound[name] for name in base.tensors if name in bound}


def _orientations(pairs: dict[str, _Pair], base: Checkpoint, config: LoraConfig) -> dict[str, bool]:
    """Whether each parameter is stored (in, out); every shape is checked on the way.

    A rectangular weight shows its orientation. A square one does not: there fan_in_fan_out decides,
    unless the adapter's rectangular weights contradict it (PEFT saves the flag of the module that
    it wrapped last, which says nothing of the others where a model has both kinds).
    """
    flag = config.fan_in_fan_out
    shown: dict[str, bool] = {}
    for name, pair in pairs.items():
        out, into, stored = pair.B.shape[0], pair.A.shape[1], base.tensors[name].shape
        if stored not in ((out, into), (into, out)):
            raise UserError(
                f"{pair.A.path}: {pair.module}: B @ A is {(out, into)}, but {name} in "
                f"{base.source} is {stored}"
            )
        if not base.tensors[name].is_float:
            raise UserError(f"{base.source}: {name} is {base.tensors[name].dtype}, not a float")
        if out != into:
            shown[name] = stored == (into, out)
    other = next((name for name in shown if shown[name] != flag), None)
    if other and len(shown) < len(pairs):
        square = next(name for name in pairs if name not in shown)
        mixed = flag in shown.values()
        raise UserError(
            f"{config.file}: fan_in_fan_out is {flag}, but {other} is stored the other way, so the "
            f"orientation of the square {square} is not known; "
            + ("save each kind as an adapter of its own" if mixed else f"set it to {not flag}")
        )
    return {name: shown.get(name, flag) for name in pairs}
