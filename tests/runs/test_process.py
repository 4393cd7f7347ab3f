"""Runs whose processes are stopped, die, hang or diverge."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU

import pytest
import torch
from helpers import faulty
from helpers.images import write_image_folder
from helpers.pipeline import image_dataset, train_loader, train_transform
from helpers.runs import arguments, outcome, run_group, run_of
from PIL import Image

import data
import main
from data import readers
from engine import checkpoint
from engine.hooks import AfterStep
from engine.run_dir import RunDir
from tools import replay
from utils.distributed import Process
from utils.errors import DataError
from utils.signals import SIGNALS
from utils.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("restore_signals")
ROOT = Path(__file__).resolve().parents[2]
PLAIN = ["AUG.AUTO_AUGMENT=", "AUG.COLOR_JITTER=0", "AUG.REPROB=0", "AUG.MIXUP=0", "AUG.CUTMIX=0"]
FAULTY = ["MODEL.NAME=faulty", "MODEL.ARGS={}", "MODEL.DROP_PATH_RATE=0", *PLAIN]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two steps of 24 images an epoch, one image of which, in steps 2 and 3, is white."""
    root = write_image_folder(tmp_path_factory.mktemp("images"), classes=4, train=13, val=4)
    sampler = data.TrainBatchSampler(52, batch_size=4, micro_batches=6, total_steps=4, seed=0)
    second, third = ({index for micro_batch in range(6) for _, index, _ in sampler.micro_batch(step, micro_batch)}
                     for step in (1, 2))  # fmt: skip
    white = min(second & third)
    Image.new("RGB", (40, 40), "white").save(root / "train" / name_of(white))
    return root


def name_of(index: int) -> str:
    return f"class_{index // 13}/{index % 13:03d}.jpg"


def faulty_arguments(folder: Path, images: Path, *opts: str) -> list[str]:
    return [*arguments(folder, images), "--opts", *FAULTY, *opts]


def status(folder: Path) -> dict:
    return json.loads((run_of(folder, "faulty") / "status.json").read_text())


# --- Divergence -----------------------------------------------------------------------------------


def test_a_step_without_finite_gradient_is_skipped_on_all_processes(images, tmp_path):
    argv = faulty_arguments(tmp_path, images, "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0")
    log = tmp_path / "log"
    assert run_group(2, argv, hooks=[faulty.print_weights], log=log) == [0, 0]
    outputs = (Path(f"{log}-{rank}").read_text() for rank in (0, 1))
    first, second = (re.search(r"^weights (\w+)$", text, re.MULTILINE)[1] for text in outputs)
    assert first == second, "the processes have different weights"
    assert outcome(tmp_path, model="faulty")["skipped"] == 1
    (record,) = map(
        json.loads, (run_of(tmp_path, "faulty") / "skipped.jsonl").read_text().splitlines()
    )
    assert record["step"] == 2
    assert [len(micro_batch) for micro_batch in record["micro_batches"]] == [4] * 6
    before, after = (run_of(tmp_path, "faulty") / "checkpoints" / f"step-{n}" for n in (1, 2))
    name = "model.safetensors"
    assert (before / name).read_bytes() == (after / name).read_bytes()


def test_many_skipped_in_a_row_roll_back_once_then_leave_a_dump_to_replay(images, tmp_path, capsys):
    assert main.main(faulty_arguments(tmp_path, images, "TRAIN.MAX_SKIPPED=2")) == 5
    out, err = capsys.readouterr()
    assert len(re.findall(r"The run rolls back to \S*step-1, once\.", out)) == 1
    dump = run_of(tmp_path, "faulty") / "diverged-2"
    assert str(dump) in err
    assert "TRAIN.BASE_LR" in err
    assert status(tmp_path)["exit_code"] == 5
    last_finite = run_of(tmp_path, "faulty") / "checkpoints" / "step-1" / "model.safetensors"
    assert (dump / "model.safetensors").read_bytes() == last_finite.read_bytes()
    records = (run_of(tmp_path, "faulty") / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [2, 3]

    assert replay.main([str(dump)]) == 0
    assert "of sick are the first that are not finite" in capsys.readouterr().out
    found = json.loads((dump / "replay.json").read_text())
    assert found["step"] == 3
    assert [micro_batch["images"] for micro_batch in found["micro_batches"]] == json.loads(
        records[1]
    )["micro_batches"]
    (bad,) = [micro_batch for micro_batch in found["micro_batches"] if micro_batch["loss"] == "nan"]
    assert any(path.endswith(white_image(images)) for path in bad["images"])
    assert checkpoint.verify(dump) is None


def white_image(images: Path) -> str:
    (path,) = (p for p in images.rglob("*.jpg") if Image.open(p).getextrema() == ((255, 255),) * 3)
    return str(path.relative_to(images / "train"))


def test_after_a_passing_fault_the_run_ends_in_the_same_bits(images, tmp_path, monkeypatch):
    well, ill = tmp_path / "well", tmp_path / "ill"
    for folder in (well, ill):
        folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(faulty.Sick, "cured", True)
        assert main.main(faulty_arguments(well, images)) == 0
    rollback = AfterStep.rollback

    def cure(self, error):
        assert len(checkpoint.list_checkpoints(self.saver.folder)) == 2
        rollback(self, error)
        (kept,) = checkpoint.list_checkpoints(self.saver.folder)
        assert kept.name == "step-1"
        monkeypatch.setattr(faulty.Sick, "cured", True)

    monkeypatch.setattr(AfterStep, "rollback", cure)
    assert main.main(faulty_arguments(ill, images, "TRAIN.MAX_SKIPPED=2")) == 0
    assert outcome(ill, model="faulty") == outcome(well, model="faulty")
    assert not (run_of(ill, "faulty") / "skipped.jsonl").read_text(encoding="utf-8")


def test_running_statistics_that_are_not_finite_count_as_many_skipped(images, tmp_path):
    assert main.main(faulty_arguments(tmp_path, images, "MODEL.ARGS.norm=True")) == 5
    assert (run_of(tmp_path, "faulty") / "diverged-1").is_dir()


def test_the_replayed_step_is_the_trained_one(images, tmp_path, capsys):
    """With augmentation, mixing and drop path, and then the same loss and gradient."""
    argv = [*arguments(tmp_path, images), "--amp-dtype", "float32"]
    assert main.main([*argv, "--opts", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"]) == 0
    folder = run_of(tmp_path)
    assert replay.main([str(folder / "checkpoints" / "step-1")]) == 0
    assert "Everything is finite" in capsys.readouterr().out
    found = json.loads((folder / "checkpoints" / "step-1" / "replay.json").read_text())
    recorded = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    assert recorded["step"] == found["step"] == 2
    losses = [micro_batch["loss"] for micro_batch in found["micro_batches"]]
    assert sum(losses) / 6 == pytest.approx(recorded["train/loss"], rel=1e-5)
    squares = [g["elements"] * (g["mean"] ** 2 + g["std"] ** 2) for g in found["gradients"]]
    assert sum(squares) ** 0.5 == pytest.approx(recorded["train/grad_norm"], rel=1e-4)


def test_replay_of_what_is_not_there_and_of_other_images(images, tmp_path, capsys):
    assert replay.main([str(tmp_path / "diverged-1")]) == 4
    argv = faulty_arguments(tmp_path, images, "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0")
    assert main.main(argv) == 0
    other = write_image_folder(tmp_path / "other", classes=4, train=13, val=4, size=48)
    step = str(run_of(tmp_path, "faulty") / "checkpoints" / "step-1")
    assert replay.main([step, "--data-path", str(other)]) == 3
    assert str(other / "train") in capsys.readouterr().err


# --- Signals --------------------------------------------------------------------------------------


def test_asked_before_the_first_step_it_exits_at_once(images, tmp_path, monkeypatch, capsys):
    opened = []

    def open_split(*args):
        opened.append(args)
        for number in SIGNALS * 2:
            os.kill(os.getpid(), number)
        raise AssertionError("the run continues")

    monkeypatch.setattr(data.dataset, "open_split", open_split)
    assert main.main(faulty_arguments(tmp_path, images)) == 75
    assert len(opened) == 1
    assert "before the first step" in capsys.readouterr().err
    assert status(tmp_path)["exit_code"] == 75


def test_asked_during_an_evaluation_it_is_cut_short_and_done_when_started_again(
    images, tmp_path, monkeypatch, capsys
):
    unbroken, cut = tmp_path / "unbroken", tmp_path / "cut"
    for folder in (unbroken, cut):
        folder.mkdir()
    monkeypatch.setattr(faulty.Sick, "cured", True)
    assert main.main(faulty_arguments(unbroken, images)) == 0
    forward, passes = faulty.Faulty.forward, []

    def asked_in_the_second_evaluation(self, x):
        passes.append(self.training)
        if passes.count(False) == 8 + 2:  # 4 batches for the model and its EMA each
            os.kill(os.getpid(), SIGTERM)
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(faulty.Faulty, "forward", asked_in_the_second_evaluation)
        assert main.main(faulty_arguments(cut, images)) == 75
    assert passes.count(False) == 8 + 2
    assert "SIGTERM was received; saved" in capsys.readouterr().err
    assert main.main(faulty_arguments(cut, images)) == 0
    assert outcome(cut, model="faulty") == outcome(unbroken, model="faulty")


@pytest.mark.slow
def test_more_signals_change_neither_the_save_nor_the_exit_code(images, tmp_path):
    """Five signals, 20 ms apart, of which some come while the process writes and while it ends."""
    argv = [*faulty_arguments(tmp_path, images, "TRAIN.EPOCHS=10000"), "--print-freq", "1000"]
    argv += ["--opts", "EVAL_FREQ=10000", "SAVE_FREQ=10000", "TRAIN.MAX_SKIPPED=9999"]
    argv += ["SAVE_STEPS=0"]
    process = subprocess.Popen(
        [sys.executable, "tests/helpers/faulty.py", *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    skipped = run_of(tmp_path, "faulty") / "skipped.jsonl"
    while not skipped.exists() or not skipped.stat().st_size:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    for number in (SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGXCPU, SIGUSR2):
        process.send_signal(number)
        time.sleep(0.02)
    while process.poll() is None:
        process.send_signal(SIGTERM)
        time.sleep(0.02)
    assert process.returncode == 75, process.stderr.read()
    (step,) = checkpoint.list_checkpoints(run_of(tmp_path, "faulty") / "checkpoints")
    assert checkpoint.verify(step) is None
    assert status(tmp_path)["exit_code"] == 75


# --- Hangs and deaths -----------------------------------------------------------------------------


def test_a_hang_leaves_every_stack_and_ends_with_76(tmp_path, monkeypatch):
    left = threading.Event()
    codes = []
    monkeypatch.setattr("utils.watchdog.GRACE", 0.5)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), left.set()))
    process = Process(0, 1, torch.device("cpu"))
    with (
        RunDir(tmp_path, process).lock() as folder,
        Watchdog(0.2, folder.hang_file(), folder.report_hang) as watchdog,
    ):
        time.sleep(0.5)
        assert not (tmp_path / "hang-rank0.txt").exists(), "it watches before there was progress"
        watchdog.beat()
        wait_in_a_named_place(left)
    assert codes == [76]
    assert "wait_in_a_named_place" in (tmp_path / "hang-rank0.txt").read_text()
    metadata = json.loads((tmp_path / "status.json").read_text())
    assert metadata["exit_code"] == 76
    assert "hang-rank0.txt" in metadata["error"]


def test_a_hang_without_room_for_the_stacks_is_reported(tmp_path, monkeypatch, capfd):
    left, messages = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: left.set())
    monkeypatch.setattr("utils.watchdog.GRACE", 0.5)
    with Watchdog(0.2, tmp_path / "absent" / "stacks.txt", messages.append) as watchdog:
        watchdog.beat()
        wait_in_a_named_place(left)
    assert "wait_in_a_named_place" in capfd.readouterr().err
    assert "in its output" in messages[0]
    assert "No such file" in messages[0]


def wait_in_a_named_place(left: threading.Event) -> None:
    assert left.wait(20)


def test_progress_is_no_hang(tmp_path, monkeypatch):
    hangs = []
    monkeypatch.setattr(os, "_exit", lambda code: None)
    with Watchdog(1.0, tmp_path / "stacks.txt", hangs.append) as watchdog:
        for _ in watchdog.watch(range(15)):
            time.sleep(0.1)
    assert hangs == []


@pytest.mark.parametrize("fault", ["kill", "kill while the loop computes", "hang"])
def test_a_worker_that_fails_is_named_with_its_image(fault, images, monkeypatch):
    dataset = image_dataset(images, transform=train_transform(32), train=True)
    sampler = data.TrainBatchSampler(52, batch_size=4, micro_batches=1, total_steps=13, seed=0)
    sick = sampler.micro_batch(1, 0)[0][1]  # read ahead, while the first batch is computed with
    read = readers.FolderReader.read

    def fail(self, index):
        if index == sick:
            time.sleep(0.5 if "while" in fault else 0)
            if fault != "hang":
                os.kill(os.getpid(), SIGKILL)
            threading.Event().wait()
        return read(self, index)

    monkeypatch.setattr(readers.FolderReader, "read", fail)
    batches = train_loader(dataset, sampler, num_workers=2, timeout=3)
    with pytest.raises(DataError, match=rf"{name_of(sick)} \(sample {sick}\)"):
        deque(time.sleep("while" in fault) for _ in batches)


@pytest.mark.slow
def test_workers_end_with_their_process(images, monkeypatch):
    """Also one that is inside of an image, and does not look whether its parent lives."""
    read, write = os.pipe()

    def stuck(self, item):
        os.write(write, b"%d\n" % os.getpid())
        time.sleep(60)

    monkeypatch.setattr(data.ImageDataset, "__getitem__", stuck)
    dataset = image_dataset(images, transform=None, train=True)
    sampler = data.TrainBatchSampler(52, batch_size=4, micro_batches=1, total_steps=13, seed=0)
    loader = train_loader(dataset, sampler, num_workers=2)
    process = multiprocessing.get_context("fork").Process(target=lambda: next(iter(loader)))
    process.start()
    with os.fdopen(read) as pids:
        workers = {int(pids.readline()) for _ in range(2)}
    process.kill()
    process.join()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- Slurm ----------------------------------------------------------------------------------------

STUBS = {
    "srun": """shift 2; SLURM_PROCID=5 SLURM_LOCALID=1 "$@" """,
    "scontrol": """[ "$1" = show ] && printf 'node7\\nnode8\\n' || echo "$@" >> scontrol.log""",
    "python": """echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $*"; exit "$CODE" """,
}


@pytest.mark.parametrize("code", [0, 1, 75, 76, 137])
def test_slurm_puts_a_stopped_run_back_into_the_queue_and_no_other(code, tmp_path):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "1234"}
    env |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
    command = ["bash", str(ROOT / "tools" / "slurm.sh"), "--cfg", "a b.yaml"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout == "5 8 1 4 node7 main.py --cfg a b.yaml\n"
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == ("requeue 1234\n" if code == 75 else "")
