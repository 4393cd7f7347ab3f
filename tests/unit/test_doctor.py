"""tools/doctor.py: finds what would spoil a run, says what to do, and continues where it was interrupted.

pytest tests/unit/test_doctor.py
"""

import io
import json
import os
import re
import resource
import shutil
import time

import numpy as np
import pytest
import torch
from helpers.images import write_image_folder, write_tar, write_zip
from helpers.pipeline import image_dataset
from helpers.runs import arguments
from PIL import Image
from reliability.bad_files import ANY, BAD, make_bad_images

import config
import main
from data import listing
from engine.build import build_model
from tools import doctor, pack
from tools.checks import forecast, images, machine, report
from utils.errors import DataError

REAL_COST = doctor.check_cost


@pytest.fixture(autouse=True)
def no_cost(monkeypatch):
    """Without the measured step, which takes seconds."""
    monkeypatch.setattr(doctor, "check_cost", lambda *args: [])


@pytest.fixture
def root(tmp_path):
    return write_image_folder(tmp_path / "set", classes=3, train=8, val=4)


@pytest.fixture
def examine(tmp_path, root, capsys):
    """A function that runs the doctor on the small run; returns its exit code and what it printed, on one line."""

    def run(*more, jobs="0", data=root):
        code = doctor.main([*arguments(tmp_path, data), "-j", jobs, *more])
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    return run


def index_in(tmp_path):
    (index,) = (tmp_path / "doctor").glob("set-*.jsonl")
    return index


def records(tmp_path):
    lines = index_in(tmp_path).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_healthy_run(examine, tmp_path):
    code, text = examine("--pixels", "--sha", jobs="1")
    assert code == 0
    for words in (
        "set/train: 24 images, 3 classes",
        "8 images in each of 3 classes",
        "36 files, decoded: 36 JPEG RGB",
        "24 images a step = 6 micro-batches of 4, 6 on each of 1 process",
        "1 step, 2 in 2 epochs; every epoch leaves out 0 images (0.0%)",
        "0 repeated files",
        "0 FAIL",
    ):
        assert words in text, words
    assert {(record["split"], record["decoded"]) for record in records(tmp_path)} == {
        ("train", True),
        ("val", True),
    }


def test_the_learning_rate_is_the_runs(examine):
    _, text = examine("--opts", "TRAIN.EPOCHS=3")
    assert (
        "2.34e-08 → 0.000469 → 2.34e-07 (warm-up, highest, last) after scaling by 24 / 512" in text
    )


def test_every_bad_image_is_counted(examine, root):
    expected = make_bad_images(root / "train/class_0")
    for name, outcome in expected.items():
        if outcome == ANY:
            (root / "train/class_0" / name).unlink()
    code, text = examine("--pixels")
    bad = sum(outcome == BAD for outcome in expected.values())
    assert code == 3
    assert f"FAIL unreadable {bad} of" in text
    assert "→ restore them from the original dataset, or remove them" in text
    assert "2 links without a target" in text
    assert "WARN odd shapes" in text
    assert "1 JPEG CMYK" in text
    assert "EXIF rotates 1 image" in text
    assert "4 images with several frames" in text
    assert "3 files of another format than the suffix" in text
    code, text = examine("--pixels", "--opts", "DATA.MAX_BAD_SAMPLES=60")
    assert f"WARN unreadable {bad} of" in text
    (root / "val/class_0/000.jpg").unlink()  # so that its folder is listed again
    (root / "val/class_0/000.jpg").write_bytes(b"<html>")
    code, text = examine()
    assert "FAIL unreadable 1 of 12 val images cannot be read" in text
    assert "TEST.SKIP_BAD" in text


def test_an_interrupted_check_continues(examine, root, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 5)
    examined, item = [], images.Examination.__getitem__

    def examine_some(self, index):
        if len(examined) == 12:
            raise KeyboardInterrupt
        examined.append(item(self, index)["name"])
        return item(self, index)

    monkeypatch.setattr(images.Examination, "__getitem__", examine_some)
    code, text = examine()
    assert (code, len(records(tmp_path))) == (130, 10)
    assert "The same command continues" in text
    with index_in(tmp_path).open("a") as file:
        file.write('{"split": "train", "na')  # what a kill leaves
    monkeypatch.setattr(images.Examination, "__getitem__", item)
    read, open_image = [], images.open_image
    monkeypatch.setattr(images, "open_image", lambda data: read.append(0) or open_image(data))
    code, text = examine()
    assert (code, len(read)) == (0, 26)
    assert "36 files" in text
    names = [(record["split"], record["name"]) for record in records(tmp_path)]
    assert len(set(names)) == len(names) == 36
    examine("--sha")  # what is known is not enough for that
    assert len(read) == 26 + 36


def test_a_repaired_file_is_looked_at_again(examine, root, tmp_path):
    file = root / "train/class_1/003.jpg"
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    assert "WARN unreadable 1 of 24 train images" in examine()[1]
    file.write_bytes(content)
    code, text = examine()
    assert (code, "unreadable" in text, len(records(tmp_path))) == (0, False, 36)


def test_records_of_a_split_that_is_not_opened_are_kept(examine, root, tmp_path):
    examine("--pixels", "--sha")
    before = records(tmp_path)
    (root / "train").rename(root / "elsewhere")
    assert "12 of 12 checked before" in examine("--pixels", "--sha")[1]
    assert records(tmp_path) == before
    (root / "elsewhere").rename(root / "train")
    assert "36 of 36 checked before" in examine("--pixels", "--sha")[1]


def keep_times(file, content):
    """Overwrite `file`; of its times, only that of any change shows it."""
    before = file.stat()
    time.sleep(0.02)  # longer than the clock tick of the file system
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_files_that_are_unchanged_since_are_not_read_again(examine, root, tmp_path):
    assert "checked before" not in examine("--pixels", "--sha")[1]
    index, before = index_in(tmp_path), records(tmp_path)
    text = examine("--pixels", "--sha")[1]
    assert "36 JPEG RGB; 36 of 36 checked before, unchanged since; index" in text
    assert records(tmp_path) == before
    first, *_ = (root / "val/class_0").iterdir()
    turned = Image.open(first).rotate(180)
    with io.BytesIO() as picture:
        turned.save(picture, "JPEG", quality=20)
        content = picture.getvalue().ljust(first.stat().st_size, b"\0")
    keep_times(first, content)
    text = examine("--pixels", "--sha")[1]
    assert "WARN changes 1 file of another SHA-256 than at the last check" in text
    assert f"val/class_0/{first.name}" in text
    for file in (root / "train/class_1").iterdir():
        keep_times(file, bytes(file.stat().st_size))
    text = examine("--pixels", "--sha")[1]
    assert "WARN unreadable 8 of 24 train images" in text
    assert "28 JPEG RGB; 28 of 36 checked before" in text
    lines = [{key: r[key] for key in r if key != "state"} for r in before]  # as once written
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "checked before" not in examine("--pixels", "--sha")[1]


@pytest.mark.parametrize("kind", ["zip", "tar", "pack"])
def test_a_changed_archive_is_read_again(examine, root, kind):
    content, archive = root.with_name("elsewhere"), root / f"train.{kind}"
    if kind == "pack":
        assert pack.main([str(root), str(root)]) == 0
        archive /= "shard-00000.bin"
    else:
        {"zip": write_zip, "tar": write_tar}[kind](root / "train", archive)
    (root / "train").rename(content)
    examine("--pixels")
    assert "36 of 36 checked before" in examine("--pixels")[1]
    damaged = bytearray(archive.read_bytes())
    picture = (content / "class_1/003.jpg").read_bytes()
    start = damaged.index(picture)
    damaged[start : start + len(picture)] = bytes(len(picture))
    keep_times(archive, damaged)
    text = examine("--pixels")[1]
    assert "WARN unreadable 1 of 24 train images" in text
    assert "12 of 36 checked before" in text


def test_an_outdated_listing_is_a_failure(examine, root, monkeypatch):
    monkeypatch.setattr(listing, "SETTLED", 0)
    assert examine()[0] == 0
    for file in (root / "train/class_1").iterdir():
        file.write_bytes(b"<html")
    code, text = examine()
    assert code == 3
    assert "FAIL listing 8 files of another size than when they were listed" in text
    index = root / ".train.index.npz"
    assert f"→ if that is meant, delete {index} and start again" in text
    index.unlink()
    assert "WARN unreadable 8 of 24 train images" in examine()[1]


def test_its_index_shows_a_flipped_byte_to_the_run(examine, root, tmp_path):
    """Nobody else would see it: most flipped bytes of a JPEG decode, to another picture."""
    assert examine("--sha")[0] == 0
    index = index_in(tmp_path)
    file = root / "train/class_1/003.jpg"
    content = bytearray(file.read_bytes())
    content[-200] ^= 16
    file.write_bytes(content)

    def bad(split, **options):
        data = image_dataset(root, split, transform=np.asarray, train=split == "train", **options)
        samples = [data[0, i] if split == "train" else data[i] for i in range(len(data))]
        return [file for sample in samples for file in sample.bad]

    assert bad("train") == bad("val", checksums=index) == []
    (found,) = bad("train", checksums=index)
    assert found.path == str(file)
    assert "SHA-256" in found.reason
    argv = arguments(tmp_path, root, "--opts", f"DATA.VERIFY={index}", "DATA.MAX_BAD_SAMPLES=0")
    assert main.main(argv) == 3


def test_an_index_that_does_not_fit(examine, root, tmp_path):
    examine()
    index = index_in(tmp_path)
    for content, words in (
        (index.read_text(), "has no SHA-256 of 24 of the 24 train images"),
        ("[]\n", "not an index of images"),
        ("nothing", "not an index of images"),
        (None, "cannot be read as an index"),
    ):
        index.unlink(missing_ok=True)
        if content is not None:
            index.write_text(content)
        with pytest.raises(DataError, match=words):
            image_dataset(root, transform=np.asarray, checksums=index)


def test_the_same_image_in_both_splits_or_under_two_labels(examine, root):
    shutil.copy(root / "train/class_0/000.jpg", root / "val/class_0/999.jpg")
    code, text = examine("--sha")
    assert code == 3
    assert "FAIL duplicates 1 image in train and in val" in text
    assert "train/class_0/000.jpg = val/class_0/999.jpg" in text
    (root / "val/class_0/999.jpg").unlink()
    shutil.copy(root / "train/class_0/000.jpg", root / "train/class_1/999.jpg")
    code, text = examine("--sha")
    assert code == 0
    assert "WARN duplicates 1 image with two labels" in text


def test_one_path_of_each_split_and_label_is_named(examine, root):
    content = (root / "train/class_0/000.jpg").read_bytes()
    for path in ("train/class_0/001.jpg", "val/class_1/000.jpg"):
        (root / path).write_bytes(content)
    _, text = examine("--sha")
    assert text.count("train/class_0/001.jpg = val/class_1/000.jpg") == 2


def test_what_is_held_out_of_train_takes_the_place_of_val(examine, root, tmp_path):
    shutil.rmtree(root / "val")
    code, text = examine("--sha", "--opts", "DATA.HOLDOUT=0.3", "TRAIN.GLOBAL_BATCH_SIZE=12")
    assert code == 0, text
    held_out = [int(n) for n in re.findall(r"train: (\d+) images, 3 classes \(\w+ part", text)]
    assert len(held_out) == 2
    assert sum(held_out) == 24
    assert {record["split"] for record in records(tmp_path)} == {"train"}
    assert len(records(tmp_path)) == 24


def test_folders_of_one_name_have_different_indices(examine, root, tmp_path):
    other = write_image_folder(tmp_path / "elsewhere/set", classes=3, train=8, val=4)
    examine()
    examine(data=other)
    assert len(list((tmp_path / "doctor").glob("set-*.jsonl"))) == 2


def test_unreadable_val_images_that_the_run_counts_are_no_failure(examine, root):
    (root / "val/class_0/000.jpg").write_bytes(b"nothing")
    assert examine()[0] == 3
    code, text = examine("--opts", "TEST.SKIP_BAD", "True")
    assert code == 0, text
    assert "WARN unreadable 1 of 12 val images" in text


def test_links(examine, root, tmp_path):
    (root / "train/class_0/back").symlink_to(root / "train")
    outside = tmp_path / "outside.jpg"
    shutil.copy(root / "train/class_0/000.jpg", outside)
    (root / "train/class_1/out.jpg").symlink_to(outside)
    code, text = examine()
    assert code == 0
    assert "WARN links 1 link back" in text
    assert f"WARN links 1 link out of {root}" in text
    (root / "train/class_1/inside.jpg").symlink_to("000.jpg")
    (root / "train/class_0/back").unlink()
    (root / "train/class_1/out.jpg").unlink()
    assert "OK links 1 link in" in examine()[1]


def test_two_forms_of_a_split(examine, root):
    write_zip(root / "train", root / "train.zip")
    code, text = examine()
    assert code == 0
    assert f"WARN train {root}/train is read; train.zip beside it is not" in text


def test_a_missing_split(examine, root):
    shutil.rmtree(root / "train")
    code, text = examine()
    assert code == 3
    assert "FAIL train" in text
    assert "→ main.py --eval does not need it" in text
    assert "val: 12 images" in examine("--eval")[1]
    shutil.rmtree(root / "val")
    assert examine("--eval")[0] == 3


def test_classes_that_do_not_match(examine, root):
    shutil.rmtree(root / "val/class_2")
    code, text = examine()
    assert code == 3
    assert "no folder for class_2" in text
    assert examine("--opts", "DATA.VAL_SUBSET=True")[0] == 0
    assert (
        "MODEL.NUM_CLASSES is 7, the dataset has 3" in examine("--opts", "MODEL.NUM_CLASSES=7")[1]
    )


def test_archives(examine, tmp_path, root):
    packed = tmp_path / "packed"
    packed.mkdir()
    for split in ("train", "val"):
        write_zip(root / split, packed / f"{split}.zip")
    code, text = examine(data=packed)
    assert (code, "36 files" in text) == (0, True)
    os.truncate(packed / "val.zip", 3000)
    assert examine(data=packed)[0] == 3


def test_configurations_that_do_not_fit(examine):
    code, text = examine("--processes", "4")
    assert code == 3
    assert "FAIL step 4 processes cannot share the 6 micro-batches" in text
    code, text = examine("--opts", "TRAIN.GLOBAL_BATCH_SIZE=48")
    assert code == 3
    assert "FAIL epoch the training set has 24 images, a step takes 48" in text
    code, text = examine("--opts", "TRAIN.GLOBAL_BATCH_SIZE=16")
    assert (code, "WARN epoch 1 step" in text, "8 images (33.3%)" in text) == (0, True, True)
    code, text = examine("--opts", "MODEL.ARGS.stagess=3")
    assert code == 3
    assert "FAIL model" in text
    code, text = examine("--opts", "TRAIN.BASE_LRR=1")
    assert code == 2
    assert "did you mean TRAIN.BASE_LR?" in text


def test_weights_are_loaded_as_the_run_would(examine, root, tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    cfg = config.parse(arguments(tmp_path, root)).cfg
    torch.save(build_model(cfg, 5, torch.device("cpu")).state_dict(), weights)
    fits = tmp_path / "fits.pth"
    torch.save(build_model(cfg, 3, torch.device("cpu")).state_dict(), fits)
    for words, code, expected in (
        (("--eval", "--pretrained", "none.pth"), 3, "FAIL weights none.pth does not exist"),
        (("--eval", "--resume", "nowhere"), 3, "FAIL weights nowhere is neither a run"),
        (("--eval",), 3, "FAIL weights --eval needs weights"),
        (("--eval", "--pretrained", str(weights)), 3, "the file knows 5 classes, the data has 3"),
        (("--eval", "--pretrained", str(fits)), 0, "fits.pth fits dat_micro (model)"),
        (("--pretrained", "none.pth"), 3, "FAIL weights none.pth does not exist"),
        (("--pretrained", str(weights)), 0, "2 new"),
        (("--resume", "nowhere"), 3, "FAIL weights nowhere is neither a run"),
        (("--opts", "MODEL.ARGS.window_size=0"), 3, "FAIL model window_size is 0"),
        (("--opts", "TRAIN.EMA_DECAY=0.9999"), 0, "WARN schedule TRAIN.EMA_DECAY 0.9999 averages"),
        (("--opts", "DEVICE=cuda"), 3, "FAIL device DEVICE is cuda, but"),
    ):
        if "DEVICE=cuda" in words:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            monkeypatch.setenv("RANK", "x")
        found, text = examine(*words)
        assert (found, expected in text) == (code, True), (words, text)
    assert "FAIL launcher RANK is 'x'" in text


def test_commands_that_say_too_little(capsys, root, tmp_path):
    assert doctor.main([]) == 2
    assert "--data-path" in capsys.readouterr().err
    assert doctor.main(["--data-path", str(root), "--seed", "1"]) == 2
    assert "--cfg" in capsys.readouterr().err
    argv = ["--data-path", str(root), "--index", str(tmp_path / "i.jsonl"), "-j", "0"]
    assert doctor.main(argv) == 0
    assert "Machine" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    (tmp_path / "notes.txt").write_text("my notes\n")
    for index in ("file/i.jsonl", "notes.txt"):
        assert doctor.main(["--data-path", str(root), "--index", str(tmp_path / index)]) == 2
        assert "--index" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_a_machine_that_is_too_small(examine, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**10))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (200, 200))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: 2)
    code, text = examine("--workers", "2", "--processes", "3")
    assert code == 3
    for words in (
        "FAIL disk 1.0 KiB free",
        "FAIL shared memory 1.0 KiB free in /dev/shm",
        "FAIL open files 200 may be open",
        "ulimit -n 4096",
        "WARN processors 1 core, 4 loader workers (2 for each of 2 processes here)",
        "WARN devices 2 GPUs for 3 processes → use 2 nodes like this one",
    ):
        assert words in text, words


def test_every_warning_and_failure_says_what_to_do(examine, root, monkeypatch):
    shown = []
    show = report.Report.show

    def note(self, findings):
        findings = list(findings)
        shown.extend(findings)
        show(self, findings)

    monkeypatch.setattr(report.Report, "show", note)
    make_bad_images(root / "train/class_0")
    shutil.rmtree(root / "val/class_2")
    examine("--pixels", "--sha", "--processes", "5", "--workers", "64")
    assert len([finding for finding in shown if finding.level != "OK"]) > 6
    for finding in shown:
        assert finding.level == "OK" or finding.remedy or ";" in finding.text, finding


# --- Forecasts ------------------------------------------------------------------------------------


def test_the_memory_and_the_time_of_the_run_are_forecast(examine, monkeypatch):
    monkeypatch.setattr(doctor, "check_cost", REAL_COST)
    code, text = examine()
    assert code == 0
    assert "OK memory a micro-batch of 4 images needs about" in text
    assert "for 2 epochs on 1 × cpu, from a measured step of 4 images" in text
    assert "on 8 H100, an estimate on paper: about 1 minute" in text
    monkeypatch.setattr(forecast, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(forecast, "estimate_on_paper", lambda *args: report.Finding("OK", "", ""))
    code, text = examine()
    assert code == 3
    assert "FAIL memory a micro-batch of 4 images needs about" in text


@pytest.mark.parametrize(("memory", "batch"), [(10.0, 4), (3.4, 2), (2.9, 0), (100.0, None)])
def test_the_largest_batch_that_fits(memory, batch):
    cfg = config.load("configs/digits.yaml", ["DATA.BATCH_SIZE=12", "TRAIN.GLOBAL_BATCH_SIZE=24"])
    step = forecast.Step(images=2, seconds=1.0, bytes_per_image=1e9)
    # 1 GB beside the images, of which 2, 4 or 12 divide the 12 of a process; 5 % are left alone.
    finding = forecast.judge_memory(cfg, step, int(1e9), int(memory * 1e9), processes=2)
    assert finding.level == ("OK" if batch is None else "FAIL")
    if batch:
        largest = {10.0: 6, 3.4: 2}[memory]
        assert finding.remedy.startswith(f"--batch-size {largest} is the largest that fits")
    elif batch == 0:
        assert "GRAD_CHECKPOINTING" in finding.remedy


def test_a_step_that_does_not_fit_is_halved():
    tried = []

    def measure(images):
        tried.append(images)
        if images > 2:
            raise torch.OutOfMemoryError
        return forecast.Step(images, 1.0, 1.0)

    assert forecast.measure_fitting(measure, 8).images == 2
    assert tried == [8, 4, 2]
    assert forecast.measure_fitting(lambda images: measure(9), 1) is None
