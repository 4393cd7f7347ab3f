"""Should the run stop before its end? On a signal or when its time is up, at an update that all processes agree on."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.distributed import all_reduce_max

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

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Note signals instead of dying of them, however many come; the former handlers are put back at the end."""
        former = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def reason(self) -> str | None:
        """Why all processes are to stop now, None if they are not. Every process has to ask at the same update."""
        own = self._received or (TIME_IS_UP if time.monotonic() > self._deadline else 0)
        agreed = all_reduce_max(own)
        if agreed == TIME_IS_UP:
            return "the time of TRAIN.MAX_SECONDS is up"
        return f"{signal.Signals(agreed).name} was received" if agreed else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
