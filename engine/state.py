"""Training state: exactly what the loop changes, what a checkpoint saves and what it restores."""

from dataclasses import dataclass, field

import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine.optim import STATE


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
    best: dict = field(default_factory=lambda: {"acc1": 0.0, "step": 0})

    def counters(self) -> dict:
        """The state that is not tensors."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "skipped": self.skipped,
            "best": self.best,
            "scaler": self.scaler.state_dict(),
        }

    def num_bytes(self) -> int:
        """Bytes of a checkpoint's tensors: weights, optimizer state and, if there is one, the EMA."""
        moments = max(len(keys - {"step"}) for keys in STATE[type(self.optimizer)])
        copies = 1 + (self.ema is not None)
        return sum(
            4 * p.numel() * (copies + moments * p.requires_grad) for p in self.model.parameters()
        )
