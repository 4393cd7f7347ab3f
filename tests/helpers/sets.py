"""Small trees of every test set, and a model that reads its answer from an image's colour.

A picture has one colour, which `colour` makes from an index of sorted wnids; `colour_reader` answers with the class of
that index. Accuracies are therefore what the trees say.
"""

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.models import register_model
from torch import nn

from analysis import imagenet

WNIDS = ImageNetInfo().label_names()
STEP = 8  # between two levels of a colour, far more than rounding moves it


def colour(index: int) -> tuple[int, int, int]:
    """The colour that is read as class `index`."""
    return (index % 32 * STEP, index // 32 * STEP, 128)


@functools.cache
def encode_colour(index: int, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour(index)).save(buffer, "PNG")
    return buffer.getvalue()


def write_picture(path: Path, index: int, size: int = 8) -> None:
    """A picture that is read as class `index`; a PNG, whatever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_colour(index, size))


class ColourReader(nn.Module):
    """Logits from the mean colour: largest for its class, falling with the distance of the index."""

    def __init__(self, num_classes: int, sharpness: float = 4.0, nan: int = -1, **ignored):
        super().__init__()
        self.num_classes = num_classes
        self.nan = nan
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.pretrained_cfg = {"architecture": "colour_reader", "classifier": "head"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor([0.5, 0.5, 0.5], device=x.device)
        level = ((x.mean((2, 3)) * mean + mean) * 255 / STEP).round()
        index = level[:, 0] + 32 * level[:, 1]
        classes = torch.arange(self.num_classes, device=x.device)
        distance = index[:, None] - classes
        logits = self.sharpness * (distance == 0) - distance.abs() / 100 + (distance > 0) / 500
        return torch.where(index[:, None] == self.nan, torch.nan, logits)


@register_model
def colour_reader(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
    return ColourReader(**kwargs)


# --- Trees ----------------------------------------------------------------------------------------


def write_val(root: Path, wrong: int = 0, per_class: int = 1) -> None:
    """`root`/val with ILSVRC's names; the first `wrong` classes are read as the class after them."""
    number = 0
    for label, wnid in enumerate(WNIDS):
        for _ in range(per_class):
            number += 1
            path = root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG"
            write_picture(path, label + 1 if label < wrong else label)


def write_classes(folder: Path, names: list[str], answers: list[int]) -> None:
    """A picture for each folder of `names`, read as the class of `answers`."""
    for name, answer in zip(names, answers, strict=True):
        write_picture(folder / name / f"{name}.jpg", answer)


def write_objectnet(root: Path) -> None:
    """Three classes shared with ImageNet, one of two of its classes, and one that is not.

    Right by argmax of 1000: chair and mug; among the shared classes alone also bottle, which is read as class 500.
    """
    names = {"chair": [423, 559], "mug": [504], "bottle": [440]}
    lines = [f"name {number}" for number in range(1000)]  # in another order than the indices
    order = {index: (index * 7) % 1000 for index in range(1000)}
    mappings = root / "mappings"
    mappings.mkdir(parents=True)
    folders = {name: name.title() for name in (*names, "spoon")}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    shared = {
        name.title(): "; ".join(lines[order[index]] for index in indices)
        for name, indices in names.items()
    }
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(order))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    write_classes(root / "images", [*names, "spoon"], [559, 504, 441, 0])


def write_corruptions(
    root: Path,
    names: list[str],
    labels: list[int],
    wrong: dict[str, int],
    corruptions: Sequence[str] = imagenet.CORRUPTIONS + imagenet.EXTRA_CORRUPTIONS,
) -> None:
    """Cells of ImageNet-C: the first `wrong[corruption]` + severity pictures are read as the next class."""
    for corruption in corruptions:
        for severity in imagenet.SEVERITIES:
            count = wrong.get(corruption, 0) + severity
            answers = [(i + 1) % 1000 if n < count else i for n, i in enumerate(labels)]
            write_classes(root / corruption / str(severity), names, answers)
