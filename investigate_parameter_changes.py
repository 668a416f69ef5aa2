#!/usr/bin/env python3
"""Which parameters changed, why, and which of their elements changed most.

    python investigate_parameter_changes.py         # task_vectors_fp32/, comparison_results/

    python investigate_parameter_changes.py --task_vector_path task_vectors_fp16/ \\
        --base_model bigcode/starcoder2-3b --lora_path checkpoint-40000/

Why a parameter changed is read from comparison_results.json where that is about this task vector,
or found out with --base_model and --lora_path. The base alone tells casts from changes; without it,
only what changed is known.

Writes parameter_changes.json, .csv (one line per parameter) and .png, and largest_changes.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli
from taskvec.flag_values import whole
from taskvec.wording import are

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    import torch

    from taskvec.adapter import Adapter
    from taskvec.subject import Subject

RESULT, TABLE = "parameter_changes.json", "parameter_changes.csv"
LARGEST_TABLE, FIGURE = "largest_changes.csv", "parameter_changes.png"
SHOWN = 20  # of the largest changes, on the terminal
DEFAULT_TASK_VECTOR = "task_vectors_fp32/"
DEFAULT_COMPARISON = "comparison_results/comparison_results.json"
REASONS = {
    "lora": "base + adapter, up to rounding",
    "cast": "the base rounded, nothing else",
    "unexplained": "neither",
    "unchanged": "zero",
}


@dataclass(frozen=True)
class InvestigationResult:
    """What was found.

    Attributes:
        output_dir: where the files are.
        document: the content of parameter_changes.json.
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
    cli.add_lora_path(parser, default=None)
    parser.add_argument(
        "--comparison",
        metavar="FILE",
        help=f"result of compare_lora_task_vector.py (default: {DEFAULT_COMPARISON}, where it "
        "exists and no --base_model is given)",
    )
    parser.add_argument(
        "--top_k",
        type=whole(1, 100_000),
        default=20,
        metavar="K",
        help="how many of the elements that changed most to list (default: 20)",
    )
    cli.add_output_dir(parser, "parameter_changes/")
    return parser


def investigate(
    output_dir: str | Path,
    *,
    task_vector_path: str | Path | None = None,
    finetuned_model: str | None = None,
    base_model: str | None = None,
    lora_path: str | Sequence[str] | None = None,
    comparison: str | Path | None = None,
    comparison_required: bool = True,
    top_k: int = 20,
    device: str = "auto",
    revision: str | None = None,
) -> InvestigationResult:
    """Say which parameters changed and, as far as the inputs tell, why.

    Args:
        output_dir: absent, empty, or an earlier output, which is replaced.
        task_vector_path: a task vector file or its directory; or
        finetuned_model: a model, with base_model. Exactly one of the two.
        base_model: tells casts from changes and gives the base's values.
        lora_path: an adapter on that base, to check the changes against.
        comparison: a comparison_results.json to take the reasons from instead.
        comparison_required: False: one that is about another task vector is left out.
        top_k: how many of the largest elements to list.
        device: where the arithmetic runs.
        revision: of a base on the hub.

    Raises:
        UserError: an input is unusable, or the comparison is about another task vector.
    """
    from taskvec import changes
    from taskvec.output import output_directory
    from taskvec.subject import open_subject

    if lora_path is not None and base_model is None:
        raise cli.UserError("--lora_path needs --base_model, the model that it adapts")
    if lora_path is not None and comparison is not None:
        raise cli.UserError("give either --comparison or --lora_path, not both")
    with ExitStack() as stack:
        subject = stack.enter_context(
            open_subject(
                task_vector_path,
                finetuned_model=finetuned_model,
                base_model=base_model,
                revision=revision,
            )
        )
        adapter = _open_adapter(lora_path, subject, stack)
        inputs = [*subject.paths, *(adapter.paths if adapter else [])]
        inputs += [Path(comparison)] if comparison else []
        files = [RESULT, TABLE, LARGEST_TABLE, FIGURE]
        partial = stack.enter_context(output_directory(Path(output_dir), files, inputs))
        torch_device = cli.pick_device(device)
        entries = _attribute_all(subject, adapter, torch_device)
        if comparison is not None:
            comparison = _adopt(entries, Path(comparison), comparison_required)
        maxima = {name: entry["max_abs"] for name, entry in entries.items()}
        largest = [
            changes.describe_change(
                change, subject, adapter, entries[change.parameter]["attribution"]
            )
            for change in changes.largest_changes(subject, maxima, top_k, torch_device)
        ]
        content = {
            "inputs": {
                "source": subject.vector.source,
                "base": base_model,
                "adapter": cli.adapters(lora_path) if lora_path else None,
                "comparison": str(comparison) if comparison else None,
            },
            "summary": changes.summarise(entries),
            "largest_changes": largest,
            "parameters": entries,
        }
        _write(content, partial)
    return InvestigationResult(Path(output_dir), content)


def _open_adapter(
    lora_path: str | Sequence[str] | None, subject: Subject, stack: ExitStack
) -> Adapter | None:
    from taskvec.adapter import open_adapter

    if lora_path is None or subject.base is None:
        return None
    return stack.enter_context(open_adapter(lora_path, subject.base))


def _attribute_all(
    subject: Subject, adapter: Adapter | None, device: torch.device
) -> dict[str, dict[str, Any]]:
    from taskvec.changes import attribute

    size = sum(info.nbytes for info in subject.tensors.values())
    entries = {}
    with cli.progress(size, "Investigating") as bar:
        for name, info in subject.tensors.items():
            entries[name] = attribute(subject, name, adapter, device)
            bar.update(info.nbytes)
    return entries


def _adopt(entries: dict[str, dict[str, Any]], path: Path, required: bool) -> Path | None:
    """Take over the reasons of a comparison; one that nobody asked for may not fit."""
    from taskvec.changes import adopt_attribution

    try:
        adopt_attribution(entries, path)
    except cli.UserError as error:
        if required:
            raise
        cli.notice(f"Not used: {error}")
        return None
    return path


def _write(content: dict[str, Any], directory: Path) -> None:
    from taskvec.figures import captions
    from taskvec.figures.task_vector import change_norms
    from taskvec.output import write_json
    from taskvec.tables import write_csv

    rows = [{"name": name, **entry} for name, entry in content["parameters"].items()]
    write_csv(directory / TABLE, list(rows[0]), rows)
    if content["largest_changes"]:
        largest = [
            {**entry, "index": ", ".join(map(str, entry["index"]))}
            for entry in content["largest_changes"]
        ]
        write_csv(directory / LARGEST_TABLE, list(largest[0]), largest)
        change_norms(content, directory / FIGURE)
    content["figures"] = captions.captioned(captions.CHANGES if content["largest_changes"] else {})
    write_json(directory / RESULT, content)


def print_result(result: InvestigationResult) -> None:
    """What changed, why, where and most, and where it was saved."""
    from taskvec.figures.captions import caption_lines

    content, summary = result.document, result.summary
    cli.result(f"🔬 PARAMETER CHANGES in {content['inputs']['source']}:")
    cli.result(
        f"   {summary['changed_parameters']} of {summary['total_parameters']} parameters and "
        f"{summary['changed_elements']:,} of {summary['total_elements']:,} elements changed."
    )
    if summary["non_finite_elements"]:
        cli.result(f"   ⚠️ {are(summary['non_finite_elements'], 'element')} NaN or infinite.")
    if summary["attribution"]:
        _print_reasons(content)
    else:
        cli.result(
            "   Why is not known from the task vector alone: give --base_model and --lora_path, or "
            "--comparison."
        )
    _print_names(content["parameters"])
    _print_largest(content["largest_changes"])
    cli.result()
    for line in caption_lines(result.document["figures"]):
        cli.detail(line)
    cli.result(f"📁 Saved to: {result.output_dir}/")


def _print_reasons(content: dict[str, Any]) -> None:
    from taskvec.wording import percent, table

    header = ("why", "parameters", "elements changed", "norm", "share of ‖T‖²", "largest")
    rows = [
        (
            f"{reason}: {meaning}",
            str(total["parameters"]),
            f"{total['changed_elements']:,}",
            f"{total['norm']:.4g}",
            percent(total["squared_norm_share"]),
            f"{total['max_abs']:.3g}",
        )
        for reason, meaning in REASONS.items()
        for total in [content["summary"]["attribution"][reason]]
    ]
    cli.result()
    for line in table(header, rows):
        cli.result(f"   {line}")
    if content["summary"]["attribution"]["unexplained"]["parameters"] and not (
        content["inputs"]["adapter"] or content["inputs"]["comparison"]
    ):
        cli.result("   No adapter was given: with --lora_path, its changes are told from others.")


def _print_names(entries: dict[str, dict[str, Any]]) -> None:
    """Names of the parameters that changed, by reason, with their numbers folded."""
    from taskvec.architecture import fold_names

    changed = {name: entry for name, entry in entries.items() if entry["nonzero_elements"]}
    for reason in dict.fromkeys(entry["attribution"] for entry in changed.values()):
        names = [name for name in changed if changed[name]["attribution"] == reason]
        cli.detail()
        cli.detail(f"   Changed ({reason or 'why is not known'}):")
        for name in fold_names(names):
            cli.detail(f"      {name}")


def _print_largest(largest: list[dict[str, Any]]) -> None:
    from taskvec.wording import number, percent, table

    if not largest:
        return
    header = ("largest changes", "index", "change", "by adapter", "base", "change / base", "why")
    rows = [
        (
            entry["parameter"],
            ", ".join(map(str, entry["index"])),
            f"{entry['change']:+.6g}",
            number(entry["adapter_delta"], "+.6g"),
            number(entry["base"], "+.6g"),
            "-" if entry["relative"] is None else percent(entry["relative"]),
            entry["attribution"] or "-",
        )
        for entry in largest[:SHOWN]
    ]
    columns = list(zip(header, *rows, strict=True))
    known = [column for column in columns if set(column[1:]) != {"-"}]
    header_known, *rows_known = zip(*known, strict=True)
    cli.result()
    for line in table(header_known, rows_known):
        cli.result(f"   {line}")
    if len(largest) > SHOWN:
        cli.result(f"   ... and {len(largest) - SHOWN} more in {LARGEST_TABLE}")


def _body(args: argparse.Namespace) -> int:
    path, comparison = args.task_vector_path, args.comparison
    if path is None and args.finetuned_model is None:
        path = DEFAULT_TASK_VECTOR
    if comparison is None and args.base_model is None and Path(DEFAULT_COMPARISON).is_file():
        comparison = DEFAULT_COMPARISON
    result = investigate(
        args.output_dir,
        task_vector_path=path,
        finetuned_model=args.finetuned_model,
        base_model=args.base_model,
        lora_path=cli.lora_path(args) or None,
        comparison=comparison,
        comparison_required=args.comparison is not None,
        top_k=args.top_k,
        device=args.device,
        revision=args.revision,
    )
    print_result(result)
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
