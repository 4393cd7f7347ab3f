"""Data in object storage: moto's S3 server, objects and a bucket that vanish or change, wrong credentials.

pip install s3fs "moto[server]"; pytest -m slow tests/runs/test_remote_s3.py
"""

import urllib.request
from pathlib import Path

import pytest
from helpers.buckets import SHARD, make_pack, objects_of, require_equal
from helpers.pipeline import image_dataset

from data import open_root, remote
from utils.errors import DataError

pytestmark = pytest.mark.slow
pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")
KEY, SECRET = "AKIAWRONG", "hunter2"


@pytest.fixture
def packed(tmp_path) -> Path:
    return make_pack(tmp_path)


@pytest.fixture
def bucket(packed, monkeypatch):
    """A bucket with the pack below `set/`."""
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02))
    remote._client.cache_clear()
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    bucket = boto3.resource("s3").create_bucket(Bucket="images")
    for name, content in objects_of(packed):
        bucket.put_object(Key=name, Body=content)
    yield bucket
    server.stop()


def open_set(tmp_path, size=0.0, **options):
    return image_dataset(open_root("s3://images/set", str(tmp_path / "cache"), size), **options)


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_pack_in_a_bucket_equals_the_disk(size, bucket, packed, tmp_path):
    require_equal(packed, lambda: open_set(tmp_path, size))


def test_an_object_that_changes_is_named(bucket, packed, tmp_path):
    dataset = open_set(tmp_path, train=True)
    bucket.put_object(Key=f"set/{SHARD}", Body=(packed / SHARD).read_bytes()[::-1])
    with pytest.raises(DataError, match=f"s3://images/set/{SHARD}: changed since the run opened"):
        dataset[0, 0, 0]


def test_a_bucket_that_vanishes_is_named(bucket, tmp_path):
    dataset = open_set(tmp_path, train=True)
    bucket.objects.all().delete()
    bucket.delete()
    with pytest.raises(DataError, match=f"s3://images/set/{SHARD}: not found"):
        dataset[0, 0, 0]
    with pytest.raises(DataError, match=r"no train split can be read there .*not found"):
        open_set(tmp_path)


def test_wrong_credentials_are_named_and_not_printed(bucket, tmp_path, capfd):
    url = bucket.meta.client.meta.endpoint_url
    reset = urllib.request.Request(
        f"{url}/moto-api/reset-auth", headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(reset, data=b"0").close()
    try:
        with pytest.raises(DataError, match=r"permission denied \(HTTP status 403\)") as refused:
            open_set(tmp_path)
    finally:
        urllib.request.urlopen(reset, data=b"inf").close()
    assert KEY not in str(refused.value) + capfd.readouterr().out
    assert SECRET not in str(refused.value)


def test_missing_credentials_are_named(bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match="permission denied"):
        open_set(tmp_path)
