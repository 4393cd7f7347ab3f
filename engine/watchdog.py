"""Does the run still move? A process without progress for too long writes every thread's stack and ends."""

import faulthandler
import os
import threading
from collections.abc import Iterable, Iterator

from engine.folder import RunFolder
from utils.logging import logger

HANG_EXIT_CODE = 76
GRACE = 2.0  # seconds in which the processes that wait for this one write their stacks too


class Watchdog:
    """Ends process `rank` when, after its first sign of progress, none came for `seconds`; with 0 never.

    The stacks go to hang-rank<rank>.txt in `folder`, one sentence to the log and to status.json. A context manager,
    outside of which nothing is watched.
    """

    def __init__(self, seconds: float, folder: RunFolder, rank: int):
        self.seconds = seconds
        self.file = folder.path / f"hang-rank{rank}.txt"
        self._folder = folder
        self._beats = 0
        self._stopped = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def beat(self) -> None:
        """Note that something was done."""
        self._beats += 1

    def watch(self, batches: Iterable) -> Iterator:
        """`batches`, each a sign of progress: a slot takes seconds where an update may take an hour."""
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
        with self.file.open("w") as file:
            faulthandler.dump_traceback(file)
        message = (
            f"nothing was done for {self.seconds:g} s (TRAIN.HANG_SECONDS); "
            f"the stack of every thread is in {self.file}"
        )
        self._folder.report("failed", exit_code=HANG_EXIT_CODE, error=message)
        logger.error(message)
