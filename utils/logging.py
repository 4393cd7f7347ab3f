"""Log and metrics of a run: console, log.txt, metrics.jsonl, timing.jsonl, skipped.jsonl, TensorBoard."""

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from utils.bottleneck import PHASES
from utils.errors import StorageError
from utils.files import read_again, storage_remedy, sync, write_atomically
from utils.first_edition import translate_record

if TYPE_CHECKING:  # a refused command need not wait for it
    import numpy as np

logger = logging.getLogger("dat")

# TensorBoard: charts of several curves, and the results beside the settings.
LAYOUT = {
    "Training": {
        "loss": ["Multiline", ["train/loss", "val/loss", "val_ema/loss"]],
        "top-1 in %": ["Multiline", ["val/acc1", "val_ema/acc1"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
    },
    "Offsets": {
        name: ["Multiline", [f"offsets/stage{stage}_{quantity}" for stage in range(1, 5)]]
        for quantity, name in (
            ("pixels", "mean length in pixels"),
            ("outside", "share outside or clamped"),
            ("coverage", "share of cells that are read"),
            ("distance", "distance between groups in pixels"),
        )
    },
    "Speed": {
        "images per second": ["Multiline", ["time/images_per_s"]],
        "share of the time": ["Multiline", [f"time/{phase}" for phase in PHASES]],
    },
}
RESULTS = ("val/acc1", "val_ema/acc1", "val/loss")


class _Console(logging.Handler):
    """Writes above the progress bar instead of through it; drops the line where the output's disk is full."""

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
    logging.raiseExceptions = False  # otherwise every line on a full disk is a traceback
    who = name if rank == 0 else f"{name} rank {rank}"
    line = logging.Formatter(
        f"[%(asctime)s {who}] (%(filename)s %(lineno)d): %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    handlers: list[logging.Handler] = [_Console()]
    if folder is not None:
        try:
            handlers.append(logging.FileHandler(folder / "log.txt", encoding="utf-8"))
        except OSError as error:
            raise StorageError(
                f"{folder / 'log.txt'} cannot be written: {error.strerror}. {storage_remedy(error)}"
            ) from error
    for handler in handlers:
        handler.setFormatter(line)
    logger.handlers = handlers


class MetricWriter:
    """Numbers of a run by step: deterministic ones to metrics.jsonl, times to timing.jsonl, all to TensorBoard.

    The images of steps that were not applied go to skipped.jsonl.

    Records beyond `step` and `epoch` are cut off first, so that a resumed run's files have each step once and, for
    the deterministic ones, the bytes of a run that was never stopped. There is a record `every` so many steps, so
    missing ones are noticed; so are the evaluations, `eval_every` so many epochs (0: not known). On a full disk,
    records wait in memory. On any process but the first (`folder` None) nothing is written. Raises StorageError.
    """

    def __init__(
        self,
        folder: Path | None,
        step: int,
        epoch: int,
        every: int,
        hparams: dict[str, bool | int | float | str] | None = None,
        eval_every: int = 0,
    ):
        self._folder = folder
        self._hparams = hparams or {}
        self._every = every
        self._eval_every = eval_every
        self._files: dict[str, io.FileIO] = {}
        self._waiting = {"metrics": b"", "timing": b"", "skipped": b""}
        self._board = None
        self.rewind(step, epoch)

    def rewind(self, step: int, epoch: int) -> None:
        """Continue after `step`, with `epoch` epochs completed: the records beyond are cut off.

        Among them is the evaluation of an epoch that was trained and not completed: it is repeated.
        """
        self.close()
        if self._folder is None:
            return
        # It takes a second to import, which is paid by one process only.
        from torch.utils.tensorboard import SummaryWriter

        try:
            for name in self._waiting:
                path = self._path(name)
                last = _cut_records(path, step, epoch)
                if name == "metrics" and last < step // self._every * self._every:
                    logger.warning(f"{path} lacks records of steps {last + 1} to {step}")
                if name != "skipped" or path.exists():  # few runs skip a step
                    self._files[name] = path.open("ab", buffering=0)
            self._report_missing_evaluation(epoch)
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)
            self._draw(self._describe)
        except OSError as error:
            raise StorageError(f"{self._folder}: its records cannot be written: {error}") from error

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _report_missing_evaluation(self, epoch: int) -> None:
        if not self._eval_every:
            return
        path, evaluated = self._path("metrics"), epoch // self._eval_every * self._eval_every
        records = map(_read_record, read_again(path.read_bytes).splitlines(keepends=True))
        if max((record.epoch for record in records if record), default=0) < evaluated:
            logger.warning(f"{path} lacks the evaluation of epoch {evaluated}")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record values that depend on the seed alone."""
        self._write("metrics", step, values)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Record values that depend on the machine."""
        self._write("timing", step, values)

    def skipped(self, step: int, micro_batches: list[list[str]]) -> None:
        """Record the paths of a step's images, by micro-batch: it was not applied."""
        self._write("skipped", step, {"micro_batches": micro_batches})

    def pictures(self, step: int, pictures: dict[str, "np.ndarray"]) -> None:
        """Show pictures (H, W, 3) uint8 in TensorBoard."""
        self._draw(
            lambda board: [
                board.add_image(tag, pixels, step, dataformats="HWC")
                for tag, pixels in pictures.items()
            ]
        )

    def _describe(self, board: object) -> None:
        """Tell TensorBoard which curves belong together, and the run's settings."""
        # Not the writer's own add_hparams, which begins a run of its own.
        from torch.utils.tensorboard.summary import hparams

        board.add_custom_scalars(LAYOUT)
        for summary in hparams(self._hparams, dict.fromkeys(RESULTS, 0.0)):
            board.file_writer.add_summary(summary)

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
        """Do `action` with TensorBoard's writer, which is dropped when it fails: the records hold the same numbers."""
        try:
            if self._board is not None:
                action(self._board)
        except OSError as error:
            logger.warning(f"TensorBoard's file is not written any more: {error}")
            self._board = None

    def _append(self, name: str) -> None:
        """Write the records that wait, as far as there is room."""
        try:
            while waiting := self._waiting[name]:
                if name not in self._files:
                    self._files[name] = self._path(name).open("ab", buffering=0)
                self._waiting[name] = waiting[self._files[name].write(waiting) :]
        except OSError as error:
            if waiting.count(b"\n") == 1:  # the first record that waits
                logger.warning(
                    f"{name}.jsonl cannot be written, its records wait: {error.strerror}"
                )

    def flush(self) -> None:
        """Write every record so far to its file, before a checkpoint that is ahead of them is saved."""
        for name in self._waiting:
            self._append(name)
        self._draw(lambda board: board.flush())

    def sync(self) -> None:
        """Bring the records in the files to the disk, with the names of all files beside them. Raises StorageError.

        A checkpoint that follows is never ahead of them. Other threads may call it.
        """
        if self._folder is None:
            return
        try:
            for name in list(self._files):
                sync(self._path(name))
            sync(self._folder)
        except OSError as error:
            raise StorageError(
                f"{self._folder}: the records could not be written ({error.strerror}). {storage_remedy(error)}"
            ) from error

    def close(self) -> None:
        """Flush and close every file. Raises StorageError where that fails or records could not be written."""
        self.flush()
        self._draw(lambda board: board.close())
        failures = [f"{name}.jsonl" for name, waiting in self._waiting.items() if waiting]
        for name, file in self._files.items():
            try:
                file.close()  # where some network disks report that they are full
            except OSError as error:
                failures.append(f"{name}.jsonl ({error.strerror})")
        self._files = {}
        if failures:
            raise StorageError(
                f"The last records of the run could not be written to {', '.join(failures)}. Make room."
            )


def _cut_records(path: Path, step: int, epoch: int) -> int:
    """Drop the records beyond `step` and `epoch` and a line that a kill left unfinished; the last one's step.

    Records of old runs get today's names, so that the file is uniform.
    """
    lines = read_again(path.read_bytes).splitlines(keepends=True) if path.exists() else []
    records = [_read_record(line) for line in lines]
    kept = [
        record for record in records if record and record.step <= step and record.epoch <= epoch
    ]
    if None in records[:-1]:
        logger.warning(f"{path}: {records[:-1].count(None)} damaged records are dropped")
    content = [record.line for record in kept]
    if content != lines:
        write_atomically(path, b"".join(content))
    return kept[-1].step if kept else 0


class _Record(NamedTuple):
    """A line of a record file under today's names, its step, and its epoch or 0."""

    line: bytes
    step: int
    epoch: int


def _read_record(line: bytes) -> _Record | None:
    """The record in `line`; None where it is damaged or unfinished."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line.decode())
        if (translated := translate_record(record)) != record:
            record, line = translated, (json.dumps(translated) + "\n").encode()
        return _Record(line, int(record["step"]), int(record.get("epoch", 0)))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
