"""Causes for what no simple mistake of merging explains, from a few parameters taken apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.compare import ParameterResult
from taskvec.diagnosis.case import Case
from taskvec.diagnosis.cause import Cause, counted, named, whole
from taskvec.diagnosis.findings import Findings
from taskvec.diagnosis.quantised import Quantised, quantised
from taskvec.diagnosis.remainder import (
    ADDITIONAL,
    CUT,
    FURTHER,
    GONE,
    MIXED,
    OTHER,
    RESCALED,
    TRUNCATED,
    UNRELATED,
    Remainder,
    Slope,
    adapted_remainder,
    pooled_slope,
    relative_change,
    unadapted_remainder,
)
from taskvec.wording import percent

_SAMPLE = 3  # parameters of each sort whose singular values are looked at
_NEARLY_ALL = 0.9
# Fine-tuning moves weights by some percent of their norm; a model of another training run differs
# by more than the weights themselves.
_OTHER_MODEL = 0.2
_RELATED = 0.5  # checkpoints of one training share most of their subspace


def remaining_causes(case: Case, findings: Findings) -> list[Cause]:
    """Causes for the parameters in ``findings.rest`` and ``findings.changed``."""
    if not findings.rest and not findings.changed:
        return []
    slope = pooled_slope(findings.rest)
    adapted = [
        adapted_remainder(case, result, result.comparison, slope)
        for result in _sample(findings.rest)
        if result.comparison is not None
    ]
    unadapted = [unadapted_remainder(case, result) for result in _sample(findings.changed)]
    if any(found.kind in (FURTHER, UNRELATED) for found in [*adapted, *unadapted]):
        looked_at = [*_sample(findings.rest), *_sample(findings.changed)]
        levels = [quantised(case, result) for result in looked_at if len(result.shape) > 1]
        if 2 * sum(item is not None for item in levels) > len(levels):
            return [_quantised(findings, levels, slope)]
    if _everything_changed(findings) and any(found.kind == FURTHER for found in unadapted):
        return [_other_model(case, findings, slope)]
    return _by_kind(findings, adapted, unadapted, slope)


def _sample(results: Sequence[ParameterResult]) -> list[ParameterResult]:
    """A few of them, matrices before vectors: the first, the last, and some between."""
    chosen = [result for result in results if len(result.shape) > 1] or list(results)
    if len(chosen) <= _SAMPLE:
        return chosen
    step = (len(chosen) - 1) / (_SAMPLE - 1)
    return [chosen[round(index * step)] for index in range(_SAMPLE)]


def _everything_changed(findings: Findings) -> bool:
    """As another base would: no adapted parameter holds, and nearly no other matrix is the base's.

    Vectors count only where there is nothing else: norms and biases that were never trained are
    the same in every model.
    """
    others = [result for result in findings.results if result.comparison is None]
    others = [result for result in others if len(result.shape) > 1] or others
    names = {result.name for result in findings.changed}
    changed = sum(result.name in names for result in others)
    all_changed = 0 < _NEARLY_ALL * len(others) <= changed
    return all_changed and len(findings.rest) >= _NEARLY_ALL * len(findings.adapted)


def _other_model(case: Case, findings: Findings, slope: Slope) -> Cause:
    """All parameters differ: by another base, or by training the whole model.

    The two are the same where the other base is this one, trained: then the tensors cannot tell.
    """
    _absorb_damage(findings)
    sample = _sample(findings.changed)
    change = relative_change(case, sample)
    others = sum(result.comparison is None for result in findings.results)
    what = (
        f"{len(findings.changed)} of {others} parameters that the adapter leaves alone differ from "
        f"the base by more than a cast"
    )
    what += f", by {percent(change)} of their norm" if change is not None else ""
    what += f"; {_presence(slope)}."
    evidence = {
        "changed_parameters": [result.name for result in findings.changed],
        "relative_change": change,
        "relative_change_of": [result.name for result in sample],
        **_slope_evidence(slope),
    }
    weight = len(findings.changed) + len(findings.rest)
    if change is not None and change < _OTHER_MODEL and slope.contained:
        sentence = (
            "All of the model was trained further after the merge, or the adapter was merged into "
            f"a trained version of this base, which looks the same: {what}"
        )
        return Cause("further_training", sentence, evidence, weight)
    return Cause("wrong_base", f"Merged into another base: {what}", evidence, weight)


def _absorb_damage(findings: Findings) -> None:
    """Where everything changed, an unadapted parameter with few changes is no damage apart."""
    adapted = set(findings.adapted)
    findings.damage = [outliers for outliers in findings.damage if outliers.name in adapted]


def _quantised(findings: Findings, levels: list[Quantised | None], slope: Slope) -> Cause:
    found = [item for item in levels if item is not None]
    width = max(item.bits for item in found)
    names = [result.name for result in findings.rest]
    others = [result.name for result in findings.changed]
    evidence = {
        "format": f"{width}-bit",
        "parameters": names,
        "unadapted_parameters": others,
        **_slope_evidence(slope),
    }
    weight = len(names) + len(others)
    seen = f"{len(found)} of {len(levels)} parameters that were looked at take"
    levels_of = f"as few values as weights that were stored in {width} bits"
    if any(item.merged for item in found):
        sentence = (
            f"The merged model was quantised, and stored as {findings.format.name} again: {seen} "
            f"{levels_of}; {_presence(slope)}."
        )
        return Cause("quantised", sentence, evidence, weight)
    sentence = (
        f"Merged from a lower-precision base: without the delta, {seen} {levels_of}; "
        f"{_presence(slope)}."
    )
    return Cause("lower_precision_base", sentence, evidence, weight)


def _presence(slope: Slope) -> str:
    estimate = _estimate(slope)
    if slope.contained:
        return f"the adapter's delta is in it ({estimate})"
    if slope.absent:
        return f"the adapter's delta is not in it ({estimate})"
    return f"whether the adapter's delta is in it cannot be told ({estimate})"


def _estimate(slope: Slope) -> str:
    if math.isinf(slope.error):
        return "the delta is zero"
    return f"slope {slope.value:.3g} ± {slope.error:.2g}"


def _slope_evidence(slope: Slope) -> dict[str, Any]:
    finite = math.isfinite(slope.error)
    return {
        "slope": slope.value if finite else None,
        "slope_standard_error": slope.error if finite else None,
    }


def _by_kind(
    findings: Findings, adapted: list[Remainder], unadapted: list[Remainder], slope: Slope
) -> list[Cause]:
    """One cause for each kind of remainder; what a sample shows is said of all it stands for."""
    absent: list[str] = []
    rest = _names_by_kind(adapted, [result.name for result in findings.rest])
    changed = _names_by_kind(unadapted, [result.name for result in findings.changed])
    for kind in {OTHER, MIXED} & set(rest):  # that other adapter may have further modules,
        changed[kind] = changed.pop(ADDITIONAL, [])
    if OTHER in rest:  # and lack some
        absent, findings.unmerged = list(findings.unmerged), {}
    causes = []
    for kind in dict.fromkeys([*rest, *changed]):
        seen = ADDITIONAL if kind in (OTHER, MIXED) else kind
        found = _Kind(
            kind=kind,
            adapted=[item for item in adapted if item.kind == kind],
            unadapted=[item for item in unadapted if kind in changed and item.kind == seen],
            names=rest.get(kind, []),
            others=changed.get(kind, []),
            slope=slope,
            absent=absent if kind == OTHER else [],
            where=whole(rest.get(kind, []), findings),
        )
        name, sentence = _SENTENCES[kind](found)
        causes.append(Cause(name, sentence, found.evidence, len(found.names) + len(found.others)))
    return causes


@dataclass(frozen=True)
class _Kind:
    """The parameters of one kind of remainder.

    Attributes:
        kind: as `Remainder` has it.
        adapted, unadapted: those that were taken apart.
        names, others: all that they stand for, adapted and unadapted.
        absent: adapted parameters that another adapter leaves alone.
        slope: of all adapted parameters that nothing simple explains.
        where: ``names`` in words.
    """

    kind: str
    adapted: list[Remainder]
    unadapted: list[Remainder]
    names: list[str]
    others: list[str]
    absent: list[str]
    slope: Slope
    where: str

    @property
    def evidence(self) -> dict[str, Any]:
        return {
            "parameters": self.names,
            "unadapted_parameters": self.others,
            **({"unmerged_parameters": self.absent} if self.absent else {}),
            **({"factor": self.slope.value} if self.kind == RESCALED else {}),
            **(_slope_evidence(self.slope) if self.names else {}),
            "sampled": {item.name: item.evidence for item in [*self.adapted, *self.unadapted]},
        }

    @property
    def hold(self) -> str:
        """The verb that goes with ``where``."""
        return "holds" if len(self.names) == 1 else "hold"

    def median(self, key: str) -> float:
        """Over the adapted ones of the sample; 0 where it is undefined for all of them."""
        values = [item.evidence[key] for item in self.adapted if item.evidence[key] is not None]
        return statistics.median(values) if values else 0.0

    def ranks(self, key: str) -> str:
        """The ranks of the sample, as "4" or "4 to 6"."""
        ranks = [item.evidence[key] for item in self.adapted or self.unadapted]
        low, high = min(ranks), max(ranks)
        return f"{low}" if low == high else f"{low} to {high}"


def _names_by_kind(sample: list[Remainder], names: list[str]) -> dict[str, list[str]]:
    kinds = {item.kind for item in sample}
    # A parameter that shows nothing contradicts nothing.
    telling = kinds - {UNRELATED, GONE} or kinds - {UNRELATED} or kinds
    if len(telling) == 1:
        return {telling.pop(): names}
    return {kind: [item.name for item in sample if item.kind == kind] for kind in sorted(kinds)}


def _other_adapter(found: _Kind) -> tuple[str, str]:
    overlap = max((item.evidence["subspace_overlap"] for item in found.adapted), default=0.0)
    related = "an adapter of another training would"
    if overlap > _RELATED:
        related = (
            "another checkpoint of the same training would, or a mix of its factors with another's"
        )
    more = (
        f"; {counted(found.others)} this one leaves alone changed as well" if found.others else ""
    )
    more += f"; {counted(found.absent)} this one changes did not" if found.absent else ""
    return "other_adapter", (
        f"Another adapter was merged: the task vector of {found.where} is of rank "
        f"{found.ranks('rank')}, but no multiple of the delta, with which it shares "
        f"{percent(overlap)} of its subspace, as {related}{more} "
        f"({_estimate(found.slope)})."
    )


def _truncated(found: _Kind) -> tuple[str, str]:
    best = all(item.evidence["best_of_its_rank"] for item in found.adapted)
    how = (
        "It is the delta's best approximation of that rank, as a truncated SVD gives"
        if best
        else "It is not the delta's best approximation of that rank"
    )
    return "truncated", (
        f"The update was cut in rank: the task vector of {found.where} is of rank "
        f"{found.ranks('rank')} and lies in the directions of the delta, which is of rank "
        f"{found.ranks('adapter_rank')}. {how} ({_estimate(found.slope)})."
    )


def _cut(found: _Kind) -> tuple[str, str]:
    return "adapter_truncated", (
        f"The adapter was cut in rank after the merge: beside the delta, which is of rank "
        f"{found.ranks('adapter_rank')}, {found.where} {found.hold} an update of rank "
        f"{found.ranks('rank_without_delta')} that is orthogonal to it and no larger in any "
        "direction, as what a truncated SVD leaves out. Compare with the adapter of the whole rank "
        f"({_estimate(found.slope)})."
    )


def _mixed(found: _Kind) -> tuple[str, str]:
    more = f", and {counted(found.others)} it leaves alone changed" if found.others else ""
    return "additional_adapter", (
        f"A mixture of adapters was merged: {found.where} {found.hold} this one's delta times "
        f"about {found.median('factor'):.3g}, and an update of rank "
        f"{found.ranks('rank_without_delta')} besides{more}."
    )


def _additional_adapter(found: _Kind) -> tuple[str, str]:
    if not found.names:
        return "additional_adapter", (
            f"A further adapter was merged, or this one lacks modules: {named(found.others)}, "
            f"which the adapter leaves alone, changed by an update of rank {found.ranks('rank')}."
        )
    more = f", as do {counted(found.others)} it leaves alone" if found.others else ""
    return "additional_adapter", (
        f"A further adapter was merged as well: beside the delta, {found.where} {found.hold} an "
        f"update of rank {found.ranks('rank_without_delta')}{more} ({_estimate(found.slope)})."
    )


def _rescaled(found: _Kind) -> tuple[str, str]:
    return "scaled", (
        f"The adapter was scaled by about {found.slope.value:.3g} in {found.where}: the task "
        f"vector points where the delta does ({_estimate(found.slope)})."
    )


def _further_training(found: _Kind) -> tuple[str, str]:
    if not found.names:
        return "further_training", (
            f"Trained besides the adapter: {named(found.others)}, which the adapter leaves alone, "
            "changed by more than a cast, and not by an update of low rank."
        )
    more = f"; {counted(found.others)} it leaves alone changed as well" if found.others else ""
    residual = found.median("relative_residual")
    ranks = {item.evidence.get("rank_without_delta") for item in found.adapted}
    rest = "a rest of no low rank"
    if ranks == {0}:
        rest = "a rest of no rank above rounding noise"
    elif None in ranks:  # of what is no matrix of low rank, the rest has not been taken apart
        rest = "a rest"
    return "further_training", (
        f"Trained further after the merge, or merged into a base that differs here: {found.where} "
        f"{found.hold} the delta ({_estimate(found.slope)}) and {rest}, {percent(residual)} of the "
        f"delta's norm{more}."
    )


def _gone(found: _Kind) -> tuple[str, str]:
    return "unknown", (
        f"Not explained: nothing of the delta is to be seen in {found.where} "
        f"({_estimate(found.slope)}), nor is it the base bit for bit: only noise of the size of "
        "rounding is there."
    )


def _unknown(found: _Kind) -> tuple[str, str]:
    residual = found.median("relative_residual")
    return "unknown", (
        f"Not explained: {found.where}. The task vector is of no low rank and "
        f"{_presence(found.slope)}; cosine {found.median('cosine_similarity'):.3g}, residual "
        f"{percent(residual)} of the delta's norm. It is not the base, not the delta times a "
        "factor or transposed, not a merge in a lower precision, and not another adapter's."
    )


_SENTENCES = {
    OTHER: _other_adapter,
    MIXED: _mixed,
    TRUNCATED: _truncated,
    CUT: _cut,
    ADDITIONAL: _additional_adapter,
    RESCALED: _rescaled,
    FURTHER: _further_training,
    GONE: _gone,
    UNRELATED: _unknown,
}
