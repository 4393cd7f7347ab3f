"""Where a run's words and numbers go: console, log.txt, metrics.jsonl, timing.jsonl, skipped.jsonl, TensorBoard."""

import json
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger("dat")


class _Console(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def start_logging(name: str, rank: int, folder: Path | None = None) -> None:
    """Log to the console and, given `folder`, to its log.txt; processes other than the first only report warnings."""
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
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
    """Numbers of a run by update: deterministic ones to metrics.jsonl, times to timing.jsonl, all to TensorBoard.

    And to skipped.jsonl the images of updates that were not applied.

    Records beyond `update` are cut off first, so that a resumed run's files have each update once and, for the
    deterministic ones, the bytes of a run that was never stopped. On any process but the first (`folder` None) nothing
    is written.
    """

    def __init__(self, folder: Path | None, update: int):
        self.folder = folder
        self.files = {}
        self.rewind(update)

    def rewind(self, update: int) -> None:
        """Go on after `update`: the records beyond it are cut off."""
        self.close()
        if self.folder is None:
            return
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # costs a second, paid by one process only

        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=update + 1)
        for name in ("metrics", "timing", "skipped"):
            path = self.folder / f"{name}.jsonl"
            _cut_records(path, update)
            self.files[name] = path.open("a", buffering=1)  # a line at a time reaches the file

    def metrics(self, update: int, values: dict[str, float]) -> None:
        """Record values that depend on the seed alone."""
        self._write("metrics", update, values)

    def timing(self, update: int, values: dict[str, float]) -> None:
        """Record values that depend on the machine."""
        self._write("timing", update, values)

    def skipped(self, update: int, slots: list[list[str]]) -> None:
        """Record the paths of an update's images, by slot: it was not applied."""
        if self.files:
            record = json.dumps({"update": update, "slots": slots})
            self.files["skipped"].write(record + "\n")

    def _write(self, name: str, update: int, values: dict[str, float]) -> None:
        if not self.files:
            return
        self.files[name].write(json.dumps({"update": update, **values}) + "\n")
        for tag, value in values.items():
            self.board.add_scalar(tag, value, update)

    def close(self) -> None:
        """Flush and close every file."""
        for file in self.files.values():
            file.close()
        if self.files:
            self.board.close()


def _cut_records(path: Path, update: int) -> None:
    """Drop the records of later updates than `update` and a line that a kill left unfinished."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= update]
    if len(kept) < len(lines):
        write_atomically(path, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a kill, finds the old or the new content and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
