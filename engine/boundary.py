"""What happens between two updates? The state is saved when due; where all agree, the run ends or goes back."""

from collections.abc import Iterator
from dataclasses import dataclass

from data import EvalBatch, Loader
from engine import checkpoint
from engine.checkpoint import Saver, TrainState
from engine.divergence import Divergence, last_sound
from engine.folder import RunFolder
from engine.stop import StopRequest
from engine.watchdog import Watchdog
from utils import distributed
from utils.distributed import Process
from utils.errors import DivergedError, StopRequested
from utils.logging import MetricWriter, logger


@dataclass
class Boundary:
    """Called after every update, on every process."""

    state: TrainState
    facts: dict  # what a checkpoint tells beside the state
    folder: RunFolder
    saver: Saver
    save_every: int  # updates; 0: only after epochs
    updates_per_epoch: int
    stop: StopRequest
    divergence: Divergence
    watchdog: Watchdog
    writer: MetricWriter
    process: Process
    gone_back: bool = False

    def __call__(self) -> None:
        """Tell of a skipped update, end the run if it was asked to, save if it is time."""
        if self.state.skipped:
            self.divergence.note(self.state, self.writer)
        self.end_if_asked()
        inside = self.state.update % self.updates_per_epoch > 0  # an epoch's end is saved validated
        if self.save_every and inside and self.state.update % self.save_every == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, in the background."""
        if self.process.is_main:
            self.writer.flush()
            self.saver.save(self.state, self.facts)
            if self.saver.failures:
                failures = {"checkpoint/failures": self.saver.failures}
                self.writer.timing(self.state.update, failures)
        self.report()

    def report(self) -> None:
        """Tell in status.json how far the run is."""
        self.folder.report(
            "running",
            epoch=self.state.epoch,
            update=self.state.update,
            best=self.state.best,
            failed_saves=self.saver.failures,
        )

    def end_if_asked(self) -> None:
        """Raise StopRequested, the state being saved, where any process was asked to stop."""
        reason = self.stop.reason()
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

    def go_back(self, error: DivergedError) -> None:
        """Restore the last checkpoint without skipped updates; raise `error` where there is none, or the second time.

        The updates after it are the same again. They succeed where the machine was at fault, or fp16's loss scale.
        """
        self.saver.wait()
        distributed.barrier()  # the first process has written what all read
        sound = None if self.gone_back else last_sound(self.saver.folder)
        if sound is None:
            raise error
        logger.warning(f"{error} Once, the run goes back to {sound}.")
        checkpoint.restore(sound, self.state)
        self.writer.rewind(self.state.update, self.state.epoch)
        self.gone_back = True


class Interruptible:
    """The batches of an evaluation, cut short where this process is asked to stop.

    After the last one, which every process reaches, although they may have different numbers of them, all agree on
    whether the run ends: the evaluation is then done again when it goes on.
    """

    def __init__(self, loader: Loader, boundary: Boundary):
        self.dataset = loader.dataset
        self._loader = loader
        self._boundary = boundary

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        for batch in self._boundary.watchdog.watch(self._loader):
            yield batch
            if self._boundary.stop.asked:
                break
        self._boundary.end_if_asked()
