#!/usr/bin/env python3
"""Deeper statistics of the files of step 2 and 3: elements, spectra, subspaces, identities.

    python analyze_lora_vs_task_vector_math.py \\
        --lora_file comparison_results/lora_deltas.safetensors \\
        --task_vector_file task_vectors_fp32/task_vector.safetensors \\
        --output_dir mathematical_analysis/

Writes mathematical_analysis.json, mathematical_analysis.md (definitions, results, and each identity
with its derivation and the numbers measured) and five figures. Exit status: 0 every identity holds,
1 one does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    from taskvec.checkpoint import Checkpoint
    from taskvec.mathematics.pair import Pair

RESULT, REPORT = "mathematical_analysis.json", "mathematical_analysis.md"
DEFAULT_LORA_FILE = "comparison_results/lora_deltas.safetensors"
DEFAULT_TASK_VECTOR_FILE = "task_vectors_fp32/task_vector.safetensors"
STEP_3 = "comparison_results.json"  # beside the deltas: names the base and each parameter's rank


@dataclass(frozen=True)
class AnalysisResult:
    """What was found.

    Attributes:
        output_dir: where the files are.
        document: the content of mathematical_analysis.json.
    """

    output_dir: Path
    document: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether every identity holds for every parameter."""
        return bool(self.document["summary"]["identities_hold"])


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument(
        "--lora_file",
        default=DEFAULT_LORA_FILE,
        metavar="FILE",
        help=f"the deltas that step 3 wrote (default: {DEFAULT_LORA_FILE})",
    )
    parser.add_argument(
        "--task_vector_file",
        default=DEFAULT_TASK_VECTOR_FILE,
        metavar="FILE",
        help=f"the task vector of step 2 (default: {DEFAULT_TASK_VECTOR_FILE})",
    )
    cli.add_output_dir(parser, "mathematical_analysis/")
    cli.add_base_model(
        parser,
        default=None,
        help="directory, .safetensors file or hub id of the base, from which the rounding floor is "
        f"predicted (default: the one that {STEP_3} beside --lora_file names, if it is here)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print a line for every parameter too"
    )
    return parser


def analyze(
    lora_file: str | Path = DEFAULT_LORA_FILE,
    task_vector_file: str | Path = DEFAULT_TASK_VECTOR_FILE,
    output_dir: str | Path = "mathematical_analysis/",
    *,
    base_model: str | None = None,
    revision: str | None = None,
    device: str = "auto",
) -> AnalysisResult:
    """Analyse a task vector beside the deltas of an adapter and write what was found.

    Args:
        lora_file: lora_deltas.safetensors of step 3.
        task_vector_file: task_vector.safetensors of step 2, or its directory.
        output_dir: absent, empty, or an earlier analysis, which is replaced.
        base_model: directory, .safetensors file or hub id; None: the one that step 3 recorded.
        revision: of a base on the hub.
        device: where the arithmetic runs.

    Raises:
        UserError: an input is unusable, the two files do not fit together, or one holds NaN.
    """
    from taskvec.figures.mathematics import CAPTIONS, draw
    from taskvec.mathematics.document import Analysis
    from taskvec.mathematics.markdown import markdown
    from taskvec.mathematics.pair import pairs
    from taskvec.mathematics.parameter import analyse
    from taskvec.output import output_directory, write_json
    from taskvec.taskvector import open_task_vector
    from taskvec.tensorfile import TensorFile

    target, torch_device = Path(output_dir), cli.pick_device(device)
    lora_path = _existing(Path(lora_file))
    record = _read_step_3(lora_path)
    with ExitStack() as stack:
        deltas = stack.enter_context(TensorFile(lora_path))
        vector = stack.enter_context(open_task_vector(Path(task_vector_file)))
        base = stack.enter_context(_open_base(base_model, revision, record))
        chosen = pairs(deltas, vector, base, torch_device)
        inputs = [lora_path, *vector.paths, *(base.paths if base else [])]
        partial = stack.enter_context(output_directory(target, [RESULT, REPORT, *CAPTIONS], inputs))
        analysis = Analysis([pair.name for pair in chosen])
        with cli.progress(sum(pair.info.nbytes for pair in chosen), "Analysing") as bar:
            for pair in chosen:
                analysis.add(analyse(pair, _recorded_rank(record, pair)))
                bar.update(pair.info.nbytes)
        content = analysis.document(
            {
                "lora_file": str(lora_file),
                "task_vector_file": str(task_vector_file),
                "base_model": base.source if base else None,
                "merged_precision_recorded": vector.merged_format and vector.merged_format.name,
                "base_precision": vector.base_format.name if vector.base_format else "stored",
            }
        )
        write_json(partial / RESULT, content)
        cli.notice("Drawing figures ...")
        captions = draw(content, partial)
        (partial / REPORT).write_text(markdown(content, captions), encoding="utf-8")
    return AnalysisResult(target, content)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise cli.UserError(f"{path}: no such file; compare_lora_task_vector.py writes it")
    return path


def _read_step_3(lora_file: Path) -> dict[str, Any]:
    """comparison_results.json beside the deltas; empty where there is none."""
    from taskvec.checkpoint import read_json_object

    path = lora_file.parent / STEP_3
    return read_json_object(path) if path.is_file() else {}


def _recorded_rank(record: dict[str, Any], pair: Pair) -> int | None:
    """The adapter's r, as step 3 recorded it: a hint and a label, never trusted further."""
    rank = _entry(record, "parameters", pair.name, "lora", "rank")
    return rank if isinstance(rank, int) and rank > 0 else None


def _entry(content: Any, *keys: str) -> Any:
    """What lies under these keys of nested objects; None where one is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


@contextmanager
def _open_base(
    base_model: str | None, revision: str | None, record: dict[str, Any]
) -> Iterator[Checkpoint | None]:
    """The base that is named, or else the one that step 3 recorded, if it still is what it was."""
    from taskvec.checkpoint import open_checkpoint

    if revision is not None and base_model is None:
        raise cli.UserError("--revision is the base's: give --base_model too")
    if base_model is not None:
        with open_checkpoint(base_model, revision) as base:
            base.refuse_quantised()
            yield base
        return
    source, commit = (_entry(record, "inputs", "base", key) for key in ("source", "revision"))
    if not isinstance(source, str) or not _is_here(source, commit):
        cli.notice("The base is not at hand (--base_model): floors come from T - delta itself.")
        yield None
        return
    with open_checkpoint(source, commit) as base:
        if base.identity()["files"] == _entry(record, "inputs", "base", "files"):
            yield base
        else:
            cli.notice(f"{source} has changed since step 3: floors come from T - delta itself.")
            yield None


def _is_here(source: str, commit: Any) -> bool:
    """True for a local path, or a hub id whose snapshot is in the cache: nothing is downloaded."""
    if Path(source).exists():
        return True
    if source.count("/") != 1 or not isinstance(commit, str):
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "config.json", revision=commit), str)


def print_result(result: AnalysisResult, *, verbose: bool = False) -> None:
    """The table and the finding."""
    from taskvec.mathematics.report import finding, parameter_table, result_table

    summary = result.document["summary"]
    cli.result("🔬 T AGAINST Δ, ELEMENT BY ELEMENT AND DIRECTION BY DIRECTION:")
    if verbose:
        for line in parameter_table(result.document):
            cli.result(f"   {line}")
        cli.result()
    for line in result_table(result.document):
        cli.result(f"   {line}")
    cli.result()
    checks = result.document["identities"]
    held = sum(check["holds"] for check in checks)
    mark = "✅" if result.holds else "❌"
    cli.result(f"{mark} {held} of {len(checks)} identities hold for {_count(summary)}")
    cli.result(f"📊 {finding(result.document)}")
    cli.result(f"📁 Analysis saved to: {result.output_dir}/")


def _count(summary: dict[str, Any]) -> str:
    count = summary["parameters"]
    return f"all {count} parameters" if count > 1 else "the one parameter"


def _body(args: argparse.Namespace) -> int:
    result = analyze(
        args.lora_file,
        args.task_vector_file,
        args.output_dir,
        base_model=args.base_model,
        revision=args.revision,
        device=args.device,
    )
    print_result(result, verbose=args.verbose)
    return cli.EXIT_OK if result.holds else cli.EXIT_DOES_NOT_HOLD


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
