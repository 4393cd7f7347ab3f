"""Should the run stop before its end? On a signal or when its time is up, where all processes agree on it.

Imports no torch: main.py listens before the seconds that the import takes.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.errors import StopRequested

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
)  # SIGUSR1: schedulers' warning before the end
TIME_IS_UP = 1_000  # beside the numbers of signals


class StopRequest:
    """What asks this run to stop; with `max_seconds` above 0, that much time since the request was made."""

    def __init__(self, max_seconds: float):
        self._deadline = time.monotonic() + max_seconds if max_seconds else float("inf")
        self._received = 0
        self._starting = True

    @contextmanager
    def handle_signals(self) -> Iterator["StopRequest"]:
        """Take signals instead of dying of them, however many come; the former handlers are put back at the end.

        Until `defer_to_steps` there is nothing to save: the first signal raises StopRequested where it comes.
        """
        former = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in former.items():
                # Asked once, the process is leaving: another signal must not change its exit code.
                signal.signal(number, signal.SIG_IGN if self._received else handler)

    def defer_to_steps(self) -> None:
        """From now on a signal is only noted, for `agree` to tell."""
        self._starting = False

    @property
    def requested(self) -> bool:
        """Whether this process, perhaps alone, was asked to stop."""
        return bool(self._own())

    def agree(self) -> str | None:
        """Why all processes are to stop now, None if they are not. Every process has to ask at the same point."""
        from utils.distributed import all_reduce_max

        agreed = all_reduce_max(self._own())
        if not agreed:
            return None
        self._received = agreed
        if agreed == TIME_IS_UP:
            return "the time of TRAIN.MAX_SECONDS is up"
        return f"{signal.Signals(agreed).name} was received"

    def _own(self) -> int:
        return self._received or (TIME_IS_UP if time.monotonic() > self._deadline else 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if self._starting:
            self._starting = False
            name = signal.Signals(number).name
            raise StopRequested(
                f"{name} was received before the first step. Start the same command again."
            )
