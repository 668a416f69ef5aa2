"""From the findings about every parameter to one verdict with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from taskvec.architecture import fold_names
from taskvec.certificate import common_recipes
from taskvec.compare import CAST, KINDS, UNEXPLAINED, Comparison, ParameterResult
from taskvec.recipes import RecipeTally
from taskvec.rounding import RECIPES
from taskvec.wording import are, listed, percent

_HANDFUL = 4  # of elements are named one by one

EXACT, ROUNDING, VIOLATED, INCOMPLETE = "exact", "rounding", "violated", "incomplete"


@dataclass(frozen=True)
class Verdict:
    """What the certificate says of the whole model.

    Attributes:
        name: exact, rounding, violated or incomplete.
        reason: one line.
        recipes: the recipes that reproduce every bit of every adapted parameter.
        violated: adapted parameters with elements out of bounds, NaN or infinity.
        missing: adapted parameters that the task vector lacks, or holds as zeros wrongly.
        isolated: parameters that a recipe gives bit for bit but for a few elements, which no
            rounding on the way explains.
        unexplained: parameters that changed though neither adapter nor cast explains it.
    """

    name: str
    reason: str
    recipes: list[str]
    violated: list[str]
    missing: list[str]
    isolated: list[str]
    unexplained: list[str]

    @property
    def holds(self) -> bool:
        return self.name in (EXACT, ROUNDING)


@dataclass(frozen=True)
class Cost:
    """What rounding cost, over all adapted parameters.

    Attributes:
        relative_error: ‖T - delta‖ / ‖delta‖, of what is finite; None where delta is zero.
        lost_share: share of the elements with an update whose merged value did not move at all.
        snr_db: 20 log10(‖delta‖ / ‖T - delta‖); None where nothing was lost.
        sentence: the same in words.
    """

    relative_error: float | None
    lost_share: float
    snr_db: float | None
    sentence: str


def adapted(results: Sequence[ParameterResult]) -> list[tuple[ParameterResult, Comparison]]:
    """The parameters that the adapter changes."""
    return [(result, result.comparison) for result in results if result.comparison is not None]


def judge(results: Sequence[ParameterResult]) -> Verdict:
    """The verdict over all parameters of a model."""
    pairs = adapted(results)
    missing = [result.name for result, _ in pairs if result.missing]
    violated = [
        result.name
        for result, comparison in pairs
        if comparison.certificate.violations and result.name not in missing
    ]
    isolated = [
        result.name
        for result, comparison in pairs
        if comparison.certificate.isolated and result.name not in [*violated, *missing]
    ]
    unexplained = [
        result.name
        for result in results
        if result.comparison is None and result.kind == UNEXPLAINED
    ]
    recipes = common_recipes([comparison.certificate for _, comparison in pairs])
    exact = all(comparison.certificate.reproduced_by for _, comparison in pairs)
    if violated or isolated:
        name = VIOLATED
    elif missing or unexplained:
        name = INCOMPLETE
    else:
        name = EXACT if exact else ROUNDING
    reason = _reason(name, results, recipes, violated, missing, isolated, unexplained)
    return Verdict(name, reason, recipes, violated, missing, isolated, unexplained)


def merged_precision(results: Sequence[ParameterResult]) -> str:
    """What the adapted parameters are stored in: fp32, fp16, bf16, another dtype, or mixed."""
    names = _formats(results)
    return names[0] if len(names) == 1 else "mixed"


def _formats(results: Sequence[ParameterResult]) -> list[str]:
    found = {comparison.precision for _, comparison in adapted(results)}
    return sorted(found, reverse=True)


def rounding_cost(results: Sequence[ParameterResult], *, holds: bool = True) -> Cost:
    """What the merge lost to rounding, over all adapted parameters.

    Args:
        holds: the certificate does; else the difference is not only rounding, and the sentence
            does not call it so.
    """
    pairs = adapted(results)
    error = sum(comparison.sums.difference_squared for _, comparison in pairs)
    delta = sum(comparison.sums.delta_squared for _, comparison in pairs)
    touched = sum(comparison.certificate.changed_by_update for _, comparison in pairs)
    lost = sum(comparison.certificate.lost for _, comparison in pairs)
    lost_share = lost / touched if touched else 0.0
    beside = sum(comparison.certificate.non_finite for _, comparison in pairs)
    if not delta:
        nothing = "The adapter changes nothing: its delta is zero."
        if beside:
            nothing = f"Nothing to measure: {_not_counted(beside)}."
        return Cost(None, lost_share, None, nothing)
    relative = math.sqrt(error / delta)
    snr = -20 * math.log10(relative) if relative else None
    off, lost_text = percent(relative), percent(lost_share)
    what = f"the task vector is off the adapter's delta by {off} of the delta's norm"
    if holds:
        kept = percent(max(0.0, 1 - relative))
        what = f"this merge keeps {kept} of the update: {off} of its norm is error"
    sentence = (
        f"In {' and '.join(_formats(results))}, {what}, and {lost_text} of its elements did not "
        f"move at all{f'; {_not_counted(beside)}' if beside else ''}."
    )
    return Cost(relative, lost_share, snr, sentence)


def _not_counted(elements: int) -> str:
    """Of elements that are NaN or infinite."""
    return f"{are(elements, 'element')} NaN or infinite and in none of these figures"


def attribution(results: Sequence[ParameterResult]) -> dict[str, dict[str, float | int]]:
    """Per kind: how many parameters, how many elements, what share of ‖T‖²."""
    total = sum(result.task_vector.squared_norm for result in results)
    table: dict[str, dict[str, float | int]] = {}
    for kind in KINDS:
        chosen = [result for result in results if result.kind == kind]
        squared = sum(result.task_vector.squared_norm for result in chosen)
        table[kind] = {
            "parameters": len(chosen),
            "elements": sum(result.elements for result in chosen),
            "squared_norm_share": squared / total if total else 0.0,
        }
    return table


def _reason(
    name: str,
    results: Sequence[ParameterResult],
    recipes: list[str],
    violated: list[str],
    missing: list[str],
    isolated: list[str],
    unexplained: list[str],
) -> str:
    pairs = adapted(results)
    count = len(pairs)
    if name in (VIOLATED, INCOMPLETE):
        parts = _violations([c for r, c in pairs if r.name in violated], violated)
        if isolated:
            parts.append(_standing_out([pair for pair in pairs if pair[0].name in isolated]))
        if missing:
            parts.append(f"the adapter changes {_named(missing)}, the task vector does not")
        if unexplained:
            parts.append(f"{_named(unexplained)} changed, which the adapter does not explain")
        return "; ".join(parts)
    casts = sum(result.kind == CAST for result in results)
    tail = f"; {casts} more only show the base's own rounding" if casts else ""
    if name == EXACT:
        how = f"recipe {recipes[0]!r}" if recipes else "one recipe or another"
        return f"{how} reproduces every bit of all {count} adapted parameters{tail}"
    near = _near_recipe(pairs)
    return (
        f"every element of all {count} adapted parameters is within its rounding bound{near}{tail}"
    )


def _near_recipe(pairs: Sequence[tuple[ParameterResult, Comparison]]) -> str:
    """Which recipe gives nearly all bits of all parameters; where it is a handful, the others."""
    found = {
        recipe.name: [(r.name, c.certificate.tally_of(recipe.name)) for r, c in pairs]
        for recipe in RECIPES
    }
    near = [name for name, tallies in found.items() if not any(t.abandoned for _, t in tallies)]
    if not near:
        return ""
    recipe = min(near, key=lambda name: _missed(found[name]))
    total = sum(result.elements for result, _ in pairs)
    return (
        f"; recipe {recipe!r} gives all but {_missed(found[recipe]):,} of {total:,} elements bit "
        "for bit"
        f"{_where(found[recipe])}"
    )


def _standing_out(pairs: Sequence[tuple[ParameterResult, Comparison]]) -> str:
    """How many elements are off the recipe that gives all the others, and where."""
    tallies = [(result.name, comparison.certificate.best_recipe) for result, comparison in pairs]
    total, missed = sum(result.elements for result, _ in pairs), _missed(tallies)
    alone = sum(comparison.certificate.isolated for _, comparison in pairs)
    recipes = {tally.recipe.name for _, tally in tallies}
    recipe = f"recipe {recipes.pop()!r}" if len(recipes) == 1 else "one recipe or another"
    text = (
        f"all but {missed:,} of {total:,} elements of {_named([r.name for r, _ in pairs])} are "
        f"{recipe} bit for bit"
    )
    if alone < missed:
        text += f", and {alone:,} of those no other arithmetic gives"
    return text + _where(tallies)


def _missed(tallies: Sequence[tuple[str, RecipeTally]]) -> int:
    return sum(tally.mismatches for _, tally in tallies)


def _where(tallies: Sequence[tuple[str, RecipeTally]]) -> str:
    """The places that a recipe misses, where they are a handful."""
    if not 0 < _missed(tallies) <= _HANDFUL:
        return ""
    missing = [(name, tally) for name, tally in tallies if tally.places]
    places = [
        f"{name + ', ' if len(missing) > 1 else ''}row {row}, column {column}"
        for name, tally in missing
        for row, column in tally.places
    ]
    if len(missing) == 1 < len(tallies):
        places[0] = f"{missing[0][0]}, {places[0]}"
    return f" ({'; '.join(places)})"


def _violations(comparisons: Sequence[Comparison], names: list[str]) -> list[str]:
    """How many elements of the named parameters are wrong, and in which way."""
    certificates = [comparison.certificate for comparison in comparisons]
    overflowed = sum(certificate.overflowed for certificate in certificates)
    non_finite = sum(certificate.non_finite for certificate in certificates) - overflowed
    outside = sum(certificate.tally.violations for certificate in certificates)
    parts = []
    if overflowed:
        format = next(c.format for c in certificates if c.overflowed)
        parts.append(
            f"{_elements(overflowed)} of {_named(names)} became infinite: beyond {format.name}'s "
            f"largest, {format.largest:g}"
        )
    if non_finite:
        verb = "is" if non_finite == 1 else "are"
        parts.append(f"{_elements(non_finite)} of {_named(names)} {verb} NaN or infinite")
    if outside:
        verb = "differs" if outside == 1 else "differ"
        parts.append(
            f"{_elements(outside)} of {_named(names)} {verb} from the adapter's delta by more than "
            "rounding can"
        )
    return parts


def _elements(count: int) -> str:
    return "1 element" if count == 1 else f"{count:,} elements"


def _named(names: Sequence[str]) -> str:
    """A few names; of more the number, and the names with those folded that differ in layers."""
    folded = fold_names(names)
    if len(names) <= 3:
        return listed(names)
    return f"{len(names)} parameters ({', '.join(folded[:3])}{', ...' if folded[3:] else ''})"
