"""Forecasts of a run: the memory of a step and the hours of all, from one measured step and from counted bytes."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from yacs.config import CfgNode

from engine.build import build_model, input_shape
from engine.loop import autocast
from engine.precision import resolve_amp_dtype
from models.dat import VARIANTS
from tools.benchmarks.traffic import count, estimate_speed
from tools.checks.report import Finding, format_bytes
from tools.common.kept import kept_bytes
from utils.devices import choose_device
from utils.errors import ConfigError
from utils.text import quantity

IMAGES = {"cpu": 8, "cuda": 32}  # of the measured step
RESERVE = 0.05  # of the memory, for the allocator
CARDS, CARD_BYTES = 8, 80 * 2**30  # H100s, for the estimate on paper
BATCH = 8  # images whose bytes are counted


class Step(NamedTuple):
    """What a forward and backward pass takes for so many images."""

    images: int
    seconds: float
    bytes_per_image: float


def check_cost(
    cfg: CfgNode, classes: int, step_images: int | None, processes: int
) -> Iterator[Finding]:
    """Findings about the memory and the time of the run; `step_images`: images of all its steps, None without data."""
    try:
        device = choose_device(cfg.DEVICE, 0)
    except ConfigError:
        return  # the check of the machine says why
    measure = Measurement(cfg, classes, device)
    step = measure_fitting(measure, min(cfg.DATA.BATCH_SIZE, IMAGES[device.type]))
    if step is None:
        remedy = "use MODEL.GRAD_CHECKPOINTING=True or a smaller model"
        yield Finding("FAIL", "memory", "not even one image fits into the memory here", remedy)
        return
    state = 4 * measure.parameters * (4 + bool(cfg.TRAIN.EMA_DECAY))
    memory = free_bytes(device) // (processes if device.type == "cpu" else 1)
    yield judge_memory(cfg, step, state, memory, processes)
    if step_images is not None:
        sharing = processes if device.type == "cuda" else 1  # processes of a CPU share it
        hours = step_images * step.seconds / step.images / sharing / 3600
        text = (
            f"{describe_hours(hours)} for {quantity(cfg.TRAIN.EPOCHS, 'epoch')} on {sharing} × {device.type}, from a "
            f"measured step of {step.images} images ({step.seconds:.2f} s), without loading and evaluation"
        )
        yield Finding("OK", "duration", text)
    if cfg.MODEL.NAME in VARIANTS:
        yield estimate_on_paper(cfg, classes, step_images, state)


# --- One measured step ----------------------------------------------------------------------------


class Measurement:
    """A step of the run, with images of noise."""

    def __init__(self, cfg: CfgNode, classes: int, device: torch.device):
        self.device, self.shape = device, input_shape(cfg)
        self.dtype = getattr(torch, resolve_amp_dtype(cfg.AMP_DTYPE, device))
        self.net = build_model(cfg, classes, device).train()
        self.parameters = sum(p.numel() for p in self.net.parameters())

    def __call__(self, images: int) -> Step:
        """Two steps: the first one warms up, the second is measured. Raises torch.OutOfMemoryError."""
        x = torch.randn(images, *self.shape, device=self.device)
        labels = torch.zeros(images, dtype=torch.long, device=self.device)
        kept = kept_bytes(self.net, lambda: self._forward(x, labels))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            self._forward(x, labels).backward()
            self.net.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        used = kept
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated(self.device) - before
        return Step(images, min(seconds), used / images)

    def _forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.dtype):
            logits = self.net(x)
        return F.cross_entropy(logits.float(), labels)


def measure_fitting(measure: Callable[[int], Step], images: int) -> Step | None:
    """The step of `images`, or of the half of it that fits, and so on; None if not even one does."""
    while images:
        try:
            return measure(images)
        except torch.OutOfMemoryError:
            images //= 2
    return None


# --- Judgement ------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Memory that a run can have on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    return 1024 * int(available.split()[1])


def judge_memory(cfg: CfgNode, step: Step, state: int, memory: int, processes: int) -> Finding:
    """Whether a micro-batch fits, beside weights, gradients, moments and the average; else the largest that does."""
    batch = cfg.DATA.BATCH_SIZE
    need = state + batch * step.bytes_per_image
    text = (
        f"a micro-batch of {batch} images needs about {format_bytes(need)} of {format_bytes(memory)}: "
        f"{format_bytes(step.bytes_per_image)} for an image (measured with {step.images}), {format_bytes(state)} beside"
    )
    usable = (1 - RESERVE) * memory
    if need <= usable:
        return Finding("OK", "memory", text)
    most = math.floor((usable - state) / step.bytes_per_image)
    share = cfg.TRAIN.GLOBAL_BATCH_SIZE // processes
    fitting = [n for n in range(2, most + 1, 2) if share % n == 0]
    if not fitting:
        return Finding(
            "FAIL", "memory", text, "use MODEL.GRAD_CHECKPOINTING=True or a smaller model"
        )
    remedy = f"--batch-size {fitting[-1]} is the largest that fits; no other key has to change"
    return Finding("FAIL", "memory", text, remedy)


def estimate_on_paper(cfg: CfgNode, classes: int, step_images: int | None, state: int) -> Finding:
    """The hours on eight H100 and the memory of one, from the bytes that a step would move there."""
    with torch.device("meta"):
        model = build_model(cfg, classes, torch.device("meta"))
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # its draws are read on the host
    dtype = torch.float32 if cfg.AMP_DTYPE == "float32" else torch.float16
    found = count(model, batch=BATCH, shape=input_shape(cfg), dtype=dtype, training=True)
    speed = CARDS * estimate_speed(found.moved, found.flops, BATCH)
    need = state + cfg.DATA.BATCH_SIZE * found.kept / BATCH
    hours = "" if step_images is None else f"{describe_hours(step_images / speed / 3600)}, "
    text = (
        f"on {CARDS} H100, an estimate on paper: {hours}{speed:,.0f} images/s, eager, without fused kernels, if "
        f"loading keeps up; a micro-batch of {cfg.DATA.BATCH_SIZE} keeps {format_bytes(need)} of "
        f"{format_bytes(CARD_BYTES)}"
    )
    return Finding("OK", "on paper", text)


def describe_hours(hours: float) -> str:
    """About how long, such as "about 3 minutes" or "about 40 hours"."""
    if hours < 1:
        return f"about {quantity(max(1, round(60 * hours)), 'minute')}"
    if hours < 72:
        return f"about {quantity(round(hours), 'hour')}"
    return f"about {quantity(round(hours / 24), 'day')}"
