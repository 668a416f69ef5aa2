"""Several task vectors to one: sums, and the sign-aware merges TIES and DARE.

    linear       sum_i w_i t_i                     Ilharco et al., arXiv 2212.04089, section 2
    ties         trim each t_i to its largest elements, elect a sign for every element, average the
                 elements that have it             Yadav et al., arXiv 2306.01708, section 4
    dare_linear  drop elements of t_i at random, divide the others by the density, and add up
    dare_ties    the same, with a sign elected     Yu et al., arXiv 2311.03099, section 3

The two libraries that people merge with differ in what they make of weights:

    PEFT (peft.utils.merge_utils)        the sign is elected before weighting, and the sum of what
                                         has it is divided by how many have it
    mergekit (merge_methods/generalized_task_arithmetic.py, its defaults)
                                         the sign is elected after weighting; ties divides by the
                                         sum of the weights of those that have it, dare_ties does
                                         not divide
With weights of one ties is the same in both. mergekit has since come to rescale what DARE left to
the tensor's old norm; here, as in the paper and in PEFT, it is divided by the density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from taskvec.arithmetic.prune import LargestElements, RandomElements
from taskvec.arithmetic.several import TaskVectors
from taskvec.cli import UserError
from taskvec.compare import Magnitude
from taskvec.tensorfile import TensorFileWriter
from taskvec.workers import for_each

if TYPE_CHECKING:
    from tqdm import tqdm

SIGN_METHODS, DEFINITIONS = ("total", "frequency"), ("peft", "mergekit")

# (rows of one task vector, fp32, first row) -> the rows with some elements set to zero
Pruning = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Combination:
    """How several task vectors become one.

    Attributes:
        name: linear, ties, dare_linear or dare_ties.
        weights: one for each vector.
        density: the share of elements that pruning leaves; None where nothing is pruned.
        seed: of a random choice; None for the largest elements.
        sign_method: elects a sign by the "total" of the elements or by the "frequency" of their
            signs; None where none is elected.
        definition: "peft" or "mergekit", where they differ.

    Raises:
        UserError: a weight that is no finite number, or a density outside (0, 1].
    """

    name: str
    weights: tuple[float, ...]
    density: float | None = None
    seed: int | None = None
    sign_method: str | None = None
    definition: str = "peft"

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.weights)):
            raise UserError(f"weights {list(self.weights)}: give finite numbers")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"--density {self.density:g}: give a share above 0 and up to 1")

    def mix(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The combination of rows that are pruned already: float64, of their shape.

        Args:
            vectors: rows of every task vector, any float dtype.
        """
        stacked = torch.stack([rows.double() for rows in vectors])
        weights = torch.tensor(self.weights, dtype=torch.float64, device=stacked.device)
        weights = weights.view(-1, *[1] * (stacked.dim() - 1))
        if self.sign_method is None:
            return (stacked * weights).sum(0)
        electing = stacked * weights if self.definition == "mergekit" else stacked
        signs = electing.sign()
        votes = (electing if self.sign_method == "total" else signs).sum(0)
        agrees = signs == torch.where(votes >= 0, 1.0, -1.0)  # a tie goes to the positive
        total = (stacked * weights * agrees).sum(0)
        if self.definition == "peft":
            return total / agrees.sum(0).clamp(min=1)
        if self.seed is not None:  # mergekit's dare_ties
            return total
        divisor = (weights * agrees).sum(0)
        return total / torch.where(divisor == 0, 1.0, divisor)

    def as_json(self) -> dict[str, Any]:
        """What was done, without what does not apply."""
        content: dict[str, Any] = {"operation": self.name, "weights": list(self.weights)}
        if self.density is not None:
            content["density"] = self.density
        if self.seed is not None:
            content["seed"] = self.seed
        if self.sign_method is not None:
            content |= {"sign_method": self.sign_method, "definition": self.definition}
        return content


def write_combination(
    vectors: TaskVectors,
    combination: Combination,
    path: Path,
    metadata: dict[str, str],
    device: torch.device,
    bar: tqdm[Any],
) -> dict[str, Magnitude]:
    """Write the combination as a task vector file, fp32, computed in float64 and rounded once.

    Args:
        path: a file that does not exist yet; what is zero becomes a hole in it.
        metadata: for its header.
        bar: advanced by the bytes of the vectors.

    Returns:
        what each tensor amounts to.

    Raises:
        UserError: an element of an input is not finite, or one of the result overflows fp32.
    """
    specs = [(name, torch.float32, info.shape) for name, info in vectors.tensors.items()]
    with TensorFileWriter(path, specs, metadata) as writer:
        found = for_each(
            lambda name: _combine_tensor(vectors, combination, name, writer, device, bar),
            vectors.tensors,
        )
    return dict(zip(vectors.tensors, found, strict=True))


def _combine_tensor(
    vectors: TaskVectors,
    combination: Combination,
    name: str,
    writer: TensorFileWriter,
    device: torch.device,
    bar: tqdm[Any],
) -> Magnitude:
    magnitude = Magnitude()
    if not vectors.is_zero(name):
        prunings = [
            _pruning(vectors, combination, name, index, device)
            for index in range(len(vectors.vectors))
        ]
        for start, stop in vectors.row_blocks(name):
            rows = vectors.rows(name, start, stop, device)
            pruned = [prune(part, start) for prune, part in zip(prunings, rows, strict=True)]
            mixed = combination.mix(pruned).float()
            if not bool(torch.isfinite(mixed).all()):
                raise UserError(f"{name}: the combination overflows fp32; use smaller weights")
            if bool(mixed.any()):
                magnitude.add(mixed)
                writer.write(name, mixed, start)
    bar.update(vectors.stored_bytes(name))
    return magnitude


def _pruning(
    vectors: TaskVectors, combination: Combination, name: str, index: int, device: torch.device
) -> Pruning:
    """How one task vector's rows of a parameter are pruned, and rescaled where DARE says so."""
    info, density = vectors.tensors[name], combination.density
    if density is None or density == 1 or vectors.vectors[index].is_zero(name):
        return lambda rows, start: rows
    if combination.seed is None:
        # PEFT and mergekit keep int(density * elements), too.
        largest = LargestElements(
            lambda: vectors.blocks(name, index, device), int(density * info.elements)
        )
        return lambda rows, start: largest(rows)
    chosen = RandomElements(combination.seed, index, name, density, info.row_elements)
    return lambda rows, start: chosen(rows, start).double() / density
