"""Data loaders: samples to batches by torch's DataLoader, whose workers change only the speed."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, default_collate

from data.dataset import BadFile, EvalSample, LoadedDataset, TrainSample
from data.samplers import ReadAheadSampler, ShardSampler, TrainBatchSampler
from data.workers import (
    TrackedDataset,
    WorkerStopped,
    explain,
    install_sigchld_handler,
    is_timeout,
    signals_after_start,
    start_worker,
    without_traceback,
)
from utils.errors import DataError, StorageError
from utils.machine import explain_limits


class TrainBatch(NamedTuple):
    """A micro-batch: images uint8 [B, 3, H, W] (channels last), labels int64 [B], substituted files.

    `ops` [B, layers, 2] is what is left of RandAugment to the device; without AUG.ON_DEVICE there are no layers.
    """

    images: torch.Tensor
    labels: torch.Tensor
    bad: list[BadFile]
    ops: torch.Tensor


class EvalBatch(NamedTuple):
    """Images uint8 [B, 3, H, W] (channels last), labels int64 [B], dataset positions int64 [B].

    `bad` are the files that could not be read: their images are black, their labels `NO_LABEL`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    bad: list[BadFile]


class Loader(DataLoader):
    """A DataLoader that raises a worker's DataError or StorageError as one line.

    A worker that dies or hangs is a DataError too, which names the image that it was reading. Too many open files and a
    full /dev/shm are a StorageError. If workers die because the run is asked to stop, the batches that it still asks
    for are loaded without them.

    patience: seconds without a batch after which workers hang; 0: no limit.
    """

    def __init__(self, dataset: TrackedDataset, *, patience: float, **options):
        # Ticks are counted, not the clock: a job that was paused for a while does not hang.
        super().__init__(dataset, timeout=min(1.0, patience / 10), **options)
        self.patience = patience

    def __iter__(self) -> Iterator:
        done = 0
        try:
            if self.dataset.death is not None:
                raise self.dataset.death
            with explain_limits():
                with signals_after_start():
                    batches = super().__iter__()
                install_sigchld_handler()
                while (batch := self._next(batches)) is not None:
                    done += 1
                    yield batch
            return
        except WorkerStopped:
            pass
        except (DataError, StorageError) as error:
            # The traceback is a cycle that keeps the workers until the garbage collector meets it, then
            # waits 5 s for them.
            error.with_traceback(None)
            raise without_traceback(error) from None
        for samples in itertools.islice(self.batch_sampler, done, None):
            yield self.collate_fn([self.dataset[sample] for sample in samples])

    def _next(self, batches: Iterator) -> TrainBatch | EvalBatch | None:
        """The next of `batches`, None after the last."""
        quiet = 0.0
        while True:
            self.dataset.waiting = True
            try:
                if self.dataset.death is not None:
                    raise self.dataset.death
                return next(batches, None)
            except (RuntimeError, OSError, EOFError) as raised:
                error = raised
            finally:
                self.dataset.waiting = False
            if not is_timeout(error):
                raise explain(error, self.dataset, batches) from None
            quiet += self.timeout
            if quiet >= self.patience:
                raise self.dataset.worker_hang(self.patience)


def train_loader(
    dataset: LoadedDataset,
    sampler: TrainBatchSampler,
    *,
    num_workers: int,
    timeout: float,
    pin_memory: bool = False,
) -> Loader:
    """One `TrainBatch` per micro-batch of `sampler`, in its order.

    timeout: seconds without a batch after which a worker is reported as hung (DataError); 0: no limit.
    """
    return _loader(dataset, sampler, _collate_train, num_workers, pin_memory, timeout)


def eval_loader(
    dataset: LoadedDataset,
    sampler: ShardSampler,
    *,
    num_workers: int,
    timeout: float,
    pin_memory: bool = False,
) -> Loader:
    """One `EvalBatch` per batch of `sampler`; may be iterated again, its workers stay."""
    return _loader(dataset, sampler, _collate_eval, num_workers, pin_memory, timeout)


def _loader(
    dataset: LoadedDataset,
    sampler: TrainBatchSampler | ShardSampler,
    collate: Callable,
    num_workers: int,
    pin_memory: bool,
    timeout: float,
) -> Loader:
    return Loader(
        TrackedDataset(dataset, num_workers),
        batch_sampler=ReadAheadSampler(sampler, num_workers),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        patience=timeout if num_workers else 0.0,
        worker_init_fn=start_worker,
        # By default every iterator draws a seed from the global generator: one more evaluation would
        # change the training after it.
        generator=torch.Generator(),
    )


def _collate_train(samples: list[TrainSample]) -> TrainBatch:
    images, labels, bad, ops = zip(*samples, strict=True)
    return TrainBatch(_stack(images), torch.tensor(labels), _flat(bad), torch.stack(ops))


def _collate_eval(samples: list[EvalSample]) -> EvalBatch:
    images, labels, indices, bad = zip(*samples, strict=True)
    return EvalBatch(_stack(images), torch.tensor(labels), torch.tensor(indices), _flat(bad))


def _flat(bad: tuple[list[BadFile], ...]) -> list[BadFile]:
    return [file for files in bad for file in files]


def _stack(images: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """B times [3, H, W] to [B, 3, H, W], copied in the order in which pictures lie: [H, W, 3]."""
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
