"""What happens between two steps? The state is saved when due; where all agree, the run ends or goes back."""

from collections.abc import Iterator
from dataclasses import dataclass

from data import EvalBatch, Loader
from engine import checkpoint
from engine.checkpoint import Saver, TrainState
from engine.divergence import Divergence, latest_finite
from engine.run_dir import RunDir
from utils import distributed
from utils.distributed import Process
from utils.errors import DivergedError, StopRequested
from utils.logging import MetricWriter, logger
from utils.signals import StopRequest
from utils.watchdog import Watchdog


@dataclass
class AfterStep:
    """Called after every step, on every process."""

    state: TrainState
    metadata: dict  # what a checkpoint tells beside the state
    folder: RunDir
    saver: Saver
    save_every: int  # steps; 0: only after epochs
    steps_per_epoch: int
    stop: StopRequest
    divergence: Divergence
    watchdog: Watchdog
    writer: MetricWriter
    process: Process
    rolled_back: bool = False

    def __call__(self) -> None:
        """Tell of a skipped step, end the run if it was asked to, save if it is time."""
        if self.state.skipped:
            self.divergence.note(self.state, self.writer)
        self.end_if_asked()
        inside = self.state.step % self.steps_per_epoch > 0  # an epoch's end is saved validated
        if self.save_every and inside and self.state.step % self.save_every == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, in the background."""
        if self.process.is_main:
            self.writer.flush()
            self.saver.save(self.state, self.metadata)
            if self.saver.failures:
                failures = {"checkpoint/failures": self.saver.failures}
                self.writer.timing(self.state.step, failures)
        self.report()

    def report(self) -> None:
        """Tell in status.json how far the run is."""
        self.folder.write_status(
            "running",
            epoch=self.state.epoch,
            step=self.state.step,
            best=self.state.best,
            failed_saves=self.saver.failures,
        )

    def end_if_asked(self) -> None:
        """Raise StopRequested, the state being saved, where any process was asked to stop."""
        reason = self.stop.agree()
        if reason is None:
            return
        self.save()
        self.finish()
        raise StopRequested(f"{reason}; saved. Start the same command again to go on.")

    def finish(self) -> None:
        """Wait until what was saved is on the disk: a launcher may kill the others when one process has ended."""
        self.watchdog.stop()
        self.writer.close()
        self.saver.wait()
        distributed.barrier()

    def rollback(self, error: DivergedError) -> None:
        """Restore the last checkpoint without skipped steps; raise `error` where there is none, or the second time.

        The steps after it are the same again. They succeed where the machine was at fault, or fp16's loss scale.
        """
        self.saver.wait()
        distributed.barrier()  # the first process has written what all read
        sound = None if self.rolled_back else latest_finite(self.saver.folder)
        if sound is None:
            raise error
        logger.warning(f"{error} Once, the run goes back to {sound}.")
        checkpoint.restore(sound, self.state)
        self.writer.rewind(self.state.step, self.state.epoch)
        self.rolled_back = True


class InterruptibleLoader:
    """The batches of an evaluation, cut short where this process is asked to stop.

    After the last one, which every process reaches, although they may have different numbers of them, all agree on
    whether the run ends: the evaluation is then done again when it goes on.
    """

    def __init__(self, loader: Loader, after_step: AfterStep):
        self.dataset = loader.dataset
        self._loader = loader
        self._boundary = after_step

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        for batch in self._boundary.watchdog.watch(self._loader):
            yield batch
            if self._boundary.stop.asked:
                break
        self._boundary.end_if_asked()
