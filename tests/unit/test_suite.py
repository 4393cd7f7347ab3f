import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import sets
from helpers.evaluations import add_set, random_logits, write_evaluation
from helpers.images import write_tar, write_zip
from helpers.pipeline import image_dataset
from helpers.sets import WNIDS
from scipy import special

import data
from analysis import imagenet, statistics, suite_table
from analysis.collector import Collector, View, extend_evaluation, format_rows
from analysis.predictions import column_names, read_evaluation, read_predictions
from engine import suite
from utils.errors import ConfigError, DataError, DivergedError

CPU = torch.device("cpu")


def open_dataset(root, split, classes, crop, allow_missing):
    return image_dataset(root, split, classes=classes, allow_missing=allow_missing)


def pixels(crop):
    return {"crop_mode": crop, "crop_pct": 1.0, "img_size": 8, "interpolation": "bicubic"}


def opener(root=None, val_subset=False):
    def open_val(classes):
        return open_dataset(root, "val", classes, "own", val_subset)

    return suite.OpenDataset(open_dataset, open_val, pixels, val_subset, holdout=0.0)


def find(folder, name):
    return suite.find_sets(folder, None, suite.parse_only(name))


def open_only(folder, name, classes=WNIDS):
    return suite.open_sets(find(folder, name), classes, opener())


# --- Collector ------------------------------------------------------------------------------------


def collect(view, logits, labels, readable=None, order=None, keep_logits=False):
    """The rows of `view` after batches of 3 images in some order."""
    collector = Collector(view, labels, logits.shape[1], CPU, keep_logits=keep_logits)
    order = torch.arange(len(labels)) if order is None else order
    readable = torch.ones(len(labels), dtype=torch.bool) if readable is None else readable
    for batch in order.split(3):
        collector.add(logits[batch], readable[batch], batch)
    count = len(collector.labels)
    return collector, *collector.gather([f"{i}.jpg" for i in range(count)])


@pytest.fixture
def logits():
    return 3 * torch.randn(10, 8, generator=torch.Generator().manual_seed(0))


LABELS = np.array([3, 1, 4, 1, 5, 2, 6, 5, 3, 5], dtype=np.int32)


def test_rows_are_the_textbook_values_of_softmax(logits):
    _, rows, _ = collect(View("x"), logits, LABELS)
    p = special.softmax(logits.numpy().astype(float), axis=1)
    onehot = np.eye(8)[LABELS]
    order = np.argsort(-p, axis=1)
    assert (rows.top == order[:, :5]).all()
    assert (rows.rank == 1 + np.argmax(order == LABELS[:, None], axis=1)).all()
    for found, expected in (
        (rows.p, p[range(10), LABELS]),
        (rows.top_p, -np.sort(-p)[:, :5]),
        (rows.nll, -np.log(p[range(10), LABELS])),
        (rows.brier, ((p - onehot) ** 2).sum(1)),
        (rows.entropy, special.entr(p).sum(1)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_order_of_batches_does_not_change_a_byte(logits):
    collector, rows, _ = collect(View("x"), logits, LABELS)
    _, shuffled, _ = collect(View("x"), logits, LABELS, order=torch.randperm(10))
    assert format_rows(rows, 8) == format_rows(shuffled, 8)
    assert format_rows(rows, 8).splitlines()[0] == ",".join(column_names(8, False))
    assert collector.competing == 8


def test_masked_classes_never_compete_and_full1_is_the_argmax_of_all(logits):
    kept = [1, 3, 5, 6]
    images = np.flatnonzero(np.isin(LABELS, kept))
    _, rows, _ = collect(View("x", images, kept), logits, LABELS)
    own = logits.numpy().astype(float)[images]
    p = special.softmax(own[:, kept], axis=1)
    assert (rows.label == LABELS[images]).all()
    assert (rows.top == np.array(kept)[np.argsort(-p, axis=1)]).all()
    assert rows.top.shape == (len(images), 4)
    place = [kept.index(label) for label in rows.label]
    np.testing.assert_allclose(rows.p, p[range(len(place)), place], rtol=1e-12)
    assert (rows.full1 == own.argmax(1)).all()


def test_pooled_classes_have_their_largest_logit(logits):
    pooled = [[0, 7], [2], [3, 4, 5]]
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    view = View("x", pooled=pooled, classes=["a", "b", "c"])
    _, rows, kept = collect(view, logits, labels, keep_logits=True)
    pooled_logits = np.stack([logits[:, ids].amax(1).numpy() for ids in pooled], axis=1)
    assert (rows.top[:, 0] == pooled_logits.argmax(1)).all()
    owner = {index: i for i, ids in enumerate(pooled) for index in ids}
    assert rows.full1.tolist() == [owner.get(i, -1) for i in logits.argmax(1).tolist()]
    assert (kept == pooled_logits.astype(np.float16)).all()


def test_an_unreadable_image_is_an_empty_row(logits):
    readable = torch.arange(10) != 2
    collector, rows, kept = collect(View("x"), logits, LABELS, readable, keep_logits=True)
    assert rows.rank[2] == 0
    assert rows.readable.sum() == 9
    assert (kept[2] == 0).all()
    assert format_rows(rows, collector.competing).splitlines()[3] == "2.jpg,4,0" + "," * 14


def test_equal_logits_rank_the_label_where_topk_puts_it():
    logits = torch.zeros(4, 8)
    _, rows, _ = collect(View("x"), logits, np.array([0, 3, 6, 7]))
    for row in range(4):
        place = np.flatnonzero(rows.top[row] == rows.label[row])
        assert rows.rank[row] == (place[0] + 1 if len(place) else 6)


def test_logits_that_are_no_numbers_are_refused_with_the_image(logits):
    logits[4, 2] = torch.nan
    with pytest.raises(DivergedError, match=r"1 of 10 images are not finite, first 4\.jpg"):
        collect(View("x"), logits, LABELS)


def test_names_with_carriage_returns_are_read_as_they_were_written(tmp_path):
    for name in ("cat\r/a.jpg", "cat\r/b\r\nc.jpg", "dog/d.jpg"):
        sets.write_picture(tmp_path / "val" / name, 0)
    dataset = image_dataset(tmp_path, "val")
    files = [suite.file_name(dataset, index) for index in range(3)]
    assert files == [r"cat\x0d/a.jpg", "cat\\x0d/b\\x0d\nc.jpg", "dog/d.jpg"]
    folder = write_evaluation(tmp_path / "a", dataset.classes)
    add_set(folder, "val", *random_logits(3, 2), files=files)
    assert read_predictions(folder / "val.csv").file == files


def test_weights_that_lie_elsewhere_are_the_same(tmp_path):
    now = read_evaluation(write_evaluation(tmp_path / "a", ["cat", "dog"]))
    moved = replace(now, weights={**now.weights, "path": "elsewhere/model.safetensors"})
    assert extend_evaluation(moved).weights == moved.weights
    other = replace(now, weights={**moved.weights, "sha256": "1" * 64})
    with pytest.raises(DataError, match=r"differs in weights\.sha256\. Give"):
        extend_evaluation(other)


# --- Find -----------------------------------------------------------------------------------------


def test_sets_are_found_under_the_names_in_circulation(tmp_path, caplog):
    names = {
        "v2-matched-frequency": "imagenetv2-matched-frequency-format-val",
        "v2-threshold-0.7": "ImageNetV2_threshold0.7",
        "v2-top-images": "imagenetv2-c-12",
        "a": "ImageNet-A",
        "r": "imagenet-r",
        "sketch": "ImageNet-Sketch",
        "objectnet": "objectnet-1.0",
    }
    for folder in names.values():
        (tmp_path / folder).mkdir()
    (tmp_path / "cifar10-c" / "fog" / "3").mkdir(parents=True)
    found = suite.find_sets(tmp_path, None, suite.GROUPS)
    assert {row.test_set.name for row in found} == {*names, "c"}
    assert {row.root / row.split for row in found if row.test_set.name in names} == {
        tmp_path / folder / ("images" if folder.startswith("object") else "")
        for folder in names.values()
    }


def test_archives_are_found_and_compressed_ones_named(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(suite.logger, "info", lines.append)
    (tmp_path / "imagenet-r.zip").touch()
    (tmp_path / "imagenet-a.tar.gz").touch()
    found = find(tmp_path, "a,r")
    assert [(row.test_set.name, row.split) for row in found] == [("r", "imagenet-r")]
    assert "Missing ImageNet-A: imagenet-a.tar.gz is compressed, unpack it" in lines


@pytest.mark.parametrize(
    ("only", "message"), [("sketches", "did you mean 'sketch'"), ("a,cc", "no test set 'cc'")]
)
def test_unknown_sets_are_refused_by_name(only, message):
    with pytest.raises(ConfigError, match=message):
        suite.parse_only(only)


def test_real_and_x_need_the_pass_over_val():
    assert suite.parse_only("real,x") == ["val", "val"]


def test_a_set_that_lies_there_twice_is_refused(tmp_path):
    for name in ("imagenet-a", "ImageNet-A.zip"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"ImageNet-A and imagenet-a are both ImageNet-A"):
        find(tmp_path, "a")


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds none of the test sets"):
        find(tmp_path, "")
    with pytest.raises(DataError, match="no such folder"):
        find(tmp_path / "x", "")


# --- Labels ---------------------------------------------------------------------------------------


def names_of(one, classes=WNIDS):
    """Folder -> class of each image."""
    owners = [name.decode().split("/")[0] for name in one.dataset.reader.names.tolist()]
    return {owner: classes[label] for owner, label in zip(owners, one.dataset.labels, strict=True)}


def test_numbered_folders_of_v2_are_positions_of_sorted_wnids(tmp_path):
    numbers = [str(i) for i in range(1000)]
    sets.write_classes(tmp_path / "imagenetv2-top-images", numbers, [0] * 1000)
    expected = dict(zip(numbers, WNIDS, strict=True))
    (one,) = open_only(tmp_path, "v2")
    assert names_of(one) == expected
    shuffled = [*reversed(WNIDS)]  # a checkpoint's own order of the same classes
    (one,) = open_only(tmp_path, "v2", shuffled)
    assert names_of(one, shuffled) == expected


def test_numbered_folders_are_translated_for_all_1000_of_v2_alone(tmp_path):
    numbers = [str(i) for i in range(1000) if i != 700]
    sets.write_classes(tmp_path / "imagenetv2-top-images", numbers, [0] * 999)
    sets.write_classes(tmp_path / "sketch", [*numbers, "700"], [0] * 1000)
    with pytest.raises(DataError, match=r"999 numbered class folders, .*missing 700"):
        open_only(tmp_path, "v2")
    with pytest.raises(DataError, match="not in the class list of 1000"):
        open_only(tmp_path, "sketch")


def test_a_set_of_999_classes_is_refused(tmp_path):
    sets.write_classes(tmp_path / "sketch", WNIDS[:-1], [0] * 999)
    with pytest.raises(DataError, match=f"no folder for {WNIDS[-1]}"):
        open_only(tmp_path, "sketch")


def test_a_has_its_200_classes_and_no_other(tmp_path):
    own = imagenet.subset_wnids("a")
    sets.write_classes(tmp_path / "imagenet-a", own, [0] * 200)
    (one,) = open_only(tmp_path, "a")
    assert [WNIDS[index] for index in one.views[0].kept] == own
    sets.write_classes(tmp_path / "imagenet-r", own, [0] * 200)
    with pytest.raises(DataError, match="200 class folders, expected ImageNet-R's 200"):
        open_only(tmp_path, "r")


def test_other_class_lists_are_refused_by_name(tmp_path):
    sets.write_classes(tmp_path / "sketch", WNIDS, [0] * 1000)
    with pytest.raises(DataError, match=r"ImageNet-Sketch: .*the weights know 2 others \(cat, dog"):
        open_only(tmp_path, "sketch", ["cat", "dog"])


def test_corruptions_of_own_classes_are_evaluated(tmp_path):
    sets.write_corruptions(tmp_path / "pets-c", ["cat", "dog"], [0, 1], {})
    passes = open_only(tmp_path, "c,c-extra", ["cat", "dog"])
    assert len(passes) == 95
    assert passes[0].views[0].name == "c-gaussian_noise-1"
    assert {one.pixels["crop_mode"] for one in passes} == {"none"}


def test_corruptions_may_lie_in_archives(tmp_path):
    sets.write_corruptions(tmp_path / "all", ["cat", "dog"], [0, 1], {})
    cells = tmp_path / "imagenet-c" / "fog"
    cells.mkdir(parents=True)
    write_zip(tmp_path / "all" / "fog" / "2", cells / "2.zip")
    write_tar(tmp_path / "all" / "fog" / "5", cells / "5.tar")
    passes = open_only(tmp_path, "c", ["cat", "dog"])
    assert [one.views[0].name for one in passes] == ["c-fog-2", "c-fog-5"]


def test_a_cell_that_lacks_images_is_refused(tmp_path):
    tree = tmp_path / "pets-c"
    sets.write_corruptions(tree, ["cat", "dog"], [0, 1], {}, ("fog",))
    for info in ({}, {"images": 2}):  # of an older version, and complete
        (tree / suite.CORRUPT_INFO).write_text(json.dumps(info))
        passes = open_only(tmp_path, "c", ["cat", "dog"])
        assert [one.note for one in passes] == ["generated by tools/corrupt.py"] * 5
    (tree / suite.CORRUPT_INFO).write_text('{"images": 3}')
    with pytest.raises(DataError, match=r"fog/1: 2 of 3 images; run the same tools/corrupt\.py"):
        open_only(tmp_path, "c", ["cat", "dog"])


def test_objectnet_is_read_with_its_own_mapping(tmp_path):
    sets.write_objectnet(tmp_path / "objectnet-1.0")
    (one,) = open_only(tmp_path, "objectnet")
    (view,) = one.views
    assert view.classes == ["bottle", "chair", "mug"]
    assert view.pooled == [[440], [423, 559], [504]]
    assert len(one.dataset) == 3  # the spoon is no class of ImageNet's
    assert [one.dataset.path(i).split("/")[-2] for i in range(3)] == view.classes
    assert [one.dataset[i].label for i in range(3)] == [0, 1, 2]
    (tmp_path / "objectnet-1.0/mappings/imagenet_to_label_2012_v2").write_text("one\n")
    with pytest.raises(DataError, match="cannot be read as ObjectNet's mappings"):
        open_only(tmp_path, "objectnet")


def test_names_of_some_val_images_alone_are_refused(tmp_path):
    sets.write_val(tmp_path)
    number = 5
    path = tmp_path / "val" / WNIDS[4] / f"ILSVRC2012_val_{number:08d}.JPEG"
    path.rename(path.with_name("cat.JPEG"))
    found = suite.find_sets(None, tmp_path, ["val"])
    with pytest.raises(DataError, match="1 of 1000 files are not named ILSVRC2012_val"):
        suite.open_sets(found, WNIDS, opener(tmp_path))
    assert suite.open_sets(found, WNIDS, opener(tmp_path, val_subset=True))


# --- Measures -------------------------------------------------------------------------------------


def test_class_lists_agree_with_timms_indices():
    for letter in "ar":
        own = imagenet.subset_wnids(letter)
        assert len(own) == 200
        assert own == sorted(own)
        assert set(own) <= set(WNIDS)


def test_real_labels_are_joined_by_name_and_follow_the_class_list():
    files = [f"x/ILSVRC2012_val_{n:08d}.JPEG" for n in (3, 1)]
    labels = imagenet.real_labels(files, WNIDS)
    assert labels == imagenet.real_labels(files[::-1], WNIDS)[::-1]
    backwards = imagenet.real_labels(files, WNIDS[::-1])
    assert [[999 - i for i in row] for row in backwards] == labels
    with pytest.raises(DataError, match=r"no labels for 1 of 3 images, such as cat\.jpg"):
        imagenet.real_labels([*files, "cat.jpg"], WNIDS)


def test_real_counts_what_the_sheet_says():
    files = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 50_001)]
    labels = imagenet.real_labels(files, WNIDS)
    counts = [len(row) for row in labels]
    assert counts.count(0) == 3163
    assert sum(count > 1 for count in counts) == 7443
    assert sum(counts) == 57_553


def test_real_hits_take_any_label_among_the_first_k():
    top = np.array([[1, 2, 3], [4, 5, 6]])
    hits = imagenet.real_hits([[3, 2], [9]], top)
    assert hits.tolist() == [[False, True, True], [False, False, False]]


def test_mean_corruption_error_by_hand():
    # ResNet-50's CE of each corruption in the paper; its mCE is 76.7, the row is rounded.
    ces = [80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77]
    alexnet = list(imagenet.ALEXNET_ERRORS.values())
    errors = np.array([[c / 100 * e] * 5 for c, e in zip(ces, alexnet, strict=True)])
    reference = np.array(alexnet)
    ce = statistics.corruption_errors(errors, reference)
    assert 100 * ce.mean() == pytest.approx(76.87, abs=0.01)
    relative = statistics.relative_corruption_errors(
        errors, 0.2385, reference, imagenet.ALEXNET_CLEAN_ERROR
    )
    # 105.4 with the clean error subtracted at every severity; 79.6 if it were subtracted once.
    assert 100 * relative.mean() == pytest.approx(105.4, abs=0.3)


def test_factors_are_errors_relative_to_all(tmp_path):
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 5)]
    lines = [
        {"file_name": name, "class": 0, "pose": int(n < 2), "texture": int(n == 3)}
        for n, name in enumerate(names)
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = imagenet.read_factors(path)
    assert found[0] == ["pose", "texture"]
    right = np.array([False, True, True, False])
    ratios = imagenet.factor_error_ratios(*found, [f"n/{name}" for name in names], right)
    assert ratios == {"pose": {"images": 2, "ratio": 1.0}, "texture": {"images": 1, "ratio": 2.0}}
    path.write_text("{}\n")
    with pytest.raises(DataError, match="ImageNet-X"):
        imagenet.read_factors(path)


def test_permuted_labels_are_explained():
    text = suite.permuted_labels("v2-top-images", 0.1, 80.0)
    for cause in ("sorted as text", "200 folders of a subset", "flat folder"):
        assert cause in text


def test_a_table_aligns():
    lines = suite_table.format_table(["a", "bb"], [["ccc", "d"]])
    assert lines == ["| a   | bb |", "| --- | -- |", "| ccc | d  |"]


def test_the_table_has_the_columns_that_its_sets_need():
    row = {
        **{"set": "val", "images": 10, "top1": 50.0, "interval": [20.0, 80.0], "top5": 90.0},
        **{"ece": 3.25, "nll": 1.5, "unreadable": 0, "crop": "squash 0.875, 32 px", "note": ""},
    }
    result = {"model": "m", "rows": [row], "corruptions": None, "factors": None}
    own = suite_table.markdown([result])
    assert "| ECE (%) | NLL " in own
    assert "all 1000" not in own
    assert "clean" not in own
    masked = row | {"set": "a", "all_classes": 40.0, "clean": 70.0, "gap": 20.0}
    assert "70.00 (+20.00)" in suite_table.markdown([result | {"rows": [row, masked]}])
    errors = {"errors": {"fog": [1.0] * 5}, "further": {}, "mean_error": 1.0}
    errors |= {"further_mean_error": None, "crop": "squash 1, 32 px", "note": ""}
    alone = suite_table.markdown([result | {"rows": [], "corruptions": errors}])
    assert alone.startswith("Corruptions, m")


def test_the_border_is_cut_before_anything_else():
    seen = []
    cut = suite.WithoutBorder(lambda picture: seen.append(tuple(picture.shape)), 2)
    cut(torch.zeros(10, 12, 3, dtype=torch.uint8))
    cut(torch.zeros(1, 12, 3, dtype=torch.uint8))
    assert seen == [(6, 8, 3), (1, 12, 3)]


def test_corrupted_pictures_of_the_right_size_are_not_resized():
    noise = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    keep = partial(data.eval_transform, 32, interpolation="bicubic", **suite.CROPS["none"])
    for exact in (True, False):
        assert (keep(exact=exact)(noise) == noise.permute(2, 0, 1)).all()
