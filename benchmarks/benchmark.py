#!/usr/bin/env python3
"""Measure merge, extract and compare beside the obvious way and `cp -r`, at any model size.

    python benchmarks/benchmark.py --width 0.25 0.35 0.5 0.7 1 1.5 --output benchmark.md

Makes a StarCoder2-shaped base with random weights and a rank-8 adapter, runs every step in a
process of its own, first the project's, then transformers' and PEFT's on the same files, checks
that their results agree, and prints times, memory and bytes. Everything that it makes is removed.
Exit status: 0 the results agree, 1 they do not, 2 bad input or not enough disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from benchmarks import inputs
from benchmarks.measure import CommandFailed, measure
from benchmarks.table import Row, WidthResult, markdown
from taskvec import cli

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("merge", "extract", "compare")
OURS, OBVIOUS, COPY, READ = "this project", "obvious", "cp -r", "cat"
BASE, ADAPTER, MERGED, VECTOR, COMPARISON = "base", "adapter", "merged", "vector", "comparison"
SPARE_DISK = 1 << 28  # what else may be written meanwhile
MODELS_IN_MEMORY = 2  # the obvious way of extracting holds them in fp32 at one time

# The obvious way sums and compares in fp32: how far its figures may be from ours.
COSINE_SLACK, DIFFERENCE_SLACK = 1e-2, 0.05


@dataclass
class Run:
    """One width: where its files are, what is measured, what was found so far."""

    directory: Path
    shapes: inputs.Shapes
    steps: list[str]
    precision: str
    obvious: bool
    device: str = "cpu"
    rows: list[Row] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)

    def measure(self, step: str, way: str, command: list[str], output: str | None = None) -> str:
        """Run one command and note its figures; returns its stdout.

        What it left for the system to write is put on disk after it, and timed, so that it does
        not slow the next one.
        """
        cli.notice(f"  {step}: {way} ...")
        measured = measure(command, self.directory, keep_output=way != READ)
        flushed = _flush(self.directory / output) if output else 0.0
        if step not in STEPS or step in self.steps:
            self.rows.append(Row(step, way, measured, flushed))
        return measured.output

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the base, and of what the largest outputs take."""
        base = inputs.nbytes(self.shapes)
        changed = inputs.nbytes({n: s for n, s in self.shapes.items() if inputs.is_adapted(n)})
        fp32 = self.precision == "fp32"
        return {
            BASE: base,
            MERGED: base if fp32 else base // 2,
            VECTOR: changed if fp32 else base,  # zeros are holes
            COMPARISON: changed,
        }

    @property
    def moves(self) -> dict[str, tuple[int, int]]:
        """Bytes that each step cannot but read, and write."""
        size = self.sizes
        return {
            "merge": (size[BASE], size[MERGED]),
            "extract": (size[BASE] + size[MERGED], size[VECTOR]),
            "compare": (size[COMPARISON] + size[VECTOR], size[COMPARISON]),
        }

    @property
    def disk_needed(self) -> int:
        """The most that lies on disk at one time."""
        size = self.sizes
        ways = 2 if self.obvious else 1
        peaks = [
            2 * size[BASE],
            size[BASE] + ways * size[MERGED],
            size[BASE] + size[MERGED] + size[VECTOR] + (size[BASE] if self.obvious else 0),
            size[BASE] + size[VECTOR] + size[COMPARISON],
        ]
        return max(peaks[: 2 + STEPS.index(max(self.steps, key=STEPS.index))]) + SPARE_DISK


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    parser.add_argument(
        "--width",
        type=_width,
        nargs="+",
        default=[0.25],
        metavar="W",
        help="fractions of StarCoder2-3B's width (default: 0.25; 0.4 is a base of 2 GB, 0.5 of "
        "3.2 GB, 1 of 12.1 GB, 1.5 about the size of a 7B model)",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=STEPS,
        default=list(STEPS),
        help="what to measure (default: all); an earlier step that one needs is run all the same",
    )
    cli.add_precision(parser, "the merged model")
    parser.add_argument(
        "--skip_obvious", action="store_true", help="measure this project and cp alone"
    )
    parser.add_argument(
        "--device", default="cpu", help="where this project computes (default: cpu)"
    )
    parser.add_argument("--output", metavar="FILE.md", help="write the table here too")
    parser.add_argument(
        "--work_dir",
        default=".",
        metavar="DIR",
        help="on the disk to be measured; a temporary directory is made in it (default: .)",
    )
    return parser


def benchmark(
    widths: list[float],
    *,
    steps: list[str],
    precision: str = "fp32",
    obvious: bool = True,
    device: str = "cpu",
    work_dir: str | Path = ".",
) -> list[WidthResult]:
    """Measure the steps at each width.

    Args:
        widths: fractions of StarCoder2-3B's width.
        steps: of `STEPS`.
        precision: of the merged model.
        obvious: run the obvious way too where its models fit into memory, and check that the
            results agree.
        device: where this project computes.
        work_dir: where a temporary directory may be made.

    Raises:
        UserError: not enough disk, or a command that failed.
    """
    if not Path(work_dir).is_dir():
        raise cli.UserError(f"--work_dir {work_dir}: no such directory")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=work_dir) as temporary:
        runs = []
        for number, width in enumerate(widths):
            directory = Path(temporary).resolve() / str(number)
            (directory / BASE).mkdir(parents=True)
            (directory / ADAPTER).mkdir()
            shapes = inputs.write_config(directory / BASE, width)
            fits = MODELS_IN_MEMORY * inputs.nbytes(shapes) < _memory()
            runs.append(Run(directory, shapes, steps, precision, obvious and fits, device))
        _check_disk(runs, Path(temporary))
        results = []
        for width, run in zip(widths, runs, strict=True):
            cli.notice(f"Width {width:g}: a base of {run.sizes[BASE] / 1e9:.2f} GB")
            if obvious and not run.obvious:
                cli.notice("  (the obvious way is left out: two such models do not fit in memory)")
            results.append(_measure_width(width, run))
            shutil.rmtree(run.directory)
        return results


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_disk(runs: list[Run], directory: Path) -> None:
    needed = max(run.disk_needed for run in runs)
    free = shutil.disk_usage(directory).free
    cli.notice(f"Needs {needed / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free.")
    if needed > free:
        raise cli.UserError(
            f"{directory.parent}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed; "
            "use a smaller --width, another --work_dir, or --skip_obvious"
        )


def _measure_width(width: float, run: Run) -> WidthResult:
    inputs.write_base(run.directory / BASE, run.shapes)
    inputs.write_adapter(run.directory / ADAPTER, run.shapes)
    try:
        torch_alone = measure([sys.executable, "-c", "import torch"], run.directory)
        _copy(run)
        _merge(run)
        if {"extract", "compare"} & set(run.steps):
            _extract(run)
        if "compare" in run.steps:
            _compare(run)
    except CommandFailed as error:
        raise cli.UserError(str(error)) from None
    elements = run.sizes[BASE] // 4
    return WidthResult(
        width, elements, run.precision, torch_alone, run.rows, run.moves, run.disagreements
    )


def _copy(run: Run) -> None:
    files = sorted(path.name for path in (run.directory / BASE).glob("*.safetensors"))
    run.measure("read", READ, ["cat", *(f"{BASE}/{file}" for file in files)])
    run.measure("copy", COPY, ["cp", "-r", BASE, "copy"], "copy")
    shutil.rmtree(run.directory / "copy")


def _merge(run: Run) -> None:
    rounding = "once" if run.precision == "fp32" else "peft"  # the obvious way's own
    flags = ["--base_model", BASE, "--lora_path", ADAPTER, "--output_dir", MERGED]
    flags += ["--precision", run.precision, "--rounding", rounding]
    run.measure("merge", OURS, _ours(run, "merge_lora.py", *flags), MERGED)
    if run.obvious and "merge" in run.steps:
        other = "merged_obvious"
        run.measure("merge", OBVIOUS, _obvious("merge", BASE, ADAPTER, other, run.precision), other)
        _check_equal(run, "merge", MERGED, other)
        shutil.rmtree(run.directory / other)


def _extract(run: Run) -> None:
    flags = ["--base_model", BASE, "--finetuned_model", MERGED, "--output_dir", VECTOR]
    run.measure("extract", OURS, _ours(run, "extract_task_vectors.py", *flags), VECTOR)
    if run.obvious and "extract" in run.steps:
        other = "vector_obvious.safetensors"
        run.measure("extract", OBVIOUS, _obvious("extract", BASE, MERGED, other), other)
        _check_equal(run, "extract", f"{VECTOR}/task_vector.safetensors", other)
        (run.directory / other).unlink()
    shutil.rmtree(run.directory / MERGED)


def _compare(run: Run) -> None:
    flags = ["--base_model", BASE, "--lora_path", ADAPTER, "--task_vector_path", VECTOR]
    flags += ["--output_dir", COMPARISON, "--no-generate_plots"]
    run.measure("compare", OURS, _ours(run, "compare_lora_task_vector.py", *flags), COMPARISON)
    if not run.obvious:
        return
    vector = f"{VECTOR}/task_vector.safetensors"
    theirs = json.loads(run.measure("compare", OBVIOUS, _obvious("compare", BASE, ADAPTER, vector)))
    document = run.directory / COMPARISON / "comparison_results.json"
    ours = json.loads(document.read_text(encoding="utf-8"))["summary"]
    for key, value, slack in (
        ("shared_parameters", theirs["parameters"], 0.0),
        ("average_cosine_similarity", theirs["cosine"], COSINE_SLACK),
        ("max_absolute_difference", theirs["max_difference"], DIFFERENCE_SLACK),
    ):
        if abs(ours[key] - value) > slack * abs(value):
            run.disagreements.append(f"compare: {key} is {ours[key]}, the obvious way has {value}")


def _ours(run: Run, script: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / script), "--device", run.device, "--quiet", *flags]


def _obvious(step: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / "obvious.py"), step, *arguments]


def _check_equal(run: Run, step: str, ours: str, theirs: str) -> None:
    names = list(differing_tensors(run.directory / ours, run.directory / theirs))
    if names:
        run.disagreements.append(f"{step}: {len(names)} tensors differ, the first is {names[0]}")


def differing_tensors(one: Path, other: Path) -> Iterator[str]:
    """Names of tensors that two models, or task vectors, do not share bit for bit."""
    import torch

    from taskvec.checkpoint import open_checkpoint
    from taskvec.tensorfile import row_blocks

    with open_checkpoint(str(one)) as first, open_checkpoint(str(other)) as second:
        yield from sorted(first.tensors.keys() ^ second.tensors.keys())
        for name, info in first.tensors.items():
            if name not in second.tensors:
                continue
            found = second.tensors[name]
            if (info.dtype, info.shape) != (found.dtype, found.shape) or not all(
                torch.equal(
                    *(model.read(name, *rows).view(torch.uint8) for model in (first, second))
                )
                for rows in row_blocks(info, 1 << 20)
            ):
                yield name


def _flush(path: Path) -> float:
    """Put a file, or every file of a directory, on disk; returns the seconds that it took."""
    start = time.perf_counter()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return time.perf_counter() - start


def _width(text: str) -> float:
    value = float(text)
    if not 0 < value <= 8:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0 and at most 8")
    return value


def _body(args: argparse.Namespace) -> int:
    if args.output is not None and not Path(args.output).resolve().parent.is_dir():
        raise cli.UserError(f"--output {args.output}: no such directory")
    results = benchmark(
        args.width,
        steps=args.steps,
        precision=args.precision,
        obvious=not args.skip_obvious,
        device=args.device,
        work_dir=args.work_dir,
    )
    text = markdown(results)
    cli.result(text)
    if args.output is not None:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    agree = not any(result.disagreements for result in results)
    return cli.EXIT_OK if agree else cli.EXIT_DOES_NOT_HOLD


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


def _end(signum: int, frame: object) -> None:
    """A polite kill is an exception here, so that everything is removed on the way out."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main())
