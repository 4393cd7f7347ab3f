"""Distillation: a teacher's logits for the student's images, and the loss that has the student follow them.

Touvron et al. 2021 (DeiT, arXiv 2012.12877), formulas 2 and 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

import models
from engine import checkpoint
from engine.hub_folder import is_hub_folder, read_hub_folder
from engine.pretrained import load_pretrained
from engine.weight_files import find_file, hash_weights, read_weights, warn_if_average_is_better
from models.dat import VARIANTS
from models.identify import identify
from utils.errors import CheckpointError, ConfigError
from utils.logging import logger
from utils.text import compare_names

GIVEN_ARGS = ("num_classes", "img_size", "drop_path_rate")  # of a teacher, decided here

# --- Teacher --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation by which a model's images are normalised, per channel."""

    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Teacher:
    """A trained model, the colours of its images, and their (height, width) if it takes no other."""

    model: nn.Module
    colours: Colours
    img_size: tuple[int, int] | None


def weights_file(path: Path) -> Path:
    """The file of a teacher's weights: `path`, or that of a Hugging Face folder, a checkpoint or a run's best one."""
    if is_hub_folder(path):
        return find_file(path)
    return checkpoint.resolve(path, best=True) / "model.safetensors" if path.is_dir() else path


def fingerprint(path: Path) -> str:
    """SHA-256 of a teacher's weights. Raises CheckpointError where there are none."""
    try:
        return hash_weights(weights_file(path))
    except OSError as error:
        raise CheckpointError(f"DISTILL.TEACHER_PATH {path}: {error.strerror}") from error


def load_teacher(path: Path, name: str, classes: list[str], device: torch.device) -> Teacher:
    """The teacher in a run, checkpoint or Hugging Face folder, or in a file of weights of timm's model `name`.

    Raises CheckpointError for a teacher of other classes than `classes`, or, where it does not name them, of another
    number of them, and ConfigError where `name` is missing or not needed.
    """
    file = weights_file(path)
    if path.is_dir() and name:
        raise ConfigError(
            f"DISTILL.TEACHER_MODEL {name}: {path} says which model it holds; leave it out"
        )
    if is_hub_folder(path):
        found = read_hub_folder(path)
        _require_classes(path, found.classes or classes, classes)
        name, settings = found.name, found.settings
        args = {k: v for k, v in found.model_args.items() if k not in GIVEN_ARGS}
        channels, *size = settings.input_size
        colours = Colours(settings.mean, settings.std)
    elif path.is_dir():
        metadata = checkpoint.read_metadata(file.parent)
        warn_if_average_is_better(file.parent)
        _require_classes(path, metadata["classes"], classes)
        settings, sample = metadata["config"]["MODEL"], metadata["config"]["DATA"]
        name, args, size = settings["NAME"], settings["ARGS"], sample["IMG_SIZE"]
        channels, colours = sample.get("IN_CHANS", 3), Colours(sample["MEAN"], sample["STD"])
    elif name:
        settings = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
        if settings is None:
            _require_model(name)
            raise ConfigError(f"DISTILL.TEACHER_MODEL {name}: timm knows no image size of it")
        args, size, channels = {}, settings.input_size[-1], settings.input_size[0]
        colours = Colours(settings.mean, settings.std)
    else:
        raise ConfigError(
            f"DISTILL.TEACHER_PATH {path} is a file of weights: name its model with DISTILL.TEACHER_MODEL"
        )
    if channels != 3:
        raise ConfigError(
            f"DISTILL.TEACHER_PATH {path}: the teacher takes images of {channels} channel, expected 3"
        )
    model = models.build(name, num_classes=len(classes), img_size=size, drop_path_rate=0, **args)
    if path.is_dir() and not is_hub_folder(path):
        checkpoint.load_strictly(model, file)
    else:
        _load_weights(model, file, name, len(classes))
    logger.info(f"Teacher: {name} of {file}")
    fixed = name not in VARIANTS and timm.get_pretrained_cfg(name).fixed_input_size
    return Teacher(model.to(device), colours, to_2tuple(size) if fixed else None)


def _require_model(name: str) -> None:
    try:
        models.check(name, {})
    except ConfigError as error:
        raise ConfigError(f"DISTILL.TEACHER_MODEL: {error}") from error


def _load_weights(model: nn.Module, file: Path, name: str, num_classes: int) -> None:
    """Load the weights of a teacher that is no run, in full."""
    tensors = read_weights(file)
    try:
        load_pretrained(model, file, strict=True, tensors=tensors)
    except CheckpointError as error:
        found = identify(tensors)
        raise CheckpointError(
            f"DISTILL.TEACHER_PATH {file}{f' is {found} and' if found else ''} does not fit the model {name} of this "
            f"training's {num_classes} classes. Name its own model with DISTILL.TEACHER_MODEL; a teacher must know the "
            "classes of the training, and no others"
        ) from error


def _require_classes(path: Path, saved: list[str], classes: list[str]) -> None:
    if saved == classes:
        return
    remedy = ""
    if sorted(saved) == sorted(classes):
        remedy = ". Name that order with DATA.CLASS_LIST"
    difference = compare_names(saved, classes)
    raise CheckpointError(
        f"DISTILL.TEACHER_PATH {path}: its classes differ from this training's; the teacher {difference}{remedy}"
    )


# --- Loss -----------------------------------------------------------------------------------------


class Distillation:
    """The loss (1 - alpha) · L + alpha · D of a student's loss L and its difference D from the teacher.

    soft (formula 2): D = tau² · KL(softmax(teacher / tau) ‖ softmax(student / tau)), the mean over the images, with the
    arguments in the order of DeiT's code. hard (formula 3): D is the cross entropy with the class that the teacher
    takes for the likeliest.

    The teacher sees what the student sees, mixed and erased, in its own colours, and computes as in an evaluation.
    """

    def __init__(self, teacher: Teacher, colours: Colours, *, type: str, alpha: float, tau: float):
        self.model = teacher.model.eval().requires_grad_(False)
        self.img_size = teacher.img_size
        self.type = type
        self.alpha = alpha
        self.tau = tau
        device = next(self.model.parameters()).device
        mean, std, student_mean, student_std = (
            torch.tensor(values, device=device).view(-1, 1, 1)
            for of in (teacher.colours, colours)
            for values in (of.mean, of.std)
        )
        self.scale, self.shift = student_std / std, (student_mean - mean) / std

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The teacher's (B, num_classes), float32, for the student's images (B, C, H, W)."""
        images = images * self.scale + self.shift
        if self.img_size not in (None, tuple(images.shape[2:])):
            images = F.interpolate(images, self.img_size, mode="bicubic", antialias=True)
        return self.model(images).float()

    def __call__(self, loss: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss from the student's own and the logits (B, num_classes) of both, float32."""
        if self.type == "hard":
            difference = F.cross_entropy(student, teacher.argmax(dim=1))
        else:
            both = (F.log_softmax(logits / self.tau, dim=1) for logits in (student, teacher))
            difference = self.tau**2 * F.kl_div(*both, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * loss + self.alpha * difference
