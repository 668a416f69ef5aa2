"""What is in an adapter file, whether it would merge, and everything that speaks against it.

`open_adapter` stops at the first thing that it cannot do exactly; here all of them are listed. The
verdict is no second opinion: an adapter would merge if `open_adapter` and `Adapter.update`, which
the merge itself uses, take it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taskvec.adapter import open_weights
from taskvec.adapters.attempt import Attempt, try_merge
from taskvec.adapters.config import LoraConfig, load_config
from taskvec.adapters.fit import coverage_problems, fit_problems, target_problems
from taskvec.adapters.keys import BIAS, MAGNITUDE, TOKENS, WHOLE, factor_of, key_of
from taskvec.adapters.measure import measure
from taskvec.adapters.problems import (
    ERROR,
    Factors,
    Problem,
    config_problems,
    rank_problems,
    tensor_problems,
    value_problems,
)
from taskvec.adapters.targets import TargetRule
from taskvec.checkpoint import Checkpoint, locate_adapter
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.names import by_key, naming_rules, pieces, renaming

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
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "init_lora_weights",
)
_BESIDE = {
    MAGNITUDE: "DoRA magnitudes",
    BIAS: "biases of lora_B",
    TOKENS: "sets of token rows",
    WHOLE: "whole tensors",
}


@dataclass(frozen=True)
class AdapterReport:
    """What was found.

    Attributes:
        path: the adapter's directory.
        config: what matters of adapter_config.json.
        base: the base as the user named it; None: the adapter was looked at alone.
        tensors, elements, nbytes: of the adapter file.
        factors: per module, in the order of the file.
        beside: how many tensors there are of other roles, in words.
        touched: shape of each parameter of the base that would change, or that B @ A fits.
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
    beside: dict[str, int]
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
    with open_weights(path) as file:
        attempt = try_merge(source, base) if base is not None else None
        sides = _sides(file.tensors)
        named = {module: _adapted(module, file.tensors, sides[module], config) for module in sides}
        find = _finder(base)
        rule = _naming_rule([name for name, _ in named.values()], base, find)
        factors = [
            measure(file, *named[module], found, config, find(named[module][0], rule))
            for module, found in sides.items()
        ]
        problems = [*config_problems(config), *tensor_problems(file.tensors, config)]
        elements = sum(info.elements for info in file.tensors.values())
        nbytes = sum(info.nbytes for info in file.tensors.values())
        tensors = len(file.tensors)
        roles = [key.role for key in map(key_of, file.tensors) if key is not None]
    problems += [*rank_problems(factors, config), *value_problems(factors)]
    problems += _base_problems(factors, config, rule, base)
    refusal = _refusal(attempt, problems) if base is not None else _first_error(problems)
    return AdapterReport(
        path=path,
        config={key: _plain(config.values.get(key)) for key in _SHOWN_CONFIG},
        base=base.source if base else None,
        tensors=tensors,
        elements=elements,
        nbytes=nbytes,
        factors=factors,
        beside={words: roles.count(role) for role, words in _BESIDE.items() if role in roles},
        touched=_touched(attempt, factors, base),
        base_tensors=len(base.tensors) if base else 0,
        base_elements=sum(info.elements for info in base.tensors.values()) if base else 0,
        problems=sorted(problems, key=lambda problem: problem.severity != ERROR),
        refusal=refusal,
    )


def _adapted(
    module: str, tensors: Mapping[str, TensorInfo], sides: dict[str, TensorInfo], config: LoraConfig
) -> tuple[str, int]:
    """What a pair adapts, a module or a parameter, and how many matrices are stacked in it."""
    plain = module.removesuffix(".base_layer")
    while plain.endswith(".base_layer"):
        plain = plain.removesuffix(".base_layer")
    parameters = config.parameters_of(plain)
    if not parameters:
        return module, 1
    depth = (len(module) - len(plain)) // len(".base_layer")
    name = sorted(parameters)[depth] if depth < len(parameters) else parameters[0]
    try:
        rank, _ = config.scaling(name)
    except UserError:
        return name, 1
    rows = sides["A"].shape[0] if "A" in sides and sides["A"].shape else rank
    return name, max(1, rows // rank)


def _sides(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The factors of each module, by side."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if factor := factor_of(name):
            sides.setdefault(factor[0], {})[factor[1]] = info
    return sides


_Finder = Callable[[str, tuple[str, str]], str | None]


def _naming_rule(modules: Sequence[str], base: Checkpoint | None, find: _Finder) -> tuple[str, str]:
    """Of the ways in which the base may name modules, the one that fits most of them."""
    if base is None:
        return "", ""
    return max(
        naming_rules(modules, base),
        key=lambda rule: sum(find(module, rule) is not None for module in modules),
    )


def _finder(base: Checkpoint | None) -> _Finder:
    """Finds what the base calls the weight of a module, or a parameter; the first of its pieces."""
    if base is None:
        return lambda module, rule: None
    tensors, rename = base.tensors, renaming([], base)
    apart = {fused: found[0].name for fused, found in pieces(base).items()}

    def find(module: str, rule: tuple[str, str]) -> str | None:
        strip, add = rule
        names = (f"{module}.weight", module)
        for name in (*map(rename, names), *names):
            found = add + name.removeprefix(strip)
            if found in tensors or found in apart:
                return apart.get(found, found)
        return None

    return find


def _base_modules(base: Checkpoint, rule: tuple[str, str], adapted: Sequence[str]) -> list[str]:
    """The base's modules that can be adapted, as the adapter would name them.

    That is by what they are called in memory, or in the file where the adapter does so too.
    """
    strip, add = rule

    def modules(names: Iterable[str]) -> list[str]:
        return [
            strip + name.removesuffix(".weight").removeprefix(add)
            for name in names
            if name.endswith(".weight") and name.startswith(add)
        ]

    matrices = {
        key: name for key, name in by_key(base).items() if len(base.tensors[name].shape) > 1
    }
    in_file = modules(matrices.values())
    in_memory = modules(n if key.expert is not None else key.name for key, n in matrices.items())
    return in_file if set(adapted) & (set(in_file) - set(in_memory)) else in_memory


def _base_problems(
    factors: Sequence[Factors],
    config: LoraConfig,
    rule: tuple[str, str],
    base: Checkpoint | None,
) -> list[Problem]:
    """What does not fit the base; without one, what does not fit within the adapter."""
    targets = TargetRule(config.values)
    adapted = [  # what target_parameters names is none of target_modules' business
        found.module
        for found in factors
        if found.module not in config.parameters_of(found.module.rpartition(".")[0])
    ]
    if base is None:
        return list(target_problems(targets, adapted, adapted, "the adapter file"))
    modules = _base_modules(base, rule, adapted)
    return [
        *fit_problems(factors, base, config),
        *target_problems(targets, adapted, modules, "the base"),
        *coverage_problems(targets, adapted, modules),
    ]


def _touched(
    attempt: Attempt | None, factors: Sequence[Factors], base: Checkpoint | None
) -> dict[str, tuple[int, ...]]:
    """The parameters that the merge changes, or would if what is wrong were put right."""
    if base is None:
        return {}
    if attempt is not None and attempt.parameters:
        return {name: base.tensors[name].shape for name in attempt.parameters}
    touched: dict[str, tuple[int, ...]] = {}
    for found in factors:
        if found.parameter is not None and found.delta_shape is not None:
            shape = base.tensors[found.parameter].shape
            if shape in (found.delta_shape, found.delta_shape[::-1]):
                touched[found.parameter] = shape
    return touched


def _refusal(attempt: Attempt | None, problems: list[Problem]) -> str | None:
    """Why the merge would stop. A reason that is not among the problems yet is put there."""
    reason = attempt.reason if attempt else None
    if reason is not None and _first_error(problems) is None:
        problems.append(Problem("refused", ERROR, reason, "see the message"))
    return reason


def _first_error(problems: Sequence[Problem]) -> str | None:
    return next((problem.what for problem in problems if problem.severity == ERROR), None)


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
