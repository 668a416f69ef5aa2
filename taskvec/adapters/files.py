"""The files of a PEFT adapter: what they are called, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from taskvec.output import output_file, write_json
from taskvec.tensorfile import TensorFileWriter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # what PEFT wrote before


def write_adapter(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them.

    The configuration comes last, and an earlier one goes first: without it no reader takes the
    directory for an adapter, whatever stops this in between.

    Args:
        directory: made if absent; files of these names are replaced.
        tensors: by PEFT's names, which begin with `taskvec.adapters.keys.PREFIX`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    specs = [(name, t.dtype, tuple(t.shape)) for name, t in sorted(tensors.items())]
    with output_file(directory / WEIGHTS_FILE) as partial:
        with TensorFileWriter(partial, specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
    with output_file(directory / CONFIG_FILE) as partial:
        write_json(partial, config)
