"""One parameter's T against delta: statistics, spectra, and what the number format predicts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from taskvec.architecture import Place, place
from taskvec.mathematics.floors import FloorSums
from taskvec.mathematics.pair import Pair, half_ulps
from taskvec.mathematics.spectra import SpectralComparison, compare_spectra, has_spectrum
from taskvec.mathematics.statistics import DirectSums, PairStatistics
from taskvec.rounding import Format

_SMALL = 1 << 17


@dataclass(frozen=True)
class ParameterFinding:
    """What was found about one parameter.

    Attributes:
        shape: as stored.
        matrix: (rows, columns), as which its spectrum is taken (`Pair.shape`).
        adapter_rank: r as step 3 recorded it; None if unknown.
        format: what M is stored in; None if unknown.
        statistics: of the first pass.
        direct: of the second.
        spectra: None for vectors.
    """

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    adapter_rank: int | None
    format: Format | None
    statistics: PairStatistics
    direct: DirectSums
    spectra: SpectralComparison | None

    @property
    def place(self) -> Place:
        return place(self.name)

    def as_json(self) -> dict[str, Any]:
        where = self.place
        return {
            "shape": list(self.shape),
            "stack": where.stack,
            "layer": where.layer,
            "module": where.module,
            "precision": self.format.name if self.format else None,
            "adapter_rank": self.adapter_rank,
            **self.statistics.as_json(),
            "spectra": self.spectra.as_json() if self.spectra else None,
        }


def analyse(pair: Pair, adapter_rank: int | None = None) -> ParameterFinding:
    """Analyse one parameter: two passes over its elements, then its spectra.

    Args:
        pair: where T, delta and perhaps W are read.
        adapter_rank: r, if it is known.

    Raises:
        UserError: NaN or infinity in T or delta.
    """
    with _threads(pair):
        return _analyse(pair, adapter_rank)


@contextlib.contextmanager
def _threads(pair: Pair) -> Iterator[None]:
    """One thread for a small parameter: it gains nothing from more, and on a busy machine waiting
    for them takes most of the time."""
    threads = torch.get_num_threads()
    if pair.info.elements <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _analyse(pair: Pair, adapter_rank: int | None) -> ParameterFinding:
    format = pair.merged_format()
    statistics, sums = PairStatistics(), FloorSums(pair, format, adapter_rank)
    for rows in pair.rows(base=True):
        pair.refuse_non_finite(rows)
        known = half_ulps(rows, format)
        statistics.add(rows.task_vector, rows.delta, known)
        sums.add(rows, known)
    direct = DirectSums(
        statistics.slope_through_origin or 0.0,
        statistics.task_vector.mean,
        statistics.delta.mean,
    )
    for rows in pair.rows():
        direct.add(rows.task_vector, rows.delta)
    spectra = None
    if has_spectrum(pair):
        spectra = compare_spectra(pair, sums.floors(), adapter_rank)
    return ParameterFinding(
        pair.name, pair.info.shape, pair.shape, adapter_rank, format, statistics, direct, spectra
    )
