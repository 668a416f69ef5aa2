"""What is in an adapter file, whether it would merge, and everything that speaks against it.

`open_adapter` stops at the first thing that it cannot do exactly; here all of them are listed. The
verdict is no second opinion: an adapter would merge if `open_adapter` and `Adapter.update`, which
the merge itself uses, take it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from taskvec.adapter import WEIGHTS_FILE, factor_of, open_adapter
from taskvec.adapter_fit import coverage_problems, fit_problems, target_problems
from taskvec.adapter_problems import (
    ERROR,
    Factors,
    Problem,
    config_problems,
    dtype_name,
    rank_problems,
    tensor_problems,
    value_problems,
)
from taskvec.checkpoint import Checkpoint, locate_adapter
from taskvec.cli import UserError
from taskvec.lora_config import LoraConfig, load_config
from taskvec.names import naming_rules
from taskvec.targets import TargetRule
from taskvec.tensorfile import TensorFile, TensorInfo, row_blocks
from taskvec.update import Update
from taskvec.updates.products import LowRank

_BLOCK_ELEMENTS = 1 << 20
_FP32_LARGEST = torch.finfo(torch.float32).max
_SHOWN_CONFIG = (
    "peft_type",
    "peft_version",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "use_dora",
    "init_lora_weights",
)


@dataclass(frozen=True)
class AdapterReport:
    """What was found.

    Attributes:
        path: the adapter's directory.
        config: what matters of adapter_config.json.
        base: the base as the user named it; None: the adapter was looked at alone.
        tensors, elements, nbytes: of the adapter file.
        factors: per module, in the order of the file.
        touched: shape of each parameter of the base that B @ A fits.
        base_tensors, base_elements: of the base.
        problems: errors first.
        refusal: why the merge would stop; None if it would not.
    """

    path: Path
    config: dict[str, Any]
    base: str | None
    tensors: int
    elements: int
    nbytes: int
    factors: list[Factors]
    touched: dict[str, tuple[int, ...]]
    base_tensors: int
    base_elements: int
    problems: list[Problem]
    refusal: str | None

    @property
    def merges(self) -> bool:
        """True if nothing stands against a merge (into this base, if there is one)."""
        return self.refusal is None

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == ERROR]

    @property
    def warnings(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity != ERROR]

    def as_json(self) -> dict[str, Any]:
        return {"merges": self.merges, **asdict(self), "path": str(self.path)}


def inspect_adapter(source: str, base: Checkpoint | None = None) -> AdapterReport:
    """Look at an adapter, and at whether it fits a base.

    Of the base, only the headers of its files are read: that its own values are finite, and that
    the sum fits a narrow format, is for the merge to see.

    Args:
        source: directory or hub id of a PEFT adapter.
        base: the model that it would be merged into; None: find what any base would refuse.

    Raises:
        UserError: the adapter cannot be read: no such directory, a file missing or damaged.
    """
    path = locate_adapter(source)
    config = load_config(path)
    if not (path / WEIGHTS_FILE).is_file():
        raise UserError(f"{path}: holds no {WEIGHTS_FILE}")
    with TensorFile(path / WEIGHTS_FILE) as file:
        sides = _sides(file.tensors)
        rule = _naming_rule(list(sides), base)
        factors = [
            _measure(file, module, found, config, _parameter(module, rule, base))
            for module, found in sides.items()
        ]
        problems = [*config_problems(config), *tensor_problems(file.tensors)]
        elements = sum(info.elements for info in file.tensors.values())
        nbytes = sum(info.nbytes for info in file.tensors.values())
        tensors = len(file.tensors)
    problems += [*rank_problems(factors, config), *value_problems(factors)]
    problems += _base_problems(factors, config, rule, base)
    refusal = _refusal(source, base, problems)
    return AdapterReport(
        path=path,
        config={key: _plain(config.values.get(key)) for key in _SHOWN_CONFIG},
        base=base.source if base else None,
        tensors=tensors,
        elements=elements,
        nbytes=nbytes,
        factors=factors,
        touched=_touched(factors, base),
        base_tensors=len(base.tensors) if base else 0,
        base_elements=sum(info.elements for info in base.tensors.values()) if base else 0,
        problems=sorted(problems, key=lambda problem: problem.severity != ERROR),
        refusal=refusal,
    )


def _sides(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The factors of each module, by side."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if factor := factor_of(name):
            sides.setdefault(factor[0], {})[factor[1]] = info
    return sides


def _naming_rule(modules: Sequence[str], base: Checkpoint | None) -> tuple[str, str]:
    """Of the ways in which the base may name modules, the one that fits most of them."""
    if base is None:
        return "", ""
    return max(
        naming_rules(modules, base),
        key=lambda rule: sum(_parameter(module, rule, base) is not None for module in modules),
    )


def _parameter(module: str, rule: tuple[str, str], base: Checkpoint | None) -> str | None:
    strip, add = rule
    name = f"{add}{module.removeprefix(strip)}.weight"
    return name if base is not None and name in base.tensors else None


def _base_modules(base: Checkpoint, rule: tuple[str, str]) -> list[str]:
    """The base's modules that can be adapted, as the adapter would name them."""
    strip, add = rule
    return [
        strip + name.removesuffix(".weight").removeprefix(add)
        for name, info in base.tensors.items()
        if name.endswith(".weight") and name.startswith(add) and len(info.shape) > 1
    ]


def _base_problems(
    factors: Sequence[Factors],
    config: LoraConfig,
    rule: tuple[str, str],
    base: Checkpoint | None,
) -> list[Problem]:
    """What does not fit the base; without one, what does not fit within the adapter."""
    adapted, targets = [found.module for found in factors], TargetRule(config.values)
    if base is None:
        return list(target_problems(targets, adapted, adapted, "the adapter file"))
    modules = _base_modules(base, rule)
    return [
        *fit_problems(factors, base, config),
        *target_problems(targets, adapted, modules, "the base"),
        *coverage_problems(targets, adapted, modules),
    ]


def _measure(
    file: TensorFile,
    module: str,
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
        update_norm=_update_norm(read.get("A"), read.get("B"), scaling),
        non_finite=sum(int((~torch.isfinite(value)).sum()) for value in values),
        dead=any(not bool(value.any()) for value in values),
    )


def _norm(factor: torch.Tensor | None) -> float | None:
    return None if factor is None else _finite(float(torch.linalg.vector_norm(factor)))


def _update_norm(
    A: torch.Tensor | None, B: torch.Tensor | None, scaling: float | None
) -> float | None:
    """‖s B A‖ without forming B A: ‖B A‖² = tr((Bᵀ B)(A Aᵀ)), two r x r matrices in float64."""
    if A is None or B is None or scaling is None or A.ndim != 2 or B.ndim != 2:
        return None
    if A.shape[0] != B.shape[1]:
        return None
    squared = float(((B.T @ B) * (A @ A.T)).sum())
    return _finite(abs(scaling) * math.sqrt(max(0.0, squared))) if squared == squared else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _touched(factors: Sequence[Factors], base: Checkpoint | None) -> dict[str, tuple[int, ...]]:
    """The parameters of the base whose shape B @ A has."""
    touched: dict[str, tuple[int, ...]] = {}
    for found in factors:
        if base is not None and found.parameter is not None and found.delta_shape is not None:
            shape = base.tensors[found.parameter].shape
            if shape in (found.delta_shape, found.delta_shape[::-1]):
                touched[found.parameter] = shape
    return touched


def _refusal(source: str, base: Checkpoint | None, problems: list[Problem]) -> str | None:
    """Why the merge would stop. A reason that is not among the problems yet is put there."""
    if base is not None:
        reason = _try_merge(source, base)
        if reason is not None and not any(problem.severity == ERROR for problem in problems):
            problems.append(Problem("refused", ERROR, reason, "see the message"))
        return reason
    return next((problem.what for problem in problems if problem.severity == ERROR), None)


def _try_merge(source: str, base: Checkpoint) -> str | None:
    """Go through the merge's own checks, and see whether a delta overflows fp32."""
    try:
        with open_adapter(source, base) as adapter:
            for name in adapter.parameters:
                update = adapter.update(name, torch.device("cpu"))
                if _overflows(update, base.tensors[name]):
                    return f"{name}: its delta overflows fp32; check lora_alpha and the factors"
    except UserError as error:
        return str(error)
    return None


def _overflows(update: Update, info: TensorInfo) -> bool:
    """True if the delta has values beyond fp32; computed only where a bound cannot exclude it."""
    if not info.elements:
        return False
    if not isinstance(update, LowRank):
        return not _finite_delta(update, info)
    rows = float(torch.linalg.vector_norm(update.B.double(), dim=1).max())
    columns = float(torch.linalg.vector_norm(update.A.double(), dim=0).max())
    scaling = abs(update.scaling)
    if rows * columns * max(1.0, scaling) < _FP32_LARGEST / 2 and scaling < _FP32_LARGEST:
        return False
    return not _finite_delta(update, info)


def _finite_delta(update: Update, info: TensorInfo) -> bool:
    return all(
        bool(torch.isfinite(update.delta(start, stop)).all())
        for start, stop in row_blocks(info, _BLOCK_ELEMENTS)
    )


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it: scalars, lists and mappings of scalars, or else its type."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list) and all(isinstance(item, (str, int)) for item in value):
        return value
    if isinstance(value, dict) and all(isinstance(item, (str, int)) for item in value.values()):
        return value
    return f"({type(value).__name__})"
