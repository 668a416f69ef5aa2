"""The result of a comparison as the JSON document from which text and figures are rendered.

No NaN and no Infinity: what is undefined is null.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from taskvec.architecture import place
from taskvec.certificate import ULP_BINS, ULP_RANGE
from taskvec.compare import PERFECT_COSINE, Comparison, ParameterResult
from taskvec.rounding import RECIPES
from taskvec.verdict import (
    Verdict,
    adapted,
    attribution,
    merged_precision,
    rounding_cost,
)


@dataclass(frozen=True)
class Storage:
    """Bytes that the adapter takes, a dense fp32 task vector, and the task vector on disk."""

    adapter_bytes: int
    dense_task_vector_bytes: int
    task_vector_disk_bytes: int


def document(
    results: Sequence[ParameterResult],
    verdict: Verdict,
    diagnosis: Sequence[dict[str, Any]],
    *,
    inputs: dict[str, Any],
    storage: Storage,
    tolerance: float,
) -> dict[str, Any]:
    """comparison_results.json: ``inputs``, ``summary`` and ``parameters`` (by name)."""
    return {
        "inputs": inputs,
        "summary": _summary(results, verdict, diagnosis, storage, tolerance),
        "parameters": {result.name: _parameter(result, tolerance) for result in results},
    }


def _summary(
    results: Sequence[ParameterResult],
    verdict: Verdict,
    diagnosis: Sequence[dict[str, Any]],
    storage: Storage,
    tolerance: float,
) -> dict[str, Any]:
    pairs = adapted(results)
    changed = [result for result in results if result.task_vector.nonzero]
    shared = [(result, comparison) for result, comparison in pairs if result in changed]
    cosines = [result.cosine for result, _ in shared if result.cosine is not None]
    maxima = [comparison.sums.difference_max for _, comparison in pairs]
    elements = sum(comparison.sums.elements for _, comparison in pairs)
    absolute = sum(comparison.sums.difference_abs for _, comparison in pairs)
    return {
        "total_parameters": len(results),
        "nonzero_parameters": len(changed),
        "lora_parameters": len(pairs),
        "shared_parameters": len(shared),
        "lora_only_parameters": len(pairs) - len(shared),
        "task_vector_only_parameters": len(changed) - len(shared),
        "average_cosine_similarity": sum(cosines) / len(cosines) if cosines else None,
        "min_cosine_similarity": min(cosines, default=None),
        "max_absolute_difference": max(maxima, default=0.0),
        "mean_max_difference": sum(maxima) / len(maxima) if maxima else 0.0,
        "mean_absolute_difference": absolute / elements if elements else 0.0,
        "lora_coverage": {
            "tensors": len(pairs) / len(results) if results else 0.0,
            "elements": _share(
                sum(result.elements for result, _ in pairs),
                sum(result.elements for result in results),
            ),
        },
        "storage": asdict(storage),
        "relative_error": rounding_cost(results).relative_error,
        "perfect_matches": sum(cosine > PERFECT_COSINE for cosine in cosines),
        "tolerance": tolerance,
        "within_tolerance": sum(maximum <= tolerance for maximum in maxima),
        "equivalent": verdict.holds,
        "certificate": _certificate(results, verdict, diagnosis),
    }


def _certificate(
    results: Sequence[ParameterResult], verdict: Verdict, diagnosis: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    pairs = adapted(results)
    worst = max(
        (pair for pair in pairs if pair[1].certificate.tally.worst),
        key=lambda pair: pair[1].certificate.tally.max_ratio,
        default=None,
    )
    return {
        "verdict": verdict.name,
        "reason": verdict.reason,
        "precision": merged_precision(results),
        "recipes": {
            recipe.name: sum(recipe.name in c.certificate.reproduced_by for _, c in pairs)
            for recipe in RECIPES
        },
        "reproduced_by": verdict.recipes,
        "elements_checked": sum(comparison.sums.elements for _, comparison in pairs),
        "violations": sum(comparison.certificate.violations for _, comparison in pairs),
        "non_finite_elements": sum(result.task_vector.non_finite for result in results),
        "max_ratio_to_bound": worst[1].certificate.tally.max_ratio if worst else 0.0,
        "worst": {"parameter": worst[0].name, **_element(worst[1])} if worst else None,
        "violated_parameters": verdict.violated,
        "missing_parameters": verdict.missing,
        "isolated_deviations": verdict.isolated,
        "unexplained_parameters": verdict.unexplained,
        "attribution": attribution(results),
        "cost": asdict(rounding_cost(results, holds=verdict.holds)),
        "ulp_histogram": _total_histograms(pairs),
        "diagnosis": list(diagnosis),
    }


def _parameter(result: ParameterResult, tolerance: float) -> dict[str, Any]:
    where = place(result.name)
    entry: dict[str, Any] = {
        "shape": list(result.shape),
        "elements": result.elements,
        "stack": where.stack,
        "layer": where.layer,
        "block": where.block,
        "module": where.module,
        "attribution": result.kind,
        "cast_format": result.cast_format,
        "task_vector_norm": result.task_vector.norm,
        "task_vector_max_abs": result.task_vector.max_abs,
        "nonzero_elements": result.task_vector.nonzero,
        "non_finite_elements": result.task_vector.non_finite,
        "lora": None,
    }
    if result.comparison is not None:
        entry["lora"] = _lora(result, result.comparison, tolerance)
    return entry


def _lora(result: ParameterResult, comparison: Comparison, tolerance: float) -> dict[str, Any]:
    sums, certificate = comparison.sums, comparison.certificate
    error = result.relative_error
    return {
        "kind": comparison.update_kind,
        "rank": comparison.rank,
        "scaling": comparison.scaling,
        "delta_norm": math.sqrt(sums.delta_squared),
        "cosine_similarity": result.cosine,
        "slope": result.slope,
        "max_absolute_difference": sums.difference_max,
        "mean_absolute_difference": _share(sums.difference_abs, sums.elements),
        "within_tolerance": sums.difference_max <= tolerance,
        "relative_error": error,
        "snr_db": -20 * math.log10(error) if error else None,
        "exact_share": _share(sums.exact, sums.elements),
        "lost_share": _share(certificate.lost, certificate.changed_by_update),
        "precision": comparison.precision,
        "reproduced_by": certificate.reproduced_by,
        "recipe_mismatches": certificate.best_recipe.mismatches,
        "recipe_mismatch_places": [
            {"row": row, "column": column} for row, column in certificate.best_recipe.places
        ],
        "bound": certificate.tally.family.name,
        "violations": certificate.violations,
        "max_ratio_to_bound": certificate.tally.max_ratio,
        "worst": _element(comparison),
    }


def _element(comparison: Comparison) -> dict[str, Any]:
    worst = comparison.certificate.tally.worst
    if worst is None:
        return {}
    # Beside the largest numbers of fp32 a bound may be infinite, which JSON has no word for.
    return {**asdict(worst), "bound": min(worst.bound, sys.float_info.max)}


def _total_histograms(pairs: Sequence[tuple[ParameterResult, Comparison]]) -> dict[str, Any]:
    """Counts of |T - delta| and of its bound in ulps of the merged weight, over all elements."""

    def total(name: str) -> list[int]:
        columns = zip(*(getattr(c.certificate, name).tolist() for _, c in pairs), strict=True)
        return [sum(column) for column in columns]

    return {
        "bin_width": ULP_RANGE / ULP_BINS,
        "error": total("ulp_histogram"),
        "bound": total("bound_histogram"),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
