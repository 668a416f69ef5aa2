#!/usr/bin/env python3
"""Step 1: merge a LoRA adapter into its base model, streaming.

    python merge_lora.py --base_model bigcode/starcoder2-3b --lora_path checkpoint-40000/ \\
        --output_dir merged_model_fp32 --precision fp32

Writes a directory that transformers loads: weights in the base's own shard layout, config.json
with the new dtype, the base's tokenizer and generation config, and merge_manifest.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli, processes

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    import torch

    from taskvec.adapter import Adapter
    from taskvec.checkpoint import Checkpoint
    from taskvec.modelwriter import RowFunction
    from taskvec.rounding import Format, Recipe

MANIFEST = "merge_manifest.json"


@dataclass(frozen=True)
class MergeResult:
    """What was written: where, in which format, and which parameters changed."""

    output_dir: Path
    precision: str
    changed_parameters: list[str]
    nbytes: int


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    cli.add_base_model(parser)
    cli.add_lora_path(parser)
    cli.add_output_dir(parser, "merged_model")
    cli.add_precision(parser, "the merged model", ", which leaves no rounding artifacts")
    parser.add_argument(
        "--rounding",
        choices=["once", "peft"],
        default="once",
        help="once: add in fp32 and round the sum (default); peft: round the base first, as PEFT "
        "does with a base that was loaded in that dtype",
    )
    cli.add_max_shard_size(parser)
    return parser


def merge(
    base_model: str,
    lora_path: str | Sequence[str],
    output_dir: str | Path,
    *,
    precision: str = "fp32",
    rounding: str = "once",
    device: str = "auto",
    revision: str | None = None,
    max_shard_size: str | None = None,
) -> MergeResult:
    """Merge an adapter into a base and write the merged model.

    Args:
        base_model: directory, .safetensors file or hub id.
        lora_path: directory or hub id of a PEFT LoRA adapter, or several, merged in turn.
        output_dir: absent, empty, or an earlier merge, which is replaced.
        precision: fp32, fp16 or bf16.
        rounding: once or peft (`taskvec.rounding.RECIPES`).
        device: where the arithmetic runs.
        revision: of a base on the hub.
        max_shard_size: such as "5GB"; the base's own shards if None.

    Raises:
        UserError: an input is unusable, or a weight overflows the format.
    """
    from taskvec.adapter import open_adapter
    from taskvec.checkpoint import open_checkpoint
    from taskvec.modelwriter import stored_format, write_model
    from taskvec.output import output_directory
    from taskvec.rounding import FORMATS, ROUNDINGS

    target, format, recipe = Path(output_dir), FORMATS[precision], ROUNDINGS[rounding]
    with (
        open_checkpoint(base_model, revision) as base,
        open_adapter(lora_path, base) as adapter,
        output_directory(target, is_merged_model, [*base.paths, *adapter.paths]) as partial,
        cli.progress(base.nbytes, f"Merging in {precision}") as bar,
    ):
        torch_device = cli.pick_device(device)
        _say_if_wider(base, precision)
        # Hashed first: should an input change later, what is read of it will not fit together.
        manifest = _manifest(base, adapter, precision, rounding)
        shards = write_model(
            base,
            partial,
            format,
            lambda name: _merged_rows(
                adapter, name, recipe, stored_format(base, name, format), torch_device
            ),
            max_shard_size=max_shard_size,
            bar=bar,
        )
        processes.by_main(lambda: _write_manifest(partial, manifest))
        changed = adapter.parameters
    return MergeResult(target, precision, changed, sum(shard.nbytes for shard in shards))


def _say_if_wider(base: Checkpoint, precision: str) -> None:
    """What fp32 costs and saves where the base is stored in 16 bits."""
    from taskvec.taskvector import precision_of

    stored = precision_of(base)
    if precision == "fp32" and stored in ("fp16", "bf16"):
        cli.notice(
            f"{base.source} is stored in {stored}, and fp32 takes twice its bytes; --precision "
            f"{stored} takes as many, and rounds part of the update away."
        )


def is_merged_model(directory: Path) -> bool:
    """True for a directory that holds an earlier output of this script and nothing else."""
    from taskvec.checkpoint import read_json_object

    if not (directory / MANIFEST).is_file():
        return False
    files = read_json_object(directory / MANIFEST).get("files")
    return isinstance(files, list) and all(
        path.name in files and path.is_file() for path in directory.iterdir()
    )


def _merged_rows(
    adapter: Adapter, name: str, recipe: Recipe, format: Format, device: torch.device
) -> RowFunction | None:
    from taskvec.tensorfile import to_device

    if name not in adapter.scalings:
        return None
    update = adapter.update(name, device)

    def rows(base: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return update.merged(recipe, to_device(base, device), start, stop, format).cpu()

    return rows


def _manifest(base: Checkpoint, adapter: Adapter, precision: str, rounding: str) -> dict[str, Any]:
    """merge_manifest.json, but for the names of the files."""
    import torch

    return {
        **_adapters(adapter),
        "base": base.identity(),
        "precision": precision,
        "rounding": rounding,
        "scaling": adapter.scalings,
        "parameters_changed": len(adapter.scalings),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    from taskvec.output import write_json

    files = sorted([MANIFEST, *(path.name for path in directory.iterdir())])
    write_json(directory / MANIFEST, {**manifest, "files": files})


def _adapters(adapter: Adapter) -> dict[str, Any]:
    """The files of the adapter, or of each of several in the order of merging."""
    from taskvec.checkpoint import file_sha256

    hashes = [(path.name, {"sha256": file_sha256(path)}) for path in adapter.files]
    each = [dict(hashes[start : start + 2]) for start in range(0, len(hashes), 2)]
    return {"adapter": each[0]} if len(each) == 1 else {"adapters": each}


def _body(args: argparse.Namespace) -> int:
    result = merge(
        args.base_model,
        cli.lora_path(args),
        args.output_dir,
        precision=args.precision,
        rounding=args.rounding,
        device=args.device,
        revision=args.revision,
        max_shard_size=args.max_shard_size,
    )
    cli.result("✅ Model merging completed successfully!")
    cli.result(f"📊 Model precision: {result.precision.upper()}")
    cli.result(f"📁 Merged model saved to: {result.output_dir}/")
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv, shared=True)


if __name__ == "__main__":
    sys.exit(main())
