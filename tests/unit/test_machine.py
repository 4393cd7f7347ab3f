"""Limits of the machine: cores, threads, open files, shared memory, long temporary folders, devices, broken streams.

pytest tests/unit/test_machine.py
"""

import errno
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import get_temp_dir
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.images import write_image_folder
from helpers.pipeline import image_dataset

from data import ShardSampler, eval_loader
from utils import machine
from utils.devices import choose_device
from utils.errors import ConfigError, StorageError, as_exit_code

ROOT = Path(__file__).resolve().parents[2]


# --- Cores and threads ----------------------------------------------------------------------------


def write_group(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_quotas_of_both_versions_of_control_groups(tmp_path):
    mounts = tmp_path, tmp_path / "unified"
    write_group(
        tmp_path / "cpu/docker/a", cpu__cfs_quota_us="150000\n", cpu__cfs_period_us="100000\n"
    )
    write_group(tmp_path / "unified/slice", cpu__max="50000 100000\n")
    write_group(tmp_path / "unified/slice/job", cpu__max="max 100000\n")
    groups = tmp_path / "groups"
    groups.write_text("4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/slice/job\n")
    assert sorted(machine.read_quotas(str(groups), mounts)) == [0.5, 1.5]
    groups.write_text("3:cpu:/\n0::/\n")
    assert list(machine.read_quotas(str(groups), mounts)) == []
    assert list(machine.read_quotas(str(tmp_path / "none"), mounts)) == []


@pytest.mark.parametrize(
    ("threads", "processes", "env", "expected"),
    [
        (3, 2, {"OMP_NUM_THREADS": "1"}, (3, "THREADS")),
        (0, 1, {"OMP_NUM_THREADS": "1"}, (1, "OMP_NUM_THREADS")),
        (0, 2, {"OMP_NUM_THREADS": "6,2"}, (6, "OMP_NUM_THREADS")),
        (0, 2, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, (4, "8 cores")),
        (0, 2, {"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, (3, "OMP_NUM_THREADS")),
        (0, 4, {"SLURM_CPUS_PER_TASK": "5"}, (5, "SLURM_CPUS_PER_TASK")),
        (0, 2, {"OMP_NUM_THREADS": "many"}, (4, "8 cores")),
        (0, 16, {}, (1, "8 cores")),
    ],
)
def test_threads_follow_the_nearest_wish(threads, processes, env, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "read_quotas", lambda: iter(()))
    assert machine.choose_threads(threads, processes, env) == expected


def test_a_quota_limits_the_cores_and_is_named(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "read_quotas", lambda: iter((2.5, 6.0)))
    assert machine.available_cores() == 3
    assert machine.choose_threads(0, 1, {}) == (3, "a CPU quota of 3 of 8 cores")


# --- Loader workers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight images for workers to hand over."""
    return write_image_folder(tmp_path_factory.mktemp("set"), classes=2, train=2, val=4)


def loader(root):
    dataset = image_dataset(root, "val")
    sampler = ShardSampler(len(dataset), batch_size=2, rank=0, world_size=1)
    return eval_loader(dataset, sampler, num_workers=1, timeout=60)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n 4096"),
        (
            RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
            "shm-size",
        ),
        (OSError("AF_UNIX path too long"), "TMPDIR"),
    ],
)
def test_a_batch_that_cannot_be_handed_over_ends_the_run_at_once(error, words, root, monkeypatch):
    dumps, parent = ForkingPickler.dumps, os.getpid()

    def fail_in_workers(batch):
        if os.getpid() != parent:
            raise error
        return dumps(batch)

    monkeypatch.setattr(ForkingPickler, "dumps", fail_in_workers)
    with pytest.raises(StorageError, match=words):
        list(loader(root))


def test_a_file_that_cannot_be_opened_for_want_of_descriptors_is_not_damaged(root, monkeypatch):
    dataset = image_dataset(root, "val")

    def read(index):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(dataset, "read", read)
    with pytest.raises(StorageError, match="lower --workers"):
        dataset[0]


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (OSError(errno.ENFILE, "x"), machine.Shortage.OPEN_FILES),
        (RuntimeError("received 0 items of ancillary data"), machine.Shortage.OPEN_FILES),
        (
            RuntimeError("worker (pid 1) is killed by signal: Bus error."),
            machine.Shortage.SHARED_MEMORY,
        ),
        (
            OSError(errno.ENOSPC, "No space left", "/dev/shm/torch_1"),
            machine.Shortage.SHARED_MEMORY,
        ),
        (OSError(errno.ENOSPC, "No space left", "/home/log.txt"), None),
        (RuntimeError("CUDA out of memory"), None),
    ],
)
def test_errors_that_mean_a_limit(error, shortage):
    assert machine.find_shortage(error) is shortage
    expected = StorageError if shortage else type(error)
    with pytest.raises(expected), machine.explain_limits():
        raise error


def test_a_path_that_may_not_be_opened_is_named():
    denied = PermissionError(errno.EACCES, "Permission denied", "/data/train")
    with (
        pytest.raises(StorageError, match="/data/train: Permission denied"),
        machine.explain_limits(),
    ):
        raise denied

    @as_exit_code
    def tool(arguments):
        raise denied

    assert tool([]) == StorageError.exit_code


def test_sockets_of_a_long_temporary_folder_are_below_tmp(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {})
    machine.shorten_socket_paths()
    assert tempfile.gettempdir() == str(long)
    folder = get_temp_dir()
    assert folder.startswith("/tmp/pymp-")
    os.rmdir(folder)


def test_shortages_are_listed_before_the_start(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (64, 64))
    monkeypatch.setattr(machine, "free_shared_memory", lambda: 2**20)
    files, memory = machine.list_shortages(4, 8, 256, (224, 224))
    assert "may open 64 files" in files
    assert "1.0 MiB free, prefetched batches take up to 588.0 MiB" in memory
    assert machine.list_shortages(0, 0, 256, (224, 224)) == []


# --- Devices --------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """A function that pretends that this machine has so many GPUs."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_devices_of_processes(gpus):
    gpus(0)
    assert choose_device("auto", 1) == choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"DEVICE is cuda, but .*DEVICE cpu"):
        choose_device("cuda", 0)
    gpus(2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"Process 2 of this machine has no GPU.*per-node 2"):
        choose_device("auto", 2)
    gpus(1)  # as srun --gpus-per-task=1 shows each process its own
    assert choose_device("cuda", 3) == torch.device("cuda", 0)


def test_two_processes_on_one_gpu_are_refused(monkeypatch):
    from utils import devices

    def gather(gpus, own):
        gpus[:] = [("a", "1"), ("b", "1"), own]

    monkeypatch.setattr(devices.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(devices.dist, "all_gather_object", gather)
    monkeypatch.setattr(devices.socket, "gethostname", lambda: "b")
    for uuid, refused in (("1", True), ("2", False)):
        properties = SimpleNamespace(uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        if refused:
            with pytest.raises(ConfigError, match="Processes 1 and 2 on b share one GPU"):
                devices.check_gpus_differ(torch.device("cuda", 0))
        else:
            devices.check_gpus_differ(torch.device("cuda", 0))


# --- Streams --------------------------------------------------------------------------------------

PROGRAM = """
import sys
from utils.streams import protect_streams
protect_streams()
for number in range(20_000):
    print(number, chr(0x5b9e))
sys.stdout.flush()
print("reached", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("shell", "errors"),
    [
        ("{} >&-", "reached\n"),
        ("{} > /dev/full", "reached\n"),
        ("{} | head -n 1 > /dev/null; exit ${{PIPESTATUS[0]}}", "reached\n"),
        (
            "PYTHONUTF8=0 LC_ALL=C {} | tail -n 1 >&2; exit ${{PIPESTATUS[0]}}",
            "reached\n19999 实\n",
        ),
        ("{} 2>&- > /dev/null", ""),
    ],
    ids=["closed", "full", "broken", "locale", "no stderr"],
)
def test_output_that_cannot_be_written_ends_nothing(shell, errors, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = shell.format(f"{sys.executable} {tmp_path / 'program.py'}")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONUTF8", None)
    result = subprocess.run(["bash", "-c", command], env=env, capture_output=True, check=False)
    assert (result.returncode, result.stderr.decode()) == (0, errors)
