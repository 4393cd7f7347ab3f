"""Models, precisions and clocks that the groups of checks share. Imports neither yacs nor simplejpeg."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor

import models  # noqa: F401  registers the variants
from models import ops

SWIN, CONVNEXT = "swin_tiny_patch4_window7_224", "convnext_tiny"


@dataclass(frozen=True)
class Setting:
    """Where a group computes, and whether on sizes that only show that its code runs."""

    device: torch.device
    tiny: bool

    @property
    def cuda(self) -> bool:
        """Whether this is a card."""
        return self.device.type == "cuda"

    def pick(self, full: object, tiny: object) -> object:
        """`tiny` where the setting is, else `full`."""
        return tiny if self.tiny else full

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


def kernel_choices(setting: Setting) -> list[str]:
    """The values of MODEL.KERNELS that can be compared here."""
    slow = not setting.cuda  # Triton's interpreter
    return ["reference"] if slow or fused_obstacle(setting) else ["reference", "fused"]


def fused_obstacle(setting: Setting) -> str:
    """Why the fused kernels cannot be checked here; empty: they can."""
    if setting.cuda or setting.tiny:
        return ops.fused_obstacle()
    return "the device is a CPU"


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Compute with the kernels `name` inside."""
    ops.use_kernels(name)
    try:
        yield
    finally:
        ops.use_kernels("auto")


def autocast(setting: Setting, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; float32 is none."""
    return torch.autocast(setting.device.type, dtype, enabled=dtype != torch.float32)


def poison(setting: Setting) -> None:
    """Fill free memory with NaN, so that what reads memory that it has not written shows it."""
    blocks = [
        torch.full((size,), torch.nan, device=setting.device)
        for size in setting.pick((1 << 10, 1 << 16, 1 << 20, 1 << 24), (1 << 10,))
    ]
    del blocks


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of the expected values; NaN is infinite."""
    difference = (found.detach().double().cpu() - expected.detach().double().cpu()).norm()
    error = (difference / expected.detach().double().cpu().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


# --- Models that are raced ------------------------------------------------------------------------


class Racer:
    """A model with random images, and the steps that are timed."""

    def __init__(
        self, setting: Setting, name: str, kernels: str, batch: int, dtype: torch.dtype, **args
    ):
        torch.manual_seed(0)
        self.setting, self.kernels, self.dtype, self.batch = setting, kernels, dtype, batch
        self.net = timm.create_model(name, **args).to(setting.device)
        size = (
            self.net.pretrained_cfg["input_size"][1] if "img_size" not in args else args["img_size"]
        )
        self.images = torch.randn(batch, 3, size, size, device=setting.device)

    def evaluate(self) -> None:
        """The forward pass."""
        self.net.eval()
        with kernels(self.kernels), torch.inference_mode(), autocast(self.setting, self.dtype):
            self.net(self.images)

    def train(self) -> None:
        """The forward and the backward pass; no optimizer, whose cost is the same for all models."""
        self.net.train()
        with kernels(self.kernels):
            with autocast(self.setting, self.dtype):
                loss = self.net(self.images).float().square().mean()
            loss.backward()
        self.net.zero_grad()


def make_racers(setting: Setting, batch: int, dtype: torch.dtype, peers: bool = True) -> dict:
    """ "name, way": a maker of each model that is compared, in an order in which its peer follows."""
    ours = setting.pick(("dat_tiny", "dat_pp_tiny"), ("dat_micro",))
    make = functools.partial(Racer, setting, batch=batch, dtype=dtype)
    racers = {
        f"{name}, {way}": functools.partial(make, name, way, drop_path_rate=0.2)
        for name in ours
        for way in kernel_choices(setting)
    }
    if peers:
        swin = setting.pick({}, {"img_size": 32, "window_size": 4, "depths": (1, 1, 1, 1)})
        for way, fused in (("plain attention", False), ("fused attention", True)):
            racers[f"Swin-T, {way}"] = functools.partial(_make_peer, make, fused, SWIN, swin)
        convnext = setting.pick({}, {"depths": (1, 1, 1, 1)})
        racers["ConvNeXt-T"] = functools.partial(_make_peer, make, True, CONVNEXT, convnext)
    return racers


def _make_peer(make: Callable[..., Racer], fused: bool, name: str, args: dict) -> Racer:
    set_fused_attn(fused)  # read when a model is built
    try:
        return make(name, "reference", drop_path_rate=0.2, **args)
    finally:
        set_fused_attn(True)


# --- Clocks ---------------------------------------------------------------------------------------


def seconds_in_turns(
    setting: Setting, steps: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every step in each round, by the device's clock; each takes a turn, the first round warms up."""
    found = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            seconds = seconds_of(setting, step)
            if turn:
                found[name].append(seconds)
    return found


def seconds_of(setting: Setting, step: Callable[[], object]) -> float:
    """Seconds of one call on the device."""
    if not setting.cuda:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def describe(values: list[float], digits: int = 1) -> str:
    """Median and quartiles as text."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def free(setting: Setting) -> None:
    """Give cached memory back, before the next model."""
    if setting.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
