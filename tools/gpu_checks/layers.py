"""Group 6: milliseconds of every layer at every stage's shape, the kernels of a step, the rate of atomic additions."""

import functools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import models.attention as mixers
from models import ops
from models.dat import LocalPerceptionUnit, Mlp
from tools.gpu_checks.common import (
    Racer,
    Setting,
    autocast,
    free,
    kernel_choices,
    kernels,
    seconds_in_turns,
)
from tools.gpu_checks.report import Report

# Channels, heads, groups, side of the map and kernel of the offsets by stage, DAT-T at 224 px.
STAGES = ((96, 3, 1, 56, 9), (192, 6, 1, 28, 7), (384, 12, 3, 14, 5), (768, 24, 6, 7, 3))
TINY = ((32, 2, 1, 6, 3),)


def check(report: Report, setting: Setting) -> None:
    """Layers, kernels of a step, atomic additions."""
    for stage, shape in enumerate(setting.pick(STAGES, TINY), start=1):
        for way in kernel_choices(setting):
            measure_layers(report, setting, f"stage {stage}, {way}", way, shape)
        free(setting)
    list_kernels(report, setting)
    measure_atomics(report, setting)


def make_layers(shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """The layers of a stage of this shape."""
    dim, heads, groups, side, kernel = shape
    size = side, side
    make = functools.partial(mixers.DeformableAttention, dim, heads, groups, kernel)
    return {
        "L": mixers.WindowAttention(dim, heads, 7),
        "S": mixers.WindowAttention(dim, heads, 7, shifted=True),
        "N": mixers.NeighborhoodAttention(dim, heads, 7),
        "D, DAT": make(1, size, mixers.DATGeometry),
        "D, DAT++": make(max(1, side // 7), size, mixers.DATPlusPlusGeometry),
        "depthwise 3×3": LocalPerceptionUnit(dim),
        "LayerNorm": nn.LayerNorm(dim),
        "MLP": Mlp(dim, 4, plus_plus=False),
    }


def measure_layers(
    report: Report, setting: Setting, title: str, way: str, shape: tuple[int, ...]
) -> None:
    """Milliseconds of forward and backward of each layer, in turns, and the share of its input's copy in that."""
    batch, rounds = setting.pick((128, 4), (1, 1))
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    dim, *_, side, _ = shape
    x = torch.randn(batch, side, side, dim, device=setting.device, requires_grad=True)
    copy = torch.empty_like(x.detach())
    steps = {"copy of the map": lambda: copy.copy_(x.detach())}
    for name, layer in make_layers(shape).items():
        steps[name] = functools.partial(run_layer, setting, way, dtype, layer.to(setting.device), x)
    if setting.cuda:
        nchw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim).to(setting.device)
        planes = x.detach().permute(0, 3, 1, 2).contiguous().requires_grad_()
        steps["depthwise 3×3, NCHW"] = functools.partial(
            run_layer, setting, way, dtype, nchw, planes
        )
    seconds = seconds_in_turns(setting, steps, rounds)
    for name, values in seconds.items():
        report.add(f"{title}, {name}: forward and backward", 1e3 * min(values), "ms")


def run_layer(setting: Setting, way: str, dtype: torch.dtype, layer: nn.Module, x: Tensor) -> None:
    """One forward and backward pass."""
    with kernels(way), autocast(setting, dtype):
        y = layer(x)
    y.float().mean().backward()


def list_kernels(report: Report, setting: Setting) -> None:
    """The kernels of one training step that take longest, attention's among them."""
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    name, batch = setting.pick(("dat_tiny", 128), ("dat_micro", 1))
    activities = [ProfilerActivity.CUDA] if setting.cuda else [ProfilerActivity.CPU]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
    for way in kernel_choices(setting) if setting.cuda else ["reference"]:
        racer = Racer(setting, name, way, batch, dtype)
        racer.train()
        with profile(activities=activities) as found:
            racer.train()
            setting.synchronize()
        time_of = "self_device_time_total" if setting.cuda else "self_cpu_time_total"
        rows = sorted(found.key_averages(), key=lambda row: -getattr(row, time_of))
        for row in rows[: setting.pick(20, 2)]:
            spent = getattr(row, time_of) / 1e3
            report.add(f"{name}, {way}, kernel {row.key[:80]} × {row.count}", spent, "ms")


def measure_atomics(report: Report, setting: Setting) -> None:
    """Atomic additions a second of the backward pass of grid_sample, at the bias of DAT-T's third stage."""
    batch, heads, n = setting.pick((128, 12, 196), (1, 2, 4))
    tables = torch.randn(batch, heads, 27, 27, device=setting.device, requires_grad=True)
    points = torch.rand(batch, n, n, 2, device=setting.device) * 2 - 1
    steps: dict[str, Callable] = {}
    read = F.grid_sample(tables, points, align_corners=True)
    gradient = torch.ones_like(read)
    steps["bias"] = lambda: torch.autograd.grad(read, tables, gradient, retain_graph=True)
    x = torch.randn(batch, 14, 14, 32 * heads, device=setting.device, requires_grad=True)
    places = torch.rand(batch, 3, 14, 14, 2, device=setting.device) * 2 - 1
    sampled = ops.sample_by_grid(x, places) if heads % 3 == 0 else None
    if sampled is not None:
        steps["reads"] = lambda: torch.autograd.grad(
            sampled, x, torch.ones_like(sampled), retain_graph=True
        )
    sizes = {"bias": read.numel(), "reads": 0 if sampled is None else sampled.numel()}
    for name, values in seconds_in_turns(setting, steps, setting.pick(5, 1)).items():
        rate = 4 * sizes[name] / min(values) / 1e9
        report.add(f"grid_sample backward, {name}: additions", rate, "G/s")
