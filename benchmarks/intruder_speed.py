#!/usr/bin/env python3
"""Time the intruder analysis of ten adapters on one base matrix beside dense SVDs.

    python benchmarks/intruder_speed.py --device cpu --sizes 64 384 1024 384x1536

A dense analysis is two SVDs, of the base's matrix and of the tuned one, in float64. The project's
way is one SVD of the base, read from the cache, and for each adapter the first ten directions of
U^T (W + s B A) V, or as many as --leading says. All ten verdicts are compared with those of the
dense SVDs. A step that takes milliseconds is repeated for a third of a second and the fastest time
is given, on both sides. The eigenvectors are those of one Gram matrix by LAPACK: the least that
an adapter could cost by a dense method.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from taskvec import cli
from taskvec.flag_values import whole
from taskvec.wording import table

if TYPE_CHECKING:  # --help stays fast
    import torch

RANKS, TOP_K, EPSILON = (1, 2, 4, 8, 16, 32, 64, 1, 8, 64), 10, 0.5
SIZES = ("64", "128", "256", "384", "512", "768", "1024", "2048", "384x1536", "1536x384")
REPEAT_SECONDS = 0.3


def measure(shape: tuple[int, int], leading: int, device: torch.device) -> dict[str, Any]:
    """Seconds for one dense analysis, for the base, and for the ten adapters; and agreement.

    Args:
        leading: how many directions of an adapter are computed, at least TOP_K.
    """
    import torch

    from taskvec.intruders.basesvd import SvdCache
    from taskvec.intruders.directions import dense_directions, low_rank_directions

    m, n = shape
    stored = _decaying(m, n)
    W = stored.to(device, torch.float64)
    updates = [_factors(m, n, rank, seed, device) for seed, rank in enumerate(RANKS)]
    with tempfile.TemporaryDirectory() as directory:
        cache = SvdCache(Path(directory))
        start = time.perf_counter()
        cache.get(stored, W, transposed=False)
        first = time.perf_counter() - start
        again, base = _timed(lambda: cache.get(stored, W, transposed=False), device)
    seconds = {"base": first, "cache": again}

    def ours() -> list[list[int]]:
        found = [low_rank_directions(base, B, A, 1.0, leading) for B, A in updates]
        return [one.intruders(EPSILON, TOP_K) for one in found]

    seconds["ten adapters"], verdicts = _timed(ours, device)
    B, A = updates[-1]
    tuned = W + B @ A
    seconds["whole model"], _ = _timed(lambda: dense_directions(base, tuned, leading), device)
    seconds["dense analysis"], _ = _timed(lambda: _dense_verdict(_left(W), tuned), device)
    gram = W.T @ W if m > n else W @ W.T
    seconds["eigenvectors"], _ = _timed(lambda: torch.linalg.eigh(gram), device)
    left = _left(W)
    expected = [_dense_verdict(left, W + B @ A) for B, A in updates]
    return {"shape": shape, "seconds": seconds, "agree": verdicts == expected}


def _left(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    left: torch.Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return left


def _dense_verdict(base_left: torch.Tensor, tuned: torch.Tensor) -> list[int]:
    """Algorithm 1 as the paper writes it down."""
    similarity = (base_left.T @ _left(tuned)[:, :TOP_K]).abs().amax(0)
    return [j for j in range(TOP_K) if float(similarity[j]) < EPSILON]


def _decaying(m: int, n: int) -> torch.Tensor:
    """A matrix in fp32 with a spectrum like a trained weight's: some strong directions, a bulk."""
    import torch

    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(m, n, generator=generator) * 0.02
    strong = torch.randn(m, 64, generator=generator) * torch.linspace(2.0, 0.3, 64)
    weight: torch.Tensor = bulk + strong @ torch.randn(64, n, generator=generator) * 0.005
    return weight


def _factors(
    m: int, n: int, rank: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64) * 0.05
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return B.to(device), A.to(device)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The least seconds that it took, of as many times as fit into REPEAT_SECONDS, at least one."""
    import torch

    least, begin = float("inf"), time.perf_counter()
    while least == float("inf") or time.perf_counter() - begin < REPEAT_SECONDS:
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least, result


def _shape(text: str) -> tuple[int, int]:
    """ROWSxCOLUMNS, or one number for both."""
    rows, _, columns = text.partition("x")
    return whole(TOP_K)(rows), whole(TOP_K)(columns or rows)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_shape,
        default=[_shape(size) for size in SIZES],
        metavar="N",
        help=f"rows and columns, or ROWSxCOLUMNS (default: {' '.join(SIZES)})",
    )
    parser.add_argument(
        "--leading",
        type=whole(TOP_K),
        default=TOP_K,
        metavar="L",
        help=f"how many directions of an adapter are computed (default: {TOP_K})",
    )
    return parser


def _body(args: argparse.Namespace) -> int:
    device = cli.pick_device(args.device)
    results = [measure(size, args.leading, device) for size in args.sizes]
    steps = list(results[0]["seconds"])
    rows = [_row(one, steps) for one in results]
    for line in table(("milliseconds", *steps, "ratio", "same verdicts"), rows):
        cli.result(line)
    agree = all(one["agree"] for one in results)
    return cli.EXIT_OK if agree else cli.EXIT_DOES_NOT_HOLD


def _row(result: dict[str, Any], steps: list[str]) -> tuple[str, ...]:
    """A line of the table; the ratio is that of cache and ten adapters to a dense analysis."""
    seconds, (m, n) = result["seconds"], result["shape"]
    ratio = (seconds["cache"] + seconds["ten adapters"]) / seconds["dense analysis"]
    times = (f"{1000 * seconds[step]:.1f}" for step in steps)
    return (f"{m} × {n}", *times, f"{ratio:.2f}", "yes" if result["agree"] else "NO")


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
