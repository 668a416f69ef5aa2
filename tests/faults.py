"""Commands of the project in processes of their own, disturbed in the middle.

A server process imports the scripts once and forks a child for each command, so that a run costs
milliseconds. ``python -m tests.faults`` is that server; `Commands` is the tests' side of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import taskvec
from tests import system_calls

ROOT = Path(__file__).parents[1]
_PATIENCE = 120  # seconds, many times what any of them takes
_SETPIPE_SIZE = 1031  # F_SETPIPE_SZ
_CAPSET = {"x86_64": 126, "aarch64": 91}.get(os.uname().machine)


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: the exit status, or minus the number of the signal that ended it.
        calls: how many system calls were made of the kind that was counted.
    """

    status: int
    out: str
    err: str
    calls: int


class Commands:
    """The server, as a context; `run` is one command in one process."""

    def __enter__(self) -> Commands:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # one thread makes all the calls
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: BaseException | type[BaseException] | TracebackType | None) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def run(
        self,
        script: str,
        *words: object,
        cwd: Path | None = None,
        count: str = "",
        at: int | None = None,
        act: str = "kill",
        file: Path | None = None,
        largest_file: int | None = None,
        memory: int | None = None,
        no_privileges: bool = False,
    ) -> Outcome:
        """Run ``script`` with ``words`` as its arguments.

        Args:
            cwd: where.
            count: the system calls to count: "changes" of the disk, "reads" of ``file``, or "all"
                of both kinds, of whatever file.
            at: act before the call of this number, from 0; None: only count.
            act: "kill" (SIGKILL), "interrupt" (Ctrl-C) or "shrink" ``file`` to half its size.
            largest_file: no file may grow beyond so many bytes (RLIMIT_FSIZE).
            memory: so many bytes may be mapped beside the libraries (RLIMIT_AS).
            no_privileges: give up root's power to write where permissions forbid it.
        """
        request = {
            "script": script,
            "words": [str(word) for word in words],
            "cwd": str(cwd or ROOT),
            "count": count,
            "at": at,
            "act": act,
            "file": str(file) if file else None,
            "largest_file": largest_file,
            "memory": memory,
            "no_privileges": no_privileges,
        }
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], _PATIENCE)[0]:
            self._server.kill()
            raise TimeoutError(f"{script} did not end within {_PATIENCE} s")
        return Outcome(**json.loads(self._server.stdout.readline()))


def drop_privileges() -> None:
    """Give up every capability: root may then do what the permissions say, like anybody else."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if _CAPSET is None or libc.syscall(_CAPSET, header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nobody else prints into the answers
    for module in pkgutil.walk_packages(taskvec.__path__, "taskvec."):
        importlib.import_module(module.name)  # else every child would import them, and torch
    for line in sys.stdin:
        json.dump(_answer(json.loads(line)), answers)
        answers.write("\n")
        answers.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    main = importlib.import_module(request["script"]).main
    (out, to_out), (err, to_err) = pipes = os.pipe(), os.pipe()
    for reading, _ in pipes:
        fcntl.fcntl(reading, _SETPIPE_SIZE, 1 << 20)  # all that a command says has room
    counter = _Counter(request) if request["count"] else None
    watched = {"changes": system_calls.CHANGES, "reads": system_calls.READS}
    status = system_calls.run(
        _command(main, request, to_out, to_err),
        counter,
        watched.get(request["count"], system_calls.CHANGES | system_calls.READS),
    )
    os.close(to_out)
    os.close(to_err)
    texts = []
    for reading in (out, err):
        with open(reading, "rb") as stream:
            texts.append(stream.read().decode(errors="replace"))
    calls = counter.calls if counter else 0
    return {"status": status, "out": texts[0], "err": texts[1], "calls": calls}


def _command(
    main: Callable[[Sequence[str]], int], request: dict[str, Any], out: int, err: int
) -> Callable[[], int]:
    def work() -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # before and after the command
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.chdir(request["cwd"])
        if request["no_privileges"]:
            drop_privileges()
        for kind, most in (
            (resource.RLIMIT_FSIZE, request["largest_file"]),
            (resource.RLIMIT_AS, request["memory"] and _mapped_bytes() + request["memory"]),
        ):
            if most is not None:
                resource.setrlimit(kind, (most, most))
        return _exit_status(main, request["words"])

    return work


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _exit_status(main: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(words)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class _Counter:
    """Counts the system calls that matter, and acts when their number is reached."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.calls = 0
        self._count, self._at, self._act = request["count"], request["at"], request["act"]
        self._file = Path(request["file"]) if request["file"] else None

    def __call__(self, call: system_calls.Call) -> None:
        if not self._matters(call):
            return
        if self.calls == self._at:
            self._do(call.pid)
        self.calls += 1

    def _matters(self, call: system_calls.Call) -> bool:
        if self._count == "changes":
            return call.changes_disk()
        if self._count == "reads" and self._file is not None:
            return call.reads(self._file)
        return bool(self._count == "all")

    def _do(self, pid: int) -> None:
        if self._act == "shrink" and self._file is not None:
            os.truncate(self._file, self._file.stat().st_size // 2)
        else:
            os.kill(pid, signal.SIGKILL if self._act == "kill" else signal.SIGINT)


if __name__ == "__main__":
    _serve()
