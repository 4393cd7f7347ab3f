"""Kills, full disks, damage and races: no checkpoint is lost, and a damaged one is reported and skipped."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import safetensors.torch
import torch
from helpers.runs import arguments, outcome
from helpers.states import make_state, save_state, save_steps
from torch import hub

import main
from engine import checkpoint, run_dir
from engine.checkpoint import MANIFEST, Saver
from engine.run_dir import RunDir
from engine.state import TrainState
from reliability.kill_points import POINTS, kill_at
from utils.distributed import Process
from utils.download import download
from utils.errors import CheckpointError, DataError, StopRequested, StorageError
from utils.logging import MetricWriter

fork = multiprocessing.get_context("fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(function: Callable, *args: object) -> int:
    """The exit code of a process that calls `function`; -9 where it was killed."""
    child = fork.Process(target=function, args=args)
    child.start()
    child.join()
    return child.exitcode


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """What is killed here is a process; no power fails."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- Kills ----------------------------------------------------------------------------------------


def save_until_killed(folder: Path, state: TrainState, point: str, nth: int) -> None:
    kill_at(point, nth, rank=0)
    with Saver(folder, keep=2) as saver:
        saver.save(state, {})


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_save_loses_no_checkpoint(point, replacing, tmp_path):
    last = make_state(3)  # no gradients are computed in a forked process
    last.epoch, last.best = 1, {"acc1": 1.0, "step": 3}
    for nth in itertools.count(1):
        shutil.rmtree(tmp_path)
        save_steps(tmp_path, 0, 1, 2, *([3] if replacing else []))
        code = in_child(save_until_killed, tmp_path, last, point, nth)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        found = checkpoint.latest(tmp_path)
        assert found.name.startswith("step-3") or (not replacing and found.name == "step-2")
        state = make_state()
        checkpoint.restore(found, state)
        before_rename = POINTS.index(point) < POINTS.index("renamed")
        assert (state.step, state.epoch) == (
            2 + (replacing or not before_rename),
            not before_rename,
        )
        checkpoint.remove_partial(tmp_path)
        assert all(checkpoint.verify(path) is None for path in tmp_path.iterdir())
        with Saver(tmp_path, keep=2) as saver:
            saver.save(last, {})
        assert names(tmp_path) == ["step-2", "step-3"]
    assert nth > 1 or (point == "set-aside" and not replacing)


def test_what_a_kill_left_is_deleted_when_the_run_starts_again(tmp_path):
    run = RunDir(tmp_path / "run", Process(0, 1, torch.device("cpu")))
    (run.checkpoints / ".tmp-step-3").mkdir(parents=True)
    (run.path / ".tmp-metrics.jsonl-17").write_text("{")
    with run.lock():
        assert names(run.path) == [".lock", "checkpoints", "status.json"]
        assert names(run.checkpoints) == []


def test_everything_is_on_the_disk_before_its_name_and_before_older_ones_go(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2, 3)
    files = checkpoint.snapshot(make_state(3), {})
    steps, rename = [], os.rename

    def note_sync(descriptor: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def note_rename(source: Path, target: Path) -> None:
        steps.append(f"{source.name} > {target.name.rstrip('0123456789')}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    checkpoint.prune(checkpoint.write(tmp_path, "step-3", files), keep=2, best="")
    assert sorted(steps[:5]) == sorted(f"sync {name}" for name in (*files, MANIFEST))
    replaced = next(name for name in steps if name.startswith("step-3-replaced"))
    assert steps[5:] == [
        "sync .tmp-step-3",
        "step-3 > step-3-replaced-",
        ".tmp-step-3 > step-",
        f"sync {tmp_path.name}",
        replaced,
        "step-1 > .tmp-step-",
    ]


# --- What is kept ---------------------------------------------------------------------------------


def damage(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def test_damaged_checkpoints_do_not_push_out_valid_ones(tmp_path):
    paths = save_steps(tmp_path, 1, 2, 3, 4, 5, 6)
    for path in paths[3:5]:
        damage(path)
    checkpoint.prune(paths[-1], keep=2, best="step-1")
    assert names(tmp_path) == ["step-1", "step-3", "step-4", "step-5", "step-6"]
    damage(paths[-1])  # the disk loses what it has just been given
    checkpoint.prune(paths[-1], keep=2, best="step-6")
    assert names(tmp_path) == ["step-1", "step-3", "step-4", "step-5", "step-6"]


def test_a_run_that_resumes_an_older_step_keeps_what_it_writes(tmp_path):
    *_, written = save_steps(tmp_path, 7, 8, 9, 1, 2, 3)
    checkpoint.prune(written, keep=2, best="step-1")
    assert names(tmp_path) == ["step-1", "step-2", "step-3", "step-7", "step-8", "step-9"]


def test_one_whose_epoch_was_not_closed_stays_until_its_successor_is_valid(tmp_path):
    save_steps(tmp_path, 1, 2)
    path, *_ = save_steps(tmp_path, 2)
    assert len(names(tmp_path)) == 3
    damage(path)
    assert checkpoint.latest(tmp_path).name.startswith("step-2-replaced-")
    checkpoint.prune(path, keep=2, best="")
    assert len(names(tmp_path)) == 3
    path, *_ = save_steps(tmp_path, 2)
    checkpoint.prune(path, keep=2, best="")
    assert names(tmp_path) == ["step-1", "step-2"]


def test_a_best_checkpoint_that_cannot_be_used_is_named(tmp_path, logged_warnings):
    checkpoints = tmp_path / "checkpoints"
    best, _ = save_steps(checkpoints, 4, 5)
    state = make_state(6)
    state.best = {"acc1": 1.0, "step": 4}
    save_state(checkpoints, state)
    assert checkpoint.resolve(tmp_path, best=True) == best
    damage(best)
    assert checkpoint.resolve(tmp_path, best=True).name == "step-6"
    assert "step-4, the best, is damaged (model.safetensors has 0" in logged_warnings[0]


# --- Disks that refuse ----------------------------------------------------------------------------


def failing(code: int) -> Callable:
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("function", ["fsync", "mkdir", "rename"])
def test_a_failed_save_is_reported_and_the_next_one_tried(
    function, code, tmp_path, monkeypatch, logged_warnings
):
    save_steps(tmp_path, 1)
    with Saver(tmp_path, keep=2) as saver:
        for step in (2, 3, 4, 5):
            with monkeypatch.context() as patch:
                if step != 4:
                    patch.setattr(os, function, failing(code))
                saver.save(make_state(step), {})
                saver.wait()
            assert saver.failures == {2: 1, 3: 2, 4: 0, 5: 1}[step]
            assert names(tmp_path) == ["step-1", "step-4"][: 1 + (step > 3)]
        saver.save(make_state(6), {})
    assert [
        message for message in logged_warnings if os.strerror(code) in message
    ] == logged_warnings
    assert "step-3: the checkpoint could not be written" in logged_warnings[1]
    assert "2 of 3" in logged_warnings[1]
    assert names(tmp_path) == ["step-4", "step-6"]
    assert all(checkpoint.verify(path) is None for path in tmp_path.iterdir())


def test_the_third_failure_in_a_row_ends_the_run_at_once(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    saver = Saver(tmp_path, keep=2)
    for step in (2, 3):
        saver.save(make_state(step), {})
    with pytest.raises(StorageError, match=r"step-4: .*No space left"):
        saver.save(make_state(4), {})
    assert names(tmp_path) == ["step-1"]


@pytest.mark.parametrize(
    ("end", "raised"),
    [(None, StorageError), (StopRequested("SIGTERM"), StorageError), (DataError("bad"), DataError)],
)
def test_a_run_that_is_not_saved_at_its_end_fails(end, raised, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))

    def run() -> None:
        with Saver(tmp_path, keep=2) as saver:
            saver.save(make_state(1), {})
            if end:
                raise end

    with pytest.raises(raised):
        run()


def test_an_old_checkpoint_that_cannot_be_deleted_only_logs_a_warning(
    tmp_path, monkeypatch, logged_warnings
):
    *_, written = save_steps(tmp_path, 1, 2, 3)
    monkeypatch.setattr(shutil, "rmtree", failing(errno.EIO))
    checkpoint.prune(written, keep=2, best="")
    assert "what is not kept cannot be deleted (Input/output error)" in logged_warnings[0]
    assert checkpoint.latest(tmp_path) == written


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    monkeypatch.setattr(Path, "iterdir", failing(errno.EIO))
    with pytest.raises(StorageError, match="cannot be listed"):
        checkpoint.latest(tmp_path)


def test_the_largest_size_of_a_file(tmp_path):
    save_steps(tmp_path, 1)
    files = checkpoint.snapshot(make_state(2), {})

    def save_under_a_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(StorageError, match="File too large"):
            checkpoint.write(tmp_path, "step-2", files)

    assert in_child(save_under_a_limit) == 0
    assert names(tmp_path) == ["step-1"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 24 MiB, which is a few checkpoints of the small run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.slow
def test_a_disk_that_was_full_for_a_while_changes_nothing(
    images, small_disk, tmp_path, monkeypatch, capsys
):
    keep = "--opts", "CHECKPOINT.KEEP=2", "TRAIN.EPOCHS=3"
    assert main.main(arguments(tmp_path, images, *keep)) == 0
    save, failures = Saver.save, []

    def save_on_a_full_disk(self, state, metadata):
        if state.step == 2:
            fill(small_disk)
        self.wait()
        failures.append(self.failures)
        if state.step == 4:
            (small_disk / "ballast").unlink()
        save(self, state, metadata)

    monkeypatch.setattr(Saver, "save", save_on_a_full_disk)
    assert main.main(arguments(small_disk, images, *keep)) == 0
    assert failures == [0, 0, 1, 2, 0, 0]
    assert outcome(small_disk) == outcome(tmp_path)
    assert "No space left on device" in capsys.readouterr().out
    run = small_disk / "dat_micro" / "run"
    assert sorted(path.name for path in run.glob("**/.tmp-*")) == []
    records = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    noted = {record["step"] for record in records if "checkpoint/failures" in record}
    assert {3} <= noted <= {2, 3}  # step 2 may be refused before its save returns


def test_a_disk_that_stays_full_ends_the_run(images, small_disk, tmp_path, monkeypatch, capsys):
    write = checkpoint.write

    def write_on_a_full_disk(folder, name, files):
        if name == "step-2":
            fill(small_disk)
        return write(folder, name, files)

    monkeypatch.setattr(checkpoint, "write", write_on_a_full_disk)
    assert main.main(arguments(small_disk, images)) == 6
    assert "step-4: the checkpoint could not be written" in capsys.readouterr().err
    checkpoints = small_disk / "dat_micro" / "run" / "checkpoints"
    assert names(checkpoints) == ["step-1"]
    assert checkpoint.verify(checkpoints / "step-1") is None


# --- Damage ---------------------------------------------------------------------------------------


def random_damage(step: Path, rng: random.Random) -> str:
    """Damage one file of the checkpoint `step`; what was done to it."""
    file = rng.choice(sorted(step.iterdir()))
    content = bytearray(file.read_bytes())
    kind = rng.choice(["cut", "flip", "flip", "zero", "missing"])
    at = rng.randrange(len(content))
    if kind == "missing":
        file.unlink()
    elif kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "cut":
        os.truncate(file, int(len(content) * rng.choice([0, 0.25, 0.5, 0.99, 0.9999])))
    else:
        content[at:] = bytes(len(content) - at)  # a power failure
        if content == file.read_bytes():
            return random_damage(step, rng)
        file.write_bytes(content)
    return f"{kind} of {file.name} at {at}"


def test_random_damage_is_detected_and_survived(tmp_path, logged_warnings):
    good, bad = save_steps(tmp_path / "checkpoints", 1, 2)
    rng, intact = random.Random(0), shutil.copytree(bad, tmp_path / "intact")
    for _ in range(220):
        shutil.rmtree(bad)
        shutil.copytree(intact, bad)
        done = random_damage(bad, rng)
        logged_warnings.clear()
        assert checkpoint.latest(bad.parent) == good, done
        (message,) = logged_warnings
        assert message.startswith(f"{bad} is damaged and skipped: ")
        named = done.split()[2]
        assert named in message or MANIFEST in (named, message.split()[-1])


MANIFESTS = [
    *(b"", b"null", b"[]", b"{}", b"1e999", b"NaN", b'"model.safetensors"', b"\xff\xfe", b"{" * 99),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'{"bytes": 1', b"\0" * 512),
]
NAMES = ["../state.json", "/etc/passwd", ".", "", "a\0b", "\ud800", "model", "x" * 300]
ENTRIES = [None, [], {}, 3, "x", {"bytes": 1}, {"bytes": float("nan"), "sha256": "0"}]
ENTRIES += [{"bytes": 10**400, "sha256": None}, {"bytes": "1", "sha256": []}]


def test_manifests_of_any_shape_are_damage_and_nothing_else(tmp_path, logged_warnings):
    good, bad = save_steps(tmp_path, 1, 2)
    manifest = json.loads((bad / MANIFEST).read_bytes())
    strange = [{**manifest, name: manifest["state.json"]} for name in NAMES]
    strange += [{**manifest, "model.safetensors": entry} for entry in ENTRIES]
    strange += [{n: manifest[n] for n in manifest if n != name} for name in checkpoint.REQUIRED]
    for content in [*MANIFESTS, *(json.dumps(entries).encode() for entries in strange)]:
        (bad / MANIFEST).write_bytes(content)
        assert checkpoint.latest(tmp_path) == good, content[:100]
    (bad / MANIFEST).unlink()
    (bad / MANIFEST).mkdir()
    assert checkpoint.latest(tmp_path) == good
    assert all(MANIFEST in message or "model.safetensors" in message for message in logged_warnings)


def forge(step: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and give it the right size and SHA-256."""
    (step / name).write_bytes(content)
    manifest = json.loads((step / MANIFEST).read_bytes())
    manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_tensors_that_are_not_the_models_are_our_own_error(name, tmp_path):
    (step,) = save_steps(tmp_path, 1)
    file = step / f"{name}.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    tensors = safetensors.torch.load_file(file)
    first, *_ = (key for key in tensors if tensors[key].ndim == 2)
    wrong = [
        {k: v for k, v in tensors.items() if k != first},
        {**tensors, "z.exp_avg": torch.ones(2)},
    ]
    wrong += [
        {**tensors, first: tensors[first].T.contiguous()},
        {**tensors, first: tensors[first].int()},
    ]
    forged = [safetensors.torch.save(t) for t in wrong]
    forged += [content[:-4], b"", b"\0" * 8, (2**60).to_bytes(8, "little") + content[8:]]
    forged += [(100_000_001).to_bytes(8, "little") + content[8:], content + b"\0\0\0\0"]
    rng = random.Random(0)
    for _ in range(40):
        flipped = bytearray(content)
        flipped[rng.randrange(header)] ^= 1 << rng.randrange(8)
        forged.append(bytes(flipped))
    for damaged in forged:
        forge(step, file.name, damaged)
        assert checkpoint.verify(step) is None
        with pytest.raises(CheckpointError, match=f"{name}.safetensors"):
            checkpoint.restore(step, make_state())


@pytest.mark.parametrize("key", ["step", "epoch", "skipped", "best", "scaler"])
def test_state_without_a_key_or_with_another_kind_of_value_is_refused_by_its_name(key, tmp_path):
    (step,) = save_steps(tmp_path, 1)
    metadata = json.loads((step / "state.json").read_bytes())
    for value in ("x", None, [], 1.5, float("nan")):
        forge(step, "state.json", json.dumps(metadata | {key: value}).encode())
        with pytest.raises(CheckpointError, match=rf"state\.json.*{key}"):
            checkpoint.restore(step, make_state())
    del metadata[key]
    forge(step, "state.json", json.dumps(metadata).encode())
    with pytest.raises(CheckpointError, match=rf"state\.json has no '{key}'"):
        checkpoint.restore(step, make_state())
    with pytest.raises(CheckpointError, match=r"state\.json has no 'classes'"):
        checkpoint.read_metadata(save_steps(tmp_path, 2)[0])["classes"]


@pytest.mark.parametrize("content", MANIFESTS)
def test_state_of_any_shape_is_our_own_error(content, tmp_path):
    (step,) = save_steps(tmp_path, 1)
    forge(step, "state.json", content)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.read_metadata(step)


# --- Two runs in one folder -----------------------------------------------------------------------


def race(path: Path, start: object, outcomes: object) -> None:
    run = RunDir(path, Process(0, 1, torch.device("cpu")))
    start.wait()
    try:
        with run.lock():
            outcomes.put((os.getpid(), None))
            start.wait()  # the others have been refused
    except StorageError as error:
        outcomes.put((os.getpid(), str(error)))
        start.wait()


def test_of_runs_that_start_at_once_one_wins_and_is_named(tmp_path):
    count = 3
    for number in range(5):
        start, outcomes = fork.Barrier(count), fork.SimpleQueue()
        path = tmp_path / str(number % 2)  # also where one has been before
        runs = [fork.Process(target=race, args=(path, start, outcomes)) for _ in range(count)]
        for run in runs:
            run.start()
        results = dict(outcomes.get() for _ in runs)
        for run in runs:
            run.join()
        (winner,) = (pid for pid, refusal in results.items() if refusal is None)
        for pid, refusal in results.items():
            assert pid == winner or f"in use by process {winner} on " in refusal


def test_a_killed_run_leaves_its_folder_to_the_next_though_its_workers_live(tmp_path):
    run = RunDir(tmp_path, Process(0, 1, torch.device("cpu")))
    held = fork.SimpleQueue()

    def hold() -> None:
        with run.lock():
            worker = fork.Process(target=time.sleep, args=(60,))
            worker.start()
            held.put(worker.pid)
            time.sleep(60)

    holder = fork.Process(target=hold)
    holder.start()
    worker = held.get()
    with pytest.raises(StorageError, match=f"process {holder.pid}"), run.lock():
        pass
    holder.kill()
    holder.join()
    os.kill(worker, 0)  # it is alive
    with run.lock():
        os.kill(worker, signal.SIGKILL)


def test_a_folder_deleted_while_it_is_locked_is_not_held(tmp_path, monkeypatch):
    run, lock = RunDir(tmp_path, Process(0, 1, torch.device("cpu"))), run_dir.fcntl.lockf
    monkeypatch.setattr(
        run_dir.fcntl, "lockf", lambda *args: (tmp_path / ".lock").unlink() or lock(*args)
    )
    with pytest.raises(StorageError, match="was deleted while"), run.lock():
        pass


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_machine_holds_is_not_taken_for_none(code, tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir.fcntl, "lockf", failing(code))
    (tmp_path / ".lock").write_text("process 1 on another machine")
    run = RunDir(tmp_path, Process(0, 1, torch.device("cpu")))
    with pytest.raises(StorageError, match="in use by process 1 on another machine"), run.lock():
        pass


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, logged_warnings):
    monkeypatch.setattr(run_dir.fcntl, "lockf", failing(errno.ENOLCK))
    with RunDir(tmp_path, Process(0, 1, torch.device("cpu"))).lock():
        assert "No locks available" in logged_warnings[0]


# --- Records --------------------------------------------------------------------------------------


def record(folder: Path, *steps: int, resumed: int = 0) -> bytes:
    writer = MetricWriter(folder, resumed, 0, every=2)
    for step in steps:
        writer.metrics(step, {"train/loss": 1 / step})
        writer.timing(step, {"time/images_per_s": 0.5})
    writer.close()
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("resumed", [0, 1, 4, 5, 6])
@pytest.mark.parametrize("tail", [b"", b'{"upd', b'{"step": 8, "train/loss": 0.125}', b"\0" * 99])
def test_records_after_a_kill_are_those_of_an_unbroken_run(
    resumed, tail, tmp_path, logged_warnings
):
    unbroken = record(tmp_path, 2, 4, 6)
    for name in ("metrics", "timing"):
        with (tmp_path / f"{name}.jsonl").open("ab") as file:
            file.write(tail)
    rest = [step for step in (2, 4, 6) if step > resumed]
    assert record(tmp_path, *rest, resumed=resumed) == unbroken
    steps = [json.loads(line)["step"] for line in (tmp_path / "timing.jsonl").open()]
    assert steps == [2, 4, 6]
    assert logged_warnings == []


@pytest.mark.parametrize("kept", [None, b"", b'{"step": 2}\n', b"\xff\xfe\n[]\n{}\n", b"1\n" * 5])
def test_records_that_are_missing_are_named_and_the_run_continues(kept, tmp_path, logged_warnings):
    if kept is not None:
        (tmp_path / "metrics.jsonl").write_bytes(kept)
    rest = record(tmp_path, 6, resumed=5)
    assert [json.loads(line)["step"] for line in rest.splitlines()][-1] == 6
    assert (
        f"metrics.jsonl lacks records of steps {3 if kept and b'2' in kept else 1} to 5"
        in logged_warnings[-1]
    )


def test_tensorboard_drops_what_is_recorded_again(tmp_path, monkeypatch):
    from torch.utils import tensorboard

    calls = []
    monkeypatch.setattr(
        tensorboard, "SummaryWriter", lambda *args, **kwargs: calls.append(kwargs) or MagicMock()
    )
    MetricWriter(tmp_path, 7, 0, every=10).close()
    assert calls == [{"purge_step": 8}]


def test_records_wait_while_there_is_no_space(tmp_path, logged_warnings, monkeypatch):
    for name in ("unlimited", "tight", "full"):
        (tmp_path / name).mkdir()
    unlimited = record(tmp_path / "unlimited", *range(1, 200))

    def record_under_a_limit() -> None:
        writer = MetricWriter(tmp_path / "tight", 0, 0, every=2)
        for step in range(1, 200):
            limit = 3001 if step < 150 else -1  # in the middle of a line
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
            writer.metrics(step, {"train/loss": 1 / step})
            writer.timing(step, {"time/images_per_s": 0.5})
        writer.close()
        assert "metrics.jsonl cannot be written, its records wait" in "".join(logged_warnings)

    assert in_child(record_under_a_limit) == 0
    assert (tmp_path / "tight" / "metrics.jsonl").read_bytes() == unlimited

    (tmp_path / "full" / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("utils.logging._cut_records", lambda *position: 0)
    writer = MetricWriter(tmp_path / "full", 0, 0, every=2)
    writer.metrics(1, {"train/loss": 1.0})
    with pytest.raises(StorageError, match="last records"):
        writer.close()


# --- Downloads ------------------------------------------------------------------------------------


class Response(io.BytesIO):
    """What a web server answers."""

    def info(self) -> "Response":
        return self

    def get_all(self, name: str) -> None:
        return None


def test_a_download_is_the_file_that_was_asked_for_or_none(tmp_path, monkeypatch):
    asked = []

    def answer(request):
        asked.append(request.full_url)
        return Response(b"weights")

    monkeypatch.setattr(hub, "urlopen", answer)
    monkeypatch.setattr(hub, "get_dir", lambda: str(tmp_path))
    digest = hashlib.sha256(b"weights").hexdigest()
    url = "https://host/some/w.safetensors?download=1"
    path = download(f"{url}#sha256={digest.upper()}")
    assert (path.read_bytes(), path.suffix) == (b"weights", ".safetensors")
    assert download(f"{url}#sha256={digest}") == path
    assert asked == [url]
    path.write_bytes(b"damaged")
    assert download(f"{url}#sha256={digest}").read_bytes() == b"weights"
    assert asked == [url, url]

    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(CheckpointError, match=r"https://host/some/w\.pth.*invalid hash value"):
        download(f"https://host/some/w.pth#sha256={other}")
    assert set(names(path.parent)) == {f"{other}.lock", f"{digest}.lock", path.name}
    monkeypatch.setattr(hub, "urlopen", failing(errno.ECONNREFUSED))
    with pytest.raises(CheckpointError, match=r"Connection refused.*give its path"):
        download(f"https://host/some/w.pth#sha256={other}")
    assert not list(path.parent.glob(f"{other}.p*"))


@pytest.mark.parametrize(
    "place", ["https://host/w.pth", "http://host/w#sha256=" + "0" * 64, "file:///w.pth"]
)
def test_nothing_else_is_downloaded(place, monkeypatch):
    monkeypatch.setattr(hub, "urlopen", lambda request: pytest.fail("it was asked for"))
    with pytest.raises(CheckpointError, match="a download needs https and its SHA-256"):
        download(place)
    assert download("w.pth") == Path("w.pth")
