"""The command line of analyze_task_vectors.py: its commands and their flags."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from taskvec import cli
from taskvec.flag_values import whole

if TYPE_CHECKING:
    from taskvec.arithmetic.combine import Combination

DEFAULT_TASK_VECTOR = "task_vectors_fp32/"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Every command, on a parser of `cli.new_command_parser`."""
    _add_show(parser)
    _add_apply(parser)
    _add_sums(parser)
    _add_sign_aware(parser)
    _add_to_lora(parser)


def _add_show(parser: argparse.ArgumentParser) -> None:
    show = cli.add_command(parser, "show", "norms, sparsity, ranks and cosines, layer by layer")
    _add_task_vectors(show, "+")
    cli.add_output_dir(show, "task_vector_overview/")
    show.add_argument(
        "--ranks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute stable and effective ranks, which takes longest (default: on)",
    )


def _add_apply(parser: argparse.ArgumentParser) -> None:
    apply = cli.add_command(
        parser, "apply", "add a task vector to a base, as often as there are scales, in one read"
    )
    cli.add_base_model(apply)
    _add_task_vector(apply)
    apply.add_argument(
        "--scale",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="L",
        help="base + L * task vector; several make a directory scale_L of each (default: 1)",
    )
    cli.add_precision(apply, "the models")
    apply.add_argument(
        "--finetuned_model",
        metavar="MODEL",
        help="the model that the task vector was extracted from: check that scale 1 gives it back",
    )
    cli.add_output_dir(apply, "applied_model/")
    cli.add_max_shard_size(apply)


def _add_sums(parser: argparse.ArgumentParser) -> None:
    add = cli.add_command(parser, "add", "the sum of task vectors, weighted if wanted")
    _add_task_vectors(add, "+")
    _add_weights(add)
    negate = cli.add_command(parser, "negate", "the opposite of a task vector, to unlearn it")
    _add_task_vectors(negate, 1)
    scale = cli.add_command(parser, "scale", "a multiple of a task vector")
    _add_task_vectors(scale, 1)
    scale.add_argument("--factor", type=float, default=1.0, metavar="L", help="(default: 1)")
    analogy = cli.add_command(parser, "analogy", "C + (B - A): A is to B as C is to the result")
    for name in ("C", "B", "A"):
        analogy.add_argument(name, metavar=name, help="a task vector file or its directory")
    for command in (add, negate, scale, analogy):
        cli.add_output_dir(command, "combined_task_vector/")


def _add_sign_aware(parser: argparse.ArgumentParser) -> None:
    summaries = {
        "ties": "keep the largest elements of each, elect signs, average what agrees",
        "dare_linear": "drop elements at random, rescale the others, add up",
        "dare_ties": "drop elements at random, rescale, elect signs, average what agrees",
    }
    for name, summary in summaries.items():
        command = cli.add_command(parser, name, summary)
        _add_task_vectors(command, "+")
        _add_weights(command)
        command.add_argument(
            "--density",
            type=float,
            default=0.2 if name == "ties" else 0.5,
            metavar="SHARE",
            help="share of the elements of every tensor that is kept (default: %(default)s)",
        )
        if name != "ties":
            command.add_argument(
                "--seed", type=int, default=0, help="of the random choice (default: 0)"
            )
        if name != "dare_linear":
            command.add_argument(
                "--sign_method",
                choices=["total", "frequency"],
                default="total",
                help="elect a sign by the sum of the elements, or by counting signs",
            )
            command.add_argument(
                "--definition",
                choices=["peft", "mergekit"],
                default="peft",
                help="what weights do: peft weights after the election and divides by the number "
                "that agree; mergekit elects among weighted elements and divides by the sum of "
                "their weights (ties) or not at all (dare_ties)",
            )
        cli.add_output_dir(command, "combined_task_vector/")


def _add_to_lora(parser: argparse.ArgumentParser) -> None:
    to_lora = cli.add_command(parser, "to_lora", "a PEFT LoRA adapter that makes the same change")
    _add_task_vector(to_lora, default=None)
    to_lora.add_argument(
        "--finetuned_model",
        metavar="MODEL",
        help="a model to subtract --base_model from, instead of a task vector",
    )
    cli.add_base_model(to_lora, default=None)
    to_lora.add_argument(
        "--lora_path",
        metavar="ADAPTER",
        help="the adapter that was merged: say how well it is recovered; needs --base_model",
    )
    to_lora.add_argument(
        "--rank",
        type=_rank,
        default=None,
        metavar="{auto,N}",
        help="of every module; auto: what stands above the rounding noise (default: auto)",
    )
    to_lora.add_argument(
        "--max_rank", type=whole(1), metavar="N", help="the most that auto may choose"
    )
    cli.add_output_dir(to_lora, "extracted_lora/")


def _add_task_vectors(command: argparse.ArgumentParser, count: str | int) -> None:
    command.add_argument(
        "task_vectors",
        nargs=count,
        metavar="TASK_VECTOR",
        help="a task vector file or its directory",
    )


def _add_task_vector(
    command: argparse.ArgumentParser, default: str | None = DEFAULT_TASK_VECTOR
) -> None:
    command.add_argument(
        "--task_vector",
        default=default,
        metavar="PATH",
        help=f"a task vector file or its directory (default: {DEFAULT_TASK_VECTOR})",
    )


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one for each (default: 1)"
    )


def combination(args: argparse.Namespace, count: int) -> Combination:
    """What the command and its flags ask for."""
    from taskvec.arithmetic.combine import Combination

    weights = {"negate": (-1.0,), "analogy": (1.0, 1.0, -1.0)}.get(args.command)
    if weights is None and args.command == "scale":
        weights = (args.factor,)
    elif weights is None:
        weights = tuple(args.weights or [1.0] * count)
    if len(weights) != count:
        raise cli.UserError(f"--weights: {len(weights)} given for {count} task vectors")
    sign_aware = args.command in ("ties", "dare_linear", "dare_ties")
    return Combination(
        args.command if sign_aware else "linear",
        weights,
        density=getattr(args, "density", None),
        seed=getattr(args, "seed", None),
        sign_method=getattr(args, "sign_method", None),
        definition=getattr(args, "definition", "peft"),
    )


def _rank(text: str) -> int | None:
    return None if text == "auto" else whole(1)(text)
