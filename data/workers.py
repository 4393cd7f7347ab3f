"""Loader workers: their start and end, and errors that name the image a dead or hanging worker was reading.

A signal that asks the run to stop may be sent to all processes of a job. Workers ignore it, or pass it on to the run.

All that depends on the inside of torch's DataLoader is in this file, below a banner.
"""

import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.dataset import EvalSample, LoadedDataset, TrainSample, image_index
from data.samplers import Batch
from utils import signals
from utils.errors import DataError, StorageError, UserError
from utils.machine import Shortage, find_shortage, shorten_socket_paths

IDLE = -1
NOTICE = 2.0  # seconds in which the system reports a process that has died


class WorkerStopped(Exception):
    """A loader worker has ended because the run is asked to stop: without workers it reaches the end of the step."""


class TrackedDataset(Dataset):
    """The samples of `dataset`; each worker notes which one it reads in memory that all processes share.

    death: why workers are dead, None while they live.
    waiting: whether the main thread waits for a batch of them.
    """

    def __init__(self, dataset: LoadedDataset, num_workers: int):
        self.dataset = dataset
        self.death: WorkerStopped | UserError | None = None
        self.waiting = False
        # pid, index, since, limit of the machine that ended it
        self.notes = torch.full((num_workers, 4), IDLE, dtype=torch.float64)
        self.notes.share_memory_()
        _tracked.add(self)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | tuple[int, int, int]) -> TrainSample | EvalSample:
        worker = get_worker_info()
        if worker is None:
            return self.dataset[item]
        self.notes[worker.id, 1:3] = torch.tensor(
            [image_index(item), time.monotonic()], dtype=torch.float64
        )
        sample = self.dataset[item]
        self.notes[worker.id, 1] = IDLE
        return sample

    def __getitems__(self, batch: Batch) -> list[TrainSample | EvalSample]:
        self.dataset.prefetch(batch.ahead)
        return [self[item] for item in batch]

    def worker_hang(self, timeout: float) -> DataError:
        """The error for no batch in `timeout` seconds: the worker that reads longest, and its image."""
        reading = [note for note in self.notes.tolist() if note[1] != IDLE]
        if not reading:
            return DataError(
                f"no batch came for {timeout:g} s, and no loader worker reads an image"
            )
        pid, index, since, _ = min(reading, key=lambda note: note[2])
        return DataError(
            f"no batch came for {timeout:g} s: a loader worker (process {pid:.0f}) has been reading "
            f"{self._image(index)} for {time.monotonic() - since:.0f} s. Look at that file and its disk."
        )

    def note_death(self, pid: int, signal_number: int) -> None:
        """Note that the worker `pid` has died, by a signal or, with 0, of itself or for an unknown reason."""
        if self.death is not None:
            return
        ((_, index, _, shortage),) = (note for note in self.notes.tolist() if note[0] == pid)
        if signal_number in signals.SIGNALS:
            self.death = WorkerStopped()
            os.kill(os.getpid(), signal_number)
        elif signals.is_stopping():
            self.death = WorkerStopped()
        elif shortage != IDLE:
            self.death = StorageError(str(Shortage(int(shortage))))
        else:
            doing = "idle" if index == IDLE else f"reading {self._image(index)}"
            self.death = DataError(
                f"a loader worker (process {pid}) died while {doing}. Look at that file; "
                "where memory ran out, lower the number of workers."
            )

    def has_worker(self, pid: int) -> bool:
        """Whether the process `pid` is one of the workers."""
        return pid in self.notes[:, 0].tolist()

    def _image(self, index: float) -> str:
        return f"{self.dataset.path(int(index))} (sample {index:.0f})"


_tracked: "weakref.WeakSet[TrackedDataset]" = weakref.WeakSet()


def start_worker(number: int) -> None:
    """Make worker `number`, of a loader of `TrackedDataset`, end with its process and with nothing else.

    And where a batch cannot be handed over: torch would drop it, and its loader wait for it.
    """
    get_worker_info().dataset.notes[number, 0] = os.getpid()
    shorten_socket_paths()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    os.setpgrp()  # a signal to all, as Ctrl-C, is for the process that decides
    signal.set_wakeup_fd(-1)
    for stop in signals.SIGNALS:
        if stop != signal.SIGTERM:  # torch ends its workers by SIGTERM
            signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)


@contextmanager
def signals_after_start() -> Iterator[None]:
    """Around the start of workers: signals to them wait until `start_worker` is done, and those to this process too."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _end_worker(error: Exception, batch: object) -> None:
    """End this worker because `batch` cannot be handed over, with the limit of the machine that was met in its note."""
    worker, shortage = get_worker_info(), find_shortage(error)
    if shortage is None:
        print(f"a loader worker cannot hand over a batch: {error!r}", file=sys.stderr, flush=True)
    else:
        worker.dataset.notes[worker.id, 3] = shortage.value
    os._exit(1)


# --- Depends on torch 2.11 … 2.14: its SIGCHLD handler and the texts of its errors ----------------

_torch_handler = None
_SIGNAL_NAMES = {signal.strsignal(number): number for number in signal.valid_signals()}
# What an iterator that fails while it starts its workers lacks when it is deleted: it has nothing to shut down.
_MultiProcessingDataLoaderIter._shutdown = True
_MultiProcessingDataLoaderIter._workers = _MultiProcessingDataLoaderIter._index_queues = ()
_MultiProcessingDataLoaderIter._worker_pids_set = False
_MultiProcessingDataLoaderIter._workers_done_event = threading.Event()


def install_sigchld_handler() -> None:
    """Note when a worker dies, and raise only where its batch is waited for; call it after torch has set its handler.

    torch sets it when workers start. It raises a RuntimeError with no more than the worker's number, wherever the main
    thread is, so perhaps inside of a step of the optimizer.
    """
    global _torch_handler
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and handler is not _on_sigchld:
        _torch_handler = handler
        signal.signal(signal.SIGCHLD, _on_sigchld)


def explain(error: Exception, dataset: TrackedDataset, batches: Iterator) -> Exception:
    """What `error`, in receiving one of torch's `batches` of `dataset`, means where a worker is dead; else `error`."""
    if (shortage := find_shortage(error)) is not None:
        return StorageError(str(shortage))
    # A worker that died before torch watched it has its signal in its exit code alone.
    for worker in getattr(batches, "_workers", ()):
        if (worker.exitcode or 0) < 0 and dataset.has_worker(worker.pid):
            dataset.note_death(worker.pid, -worker.exitcode)
    _note_death(error)
    deadline = time.monotonic() + NOTICE
    # A batch lies in the memory of its worker: that this is gone is seen before that the worker is.
    while dataset.death is None and isinstance(error, (OSError, EOFError)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return dataset.death or error


def _note_death(error: Exception) -> TrackedDataset | None:
    """Note a death that torch reports with the dataset whose worker has died; None if `error` is another one."""
    match = re.match(
        r"DataLoader worker \(pid(?:\(s\))? (\d+).*?(?:killed by signal: (.*?)\. |$)", str(error)
    )
    if match is None:
        return None
    pid, number = int(match[1]), _SIGNAL_NAMES.get(match[2], 0)
    dataset = next((dataset for dataset in _tracked if dataset.has_worker(pid)), None)
    if dataset is not None:
        dataset.note_death(pid, number)
    return dataset


def is_timeout(error: Exception) -> bool:
    """Whether `error` is torch's about a batch that did not come in time."""
    return "DataLoader timed out" in str(error)


def without_traceback(error: UserError) -> UserError:
    """A worker's error with its message alone: torch puts the worker's traceback in front of it."""
    kind = type(error)
    return kind(str(error).rsplit(f"{kind.__name__}: ", 1)[-1].strip())


def _on_sigchld(number: int, frame: FrameType | None) -> None:
    raised = None
    while True:  # torch reports one loader at a time, once each
        try:
            _torch_handler(number, frame)
        except RuntimeError as error:
            dataset = _note_death(error)
            if dataset is None or dataset.waiting:
                raised = error
        else:
            break
    if raised is not None:
        raise raised
