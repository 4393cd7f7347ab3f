"""Runs through main.py: the same bits after any stop, exact evaluation, and the answers to bad input."""

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import (
    arguments,
    held,
    interrupted_after,
    launch,
    outcome,
    run_group,
    run_of,
)

import data
import main
from engine import checkpoint
from utils.signals import StopRequest

pytestmark = pytest.mark.usefixtures("restore_signals")
SLOW = pytest.mark.slow


# --- The same bits --------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_bits(images, unbroken, tmp_path):
    assert main.main(arguments(tmp_path, images, "--workers", "2")) == 0
    assert outcome(tmp_path) == outcome(unbroken)


@pytest.mark.parametrize("step", [2, 3, *(pytest.param(n, marks=SLOW) for n in (1, 4))])
def test_stopped_at_any_step_and_resumed(step, images, unbroken, tmp_path):
    with interrupted_after(step):
        assert main.main(arguments(tmp_path, images)) == 130
    assert main.main(arguments(tmp_path, images)) == 0
    assert outcome(tmp_path) == outcome(unbroken)


@pytest.mark.parametrize("step", [1, 2, pytest.param(3, marks=SLOW)])
def test_asked_to_stop_it_saves_and_resumes_when_started_again(
    step, images, unbroken, tmp_path, monkeypatch
):
    reason = StopRequest.agree
    asked = []

    def reason_at(self):
        asked.append(self)
        for number in (SIGTERM, SIGINT, SIGUSR1) if len(asked) == step else ():
            os.kill(os.getpid(), number)
        return reason(self)

    monkeypatch.setattr(StopRequest, "agree", reason_at)
    never = "--opts", "SAVE_STEPS=0", "SAVE_FREQ=2", "EVAL_FREQ=2"
    assert main.main(arguments(tmp_path, images, *never)) == 75
    assert [path.name for path in checkpoint.list_checkpoints(checkpoints(tmp_path))] == [
        f"step-{step}"
    ]
    status = json.loads((run_of(tmp_path) / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, step)
    monkeypatch.undo()
    assert main.main(arguments(tmp_path, images)) == 0
    last, reference = outcome(tmp_path), outcome(unbroken)
    assert last["model.safetensors"] == reference["model.safetensors"]


def test_the_written_configuration_runs_again_unchanged(images, unbroken, tmp_path):
    written = run_of(unbroken) / "config.yaml"
    assert main.main(["--cfg", str(written), "--output", str(tmp_path)]) == 0
    assert outcome(tmp_path) == outcome(unbroken)


def test_a_finished_run_does_nothing_more(images, unbroken):
    before = outcome(unbroken)
    state = json.loads((run_of(unbroken) / "status.json").read_text())
    assert (state["state"], state["epoch"], state["step"]) == ("done", 2, 4)
    assert state["best"] == before["best"]
    assert main.main(arguments(unbroken, images)) == 0
    assert outcome(unbroken) == before
    again = json.loads((run_of(unbroken) / "status.json").read_text())
    assert again == state | {"time": again["time"]}


@SLOW
@pytest.mark.parametrize("processes", [2, 3])
def test_killed_and_resumed_on_many_processes(processes, images, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    reference = launch(processes, arguments(unbroken, images))
    assert reference.wait() == 0, reference.stdout.read()

    killed = launch(processes, arguments(broken, images))
    wait_for(run_of(broken) / "checkpoints" / "step-1", killed)
    os.killpg(killed.pid, SIGKILL)
    kill_workers(broken)
    killed.wait()
    assert len(checkpoint.list_checkpoints(run_of(broken) / "checkpoints")) < 4

    resumed = launch(processes, arguments(broken, images))
    log = resumed.communicate()[0]
    assert resumed.returncode == 0, log
    assert "Resumed from" in log
    assert outcome(broken) == outcome(unbroken)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def kill_workers(folder: Path) -> None:
    """Workers of torchrun are sessions of their own: find them by their command line."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


# --- Evaluation -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_counts_every_image_once(images, unbroken, tmp_path, capsys):
    resume = ["--eval", "--resume", str(run_of(unbroken))]
    assert main.main(arguments(tmp_path, images, *resume)) == 0
    alone = record_in(capsys.readouterr().out)
    assert alone["model"]["images"] == alone["ema"]["images"] == 13
    assert run_group(3, arguments(tmp_path, images, *resume), log=tmp_path / "log") == [0] * 3
    assert record_in((tmp_path / "log-0").read_text()) == alone


def test_evaluation_is_of_the_best_checkpoint_and_as_in_training(
    images, unbroken, tmp_path, capsys
):
    state = json.loads(
        (checkpoint.list_checkpoints(checkpoints(unbroken))[0] / "state.json").read_text()
    )
    assert main.main(arguments(tmp_path, images, "--eval", "--resume", str(run_of(unbroken)))) == 0
    record = record_in(capsys.readouterr().out)
    assert record["weights"].endswith(f"step-{state['best']['step']}")
    model, ema = (record[name]["acc1"] for name in ("model", "ema"))
    expected = {"acc1": max(model, ema), "ema": ema > model}
    assert state["best"].items() >= expected.items()


def test_weights_of_a_run_are_a_file_for_pretrained(images, unbroken, tmp_path, capsys):
    weights = checkpoint.list_checkpoints(checkpoints(unbroken))[0] / "model.safetensors"
    assert main.main(arguments(tmp_path, images, "--eval", "--pretrained", str(weights))) == 0
    assert "crop_mode squash, 32 px" in capsys.readouterr().out
    assert main.main(arguments(tmp_path, images, "--pretrained", str(weights), tag="tuned")) == 0


def record_in(output: str) -> dict:
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def checkpoints(folder: Path) -> Path:
    return run_of(folder) / "checkpoints"


# --- Bad input: exit code, and a message that names the thing and the remedy ---------------------------


def refused(capsys, argv: list[str], code: int, *words: str) -> None:
    assert main.main(argv) == code
    message = capsys.readouterr().err
    assert not [word for word in words if word not in message], message


@pytest.fixture
def copy(images, tmp_path) -> Path:
    """The images, to be damaged."""
    return shutil.copytree(images, tmp_path / "copy")


def test_data_that_is_not_there(images, tmp_path, capsys):
    refused(capsys, arguments(tmp_path, Path("nowhere")), 3, "nowhere", "train")
    refused(capsys, arguments(tmp_path, tmp_path), 3, str(tmp_path), "train", "val")
    refused(capsys, arguments(tmp_path, Path(), "--data-path="), 2, "DATA.PATH", "--data-path")


def test_classes_that_do_not_match(copy, tmp_path, capsys):
    shutil.rmtree(copy / "val" / "class_2")
    refused(capsys, arguments(tmp_path, copy), 3, "class_2", "subset")
    (copy / "val" / "class_2").mkdir()
    refused(capsys, arguments(tmp_path, copy), 3, "class_2", "no image")


def test_number_of_classes_against_the_data(images, tmp_path, capsys):
    argv = arguments(tmp_path, images, "--opts", "MODEL.NUM_CLASSES", "7")
    refused(capsys, argv, 2, "MODEL.NUM_CLASSES", "7", "4 classes")


def test_names_of_a_runs_classes_decide_and_not_their_number(
    copy, unbroken, tmp_path, capsys, logged_warnings
):
    for split in ("train", "val"):
        for label in range(4):
            (copy / split / f"class_{label}").rename(copy / split / "abcd"[3 - label])
    weights = checkpoint.list_checkpoints(checkpoints(unbroken))[0]
    for named in (run_of(unbroken), weights, weights / "model.safetensors"):
        for flag in ("--pretrained", "--resume")[: 1 if named.is_file() else 2]:
            argv = arguments(tmp_path, copy, "--eval", flag, str(named))
            refused(capsys, argv, 3, "a, b, c, d not in the class list of 4 (class_0")
    one_epoch = ("--opts", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0", "PRINT_FREQ=50")
    one_epoch += ("DATA.MEAN=[0.1, 0.1, 0.1]",)
    argv = arguments(tmp_path, copy, "--pretrained", str(run_of(unbroken)), *one_epoch)
    assert main.main(argv) == 0
    printed = capsys.readouterr().out
    assert "knows other classes (class_0, class_1, class_2 and 1 more) than the data (a" in printed
    assert "trained with other colours: DATA.MEAN was [" in printed
    assert "2 new" in printed  # weight and bias of the classifier
    assert "only the last step of each epoch is recorded" in printed
    records = (run_of(tmp_path) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["step"] for r in records if "train/loss" in r] == [2]


def test_classes_in_another_order_reorder_the_classifier(images, unbroken, tmp_path, capsys):
    (tmp_path / "list").write_text("class_3\nclass_1\nclass_0\nclass_2\n")
    opts = ("--opts", f"DATA.CLASS_LIST={tmp_path / 'list'}", "TRAIN.EPOCHS=1")
    opts += ("TRAIN.WARMUP_EPOCHS=0", "TRAIN.BASE_LR=1e-9", "TRAIN.MIN_LR=0", "TRAIN.WARMUP_LR=0")
    source = checkpoint.resolve(run_of(unbroken), best=True)
    best = json.loads((source / "state.json").read_text())["best"]["acc1"]
    assert main.main(arguments(tmp_path, images, "--pretrained", str(source), *opts)) == 0
    printed = capsys.readouterr().out
    assert "another order: its classifier is reordered" in printed
    assert "trained with other colours" not in printed
    metrics = (run_of(tmp_path) / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(metrics[-1])[f"{name}/acc1"] for name in ("val", "val_ema")) <= best
    before = checkpoint.read_tensors(source / "model.safetensors")["head.fc.weight"]
    step = checkpoint.list_checkpoints(checkpoints(tmp_path))[0]
    after = checkpoint.read_tensors(step / "model.safetensors")["head.fc.weight"]
    torch.testing.assert_close(after, before[[3, 1, 0, 2]], atol=1e-5, rtol=0)


def test_weights_for_more_classes_name_the_keys_that_work(copy, unbroken, tmp_path, capsys):
    weights = tmp_path / "bare.safetensors"
    shutil.copy(checkpoint.resolve(run_of(unbroken)) / "model.safetensors", weights)
    for label in (1, 3):
        shutil.rmtree(copy / "val" / f"class_{label}")
    (tmp_path / "list").write_text("".join(f"class_{label}\n" for label in range(4)))
    command = "--eval", "--pretrained", str(weights)
    refused(
        capsys,
        arguments(tmp_path, copy, *command),
        *(4, "knows 4 classes, the data has 2", "DATA.CLASS_LIST", "DATA.VAL_SUBSET=True"),
    )
    contradiction = arguments(tmp_path, copy, *command, "--opts", "MODEL.NUM_CLASSES", "4")
    refused(capsys, contradiction, 2, "MODEL.NUM_CLASSES is 4", "DATA.CLASS_LIST", "VAL_SUBSET")
    advice = ("--opts", f"DATA.CLASS_LIST={tmp_path / 'list'}", "DATA.VAL_SUBSET=True")
    assert main.main(arguments(tmp_path, copy, *command, *advice)) == 0
    assert "Labels: 4 classes as in DATA.CLASS_LIST, class_0 first" in capsys.readouterr().out


def test_another_class_list_than_the_checkpoints_is_refused(images, unbroken, tmp_path, capsys):
    (tmp_path / "list").write_text("class_3\nclass_1\nclass_0\nclass_2\n")
    opts = ("--opts", f"DATA.CLASS_LIST={tmp_path / 'list'}")
    argv = arguments(tmp_path, images, "--eval", "--resume", str(run_of(unbroken)), *opts)
    refused(capsys, argv, 2, "is not the class list of", "Leave it out")


def test_a_copied_checkpoint_has_any_name(images, unbroken, tmp_path, capsys):
    kept = shutil.copytree(checkpoint.resolve(run_of(unbroken)), tmp_path / "best")
    for flag in ("--resume", "--pretrained"):
        assert main.main(arguments(tmp_path, images, "--eval", flag, str(kept))) == 0
    assert record_in(capsys.readouterr().out)["weights"] == str(kept)


def test_broken_image_in_training_is_replaced_and_named(copy, tmp_path, capsys):
    (copy / "train" / "class_0" / "005.jpg").write_bytes(b"<html>")
    assert main.main(arguments(tmp_path, copy)) == 0
    assert "005.jpg" in capsys.readouterr().out
    argv = arguments(tmp_path, copy, "--opts", "DATA.MAX_BAD_SAMPLES=0", tag="strict")
    refused(capsys, argv, 3, "005.jpg", "DATA.MAX_BAD_SAMPLES")


def test_broken_image_in_validation_ends_the_run(copy, tmp_path, capsys):
    (copy / "val" / "class_0" / "001.jpg").write_bytes(b"")
    for workers in "01":
        argv = arguments(tmp_path, copy, "--workers", workers, tag=workers)
        refused(capsys, argv, 3, "001.jpg", "0 bytes")


def test_evaluation_without_weights(images, tmp_path, capsys):
    refused(capsys, arguments(tmp_path, images, "--eval"), 4, "--pretrained", "--resume")
    argv = arguments(tmp_path, images, "--eval", "--pretrained", "absent.pth")
    refused(capsys, argv, 4, "absent.pth", "does not exist")
    assert not run_of(tmp_path).exists()


def test_checkpoint_of_another_model(images, unbroken, tmp_path, capsys):
    argv = arguments(tmp_path, images, "--resume", str(run_of(unbroken)), tag="other")
    more = ["--opts", "MODEL.ARGS.dims", "[16, 32, 32, 64]"]
    refused(capsys, argv + more, 4, "--accept MODEL.ARGS")
    refused(capsys, [*argv, "--accept", "MODEL.ARGS", *more], 4, "stages.3", "MODEL.ARGS")
    more = ["--opts", "MODEL.NAME", "dat_tiny"]
    refused(capsys, argv + more, 4, "dat_micro", "dat_tiny", "MODEL.NAME")
    more = ["--opts", "TRAIN.GLOBAL_BATCH_SIZE", "12"]
    refused(capsys, argv + more, 4, "steps_per_epoch", "TRAIN.GLOBAL_BATCH_SIZE")


def test_another_recipe_has_to_be_accepted(images, unbroken, tmp_path, capsys):
    shutil.copytree(run_of(unbroken), run_of(tmp_path))
    longer = "--opts", "TRAIN.EPOCHS=3", "TRAIN.BASE_LR=0.02", "PRINT_FREQ=2"
    names = "--accept TRAIN.BASE_LR,TRAIN.EPOCHS"
    refused(capsys, arguments(tmp_path, images, *longer), 4, "TRAIN.EPOCHS was 2, is 3", names)
    assert main.main(arguments(tmp_path, images, *names.split(" "), *longer)) == 0
    assert "PRINT_FREQ was 1, is 2" in capsys.readouterr().out
    assert main.main(arguments(tmp_path, images, *longer)) == 0  # accepted once for all
    assert outcome(tmp_path)["step"] == 6


def test_the_best_of_another_validation_counts_no_more(images, unbroken, tmp_path, capsys):
    shutil.copytree(run_of(unbroken), run_of(tmp_path))
    path = checkpoint.list_checkpoints(checkpoints(tmp_path))[0]
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    best = {"acc1": 99.0, "step": 4}
    files["state.json"] = json.dumps(checkpoint.read_metadata(path) | {"best": best}).encode()
    del files[checkpoint.MANIFEST]
    shutil.rmtree(path)
    checkpoint.write(path.parent, path.name, files)
    changed = "--accept", "TRAIN.EPOCHS,TEST.CROP_PCT", "--opts", "TRAIN.EPOCHS=3"
    assert main.main(arguments(tmp_path, images, *changed, "TEST.CROP_PCT=0.5")) == 0
    assert (
        "The best accuracy so far counts no more: 99.00% was of another" in capsys.readouterr().out
    )
    assert outcome(tmp_path)["best"]["step"] == 6


def test_other_images_have_to_be_accepted(copy, unbroken, tmp_path, capsys):
    shutil.copytree(run_of(unbroken), run_of(tmp_path))
    with (copy / "train" / "class_0" / "000.jpg").open("ab") as file:
        file.write(b"\0")
    refused(capsys, arguments(tmp_path, copy), 3, "data was", "--accept data")
    assert main.main(arguments(tmp_path, copy, "--accept", "data")) == 0


def test_damaged_checkpoint_is_refused_by_name_and_passed_over_in_a_run(
    images, unbroken, tmp_path, capsys
):
    shutil.copytree(run_of(unbroken), run_of(tmp_path))
    last = checkpoint.list_checkpoints(checkpoints(tmp_path))[0]
    content = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(content[:-1])
    argv = arguments(tmp_path, images, "--resume", str(last))
    refused(capsys, [*argv, "--eval"], 4, "model.safetensors", str(len(content)))
    assert main.main(arguments(tmp_path, images)) == 0
    assert "step-4 is damaged and skipped" in capsys.readouterr().out
    assert outcome(tmp_path) == outcome(unbroken)


def test_older_checkpoint_of_the_same_run_needs_a_run_of_its_own(images, unbroken, capsys):
    older = checkpoints(unbroken) / "step-2"
    refused(capsys, arguments(unbroken, images, "--resume", str(older)), 4, "--tag", "step-4")


def test_folder_that_cannot_be_written(images, tmp_path, capsys):
    (tmp_path / "dat_micro").write_text("in the way")
    refused(capsys, arguments(tmp_path, Path("nowhere")), 6, "dat_micro", "--output")


def test_full_folder(images, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**16))
    refused(capsys, arguments(tmp_path, images), 6, "MiB", "--output")


def test_two_runs_in_one_folder(images, tmp_path, capsys):
    with held(run_of(tmp_path)) as holder:
        refused(capsys, arguments(tmp_path, images), 6, f"process {holder}", "--tag")
        status = json.loads((run_of(tmp_path) / "status.json").read_text())
        assert status["state"] == "running", "the refused run wrote into the other's folder"


def test_loss_that_is_not_a_number(images, tmp_path, capsys, monkeypatch):
    normalize = data.Normalize.__call__
    monkeypatch.setattr(data.Normalize, "__call__", lambda self, x: normalize(self, x) * torch.nan)
    more = "--opts", "SAVE_STEPS=0", "SAVE_FREQ=2", "EVAL_FREQ=2", "TRAIN.MAX_SKIPPED=2"
    refused(capsys, arguments(tmp_path, images, *more), 5, "not finite", "TRAIN.BASE_LR")
    status = json.loads((run_of(tmp_path) / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)


@pytest.mark.slow
def test_throughput_needs_no_data(tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("engine.evaluate.time", clock)  # a batch takes a second
    assert main.main(arguments(tmp_path, tmp_path, "--throughput")) == 0
    assert "throughput 4.0 images/s" in capsys.readouterr().out
    assert not run_of(tmp_path).exists()
