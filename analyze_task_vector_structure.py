#!/usr/bin/env python3
"""What a task vector consists of: by layer, block and module, with norms, sparsity and ranks.

    python analyze_task_vector_structure.py --task_vector_path task_vectors_fp32/

    python analyze_task_vector_structure.py --base_model BASE --finetuned_model TUNED

Writes task_vector_structure.json, .csv (one line per tensor) and two figures.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli
from taskvec.wording import are

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    from taskvec.subject import Subject

RESULT, TABLE = "task_vector_structure.json", "task_vector_structure.csv"
SHARES_FIGURE, RANKS_FIGURE = "task_vector_shares.png", "task_vector_ranks.png"
DEFAULT_TASK_VECTOR = "task_vectors_fp32/"


@dataclass(frozen=True)
class StructureResult:
    """What was found.

    Attributes:
        output_dir: where the files are.
        document: the content of task_vector_structure.json.
    """

    output_dir: Path
    document: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = self.document["summary"]
        return summary


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    cli.add_task_vector(parser, DEFAULT_TASK_VECTOR)
    cli.add_base_model(parser, default=None)
    cli.add_output_dir(parser, "task_vector_structure/")
    parser.add_argument(
        "--ranks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute stable and effective ranks, which takes longest (default: on)",
    )
    return parser


def analyze(
    output_dir: str | Path,
    *,
    task_vector_path: str | Path | None = None,
    finetuned_model: str | None = None,
    base_model: str | None = None,
    ranks: bool = True,
    device: str = "auto",
    revision: str | None = None,
) -> StructureResult:
    """Measure every tensor of a task vector and sum up by layer, block, module and kind.

    Args:
        output_dir: absent, empty, or an earlier output, which is replaced.
        task_vector_path: a task vector file or its directory; or
        finetuned_model, base_model: two models. Exactly one of the two.
        ranks: compute the spectrum of each matrix that changed.
        device: where the arithmetic runs.
        revision: of a base on the hub.

    Raises:
        UserError: an input is unusable, or the two models do not fit together.
    """
    from taskvec.breakdown import breakdown
    from taskvec.figures import captions
    from taskvec.figures import task_vector as figures
    from taskvec.output import output_directory, write_json
    from taskvec.subject import open_subject
    from taskvec.tables import write_csv

    files = [RESULT, TABLE, SHARES_FIGURE, RANKS_FIGURE]
    with (
        open_subject(
            task_vector_path,
            finetuned_model=finetuned_model,
            base_model=base_model,
            revision=revision,
        ) as subject,
        output_directory(Path(output_dir), files, subject.paths) as partial,
    ):
        torch_device = cli.pick_device(device)
        content = {
            "inputs": {"source": subject.vector.source, "ranks": ranks},
            **breakdown(_measure(subject, torch_device, ranks)),
        }
        rows = [{"name": name, **entry} for name, entry in content["parameters"].items()]
        write_csv(partial / TABLE, list(rows[0]), rows)
        figures.shares(content, partial / SHARES_FIGURE)
        drawn = dict(captions.STRUCTURE)
        if content["summary"]["median_stable_rank"] is not None:
            figures.ranks(content, partial / RANKS_FIGURE)
        else:
            del drawn[RANKS_FIGURE]
        content["figures"] = captions.captioned(drawn)
        write_json(partial / RESULT, content)
    return StructureResult(Path(output_dir), content)


def _measure(subject: Subject, device: Any, ranks: bool) -> dict[str, dict[str, Any]]:
    from taskvec.breakdown import measure_tensor

    size = sum(info.nbytes for info in subject.tensors.values())
    entries = {}
    with cli.progress(size, "Measuring") as bar:
        for name, info in subject.tensors.items():
            entries[name] = measure_tensor(subject, name, device, ranks=ranks)
            bar.update(info.nbytes)
    return entries


def print_result(result: StructureResult) -> None:
    """The totals and the groups, the layers unless --quiet, and where it was saved."""
    from taskvec.figures.captions import caption_lines
    from taskvec.wording import percent

    content, summary = result.document, result.summary
    cli.result(f"🔬 TASK VECTOR STRUCTURE of {content['inputs']['source']}:")
    cli.result(
        f"   {summary['nonzero_tensors']} of {summary['tensors']} tensors and "
        f"{summary['nonzero_elements']:,} of {summary['elements']:,} elements are not zero "
        f"({percent(1 - summary['sparsity'])})."
    )
    cli.result(f"   Norm {summary['norm']:.4g}, largest element {summary['max_abs']:.4g}.")
    if count := sum(entry["non_finite_elements"] for entry in content["parameters"].values()):
        cli.result(f"   ⚠️ {are(count, 'element')} NaN or infinite, and in no norm.")
    _print_groups("block", content["by_block"], cli.result)
    _print_groups("module", content["by_module"], cli.result)
    _print_groups("kind", content["by_kind"], cli.detail)
    _print_groups("layer", content["by_layer"], cli.detail)
    cli.result()
    for line in caption_lines(result.document["figures"]):
        cli.detail(line)
    cli.result(f"📁 Saved to: {result.output_dir}/")


def _print_groups(title: str, groups: dict[str, Any], show: Any) -> None:
    from taskvec.wording import number, percent, table

    header = (
        title,
        "tensors changed",
        "elements",
        "zero",
        "norm",
        "share of ‖T‖²",
        "median stable rank",
        "median effective rank",
    )
    rows = [
        (
            name,
            f"{group['nonzero_tensors']}/{group['tensors']}",
            f"{group['elements']:,}",
            percent(group["sparsity"]),
            f"{group['norm']:.4g}",
            percent(group["squared_norm_share"]),
            number(group["median_stable_rank"], ".2f"),
            number(group["median_effective_rank"], ".2f"),
        )
        for name, group in groups.items()
    ]
    show()
    for line in table(header, rows):
        show(f"   {line}")


def _body(args: argparse.Namespace) -> int:
    path = args.task_vector_path
    if path is None and args.finetuned_model is None:
        path = DEFAULT_TASK_VECTOR
    result = analyze(
        args.output_dir,
        task_vector_path=path,
        finetuned_model=args.finetuned_model,
        base_model=args.base_model,
        ranks=args.ranks,
        device=args.device,
        revision=args.revision,
    )
    print_result(result)
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
