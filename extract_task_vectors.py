#!/usr/bin/env python3
"""Step 2: subtract the base from a fine-tuned model to get its task vector, streaming.

    python extract_task_vectors.py --base_model bigcode/starcoder2-3b \\
        --finetuned_model merged_model_fp32/ --output_dir task_vectors_fp32/

Writes task_vector.safetensors (fp32, every tensor of the architecture; what is zero takes no disk)
and task_vector_summary.json (per tensor: shape, non-zero elements, norm, largest absolute value).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli, processes
from taskvec.wording import are

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    import torch
    from tqdm import tqdm

    from taskvec.checkpoint import Checkpoint
    from taskvec.compare import Magnitude
    from taskvec.header import TensorInfo
    from taskvec.taskvector import FormedTaskVector
    from taskvec.tensorfile import TensorFileWriter

SUMMARY = "task_vector_summary.json"
BLOCK_ELEMENTS = 1 << 18  # of each model: with smaller ones, threads wait for Python's lock


@dataclass(frozen=True)
class ExtractResult:
    """What was written, and how much of it is not zero."""

    output_dir: Path
    total_parameters: int
    nonzero_parameters: int


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    cli.add_base_model(parser)
    parser.add_argument(
        "--finetuned_model",
        default="merged_model_fp32/",
        metavar="MODEL",
        help="directory, .safetensors file or hub id (default: merged_model_fp32/)",
    )
    cli.add_output_dir(parser, "task_vectors/")
    parser.add_argument(
        "--base_precision",
        choices=["stored", "fp32", "fp16", "bf16"],
        default="stored",
        help="round the base to this before subtracting (default: stored, as it is); rounding it "
        "like the merged model removes the artifacts of the base's own rounding",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="accepted for compatibility: tensors are read from the files, no model code ever runs",
    )
    return parser


def extract(
    base_model: str,
    finetuned_model: str,
    output_dir: str | Path,
    *,
    base_precision: str = "stored",
    device: str = "auto",
    revision: str | None = None,
) -> ExtractResult:
    """Write the task vector of a fine-tuned model.

    Args:
        base_model, finetuned_model: directory, .safetensors file or hub id.
        output_dir: absent, empty, or an earlier task vector, which is replaced.
        base_precision: stored, or the format that the base is rounded to first.
        device: where the arithmetic runs.
        revision: of a base on the hub.

    Raises:
        UserError: an input is unusable, or the two models differ in a tensor's name or shape.
    """
    import torch

    from taskvec.checkpoint import open_checkpoint
    from taskvec.kinds import BASE_PRECISION, MERGED_PRECISION, TASK_VECTOR_FILE
    from taskvec.names import aligned
    from taskvec.output import output_directory, write_json
    from taskvec.rounding import FORMATS
    from taskvec.taskvector import FormedTaskVector, precision_of
    from taskvec.tensorfile import TensorFileWriter
    from taskvec.workers import for_each

    target, names_written = Path(output_dir), [TASK_VECTOR_FILE, SUMMARY]
    with (
        open_checkpoint(base_model, revision) as base,
        open_checkpoint(finetuned_model) as merged,
        output_directory(target, names_written, [*base.paths, *merged.paths]) as partial,
        cli.progress(base.nbytes + merged.nbytes, "Extracting") as bar,
    ):
        merged = aligned(base, merged)
        torch_device = cli.pick_device(device)
        vector = FormedTaskVector(finetuned_model, merged, FORMATS.get(base_precision))
        tensors = {name: info for name, info in base.tensors.items() if info.is_float}
        vector.check_other_tensors(base, bar.update)
        metadata = {BASE_PRECISION: base_precision, MERGED_PRECISION: precision_of(merged)}
        specs = [(name, torch.float32, info.shape) for name, info in tensors.items()]
        with TensorFileWriter(partial / TASK_VECTOR_FILE, specs, metadata) as writer:
            magnitudes = for_each(
                lambda info: _extract_tensor(vector, base, info, writer, torch_device, bar),
                tensors.values(),
                cost=lambda info: info.nbytes,
                reads=lambda info: [base.stored(info.name), *vector.stored(info.name)],
            )
        found = dict(zip(tensors, magnitudes, strict=True))
        summary = summarise(tensors, found, metadata)
        processes.by_main(lambda: write_json(partial / SUMMARY, summary))
    if summary["non_finite_elements"]:
        cli.notice(f"⚠️ {are(summary['non_finite_elements'], 'element')} NaN or infinite.")
    return ExtractResult(target, summary["total_parameters"], summary["nonzero_parameters"])


def summarise(
    tensors: dict[str, TensorInfo], found: dict[str, Magnitude], metadata: dict[str, str]
) -> dict[str, Any]:
    """task_vector_summary.json: the totals, then one entry per tensor. Norms are Frobenius."""
    return {
        **metadata,
        "total_parameters": len(found),
        "nonzero_parameters": sum(magnitude.nonzero > 0 for magnitude in found.values()),
        "total_elements": sum(info.elements for info in tensors.values()),
        "nonzero_elements": sum(magnitude.nonzero for magnitude in found.values()),
        "non_finite_elements": sum(magnitude.non_finite for magnitude in found.values()),
        "norm": sum(magnitude.squared_norm for magnitude in found.values()) ** 0.5,
        "max_abs": max((magnitude.max_abs for magnitude in found.values()), default=0.0),
        "parameters": {
            name: {
                "shape": list(tensors[name].shape),
                "nonzero_elements": magnitude.nonzero,
                "non_finite_elements": magnitude.non_finite,
                "norm": magnitude.norm,
                "max_abs": magnitude.max_abs,
            }
            for name, magnitude in found.items()
        },
    }


def _extract_tensor(
    vector: FormedTaskVector,
    base: Checkpoint,
    info: TensorInfo,
    writer: TensorFileWriter,
    device: torch.device,
    bar: tqdm[Any],
) -> Magnitude:
    """Write one tensor of the task vector; blocks that are zero are left out as holes."""
    from taskvec.compare import Magnitude
    from taskvec.tensorfile import row_blocks

    magnitude = Magnitude()
    if vector.is_zero(info.name):
        bar.update(info.nbytes)
        return magnitude
    merged_itemsize = vector.merged.tensors[info.name].dtype.itemsize
    for start, stop in row_blocks(info, BLOCK_ELEMENTS):
        stored = base.read(info.name, start, stop)
        rows = vector.changed_rows(stored, info.name, start, stop, device)
        if rows is not None:
            magnitude.add(rows)
            writer.write(info.name, rows, start)
        bar.update(stored.numel() * (info.dtype.itemsize + merged_itemsize))
    return magnitude


def _body(args: argparse.Namespace) -> int:
    result = extract(
        args.base_model,
        args.finetuned_model,
        args.output_dir,
        base_precision=args.base_precision,
        device=args.device,
        revision=args.revision,
    )
    cli.result(f"📁 Task vectors saved to: {result.output_dir}/")
    cli.result(
        f"📊 Found {result.nonzero_parameters} non-zero parameters "
        f"(vs {result.total_parameters} total architecture parameters)"
    )
    cli.result("💾 Saved: task_vector.safetensors")
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv, shared=True)


if __name__ == "__main__":
    sys.exit(main())
