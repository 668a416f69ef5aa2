#!/usr/bin/env python3
"""Work with task vectors: look at them, apply them, put them together, make adapters of them.

    python analyze_task_vectors.py show tv_a/ tv_b/
    python analyze_task_vectors.py apply --base_model BASE --task_vector tv_a/ --scale 0.5 1
    python analyze_task_vectors.py ties tv_a/ tv_b/ --density 0.2
    python analyze_task_vectors.py to_lora --base_model BASE --task_vector tv_a/

A task vector is a file of extract_task_vectors.py, or its directory. What is written is one again
(add, negate, scale, analogy, ties, dare_linear, dare_ties), a model (apply) or a PEFT adapter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli
from taskvec.arithmetic.flags import DEFAULT_TASK_VECTOR, add_commands, combination

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    from taskvec.arithmetic.combine import Combination

SHOW_RESULT, SHOW_TABLE = "task_vectors.json", "task_vectors.csv"
COSINES_FIGURE, NORMS_FIGURE = "task_vector_cosines.png", "task_vector_norms.png"
LORA_RESULT = "to_lora.json"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_command_parser(__doc__)
    add_commands(parser)
    return parser


# -- the work ------------------------------------------------------------------


@dataclass(frozen=True)
class CombineResult:
    """A task vector that was written: where, of how many parameters, and how many are not zero."""

    output_dir: Path
    total_parameters: int
    nonzero_parameters: int
    norm: float


@dataclass(frozen=True)
class ApplyResult:
    """Models that were written.

    Attributes:
        models: the directory of each, by its scale.
        round_trip: what of the merged model came back at scale 1; None where that says nothing.
    """

    models: dict[float, Path]
    round_trip: dict[str, Any] | None

    @property
    def holds(self) -> bool:
        """False if the merged model differs where the task vector had room for the difference."""
        return not (self.round_trip and self.round_trip["unexplained"])


@dataclass(frozen=True)
class DocumentResult:
    """Where an output is, and the JSON document in it."""

    output_dir: Path
    document: dict[str, Any]


def combine(
    task_vectors: Sequence[str | Path],
    combination: Combination,
    output_dir: str | Path,
    *,
    device: str = "auto",
) -> CombineResult:
    """Write the combination of several task vectors as a task vector.

    Args:
        task_vectors: files or directories; the combination has a weight for each.
        output_dir: absent, empty, or an earlier task vector, which is replaced.
        device: where the arithmetic runs.

    Raises:
        UserError: an input is unusable, or they are of different architectures.
    """
    import json

    from extract_task_vectors import SUMMARY, summarise
    from taskvec.arithmetic.combine import write_combination
    from taskvec.arithmetic.several import open_task_vectors
    from taskvec.kinds import TASK_VECTOR_FILE
    from taskvec.output import output_directory, write_json

    with (
        open_task_vectors(task_vectors) as vectors,
        output_directory(Path(output_dir), [TASK_VECTOR_FILE, SUMMARY], vectors.paths) as partial,
        cli.progress(vectors.nbytes, "Combining") as bar,
    ):
        done = {**combination.as_json(), "inputs": vectors.sources}
        found = write_combination(
            vectors,
            combination,
            partial / TASK_VECTOR_FILE,
            {key: json.dumps(value) for key, value in done.items()},
            cli.pick_device(device),
            bar,
        )
        summary = summarise(vectors.tensors, found, {})
        write_json(partial / SUMMARY, {**done, **summary})
    return CombineResult(
        Path(output_dir),
        summary["total_parameters"],
        summary["nonzero_parameters"],
        summary["norm"],
    )


def apply(
    base_model: str,
    task_vector: str | Path,
    output_dir: str | Path,
    *,
    scales: Sequence[float] = (1.0,),
    precision: str = "fp32",
    finetuned_model: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    max_shard_size: str | None = None,
) -> ApplyResult:
    """Write base + scale * task vector as a model that transformers loads, for every scale.

    Args:
        base_model: directory, .safetensors file or hub id.
        task_vector: a file or its directory.
        output_dir: absent, empty, or an earlier output, which is replaced. With several scales it
            holds a directory ``scale_...`` of each.
        precision: fp32, fp16 or bf16; the sum is computed in float64 and rounded once.
        finetuned_model: the model that the task vector was extracted from, to compare with.
        device: where the arithmetic runs.
        revision: of a base on the hub.
        max_shard_size: such as "5GB"; the base's own shards if None.

    Raises:
        UserError: an input is unusable, they do not fit together, or a weight overflows.
    """
    from contextlib import ExitStack

    from taskvec.arithmetic.apply import (
        APPLIED,
        Application,
        files_inside,
        is_applied,
        scale_names,
    )
    from taskvec.checkpoint import open_checkpoint
    from taskvec.modelwriter import write_models
    from taskvec.output import output_directory, write_json
    from taskvec.rounding import FORMATS
    from taskvec.subject import open_vector
    from taskvec.taskvector import open_task_vector

    names = scale_names(scales, finetuned_model)
    with ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(base_model, revision))
        base.refuse_quantised()
        vector = stack.enter_context(open_task_vector(Path(task_vector)))
        vector.check_fits(base)
        inputs, merged = [*base.paths, *vector.paths], None
        if finetuned_model is not None:
            merged, paths = stack.enter_context(open_vector(base, None, finetuned_model))
            inputs += paths
        partial = stack.enter_context(output_directory(Path(output_dir), is_applied, inputs))
        bar = stack.enter_context(cli.progress(base.nbytes, f"Applying in {precision}"))
        application = Application(
            base, vector, scales, FORMATS[precision], merged, cli.pick_device(device)
        )
        if vector.base_format is not None:
            cli.notice(
                f"The base was rounded to {vector.base_format.name} when this task vector was "
                "extracted, so it is rounded again before the task vector is added."
            )
        directories = [partial / name for name in names]
        for directory in directories:
            directory.mkdir(exist_ok=True)
        write_models(
            base,
            directories,
            FORMATS[precision],
            application.edit,
            max_shard_size=max_shard_size,
            bar=bar,
        )
        round_trip = application.round_trip.as_json() if application.round_trip else None
        manifest = {
            "base": base.identity(),
            "task_vector": str(task_vector),
            "scales": dict(zip(names, scales, strict=True)),
            "precision": precision,
            "round_trip": round_trip,
            "files": sorted([APPLIED, *(str(path) for path in files_inside(partial))]),
        }
        write_json(partial / APPLIED, manifest)
    models = {scale: Path(output_dir) / name for scale, name in zip(scales, names, strict=True)}
    return ApplyResult(models, round_trip)


def show(
    task_vectors: Sequence[str | Path],
    output_dir: str | Path,
    *,
    ranks: bool = True,
    device: str = "auto",
) -> DocumentResult:
    """Measure task vectors layer by layer, and how far they point the same way.

    Args:
        task_vectors: files or directories.
        output_dir: absent, empty, or an earlier output, which is replaced.
        ranks: compute the spectrum of each matrix that changed.
        device: where the arithmetic runs.

    Raises:
        UserError: an input is unusable, or they are of different architectures.
    """
    from taskvec.arithmetic.overview import overview, table_rows
    from taskvec.arithmetic.several import open_task_vectors
    from taskvec.figures import vectors as figures
    from taskvec.output import output_directory, write_json
    from taskvec.tables import write_csv

    files = [SHOW_RESULT, SHOW_TABLE, COSINES_FIGURE, NORMS_FIGURE]
    with (
        open_task_vectors(task_vectors) as vectors,
        output_directory(Path(output_dir), files, vectors.paths) as partial,
    ):
        with cli.progress(2 * vectors.nbytes, "Measuring") as bar:
            content = overview(vectors, cli.pick_device(device), bar, ranks=ranks)
        write_json(partial / SHOW_RESULT, content)
        rows = table_rows(content)
        write_csv(partial / SHOW_TABLE, list(rows[0]), rows)
        figures.norms(content, partial / NORMS_FIGURE)
        if len(task_vectors) > 1:
            figures.cosines(content, partial / COSINES_FIGURE)
    return DocumentResult(Path(output_dir), content)


def to_lora(
    output_dir: str | Path,
    *,
    task_vector: str | Path | None = None,
    finetuned_model: str | None = None,
    base_model: str | None = None,
    rank: int | None = None,
    max_rank: int | None = None,
    lora_path: str | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> DocumentResult:
    """Write a PEFT adapter that makes the change of a task vector.

    Args:
        output_dir: absent, empty, or an earlier output, which is replaced.
        task_vector: a file or its directory; or
        finetuned_model: a model, which needs base_model. Exactly one of the two.
        base_model: the base: its weights tell rounding noise from signal, its configuration what
            the modules are, and norms and biases are stored as their new values.
        rank: of every module; None for what stands above the rounding noise,
        max_rank: and no more than this.
        lora_path: the adapter that was merged, to compare with; needs base_model.
        device: where the arithmetic runs.
        revision: of a base on the hub.

    Raises:
        UserError: an input is unusable, or nothing stands above the noise.
    """
    from contextlib import ExitStack

    from taskvec.adapter import open_adapter
    from taskvec.adapters.files import CONFIG_FILE, WEIGHTS_FILE
    from taskvec.checkpoint import locate_adapter
    from taskvec.lowrank.convert import convert, summarise
    from taskvec.output import output_directory, write_json
    from taskvec.subject import open_subject

    if rank is not None and max_rank is not None:
        raise cli.UserError("--max_rank bounds --rank auto; with a number it has no meaning")
    written = [CONFIG_FILE, WEIGHTS_FILE, LORA_RESULT]
    with ExitStack() as stack:
        subject = stack.enter_context(
            open_subject(
                task_vector,
                finetuned_model=finetuned_model,
                base_model=base_model,
                revision=revision,
            )
        )
        inputs, truth = subject.paths, None
        if lora_path is not None:
            if subject.base is None:
                raise cli.UserError("--lora_path needs --base_model, which the adapter is bound to")
            truth = stack.enter_context(open_adapter(lora_path, subject.base))
            inputs = [*inputs, locate_adapter(lora_path)]
        partial = stack.enter_context(output_directory(Path(output_dir), written, inputs))
        total = sum(info.nbytes for info in subject.tensors.values())
        bar = stack.enter_context(cli.progress(total, "Factorising"))
        files, layout, entries = convert(
            subject, base_model, rank, max_rank, truth, cli.pick_device(device), bar
        )
        content = {
            "inputs": {"source": subject.vector.source, "base_model": base_model},
            "rank": "auto" if rank is None else rank,
            "max_rank": max_rank,
            "modules_known": layout.known,
            "tied_embedding": layout.tied,
            "summary": {**summarise(entries), "adapter_bytes": files.write(partial)},
            "parameters": entries,
        }
        write_json(partial / LORA_RESULT, content)
    return DocumentResult(Path(output_dir), content)


# -- what is printed -----------------------------------------------------------


def _body(args: argparse.Namespace) -> int:
    if args.command == "show":
        return _show(args)
    if args.command == "apply":
        return _apply(args)
    if args.command == "to_lora":
        return _to_lora(args)
    paths = [args.C, args.B, args.A] if args.command == "analogy" else args.task_vectors
    made = combine(paths, combination(args, len(paths)), args.output_dir, device=args.device)
    cli.result(f"📁 Task vector saved to: {made.output_dir}/")
    cli.result(
        f"📊 {made.nonzero_parameters} of {made.total_parameters} parameters are not zero, "
        f"norm {made.norm:.4g}"
    )
    return cli.EXIT_OK


def _show(args: argparse.Namespace) -> int:
    from taskvec.arithmetic.text import layer_lines, overview_lines

    found = show(args.task_vectors, args.output_dir, ranks=args.ranks, device=args.device)
    cli.result("🔬 TASK VECTORS:")
    for line in overview_lines(found.document):
        cli.result(f"   {line}".rstrip())
    for line in layer_lines(found.document):
        cli.detail(f"   {line}".rstrip())
    cli.result()
    cli.result(f"📁 Saved to: {found.output_dir}/")
    return cli.EXIT_OK


def _apply(args: argparse.Namespace) -> int:
    from taskvec.arithmetic.text import round_trip_lines

    made = apply(
        args.base_model,
        args.task_vector,
        args.output_dir,
        scales=args.scale,
        precision=args.precision,
        finetuned_model=args.finetuned_model,
        device=args.device,
        revision=args.revision,
        max_shard_size=args.max_shard_size,
    )
    if made.round_trip is not None:
        for line in round_trip_lines(made.round_trip):
            cli.result(f"🔬 {line}")
    for scale, directory in made.models.items():
        cli.result(f"📁 Base + {scale:g} · task vector saved to: {directory}/")
    return cli.EXIT_OK if made.holds else cli.EXIT_DOES_NOT_HOLD


def _to_lora(args: argparse.Namespace) -> int:
    from taskvec.arithmetic.text import factor_lines, lora_lines, lora_notices

    path = args.task_vector
    if path is None and args.finetuned_model is None:
        path = DEFAULT_TASK_VECTOR
    found = to_lora(
        args.output_dir,
        task_vector=path,
        finetuned_model=args.finetuned_model,
        base_model=args.base_model,
        rank=args.rank,
        max_rank=args.max_rank,
        lora_path=args.lora_path,
        device=args.device,
        revision=args.revision,
    )
    for notice in lora_notices(found.document):
        cli.notice(notice)
    cli.result(f"🔬 LOW-RANK ADAPTER of {found.document['inputs']['source']}:")
    for line in lora_lines(found.document):
        cli.result(f"   {line}")
    cli.detail()
    for line in factor_lines(found.document):
        cli.detail(f"   {line}")
    cli.detail()
    cli.result(f"📁 Adapter saved to: {found.output_dir}/")
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
