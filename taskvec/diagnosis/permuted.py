"""Are rows or columns of the update in another order, where rounding blurs each of them?

Every row of a low-rank update is a point in the space of its rank, where the rounding of thousands
of elements comes to no more than that of one. So each row of T is given the row of the update that
is nearest to it there, and the update in that order is held against T, element by element.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from taskvec.diagnosis.case import Case
from taskvec.diagnosis.factors import FactorTest
from taskvec.update import Update
from taskvec.updates.products import LowRank

_DISTANCES = 1 << 24  # at a time
_EACH_ONCE = 0.8  # of the lines at least are found somewhere; at random 1 - 1/e of them are


def permuted(case: Case, name: str, update: Update | None) -> str | None:
    """ "rows of the update alone" or "columns of the update alone"; None if neither explains T."""
    if not isinstance(update, LowRank) or update.stored is not None:
        return None
    left, right = update.B.double() * update.scaling, update.A.double()
    if update.transposed:
        left, right = right.T, left.T
    bases = torch.linalg.qr(left).Q, torch.linalg.qr(right.T).Q
    rows, columns = [], torch.zeros_like(bases[1])
    for block in case.blocks(name):
        target = block.task_vector.double()
        rows.append(target @ bases[1])
        columns += target.T @ bases[0][block.start : block.stop]
    for lines, there, expected in (
        ("rows", torch.cat(rows), left @ (right @ bases[1])),
        ("columns", columns, right.T @ (left.T @ bases[0])),
    ):
        order = _nearest(there, expected)
        found = int(torch.bincount(order).count_nonzero())
        if found >= _EACH_ONCE * len(order) and _explains(case, name, update, lines, order):
            return f"{lines} of the update alone"
    return None


def _nearest(points: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The number of the nearest of some points to each point, (points,) int64."""
    step = max(1, _DISTANCES // len(among))
    return torch.cat(
        [
            torch.cdist(points[start : start + step], among).argmin(1)
            for start in range(0, len(points), step)
        ]
    )


def _explains(case: Case, name: str, update: LowRank, lines: str, order: torch.Tensor) -> bool:
    """Whether T is the update with its rows or columns in an order, within rounding."""
    if (lines == "rows") != update.transposed:
        update = replace(update, B=update.B[order])
    else:
        update = replace(update, A=update.A[:, order])
    stored = case.base.tensors[name].dtype
    test = FactorTest(update, case.format_of(name), stored, case.vector.base_format)
    return all(test.add(block) for block in case.probe_first(name)) and (
        test.holds and test.allows(1.0)
    )
