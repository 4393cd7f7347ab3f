"""Model benchmark: speed beside a peer and beside the peak of the machine, memory, and where the time goes.

Both models and a large matrix product, whose speed is the peak, take turns on random images.

example:
  python tools/benchmark.py model dat_tiny swin_tiny_patch4_window7_224 --dtype bfloat16
"""

import argparse
import functools
import multiprocessing
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

import models
from engine.loop import autocast
from tools.benchmarks.macs import count_macs
from tools.common.kept import kept_bytes
from utils.errors import ConfigError

KINDS = {  # kinds of ATen operations; the first pattern that matches counts
    "convolutions": r"conv",
    "matrix products": r"mm\b|bmm|linear|scaled_dot_product|flash_attention|efficient_attention",
    "softmax": r"softmax",
    "normalisation": r"norm",
    "gather, bilinear reads": r"grid_sampler|index|gather|scatter|embedding|take",
    "copies, layout": r"copy|clone|contiguous|\bcat\b|stack|pad|roll|fill|zero|empty|resize",
    "elementwise, sums": r"aten::_?(add|sub|mul|div|gelu|tanh|sigmoid|exp|clamp|where|masked|sum|mean|neg|pow|eq|ne|lt|"
    r"le|gt|ge|arange|bernoulli|remainder|minimum|maximum)",
}

PRODUCT_SIZE = {
    "cpu": 2048,
    "cuda": 8192,
}  # rows and columns of the matrices whose product is the peak


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: integers not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, expected {least} or more")
        return int(text)

    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `benchmark.py model`."""
    parser.add_argument("model", help="any name that timm knows")
    parser.add_argument(
        "peer", nargs="?", default="swin_tiny_patch4_window7_224", help="model to compare with"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="autocast"
    )
    parser.add_argument("--batch", type=at_least(1), default=16, help="images at a time")
    parser.add_argument("--size", type=at_least(1), default=224, help="pixels along a side")
    parser.add_argument("--threads", type=at_least(1), default=2, help="CPU threads")
    parser.add_argument("--rounds", type=at_least(2), default=7, help="timed turns of each model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


# --- Timing -------------------------------------------------------------------------------------


def time_in_turns(
    steps: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every step in each of `rounds`; each takes a turn in every round, so that drift affects all.

    One more round, the first, warms up and is left out.
    """
    seconds = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """The median and the quartiles of two or more values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratios(own: list[float], peer: list[float]) -> dict[str, float]:
    """`spread` of the speed relative to the peer, from the seconds of both in the same rounds."""
    return spread([b / a for a, b in zip(own, peer, strict=True)])


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """A product of two large square matrices, the peak of what a model could reach, and its GFLOP."""
    n = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3 / 1e9


# --- One model ------------------------------------------------------------------------------------


class Subject:
    """A model with a batch of random images, and the steps that are timed."""

    def __init__(
        self, net: nn.Module, *, batch: int, shape: tuple[int, int, int], dtype: str, device: str
    ):
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: no CUDA device is available; use --device cpu")
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self.net = net.to(self.device)
        self.images = torch.randn(batch, *shape, device=self.device)

    @classmethod
    def from_name(cls, name: str, args: argparse.Namespace) -> "Subject":
        """The timm model `name` with the settings of the command line."""
        net = models.build(name, num_classes=1000, img_size=args.size, drop_path_rate=0.2)
        return cls(
            net,
            batch=args.batch,
            shape=(3, args.size, args.size),
            dtype=args.dtype,
            device=args.device,
        )

    @torch.inference_mode()
    def evaluate(self) -> Tensor:
        """The logits."""
        self.net.eval()
        with autocast(self.device, self.dtype):
            return self.net(self.images)

    def train(self) -> None:
        """Forward and backward pass; no optimizer, whose cost is the same for all models."""
        self.net.train()
        with autocast(self.device, self.dtype):
            loss = self.net(self.images).float().square().mean()
        loss.backward()
        self.net.zero_grad()

    def activation_mib(self) -> float:
        """MiB per image that the forward pass of a training step saves for the backward pass, without parameters."""
        few = self.images[:4]
        self.net.train()
        with autocast(self.device, self.dtype):
            return kept_bytes(self.net, lambda: self.net(few)) / len(few) / 2**20

    def count_operations(self) -> int:
        """ATen operations of one forward pass in evaluation, without autocast."""
        self.net.eval()
        few = self.images[:4]
        with CountOperations() as counter, torch.no_grad():
            self.net(few)
        return counter.count

    def profile(self, step: Callable[[], object]) -> dict[str, float]:
        """The share of every kind of operation in the time of `step`, by name."""
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
        with torch.profiler.profile(activities=activities) as profiler:
            step()
        times = Counter()
        operations = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
        for event in operations:  # a kernel's time counts for the operation that launched it
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[kind_of(event.key)] += spent
        return {name: times[name] / times.total() for name in [*KINDS, "other"]}


class CountOperations(TorchDispatchMode):
    """Counts the operations that reach ATen."""

    count = 0

    def __torch_dispatch__(
        self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


def kind_of(operation: str) -> str:
    """The one of KINDS that an operation of the profiler belongs to, or "other"."""
    return next((name for name, words in KINDS.items() if re.search(words, operation)), "other")


def peak_mib(name: str, args: argparse.Namespace) -> float:
    """MiB at the peak of a training step: of the accelerator, or of a process that does nothing else."""
    torch.set_num_threads(args.threads)
    subject = Subject.from_name(name, args)
    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
    subject.train()
    if subject.device.type == "cuda":
        return torch.cuda.max_memory_allocated(subject.device) / 2**20
    status = Path("/proc/self/status").read_text(
        encoding="utf-8"
    )  # getrusage would start at the parent's peak
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10


def measure_size(name: str, subject: Subject, args: argparse.Namespace) -> dict:
    """Parameters, multiply-adds, memory and operations: the numbers that do not vary from round to round."""
    # In a process of its own, because the peak of a process never comes down.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        peak = process.submit(peak_mib, name, args).result()
    return {
        "parameters": sum(p.numel() for p in subject.net.parameters()),
        "gmacs": count_macs(subject.net, args.size, args.size) / 1e9,
        "activation_mib_per_image": subject.activation_mib(),
        "peak_mib": peak,
        "aten_operations": subject.count_operations(),
    }


# --- Command --------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict:
    """Time both models and the peak of the machine in turns. Raises ConfigError."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    subjects = {name: Subject.from_name(name, args) for name in (args.model, args.peer)}
    product, product_gflop = matrix_product(getattr(torch, args.dtype), device)
    conditions = ("model", "peer", "dtype", "batch", "size", "threads", "device")
    result = {name: getattr(args, name) for name in conditions} | {"models": {}}

    for name, subject in subjects.items():
        result["models"][name] = measure_size(name, subject, args)
    for phase, step, passes in (("eval", Subject.evaluate, 1), ("train", Subject.train, 3)):
        steps = {name: functools.partial(step, subject) for name, subject in subjects.items()}
        seconds = time_in_turns({**steps, "peak": product}, args.rounds, device)
        peak = product_gflop / statistics.median(seconds["peak"])
        ratio = ratios(seconds[args.model], seconds[args.peer])
        result[phase] = {"ratio": ratio, "peak_gflops": peak, "models": {}}
        for name, subject in subjects.items():
            speed = spread([args.batch / s for s in seconds[name]])
            gflops = 2 * passes * result["models"][name]["gmacs"] * speed["median"]
            result[phase]["models"][name] = {
                "images_per_s": speed,
                "gflops": gflops,
                "of_peak": gflops / peak,
                "kinds": subject.profile(steps[name]),
            }
    return result


def table(result: dict) -> str:
    """The result of `run` as text."""
    names = list(result["models"])
    conditions = ("dtype", "batch", "size", "threads", "device")
    lines = [", ".join(f"{word} {result[word]}" for word in conditions)]

    def row(label: str, cells: list[str], end: str = "") -> None:
        lines.append(f"{label:24}" + "".join(f"{cell:>32}" for cell in cells) + f"  {end}")

    row("", names)
    for phase in ("eval", "train"):
        timed = [result[phase]["models"][name] for name in names]
        row(
            f"{phase}, images/s",
            [format_spread(t["images_per_s"], 1) for t in timed],
            f"ratio {format_spread(result[phase]['ratio'], 3)}",
        )
        row(
            f"{phase}, GFLOP/s",
            [f"{t['gflops']:.1f}, {t['of_peak']:.0%} of the peak" for t in timed],
            f"peak {result[phase]['peak_gflops']:.0f}, a matrix product",
        )
    for quantity in result["models"][names[0]]:
        values = [result["models"][name][quantity] for name in names]
        cells = [f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" for v in values]
        row(quantity.replace("_", " "), cells)
    for phase in ("eval", "train"):
        row(f"share of time, {phase}", names)
        for name in [*KINDS, "other"]:
            kinds = [result[phase]["models"][model]["kinds"] for model in names]
            row(f"  {name}", [f"{k[name]:.1%}" for k in kinds])
    return "\n".join(line.rstrip() for line in lines)


def format_spread(values: dict[str, float], digits: int) -> str:
    """A `spread` as "median (quartile to quartile)"."""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"
