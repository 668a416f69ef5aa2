"""Several tensors at a time: reading, computing and writing overlap, and every core has work.

PyTorch and the system's calls let go of Python's lock, so threads are enough. A tensor is one
thread's work from beginning to end, so results do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 4  # each holds a block of rows, and what is computed from it, in memory


def for_each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Do some work on every item, on as many threads as PyTorch may use.

    Args:
        work: must not change what the work on another item reads.

    Returns:
        the results in the order of the items.

    Raises:
        what ``work`` raised for the first item that it raised for; what has not begun by then is
        left undone.
    """
    threads = torch.get_num_threads()
    workers = min(threads, _MOST)
    if workers == 1:
        return [work(item) for item in items]
    pool = ThreadPoolExecutor(workers)
    torch.set_num_threads(threads // workers)
    try:
        futures = [pool.submit(work, item) for item in items]
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
