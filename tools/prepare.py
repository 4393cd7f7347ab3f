#!/usr/bin/env python
"""Where does the demo's data come from? scikit-learn's handwritten digits as JPEG files in ImageNet's layout.

python tools/prepare.py output/digits
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 32  # pixels a side, from the original 8


def write_digits(root: Path) -> None:
    """Write 1,442 training images and 355 for validation, every fifth of a class, as `root`/<split>/<digit>/*.jpg."""
    images, labels = load_digits(return_X_y=True)
    seen = [0] * 10
    for pixels, label in zip(images.reshape(-1, 8, 8), labels, strict=True):
        split = "val" if seen[label] % 5 == 4 else "train"
        file = root / split / str(label) / f"{seen[label]:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        gray = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        gray.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, quality=95)
        seen[label] += 1
    print(f"{sum(seen)} images of handwritten digits are in {root}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder to write train and val into")
    write_digits(parser.parse_args().root)
