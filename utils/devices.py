"""Devices: the GPU of each process, or the CPU; missing and shared GPUs are explained."""

import os
import socket

import torch
import torch.distributed as dist

from utils.errors import ConfigError


def choose_device(kind: str, local_rank: int) -> torch.device:
    """The device of process `local_rank` on this machine.

    kind: "cuda", "cpu" or "auto" (CUDA where it is available). A process that sees one GPU takes it, as under
    srun --gpus-per-task=1. Raises ConfigError where there is no GPU, or none left.
    """
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(f"DEVICE is cuda, but {explain_no_gpu()}. DEVICE cpu runs without one.")
    if local_rank >= count > 1:
        raise ConfigError(
            f"Process {local_rank} of this machine has no GPU: there are {count}. Start at most {count} processes "
            f"(torchrun --nproc-per-node {count}), one per GPU, or set DEVICE cpu."
        )
    return torch.device("cuda", local_rank if count > 1 else 0)


def explain_no_gpu() -> str:
    """Why torch sees no GPU."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install one with it"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    return f"torch sees no GPU: look at nvidia-smi and the driver, which must suit CUDA {torch.version.cuda}{hidden}"


def check_gpus_differ(device: torch.device) -> None:
    """Raise ConfigError, on all processes, where two of them compute on one GPU. A collective, also for CPUs."""
    own = None
    if device.type == "cuda":
        own = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
    gpus: list = [None] * dist.get_world_size()
    dist.all_gather_object(gpus, own)
    for rank, gpu in enumerate(gpus):
        if gpu is not None and (first := gpus.index(gpu)) < rank:
            raise ConfigError(
                f"Processes {first} and {rank} on {gpu[0]} share one GPU: start as many processes as it has GPUs "
                "(torchrun --nproc-per-node N), or set DEVICE cpu."
            )
