"""Packed sets: the same samples in the same order, other encodings are other datasets, every damage is named."""

import io
import json
import os
import signal

import numpy as np
import pytest
from helpers.images import write_image_folder
from helpers.pipeline import image_dataset as dataset
from PIL import ExifTags, Image

from data import decode
from tools import pack
from utils.errors import DataError, StorageError


@pytest.fixture
def root(tmp_path):
    return write_image_folder(tmp_path / "set", classes=3, train=5, val=2, size=40)


def contents(data):
    return [(data[i].image.numpy().tobytes(), data[i].label) for i in range(len(data))]


def run(root, out, *options, code=0):
    assert pack.main([str(root), str(out), "--workers", "1", *options]) == code


def test_a_pack_equals_the_folder(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 4000)
    run(root, tmp_path / "packed", "--split", "train", "val")
    assert len(list((tmp_path / "packed/train.pack").glob("shard-*.bin"))) > 2
    for split in ("train", "val"):
        packed, folder = dataset(tmp_path / "packed", split), dataset(root, split)
        assert packed.classes == folder.classes
        assert packed.fingerprint == folder.fingerprint
        assert contents(packed) == contents(folder)
        assert packed.reader.path.endswith(f"{split}.pack")
    run(root, tmp_path / "packed", "--split", "train", "val", "--verify")
    run(tmp_path / "packed", tmp_path / "again")  # a pack can be packed
    assert dataset(tmp_path / "again").fingerprint == dataset(root).fingerprint


def test_a_pack_comes_before_the_folder_beside_it(root):
    run(root, root)
    assert dataset(root).reader.path == str(root / "train.pack")


def test_encoded_again_it_is_another_dataset(root, tmp_path):
    run(root, tmp_path, "--shorter-side", "32", "--quality", "80")
    packed, folder = dataset(tmp_path), dataset(root)
    assert packed.fingerprint != folder.fingerprint
    assert packed.reader.info["source"] == folder.fingerprint
    assert packed.reader.names.tolist() == folder.reader.names.tolist()
    assert packed[3].image.shape == (3, 32, 32)
    assert abs(packed[3].image.float().mean() - folder[3].image.float().mean()) < 3
    info = json.loads((tmp_path / "train.pack/pack.json").read_text())
    assert (info["shorter_side"], info["quality"]) == (32, 80)
    run(root, tmp_path, "--verify")
    run(root, tmp_path / "larger", "--shorter-side", "40")
    assert dataset(tmp_path / "larger").fingerprint == folder.fingerprint, "none was longer"


def test_pictures_that_lie_on_their_side_keep_their_orientation(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, "JPEG", exif=exif)
    small = pack.shrink(buffer.getvalue(), 32, 90)
    assert decode.orientation(decode.open_image(small)) == 6
    assert decode.open_image(small).size == (43, 32)


def test_it_resumes_where_it_was_stopped(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 4000)
    folder = tmp_path / ".train.pack"
    broken = root / "train/class_2/004.jpg"
    healthy = broken.read_bytes()
    broken.write_bytes(healthy[:-9])
    run(root, tmp_path, "--shorter-side", "32", code=DataError.exit_code)
    assert not (tmp_path / "train.pack").exists()
    broken.write_bytes(healthy)
    # The files are others than those it began with.
    run(root, tmp_path, "--shorter-side", "32", code=2)
    begun = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.npy")}
    assert begun
    plan = json.loads((folder / "plan.json").read_text())
    plan["source"] = dataset(root).fingerprint
    (folder / "plan.json").write_text(json.dumps(plan))
    monkeypatch.setattr(pack, "write_index", lambda *_: begun.update({
        path: path.stat().st_mtime_ns - time for path, time in begun.items()}))  # fmt: skip
    run(root, tmp_path, "--shorter-side", "32")
    assert set(begun.values()) == {0}, "finished shards are written again"


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_explained(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "write_shard", _die)
    assert pack.main([str(root), str(tmp_path), "--workers", "1"]) == StorageError.exit_code
    assert "was killed, probably for want of memory. Lower --workers" in capsys.readouterr().err
    monkeypatch.undo()
    assert pack.main([str(root), str(tmp_path)]) == 0


def test_an_existing_pack_is_not_overwritten(root, tmp_path, capsys):
    run(root, tmp_path)
    run(root, tmp_path, code=2)
    assert "train.pack exists" in capsys.readouterr().err


def damage(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_named(root, tmp_path, capsys):
    run(root, tmp_path)
    size, shard, offset, _ = dataset(tmp_path).reader.where[7].tolist()
    damage(tmp_path / "train.pack/shard-00000.bin", offset + size // 2)
    words = f"record 7, at byte {offset} of shard-00000.bin: CRC-32 differs"
    with pytest.raises(DataError, match=words):
        dataset(tmp_path)[7]
    sample = dataset(tmp_path, train=True)[0, 7]
    assert words in sample.bad[0].reason
    run(root, tmp_path, "--verify", code=DataError.exit_code)
    assert words in capsys.readouterr().err
    assert shard == 0


def cut(folder):
    os.truncate(folder / "shard-00000.bin", 5000)


def lost(folder):
    (folder / "shard-00000.bin").unlink()


def index_damaged(folder):
    damage(folder / "index.npz", 400)


def info_damaged(folder):
    (folder / "pack.json").write_text('{"format": 1}')


def info_lost(folder):
    (folder / "pack.json").unlink()


def newer(folder):
    info = json.loads((folder / "pack.json").read_text())
    (folder / "pack.json").write_text(json.dumps(info | {"format": 2}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "shard-00000.bin: holds 5000 bytes, expected"),
        (lost, "shard-00000.bin"),
        (index_damaged, "index.npz: differs from its SHA-256"),
        (info_damaged, "train.pack: not a readable pack"),
        (info_lost, "pack.json"),
        (newer, "is a pack of format 2, expected 1; write it again"),
    ],
)
def test_damaged_packs_are_refused_when_opened(root, tmp_path, harm, words):
    run(root, tmp_path)
    harm(tmp_path / "train.pack")
    with pytest.raises(DataError) as error:
        dataset(tmp_path)
    assert words in str(error.value)
    assert "tools/pack.py" in str(error.value)


def test_a_pack_of_other_files_is_noticed(root, tmp_path, capsys):
    run(root, tmp_path)
    (root / "train/class_1/004.jpg").unlink()
    run(root, tmp_path, "--verify", code=DataError.exit_code)
    assert "was packed from other files than" in capsys.readouterr().err


def test_shards_hold_every_file_once():
    sizes = np.array([5, 1, 1, 9, 30, 2, 2, 2]) * 2**22
    shards = pack.split_into_shards(sizes)
    assert [i for shard in shards for i in shard] == list(range(8))
    assert all(len(shard) == 1 or sizes[shard].sum() <= pack.SHARD_BYTES for shard in shards)
    assert len(shards) == 3
