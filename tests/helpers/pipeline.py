"""The data package's classes and functions with a value for every setting: config.py's default, or off."""

from pathlib import Path

import torch

import data
from config import KEYS
from helpers.images import as_they_are
from tools.benchmarks.data import IMAGES

CPU = torch.device("cpu")


def defaults(group: str, *names: str) -> dict:
    """The defaults of settings as keyword arguments: `defaults("AUG", "hflip")` is {"hflip": 0.5}."""
    return {name: KEYS[f"{group}.{name.upper()}"].default for name in names}


def image_dataset(root: Path, split: str = "train", **options) -> data.ImageDataset:
    """An evaluation's dataset of pixels as they are, unless `options` say otherwise."""
    settings = {"transform": as_they_are, "train": False, **IMAGES}
    return data.ImageDataset(root, split, **settings | options)


def train_transform(img_size: int, **options):
    """The training transform with config.py's defaults."""
    settings = defaults(
        "AUG", "scale", "ratio", "padding", "hflip", "color_jitter", "auto_augment", "on_device"
    ) | defaults("DATA", "interpolation", "mean")
    return data.train_transform(img_size, **settings | options)


def eval_transform(img_size: int, **options):
    """The evaluation's transform with config.py's defaults."""
    settings = defaults("TEST", "crop_mode", "crop_pct", "exact") | defaults(
        "DATA", "interpolation"
    )
    return data.eval_transform(img_size, **settings | options)


def batch_transform(num_classes: int, **options) -> data.BatchTransform:
    """Normalisation on the CPU with config.py's defaults; erasing and mixing are off."""
    settings = defaults("DATA", "mean", "std", "in_chans", "interpolation") | defaults(
        "AUG", "on_device", "remode", "recount", "mixup_prob", "mixup_switch_prob", "mixup_mode"
    )
    off = {"reprob": 0.0, "mixup": 0.0, "cutmix": 0.0}
    return data.BatchTransform(num_classes, device=CPU, **settings | off | options)


def train_loader(dataset: data.ImageDataset, sampler: data.TrainBatchSampler, **options):
    """The training loader without workers and without a limit of time."""
    return data.train_loader(dataset, sampler, **{"num_workers": 0, "timeout": 0} | options)


def eval_loader(dataset: data.ImageDataset, sampler: data.ShardSampler, **options):
    """The evaluation's loader without workers and without a limit of time."""
    return data.eval_loader(dataset, sampler, **{"num_workers": 0, "timeout": 0} | options)
