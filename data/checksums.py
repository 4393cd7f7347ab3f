"""What should the bytes of each image be? As the index of tools/doctor.py says, by their SHA-256."""

import json
import os
from pathlib import Path

import numpy as np

from utils.errors import DataError

REMEDY = "make it with tools/doctor.py --sha, or leave DATA.VERIFY empty"


def read_checksums(path: str | Path, split: str, names: list[bytes]) -> np.ndarray:
    """SHA-256 of each image of `split` in `names`, uint8 [N, 32].

    Raises DataError if the index cannot be read or does not know an image.
    """
    position = {os.fsdecode(name): index for index, name in enumerate(names)}
    checksums = np.zeros((len(names), 32), dtype=np.uint8)
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                if record["split"] == split and "sha256" in record:
                    index = position.pop(record["name"], None)
                    if index is not None:
                        checksums[index] = np.frombuffer(bytes.fromhex(record["sha256"]), np.uint8)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read as an index ({error.strerror}); {REMEDY}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an index of images ({error}); {REMEDY}") from error
    if position:
        raise DataError(
            f"{path}: has no SHA-256 of {len(position)} of the {len(names)} {split} images, such as "
            f"{next(iter(position))}; {REMEDY}"
        )
    return checksums
