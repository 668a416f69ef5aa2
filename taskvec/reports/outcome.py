"""What a validation writes beside the outputs of its steps: two figures of all precisions, and the
result as a page, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.figures import captions, titles
from taskvec.figures import comparison as figures_of
from taskvec.output import output_file, write_json
from taskvec.reports import validation
from taskvec.reports.html import validation_page
from taskvec.reports.text import validation_report

Document = dict[str, Any]

GIVEN = "given"  # the label of what was not made here
SUMMARY, REPORT = "validation_summary.json", "validation_report.txt"
HTML_REPORT = "validation_report.html"
IMPACT_FIGURE, ULP_FIGURE = "precision_impact.png", "rounding_error_in_ulps.png"


@dataclass(frozen=True)
class Judged:
    """What was compared with the adapter in one precision: what was made, or what was given.

    Attributes:
        label: the precision that it was made in, or `GIVEN`.
        task_vector: its file, if there is one.
        merged_model: its source, if there is one.
        place: the comparison's directory.
        comparison: the content of comparison_results.json.
    """

    label: str
    task_vector: Path | None
    merged_model: str | None
    place: Path
    comparison: Document

    @property
    def summary(self) -> Document:
        summary: Document = self.comparison["summary"]
        return summary

    @property
    def title(self) -> str:
        """The precision, whether it was made or given, as figures name it."""
        precision = str(self.summary["certificate"]["precision"])
        return precision if self.label == GIVEN else self.label


def draw(judged: Sequence[Judged], directory: Path) -> Document:
    """Write the two figures of all precisions; returns what they and the comparisons' show."""
    documents = {each.title: each.comparison for each in judged}
    with output_file(directory / IMPACT_FIGURE) as partial:
        figures_of.precision_impact(documents, partial)
    with output_file(directory / ULP_FIGURE) as partial:
        figures_of.rounding_errors(documents, partial)
    findings = {
        IMPACT_FIGURE: titles.precision_impact(documents),
        ULP_FIGURE: titles.rounding_errors(documents),
    }
    drawn: Document = {
        file: {"label": None, **figure}
        for file, figure in captions.described(findings, captions.VALIDATION).items()
    }
    for each in judged:
        for file, figure in each.comparison["figures"].items():
            drawn[f"{each.place.name}/{file}"] = {"label": each.label, **figure}
    return drawn


def write(
    judged: Sequence[Judged],
    directory: Path,
    behaviour: Document,
    *,
    inputs: Document,
    figures: Document,
) -> Document:
    """Write what was found as a page, as text and as JSON, which is returned.

    Args:
        behaviour, inputs: as in `validation.document`.
        figures: what `draw` returned.
    """
    comparisons = {each.label: each.comparison for each in judged}
    document = validation.document(
        comparisons, behaviour, inputs=inputs, figures=figures, files=_files(judged, directory)
    )
    images = {file: (directory / file).read_bytes() for file in figures}
    texts = {
        REPORT: validation_report(document),
        HTML_REPORT: validation_page(document, comparisons, images),
    }
    for name, text in texts.items():
        with output_file(directory / name) as partial:
            partial.write_text(text, encoding="utf-8")
    with output_file(directory / SUMMARY) as partial:
        write_json(partial, document)
    return document


def _files(judged: Sequence[Judged], directory: Path) -> dict[str, str]:
    """What was written, by its place below the directory, and what it is."""
    files = {
        HTML_REPORT: "this result as a page to look at",
        REPORT: "this result as text",
        SUMMARY: "this result for programs",
    }
    for each in judged:
        written = {
            each.merged_model: "base + adapter, as AutoModelForCausalLM loads it",
            each.task_vector and each.task_vector.parent: "merged − base, fp32",
            each.place: "every parameter's numbers, the adapter's deltas, a text report and "
            "figures",
        }
        for path, what in written.items():
            if path and Path(path).resolve().is_relative_to(directory.resolve()):
                name = Path(path).resolve().relative_to(directory.resolve()).as_posix()
                files[f"{name}/"] = f"{each.label}: {what}"
    return files
