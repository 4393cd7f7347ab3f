"""Distributed processes: rank, world size, device and collectives; the same program runs with and without torchrun."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from utils.devices import check_gpus_differ, choose_device
from utils.errors import ConfigError, ProcessLost, UserError
from utils.machine import choose_threads, explain_limits

FOREVER = timedelta(days=365)
PATIENCE = 10.0  # seconds of waiting for the other processes before that is reported
REFUSAL_SECONDS = 60  # in which a process that cannot run its command has to reach the others

T = TypeVar("T")


# --- The group ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """One process of the run: its rank in the group and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device
    threads_from: str = "torch's default"  # what the number of CPU threads follows from

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
    threads: CPU threads of this process; 0: as OMP_NUM_THREADS says, else its share of the cores.
    timeout: seconds after which a collective fails; 0: it waits for ever.

    Raises ConfigError where there is no GPU for the process, and where the processes cannot meet.
    """
    env = {name: int(os.environ.get(name, default)) for name, default in
           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))}  # fmt: skip
    threads, source = choose_threads(threads, env["LOCAL_WORLD_SIZE"])
    refusal = None
    try:
        chosen = choose_device(device, env["LOCAL_RANK"])
    except ConfigError as error:  # ends the others as well, once this process has joined them
        refusal, chosen = error, torch.device("cpu")
    process = Process(
        rank=env["RANK"],
        world_size=env["WORLD_SIZE"],
        device=chosen,
        threads_from=source,
    )
    torch.set_num_threads(threads)
    if process.world_size > 1:
        with explain_lost_process():
            _join_group(process, timeout)
    try:
        with share_errors():
            if refusal is not None:
                raise refusal
            if process.device.type == "cuda":
                torch.cuda.set_device(process.device)
        if process.world_size > 1:
            check_gpus_differ(process.device)
        yield process
    finally:
        if process.world_size > 1:
            dist.destroy_process_group()


def _join_group(process: Process, timeout: float) -> None:
    """Meet the other processes at MASTER_ADDR; who waits long says so on stderr, as no log is open yet."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = (
        f"Process {process.rank} waits for all {process.world_size} processes to meet at {place}\n"
    )
    waiting = threading.Timer(PATIENCE, sys.stderr.write, [text])
    waiting.daemon = True
    waiting.start()
    cuda = process.device.type == "cuda"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=timedelta(seconds=timeout) if timeout else FOREVER,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).partition("\n")[0]
        taken = "EADDRINUSE" in reason or "address already in use" in reason.lower()
        remedy = (
            "That port is in use: set another MASTER_PORT, or let torchrun --standalone find a free one."
            if taken
            else "MASTER_ADDR must be a host that every process reaches, the same for all, as MASTER_PORT."
        )
        raise ConfigError(f"The processes cannot meet at {place}. {remedy} ({reason})") from error
    finally:
        waiting.cancel()


def limit_waiting(seconds: float) -> None:
    """Let collectives wait for so long from now on; 0: for ever, as a limit ends a job that is paused as if it hung."""
    if dist.is_initialized():
        timeout = timedelta(seconds=seconds) if seconds else FOREVER
        dist.distributed_c10d._set_pg_timeout(timeout)


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


@contextmanager
def explain_failures() -> Iterator[None]:
    """Raise a UserError where another process is lost, or where the machine runs out of files or memory to share."""
    with explain_lost_process(), explain_limits():
        yield


# --- One error for all processes ------------------------------------------------------------------


@contextmanager
def share_errors() -> Iterator[None]:
    """Around what a process does by itself: an error in it ends every process, with its message and exit code.

    A collective at the end of the block; there must be none inside. Of several errors the lowest rank's counts.
    """
    try:
        yield
    except BaseException as error:
        if (shared := _share(error)) is not None:
            raise shared from error
        raise
    if (shared := _share(None)) is not None:
        raise shared


def share_refusal(error: UserError) -> UserError:
    """Join the group for the sole purpose of ending all its processes with `error`; what they end with.

    That is `error` itself where the others cannot be reached within REFUSAL_SECONDS.
    """
    try:
        with init_distributed("cpu", timeout=REFUSAL_SECONDS), share_errors():
            raise error
    except UserError as shared:
        return shared if shared.on_all else error


def _share(own: BaseException | None) -> UserError | None:
    """Gather the errors of all processes; what this one raises in the place of `own`, None if that is right."""
    if isinstance(own, UserError):
        own.on_all = True
    try:
        described = gather(None if own is None else (type(own).__name__, str(own)))
    except ProcessLost:
        if own is None:
            raise
        own.on_all = False
        return None
    failures = [(rank, *failure) for rank, failure in enumerate(described) if failure is not None]
    if not failures or not isinstance(own, UserError | None):  # a bug shows its own traceback
        return None
    rank, name, message = failures[0]
    alone = len(described) == 1
    if own is not None and (alone or rank == dist.get_rank() or str(own) == message):
        return None
    kinds = {kind.__name__: kind for kind in UserError.__subclasses__()}
    message = message if name in kinds else f"{name}: {message}"
    error = kinds.get(name, ProcessLost)(f"rank {rank}: {message}")
    error.on_all = True
    return error


# --- One value for all processes ------------------------------------------------------------------


def on_main(function: Callable[[], T]) -> T:
    """What `function()` returns on the main process, which alone calls it; on every process, as its errors are."""
    with share_errors():
        value = function() if is_main() else None
    return broadcast_object(value)


def is_main() -> bool:
    """Whether this is the main process, also before there is a group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def broadcast_object(value: T) -> T:
    """The main process's `value`, on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    with explain_lost_process():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: T) -> list[T]:
    """The `value` of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    with explain_lost_process():
        dist.all_gather_object(values, value)
    return values


def broadcast_each(tensors: Iterable[torch.Tensor]) -> None:
    """Copy the bits of `tensors` on the main process to all others, in place, one after the other."""
    if not dist.is_initialized():
        return
    with explain_lost_process():
        for tensor in tensors:
            dense = tensor.detach().contiguous()
            dist.broadcast(as_bytes(dense), src=0)
            if dense.data_ptr() != tensor.data_ptr():
                tensor.copy_(dense)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 [bytes], in the same memory."""
    return tensor.detach().flatten().view(torch.uint8)


# --- Sums -----------------------------------------------------------------------------------------


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
