"""tools/score.py and the reader of the prediction store: right numbers from good stores, clear refusals of bad ones."""

import json

import numpy as np
import pytest
from helpers.evaluations import CENTER, add_set, random_logits, sign, write_evaluation
from sklearn.metrics import balanced_accuracy_score, log_loss
from statsmodels.stats.contingency_tables import mcnemar

from analysis import imagenet, scores
from analysis.predictions import read_evaluation, read_predictions
from tools import score
from utils.errors import DataError

CLASSES = [f"class_{index}" for index in range(8)]


@pytest.fixture
def folder(tmp_path):
    """An evaluation of 200 images of 8 classes, of which two cannot be read."""
    folder = write_evaluation(tmp_path / "a", CLASSES, "dat")
    add_set(folder, "val", *random_logits(200, 8), bad=(0, 7))
    return folder


def other(tmp_path, name="b", seed=1, **entries):
    folder = write_evaluation(tmp_path / name, entries.pop("classes", CLASSES), "swin", **entries)
    logits, label = random_logits(200, 8, seed=seed)
    add_set(folder, "val", logits, label)
    return folder


def edit(path, change):
    """Replace the lines of a CSV by `change(lines)`."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


# --- One evaluation ---------------------------------------------------------------------------------------------------


def test_a_set_is_read_as_it_was_written(folder):
    logits, label = random_logits(200, 8)
    rows = read_predictions(folder / "val.csv")
    assert rows.readable.sum() == 198
    good = rows.readable
    assert rows.label.tolist() == label.tolist()
    assert (rows.top[good, 0] == logits[good].argmax(axis=1)).all()
    assert (rows.right == (good & (logits.argmax(axis=1) == label))).all()
    in_five = (np.argsort(-logits, axis=1)[:, :5] == label[:, None]).any(axis=1)
    assert (rows.right5 == (good & in_five)).all()
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert rows.nll[good].mean() == pytest.approx(log_loss(label[good], p[good]), rel=1e-5)
    brier = ((p - np.eye(8)[label]) ** 2).sum(axis=1)
    assert rows.brier[good] == pytest.approx(brier[good], rel=1e-5)


def test_scores_are_those_of_the_rows(folder, capsys):
    assert score.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "scores.json").read_text())
    logits, label = random_logits(200, 8)
    guess = logits.argmax(axis=1)
    guess[[0, 7]] = (label[[0, 7]] + 1) % 8  # unreadable counts as wrong
    [row] = found["suite"]["rows"]
    assert row["right"] == (guess == label).sum()
    assert (row["images"], row["unreadable"]) == (200, 2)
    details = found["sets"]["val"]
    expected = 100 * balanced_accuracy_score(label, guess)
    assert details["class_accuracy"]["value"] == pytest.approx(expected)
    low, high = details["class_accuracy"]["interval"]
    assert low < expected < high
    shares = [one["right"] / one["images"] for one in details["worst_classes"]]
    assert shares == sorted(shares)
    assert len(shares) == 8
    assert sum(bin["images"] for bin in details["reliability"]) == 198
    most = details["confusions"][0]
    pair = (CLASSES.index(most["label"]), CLASSES.index(most["guess"]))
    good = np.delete(np.arange(200), [0, 7])
    assert most["images"] == ((label[good] == pair[0]) & (guess[good] == pair[1])).sum()
    assert f"{row['top1']:.3f}" in printed
    assert "worst classes" in (folder / "scores.md").read_text()


def test_scores_are_the_same_bytes_again(folder):
    score.main([str(folder)])
    first = [(folder / f"scores.{kind}").read_bytes() for kind in ("json", "md")]
    score.main([str(folder)])
    assert first == [(folder / f"scores.{kind}").read_bytes() for kind in ("json", "md")]


def test_temperature_is_fitted_on_one_half_of_val_and_reported_on_the_other(tmp_path):
    folder = write_evaluation(tmp_path / "a", CLASSES)
    logits, label = random_logits(4000, 8, skill=2.0)
    add_set(folder, "val", logits * 3, label, keep_logits=True, bad=(5,))
    add_set(folder, "a", logits[:3000] * 3, label[:3000], kept=list(range(6)), keep_logits=True)
    found = scores.score_evaluation(folder)["temperature"]
    rows = found["sets"]
    assert 1800 < found["fitted_on"] < 2200
    assert found["fitted_on"] + rows["val"]["images"] == 3999
    assert rows["val"]["after"]["nll"] < rows["val"]["before"]["nll"]
    assert rows["val"]["after"]["ece"] < rows["val"]["before"]["ece"] / 2
    a = read_predictions(folder / "a.csv")
    assert rows["a"]["before"]["nll"] == pytest.approx(a.nll.mean(), rel=1e-3), "masked as the rows"


def test_logits_that_are_not_finite_are_refused(folder):
    logits, label = random_logits(200, 8)
    add_set(folder, "val", logits, label, keep_logits=True)
    logits[3, 2] = np.nan
    np.save(folder / "val.logits.npy", logits.astype(np.float16))
    with pytest.raises(DataError, match=r"val\.logits\.npy, row 3 .* not finite"):
        scores.score_evaluation(folder)
    np.save(folder / "val.logits.npy", logits[:100].astype(np.float16))
    with pytest.raises(DataError, match=r"shape \(100, 8\), expected \(200, 8\)"):
        scores.score_evaluation(folder)
    (folder / "val.logits.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"val\.logits\.npy cannot be read"):
        scores.score_evaluation(folder)


@pytest.mark.parametrize(("skill", "accuracy"), [(50, 100), (-50, 0)])
def test_all_right_and_all_wrong(tmp_path, skill, accuracy):
    folder = write_evaluation(tmp_path / "a", CLASSES)
    add_set(folder, "val", *random_logits(40, 8, skill=skill))
    found = scores.score_evaluation(folder)
    assert found["suite"]["rows"][0]["top1"] == accuracy
    assert found["sets"]["val"]["aurc"]["value"] == 100 - accuracy
    assert len(found["sets"]["val"]["confusions"]) == (0 if accuracy else 20)


def test_scores_of_other_predictions_are_not_read(folder):
    scores.write_scores(folder)
    marked = scores.read_scores(folder) | {"temperature": "as it was written"}
    (folder / "scores.json").write_text(json.dumps(marked))
    assert scores.read_scores(folder) == marked
    for seed in (1, 2):  # another set, then other predictions
        add_set(folder, "sketch", *random_logits(50, 8, seed))
        found = scores.read_scores(folder)
        assert found == scores.score_evaluation(folder)
        assert list(found["sets"]) == ["val", "sketch"]
        scores.write_scores(folder)
    (folder / "scores.json").write_text("[]")
    with pytest.raises(DataError, match=r"scores\.json cannot be read"):
        scores.read_scores(folder)


@pytest.mark.parametrize("bad", [(), (0,)])
def test_one_image(tmp_path, bad):
    folder = write_evaluation(tmp_path / "a", CLASSES)
    add_set(folder, "val", *random_logits(1, 8), bad=bad)
    assert score.main([str(folder)]) == 0
    found = json.loads((folder / "scores.json").read_text())["sets"]["val"]
    assert found["ece"]["interval"] is None
    assert (found["ece"]["value"] is None) == bool(bad)


def test_fewer_than_five_classes(tmp_path):
    folder = write_evaluation(tmp_path / "a", CLASSES[:2])
    add_set(folder, "val", *random_logits(30, 2))
    assert read_predictions(folder / "val.csv").top.shape == (30, 2)
    assert score.main([str(folder)]) == 0


# --- Bad stores -------------------------------------------------------------------------------------------------------


def swap(lines):
    return [*lines[:4], lines[5], lines[4], *lines[6:]]


def set_field(column, value):
    def change(lines):
        fields = lines[9].split(",")
        fields[lines[0].strip().split(",").index(column)] = value
        return [*lines[:9], ",".join(fields), *lines[10:]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            swap,
            r"val\.csv, line 6: 'class_0/00003.JPEG' after 'class_0/00004.JPEG', the rows were permuted",
        ),
        (lambda lines: lines[:100], r"val\.csv ends after line 100: 99 images, .* says 200"),
        (
            lambda lines: [*lines[:50], lines[50][:20]],
            r"val\.csv, line 51: \d+ fields, expected 17",
        ),
        (lambda lines: lines[1:], r"val\.csv, line 1: expected the columns file,label,rank"),
        (lambda lines: [], r"val\.csv, line 1: expected the columns"),
        (set_field("nll", "nan"), r"val\.csv, line 10: nll is missing or not finite"),
        (set_field("p1", ""), r"val\.csv, line 10: p1 is missing or not finite"),
        (set_field("p", "inf"), r"val\.csv, line 10: p is missing or not finite"),
        (set_field("rank", "nan"), r"val\.csv, line 10: rank is missing or not finite"),
        (set_field("brier", "x"), r"val\.csv, line 10: brier is 'x', no number"),
        (set_field("label", "1.5"), r"val\.csv, line 10: label is no integer"),
        (set_field("label", "8"), r"val\.csv, line 10: label is no index of 8 classes"),
        (set_field("label", "5"), r"val\.csv, line 10: rank, label and c1 … c5 contradict"),
        (set_field("rank", "9"), r"val\.csv, line 10: rank is not within 0 … 8"),
        (set_field("c1", "-1"), r"val\.csv, line 10: c1 … c5 are not different indices"),
        (set_field("p5", "0.999"), r"val\.csv, line 10: p1 … p5 do not fall"),
        (set_field("p", "1.2"), r"val\.csv, line 10: p is not within 0 … 1"),
        (set_field("brier", "2.1"), r"val\.csv, line 10: .* brier above 2"),
        (set_field("nll", "0.5"), r"val\.csv was edited since the evaluation"),
    ],
)
def test_a_csv_that_was_changed_is_refused_with_its_line(folder, change, message, capsys):
    edit(folder / "val.csv", change)
    assert score.main([str(folder)]) == 3
    error = capsys.readouterr().err
    with pytest.raises(DataError, match=message):
        read_predictions(folder / "val.csv")
    assert error.startswith("DataError: ")
    assert not (folder / "scores.json").exists()


def test_rows_that_contradict_the_mask_are_refused(tmp_path):
    folder = write_evaluation(tmp_path / "a", CLASSES)
    logits, label = random_logits(120, 8)
    label = label % 6
    add_set(folder, "a", logits, label, kept=list(range(6)))
    assert read_predictions(folder / "a.csv").full1.tolist() == logits.argmax(axis=1).tolist()
    record = json.loads((folder / "evaluation.json").read_text())
    record["sets"]["a"]["kept"] = [0, 1, 2, 3, 4, 7]
    (folder / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"a\.csv, line \d+: label is no index of 6 classes"):
        read_predictions(folder / "a.csv")


def test_a_folder_that_is_no_evaluation_is_refused(tmp_path, folder):
    with pytest.raises(DataError, match="does not exist; name the folder of an evaluation"):
        read_evaluation(tmp_path)
    with pytest.raises(DataError, match="lists no set 'train', only val"):
        read_predictions(folder / "train.csv")
    content = (folder / "evaluation.json").read_text()
    (folder / "evaluation.json").write_text(content[:-9])
    with pytest.raises(DataError, match=r"evaluation\.json cannot be read"):
        read_evaluation(folder)
    (folder / "evaluation.json").write_text(content.replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="format 2, expected 1"):
        read_evaluation(folder)
    (folder / "evaluation.json").write_text(content)
    (folder / "val.csv").unlink()
    with pytest.raises(DataError, match=r"val\.csv does not exist, but"):
        read_predictions(folder / "val.csv")


def test_quoted_file_names(tmp_path):
    folder = write_evaluation(tmp_path / "a", CLASSES)
    files = [
        'class_0/a, "b".jpg',
        "class_0/c\x0c\x1cd.jpg",
        "class_1/e\u2028\x85f.jpg",
        "class_1/ä.jpg",
    ]
    add_set(folder, "val", *random_logits(4, 8), files=files)
    assert read_predictions(folder / "val.csv").file == files


# --- Comparison -------------------------------------------------------------------------------------------------------


def test_two_models_are_compared_image_by_image(tmp_path, folder, capsys):
    second = other(tmp_path)
    out = tmp_path / "a new" / "folder"
    assert score.main([str(folder), str(second), "--out", str(out)]) == 0
    [row] = json.loads((out / "comparison.json").read_text())["rows"]
    a, b = (read_predictions(one / "val.csv").right for one in (folder, second))
    table = [[(a & b).sum(), (a & ~b).sum()], [(b & ~a).sum(), (~a & ~b).sum()]]
    assert row["only"] == [table[0][1], table[1][0]]
    assert row["p"] == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert row["difference"] == pytest.approx(100 * (a.mean() - b.mean()))
    assert row["interval"][0] < row["difference"] < row["interval"][1]
    assert row["q"] is None, "one test is not adjusted"
    gaps = [abs((one["p"][0] or 0) - (one["p"][1] or 0)) for one in row["differ"]]
    assert len(gaps) == 20
    assert gaps == sorted(gaps, reverse=True)
    assert capsys.readouterr().out == (out / "comparison.md").read_text()


def test_several_comparisons_are_adjusted(tmp_path, folder):
    others = [other(tmp_path, f"b{seed}", seed) for seed in (1, 2)]
    rows = scores.compare_evaluations([folder, *others])["rows"]
    assert [row["models"] for row in rows] == [[0, 1], [0, 2], [1, 2]]
    assert all(row["q"] >= row["p"] for row in rows)
    assert max(row["q"] for row in rows) == max(row["p"] for row in rows)


def test_sets_of_own_classes_show_the_guesses_among_all_classes(tmp_path):
    folders = []
    for name, full1 in (("a", [0, 1, -1]), ("b", [1, 1, 2])):
        folders.append(write_evaluation(tmp_path / name, CLASSES))
        label = np.array([0, 1, 2])
        own = {"classes": ["cup", "hat", "shoe"], "full1": full1, "files": ["x", "y", "z"]}
        add_set(folders[-1], "objectnet", 9.0 * np.eye(3), label, **own)
    comparison = scores.compare_evaluations(folders)
    assert comparison["rows"][0]["differ"] == [
        {"file": "x", "label": "cup", "guess": ["cup", "hat"]},
        {"file": "z", "label": "shoe", "guess": ["a class outside the set", "shoe"]},
    ]
    text = scores.tables.format_comparison(comparison)
    assert "p of the label" not in text
    scores.write_scores(folders[0])
    text = (folders[0] / "scores.md").read_text()
    assert (
        text.count("objectnet, its classes alone") == 4
    )  # accuracy, calibration, classes, confusions


def test_a_model_compared_with_itself(tmp_path):
    one, two = other(tmp_path, "one"), other(tmp_path, "two")
    [row] = scores.compare_evaluations([one, two])["rows"]
    assert (row["only"], row["difference"], row["p"]) == ([0, 0], 0, 1)
    assert row["interval"] is None
    assert score.main([str(one), str(two)]) == 0


def test_what_cannot_be_compared_is_refused_by_name(tmp_path, folder, capsys):
    def refusal(second):
        assert score.main([str(folder), str(second)]) == 3
        error = capsys.readouterr().err
        assert str(folder) in error
        assert str(second) in error
        return error

    renamed = other(tmp_path, "renamed", classes=[*CLASSES[:7], "zebra"])
    assert "classes differ (class_7, zebra)" in refusal(renamed)
    turned = other(tmp_path, "turned", classes=CLASSES[::-1])
    assert "the same in another order" in refusal(turned)
    files = [f"{CLASSES[c]}/x{i}.JPEG" for i, c in enumerate(random_logits(200, 8)[1])]
    images = write_evaluation(tmp_path / "images", CLASSES)
    add_set(images, "val", *random_logits(200, 8), files=files, source="/data/mine/val")
    assert "images or labels differ" in (message := refusal(images))
    assert "/data/mine/val" in message
    squash = write_evaluation(tmp_path / "squash", CLASSES)
    add_set(squash, "val", *random_logits(200, 8), pixels=CENTER | {"crop_mode": "squash"})
    assert "TEST.CROP_MODE was center and squash" in refusal(squash)
    masked = write_evaluation(tmp_path / "masked", CLASSES)
    add_set(masked, "val", *random_logits(200, 8), kept=list(range(8)))
    assert "masked to different classes" in refusal(masked)
    sketch = write_evaluation(tmp_path / "sketch", CLASSES)
    add_set(sketch, "sketch", *random_logits(200, 8))
    assert "share no set" in refusal(sketch)


def test_settings_that_differ_are_listed(tmp_path, folder):
    second = write_evaluation(tmp_path / "b", CLASSES, "swin", logits={"dtype": "bfloat16"})
    add_set(second, "val", *random_logits(200, 8, 1), pixels=CENTER | {"img_size": 384})
    notes = scores.compare_evaluations([folder, second])["notes"]
    assert [note.partition(" is ")[0] for note in notes] == ["dtype", "val: img_size"]
    assert f"224 in {folder} and 384 in {second}" in notes[1]


def test_corruptions_are_compared_by_their_mean(tmp_path):
    folders = []
    for name, skill in (("a", 2.0), ("b", 1.0)):
        folders.append(write_evaluation(tmp_path / name, CLASSES))
        for severity in (1, 2, 3):
            logits, label = random_logits(150, 8, severity, skill)
            add_set(folders[-1], f"c-fog-{severity}", logits, label)
    [row] = scores.compare_evaluations(folders)["rows"]
    means = [
        np.mean([read_predictions(f / f"c-fog-{s}.csv").right.mean() for s in (1, 2, 3)])
        for f in folders
    ]
    assert row["set"] == "c, mean of 3 cells"
    assert row["top1"] == pytest.approx([100 * mean for mean in means])
    assert row["interval"][0] < row["difference"] < row["interval"][1]
    for folder in folders:
        add_set(folder, "c-fog-4", *random_logits(120, 8, 4))
    comparison = scores.compare_evaluations(folders)
    assert comparison["rows"] == []
    assert comparison["notes"] == [
        "c: its 4 cells list different images, so they have no mean here"
    ]


def test_real_labels_are_compared_too(tmp_path):
    wnids = imagenet.wnids()
    folders = []
    numbers = np.arange(1, 61)
    for name in ("a", "b"):
        rng = np.random.default_rng(len(folders))
        folders.append(write_evaluation(tmp_path / name, wnids))
        files = [f"{wnids[0]}/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers]
        labels = imagenet.real_labels(files, wnids)
        logits = rng.normal(size=(60, 1000))
        for row, allowed in enumerate(labels):
            logits[row, allowed[:1]] += 4
        add_set(folders[-1], "val", logits, np.zeros(60, int), files=files)
    rows = {row["set"]: row for row in scores.compare_evaluations(folders)["rows"]}
    assert rows["real"]["images"] == sum(bool(allowed) for allowed in labels)
    assert rows["real"]["top1"][0] > rows["val"]["top1"][0] + 50


def test_flags_that_do_not_fit_are_refused(tmp_path, folder, capsys):
    assert score.main([str(folder), "--out", str(tmp_path)]) == 2
    assert "--out belongs to a comparison" in capsys.readouterr().err
    assert score.main([str(folder), str(folder), "--imagenet-x", "x"]) == 2


def test_sign_is_what_makes_an_edited_csv_valid(folder):
    """The helper's own check: otherwise the refusals above could have another cause."""
    edit(folder / "val.csv", set_field("nll", "0.5"))
    sign(folder, "val")
    assert read_predictions(folder / "val.csv").nll[8] == 0.5
