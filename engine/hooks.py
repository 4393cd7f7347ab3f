"""Hooks after a step: periodic checkpoints, stop requests, steps without a finite gradient, rollback."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data import EvalBatch, ImageDataset, Loader, TrainBatchSampler
from engine import checkpoint, compat
from engine.agreement import Replicas, send_state
from engine.checkpoint import Saver
from engine.results import StepResults
from engine.run_dir import RunDir
from engine.state import TrainState
from utils import distributed
from utils.distributed import Process, all_reduce_max, limit_waiting, on_main
from utils.errors import DivergedError, StopRequested
from utils.logging import MetricWriter, logger
from utils.signals import StopRequest
from utils.watchdog import Watchdog

# --- After a step ---------------------------------------------------------------------------------


@dataclass
class AfterStep:
    """Called after every step, on every process."""

    state: TrainState
    replicas: Replicas
    metadata: dict  # of the checkpoints
    run_dir: RunDir
    saver: Saver
    save_steps: int  # steps from one checkpoint to the next; 0: only after epochs
    steps_per_epoch: int
    stop: StopRequest
    divergence: "Divergence"
    watchdog: Watchdog
    writer: MetricWriter
    process: Process
    rolled_back: bool = False

    def __post_init__(self) -> None:
        self.saver.sync_records = self.writer.sync

    def start(self) -> None:
        """Write the status; from now on a request to stop waits for the end of a step."""
        self.write_status()
        self.stop.defer_to_steps()

    def __call__(self, results: StepResults) -> None:
        """Record skipped steps, end the run if a stop was requested, save if it is time.

        This step's own result is read now if something depends on it, or else after the next step.
        """
        self.read(results, keep=1)
        reason = self.stop.agree()
        inside = self.state.step % self.steps_per_epoch > 0
        # An epoch's end is saved after its validation.
        due = self.save_steps and inside and self.state.step % self.save_steps == 0
        if reason or due or not inside or self.divergence.is_near(self.state):
            self.read(results, keep=0)
        if reason:
            self.end(reason)
        if due:
            self.save()

    def read(self, results: StepResults, keep: int) -> None:
        """Read all results but the last `keep`, and record the steps that were skipped."""
        for step in results.read(keep):
            self.divergence.record(step, self.writer)
            self.divergence.raise_if_lost(step, self.state)

    def save(self) -> None:
        """Write a checkpoint, in the background, once all processes have the same state."""
        self.replicas.compare(self.state)
        if self.process.is_main:
            self.writer.flush()
            self.saver.save(self.state, self.metadata)
            if self.saver.failures:
                failures = {"checkpoint/failures": self.saver.failures}
                self.writer.timing(self.state.step, failures)
        self.write_status()

    def write_status(self) -> None:
        """Write the progress to status.json."""
        self.run_dir.write_status(
            "running",
            epoch=self.state.epoch,
            step=self.state.step,
            best=self.state.best,
            failed_saves=self.saver.failures,
        )

    def end_if_requested(self) -> None:
        """Save and raise StopRequested if any process was asked to stop."""
        reason = self.stop.agree()
        if reason is not None:
            self.end(reason)

    def end(self, reason: str) -> NoReturn:
        """Save and raise StopRequested."""
        self.save()
        self.finish()
        raise StopRequested(f"{reason}; saved. Start the same command again to resume.")

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk: a launcher may kill the others when one process has ended."""
        self.watchdog.stop()
        self.saver.wait()
        self.writer.close()
        distributed.barrier()

    def rollback(self, error: DivergedError) -> None:
        """Restore the last checkpoint without skipped steps; raise `error` if there is none, or the second time.

        The steps after it are the same as before. They succeed if the machine was at fault, or fp16's loss scale.
        Later checkpoints are deleted: a kill must not bring their steps back.
        """
        self.saver.wait()
        path = on_main(lambda: None if self.rolled_back else latest_finite(self.saver.folder))
        if path is None:
            raise error
        logger.warning(f"{error} The run rolls back to {path}, once.")
        on_main(lambda: delete_later(path))
        on_main(lambda: compat.restore(path, self.state, self.metadata))
        send_state(self.state)
        self.writer.rewind(self.state.step, self.state.epoch)
        self.rolled_back = True


class WatchedLoader:
    """The batches of an evaluation, each a sign of progress for the watchdog."""

    def __init__(self, loader: Loader, watchdog: Watchdog):
        self.dataset = loader.dataset
        self._loader = loader
        self._watchdog = watchdog

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        return self._watchdog.watch(self._loader)


class InterruptibleLoader(WatchedLoader):
    """The batches of an evaluation in a training run, cut short on a stop request.

    Processes may have different numbers of batches, but each reaches the end, where all agree on whether the run ends
    (`AfterStep.end_if_requested`); the evaluation is then repeated after the resume.
    """

    def __init__(self, loader: Loader, after_step: AfterStep):
        super().__init__(loader, after_step.watchdog)
        self._after_step = after_step

    def __iter__(self) -> Iterator[EvalBatch]:
        for batch in super().__iter__():
            yield batch
            if self._after_step.stop.requested:
                break
        self._after_step.end_if_requested()


@contextmanager
def watch_evaluation(
    loader: Loader, process: Process, hang_seconds: float
) -> Iterator[WatchedLoader]:
    """`loader` for an evaluation outside of a training run, which may be paused as that.

    On several processes a watchdog takes the place of the collectives' limit: it ends a process that made no progress
    for `hang_seconds`, and counts no time in which it was stopped.
    """
    seconds = hang_seconds if process.world_size > 1 else 0.0
    name = f"dat-hang-rank{process.rank}-{os.getpid()}.txt"
    file = Path(tempfile.gettempdir(), name)
    with Watchdog(seconds, file, logger.error) as watchdog:
        watchdog.beat()
        limit_waiting(0)
        try:
            yield WatchedLoader(loader, watchdog)
        finally:
            limit_waiting(2 * hang_seconds)


# --- Divergence -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """What becomes of steps without a finite gradient: they are recorded, and too many in a row end the run."""

    limit: int  # steps in a row
    folder: Path  # of the run
    metadata: dict  # of its checkpoints
    dataset: ImageDataset
    sampler: TrainBatchSampler
    process: Process

    def is_near(self, state: TrainState) -> bool:
        """Whether the run must not make another step before the last one is known to have been applied."""
        return state.skipped + 1 >= self.limit or not state.skips_on_device

    def record(self, step: int, writer: MetricWriter) -> None:
        """Write the images of the skipped `step` to skipped.jsonl."""
        writer.skipped(step, images_of(step - 1, self.dataset, self.sampler))

    def raise_if_lost(self, step: int, state: TrainState) -> None:
        """Raise DivergedError after `limit` skipped steps in a row, or if one left NaN in a buffer such as BatchNorm's.

        The state before the step is written to `diverged-<n>`, a directory like a checkpoint, to be replayed. A
        collective: every process has to call it.
        """
        ruined = all_reduce_max(int(any(b.isnan().any() for b in state.model.buffers())))
        if state.skipped < self.limit and not ruined:
            return
        name = f"diverged-{step - 1}"
        if self.process.is_main:
            before = dataclasses.replace(state, step=step - 1, skipped=state.skipped - 1)
            if (self.folder / name).exists():  # from before the rollback, or an earlier start
                shutil.rmtree(self.folder / name)
            checkpoint.write(self.folder, name, checkpoint.snapshot(before, self.metadata))
        raise DivergedError(
            f"step {step}: the gradient was not finite, {state.skipped} times in a row. "
            f"Find out where it begins with python tools/replay.py {self.folder / name}. Then lower TRAIN.BASE_LR, "
            "use --amp-dtype bfloat16 or repair the images in skipped.jsonl, and start the same command again."
        )


def images_of(step: int, dataset: ImageDataset, sampler: TrainBatchSampler) -> list[list[str]]:
    """The paths of the images of a step, by micro-batch."""
    numbers = range(sampler.global_batch_size // sampler.batch_size)
    batches = [sampler.micro_batch(step, number) for number in numbers]
    return [[dataset.path(index) for _, index, _ in batch] for batch in batches]


def delete_later(path: Path) -> None:
    """Delete the checkpoints beside `path` of later steps."""
    found = checkpoint.list_checkpoints(path.parent)  # the latest first
    for later in found[: found.index(path)]:
        checkpoint.delete(later)


def latest_finite(folder: Path) -> Path | None:
    """The latest valid checkpoint in `folder` whose last step was not skipped."""
    for path in checkpoint.list_checkpoints(folder):
        damage = checkpoint.verify(path)
        if damage is None and checkpoint.read_metadata(path)["skipped"] == 0:
            return path
    return None
