"""Data in Google Cloud Storage: an emulator's bucket, an object that changes and one that vanishes.

pip install gcsfs gcp-storage-emulator "setuptools<80"; pytest -m slow tests/runs/test_remote_gcs.py
"""

import socket
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from helpers.buckets import SHARD, make_pack, objects_of, require_equal
from helpers.pipeline import image_dataset

from data import open_root, remote
from utils.errors import DataError

pytestmark = pytest.mark.slow
gcsfs = pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")


class Bucket:
    """The bucket `images` of an emulator at `url`."""

    def __init__(self, url: str):
        self.url = url

    def put(self, name: str, content: bytes) -> None:
        """Write the object `name`."""
        address = f"{self.url}/upload/storage/v1/b/images/o?uploadType=media&name={quote(name)}"
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(address, content, headers)).close()

    def delete(self, name: str) -> None:
        """Delete the object `name`."""
        address = f"{self.url}/storage/v1/b/images/o/{quote(name)}"
        urllib.request.urlopen(urllib.request.Request(address, method="DELETE")).close()


def quote(name: str) -> str:
    return urllib.parse.quote(name, safe="")


@pytest.fixture
def packed(tmp_path) -> Path:
    return make_pack(tmp_path)


@pytest.fixture
def bucket(packed, monkeypatch):
    """A bucket with the pack below `set/`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="images")
    server.start()
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02))
    remote._client.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    bucket = Bucket(url)
    for name, content in objects_of(packed):
        bucket.put(name, content)
    yield bucket
    server.stop()


def open_set(tmp_path, size=0.0, **options):
    return image_dataset(open_root("gs://images/set", str(tmp_path / "cache"), size), **options)


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_pack_in_a_bucket_equals_the_disk(size, bucket, packed, tmp_path):
    require_equal(packed, lambda: open_set(tmp_path, size))


def test_an_object_that_changes_is_named(bucket, packed, tmp_path):
    dataset = open_set(tmp_path, train=True)
    bucket.put(f"set/{SHARD}", (packed / SHARD).read_bytes()[::-1])
    with pytest.raises(DataError, match=f"gs://images/set/{SHARD}: changed since the run opened"):
        dataset[0, 0, 0]


def test_an_object_that_vanishes_is_named(bucket, tmp_path):
    dataset = open_set(tmp_path, train=True)
    bucket.delete(f"set/{SHARD}")
    with pytest.raises(DataError, match=f"gs://images/set/{SHARD}: not found"):
        dataset[0, 0, 0]


def test_a_bucket_that_is_not_there_is_named(bucket, tmp_path):
    with pytest.raises(DataError, match=r"no train split can be read there"):
        image_dataset(open_root("gs://others/set", str(tmp_path / "cache"), 0))
