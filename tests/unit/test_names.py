"""Name table of archives: used like an array, and as small as the names."""

import numpy as np
from helpers.images import write_image_folder, write_zip

from data.names import Names
from data.readers import open_split

LIST = [b"a/1.jpg", b"a/22.jpg", b"b/1.jpg", b"b/" + b"x" * 50 + b".jpg"]


def test_it_is_used_like_an_array():
    names, array = Names(LIST), np.array(LIST, np.bytes_)
    assert len(names) == 4
    assert list(names) == names.tolist() == array.tolist() == LIST
    assert [names[-1], names[np.int64(1)]] == [LIST[-1], LIST[1]]
    assert names[1:3].tolist() == LIST[1:3]
    assert names[range(0, 4, 2)].tolist() == LIST[::2]
    assert names[np.array([True, False, False, True])].tolist() == [LIST[0], LIST[3]]
    assert np.array_equal(names, array)
    assert Names([]).tolist() == []


def test_one_long_name_costs_no_more_than_its_length(tmp_path):
    root = write_image_folder(tmp_path / "set", classes=2, train=50, val=1)
    image = root / "train" / "class_0" / "000.jpg"
    packed = tmp_path / "packed"
    packed.mkdir()
    write_zip(root / "train", packed / "train.zip")
    import zipfile

    with zipfile.ZipFile(packed / "train.zip", "a") as archive:
        archive.writestr(f"class_0/{'x' * 60_000}.jpg", image.read_bytes())
    reader = open_split(packed, "train")
    assert len(reader.names) == 101
    assert reader.names.nbytes < 70_000
    assert reader.class_ranges() == {"class_0": (0, 51), "class_1": (51, 101)}
    assert reader.read(50) == image.read_bytes()
