"""Machine checks: devices, cores, shared memory and open files."""

import os
from collections.abc import Iterator

import torch
from yacs.config import CfgNode

from engine.build import image_sizes
from tools.checks.report import Finding, format_bytes
from utils.devices import choose_device
from utils.errors import ConfigError
from utils.launcher import set_ranks
from utils.machine import (
    available_cores,
    free_shared_memory,
    most_open_files,
    open_files_needed,
    shared_memory_needed,
)
from utils.text import quantity


def check_machine(cfg: CfgNode | None, processes: int) -> Iterator[Finding]:
    """Findings about devices, cores, shared memory and open files, for the processes on this node."""
    cores, gpus = available_cores(), torch.cuda.device_count()
    yield from _check_launcher(cfg)
    local = min(processes, gpus) if gpus else processes
    if gpus >= processes:
        yield Finding(
            "OK", "devices", f"{quantity(gpus, 'GPU')} for {quantity(processes, 'process')}"
        )
    elif gpus:
        text = f"{quantity(gpus, 'GPU')} for {quantity(processes, 'process')}"
        remedy = (
            f"use {-(-processes // gpus)} nodes like this one, or start {quantity(gpus, 'process')}"
        )
        yield Finding("WARN", "devices", text, remedy)
    else:
        remedy = "that suits small models only; check the driver if there is a GPU"
        yield Finding("WARN", "devices", "no GPU: the run would use the CPU", remedy)
    if cfg is None:
        yield Finding(
            "OK",
            "processors",
            quantity(cores, "core"),
            "--cfg compares them with the workers of a configuration",
        )
        return
    workers = cfg.DATA.NUM_WORKERS * local
    quota = " by a CPU quota" if cores < len(os.sched_getaffinity(0)) else ""
    text = (
        f"{quantity(cores, 'core')}{quota}, {quantity(workers, 'loader worker')} ({cfg.DATA.NUM_WORKERS} for "
        f"each of {quantity(local, 'process')} here)"
    )
    if workers > cores:
        remedy = f"--workers {max(1, cores // local)}: more would share cores"
        yield Finding("WARN", "processors", text, remedy)
    else:
        yield Finding("OK", "processors", text)

    images = cfg.DATA.BATCH_SIZE + (cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE)
    need = shared_memory_needed(workers, images, image_sizes(cfg)[-1])
    free = free_shared_memory()
    text = (
        f"{format_bytes(free)} free in /dev/shm; prefetched batches take up to {format_bytes(need)}"
    )
    if need > free:
        remedy = "increase it (docker run --shm-size=…), or lower --workers or --batch-size"
        yield Finding("FAIL", "shared memory", text, remedy)
    else:
        yield Finding("OK", "shared memory", text)

    limit = most_open_files()
    need = open_files_needed(cfg.DATA.NUM_WORKERS)
    text = f"{limit:,} may be open per process, about {need:,} are needed"
    if need > limit:
        yield Finding(
            "FAIL",
            "open files",
            text,
            f"ulimit -n {max(4096, need)}, as root or by your administrator",
        )
    else:
        yield Finding("OK", "open files", text)


def _check_launcher(cfg: CfgNode | None) -> Iterator[Finding]:
    """Findings about the variables of a launcher, and about a GPU that DEVICE demands."""
    try:
        set_ranks(dict(os.environ))
    except ConfigError as error:
        yield Finding("FAIL", "launcher", str(error))
    if cfg is not None and cfg.DEVICE == "cuda":
        try:
            choose_device("cuda", 0)
        except ConfigError as error:
            yield Finding("FAIL", "device", str(error))
