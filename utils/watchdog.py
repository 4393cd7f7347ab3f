"""Watchdog: a process without progress for too long writes every thread's stack and ends."""

import faulthandler
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

HANG_EXIT_CODE = 76
STDERR = 2
GRACE = 2.0  # seconds in which the processes that wait for this one write their stacks too


class Watchdog:
    """Ends the process when, after its first sign of progress, none came for `seconds`; with 0 never.

    The stack of every thread goes to `file`, or to stderr where that cannot be written, and one sentence to `on_hang`.
    A context manager; nothing is watched outside.
    """

    def __init__(self, seconds: float, file: Path, on_hang: Callable[[str], None]):
        self.seconds = seconds
        self.file = file
        self._on_hang = on_hang
        self._beats = 0
        self._stopped = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()

    def beat(self) -> None:
        """Note progress."""
        self._beats += 1

    def watch(self, batches: Iterable) -> Iterator:
        """`batches`, each a sign of progress: a micro-batch takes seconds where a step may take an hour."""
        for batch in batches:
            self.beat()
            yield batch

    def _run(self) -> None:
        # Its own ticks are counted, not the clock: a process that was stopped for a while does not hang.
        tick = min(1.0, self.seconds / 10)
        seen, quiet = 0, 0.0
        while not self._stopped.wait(tick):
            quiet = quiet + tick if self._beats == seen > 0 else 0.0
            seen = self._beats
            if quiet > self.seconds:
                self._end()
                return

    def _end(self) -> None:
        # First of all, as writing may hang as well, on the disk or on a lock that the main thread holds.
        threading.Timer(GRACE, os._exit, [HANG_EXIT_CODE]).start()
        place = str(self.file)
        try:
            with self.file.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
        except OSError as error:
            faulthandler.dump_traceback(STDERR)
            place = f"its output, as {place} cannot be written ({error.strerror})"
        self._on_hang(
            f"no progress for {self.seconds:g} s (TRAIN.HANG_SECONDS); "
            f"the stack of every thread is in {place}"
        )
