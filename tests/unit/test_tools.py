"""tools/*.py and analysis/records.py: damaged and old records of a run are read as far as possible.

pytest tests/unit/test_tools.py
"""

import json

import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from analysis.records import read_records
from engine import checkpoint
from engine.state import TrainState
from tools import checkpoint as checkpoint_tool
from tools import compare, curves
from utils.errors import StorageError

GOOD = [
    {"step": 1, "train/loss": 2.0, "train/lr": 0.1},
    {"step": 2, "train/loss": 1.5, "train/lr": 0.2},
    {"step": 2, "epoch": 1, "val/acc1": 40.0, "val/acc5": 80.0, "val/loss": 1.2},
]
DAMAGED = [b"\xff\xfe\x00", b"{}", b"[1]", b'{"step": 3, "train/lo', b'{"step": "3"}', b"[" * 9999]


def as_lines(records: list[dict]) -> list[bytes]:
    return [json.dumps(record).encode() for record in records]


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run with a checkpoint and records, among them damaged ones."""
    folder = tmp_path / "output" / "dat_micro" / "default"
    model = timm.create_model("dat_micro", num_classes=3)
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler(enabled=False)
    state = TrainState(model, None, optimizer, scaler, step=2, epoch=1)
    metadata = {
        "model": "dat_micro",
        "classes": list("abc"),
        "config": {"TAG": "default", "MODEL": {"NAME": "dat_micro", "ARGS": {}}},
        "versions": {"torch": "2.14.1"},
        "revision": "0123456",
    }
    checkpoint.write(folder / "checkpoints", "step-2", checkpoint.snapshot(state, metadata))
    lines = [*as_lines(GOOD[:2]), *DAMAGED[:3], *as_lines(GOOD[2:]), *DAMAGED[3:]]
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (folder / "status.json").write_text('{"state": "done"}')
    return folder


def test_damaged_records_are_reported_and_skipped(run, caplog):
    file = run / "metrics.jsonl"
    assert list(read_records(file)) == GOOD
    places = [message.partition(": ")[0] for message in caplog.messages]
    assert places == [f"{file}:{line}" for line in (3, 4, 5, 7, 8, 9)]
    file.write_bytes(b"")
    assert list(read_records(file)) == []
    file.unlink()
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be read: No such file"):
        list(read_records(file))


def test_records_of_the_first_edition_have_the_names_of_today(tmp_path):
    file = tmp_path / "skipped.jsonl"
    file.write_text('{"update": 7, "slots": [["a.jpg"]]}\n')
    assert list(read_records(file)) == [{"step": 7, "micro_batches": [["a.jpg"]]}]


def test_curves_of_damaged_records(run, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    assert curves.main([str(run), "--out", str(picture)]) == 0
    assert "2 steps, best top-1 40.00 %" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert len(image.convert("RGB").resize((64, 64)).getcolors(64**2)) > 100


def test_curves_are_replaced_by_complete_ones(run, tmp_path, monkeypatch):
    def stop(figure, file, **settings):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    picture = tmp_path / "curves.svg"
    picture.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", stop)
        assert curves.main([str(run), "--out", str(picture)]) == 130
    assert picture.read_text() == "old"
    assert curves.main([str(run), "--out", str(picture)]) == 0
    assert "</svg>" in picture.read_text()
    assert not [*tmp_path.glob(".tmp-*")]


def test_curves_before_the_first_validation(run, tmp_path, capsys):
    (run / "metrics.jsonl").write_bytes(b"\n".join(as_lines(GOOD[:2])))
    assert curves.main([str(run), "--out", str(tmp_path / "curves.png")]) == 0
    assert "2 steps, no validation yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "out", "code", "words"),
    [
        (None, "curves.png", 2, "has no metrics.jsonl"),
        (b"", "curves.png", 2, "has no valid records"),
        (b"\0\0\0", "curves.png", 2, "has no valid records"),
        (as_lines(GOOD[:1])[0], "absent/curves.png", 6, "No such file"),
        (as_lines(GOOD[:1])[0], "curves.xyz", 6, "is not supported"),
    ],
)
def test_curves_that_cannot_be_drawn(run, tmp_path, capsys, records, out, code, words):
    file = run / "metrics.jsonl"
    file.unlink() if records is None else file.write_bytes(records)
    assert curves.main([str(run), "--out", str(tmp_path / out)]) == code
    assert words in capsys.readouterr().err


def test_an_interrupted_tool_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(curves, "draw", interrupt)
    assert curves.main(["run"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_checkpoint_is_inspected_beside_damaged_records(run, capsys, monkeypatch):
    assert checkpoint_tool.main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert "40.000 % top-1, 80.000 % top-5" in text
    assert "dat_micro, 3 classes" in text
    monkeypatch.chdir(run / "checkpoints")
    assert checkpoint_tool.main(["inspect", "step-2"]) == 0
    assert "80.000 % top-5" in capsys.readouterr().out


def test_runs_without_usable_records_are_compared_without_accuracy(run, tmp_path, capsys):
    (tmp_path / "micro.yaml").write_text("MODEL: {NAME: dat_micro}\nDATA: {IMG_SIZE: 32}")
    argv = [str(tmp_path / "micro.yaml"), "--runs", str(tmp_path / "output")]
    argv += ["--batch", "2", "--rounds", "2"]

    def accuracy() -> str:
        assert compare.main(argv) == 0
        return capsys.readouterr().out.splitlines()[-1].split(" | ")[6]

    assert accuracy() == "40.00"
    (run / "metrics.jsonl").write_bytes(DAMAGED[0])
    assert accuracy() == "—"
    (run / "status.json").write_text('{"sta')
    assert accuracy() == "—"
    (run / "status.json").write_text('{"state": "done"}')
    (run / "checkpoints").rename(run / "elsewhere")
    assert compare.main(argv) == 4
    assert "has no checkpoints" in capsys.readouterr().err


def test_a_run_counts_once(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("MODEL: {NAME: dat_micro}\nDATA: {IMG_SIZE: 32}")
    one, two, out = (str(tmp_path / name) for name in ("a.yaml", "b.yaml", "output"))
    assert compare.main([one, two, "--runs", out]) == 2
    message = f"{one} and {two}: the runs of both are dat_micro/default; give one of them a TAG"
    assert message in capsys.readouterr().err
    assert compare.main([one, "--runs", out, f"{out}/../output"]) == 2
    assert "--runs names a folder twice" in capsys.readouterr().err
