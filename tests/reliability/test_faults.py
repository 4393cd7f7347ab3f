"""Faults of disks and neighbours: one error, damaged records, leftovers, pauses; and the recorder of power loss."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.images import write_image_folder
from helpers.pipeline import image_dataset, train_loader, train_transform
from helpers.runs import arguments, outcome, run_of
from helpers.states import make_state, save_steps

import data
import main
from data import BadFile, BadSamples, bad_samples, workers
from engine import checkpoint, evaluate, run_dir
from engine.checkpoint import Saver
from engine.hooks import AfterStep
from engine.results import StepResults
from engine.run_dir import RunDir
from reliability.disk import after_power_loss, read_recording, record_operations
from reliability.harness import Sandbox
from reliability.jobs import paused_evaluation_trial
from utils import files, signals
from utils.distributed import Process
from utils.errors import DataError, StorageError
from utils.logging import MetricWriter

pytestmark = pytest.mark.usefixtures("restore_signals")
fork = multiprocessing.get_context("fork")
ONE = Process(0, 1, torch.device("cpu"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(code: int, times: int, function: Callable) -> Callable:
    """`function` that fails so many times."""
    left = [times]

    def fail(*args: object, **options: object) -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, os.strerror(code))
        return function(*args, **options)

    return fail


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0, 0.0))


# --- Passing errors, leftovers, the cost of a save ------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_checkpoint_is_read_again_after_a_passing_error(code, tmp_path, monkeypatch):
    *_, newest = save_steps(tmp_path, 1, 2)
    monkeypatch.setattr(io, "open", failing(code, 1, io.open))
    assert checkpoint.latest(tmp_path) == newest
    monkeypatch.setattr(os, "listdir", failing(code, 1, os.listdir))
    assert checkpoint.latest(tmp_path) == newest
    monkeypatch.setattr(io, "open", failing(code, 1, io.open))
    assert checkpoint.read_metadata(newest)["step"] == 2


def test_a_lasting_error_is_named_with_its_file(tmp_path, monkeypatch, logged_warnings):
    older, newest = save_steps(tmp_path, 1, 2)
    (newest / "model.safetensors").unlink()
    assert checkpoint.latest(tmp_path) == older
    assert "model.safetensors: No such file or directory" in logged_warnings[0]


def test_links_and_leftovers_among_checkpoints_stop_nothing(tmp_path, monkeypatch, logged_warnings):
    elsewhere = tmp_path / "elsewhere"
    folder = tmp_path / "checkpoints"
    kept, *_ = save_steps(elsewhere, 1)
    (folder / ".tmp-step-9" / "inside").mkdir(parents=True)
    (folder / "step-1").symlink_to(kept)
    (folder / ".tmp-step-8").symlink_to(kept)
    (folder / "step-4").symlink_to("nowhere")
    rmtree = shutil.rmtree

    def refuse(path: Path, *args: object, **options: object) -> None:
        if Path(path).name == ".tmp-step-9":
            raise OSError("something without a number")
        rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with RunDir(tmp_path, ONE).lock():
        assert names(folder) == [".tmp-step-9", "step-1", "step-4"]
        with Saver(folder, keep=2) as saver:
            for step in (3, 4, 5, 9):
                saver.save(make_state(step), {})
    assert checkpoint.verify(kept) is None
    assert [name for name in names(folder) if "replaced" not in name] == [
        *(".tmp-step-9", "step-5", "step-9"),
    ]
    assert "something without a number" in logged_warnings[0]
    assert not [message for message in logged_warnings if "None" in message]


def test_a_kept_checkpoint_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    hashed, digest = [], hashlib.file_digest

    def note_and_digest(file, kind):
        hashed.append(Path(file.name).parent.name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", note_and_digest)
    with Saver(tmp_path, keep=3) as saver:
        for step in (1, 2, 3, 4):
            saver.save(make_state(step), {})
    assert sorted(set(hashed)) == ["step-1", "step-2", "step-3", "step-4"]
    assert len(hashed) == 4 * len(checkpoint.FILES)
    (tmp_path / "step-3" / "model.safetensors").write_bytes(b"")
    with Saver(tmp_path, keep=3) as saver:
        saver.save(make_state(5), {})
    assert names(tmp_path) == ["step-2", "step-3", "step-4", "step-5"]


# --- Records --------------------------------------------------------------------------------------


def test_the_records_are_on_the_disk_before_a_checkpoint_is_written(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    writer = MetricWriter(tmp_path, 0, 0, every=1)
    with Saver(tmp_path / "checkpoints", keep=2) as saver:
        saver.sync_records = writer.sync
        saver.save(make_state(1), {})
    first = synced.index("model.safetensors")
    records = {"metrics.jsonl", "timing.jsonl", tmp_path.name}
    assert set(synced[:first]) == records
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, 1, fsync))
    with Saver(tmp_path / "checkpoints", keep=2) as saver:
        saver.sync_records = writer.sync
        saver.save(make_state(2), {})
        saver.wait()
        assert saver.failures == 1
        saver.save(make_state(3), {})
    writer.close()
    assert names(tmp_path / "checkpoints") == ["step-1", "step-3"]


def test_new_folders_are_synced_once(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
    )
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == ["b", "a", tmp_path.name]
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def test_an_evaluation_whose_record_is_missing_is_named(tmp_path, logged_warnings):
    lines = [{"step": 2, "epoch": 1, "val/acc1": 5.0}, {"step": 4, "train/loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricWriter(tmp_path, 4, 2, every=2, eval_every=1).close()
    assert "metrics.jsonl lacks the evaluation of epoch 2" in logged_warnings[-1]
    MetricWriter(tmp_path, 4, 1, every=2, eval_every=1).close()
    MetricWriter(tmp_path, 4, 2, every=2, eval_every=3).close()
    assert len(logged_warnings) == 1


def test_an_error_at_the_closing_of_the_records_is_one_sentence(
    images, tmp_path, monkeypatch, capsys
):
    class Full(io.FileIO):
        """A file on a network disk that reports at close that it is full."""

        def close(self) -> None:
            closed = self.closed
            super().close()
            if not closed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rewind = MetricWriter.rewind

    def rewind_and_replace(self: MetricWriter, step: int, epoch: int) -> None:
        rewind(self, step, epoch)
        self._files["timing"] = Full(tmp_path / "timing.jsonl", "a")

    monkeypatch.setattr(MetricWriter, "rewind", rewind_and_replace)
    short = "--opts", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"
    assert main.main(arguments(tmp_path, images, *short)) == 6
    assert "timing.jsonl (No space left on device)" in capsys.readouterr().err
    status = json.loads((run_of(tmp_path) / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)


def test_an_error_at_the_closing_of_the_lock_changes_nothing(tmp_path, monkeypatch):
    run = RunDir(tmp_path, ONE)

    class Lock:
        """A lock whose file cannot be closed."""

        def close(self) -> None:
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(run_dir.RunDir, "_lock", lambda self: Lock())
    with run.lock():
        pass
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


# --- Bad samples ----------------------------------------------------------------------------------

FILES = [BadFile(f"train/{name}.jpg", "empty", 0, index) for index, name in enumerate("abcd")]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_the_limit_holds_without_locks(code, tmp_path, monkeypatch):
    monkeypatch.setattr(bad_samples.fcntl, "flock", failing(code, 99, lambda *args: None))
    report = BadSamples(tmp_path / "bad_samples.jsonl", limit=2)
    report.add(FILES[:2])
    assert len(report.path.read_text().splitlines()) == 2
    with pytest.raises(DataError, match="3 training images"):
        report.add(FILES[2:3])


def test_the_limit_holds_on_a_full_disk_and_the_run_continues(
    tmp_path, monkeypatch, logged_warnings
):
    def refuse(path: Path, content: str) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(bad_samples, "write_atomically", refuse)
    report = BadSamples(tmp_path / "bad_samples.jsonl", limit=2)
    report.add(FILES[:2])
    assert "lacks records, which the log has: no space" in logged_warnings[-1]
    with pytest.raises(DataError, match="3 training images"):
        report.add(FILES[2:3])


@pytest.mark.parametrize(
    "damage", [b"\0" * 8, b'{"path": "x', b'{"path": 1}\n', b"\xff\n", b"[]\n", b"7\n"]
)
def test_damaged_records_of_bad_samples_are_reported_and_dropped(damage, tmp_path, logged_warnings):
    report = BadSamples(tmp_path / "bad_samples.jsonl", limit=3)
    report.add(FILES[:1])
    good = report.path.read_bytes()
    report.path.write_bytes(good + damage)
    BadSamples(report.path, limit=3).add(FILES[:1])
    assert report.path.read_bytes() == good
    assert "1 damaged records are dropped" in logged_warnings[-1]


# --- Neighbours -----------------------------------------------------------------------------------


def test_a_fresh_start_in_a_used_folder_is_refused(images, unbroken, tmp_path, capsys):
    shutil.copytree(run_of(unbroken), run_of(tmp_path))
    before, files_before = outcome(tmp_path), names(run_of(tmp_path) / "checkpoints")
    fresh = "--opts", "CHECKPOINT.AUTO_RESUME=False"
    assert main.main(arguments(tmp_path, images, *fresh)) == 4
    message = capsys.readouterr().err
    assert "CHECKPOINT.AUTO_RESUME False" in message
    assert "--tag" in message
    assert main.main(arguments(tmp_path, images, *fresh, "--resume", str(run_of(tmp_path)))) == 4
    assert outcome(tmp_path) == before
    assert names(run_of(tmp_path) / "checkpoints") == files_before


def test_a_fresh_start_without_auto_resume_elsewhere(images, tmp_path):
    settings = "--opts", "CHECKPOINT.AUTO_RESUME=False", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"
    assert main.main(arguments(tmp_path, images, *settings)) == 0


@pytest.mark.parametrize("sets", [False, True])
def test_a_checkpoint_that_is_deleted_during_its_evaluation(
    sets, images, unbroken, tmp_path, monkeypatch, capsys
):
    shutil.copytree(run_of(unbroken), run_of(tmp_path))
    out = ["--out", str(tmp_path / "out")] if sets else []
    argv = arguments(tmp_path, images, "--eval", *out)
    assert main.main(argv) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    validate = evaluate.validate

    def validate_and_prune(**options: object) -> object:
        shutil.rmtree(run_of(tmp_path) / "checkpoints", ignore_errors=True)
        return validate(**options)

    monkeypatch.setattr(evaluate, "validate", validate_and_prune)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert main.main(argv) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    if sets:
        assert len(found["results"]) == len(expected["results"]) == 2
    else:
        assert found == expected
        assert {"model", "ema"} <= found.keys()


# --- Workers that are asked to stop ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("main_too", [False, True])
def test_workers_that_are_ended_with_the_job_stop_the_run(
    main_too, images, unbroken, tmp_path, monkeypatch
):
    asked = []

    def kill_workers(self: AfterStep, results: StepResults) -> None:
        asked.append(self.state.step)
        if len(asked) == 2:
            # By another process: from their own, SIGTERM is how a loader ends its workers.
            pids = [str(worker.pid) for worker in multiprocessing.active_children()]
            subprocess.run(["kill", "-TERM", *pids], check=True)
            if main_too:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        after_step(self, results)

    after_step = AfterStep.__call__
    with monkeypatch.context() as patch:
        patch.setattr(AfterStep, "__call__", kill_workers)
        assert main.main(arguments(tmp_path, images, "--workers", "2")) == 75
    assert max(asked) in (2, 3)
    assert main.main(arguments(tmp_path, images)) == 0
    assert outcome(tmp_path) == outcome(unbroken)


def test_a_signal_to_a_worker_that_starts_stops_the_run(images, monkeypatch):
    """Between its fork and `start_worker` a worker does not know what to do with a signal."""

    def start_late(number: int) -> None:
        subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)
        workers.start_worker(number)

    monkeypatch.setattr("data.loader.start_worker", start_late)
    dataset = image_dataset(images, transform=train_transform(32), train=True)
    sampler = data.TrainBatchSampler(52, batch_size=4, micro_batches=1, total_steps=13, seed=0)
    stop = signals.StopRequest()
    with stop.handle_signals():
        stop.start_training(0)
        stop.defer_to_steps()
        batches = list(train_loader(dataset, sampler, num_workers=2, timeout=60))
        assert stop.requested
    assert len(batches) == 13


def test_a_worker_that_dies_while_a_stop_is_asked_for_is_the_stop(images, monkeypatch):
    dataset = workers.TrackedDataset(image_dataset(images), num_workers=1)
    dataset.notes[0] = torch.tensor([17, 2, 0.0, workers.IDLE])
    dataset.note_death(17, signal.SIGKILL)
    assert isinstance(dataset.death, DataError)
    assert dataset.dataset.path(2) in str(dataset.death)
    dataset.death = None
    monkeypatch.setattr(signals, "is_stopping", lambda: True)
    dataset.note_death(17, signal.SIGKILL)
    assert isinstance(dataset.death, workers.WorkerStopped)


def test_without_its_workers_a_loader_gives_the_same_batches(images):
    dataset = image_dataset(images, transform=train_transform(32), train=True)
    sampler = data.TrainBatchSampler(52, batch_size=4, micro_batches=1, total_steps=13, seed=0)
    expected = list(train_loader(dataset, sampler))
    loader = train_loader(dataset, sampler, num_workers=1, timeout=60)
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == 5:
            loader.dataset.death = workers.WorkerStopped()
    assert len(found) == len(expected) == 13
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))


def load_slowly(root: Path, started: multiprocessing.Event) -> None:
    """Load images, each of which takes longer than a pause may last."""
    os.setpgrp()
    dataset = image_dataset(root, transform=train_transform(32), train=True)
    read = dataset.read

    def read_slowly(index: int) -> bytes:
        started.set()
        time.sleep(1.5)
        return read(index)

    dataset.read = read_slowly
    sampler = data.TrainBatchSampler(4, batch_size=1, micro_batches=1, total_steps=2, seed=0)
    assert len(list(train_loader(dataset, sampler, num_workers=1, timeout=2.5))) == 2
    os._exit(0)


@pytest.mark.slow
def test_a_pause_of_the_job_is_no_hang_of_a_worker(tmp_path):
    root = write_image_folder(tmp_path / "set", classes=2, train=2, val=1)
    started = fork.Event()
    job = fork.Process(target=load_slowly, args=(root, started))
    job.start()
    assert started.wait(60)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    pids = [job.pid, *map(int, children)]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(3 if number == signal.SIGSTOP else 0)
    job.join(30)
    assert job.exitcode == 0


@pytest.mark.slow
def test_a_pause_of_an_evaluation_is_no_hang(tmp_path):
    assert paused_evaluation_trial(Sandbox.create(tmp_path, seed=0, short=True)) == []


# --- The recorder of power loss -------------------------------------------------------------------


def write_a_few_files(folder: Path, out: Path) -> None:
    record_operations(folder, out, rank=0)
    (folder / "unsynced").write_text("lost")
    with (folder / "synced").open("w") as file:
        file.write("kept")
        file.flush()
        os.fsync(file.fileno())
        file.write(" and lost")
    (folder / "new").mkdir()
    files.write_atomically(folder / "new" / "file", "content")
    files.sync(folder)


def test_threads_replace_one_file_at_once(tmp_path):
    """As a signal's thread and the main one, which write status.json."""
    path, contents = tmp_path / "status.json", [f"{i}" * 1000 for i in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: files.write_atomically(path, content), contents))
    assert path.read_text() in contents
    assert names(tmp_path) == ["status.json"]


@pytest.mark.parametrize(("path", "remedy"), [("absent/file", "must exist"), ("/dev/full", "room")])
def test_what_to_do_about_a_file_that_cannot_be_written(path, remedy, tmp_path):
    with pytest.raises(OSError, match="Errno") as caught:
        (tmp_path / path).write_bytes(bytes(2**20))
    assert remedy in files.storage_remedy(caught.value)


def test_what_power_loss_leaves_is_what_was_synced(tmp_path):
    folder, out = tmp_path / "disk", tmp_path / "recording"
    folder.mkdir()
    child = fork.Process(target=write_a_few_files, args=(folder, out))
    child.start()
    child.join()
    assert child.exitcode == 0
    recorded = list(read_recording(out))
    assert {operation.split()[0] for operation, _ in recorded} == {
        *("open", "write", "close", "fsync", "mkdir", "replace"),
    }
    _, nodes = recorded[-1]
    content = {"unsynced": b"", "synced": b"kept", "new": None, "new/file": b"content", "": None}
    assert after_power_loss(nodes, "all", "synced") == content
    assert after_power_loss(nodes, "all", "zeros")["unsynced"] == bytes(4)
    assert after_power_loss(nodes, "all", "half")["synced"] == b"kept and"
    # The new folder's own entries were never synced.
    del content["new/file"]
    assert after_power_loss(nodes, "synced", "synced") == content
