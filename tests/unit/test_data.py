"""Datasets: folders, zip and tar files give the same samples; bad layouts and files are named."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import encode, write_image_folder, write_tar, write_zip
from helpers.pipeline import eval_transform, train_transform
from helpers.pipeline import image_dataset as dataset
from PIL import Image

import data.dataset
from data import read_class_list
from data.classes import sort_classes
from data.decode import FORMATS, UNREADABLE, decode, decode_pixels
from data.listing import EXTENSIONS
from data.pack import write_index
from data.readers import Reader, open_split
from utils.errors import DataError

SHARED = Path(__file__).parents[2] / "../shared/data"
PICTURE = Image.fromarray(
    np.random.default_rng(1).integers(0, 256, (24, 32, 3)).astype(np.uint8)
).resize((64, 48), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path):
    return write_image_folder(tmp_path / "set", classes=3, train=4, val=2)


def contents(data):
    """Everything that must not depend on how the files are kept."""
    samples = [data[index] for index in range(len(data))]
    images = [(sample.image.numpy().tobytes(), sample.label) for sample in samples]
    return data.classes, data.fingerprint, images


@pytest.mark.parametrize("prefix", ["", "train/", "./", "./val/"])
@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "tar"])
def test_archives_equal_the_folder(root, tmp_path, kind, prefix):
    packed = tmp_path / "packed"
    packed.mkdir()
    if kind == "tar":
        write_tar(root / "train", packed / "train.tar", prefix.rstrip("/"))
    else:
        method = zipfile.ZIP_DEFLATED if "deflated" in kind else zipfile.ZIP_STORED
        write_zip(root / "train", packed / "train.zip", prefix, method)
    assert contents(dataset(packed)) == contents(dataset(root))


def test_a_dataset_survives_pickling_and_forks(root, tmp_path):
    write_zip(root / "train", tmp_path / "train.zip")
    data = dataset(tmp_path)
    expected = contents(data)  # opens the archive here, before the fork
    assert contents(pickle.loads(pickle.dumps(data))) == expected
    pid = os.fork()
    if not pid:
        os._exit(contents(data) != expected)
    assert os.waitpid(pid, 0)[1] == 0


def test_one_class_list_decides_the_labels(root, tmp_path):
    (tmp_path / "classes.txt").write_text("class_2\n\nclass_0\nclass_1\n")
    classes = read_class_list(tmp_path / "classes.txt")
    data = dataset(root, "val", classes=classes)
    assert data.classes == classes == ["class_2", "class_0", "class_1"]
    for index in range(len(data)):
        assert classes[data[index].label] in data.path(index)
    for file in (root / "val/class_0").iterdir():
        file.unlink()
    (root / "val/class_0").rmdir()
    subset = dataset(root, "val", classes=classes, allow_missing=True)
    assert sorted(set(subset.labels.tolist())) == [0, 2]


def as_kind(root, kind, prefix=""):
    """The training split of `root` as it is, or as a zip, tar or pack in a folder of its own; returns the root."""
    target = root.parent / f"as {kind}"
    if kind == "folder":
        shutil.copytree(root, target, symlinks=True)
    elif kind == "zip":
        target.mkdir()
        write_zip(root / "train", target / "train.zip", prefix)
    elif kind == "tar":
        target.mkdir()
        write_tar(root / "train", target / "train.tar", prefix.rstrip("/"))
    else:
        folder = target / "train.pack"
        folder.mkdir(parents=True)
        reader = open_split(root, "train")
        rows, content = [], b""
        for index in range(len(reader.names)):
            image = reader.read(index)
            rows.append((len(image), 0, len(content), zlib.crc32(image)))
            content += image
        (folder / "shard-00000.bin").write_bytes(content)
        write_index(folder, reader.names, np.array(rows), {"source": ""})
    return target


KINDS = ["folder", "zip", "tar", "pack"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_is_refused_with_the_folders_below(root, kind):
    (root / "train").rename(root / "images")
    (root / "train").mkdir()
    (root / "images").rename(root / "train/images")
    with pytest.raises(DataError) as error:
        dataset(as_kind(root, kind))
    assert (
        "has one class, images, expected at least two; is images a folder too much? "
        "It holds 3 folders (class_0, class_1, class_2): move them up a level"
    ) in str(error.value)
    for name in ("class_1", "class_2"):
        shutil.rmtree(root / "train/images" / name)
    for file in (root / "train/images/class_0").iterdir():
        file.rename(root / "train/images" / file.name)
    (root / "train/images/class_0").rmdir()
    shutil.rmtree(root.parent / f"as {kind}")
    with pytest.raises(DataError, match=r"has one class, images, .* sort the images into one"):
        dataset(as_kind(root, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_numeric_classes_are_sorted_as_numbers(root, kind):
    for old, new in enumerate(("10", "2", "0")):
        (root / f"train/class_{old}").rename(root / "train" / new)
    data = dataset(as_kind(root, kind))
    assert data.classes == ["0", "2", "10"]
    assert [data.classes[label] for label in data.labels] == ["0"] * 4 + ["10"] * 4 + ["2"] * 4
    assert dataset(root, classes=["0", "10", "2"]).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert sort_classes(["10", "2", "1e1"]) == ["10", "1e1", "2"]
    assert sort_classes(["10", "2", "²"]) == ["10", "2", "²"]


LITTER = ["__MACOSX/class_0/._000.jpg", "__MACOSX/000.jpg", "@eaDir/x.jpg", "class_0/@eaDir/000.jpg/THUMB_M.jpg",
          "lost+found/#1.jpg", "class_1/.ipynb_checkpoints/000.jpg", ".DS_Store", "class_1/Thumbs.db",
          "class_2/desktop.ini", "class_2/._000.jpg", "$RECYCLE.BIN/1.jpg", "#recycle/1.jpg",
          "System Volume Information/1.jpg", ".DS_Store_folder/1.jpg"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_litter_of_systems_is_never_data(root, kind):
    expected = contents(dataset(root))
    for name in LITTER:
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "train/class_0/000.jpg", path)
    data = dataset(as_kind(root, kind, "train/" if kind in ("zip", "tar") else ""))
    assert contents(data) == expected
    assert set(data.reader.ignored) <= {"hidden or system"}


def test_ignored_files_are_reported_by_suffix(root, tmp_path):
    for name in ("a.txt", "class_0/b.TXT", "class_0/c.xml", "class_0/d", "loose.jpg"):
        (root / "train" / name).write_text("")
    assert str(dataset(root)).endswith(
        "train: 12 images, 3 classes, 5 other files ignored (.txt 2, .xml 1, in no class folder 1, no suffix 1)"
    )
    for kind in ("zip", "tar"):
        assert dataset(as_kind(root, kind)).reader.ignored == dataset(root).reader.ignored


def test_every_name_of_a_format_that_is_decoded_is_an_image():
    """No more and no fewer than Pillow's names of these formats, but for what never decodes to 8 bits."""
    names = {name for name, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert {name.decode() for name in EXTENSIONS} == names - {".pfm", ".avifs"}


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_known_by_all_their_suffixes(root, kind):
    for number, (name, form) in enumerate(
        {".jpe": "JPEG", ".JFIF": "JPEG", ".gif": "GIF", ".pnm": "PPM", ".AVIF": "AVIF"}.items()
    ):
        (root / f"train/class_1/x{number}{name}").write_bytes(encode(PICTURE, form))
    for form in ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "AVIF"):  # known by their first bytes
        (root / f"train/class_1/y{form}").write_bytes(encode(PICTURE, form))
    (root / "train/class_1/README").write_text("BMW and others")
    data = dataset(as_kind(root, kind))
    assert len(data) == 24
    assert all(data[index].image.shape == (3, 48, 64) for index in range(8, 20))


def test_a_zip_with_the_separators_of_windows(root, tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for file in (root / "train").rglob("*.jpg"):
            member = zipfile.ZipInfo("x")
            member.filename = f"train\\{file.parent.name}\\{file.name}"
            archive.writestr(member, file.read_bytes())
    assert contents(dataset(tmp_path)) == contents(dataset(root))


# --- Hold-out -------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    return write_image_folder(tmp_path / "many", classes=3, train=60, val=1, size=8)


def parts(root, share=0.3):
    return [dataset(root, holdout=share, part=part) for part in ("train", "holdout")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_disjoint_and_exhaustive_and_the_same_for_every_kind(many, kind):
    full = dataset(many)
    train, held_out = parts(as_kind(many, kind))
    names = [set(part.reader.names.tolist()) for part in (train, held_out)]
    assert names[0] | names[1] == set(full.reader.names.tolist())
    assert not names[0] & names[1]
    assert 30 < len(held_out) < 80, "about 0.3 of 180"
    assert train.classes == held_out.classes == full.classes
    assert [part.fingerprint for part in (train, held_out)] == [p.fingerprint for p in parts(many)]
    assert len({train.fingerprint, held_out.fingerprint, full.fingerprint}) == 3
    for part in (train, held_out):
        for index in range(len(part)):
            assert part.path(index).split("/")[-2] == part.classes[part.labels[index]]
            assert part[index].image.shape == (3, 8, 8)
    assert "(holdout part, 0.3 of each class held out)" in str(held_out)


def test_the_parts_are_stable_when_files_and_classes_are_added(many):
    before = [set(part.reader.names.tolist()) for part in parts(many)]
    for number in range(40):
        shutil.copy(many / "train/class_0/000.jpg", many / f"train/class_0/new{number}.jpg")
    shutil.copytree(many / "train/class_1", many / "train/class_00")
    after = [set(part.reader.names.tolist()) for part in parts(many)]
    assert all(old < new for old, new in zip(before, after, strict=True))
    larger = set(parts(many, 0.5)[1].reader.names.tolist())
    assert after[1] < larger, "a larger share keeps what was held out"


def test_the_parts_are_these():
    """Which files are held out never changes, or a resumed run would train on what it is judged by."""
    names = np.array([b"class_0/%03d.jpg" % number for number in range(20)])
    reader = Reader(Path("x"), names, np.ones((20, 1), np.int64), {"class_0"}, Counter())
    kept = data.dataset._split_by_hash(reader, 0.25, "holdout").names.tolist()
    assert [int(name[8:11]) for name in kept] == [5, 15, 16, 18, 19]


def test_a_class_without_an_image_in_a_part_is_named(root):
    with pytest.raises(DataError, match=r"DATA.HOLDOUT 0.001 holds 0 of the 4 images of class cl"):
        dataset(root, holdout=0.001, part="train")


def test_checksums_of_a_part(many, tmp_path):
    lines = [
        json.dumps({"split": "train", "name": f"{p.parent.name}/{p.name}",
                    "sha256": hashlib.sha256(p.read_bytes()).hexdigest()})
        for p in (many / "train").rglob("*.jpg")
    ]  # fmt: skip
    (tmp_path / "index.jsonl").write_text("\n".join(lines))
    part = dataset(many, holdout=0.3, part="holdout", checksums=tmp_path / "index.jsonl")
    assert part[len(part) - 1].image.shape == (3, 8, 8)


def test_validation_is_another_name_of_val(root):
    expected = contents(dataset(root, "val"))
    (root / "val").rename(root / "validation")
    assert contents(dataset(root, "val")) == expected


def test_other_forms_of_a_split_are_reported(root):
    assert open_split(root, "val").describe_unread() == ""
    write_zip(root / "val", root / "validation.zip")
    reader = open_split(root, "val")
    assert reader.describe_unread() == f"{root}/val is read; validation.zip beside it is not"
    write_tar(root / "val", root / "val.tar")
    reader = open_split(root, "val").subset(range(2))
    assert (
        reader.describe_unread()
        == f"{root}/val is read; val.tar and validation.zip beside it are not"
    )
    assert open_split(root, "val.tar").describe_unread() == ""


def test_what_is_no_image_is_ignored_and_counted(root, tmp_path):
    expected = contents(dataset(root))
    folder = root / "train/class_1"
    (root / "train/.cache").mkdir()
    (root / "train/.cache/0.jpg").write_bytes(b"")
    (root / "train/readme.txt").write_text("hello")
    (folder / "._000.jpg").write_bytes(b"")
    (folder / "notes.md").write_text("hello")
    (folder / "circle").symlink_to(root / "train")
    (folder / "self").symlink_to(folder)
    data = dataset(root)
    assert contents(data) == expected
    assert data.reader.ignored == {
        "hidden or system": 2,
        ".txt": 1,
        ".md": 1,
    }  # the hidden folder as one
    write_zip(root / "train", tmp_path / "train.zip")
    packed = dataset(tmp_path)
    assert contents(packed) == expected


def test_the_fingerprint_follows_names_sizes_and_classes(root):
    prints = {dataset(root).fingerprint, dataset(root, "val").fingerprint}
    prints.add(dataset(root, classes=["class_2", "class_1", "class_0"]).fingerprint)
    (root / "train/class_0/000.jpg").rename(root / "train/class_0/999.jpg")
    prints.add(dataset(root).fingerprint)
    with open(root / "train/class_0/999.jpg", "ab") as file:
        file.write(b"\0")
    prints.add(dataset(root).fingerprint)
    assert len(prints) == 4  # the order of the class list is not the data's


def empty_class(root):
    (root / "val/class_9").mkdir()
    return {}


def unknown_class(root):
    (root / "val/class_1").rename(root / "val/class_x")
    return {"classes": ["class_0", "class_1", "class_2"]}


def missing_class(root):
    return {"classes": ["class_0", "class_1", "class_2", "class_3"]}


def level_too_many(root):
    (root / "val").rename(root / "images")
    (root / "val").mkdir()
    (root / "images").rename(root / "val/images")
    return {"classes": ["class_0", "class_1", "class_2"]}


def other_suffixes(root):
    for file in (root / "val/class_1").iterdir():
        file.rename(file.with_suffix(".jpg_large"))
    (root / "val/class_1/notes").touch()
    return {}


def flat(root):
    for file in (root / "val").rglob("*.jpg"):
        file.rename(root / "val" / f"{file.parent.name}_{file.name}")
    for folder in list((root / "val").glob("class_*")):
        if folder.is_dir():
            folder.rmdir()
    return {}


def no_split(root):
    (root / "val").rename(root / "test")
    (root / ".train.index.npz").touch()
    return {}


def lost_root(root):
    root.rename(root.with_name("elsewhere"))
    root.symlink_to("/unmounted/disk")
    return {}


def no_root(root):
    root.rename(root.with_name("elsewhere"))
    return {}


def no_images(root):
    (root / "val").rename(root / "old")
    (root / "val").mkdir()
    return {}


def linked_class(root):
    (root / "val/class_9").symlink_to(root / "val/class_0")
    return {}


def link_to_the_split(root):
    (root / "val/class_9").symlink_to(root / "val")
    return {}


def lost_class(root):
    (root / "val/class_9").symlink_to("/nowhere")
    return {}


def lost_file(root):
    (root / "val/class_0/more").symlink_to("more")  # in a circle
    return {}


def archive(name, data):
    def build(root):
        (root / "val").rename(root / "old")
        (root / name).write_bytes(data)
        return {}

    return build


def cut_tar(root):
    write_tar(root / "val", root / "val.tar")
    os.truncate(root / "val.tar", 5000)
    (root / "val").rename(root / "old")
    return {}


def bzip2(root):
    write_zip(root / "val", root / "val.zip", method=zipfile.ZIP_BZIP2)
    (root / "val").rename(root / "old")
    return {}


def tars_of_classes(root):
    (root / "val").rename(root / "old")
    (root / "val").mkdir()
    write_tar(root / "old", root / "val" / "n01440764.tar")
    write_tar(root / "val", root / "val.tar")
    shutil.rmtree(root / "val")
    return {}


def dangling(root):
    (root / "val").rename(root / "old")
    (root / "val").symlink_to("/nowhere")
    return {}


def a_file(root):
    shutil.rmtree(root)
    root.touch()
    return {}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (tars_of_classes, "prepared with `python tools/prepare.py imagenet DOWNLOAD OUT`"),
        (dangling, "val: is a link to /nowhere, which does not exist"),
        (a_file, "set: is a file, not a folder; expected <root>/train and"),
        (empty_class, "val: no image in class_9; expected at least one"),
        (
            linked_class,
            "val: class_0 and class_9 are the same folder; remove the one that is a link",
        ),
        (
            link_to_the_split,
            "val: val and class_9 are the same folder; remove the one that is a link",
        ),
        (
            lost_class,
            "val/class_9: is a link to /nowhere, which does not exist; restore that, or remove",
        ),
        (lost_file, "val/class_0/more: is a link to more, which does not exist"),
        (unknown_class, "val: class_x not in the class list of 3 (class_0, class_1, class_2); use"),
        (missing_class, "val: no folder for class_3 of the 4 classes; complete"),
        (level_too_many, "val: images not in the class list of 3 (class_0, class_1, class_2)"),
        (
            level_too_many,
            "is images a folder too much? It holds 3 folders (class_0, class_1, class_2)",
        ),
        (
            other_suffixes,
            "no image in class_1; expected at least one per class folder, fill or remove it",
        ),
        (other_suffixes, "remove it, 3 other files ignored (.jpg_large 2, no suffix 1)"),
        (flat, "val: holds 6 images and no class folder, expected <class>/<image>; sort"),
        (no_images, "val: holds no image, expected <class>/<image>; sort"),
        (no_split, "set: has no val split, found test, train; expected <root>/train and"),
        (no_split, ".zip or .tar; or validate on a tenth of train with DATA.HOLDOUT=0.1"),
        (lost_root, "set: is a link to /unmounted/disk, which does not exist"),
        (no_root, "set: no such folder. Name yours with --data-path, link it here"),
        (archive("val.zip", b"PK nothing"), "val.zip: not a readable zip file"),
        (archive("val.tar", b"nothing" * 99), "val.tar: not a readable uncompressed tar file"),
        (cut_tar, "of 5000; the archive is cut off or damaged, copy it again"),
        (bzip2, "compressed by method 12; pack the folder again with zip -0 -r"),
    ],
)
def test_bad_layouts(root, build, words):
    options = build(root)
    with pytest.raises(DataError) as error:
        dataset(root, "val", **options)
    assert words in str(error.value)
    assert str(root) in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read as a class list"),
        ("\n", "names no class"),
        ("a\nb\na\n", "names a more than once"),
    ],
)
def test_bad_class_lists(tmp_path, text, words):
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_class_list(path)


def png(size, chunk=b""):
    """A PNG that claims to be `size` pixels wide and high."""

    def block(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    pixels = block(b"IDAT", chunk or zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + pixels + block(b"IEND", b"")


JPEG, PNG = encode(PICTURE, "JPEG"), encode(PICTURE, "PNG")
DAMAGED = {
    "empty": b"",
    "html": b"<!DOCTYPE html><html>404</html>",
    "zeros": bytes(4096),
    "jpeg, half": JPEG[: len(JPEG) // 2],
    "jpeg, last bytes missing": JPEG[:-2],
    "jpeg, header only": JPEG[:200],
    "progressive jpeg, half": encode(PICTURE, "JPEG", progressive=True)[:1500],
    "png, half": PNG[: len(PNG) // 2],
    "png, flipped byte": PNG[:400] + bytes([PNG[400] ^ 255]) + PNG[401:],
    "png, pixels are not deflated": png(8, b"no zlib stream"),
    "png, too few pixels": png(64),
    "png, decompression bomb": png(30000),
    "gif, half": encode(PICTURE, "GIF")[:900],
    "bmp, half": encode(PICTURE, "BMP")[:900],
    "webp, half": encode(PICTURE, "WEBP")[:900],
    "tiff, half": encode(PICTURE, "TIFF")[:900],
    "avif, half": encode(PICTURE, "AVIF")[:900],
    "float tiff": encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "32-bit tiff": encode(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"),
    "postscript": encode(PICTURE, "EPS"),
    "healthy, but in a format that is not read": encode(PICTURE, "TGA"),
}


def test_every_other_image_of_a_class_is_tried_once(tmp_path):
    train = dataset(write_image_folder(tmp_path / "set", classes=2, train=8, val=2), train=True)
    for index in range(7):  # one of class_0 is left
        Path(train.path(index)).write_bytes(b"nothing")
    for epoch in range(3):
        sample = train[epoch, 0]
        assert sample.label == 0
        assert len({bad.path for bad in sample.bad}) == len(sample.bad) <= 7


def check_damaged(root, broken, first_bytes=None):
    """Training substitutes, always the same way, and reports; evaluation names the file."""
    train = dataset(root, train=True)
    index = [train.path(i) for i in range(len(train))].index(str(root / broken))
    sample, again = train[5, index], train[5, index]
    assert torch.equal(sample.image, again.image)
    assert (sample.label, sample.bad) == (again.label, again.bad)
    path, reason, *address = sample.bad[0]
    assert address == [5, index]
    assert path == str(root / broken)
    assert "0x" not in reason.split("the first are")[0], "an address would differ from run to run"
    healthy = [train[5, other] for other in range(len(train)) if other != index]
    same_class = [s for s in healthy if s.label == sample.label]
    assert any(torch.equal(sample.image, s.image) for s in same_class)
    assert not any(s.bad for s in healthy)
    with pytest.raises(DataError) as error:
        dataset(root)[index]
    for words in (path, f"{train.reader.sizes[index]} bytes", "never substitutes"):
        assert words in str(error.value)
    if first_bytes is not None:
        assert repr(first_bytes) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files(root, kind):
    (root / "train/class_1/001.jpg").write_bytes(DAMAGED[kind])
    check_damaged(root, "train/class_1/001.jpg", DAMAGED[kind][:16])


def test_dangling_link(root):
    (root / "train/class_1/001.jpg").unlink()
    (root / "train/class_1/001.jpg").symlink_to("nowhere.jpg")
    check_damaged(root, "train/class_1/001.jpg", b"")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("where", [40, 300])  # in the data's first bytes, in its middle
def test_damaged_zip_members(root, tmp_path, method, where):
    packed = tmp_path / "packed"
    packed.mkdir()
    write_zip(root / "train", packed / "train.zip", method=method)
    data = bytearray((packed / "train.zip").read_bytes())
    data[data.index(b"class_1/001.jpg") + where] ^= 255
    (packed / "train.zip").write_bytes(data)
    check_damaged(packed, "train.zip/class_1/001.jpg")


def test_archives_cut_after_indexing(root, tmp_path):
    write_tar(root / "train", tmp_path / "train.tar")
    data = dataset(tmp_path)
    os.truncate(tmp_path / "train.tar", 100)
    with pytest.raises(DataError, match="the archive ends inside the file"):
        data[0]


def test_a_class_without_a_readable_image_ends_training(root):
    for file in (root / "train/class_1").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"class class_1 none can be read; repair"):
        dataset(root, train=True)[0, 4]


def ramp(dtype, top):
    return Image.fromarray(np.linspace(0, top, 256).round().astype(dtype).reshape(16, 16))


GREY = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (encode(ramp(np.uint16, 65535), "PNG"), GREY),
        (encode(ramp(np.uint16, 65535), "TIFF"), GREY),
        (encode(ramp(np.int32, 65535), "TIFF"), GREY),
        (encode(ramp(np.uint8, 255), "PNG"), GREY),
        (encode(ramp(np.uint8, 255).convert("LA"), "PNG"), GREY),
        (encode(ramp(np.uint8, 255).convert("P"), "PNG"), GREY),
        (encode(ramp(np.uint8, 255), "GIF"), GREY),
        (PNG, np.asarray(PICTURE)),
        (encode(PICTURE.convert("RGBA"), "PNG"), np.asarray(PICTURE)),
        (encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(9)]), np.asarray(PICTURE)),
        (encode(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
         np.asarray(decode(JPEG))),
        (encode(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"), np.zeros((8, 8, 3))),
        (encode(Image.new("1", (1, 1), 1), "PNG"), np.full((1, 1, 3), 255)),
    ],
    ids=["png16", "tiff16", "tiff32", "L", "LA", "P", "gif", "png", "RGBA", "animated", "exif", "CMYK", "1x1"],
)  # fmt: skip
def test_every_mode_becomes_rgb(data, pixels):
    image = decode(data)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(decode_pixels(data).numpy(), pixels)


@pytest.mark.parametrize("kind", DAMAGED)
def test_pixels_of_damaged_files_are_refused_like_pictures(kind):
    with pytest.raises(UNREADABLE) as picture:
        decode(DAMAGED[kind])
    with pytest.raises(UNREADABLE) as pixels:
        decode_pixels(DAMAGED[kind])
    assert str(pixels.value) == str(picture.value)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
def test_extreme_shapes_are_accepted(size):
    picture = Image.new("RGB", size)
    data = encode(picture, "PNG")
    for transform in (
        train_transform(32),
        train_transform(32, padding=4),
        eval_transform(32),
        eval_transform(32, exact=False),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert transform(decode_pixels(data)).shape == (3, 32, 32)


def many_scans(scans):
    jpeg = encode(Image.new("L", (2048, 2048)), "JPEG", progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * scans + jpeg[-2:]


def many_scans_of_the_first_of_two(scans):
    """An MPO file, as of cameras with two lenses."""
    small = [Image.new("L", (8, 8))]
    options = {"save_all": True, "append_images": small, "progressive": True}
    data = encode(Image.new("L", (2048, 2048)), "MPO", **options)
    end = data.index(b"\xff\xd9\xff\xd8")  # of the first picture
    last = data.rindex(b"\xff\xda", 0, end)
    return data[:end] + data[last:end] * scans + data[end:]


def text_pixels(side):
    return b"P2 %d %d 255\n" % (side, side) + b"1 " * side**2


def lying(width, height):
    png = encode(Image.new("L", (8, 8)), "PNG")
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return png[:12] + chunk + png[33:]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lying(9_500, 9_500), "9500 × 9500 pixels, more than 89,478,485"),
        (lying(30_000, 1), "one side over 20,000 times the other"),
        (many_scans(300), "scans of 4,194,304 pixels, more than 1,073,741,824 in all"),
        (many_scans_of_the_first_of_two(300), "scans of 4,194,304 pixels, more than"),
        (text_pixels(1500), "a PPM file of a kind that is decoded slowly, of more than 4 MiB"),
    ],
    ids=["pixels", "sides", "scans", "scans of two", "text"],
)
def test_what_would_cost_too_much_is_refused_before_it_is_decoded(data, words, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it is decoded"))
    for read in (decode, decode_pixels):
        with pytest.raises(ValueError, match=words):
            read(data)


def test_what_photographs_have_is_no_excess():
    assert decode_pixels(many_scans(20)).shape == (2048, 2048, 3)
    assert decode_pixels(many_scans_of_the_first_of_two(1)).shape == (2048, 2048, 3)
    assert decode_pixels(text_pixels(100)).shape == (100, 100, 3)


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 128, 129, 257, 65278, 65535]], np.uint16)
    for picture in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        kind = "PNG" if picture.mode == "I;16" else "TIFF"
        assert decode_pixels(encode(picture, kind))[0, :, 0].tolist() == [0, 0, 1, 1, 254, 255]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared CIFAR-10 and ImageNet samples")
def test_shared_samples(monkeypatch):
    monkeypatch.setattr("data.listing.SETTLED", 10**20)  # keeps the folder as it is
    train = dataset(SHARED / "cifar10", train=True)
    val = dataset(SHARED / "cifar10", "val", classes=train.classes)
    assert (len(train), len(val), len(train.classes)) == (50_000, 10_000, 10)
    assert train[0, 49_999].image.shape == val[0].image.shape == (3, 32, 32)
    imagenet = dataset(SHARED / "imagenet_samples", "val")
    assert len(imagenet) == len(imagenet.classes) == 1000
    assert imagenet[999].image.shape[0] == 3
    for index in range(0, 1000, 20):
        file = imagenet.reader.read(index)
        np.testing.assert_array_equal(decode_pixels(file).numpy(), np.asarray(decode(file)))
