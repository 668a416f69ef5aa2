"""Several tensors at a time: the order of results, failures, and the same bytes with any number."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from compare_lora_task_vector import compare
from extract_task_vectors import extract
from merge_lora import merge
from taskvec.tensorfile import StoredTensor
from taskvec.workers import for_each


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_results_are_in_the_order_of_the_items(threads, count):
    threads(count)
    assert for_each(lambda item: item * item, range(50)) == [item * item for item in range(50)]
    assert for_each(str, []) == []
    assert torch.get_num_threads() == count


def test_several_items_are_worked_on_at_once(threads):
    """Each waits for the other, so one at a time would never end."""
    threads(2)
    meeting = threading.Barrier(2, timeout=30)
    for_each(lambda _: meeting.wait(), range(2))


def test_the_threads_of_arithmetic_are_shared_out(threads):
    threads(8)
    assert set(for_each(lambda _: torch.get_num_threads(), range(20))) == {2}


@pytest.mark.parametrize("count", [1, 2])
def test_a_failure_is_raised_and_what_has_not_begun_is_left_undone(threads, count):
    threads(count)
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise ValueError(item)

    with pytest.raises(ValueError, match="3"):
        for_each(work, range(100_000))
    assert len(begun) < 100_000
    assert torch.get_num_threads() == count


def test_of_failures_at_a_time_the_first_item_s_is_raised(threads):
    """However they are begun, and whichever fails first."""
    threads(2)
    both, later = threading.Barrier(2, timeout=30), threading.Event()

    def work(item: int) -> None:
        both.wait()
        if item == 0:
            later.wait(30)
        else:
            later.set()
        raise ValueError(f"item {item}")

    for tensors in ([[Stored(True)], [Stored(False)]], [[Stored(False)], [Stored(True)]]):
        later.clear()
        with pytest.raises(ValueError, match="item 0"):
            for_each(work, range(2), reads=tensors.__getitem__)


class Stored(StoredTensor):
    """A tensor of which it is given whether it is in memory."""

    def __init__(self, cached: bool) -> None:
        self.__dict__.update(cached=cached, passing=False)

    def is_cached(self) -> bool:
        return bool(self.__dict__["cached"])

    def let_go(self) -> None:
        self.__dict__["passing"] = True


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_in_memory_comes_first_and_results_keep_their_order(threads, count):
    threads(count)
    begun: list[int] = []
    tensors = [[Stored(number < of) for number in range(2)] for of in (0, 2, 1, 2, 0, 1)]
    meeting = threading.Barrier(count, timeout=30)

    def work(item: int) -> int:
        begun.append(item)
        meeting.wait()  # as many as there are threads are begun together
        return 10 * item

    assert for_each(work, range(6), reads=tensors.__getitem__) == [0, 10, 20, 30, 40, 50]
    if count == 1:
        assert begun == [1, 3, 2, 5, 0, 4]
    else:  # one thread from the front, the other from the back
        assert [set(begun[at : at + 2]) for at in (0, 2, 4)] == [{1, 4}, {3, 0}, {2, 5}]
    for each in itertools.chain(*tensors):  # what was not there does not stay
        assert each.__dict__["passing"] is not each.is_cached()


@pytest.mark.parametrize("cached", [True, False])
def test_where_all_is_in_memory_or_nothing_the_order_is_that_of_the_items(threads, cached):
    threads(1)
    begun: list[int] = []
    tensors = [[Stored(cached)] for _ in range(4)] + [[]]
    for_each(begun.append, range(5), reads=tensors.__getitem__)
    assert begun == [0, 1, 2, 3, 4]
    assert not any(each.__dict__["passing"] for each in itertools.chain(*tensors))


def test_the_chain_writes_the_same_bytes_with_any_number_of_threads(
    threads, llama: Path, llama_lora: Path, tmp_path: Path
):
    found = []
    for count in (1, 4):
        threads(count)
        here = tmp_path / str(count)
        merge(str(llama), str(llama_lora), here / "m", precision="bf16", max_shard_size="20KB")
        extract(str(llama), str(here / "m"), here / "tv")
        result = compare(
            str(llama),
            str(llama_lora),
            here / "c",
            task_vector_path=here / "tv",
            generate_plots=False,
            detailed_report=False,
        )
        files = sorted(path for path in here.rglob("*.safetensors"))
        del result.summary["storage"]["task_vector_disk_bytes"]  # the file system's own business
        content = json.dumps(result.document).replace(str(here), "")
        found.append(([path.read_bytes() for path in files], len(files), content))
    assert found[0] == found[1]
    assert found[0][1] > 3
