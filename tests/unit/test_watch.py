"""tools/watch.py, analysis/offsets.py and tools/screenshot.py: what is shown while a run trains.

pytest tests/unit/test_watch.py
"""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers.run_dirs import write_run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis import offsets
from analysis.offsets import draw_offsets, measure_offsets
from analysis.report import describe_faults
from analysis.runs import Series, list_lost_points, read_run
from tools import screenshot, watch
from utils.logging import MetricWriter


@pytest.fixture
def run(tmp_path):
    run = write_run(tmp_path, steps=400)
    records = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(r for r in records if json.loads(r)["step"] <= 200))
    records = (run / "timing.jsonl").read_text().splitlines(keepends=True)
    (run / "timing.jsonl").write_text("".join(records[:200]))
    config = json.loads((run / "config.yaml").read_text())
    config["TRAIN"]["GLOBAL_BATCH_SIZE"] = 1030
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "status.json").write_text(json.dumps({"state": "running", "step": 200}))
    return run


def test_the_terminal_shows_progress_and_time_left(run, capsys):
    assert watch.main([str(run)]) == 0  # once, as this is no terminal
    text = capsys.readouterr().out
    assert " 50 %  200 / 400" in text
    assert "103 images/s" in text
    assert "0:33:20 left" in text  # 200 steps of 1030 images at 103 a second
    assert "training loss" in text
    assert "epoch 2.00" in text
    assert "\x1b" not in text


def test_lines_fit_and_hide_control_characters(run):
    (run / "status.json").write_text(
        json.dumps({"state": "failed\x1b[2J", "exit_code": 5, "error": "x" * 300})
    )
    lines = watch.describe(read_run(run), 60, now=0)
    assert max(map(len, lines)) <= 60
    assert "diverged" in lines[0] + lines[1]
    assert not any("\x1b" in line for line in lines)


def test_silence_and_faults_are_warnings(run):
    (run / "skipped.jsonl").write_text('{"step": 9, "micro_batches": []}\n[]\n')
    now = (run / "timing.jsonl").stat().st_mtime + 3600
    text = "\n".join(watch.describe(read_run(run), 100, now))
    assert "! no record for 1:00:00" in text
    assert "! 1 steps without a finite gradient, the last was 9" in text
    assert "! skipped.jsonl, line 2: damaged" in text


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert watch.main([str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err


def test_sparklines():
    values = np.array([0.0, 1, 2, np.nan, 7])
    assert watch.sparkline(Series(np.arange(5), values), 10) == "▁▂▃ █"
    assert watch.sparkline(Series(np.arange(4), np.ones(4)), 10) == "▅▅▅▅"
    assert watch.sparkline(Series(np.arange(79), np.full(79, 0.1)), 6) == "▅▅▅▅▅▅"
    assert watch.sparkline(Series(np.arange(3), np.array([1, np.nan, 1])), 6) == "▅ ▅"
    assert len(watch.sparkline(Series(np.arange(99), np.arange(99.0)), 10)) == 10


# --- Offsets --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def full_size(monkeypatch):
    """Pictures as a run writes them; helpers/runs.py shrinks those of small runs."""
    monkeypatch.setattr(offsets, "SIDE", 288)


@pytest.mark.parametrize("far", [1e12, float("nan")])
def test_points_of_a_model_that_diverges_are_drawn_at_once(far):
    model = timm.create_model("dat_micro").eval()
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        layers = model.sampling_positions(images / 255)
    layers = [layer._replace(positions=layer.positions + far) for layer in layers]
    assert draw_offsets(layers, images)["offsets/stage3"].shape == (288, 288, 3)


def test_offsets_in_numbers_and_pictures():
    torch.manual_seed(0)
    model = timm.create_model("dat_micro").eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        layers = model.sampling_positions(images / 255)
    numbers = measure_offsets(layers, clamped=False)
    stage3 = [layer for layer in layers if layer.stage == 2]
    expected = sum(layer.offset_length().mean().item() for layer in stage3) / len(stage3)
    assert numbers["offsets/stage3_pixels"] == expected
    assert 0 <= numbers["offsets/stage3_outside"] <= 1
    assert 0 < numbers["offsets/stage3_coverage"] <= 1
    assert numbers["offsets/stage3_distance"] > 0
    assert "offsets/stage2_distance" not in numbers  # one group
    pictures = draw_offsets(layers, images)
    assert sorted(pictures) == ["offsets/stage2", "offsets/stage3", "offsets/stage4"]
    assert pictures["offsets/stage3"].shape == (288, 3 * 288, 3)
    assert len(np.unique(pictures["offsets/stage3"].reshape(-1, 3), axis=0)) > 100


def test_points_of_wide_images_cover_the_picture():
    torch.manual_seed(0)
    model = timm.create_model("dat_micro", img_size=(32, 64)).eval()
    images = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    with torch.no_grad():
        layers = model.sampling_positions(images / 255)
    still = [
        layer._replace(positions=layer.reference.expand_as(layer.positions)) for layer in layers
    ]
    picture = draw_offsets(still, images)["offsets/stage2"]
    lit = np.argwhere(picture.any(-1))
    assert (lit.min(0) < 60).all()
    assert (lit.max(0) > 228).all()


def test_points_that_the_offsets_took_to_the_border_are_lost():
    torch.manual_seed(0)
    # Two of four points a side of the last map of DAT++ begin at the border, and are never lost.
    model = timm.create_model("dat_pp_micro").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fresh = measure_offsets(model.sampling_positions(images), clamped=True)
        model.stages[1].blocks[1].attn.positions.proj.weight *= 1e4
        moved = measure_offsets(model.sampling_positions(images), clamped=True)
    assert fresh["offsets/stage4_outside"] > 0.5 > fresh["offsets/stage4_lost"]
    assert list_lost_points(fresh) == {}
    assert list(list_lost_points(moved)) == ["stage 2"]
    assert 0.9 < moved["offsets/stage2_lost"] <= 1


def test_lost_points_are_warned_of(run):
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 200, "offsets/stage3_lost": 0.75}\n')
    text = "\n".join(watch.describe(read_run(run), 100, now=0))
    assert "! 75% of the sampled points of stage 3 are lost" in text
    assert any(row.value == "75%" for row in describe_faults(read_run(run)))


def test_tensorboard_has_charts_settings_and_pictures(tmp_path):
    writer = MetricWriter(tmp_path, 0, 0, 1, {"TRAIN.BASE_LR": 0.1, "MODEL.NAME": "dat_micro"})
    writer.metrics(1, {"train/loss": 2.0})
    writer.pictures(1, {"offsets/stage3": np.zeros((4, 8, 3), np.uint8)})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["offsets/stage3"]
    plugins = {
        events.summary_metadata[tag].plugin_data.plugin_name for tag in events.summary_metadata
    }
    assert {"custom_scalars", "hparams"} <= plugins


# --- Screenshots ----------------------------------------------------------------------------------


def test_a_page_becomes_a_small_picture(tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("<body style='background:#0072b2;color:white'>words</body>")
    out = tmp_path / "page.png"
    if not any(map(shutil.which, screenshot.PROGRAMS)):
        pytest.skip("needs Chromium: apt-get install chromium")
    assert screenshot.main([str(page), str(out), "--size", "320x200"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (320, 200)
        red, green, blue = picture.convert("RGB").getpixel((300, 190))
        assert max(red, abs(green - 114), abs(blue - 178)) < 8
    assert screenshot.main([str(page), str(out), "--size", "wide"]) == 2
    assert screenshot.main([str(tmp_path / "absent.html"), str(out)]) == 3
