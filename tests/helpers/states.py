"""A tiny training state and checkpoints of it."""

from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine import checkpoint
from engine.checkpoint import TrainState
from engine.optim import OPTIMIZERS, create_optimizer


def make_optimizer(model: nn.Module, name: str = "adamw", weight_decay: float = 0.01):
    """The optimizer `name` with the usual settings."""
    settings = {"momentum": 0.9, "betas": (0.9, 0.99), "eps": 1e-8}
    settings["lr_scales"] = {name: 1.0 for name, _ in model.named_parameters()}
    return create_optimizer(model, name, weight_decay=weight_decay, **settings)


def make_state(
    step: int = 0,
    *,
    optimizer: str = "adamw",
    fp16: bool = False,
    lr: float = 0.1,
    weight_decay: float = 0.01,
) -> TrainState:
    """The state after `step` optimizer steps of a three-layer model; its weights are a function of `step`."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = make_optimizer(model, optimizer, weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = lr
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    return TrainState(model, ModelEmaV3(model, decay=0.9), optimizer, scaler, step)


def save_state(folder: Path, state: TrainState, metadata: dict | None = None) -> Path:
    """Write `state` as a checkpoint in `folder`; its path. metadata: beside the name of the optimizer."""
    (name,) = (name for name, kind in OPTIMIZERS.items() if kind is type(state.optimizer))
    settings = {"config": {"TRAIN": {"OPTIMIZER": {"NAME": name}}}}
    files = checkpoint.snapshot(state, settings | (metadata or {}))
    return checkpoint.write(folder, f"step-{state.step}", files)


def save_steps(folder: Path, *steps: int) -> list[Path]:
    """Write valid checkpoints of these steps in `folder`, in this order; their paths."""
    return [save_state(folder, make_state(step)) for step in steps]
