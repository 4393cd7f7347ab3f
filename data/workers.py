"""What is each loader worker doing? TrackedDataset, so that one that dies or hangs is named with the image it was reading."""

import os
import re
import signal
import time
import weakref
from types import FrameType

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torch.utils.data import Dataset, get_worker_info

from data.dataset import EvalSample, ImageDataset, TrainSample
from utils.errors import DataError

IDLE = -1

_noted: "weakref.WeakSet[TrackedDataset]" = weakref.WeakSet()
_torch_handler = None


class TrackedDataset(Dataset):
    """The samples of `dataset`, of which each worker notes which one it reads, in memory that all processes share."""

    def __init__(self, dataset: ImageDataset, num_workers: int):
        self.dataset = dataset
        self.notes = torch.full((num_workers, 3), IDLE, dtype=torch.float64)  # pid, index, since
        self.notes.share_memory_()
        _noted.add(self)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | tuple[int, int]) -> TrainSample | EvalSample:
        worker = get_worker_info()
        if worker is None:
            return self.dataset[item]
        index = item if isinstance(item, int) else item[1]
        self.notes[worker.id, 1:] = torch.tensor([index, time.monotonic()], dtype=torch.float64)
        sample = self.dataset[item]
        self.notes[worker.id, 1] = IDLE
        return sample

    def worker_hang(self, timeout: float) -> DataError:
        """That no batch came for `timeout` seconds, with the worker that reads longest and its image."""
        reading = [note for note in self.notes.tolist() if note[1] != IDLE]
        if not reading:
            return DataError(
                f"no batch came for {timeout:g} s, and no loader worker reads an image"
            )
        pid, index, since = min(reading, key=lambda note: note[2])
        return DataError(
            f"no batch came for {timeout:g} s: a loader worker (process {pid:.0f}) has been reading "
            f"{self._image(index)} for {time.monotonic() - since:.0f} s. Look at that file and its disk."
        )

    def worker_death(self, pids: list[int]) -> DataError | None:
        """That one of this dataset's workers, which is among `pids`, died, with its image."""
        for pid, index, _ in self.notes.tolist():
            if pid in pids:
                doing = "idle" if index == IDLE else f"reading {self._image(index)}"
                return DataError(
                    f"a loader worker (process {pid:.0f}) died while {doing}. Look at that file; "
                    "where memory ran out, lower the number of workers."
                )
        return None

    def _image(self, index: float) -> str:
        return f"{self.dataset.path(int(index))} (sample {index:.0f})"


def start_worker(number: int) -> None:
    """Make worker `number`, of a loader of `TrackedDataset`, end with its process and with nothing else."""
    get_worker_info().dataset.notes[number, 0] = os.getpid()
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    os.setpgrp()  # a signal to all, as Ctrl-C, is for the process that decides


def install_sigchld_handler() -> None:
    """Let a DataError tell of a dead worker; to be called when torch's own handler is set, that is with workers.

    torch's raises a RuntimeError with no more than the worker's number, wherever the main thread is.
    """
    global _torch_handler
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and handler is not _on_death:
        _torch_handler = handler
        signal.signal(signal.SIGCHLD, _on_death)


def explain(error: RuntimeError) -> Exception:
    """`error` as a DataError if it is torch's about dead workers that are known here, else as it is."""
    told = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
    pids = [int(pid) for pid in told[1].split(",")] if told else []
    return next(filter(None, (noted.worker_death(pids) for noted in _noted)), error)


def _on_death(number: int, frame: FrameType | None) -> None:
    try:
        _torch_handler(number, frame)
    except RuntimeError as error:
        raise explain(error) from None
