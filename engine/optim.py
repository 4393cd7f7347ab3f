"""Optimizer and schedule: AdamW with the recipe's decay groups, the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, decayed and not: vectors, biases and what `model.no_weight_decay()` names are not decayed.

    A name of `no_weight_decay` is a parameter's full name or its last part, as timm's models use both.
    """
    exempt = set(getattr(model, "no_weight_decay", set)())
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rpartition(".")[2]
        free = parameter.ndim <= 1 or last == "bias" or name in exempt or last in exempt
        (plain if free else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def create_optimizer(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW in its fused form, whose bits differ from the other forms': it is one for every device, so it is fixed.

    The learning rate is set at every step from `Schedule`.
    """
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(betas), eps=eps, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine, per step: the learning rate of a step is a pure function of its number.

    As in the recipe of the papers (and timm's CosineLRScheduler without warm-up prefix) the cosine runs over all
    steps, so that warm-up replaces its beginning; and the rate of step k is the curve's value at k - 1, the first
    two steps sharing the warm-up's start, because the released code sets it after the step.
    """

    total: int
    warmup: int
    base: float
    start: float
    end: float

    def __call__(self, step: int) -> float:
        """Learning rate of the step that is number `step`, counted from 0."""
        t = max(step - 1, 0)
        if t < self.warmup:
            return self.start + (self.base - self.start) * t / self.warmup
        return self.end + 0.5 * (self.base - self.end) * (1 + math.cos(math.pi * t / self.total))
