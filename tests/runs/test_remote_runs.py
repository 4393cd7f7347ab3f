"""Training on data of a server: the bits are those of the disk, through faults, kills and two runs with one cache.

pytest tests/runs/test_remote_runs.py
"""

import shutil
from pathlib import Path
from signal import SIGKILL

import pytest
from helpers.range_server import serve
from helpers.runs import arguments, outcome, run_group

from tools import pack

pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory) -> Path:
    """Packs of the small data set, not to be changed."""
    out = tmp_path_factory.mktemp("packed")
    assert pack.main([str(images), str(out), "--workers", "1", "--split", "train", "val"]) == 0
    return out


@pytest.fixture(scope="module")
def unbroken(packed, tmp_path_factory) -> Path:
    """The folder of a run on the disk that nothing stopped."""
    folder = tmp_path_factory.mktemp("disk")
    assert run_group(1, arguments(folder, packed)) == [0]
    return folder


def fails_sometimes():
    """A fault at every third part of a file that is requested, never the same one twice."""
    seen = set()

    def fault(method, path, part):
        seen.add((path, part, len(seen)))
        return (503, "cut")[len(seen) % 2] if part and len(seen) % 3 == 0 else None

    return fault


@pytest.mark.slow
def test_killed_and_resumed_on_a_server_with_faults_equals_the_disk(packed, unbroken, tmp_path):
    cache = f"DATA.CACHE_DIR={tmp_path / 'cache'}", "DATA.CACHE_SIZE=1e-3", "DATA.NUM_WORKERS=2"
    with serve(packed) as server:
        server.fault = fails_sometimes()
        for kill_at in (3, 0):
            argv = arguments(tmp_path, server.address, "--opts", *cache)
            (code,) = run_group(1, argv, at=kill_at, signal=SIGKILL)
            assert code == (-SIGKILL if kill_at else 0)
    assert outcome(tmp_path) == outcome(unbroken)


def test_a_file_that_changes_after_the_start_ends_the_run_by_its_name(packed, tmp_path):
    served = shutil.copytree(packed, tmp_path / "served")
    shard = served / "train.pack" / "shard-00000.bin"
    content = shard.read_bytes()
    with serve(served) as server:

        def changes(
            method, path, part
        ):  # before the first images are sent, after the run has opened the file
            if path.endswith(f"train.pack/{shard.name}") and part and shard.read_bytes() == content:
                shard.write_bytes(content[::-1])

        server.fault = changes
        argv = arguments(tmp_path, server.address, "--opts", "DATA.CACHE_SIZE=0")
        assert run_group(1, argv, log=tmp_path / "log") == [3]
    text = (tmp_path / "log-0").read_text()
    assert f"{server.address}/train.pack/{shard.name}: changed since the run opened it" in text
    assert not (tmp_path / "dat_micro" / "run" / "bad_samples.jsonl").exists()
