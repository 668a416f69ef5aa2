"""A whole task vector to an adapter: what becomes of each parameter, and why.

lora         factors B and A; of a stack of matrices, such as experts', for each of them
bias         the new value, stored with the adapter (PEFT: bias = "all")
saved        the new value, its module being saved whole (PEFT: modules_to_save)
unchanged    T is zero
artifact     T is the base's own rounding to the format of the merged model, bit for bit
below_floor  nothing in T stands above the rounding noise
left_out     none of these; the reason says why
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from taskvec.adapter import Adapter
from taskvec.arithmetic.apply import add_scaled
from taskvec.cli import UserError
from taskvec.compare import CAST, Magnitude, attribute_parameter, read_blocks
from taskvec.lowrank.adapterfiles import AdapterFiles
from taskvec.lowrank.factors import Factors, factorise
from taskvec.lowrank.floor import FORMATS_FLOOR
from taskvec.lowrank.layout import CONV1D, OTHER, WHOLE, Layout, Parameter, model_layout
from taskvec.lowrank.stacks import Stack, apart, described_stack, interleaved, magnitude_of
from taskvec.rounding import FP32
from taskvec.subject import Subject

if TYPE_CHECKING:
    from tqdm import tqdm

LORA, BIAS, SAVED = "lora", "bias", "saved"
UNCHANGED, ARTIFACT, BELOW_FLOOR, LEFT_OUT = "unchanged", "artifact", "below_floor", "left_out"

Entry = dict[str, Any]


@dataclass
class Conversion:
    """Turns the parameters of a task vector into an adapter, one by one.

    Args:
        subject: the task vector, and the base where there is one.
        files: takes what becomes part of the adapter.
        rank: of every module; None for what stands above the noise,
        most: and no more than this.
        truth: the adapter that was merged, to compare with; None if nobody has it.
        device: where the arithmetic runs.
    """

    subject: Subject
    layout: Layout
    files: AdapterFiles
    rank: int | None
    most: int | None
    truth: Adapter | None
    device: torch.device

    def parameter(self, name: str) -> Entry:
        """Find out what becomes of a parameter and do it; ready for JSON."""
        stack = self.layout.stacks.get(name)
        if stack is None:
            magnitude, artifact = self._measure(name)
            shape = self.subject.tensors[name].shape
        else:
            magnitude, artifact = magnitude_of(self.subject, stack.tensors, self.device)
            shape = stack.shape
        entry: Entry = {"shape": list(shape), "norm": magnitude.norm, "treatment": UNCHANGED}
        if magnitude.non_finite:
            raise UserError(f"{self.subject.vector.source}: {name}: holds NaN or infinity")
        if not magnitude.nonzero:
            return entry
        if artifact:
            return entry | {"treatment": ARTIFACT}
        place = self.layout.parameters.get(name)
        if place is None:
            reason = "the model has no parameter of this name in memory"
            return entry | {"treatment": LEFT_OUT, "reason": reason}
        if stack is not None:
            return entry | self._each_low_rank(name, stack, place)
        matrix = len(entry["shape"]) == 2 and min(entry["shape"]) > 0
        if place.kind != OTHER and place.leaf == "weight" and matrix:
            return entry | self._low_rank(name, place)
        return entry | self._whole(name, place)

    def _measure(self, name: str) -> tuple[Magnitude, bool]:
        """How large T is, and whether it is nothing but the base's own rounding."""
        if self.subject.base is None:
            return self.subject.measure(name, self.device), False
        result = attribute_parameter(self.subject.base, self.subject.vector, name, self.device)
        return result.task_vector, result.kind == CAST

    def _low_rank(self, name: str, place: Parameter) -> Entry:
        factors = factorise(self.subject, [name], self.device, self.rank, self.most)
        found = _described(factors)
        if not _is_signal(factors):
            return {"treatment": BELOW_FLOOR, **found}
        self.files.add_factors(place, factors)
        if self.truth is not None and name in self.truth.scalings:
            found |= self._beside_the_truth(name, factors, self.truth)
        return {"treatment": LORA, **found}

    def _each_low_rank(self, name: str, stack: Stack, place: Parameter) -> Entry:
        """Factors of every matrix of a stack that has any above the noise."""
        if any(other.kind == CONV1D for other in self.layout.parameters.values()):
            return {"treatment": LEFT_OUT, "reason": "PEFT adapts no stacks beside GPT-2's Conv1D"}
        if self._has_changed_others(place):
            return self._whole(name, place)
        subject = apart(self.subject, stack)
        factors: list[Factors | None] = []
        norms = []
        for names in stack.matrices:
            magnitude, artifact = magnitude_of(subject, names, self.device)
            real = magnitude.nonzero and not artifact
            ranks = self.rank, self.most
            factors.append(factorise(subject, names, self.device, *ranks) if real else None)
            norms.append(magnitude.norm)
        if not any(factors):
            return {"treatment": ARTIFACT}
        kept = [own if own is not None and _is_signal(own) else None for own in factors]
        found = described_stack(factors, kept, norms)
        if not any(kept):
            return {"treatment": BELOW_FLOOR, **found}
        self.files.add_stack(place, interleaved(kept, stack.shape, place.transposed))
        return {"treatment": LORA, **found}

    def _has_changed_others(self, place: Parameter) -> bool:
        """Whether a stack's module has parameters that changed and are no stacks."""
        for name, other in self.layout.parameters.items():
            if other.module == place.module and other.kind == OTHER:
                magnitude, artifact = self._measure(name)
                if magnitude.nonzero and not artifact:
                    return True
        return False

    def _beside_the_truth(self, name: str, factors: Factors, truth: Adapter) -> Entry:
        """How far the recovered delta, and T itself, are from the delta that was merged."""
        update = truth.update(name, self.device)
        left, right = (factor.to(self.device).double() for factor in (factors.left, factors.right))
        recovered = merged = size = 0.0
        for start, rows in self.subject.blocks(name, self.device):
            stop = start + rows.shape[0]
            delta = update.exact(start, stop)
            size += float((delta**2).sum())
            recovered += float(((left[start:stop] @ right - delta) ** 2).sum())
            merged += float(((rows.double() - delta) ** 2).sum())
        return {
            "true_rank": update.rank,
            "true_norm": math.sqrt(size),
            "recovered_error": math.sqrt(recovered / size) if size else None,
            "task_vector_error": math.sqrt(merged / size) if size else None,
        }

    def _whole(self, name: str, place: Parameter) -> Entry:
        """What is no matrix of a module that LoRA knows."""
        reason = self._why_not(name, place)
        if reason:
            return {"treatment": LEFT_OUT, "reason": reason}
        if place.kind not in WHOLE:
            self.files.add_bias(place, self._new_value(name))
            return {"treatment": BIAS}
        for other, where in self.layout.parameters.items():
            if where.module == place.module:
                self.files.add_saved(where, self._new_value(other))
        return {"treatment": SAVED}

    def _why_not(self, name: str, place: Parameter) -> str | None:
        """Why a parameter cannot be stored whole; None if it can."""
        if self.subject.base is None:
            return "its new value needs the base: give --base_model"
        if place.kind not in WHOLE:
            if place.leaf == "bias":
                return None
            return f"LoRA has no place for a parameter of shape {self.subject.tensors[name].shape}"
        if name not in self.subject.tensors:
            return f"{place.module} lies in pieces, and has other parameters that changed"
        if place.module in self.layout.parents:
            return f"{place.module or 'the model'} holds other modules, so it is not saved whole"
        stored = {p.leaf for p in self.layout.parameters.values() if p.module == place.module}
        if missing := self.layout.contents[place.module] - stored:
            return f"{place.module} also has {min(missing)}, which the base's files lack"
        for other in (*self.layout.contents, *self.layout.parents):
            if other != place.module and other.endswith(place.module):
                return f"PEFT would take {other} for {place.module} in modules_to_save"
        return None

    def _new_value(self, name: str) -> torch.Tensor:
        """W + T of a parameter, fp32."""
        assert self.subject.base is not None
        info = self.subject.tensors[name]
        rows = [
            add_scaled(block.subtracted, block.task_vector, 1.0, FP32).cpu()
            for block in read_blocks(self.subject.base, self.subject.vector, name, self.device)
        ]
        return torch.cat(rows).view(info.shape) if info.shape else rows[0]


def convert(
    subject: Subject,
    base_model: str | None,
    rank: int | None,
    most: int | None,
    truth: Adapter | None,
    device: torch.device,
    bar: tqdm[Any],
) -> tuple[AdapterFiles, Layout, dict[str, Entry]]:
    """An adapter from a task vector, and what became of every parameter.

    A stack of matrices that the base's file has in pieces is one parameter, by its name in memory.

    Args:
        base_model: what the adapter names as its base.
        rank, most, truth: as `Conversion`.
        bar: advanced by the bytes of the tensors.

    Raises:
        UserError: NaN or infinity; or no matrix has anything above the noise.
    """
    layout = model_layout(subject.base, subject.tensors)
    modules = {parameter.module for parameter in layout.parameters.values()}
    in_memory = {
        f"{module}.{leaf}" for module in layout.contents for leaf in layout.contents[module]
    }
    files = AdapterFiles(base_model, layout.task_type, modules, in_memory)
    conversion = Conversion(subject, layout, files, rank, most, truth, device)
    entries: dict[str, Entry] = {}
    of_stack = {tensor: name for name, stack in layout.stacks.items() for tensor in stack.tensors}
    for tensor, info in subject.tensors.items():
        name = of_stack.get(tensor, tensor)
        if name not in entries:
            entries[name] = conversion.parameter(name)
        bar.update(info.nbytes)
    if not any(entry["treatment"] == LORA for entry in entries.values()):
        raise UserError(
            f"{subject.vector.source}: no matrix has a change above its rounding noise, so there "
            "is nothing to make an adapter of"
        )
    return files, layout, entries


def summarise(entries: dict[str, Entry]) -> Entry:
    """The totals of `convert`, ready for JSON.

    Returns:
        how many parameters were treated how; of the factors, their ranks by frequency, the largest
        relative error ‖T - BA‖ / ‖T‖ and that of all of them together; and ``lost_share``, the
        share of ‖T‖^2 in parameters that were left out or are below the floor; the elements of all
        factors, and of the matrices that they stand for. Beside the adapter
        that was merged also ``truth``: how many ranks are its own, and of all its deltas that were
        recovered together the relative error of the factors and of T.
    """
    counts = Counter(entry["treatment"] for entry in entries.values())
    lora = [entry for entry in entries.values() if entry["treatment"] == LORA]
    squared = math.fsum(entry["norm"] ** 2 for entry in lora)
    error = math.fsum((entry["relative_error"] * entry["norm"]) ** 2 for entry in lora)
    missing = (LEFT_OUT, BELOW_FLOOR)
    lost = math.fsum(e["norm"] ** 2 for e in entries.values() if e["treatment"] in missing)
    real = math.fsum(e["norm"] ** 2 for e in entries.values() if e["treatment"] != ARTIFACT)
    ranks = Counter(entry["rank"] for entry in lora)
    known = [entry for entry in lora if "true_rank" in entry and entry["true_norm"]]
    return {
        "parameters": dict(counts),
        "ranks": {str(rank): ranks[rank] for rank in sorted(ranks)},
        "largest_relative_error": max(entry["relative_error"] for entry in lora),
        "relative_error": math.sqrt(error / squared) if squared else 0.0,
        "lost_share": lost / real if real else 0.0,
        "factor_elements": sum(_factor_elements(entry) for entry in lora),
        "matrix_elements": sum(math.prod(e["shape"]) for e in lora),
        "truth": _truth(known) if known else None,
    }


def _factor_elements(entry: Entry) -> int:
    *stack, m, n = entry["shape"]
    return int(math.prod(stack) * entry["rank"] * (m + n))


def _is_signal(factors: Factors) -> bool:
    """Whether there are any, and more than the noise that the formats explain in them."""
    finding = factors.finding
    return bool(factors.rank) and (finding.rank > 0 or finding.source != FORMATS_FLOOR)


def _truth(known: list[Entry]) -> Entry:
    """The adapter that was merged beside what was recovered of it."""
    squared = math.fsum(entry["true_norm"] ** 2 for entry in known)

    def together(key: str) -> float:
        return math.sqrt(math.fsum((e[key] * e["true_norm"]) ** 2 for e in known) / squared)

    return {
        "parameters": len(known),
        "true_ranks": sum(entry["rank"] == entry["true_rank"] for entry in known),
        "recovered_error": together("recovered_error"),
        "task_vector_error": together("task_vector_error"),
    }


def _described(factors: Factors) -> Entry:
    """What is known of a matrix's factors; singular values, and the noise's largest."""
    finding, norm = factors.finding, factors.norm
    return {
        "rank": factors.rank,
        "rank_above_noise": finding.rank,
        "noise": finding.threshold,
        "noise_from": finding.source,
        "noise_ratio": finding.noise_ratio,
        "weakest_kept": factors.weakest_kept,
        "strongest_left": factors.strongest_left,
        "relative_error": factors.error / norm,
        "optimal_relative_error": None if factors.optimum is None else factors.optimum / norm,
    }
