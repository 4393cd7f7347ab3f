"""Step timer: how long each phase of a step takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
