"""What every script's command line has in common. Knows nothing of tensors.

A script is ``build_parser()``, one public function that does the work, and

    def main(argv: list[str] | None = None) -> int:
        return cli.run(build_parser(), body, argv)

where ``body(args)`` returns the exit status: 0 done (and, for a check, it holds),
1 the check was made and does not hold. `UserError` becomes one line and status 2.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

EXIT_OK, EXIT_DOES_NOT_HOLD, EXIT_BAD_INPUT = 0, 1, 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell has it

DEFAULT_BASE = "bigcode/starcoder2-3b"
DEFAULT_LORA = "checkpoint-40000/"

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
    return parser


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
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.config is not None:
        args = parser.parse_args([*_config_as_flags(parser, Path(args.config), args), *argv])
    _quiet = args.quiet
    return args


def run(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], int],
    argv: list[str] | None = None,
) -> int:
    """Parse and do the work; a user's mistake or a failing disk is one line and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without emoji shows '?', not a traceback
            stream.reconfigure(errors="replace")
    try:
        return body(parse_args(parser, argv))
    except UserError as error:
        return _fail(parser, str(error))
    except BrokenPipeError:  # the reader of a pipe (`| head`) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(parser, f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        return EXIT_INTERRUPTED


def notice(message: str) -> None:
    """A remark for the person watching: to stderr, silenced by ``--quiet``."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def result(message: str = "") -> None:
    """A result line: to stdout, always."""
    print(message, flush=True)


def detail(message: str = "") -> None:
    """A line on stdout that ``--quiet`` leaves out."""
    if not _quiet:
        print(message, flush=True)


def progress(total: int, description: str, unit: str = "B") -> tqdm[Any]:
    """A progress bar on stderr (bytes per second and time left); none where nobody watches.

    Several threads may advance it.
    """
    from tqdm import tqdm

    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                return super().update(n)

    return Bar(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=True if _quiet else None,  # None: off unless stderr is a terminal
    )


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is the first GPU, else the CPU with a notice.

    Raises:
        UserError: a device that PyTorch does not know or does not see.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
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


def _fail(parser: argparse.ArgumentParser, message: str) -> int:
    one_line = " ".join(message.split())
    # Names come out of files that anybody may have made: no control codes to the terminal.
    one_line = "".join(letter if letter.isprintable() else "?" for letter in one_line)
    print(f"{parser.prog}: error: {one_line}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


def _config_as_flags(
    parser: argparse.ArgumentParser, path: Path, given: argparse.Namespace
) -> list[str]:
    """A YAML mapping as command-line words, so that argparse checks types and choices alike.

    A flag that collects its values would join the file's with those ``given`` on the command line,
    which win: the file's are left out.
    """
    flags = {
        option.lstrip("-"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config")
    }
    words: list[str] = []
    for key, value in _read_yaml_mapping(path).items():
        if key not in flags:
            near = difflib.get_close_matches(str(key), flags, n=1, cutoff=0.0)
            raise UserError(f"{path}: unknown key {key!r}; did you mean {near[0]!r}?")
        collects = isinstance(flags[key], argparse._ExtendAction)
        if not (collects and getattr(given, flags[key].dest)):
            words += _as_flag(path, key, value, flags[key])
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


def _read_yaml_mapping(path: Path) -> dict[str, object]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `flag: value` lines, found {type(content).__name__}")
    return content
