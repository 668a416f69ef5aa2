#!/usr/bin/env python3
"""Time the intruder analysis of ten adapters on one base matrix beside dense SVDs.

    python benchmarks/intruder_speed.py --sizes 1024 2048

A dense analysis is two SVDs, of the base's matrix and of the tuned one, in float64. The project's
way is one SVD of the base, read from the cache, and for each adapter the first ten directions of
U^T (W + s B A) V. All ten verdicts are compared with those of the dense SVDs.
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
from taskvec.wording import table

if TYPE_CHECKING:  # --help stays fast
    import torch

ADAPTERS, RANKS, TOP_K, EPSILON = 10, (1, 2, 4, 8, 16, 32, 64, 1, 8, 64), 10, 0.5


def measure(shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Seconds for one dense analysis, for the base, and for the ten adapters; and agreement."""
    import torch

    from taskvec.intruders.basesvd import SvdCache
    from taskvec.intruders.directions import dense_directions, low_rank_directions

    m, n = shape
    stored = _decaying(m, n)
    W = stored.to(device, torch.float64)
    updates = [_factors(m, n, rank, seed, device) for seed, rank in enumerate(RANKS)]
    with tempfile.TemporaryDirectory() as directory:
        cache = SvdCache(Path(directory))
        first, base = _timed(lambda: cache.get(stored, W, transposed=False), device)
        again, base = _timed(lambda: cache.get(stored, W, transposed=False), device)
    seconds = {"base, first time": first, "base, from the cache": again}

    def ours() -> list[list[int]]:
        found = [low_rank_directions(base, B, A, 1.0, TOP_K) for B, A in updates]
        return [one.intruders(EPSILON, TOP_K) for one in found]

    seconds["ten adapters"], verdicts = _timed(ours, device)
    B, A = updates[-1]
    tuned = W + B @ A
    seconds["one whole model"], _ = _timed(lambda: dense_directions(base, tuned, TOP_K), device)
    seconds["one dense analysis"], _ = _timed(lambda: _dense_verdict(_left(W), tuned), device)
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
    import torch

    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[1024, 2048], metavar="N", help="(1024 2048)"
    )
    return parser


def _body(args: argparse.Namespace) -> int:
    device = cli.pick_device(args.device)
    results = [measure((size, size), device) for size in args.sizes]
    header = ("seconds", *(f"{one['shape'][0]} × {one['shape'][1]}" for one in results))
    steps = list(results[0]["seconds"])
    rows = [(step, *(f"{one['seconds'][step]:.3f}" for one in results)) for step in steps]
    ratios = [
        (one["seconds"]["base, from the cache"] + one["seconds"]["ten adapters"])
        / one["seconds"]["one dense analysis"]
        for one in results
    ]
    rows.append(("cache + ten adapters, in dense analyses", *(f"{ratio:.2f}" for ratio in ratios)))
    rows.append(("same verdicts", *("yes" if one["agree"] else "NO" for one in results)))
    for line in table(header, rows):
        cli.result(line)
    agree = all(one["agree"] for one in results)
    return cli.EXIT_OK if agree else cli.EXIT_DOES_NOT_HOLD


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
