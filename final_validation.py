#!/usr/bin/env python3
"""Everything in one command: merge, extract, compare, check the behaviour, judge.

    python final_validation.py                       # the bundled example, any CPU, under a minute
    python final_validation.py --base_model bigcode/starcoder2-3b --lora_path checkpoint-40000/
    python final_validation.py --base_model BASE --lora_path ADAPTER --finetuned_model MERGED

Every step is one of the other scripts' public functions. The exit status is the verdict: 0 the
certificate holds in every precision, 1 it does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare_lora_task_vector import ComparisonResult, compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec import cli, processes

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    from taskvec.behaviour import Agreement
    from taskvec.reports.outcome import Judged

EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE_BASE, EXAMPLE_LORA = EXAMPLES / "starcoder2-mini", EXAMPLES / "starcoder2-mini-lora"
PRECISIONS = ("fp32", "fp16", "bf16")
STEPS = 6


@dataclass(frozen=True)
class ValidationResult:
    """The outcome of all steps.

    Attributes:
        output_dir: where everything is.
        document: the content of validation_summary.json.
    """

    output_dir: Path
    document: dict[str, Any]

    @property
    def holds(self) -> bool:
        return bool(self.document["valid"])


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    cli.add_base_model(parser, default=None)
    cli.add_lora_path(parser, default=None)
    cli.add_output_dir(parser, "validation_results/")
    parser.add_argument(
        "--task_vector_path", metavar="PATH", help="judge this task vector instead of making one"
    )
    parser.add_argument(
        "--finetuned_model", metavar="MODEL", help="judge this merged model instead of making one"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        metavar="P",
        help="formats to merge in, where no merge is given (default: fp32 fp16 bf16)",
    )
    parser.add_argument(
        "--rounding",
        choices=["once", "peft"],
        default="once",
        help="as in merge_lora.py (default: once)",
    )
    parser.add_argument(
        "--behaviour",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare logits on a few prompts, with the whole model in memory (default: on)",
    )
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="(default: five of code)")
    return parser


def validate(
    base_model: str,
    lora_path: str | Sequence[str],
    output_dir: str | Path,
    *,
    task_vector_path: str | None = None,
    finetuned_model: str | None = None,
    precisions: Sequence[str] = PRECISIONS,
    rounding: str = "once",
    behaviour: bool = True,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> ValidationResult:
    """Run every step and write what was found.

    Args:
        base_model, lora_path: as in `merge_lora.merge`.
        output_dir: merged_model_*/, task_vectors_*/ and comparison_results_*/ go below it, beside
            validation_report.html, validation_report.txt, validation_summary.json and two figures.
        task_vector_path, finetuned_model: judge this one (at most one of them) instead of
            merging in each of ``precisions``.
        behaviour: compare logits on ``prompts``.
        device, revision: as in `merge_lora.merge`.

    Raises:
        UserError: an input is unusable, or the disk is too small for the outputs.
    """
    from taskvec.reports import outcome, validation

    target = Path(output_dir)
    if task_vector_path and finetuned_model:
        raise cli.UserError("give either --task_vector_path or --finetuned_model, not both")
    given = task_vector_path is not None or finetuned_model is not None
    made = () if given else precisions
    processes.by_main(
        lambda: validation.check_inputs(base_model, lora_path, revision, target, made)
    )
    device = str(cli.pick_device(device))
    common = {"device": device, "revision": revision}
    if given:
        subjects = [
            _judge_given(base_model, lora_path, target, task_vector_path, finetuned_model, common)
        ]
    else:
        subjects = _make_and_judge(base_model, lora_path, target, precisions, rounding, common)

    def conclude() -> ValidationResult:
        _step(4, "Weigh what each precision keeps")
        figures = outcome.draw(subjects, target)
        for subject in subjects:
            cli.detail(f"      {subject.summary['certificate']['cost']['sentence']}")
        _step(5, "Compare behaviour on prompts")
        checked: dict[str, Any] = {"skipped": "switched off (--no-behaviour)"}
        if behaviour:
            checked = _behaviour(base_model, lora_path, subjects, prompts, device, revision)
        if "skipped" in checked:
            cli.detail(f"      skipped: {checked['skipped']}")
        _step(6, "Write the report")
        inputs = {
            **validation.inputs_of(base_model, lora_path, revision),
            "judged": finetuned_model or task_vector_path,
        }
        document = outcome.write(subjects, target, checked, inputs=inputs, figures=figures)
        return ValidationResult(target, document)

    return processes.by_main(conclude)


def _make_and_judge(
    base_model: str,
    lora_path: str | Sequence[str],
    target: Path,
    precisions: Sequence[str],
    rounding: str,
    common: dict[str, Any],
) -> list[Judged]:
    from taskvec.reports.outcome import Judged

    merged = {precision: target / f"merged_model_{precision}" for precision in precisions}
    vectors = {precision: target / f"task_vectors_{precision}" for precision in precisions}
    _step(1, "Merge the adapter into the base")
    for precision, path in merged.items():
        made = merge(base_model, lora_path, path, precision=precision, rounding=rounding, **common)
        cli.detail(f"      {precision}: {len(made.changed_parameters)} parameters merged, {path}/")
    _step(2, "Extract task vectors")
    for precision, path in vectors.items():
        found = extract(base_model, str(merged[precision]), path, **common)
        cli.detail(
            f"      {precision}: {found.nonzero_parameters} of {found.total_parameters} "
            f"parameters changed, {path}/"
        )
    _step(3, "Compare with the adapter, element by element")
    subjects = []
    for precision in precisions:
        path = target / f"comparison_results_{precision}"
        comparison = compare(
            base_model, lora_path, path, task_vector_path=vectors[precision], **common
        )
        _say_compared(precision, comparison)
        file = vectors[precision] / "task_vector.safetensors"
        subjects.append(Judged(precision, file, str(merged[precision]), path, comparison.document))
    return subjects


def _judge_given(
    base_model: str,
    lora_path: str | Sequence[str],
    target: Path,
    task_vector_path: str | None,
    finetuned_model: str | None,
    common: dict[str, Any],
) -> Judged:
    from taskvec.reports.outcome import GIVEN, Judged

    _step(1, "Merge the adapter into the base")
    cli.detail(f"      skipped: judging {finetuned_model or task_vector_path}")
    _step(2, "Extract task vectors")
    file = None
    if finetuned_model:
        found = extract(base_model, finetuned_model, target / "task_vectors", **common)
        file = target / "task_vectors" / "task_vector.safetensors"
        cli.detail(
            f"      {found.nonzero_parameters} of {found.total_parameters} parameters changed"
        )
    else:
        cli.detail("      skipped: given")
        path = Path(task_vector_path or "")
        file = path / "task_vector.safetensors" if path.is_dir() else path
    _step(3, "Compare with the adapter, element by element")
    place = target / "comparison_results"
    comparison = compare(
        base_model,
        lora_path,
        place,
        task_vector_path=task_vector_path,
        finetuned_model=finetuned_model,
        **common,
    )
    _say_compared(GIVEN, comparison)
    return Judged(GIVEN, file, finetuned_model, place, comparison.document)


def _behaviour(
    base_model: str,
    lora_path: str | Sequence[str],
    subjects: Sequence[Judged],
    prompts: Sequence[str] | None,
    device: str,
    revision: str | None,
) -> dict[str, Any]:
    """Logits of base + adapter against merged and base + task vector, or why not."""
    import torch

    from taskvec import behaviour
    from taskvec.checkpoint import open_checkpoint

    torch_device = torch.device(device)
    with open_checkpoint(base_model, revision) as base:
        directory, reason = str(base.directory), behaviour.obstacle(base, torch_device)
    if reason:
        return {"skipped": reason}
    try:
        tokens = behaviour.tokenize(directory, prompts or behaviour.DEFAULT_PROMPTS)
        reference = behaviour.adapter_logits(directory, lora_path, tokens, torch_device)
    except cli.UserError as error:  # without a reference there is nothing to compare with
        return {"skipped": str(error)}
    found: dict[str, Any] = {}
    for subject in subjects:
        entry: dict[str, Agreement] = {}
        if subject.merged_model:
            logits = behaviour.model_logits(subject.merged_model, tokens, torch_device)
            entry["merged"] = behaviour.agreement(reference, logits)
        if subject.task_vector:
            logits = behaviour.task_vector_logits(
                directory, subject.task_vector, tokens, torch_device
            )
            entry["base_plus_task_vector"] = behaviour.agreement(reference, logits)
        found[subject.label] = {name: asdict(value) for name, value in entry.items()}
        _say_behaviour(subject.label, entry)
    return found


def _step(number: int, title: str) -> None:
    cli.detail(f"[{number}/{STEPS}] {title}")


def _say_compared(label: str, comparison: ComparisonResult) -> None:
    mark = "✓" if comparison.holds else "✗"
    certificate = comparison.summary["certificate"]
    cli.detail(f"    {mark} {label}: {certificate['verdict']}: {certificate['reason']}")


def _say_behaviour(label: str, entry: dict[str, Agreement]) -> None:
    for name, value in entry.items():
        cli.detail(
            f"      {label}: {name.replace('_', ' ')}: largest logit difference "
            f"{value.max_logit_difference:.2e}, KL {value.mean_kl:.2e} nats, same next token at "
            f"{100 * value.equal_top1:.1f} % of {value.positions} positions"
        )


def print_result(result: ValidationResult) -> None:
    """The table, the verdict, and where the files are."""
    from taskvec.reports.outcome import HTML_REPORT
    from taskvec.reports.text import validation_table

    cli.result()
    for line in validation_table(result.document):
        cli.result(line)
    cli.result()
    if result.holds:
        cli.result("✅ VALIDATION SUCCESSFUL: LoRA and Task Vectors are mathematically equivalent!")
    else:
        cli.result("❌ VALIDATION FAILED:")
        for failure in result.document["failures"]:
            cli.result(f"   {failure}")
        for summary in result.document["precisions"].values():
            for cause in summary["certificate"]["diagnosis"]:
                cli.result(f"   Diagnosis: {cause['sentence']}")
    cli.result(f"📁 Everything is in {result.output_dir}/ ({HTML_REPORT} first)")


def _inputs(args: argparse.Namespace) -> tuple[str, str | list[str]]:
    """Base and adapters as given, or the bundled pair."""
    lora_path = cli.lora_path(args)
    if (args.base_model is None) != (not lora_path):
        raise cli.UserError("give both --base_model and --lora_path, or neither for the example")
    if lora_path:
        return args.base_model, lora_path
    return _short(EXAMPLE_BASE), _short(EXAMPLE_LORA)


def _short(path: Path) -> str:
    here = Path.cwd()
    return (
        str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else str(path)
    )


def _body(args: argparse.Namespace) -> int:
    base_model, lora_path = _inputs(args)
    result = validate(
        base_model,
        lora_path,
        args.output_dir,
        task_vector_path=args.task_vector_path,
        finetuned_model=args.finetuned_model,
        precisions=args.precisions,
        rounding=args.rounding,
        behaviour=args.behaviour,
        prompts=args.prompts,
        device=args.device,
        revision=args.revision,
    )
    print_result(result)
    return cli.EXIT_OK if result.holds else cli.EXIT_DOES_NOT_HOLD


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv, shared=True)


if __name__ == "__main__":
    sys.exit(main())
