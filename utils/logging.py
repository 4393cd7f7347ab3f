"""Where a run's words and numbers go: console, log.txt, metrics.jsonl, timing.jsonl, skipped.jsonl, TensorBoard."""

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from utils.errors import StorageError
from utils.files import write_atomically

logger = logging.getLogger("dat")


class _Console(logging.Handler):
    """Writes above the progress bar instead of through it; goes without where a full disk holds the output."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            self.handleError(record)


def start_logging(name: str, rank: int, folder: Path | None = None) -> None:
    """Log to the console and, given `folder`, to its log.txt; processes other than the first only report warnings."""
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    logging.raiseExceptions = False  # or every line that a full disk refuses would be a traceback
    who = name if rank == 0 else f"{name} rank {rank}"
    line = logging.Formatter(
        f"[%(asctime)s {who}] (%(filename)s %(lineno)d): %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    handlers: list[logging.Handler] = [_Console()]
    if folder is not None:
        handlers.append(logging.FileHandler(folder / "log.txt"))
    for handler in handlers:
        handler.setFormatter(line)
    logger.handlers = handlers


class MetricWriter:
    """Numbers of a run by step: deterministic ones to metrics.jsonl, times to timing.jsonl, all to TensorBoard.

    And to skipped.jsonl the images of steps that were not applied.

    Records beyond `step` and `epoch` are cut off first, so that a resumed run's files have each step once and, for
    the deterministic ones, the bytes of a run that was never stopped; that there is one `every` so many steps tells
    whether some are missing. Records that a full disk refuses wait in memory. On any process but the first (`folder`
    None) nothing is written. Raises StorageError.
    """

    def __init__(self, folder: Path | None, step: int, epoch: int, every: int):
        self._folder = folder
        self._every = every
        self._files: dict[str, io.FileIO] = {}
        self._waiting = {"metrics": b"", "timing": b"", "skipped": b""}
        self._board = None
        self.rewind(step, epoch)

    def rewind(self, step: int, epoch: int) -> None:
        """Go on after `step`, with `epoch` epochs closed: the records beyond are cut off.

        The evaluation of an epoch that was trained and not closed is among them: it is done again.
        """
        self.close()
        if self._folder is None:
            return
        # It takes a second to import, which is paid by one process only.
        from torch.utils.tensorboard import SummaryWriter

        try:
            for name in self._waiting:
                path = self._folder / f"{name}.jsonl"
                last = _cut_records(path, step, epoch)
                if name == "metrics" and last < step // self._every * self._every:
                    logger.warning(f"{path} lacks records of steps {last + 1} to {step}")
                self._files[name] = path.open("ab", buffering=0)
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise StorageError(f"{self._folder}: its records cannot be written: {error}") from error

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record values that depend on the seed alone."""
        self._write("metrics", step, values)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Record values that depend on the machine."""
        self._write("timing", step, values)

    def skipped(self, step: int, micro_batches: list[list[str]]) -> None:
        """Record the paths of a step's images, by micro-batch: it was not applied."""
        self._write("skipped", step, {"micro_batches": micro_batches})

    def _write(self, name: str, step: int, values: dict) -> None:
        if not self._files:
            return
        self._waiting[name] += (json.dumps({"step": step, **values}) + "\n").encode()
        self._append(name)
        if name != "skipped":
            self._draw(
                lambda board: [board.add_scalar(t, value, step) for t, value in values.items()]
            )

    def _draw(self, action: Callable) -> None:
        """Do `action` to TensorBoard's writer, which is given up when it fails: the records hold the same numbers."""
        try:
            if self._board is not None:
                action(self._board)
        except OSError as error:
            logger.warning(f"TensorBoard's file is not written any more: {error}")
            self._board = None

    def _append(self, name: str) -> None:
        """Write what waits, as far as there is room."""
        try:
            while waiting := self._waiting[name]:
                self._waiting[name] = waiting[self._files[name].write(waiting) :]
        except OSError as error:
            if waiting.count(b"\n") == 1:  # said once
                logger.warning(
                    f"{name}.jsonl cannot be written, its records wait: {error.strerror}"
                )

    def flush(self) -> None:
        """Bring every record so far into its file: what is about to be saved shall not be ahead of them."""
        for name in self._files:
            self._append(name)
        self._draw(lambda board: board.flush())

    def close(self) -> None:
        """Flush and close every file. Raises StorageError where records remain that could not be written."""
        self.flush()
        for file in self._files.values():
            file.close()
        self._draw(lambda board: board.close())
        if any(self._waiting.values()):
            raise StorageError("The last records of the run could not be written. Make room.")


def _cut_records(path: Path, step: int, epoch: int) -> int:
    """Drop the records beyond `step` and `epoch` and a line that a kill left unfinished; the last one's step."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    places = [_place_of(line) for line in lines]
    kept = [
        (place[0], line)
        for place, line in zip(places, lines, strict=True)
        if place is not None and place[0] <= step and place[1] <= epoch
    ]
    if None in places[:-1]:
        logger.warning(f"{path}: {places[:-1].count(None)} damaged records are dropped")
    if len(kept) < len(lines):
        write_atomically(path, b"".join(line for _, line in kept))
    return kept[-1][0] if kept else 0


def _place_of(line: bytes) -> tuple[int, int] | None:
    """Step and epoch of a record, 0 for one without an epoch; None where it is damaged or unfinished."""
    try:
        record = json.loads(line.decode())
        return (int(record["step"]), int(record.get("epoch", 0))) if line.endswith(b"\n") else None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
