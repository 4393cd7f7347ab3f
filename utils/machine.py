"""Limits of the machine: cores, threads, open files, shared memory, paths of sockets; and what to do where one is met.

Imports no torch.
"""

import errno
import math
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from multiprocessing.util import get_temp_dir
from pathlib import Path

from utils.errors import StorageError, explain_denied

CGROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = "/dev/shm"
PREFETCH = 2  # batches that a loader worker prepares ahead, torch's default
LONGEST_TEMPORARY = 70  # bytes; a socket's path may have 107, multiprocessing appends 32


# --- Cores and threads ----------------------------------------------------------------------------


def available_cores() -> int:
    """The cores that this process may use: those of its affinity, or fewer by the quota of a container."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, read_quotas())]))


def read_quotas(
    groups: str = "/proc/self/cgroup", mounts: tuple[Path, ...] = (CGROUPS, CGROUPS / "unified")
) -> Iterator[float]:
    """Seconds of CPU time per second, of each control group (version 1 or 2) above this process that has a quota."""
    try:
        lines = Path(groups).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = mounts
        elif "cpu" in controllers.split(","):
            roots = (mounts[0] / controllers, mounts[0] / "cpu")
        else:
            continue
        for root in roots:
            group = Path(path.strip("/"))
            for folder in (root / group, *(root / parent for parent in group.parents), root):
                if (quota := _read_quota(folder)) is not None:
                    yield quota


def _read_quota(folder: Path) -> float | None:
    try:
        if (file := folder / "cpu.max").exists():
            quota, period = file.read_text(encoding="ascii").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii")
                for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None


def choose_threads(
    threads: int, local_processes: int, env: Mapping[str, str] = os.environ
) -> tuple[int, str]:
    """CPU threads of a process, and what they follow from.

    threads: as configured; 0: OMP_NUM_THREADS, else the cores of a Slurm task, else a share of the cores.
    local_processes: processes of the run on this machine.
    """
    if threads:
        return threads, "THREADS"
    omp = env.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    by_torchrun = "TORCHELASTIC_RUN_ID" in env and omp == "1" and local_processes > 1
    if omp.isdecimal() and int(omp) and not by_torchrun:
        return int(omp), "OMP_NUM_THREADS"
    task = env.get("SLURM_CPUS_PER_TASK", "")
    if task.isdecimal() and int(task):
        return int(task), "SLURM_CPUS_PER_TASK"
    cores, all_cores = available_cores(), len(os.sched_getaffinity(0))
    source = (
        f"a CPU quota of {cores} of {all_cores} cores" if cores < all_cores else f"{cores} cores"
    )
    return max(1, cores // local_processes), source


# --- Files and memory -----------------------------------------------------------------------------


def raise_open_files() -> None:
    """Allow this process as many open files as the system lets it have without asking."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < (wanted := most_open_files()):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_open_files() -> int:
    """The files that `raise_open_files` lets this process open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)


def open_files_needed(workers: int) -> int:
    """About how many files a process with so many loader workers opens: two loaders, three tensors of a batch."""
    return 256 + 2 * 3 * PREFETCH * workers


def shared_memory_needed(workers: int, images: int, img_size: tuple[int, int]) -> int:
    """Bytes that the prefetched batches of so many workers take at most; `images` of a batch of each loader, added."""
    return workers * PREFETCH * images * 3 * math.prod(img_size)


def list_shortages(
    workers: int, local_workers: int, images: int, img_size: tuple[int, int]
) -> list[str]:
    """What this machine has too little of for the loader workers, with the remedy; empty where all is well.

    workers: of each process. local_workers: of all processes on this machine.
    """
    if not workers:
        return []
    shortages = []
    if open_files_needed(workers) > most_open_files():
        shortages.append(_describe_open_files())
    need = shared_memory_needed(local_workers, images, img_size)
    if need > (free := free_shared_memory()):
        shortages.append(
            f"{SHARED_MEMORY} has {free / 2**20:.1f} MiB free, prefetched batches take up to {need / 2**20:.1f} MiB. "
            f"{SHARE_REMEDY}"
        )
    return shortages


def free_shared_memory() -> int:
    """Free bytes of the file system through which loader workers hand over images."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return 0


SHARE_REMEDY = "Increase it (docker run --shm-size=8g), or lower --workers or --batch-size; --workers 0 needs none."


def _describe_open_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = "as root or by your administrator" if hard <= soft else "before the start"
    return (
        f"A process may open {soft:,} files, which is too few for this number of loader workers. "
        f"Raise the limit (ulimit -n 4096, {allowed}), or lower --workers."
    )


def shorten_socket_paths() -> None:
    """Put this process's sockets below /tmp, where the path of TMPDIR is longer than a socket's may be.

    Raises StorageError where /tmp cannot be written.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST_TEMPORARY:
        return
    former, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        get_temp_dir()
    except OSError as error:
        raise StorageError(
            f"TMPDIR {folder} is too long for the sockets of loader workers, and /tmp cannot be written "
            f"({error.strerror}). Set TMPDIR to a path of at most {LONGEST_TEMPORARY} characters."
        ) from error
    finally:
        tempfile.tempdir = former


# --- Errors ---------------------------------------------------------------------------------------


class Shortage(Enum):
    """A limit of the machine that an error means."""

    OPEN_FILES = 1
    SHARED_MEMORY = 2
    SOCKET_PATH = 3

    def __str__(self) -> str:
        if self is Shortage.OPEN_FILES:
            return _describe_open_files()
        if self is Shortage.SHARED_MEMORY:
            free = free_shared_memory() / 2**20
            return f"{SHARED_MEMORY}, which loader workers share, is full ({free:.1f} MiB free). {SHARE_REMEDY}"
        return (
            f"The temporary folder {tempfile.gettempdir()} is too long for the sockets of loader workers. "
            f"Set TMPDIR to a path of at most {LONGEST_TEMPORARY} characters."
        )


def find_shortage(error: BaseException) -> Shortage | None:
    """The limit of the machine that `error` means; None for any other error."""
    text, number = str(error), getattr(error, "errno", None)
    files = number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text
    if (
        files or "ancillary data" in text
    ):  # which a process without a free descriptor cannot receive
        return Shortage.OPEN_FILES
    shared = any(word in text for word in (SHARED_MEMORY, "shared memory", "/torch_"))
    full = number == errno.ENOSPC or "No space left" in text or "Bus error" in text
    # A semaphore, which lies there too, is refused without a name.
    nameless = number == errno.ENOSPC and free_shared_memory() < 2**20
    if full and (shared or nameless or "Bus error" in text):
        return Shortage.SHARED_MEMORY
    return Shortage.SOCKET_PATH if "AF_UNIX path too long" in text else None


@contextmanager
def explain_limits() -> Iterator[None]:
    """Raise StorageError, with the remedy, for an error that means a limit of the machine, or a forbidden path."""
    try:
        yield
    except PermissionError as error:
        raise explain_denied(error) from error
    except (OSError, RuntimeError) as error:
        if (shortage := find_shortage(error)) is None:
            raise
        raise StorageError(str(shortage)) from error
