"""Step timer: how long each phase of a step takes, and what bounds the speed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data_wait", "transform", "forward", "backward", "optimizer", "save", "other")
STALLED = 0.1  # share of the time above which a phase that computes nothing is the bottleneck


class StepTimer:
    """A clock for the phases of steps. `with timer("forward"):` gives the block's time to a phase.

    On a CUDA device, which computes asynchronously, events are recorded in its stream, which wait for nothing, and
    "data_wait" is how long the device itself was idle. The time between the blocks is "other". Gradients are reduced
    during "backward".
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans = []
        self._start = self._now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Around what belongs to `phase`, one of PHASES."""
        start = self._now()
        yield
        self._spans.append((phase, start, self._now()))

    def flush(self) -> dict[str, float]:
        """Seconds of every phase since the last flush; waits for the device."""
        end = self._now()
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, start, stop in self._spans:
            seconds[phase] += self._between(start, stop)
        seconds["other"] = self._between(self._start, end) - sum(seconds.values())
        self._spans, self._start = [], end
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """The share of each phase in the total."""
    total = sum(seconds.values())
    return {phase: value / total for phase, value in seconds.items()}


def bottleneck(seconds: dict[str, float]) -> str:
    """What bounds the speed of the steps that took `seconds`, and which setting to change, in one line."""
    share = shares(seconds)
    if share["save"] > max(STALLED, share["data_wait"]):
        return (
            f"save-bound: {share['save']:.0%} of the time goes into checkpoints inside of epochs; "
            "raise SAVE_STEPS or write to a faster disk (OUTPUT)"
        )
    if share["data_wait"] > STALLED:
        return (
            f"input-bound: {share['data_wait']:.0%} of the time waits for images; raise DATA.NUM_WORKERS while "
            "cores are free, then pack the images (tools/pack.py) or lighten AUG.AUTO_AUGMENT"
        )
    computing = share["forward"] + share["backward"] + share["optimizer"]
    return (
        f"compute-bound: {computing:.0%} of the time is forward, backward and optimizer; if they are slow, "
        "AMP_DTYPE auto, MODEL.GRAD_CHECKPOINTING False and the largest DATA.BATCH_SIZE that fits are fastest"
    )
