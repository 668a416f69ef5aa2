"""What the benchmark runs on: a StarCoder2-shaped base of any width and an adapter for it.

Random weights at the magnitudes of real ones. Names, shapes and config.json are transformers'.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from taskvec.output import write_json

if TYPE_CHECKING:
    import torch

RANK = ALPHA = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARDS = 3
WEIGHT_STD = 0.018  # Starcoder2Config().initializer_range
UPDATE_STD = 5.9e-5  # of B @ A, as in checkpoint-40000/README.md
WIDTH_STEP = 48  # 24 heads, and rotary embeddings need an even size of each

Shapes = dict[str, tuple[int, ...]]


def write_config(directory: Path, width: float) -> Shapes:
    """Write config.json of StarCoder2-3B at ``width`` times its width.

    The vocabulary and the 30 layers stay; 24 query and 2 key-value heads get narrower.

    Returns:
        shape of each of the 483 parameters by name.
    """
    import torch
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    full = Starcoder2Config(bos_token_id=0, eos_token_id=0)
    hidden = max(1, round(full.hidden_size * width / WIDTH_STEP)) * WIDTH_STEP
    config = Starcoder2Config(
        hidden_size=hidden, intermediate_size=4 * hidden, bos_token_id=0, eos_token_id=0
    )
    config.architectures = [Starcoder2ForCausalLM.__name__]
    config.dtype = torch.float32
    config.save_pretrained(directory)
    with torch.device("meta"):  # shapes without memory
        model = Starcoder2ForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def is_adapted(name: str) -> bool:
    """Whether the adapter changes a parameter."""
    return name.endswith(tuple(f".{module}.weight" for module in TARGETS))


def nbytes(shapes: Shapes) -> int:
    """Bytes of fp32 tensors of these shapes."""
    return sum(4 * math.prod(shape) for shape in shapes.values())


def write_base(directory: Path, shapes: Shapes, seed: int = 0) -> None:
    """Write random weights, fp32, in shards of about equal size and their index."""
    import torch

    from taskvec.checkpoint import INDEX_FILE
    from taskvec.tensorfile import TensorFileWriter, row_blocks

    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for number, names in enumerate(_split(shapes), 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        specs = [(name, torch.float32, shapes[name]) for name in names]
        with TensorFileWriter(directory / file, specs) as writer:
            for name, info in writer.tensors.items():
                weight_map[name] = file
                for start, stop in row_blocks(info, 1 << 20):
                    rows = torch.empty(stop - start, *info.shape[1:])
                    rows.normal_(_mean(name), WEIGHT_STD, generator=generator)
                    writer.write(name, rows, start)
    content = {"metadata": {"total_size": nbytes(shapes)}, "weight_map": weight_map}
    write_json(directory / INDEX_FILE, content)


def write_adapter(directory: Path, shapes: Shapes, seed: int = 1) -> None:
    """Write a rank-8 adapter on q, k, v and o of every layer, fp32, as PEFT does."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes.items() if is_adapted(n)):
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        reach = 1 / math.sqrt(columns)  # PEFT's own initialisation of A
        b_std = UPDATE_STD / (math.sqrt(RANK) * reach / math.sqrt(3))
        a = torch.empty(RANK, columns).uniform_(-reach, reach, generator=generator)
        b = torch.empty(rows, RANK).normal_(0, b_std, generator=generator)
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def _mean(name: str) -> float:
    """Norms scale by about one; everything else is centred."""
    return 1.0 if "norm" in name and name.endswith(".weight") else 0.0


def _split(shapes: Shapes) -> Iterator[list[str]]:
    """Names in order, cut into `SHARDS` groups of about equal bytes."""
    limit, filled = nbytes(shapes) / SHARDS, 0.0
    groups: list[list[str]] = [[] for _ in range(SHARDS)]
    for name, shape in shapes.items():
        groups[min(SHARDS - 1, int(filled / limit))].append(name)
        filled += 4 * math.prod(shape)
    return iter(groups)
