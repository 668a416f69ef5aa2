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
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare_lora_task_vector import ComparisonResult, compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec import cli

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    from taskvec.behaviour import Agreement

EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE_BASE, EXAMPLE_LORA = EXAMPLES / "starcoder2-mini", EXAMPLES / "starcoder2-mini-lora"
PRECISIONS = ("fp32", "fp16", "bf16")
SUMMARY, REPORT = "validation_summary.json", "validation_report.txt"
IMPACT_FIGURE, ULP_FIGURE = "precision_impact.png", "rounding_error_in_ulps.png"
STEPS = 6

# Beside the weights, an fp32 model needs activations and the loader's own buffers.
_MEMORY_FACTOR = 1.3


@dataclass(frozen=True)
class Subject:
    """What is compared with the adapter in one precision: what was made, or what was given."""

    label: str
    task_vector: Path | None
    merged_model: str | None
    comparison: ComparisonResult


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
    parser.add_argument(
        "--output_dir",
        default="validation_results/",
        metavar="DIR",
        help="(default: validation_results/)",
    )
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
        help="formats to merge in (default: fp32 fp16 bf16)",
    )
    parser.add_argument(
        "--rounding", choices=["once", "peft"], default="once", help="as in merge_lora.py"
    )
    parser.add_argument(
        "--behaviour",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare logits on a few prompts (needs the whole model in memory)",
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
            validation_summary.json, validation_report.txt and two figures.
        task_vector_path, finetuned_model: judge this one (at most one of them) instead of
            merging in each of ``precisions``.
        behaviour: compare logits on ``prompts``.
        device, revision: as in `merge_lora.merge`.

    Raises:
        UserError: an input is unusable, or the disk is too small for the outputs.
    """
    from taskvec.output import output_file, write_json
    from taskvec.textreport import validation_report

    target = Path(output_dir)
    if task_vector_path and finetuned_model:
        raise cli.UserError("give either --task_vector_path or --finetuned_model, not both")
    given = task_vector_path is not None or finetuned_model is not None
    _check_inputs(base_model, lora_path, revision, target, () if given else precisions)
    device = str(cli.pick_device(device))
    common = {"device": device, "revision": revision}
    if given:
        subjects = [
            _judge_given(base_model, lora_path, target, task_vector_path, finetuned_model, common)
        ]
    else:
        subjects = _make_and_judge(base_model, lora_path, target, precisions, rounding, common)
    _step(4, "Weigh what each precision keeps")
    _draw_precisions(subjects, target)
    _step(5, "Compare behaviour on prompts")
    checked: dict[str, Any] = {"skipped": "switched off (--no-behaviour)"}
    if behaviour:
        checked = _behaviour(base_model, lora_path, subjects, prompts, device, revision)
    if "skipped" in checked:
        cli.detail(f"      skipped: {checked['skipped']}")
    _step(6, "Write the report")
    document = _document(base_model, lora_path, subjects, checked)
    with output_file(target / SUMMARY) as partial:
        write_json(partial, document)
    with output_file(target / REPORT) as partial:
        partial.write_text(validation_report(document), encoding="utf-8")
    return ValidationResult(target, document)


def _make_and_judge(
    base_model: str,
    lora_path: str | Sequence[str],
    target: Path,
    precisions: Sequence[str],
    rounding: str,
    common: dict[str, Any],
) -> list[Subject]:
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
        subjects.append(Subject(precision, file, str(merged[precision]), comparison))
    return subjects


def _judge_given(
    base_model: str,
    lora_path: str | Sequence[str],
    target: Path,
    task_vector_path: str | None,
    finetuned_model: str | None,
    common: dict[str, Any],
) -> Subject:
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
    comparison = compare(
        base_model,
        lora_path,
        target / "comparison_results",
        task_vector_path=task_vector_path,
        finetuned_model=finetuned_model,
        **common,
    )
    _say_compared("given", comparison)
    return Subject("given", file, finetuned_model, comparison)


def _behaviour(
    base_model: str,
    lora_path: str | Sequence[str],
    subjects: Sequence[Subject],
    prompts: Sequence[str] | None,
    device: str,
    revision: str | None,
) -> dict[str, Any]:
    """Logits of base + adapter against merged and base + task vector, or why not."""
    import torch

    from taskvec import behaviour
    from taskvec.checkpoint import open_checkpoint

    with open_checkpoint(base_model, revision) as base:
        directory, elements = base.directory, sum(i.elements for i in base.tensors.values())
        architectures = base.config().get("architectures") or [""]
    if directory is None or not str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")):
        return {"skipped": f"{base_model} is not a causal language model with a config.json"}
    needed, available = int(4 * elements * _MEMORY_FACTOR), _available_memory(device)
    if available is not None and needed > available:
        return {
            "skipped": f"a whole fp32 model needs {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free"
        }
    torch_device = torch.device(device)
    try:
        tokens = behaviour.tokenize(str(directory), prompts or behaviour.DEFAULT_PROMPTS)
    except cli.UserError as error:
        return {"skipped": str(error)}
    reference = behaviour.adapter_logits(str(directory), lora_path, tokens, torch_device)
    found: dict[str, Any] = {}
    for subject in subjects:
        entry: dict[str, Agreement] = {}
        if subject.merged_model:
            logits = behaviour.model_logits(subject.merged_model, tokens, torch_device)
            entry["merged"] = behaviour.agreement(reference, logits)
        if subject.task_vector:
            logits = behaviour.task_vector_logits(
                str(directory), subject.task_vector, tokens, torch_device
            )
            entry["base_plus_task_vector"] = behaviour.agreement(reference, logits)
        found[subject.label] = {name: asdict(value) for name, value in entry.items()}
        _say_behaviour(subject.label, entry)
    return found


def _document(
    base_model: str,
    lora_path: str | Sequence[str],
    subjects: Sequence[Subject],
    checked: dict[str, Any],
) -> dict[str, Any]:
    """validation_summary.json: inputs, one entry per precision, behaviour, and the verdict."""
    import torch

    summaries = {subject.label: subject.comparison.summary for subject in subjects}
    failures = [
        f"{label}: {summary['certificate']['reason']}"
        for label, summary in summaries.items()
        if not summary["equivalent"]
    ]
    failures += _behaviour_failures(summaries, checked)
    return {
        "valid": not failures,
        "failures": failures,
        "inputs": {"base_model": base_model, "lora_path": cli.adapters(lora_path)},
        "precisions": summaries,
        "behaviour": checked,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _behaviour_failures(summaries: dict[str, Any], checked: dict[str, Any]) -> list[str]:
    """In fp32 nothing but rounding may separate the three models; narrower ones only cost."""
    from taskvec.behaviour import FP32_KL_LIMIT

    return [
        f"{label}: the {kind.replace('_', ' ')} model does not behave like base + adapter "
        f"(KL {numbers['max_kl']:.2e} nats)"
        for label, entry in checked.items()
        if label in summaries and summaries[label]["certificate"]["precision"] == "fp32"
        for kind, numbers in entry.items()
        if numbers["max_kl"] > FP32_KL_LIMIT
    ]


def _check_inputs(
    base_model: str,
    lora_path: str | Sequence[str],
    revision: str | None,
    target: Path,
    precisions: Sequence[str],
) -> None:
    """Refuse before the first byte if the two do not fit together, or the outputs on the disk.

    Raises:
        UserError: names what does not fit, or what is needed and what is free.
    """
    from taskvec.adapter import open_adapter
    from taskvec.checkpoint import open_checkpoint
    from taskvec.rounding import FORMATS

    with open_checkpoint(base_model, revision) as base, open_adapter(lora_path, base):
        elements = sum(info.elements for info in base.tensors.values())
    # The merged model, at most a dense fp32 task vector, and at most as much in fp32 deltas.
    needed = sum(elements * (FORMATS[name].dtype.itemsize + 8) for name in precisions)
    parent = next(path for path in [target.resolve(), *target.resolve().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise cli.UserError(
            f"{target}: the outputs may take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "choose another --output_dir or fewer --precisions"
        )


def _available_memory(device: str) -> int | None:
    """Free bytes on the device, None where the system does not tell."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _draw_precisions(subjects: Sequence[Subject], directory: Path) -> None:
    from taskvec.figures import comparison as figures
    from taskvec.output import output_file

    documents = {subject.label: subject.comparison.document for subject in subjects}
    with output_file(directory / IMPACT_FIGURE) as partial:
        figures.precision_impact(documents, partial)
    with output_file(directory / ULP_FIGURE) as partial:
        figures.rounding_errors(documents, partial)
    for subject in subjects:
        cli.detail(f"      {subject.comparison.summary['certificate']['cost']['sentence']}")


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
    from taskvec.textreport import validation_table

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
    cli.result(f"📁 Everything is in {result.output_dir}/ ({REPORT} first)")


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
    return cli.run(build_parser(), _body, argv)


if __name__ == "__main__":
    sys.exit(main())
