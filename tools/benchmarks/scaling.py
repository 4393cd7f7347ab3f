"""Scaling benchmark: the cost of more processes on this machine, and an estimate for 8, 64 and 512 accelerators.

Measures P processes of T threads against one process of P · T threads, in turns. The estimate says which network,
cores and storage a step needs.

example:
  python tools/benchmark.py scaling dat_tiny --processes 2 --threads 1
"""

import argparse
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models
from engine.loop import autocast
from tools.benchmarks.macs import count_macs
from tools.benchmarks.model import at_least, format_spread, ratios, spread
from utils.errors import ConfigError

NODE = 8  # accelerators of one machine
# The backward pass is two thirds of a step's arithmetic; gradients travel from when its first tenth is done.
OVERLAP = 0.6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `benchmark.py scaling`."""
    parser.add_argument("model", nargs="?", default="dat_tiny", help="any name that timm knows")
    parser.add_argument("--processes", type=at_least(2), default=2)
    parser.add_argument(
        "--threads", type=at_least(1), default=1, help="CPU threads of each process"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=32, help="images of a step, over all processes"
    )
    parser.add_argument("--size", type=at_least(1), default=224, help="pixels along a side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=at_least(2), default=7, help="timed turns of each layout")
    assumptions = parser.add_argument_group("assumptions of the estimate")
    assumptions.add_argument("--global-batch", type=int, default=4096, help="images of a step")
    assumptions.add_argument("--tflops", type=float, default=80, help="sustained by an accelerator")
    assumptions.add_argument(
        "--images-per-core",
        type=float,
        default=200,
        help="images/s that a core prepares, see `benchmark.py data`",
    )
    assumptions.add_argument("--kilobytes", type=float, default=107, help="of one image file")


def build(args: argparse.Namespace) -> nn.Module:
    """The model, with the same weights in every process."""
    torch.manual_seed(0)
    return models.build(args.model, num_classes=1000, img_size=args.size, drop_path_rate=0.0)


# --- Measured -------------------------------------------------------------------------------------


def run_worker(
    rank: int, world_size: int, threads: int, store: str, args: argparse.Namespace, pipe: Connection
) -> None:
    """One process: for every True from `pipe`, make a step and send its seconds; end at False."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    model = build(args)
    net = model
    if world_size > 1:  # as in a run
        net = DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(args.batch // world_size, 3, args.size, args.size)
    while pipe.recv():
        start = time.perf_counter()
        with autocast(images.device, getattr(torch, args.dtype)):
            loss = net(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send(time.perf_counter() - start)
    dist.destroy_process_group()


class Group:
    """Processes that make a step together on request, and wait idle otherwise."""

    def __init__(self, world_size: int, threads: int, store: Path, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=run_worker,
                args=(rank, world_size, threads, str(store), args, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()  # so that a dead process is an end of file instead of an endless wait
            self.pipes.append(ours)
            self.processes.append(process)

    def step(self) -> float:
        """Make a step; return the seconds of the slowest process."""
        for pipe in self.pipes:
            pipe.send(True)
        return max(pipe.recv() for pipe in self.pipes)

    def close(self) -> None:
        """End all processes."""
        for pipe in self.pipes:
            pipe.send(False)
        for process in self.processes:
            process.join()


def measure(args: argparse.Namespace) -> dict:
    """Images/s of many processes and of one with all their threads, in turns, and the ratio round by round."""
    layouts = {"many": (args.processes, args.threads), "one": (1, args.processes * args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        groups = {
            name: Group(*layout, Path(folder) / name, args) for name, layout in layouts.items()
        }
        seconds = {name: [] for name in groups}
        for turn in range(args.rounds + 2):
            for name, group in groups.items():
                elapsed = group.step()
                if turn > 1:  # the first rounds warm up; DDP rebuilds its buckets in the second
                    seconds[name].append(elapsed)
        for group in groups.values():
            group.close()
    result = {name: spread([args.batch / s for s in values]) for name, values in seconds.items()}
    return {**result, "ratio": ratios(seconds["many"], seconds["one"])}


# --- Estimate -------------------------------------------------------------------------------------


def estimate_needs(
    accelerators: int, gradient_bytes: float, macs: float, args: argparse.Namespace
) -> dict:
    """What a step of the global batch needs so that the accelerators wait for neither network nor images.

    An all-reduce ring over m machines sends 2 (m − 1) / m times the gradient through the link of each.
    """
    speed = accelerators * args.tflops * 1e12 / (6 * macs)  # images/s; forward and backward: 3 · 2
    seconds = args.global_batch / speed
    nodes = max(1, accelerators // NODE)
    sent = 2 * (nodes - 1) / nodes * gradient_bytes
    return {
        "accelerators": accelerators,
        "images_per_accelerator": args.global_batch / accelerators,
        "images_per_s": speed,
        "step_ms": 1000 * seconds,
        "network_gbit_per_s": 8 * sent / (OVERLAP * seconds) / 1e9,  # of each machine
        "cores": speed / nodes / args.images_per_core,  # of each machine
        "read_gb_per_s": speed / nodes * args.kilobytes * 1e3 / 1e9,  # of each machine
    }


def estimate(args: argparse.Namespace) -> list[dict]:
    """`estimate_needs` of 8, 64 and 512 accelerators, from the model's own bytes and multiply-adds."""
    model = build(args)
    gradient_bytes = 4 * sum(p.numel() for p in model.parameters())
    macs = count_macs(model, args.size, args.size)
    return [estimate_needs(n, gradient_bytes, macs, args) for n in (8, 64, 512)]


# --- Command --------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict:
    """Measure and estimate. Raises ConfigError."""
    if args.batch % args.processes:
        raise ConfigError(
            f"--batch {args.batch} is not divisible by --processes {args.processes}; every process takes as many images"
        )
    conditions = {name: value for name, value in vars(args).items() if name != "json"}
    return {"conditions": conditions, "estimate": estimate(args), "measured": measure(args)}


def table(result: dict) -> str:
    """The result of `run` as text."""
    given, measured = argparse.Namespace(**result["conditions"]), result["measured"]
    lines = [f"{given.model}, {given.dtype}, {given.batch} images of {given.size} px a step, gloo"]
    for name, processes in (("many", given.processes), ("one", 1)):
        threads = given.threads * given.processes // processes
        lines.append(
            f"  {processes} × {threads} threads: {format_spread(measured[name], 1)} images/s"
        )
    lines += [
        f"  ratio {format_spread(measured['ratio'], 3)}",
        "",
        f"estimate: {given.global_batch} images a step, {given.tflops:g} TFLOP/s sustained by an accelerator, "
        f"{NODE} accelerators per machine,",
        f"float32 gradients sent during {OVERLAP:.0%} of a step, {given.images_per_core:g} images/s per core, "
        f"{given.kilobytes:g} kB an image",
        "",
        f"{'accelerators':>12}{'images/s':>12}{'images each':>13}{'step ms':>11}   each machine:"
        f"{'Gbit/s':>9}{'cores':>7}{'reads GB/s':>12}",
    ]
    for row in result["estimate"]:
        lines.append(
            f"{row['accelerators']:>12}{row['images_per_s']:>12,.0f}"
            f"{row['images_per_accelerator']:>13.0f}{row['step_ms']:>11.1f}{'':16}"
            f"{row['network_gbit_per_s']:>9.1f}{row['cores']:>7.0f}{row['read_gb_per_s']:>12.2f}"
        )
    return "\n".join(lines)
