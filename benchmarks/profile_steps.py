#!/usr/bin/env python3
"""Where the time of merge, extract and compare goes: by operation of PyTorch and by call.

    python benchmarks/profile_steps.py --width 0.25

Makes the benchmark's base and adapter in a temporary directory and runs each step in this process,
on one thread: first alone for its processor time and page faults, then under two profilers.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from benchmarks import inputs
from taskvec import cli

SHOWN = 12  # operations and calls of each step


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    parser.add_argument("--width", type=float, default=0.25, help="as in benchmark.py")
    parser.add_argument("--work_dir", default=".", metavar="DIR", help="as in benchmark.py")
    return parser


def profile_steps(width: float, work_dir: str) -> None:
    """Print, for each step, what takes its time."""
    from compare_lora_task_vector import compare
    from extract_task_vectors import extract
    from merge_lora import merge

    with tempfile.TemporaryDirectory(prefix="profile-", dir=work_dir) as temporary:
        here = Path(temporary)
        base, adapter, merged, vector = (here / name for name in ("base", "lora", "merged", "tv"))
        base.mkdir()
        adapter.mkdir()
        shapes = inputs.write_config(base, width)
        inputs.write_base(base, shapes)
        inputs.write_adapter(adapter, shapes)
        common = (str(base), str(adapter))
        _profile("merge", lambda: merge(*common, merged, device="cpu"))
        _profile("extract", lambda: extract(str(base), str(merged), vector, device="cpu"))
        _profile(
            "compare",
            lambda: compare(
                *common, here / "c", task_vector_path=vector, device="cpu", generate_plots=False
            ),
        )


def _profile(name: str, step: Callable[[], object]) -> None:
    import torch

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    cli.result(f"{name}: user {user:.2f} s, system {system:.2f} s, {faults:,} page faults")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operations:
        step()
    averages = operations.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    averages.sort(key=lambda event: -event.self_cpu_time_total)
    for event in averages[:SHOWN]:
        share = 100 * event.self_cpu_time_total / total
        cli.result(f"  {share:4.1f} %  {event.count:7} x {event.key}")
    calls = cProfile.Profile()
    calls.runcall(step)
    statistics = pstats.Stats(calls, stream=sys.stdout)
    statistics.strip_dirs().sort_stats("tottime").print_stats(SHOWN)


def _body(args: argparse.Namespace) -> int:
    profile_steps(args.width, args.work_dir)
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
