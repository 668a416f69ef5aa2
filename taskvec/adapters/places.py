"""A base's parameters by the names that an adapter has for them, and what fits them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from taskvec.adapters.keys import PREFIX, A, B, Group
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.conversions import conversion_of
from taskvec.header import TensorInfo
from taskvec.names import is_expert, pieces, renaming

# How transformers stores a stack of experts: its modules' ``is_transposed``.
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")
_EXPERTS_BY_OUTPUT = ("granitemoe",)


class Places:
    """Where in a base an adapter's tensors belong.

    Args:
        path: the adapter's file, for messages.
        modules, parameters: what it adapts, by its own names.

    Attributes:
        rename: an adapter's name of a parameter -> the base's.
        pieces: of a parameter that is fused in memory only: what it consists of in the file.

    Raises:
        UserError: the base has none of what is adapted.
    """

    def __init__(
        self, path: Path, base: Checkpoint, modules: Sequence[str], parameters: Sequence[str]
    ) -> None:
        self.path, self.base = path, base
        self.rename = renaming(modules, base, parameters)
        self.pieces = pieces(base)
        self._refuse_if_strange([*modules, *parameters])

    def _refuse_if_strange(self, adapted: Sequence[str]) -> None:
        """An adapter of which nothing is found has names of its own, or is of another model."""
        found = any(
            self.shape(name) is not None for each in adapted for name in (each, f"{each}.weight")
        )
        if adapted and not found and all(name.startswith(PREFIX) for name in adapted):
            raise UserError(
                f"{self.path}: {PREFIX}{adapted[0]}: the keys have the prefix {PREFIX} twice, as "
                "where get_peft_model() is given a model that it has wrapped already; take one of "
                "them out of the keys"
            )
        if adapted and not found:
            raise UserError(
                f"{self.path}: adapts {adapted[0]}, which {self.base.source} has not got, nor "
                "any other that it adapts; give the base that it was trained on, and if it is that "
                "one, load it in transformers and save it with save_original_format=False"
            )

    def is_fused(self, name: str) -> bool:
        """Whether PEFT adapts this module's weight as a parameter, since transformers 5 fuses it.

        That holds for experts, and for the router beside them.
        """
        experts = conversion_of(self.base.config()).experts
        return is_expert(self.base, name) or (
            experts is not None and name.endswith((".mlp.gate.weight", "_moe.gate.weight"))
        )

    def is_transposed(self, group: Group, name: str, info: TensorInfo) -> bool:
        """Whether a stack's matrices are stored (in, out); the shape of a square one cannot say."""
        into, out = group.tensors[A].shape[1], group.tensors[B].shape[0]
        if into != out:
            return info.shape[1:] == (into, out)
        kind = self.base.config().get("model_type")
        if kind in _TRANSPOSED_EXPERTS:
            return True
        if kind in _EXPERTS_BY_OUTPUT or conversion_of(self.base.config()).experts:
            return False
        raise UserError(
            f"{self.path}: {name} in {self.base.source} holds square matrices {info.shape}, "
            f"and whether a {kind} stores them (out, in) is not known; merge it with PEFT's "
            "merge_and_unload()"
        )

    def find(self, parameter: str, adapted: str) -> tuple[str, TensorInfo]:
        """The base's name for a parameter, and where it lies."""
        name = self.rename(parameter)
        info = self.base.tensors.get(name)
        if info is None and is_expert(self.base, parameter):
            raise UserError(
                f"{self.path}: adapts {adapted}, but {self.base.source} lacks it, or has its "
                "experts fused where the adapter has them one by one; use the base as it was "
                "published"
            )
        if info is None:
            raise UserError(f"{self.path}: adapts {adapted}, which {self.base.source} has not got")
        if not info.is_float:
            raise UserError(f"{self.base.source}: {name} is {info.dtype}, not a float")
        return name, info

    def check_convolution(self, group: Group, name: str, info: TensorInfo) -> None:
        """A is a convolution of the same kernel to r channels, B one of kernel 1 from these."""
        found_A, found_B = group.tensors[A].shape, group.tensors[B].shape
        shape = (found_B[0], *found_A[1:])
        if info.shape != shape or math.prod(found_B[2:]) != 1:
            self.refuse_shape(group, name, info, shape)

    def check_shape(
        self, group: Group, name: str, info: TensorInfo, shape: tuple[int, ...]
    ) -> None:
        if info.shape != shape:
            self.refuse_shape(group, name, info, shape)

    def refuse_shape(
        self, group: Group, name: str, info: TensorInfo, shape: tuple[int, ...]
    ) -> None:
        raise UserError(
            f"{self.path}: {group.module}: B @ A is {shape}, but {name} in "
            f"{self.base.source} is {info.shape}"
        )

    def fits(self, group: Group, name: str) -> bool:
        """Whether a pair has the shape of a parameter or of the matrices stacked in it."""
        shape = self.shape(name)
        if shape is None:
            return False
        into, out = group.tensors[A].shape[1], group.tensors[B].shape[0]
        if len(shape) == 3 and shape[0] > 1:
            return {into, out} == set(shape[1:]) and into + out == sum(shape[1:])
        return shape[-2:] == (out, into)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """A parameter's shape in memory; None if the base has not got it."""
        name = self.rename(parameter)
        if name in self.base.tensors:
            return self.base.tensors[name].shape
        apart = self.pieces.get(name)
        if not apart:
            return None
        parts, (rows, *rest) = apart[0].parts, self.base.tensors[apart[0].name].shape
        return (len(apart) // parts, parts * rows, *rest)
