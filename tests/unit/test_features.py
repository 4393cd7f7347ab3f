import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.images import write_image_folder, write_zip
from PIL import Image

import models
from data.decode import decode_pixels
from tools import features

CONFIG = """
AMP_DTYPE: float32
DATA: {BATCH_SIZE: 8, IMG_SIZE: 32}
MODEL: {NAME: dat_micro, NUM_CLASSES: 10}
TEST: {CROP_PCT: 1.0}
"""


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A folder with images, an untrained model's weights, and the flags that name it."""
    folder = tmp_path_factory.mktemp("features")
    write_image_folder(folder / "data", classes=3, train=6, val=3)
    torch.manual_seed(0)
    model = models.build("dat_micro", num_classes=10, img_size=32, drop_path_rate=0.0).eval()
    safetensors.torch.save_file(model.state_dict(), folder / "w.safetensors")
    (folder / "micro.yaml").write_text(CONFIG)
    flags = ["--cfg", str(folder / "micro.yaml"), "--pretrained", str(folder / "w.safetensors")]
    for split in ("train", "val"):
        out = str(folder / f"{split}.npz")
        assert features.main(["extract", str(folder / "data" / split), "--out", out, *flags]) == 0
    return folder, model, flags


def test_features_are_what_the_last_layer_reads(trees):
    folder, model, _ = trees
    found = features.read(folder / "val.npz")
    assert found.features.shape == (9, 256)
    assert found.features.dtype == np.float32
    assert found.classes == ["class_0", "class_1", "class_2"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    path = folder / "data" / "val" / found.files[4]
    picture = Image.fromarray(decode_pixels(path.read_bytes()).numpy()).resize((32, 32), 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = (torch.from_numpy(np.array(picture)) / 255 - mean) / std
    with torch.no_grad():
        logits = model(values.permute(2, 0, 1)[None])[0]
        by_features = model.head.fc(torch.from_numpy(found.features[4]))
    torch.testing.assert_close(by_features, logits, rtol=1e-3, atol=1e-3)


def test_archives_and_loose_pictures_are_read_too(trees, tmp_path):
    folder, _, flags = trees
    write_zip(folder / "data" / "val", tmp_path / "val.zip")
    out = tmp_path / "zip.npz"
    assert features.main(["extract", str(tmp_path / "val.zip"), "--out", str(out), *flags]) == 0
    expected = features.read(folder / "val.npz")
    assert (features.read(out).features == expected.features).all()
    loose = folder / "data" / "val" / "class_1"
    assert features.main(["extract", str(loose), "--out", str(out), *flags]) == 0
    found = features.read(out)
    assert found.labels.tolist() == [-1, -1, -1]
    np.testing.assert_allclose(found.features, expected.features[3:6], rtol=1e-4, atol=1e-4)


def test_damaged_images_are_named_and_left_out(trees, tmp_path, capsys):
    _, _, flags = trees
    write_image_folder(tmp_path, classes=2, train=1, val=2)
    (tmp_path / "val" / "class_0" / "000.jpg").write_bytes(b"no picture")
    out = tmp_path / "val.npz"
    assert features.main(["extract", str(tmp_path / "val"), "--out", str(out), *flags]) == 0
    assert features.read(out).labels.tolist() == [0, 1, 1]
    assert "class_0/000.jpg cannot be read" in capsys.readouterr().err


def test_a_missing_folder_is_refused_before_the_work(trees, tmp_path, capsys, monkeypatch):
    folder, _, flags = trees
    monkeypatch.delattr(features, "extract")
    argv = ["extract", str(folder / "data" / "val"), *flags]
    assert features.main([*argv, "--out", str(tmp_path / "absent" / "val.npz")]) == 6
    assert "no such folder for --out" in capsys.readouterr().err


def test_colours_are_classified_by_neighbours_and_by_a_probe(trees, capsys):
    folder, _, _ = trees
    pair = [str(folder / "train.npz"), str(folder / "val.npz")]
    assert features.main(["knn", *pair, "-k", "3"]) == 0
    assert features.main(["probe", *pair]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" [")[0] for line in lines] == [
        "k-NN, k 3: top-1 100.00 %",
        "linear probe, C 1: top-1 100.00 %",
    ]
    assert "[70.09, 100.00] of 9 images" in lines[0]  # Wilson's interval of 9 in 9


def make(rows, labels, classes):
    names = [f"{n}.jpg" for n in range(len(labels))]
    return features.Features(np.array(rows, np.float32), np.array(labels), classes, names, "m")


def test_neighbours_vote_with_exponential_weights_of_their_cosine():
    train = make([[1, 0], [0.9, 0.5], [0.9, -0.5]], [0, 1, 1], ["a", "b"])
    test = make([[1, 0]], [0], ["a", "b"])
    # cosines 1, 0.874, 0.874: e^(1/0.07) against 2 e^(0.874/0.07), so one near image outvotes two others.
    assert features.classify_by_neighbours(train, test, 3).tolist() == [True]
    far = make([[1, 0], [0.99, 0.05], [0.99, -0.05]], [0, 1, 1], ["a", "b"])
    assert features.classify_by_neighbours(far, test, 3).tolist() == [False]


def test_test_labels_follow_the_training_classes_by_name(tmp_path):
    features.write(make([[1, 0], [0, 1]], [0, 1], ["ant", "bee"]), tmp_path / "a.npz")
    features.write(make([[0, 1]], [0], ["bee"]), tmp_path / "b.npz")
    _, test = features.read_pair(tmp_path / "a.npz", tmp_path / "b.npz")
    assert test.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make([[1, 0]], [0], ["cow"]), "classes that .* does not have: cow"),
        (make([[1, 0, 0]], [0], ["ant"]), "extract both with one model"),
        (make([[1, 0]], [-1], []), "images without a class"),
    ],
)
def test_features_that_do_not_belong_together_are_refused(tmp_path, capsys, other, message):
    features.write(make([[1, 0], [0, 1]], [0, 1], ["ant", "bee"]), tmp_path / "a.npz")
    features.write(other, tmp_path / "b.npz")
    with pytest.raises(features.DataError, match=message):
        features.read_pair(tmp_path / "a.npz", tmp_path / "b.npz")


def test_impossible_requests_are_refused(trees, tmp_path, capsys):
    folder, _, flags = trees
    pair = [str(folder / "train.npz"), str(folder / "val.npz")]
    assert features.main(["knn", *pair, "-k", "19"]) == 2
    assert features.main(["probe", *pair, "-c", "0"]) == 2
    assert features.main(["knn", str(folder / "w.safetensors"), pair[1]]) == 3
    out = str(tmp_path / "x.npy")
    assert features.main(["extract", str(folder / "data/val"), "--out", out, *flags]) == 2
    assert features.main(["extract", str(tmp_path / "no"), "--out", f"{out[:-1]}z", *flags]) == 3


@pytest.mark.parametrize("size", [0, 100, -30])
def test_damaged_files_are_refused(trees, tmp_path, size):
    content = (trees[0] / "val.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:size])
    with pytest.raises(features.DataError, match=r"cut\.npz: not a file of features"):
        features.read(tmp_path / "cut.npz")


def test_features_that_are_not_finite_are_refused(trees, tmp_path, capsys, monkeypatch):
    folder, _, flags = trees
    features.write(make([[1, 0], [np.nan, 1]], [0, 1], ["ant", "bee"]), tmp_path / "a.npz")
    with pytest.raises(features.DataError, match=r"a\.npz: has features that are not finite"):
        features.read_pair(tmp_path / "a.npz", tmp_path / "a.npz")
    monkeypatch.setattr(features, "pooled_head", lambda model: lambda x: x.mean((2, 3)) / 0)
    argv = ["extract", str(folder / "data" / "val"), "--out", str(tmp_path / "b.npz"), *flags]
    assert features.main(argv) == 5
    message = "the features of 9 of 9 images are not finite, first class_0/000.jpg"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.npz").exists()


def test_a_probe_needs_images_of_two_classes(tmp_path, capsys):
    features.write(make([[1, 0], [0, 1]], [0, 0], ["ant", "bee"]), tmp_path / "a.npz")
    assert features.main(["probe", str(tmp_path / "a.npz"), str(tmp_path / "a.npz")]) == 3
    assert "has images of one class, expected at least two" in capsys.readouterr().err


def test_parquet_holds_the_same(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is optional")
    found = make([[1, 0], [0, 1], [2, 3]], [0, 1, -1], ["ant", "bee"])
    features.write(found, tmp_path / "a.parquet")
    back = features.read(tmp_path / "a.parquet")
    assert (back.features == found.features).all()
    assert back.labels.tolist() == [0, 1, -1]
    assert (back.classes, back.files, back.model) == (found.classes, found.files, "m")
