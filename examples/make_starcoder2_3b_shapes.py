#!/usr/bin/env python3
"""Write a model with the names, shapes and dtype of StarCoder2-3B, all zero: no weights needed.

    python examples/make_starcoder2_3b_shapes.py --output_dir starcoder2-3b-shapes/

The architecture is that of transformers' Starcoder2Config, whose defaults are StarCoder2-3B's. The
file says 12.1 GB and is one hole: on a file system with sparse files it takes a few kilobytes. What
depends on names and shapes only can be tried on it without a download.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules

from taskvec import cli

OUTPUT_FILES = ("config.json", "model.safetensors")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    cli.add_output_dir(parser, "starcoder2-3b-shapes/")
    return parser


def write_shapes(output_dir: str | Path) -> dict[str, tuple[int, ...]]:
    """Write config.json and an all-hole model.safetensors in fp32.

    Args:
        output_dir: absent, empty, or an earlier output, which is replaced.

    Returns:
        shape of each parameter by name.

    Raises:
        UserError: the output directory holds something else.
    """
    import torch
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    from taskvec.output import output_directory
    from taskvec.tensorfile import TensorFileWriter

    config = Starcoder2Config(bos_token_id=0, eos_token_id=0)
    config.architectures = [Starcoder2ForCausalLM.__name__]
    with torch.device("meta"):  # shapes without memory
        model = Starcoder2ForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with output_directory(Path(output_dir), OUTPUT_FILES) as partial:
        config.save_pretrained(partial)
        specs = [(name, torch.float32, shape) for name, shape in shapes.items()]
        with TensorFileWriter(partial / OUTPUT_FILES[1], specs):
            pass  # nothing is written, so everything reads as zero
    return shapes


def _body(args: argparse.Namespace) -> int:
    from math import prod

    shapes = write_shapes(args.output_dir)
    elements = sum(prod(shape) for shape in shapes.values())
    file = Path(args.output_dir) / OUTPUT_FILES[1]
    cli.result(f"📊 {len(shapes)} parameters, {elements:,} elements, all zero")
    cli.result(
        f"📁 {file}: {file.stat().st_size:,} bytes, {file.stat().st_blocks * 512:,} of them on disk"
    )
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
