"""Pictures and models for the tools that show attention."""

import argparse
from pathlib import Path

from torch import Tensor

from analysis.recording import can_record
from data.decode import UNREADABLE, decode_pixels
from tools.common.classifier import Classifier, at_size, load_classifier
from utils.errors import ConfigError, DataError


def load_recordable(args: argparse.Namespace, names: str = "lemma") -> Classifier:
    """The classifier that `args` name, for `args.size`; untrained for a configuration alone.

    Raises ConfigError where its attention cannot be recorded, and what `load_classifier` raises.
    """
    if args.size and args.size < 32:
        raise ConfigError(f"--size {args.size}: expected at least 32 pixels")
    classifier = at_size(load_classifier(args, names, untrained=True), args.size)
    if not can_record(classifier.model):
        raise ConfigError(
            f"{classifier.title}: its attention cannot be recorded; expected a DAT, or a Swin, ViT or PVTv2 of timm"
        )
    return classifier


def read_pixels(classifier: Classifier, path: Path) -> Tensor:
    """The pixels of a picture file, uint8 (height, width, 3). Raises DataError."""
    try:
        return decode_pixels(path.read_bytes(), apply_exif=classifier.apply_exif)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read as an image: {reason}") from None


def parse_point(text: str) -> tuple[float, float]:
    """The text "y,x" as shares of the image."""
    try:
        y, x = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--point {text}: expected y,x such as 0.5,0.5, the centre") from None
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise ConfigError(
            f"--point {text} is outside the image: expected y,x from 0,0, its upper left corner, to 1,1; "
            "divide pixels by the image's height and width"
        )
    return y, x
