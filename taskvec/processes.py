"""Several processes on one run, as ``accelerate launch`` and ``torchrun`` start them.

Every process opens the same inputs and works on its share of the tensors (`divided`). What there is
one of, such as a file's header, JSON and the final rename, is done by the main process (`by_main`);
the others wait for it, and fail as it fails. A script takes part by ``cli.run(..., shared=True)``;
in any other, and where no launcher is at work, there is one process and all of this costs nothing.

Results are those of one process, bit for bit: a tensor is one process's work from beginning to end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# A process that ends is noticed at once. This is for one that hangs, and is longer than the main
# process may need for what it does alone.
_TIMEOUT = timedelta(hours=1)

_rank, _count, _local_rank = 0, 1, 0


class LostProcessError(Exception):
    """Another process of the run has ended, or does not answer."""


def join() -> None:
    """Find the other processes of this run, if a launcher has started several.

    Raises:
        LostProcessError: they cannot be reached.
    """
    global _rank, _count, _local_rank
    if started() == 1:
        return
    import torch.distributed

    with _losing_others():
        torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
    _rank, _count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    _local_rank = int(os.environ.get("LOCAL_RANK", _rank))
    # A launcher ends all processes when one has failed: as an exception, so that files are removed.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))


def started() -> int:
    """How many processes a launcher says that it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the first process that a launcher has started, whether they met or not."""
    return int(os.environ.get("RANK", "0")) == 0


def started_one_of_several() -> bool:
    """Whether ``accelerate launch`` was asked for several processes, and started a single one.

    It starts several where it sees as many GPUs, or is told --multi_gpu. On CPUs it leaves that to
    MPI, and tells the one process that it starts no more than the address where they would meet:
    not how many were asked for, so that the others cannot be started from here.
    """
    return "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ


def leave() -> None:
    """Part with the other processes."""
    global _rank, _count, _local_rank
    if _count > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()
        _rank, _count, _local_rank = 0, 1, 0


def count() -> int:
    """How many processes share the work."""
    return _count


def is_main() -> bool:
    """Whether this is the process that writes what there is one of, and prints."""
    return _rank == 0


def local_rank() -> int:
    """Which of its machine's processes this is, from 0."""
    return _local_rank


def wait() -> None:
    """Until every process has come here.

    Raises:
        LostProcessError: one never will.
    """
    _exchange(None)


def by_main(work: Callable[[], Result]) -> Result:
    """Have the main process do something alone; every process gets its result, or its failure.

    Args:
        work: may use all of this module, as if there were one process.

    Raises:
        what ``work`` raised, in every process; LostProcessError.
    """
    if _count == 1:
        return work()
    import torch.distributed

    outcome: list[Any] = [None]
    if is_main():
        with _alone():
            outcome = [_attempt(work)]
    with _losing_others():
        torch.distributed.broadcast_object_list(outcome, src=0)
    result: Result = _value(outcome[0])
    return result


def divided(
    work: Callable[[list[Item]], list[Result]], items: Sequence[Item], costs: Sequence[float]
) -> list[Result]:
    """Have each process work on some of the items; every process gets all results.

    Args:
        work: from a list of items to their results.
        costs: of each item, in any unit; every process gets about as much.

    Returns:
        the results in the order of the items.

    Raises:
        what ``work`` raised in the first process in which it did; LostProcessError.
    """
    if _count == 1:
        return work(list(items))
    shares = shares_of(costs, _count)
    mine = [items[index] for index in shares[_rank]]
    results: dict[int, Result] = {}
    for share, outcome in zip(shares, _exchange(_attempt(lambda: work(mine))), strict=True):
        results.update(zip(share, _value(outcome), strict=True))
    return [results[index] for index in range(len(items))]


def shares_of(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices dealt to ``count`` processes, the costliest first, each to the one with least to do.

    Example:
        shares_of([1, 5, 1, 4], 2)   # [[1, 2], [3, 0]]
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += costs[index]
    return shares


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    """What some work came to, as it travels between processes: a result or an exception."""

    result: Result | None = None
    error: Exception | None = None


def _attempt(work: Callable[[], Result]) -> _Outcome[Result]:
    try:
        return _Outcome(work())
    except LostProcessError:
        raise
    except Exception as error:
        return _Outcome(error=error)


def _value(outcome: _Outcome[Any]) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def _exchange(mine: Any) -> list[Any]:
    """What each process has to tell, in the order of their ranks."""
    if _count == 1:
        return [mine]
    import torch.distributed

    found: list[Any] = [None] * _count
    with _losing_others():
        torch.distributed.all_gather_object(found, mine)
    return found


@contextlib.contextmanager
def _losing_others() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # PyTorch has no narrower class for all of them
        raise LostProcessError(
            f"the other processes of this run do not answer, so it ends without output ({error})"
        ) from None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    global _count
    count, _count = _count, 1
    try:
        yield
    finally:
        _count = count
