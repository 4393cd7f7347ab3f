"""Damaged, odd and malicious files: training continues and reports them, evaluation never guesses, nothing hangs.

python -m pytest tests/reliability/test_bad_files.py
"""

import errno
import faulthandler
import json
import os
import shutil
import tempfile
import warnings
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import encode, write_image_folder
from helpers.pipeline import eval_loader, eval_transform
from helpers.pipeline import image_dataset as dataset
from helpers.runs import arguments
from PIL import Image, ImageFile
from torch import nn

import data.dataset
import data.decode
import main
from data import (
    NO_LABEL,
    BadFile,
    BadSamples,
    ShardSampler,
    decoder_fingerprint,
)
from data.decode import decode
from engine.loop import validate
from reliability.bad_files import (
    ANY,
    BAD,
    GOOD,
    IGNORED,
    REFUSED,
    make_bad_archives,
    make_bad_images,
    read_fuzzed,
    valid_files,
    valid_tar,
    valid_zip,
)
from utils.distributed import Process
from utils.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def no_hang():
    """A read that never ends would end the tests, with a stack that says where."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """A dataset whose first class holds every kind of bad file beside valid ones, and what each is."""
    root = write_image_folder(tmp_path_factory.mktemp("set"), classes=2, train=12, val=4)
    expected = make_bad_images(root / "train/class_0")
    shutil.copytree(root / "train/class_0", root / "val/class_0", dirs_exist_ok=True, symlinks=True,
                    copy_function=link_or_pipe)  # fmt: skip
    return root, expected


def link_or_pipe(source, target):
    """Copy a file; a pipe, which cannot be copied, is made again."""
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


# --- Every kind of image file ---------------------------------------------------------------------


REASONS = {
    "pipe.jpg": "a pipe or device instead of a file",
    "link_to_a_device.jpg": "a pipe or device instead of a file",
    "seventy_megabytes.jpg": "larger than 64 MiB",
}


def test_every_kind_is_read_substituted_or_ignored(every_kind):
    root, expected = every_kind
    assert sum(outcome == BAD for outcome in expected.values()) >= 35
    train = dataset(root, train=True)
    met = set()
    for index in range(len(train)):
        name = os.path.basename(os.fsdecode(train.reader.names[index]))
        outcome = expected.get(name, GOOD)
        met.add(name)
        sample = train[3, index]
        assert sample.image.shape[0] == 3
        assert outcome in (ANY, BAD if sample.bad else GOOD), (name, sample.bad)
        if outcome == BAD:
            assert sample.bad[0][:1] + sample.bad[0][2:] == (train.path(index), 3, index)
            again = train[3, index]
            assert again.bad == sample.bad
            assert REASONS.get(name, "") in sample.bad[0].reason
            assert torch.equal(again.image, sample.image)
    assert met.isdisjoint(name for name, outcome in expected.items() if outcome == IGNORED)
    assert met.issuperset(name for name, outcome in expected.items() if outcome != IGNORED)


def test_an_evaluation_stops_at_each_or_counts_it_as_wrong(every_kind):
    root, expected = every_kind
    strict, lenient = dataset(root, "val"), dataset(root, "val", skip_bad=True)
    for index in range(len(strict)):
        sample, name = lenient[index], os.path.basename(os.fsdecode(strict.reader.names[index]))
        if expected.get(name) == BAD:
            assert (sample.label, sample.index) == (NO_LABEL, index)
            assert not sample.image.any()
            with pytest.raises(DataError) as error:
                strict[index]
            assert strict.path(index) in str(error.value)
            assert "bytes, the first are b" in str(error.value)
            assert "\n" not in str(error.value)
        elif expected.get(name) != ANY:
            assert sample.label == strict[index].label == strict.labels[index]
            assert sample.bad == []


def test_what_cannot_be_read_is_wrong_and_has_no_loss(tmp_path):
    write_image_folder(tmp_path, classes=3, train=1, val=3)
    (tmp_path / "val/class_1/001.jpg").write_bytes(b"")
    val = dataset(tmp_path, "val", transform=eval_transform(32), skip_bad=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    result = validate(
        model=model,
        loader=eval_loader(val, ShardSampler(9, batch_size=4), num_workers=0),
        normalize=lambda images: images.float() / 255,
        process=Process(0, 1, torch.device("cpu")),
        amp_dtype=torch.float32,
        batch_size=0,
        print_freq=10,
    )
    valid = [val[index] for index in range(9) if index != 4]
    labels = torch.tensor([sample.label for sample in valid])
    with torch.no_grad():
        logits = model(torch.stack([sample.image for sample in valid]).float() / 255)
    assert (result.images, result.unreadable) == (9, 1)
    assert result.top1 == (logits.argmax(1) == labels).sum()
    assert result.top5 == 8  # all three classes are among the first five
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


@pytest.mark.parametrize("exact", [True, False])
def test_a_skipped_image_is_black_however_the_others_are_resized(exact, tmp_path):
    root = write_image_folder(tmp_path, classes=2, train=1, val=2)
    (root / "val" / "class_0" / "000.jpg").write_bytes(b"")
    val = dataset(root, "val", transform=eval_transform(32, exact=exact), skip_bad=True)
    skipped, valid = val[0], val[1]
    assert skipped.label == NO_LABEL
    assert skipped.image.shape == valid.image.shape
    assert skipped.image.dtype == valid.image.dtype
    assert not skipped.image.any()


@pytest.mark.slow
def test_a_run_on_all_of_them(every_kind, tmp_path, capfd):
    """Trained with a worker, evaluated with SKIP_BAD; every bad file is reported, and no other."""
    root, expected = every_kind
    bad = {printable(name) for name, outcome in expected.items() if outcome == BAD}
    options = ["TRAIN.EPOCHS=2", "TRAIN.GLOBAL_BATCH_SIZE=4", "SAVE_STEPS=0",
               "TRAIN.EMA_DECAY=0", "EVAL_FREQ=2", "TEST.SKIP_BAD=True", "PRINT_FREQ=50"]  # fmt: skip
    argv = [*arguments(tmp_path, root, "--workers", "1"), "--opts", *options]
    assert main.main([*argv, "DATA.MAX_BAD_SAMPLES=200"]) == 0
    records = read_records(tmp_path / "dat_micro/run/bad_samples.jsonl")
    assert {Path(record["path"]).name for record in records} >= bad
    allowed = bad | {name for name, outcome in expected.items() if outcome == ANY}
    assert {Path(record["path"]).name for record in records} <= allowed
    assert {record["epoch"] for record in records} == {0, 1}
    output = capfd.readouterr().out
    val = dataset(root, "val", skip_bad=True)
    unreadable = sum(bool(val[index].bad) for index in range(len(val)))
    read = len(val) - unreadable
    assert f"{read} of {len(val)} images were evaluated, {unreadable} cannot be read" in output

    assert main.main([*argv, "--tag", "strict"]) == 3  # ten are allowed by default
    error = capfd.readouterr().err
    assert "training images cannot be read, 10 are allowed: restore them and delete" in error
    assert "DATA.MAX_BAD_SAMPLES" in error


def printable(name):
    return os.fsencode(name).decode(errors="backslashreplace")


def read_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_without_permission():
    if os.geteuid():
        pytest.skip("needs root, to give its rights up")
    folder = Path(tempfile.mkdtemp())  # below pytest's own folders, nobody could enter
    try:
        folder.chmod(0o755)
        write_image_folder(folder, classes=2, train=2, val=1)
        (folder / "train/class_0/000.jpg").chmod(0)
        pid = os.fork()
        if not pid:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            reason = dataset(folder, train=True)[0, 0].bad[0].reason
            os._exit(0 if "PermissionError: Permission denied" in reason else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        shutil.rmtree(folder)


def test_a_file_that_changed_since_it_was_listed(tmp_path):
    write_image_folder(tmp_path, classes=2, train=2, val=1)
    train = dataset(tmp_path, train=True)
    with Path(train.path(0)).open("ab") as file:
        file.write(b"\0")
    assert "when it was listed" in train[0, 0].bad[0].reason


# --- Archives -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    return folder, make_bad_archives(folder)


def read_all(root):
    opened = dataset(root)
    return [opened[index] for index in range(len(opened))]


ZIPS = ["parent", "parent_inside", "absolute", "link", "duplicate", "duplicate_spelling", "bomb",
        "bzip2", "encrypted", "huge", "lying_size", "elsewhere", "flipped_byte", "cut",
        "cut_in_front", "prefixed"]  # fmt: skip
TARS = ["parent", "absolute", "link", "hard_link", "device", "pipe", "duplicate", "negative_size",
        "huge", "damaged_header", "cut", "cut_between", "compressed", "headers_without_end",
        "empty"]  # fmt: skip


@pytest.mark.parametrize("kind", [*(f"zip_{k}" for k in ZIPS), *(f"tar_{k}" for k in TARS)])
def test_bad_archives(archives, kind):
    folder, refusals = archives
    assert len(refusals) == len(ZIPS) + len(TARS)
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(DataError) as error:
        read_all(folder / kind)
    assert refusals[kind] in str(error.value)
    assert str(folder / kind / "train.") in str(error.value)
    assert sorted(path.name for path in folder.rglob("*")) == before, "something was unpacked"


def test_the_archives_are_valid_before_they_are_damaged(tmp_path):
    for name, content in (("train.zip", valid_zip()), ("val.tar", valid_tar())):
        (tmp_path / name).write_bytes(content)
        opened = dataset(tmp_path, name[:-4])
        assert [opened[index].label for index in range(len(opened))] == [0, 0, 1, 1]


# --- Random damage --------------------------------------------------------------------------------


def test_fuzzed_files_raise_our_errors_only(tmp_path):
    outcomes = [read_fuzzed(seed, tmp_path) for seed in range(600)]
    assert {GOOD, BAD, REFUSED} == set(outcomes)


def test_the_seed_of_a_fuzzed_file_makes_it_again(tmp_path):
    for seed in range(40):
        read_fuzzed(seed, tmp_path / "a")
        read_fuzzed(seed, tmp_path / "b")
    made = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("train.*")]
    assert made
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in made)


# --- Disks and servers that do not answer ---------------------------------------------------------


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    """A function that makes the next `times` reads fail with an errno, and a list of pauses taken."""
    write_image_folder(tmp_path, classes=2, train=3, val=1)
    train = dataset(tmp_path, train=True)
    pauses, read = [], train.reader.read
    monkeypatch.setattr("utils.files.time.sleep", pauses.append)

    def fail(times, code):
        left = [times]

        def read_or_fail(index):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(code, os.strerror(code))
            return read(index)

        monkeypatch.setattr(train.reader, "read", read_or_fail)

    return train, fail, pauses


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_transient_errors_are_tried_again(flaky, code):
    train, fail, pauses = flaky
    fail(3, code)
    assert train[0, 0].bad == []
    assert len(pauses) == 3
    assert pauses == sorted(pauses)
    fail(4, code)
    assert os.strerror(code) in train[0, 0].bad[0].reason


def test_lasting_errors_are_not(flaky):
    train, fail, pauses = flaky
    fail(1, errno.EACCES)
    assert len(train[0, 0].bad) == 1
    assert pauses == []


# --- The report -----------------------------------------------------------------------------------

FILES = [BadFile(f"train/{name}.jpg", "empty", epoch, index)
         for name, epoch, index in (("b", 1, 4), ("a", 0, 9), ("c", 1, 2))]  # fmt: skip


def test_the_report_is_the_same_in_any_order_and_number_of_starts(tmp_path):
    report = BadSamples(tmp_path / "bad_samples.jsonl", limit=3)
    report.add(FILES)
    text = report.path.read_text()
    assert [record["path"][6] for record in read_records(report.path)] == ["a", "c", "b"]
    for file in [*FILES, FILES[0]]:
        BadSamples(report.path, limit=3).add([file])
    assert report.path.read_text() == text
    report.path.unlink()
    for file in reversed(FILES):
        report.add([file])
    assert report.path.read_text() == text


def test_the_limit_is_of_files_not_of_epochs(tmp_path):
    report = BadSamples(tmp_path / "bad_samples.jsonl", limit=2)
    for epoch in range(20):
        report.add([FILES[0]._replace(epoch=epoch), FILES[1]._replace(epoch=epoch)])
    with pytest.raises(DataError) as error:
        report.add([FILES[2]])
    for words in ("3 training images", "2 are allowed", "train/c.jpg", "DATA.MAX_BAD_SAMPLES"):
        assert words in str(error.value)


def add_one_by_one(path, start):
    report = BadSamples(path, limit=1000)
    for index in range(start, 40, 2):
        report.add([BadFile("x.jpg", "empty", 0, index)])


def test_processes_report_into_one_file(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    context = get_context("fork")
    processes = [context.Process(target=add_one_by_one, args=(path, start)) for start in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [record["index"] for record in read_records(path)] == list(range(40))


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "bad_samples.jsonl").mkdir()
    report = BadSamples(tmp_path / "bad_samples.jsonl", limit=2)
    report.add(FILES[:2])
    with pytest.raises(DataError, match="3 training images cannot be read, 2 are allowed"):
        report.add(FILES[2:])


# --- What decoding depends on ---------------------------------------------------------------------


def test_exif_rotation_is_applied_on_request():
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encode(picture, "PNG", exif=exif)
        turned = np.asarray(decode(content, apply_exif=True)).tolist()
        top, bottom = np.asarray(picture).tolist()
        upright = [top, bottom]
        expected = {
            1: upright,
            2: [top[::-1], bottom[::-1]],
            3: [bottom[::-1], top[::-1]],
            4: [bottom, top],
            5: [[top[0], bottom[0]], [top[1], bottom[1]]],
            6: [[bottom[0], top[0]], [bottom[1], top[1]]],
            7: [[bottom[1], top[1]], [bottom[0], top[0]]],
            8: [[top[1], bottom[1]], [top[0], bottom[0]]],
        }[orientation]
        assert turned == expected, orientation
        assert np.asarray(decode(content)).tolist() == upright


def test_damaged_exif_leaves_a_picture_as_it_is():
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0M\xff\0*\0\0\0\x08"):
        for kind in ("JPEG", "PNG", "WEBP"):
            content = encode(Image.new("RGB", (3, 2)), kind, exif=exif)
            assert decode(content, apply_exif=True).size == (3, 2)


def test_truncated_images_are_never_painted_grey(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES"):
        decode(valid_files()["a.jpg"])


def test_the_decoder_is_known_by_its_pixels(monkeypatch):
    fingerprint = decoder_fingerprint()
    assert fingerprint == decoder_fingerprint()
    assert set(fingerprint) == {"pillow", "simplejpeg", "libjpeg", "pixels"}
    swapped = decode(data.decode.SAMPLE).getchannel
    other = Image.merge("RGB", [swapped(channel) for channel in "BGR"])
    monkeypatch.setattr(data.decode, "decode", lambda content: other)
    assert decoder_fingerprint()["pixels"] != fingerprint["pixels"]


def test_no_warning_of_a_valid_image():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(valid_files()["a.jpg"], apply_exif=True)
