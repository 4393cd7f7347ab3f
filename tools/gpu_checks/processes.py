"""Processes of a check: started at the head of a group of their own, ended with all that they have started."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]


def start(command: list[str], output: int | TextIO, errors: int | TextIO) -> subprocess.Popen:
    """Start `command` in the project's folder."""
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=output, stderr=errors, text=True
    )


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started; torchrun's workers have sessions of their own."""
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            for child in map(int, file.read_text(encoding="ascii").split()):
                found += [*descendants(child), child]
    return found
