#!/usr/bin/env python3
"""What precision does to a merge: which changed parameters are real, and which are artifacts.

    python quick_precision_test.py          # task_vectors_fp16/ against task_vectors_fp32/

    python quick_precision_test.py --base_model bigcode/starcoder2-3b \\
        --lora_path checkpoint-40000/       # fp32, fp16 and bf16 in one pass, no model written

Writes precision_impact.json and precision_impact.png.
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

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    from taskvec.rounding import Format
    from taskvec.taskvector import StoredTaskVector

RESULT, FIGURE = "precision_impact.json", "precision_impact.png"
DEFAULT_PATHS = {"fp16": "task_vectors_fp16/", "fp32": "task_vectors_fp32/"}
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class PrecisionResult:
    """What was found.

    Attributes:
        output_dir: where the files are.
        document: the content of precision_impact.json.
    """

    output_dir: Path
    document: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per format and way of subtracting the base."""
        rows: list[dict[str, Any]] = self.document["impacts"]
        return rows


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    for precision in PRECISIONS:
        default = DEFAULT_PATHS.get(precision, "none")
        parser.add_argument(
            f"--{precision}_path",
            metavar="PATH",
            help=f"task vector of the {precision} merge: a file or its directory "
            f"(default: {default})",
        )
    cli.add_base_model(parser, default=None)
    cli.add_lora_path(parser, default=None)
    parser.add_argument(
        "--rounding",
        choices=["once", "peft"],
        help="as in merge_lora.py. once: add in fp32 and round the sum (default); peft: round the "
        "base first",
    )
    cli.add_output_dir(parser, "precision_test/")
    return parser


def compare_task_vectors(
    paths: dict[str, str], output_dir: str | Path, *, device: str = "auto"
) -> PrecisionResult:
    """Set the task vectors of one merge, stored in several formats, against the fp32 one.

    Args:
        paths: task vector file or its directory, by format; "fp32" must be among them.
        output_dir: absent, empty, or an earlier output, which is replaced.
        device: where the arithmetic runs.

    Raises:
        UserError: a task vector is missing, is not of the format it is given for, or is of
            another architecture.
    """
    from taskvec.output import output_directory
    from taskvec.precision import measure_task_vectors, stored_findings

    with ExitStack() as stack:
        vectors = _open_vectors(paths, stack)
        torch_device = cli.pick_device(device)
        inputs = [path for vector in vectors.values() for path in vector.paths]
        partial = stack.enter_context(output_directory(Path(output_dir), [RESULT, FIGURE], inputs))
        size = sum(info.nbytes for v in vectors.values() for info in v.file.tensors.values())
        with cli.progress(size, "Comparing") as bar:
            impacts, tensors = measure_task_vectors(vectors, torch_device, bar.update)
        rows = [impact.as_json() for impact in impacts]
        content = _document(
            rows,
            inputs={"task_vectors": {format.name: v.source for format, v in vectors.items()}},
            reference="the fp32 task vector",
            total=len(tensors),
            findings=stored_findings(rows, len(tensors)),
        )
        _write(content, partial)
    return PrecisionResult(Path(output_dir), content)


def compare_merges(
    base_model: str,
    lora_path: str | Sequence[str],
    output_dir: str | Path,
    *,
    rounding: str = "once",
    device: str = "auto",
    revision: str | None = None,
) -> PrecisionResult:
    """Merge in every format and subtract the base both ways, in one pass that writes no model.

    Args:
        base_model: directory, .safetensors file or hub id.
        lora_path: directory or hub id of a PEFT LoRA adapter, or several, merged in turn.
        output_dir: absent, empty, or an earlier output, which is replaced.
        rounding: once or peft (`taskvec.rounding.RECIPES`).
        device: where the arithmetic runs.
        revision: of a base on the hub.

    Raises:
        UserError: an input is unusable.
    """
    from taskvec.adapter import open_adapter
    from taskvec.checkpoint import open_checkpoint
    from taskvec.output import output_directory
    from taskvec.precision import findings, measure_merges
    from taskvec.rounding import ROUNDINGS

    with (
        open_checkpoint(base_model, revision) as base,
        open_adapter(lora_path, base) as adapter,
        output_directory(
            Path(output_dir), [RESULT, FIGURE], [*base.paths, *adapter.paths]
        ) as partial,
        cli.progress(base.nbytes, "Merging in fp32, fp16 and bf16") as bar,
    ):
        base.refuse_quantised()
        torch_device = cli.pick_device(device)
        impacts = measure_merges(base, adapter, ROUNDINGS[rounding], torch_device, bar.update)
        rows = [impact.as_json() for impact in impacts]
        content = _document(
            rows,
            inputs={
                "base": base.identity(),
                "adapter": cli.adapters(lora_path),
                "rounding": rounding,
            },
            reference="the adapter's exact delta",
            total=sum(info.is_float for info in base.tensors.values()),
            findings=findings(rows),
        )
        _write(content, partial)
    return PrecisionResult(Path(output_dir), content)


def _open_vectors(paths: dict[str, str], stack: ExitStack) -> dict[Format, StoredTaskVector]:
    """The task vectors, each of the format it was given for."""
    from taskvec.rounding import FORMATS
    from taskvec.taskvector import open_task_vector

    _refuse_missing(paths)
    vectors = {}
    for precision in PRECISIONS:
        if precision in paths:
            vector = stack.enter_context(open_task_vector(Path(paths[precision])))
            _check_format(precision, vector)
            vectors[FORMATS[precision]] = vector
    return vectors


def _refuse_missing(paths: dict[str, str]) -> None:
    missing = [precision for precision in paths if not Path(paths[precision]).exists()]
    if missing:
        name = missing[0]
        raise cli.UserError(
            f"{' and '.join(paths[precision] for precision in missing)}: no such task vector; "
            f"make it with `python merge_lora.py --precision {name} --output_dir "
            f"merged_model_{name}` and `python extract_task_vectors.py --finetuned_model "
            f"merged_model_{name}/ --output_dir task_vectors_{name}/`, or test a merge that is "
            "never written: `python quick_precision_test.py --base_model MODEL --lora_path ADAPTER`"
        )


def _check_format(precision: str, vector: StoredTaskVector) -> None:
    """Refuse a task vector that says it is not what its flag says."""
    found, base = vector.merged_format, vector.base_format
    if found is not None and found.name != precision:
        raise cli.UserError(
            f"--{precision}_path {vector.source}: was extracted from a model in {found.name}"
        )
    if precision == "fp32" and base is not None and base.name != "fp32":
        raise cli.UserError(
            f"--fp32_path {vector.source}: was extracted with --base_precision {base.name}, so it "
            "shows that rounding too; extract it with --base_precision stored"
        )


def _document(
    rows: list[dict[str, Any]],
    *,
    inputs: dict[str, Any],
    reference: str,
    total: int,
    findings: list[str],
) -> dict[str, Any]:
    from taskvec.figures import captions

    return {
        "inputs": inputs,
        "reference": reference,
        "total_parameters": total,
        "findings": findings,
        "impacts": rows,
        "figures": captions.captioned(captions.PRECISION),
    }


def _write(content: dict[str, Any], directory: Path) -> None:
    from taskvec.figures.task_vector import artifacts_by_precision
    from taskvec.output import write_json

    write_json(directory / RESULT, content)
    artifacts_by_precision(content, directory / FIGURE)


def print_result(result: PrecisionResult) -> None:
    """The table, what it says, and where it was saved."""
    from taskvec.figures.captions import caption_lines
    from taskvec.wording import number, percent, table

    total = result.document["total_parameters"]
    header = (
        "merged in",
        "base subtracted",
        "changed",
        "real",
        "artifacts",
        "relative error",
        "SNR (dB)",
        "elements lost",
    )
    cells = [
        (
            row["precision"],
            "as stored" if row["base_precision"] == "stored" else f"as {row['base_precision']}",
            f"{row['changed_parameters']}/{total}",
            str(row["real_parameters"]),
            str(row["artifact_parameters"]),
            number(row["relative_error"], ".2e"),
            number(row["snr_db"], ".1f"),
            "-" if row["lost_share"] is None else percent(row["lost_share"]),
        )
        for row in result.rows
    ]
    cli.result("🔬 PRECISION IMPACT:")
    for line in table(header, cells):
        cli.result(f"   {line}")
    cli.detail(
        f"   Relative error: ‖T - update‖ / ‖update‖; the update is {result.document['reference']}."
    )
    cli.result()
    for sentence in result.document["findings"]:
        cli.result(f"💡 {sentence}")
    for line in caption_lines(result.document["figures"]):
        cli.detail(line)
    cli.result(f"📁 Saved to: {result.output_dir}/")


def _body(args: argparse.Namespace) -> int:
    given = {p: path for p in PRECISIONS if (path := getattr(args, f"{p}_path")) is not None}
    if args.base_model is None and args.lora_path is None:
        if args.rounding or args.revision:
            flag = "rounding" if args.rounding else "revision"
            raise cli.UserError(f"--{flag} needs --base_model and --lora_path")
        paths = {**DEFAULT_PATHS, **given}
        result = compare_task_vectors(paths, args.output_dir, device=args.device)
    elif args.base_model is None or args.lora_path is None:
        raise cli.UserError("--base_model and --lora_path go together")
    elif given:
        raise cli.UserError(
            f"give either --{next(iter(given))}_path or --base_model and --lora_path, not both"
        )
    else:
        result = compare_merges(
            args.base_model,
            cli.lora_path(args),
            args.output_dir,
            rounding=args.rounding or "once",
            device=args.device,
            revision=args.revision,
        )
    print_result(result)
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
