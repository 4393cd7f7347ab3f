"""Batch samplers: which images a process reads, in what order.

The order is a function of the seed and the position: nothing to save, and resuming costs nothing.
A micro-batch has `batch_size` images; a step has `micro_batches` of them, distributed evenly over the processes.
"""

import math
from collections import deque
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
from torch.utils.data import Sampler

from utils.errors import DataError
from utils.rng import key, permutation

READ_AHEAD = 64  # images of a worker, at least: they take longer to decode than a server to answer


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Steps in one pass over the training set; the incomplete last one is dropped.

    Raises DataError if there is none.
    """
    if num_samples < global_batch_size:
        raise DataError(
            f"the training set has {num_samples} images, a step takes {global_batch_size}; "
            f"expected at least one step per epoch, set the global batch size to {num_samples} "
            "or less"
        )
    return num_samples // global_batch_size


class TrainBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """The micro-batches of one process from the first step to the last, each a list of (epoch, index, repeat).

    The `micro_batches` of a step, a multiple of `world_size`, go to the processes in contiguous runs; they
    come step by step from `start_step` to `total_steps`, without a break between epochs.

    repeats: how often a step holds each of its images (repeated augmentation, Hoffer et al. 2020, as in DeiT and
    timm's RepeatAugSampler): an epoch has its number of steps, with the first 1 / `repeats` of its images in them.
    The repeats of an image are in different micro-batches, where there are so many.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        micro_batches: int,
        total_steps: int,
        seed: int,
        repeats: int = 1,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch(num_samples, batch_size * micro_batches)
        self.global_batch_size = batch_size * micro_batches
        self.steps = range(start_step, total_steps)
        self.own_micro_batches = range(
            rank * micro_batches // world_size, (rank + 1) * micro_batches // world_size
        )
        self.seed = seed
        self.repeats = repeats
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.steps) * len(self.own_micro_batches)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in self.steps:
            for micro_batch in self.own_micro_batches:
                yield self.micro_batch(step, micro_batch)

    def micro_batch(self, step: int, micro_batch: int) -> list[tuple[int, int, int]]:
        """The (epoch, index, repeat) of any micro-batch of any step, whichever process has it."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        if self.repeats == 1:
            places = start + micro_batch * self.batch_size + np.arange(self.batch_size)
        else:  # dealt out, so that the repeats of an image, which are neighbours, part
            count = self.global_batch_size // self.batch_size
            places = start + micro_batch + count * np.arange(self.batch_size)
        places, repeats = np.divmod(places, self.repeats)
        indices = self._epoch_order(epoch)[places]
        return [(epoch, *pair) for pair in zip(indices.tolist(), repeats.tolist(), strict=True)]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._order = permutation(self.num_samples, key(self.seed, "order", epoch))
            self._epoch = epoch
        return self._order


class ShardSampler(Sampler[list[int]]):
    """The batches of one process in an evaluation: each image once, every world_size-th batch from the rank-th.

    An image is in the same batch for any number of processes, because a kernel's last bits may depend on the other
    images. Nothing is padded: processes may have different numbers of batches, and the last batch may be smaller.
    """

    def __init__(self, num_samples: int, *, batch_size: int, rank: int = 0, world_size: int = 1):
        self.starts = range(rank * batch_size, num_samples, world_size * batch_size)
        self.batch_size = batch_size
        self.num_samples = num_samples

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch_size, self.num_samples)))


class Batch(list):
    """The addresses of the samples of a batch; `ahead` are those of later ones that its loader worker reads, too."""

    def __init__(self, samples: list, ahead: list):
        super().__init__(samples)
        self.ahead = ahead


class ReadAheadSampler(Sampler[Batch]):
    """The batches of `sampler`, each with later samples of the same loader worker, so that it can request their files.

    Workers take batches in turn. With its first batch a worker gets the samples of that one and of those until at
    least READ_AHEAD images later; then, with each batch, those of one more.
    """

    def __init__(self, sampler: TrainBatchSampler | ShardSampler, num_workers: int):
        self.sampler = sampler
        self.workers = max(1, num_workers)
        self.distance = self.workers * math.ceil(READ_AHEAD / sampler.batch_size)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.sampler)
        window = deque(islice(batches, self.distance))
        for number in count():
            window.extend(islice(batches, 1))
            if not window:
                return
            first = 0 if number < self.workers else self.distance
            later = list(islice(window, first, None, self.workers))
            yield Batch(window.popleft(), [sample for batch in later for sample in batch])
