"""Merges that took part of the update's elements, or lost weights afterwards, as causes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from taskvec.diagnosis.cause import Cause, counted, named, whole
from taskvec.diagnosis.findings import Findings
from taskvec.diagnosis.partial import PartialMerge
from taskvec.wording import percent

_SAME = 1e-3  # factors so near are one


def partly_merged(findings: Findings) -> list[Cause]:
    """What `taskvec.diagnosis.partial` found, and zeros in what the adapter leaves alone."""
    dropped = {name: part for name, part in findings.partial.items() if not part.zeroed}
    zeroed = {name: part for name, part in findings.partial.items() if part.zeroed}
    return [*_dropped(findings, dropped), *_pruned(findings, zeroed)]


def _dropped(findings: Findings, parts: dict[str, PartialMerge]) -> list[Cause]:
    if not parts:
        return []
    names, found = list(parts), list(parts.values())
    density = statistics.median(part.density for part in found)
    factor = statistics.median(part.factor for part in found)
    by_size = all(part.by_size for part in found)
    scaled = abs(factor - 1) > _SAME
    sentence = (
        f"The update was thinned out: about {percent(density)} of its elements, "
        f"{'the largest ones' if by_size else 'wherever they lie'}, were added to "
        f"{whole(names, findings)}"
    )
    sentence += f", times {factor:.4g}" if scaled else ""
    sentence += ", and the others are the base's own"
    if by_size:
        sentence += ", as TIES or pruning by size leaves it."
    elif abs(factor * density - 1) < 0.05 and scaled:
        sentence += f", as DARE with a density of {1 / factor:.3g} leaves it."
    else:
        sentence += ", as dropping elements at random leaves it."
    evidence = {
        "parameters": names,
        "density": density,
        "densities": {name: part.density for name, part in parts.items()},
        "factor": factor,
        "largest_elements": by_size,
    }
    return [Cause("thinned_out", sentence, evidence, len(names))]


def _pruned(findings: Findings, parts: dict[str, PartialMerge]) -> list[Cause]:
    others = [outliers.name for outliers in findings.zeroed]
    if not parts and not others:
        return []
    seen: list[str] = [whole(list(parts), findings)] if parts else []
    seen += [_others(others)] if others else []
    sentence = f"Pruned after the merge: weights here and there of {' and '.join(seen)} are 0"
    evidence: dict[str, object] = {"parameters": list(parts), "unadapted_parameters": others}
    if parts:
        share = 1 - statistics.median(part.density for part in parts.values())
        sentence += f" (about {percent(share)} of them)"
        evidence["zero_share"] = share
    sentence += "; the rest is what base + adapter gives."
    return [Cause("pruned", sentence, evidence, len(parts) + len(others))]


def _others(names: Sequence[str]) -> str:
    return f"{counted(names)} that the adapter leaves alone ({named(names)})"
