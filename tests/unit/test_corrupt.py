"""tools/corrupt.py: ImageNet-C's layout, bytes that depend on nothing but seed and names, resumption, refusals."""

import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
from helpers.images import write_image_folder, write_zip
from PIL import Image

from tools import corrupt


@pytest.fixture
def val(tmp_path):
    return write_image_folder(tmp_path / "data", classes=2, train=1, val=4, size=40) / "val"


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package that draws from NumPy's generator, or from `seed` where it is given."""

    def noisy(pixels, severity, name, seed=None):
        rng = np.random if seed is None else np.random.default_rng(seed)
        noise = rng.normal(size=pixels.shape) * 10 * severity
        return (pixels + noise).clip(0, 255).astype(np.uint8)

    monkeypatch.setattr(corrupt, "import_package", lambda: types.SimpleNamespace(corrupt=noisy))
    monkeypatch.setattr(corrupt, "list_versions", lambda: {"package": "1"})


def tree(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(*arguments) -> int:
    return corrupt.main([str(argument) for argument in arguments])


def test_the_layout_is_that_of_imagenet_c(val, tmp_path, package):
    assert run(val, tmp_path / "c", "--severities", 1, 5, "--workers", 1) == 0
    files = tree(tmp_path / "c")
    names = {str(path.relative_to(val)) for path in val.rglob("*.jpg")}
    assert set(files) == {"corruptions.json"} | {
        f"{corruption}/{severity}/{name}"
        for corruption in corrupt.CORRUPTIONS
        for severity in (1, 5)
        for name in names
    }
    with Image.open(tmp_path / "c" / "fog" / "1" / min(names)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (224, 224))
    assert len(set(files.values())) == len(files), "no two cells draw the same numbers"


@pytest.mark.parametrize("corruption", ["fog", "glass_blur"])
def test_bytes_depend_on_neither_order_nor_workers_nor_archive(val, tmp_path, package, corruption):
    assert run(val, tmp_path / "a", "--corruptions", "snow", corruption, "--workers", 1) == 0
    write_zip(val, tmp_path / "val.zip")
    options = ["--severities", 5, 4, 3, 2, 1, "--corruptions", corruption, "snow", "--workers", 2]
    assert run(tmp_path / "val.zip", tmp_path / "b", *options) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert run(val, tmp_path / "c", "--corruptions", corruption, "--seed", 1, "--workers", 1) == 0
    other = tree(tmp_path / "c")
    assert not set(tree(tmp_path / "a").values()) & set(other.values()), "another seed, other noise"


def test_it_resumes_and_keeps_what_is_there(val, tmp_path, package):
    out = tmp_path / "c"
    options = ["--corruptions", "fog", "--severities", 2, "--workers", 1]
    run(val, out, *options)
    complete = tree(out)
    kept, lost, *_ = sorted((out / "fog").rglob("*.jpg"))
    kept.write_bytes(b"kept")
    lost.unlink()
    (lost.parent / f".tmp-{lost.name}-1").write_bytes(b"half a fi")
    assert run(val, out, *options) == 0
    assert lost.read_bytes() == complete[str(lost.relative_to(out))]
    assert kept.read_bytes() == b"kept"
    assert run(val, out, "--corruptions", "snow", "--severities", 1, "--workers", 1) == 0
    assert (out / "snow" / "1").is_dir(), "cells can be added"


def test_the_number_of_images_is_recorded_and_may_lack_in_older_records(val, tmp_path, package):
    options = ["--per-class", 3, "--corruptions", "fog", "--severities", 2, "--workers", 1]
    assert run(val, tmp_path / "c", *options) == 0
    info = tmp_path / "c" / "corruptions.json"
    record = json.loads(info.read_text())
    assert record["images"] == len(list((tmp_path / "c" / "fog" / "2").rglob("*.jpg"))) == 6
    info.write_text(json.dumps({key: record[key] for key in record if key != "images"}))
    assert run(val, tmp_path / "c", *options) == 0
    assert json.loads(info.read_text()) == record


def test_another_plan_is_refused(val, tmp_path, package, capsys):
    out = tmp_path / "c"
    options = ["--corruptions", "fog", "--severities", 2, "--workers", 1]
    run(val, out, *options)
    before = tree(out)
    assert run(val, out, *options, "--seed", 1, "--size", 64) == 2
    assert "seed was 0 and is 1, size was 224 and is 64" in capsys.readouterr().err
    Image.new("RGB", (40, 40)).save(val / "class_0" / "new.jpg")
    assert run(val, out, *options) == 2
    assert "files was" in capsys.readouterr().err
    assert tree(out) == before


def test_the_same_images_of_each_class_in_every_cell(val, tmp_path, package):
    options = ["--per-class", 3, "--corruptions", "fog", "snow", "--workers", 1]
    assert run(val, tmp_path / "c", *options) == 0
    cells = [
        {str(path.relative_to(cell)) for path in cell.rglob("*.jpg")}
        for cell in (tmp_path / "c").glob("*/*")
        if cell.is_dir()
    ]
    assert len(cells) == 10
    assert all(cell == cells[0] for cell in cells)
    assert sorted(name.partition("/")[0] for name in cells[0]) == ["class_0"] * 3 + ["class_1"] * 3


def test_other_formats_become_jpegs_with_names_of_their_own(val, tmp_path, package):
    with Image.open(val / "class_0" / "000.jpg") as picture:
        picture.save(val / "class_0" / "000.png")
    run(val, tmp_path / "c", "--corruptions", "fog", "--severities", 1, "--workers", 1)
    folder = tmp_path / "c" / "fog" / "1" / "class_0"
    assert {"000.jpg", "000.png.jpg"} <= {path.name for path in folder.iterdir()}
    with Image.open(folder / "000.png.jpg") as picture:
        assert picture.format == "JPEG"


def test_pictures_stay_as_they_are_with_size_0(val, tmp_path, package, capsys):
    options = ["--size", 0, "--corruptions", "fog", "--severities", 1, "--workers", 1]
    assert run(val, tmp_path / "c", *options) == 0
    with Image.open(tmp_path / "c" / "fog" / "1" / "class_0" / "000.jpg") as picture:
        assert picture.size == (40, 40)
    Image.new("RGB", (31, 50)).save(val / "class_0" / "small.jpg")
    assert run(val, tmp_path / "d", *options) == 3
    error = capsys.readouterr().err
    assert "small.jpg has 31x50 pixels; the corruptions need at least 32 a side" in error


def test_a_damaged_picture_is_named(val, tmp_path, package, capsys):
    (val / "class_1" / "002.jpg").write_bytes(b"no picture")
    assert run(val, tmp_path / "c", "--corruptions", "fog", "--workers", 1) == 3
    assert "class_1/002.jpg" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(val, tmp_path, package, capsys):
    (tmp_path / "c").mkdir(mode=0o500)
    assert run(val, tmp_path / "c", "--workers", 1) == 6
    assert str(tmp_path / "c") in capsys.readouterr().err


def test_a_file_in_the_way_is_named(val, tmp_path, package, capsys):
    (tmp_path / "c").write_text("")
    assert run(val, tmp_path / "c" / "d", "--workers", 1) == 6
    assert f"{tmp_path / 'c' / 'd'} cannot be made: Not a directory" in capsys.readouterr().err


def test_the_missing_package_is_named(val, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corrupt, "PACKAGE", "no-such-package-of-corruptions")
    assert run(val, tmp_path / "c") == 2
    assert "pip install no-such-package-of-corruptions" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_the_package_makes_every_corruption_the_same_again(val, tmp_path):
    pytest.importorskip("imagecorruptions", reason="imagecorruptions-imaug is not installed")
    corruptions = (*corrupt.CORRUPTIONS, *corrupt.EXTRA_CORRUPTIONS)
    some = ("frost", "glass_blur", "impulse_noise", "elastic_transform")
    options = ["--severities", 3, "--per-class", 1, "--size", 64, "--corruptions"]
    assert run(val, tmp_path / "a", *options, *corruptions, "--workers", 1) == 0
    assert run(val, tmp_path / "b", *options, *some, "--workers", 2) == 0
    files, again = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert len(again) == 1 + 2 * len(some)
    assert again.items() <= files.items()
    assert len(files) == 1 + 2 * len(corruptions)
    record = json.loads(files.pop("corruptions.json"))
    assert record["versions"][corrupt.PACKAGE]
    assert len(set(files.values())) == len(files)
