"""Results of steps: gradient norms and losses, read one step after they were computed, so that no step waits."""

import math
import resource
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.utils import AverageMeter

from engine.state import TrainState
from utils.bottleneck import shares
from utils.logging import MetricWriter, logger
from utils.step_timer import Lap, StepTimer


@dataclass(frozen=True)
class StepResult:
    """The result of one step, on its way from the device."""

    step: int  # steps done after it
    rate: float  # learning rate
    values: (
        torch.Tensor
    )  # gradient norm; of a step with a record also the loss and the loss scale, if there is one
    arrived: torch.cuda.Event | None  # when `values` are on the host; None: they are
    lap: Lap | None  # the time since the last record; None: there is no record of this step


class StepResults:
    """The results of an epoch's steps: what is recorded and logged of them, and how many in a row were skipped.

    A result is read when the next step has been started: by then it has come from the device. Who needs it at once
    calls `read` with `keep` 0, which waits. What is recorded of a step does not depend on when it is read.

    later_epochs: how many times this epoch's duration the epochs after it will take; their images may be larger.
    """

    def __init__(
        self,
        state: TrainState,
        writer: MetricWriter,
        timer: StepTimer,
        device: torch.device,
        *,
        steps_per_epoch: int,
        epochs: int,
        later_epochs: float,
        global_batch: int,
    ):
        self.seconds = Counter()  # of the laps that were read, by phase
        self._state = state
        self._writer = writer
        self._timer = timer
        self._device = device
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._later_epochs = later_epochs
        self._global_batch = global_batch
        self._meters = {name: AverageMeter() for name in ("time", "loss", "grad_norm")}
        self._recorded = state.step
        self._waiting: deque[StepResult] = deque()

    def add(self, rate: float, norm: torch.Tensor, loss: torch.Tensor | None) -> None:
        """Add the step that was just made; `loss` is that of a step with a record. Nothing is read."""
        values, lap = [norm], None
        if loss is not None:
            values.append(loss)
            if self._state.scaler.is_enabled():
                # get_scale would wait for the device.
                values.append(self._state.scaler._get_scale_async())
            lap = self._timer.lap()
        values = torch.stack([value.detach().float().view(()) for value in values])
        values = values.to("cpu", non_blocking=True)
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append(StepResult(self._state.step, rate, values, arrived, lap))

    def read(self, keep: int) -> Iterator[int]:
        """Read all results but the last `keep`; yields each step that was skipped, once `state.skipped` counts it."""
        while len(self._waiting) > keep:
            result = self._waiting.popleft()
            if result.arrived is not None:
                result.arrived.synchronize()
            norm, *recorded = result.values.tolist()
            finite = norm < math.inf
            self._state.skipped = 0 if finite else self._state.skipped + 1
            if not finite:
                logger.warning(f"step {result.step}: the gradient norm is {norm}, it is skipped")
            if result.lap is not None:
                self._record(result, norm, *recorded)
            if not finite:
                yield result.step

    def _record(self, result: StepResult, norm: float, loss: float, *scale: float) -> None:
        # The values are this step's own, so that a resumed run records the same as one that was not stopped.
        values = {"train/loss": loss, "train/lr": result.rate, "train/grad_norm": norm}
        if scale:
            (values["train/loss_scale"],) = scale
        self._writer.metrics(result.step, values)
        lap, steps = result.lap.seconds(), result.step - self._recorded
        self.seconds.update(lap)
        seconds = sum(lap.values())
        times = {f"time/{phase}": share for phase, share in shares(lap).items()}
        speed = {"time/images_per_s": steps * self._global_batch / seconds}
        self._writer.timing(result.step, speed | times)
        for name, value in (("time", seconds / steps), ("loss", loss), ("grad_norm", norm)):
            if math.isfinite(value):  # not of a skipped step
                self._meters[name].update(value)
        logger.info(self._line(result))
        self._recorded = result.step

    def _line(self, result: StepResult) -> str:
        index = (result.step - 1) % self._steps_per_epoch + 1
        steps_left = self._steps_per_epoch * (1 + self._later_epochs) - index
        left = self._meters["time"].avg * steps_left
        values = "\t".join(
            f"{name} {meter.val:.4f} ({meter.avg:.4f})" for name, meter in self._meters.items()
        )
        return (
            f"Train: [{self._state.epoch}/{self._epochs}][{index}/{self._steps_per_epoch}]\t"
            f"eta {clock(left)} lr {result.rate:.6f}\t{values}\tmem {peak_memory(self._device):.0f}MB"
        )


def peak_memory(device: torch.device) -> float:
    """MiB at the peak so far: of the accelerator's memory, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
