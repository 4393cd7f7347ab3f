"""What becomes of updates without a finite gradient? They are told; many in a row end in a dump to be replayed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from data import ImageDataset, SlotSampler
from engine import checkpoint
from engine.checkpoint import TrainState
from utils.distributed import Process, all_reduce_max
from utils.errors import DivergedError
from utils.logging import MetricWriter


@dataclass(frozen=True)
class Divergence:
    """What is needed to tell of a skipped update, and when too many are."""

    limit: int  # updates in a row
    folder: Path  # of the run
    facts: dict  # of its checkpoints
    dataset: ImageDataset
    sampler: SlotSampler
    process: Process

    def note(self, state: TrainState, writer: MetricWriter) -> None:
        """Record the images of the update that was just skipped; every process has to call it.

        After `limit` in a row, or where it left NaN in a buffer such as BatchNorm's statistics, the state before the
        update is written to `diverged-<update>`, a folder like a checkpoint, and DivergedError raised.
        """
        update = state.update - 1
        writer.skipped(state.update, images_of(update, self.dataset, self.sampler))
        ruined = all_reduce_max(int(any(b.isnan().any() for b in state.model.buffers())))
        if state.skipped < self.limit and not ruined:
            return
        name = f"diverged-{update}"
        if self.process.is_main:
            before = dataclasses.replace(state, update=update, skipped=state.skipped - 1)
            checkpoint.write(self.folder, name, checkpoint.snapshot(before, self.facts))
        raise DivergedError(
            f"update {state.update}: the gradient was not finite, {state.skipped} times in a row. "
            f"Look where it begins: python tools/replay.py {self.folder / name}. Then lower TRAIN.BASE_LR, use "
            "--amp-dtype bfloat16 or repair the images in skipped.jsonl, and start the same command again."
        )


def images_of(update: int, dataset: ImageDataset, sampler: SlotSampler) -> list[list[str]]:
    """The paths of the images of an update, by slot."""
    slots = range(sampler.global_batch_size // sampler.batch_size)
    return [[dataset.path(index) for _, index in sampler.slot(update, slot)] for slot in slots]


def last_sound(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder` whose last update was not skipped."""
    for path in checkpoint.steps(folder):
        damage = checkpoint.verify(path)
        if damage is None and checkpoint.read_facts(path)["skipped"] == 0:
            return path
    return None
