"""scikit-learn's handwritten digits as 32×32 JPEGs: 1,442 for training, 355 for validation."""

import io
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from tools.datasets.raw_dataset import Part, RawDataset, RawImage

SIZE = 32  # pixels a side, from the original 8


class Digits(RawDataset):
    """The images that scikit-learn brings along; every fifth of a class is for validation."""

    classes = tuple("0123456789")
    counts: Mapping[str, int] = {"train": 1442, "val": 355}

    def parts(self, split: str) -> Iterator[Part]:
        """The split as one part."""
        yield Part(split, self.counts[split], _images(split))


def _images(split: str) -> Iterator[RawImage]:
    # It takes seconds to import, which the other datasets do without.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    seen = [0] * 10
    for pixels, label in zip(images.reshape(-1, 8, 8), labels, strict=True):
        if split == ("val" if seen[label] % 5 == 4 else "train"):
            gray = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
            buffer = io.BytesIO()
            gray.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
            yield RawImage(str(label), f"{seen[label]:03d}.jpg", buffer.getvalue())
        seen[label] += 1
