"""Run a command in a process of its own and measure it: wall time, peak memory, bytes moved.

The command is started by a small helper process (this file run as a script), because Linux counts
what the process that starts a command held in memory towards the command's own peak.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType


class CommandFailed(Exception):
    """A measured command ended with a status other than 0; the message is its last words."""


@dataclass(frozen=True)
class Measured:
    """What one process took. Bytes are None where the system does not tell.

    Attributes:
        seconds: wall time from its start to its end.
        peak: largest resident memory, bytes.
        read_calls: bytes read by system calls, file copies in the kernel included; reading a
            mapped file is not among them.
        read_disk, written: bytes that it made the kernel fetch from disk, and store there.
        output: its stdout.
    """

    seconds: float
    peak: int
    read_calls: int | None
    read_disk: int | None
    written: int | None
    output: str


def measure(command: list[str], directory: Path, *, keep_output: bool = True) -> Measured:
    """Run a command in a directory, which must succeed.

    Args:
        keep_output: return its stdout; otherwise it is thrown away unseen.

    Raises:
        CommandFailed: it did not.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        tempfile.NamedTemporaryFile("r", encoding="utf-8") as report,
    ):
        helper = subprocess.Popen(
            [sys.executable, "-I", __file__, report.name, *command],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=out if keep_output else subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the other two
        )
        try:
            helper.wait()
        except BaseException:
            helper.terminate()
            helper.wait()
            raise
        for stream in (out, err, report):
            stream.seek(0)
        if helper.returncode:
            words = (err.read().strip() or out.read().strip()).splitlines()
            last = words[-1] if words else ""
            raise CommandFailed(f"{' '.join(command)}: exit status {helper.returncode}: {last}")
        return Measured(**json.load(report), output=out.read())


def _help(report: str, command: list[str]) -> int:
    """The helper process: start the command, wait for its end, write down what it took."""
    start = time.perf_counter()
    child = subprocess.Popen(command)

    def end(signum: int, frame: FrameType | None) -> None:
        child.kill()

    signal.signal(signal.SIGTERM, end)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended; its figures are still there
    seconds = time.perf_counter() - start
    moved = _bytes_moved(child.pid)
    _, status, usage = os.wait4(child.pid, 0)
    content = {
        "seconds": seconds,
        "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "read_calls": moved.get("rchar"),
        "read_disk": moved.get("read_bytes"),
        "written": moved.get("write_bytes"),
    }
    Path(report).write_text(json.dumps(content), encoding="utf-8")
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _bytes_moved(pid: int) -> dict[str, int]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
        return {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return {}


if __name__ == "__main__":
    sys.exit(_help(sys.argv[1], sys.argv[2:]))
