"""Where does a run live? `<output>/<model>/<tag>`: tried for writing, claimed by one run, and telling its state."""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.distributed import Process
from utils.errors import StopRequested, StorageError, UserError
from utils.logging import write_atomically


class RunFolder:
    """The folder of one run; every process knows it, the first one writes in it."""

    def __init__(self, path: Path, process: Process):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._process = process

    @contextmanager
    def claimed(self) -> Iterator["RunFolder"]:
        """Hold the folder for this run, and leave in status.json how the run went.

        Raises StorageError where the folder cannot be written or another run holds it, before anything else is done.
        """
        lock = self._lock() if self._process.is_main else None
        self.report("running")
        try:
            yield self
        except KeyboardInterrupt:
            self.report("interrupted", exit_code=130)
            raise
        except StopRequested as error:
            self.report("stopped", exit_code=error.exit_code, error=str(error))
            raise
        except UserError as error:
            self.report("failed", exit_code=error.exit_code, error=str(error))
            raise
        except Exception as error:
            self.report("failed", exit_code=1, error=f"{type(error).__name__}: {error}")
            raise
        else:
            if self._process.is_main:
                self.report("done", exit_code=0)
        finally:
            if lock is not None:
                os.close(lock)

    def report(self, state: str, **facts: object) -> None:
        """Write status.json: `state`, the time and `facts`. A process that fails says so itself, whichever it is.

        The first one does: the others fail because it is gone.
        """
        if state == "running" and not self._process.is_main:
            return
        if state != "running" and self._has_ended():
            return
        facts = {
            "state": state,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rank": self._process.rank,
            **facts,
        }
        try:
            write_atomically(self.path / "status.json", json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            if state == "running":
                raise StorageError(f"{self.path}: {error.strerror}") from error

    def _has_ended(self) -> bool:
        try:
            return json.loads((self.path / "status.json").read_text())["state"] != "running"
        except (OSError, ValueError):
            return False

    def require_space(self, size: int) -> None:
        """Raise StorageError unless two checkpoints of `size` bytes fit: a new one beside the last."""
        free = shutil.disk_usage(self.path).free
        if self._process.is_main and free < 2 * size:
            raise StorageError(
                f"{self.path}: {free / 2**20:.0f} MiB are free, but two checkpoints need {2 * size / 2**20:.0f} MiB. "
                "Make room or choose another --output."
            )

    def _lock(self) -> int:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".probe"
            with probe.open("wb") as file:
                file.write(bytes(4096))
                os.fsync(file.fileno())
            probe.unlink()
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror}. Make room there or choose another --output."
            ) from error
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the kernel releases it, even after kill -9
        except BlockingIOError:
            holder = os.read(lock, 4096).decode() or "another run"
            os.close(lock)
            raise StorageError(
                f"{self.path} is in use by {holder}. Stop that run, or give this one a --tag of its own."
            ) from None
        os.ftruncate(lock, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(
            lock, f"process {os.getpid()} on {socket.gethostname()}, started {started}".encode()
        )
        return lock
