"""How fast is a model beside another, how far from the machine's limit, and where does its time go?"""

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
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import models
from engine.loop import autocast
from tools.benchmarks.macs import count_macs
from utils.errors import ConfigError

KINDS = {  # of ATen operations, the first pattern that is found counts
    "convolutions": r"conv",
    "matrix products": r"mm\b|bmm|linear|scaled_dot_product|flash_attention|efficient_attention",
    "softmax": r"softmax",
    "normalisation": r"norm",
    "gather, bilinear reads": r"grid_sampler|index|gather|scatter|embedding|take",
    "copies, layout": r"copy|clone|contiguous|\bcat\b|stack|pad|roll|fill|zero|empty|resize",
    "elementwise, sums": r"aten::_?(add|sub|mul|div|gelu|tanh|sigmoid|exp|clamp|where|masked|sum|mean|neg|pow|eq|ne|lt|"
    r"le|gt|ge|arange|bernoulli|remainder|minimum|maximum)",
}


def at_least(least: int) -> Callable[[str], int]:
    """A type of command-line arguments: integers from `least` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, expected {least} or more")
        return int(text)

    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `benchmark.py model` is told."""
    parser.add_argument("model", help="any name that timm knows")
    parser.add_argument("peer", nargs="?", default="swin_tiny_patch4_window7_224")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="autocast"
    )
    parser.add_argument("--batch", type=at_least(1), default=16, help="images at a time")
    parser.add_argument("--size", type=at_least(1), default=224, help="pixels along a side")
    parser.add_argument("--threads", type=at_least(1), default=2, help="CPU threads")
    parser.add_argument("--rounds", type=at_least(2), default=7, help="turns that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


# --- In turns -------------------------------------------------------------------------------------


def in_turns(
    steps: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every step in each of `rounds`; all take a turn in every round, so that a drifting machine slows all.

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
    """How many times as fast as the peer, from the seconds of both in the same rounds."""
    return spread([b / a for a, b in zip(own, peer, strict=True)])


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """A product of two square matrices, which is as fast as a model could be, and its GFLOP."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3 / 1e9


# --- One model ------------------------------------------------------------------------------------


class Subject:
    """A model with a batch of random images and the two things that are timed."""

    def __init__(self, net: nn.Module, *, batch: int, size: int, dtype: str, device: str):
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: there is no CUDA device here, expected cpu")
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self.net = net.to(self.device)
        self.images = torch.randn(batch, 3, size, size, device=self.device)

    @classmethod
    def named(cls, name: str, args: argparse.Namespace) -> "Subject":
        """What timm knows as `name`."""
        net = models.build(name, num_classes=1000, img_size=args.size, drop_path_rate=0.2)
        return cls(net, batch=args.batch, size=args.size, dtype=args.dtype, device=args.device)

    @torch.inference_mode()
    def evaluate(self) -> Tensor:
        """The logits."""
        self.net.eval()
        with autocast(self.device, self.dtype):
            return self.net(self.images)

    def train(self) -> None:
        """Forward and backward; no optimizer, which is the same for all."""
        self.net.train()
        with autocast(self.device, self.dtype):
            loss = self.net(self.images).float().square().mean()
        loss.backward()
        self.net.zero_grad()

    def kept_mib(self) -> float:
        """MiB per image that a training step's forward pass keeps for the backward pass, parameters left out."""
        parameters = {p.untyped_storage().data_ptr() for p in self.net.parameters()}
        kept = {}  # by address; the storages are held, so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        self.net.train()
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(self.device, self.dtype):
            self.net(self.images[:4])
        sizes = [s.nbytes() for address, s in kept.items() if address not in parameters]
        return sum(sizes) / len(self.images[:4]) / 2**20

    def operations(self) -> int:
        """ATen operations of one forward pass in evaluation, outside of autocast."""
        self.net.eval()
        few = self.images[:4]
        with CountOperations() as counter, torch.no_grad():
            self.net(few)
        return counter.count

    def kinds(self, step: Callable[[], object]) -> dict[str, float]:
        """The share of every kind of operation in the time of `step`."""
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks on every use
        with profile(activities=activities) as profiler:
            step()
        times = Counter()
        operations = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
        for event in operations:  # a kernel's time is given to the operation that started it
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[kind(event.key)] += spent
        return {name: times[name] / times.total() for name in [*KINDS, "other"]}


class CountOperations(TorchDispatchMode):
    """Counts what reaches ATen."""

    count = 0

    def __torch_dispatch__(
        self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


def kind(operation: str) -> str:
    """Which of KINDS an operation of the profiler is, or "other"."""
    return next((name for name, words in KINDS.items() if re.search(words, operation)), "other")


def peak_mib(name: str, args: argparse.Namespace) -> float:
    """MiB at the peak of a training step: the accelerator's, or all of a process that does nothing else."""
    torch.set_num_threads(args.threads)
    subject = Subject.named(name, args)
    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
    subject.train()
    if subject.device.type == "cuda":
        return torch.cuda.max_memory_allocated(subject.device) / 2**20
    status = Path("/proc/self/status").read_text()  # getrusage would begin at the parent's size
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10


def metadata(name: str, subject: Subject, args: argparse.Namespace) -> dict:
    """What does not depend on the machine's mood."""
    # A process that has done nothing else: the peak of a process never comes down.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        peak = process.submit(peak_mib, name, args).result()
    return {
        "parameters": sum(p.numel() for p in subject.net.parameters()),
        "gmacs": count_macs(subject.net, args.size, args.size) / 1e9,
        "kept_mib_per_image": subject.kept_mib(),
        "peak_mib": peak,
        "aten_operations": subject.operations(),
    }


# --- Command --------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict:
    """Time both models and the machine's limit in turns. Raises ConfigError."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    subjects = {name: Subject.named(name, args) for name in (args.model, args.peer)}
    limit, limit_gflop = matrix_product(getattr(torch, args.dtype), device)
    conditions = ("model", "peer", "dtype", "batch", "size", "threads", "device")
    result = {name: getattr(args, name) for name in conditions} | {"models": {}}

    for name, subject in subjects.items():
        result["models"][name] = metadata(name, subject, args)
    for phase, step, passes in (("eval", Subject.evaluate, 1), ("train", Subject.train, 3)):
        steps = {name: functools.partial(step, subject) for name, subject in subjects.items()}
        seconds = in_turns({**steps, "limit": limit}, args.rounds, device)
        ceiling = limit_gflop / statistics.median(seconds["limit"])
        ratio = ratios(seconds[args.model], seconds[args.peer])
        result[phase] = {"ratio": ratio, "limit_gflops": ceiling, "models": {}}
        for name, subject in subjects.items():
            speed = spread([args.batch / s for s in seconds[name]])
            gflops = 2 * passes * result["models"][name]["gmacs"] * speed["median"]
            result[phase]["models"][name] = {
                "images_per_s": speed,
                "gflops": gflops,
                "of_limit": gflops / ceiling,
                "kinds": subject.kinds(steps[name]),
            }
    return result


def table(result: dict) -> str:
    """The numbers of `run` for people."""
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
            [in_words(t["images_per_s"], 1) for t in timed],
            f"ratio {in_words(result[phase]['ratio'], 3)}",
        )
        row(
            f"{phase}, GFLOP/s",
            [f"{t['gflops']:.1f}, {t['of_limit']:.0%} of the limit" for t in timed],
            f"limit {result[phase]['limit_gflops']:.0f}, a matrix product",
        )
    for fact in result["models"][names[0]]:
        values = [result["models"][name][fact] for name in names]
        cells = [f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" for v in values]
        row(fact.replace("_", " "), cells)
    for phase in ("eval", "train"):
        row(f"share of time, {phase}", names)
        for name in [*KINDS, "other"]:
            kinds = [result[phase]["models"][model]["kinds"] for model in names]
            row(f"  {name}", [f"{k[name]:.1%}" for k in kinds])
    return "\n".join(line.rstrip() for line in lines)


def in_words(values: dict[str, float], digits: int) -> str:
    """A `spread` as its median (and quartiles)."""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"
