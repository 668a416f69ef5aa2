"""What an adapter's configuration says of its tensors must be true of them.

Each function raises a UserError that names the tensor or module, and both sides of what differs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from taskvec.adapters.config import LoraConfig
from taskvec.adapters.keys import MAGNITUDE, TOKENS, A, B, Group
from taskvec.checkpoint import Checkpoint
from taskvec.cli import UserError
from taskvec.header import TensorInfo
from taskvec.tensorfile import TensorFile


def check_promises(
    file: TensorFile, config: LoraConfig, groups: Sequence[Group], whole: Mapping[str, TensorInfo]
) -> None:
    """Whole tensors are what was trained, or an embedding saved along; trained tokens are there."""
    for parameter, info in whole.items():
        if not config.explains(parameter):
            raise UserError(
                f"{file.path}: {info.name}: a whole tensor that neither modules_to_save nor bias "
                f"of {config.file.name} names; add it to modules_to_save if it was trained"
            )
    promised = config.values.get("trainable_token_indices")
    if promised and not any(TOKENS in group.tensors for group in groups):
        raise UserError(
            f"{file.path}: trainable_token_indices is set in {config.file.name}, but there are no "
            "rows of tokens; the file is incomplete"
        )


def check_saved(
    file: TensorFile, config: LoraConfig, base: Checkpoint, held: Collection[str]
) -> None:
    """Of every module of the base that modules_to_save names, every parameter is held."""
    for module in config.saved_modules():
        for name, info in base.tensors.items():
            if f".{module}." in f".{name}" and info.is_float and name not in held:
                raise UserError(
                    f"{file.path}: holds no {name}, although modules_to_save of "
                    f"{config.file.name} names {module}; the file is incomplete"
                )


def checked_scaling(
    file: TensorFile, config: LoraConfig, group: Group, named: str, matrices: int
) -> float:
    """s of a pair, whose factors have the rank that the configuration gives for each matrix."""
    rank, scaling = config.scaling(named)
    found_A, found_B = group.tensors[A], group.tensors[B]
    wanted = rank * matrices
    if found_A.shape[0] != wanted or found_B.shape[1] != wanted:
        times = f" for each of {matrices} matrices" if matrices > 1 else ""
        raise UserError(
            f"{file.path}: {named}: lora_A {found_A.shape} and lora_B {found_B.shape} do not have "
            f"the rank {rank} of {config.file.name}{times}"
        )
    return scaling


def checked_magnitude(file: TensorFile, config: LoraConfig, group: Group) -> TensorInfo | None:
    """DoRA's magnitudes, which a module has exactly where the configuration says so."""
    found = group.tensors.get(MAGNITUDE)
    if (found is not None) != bool(config.values.get("use_dora")):
        has = "has no lora_magnitude_vector" if found is None else "has lora_magnitude_vector"
        raise UserError(
            f"{file.path}: {group.module} {has}, but use_dora is {config.values.get('use_dora')} "
            f"in {config.file.name}"
        )
    if found is not None and math.prod(found.shape) != group.tensors[B].shape[0]:
        raise UserError(
            f"{file.path}: {group.module}: lora_magnitude_vector {found.shape} does not fit the "
            f"{group.tensors[B].shape[0]} outputs of lora_B"
        )
    return found
