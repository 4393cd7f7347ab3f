"""Step timer: how long each phase of a step takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from utils.bottleneck import PHASES


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

    def lap(self) -> "Lap":
        """End a lap here and start the next."""
        end = self._now()
        lap = Lap(self._spans, self._start, end)
        self._spans, self._start = [], end
        return lap

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Lap:
    """The time between two calls of `StepTimer.lap`."""

    spans: list  # (phase, start, stop)
    start: float | torch.cuda.Event
    end: float | torch.cuda.Event

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase; waits until the device has come to the end of the lap."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, start, stop in self.spans:
            seconds[phase] += _between(start, stop)
        seconds["other"] = _between(self.start, self.end) - sum(seconds.values())
        return seconds


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
