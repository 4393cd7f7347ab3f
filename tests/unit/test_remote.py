"""Remote data: the samples of a server equal those of the disk, through every fault, with a cache that is bounded.

pytest tests/unit/test_remote.py
"""

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.images import write_image_folder, write_zip
from helpers.pipeline import eval_loader, image_dataset, train_loader
from helpers.range_server import serve

import config
from data import ShardSampler, TrainBatchSampler, open_root, remote
from data.block_cache import BLOCK, DIGEST, FOLDER, BlockCache
from data.samplers import ReadAheadSampler
from tools import pack
from utils.addresses import hide_secrets, is_address
from utils.errors import ConfigError, DataError

pytest.importorskip("aiohttp")
SHARD = "/train.pack/shard-00000.bin"
CFG = "--cfg", "configs/dat_tiny.yaml"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Packs of a small data set, not to be changed: the training images fill two blocks of the cache."""
    root = write_image_folder(tmp_path_factory.mktemp("set"), train=16, val=3, size=96)
    out = tmp_path_factory.mktemp("packed")
    assert pack.main([str(root), str(out), "--workers", "1", "--split", "train", "val"]) == 0
    assert BLOCK < (out / SHARD[1:]).stat().st_size < 2 * BLOCK
    return out


@pytest.fixture
def server(packed, tmp_path, monkeypatch):
    """A server of a copy of `packed`, whose faults are tried again at once."""
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.03))
    with serve(shutil.copytree(packed, tmp_path / "served")) as running:
        yield running


@pytest.fixture
def opened(server, tmp_path):
    """A function that opens a split of the server, with a cache below `tmp_path`."""

    def open_dataset(split="train", size=1.0, **options):
        return image_dataset(
            open_root(server.address, str(tmp_path / "cache"), size), split, **options
        )

    return open_dataset


def contents(dataset):
    return [(dataset[i].image.numpy().tobytes(), dataset[i].label) for i in range(len(dataset))]


def blocks(tmp_path):
    return sorted(path for path in (tmp_path / "cache" / FOLDER).rglob("*/*") if path.is_file())


# --- The same data --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_pack_on_a_server_equals_the_pack_on_the_disk(split, opened, packed):
    there, here = opened(split), image_dataset(packed, split)
    assert there.classes == here.classes
    assert there.fingerprint == here.fingerprint
    assert contents(there) == contents(here)
    assert there.path(0).startswith("http://127.0.0.1")


def test_a_zip_on_a_server_equals_the_zip_on_the_disk(server, opened, tmp_path):
    root = write_image_folder(tmp_path / "set", classes=2, train=3, val=1, size=50)
    shutil.rmtree(server.folder / "train.pack")
    write_zip(root / "train", server.folder / "train.zip")
    there, here = opened(), image_dataset(server.folder)
    assert there.fingerprint == here.fingerprint
    assert contents(there) == contents(here)


def test_the_state_of_an_image_is_the_version_of_its_file(server, opened):
    before = opened().reader.state(0)
    assert opened().reader.state(0) == before
    os.utime(server.folder / SHARD[1:], ns=(0, 0))
    assert opened().reader.state(0) != before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_give_the_same_batches(num_workers, opened, packed):
    def batches(dataset):
        options = {
            "batch_size": 4,
            "micro_batches": 2,
            "start_step": 3,
            "total_steps": 20,
            "seed": 1,
        }
        sampler = TrainBatchSampler(len(dataset), **options)
        loader = train_loader(dataset, sampler, num_workers=num_workers)
        return [(batch.images.numpy().tobytes(), batch.labels.tolist()) for batch in loader]

    there, here = opened(train=True, seed=3), image_dataset(packed, train=True, seed=3)
    assert batches(there) == batches(here)


def test_an_evaluation_may_be_repeated_with_the_same_workers(opened):
    dataset = opened("val")
    loader = eval_loader(dataset, ShardSampler(len(dataset), batch_size=2), num_workers=2)
    first, second = ([batch.indices.tolist() for batch in loader] for _ in range(2))
    assert first == second == [[n, n + 1] for n in range(0, 12, 2)]


# --- Read-ahead -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 4), (1, 100), (2, 4), (3, 30)])
def test_each_worker_reads_all_its_samples_ahead_once(workers, batch_size):
    batches = list(ReadAheadSampler(ShardSampler(1000, batch_size=batch_size), workers))
    assert [sample for batch in batches for sample in batch] == list(range(1000))
    count = max(1, workers)
    for worker in range(count):
        own = batches[worker::count]
        samples = [sample for batch in own for sample in batch]
        assert [sample for batch in own for sample in batch.ahead] == samples
        seen = 0
        for number, batch in enumerate(own):
            seen += len(batch.ahead)
            done = sum(map(len, own[: number + 1]))
            assert seen == len(samples) or seen >= done + 64


def test_later_batches_are_requested_before_they_are_read(server, opened, monkeypatch):
    dataset = opened(size=0)
    server.requests.clear()
    sampler = ReadAheadSampler(ShardSampler(len(dataset), batch_size=4), 0)
    dataset.prefetch(next(iter(sampler)).ahead)
    client = remote._client_of(server.address)
    for request in set(client.pending.values()):
        request.result()
    size = dataset.reader.shards[0].size
    expected = [f"bytes=0-{BLOCK - 1}", f"bytes={BLOCK}-{size - 1}"]
    assert sorted(server.parts()) == [(SHARD, part) for part in expected]
    count = len(server.requests)
    dataset.read(0)
    assert len(server.requests) == count


def test_without_a_cache_neighbours_share_a_request(server, opened):
    dataset = opened(size=0)
    server.requests.clear()
    contents(dataset)
    assert len(server.parts()) == 2


def test_requests_run_at_the_same_time(packed, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(os.urandom(40 * BLOCK))
    with serve(tmp_path) as server:
        root = open_root(server.address, "unused", 0)
        (file,) = remote.open_remote_files([root / "large"])
        others = threading.Barrier(10)

        def wait_for_others(*request: object) -> None:
            others.wait(timeout=20)

        server.fault = wait_for_others
        for number in range(0, 40, 2):
            file.prefetch(10, number * BLOCK)
        for number in range(0, 40, 2):
            assert file.read(10, number * BLOCK) == large.read_bytes()[number * BLOCK :][:10]
        assert not others.broken


# --- The cache ------------------------------------------------------------------------------------


def test_what_is_kept_is_not_requested_again(server, opened, tmp_path, packed):
    first = contents(opened())
    server.requests.clear()
    again = opened()
    before = len(server.requests)
    assert contents(again) == first
    assert len(server.requests) == before
    assert server.parts() == [("/train.pack/pack.json", "bytes=0-0")], "whether it may be read"


def test_a_damaged_block_is_read_from_the_server_again(opened, tmp_path, packed):
    expected = contents(opened())
    for path in blocks(tmp_path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    cut = blocks(tmp_path)[0]
    cut.write_bytes(cut.read_bytes()[:100])
    assert contents(opened()) == expected
    assert contents(opened()) == contents(image_dataset(packed))


def test_the_blocks_used_least_recently_are_deleted(tmp_path):
    cache = BlockCache(tmp_path, 20 * (BLOCK + DIGEST))
    cache.prepare()
    file = "0" * 32
    for number in range(20):
        cache.store(file, number, bytes(BLOCK))
        os.utime(cache._path(file, number), (number, number))
    assert cache.load(file, 0, BLOCK) == bytes(BLOCK)  # used now
    other = tmp_path / FOLDER / "notes.txt"
    other.write_text("not ours")
    cache.store(file, 20, bytes(BLOCK))
    left = {number for number in range(21) if cache.has(file, number)}
    assert left == {0, *range(4, 21)}
    assert other.exists()


def test_a_smaller_limit_holds_from_the_start(opened, tmp_path):
    contents(opened())
    assert len(blocks(tmp_path)) >= 4
    dataset = opened(size=3 * (BLOCK + DIGEST) / 2**30)
    assert len(blocks(tmp_path)) <= 3
    contents(dataset)
    assert len(blocks(tmp_path)) <= 3


def test_two_processes_fill_one_folder(server, opened, packed, tmp_path):
    program = (
        "import sys; from data import open_root; from data.readers import open_split\n"
        "reader = open_split(open_root(sys.argv[1], sys.argv[2], 1e-3), 'train')\n"
        "for _ in range(5):\n"
        "    for index in range(len(reader.names)): sys.stdout.buffer.write(reader.read(index))\n"
    )
    command = [sys.executable, "-c", program, server.address, str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    reader = image_dataset(packed).reader
    expected = 5 * b"".join(map(reader.read, range(len(reader.names))))
    assert [run.communicate()[0] for run in runs] == [expected, expected]
    assert all(path.name.isdecimal() for path in blocks(tmp_path)), "nothing unfinished is left"


def test_a_full_disk_ends_no_run(opened, packed, tmp_path, monkeypatch, logged_warnings):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.block_cache.os.replace", full)
    assert contents(opened()) == contents(image_dataset(packed))
    assert blocks(tmp_path) == []
    (warning,) = logged_warnings
    assert warning.startswith(f"{tmp_path / 'cache'} keeps no more of the data: No space left")


def test_a_folder_that_cannot_be_made_ends_no_run(opened, packed, tmp_path, logged_warnings):
    (tmp_path / "cache").write_text("a file")
    assert contents(opened()) == contents(image_dataset(packed))
    assert "keeps none of the data: Not a directory" in logged_warnings[0]


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [503, 429, "cut"])
def test_a_server_that_recovers_changes_nothing(fault, server, opened, packed):
    tried = set()

    def fails_once(*request):
        return None if request in tried else tried.add(request) or fault

    server.fault = fails_once
    assert contents(opened()) == contents(image_dataset(packed))


def test_a_server_that_does_not_answer_is_named(server, opened):
    dataset = opened(train=True)
    server.fault = lambda method, path, part: 503 if part else None
    with pytest.raises(
        DataError, match=rf"{SHARD}: no answer after 4 tries in \d+ s \(HTTP status 503\)"
    ):
        dataset[0, 0, 0]
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"no answer after 4 tries in .*(Connect|refused)"):
        image_dataset(open_root("http://127.0.0.1:1", "unused", 0))


def test_an_answer_that_does_not_come_is_given_up(server, opened, monkeypatch):
    dataset = opened()
    monkeypatch.setattr(remote, "TIMEOUT", 0.05)
    server.latency = 0.3
    with pytest.raises(
        DataError, match=r"no answer after 4 tries in .* \(no answer within 0.05 s\)"
    ):
        dataset.read(0)


@pytest.mark.parametrize(
    ("status", "text"), [(404, "not found"), (403, r"permission denied \(HTTP status 403\)")]
)
def test_a_file_that_vanishes_ends_the_run(status, text, server, opened):
    dataset = opened(train=True)
    server.fault = lambda method, path, part: status
    with pytest.raises(DataError, match=f"{SHARD}: {text}, bytes 0 to .* Restore it"):
        dataset[0, 0, 0]
    assert len(server.requests) < 12, "a final answer is not asked for again"


@pytest.mark.parametrize("change", ["content", "shorter"])
def test_a_file_that_changes_ends_the_run(change, server, opened):
    dataset = opened(train=True, size=0)
    file = server.folder / SHARD[1:]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if change == "shorter" else data[::-1])
    with pytest.raises(
        DataError, match=f"{SHARD}: changed since the run opened it: it had {len(data)} bytes"
    ):
        dataset[0, len(dataset) - 1, 0]


def test_a_damaged_image_is_one_for_a_server_too(server, opened, packed):
    file = server.folder / SHARD[1:]
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    dataset = opened(train=True)
    (bad,) = dataset[0, 0, 0].bad
    assert "CRC-32 differs" in bad.reason
    assert dataset[0, 1, 0].bad == []


def test_a_missing_split_is_named(server, opened):
    shutil.rmtree(server.folder / "train.pack")
    with pytest.raises(
        DataError, match=r"no train split .*train\.pack: not found, train\.zip: not found"
    ):
        opened()
    server.fault = lambda *request: 401
    with pytest.raises(DataError, match=r"permission denied \(HTTP status 401\)"):
        opened()


def test_a_server_without_ranges_is_named(server, opened):
    server.ranges = False
    with pytest.raises(DataError, match=r"sends the complete file where a part is requested"):
        opened()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs:// needs the package gcsfs.*pip install gcsfs"):
        image_dataset(open_root("gs://bucket/imagenet", "unused", 0))


# --- Random numbers and secrets -------------------------------------------------------------------


def test_servers_draw_none_of_the_random_numbers_of_images(server, opened):
    opened()
    import aiohttp.connector

    random.seed(1)
    state = random.getstate()
    aiohttp.connector.random.shuffle(list(range(100)))
    assert random.getstate() == state


@pytest.mark.parametrize(
    "address",
    [
        "https://me:hunter2@host/set",
        "https://host/set?X-Signature=hunter2",
        "s3://key:hunter2@host/a",
    ],
)
def test_addresses_with_secrets_are_refused_and_not_printed(address, tmp_path):
    assert not is_address(address)
    file = tmp_path / "run.yaml"
    file.write_text(f"DATA: {{PATH: '{address}'}}")
    for command in ([*CFG, "--data-path", address], ["--cfg", str(file)]):
        with pytest.raises(ConfigError, match=r"DATA\.PATH|--data-path") as refused:
            config.parse(command)
        assert "without a password or query" in str(refused.value)
        assert "hunter2" not in str(refused.value)


def test_a_user_without_a_home_is_asked_for_a_folder(monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(ConfigError, match=r"DATA\.CACHE_DIR is empty"):
        open_root("https://host/set", "", 1.0)


def test_addresses_are_accepted_where_data_is_read():
    for address in ("s3://bucket/imagenet", "https://host:8080/a-b", "gs://b/c/"):
        assert address == config.parse([*CFG, "--data-path", address]).cfg.DATA.PATH
    with pytest.raises(ConfigError, match=r"http://, https://, s3://, gs://"):
        config.parse([*CFG, "--data-path", "ftp://host/imagenet"])
    with pytest.raises(ConfigError, match=r"OUTPUT"):
        config.parse([*CFG, "--output", "s3://bucket/output"])
    assert hide_secrets("'https://a:b@c/d?e=f', x") == "'https://…@c/d?…', x"
