#!/usr/bin/env python3
"""Sample the adapter in checkpoint-40000/: StarCoder2-3B's real shapes, no training.

    python examples/make_checkpoint_40000.py --output_dir checkpoint-40000

The same seed gives the same bytes. A directory that holds anything is never replaced: it may be
the checkpoint that somebody trained.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from taskvec import cli
from taskvec.output import output_directory

if TYPE_CHECKING:
    import numpy as np

LAYERS, HIDDEN, KEY_VALUE = 30, 3072, 256
OUTPUT_ROWS = {"q_proj": HIDDEN, "k_proj": KEY_VALUE, "v_proj": KEY_VALUE, "o_proj": HIDDEN}
RANK = ALPHA = 8
SEED = 40000

# PEFT starts A as torch starts a linear layer: Kaiming-uniform with a = sqrt(5), which is
# uniform in +-1/sqrt(inputs). Training moves A little from there.
A_BOUND = 1 / math.sqrt(HIDDEN)
A_STD = A_BOUND / math.sqrt(3)
# B starts at zero; what training leaves in it sets the size of the update, whose elements are
# sums of RANK products: std(B A) = sqrt(RANK) std(B) std(A).
UPDATE_STD = 5.9e-5
B_STD = UPDATE_STD / (math.sqrt(RANK) * A_STD)
# Starcoder2Config().initializer_range: what StarCoder2-3B's weights were drawn with.
WEIGHT_STD = 0.018042

README = """\
# checkpoint-40000: sampled, not trained

**This is not a trained adapter.** It is a stand-in with the exact shapes of a LoRA adapter for
[bigcode/starcoder2-3b](https://huggingface.co/bigcode/starcoder2-3b), so that the documented
commands run as typed. A model merged with it is StarCoder2-3B plus a little noise. To analyse your
own adapter, put your own checkpoint here (`adapter_config.json` and `adapter_model.safetensors`),
or name another directory with `--lora_path`. A small adapter that was really trained is in
`examples/starcoder2-mini-lora/`.

| | |
|---|---|
| rank, alpha | {rank}, {alpha} (scaling {scaling:g}) |
| modules | {modules} of {layers} layers: {updated} parameters, {tensors} tensors |
| shapes | A {rank} x {hidden}; B {hidden} x {rank} (q, o) and {key_value} x {rank} (k, v) |
| size | {parameters:,} parameters in fp32, {megabytes:.1f} MB |

## Where the magnitudes come from

Standard deviations, measured over all elements:

- **A: {a_std:.3e}.** Uniform in ±1/√{hidden}: PEFT's initialisation (Kaiming-uniform), near which
  A stays in most trainings.
- **B: {b_std:.3e}.** Normal, of the size that gives the update below:
  std(B A) = √{rank} · std(B) · std(A).
- **Update B A: {update_std:.3e}.** The weights that it is added to have a standard deviation of
  about 0.018 to 0.02 (StarCoder2's `initializer_range` is {weight_std}), so it changes them by
  {share:.2%}.

At this ratio the formats differ as they do for real adapters: the rounding error of a merge is
about a hundred-thousandth of the update in fp32, some per cent of it in fp16, and about half
of it in bf16. What random values cannot show is structure: the {rank} singular values of every
update are nearly equal, and their directions mean nothing.

## Made by

```
python examples/make_checkpoint_40000.py --output_dir checkpoint-40000
```

Seed {seed}; every run writes the same bytes. The script writes only to a new or empty directory.
"""


@dataclass(frozen=True)
class Measured:
    """Standard deviations over all elements of all tensors of a kind."""

    a_std: float
    b_std: float
    update_std: float


def sample_tensors(seed: int = SEED) -> dict[str, np.ndarray]:
    """The adapter by PEFT's names: lora_A.weight (8, 3072) and lora_B.weight (out, 8), fp32."""
    import numpy as np

    # RandomState is old, but its streams are frozen for all versions of NumPy (NEP 19).
    generator = np.random.RandomState(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, rows in OUTPUT_ROWS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            a = generator.uniform(-A_BOUND, A_BOUND, (RANK, HIDDEN))
            b = generator.normal(0.0, B_STD, (rows, RANK))
            tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    return tensors


def measure(tensors: dict[str, np.ndarray]) -> Measured:
    """The standard deviations that README.md states. All means are zero but for sampling."""
    import numpy as np

    squares = {"A": 0.0, "B": 0.0, "update": 0.0}
    counts = {"A": 0, "B": 0, "update": 0}
    for name in (name for name in tensors if ".lora_A." in name):
        a = tensors[name].astype(np.float64)
        b = tensors[name.replace(".lora_A.", ".lora_B.")].astype(np.float64)
        # ||B A||_F^2 = sum((B'B) * (A A')), without forming the 3072 x 3072 product.
        norms = {"A": (a**2).sum(), "B": (b**2).sum(), "update": ((b.T @ b) * (a @ a.T)).sum()}
        sizes = {"A": a.size, "B": b.size, "update": len(b) * a.shape[1]}
        for kind in squares:
            squares[kind] += float(norms[kind])
            counts[kind] += sizes[kind]
    return Measured(*(math.sqrt(squares[kind] / counts[kind]) for kind in squares))


def make_checkpoint(output_dir: Path, seed: int = SEED) -> Measured:
    """Write the adapter, its configuration as PEFT writes it, and README.md."""
    from peft import LoraConfig
    from safetensors.numpy import save_file

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=cli.DEFAULT_BASE,
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(OUTPUT_ROWS),
        inference_mode=True,
    )
    config.target_modules = sorted(OUTPUT_ROWS)  # not a set, whose order changes between runs
    tensors = sample_tensors(seed)
    measured = measure(tensors)
    with output_directory(output_dir, is_ours=()) as folder:
        config.save_pretrained(str(folder))
        weights = folder / "adapter_model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        text = readme(tensors, measured, weights.stat().st_size, seed)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return measured


def readme(tensors: dict[str, np.ndarray], measured: Measured, nbytes: int, seed: int) -> str:
    """README.md with the numbers of this adapter."""
    return README.format(
        rank=RANK,
        alpha=ALPHA,
        scaling=ALPHA / RANK,
        modules=", ".join(OUTPUT_ROWS),
        layers=LAYERS,
        updated=len(tensors) // 2,
        tensors=len(tensors),
        hidden=HIDDEN,
        key_value=KEY_VALUE,
        parameters=sum(tensor.size for tensor in tensors.values()),
        megabytes=nbytes / 1e6,
        a_std=measured.a_std,
        b_std=measured.b_std,
        update_std=measured.update_std,
        share=measured.update_std / WEIGHT_STD,
        weight_std=WEIGHT_STD,
        seed=seed,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    cli.add_output_dir(parser, "checkpoint-40000", "a new or empty directory")
    parser.add_argument("--seed", type=int, default=SEED, help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _make, argv)


def _make(args: argparse.Namespace) -> int:
    measured = make_checkpoint(Path(args.output_dir), args.seed)
    cli.result(f"Standard deviation of the update B A: {measured.update_std:.3e}")
    cli.result(f"Saved: {args.output_dir}")
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
