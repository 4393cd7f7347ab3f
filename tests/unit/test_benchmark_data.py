"""The data benchmark: every loader runs on the same images, and without data there is no number."""

import argparse

import pytest
from helpers.images import write_image_folder, write_zip

from tools.benchmarks import data as bench_data
from utils.errors import DataError


def parse(*options):
    parser = argparse.ArgumentParser()
    bench_data.add_arguments(parser)
    return parser.parse_args(options)


def options(root, *more):
    return parse("--data-path", str(root), "--workers", "0", "--rounds", "2", *more)


def test_every_loader_is_timed_on_complete_batches(tmp_path):
    root = write_image_folder(tmp_path / "set", classes=2, train=5, val=1)
    write_zip(root / "train", tmp_path / "train.zip")
    result = bench_data.run(options(tmp_path, "--images", "7", "--batch-size", "2"))
    assert result["images"] == 6
    speeds, times = result["images_per_second"], result["times_timm"]
    assert len(speeds) == 15
    assert all(0 < s["min"] <= s["median"] <= s["max"] for s in speeds.values())
    assert set(times) == {name for name in speeds if "ours" in name}
    assert result["share_of_decoding"]["Pillow"]["decoding, Pillow"]["median"] == 1
    lines = bench_data.table(result).splitlines()
    assert len(lines) == 2 + len(speeds)


def test_without_data_there_is_no_benchmark(tmp_path):
    with pytest.raises(DataError, match="has no val split"):
        bench_data.run(options(tmp_path))
    root = write_image_folder(tmp_path / "set", classes=2, train=2, val=1)
    with pytest.raises(DataError, match="has 4 images, fewer than a batch of 50"):
        bench_data.run(options(root))
