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
import contextlib
import difflib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn
from unicodedata import category

from taskvec import processes

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


def add_base_model(parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_BASE) -> None:
    """The flags that name a base model: ``--base_model`` and ``--revision``."""
    shown = f" (default: {default})" if default else ""
    parser.add_argument(
        "--base_model",
        default=default,
        metavar="MODEL",
        help=f"directory, .safetensors file or hub id{shown}",
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
        command = [argv.pop(0)] if has_commands else []
        described = _commands(parser).choices[command[0]] if command else parser
        flags = _config_as_flags(described, Path(args.config), args)
        # A list of values ends where the next flag begins, not at a word of the command line.
        args = parser.parse_args([*command, *flags, f"--config={args.config}", *argv])
    _quiet = args.quiet
    return args


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
        _import_torch()
        if shared:
            processes.join()
            if processes.started_one_of_several():
                notice(
                    "The launcher started one process, which does all the work. Without several "
                    "GPUs, accelerate launch starts more with --multi_gpu."
                )
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


def _import_torch() -> None:
    """Which every script needs: a tenth faster without the collector, which would find nothing."""
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        with _not_losing_an_interrupt():
            import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _not_losing_an_interrupt() -> Iterator[None]:
    """Ctrl-C ends the block, also where C code in it drops the exception or makes another of it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored, as a shell does for what runs in its background, or somebody else's
        return
    interrupted = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception:
        if not interrupted:
            raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt


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


def _config_as_flags(
    parser: argparse.ArgumentParser, path: Path, given: argparse.Namespace
) -> list[str]:
    """A YAML mapping as command-line words, so that argparse checks types and choices alike.

    A flag that collects its values would join the file's with those ``given`` on the command line,
    which win: the file's are left out.
    """
    from taskvec.configfile import read_flags

    flags = {
        option.lstrip("-"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config")
    }
    words: list[str] = []
    for key, value in read_flags(path).items():
        if key not in flags:
            near = difflib.get_close_matches(str(key), flags, n=1, cutoff=0.0)
            raise UserError(f"{path}: unknown key {key!r}; did you mean {near[0]!r}?")
        collects = isinstance(flags[key], argparse._ExtendAction)
        if collects and getattr(given, flags[key].dest):
            continue
        try:
            words += _as_flag(path, key, value, flags[key])
        except ValueError:  # a number of more digits than Python prints
            raise UserError(f"{path}: {key}: a number that is too long") from None
    return words


def _as_flag(path: Path, key: str, value: object, action: argparse.Action) -> list[str]:
    if value is None:
        return []
    if action.nargs == 0:  # a switch: --key, --no-key
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} is true or false, not {value!r}")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [f"--{key}" if value else f"--no-{key}"]
        return [f"--{key}"] if value else []
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [f"--{key}", *(_scalar(path, key, item) for item in value)]
    return [f"--{key}={_scalar(path, key, value)}"]


def _scalar(path: Path, key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{path}: {key} takes a single value, not {value!r}")
    return str(value)
