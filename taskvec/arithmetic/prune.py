"""Thinning a task vector out: the largest elements of a tensor, or a random choice of them.

Both stream: neither needs more than a block of rows, and neither depends on how rows are cut into
blocks or on the number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch

# |x| of an fp32 number orders as its 31 low bits do: 16 of them make a first histogram, the
# other 15 tell the numbers of one of its bins apart.
_LOW_BITS, _HIGH_BINS = 15, 1 << 16
_MAGNITUDE = 0x7FFFFFFF

# SplitMix64: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class LargestElements:
    """Keeps the k elements of a tensor that are largest in absolute value, and zeroes the others.

    Exactly k: of elements that are as large as the smallest one kept, the first ones stay. Two
    passes over the tensor find the threshold; memory is a histogram of 2^16 bins.

    Args:
        blocks: makes an iterator over the tensor's rows, fp32, in their order.
        keep: k.
    """

    def __init__(self, blocks: Callable[[], Iterator[torch.Tensor]], keep: int) -> None:
        high, above = _bin_of_rank(_histogram(map(_high_bits, blocks()), _HIGH_BINS), keep)
        low_bits = (_low_bits_of(rows, high) for rows in blocks())
        low, above_in_bin = _bin_of_rank(_histogram(low_bits, 1 << _LOW_BITS), keep - above)
        self._threshold = (high << _LOW_BITS) | low if keep else _MAGNITUDE
        self._ties_left = keep - above - above_in_bin

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The next rows with everything else set to zero; call it in the order of the rows."""
        bits = _magnitude_bits(rows)
        kept = bits > self._threshold
        ties = bits == self._threshold
        if self._ties_left and bool(ties.any()):
            kept |= ties & (ties.cumsum(0) <= self._ties_left)
            self._ties_left = max(0, self._ties_left - int(ties.sum()))
        return torch.where(kept.view(rows.shape), rows, 0.0)


class RandomElements:
    """Keeps each element of a tensor with a probability, and zeroes the others.

    An element's fate follows from the seed, the tensor's name, which of the task vectors it is in
    and the element's place, and from nothing else. The choices are independent draws of SplitMix64.

    Args:
        seed: any integer.
        index: which of the task vectors.
        name: the tensor's.
        density: the probability.
        row_elements: elements of a row.
    """

    def __init__(self, seed: int, index: int, name: str, density: float, row_elements: int) -> None:
        text = f"{seed} {index} {name}".encode()
        self._key = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
        self._density, self._row_elements = density, row_elements

    def __call__(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Rows from row ``start`` on with everything else set to zero."""
        draws = uniform(self._key, start * self._row_elements, rows.numel(), rows.device)
        return torch.where((draws < self._density).view(rows.shape), rows, 0.0)


def uniform(key: int, first: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Numbers ``first`` to ``first + count`` of the sequence that a key begins: [0, 1) float64."""
    places = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    z = places * _signed(_GOLDEN) + _signed(key)  # modulo 2^64
    z = (z ^ _shifted(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shifted(z, 27)) * _signed(_MIX_2)
    return _shifted(z ^ _shifted(z, 31), 11).double() * 2.0**-53


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros coming in from the left."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _magnitude_bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().flatten().view(torch.int32) & _MAGNITUDE


def _high_bits(rows: torch.Tensor) -> torch.Tensor:
    return _magnitude_bits(rows) >> _LOW_BITS


def _low_bits_of(rows: torch.Tensor, high: int) -> torch.Tensor:
    """The low bits of the elements in one bin of the first histogram."""
    bits = _magnitude_bits(rows)
    return bits[(bits >> _LOW_BITS) == high] & ((1 << _LOW_BITS) - 1)


def _histogram(values: Iterator[torch.Tensor], bins: int) -> torch.Tensor:
    counts = torch.zeros(bins, dtype=torch.int64)
    for block in values:
        counts += torch.bincount(block, minlength=bins).cpu()
    return counts


def _bin_of_rank(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest (from 1), and how many lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(from_top, max(1, rank))), counts.numel() - 1)
    return counts.numel() - 1 - place, int(from_top[place] - counts.flip(0)[place])
