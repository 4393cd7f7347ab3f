"""Training state: exactly what the loop changes, what a checkpoint saves and what it restores."""

import functools
from dataclasses import dataclass, field

import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine.grad_sync import running_statistics
from engine.optim import STATE, load_optimizer_state, optimizer_state

# Before the first validation. ema: the accuracy is that of the average.
NO_BEST = {"acc1": 0.0, "step": 0, "ema": False}


@dataclass
class TrainState:
    """Model, EMA, optimizer, gradient scaler, counters and the best accuracy so far."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done: the position in the run
    epoch: int = 0  # epochs done: trained and, where due, validated
    skipped: int = 0  # steps in a row whose gradient was not finite
    best: dict = field(default_factory=lambda: dict(NO_BEST))

    @functools.cached_property
    def skips_on_device(self) -> bool:
        """Whether a step whose gradient is not finite can be skipped without the host.

        The optimizer must read a flag, as GradScaler's contract has it. Running statistics, which a forward pass has
        changed, are for the host to judge, before the next one.
        """
        reads_flag = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return reads_flag and not running_statistics(self.model)

    def counters(self) -> dict:
        """The state that is not tensors."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "skipped": self.skipped,
            "best": self.best,
            "scaler": self.scaler.state_dict(),
        }

    def load_counters(self, counters: dict) -> None:
        """Take over what `counters` gave."""
        if self.scaler.is_enabled() and counters["scaler"]:
            self.scaler.load_state_dict(counters["scaler"])
        self.step, self.epoch = counters["step"], counters["epoch"]
        self.skipped, self.best = counters["skipped"], counters["best"]

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors as "<parameter>.<name>", such as "head.weight.exp_avg"."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            f"{names[parameter]}.{key}": value
            for parameter, values in optimizer_state(self.optimizer).items()
            for key, value in values.items()
        }

    def set_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the optimizer's tensors by `tensors`, named as `optimizer_tensors` does."""
        parameters = dict(self.model.named_parameters())
        state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(".")
            state.setdefault(parameters[name], {})[key] = tensor
        load_optimizer_state(self.optimizer, state)

    def num_bytes(self) -> int:
        """Bytes of a checkpoint's tensors: weights, optimizer state and, if there is one, the EMA."""
        moments = max(len(keys - {"step"}) for keys in STATE[type(self.optimizer)])
        copies = 1 + (self.ema is not None)
        return sum(
            4 * p.numel() * (copies + moments * p.requires_grad) for p in self.model.parameters()
        )
