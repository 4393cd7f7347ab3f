"""The index of a folder's listing: used while nothing has changed, and never needed."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from helpers.images import write_image_folder

import data.listing
from data.readers import FolderReader
from utils.errors import DataError


@pytest.fixture
def split(tmp_path, monkeypatch):
    monkeypatch.setattr(data.listing, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_image_folder(tmp_path / "set", classes=3, train=4, val=1) / "train"


def content(folder):
    return folder.names.tolist(), folder.where.tolist(), folder.folders, folder.ignored


def listed(split, monkeypatch):
    """The split's content and whether its folders were listed for it."""
    calls = []
    with monkeypatch.context() as patch:
        scan = data.listing._opened
        patch.setattr(data.listing, "_opened", lambda folder: calls.append(folder) or scan(folder))
        return content(FolderReader(split)), bool(calls)


def test_the_second_time_nothing_is_listed(split, monkeypatch):
    (split / "readme.txt").write_text("ignored")
    (split / "class_0/deeper").mkdir()
    shutil.copy(split / "class_0/000.jpg", split / "class_0/deeper/x.jpg")
    first, was_listed = listed(split, monkeypatch)
    assert was_listed
    assert (split.parent / ".train.index.npz").exists()
    second, was_listed = listed(split, monkeypatch)
    assert not was_listed
    assert second == first
    assert first[3] == {".txt": 1}
    assert len(first[0]) == 13
    monkeypatch.chdir(split.parent)
    assert not listed(data.listing.Path("train"), monkeypatch)[1]


def add(split):
    shutil.copy(split / "class_0/000.jpg", split / "class_0/new.jpg")


def remove(split):
    (split / "class_1/002.jpg").unlink()


def rename(split):
    (split / "class_1/002.jpg").rename(split / "class_1/009.jpg")


def replace(split):
    (split / "other.jpg").write_bytes(b"longer than before" * 999)
    os.replace(split / "other.jpg", split / "class_1/002.jpg")


def new_class(split):
    shutil.copytree(split / "class_0", split / "class_7")


def restored_times(split):
    time_before = os.stat(split / "class_1").st_mtime_ns
    (split / "class_1/002.jpg").unlink()
    os.utime(split / "class_1", ns=(time_before, time_before))


def moved_copy(split):
    """Another folder in its place with the same modification times, and the cache with it."""
    shutil.copytree(split.parent, split.parent.with_name("copy"))
    shutil.rmtree(split.parent)
    split.parent.with_name("copy").rename(split.parent)


@pytest.mark.parametrize(
    "change", [add, remove, rename, replace, new_class, restored_times, moved_copy]
)
def test_every_change_is_noticed(split, monkeypatch, change):
    FolderReader(split)
    time.sleep(0.02)  # longer than the clock tick of the file system
    change(split)
    found, was_listed = listed(split, monkeypatch)
    assert was_listed
    (split.parent / ".train.index.npz").unlink()
    assert found == content(FolderReader(split))


def test_a_file_overwritten_in_place_is_noticed_until_the_index_is_deleted(split):
    before = FolderReader(split)
    (split / "class_0/000.jpg").write_bytes(b"new")
    index = split.parent / ".train.index.npz"
    remedy = re.escape(f"if that is meant, delete {index} and start again")
    with pytest.raises(ValueError, match=f"^has 3 bytes, had [0-9]+ when it was listed; {remedy}$"):
        FolderReader(split).read(0)
    index.unlink()
    with pytest.raises(ValueError, match=r"; if that is meant, start again$"):
        before.read(0)
    assert FolderReader(split).read(0) == b"new"


def test_a_class_on_a_disk_that_is_away_is_neither_left_out_nor_forgotten(split):
    disk = split.parent / "disk"
    shutil.move(split / "class_1", disk)
    (split / "class_1").symlink_to(disk)
    for name in (".link", "photo.jpg", "class_0/notes.txt"):  # no folder of that name is data
        (split / name).symlink_to("nowhere")
    expected = content(FolderReader(split))
    disk.rename(split.parent / "away")
    with pytest.raises(DataError, match=r"class_1: is a link to .*/disk, which does not exist"):
        FolderReader(split)
    (split.parent / "away").rename(disk)
    assert content(FolderReader(split)) == expected


@pytest.mark.parametrize("harm", [b"", b"PK\3\4 no zip", "flipped", "cut", "flag of encryption"])
def test_a_damaged_index_is_ignored(split, monkeypatch, harm):
    expected = content(FolderReader(split))
    cache = split.parent / ".train.index.npz"
    valid = cache.read_bytes()
    half = len(valid) // 2
    harms = {
        "cut": valid[:half],
        "flipped": valid[:300] + bytes([valid[300] ^ 1]) + valid[301:],
        "flag of encryption": valid.replace(b"PK\1\2-\3-\0\0", b"PK\1\2-\3-\0\1"),
    }
    cache.write_bytes(harms.get(harm, harm))
    assert listed(split, monkeypatch) == (expected, True)
    assert listed(split, monkeypatch) == (expected, False)


def test_beside_a_read_only_split_the_users_cache_is_used(split, monkeypatch):
    (split.parent / ".train.index.npz").mkdir()  # nobody can write a file there, root included
    FolderReader(split)
    assert not listed(split, monkeypatch)[1]
    (split.parent / ".train.index.npz").rmdir()
    shutil.rmtree(split.parent.with_name("cache"))
    split.parent.with_name("cache").write_text("nor here")
    (split.parent / ".train.index.npz").mkdir()
    assert listed(split, monkeypatch)[1]
    assert not list(split.parent.glob(".tmp-*")), "nothing is left behind"


def test_what_changed_a_moment_ago_is_not_kept(split, monkeypatch):
    monkeypatch.setattr(data.listing, "SETTLED", 10**11)
    FolderReader(split)
    assert not (split.parent / ".train.index.npz").exists()


def test_folders_without_a_time_are_listed_every_time(split, monkeypatch):
    """As on some network drives: no change would be noticed."""
    monkeypatch.setattr(data.listing, "change_time", lambda split, folder: 0)
    FolderReader(split)
    assert not (split.parent / ".train.index.npz").exists()


def test_an_index_made_under_other_rules_is_ignored(split, monkeypatch):
    """As one written before .gif was read, by a Pillow that reads more formats, or by other code."""
    (split / "class_0/000.jpg").rename(split / "class_0/000.gif")
    with monkeypatch.context() as patch:
        patch.setattr(data.listing, "EXTENSIONS", (b".jpg",))
        assert len(FolderReader(split).names) == 11
        assert not listed(split, patch)[1]
    (names, *_), was_listed = listed(split, monkeypatch)
    assert was_listed
    assert names[0] == b"class_0/000.gif"
    monkeypatch.setattr(data.listing, "EDITION", b"1000")
    assert listed(split, monkeypatch)[1]


def test_files_of_all_levels_are_sorted_by_path(split):
    for path in (
        "class_0/000/z.jpg",
        "class_0/b.jpg",
        "class_0/b/a.jpg",
        "class_0-1/a.jpg",
        "class_0.1/b/c/d.jpg",
    ):
        (split / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(split / "class_0/001.jpg", split / path)
    names = FolderReader(split).names.tolist()
    assert names == sorted(str(p.relative_to(split)).encode() for p in split.rglob("*.jpg"))
    ranges = FolderReader(split).class_ranges()
    assert ranges.keys() == {path.name for path in split.iterdir()}
    for name, (start, end) in ranges.items():
        assert names[start:end] == [n for n in names if n.split(b"/")[0] == name.encode()]


def test_listing_needs_no_torch():
    program = "import sys, data.readers; sys.exit('torch' in sys.modules)"
    root = os.path.dirname(os.path.dirname(data.listing.__file__))
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
