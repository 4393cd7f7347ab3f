"""Machine checks: devices, cores, shared memory and open files."""

import os
import resource
import shutil
from collections.abc import Iterator

import torch
from yacs.config import CfgNode

from tools.checks.report import Finding, format_bytes

PREFETCH = 2  # batches that a worker prepares ahead, torch's default


def check_machine(cfg: CfgNode | None, processes: int) -> Iterator[Finding]:
    """Findings about devices, cores, shared memory and open files, for the processes on this node."""
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    local = min(processes, gpus) if gpus else processes
    if gpus >= processes:
        yield Finding("OK", "devices", f"{gpus} GPUs for {processes} processes")
    elif gpus:
        text = f"{gpus} GPUs for {processes} processes"
        remedy = f"use {-(-processes // gpus)} nodes like this one, or start {gpus} processes"
        yield Finding("WARN", "devices", text, remedy)
    else:
        remedy = "that suits small models only; check the driver if there is a GPU"
        yield Finding("WARN", "devices", "no GPU: the run would use the CPU", remedy)
    if cfg is None:
        yield Finding(
            "OK",
            "processors",
            f"{cores} cores",
            "--cfg compares them with the workers of a configuration",
        )
        return
    workers = cfg.DATA.NUM_WORKERS * local
    text = f"{cores} cores, {workers} loader workers ({cfg.DATA.NUM_WORKERS} for each of {local} processes here)"
    if workers > cores:
        remedy = f"--workers {max(1, cores // local)}: more would share cores"
        yield Finding("WARN", "processors", text, remedy)
    else:
        yield Finding("OK", "processors", text)

    images = cfg.DATA.BATCH_SIZE + (cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE)
    size = max([cfg.DATA.IMG_SIZE, *(size for _, size in cfg.DATA.IMG_SIZE_SCHEDULE)])
    need = workers * PREFETCH * images * 3 * size**2
    free = shutil.disk_usage("/dev/shm").free
    text = (
        f"{format_bytes(free)} free in /dev/shm; prefetched batches take up to {format_bytes(need)}"
    )
    if need > free:
        remedy = "increase it (docker run --shm-size=…), or lower --workers or --batch-size"
        yield Finding("FAIL", "shared memory", text, remedy)
    else:
        yield Finding("OK", "shared memory", text)

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    need = 256 + 2 * 3 * PREFETCH * cfg.DATA.NUM_WORKERS  # two loaders, three tensors of a batch
    text = f"{limit:,} may be open per process, about {need:,} are needed"
    if need > limit:
        yield Finding("FAIL", "open files", text, f"ulimit -n {max(4096, need)}")
    else:
        yield Finding("OK", "open files", text)
