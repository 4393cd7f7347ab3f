"""Whole evaluations on toy trees of every test set, whose answers are known beforehand."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import sets
from helpers.images import write_image_folder, write_tar, write_zip
from helpers.runs import arguments, run_group
from helpers.sets import WNIDS

import main
import models
from analysis import imagenet, statistics
from analysis.predictions import read_evaluation, read_logits, read_predictions
from engine import checkpoint, evaluate, suite
from engine.weight_files import hash_weights

CONFIG = """
AMP_DTYPE: float32
THREADS: 1
DATA: {BATCH_SIZE: 64, IMG_SIZE: 32, NUM_WORKERS: 0, VAL_SUBSET: true, MEAN: [.5, .5, .5], STD: [.5, .5, .5]}
MODEL: {NAME: colour_reader}
TEST: {CROP_MODE: center, CROP_PCT: 1.0}
"""
# Of 20 pictures, beside the severity: of fog and saturate, all pictures of severity 5.
WRONG = {"gaussian_noise": 3, "fog": 15, "saturate": 15}


def a_answers() -> list[int]:
    """Half of ImageNet-A's pictures are read as their class, the others as the class after the next."""
    labels = [WNIDS.index(name) for name in imagenet.subset_wnids("a")]
    return [label if n % 2 else label + 2 for n, label in enumerate(labels)]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A folder with `imagenet`, `sets`, a configuration and the weights of a colour reader."""
    folder = tmp_path_factory.mktemp("trees")
    root = folder / "sets"
    sets.write_val(folder / "imagenet", wrong=250)

    half = [i if i % 2 == 0 else (i + 1) % 1000 for i in range(1000)]
    numbers = [str(i) for i in range(1000)]
    sets.write_classes(root / "imagenetv2-matched-frequency-format-val", numbers, half)
    sets.write_classes(folder / "v2", WNIDS, half)
    write_zip(folder / "v2", root / "imagenetv2-threshold0.7.zip")
    sets.write_classes(root / "imagenetv2-top-images", WNIDS, np.roll(range(1000), 500).tolist())
    sets.write_classes(root / "imagenet-a", imagenet.subset_wnids("a"), a_answers())
    r_labels = [WNIDS.index(name) for name in imagenet.subset_wnids("r")]
    sets.write_classes(folder / "r", imagenet.subset_wnids("r"), r_labels)
    write_tar(folder / "r", root / "imagenet-r.tar")
    sketch = [i if i < 900 else 0 for i in range(1000)]
    sets.write_classes(root / "ImageNet-Sketch", WNIDS, sketch)
    sets.write_corruptions(root / "imagenet-c", WNIDS[:20], list(range(20)), WRONG)
    sets.write_objectnet(root / "objectnet-1.0")
    lines = [
        {"file_name": f"ILSVRC2012_val_{n:08d}.JPEG", "class": 0, "pose": int(n <= 500)}
        for n in range(1, 1001)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / suite.FACTORS_FILE).write_text(text)

    (folder / "colour.yaml").write_text(CONFIG)
    safetensors.torch.save_file({"sharpness": torch.tensor(4.0)}, folder / "colour.safetensors")
    return folder


def command(trees, out, *more):
    return [
        *("--cfg", str(trees / "colour.yaml"), "--data-path", str(trees / "imagenet"), "--eval"),
        *("--pretrained", str(trees / "colour.safetensors"), "--out", str(out), *more),
    ]


def results_of(capsys) -> dict:
    """The record that the evaluation printed last."""
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"][0]


@pytest.fixture(scope="module")
def evaluated(trees, tmp_path_factory):
    """The suite's folder, its record and what it logged."""
    out = tmp_path_factory.mktemp("predictions")
    lines = []
    patch = pytest.MonkeyPatch()
    for level in ("info", "warning"):
        patch.setattr(suite.logger, level, lines.append)
    more = ("--sets", str(trees / "sets"), "--opts", "TEST.SAVE_LOGITS", "True")
    assert main.main(command(trees, out, *more)) == 0
    patch.undo()
    return out, json.loads((out / "scores.json").read_text())["suite"], lines


def row(record, name):
    return next(row for row in record["rows"] if row["set"] == name)


# --- Known answers --------------------------------------------------------------------------------


def test_every_set_has_the_accuracy_that_its_tree_says(evaluated):
    _, record, _ = evaluated
    known = {
        "val": 75.0,
        "v2-matched-frequency": 50.0,
        "v2-threshold-0.7": 50.0,
        "v2-top-images": 0.0,
        "r": 100.0,
        "sketch": 90.0,
        "objectnet": 200 / 3,
        "objectnet, its classes alone": 100.0,
    }
    assert {name: row(record, name)["top1"] for name in known} == pytest.approx(known)
    assert row(record, "val")["interval"] == pytest.approx(
        [100 * end for end in statistics.wilson(750, 1000)]
    )


def test_numbered_folders_give_the_predictions_of_wnids(evaluated):
    out, _, _ = evaluated
    by_number = read_predictions(out / "v2-matched-frequency.csv")
    by_wnid = read_predictions(out / "v2-threshold-0.7.csv")
    order = np.argsort(by_number.label)
    for column in ("label", "rank", "p", "top", "nll"):
        assert (getattr(by_number, column)[order] == getattr(by_wnid, column)).all()


def test_a_is_masked_and_compared_with_its_clean_partner(evaluated):
    out, record, _ = evaluated
    kept = [WNIDS.index(name) for name in imagenet.subset_wnids("a")]
    answers = a_answers()
    model = sets.ColourReader(1000)
    colours = torch.tensor([sets.colour(answer) for answer in answers]) / 255
    with torch.no_grad():
        logits = model(((colours - 0.5) / 0.5)[:, :, None, None])
    masked = np.array(kept)[logits[:, kept].argmax(1)]
    found = row(record, "a")
    assert found["right"] == (masked == kept).sum()
    assert found["all_classes"] == 100 * (np.array(answers) == kept).mean() == 50.0
    assert found["right"] > 100  # some of the wrong ones are right among the 200
    clean = np.mean([label >= 250 for label in kept])
    in_val = read_predictions(out / "a-clean.csv")
    assert len(in_val) == 200
    assert found["clean"] == 100 * in_val.right.mean() >= 100 * clean


def test_real_is_scored_from_val_by_file_name(evaluated):
    out, record, _ = evaluated
    val = read_predictions(out / "val.csv")
    labels = imagenet.real_labels(val.file, WNIDS)
    judged = [n for n in range(1000) if labels[n]]
    right = sum(val.top[n, 0] in labels[n] for n in judged)
    right5 = sum(bool(set(val.top[n]) & set(labels[n])) for n in judged)
    found = row(record, "real")
    assert (found["images"], found["right"]) == (len(judged), right)
    assert found["top5"] == pytest.approx(100 * right5 / len(judged))


def test_corruption_errors_are_those_of_the_paper_by_hand(evaluated):
    _, record, _ = evaluated
    found = record["corruptions"]
    ces, relative = [], []
    for name in imagenet.CORRUPTIONS:
        errors = [(WRONG.get(name, 0) + severity) / 20 for severity in range(1, 6)]
        assert found["errors"][name] == pytest.approx([100 * error for error in errors])
        ces.append(100 * sum(errors) / (5 * imagenet.ALEXNET_ERRORS[name]))
        added = sum(error - 0.25 for error in errors)
        relative.append(100 * added / (5 * imagenet.ALEXNET_ERRORS[name] - 5 * 0.435))
    assert found["mce"] == pytest.approx(np.mean(ces))
    assert found["relative_mce"] == pytest.approx(np.mean(relative))
    assert found["mce_interval"][0] < found["mce"] < found["mce_interval"][1]
    assert set(found["further"]) == set(imagenet.EXTRA_CORRUPTIONS)
    assert found["further"]["saturate"] == pytest.approx([80, 85, 90, 95, 100])


def test_factors_of_imagenet_x_are_scored_from_val(evaluated):
    _, record, _ = evaluated
    assert record["factors"] == {"pose": {"images": 500, "ratio": pytest.approx(2.0)}}


def test_permuted_labels_are_reported_and_low_accuracies_of_a_and_c_are_not(evaluated):
    warnings = [line for line in evaluated[2] if "probably permuted" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("v2-top-images: top-1 0.00 %")


def test_what_is_found_is_listed_first(evaluated):
    lines = evaluated[2]
    listed = [line for line in lines if line.startswith(("Found", "Missing"))]
    assert len([line for line in listed if line.startswith("Found")]) == 10
    first_result = next(n for n, line in enumerate(lines) if "top-1" in line)
    assert all(lines.index(line) < first_result for line in listed)


def test_the_table_names_sets_intervals_and_crops(evaluated):
    out, _, _ = evaluated
    text = (out / "scores.md").read_text()
    assert "| val " in text
    low, high = (100 * end for end in statistics.wilson(750, 1000))
    assert f"75.000 [{low:.2f}, {high:.2f}]" in text
    assert "center 1, 32 px" in text
    assert "mCE" in text


def test_the_store_holds_every_row_and_its_logits(evaluated):
    out, _, _ = evaluated
    evaluation = read_evaluation(out)
    assert len(evaluation.sets) == 1 + 2 + 3 + 2 + 1 + 95 + 1
    for name, record in evaluation.sets.items():
        rows = read_predictions(out / f"{name}.csv")
        assert len(rows) == record.images
        classes = len(evaluation.classes_of(name))
        assert read_logits(out / f"{name}.logits.npy", rows, classes).shape[1] == classes
    assert evaluation.sets["a"].kept is not None
    assert evaluation.names[0].startswith("tench")


# --- Selections and refusals ----------------------------------------------------------------------


def test_only_some_sets_and_a_second_evaluation_beside_the_first(trees, tmp_path, capsys):
    more = ("--sets", str(trees / "sets"), "--only")
    assert main.main(command(trees, tmp_path, *more, "a")) == 0
    assert [r["set"] for r in results_of(capsys)["rows"]] == ["a"]
    assert main.main(command(trees, tmp_path, *more, "val")) == 0
    found = results_of(capsys)
    assert [r["set"] for r in found["rows"]] == ["a", "val", "real"]
    assert row(found, "a")["clean"] > 75
    settings = ("--amp-dtype", "bfloat16", "--opts", "TEST.CROP_PCT", "0.5")
    assert main.main(command(trees, tmp_path, *more, "r", *settings)) == 3
    assert "differs in pixels.crop_pct, logits.amp_dtype" in capsys.readouterr().err
    assert not (tmp_path / "r.csv").exists()


def test_two_evaluations_at_once_keep_the_sets_of_both(trees, tmp_path, capsys, monkeypatch):
    more = ("--sets", str(trees / "sets"), "--only")
    collect = evaluate._collect

    def collect_beside_another(*arguments: object) -> None:
        monkeypatch.setattr(evaluate, "_collect", collect)
        assert main.main(command(trees, tmp_path, *more, "val")) == 0
        collect(*arguments)

    monkeypatch.setattr(evaluate, "_collect", collect_beside_another)
    assert main.main(command(trees, tmp_path, *more, "a")) == 0
    assert {r["set"] for r in results_of(capsys)["rows"]} == {"a", "val", "real"}


def test_sizes_are_rows_of_one_table(trees, tmp_path, capsys):
    assert main.main(command(trees, tmp_path, "--sizes", "32,48,32")) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [r["model"] for r in record["results"]] == [
        "colour_reader, 32 px",
        "colour_reader, 48 px",
    ]
    assert {r["rows"][0]["top1"] for r in record["results"]} == {75.0}
    assert (tmp_path / "48px" / "val.csv").exists()


def test_other_classes_are_refused_before_anything_is_evaluated(trees, tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", classes=3)
    argv = command(trees, tmp_path / "out", "--sets", str(trees / "sets"), "--only", "val,r")
    argv[argv.index("--data-path") + 1] = str(data)
    assert main.main(argv) == 3
    assert "ImageNet-R: labelled by ImageNet-1k's 1000 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_an_error_or_counts_as_wrong(trees, tmp_path, capsys):
    shutil.copytree(trees / "sets" / "imagenet-a", tmp_path / "imagenet-a")
    name = imagenet.subset_wnids("a")[1]
    (tmp_path / "imagenet-a" / name / f"{name}.jpg").write_bytes(b"no picture")
    more = ("--sets", str(tmp_path), "--only", "a")
    assert main.main(command(trees, tmp_path / "1", *more)) == 3
    assert f"{name}.jpg" in capsys.readouterr().err
    skip = ("--opts", "TEST.SKIP_BAD", "True")
    assert main.main(command(trees, tmp_path / "2", *more, *skip)) == 0
    found = row(results_of(capsys), "a")
    assert (found["images"], found["unreadable"]) == (200, 1)
    assert read_predictions(tmp_path / "2" / "a.csv").rank[1] == 0


def test_logits_that_are_no_numbers_end_the_evaluation_with_the_image(trees, tmp_path, capsys):
    nan = ("--opts", "MODEL.ARGS.nan", "700")
    assert main.main(command(trees, tmp_path, *nan)) == 5
    assert "1 of 1000 images are not finite, first " + WNIDS[700] in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(trees, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main.main(command(trees, tmp_path / "file" / "out")) == 6
    assert "cannot be written" in capsys.readouterr().err


def test_a_file_of_weights_needs_a_folder_for_its_predictions(trees, capsys):
    argv = command(trees, "", "--sets", str(trees / "sets"))
    assert main.main(argv) == 2
    assert "--out DIR" in capsys.readouterr().err


def test_a_hugging_face_folder_names_its_classes(trees, tmp_path, capsys):
    def top1(out, name=""):
        argv = command(trees, tmp_path / out)
        argv[argv.index("--pretrained") + 1] = str(tmp_path / name)
        assert main.main(argv) == 0
        return results_of(capsys)["rows"][0]["top1"]

    shutil.copy(trees / "colour.safetensors", tmp_path / "model.safetensors")
    known = top1("bare")
    reversed_names = {"label_names": WNIDS[::-1]}
    (tmp_path / "config.json").write_text(json.dumps(reversed_names))
    assert known == 75
    assert top1("named") < 1
    assert top1("foreign", "model.safetensors") == known  # that config.json is not timm's
    timms = reversed_names | {"architecture": "colour_reader", "num_classes": 1000}
    (tmp_path / "config.json").write_text(json.dumps(timms | {"pretrained_cfg": {}}))
    assert top1("file", "model.safetensors") < 1
    argv = command(trees, tmp_path / "listed", "--opts", "DATA.CLASS_LIST", "imagenet-1k")
    argv[argv.index("--pretrained") + 1] = str(tmp_path)
    assert main.main(argv) == 2
    assert "config.json in another order" in capsys.readouterr().err
    # Names of no folder are another matter: the list says what the folders are.
    words = [f"word {number}" for number in range(1000)]
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"architecture": "colour_reader", "num_classes": 1000, "label_names": words}
            | {"pretrained_cfg": {"mean": [0.1, 0.5, 0.5], "input_size": [3, 32, 32]}}
        )
    )
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/config.json: DATA.MEAN was [0.1, 0.5, 0.5], is [0.5, 0.5, 0.5]" in out
    assert json.loads(out.strip().splitlines()[-1])["results"][0]["rows"][0]["top1"] == known


# --- Processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro(trees, tmp_path_factory):
    """The command line of a DAT with 1000 classes on some of the trees."""
    folder = tmp_path_factory.mktemp("micro")
    torch.manual_seed(0)
    sizes = {"num_classes": 1000, "img_size": 32, "drop_path_rate": 0.0}
    model = models.build("dat_micro", stages=["L", "S", "D", "D"], **sizes)
    safetensors.torch.save_file(model.state_dict(), folder / "micro.safetensors")
    rng = np.random.default_rng(0)
    names = rng.choice(imagenet.wnids(), 70, replace=False)
    for number, name in enumerate(names):
        path = folder / "imagenet" / "val" / name / f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        sets.write_picture(path, int(rng.integers(1000)))
    next((folder / "imagenet" / "val").rglob("*00009.JPEG")).write_bytes(b"damaged")
    (folder / "micro.yaml").write_text(
        CONFIG.replace("BATCH_SIZE: 64", "BATCH_SIZE: 8").replace(
            "NAME: colour_reader", "NAME: dat_micro, ARGS: {stages: [L, S, D, D]}"
        )
    )
    classes = folder / "classes.txt"
    classes.write_text("\n".join(imagenet.wnids()))
    return [
        *("--cfg", str(folder / "micro.yaml"), "--data-path", str(folder / "imagenet")),
        *("--eval", "--pretrained", str(folder / "micro.safetensors")),
        *("--sets", str(trees / "sets"), "--only", "val,a"),
        *("--opts", "TEST.SKIP_BAD", "True", "DATA.CLASS_LIST", str(classes)),
        *("TEST.SAVE_LOGITS", "True"),
    ]


def contents(folder):
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    record = json.loads(files.pop("evaluation.json"))
    for key in ("date", "command"):
        del record[key]
    del record["environment"]["world_size"]
    return files, record


def test_predictions_have_the_same_bytes_on_1_and_3_processes(micro, tmp_path):
    for processes in (1, 3):
        out = tmp_path / str(processes)
        assert run_group(processes, [*micro, "--out", str(out)]) == [0] * processes
    one = contents(tmp_path / "1")
    assert {"val.csv", "a.csv", "a-clean.csv", "val.logits.npy", "scores.md"} <= one[0].keys()
    assert one == contents(tmp_path / "3")


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run: (folder, data, command line)."""
    folder = tmp_path_factory.mktemp("run")
    images = write_image_folder(folder / "data")
    argv = arguments(folder, images)
    assert main.main(argv) == 0
    return folder / "dat_micro" / "run", images, argv


def test_a_run_keeps_the_predictions_of_model_and_ema(run, capsys):
    path, _, argv = run
    capsys.readouterr()
    assert main.main([*argv, "--eval"]) == 0
    plain = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert plain["changes"] == []
    assert not (path / "eval").exists()
    sets_folder = path.parent / "sets"
    names = [f"class_{i}" for i in range(4)]
    sets.write_corruptions(sets_folder / "own-c", names, [0] * 4, {}, ["fog"])
    assert main.main([*argv, "--eval", "--sets", str(sets_folder), "--only", "val,c"]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    step = plain["weights"].rpartition("-")[2]
    for kind, result in zip(("model", "ema"), record["results"], strict=True):
        rows = read_predictions(path / "eval" / f"{step}-{kind}" / "val.csv")
        assert int(rows.right.sum()) == plain[kind]["top1"] == row(result, "val")["right"]
        assert int(rows.right5.sum()) == plain[kind]["top5"]
        assert rows.nll.mean() == pytest.approx(plain[kind]["loss"], rel=1e-5)
        assert "mce" not in result["corruptions"]  # AlexNet's errors are ImageNet's
        assert result["corruptions"]["errors"].keys() == {"fog"}


def test_what_differs_from_the_run_is_listed_and_recorded(run, tmp_path, capsys):
    _, images, argv = run
    other = shutil.copytree(images, tmp_path / "data")
    next((other / "val").rglob("*.jpg")).unlink()
    argv = [*argv, "--eval", "--out", str(tmp_path / "out"), "--amp-dtype", "bfloat16"]
    argv[argv.index("--data-path") + 1] = str(other)
    capsys.readouterr()
    changed = ("--opts", "TEST.CROP_MODE", "center", "DATA.MEAN", "[0.5,0.5,0.5]")
    assert main.main([*argv, *changed]) == 0
    text = capsys.readouterr().out
    for name in ("TEST.CROP_MODE was squash, is center", "DATA.MEAN", "AMP_DTYPE", "val_data"):
        assert f"Differs from the run's own evaluation: {name}" in text
    assert text.index("Differs from the run") < text.index("val: 15 images")
    (folder, _) = sorted((tmp_path / "out").iterdir())
    changes = read_evaluation(folder).environment["changes"]
    assert {change.split(" was ")[0] for change in changes} == {
        *("DATA.MEAN", "AMP_DTYPE", "TEST.CROP_MODE", "val_data"),
    }


def test_what_differs_is_listed_for_weights_of_a_run_too(run, tmp_path, capsys):
    folder, _, argv = run
    best = checkpoint.resolve(folder, best=True)
    file = best / "model.safetensors"
    argv = [*argv, "--eval", "--opts", "DATA.MEAN", "[0.5,0.5,0.5]"]
    for named in (folder, best, file):
        assert main.main([*argv, "--pretrained", str(named)]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["weights"] == str(file)
        (change,) = record["changes"]
        assert change.startswith("DATA.MEAN was [0.485")
        assert record["pixels"]["mean"] == [0.5, 0.5, 0.5]
    assert main.main([*argv, "--pretrained", str(folder), "--out", str(tmp_path / "out")]) == 0
    evaluation = read_evaluation(tmp_path / "out")
    assert evaluation.environment["changes"] == [change]
    assert evaluation.weights["sha256"] == hash_weights(file)


def test_with_a_holdout_val_is_what_was_held_out(run, tmp_path, capsys):
    _, images, argv = run
    holdout = ("--opts", "DATA.HOLDOUT", "0.4", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    argv = [*argv, "--tag", "holdout"]
    argv += [*holdout, "TRAIN.GLOBAL_BATCH_SIZE", "12"]
    assert main.main(argv) == 0
    capsys.readouterr()
    assert main.main([*argv, "--eval", "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    found = row(record["results"][0], "val")
    assert found["note"] == "held out of train, DATA.HOLDOUT 0.4"
    names = set(read_predictions(sorted(tmp_path.glob("*-model"))[0] / "val.csv").file)
    train = {str(p.relative_to(images / "train")) for p in (images / "train").rglob("*.jpg")}
    assert names < train
