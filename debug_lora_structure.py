#!/usr/bin/env python3
"""What is in a LoRA adapter, and does it fit a base? Every problem is listed, with what to do.

    python debug_lora_structure.py --lora_path checkpoint-40000/

    python debug_lora_structure.py --lora_path examples/starcoder2-mini-lora \\
        --base_model examples/starcoder2-mini --output_dir lora_structure/

Without --base_model the adapter is looked at alone. With it, exit status 0 means that merge_lora.py
would merge the two, in fp32, and 1 that it would refuse. Of the base only the headers are read.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from taskvec import cli

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    from taskvec.adapters.check import AdapterReport
    from taskvec.adapters.problems import Factors, Problem

RESULT = "lora_structure.json"
MOST_NAMES = 6  # of a problem on the terminal; the JSON has them all


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    cli.add_lora_path(parser, several=False)
    cli.add_base_model(
        parser,
        default=None,
        help="check the fit to this base: directory, .safetensors file or hub id (default: none)",
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", help=f"write {RESULT} there (default: nothing is written)"
    )
    return parser


def debug(
    lora_path: str,
    base_model: str | None = None,
    *,
    output_dir: str | Path | None = None,
    revision: str | None = None,
) -> AdapterReport:
    """Look at an adapter, and at whether it would merge into a base.

    Args:
        lora_path: directory or hub id of a PEFT adapter.
        base_model: directory, .safetensors file or hub id; None: look at the adapter alone.
        output_dir: where lora_structure.json goes; None: nowhere.
        revision: of a base on the hub.

    Raises:
        UserError: an input cannot be read, or the output directory holds something else.
    """
    from taskvec.adapters.check import inspect_adapter
    from taskvec.checkpoint import open_checkpoint
    from taskvec.output import output_directory, write_json

    if revision is not None and base_model is None:
        raise cli.UserError("--revision is the base's; give --base_model too")
    with ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(base_model, revision)) if base_model else None
        report = inspect_adapter(lora_path, base)
        if output_dir is not None:
            inputs = [report.path, *(base.paths if base else [])]
            target = Path(output_dir)
            partial = stack.enter_context(output_directory(target, [RESULT], inputs))
            write_json(partial / RESULT, report.as_json())
    return report


def print_result(report: AdapterReport) -> None:
    """What is in the file, what it would change, what is wrong, and the verdict last."""
    _print_contents(report)
    if report.base is not None:
        _print_touched(report)
    for problem in report.problems:
        _print_problem(problem)
    cli.result()
    warnings = len(report.warnings)
    tail = f" ({warnings} warning{'s' if warnings > 1 else ''})" if warnings else ""
    if not report.merges:
        count = len(report.errors)
        where = f" into {report.base}" if report.base else " into any base"
        noun = "problem" if count == 1 else "problems"
        cli.result(f"❌ Would not merge{where}: {count} {noun}{tail}")
    elif report.base is None:
        cli.result(f"✅ Nothing is wrong with the file itself{tail}; --base_model checks the fit")
    else:
        cli.result(f"✅ Would merge into {report.base}{tail}")


def _print_contents(report: AdapterReport) -> None:
    from taskvec.wording import size, table

    config = report.config
    kind = "rsLoRA" if config["use_rslora"] else config["peft_type"]
    if config["use_dora"]:
        kind = f"{kind} with DoRA"
    targets = config["target_modules"]
    shown = ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    cli.detail(f"🔎 {report.path}")
    cli.detail(
        f"   {kind}, r = {config['r']}, alpha = {config['lora_alpha']}, "
        f"made for {config['base_model_name_or_path'] or 'a base that it does not name'}"
    )
    cli.detail(f"   target_modules: {shown or 'not named'}")
    cli.detail(
        f"   {report.tensors} tensors, {len(report.factors)} modules, {report.elements:,} "
        f"parameters, {size(report.nbytes)}"
    )
    for words, count in report.beside.items():
        cli.detail(f"   beside the factors: {count} {words}")
    cli.detail()
    header = ["module", "pairs", "A", "B", "s", "dtype", "‖A‖", "‖B‖", "‖s B A‖"]
    for line in table(header, _factor_rows(report.factors)):
        cli.detail(f"   {line}")


def _factor_rows(factors: list[Factors]) -> list[list[str]]:
    """One row for all modules of the same name, shapes, scaling and dtype: norms as ranges."""
    from taskvec.architecture import fold_alike, template

    groups: dict[tuple[object, ...], list[Factors]] = {}
    for found in factors:
        shape = (
            template(found.module),
            found.A_shape,
            found.B_shape,
            found.scaling,
            tuple(found.dtypes),
        )
        groups.setdefault(shape, []).append(found)
    return [
        [
            fold_alike(found.module for found in group),
            str(len(group)),
            _shape(group[0].A_shape),
            _shape(group[0].B_shape),
            "?" if group[0].scaling is None else f"{group[0].scaling:.4g}",
            "/".join(dict.fromkeys(group[0].dtypes)),
            _range([found.A_norm for found in group]),
            _range([found.B_norm for found in group]),
            _range([found.update_norm for found in group]),
        ]
        for group in groups.values()
    ]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape)) or "scalar"


def _range(values: list[float | None]) -> str:
    """Smallest and largest of some norms; "?" where one is not defined."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "?"
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    return low if low == high else f"{low} to {high}"


def _print_touched(report: AdapterReport) -> None:
    from math import prod

    from taskvec.wording import percent

    elements = sum(prod(shape) for shape in report.touched.values())
    tensors, total = len(report.touched), report.base_elements
    verb = "Changes" if report.merges else "Fits"
    cli.detail()
    cli.detail(
        f"🎯 {verb} {tensors} of {report.base_tensors} tensors of {report.base} "
        f"({percent(tensors / report.base_tensors)}), {elements:,} of {total:,} elements "
        f"({percent(elements / total if total else 0.0)})"
    )


def _print_problem(problem: Problem) -> None:
    from taskvec.adapters.problems import ERROR
    from taskvec.architecture import fold_names

    mark = "✗" if problem.severity == ERROR else "⚠"
    cli.result()
    count = f" ({len(problem.names)})" if problem.names else ""
    cli.result(f"{mark} {problem.what}{count}")
    names = fold_names(problem.names)
    for name in names[:MOST_NAMES]:
        cli.result(f"     {name}")
    if len(names) > MOST_NAMES:
        cli.result(f"     ... and {len(names) - MOST_NAMES} more; --output_dir lists them all")
    cli.result(f"  -> {problem.todo}")


def _body(args: argparse.Namespace) -> int:
    report = debug(
        cli.adapters(cli.lora_path(args)),
        args.base_model,
        output_dir=args.output_dir,
        revision=args.revision,
    )
    print_result(report)
    return cli.EXIT_OK if report.merges else cli.EXIT_DOES_NOT_HOLD


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
