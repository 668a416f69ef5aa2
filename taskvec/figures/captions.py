"""What to see in each figure, by file name: the caption line of reports and of the HTML page.

A figure's own title says what was found; its caption says what to look for, and what it would look
like if the merge were wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskvec.figures.style import Finding

COMPARISON = {
    "cosine_similarity_analysis.png": "Left: the nearer to the top, the more exactly a parameter's "
    "task vector points where the adapter says; a wrong merge falls below the shaded band. Right: "
    "points on the line have the adapter's own length; twice merged or scaled ones lie beside it.",
    "norm_distribution_comparison.png": "How far each parameter moved. Purple circles were moved "
    "by the adapter. Red triangles moved without it: they are rounding as long as they lie far "
    "below the purple ones and carry no cross.",
    "parameter_modification_heatmap.png": "A row per kind of parameter, a column per layer: darker "
    "moved further. What the adapter targets is purple in every layer; an isolated pale, red or "
    "crossed cell is a parameter to look at.",
    "rounding_error_in_ulps.png": "Measured errors (filled) against what rounding may do (blue). "
    "In fp16 and bf16 nearly all errors lie left of half an ulp, the cost of storing a weight "
    "once; in fp32 the rounding of the matrix product itself reaches further, and so does its "
    "bound. The count at the far right, beyond the bound, has to be 0.",
    "model_architecture_coverage.png": "Which tensors of the model the adapter touches, drawn to "
    "the model's own layout, and how little of the model it stores for that.",
}
VALIDATION = {
    "precision_impact.png": "Left: the purple part is the adapter's and has the same length in "
    "every precision; the red part appears only where the base itself was rounded. Right: what "
    "rounding left of the update.",
    "rounding_error_in_ulps.png": COMPARISON["rounding_error_in_ulps.png"],
}


def described(findings: Mapping[str, Finding], captions: Mapping[str, str]) -> dict[str, Any]:
    """What JSON keeps of figures: title (what was found), note (how to read it), caption.

    Args:
        findings: by file name.
        captions: what to see, by file name.
    """
    return {
        file: {"title": finding.title, "note": finding.note, "caption": captions[file]}
        for file, finding in findings.items()
    }
