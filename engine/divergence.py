"""What becomes of steps without a finite gradient? They are told; many in a row end in a dump to be replayed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from data import ImageDataset, TrainBatchSampler
from engine import checkpoint
from engine.checkpoint import TrainState
from utils.distributed import Process, all_reduce_max
from utils.errors import DivergedError
from utils.logging import MetricWriter


@dataclass(frozen=True)
class Divergence:
    """What is needed to tell of a skipped step, and when too many are."""

    limit: int  # steps in a row
    folder: Path  # of the run
    metadata: dict  # of its checkpoints
    dataset: ImageDataset
    sampler: TrainBatchSampler
    process: Process

    def note(self, state: TrainState, writer: MetricWriter) -> None:
        """Record the images of the step that was just skipped; every process has to call it.

        After `limit` in a row, or where it left NaN in a buffer such as BatchNorm's statistics, the state before the
        step is written to `diverged-<n>`, a folder like a checkpoint, and DivergedError raised.
        """
        step = state.step - 1
        writer.skipped(state.step, images_of(step, self.dataset, self.sampler))
        ruined = all_reduce_max(int(any(b.isnan().any() for b in state.model.buffers())))
        if state.skipped < self.limit and not ruined:
            return
        name = f"diverged-{step}"
        if self.process.is_main:
            before = dataclasses.replace(state, step=step, skipped=state.skipped - 1)
            checkpoint.write(self.folder, name, checkpoint.snapshot(before, self.metadata))
        raise DivergedError(
            f"step {state.step}: the gradient was not finite, {state.skipped} times in a row. "
            f"Look where it begins: python tools/replay.py {self.folder / name}. Then lower TRAIN.BASE_LR, use "
            "--amp-dtype bfloat16 or repair the images in skipped.jsonl, and start the same command again."
        )


def images_of(step: int, dataset: ImageDataset, sampler: TrainBatchSampler) -> list[list[str]]:
    """The paths of the images of a step, by micro-batch."""
    micro_batches = range(sampler.global_batch_size // sampler.batch_size)
    return [
        [dataset.path(index) for _, index in sampler.micro_batch(step, micro_batch)]
        for micro_batch in micro_batches
    ]


def latest_finite(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder` whose last step was not skipped."""
    for path in checkpoint.list_checkpoints(folder):
        damage = checkpoint.verify(path)
        if damage is None and checkpoint.read_metadata(path)["skipped"] == 0:
            return path
    return None
