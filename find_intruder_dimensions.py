#!/usr/bin/env python3
"""Intruder dimensions: leading directions of a fine-tuned model that its base does not have.

    python find_intruder_dimensions.py --base_model BASE --lora_path ADAPTER

    python find_intruder_dimensions.py --base_model BASE --lora_path r1=A r64=B \\
        --finetuned_model full=MODEL --top_k 10 --epsilon 0.5 0.6

A left singular vector of a tuned weight, among its first k, is an intruder where its absolute
cosine with every left singular vector of the base's weight is below epsilon (arXiv 2410.21228,
Definition 3.1 and Algorithm 1). Writes intruder_dimensions.json, .csv and four figures; with
--scale_intruders also the model with its intruders scaled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli
from taskvec.flag_values import real, whole

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    import torch

    from taskvec.checkpoint import Checkpoint
    from taskvec.intruders.analysis import MatrixFindings, Settings
    from taskvec.intruders.basesvd import SvdCache
    from taskvec.intruders.tuned import Tuned

RESULT, TABLE = "intruder_dimensions.json", "intruder_dimensions.csv"
TOP_FIGURE, WIDE_FIGURE = "similarity_matrices.png", "similarity_diagonal.png"
PLACES_FIGURE, COUNTS_FIGURE = "intruders_by_layer.png", "intruder_counts.png"
FIGURES = (TOP_FIGURE, WIDE_FIGURE, PLACES_FIGURE, COUNTS_FIGURE)

TOP_K, EPSILON, LEADING = 10, 0.5, 40


@dataclass(frozen=True)
class IntruderResult:
    """What was found.

    Attributes:
        output_dir: where the files are.
        document: the content of intruder_dimensions.json.
        scaled_model_dir: the model with scaled intruders, where one was asked for.
    """

    output_dir: Path
    document: dict[str, Any]
    scaled_model_dir: Path | None = None

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = self.document["summary"]
        return summary


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    cli.add_base_model(parser)
    parser.add_argument(
        "--lora_path",
        nargs="+",
        action="extend",
        metavar="[LABEL=]ADAPTER",
        help="directories or hub ids of PEFT adapters",
    )
    parser.add_argument(
        "--finetuned_model",
        nargs="+",
        action="extend",
        metavar="[LABEL=]MODEL",
        help="models that were fine-tuned from the base; both flags may be repeated",
    )
    parser.add_argument(
        "--modules",
        nargs="+",
        metavar="NAME",
        help="only these linear layers, such as q_proj v_proj (default: all that changed)",
    )
    parser.add_argument(
        "--top_k",
        type=whole(1),
        default=TOP_K,
        metavar="K",
        help=f"how many leading vectors of each matrix are tested (default: {TOP_K})",
    )
    parser.add_argument(
        "--epsilon",
        nargs="+",
        type=_share,
        default=[EPSILON],
        metavar="E",
        help=f"similarity below which a vector is an intruder (default: {EPSILON}); the first of "
        "several is the one that figures and the last line are about",
    )
    parser.add_argument(
        "--leading",
        type=whole(1),
        default=LEADING,
        metavar="L",
        help=f"how many leading vectors the figures look at (default: {LEADING})",
    )
    cli.add_output_dir(parser, "intruder_dimensions/")
    parser.add_argument(
        "--cache_dir",
        metavar="DIR",
        help="where the base's SVDs are kept, safe to delete (default: ~/.cache/taskvec/svd); none "
        "keeps none",
    )
    parser.add_argument(
        "--scale_intruders",
        type=real,
        metavar="LAMBDA",
        help="also write the one version given with its intruders scaled: 0 takes them out",
    )
    parser.add_argument(
        "--scaled_model_dir",
        default="scaled_model/",
        metavar="DIR",
        help="where that model goes (default: scaled_model/)",
    )
    cli.add_precision(parser, "that model")
    return parser


def find_intruders(
    base_model: str,
    output_dir: str | Path,
    *,
    lora_paths: Sequence[str] = (),
    finetuned_models: Sequence[str] = (),
    modules: Sequence[str] | None = None,
    top_k: int = TOP_K,
    epsilons: Sequence[float] = (EPSILON,),
    leading: int = LEADING,
    cache_dir: str | Path | None = None,
    device: str = "auto",
    revision: str | None = None,
    scale_intruders: float | None = None,
    scaled_model_dir: str | Path = "scaled_model/",
    precision: str = "fp32",
) -> IntruderResult:
    """Compare the singular vectors of fine-tuned matrices with those of their base.

    Args:
        base_model: directory, .safetensors file or hub id.
        output_dir: absent, empty, or an earlier output, which is replaced.
        lora_paths, finetuned_models: adapters and models, each a path or LABEL=PATH; at least one.
        modules: the ends of the linear layers' names; all that changed if None.
        top_k: how many leading vectors are tested.
        epsilons: thresholds; the first is the one that is reported first.
        leading: how many vectors the figures look at; at least top_k are.
        cache_dir: of the base's SVDs; None the default one, "none" none.
        device: where the arithmetic runs.
        revision: of a base on the hub.
        scale_intruders: lambda, for W_tuned + (lambda - 1) sum of u sigma v^T over the intruders.
        scaled_model_dir, precision: where and in which format that model is written.

    Raises:
        UserError: an input is unusable, or the versions do not fit the base.
    """
    from taskvec.checkpoint import open_checkpoint
    from taskvec.intruders.analysis import Settings
    from taskvec.intruders.basesvd import SvdCache, default_cache_dir
    from taskvec.intruders.tuned import open_tuned
    from taskvec.output import output_directory, refuse_on_input

    if not lora_paths and not finetuned_models:
        raise cli.UserError("give what was fine-tuned: --lora_path or --finetuned_model")
    if scale_intruders is not None and len(lora_paths) + len(finetuned_models) > 1:
        raise cli.UserError("--scale_intruders writes one model: give one version of the base")
    settings = Settings(top_k, tuple(epsilons), max(leading, top_k))
    none = str(cache_dir) == "none"
    cache = SvdCache(None if none else Path(cache_dir or default_cache_dir()))
    with (
        open_checkpoint(base_model, revision) as base,
        open_tuned(base, lora_paths, finetuned_models) as tuned,
    ):
        base.refuse_quantised()
        paths = [*base.paths, *(path for one in tuned for path in one.paths)]
        if cache.directory is not None:
            refuse_on_input(cache.directory, paths, "--cache_dir", around=False)
        if scale_intruders is not None:
            refuse_on_input(Path(scaled_model_dir), paths, "--scaled_model_dir")
        with output_directory(Path(output_dir), [RESULT, TABLE, *FIGURES], paths) as partial:
            torch_device = cli.pick_device(device)
            found = _analyze(base, tuned, modules, settings, cache, torch_device)
            content = _write(partial, base, tuned, settings, found)
        if scale_intruders is None:
            return IntruderResult(Path(output_dir), content)
        scaled = Path(scaled_model_dir)
        _write_scaled(tuned[0], found, scale_intruders, scaled, precision, torch_device)
    return IntruderResult(Path(output_dir), content, scaled)


def _analyze(
    base: Checkpoint,
    tuned: Sequence[Tuned],
    modules: Sequence[str] | None,
    settings: Settings,
    cache: SvdCache,
    device: torch.device,
) -> list[MatrixFindings]:
    from taskvec.intruders.analysis import analyze_matrices
    from taskvec.intruders.basesvd import svd_bytes
    from taskvec.intruders.tuned import linear_weights
    from taskvec.wording import size

    names = [
        name for name in linear_weights(base, modules) if any(one.changes(name) for one in tuned)
    ]
    _say_what_is_left_out(base, tuned)
    if not names:
        raise cli.UserError("no version changes any of these linear layers; check --modules")
    shapes = [base.tensors[name].shape for name in names]
    nbytes = sum(svd_bytes((rows, columns)) for rows, columns in shapes)
    cache.refuse_if_full(nbytes)
    if cache.directory is not None:
        cli.notice(
            f"The base's SVDs are kept in {cache.directory} (up to {size(nbytes)}; safe to delete, "
            "--cache_dir none keeps none)."
        )
    found = []
    with cli.progress(len(names), "Comparing matrices", unit="matrix") as bar:
        for one in analyze_matrices(base, tuned, names, settings, cache, device):
            if one is not None:
                found.append(one)
            bar.update()
    if not found:
        raise cli.UserError(f"no linear layer differs from {base.source}'s")
    return found


def _say_what_is_left_out(base: Checkpoint, tuned: Sequence[Tuned]) -> None:
    """An adapter may also change what has no singular vectors to compare, or is no linear layer."""
    from taskvec.intruders.tuned import linear_weights
    from taskvec.wording import listed

    linear = set(linear_weights(base, None))
    for one in tuned:
        others = [name for name in one.parameters if name not in linear]
        if one.kind == "lora" and others:
            cli.notice(f"{one.label} also changes {listed(others)}: no linear layer, left out.")


def _write(
    directory: Path,
    base: Checkpoint,
    tuned: Sequence[Tuned],
    settings: Settings,
    found: Sequence[MatrixFindings],
) -> dict[str, Any]:
    from taskvec.figures import intruders as figures
    from taskvec.intruders import report
    from taskvec.output import write_json
    from taskvec.tables import write_csv

    inputs = {"base": base.source, **{one.label: one.source for one in tuned}}
    content = report.document(inputs, settings, tuned, found)
    write_json(directory / RESULT, content)
    write_csv(directory / TABLE, report.COLUMNS, report.rows(content))
    figures.similarity(content, settings.top_k, directory / TOP_FIGURE)
    figures.similarity(content, settings.leading, directory / WIDE_FIGURE)
    figures.places(content, directory / PLACES_FIGURE)
    figures.counts(content, directory / COUNTS_FIGURE)
    return content


def _write_scaled(
    one: Tuned,
    found: Sequence[MatrixFindings],
    factor: float,
    target: Path,
    precision: str,
    device: torch.device,
) -> None:
    from taskvec.intruders.scaled import write_scaled_model

    intruders = {
        matrix.name: (triplets, bool(matrix.base["stored_transposed"]))
        for matrix in found
        if (triplets := matrix.versions[one.label].intruders) is not None
    }
    write_scaled_model(one, intruders, factor, target, precision, device)


def print_result(result: IntruderResult) -> None:
    """A table of the versions, what tall matrices leave open, and the last line for each."""
    from taskvec.wording import table

    content, summary = result.document, result.summary
    epsilons, top_k = content["settings"]["epsilons"], content["settings"]["top_k"]
    header = ("version", "matrices", "vectors", *(f"ε = {e:g}" for e in epsilons), "mean max |cos|")
    lines = [
        (
            label,
            str(version["changed_matrices"]),
            str(version["tested_vectors"]),
            *(str(number) for number in version["intruders"].values()),
            f"{version['mean_max_similarity'] or 1.0:.3f}",
        )
        for label, version in summary["versions"].items()
    ]
    for line in table(header, lines):
        cli.detail(f"   {line}")
    tall = summary["matrices_with_outputs_without_base"]
    if tall:
        outside = sum(version["intruders_outside"] for version in summary["versions"].values())
        cli.detail(
            f"   In {tall} of {summary['matrices']} matrices the base reaches only part of the "
            f"outputs; {outside} of the intruders lie mostly in the rest, where the base has no "
            "direction to compare with (`outside` in the files)."
        )
    cli.detail(f"📁 Saved to: {result.output_dir}/")
    if result.scaled_model_dir is not None:
        cli.result(f"📁 Model with scaled intruders saved to: {result.scaled_model_dir}/")
    for label, version in summary["versions"].items():
        name = f"{label}: " if len(summary["versions"]) > 1 else ""
        first = next(iter(version["intruders"].values()))
        matrices = summary["matrices"]
        cli.result(
            f"🔎 {name}{first} intruder dimension{'' if first == 1 else 's'} in "
            f"{matrices} matri{'x' if matrices == 1 else 'ces'} (top {top_k}, ε = {epsilons[0]:g})"
        )


def _share(text: str) -> float:
    value = real(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a cosine between 0 and 1 is needed")
    return value


def _body(args: argparse.Namespace) -> int:
    result = find_intruders(
        args.base_model,
        args.output_dir,
        lora_paths=args.lora_path or (),
        finetuned_models=args.finetuned_model or (),
        modules=args.modules,
        top_k=args.top_k,
        epsilons=args.epsilon,
        leading=args.leading,
        cache_dir=args.cache_dir,
        device=args.device,
        revision=args.revision,
        scale_intruders=args.scale_intruders,
        scaled_model_dir=args.scaled_model_dir,
        precision=args.precision,
    )
    print_result(result)
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
