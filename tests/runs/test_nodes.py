"""Two nodes, as network namespaces of this machine: each is lost once, then one resumes alone: equal bits.

Needs root and `ip netns`. pytest -m slow tests/runs/test_nodes.py
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runs import ROOT, arguments, outcome

pytestmark = pytest.mark.slow
EXACT = ("--opts", "TRAIN.EXACT_WORLD_SIZE=True", "TRAIN.GLOBAL_BATCH_SIZE=16")
FIRST = "10.213.7.1"  # address of the first node, on a network of its own


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """The names of two namespaces that are joined by a cable, `net0` at both ends."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and the command ip")
    names = [f"dat-{os.getpid()}-{number}" for number in range(2)]
    ends = [f"d{os.getpid()}n{number}" for number in range(2)]
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
            if made.returncode:
                pytest.skip("network namespaces cannot be made here")
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "net0")
            ip("-n", name, "address", "add", f"10.213.7.{number + 1}/24", "dev", "net0")
            ip("-n", name, "link", "set", "net0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def start(nodes: list[str], port: int, argv: list[str], log: Path) -> list[subprocess.Popen]:
    """main.py on the nodes, one process each, in process groups of their own; their output is in `<log>-<node>`."""
    started = []
    for rank, node in enumerate(nodes):
        command = ["ip", "netns", "exec", node, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", str(len(nodes)), "--node-rank", str(rank), "--nproc-per-node", "1"]
        command += ["--master-addr", FIRST, "--master-port", str(port), "main.py", *argv]
        with open(f"{log}-{rank}", "w", encoding="utf-8") as output:
            started.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "net0"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return started


def wait(processes: list[subprocess.Popen]) -> list[int]:
    """Their exit codes; nothing of them is left running."""
    try:
        return [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """End all processes of a node, as a loss of its power does."""
    if process.poll() is None:
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(parent: int) -> list[int]:
    """The processes that `parent` and its children have started."""
    found, parents = [], [parent]
    while parents:
        command = ["ps", "--ppid", ",".join(map(str, parents)), "-o", "pid="]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        parents = [int(pid) for pid in listed.split()]
        found += parents
    return found


def test_lost_nodes_and_another_number_of_nodes_change_no_bit(nodes, images, tmp_path):
    undisturbed = arguments(tmp_path, images, *EXACT, tag="undisturbed")
    assert wait(start(nodes[:1], 29510, undisturbed, tmp_path / "undisturbed")) == [0]

    argv = arguments(tmp_path, images, *EXACT, tag="broken")
    checkpoints = tmp_path / "dat_micro" / "broken" / "checkpoints"
    for lost, step in ((1, 2), (0, 4)):
        group = start(nodes, 29510 + step, argv, tmp_path / f"lost-{lost}")
        deadline = time.monotonic() + 500
        while not (checkpoints / f"step-{step}").exists():
            assert time.monotonic() < deadline
            assert [process.poll() for process in group] == [None, None]
            time.sleep(0.02)
        kill(group[lost])
        assert all(wait(group)), "the other node ends, too"
        assert not (checkpoints / "step-6").exists(), "in mid-run"

    assert wait(start(nodes[:1], 29520, argv, tmp_path / "alone")) == [0]
    assert outcome(tmp_path, "broken") == outcome(tmp_path, "undisturbed")
    log = (tmp_path / "dat_micro" / "broken" / "log.txt").read_text()
    assert "Changed since the checkpoint: world_size was 2, is 1" in log
