"""Checks of a disk that fails: each operation on it once, and power lost after any of them.

The run's operations are those of replaced functions: files that Python opens, and the functions of `os` that change
folders or sync them. Whatever is below the run's folder counts, TensorBoard's files excepted.
"""

import builtins
import errno
import functools
import hashlib
import io
import itertools
import os
import pickle
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine import checkpoint
from reliability.harness import Result, Sandbox, differences, finish, launch, outcome
from reliability.storage import STORAGE, copy_stopped_run, reference_runs

FUNCTIONS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "listdir")


# --- Operations -----------------------------------------------------------------------------------


def watch(folder: Path, around: Callable[[str, str, Callable], object]) -> None:
    """Replace functions: each operation on a path below `folder` becomes `around(kind, path, operation)`.

    `operation` does it; that of a "write" takes the data. The kinds are "open", "write", "close" of what is written,
    "open-read", "read", "close-read" of what is read, and FUNCTIONS.
    """
    prefix = f"{os.fspath(folder)}/"

    class WatchedFile(io.FileIO):
        """The operations of an open file."""

        def readinto(self, buffer: memoryview) -> int:
            return around("read", self.name, lambda: io.FileIO.readinto(self, buffer))

        def readall(self) -> bytes:
            return around("read", self.name, lambda: io.FileIO.readall(self))

        def write(self, data: bytes) -> int:
            return around("write", self.name, lambda part=data: io.FileIO.write(self, part))

        def close(self) -> None:
            if self.closed:
                return
            try:
                around("close" if self.writable() else "close-read", self.name, lambda: None)
            finally:
                io.FileIO.close(self)

    def open_watched(
        file: object,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        **rest: object,
    ) -> object:
        path = os.fspath(file) if isinstance(file, str | os.PathLike) else ""
        if not is_watched(path):
            return open_file(file, mode, buffering, encoding, errors, newline, **rest)
        raw_mode = mode.replace("b", "").replace("t", "")
        reads = raw_mode == "r"
        kind = "open-read" if reads else "open"
        raw = around(kind, path, lambda: WatchedFile(path, raw_mode))
        if buffering == 0:
            return raw
        buffer = io.BufferedReader(raw) if reads else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    def is_watched(path: str) -> bool:
        return f"{path}/".startswith(prefix) and "/tensorboard" not in path

    def path_of(target: object, dir_fd: int | None = None) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
        return os.path.join(base, os.fsdecode(target))

    def replacement(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(target: object = ".", *args: object, **options: object) -> object:
            path = path_of(target, options.get("dir_fd"))
            operation = functools.partial(function, target, *args, **options)
            return around(name, path, operation) if is_watched(path) else operation()

        return call

    open_file = builtins.open
    builtins.open = io.open = open_watched
    for name in FUNCTIONS:
        setattr(os, name, replacement(name, getattr(os, name)))


# --- Each operation fails once --------------------------------------------------------------------

FAULTS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "ESTALE": errno.ESTALE, "short": 0, "kill": 0}
READS = ("open-read", "read", "close-read", "listdir")


def can_happen(fault: str, kind: str) -> bool:
    """Whether an operation of `kind` can meet `fault`: reading needs no space, and only a write can be short."""
    return {"short": kind == "write", "ENOSPC": kind not in READS}.get(fault, True)


def name_of(folder: Path, kind: str, path: str) -> str:
    """What an operation is called in every run: its kind and its path below `folder`."""
    return f"{kind} {os.path.relpath(path, folder).replace(str(os.getpid()), 'PID')}"


def count_operations(folder: Path, out: Path, rank: int) -> None:
    """A hook: write the name of each operation to `out`, a line each."""
    lines = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def around(kind: str, path: str, operation: Callable) -> object:
        os.write(lines, f"{name_of(folder, kind, path)}\n".encode())
        return operation()

    watch(folder, around)


def fail_once(folder: Path, fault: str, target: str, occurrence: int, met: Path, rank: int) -> None:
    """A hook: an operation fails, is cut short, or kills the process; then the file `met` is there.

    It is the one named `target` that so many others of its name came before. Threads take turns: its number among all
    operations differs from run to run.
    """
    seen: Counter[str] = Counter()

    def around(kind: str, path: str, operation: Callable) -> object:
        name = name_of(folder, kind, path)
        seen[name] += 1
        if name != target or seen[name] != occurrence + 1:
            return operation()
        met.touch()
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "short":
            (data,) = operation.__defaults__
            return operation(bytes(data)[: len(data) // 2])
        raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]))

    watch(folder, around)


def operation_trial(sandbox: Sandbox, case: tuple[int, str, str, int]) -> dict:
    """Resume at the middle with one operation failing, then once more: an exit code of ours, and equal bits."""
    number, fault, target, occurrence = case
    met = sandbox.folder / "operations" / f"{number}.met"
    folder = copy_stopped_run(sandbox, "operations", number)
    log = sandbox.folder / "operations" / f"{number}.log"
    hook = functools.partial(fail_once, folder, fault, target, occurrence, met)
    victim = launch(sandbox.arguments(folder), log=log, hooks=[hook])
    codes = victim.wait()
    output = victim.output
    finish(*sandbox.arguments(folder), log=log)
    different = differences(outcome(folder), outcome(sandbox.folder / "unbroken"))
    shutil.rmtree(folder)
    return {
        "fault": fault,
        "operation": target,
        "occurrence": occurrence,
        "met": met.exists(),
        "exit_codes": codes,
        "traceback": "Traceback" in output,
        "different": different,
        "last words": output.strip().splitlines()[-1:],
    }


def check_operations(sandbox: Sandbox) -> Result:
    """EIO, ENOSPC, ESTALE, a short write, a kill: 0 or 6 and one sentence, then the end of an undisturbed run."""
    reference_runs(sandbox)
    folder = copy_stopped_run(sandbox, "operations", "counted")
    listing = sandbox.folder / "operations" / "listing"
    hook = functools.partial(count_operations, folder, listing)
    finish(*sandbox.arguments(folder), log=folder / "log", hooks=[hook])
    operations = Counter(listing.read_text().splitlines())
    cases = [
        (fault, name, occurrence)
        for name, count in operations.items()
        for occurrence in range(count)
        for fault in FAULTS
        if can_happen(fault, name.partition(" ")[0])
    ]
    if sandbox.short:
        cases = sandbox.random("operations").sample(cases, 16)
    trials = sandbox.map(operation_trial, [(number, *case) for number, case in enumerate(cases)])
    good = sum(
        trial["exit_codes"][0] in (0, STORAGE, -signal.SIGKILL)
        and not trial["traceback"]
        and not trial["different"]
        for trial in trials
    )
    measured = f"{good}/{len(trials)} of {operations.total()} operations"
    if absent := sum(not trial["met"] for trial in trials):
        measured += f", {absent} did not happen again"
    return Result(measured, good == len(trials), {"trials": trials})


# --- Power loss -----------------------------------------------------------------------------------


@dataclass
class Node:
    """A file or folder: what it holds, and what of that was synced. Children are the numbers of nodes by name."""

    is_folder: bool
    content: bytes = b""
    children: dict[str, int] = field(default_factory=dict)
    synced: bytes = b""
    synced_children: dict[str, int] = field(default_factory=dict)


class Recorder:
    """The nodes below `folder`, number 0, after each operation; a number is not used again, as an inode's is."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.nodes: dict[int, Node] = {}
        self._numbers: dict[int, int] = {}  # by inode
        self._fresh = itertools.count()

    def look(self, synced: int | None) -> None:
        """Bring `nodes` up to date, after the file or folder with the inode `synced` was synced."""
        seen = self._look(self.folder)
        for inode in self._numbers.keys() - seen:
            del self._numbers[inode]
        if synced in self._numbers:
            node = self.nodes[self._numbers[synced]]
            node.synced, node.synced_children = node.content, dict(node.children)

    def _look(self, path: Path) -> set[int]:
        inode = path.stat().st_ino
        if inode not in self._numbers:
            self._numbers[inode] = next(self._fresh)
            self.nodes[self._numbers[inode]] = Node(path.is_dir())
        node, seen = self.nodes[self._numbers[inode]], {inode}
        if node.is_folder:
            with os.scandir(path) as entries:
                children = [Path(entry.path) for entry in entries if entry.name != "tensorboard"]
            for child in children:
                seen |= self._look(child)
            node.children = {c.name: self._numbers[c.stat().st_ino] for c in children}
        else:
            node.content = path.read_bytes()
        return seen


def record_operations(folder: Path, out: Path, rank: int) -> None:
    """A hook: after each operation that changes something, append all nodes below `folder` to the file `out`."""
    recorder, sink = Recorder(folder), out.open("ab")
    lock, looking = threading.RLock(), []  # a checkpoint is written by another thread

    def around(kind: str, path: str, operation: Callable) -> object:
        with lock:
            value = operation()
            if not looking and kind not in ("read", "listdir"):
                looking.append(kind)
                recorder.look(os.stat(path).st_ino if kind == "fsync" else None)
                entry = f"{kind} {os.path.relpath(path, folder)}", recorder.nodes
                pickle.dump(entry, sink)
                sink.flush()
                looking.clear()
            return value

    watch(folder, around)


def read_recording(file: Path) -> Iterator[tuple[str, dict[int, Node]]]:
    """The operations in `file`, and the nodes after each."""
    with file.open("rb") as source:
        while source.peek(1):
            yield pickle.load(source)


# What of the folders' changes and of the files' content reaches the disk. A journal keeps the changes of folders in
# order; all that POSIX warrants is what was synced, the entries of folders included.
SURVIVORS = (("all", "synced"), ("all", "zeros"), ("all", "half"), ("synced", "synced"))
NOISE = ("log.txt", "status.json", "timing.jsonl", ".lock")


def after_power_loss(nodes: dict[int, Node], entries: str, data: str) -> dict[str, bytes | None]:
    """The files, and folders as None, by path, that are there when the power is back."""
    found: dict[str, bytes | None] = {}

    def visit(number: int, path: str) -> None:
        node = nodes[number]
        if node.is_folder:
            found[path] = None
            children = node.children if entries == "all" else node.synced_children
            for name, child in children.items():
                visit(child, os.path.join(path, name))
            return
        lost = len(node.content) - len(node.synced)
        tail = {
            "synced": b"",
            "zeros": bytes(max(0, lost)),
            "half": node.content[-lost:][: lost // 2],
        }
        found[path] = node.synced + (tail[data] if lost > 0 else b"")

    visit(0, "")
    return found


def guaranteed_step(nodes: dict[int, Node]) -> int:
    """The newest step whose checkpoint was saved, its name included."""
    names = [
        Path(path).name
        for path, content in after_power_loss(nodes, "synced", "synced").items()
        if content is None
    ]
    return max((int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit()), default=0)


def power_states(file: Path) -> list[tuple[str, tuple, int]]:
    """The different states in which power loss after each recorded operation leaves the disk.

    Each with its operation, the number of the operation and what survived, and the newest step that was saved.
    """
    states, known = [], set()
    for number, (operation, nodes) in enumerate(read_recording(file)):
        for survivors in SURVIVORS:
            found = after_power_loss(nodes, *survivors)
            quiet = {path: content for path, content in found.items() if not path.endswith(NOISE)}
            digest = hashlib.sha256(pickle.dumps(sorted(quiet.items()))).digest()
            if digest not in known:
                known.add(digest)
                states.append((operation, (number, *survivors), guaranteed_step(nodes)))
    return states


def power_trial(sandbox: Sandbox, state: tuple[str, tuple, int]) -> dict:
    """Lose power after one operation, then finish the run: no saved step is lost, and the end is the same."""
    operation, (number, *survivors), guaranteed = state
    folder = sandbox.new_folder("power", "-".join(map(str, (number, *survivors))))
    recording = read_recording(sandbox.folder / "recording")
    _, nodes = next(itertools.islice(recording, number, None))
    for path, content in after_power_loss(nodes, *survivors).items():
        if content is None:
            (folder / path).mkdir(exist_ok=True)
        else:
            (folder / path).write_bytes(content)
    found = 0
    for checkpoints in folder.glob("*/*/checkpoints"):
        if newest := checkpoint.latest(checkpoints):
            found = checkpoint.read_metadata(newest)["step"]
    log = sandbox.folder / "power" / f"{folder.name}.log"
    victim = launch(sandbox.arguments(folder), log=log)
    codes = victim.wait()
    reference = outcome(sandbox.folder / "unbroken")
    different = differences(outcome(folder), reference) if codes == [0] else ["not finished"]
    shutil.rmtree(folder)
    return {
        "after": operation,
        "survived": survivors,
        "saved_step": guaranteed,
        "found_step": found,
        "exit_codes": codes,
        "different": different,
    }


def check_power_loss(sandbox: Sandbox) -> Result:
    """The states of the disk after each operation of a run: what was saved is there, the records are byte-equal."""
    reference_runs(sandbox)
    folder, recording = sandbox.new_folder("recorded"), sandbox.folder / "recording"
    hook = functools.partial(record_operations, folder, recording)
    finish(*sandbox.arguments(folder), log=sandbox.folder / "recorded.log", hooks=[hook])
    states = power_states(recording)
    chosen = sandbox.random("power").sample(states, 16) if sandbox.short else states
    trials = sandbox.map(power_trial, chosen)
    good = sum(
        trial["found_step"] >= trial["saved_step"] and not trial["different"] for trial in trials
    )
    measured = f"{good}/{len(trials)} of {len(states)} states"
    return Result(measured, good == len(trials), {"trials": trials})
