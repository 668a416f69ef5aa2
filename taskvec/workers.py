"""Several tensors at a time: reading, computing and writing overlap, and every core has work.

PyTorch and the system's calls let go of Python's lock, so threads are enough on one machine; where
a launcher has started several processes, each has its share of the tensors. A tensor is one
thread's work from beginning to end, so results do not depend on how many there are.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import TypeVar

import torch

from taskvec import processes
from taskvec.tensorfile import StoredTensor

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 4  # each holds a block of rows, and what is computed from it, in memory

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # of glibc's malloc.h
_KEPT = 64 << 20


def for_each(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    cost: Callable[[Item], float] = lambda item: 1.0,
    reads: Callable[[Item], Sequence[StoredTensor]] = lambda item: (),
) -> list[Result]:
    """Do some work on every item, on as many threads as PyTorch may use, and in every process.

    Args:
        work: must not change what the work on another item reads.
        cost: how much work an item is, in any unit, to share it out among processes.
        reads: what it reads, where that is worth reading in another order than that of the items
            (`_by_memory`).

    Returns:
        the results in the order of the items, in every process.

    Raises:
        what ``work`` raised, of several that fail at a time for the first item; what has not begun
        by then is left undone. LostProcessError: another process has ended.
    """
    items = list(items)
    return processes.divided(
        lambda share: _on_threads(work, share, reads), items, [cost(item) for item in items]
    )


def _on_threads(
    work: Callable[[Item], Result],
    items: list[Item],
    reads: Callable[[Item], Sequence[StoredTensor]],
) -> list[Result]:
    _keep_freed_memory()
    order, mixed = _by_memory([reads(item) for item in items])
    todo = deque(order)
    # While one thread has what is in memory to work on, another waits for the disk.
    ends = cycle([todo.popleft, todo.pop] if mixed else [todo.popleft])
    mine = threading.local()
    failures: dict[int, Exception] = {}

    def begin() -> None:
        mine.take = next(ends)

    def work_on_next() -> tuple[int, Result]:
        index: int = mine.take()
        try:
            with torch.inference_mode():  # each call of PyTorch holds Python's lock for less long
                return index, work(items[index])
        except Exception as error:
            failures[index] = error
            raise

    threads = torch.get_num_threads()
    workers = min(threads, _MOST)
    if workers == 1:
        mine.take = todo.popleft
        results = dict(work_on_next() for _ in items)
        return [results[index] for index in range(len(items))]
    pool = ThreadPoolExecutor(workers, initializer=begin)
    torch.set_num_threads(threads // workers)
    try:
        futures = [pool.submit(work_on_next) for _ in items]
        results = dict(future.result() for future in futures)
        return [results[index] for index in range(len(items))]
    except Exception:
        pool.shutdown(cancel_futures=True)  # what has begun may fail as well
        if failures:
            raise failures[min(failures)] from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _by_memory(reads: Sequence[Sequence[StoredTensor]]) -> tuple[list[int], bool]:
    """In which order to work where a part of what is read is in memory, but not all of it.

    Whoever reads a model from its beginning drives out of memory what lies at its end, which is
    what the step before has left there. So what is in memory comes first, and the rest is let go of
    as it is read. Where all is there, or nothing, the order is that of the items.

    Args:
        reads: what the work on each item reads.

    Returns:
        the items' numbers, those with the most in memory first; and whether it was so.
    """
    cached = [[tensor.is_cached() for tensor in tensors] for tensors in reads]
    found = {answer for answers in cached for answer in answers}
    order = list(range(len(reads)))
    if len(found) < 2:
        return order, False
    for tensors, answers in zip(reads, cached, strict=True):
        for tensor, answer in zip(tensors, answers, strict=True):
            if not answer:
                tensor.let_go()
    return sorted(order, key=lambda index: -sum(cached[index])), True


def _keep_freed_memory() -> None:
    """Have the blocks of one tensor lie where those of the last one did.

    glibc gives large blocks back to the system as soon as they are freed, which then clears every
    page of the next one: a quarter of the time. One arena for all threads, so that they share what
    is kept. Nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (
            (_MMAP_THRESHOLD, _KEPT >> 1),  # the largest that glibc takes
            (_TRIM_THRESHOLD, _KEPT),
            (_ARENA_MAX, 1),
        ):
            mallopt(parameter, value)
