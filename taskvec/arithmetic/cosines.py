"""Which task vectors resemble each other: their inner products, by tensor, by layer and overall.

cos(a, b) = <a, b> / (‖a‖ ‖b‖), accumulated in float64. Two unrelated directions of n dimensions
have a cosine of about 1 / sqrt(n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from taskvec.architecture import place
from taskvec.arithmetic.several import TaskVectors
from taskvec.breakdown import layer_groups
from taskvec.workers import for_each

if TYPE_CHECKING:
    from tqdm import tqdm

Matrix = list[list[float | None]]


def gram_matrices(
    vectors: TaskVectors, device: torch.device, bar: tqdm[Any]
) -> dict[str, torch.Tensor]:
    """The inner products of k task vectors in every tensor, (k, k) float64, in one pass.

    Raises:
        UserError: an element is not finite.
    """

    def work(name: str) -> torch.Tensor:
        count = len(vectors.vectors)
        gram = torch.zeros(count, count, dtype=torch.float64)
        if not vectors.is_zero(name):
            for start, stop in vectors.row_blocks(name):
                rows = vectors.rows(name, start, stop, device)
                flat = torch.stack([part.flatten() for part in rows]).double()
                gram += (flat @ flat.T).cpu()
        bar.update(vectors.stored_bytes(name))
        return gram

    return dict(zip(vectors.tensors, for_each(work, vectors.tensors), strict=True))


def cosines(grams: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Cosine matrices overall, by layer and by block, ready for JSON; null where one is zero."""

    def by(label: Callable[[str], str]) -> dict[str, Matrix]:
        groups: dict[str, list[torch.Tensor]] = {}
        for name, gram in grams.items():
            groups.setdefault(label(name), []).append(gram)
        return {key: cosine_matrix(members) for key, members in groups.items()}

    order, layer = layer_groups(grams)
    layers = by(layer)
    return {
        "overall": cosine_matrix(grams.values()),
        "by_layer": {key: layers[key] for key in dict.fromkeys(map(layer, order))},
        "by_block": by(lambda name: place(name).block),
    }


def cosine_matrix(grams: Iterable[torch.Tensor]) -> Matrix:
    """The cosines that the inner products of some tensors add up to."""
    total = torch.stack(list(grams)).sum(0)
    norms = total.diagonal().sqrt().tolist()
    return [
        [_cosine(float(total[i, j]), norms[i] * norms[j], i == j) for j in range(len(norms))]
        for i in range(len(norms))
    ]


def _cosine(product: float, norms: float, same: bool) -> float | None:
    """By Cauchy and Schwarz within [-1, 1], up to float64's rounding."""
    if not norms or not math.isfinite(norms):
        return None
    return 1.0 if same else max(-1.0, min(1.0, product / norms))
