"""Group 10: loaders beside the card, RandAugment on it, and JPEGs that it decodes."""

import argparse
import io
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms
from torchvision.io import decode_jpeg

from tools.gpu_checks.common import Setting, describe, seconds_of
from tools.gpu_checks.report import Report


def check(report: Report, setting: Setting) -> None:
    """Images a second of what feeds the card."""
    augment_on_device(report, setting)
    if setting.cuda:
        decode_on_device(report, setting)
    load(report, setting)


def augment_on_device(report: Report, setting: Setting) -> None:
    """The recipe's RandAugment on a micro-batch."""
    from data.device_augment import DrawRandAugment, RandAugmentOnDevice

    batch, size = setting.pick((128, 224), (2, 32))
    policy = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": size // 2})
    draw = DrawRandAugment(transforms.Compose([policy]))
    augment = RandAugmentOnDevice(
        fill=(124, 116, 104), interpolation="bicubic", device=setting.device
    )
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    drawn = torch.stack([draw() for _ in range(batch)])
    augment(images, drawn)
    seconds = [
        seconds_of(setting, lambda: augment(images, drawn)) for _ in range(setting.pick(10, 1))
    ]
    report.add("RandAugment on the device", describe([batch / s for s in seconds]), "images/s")


def decode_on_device(report: Report, setting: Setting) -> None:
    """torchvision's decoder of JPEGs on CUDA, where it has one."""
    stream = io.BytesIO()
    Image.effect_noise((500, 375), 60).convert("RGB").save(stream, "JPEG", quality=90)
    files = [torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)] * 128
    try:
        decode_jpeg(files, device=setting.device)
        seconds = [
            seconds_of(setting, lambda: decode_jpeg(files, device=setting.device)) for _ in range(5)
        ]
    except (RuntimeError, TypeError, ImportError) as error:
        report.skip(f"JPEGs decoded on the device: {str(error).splitlines()[0][:120]}")
        return
    report.add("JPEGs decoded on the device", describe([128 / s for s in seconds]), "images/s")


def load(report: Report, setting: Setting) -> None:
    """The loaders of tools/benchmark.py on JPEGs of noise as large as ImageNet's."""
    from tools.benchmarks import data
    from tools.benchmarks.loop import write_images

    images, workers, rounds = setting.pick((2000, len(os.sched_getaffinity(0)), 2), (8, 1, 1))
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), images)
        args = {"images": images, "workers": workers, "rounds": rounds, "threads": 1}
        args |= {"batch_size": setting.pick(128, 4), "shorter_side": 256}
        found = data.run(argparse.Namespace(data_path=Path(folder), **args))
    for name, speed in found["images_per_second"].items():
        report.add(f"{name}, {workers} workers", speed["median"], "images/s")
