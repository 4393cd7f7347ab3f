"""Class lists: forms that are read, and folders whose names are the same in another spelling.

pytest tests/unit/test_classes.py
"""

import json
import unicodedata

import pytest
from helpers.images import write_image_folder
from helpers.pipeline import image_dataset as dataset

from analysis import imagenet
from data import read_class_list, same_names
from data.classes import sort_classes
from engine.sanity import class_order_warnings
from utils.errors import DataError
from utils.text import quantity

LISTS = {
    "plain": b"dog\ncat\n",
    "byte order mark": b"\xef\xbb\xbfdog\ncat",
    "Windows": b"dog\r\ncat\r\n",
    "old Mac": b"dog\rcat\r",
    "UTF-16": "dog\r\ncat\r\n".encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + "dog\ncat".encode("utf-16-be"),
    "spaces at the ends": b" dog \n\ncat\t\n\n",
    "JSON list": b'["dog", "cat"]',
    "JSON by label": b'{"1": "cat", "0": "dog"}',
    "JSON by name": b'{"cat": 1, "dog": 0}',
    "JSON with a mark": b"\xef\xbb\xbf" + b'["dog", "cat"]',
}


@pytest.mark.parametrize("content", LISTS.values(), ids=LISTS)
def test_forms_of_a_class_list(tmp_path, content):
    (tmp_path / "list").write_bytes(content)
    assert read_class_list(tmp_path / "list") == ["dog", "cat"]


WNIDS = {
    "synset_words.txt": "n01443537 goldfish, Carassius auratus\nn01440764 tench, Tinca tinca\n",
    "csv": "n01443537,goldfish\nn01440764,tench\n",
    "ids alone": "n01443537\nn01440764\n",
    "imagenet_class_index.json": '{"1": ["n01440764", "tench"], "0": ["n01443537", "goldfish"]}',
}


@pytest.mark.parametrize("text", WNIDS.values(), ids=WNIDS)
def test_lists_of_imagenet_name_the_ids(tmp_path, text):
    (tmp_path / "list").write_text(text, encoding="utf-8")
    assert read_class_list(tmp_path / "list") == ["n01443537", "n01440764"]


def test_words_after_other_names_are_part_of_them(tmp_path):
    (tmp_path / "list").write_text("polar bear\nn01440764 tench\n")
    assert read_class_list(tmp_path / "list") == ["polar bear", "n01440764 tench"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"dog\ncaf\xe9\n", "as UTF-8"),
        ("dog\ncat\n".encode("utf-16-le"), "zero bytes"),
        (b'{"0": "dog", "2": "cat"}', "labels are not 0, 1, 2"),
        (b'["dog", 3]', "not all names are text"),
        (b'["dog", ', "not a class list in JSON"),
        (b"dog\ncat\ndog", "names dog more than once"),
    ],
)
def test_what_is_no_class_list_is_explained(tmp_path, content, words):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_class_list(tmp_path / "list")


# --- Spellings ------------------------------------------------------------------------------------

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture
def root(tmp_path):
    """Three classes of four and two images."""
    return write_image_folder(tmp_path / "set", classes=3, train=4, val=2)


@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
def test_other_unicode_forms_are_the_same_class(root, listed):
    (root / "train/class_1").rename(root / "train" / COMPOSED)
    (root / "val/class_1").rename(root / "val" / DECOMPOSED)
    for split in ("train", "val"):
        data = dataset(root, split, classes=["class_0", listed, "class_2"])
        found = {data.path(i).split("/")[-2]: data[i].label for i in range(len(data))}
        assert {unicodedata.normalize("NFC", name): label for name, label in found.items()} == {
            "class_0": 0, COMPOSED: 1, "class_2": 2
        }  # fmt: skip
    assert same_names([COMPOSED, "a"], ["a", DECOMPOSED])
    assert not same_names(["a"], ["b"])


def test_spaces_at_the_end_of_a_folder_are_no_other_class(root):
    (root / "val/class_1").rename(root / "val/class_1 ")
    assert len(dataset(root, "val", classes=["class_0", "class_1", "class_2"])) == 6


def test_two_folders_of_one_name_are_refused(root):
    (root / "train/class_0").rename(root / "train" / COMPOSED)
    (root / "train/class_1").rename(root / "train" / DECOMPOSED)
    with pytest.raises(DataError, match=r"'cafe\\u0301' and 'caf\\xe9' are two classes"):
        dataset(root)
    with pytest.raises(DataError, match="are two folders of one class; they are one name"):
        dataset(root, classes=[COMPOSED, "class_2"])


def test_capital_letters_are_another_class_and_named(root):
    (root / "val/class_1").rename(root / "val/Class_1")
    with pytest.raises(DataError, match="Class_1 is spelled class_1 there: rename it"):
        dataset(root, "val", classes=["class_0", "class_1", "class_2"])


# --- Order ----------------------------------------------------------------------------------------

NUMBERED = sort_classes(f"class_{i}" for i in range(11))


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (NUMBERED, ["class_10 before class_2"]),
        (sort_classes(map(str, range(1, 1001))), ["WordNet ids, 1 among them"]),
        ([name.upper() for name in imagenet.wnids()], ["WordNet ids, N01440764 among them"]),
        (imagenet.wnids(), []),
        (sort_classes(map(str, range(12))), []),
        (sorted(f"class_{i:02}" for i in range(12)), []),
        (["cat", "dog 2", "fox 10"], []),
    ],
    ids=["text", "devkit", "case", "wnids", "numbers", "zeros", "words"],
)
def test_uncertain_orders_are_named(classes, words):
    warnings = class_order_warnings(classes)
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True)), warnings


def test_numbers_and_their_nouns():
    texts = [
        quantity(3, "epoch"),
        quantity(2, "micro-batch"),
        quantity(1, "epoch"),
        quantity(2, "class"),
        quantity(0, "image"),
        quantity(1442, "image"),
    ]
    assert texts == [
        "3 epochs",
        "2 micro-batches",
        "1 epoch",
        "2 classes",
        "0 images",
        "1,442 images",
    ]


def test_labels_by_json_are_the_order(tmp_path):
    (tmp_path / "list").write_text(json.dumps({str(i): f"c{i}" for i in range(11)}))
    assert read_class_list(tmp_path / "list") == [f"c{i}" for i in range(11)]
