"""Run directory `<output>/<model>/<tag>`: locked by one run, checked for space, with status.json."""

import contextlib
import fcntl
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint import remove_partial
from utils.distributed import Process, broadcast_object, share_errors
from utils.errors import StopRequested, StorageError, UserError
from utils.files import make_folder, storage_remedy, write_atomically
from utils.logging import logger
from utils.watchdog import HANG_EXIT_CODE

LOCK = ".lock"


class RunDir:
    """The directory of one run; every process knows it, the main process writes in it.

    Other processes need not see the main one's: what they write themselves, such as their stacks when they hang, may
    be in a directory of the same name on a disk of their own.
    """

    def __init__(self, path: Path, process: Process):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._process = process
        self._holder = ""  # of the lock, in words
        self._progress: dict[str, object] = {}  # of the run, as of the last status "running"

    @contextmanager
    def lock(self) -> Iterator["RunDir"]:
        """Lock the directory for this run, and write to status.json how the run ended.

        Raises StorageError, before anything else happens, if it cannot be written or another run holds it. A
        collective.
        """
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {started}"
        self._holder = broadcast_object(holder)
        lock = None
        with share_errors():
            if self._process.is_main:
                lock = self._lock()
            else:
                self._make_own_folder()
        self.write_status("running")
        try:
            yield self
        except KeyboardInterrupt:
            self.write_status("interrupted", exit_code=130)
            raise
        except StopRequested as error:
            self.write_status("stopped", exit_code=error.exit_code, error=str(error))
            raise
        except UserError as error:
            self.write_status("failed", exit_code=error.exit_code, error=str(error))
            raise
        except Exception as error:
            self.write_status("failed", exit_code=1, error=f"{type(error).__name__}: {error}")
            raise
        else:
            if self._process.is_main:
                self.write_status("done", exit_code=0)
        finally:
            if lock is not None:
                with contextlib.suppress(OSError):
                    lock.close()

    def write_status(self, state: str, **values: object) -> None:
        """Write status.json: `state`, the time and `values`; of several processes that fail, the first one's.

        The others fail because it is gone. How a run ends is written with the values of its last "running", which say
        how far it has come. Only who holds the lock writes: the main process, and the others of its run where they see
        its lock file. A failure to write is only a warning: no run ends for want of its status.
        """
        if state == "running":
            self._progress = values
        if not self._process.is_main and (state == "running" or not self._is_locked_by_this_run()):
            return
        if state != "running" and self._has_ended():
            return
        status = {
            "state": state,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "rank": self._process.rank,
            **self._progress,
            **values,
        }
        try:
            write_atomically(self.path / "status.json", json.dumps(status, indent=1) + "\n")
        except StorageError as error:
            logger.warning(str(error))

    def write_settings(self, config: str, sources: dict[str, str]) -> None:
        """Write config.yaml, and sources.json: where the settings that are no defaults come from.

        Raises StorageError.
        """
        if self._process.is_main:
            write_atomically(self.path / "config.yaml", config)
            write_atomically(self.path / "sources.json", json.dumps(sources, indent=1) + "\n")

    def hang_file(self) -> Path:
        """Where this process writes its stacks when it hangs."""
        return self.path / f"hang-rank{self._process.rank}.txt"

    def report_hang(self, message: str) -> None:
        """Write to status.json and the log that this process hangs."""
        self.write_status("failed", exit_code=HANG_EXIT_CODE, error=message)
        logger.error(message)

    def report_exit(self, state: str, code: int, message: str) -> None:
        """Write to status.json that the process ends at once, with exit code `code`."""
        self.write_status(state, exit_code=code, error=message)

    def _has_ended(self) -> bool:
        try:
            return (
                json.loads((self.path / "status.json").read_text(encoding="utf-8"))["state"]
                != "running"
            )
        except (OSError, ValueError):
            return False

    def require_space(self, size: int) -> None:
        """Raise StorageError unless two checkpoints of `size` bytes fit: a new one beside the last."""
        if not self._process.is_main:
            return
        free = shutil.disk_usage(self.path).free
        if free < 2 * size:
            raise StorageError(
                f"{self.path}: {free / 2**20:.0f} MiB are free, but two checkpoints need {2 * size / 2**20:.0f} MiB. "
                "Make room or choose another --output."
            )

    def _make_own_folder(self) -> None:
        """Make the directory for what another than the main process writes."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning(
                f"{self.path} cannot be made ({error.strerror}): unreadable images and hangs of this process are "
                "only in its output"
            )

    def _is_locked_by_this_run(self) -> bool:
        try:
            return (self.path / LOCK).read_text(encoding="utf-8").strip() == self._holder
        except OSError:
            return False

    def _lock(self) -> io.FileIO:
        """The lock file with this process's name inside; partial files that a kill left are removed."""
        try:
            make_folder(self.checkpoints)
            lock = (self.path / LOCK).open("ab+", buffering=0)
            self._acquire(lock)
            lock.truncate(0)
            lock.write(
                self._holder.encode().ljust(4096)
            )  # a block, which tries whether there is room
            os.fsync(lock.fileno())
            for folder in (self.path, self.checkpoints):
                remove_partial(folder)
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror}. {storage_remedy(error)} Or choose another --output."
            ) from error
        return lock

    def _acquire(self, lock: io.FileIO) -> None:
        # Not flock, which loader processes inherit: they outlive a killed run by seconds, and would keep its folder.
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as POSIX has it
            raise StorageError(
                f"{self.path} is in use by {_holder(lock)}. Stop that run, or give this one a --tag of its own."
            ) from None
        except OSError as error:  # some network drives have no locks
            logger.warning(
                f"{self.path}: {error.strerror}; make sure that no other run uses this directory"
            )
        if os.fstat(lock.fileno()).st_nlink == 0:
            raise StorageError(f"{self.path} was deleted while this run began. Start it again.")


def _holder(lock: io.FileIO) -> str:
    """Who holds `lock`; after a race, the winner has time to write its name."""
    for _ in range(10):
        time.sleep(0.2)
        lock.seek(0)
        if name := lock.read().decode().strip():
            return name
    return "another run"
