"""What does not fit between a LoRA adapter and a base: every problem of a kind is listed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from taskvec.adapters.config import LoraConfig
from taskvec.adapters.keys import PREFIX
from taskvec.adapters.problems import ERROR, WARNING, Factors, Problem, dtype_name, grouped
from taskvec.adapters.targets import TargetRule
from taskvec.architecture import fold_numbers, layer_split, template
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError

_MOST_NEAREST = 50  # so that a file of nothing but strange names does not take hours


def fit_problems(
    factors: Sequence[Factors], base: Checkpoint, config: LoraConfig
) -> Iterator[Problem]:
    """Everything that does not fit the base."""
    try:
        base.refuse_quantised()
    except UserError as error:
        what, _, todo = str(error).partition("; ")
        yield Problem("quantised-base", ERROR, what, todo)
        return  # its packed weights have other shapes, which says nothing about the adapter
    named = config.values.get("base_model_name_or_path")
    if isinstance(named, str) and named and not _same_name(named, base.source):
        yield Problem(
            "base-name",
            WARNING,
            f"{config.file.name} names {named} as its base, and this is {base.source}",
            "make sure that they are the same model",
        )
    trained_on = f" ({config.file.name} names {named})" if isinstance(named, str) else ""
    yield from _missing_modules(factors, base, trained_on)
    other, unfit = [], []
    for found in factors:
        if found.parameter is None or found.delta_shape is None:
            continue
        info = base.tensors[found.parameter]
        if info.shape not in (found.delta_shape, found.delta_shape[::-1]):
            what = f"B @ A is {found.delta_shape}, but the base's weight is {info.shape}"
            todo = f"use the base that it was trained on{trained_on}"
            unfit.append((what, todo, found.module))
        elif not info.is_float:
            what = f"the base's weight is {dtype_name(info)}, not a float"
            other.append((what, "use the unquantised base", found.module))
    yield from grouped("shape", ERROR, unfit)
    yield from grouped("not-a-float", ERROR, other)
    yield from _orientation_problem(factors, base, config)


def target_problems(
    rule: TargetRule, adapted: Sequence[str], candidates: Sequence[str], where: str
) -> Iterator[Problem]:
    """Where ``target_modules`` and the tensors disagree about what is adapted.

    Args:
        rule: of the configuration.
        adapted: modules that have factors.
        candidates: modules that an entry may name: the base's, or the file's if no base is given.
        where: what the candidates are, for people.
    """
    for name in rule.names:
        if not any(f".{module}".endswith(f".{name}") for module in candidates):
            yield Problem(
                "target-unmatched",
                WARNING,
                f"target_modules names {name}, which is no module of {where}",
                f"did you mean {_nearest_end(name, candidates)}?"
                if candidates
                else "check target_modules",
            )
    if rule.expression is not None and not any(map(rule.selects, candidates)):
        yield Problem(
            "target-unmatched",
            WARNING,
            f"target_modules is {rule.expression!r}, which matches no module of {where}",
            "check the expression: it must match the full name",
        )
    extra = [module for module in adapted if rule.is_known and not rule.selects(module)]
    if extra:
        yield Problem(
            "untargeted",
            WARNING,
            "modules have factors although target_modules does not select them",
            "they would be merged all the same: check that file and configuration belong together",
            extra,
        )


def coverage_problems(
    rule: TargetRule, adapted: Sequence[str], modules: Sequence[str]
) -> Iterator[Problem]:
    """Modules of the base that ``target_modules`` selects, but that have no factors."""
    missing = sorted(set(modules) - set(adapted), key=list(modules).index)
    selected = [module for module in missing if rule.selects(module)]
    if selected and rule.is_known:
        yield Problem(
            "not-adapted",
            WARNING,
            "target_modules selects modules of the base that have no factors in the file",
            "they would stay as they are: check that the file is complete",
            selected,
        )


def _missing_modules(
    factors: Sequence[Factors], base: Checkpoint, trained_on: str
) -> Iterator[Problem]:
    """Modules that the base has not got, each with the nearest that it has."""
    missing = [found.module for found in factors if found.parameter is None]
    templates: dict[str, list[str]] = {}
    for name in base.tensors:
        if name.endswith(".weight"):
            templates.setdefault(_open(name), []).append(name)
    nearest: dict[str, str] = {}
    problems = []
    for module in missing:
        name = _open(f"{module}.weight")
        if name in templates:
            layers = {where[1] for full in templates[name] if (where := layer_split(full))}
            what = f"the base has layers {fold_numbers(layers)} only"
            todo = f"use the base that it was trained on{trained_on}"
        elif module.split(".")[-1] == "lm_head":
            what = "the base's files hold no lm_head, and no embedding that it is tied to"
            todo = "use a base that was saved with its head"
        else:
            if templates and name not in nearest and len(nearest) < _MOST_NEAREST:
                near = difflib.get_close_matches(name, templates, n=1, cutoff=0.0)
                nearest[name] = f"; the nearest is {near[0].removesuffix('.weight')}"
            what = f"the base has no such module{nearest.get(name, '')}"
            todo = (
                f"the prefix {PREFIX} stands twice in the keys: take one of them out"
                if module.startswith(PREFIX)
                else f"the adapter is for another architecture: use its own base{trained_on}"
                if len(missing) == len(factors)
                else "rename the tensors if that is what they are for"
            )
        problems.append((what, todo, module))
    yield from grouped("no-module", ERROR, problems)


def _orientation_problem(
    factors: Sequence[Factors], base: Checkpoint, config: LoraConfig
) -> Iterator[Problem]:
    """A square weight's orientation follows fan_in_fan_out, unless rectangular ones contradict."""
    shown, square = set(), []
    for found in factors:
        shape = found.delta_shape
        if found.parameter is None or shape is None or found.embedding:
            continue
        stored = base.tensors[found.parameter].shape
        if shape[0] == shape[1] == stored[0]:
            square.append(found.module)
        elif stored in (shape, shape[::-1]):
            shown.add(stored != shape)
    if square and shown and config.fan_in_fan_out not in shown:
        yield Problem(
            "orientation",
            ERROR,
            f"fan_in_fan_out is {config.fan_in_fan_out}, but the rectangular weights say "
            "otherwise, so the orientation of the square ones is not known",
            f"correct fan_in_fan_out in {config.file.name}",
            square,
        )


def _open(name: str) -> str:
    """A name with its numbers left open: ``model.layers.#.self_attn.q_proj``."""
    return ".".join("#" if part is None else part for part in template(name))


def _nearest_end(name: str, modules: Sequence[str]) -> str:
    """The end of a module's name, of as many parts, that is nearest to a name."""
    parts = name.count(".") + 1
    ends = dict.fromkeys(".".join(module.split(".")[-parts:]) for module in modules)
    near: list[str] = difflib.get_close_matches(name, ends, n=1, cutoff=0.0)
    return near[0]


def _same_name(named: str, source: str) -> bool:
    """True if a path could well be the model of that name: its own, or the hub cache's folder."""
    last = Path(named).name.lower()
    parts = [part.lower() for part in Path(source).resolve().parts] + [source.lower()]
    return any(part == last or part.endswith((f"--{last}", f"/{last}")) for part in parts)
