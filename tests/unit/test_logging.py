"""Record files of a run: those of the first edition are translated when a run resumes."""

import json

import pytest

from utils.logging import MetricWriter

OLD = {
    "metrics": [
        {"update": 2, "train/loss": 0.1, "train/lr": 1e-05},
        {"update": 4, "train/loss": float("nan"), "train/lr": 3e-05},
        {"update": 4, "epoch": 1, "val/acc1": 50.0},
        {"update": 6, "train/loss": 0.3, "train/lr": 5e-05},
    ],
    "timing": [{"update": 2, "time/images_per_s": 9.5}, {"update": 6, "time/images_per_s": 9.5}],
    "skipped": [{"update": 3, "slots": [["a.jpg", "b.jpg"], ["c.jpg"]]}],
}


def write(folder, records):
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(folder):
    return {path.stem: path.read_text() for path in folder.glob("*.jsonl")}


@pytest.mark.parametrize("translated", [0, 2])
def test_old_records_resume_as_those_of_an_unbroken_run(tmp_path, translated):
    """Also where the first lines have today's names already."""
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir(), old.mkdir()
    writer = MetricWriter(new, 0, 0, every=2)
    for name, lines in OLD.items():
        for line in lines:
            values = dict(line)
            step, slots = values.pop("update"), values.pop("slots", None)
            if slots is None:
                getattr(writer, name)(step, values)
            else:
                writer.skipped(step, slots)
    writer.close()
    unbroken = read(new)
    write(old, OLD)
    for name, text in unbroken.items():
        lines = (old / f"{name}.jsonl").read_text().splitlines(keepends=True)
        first = text.splitlines(keepends=True)[:translated]
        (old / f"{name}.jsonl").write_text("".join(first + lines[len(first) :]))
    writer = MetricWriter(old, 4, 1, every=2)
    writer.metrics(6, {"train/loss": 0.3, "train/lr": 5e-05})
    writer.timing(6, {"time/images_per_s": 9.5})
    writer.close()
    assert read(old) == unbroken
    assert '"micro_batches"' in unbroken["skipped"]


def test_old_records_beyond_the_step_are_cut(tmp_path):
    write(tmp_path, OLD)
    MetricWriter(tmp_path, 4, 0, every=2).close()
    steps = {
        name: [json.loads(line)["step"] for line in text.splitlines()]
        for name, text in read(tmp_path).items()
    }
    assert steps == {"metrics": [2, 4], "timing": [2], "skipped": [3]}
