"""What to see in each figure, by file name: the caption line of reports and of the HTML page.

A figure's own title says what was found; its caption says what to look for, and what it would look
like if the merge were wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib comes with it, which whoever only reads captions does not need
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

PRECISION = {
    "precision_impact.png": "Left: the purple part is what the adapter changed and stays the same; "
    "the hatched part is there only where the base was subtracted as stored, and vanishes where "
    "it was rounded first. Right: the further to the right, the more of the update was rounded "
    "away; at the dashed line nothing is left of it.",
}
STRUCTURE = {
    "task_vector_shares.png": "Which tensors the change is in: a darker cell holds more of ‖T‖², "
    "and the shares of a row stand beside it. Grey did not change at all.",
    "task_vector_ranks.png": "How many directions the change of a matrix has. A LoRA's effective "
    "rank stays below its r; rounding noise, or full training, drives it towards the number of "
    "rows or columns.",
}
CHANGES = {
    "parameter_changes.png": "All parameters that changed, by the size of the change. Real changes "
    "and artifacts of rounding are told apart by shape; a gap between them says that rounding is "
    "too small to matter, an overlap that it is not.",
}
MODEL = {
    "model_structure.png": "A row per parameter of a layer, a cell per layer: purple rings are "
    "what the adapter changes, grey squares what it leaves alone. The bars at the right tell where "
    "the elements are. model_structure.svg is the same for print.",
}


def caption_lines(figures: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line per figure for the printed report."""
    return [f"🖼️ {file}: {figure['caption']}" for file, figure in figures.items()]


def captioned(captions: Mapping[str, str]) -> dict[str, Any]:
    """What JSON keeps of figures whose title only the picture has."""
    return {file: {"caption": caption} for file, caption in captions.items()}


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
