"""What can be wrong with a LoRA adapter by itself: every problem of a kind is listed.

What does not fit a base is in `taskvec.adapters.fit`. A problem is an error exactly where
`taskvec.adapter` refuses to merge; what merges, but perhaps not as meant, is a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from taskvec.adapters.config import LoraConfig, refusals
from taskvec.adapters.keys import WHOLE, factor_of, key_of, unknown_key
from taskvec.cli import UserError
from taskvec.header import TensorInfo

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Problem:
    """Something wrong, or worth a look, and what to do about it.

    Attributes:
        kind: its name, stable for programs.
        severity: "error" (it would not merge) or "warning" (it would, perhaps not as meant).
        what, todo: for people.
        names: the tensors or modules concerned; empty where it is the adapter as a whole.
    """

    kind: str
    severity: str
    what: str
    todo: str
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Factors:
    """A module's two factors and what they amount to. Norms are Frobenius; None: not finite.

    Attributes:
        module: as the adapter names it, or the parameter that target_parameters names.
        parameter: what the base calls its weight; None if it has none, or no base was given.
        matrices: how many pairs are stacked in the two, as for the experts of a layer.
        A_shape, B_shape: (r, in) and (out, r), of a convolution (r, in, ...) and (out, r, 1, ...);
            None where a factor is missing.
        rank, scaling: of the configuration; None where it does not say.
        dtypes: of A and B.
        A_norm, B_norm, update_norm: ‖A‖, ‖B‖ and ‖s B A‖.
        non_finite: NaN and infinite values in both.
        dead: a factor is zero everywhere, so that this module would not change.
        embedding: they are an embedding's, which is stored (in, out).
    """

    module: str
    parameter: str | None
    A_shape: tuple[int, ...] | None
    B_shape: tuple[int, ...] | None
    rank: int | None
    scaling: float | None
    dtypes: list[str]
    A_norm: float | None
    B_norm: float | None
    update_norm: float | None
    non_finite: int
    dead: bool
    matrices: int = 1
    embedding: bool = False

    @property
    def delta_shape(self) -> tuple[int, int] | None:
        """(out, in) of B @ A; None where that is not defined, or is not the shape of a weight."""
        if self.A_shape is None or self.B_shape is None:
            return None
        if len(self.A_shape) != 2 or len(self.B_shape) != 2 or self.matrices > 1:
            return None
        return self.B_shape[0], self.A_shape[1]


def config_problems(config: LoraConfig) -> Iterator[Problem]:
    """Settings that make this something else than a LoRA adapter that can be merged."""
    for reason in refusals(config):
        what, _, todo = reason.partition("; ")
        yield Problem(
            "config",
            ERROR,
            f"{config.file.name}: {what}",
            todo or "PEFT's merge_and_unload() may know this kind",
        )


def tensor_problems(tensors: Mapping[str, TensorInfo], config: LoraConfig) -> Iterator[Problem]:
    """Tensors that are not understood, and factors without a partner."""
    keys = {name: key_of(name) for name in tensors}
    strange = [
        name
        for name, key in keys.items()
        if key is None or (key.role == WHOLE and not config.explains(key.module))
    ]
    yield from grouped("unknown-key", ERROR, ((*unknown_key(name), name) for name in strange))
    factors = {factor: name for name in tensors if (factor := factor_of(name))}
    if not tensors or len(strange) == len(tensors):
        yield Problem(
            "no-factors",
            ERROR,
            "holds no LoRA factors",
            "write the adapter with PEFT's save_pretrained()",
        )
    yield from grouped(
        "no-factor-shape",
        ERROR,
        (
            (
                f"{dtype_name(tensors[name])} {tensors[name].shape} is no LoRA factor, which is a "
                "float matrix or kernel",
                "write the adapter with PEFT's save_pretrained()",
                name,
            )
            for name in factors.values()
            if not tensors[name].is_float or len(tensors[name].shape) < 2
        ),
    )
    for side, other in (("A", "B"), ("B", "A")):
        alone = [m for m, s in factors if s == side and (m, other) not in factors]
        if alone:
            yield Problem(
                "no-partner",
                ERROR,
                f"modules have lora_{side} but no lora_{other}",
                "the file is incomplete; save or download it again",
                alone,
            )


def rank_problems(factors: Iterable[Factors], config: LoraConfig) -> Iterator[Problem]:
    """Ranks and scalings that the configuration does not give, or that the tensors contradict."""
    invalid, wrong, zero = [], [], []
    for found in factors:
        try:
            rank, scaling = config.scaling(found.module)
        except UserError as error:
            reason = str(error).removeprefix(f"{config.file}: ").replace(found.module, "a module")
            invalid.append((reason, f"correct {config.file.name}", found.module))
            continue
        if scaling == 0:
            zero.append(("the scaling is 0, so nothing changes", "check lora_alpha", found.module))
        if found.A_shape is None or found.B_shape is None:
            continue
        if len(found.A_shape) < 2 or len(found.B_shape) < 2:
            continue
        ranks = found.A_shape[0] // found.matrices, found.B_shape[1] // found.matrices
        if ranks != (rank, rank):
            what = (
                f"lora_A has rank {ranks[0]} and lora_B {ranks[1]}, but {config.file.name} says "
                f"{rank}"
            )
            todo = (
                f"set r or rank_pattern to {ranks[0]} and check lora_alpha: the scaling is alpha / "
                "r (rsLoRA: alpha / sqrt(r))"
                if ranks[0] == ranks[1]
                else "the file is damaged or mixes two adapters; save it again"
            )
            wrong.append((what, todo, found.module))
    yield from grouped("scaling", ERROR, invalid)
    yield from grouped("rank", ERROR, wrong)
    yield from grouped("zero-scaling", WARNING, zero)


def value_problems(factors: Sequence[Factors]) -> Iterator[Problem]:
    """Values that are not finite, and pairs that change nothing."""
    broken = [found for found in factors if found.non_finite]
    if broken:
        yield Problem(
            "non-finite",
            ERROR,
            f"{sum(found.non_finite for found in broken)} values are NaN or infinite",
            "the training diverged or the file is damaged; take an earlier checkpoint",
            [found.module for found in broken],
        )
    dead = [found.module for found in factors if found.dead]
    if dead:
        every = len(dead) == len(factors)
        yield Problem(
            "dead",
            WARNING,
            "every pair is zero, so the merged model would be the base"
            if every
            else "pairs are zero (B or A is 0), so these modules would not change",
            "the adapter is untrained, or these modules were frozen in training",
            dead,
        )


def grouped(kind: str, severity: str, found: Iterable[tuple[str, str, str]]) -> Iterator[Problem]:
    """One problem for all names that have the same thing wrong with them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for what, todo, name in found:
        groups.setdefault((what, todo), []).append(name)
    for (what, todo), names in groups.items():
        yield Problem(kind, severity, what, todo, names)


def dtype_name(info: TensorInfo) -> str:
    """A tensor's dtype without its module: ``float32``."""
    return str(info.dtype).removeprefix("torch.")
