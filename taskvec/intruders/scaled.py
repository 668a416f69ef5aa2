"""The intervention on intruder dimensions: a tuned model with some singular triplets scaled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from taskvec import cli
from taskvec.checkpoint import Checkpoint, read_json_object
from taskvec.intruders.directions import scaled_rows
from taskvec.intruders.leading import Triplets
from taskvec.intruders.tuned import Tuned
from taskvec.modelwriter import RowFunction, write_model
from taskvec.output import output_directory, write_json
from taskvec.rounding import FORMATS

MANIFEST = "scaling_manifest.json"

# By parameter: the triplets to scale, and whether it is stored (in, out).
Chosen = Mapping[str, tuple[Triplets, bool]]


def write_scaled_model(
    tuned: Tuned,
    chosen: Chosen,
    factor: float,
    target: Path,
    precision: str,
    device: torch.device,
) -> None:
    """Write W_0 + delta + (lambda - 1) sum of u sigma v^T as a model that transformers loads.

    Computed in float64 and rounded once. Parameters without a chosen triplet are the tuned ones.

    Args:
        chosen: the triplets that are scaled.
        factor: lambda: 1 changes nothing, 0 takes the triplets out.
        target: absent, empty, or an earlier output of this function, which is replaced.
        precision: fp32, fp16 or bf16.

    Raises:
        UserError: a value overflows the format, or target holds something else.
    """
    start = tuned.version if isinstance(tuned.version, Checkpoint) else tuned.base
    format = FORMATS[precision]

    def edit(name: str) -> RowFunction | None:
        if name not in chosen and not (tuned.kind == "lora" and tuned.changes(name)):
            return None

        def rows(base: torch.Tensor, first: int, last: int) -> torch.Tensor:
            new = tuned.rows(name, base, first, last, device)
            if name in chosen:
                triplets, transposed = chosen[name]
                part = slice(first, last)
                new = new + scaled_rows(triplets, factor, part, transposed=transposed)
            return new.to(format.dtype).cpu()

        return rows

    paths = [*tuned.base.paths, *tuned.paths]
    with (
        output_directory(target, is_scaled_model, paths) as partial,
        cli.progress(start.nbytes, "Writing the scaled model") as bar,
    ):
        write_model(start, partial, format, edit, max_shard_size=None, bar=bar)
        files = sorted([MANIFEST, *(path.name for path in partial.iterdir())])
        numbers = {name: len(triplets.values) for name, (triplets, _) in chosen.items()}
        content = {
            "base": tuned.base.source,
            "version": tuned.source,
            "scale": factor,
            "precision": precision,
            "scaled_triplets": numbers,
            "files": files,
        }
        write_json(partial / MANIFEST, content)


def is_scaled_model(directory: Path) -> bool:
    """True for a directory that holds an earlier output of this module and nothing else."""
    if not (directory / MANIFEST).is_file():
        return False
    files = read_json_object(directory / MANIFEST).get("files")
    return isinstance(files, list) and all(
        path.name in files and path.is_file() for path in directory.iterdir()
    )
