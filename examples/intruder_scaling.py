"""The intervention of the intruder experiment, beside two controls.

Three parts of a LoRA-tuned model are scaled by lambda, one at a time:

- ``intruders``: W + (lambda - 1) sum of u sigma v^T over the intruders, as in arXiv 2410.21228;
- ``others``: the same over as many triplets that are no intruders, in the same matrices, of the
  nearest singular values: does scaling any directions of that size do as much?
- ``update``: W_0 + lambda (W - W_0): does taking back any part of what was learned do as much?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from intruder_runs import MODEL_DIR, load_head
from intruder_tasks import Task

from taskvec.checkpoint import open_checkpoint
from taskvec.intruders.basesvd import SvdCache, default_cache_dir
from taskvec.intruders.directions import TunedDirections, low_rank_directions, scaled_rows
from taskvec.intruders.tuned import linear_weights, open_tuned

INTRUDERS, OTHERS, UPDATE = ARMS = ("intruders", "others", "update")
_LEADING = 40  # triplets of a matrix among which the others are looked for


@dataclass(frozen=True)
class TunedMatrix:
    """One matrix of a tuned model, and the triplets that are scaled in it.

    Attributes:
        base, tuned: W_0 and W (m, n), float64.
        directions: the leading triplets of W.
        chosen: their numbers from 0, for ``intruders`` and ``others``.
    """

    base: torch.Tensor
    tuned: torch.Tensor
    directions: TunedDirections
    chosen: dict[str, list[int]]

    def scaled(self, arm: str, scale: float) -> torch.Tensor:
        if arm == UPDATE:
            return self.base + scale * (self.tuned - self.base)
        triplets = self.directions.triplets(self.chosen[arm])
        return self.tuned + scaled_rows(triplets, scale, slice(None), transposed=False)

    def square_norm(self, arm: str) -> float:
        """Of what is scaled: sum of sigma^2, or ‖W - W_0‖^2."""
        if arm == UPDATE:
            return float(((self.tuned - self.base) ** 2).sum())
        return float((self.directions.values[self.chosen[arm]] ** 2).sum())


def scaled_losses(
    task: Task, directory: Path, scales: Sequence[float], epsilon: float, top_k: int
) -> list[dict[str, Any]]:
    """Held-out and pre-training loss of a LoRA run, with each part of it scaled by every lambda.

    Args:
        directory: of the run.
        epsilon, top_k: what counts as an intruder.

    Returns:
        for each part: its name (``arm``), how many triplets, their norm, and the losses.
    """
    load_head(task, directory)
    matrices = tuned_matrices(task, directory / MODEL_DIR, epsilon, top_k)
    model = task.load(str(task.base))
    found = []
    for arm in ARMS:
        losses = []
        for scale in scales:
            with torch.no_grad():
                for name, matrix in matrices.items():
                    model.get_parameter(name).copy_(matrix.scaled(arm, scale))
            held_out, pretraining = task.held_out(model), task.pretraining(model)
            losses.append(
                {"scale": scale, "held_out_loss": held_out, "pretraining_loss": pretraining}
            )
        triplets = [len(matrix.chosen[arm]) for matrix in matrices.values() if arm in matrix.chosen]
        norm = sum(matrix.square_norm(arm) for matrix in matrices.values()) ** 0.5
        found.append({"arm": arm, "triplets": sum(triplets), "norm": norm, "losses": losses})
    return found


def tuned_matrices(task: Task, adapter: Path, epsilon: float, top_k: int) -> dict[str, TunedMatrix]:
    """Every matrix that an adapter changes, by the parameter's name."""
    cache, found = SvdCache(default_cache_dir()), {}
    cpu = torch.device("cpu")
    with open_checkpoint(str(task.base)) as base, open_tuned(base, [str(adapter)], []) as (tuned,):
        for name in linear_weights(base, task.target_modules):
            stored, factors = base.read(name), tuned.factors(name, cpu)
            if factors is None:
                raise ValueError(f"{name}: the adapter has no low-rank update of it")
            svd = cache.get(stored, stored.double(), transposed=False)
            directions = low_rank_directions(
                svd, factors.B.double(), factors.A.double(), factors.scaling, _LEADING
            )
            intruders = directions.intruders(epsilon, top_k)
            chosen = {INTRUDERS: intruders, OTHERS: like(directions, intruders, epsilon)}
            W = tuned.rows(name, stored, 0, len(stored), cpu)
            found[name] = TunedMatrix(stored.double(), W, directions, chosen)
    return found


def like(directions: TunedDirections, intruders: Sequence[int], epsilon: float) -> list[int]:
    """For each intruder in turn, the non-intruder of the nearest singular value not taken yet.

    Fewer where a matrix has not as many that are no intruders.
    """
    left = [int(j) for j in torch.nonzero(directions.similarity >= epsilon).flatten()]
    values, taken = directions.values.tolist(), []
    for intruder in intruders[: len(left)]:
        nearest = min(left, key=lambda j: abs(values[j] - values[intruder]))
        left.remove(nearest)
        taken.append(nearest)
    return taken
