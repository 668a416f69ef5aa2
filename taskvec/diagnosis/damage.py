"""Elements that are wrong in a merge that is right elsewhere, as causes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from taskvec.diagnosis.cause import Cause, counted, named, whole
from taskvec.diagnosis.findings import Findings
from taskvec.diagnosis.outliers import Outliers
from taskvec.rounding import FP16, FP32
from taskvec.verdict import adapted

_FEW = 8  # elements that are cut to one value may be so by chance, or by damage


def overflow(findings: Findings) -> list[Cause]:
    if not findings.overflow:
        return []
    count = sum(outliers.count for outliers in findings.overflow)
    first = findings.overflow[0]
    place = first.shown[0]
    format = FP16 if findings.format is FP32 else findings.format
    sentence = (
        f"Overflow: {count:,} elements of {counted(findings.overflow)} are beyond what "
        f"{format.name} holds ({format.largest:g}), first {first.name}, row {place['row']}, column "
        f"{place['column']}: {_shown(place['expected'])} is stored as {_shown(place['merged'])}."
    )
    return [Cause("overflow", sentence, _places(findings.overflow), len(findings.overflow))]


def partly_unmerged(findings: Findings) -> list[Cause]:
    parts = [outliers for outliers in findings.damage if outliers.unmerged]
    if not parts:
        return []
    shown = ", ".join(outliers.where for outliers in parts[:3])
    more = f" and {len(parts) - 3} more parameters" if len(parts) > 3 else ""
    sentence = f"Not merged: {shown}{more}, which are the base's own; the rest is merged."
    return [Cause("some_modules_not_merged", sentence, _places(parts), len(parts))]


def clipped(findings: Findings) -> list[Cause]:
    found = _clipped(findings)
    if not found:
        return []
    names = [outliers.name for outliers in found]
    count, limits = sum(outliers.count for outliers in found), [o.most for o in found]
    low, high = f"{min(limits):.6g}", f"{max(limits):.6g}"
    sentence = (
        f"Clipped: {count:,} elements of {whole(names, findings)} are cut to "
        f"±{low if low == high else f'{low} to ±{high}'}, where base + adapter lies beyond; the "
        "rest is what it gives."
    )
    return [Cause("clipped", sentence, _places(found), len(found))]


def _clipped(findings: Findings) -> list[Outliers]:
    """Single elements that are the largest of their parameters are that by chance, or damage."""
    found = [outliers for outliers in findings.damage if outliers.clipped]
    limits = [outliers.most for outliers in found if outliers.count > _FEW]
    return [o for o in found if any(math.isclose(o.most, limit, rel_tol=1e-6) for limit in limits)]


def damaged(findings: Findings) -> list[Cause]:
    apart = {id(outliers) for outliers in _clipped(findings)}
    damage = [o for o in findings.damage if not o.unmerged and id(o) not in apart]
    if not damage:
        return []
    damage.sort(key=lambda outliers: -outliers.count)
    count = sum(outliers.count for outliers in damage)
    shown = ", ".join(outliers.where for outliers in damage[:3])
    more = f" and {len(damage) - 3} more parameters" if len(damage) > 3 else ""
    first = damage[0].shown[0]
    verb = "is" if count == 1 else "are"
    recipes = {outliers.recipe for outliers in damage}
    recipe = recipes.pop() if len(recipes) == 1 else None
    bits = f", bit for bit (recipe {recipe!r})" if recipe else ""
    sentence = (
        f"Corrupted: {shown}{more} {verb} not what base + adapter gives, the rest is{bits}. Row "
        f"{first['row']}, column {first['column']} holds {_shown(first['merged'])} instead of "
        f"{_shown(first['expected'])}."
    )
    return [Cause("corrupted", sentence, _places(damage), len(damage))]


def marginal_cause(findings: Findings) -> Cause:
    """When a few elements at the edge of their bounds are all that was found."""
    names = [result.name for result in findings.marginal]
    certificates = {
        result.name: found.certificate
        for result, found in adapted(findings.results)
        if result.name in names
    }
    count = sum(certificate.tally.violations for certificate in certificates.values())
    name = max(names, key=lambda name: certificates[name].tally.max_ratio)
    tally = certificates[name].tally
    what = f"a few elements of {named(names)} differ from the recipe that reproduces the others"
    what += ", but by no more than another matmul would make them"
    if count and tally.worst:
        elements = f"{count} elements of {named(names)} are out of their bounds"
        if count == 1:
            elements = f"1 element of {named(names)} is out of its bound"
        what = (
            f"{elements}, by a factor of {tally.max_ratio:.3g} at {name}, row {tally.worst.row}, "
            f"column {tally.worst.column}, and no recipe reproduces the others bit for bit"
        )
    formats = {findings.maybe_copies.get(name) for name in names}
    copied = formats.pop() if len(formats) == 1 else None
    others = "another change"
    if copied is not None:
        others = f"an adapter that was rounded to {copied.name} after the merge, or another change"
    sentence = f"Not explained: {what}. That is too little to tell damage from {others}."
    evidence = {
        "parameters": names,
        "elements": count,
        "max_ratio_to_bound": tally.max_ratio,
        "worst": {"parameter": name, **asdict(tally.worst)} if tally.worst else None,
    }
    return Cause("unknown", sentence, evidence, len(names))


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.9g}"


def _places(found: Sequence[Outliers]) -> dict[str, Any]:
    return {
        "parameters": [outliers.name for outliers in found],
        "elements": sum(outliers.count for outliers in found),
        "places": [
            {
                "parameter": outliers.name,
                "elements": outliers.count,
                "rows": len(outliers.rows),
                "first_row": min(outliers.rows),
                "last_row": max(outliers.rows),
                "columns": len(outliers.columns),
                "first_column": min(outliers.columns),
                "last_column": max(outliers.columns),
                "first_elements": outliers.shown,
            }
            for outliers in found
        ],
    }
