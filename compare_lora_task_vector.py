#!/usr/bin/env python3
"""Step 3: is this task vector, or this merged model, really base + adapter?

    python compare_lora_task_vector.py --base_model bigcode/starcoder2-3b \\
        --lora_path checkpoint-40000/ --task_vector_path task_vectors_fp32/ \\
        --output_dir comparison_results/

    python compare_lora_task_vector.py --base_model BASE --lora_path ADAPTER \\
        --finetuned_model MERGED     # judge a merge made by any tool, nothing extracted

Every element is checked against its floating-point bound, and every changed parameter is
attributed. Exit status: 0 the certificate holds, 1 it does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli, processes
from taskvec.flag_values import not_negative
from taskvec.wording import number

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    import torch

    from taskvec.adapter import Adapter
    from taskvec.checkpoint import Checkpoint
    from taskvec.compare import ParameterResult
    from taskvec.taskvector import TaskVector
    from taskvec.tensorfile import StoredTensor, TensorFileWriter
    from taskvec.update import Update

RESULTS, DELTAS, REPORT = (
    "comparison_results.json",
    "lora_deltas.safetensors",
    "detailed_comparison_report.txt",
)
FIGURES = (
    "cosine_similarity_analysis.png",
    "norm_distribution_comparison.png",
    "parameter_modification_heatmap.png",
    "rounding_error_in_ulps.png",
)
ARCHITECTURE_FIGURE = "model_architecture_coverage.png"
DEFAULT_TASK_VECTOR = "task_vectors_fp32/"


@dataclass(frozen=True)
class ComparisonResult:
    """What was found.

    Attributes:
        output_dir: where the files are.
        document: the content of comparison_results.json.
    """

    output_dir: Path
    document: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = self.document["summary"]
        return summary

    @property
    def holds(self) -> bool:
        return bool(self.summary["equivalent"])


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    cli.add_base_model(parser)
    cli.add_lora_path(parser)
    parser.add_argument(
        "--task_vector_path",
        metavar="PATH",
        help=f"a task vector file or its directory (default: {DEFAULT_TASK_VECTOR})",
    )
    parser.add_argument(
        "--finetuned_model",
        metavar="MODEL",
        help="a merged model to judge directly, instead of a task vector",
    )
    cli.add_output_dir(parser, "comparison_results/")
    parser.add_argument(
        "--tolerance",
        type=not_negative,
        default=1e-5,
        help="largest |T - delta| up to which a parameter is counted as within tolerance "
        "(default: 1e-5). A yardstick for the report: the verdict is the certificate's",
    )
    for flag, what in (
        ("generate_plots", "write the figures"),
        ("detailed_report", "write the text report"),
        ("architecture_analysis", "write the architecture's figure and its section in the report"),
    ):
        parser.add_argument(
            f"--{flag}",
            action=argparse.BooleanOptionalAction,
            default=True,
            help=f"{what} (default: on)",
        )
    return parser


def compare(
    base_model: str,
    lora_path: str | Sequence[str],
    output_dir: str | Path,
    *,
    task_vector_path: str | Path | None = None,
    finetuned_model: str | None = None,
    tolerance: float = 1e-5,
    device: str = "auto",
    revision: str | None = None,
    generate_plots: bool = True,
    detailed_report: bool = True,
    architecture_analysis: bool = True,
) -> ComparisonResult:
    """Compare an adapter's delta with a task vector and write what was found.

    Args:
        base_model: directory, .safetensors file or hub id.
        lora_path: directory or hub id of a PEFT LoRA adapter, or several, merged in turn.
        output_dir: absent, empty, or an earlier comparison, which is replaced.
        task_vector_path: a task vector file or its directory; or
        finetuned_model: a merged model. Exactly one of the two.
        tolerance: yardstick for the report.
        device: where the arithmetic runs.
        revision: of a base on the hub.
        generate_plots, detailed_report, architecture_analysis: what to write beside the JSON.

    Raises:
        UserError: an input is unusable, or base and task vector are of different models.
    """
    from taskvec.adapter import open_adapter
    from taskvec.checkpoint import open_checkpoint
    from taskvec.diagnose import diagnose
    from taskvec.output import output_directory, write_json
    from taskvec.reports.comparison import Storage, document
    from taskvec.reports.text import comparison_report
    from taskvec.subject import open_vector
    from taskvec.verdict import judge

    target = Path(output_dir)
    if task_vector_path is None and finetuned_model is None:
        task_vector_path = DEFAULT_TASK_VECTOR
    with ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(base_model, revision))
        adapter = stack.enter_context(open_adapter(lora_path, base))
        vector, paths = stack.enter_context(open_vector(base, task_vector_path, finetuned_model))
        torch_device = cli.pick_device(device)
        written = [RESULTS, DELTAS, REPORT, *FIGURES, ARCHITECTURE_FIGURE]
        inputs = [*base.paths, *adapter.paths, *paths]
        partial = stack.enter_context(output_directory(target, written, inputs))
        results = _compare_all(base, adapter, vector, partial, torch_device)

        def conclude() -> dict[str, Any]:
            verdict = judge(results)
            found = [] if verdict.holds else diagnose(base, adapter, vector, results, torch_device)
            elements = sum(result.elements for result in results)
            content = document(
                results,
                verdict,
                [cause.as_json() for cause in found],
                inputs={
                    "base": base.identity(),
                    "adapter": cli.adapters(lora_path),
                    "task_vector" if task_vector_path else "finetuned_model": vector.source,
                },
                storage=Storage(adapter.stored_bytes, 4 * elements, vector.disk_bytes),
                tolerance=tolerance,
            )
            content["figures"] = {}
            if generate_plots:
                content["figures"] = _draw(content, partial, architecture_analysis)
            write_json(partial / RESULTS, content)
            if detailed_report:
                text = comparison_report(content, architecture=architecture_analysis)
                (partial / REPORT).write_text(text, encoding="utf-8")
            return content

        content = processes.by_main(conclude)
    return ComparisonResult(target, content)


def _compare_all(
    base: Checkpoint,
    adapter: Adapter,
    vector: TaskVector,
    directory: Path,
    device: torch.device,
) -> list[ParameterResult]:
    """Every float parameter of the base in turn; the adapter's deltas are written on the way."""
    import torch

    from taskvec.compare import attribute_parameter, compare_parameter
    from taskvec.tensorfile import TensorFileWriter
    from taskvec.workers import for_each

    def examine(name: str) -> ParameterResult:
        if name in adapter.scalings:
            update = adapter.update(name, device)
            result = compare_parameter(base, vector, name, update, device)
            _write_delta(update, writer)
        else:
            result = attribute_parameter(base, vector, name, device)
        bar.update(base.tensors[name].nbytes)
        return result

    def cost(name: str) -> int:  # a parameter that is known to be zero takes no time
        nbytes = base.tensors[name].nbytes
        return nbytes if name in adapter.scalings or not vector.is_zero(name) else 0

    def reads(name: str) -> list[StoredTensor]:
        return [base.stored(name), *vector.stored(name)] if cost(name) else []

    names = [name for name, info in base.tensors.items() if info.is_float]
    specs = [(name, torch.float32, base.tensors[name].shape) for name in adapter.parameters]
    with (
        TensorFileWriter(directory / DELTAS, specs) as writer,
        cli.progress(sum(base.tensors[name].nbytes for name in names), "Comparing") as bar,
    ):
        return for_each(examine, names, cost, reads)


def _write_delta(update: Update, writer: TensorFileWriter) -> None:
    from taskvec.compare import BLOCK_ELEMENTS
    from taskvec.tensorfile import row_blocks

    name = update.parameter
    for start, stop in row_blocks(writer.tensors[name], BLOCK_ELEMENTS):
        writer.write(name, update.delta(start, stop), start)


def _draw(content: dict[str, Any], directory: Path, architecture: bool) -> dict[str, Any]:
    """Write the figures; returns what each shows, by file name."""
    from taskvec.figures import captions, titles
    from taskvec.figures import comparison as figures

    cli.notice("Drawing figures ...")
    by_precision = {content["summary"]["certificate"]["precision"]: content}
    figures.cosine_similarity(content, directory / FIGURES[0])
    figures.norm_distribution(content, directory / FIGURES[1])
    figures.modification_heatmap(content, directory / FIGURES[2])
    figures.rounding_errors(by_precision, directory / FIGURES[3])
    findings = {
        FIGURES[0]: titles.cosine_similarity(content),
        FIGURES[1]: titles.norm_distribution(content),
        FIGURES[2]: titles.modification_heatmap(content),
        FIGURES[3]: titles.rounding_errors(by_precision),
    }
    if architecture:
        figures.architecture_coverage(content, directory / ARCHITECTURE_FIGURE)
        findings[ARCHITECTURE_FIGURE] = titles.architecture_coverage(content)
    return captions.described(findings, captions.COMPARISON)


def print_result(result: ComparisonResult) -> None:
    """The certificate, then the documented lines: numbers as measured, the verdict last."""
    summary = result.summary
    certificate = summary["certificate"]
    cosine, shared = summary["average_cosine_similarity"], summary["shared_parameters"]
    perfect = summary["perfect_matches"]
    cli.result(f"📜 CERTIFICATE ({certificate['precision']}): {certificate['verdict']}")
    cli.result(f"   {certificate['reason']}")
    cli.result(f"   {certificate['cost']['sentence']}")
    for cause in certificate["diagnosis"]:
        cli.result(f"   Diagnosis: {cause['sentence']}")
    cli.result()
    cli.result("🔬 MATHEMATICAL EQUIVALENCE ANALYSIS:")
    cli.result(f"   Analyzing {shared} shared parameters...")
    cli.result(f"   Average cosine similarity: {number(cosine, '.6f')}")
    cli.result(f"   Max absolute difference: {summary['max_absolute_difference']:.2e}")
    cli.result(
        f"   Perfect matches (>0.9999): {perfect}/{shared} "
        f"({100 * perfect / shared if shared else 0:.1f}%)"
    )
    cli.result()
    if result.holds:
        cli.result("✅ VALIDATION SUCCESSFUL: LoRA and Task Vectors are mathematically equivalent!")
    else:
        cli.result(f"❌ VALIDATION FAILED: {certificate['reason']}")


def _body(args: argparse.Namespace) -> int:
    result = compare(
        args.base_model,
        cli.lora_path(args),
        args.output_dir,
        task_vector_path=args.task_vector_path,
        finetuned_model=args.finetuned_model,
        tolerance=args.tolerance,
        device=args.device,
        revision=args.revision,
        generate_plots=args.generate_plots,
        detailed_report=args.detailed_report,
        architecture_analysis=args.architecture_analysis,
    )
    print_result(result)
    return cli.EXIT_OK if result.holds else cli.EXIT_DOES_NOT_HOLD


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv, shared=True)


if __name__ == "__main__":
    sys.exit(main())
