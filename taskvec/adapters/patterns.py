"""Regular expressions out of an adapter's configuration, matched within a limit of time.

Anybody may have written them, and an expression of a few letters can take longer than the universe
is old ("(a+)+$").
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType

from taskvec.cli import UserError

_SECONDS = 5.0  # for all that one `Matcher` is asked; thousands of modules take a fraction of one


class Matcher:
    """Matches the expressions of one configuration, which have a few seconds together.

    The limit needs the main thread, which is where adapters are opened; elsewhere there is none.
    """

    def __init__(self) -> None:
        self._left = _SECONDS

    def match(self, expression: str, text: str, *, whole: bool = False) -> re.Match[str] | None:
        """The match at the beginning of a text, or with all of it.

        Raises:
            re.error: not a regular expression.
            UserError: the time is up.
        """
        begin = time.perf_counter()
        try:
            with _time_limit(self._left):
                compiled = _compiled(expression)
                return compiled.fullmatch(text) if whole else compiled.match(text)
        except TimeoutError:
            raise UserError(
                f"the expression {expression!r} takes for ever to match {text!r}; write it without "
                "repeats of repeats"
            ) from None
        finally:
            self._left -= time.perf_counter() - begin


@lru_cache(maxsize=10_000)  # re's own cache is too small for a pattern per module
def _compiled(expression: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(expression)
    except (OverflowError, RecursionError, MemoryError) as error:
        raise re.error(str(error) or type(error).__name__) from None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Python's matcher looks for signals now and then; an alarm gets through to it.

    Raises:
        TimeoutError: the block took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
