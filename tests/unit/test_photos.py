"""Decoding and evaluation of real photographs, which compress and resize unlike noise: equal to Pillow's."""

import numpy as np
import pytest
import torch
from helpers.images import encode
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from data import eval_transform
from data.decode import decode, decode_pixels

# Left, top, right, bottom in 640×427: the photograph, two usual shapes of ImageNet, a tall one, one that is enlarged.
BOXES = [(0, 0, 640, 427), (0, 0, 500, 375), (100, 50, 433, 427), (7, 3, 160, 420), (300, 200, 364, 264)]  # fmt: skip
JPEGS = [
    {"quality": 95, "subsampling": "4:4:4"},
    {"quality": 75, "subsampling": "4:2:0"},
    {"quality": 90, "subsampling": "4:2:2", "progressive": True},
    {"quality": 10, "optimize": True},
]


@pytest.fixture(scope="module")
def photos(photo_files) -> list[Image.Image]:
    return [Image.open(path).convert("RGB").crop(box) for path in photo_files for box in BOXES]


@pytest.mark.parametrize("options", JPEGS, ids=str)
def test_photographs_are_decoded_to_the_same_pixels(options, photos):
    for photo in photos:
        for mode in ("RGB", "L"):
            file = encode(photo.convert(mode), "JPEG", **options)
            np.testing.assert_array_equal(decode_pixels(file).numpy(), np.asarray(decode(file)))


def test_evaluation_of_photographs_is_exact(photos):
    transform = eval_transform(
        224, crop_mode="squash", crop_pct=0.875, interpolation="bicubic", exact=True
    )
    bicubic = Image.Resampling.BICUBIC
    for photo in photos:
        squashed = photo.resize((256, photo.height), bicubic).resize((256, 256), bicubic)
        expected = v2.functional.center_crop(pil_to_tensor(squashed), 224)
        assert torch.equal(transform(torch.from_numpy(np.array(photo))), expected)
