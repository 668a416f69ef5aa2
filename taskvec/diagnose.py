"""Why a certificate does not hold: what most likely happened, from tests on the data.

Every failing parameter is read again and tested against what can go wrong in a merge
(`taskvec.diagnosis.findings`); a few of those that nothing explains are taken apart by their
singular values (`taskvec.diagnosis.remaining`). What was found becomes one cause, or several where
several things happened.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from taskvec.adapter import Adapter
from taskvec.checkpoint import Checkpoint
from taskvec.compare import ParameterResult
from taskvec.diagnosis.case import Case
from taskvec.diagnosis.cause import Cause
from taskvec.diagnosis.causes import simple_causes
from taskvec.diagnosis.damage import marginal_cause
from taskvec.diagnosis.findings import examine
from taskvec.diagnosis.remaining import remaining_causes
from taskvec.diagnosis.swapped import swapped
from taskvec.taskvector import TaskVector
from taskvec.verdict import adapted

__all__ = ["Cause", "diagnose"]


def diagnose(
    base: Checkpoint,
    adapter: Adapter,
    vector: TaskVector,
    results: Sequence[ParameterResult],
    device: torch.device,
) -> list[Cause]:
    """Say why a merge is not base + adapter.

    Args:
        base, adapter, vector: as they were compared.
        results: of all parameters, as the comparison found them.
        device: where the arithmetic runs.

    Returns:
        causes, the one that explains most parameters first; empty for a merge that holds. Their
        names: swapped, nothing_merged, some_modules_not_merged, scaled, weights_scaled,
        rounded_otherwise, transposed, magnitudes_left_out, magnitudes_misapplied, misplaced,
        reordered, tied, merged_and_unmerged, thinned_out, truncated, pruned, quantised,
        lower_precision_base, lower_precision_adapter, adapter_rounded, adapter_truncated,
        wrong_base, other_adapter, additional_adapter, further_training, clipped, corrupted,
        overflow, unknown.
    """
    format = adapted(results)[0][1].certificate.format
    case = Case(base, adapter, vector, device, format)
    if cause := swapped(case, results):
        return [cause]
    findings = examine(case, results)
    remaining = remaining_causes(case, findings)  # first: it may take other findings in
    causes = [*simple_causes(findings, adapter), *remaining]
    if findings.marginal and not causes:
        causes.append(marginal_cause(findings))
    return sorted(causes, key=lambda cause: -cause.weight)
