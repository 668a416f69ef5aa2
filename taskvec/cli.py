"""What every script's command line has in common. Knows nothing of tensors.

A script is ``build_parser()``, one public function that does the work, and

    def main(argv: list[str] | None = None) -> int:
        return cli.run(build_parser, body, argv)

where ``body(args)`` returns the exit status: 0 done (and, for a check, it holds),
1 the check was made and does not hold. `UserError` becomes one line and status 2. The parser is
handed over unbuilt, so that Ctrl-C while it is built ends like any other.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unicodedata import category

from taskvec import processes
from taskvec.loading import import_torch

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

EXIT_OK, EXIT_DOES_NOT_HOLD, EXIT_BAD_INPUT = 0, 1, 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell has it

DEFAULT_BASE = "bigcode/starcoder2-3b"
DEFAULT_LORA = "checkpoint-40000/"

_LONGEST_MESSAGE = 1000  # characters of an error: a name in a file may have millions

_quiet = False


class UserError(Exception):
    """Bad usage or bad input: one line that names what is wrong, where, and what to do."""


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors raised as `UserError` instead of printed with the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def new_parser(doc: str | None, *, device: bool = True) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the flags that every script has."""
    parser = _Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_common(parser, device)
    return parser


def new_command_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser for a script with subcommands, which `add_command` adds."""
    parser = _Parser(
        description=doc,
        epilog="Every command takes --device, --config FILE.yml and --quiet; "
        "`COMMAND --help` lists its flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    return parser


def add_command(
    parser: argparse.ArgumentParser, name: str, summary: str, *, device: bool = True
) -> argparse.ArgumentParser:
    """A subcommand's own parser, with the flags that every script has.

    Args:
        parser: of `new_command_parser`.
        summary: one sentence without a full stop; the command's line in the script's help.
        device: whether it takes ``--device``.
    """
    command: argparse.ArgumentParser = _commands(parser).add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_common(command, device)
    return command


def _commands(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[Any]:
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def _add_common(parser: argparse.ArgumentParser, device: bool) -> None:
    common = parser.add_argument_group("every script")
    if device:
        common.add_argument(
            "--device",
            default="auto",
            metavar="DEVICE",
            help="cuda:0, cpu, ... (auto: cuda:0 where PyTorch sees a GPU, else cpu)",
        )
    common.add_argument("--config", metavar="FILE.yml", help="values for any of these flags")
    common.add_argument("--quiet", action="store_true", help="print only the result lines")


def add_base_model(
    parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_BASE, help: str = ""
) -> None:
    """The flags that name a base model: ``--base_model`` and ``--revision``.

    Args:
        help: instead of what is said of a base, and of its default, elsewhere.
    """
    shown = f" (default: {default})" if default else ""
    parser.add_argument(
        "--base_model",
        default=default,
        metavar="MODEL",
        help=help or f"directory, .safetensors file or hub id{shown}",
    )
    parser.add_argument("--revision", metavar="REV", help="the base's revision on the hub")


def add_lora_path(
    parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_LORA, several: bool = True
) -> None:
    """``--lora_path``, of one PEFT adapter or several, and ``--adapter_name``."""
    shown = f" (default: {default})" if default else ""
    more = "; several are merged in turn" if several else ""
    parser.add_argument(
        "--lora_path",
        nargs="+" if several else None,
        default=default,
        metavar="ADAPTER",
        help=f"directory or hub id{more}{shown}",
    )
    parser.add_argument(
        "--adapter_name",
        metavar="NAME",
        help="the folder in it, where PEFT saved the adapter under a name",
    )


def add_task_vector(parser: argparse.ArgumentParser, default: str) -> None:
    """The flags of an analysis of a task vector: ``--task_vector_path``, ``--finetuned_model``.

    Args:
        default: the task vector where neither is given, which is the script's to apply.
    """
    parser.add_argument(
        "--task_vector_path",
        metavar="PATH",
        help=f"a task vector file or its directory (default: {default})",
    )
    parser.add_argument(
        "--finetuned_model",
        metavar="MODEL",
        help="a model to subtract --base_model from, instead of a task vector",
    )


def add_output_dir(parser: argparse.ArgumentParser, default: str, what: str = "") -> None:
    """``--output_dir``; ``what`` says what goes there, where the script's help does not."""
    parser.add_argument(
        "--output_dir",
        default=default,
        metavar="DIR",
        help=f"{what} (default: {default})".lstrip(),
    )


def add_precision(parser: argparse.ArgumentParser, what: str, why: str = "") -> None:
    """``--precision``, the format of ``what`` is written; ``why`` remarks on the default."""
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help=f"format of {what} (default: fp32{why})",
    )


def add_max_shard_size(parser: argparse.ArgumentParser) -> None:
    """``--max_shard_size``, of a model that is written."""
    parser.add_argument(
        "--max_shard_size", metavar="SIZE", help="such as 5GB (default: the base's own shards)"
    )


def lora_path(args: argparse.Namespace) -> str | list[str]:
    """What `add_lora_path` was given: one adapter, a list of several, or "" for none."""
    given = [args.lora_path] if isinstance(args.lora_path, str) else args.lora_path
    if given is None:
        if args.adapter_name is not None:
            raise UserError("--adapter_name needs --lora_path, the directory or hub id that has it")
        return ""
    folder = f"/{args.adapter_name}" if args.adapter_name else ""
    found = [f"{path.rstrip('/')}{folder}" if folder else path for path in given]
    return found[0] if len(found) == 1 else found


def adapters(lora_path: str | Sequence[str]) -> str:
    """One or several adapters as a report names them."""
    return lora_path if isinstance(lora_path, str) else ", ".join(map(str, lora_path))


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """Parse ``argv``, with the values of ``--config`` placed before it so that a flag wins.

    Raises:
        UserError: a flag or a YAML value that the parser does not take.
    """
    global _quiet
    argv = list(sys.argv[1:] if argv is None else argv)
    has_commands = any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)
    if has_commands and argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        parser.error(f"unrecognized arguments: {' '.join(argv)}: the command comes first")
    args = parser.parse_args(argv)
    if args.config is not None:
        from taskvec.configfile import as_flags

        command = [argv.pop(0)] if has_commands else []
        described = _commands(parser).choices[command[0]] if command else parser
        flags = as_flags(described, Path(args.config), args)
        # A list of values ends where the next flag begins, not at a word of the command line.
        args = parser.parse_args([*command, *flags, f"--config={args.config}", *argv])
    _quiet = args.quiet
    if _quiet:
        _hush_libraries()
    return args


def _hush_libraries() -> None:
    """Remarks of matplotlib and transformers are no result lines either."""
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def run(
    build_parser: Callable[[], argparse.ArgumentParser],
    body: Callable[[argparse.Namespace], int],
    argv: list[str] | None = None,
    *,
    shared: bool = False,
) -> int:
    """Parse and do the work; a user's mistake or a failing disk is one line and status 2.

    Args:
        build_parser: makes the script's parser.
        body: does the work with the flags, and returns the exit status.
        argv: the command line without the script's name; sys.argv's if None.
        shared: the script's work can be shared by several processes, where a launcher has started
            them (`taskvec.processes`). The main one prints.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal without emoji shows '?' instead
                stream.reconfigure(errors="replace")
        args = parse_args(build_parser(), argv)
        import_torch()
        if not _has_work(shared=shared):
            return EXIT_OK
        return body(args)
    except UserError as error:
        return _fail(str(error))
    except processes.LostProcessError as error:
        return _fail(str(error), always=True)
    except BrokenPipeError:  # the reader of a pipe (`| head`) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except MemoryError:
        return _fail("not enough memory for these inputs")
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        if processes.is_main():
            print("interrupted; nothing was left half-written", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        processes.leave()


def _has_work(*, shared: bool) -> bool:
    """Whether this process has any, where a launcher has started several; says what they do."""
    if shared:
        processes.join()
        if processes.started_one_of_several():
            notice(
                "The launcher started one process, which does all the work. Without several "
                "GPUs, accelerate launch starts more with --multi_gpu (and without --cpu), or "
                "torchrun with --nproc_per_node."
            )
        return True
    count = processes.started()
    if count > 1 and processes.is_first():
        notice(
            f"A launcher started this {count} times. It is the work of one process, and the first "
            "does it."
        )
    return processes.is_first()


def notice(message: str) -> None:
    """A remark for the person watching: to stderr, silenced by ``--quiet``."""
    if not _quiet and processes.is_main():
        print(printable(message), file=sys.stderr, flush=True)


def result(message: str = "") -> None:
    """A result line: to stdout, always."""
    if processes.is_main():
        print(printable(message), flush=True)


def detail(message: str = "") -> None:
    """A line on stdout that ``--quiet`` leaves out."""
    if not _quiet and processes.is_main():
        print(printable(message), flush=True)


def progress(total: int, description: str, unit: str = "B") -> tqdm[Any]:
    """A progress bar on stderr (bytes per second and time left); none where nobody watches.

    Several threads may advance it. Of several processes the main one shows it, and takes the others
    to be as far as itself.
    """
    from tqdm import tqdm

    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[type-arg]
        monitor_interval = 0  # else a thread for each bar, which never ends

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                return super().update(n and n * processes.count())

    return Bar(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        leave=False,
        miniters=1,  # every update looks at the clock, as nobody else does
        dynamic_ncols=True,
        # None: off unless stderr is a terminal
        disable=None if not _quiet and processes.is_main() else True,
    )


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is the first GPU, else the CPU with a notice.

    Of several processes on a machine, ``auto`` gives each the next GPU.

    Raises:
        UserError: a device that PyTorch does not know or does not see.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False  # the certificate's bound is of fp32 products
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", processes.local_rank() % max(1, torch.cuda.device_count()))
        notice("No GPU visible to PyTorch: using the CPU.")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use cpu, cuda:0 or auto") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(
                f"--device {name}: PyTorch sees {count} GPU(s); use --device cpu or install a "
                "CUDA build of torch"
            )
    elif device.type != "cpu":
        raise UserError(f"--device {name}: only cpu and cuda devices are supported")
    return device


def _fail(message: str, *, always: bool = False) -> int:
    if not (always or processes.is_main()):
        return EXIT_BAD_INPUT
    one_line = printable(" ".join(message.split()))
    if len(one_line) > _LONGEST_MESSAGE:
        one_line = f"{one_line[: _LONGEST_MESSAGE // 2]} ... {one_line[-_LONGEST_MESSAGE // 2 :]}"
    print(f"{Path(sys.argv[0]).name}: error: {one_line}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


def printable(text: str) -> str:
    """Names come out of files that anybody may have made: no control codes to the terminal."""
    if text.isprintable():
        return text
    return "".join("?" if category(x)[0] == "C" and x != "\n" else x for x in text)
