"""Distributed processes: rank, world size, device and collectives; the same program runs with and without torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import ProcessLost

FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class Process:
    """One process of the run: its rank in the group and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0


@contextmanager
def init_distributed(
    device: str = "auto", threads: int = 0, timeout: float = 0.0
) -> Iterator[Process]:
    """Join the process group that torchrun describes in the environment, if any.

    device: "cuda", "cpu" or "auto" (CUDA where it is available).
    threads: CPU threads of this process; 0: its share of the cores, where torchrun would allow each process one.
    timeout: seconds after which a collective fails; 0: it waits for ever.
    """
    env = {name: int(os.environ.get(name, default)) for name, default in
           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))}  # fmt: skip
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    process = Process(
        rank=env["RANK"],
        world_size=env["WORLD_SIZE"],
        device=torch.device(kind, env["LOCAL_RANK"]) if kind == "cuda" else torch.device(kind),
    )
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // env["LOCAL_WORLD_SIZE"]))
    if kind == "cuda":
        torch.cuda.set_device(process.device)
    if process.world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout) if timeout else FOREVER,
        )
    try:
        yield process
    finally:
        if process.world_size > 1:
            dist.destroy_process_group()


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """Raise ProcessLost where a collective fails because another process has ended or hangs."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ProcessLost(
            "Another process of this run has ended or hangs: its output, or the launcher's, gives the reason. "
            f"Then start the same command again. Noticed by: {error}"
        ) from error


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def pairwise_sum(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all processes, a power of two, as a balanced tree over their ranks: (0 + 1) + (2 + 3).

    In every round, processes whose ranks differ in one bit exchange their sums and add the same two numbers, whose
    order does not matter: a + b = b + a.
    """
    distance = 1
    while dist.is_initialized() and distance < dist.get_world_size():
        peer = dist.get_rank() ^ distance
        theirs = torch.empty_like(tensor)
        exchange = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, theirs, peer)]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        tensor = tensor + theirs
        distance *= 2
    return tensor


def broadcast(tensors: list[torch.Tensor]) -> None:
    """Copy the values of `tensors` on the first process to all others, in place."""
    if not tensors or not dist.is_initialized():
        return
    # One message for all of them: float64 holds float32 numbers and counts exactly.
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    dist.broadcast(flat, src=0)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def all_reduce_max(value: int) -> int:
    """The largest `value` of all processes."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
