"""Stop requests: by a signal or a time limit, at a step on which all processes agree.

Imports no torch: main.py handles signals before that import, which takes seconds.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.errors import StopRequested

# SIGUSR1 is what schedulers send before a job's time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIME_IS_UP = 1_000  # larger than the number of any signal


class StopRequest:
    """Whether this run was asked to stop; with `max_seconds` above 0 also by that much time since its start."""

    def __init__(self, max_seconds: float):
        self._deadline = time.monotonic() + max_seconds if max_seconds else float("inf")
        self._received = 0
        self._starting = True

    @contextmanager
    def handle_signals(self) -> Iterator["StopRequest"]:
        """Handle SIGNALS instead of dying of them; the former handlers are restored at the end.

        Until `defer_to_steps` there is nothing to save: the first signal raises StopRequested at once.
        """
        former = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in former.items():
                # After a request the process is about to exit: another signal must not change its exit code.
                signal.signal(number, signal.SIG_IGN if self._received else handler)

    def defer_to_steps(self) -> None:
        """From now on a signal is only noted, for `agree` to report."""
        self._starting = False

    @property
    def requested(self) -> bool:
        """Whether this process, perhaps alone, was asked to stop."""
        return bool(self._own())

    def agree(self) -> str | None:
        """The reason for all processes to stop now, or None. A collective: every process calls it at the same step."""
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
