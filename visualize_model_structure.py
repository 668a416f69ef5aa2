#!/usr/bin/env python3
"""Draw a model's architecture from its checkpoint: which tensors there are, and which LoRA changes.

    python visualize_model_structure.py --base_model examples/starcoder2-mini \\
        --lora_path examples/starcoder2-mini-lora

Only the headers of the safetensors files are read, so a model of any size takes seconds. Prints how
the count of parameters comes about (30 layers x 16 parameters + 3 global = 483) and writes
model_structure.png, model_structure.svg and model_structure.json (every tensor by name).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec import cli

if TYPE_CHECKING:  # torch is loaded only when there is work to do: --help stays fast
    from taskvec.adapter import Adapter
    from taskvec.checkpoint import Checkpoint

RESULT = "model_structure.json"
FIGURES = ("model_structure.png", "model_structure.svg")


@dataclass(frozen=True)
class StructureResult:
    """What was found.

    Attributes:
        output_dir: where the files are.
        document: the content of model_structure.json (`taskvec.structure.describe`).
    """

    output_dir: Path
    document: dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__, device=False)
    cli.add_base_model(parser)
    cli.add_lora_path(parser, default=None)
    cli.add_output_dir(parser, "model_structure/")
    return parser


def visualize(
    base_model: str,
    output_dir: str | Path,
    *,
    lora_path: str | Sequence[str] | None = None,
    revision: str | None = None,
) -> StructureResult:
    """Describe and draw a model's structure from the headers of its files.

    Args:
        base_model: directory, .safetensors file or hub id.
        output_dir: absent, empty, or an earlier output, which is replaced.
        lora_path: an adapter of that model, to mark what it changes.
        revision: of a base on the hub.

    Raises:
        UserError: an input is unusable, or the adapter does not fit the base.
    """
    from taskvec.output import output_directory, write_json

    document, inputs = _read(base_model, lora_path, revision)
    with output_directory(Path(output_dir), [RESULT, *FIGURES], inputs) as partial:
        write_json(partial / RESULT, document)
        _draw(document, partial)
    return StructureResult(Path(output_dir), document)


def describe(
    base_model: str, *, lora_path: str | Sequence[str] | None = None, revision: str | None = None
) -> dict[str, Any]:
    """What `visualize` draws, without drawing it: the content of model_structure.json."""
    return _read(base_model, lora_path, revision)[0]


def _read(
    base_model: str, lora_path: str | Sequence[str] | None, revision: str | None
) -> tuple[dict[str, Any], list[Path]]:
    """The document, and the paths that it was read from."""
    from taskvec.adapter import open_adapter
    from taskvec.checkpoint import open_checkpoint

    with ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(base_model, revision))
        adapter = stack.enter_context(open_adapter(lora_path, base)) if lora_path else None
        inputs = [*base.paths, *(adapter.paths if adapter else [])]
        return _document(base, adapter, lora_path), inputs


def _document(
    base: Checkpoint, adapter: Adapter | None, lora_path: str | Sequence[str] | None
) -> dict[str, Any]:
    from taskvec import structure
    from taskvec.figures import captions

    found = structure.describe(base.tensors, adapter.scalings if adapter else ())
    elements = found["totals"]["elements"]
    stored = adapter.stored_elements if adapter else 0
    return {
        "base": base.identity(),
        "architecture": _architecture(base),
        "adapter": {
            "source": cli.adapters(lora_path or ""),
            "stored_elements": stored,
            "stored_bytes": adapter.stored_bytes,
            "stored_share": stored / elements if elements else 0.0,
        }
        if adapter
        else None,
        **found,
        "figures": captions.captioned(captions.MODEL),
    }


def _architecture(base: Checkpoint) -> str | None:
    """The class or model type that config.json names, if there is one."""
    config = base.config()
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None


def _draw(document: dict[str, Any], directory: Path) -> None:
    from taskvec.figures.architecture import model_structure

    cli.notice("Drawing the figure ...")
    model_structure(document, [directory / name for name in FIGURES])


def print_result(result: StructureResult) -> None:
    """The breakdown: per stack of layers and outside of them, then by block, then the totals."""
    from taskvec.figures.captions import caption_lines
    from taskvec.wording import percent, size

    document = result.document
    totals, adapter = document["totals"], document["adapter"]
    cli.result(f"🏗️ {document['base']['source']} ({document['architecture'] or 'no config.json'})")
    cli.result(f"   {document['formula']}")
    for title, rows, layers in _sections(document):
        cli.detail()
        cli.detail(title)
        _print_table(*_rows_table(rows, layers, marks=adapter is not None))
    cli.detail()
    _print_table(*_blocks_table(document))
    cli.detail()
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in totals["dtypes"].items())
    cli.result(
        f"📊 {totals['tensors']} tensors ({dtypes}), {totals['elements']:,} elements, "
        f"{size(totals['nbytes'])}"
    )
    if adapter:
        cli.result(
            f"🎯 The adapter changes {totals['touched_tensors']} of {totals['tensors']} tensors "
            f"({percent(totals['touched_tensor_share'])}) and {totals['touched_elements']:,} "
            f"elements ({percent(totals['touched_element_share'])})"
        )
        cli.result(
            f"💾 It stores {adapter['stored_elements']:,} parameters "
            f"({percent(adapter['stored_share'])}), {size(adapter['stored_bytes'])}"
        )
    for line in caption_lines(result.document["figures"]):
        cli.detail(line)
    cli.result(f"📁 Drawn in: {result.output_dir}/ ({', '.join((*FIGURES, RESULT))})")


def _sections(document: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]], list[int]]]:
    """Heading, rows and layers of each stack, and of what stands outside of the layers."""
    from taskvec.architecture import fold_numbers
    from taskvec.structure import sizes_text

    for stack in document["stacks"]:
        heading = (
            f"{stack['name'] or '(unnamed)'}, layers {fold_numbers(stack['layers'])}: "
            f"{sizes_text(stack['sizes'])} parameters"
        )
        yield heading, stack["rows"], stack["layers"]
    if document["global"]:
        yield "outside of layers:", document["global"], []


def _rows_table(
    rows: list[dict[str, Any]], layers: list[int], *, marks: bool
) -> tuple[list[str], list[list[str]]]:
    """Header and a line per row, with its layers where not all of the stack's have it."""
    from taskvec.architecture import fold_numbers
    from taskvec.structure import shape_text

    lines = []
    for row in rows:
        where = "" if row["layers"] == layers else f" (layers {fold_numbers(row['layers'])})"
        line = [row["name"] + where, shape_text(row["shapes"]), str(row["tensors"])]
        line.append(f"{row['elements']:,}")
        if marks:
            line.append(f"● {row['touched_tensors']}" if row["touched_tensors"] else "-")
        lines.append(line)
    return ["parameter", "shape", "tensors", "elements", *(["changed"] if marks else [])], lines


def _blocks_table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    from taskvec.wording import percent

    total = document["totals"]["elements"] or 1
    return ["block", "tensors", "elements", "share"], [
        [block, str(entry["tensors"]), f"{entry['elements']:,}", percent(entry["elements"] / total)]
        for block, entry in document["blocks"].items()
    ]


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    from taskvec.wording import table

    for line in table(header, rows):
        cli.detail(f"   {line}")


def _body(args: argparse.Namespace) -> int:
    result = visualize(
        args.base_model,
        args.output_dir,
        lora_path=cli.lora_path(args) or None,
        revision=args.revision,
    )
    print_result(result)
    return cli.EXIT_OK


def main(argv: list[str] | None = None) -> int:
    return cli.run(build_parser, _body, argv)


if __name__ == "__main__":
    sys.exit(main())
