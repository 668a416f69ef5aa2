"""What is wrong with each parameter that fails its certificate, one parameter at a time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from taskvec.compare import UNEXPLAINED, Comparison, ParameterResult
from taskvec.diagnosis.case import Case, unmerged_as
from taskvec.diagnosis.casts import rounded_otherwise
from taskvec.diagnosis.copies import Copy, rounded_copies
from taskvec.diagnosis.factors import FactorTest, factor_test, misplaced_from, shared_with
from taskvec.diagnosis.magnitudes import misapplied
from taskvec.diagnosis.merges import Agreement, WrongMerge, best_merge
from taskvec.diagnosis.outliers import (
    Outliers,
    damage_of_unadapted,
    locate,
    non_finite,
    off_the_bits,
    off_the_merge,
    out_of_bounds,
    out_of_interval,
)
from taskvec.diagnosis.partial import PartialMerge, partial_merge
from taskvec.diagnosis.reordered import lines_reordered, weights_elsewhere
from taskvec.diagnosis.rescaled import Rescaled, rescaled, rescaled_alike
from taskvec.rounding import FP32, Format
from taskvec.verdict import adapted, judge

# Where no recipe reproduces the others: so few elements so near to their bounds tell nothing, and
# damage to scattered elements has to be so far out.
_FEW, _NEAR, _FAR = 16, 2.0, 8.0


@dataclass
class Findings:
    """The failing parameters, sorted by what is wrong with them.

    Attributes:
        results: of all parameters.
        format: what the adapted parameters are stored in.
        unmerged: adapted parameters that are the base's, and the roundings on the way.
        merges: adapted parameters that a wrong merge reproduces.
        factors: adapted parameters that are base + c * delta within rounding.
        copies: adapted parameters that the rounding of the adapter after the merge explains.
        maybe_copies: those that it would explain as well as other noise would, and its format.
        misapplied: adapted DoRA parameters, and how their magnitudes were applied.
        rounded_otherwise: parameters that were not rounded to the nearest number, and how.
        rescaled: parameters whose weights were scaled, and how.
        misplaced: adapted parameters that got the update of another one, and whose.
        reordered: parameters that hold the weights of another one, and whose.
        reordered_lines: parameters whose rows or columns, or those of whose update, are in another
            order, and which.
        partial: adapted parameters that took part of their update's elements only.
        zeroed: unadapted parameters of which elements here and there are zero.
        shared: unadapted parameters that got the update of one that they are tied to, and which.
        marginal: adapted parameters with a few elements just outside their bounds.
        rounded: unadapted parameters that were rounded more than once, and to what.
        overflow, damage: elements that stand out.
        undecided: adapted parameters of ``maybe_copies`` that nothing else explains.
        rest: adapted parameters that none of these explains.
        changed: unadapted parameters that none of these explains.
    """

    results: Sequence[ParameterResult]
    format: Format
    unmerged: dict[str, tuple[Format, ...]] = field(default_factory=dict)
    merges: dict[str, Agreement] = field(default_factory=dict)
    factors: dict[str, FactorTest] = field(default_factory=dict)
    copies: dict[str, Copy] = field(default_factory=dict)
    maybe_copies: dict[str, Format] = field(default_factory=dict)
    misapplied: dict[str, str] = field(default_factory=dict)
    rounded_otherwise: dict[str, str] = field(default_factory=dict)
    rescaled: dict[str, Rescaled] = field(default_factory=dict)
    misplaced: dict[str, str] = field(default_factory=dict)
    reordered: dict[str, str] = field(default_factory=dict)
    reordered_lines: dict[str, str] = field(default_factory=dict)
    partial: dict[str, PartialMerge] = field(default_factory=dict)
    zeroed: list[Outliers] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    marginal: list[ParameterResult] = field(default_factory=list)
    rounded: dict[str, tuple[Format, ...]] = field(default_factory=dict)
    overflow: list[Outliers] = field(default_factory=list)
    damage: list[Outliers] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    rest: list[ParameterResult] = field(default_factory=list)
    changed: list[ParameterResult] = field(default_factory=list)

    @property
    def adapted(self) -> list[str]:
        """Names of all parameters that the adapter changes."""
        return [result.name for result, _ in adapted(self.results)]

    def hidden_copy(self, name: str) -> bool:
        """Whether the merge's rounding to 16 bits may hide that of the adapter."""
        return name in self.maybe_copies and self.format is not FP32

    def scaling(self, name: str) -> float | None:
        """s of an adapted parameter; None where nothing is scaled."""
        return next(found.scaling for result, found in adapted(self.results) if result.name == name)


def examine(case: Case, results: Sequence[ParameterResult]) -> Findings:
    """Test every failing parameter."""
    pairs = adapted(results)
    isolated = set(judge(results).isolated)
    findings = Findings(results, case.format)
    off = [(r, c) for r, c in pairs if c.certificate.tally.violations or r.name in isolated]
    others = [r for r in results if r.comparison is None and r.kind == UNEXPLAINED]
    findings.rounded_otherwise = rounded_otherwise(case, [*(r for r, _ in off), *others])
    for result, _ in pairs:
        if result.task_vector.non_finite:
            _sort_non_finite(case, result, findings)
    off = [(r, c) for r, c in off if r.name not in findings.rounded_otherwise]
    copies, findings.maybe_copies = rounded_copies(case, off)
    for result, comparison in off:
        _examine_adapted(case, result, comparison, copies.get(result.name), findings)
    _find_misplaced(case, findings)
    for result in others:
        if result.name not in findings.rounded_otherwise:
            _examine_unadapted(case, result, findings)
    _find_rescaled(case, others, findings)
    _find_reordered(case, findings)
    findings.undecided += [r.name for r in findings.rest if r.name in findings.maybe_copies]
    findings.rest = [r for r in findings.rest if r.name not in findings.maybe_copies]
    return findings


def _find_rescaled(case: Case, others: Sequence[ParameterResult], findings: Findings) -> None:
    """Where weights were scaled as a whole, take what is left of vectors for that."""
    factors = [item.of_base for item in findings.rescaled.values() if item.lines is None]
    if not factors:
        return
    by, apart = statistics.median(factors), {result.name for result in findings.changed}
    apart |= {outliers.name for outliers in findings.damage}
    for result in others:
        alike = len(result.shape) == 1 and result.name in apart
        if alike and (scaled := rescaled_alike(case, result, by)):
            findings.rescaled[result.name] = scaled
    findings.damage = [o for o in findings.damage if o.name not in findings.rescaled]
    findings.changed = [r for r in findings.changed if r.name not in findings.rescaled]


def _find_misplaced(case: Case, findings: Findings) -> None:
    """Try other parameters' updates, on all that is left if they explain the first of it."""
    rest, findings.rest = findings.rest, []
    for result in rest:
        first_failed = findings.rest and not findings.misplaced
        if result.comparison is None or first_failed:
            findings.rest.append(result)
        elif source := misplaced_from(case, result, result.comparison):
            findings.misplaced[result.name] = source
        else:
            findings.rest.append(result)


def _find_reordered(case: Case, findings: Findings) -> None:
    """Take out of what is left the parameters with the weights, or rows, of another place."""
    findings.reordered = weights_elsewhere(case, [*findings.changed, *findings.rest])
    for result in [*findings.changed, *findings.rest]:
        if result.name not in findings.reordered and (what := lines_reordered(case, result)):
            findings.reordered_lines[result.name] = what
    explained = {*findings.reordered, *findings.reordered_lines}
    findings.rest = [r for r in findings.rest if r.name not in explained]
    findings.changed = [r for r in findings.changed if r.name not in explained]


def _sort_non_finite(case: Case, result: ParameterResult, findings: Findings) -> None:
    overflow, damage = non_finite(case, result)
    findings.overflow += [overflow] if overflow.count else []
    findings.damage += [damage] if damage.count else []


def _examine_adapted(
    case: Case,
    result: ParameterResult,
    comparison: Comparison,
    copy: Copy | None,
    findings: Findings,
) -> None:
    chain = unmerged_as(case, result.name)
    if chain is not None:
        findings.unmerged[result.name] = chain
        return
    agreement = best_merge(case, result, comparison)
    if agreement is not None and agreement.merge.wrong:
        # Where many bits are missed all the same, a factor that no bit contradicts comes first.
        test = None if agreement.clean else factor_test(case, result, comparison)
        if test is not None:
            findings.factors[result.name] = test
        else:
            findings.merges[result.name] = agreement
        return
    tally = comparison.certificate.tally
    if copy is not None:
        findings.copies[result.name] = copy
        return
    if agreement is not None and agreement.clean:
        outliers = _off_the_merge(case, result, comparison, agreement.merge)
        if not outliers.count:
            findings.marginal.append(result)
            return
        if findings.hidden_copy(result.name) and not (outliers.clipped or outliers.together):
            findings.undecided.append(result.name)
            return
        if outliers.clipped or outliers.few or outliers.together:
            findings.damage.append(outliers)
            return
        if part := partial_merge(case, result, comparison):
            findings.partial[result.name] = part
            return
    elif tally.violations <= _FEW and tally.max_ratio <= _NEAR:
        findings.marginal.append(result)
        return
    elif test := factor_test(case, result, comparison):
        findings.factors[result.name] = test
        return
    elif how := misapplied(case, result, comparison):
        findings.misapplied[result.name] = how
        return
    elif scaled := rescaled(case, result):
        findings.rescaled[result.name] = scaled
        return
    elif part := partial_merge(case, result, comparison):
        findings.partial[result.name] = part
        return
    elif 2 * tally.violations <= result.elements:
        finder = out_of_bounds(case, result, comparison)
        outliers = locate(case, result.name, finder)
        far = outliers.few and tally.max_ratio >= _FAR
        if outliers.clipped or outliers.together or far:
            findings.damage.append(outliers)
            return
        if outliers.count <= _FEW:
            findings.marginal.append(result)
            return
    findings.rest.append(result)


def _off_the_merge(
    case: Case, result: ParameterResult, comparison: Comparison, merge: WrongMerge
) -> Outliers:
    """The elements that a merge does not give; where some stand out from a recipe, those."""
    certificate = comparison.certificate
    best = certificate.best_recipe
    if certificate.isolated and certificate.isolated == best.mismatches:
        exact = replace(merge, recipe=best.recipe)
        outliers = locate(case, result.name, off_the_bits(case, result, exact))
        if outliers.count == certificate.isolated:
            return replace(outliers, recipe=best.recipe.name)
    found = locate(case, result.name, off_the_merge(case, result, comparison, merge))
    if certificate.isolated and not found.count:  # then those that the certificate counted
        for anywhere in (True, False):
            finder = out_of_interval(case, result, best.recipe, rounded_anywhere=anywhere)
            outliers = locate(case, result.name, finder)
            if outliers.count == certificate.isolated:
                return outliers
    return found


def _examine_unadapted(case: Case, result: ParameterResult, findings: Findings) -> None:
    if result.task_vector.non_finite:
        _sort_non_finite(case, result, findings)
    chain = unmerged_as(case, result.name)
    if chain is not None:  # as it should be, but for what is not finite, or rounded twice
        if chain not in ((), (case.format_of(result.name),)):
            findings.rounded[result.name] = chain
        return
    if scaled := rescaled(case, result):
        findings.rescaled[result.name] = scaled
        return
    outliers = damage_of_unadapted(case, result.name)
    if outliers.sparse_zeros:
        findings.zeroed.append(outliers)
    elif outliers.clipped or outliers.few or outliers.together:
        findings.damage += [outliers] if outliers.count else []
    elif source := shared_with(case, result):
        findings.shared[result.name] = source
    else:
        findings.changed.append(result)
