"""Run something in a child process and step in at one of its system calls (Linux's ptrace).

Whatever a process does to a disk passes here, from Python or from a library, so a run can be
stopped before each of its writes in turn, and no write is missed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_TRACEME, _CONT, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 7, 0x4200, 0x420E
_TRACESECCOMP, _EXITKILL, _EVENT_SECCOMP = 1 << 7, 1 << 20, 7
_TRACE_DESCENDANTS = 1 << 1 | 1 << 2 | 1 << 3  # fork, vfork, clone
_WALL = 0x40000000

# (x86-64, arm64) numbers of the calls that change a disk; None: arm64 has not got it.
_CHANGING = {
    "write": (1, 64),
    "pwrite64": (18, 68),
    "writev": (20, 66),
    "pwritev": (296, 70),
    "pwritev2": (328, 287),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "fallocate": (285, 47),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "sync_file_range": (277, 84),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
}
_OPENAT, _IOCTL = (257, 56), (16, 29)
_CLONING = (0x40049409, 0x4020940D)  # FICLONE, FICLONERANGE
_READING = {
    "read": (0, 63),
    "pread64": (17, 67),
    "preadv": (295, 69),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "mmap": (9, 222),
    "lseek": (8, 62),
}
_MACHINES = {"x86_64": 0, "aarch64": 1}
_MACHINE = _MACHINES.get(os.uname().machine, -1) if sys.platform == "linux" else -1


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info when a filter stopped a call, with room for its other forms."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("nr", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
        ("more", ctypes.c_uint64 * 2),
    )


class _Program(ctypes.Structure):
    """struct sock_fprog: a seccomp filter."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


@dataclass(frozen=True)
class Call:
    """A system call that is about to be made.

    Attributes:
        pid: of the process or thread, stopped.
        number, arguments: as the processor has them.
    """

    pid: int
    number: int
    arguments: tuple[int, ...]

    def changes_disk(self) -> bool:
        """True for a write, a flush, a rename and their like, and for a file that is created."""
        if self.number == _OPENAT[_MACHINE]:
            return bool(self.arguments[2] & os.O_CREAT)
        if self.number == _IOCTL[_MACHINE]:
            return self.arguments[1] in _CLONING
        return self.number in _CHANGING_NUMBERS

    def reads(self, file: Path) -> bool:
        """True for a call that takes bytes, or a mapping, from this file."""
        if self.number not in _READING_NUMBERS:
            return False
        descriptor = self.arguments[4 if self.number == _READING["mmap"][_MACHINE] else 0]
        if self.number == _READING["sendfile"][_MACHINE]:
            descriptor = self.arguments[1]
        try:
            return os.readlink(f"/proc/{self.pid}/fd/{descriptor}") == str(file)
        except OSError:
            return False


def _numbers(pairs: Iterable[tuple[int, int | None]]) -> frozenset[int]:
    numbers = (pair[_MACHINE] for pair in pairs)
    return frozenset(number for number in numbers if number is not None)


_CHANGING_NUMBERS = _numbers(_CHANGING.values())
_READING_NUMBERS = _numbers(_READING.values())
CHANGES = _CHANGING_NUMBERS | _numbers([_OPENAT, _IOCTL])
READS = _READING_NUMBERS


def run(
    work: Callable[[], int],
    step_in: Callable[[Call], None] | None = None,
    watched: Collection[int] = CHANGES,
) -> int:
    """Run ``work`` in a child process to its end.

    Args:
        work: returns the exit status.
        step_in: called before system calls of the child, which waits meanwhile.
        watched: the numbers of those calls, such as CHANGES or READS.

    Returns:
        the exit status, or minus the number of the signal that ended it.
    """
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            if step_in is not None:
                _be_followed(watched)
            status = work()
        finally:
            os._exit(status)
    if step_in is None:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return _follow(pid, step_in)


def _be_followed(watched: Collection[int]) -> None:
    """Have the parent told of system calls: a seccomp filter picks them (seccomp(2))."""
    if _libc.ptrace(_TRACEME, 0, None, None):
        os._exit(71)
    os.kill(os.getpid(), signal.SIGSTOP)
    steps = [(0x20, 0, 0, 0)]  # load the number
    for after, number in zip(range(len(watched), 0, -1), sorted(watched), strict=True):
        steps.append((0x15, after, 0, number))  # where it is equal, jump to the last step
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FF00000)]  # allow; or have it traced
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    if _libc.prctl(38, 1, 0, 0, 0) or _libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        os._exit(72)  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP


def _follow(pid: int, step_in: Callable[[Call], None]) -> int:
    """Wait for the child, with its threads and children of its own, and for what they do."""
    os.waitpid(pid, 0)
    _ptrace(_SETOPTIONS, pid, 0, _TRACESECCOMP | _TRACE_DESCENDANTS | _EXITKILL)
    _libc.ptrace(_CONT, pid, None, None)
    result, alive, info = 0, {pid}, _Info()
    while alive:
        task, status = os.waitpid(-1, _WALL)
        if not os.WIFSTOPPED(status):
            alive.discard(task)
            result = os.waitstatus_to_exitcode(status) if task == pid else result
            continue
        alive.add(task)
        event, passed_on = status >> 16, os.WSTOPSIG(status)
        if event == _EVENT_SECCOMP:
            _ptrace(_GET_SYSCALL_INFO, task, ctypes.sizeof(info), ctypes.addressof(info))
            step_in(Call(task, int(info.nr), tuple(info.args)))
        if event or passed_on == signal.SIGSTOP:  # ptrace's own, at a task's beginning
            passed_on = 0
        _libc.ptrace(_CONT, task, None, ctypes.c_void_p(passed_on))  # fails where it was killed
    return result


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    if _libc.ptrace(request, pid, ctypes.c_void_p(address), ctypes.c_void_p(data)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace {request:#x}: {os.strerror(code)}")


def why_not() -> str | None:
    """Why system calls cannot be followed here; None if they can."""
    if _MACHINE < 0:
        return "system calls are followed on Linux, x86-64 or arm64"
    seen: list[int] = []
    try:
        status = run(lambda: os.write(1, b"") or 0, lambda call: seen.append(call.number), CHANGES)
    except OSError as error:
        return f"the system calls of a process may not be followed here: {error}"
    return None if (status, len(seen)) == (0, 1) else "ptrace or seccomp is not permitted here"
