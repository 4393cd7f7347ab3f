"""Preparation of datasets: every form gives the same files, damage is named, nothing partial is taken for complete."""

import errno
import fcntl
import json
import os
import pickle
import resource
import shutil
import tarfile

import numpy as np
import pytest
from helpers import downloads
from helpers.pipeline import image_dataset
from PIL import Image

from data.decode import decode
from data.raw_forms import describe_raw_form
from data.readers import open_split
from tools import prepare
from tools.datasets import cifar10, imagenet, imagenette, raw_dataset
from utils.errors import ConfigError, DataError, StorageError

HAS_PYARROW = imagenet.find_spec("pyarrow") is not None
needs_pyarrow = pytest.mark.skipif(not HAS_PYARROW, reason="pyarrow is not installed")


def write_class_tars(photos, root):
    return downloads.unpack_train(downloads.write_archives(photos, root))


def write_class_folders(photos, root):
    """With the validation images as an archive still, and the devkit unpacked."""
    downloads.unpack_classes(write_class_tars(photos, root))
    shutil.unpack_archive(root / "ILSVRC2012_devkit_t12.tar.gz", root)
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    return root


def write_flat_val(photos, root):
    return downloads.unpack_val(downloads.unpack_classes(write_class_tars(photos, root)))


FORMS = {
    "archives": downloads.write_archives,
    "class tars": write_class_tars,
    "class folders": write_class_folders,
    "flat val": write_flat_val,
    "kaggle": downloads.write_kaggle,
    "shards": downloads.write_shards,
    "parquet": downloads.write_parquet,
}
each_form = pytest.mark.parametrize(
    "form", [pytest.param(f, marks=needs_pyarrow if f == "parquet" else ()) for f in FORMS]
)
each_output = pytest.mark.parametrize("to", ["tree", "zip", "pack"])
SUFFIX = {"tree": "", "zip": ".zip", "pack": ".pack"}


@pytest.fixture(autouse=True)
def _small_datasets(monkeypatch):
    """Published numbers as small as the downloads made here."""
    monkeypatch.setattr(imagenet, "CLASSES", downloads.GREY)
    monkeypatch.setattr(imagenet, "COUNTS", {"train": 9, "val": 5})
    monkeypatch.setattr(cifar10.Cifar10, "counts", {"train": 50, "val": 10})
    monkeypatch.setattr(imagenette.Imagenette, "classes", downloads.GREY)
    monkeypatch.setattr(imagenette.Imagenette, "counts", {"train": 9, "val": 5})


@pytest.fixture(scope="module")
def photos():
    return downloads.photos()


def run(*arguments, code=0):
    assert prepare.main([str(argument) for argument in arguments]) == code


def fails(capsys, code, *arguments):
    """The message with which the command ends."""
    capsys.readouterr()
    run(*arguments, code=code)
    return capsys.readouterr().err


def contents(root):
    """Everything that training reads, by split."""
    found = {}
    for split in ("train", "val"):
        reader = open_split(root, split)
        names = [name.decode() for name in reader.names]
        found[split] = [(name, reader.read(index)) for index, name in enumerate(names)]
    return found


def fingerprint(root, split="train"):
    return image_dataset(root, split).fingerprint


def expected(photos):
    return {
        split: sorted((f"{p.wnid}/{p.name}.JPEG", p.data) for p in found)
        for split, found in photos.items()
    }


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# --- What comes out -------------------------------------------------------------------------------


@each_form
@each_output
def test_every_form_of_imagenet_gives_the_original_files(photos, tmp_path, form, to, capsys):
    source = FORMS[form](photos, tmp_path / "source")
    run("imagenet", source, tmp_path / "out", "--to", to)
    assert contents(tmp_path / "out") == expected(photos)
    names = [f"train{SUFFIX[to]}", f"val{SUFFIX[to]}"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "prepare.json"])
    assert "9 images of 3 classes (as published)" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/prepare.json").read_text())
    tree = downloads.write_tree(photos, tmp_path / "tree")
    assert record["splits"]["train"]["fingerprint"] == fingerprint(tree)


def test_a_pack_has_the_fingerprint_of_the_files(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.datasets.output.SHARD_BYTES", 2000)
    source = downloads.write_archives(photos, tmp_path / "source")
    run("imagenet", source, tmp_path / "out", "--to", "pack")
    assert contents(tmp_path / "out") == expected(photos)
    pack = open_split(tmp_path / "out", "train")
    tree = downloads.write_tree(photos, tmp_path / "tree")
    assert pack.info["source"] == fingerprint(tree)
    assert len(pack.info["shards"]) > 3


def test_zip_files_are_stored_and_the_same_each_time(photos, tmp_path):
    source = downloads.write_archives(photos, tmp_path / "source")
    for name in ("one", "two"):
        run("imagenet", source, tmp_path / name, "--to", "zip")
    assert (tmp_path / "one/val.zip").read_bytes() == (tmp_path / "two/val.zip").read_bytes()
    reader = open_split(tmp_path / "one", "train")
    assert (reader.where[:, 0] == reader.where[:, 2]).all(), "packed size equals size"


def test_validation_alone_can_be_prepared_and_training_later(photos, tmp_path, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    train = source / "ILSVRC2012_img_train.tar"
    train.rename(tmp_path / "later")
    run("imagenet", source, tmp_path / "out")
    assert visible(tmp_path / "out") == ["prepare.json", "val"]
    assert f"{source}: ImageNet's original archives, val\n" in capsys.readouterr().out
    (tmp_path / "later").rename(train)
    run("imagenet", source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected(photos)


def test_class_tars_beside_sorted_or_no_validation_images(photos, tmp_path):
    source = write_class_tars(photos, tmp_path / "source")
    run("imagenet", source / "train", tmp_path / "train")
    assert visible(tmp_path / "train") == ["prepare.json", "train"]
    (source / "ILSVRC2012_img_val.tar").unlink()
    tree = downloads.write_tree({"val": photos["val"]}, source)
    assert open_split(tree, "val")
    run("imagenet", source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected(photos)


def test_empty_folders_beside_archives_are_no_splits(photos, tmp_path):
    source = downloads.write_archives(photos, tmp_path / "source")
    (source / "ILSVRC2012_img_train.tar").unlink()
    (source / "train").mkdir()
    run("imagenet", source, tmp_path / "out")
    assert visible(tmp_path / "out") == ["prepare.json", "val"]


def test_class_tars_resume_after_the_last_complete_one(photos, tmp_path, capsys):
    source, out = write_class_tars(photos, tmp_path / "source"), tmp_path / "out"
    first, _, last = sorted((source / "train").glob("*.tar"))
    complete = cut(last, last.stat().st_size // 2)
    message = fails(capsys, DataError.exit_code, "imagenet", source, out)
    assert f"{last}: cut off or damaged at byte" in message
    last.write_bytes(complete)
    first.write_bytes(bytes(first.stat().st_size))  # of the same size: it is not read again
    run("imagenet", source, out)
    assert contents(out) == expected(photos)


def test_an_image_without_a_label_is_named(photos, tmp_path, capsys):
    source = write_flat_val(photos, tmp_path / "source")
    (source / "val/cat.jpg").touch()
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    kit = source / "ILSVRC2012_devkit_t12.tar.gz"
    assert f"{kit}: has no label for cat.jpg of {source / 'val'}" in message


@each_output
def test_cifar10_is_lossless(tmp_path, to):
    batches = downloads.cifar_batches()
    archive = downloads.write_cifar(batches, tmp_path / "cifar-10-python.tar.gz")
    run("cifar10", archive, tmp_path / "out", "--to", to)
    found = contents(tmp_path / "out")
    for split, names in cifar10.BATCHES.items():
        pixels = np.concatenate([batches[name]["data"] for name in names])
        labels = [label for name in names for label in batches[name]["labels"]]
        assert len(found[split]) == len(labels)
        for name, data in found[split]:
            class_name, _, file = name.partition("/")
            number = int(file.removesuffix(".png"))
            assert class_name == cifar10.Cifar10.classes[labels[number]]
            image = np.array(decode(data))  # height, width, colours
            assert np.array_equal(image.transpose(2, 0, 1).flatten(), pixels[number])


def test_cifar10_as_jpegs_from_the_extracted_folder(tmp_path):
    archive = downloads.write_cifar(downloads.cifar_batches(), tmp_path / "cifar-10-python.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "extracted", "gztar")
    run("cifar10", tmp_path / "extracted", tmp_path / "out", "--quality", "95")
    file = next((tmp_path / "out/val").glob("*/00000.jpg"))
    assert Image.open(file).format == "JPEG"


def test_imagenette_from_its_archive_and_its_folder(photos, tmp_path):
    archive = downloads.write_imagenette(photos, tmp_path / "imagenette2-160.tgz")
    shutil.unpack_archive(archive, tmp_path / "extracted", "gztar")
    for source in (archive, tmp_path / "extracted", tmp_path / "extracted/imagenette2-160"):
        run("imagenette", source, out := tmp_path / f"out-{source.name}")
        assert contents(out) == expected(photos)


def test_without_a_source_torchvision_downloads_and_nothing_of_it_stays(
    photos, tmp_path, monkeypatch
):
    wanted = []

    def download_url(url, folder, name, md5):
        wanted.append((url.rpartition("/")[2], md5))
        path = tmp_path / "out" / ".prepare" / name
        assert path.parent == type(path)(folder)
        if "cifar" in name:
            downloads.write_cifar(downloads.cifar_batches(), path)
        else:
            downloads.write_imagenette(photos, path)

    monkeypatch.setattr("tools.datasets.download.download_url", download_url)
    run("cifar10", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["prepare.json", "train", "val"]
    shutil.rmtree(tmp_path / "out")
    run("imagenette", tmp_path / "out", "--size", "320px")
    assert contents(tmp_path / "out") == expected(photos)
    assert wanted == [
        ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        ("imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    ]


def test_a_failed_download_says_how_to_go_without(tmp_path, monkeypatch, capsys):
    def download_url(*_):
        raise OSError(errno.ENETUNREACH, "no route")

    monkeypatch.setattr("tools.datasets.download.download_url", download_url)
    message = fails(capsys, DataError.exit_code, "cifar10", tmp_path / "out")
    assert "cifar-10-python.tar.gz was not downloaded" in message
    assert "SOURCE" in message


def test_digits_have_the_layout_of_the_demo(tmp_path):
    run("digits", tmp_path / "out")
    run("digits", tmp_path / "out")  # make demo runs it each time
    train = open_split(tmp_path / "out", "train")
    assert (len(train.names), train.folders) == (1442, set("0123456789"))
    first = tmp_path / "out/train/0/000.jpg"
    assert Image.open(first).size == (32, 32)
    assert (tmp_path / "out/val/0/004.jpg").exists(), "every fifth of a class"


# --- Stopped and run again ------------------------------------------------------------------------


def cut(path, size):
    data = path.read_bytes()
    path.write_bytes(data[:size])
    return data


@each_output
def test_it_resumes_after_the_last_complete_part(photos, tmp_path, to, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    out, train = tmp_path / "out", source / "ILSVRC2012_img_train.tar"
    complete = cut(train, train.stat().st_size * 2 // 3)
    message = fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", to)
    assert f"{train}: cut off or damaged at byte" in message
    assert visible(out) == ["prepare.json"], "nothing partial is taken for complete"
    with pytest.raises(DataError, match="has no train split"):
        open_split(out, "train")
    lines = (out / ".prepare/train.jsonl").read_text().splitlines()
    assert 1 <= len(lines) < 3
    train.write_bytes(
        complete.replace(photos["train"][0].data, bytes(len(photos["train"][0].data)))
    )
    run("imagenet", source, out, "--to", to)
    assert contents(out) == expected(photos), "the first class was not read again"
    assert not (out / ".prepare").exists()


@each_output
def test_what_a_kill_left_behind_is_dropped(photos, tmp_path, to, monkeypatch, capsys):
    monkeypatch.setattr("tools.datasets.output.SHARD_BYTES", 2000)
    source = downloads.write_shards(photos, tmp_path / "source")
    out, shards = tmp_path / "out", sorted(source.glob("imagenet1k-train-*.tar"))[1:]
    complete = [cut(shard, 0) for shard in shards]
    fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", to)
    work, half = out / ".prepare", photos["train"][4].data[:100]
    with (work / "train.jsonl").open("a") as record:
        record.write('{"part": "imagenet1k-train-0001.tar", "ima')
    if to == "tree":
        half_written = work / "train" / photos["train"][4].wnid / f"{photos['train'][4].name}.JPEG"
        half_written.write_bytes(half)
    elif to == "zip":
        with (work / "train.zip").open("ab") as file:
            file.write(half)
    else:
        last = sorted((work / "train.pack").glob("shard-*.bin"))[-1]
        with last.open("ab") as file:
            file.write(half)
        (work / "train.pack/shard-00099.bin").write_bytes(half)
    shards[0].write_bytes(complete[0])
    fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", to)
    shards[1].write_bytes(complete[1])
    run("imagenet", source, out, "--to", to)
    assert contents(out) == expected(photos)
    assert not list(out.glob("train.pack/shard-00099.bin"))


def test_a_kill_between_record_and_move_is_repaired(photos, tmp_path):
    source = downloads.write_archives(photos, tmp_path / "source")
    out = tmp_path / "out"
    run("imagenet", source, out, "--to", "zip")
    (out / ".prepare").mkdir()
    (out / "train.zip").rename(out / ".prepare/train.zip")
    run("imagenet", source, out, "--to", "zip")
    assert contents(out) == expected(photos)


@each_output
@pytest.mark.parametrize("number", [0, 4, 8])  # in the first class, the second and the last
def test_a_part_whose_source_has_changed_is_written_again(photos, tmp_path, to, number, capsys):
    source, out = downloads.write_kaggle(photos, tmp_path / "source"), tmp_path / "out"
    photo = photos["train"][number]
    folder = source / "ILSVRC/Data/CLS-LOC/train" / photo.wnid
    missing, extra = folder / f"{photo.name}.JPEG", folder / "extra.JPEG"
    missing.unlink()
    extra.write_bytes(b"of an older download")
    (folder / "more.JPEG").write_bytes(b"of an older download")
    fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", to)
    missing.write_bytes(photo.data)
    extra.unlink()
    fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", to)
    (folder / "more.JPEG").unlink()
    run("imagenet", source, out, "--to", to)
    assert contents(out) == expected(photos)
    fresh = tmp_path / "fresh"
    run("imagenet", source, fresh, "--to", to)
    files = [path.relative_to(fresh) for path in fresh.glob("train*/**/*") if path.is_file()]
    assert all((out / file).read_bytes() == (fresh / file).read_bytes() for file in files)


def test_a_changed_shard_that_was_written_before_an_earlier_one(photos, tmp_path, capsys):
    source, out = downloads.write_shards(photos, tmp_path / "source"), tmp_path / "out"
    first, last = (source / f"imagenet1k-train-000{n}.tar" for n in (0, 2))
    kept, content = first.read_bytes(), last.read_bytes()
    first.unlink()
    last.write_bytes(downloads.tar_of([]))
    fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", "pack")
    first.write_bytes(kept)
    fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", "pack")
    second = source / "imagenet1k-train-0001.tar"
    kept = second.read_bytes()
    second.write_bytes(downloads.tar_of([]))
    fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", "pack")
    second.write_bytes(kept)
    last.write_bytes(content)
    run("imagenet", source, out, "--to", "pack")
    assert contents(out) == expected(photos)


@each_output
def test_killed_while_a_part_is_written_again(photos, tmp_path, to, capsys, monkeypatch):
    source, out = downloads.write_kaggle(photos, tmp_path / "source"), tmp_path / "out"
    photo = photos["train"][-1]
    file = source / "ILSVRC/Data/CLS-LOC/train" / photo.wnid / f"{photo.name}.JPEG"
    file.unlink()
    fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", to)
    file.write_bytes(photo.data)
    with monkeypatch.context() as patch:
        patch.setattr("tools.datasets.prepare.zlib.crc32", lambda data: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run("imagenet", source, out, "--to", to)
    run("imagenet", source, out, "--to", to)
    assert contents(out) == expected(photos)


@each_output
def test_what_the_download_has_no_more_counts_no_more(photos, tmp_path, to, capsys):
    source, out = downloads.write_kaggle(photos, tmp_path / "source"), tmp_path / "out"
    folder = source / "ILSVRC/Data/CLS-LOC/train" / photos["train"][0].wnid
    (folder / "extra.JPEG").write_bytes(photos["train"][0].data)
    assert "train has 10 images" in fails(
        capsys, DataError.exit_code, "imagenet", source, out, "--to", to
    )
    shutil.rmtree(folder)
    for _ in range(2):
        run("imagenet", source, out, "--to", to, "--any-count")
        assert "6 images of 2 classes (published: 9 of 3)" in capsys.readouterr().out
    assert contents(out) == expected(dict(photos, train=photos["train"][3:]))


def test_a_shard_that_is_there_twice_can_be_removed_either_way(photos, tmp_path, capsys):
    for removed in "0000", "0005":
        source, out = (
            downloads.write_shards(photos, tmp_path / f"source{removed}"),
            tmp_path / removed,
        )
        shutil.copy(source / "imagenet1k-train-0000.tar", source / "imagenet1k-train-0005.tar")
        message = fails(capsys, DataError.exit_code, "imagenet", source, out)
        assert "was found before; remove one of the two" in message
        (source / f"imagenet1k-train-{removed}.tar").unlink()
        run("imagenet", source, out)
        assert contents(out) == expected(photos)


def test_a_class_that_is_in_the_archive_twice_is_refused(photos, tmp_path, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    with tarfile.open(source / "ILSVRC2012_img_train.tar", "a") as archive:
        downloads.add(archive, "n01440764.tar", downloads.tar_of([("a.JPEG", b"another")]))
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    assert "ILSVRC2012_img_train.tar: holds n01440764.tar more than once" in message


def test_classes_of_which_some_are_unpacked(photos, tmp_path, capsys):
    source, out = write_class_tars(photos, tmp_path / "source"), tmp_path / "out"
    tars = sorted((source / "train").glob("*.tar"))
    for tar in tars[:2]:
        shutil.unpack_archive(tar, tar.with_suffix(""))
    tars[0].unlink()
    message = fails(capsys, DataError.exit_code, "imagenet", source, out)
    assert "holds the tars of some classes and the folders of others (n01440764)" in message
    shutil.unpack_archive(tars[2], tars[2].with_suffix(""))
    for tar in tars[1:]:
        tar.unlink()
    run("imagenet", source, out)
    assert contents(out) == expected(photos)


def test_a_drive_without_locks_is_no_obstacle(photos, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("tools.datasets.prepare.fcntl.flock", refuse)
    run("imagenet", downloads.write_archives(photos, tmp_path / "source"), tmp_path / "out")
    assert "make sure that no other process writes there" in capsys.readouterr().out
    assert contents(tmp_path / "out") == expected(photos)


def test_a_full_disk_is_named_and_resumed(photos, tmp_path, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        message = fails(capsys, StorageError.exit_code, "imagenet", source, out, "--to", "zip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(out) in message
    assert "cannot be written: File too large" in message
    run("imagenet", source, out, "--to", "zip")
    assert contents(out) == expected(photos)


def test_an_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    message = fails(capsys, StorageError.exit_code, "digits", tmp_path / "file/out")
    assert f"{tmp_path / 'file/out'}" in message
    assert "cannot be written: Not a directory" in message


def test_a_second_process_is_kept_out(photos, tmp_path, capsys):
    source, out = downloads.write_archives(photos, tmp_path / "source"), tmp_path / "out"
    run("imagenet", source, out)
    (out / ".prepare").mkdir()
    with (out / ".prepare/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = fails(capsys, ConfigError.exit_code, "imagenet", source, out)
    assert "in use by another process" in message


def test_an_output_with_other_content_is_left_alone(photos, tmp_path, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True)
    message = fails(capsys, ConfigError.exit_code, "imagenet", source, out)
    assert f"{out} is not empty (found train)" in message
    assert os.listdir(out) == ["train"]
    shutil.rmtree(out)
    run("imagenet", source, out)
    message = fails(capsys, ConfigError.exit_code, "imagenet", source, out, "--to", "zip")
    assert "(to tree, now zip)" in message
    message = fails(capsys, ConfigError.exit_code, "digits", out)
    assert "dataset imagenet, now digits" in message
    assert contents(out) == expected(photos)


# --- Damaged and incomplete downloads -------------------------------------------------------------


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_a_tar_cut_anywhere_is_refused_at_a_byte_before_the_cut(photos, tmp_path, name, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    complete = (source / name).read_bytes()
    end = len(complete.rstrip(b"\0"))
    for size in [0, *range(200, end, 1111)]:
        (source / name).write_bytes(complete[:size])
        message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / f"out{size}")
        assert f"{source / name}: cut off or damaged at byte " in message
        byte = int(message.partition("at byte ")[2].split(" ")[0].replace(",", ""))
        assert byte <= size
        assert "run the same command: it resumes" in message
        assert not (tmp_path / f"out{size}" / name[15:-4]).exists()


def test_a_damaged_header_is_not_taken_for_the_end(photos, tmp_path, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    train = source / "ILSVRC2012_img_train.tar"
    data = bytearray(train.read_bytes())
    at = data.index(b"n01443537.tar")
    data[at + 148] ^= 1  # the checksum
    train.write_bytes(data)
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    assert f"cut off or damaged at byte {at:,}" in message


@each_form
def test_a_cut_file_of_any_form_is_named(photos, tmp_path, form, capsys):
    source = FORMS[form](photos, tmp_path / "source")
    patterns = {"class tars": "train/*.tar", "kaggle": "*.csv", "parquet": "data/train*"}
    pattern = patterns.get(form, "*.tar.gz" if form == "flat val" else "*.tar")
    file = sorted(source.glob(pattern))[0]
    cut(file, file.stat().st_size // 2)
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    assert str(file) in message


def test_a_cut_archive_of_imagenette_is_named(photos, tmp_path, capsys):
    archive = downloads.write_imagenette(photos, tmp_path / "imagenette2-160.tgz")
    cut(archive, archive.stat().st_size // 2)
    message = fails(capsys, DataError.exit_code, "imagenette", archive, tmp_path / "out")
    assert f"{archive}: cut off or damaged at byte" in message
    assert "unpacked" in message


def test_a_devkit_of_another_year(photos, tmp_path, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    kit = source / "ILSVRC2012_devkit_t12.tar.gz"

    def message():
        return fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")

    others = ["n00000001", "n00000002", "n00000003"]
    downloads.write_devkit(source, others, [others[0]] * 5)
    assert "development kit of another year (it has the classes n00000001" in message()
    downloads.write_devkit(source, list(downloads.GREY), [downloads.GREY[0]] * 4)
    assert "has 4 lines, expected 5" in message()
    downloads.write_devkit(
        source, list(downloads.GREY), [downloads.GREY[0]] * 5, "ILSVRC2010_devkit"
    )
    kit.unlink()
    assert "labels of the validation images are missing, ILSVRC2012_devkit_t12.tar.gz" in message()
    assert "found ILSVRC2010_devkit.tar.gz" in message()
    (source / "ILSVRC2010_devkit.tar.gz").rename(kit)
    assert "not the development kit of ILSVRC2012" in message()
    kit.write_bytes(b"<html>log in first</html>")
    assert "not the development kit of ILSVRC2012" in message()
    assert not (tmp_path / "out").exists(), "refused before anything is written"


def test_a_csv_file_with_a_missing_repeated_or_strange_row(photos, tmp_path, capsys):
    source = downloads.write_kaggle(photos, tmp_path / "source")
    table = source / "LOC_val_solution.csv"
    header, *rows = table.read_text().splitlines()

    def message(*lines):
        table.write_text("\n".join(lines))
        return fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")

    assert "has no label for ILSVRC2012_val_00000005.JPEG of" in message(header, *rows[1:])
    assert "line 7, " in message(header, *rows, rows[0])
    assert "line 2, " in message(header, "ILSVRC2012_val_00000005", *rows[1:])
    assert "line 3, " in message(header, rows[0], "ILSVRC2012_val_00000004,n9 1 1 1 1")
    assert "begins with 'ImageId,Label'" in message("ImageId,Label", *rows)
    table.unlink()
    missing = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    assert "missing, ILSVRC2012_devkit_t12.tar.gz or Kaggle's LOC_val_solution.csv;" in missing
    assert not (tmp_path / "out").exists()


@needs_pyarrow
@each_output
def test_broken_images_in_parquet_are_copied_counted_and_reported(photos, tmp_path, to, capsys):
    broken = dict(photos, train=list(photos["train"]))
    for place, data in ((1, b"no image"), (2, b""), (3, None)):
        broken["train"][place] = broken["train"][place]._replace(data=data)
    source = downloads.write_parquet(broken, tmp_path / "source")
    for _ in range(2):  # a second run reports them again
        run("imagenet", source, tmp_path / "out", "--to", to)
        out = capsys.readouterr().out
        assert "3 files cannot be opened as images and were copied as they are" in out
        wnid, name, _ = photos["train"][2]
        assert f"{wnid}/{name}.JPEG: empty" in out
    for place in (2, 3):
        broken["train"][place] = broken["train"][place]._replace(data=b"")
    assert contents(tmp_path / "out") == expected(broken)


@needs_pyarrow
def test_parquet_with_other_labels_or_columns(photos, tmp_path, capsys, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    source = downloads.write_parquet(photos, tmp_path / "source")
    file = source / "data/train-00000-of-00003.parquet"
    table = parquet.read_table(file)

    def message(changed):
        parquet.write_table(changed, file)
        return fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")

    labels = table["label"].to_pylist()
    for wrong, why in (
        ([(label + 1) % 3 for label in labels], "has label 1, which is n01443537"),
        ([-1] * len(labels), "label -1 of"),
        ([None] * len(labels), "label None of"),
    ):
        column = pyarrow.array(wrong, pyarrow.int64())
        assert why in message(table.set_column(1, "label", column))
    assert "expected `image` with `bytes`" in message(table.rename_columns(["img", "label"]))
    assert "expected `image` with `bytes`" in message(table.set_column(1, "label", [list("abcd")]))
    texts = pyarrow.array([{"bytes": "abc", "path": "x.JPEG"}] * len(labels))
    assert "expected `image` with `bytes`" in message(table.set_column(0, "image", texts))
    file.unlink()
    file.symlink_to("nowhere")
    lost = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    assert f"{file}: cannot be opened" in lost
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    assert "pip install pyarrow" in fails(
        capsys, ConfigError.exit_code, "imagenet", source, tmp_path / "other"
    )


def test_a_wrong_count_is_refused_until_the_download_is_complete(photos, tmp_path, capsys):
    source = downloads.write_shards(photos, tmp_path / "source")
    out, shard = tmp_path / "out", source / "imagenet1k-train-0001.tar"
    shard.rename(tmp_path / "elsewhere")
    message = fails(capsys, DataError.exit_code, "imagenet", source, out, "--to", "zip")
    assert "train has 5 images of 3 classes, expected 9 of 3" in message
    assert "--any-count" in message
    assert visible(out) == ["prepare.json"]
    (tmp_path / "elsewhere").rename(shard)
    run("imagenet", source, out, "--to", "zip")
    assert contents(out) == expected(photos)


def test_any_count_accepts_a_subset_and_says_so(photos, tmp_path, capsys):
    few = dict(photos, train=photos["train"][:4])
    source = downloads.write_kaggle(few, tmp_path / "source")
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    assert "train has 4 images of 2 classes, expected 9 of 3; no image of n01484850" in message
    run("imagenet", source, tmp_path / "out", "--any-count")
    assert "4 images of 2 classes (published: 9 of 3)" in capsys.readouterr().out
    assert contents(tmp_path / "out") == expected(few)
    again = fails(capsys, ConfigError.exit_code, "imagenet", source, tmp_path / "out")
    assert "train was prepared with --any-count" in again
    run("imagenet", source, tmp_path / "out", "--any-count")


@pytest.mark.parametrize("change", ["image added", "class removed", "class added"])
def test_a_download_that_changed_after_its_preparation(photos, tmp_path, capsys, change):
    few = dict(photos, train=photos["train"][:4])
    source, out = downloads.write_kaggle(few, tmp_path / "source"), tmp_path / "out"
    run("imagenet", source, out, "--any-count")
    train, (wnid, name, data) = source / "ILSVRC/Data/CLS-LOC/train", photos["train"][-1]
    if change == "image added":
        wnid = photos["train"][3].wnid
    (train / wnid).mkdir(exist_ok=True)
    (train / wnid / f"{name}.JPEG").write_bytes(data)
    if change == "class removed":
        wnid = photos["train"][0].wnid
        shutil.rmtree(train / wnid)
    for flags in ([], ["--any-count"]):
        message = fails(capsys, ConfigError.exit_code, "imagenet", source, out, *flags)
        assert f"{train} has changed since {out / 'train'} was written: {wnid}" in message
        assert f"name another folder, or delete {out}" in message
    assert contents(out) == expected(few)


@each_form
def test_a_complete_preparation_needs_no_image_again(photos, tmp_path, form, monkeypatch):
    source, out = FORMS[form](photos, tmp_path / "source"), tmp_path / "out"
    run("imagenet", source, out)
    monkeypatch.setattr(raw_dataset, "RawImage", None)
    monkeypatch.setattr(imagenet, "RawImage", None)
    run("imagenet", source, out)
    record = json.loads((out / "prepare.json").read_text())
    for summary in record["splits"].values():  # of a folder that was prepared before
        del summary["parts"]
    (out / "prepare.json").write_text(json.dumps(record))
    run("imagenet", source, out)


def test_a_source_of_no_form(tmp_path, capsys):
    message = fails(capsys, DataError.exit_code, "imagenet", tmp_path, tmp_path / "out")
    assert "found no form of ImageNet; expected ILSVRC2012_img_train.tar" in message
    assert "name the one to read" in fails(
        capsys, DataError.exit_code, "imagenette", tmp_path, tmp_path / "out"
    )
    assert "expected cifar-10-python.tar.gz" in fails(
        capsys, DataError.exit_code, "cifar10", tmp_path, tmp_path / "out"
    )
    absent = tmp_path / "absent"
    for dataset in ("imagenet", "imagenette", "cifar10"):
        message = fails(capsys, DataError.exit_code, dataset, absent, tmp_path / "out")
        assert f"{absent}: does not exist" in message
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    file = tmp_path / "ILSVRC2012_img_train.tar"
    message = fails(capsys, DataError.exit_code, "imagenet", file, tmp_path / "out")
    assert "is a file; name the folder that it is in" in message


def test_a_download_in_another_layout(photos, tmp_path, capsys):
    source = downloads.write_kaggle(photos, tmp_path / "sorted")
    val = source / "ILSVRC/Data/CLS-LOC/val"
    (val / "n01440764").mkdir()
    for file in val.glob("*.JPEG"):
        file.rename(val / "n01440764" / file.name)
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "a")
    assert f"{val.parent}: train and val are sorted into class folders already" in message
    assert f"name {val.parent} with --data-path" in message
    assert not (tmp_path / "a").exists()
    source = downloads.write_kaggle(photos, tmp_path / "named")
    train = source / "ILSVRC/Data/CLS-LOC/train"
    (train / "n01440764").rename(train / "tench")
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "b")
    assert f"{train / 'tench'}: 'tench/" in message
    assert "(expected class folders, n01440764 and 999 more)" in message


@needs_pyarrow
def test_parquet_files_are_sorted_by_their_folders_too(photos, tmp_path, capsys):
    source = downloads.write_parquet(photos, tmp_path / "source")
    for file in sorted((source / "data").glob("*.parquet")):
        split, number, *_ = file.stem.split("-")
        (source / "default" / split).mkdir(parents=True, exist_ok=True)
        file.rename(source / "default" / split / f"{number[1:]}.parquet")
    run("imagenet", source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected(photos)
    (source / "default/train").rename(source / "default/a")
    (source / "default/validation").rename(source / "default/b")
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "other")
    assert "expected names of files or their folders that begin with train or val" in message


def test_a_kill_before_the_first_record_leaves_no_obstacle(photos, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-prepare.json-1-1").touch()
    source = downloads.write_archives(photos, tmp_path / "source")
    run("imagenet", source, out)
    assert contents(out) == expected(photos)
    assert sorted(os.listdir(out)) == ["prepare.json", "train", "val"]


def test_a_file_that_may_not_be_read(photos, tmp_path, capsys, monkeypatch):
    source = downloads.write_archives(photos, tmp_path / "source")

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(source / "file"))

    monkeypatch.setattr("tools.datasets.imagenet.tarfile.open", denied)
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    assert f"{source / 'file'}: cannot be opened (Permission denied); check access" in message


@pytest.mark.parametrize("to", ["tree", "zip"])
def test_no_name_leads_out_of_the_output(photos, tmp_path, to, capsys):
    data, root = photos["train"][0].data, tmp_path / "source"
    root.mkdir()
    train = root / "ILSVRC2012_img_train.tar"
    for member, image in (
        ("n01440764.tar", "../../evil.JPEG"),
        ("n01440764.tar", "/tmp/evil.JPEG"),
        ("n01440764.tar", "a\\..\\evil.JPEG"),
        ("...tar", "evil.JPEG"),
        ("evil.tar", "evil.JPEG"),
    ):
        train.write_bytes(downloads.tar_of([(member, downloads.tar_of([(image, data)]))]))
        message = fails(capsys, DataError.exit_code, "imagenet", root, tmp_path / "out", "--to", to)
        assert "no plain file name" in message or "a class that is not one of" in message
        shutil.rmtree(tmp_path / "out")
    archive = tmp_path / "imagenette2.tgz"
    name = "imagenette2/train/../evil.JPEG"
    archive.write_bytes(downloads.tar_of([(name, data)], "w:gz"))
    message = fails(capsys, DataError.exit_code, "imagenette", archive, tmp_path / "out")
    assert "'../evil.JPEG' is of a class that is not one of" in message
    assert not list(tmp_path.rglob("evil*"))


def test_a_link_in_a_tar_is_refused(photos, tmp_path, capsys):
    source = downloads.write_archives(photos, tmp_path / "source")
    link = downloads.tarfile.TarInfo("n01440764_1.JPEG")
    link.type, link.linkname = downloads.tarfile.SYMTYPE, "/etc/passwd"
    inner = link.tobuf() + bytes(10240)
    (source / "ILSVRC2012_img_train.tar").write_bytes(downloads.tar_of([("n01440764.tar", inner)]))
    message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
    assert "n01440764_1.JPEG is a link" in message


def test_duplicate_and_incomplete_keys_in_shards(photos, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    jpg, cls = ("n01440764_1.jpg", photos["train"][0].data), ("n01440764_1.cls", b"0")
    other = [("n01440764_2.jpg", jpg[1]), ("n01440764_2.cls", b"0")]
    for members, why in (
        ([jpg, cls, jpg, cls], "has two members image"),
        ([jpg, cls, *other, jpg, cls], "n01440764/n01440764_1.JPEG was found before"),
        ([jpg], "has members image; expected an image and a .cls"),
        ([jpg, ("n01440764_1.cls", b"tench")], "expected an image and a .cls with an integer"),
        ([jpg, ("n01440764_1.cls", b"3")], "label 3 of n01440764_1, expected an integer from 0"),
        ([jpg, ("n01440764_1.cls", b"1")], "has label 1, which is n01443537"),
    ):
        shard = source / "imagenet1k-train-0000.tar"
        shard.write_bytes(downloads.tar_of(members))
        message = fails(capsys, DataError.exit_code, "imagenet", source, tmp_path / "out")
        assert shard.name in message
        assert why in message


def test_batches_of_cifar10_run_no_code(tmp_path, capsys):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    batch = downloads.cifar_batches()["data_batch_1"]
    for content, why in (
        (pickle.dumps({"data": Harmful()}), "it refers to posix.mkdir"),
        (downloads.python2_pickle(dict(batch, labels=[1, 2])), "it holds pixels uint8 (10, 3072)"),
        (downloads.python2_pickle(dict(batch, labels=[*range(9), 10])), "not integers from 0 to 9"),
        (downloads.python2_pickle(batch)[:-100], "not a batch"),
        (downloads.python2_pickle([1]), "not a batch"),
        (b"", "not a batch"),
    ):
        (folder / "data_batch_1").write_bytes(content)
        message = fails(capsys, DataError.exit_code, "cifar10", folder, tmp_path / "out")
        assert f"{folder / 'data_batch_1'}: not a batch of CIFAR-10's python version" in message
        assert why in message
    assert not (tmp_path / "harm").exists()


# --- Refusals elsewhere ---------------------------------------------------------------------------


@each_form
def test_training_on_a_raw_form_names_the_tool(photos, tmp_path, form):
    source = FORMS[form](photos, tmp_path / "source")
    split = "val" if form in ("class folders", "flat val") else "train"
    with pytest.raises(DataError, match=r"`python tools/prepare.py imagenet \S+source OUT`"):
        open_split(source, split)


def test_flat_validation_images_are_not_called_kaggles(photos, tmp_path):
    source = write_flat_val(photos, tmp_path / "source")
    with pytest.raises(DataError, match="holds ImageNet's validation images without class folders"):
        open_split(source, "val")


def test_kaggles_flat_validation_images_name_the_tool(photos, tmp_path):
    source = downloads.write_kaggle(photos, tmp_path / "source") / "ILSVRC/Data/CLS-LOC"
    with pytest.raises(DataError, match=r"`python tools/prepare.py imagenet \S+CLS-LOC OUT`"):
        open_split(source, "val")
    assert len(open_split(source, "train").names) == 9


def test_raw_forms_of_other_datasets_are_known(photos, tmp_path):
    assert describe_raw_form(downloads.write_tree(photos, tmp_path / "tree")) is None
    downloads.write_imagenette(photos, tmp_path / "imagenette2-160.tgz")
    assert "tools/prepare.py imagenette" in describe_raw_form(tmp_path)
    downloads.write_cifar(downloads.cifar_batches(), tmp_path / "cifar-10-python.tar.gz")
    assert "tools/prepare.py cifar10" in describe_raw_form(tmp_path)
