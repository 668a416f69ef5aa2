"""What an adapter does to one parameter.

An `Update` answers with the delta of some rows in fp32, in the very bits that PEFT computes, with
the same delta in float64, and with the magnitude that bounds the distance between the two
(formulas: Hu et al., arXiv 2106.09685, section 4.1; scaling of rsLoRA: Kalajdzievski, arXiv
2312.03732).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A product of few rows takes another path through the BLAS than the whole matrix does, and has
# other last bits: with MKL below 2 rows on Intel's processors, below 4 on AMD's; where it has fewer
# than 12 columns, so can any rows. More than twice that is computed, or the whole.
_FEWEST_ROWS, _FEWEST_COLUMNS = 16, 32


@dataclass(frozen=True)
class Update:
    """A low-rank update of one parameter, with its factors in memory.

    Attributes:
        parameter: the parameter's name in the base.
        A: (r, in) fp32.
        B: (out, r) fp32.
        scaling: s, a Python float as PEFT keeps it.
        transposed: the parameter is stored (in, out), as GPT-2's Conv1D does.
    """

    parameter: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The parameter's stored shape."""
        out, into = self.B.shape[0], self.A.shape[1]
        return (into, out) if self.transposed else (out, into)

    def delta(self, start: int, stop: int, *, prescaled: bool = False) -> torch.Tensor:
        """Rows of fl32(fl32(B @ A) * s), fp32: the bits of PEFT's get_delta_weight.

        Args:
            start, stop: rows of the parameter as stored.
            prescaled: fold s into B before the product instead.

        Returns:
            (stop - start, columns) fp32.
        """
        low, high = _widened(start, stop, *self.shape)
        B, A = self._rows(low, high)
        product = self._stored((B * self.scaling) @ A if prescaled else B @ A)
        rows = product[start - low : stop - low]
        return rows if prescaled else rows * self.scaling

    def exact(self, start: int, stop: int) -> torch.Tensor:
        """Rows of s * B @ A computed in float64: exact to 2^-29 of what fp32 could lose."""
        B, A = self._rows(start, stop)
        return self._stored((B.double() * self.scaling) @ A.double())

    def magnitude(self, start: int, stop: int) -> torch.Tensor:
        """Rows of |s| * (|B| @ |A|) in float64, to which matmul errors are relative."""
        B, A = self._rows(start, stop)
        return self._stored((B.double().abs() * abs(self.scaling)) @ A.double().abs())

    def magnitude_sums(self, start: int, stop: int) -> torch.Tensor:
        """|s| * (sum_k |B_ik| + sum_k |A_kj|) for the same rows, float64."""
        B, A = (factor.double().abs() for factor in self._rows(start, stop))
        return self._stored((B.sum(1, keepdim=True) + A.sum(0, keepdim=True)) * abs(self.scaling))

    def rounded_factors(self, dtype: torch.dtype) -> Update:
        """The update of an adapter whose factors were stored in ``dtype`` on the way."""
        A, B = (factor.to(dtype).float() for factor in (self.A, self.B))
        return Update(self.parameter, A, B, self.scaling, self.transposed)

    def _rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.transposed:
            return self.B, self.A[:, start:stop]
        return self.B[start:stop], self.A

    def _stored(self, product: torch.Tensor) -> torch.Tensor:
        return product.T if self.transposed else product


def _widened(start: int, stop: int, rows: int, columns: int) -> tuple[int, int]:
    """The rows to compute so that ``start`` to ``stop`` come out as in the whole product."""
    if columns < _FEWEST_COLUMNS:
        return 0, rows
    high = min(rows, max(stop, start + _FEWEST_ROWS))
    return max(0, min(start, high - _FEWEST_ROWS)), high
