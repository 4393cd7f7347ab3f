"""Group 4: what a training step keeps and needs, the largest batch that fits, and large images."""

import timm
import torch

from tools.common.kept import kept_bytes
from tools.gpu_checks.common import (
    Racer,
    Setting,
    autocast,
    free,
    kernel_choices,
    kernels,
)
from tools.gpu_checks.report import Report

MIB = 2**20
# MiB kept per image of 224 px in half precision, without stochastic depth.
BARS = {
    ("dat_tiny", "reference"): 60,
    ("dat_tiny", "fused"): 50,
    ("dat_pp_tiny", "reference"): 95,
    ("dat_pp_tiny", "fused"): 85,
}


def check(report: Report, setting: Setting) -> None:
    """Kept and peak memory of DAT-T and DAT-T++, and the largest batch."""
    batch = setting.pick(128, 2)
    dtype = torch.float16 if setting.cuda else torch.float32
    for name in setting.pick(("dat_tiny", "dat_pp_tiny"), ("dat_micro",)):
        for way in kernel_choices(setting):
            free(setting)
            racer = Racer(setting, name, way, batch, dtype)
            racer.net.train()
            with kernels(way), autocast(setting, dtype):
                kept = kept_bytes(racer.net, lambda r=racer: r.net(r.images)) / batch / MIB
            bar = BARS.get((name, way))
            text, ok = (f"at most {bar} MiB", kept <= bar) if bar else ("", None)
            report.add(f"{name}, {way}: kept per image", kept, "MiB", bar=text, ok=ok)
            if setting.cuda:
                racer.train()
                peak = torch.cuda.max_memory_allocated(setting.device)
                report.add(f"{name}, {way}: peak per image", peak / batch / MIB, "MiB")
                del racer
                largest = largest_batch(setting, name, way, dtype, peak / batch)
                report.add(f"{name}, {way}: largest batch that fits", largest, "images")
    for name in setting.pick(("dat_tiny", "dat_pp_tiny"), ("dat_micro",)):
        for way in kernel_choices(setting):
            keep_large_images(report, setting, name, way, dtype)


def largest_batch(
    setting: Setting, name: str, way: str, dtype: torch.dtype, bytes_per_image: float
) -> int:
    """The largest of a few batches around what should fit into the memory that makes a training step."""
    total = torch.cuda.get_device_properties(setting.device).total_memory
    estimate = int(total / bytes_per_image) // 16 * 16
    for batch in (estimate, int(estimate * 0.95) // 16 * 16, int(estimate * 0.85) // 16 * 16):
        free(setting)
        try:
            Racer(setting, name, way, batch, dtype).train()
        except torch.OutOfMemoryError:
            continue
        return batch
    return 0


def keep_large_images(
    report: Report, setting: Setting, name: str, way: str, dtype: torch.dtype
) -> None:
    """What a training step of two images of 800 × 1333 keeps, as in detection."""
    free(setting)
    height, width = setting.pick((800, 1333), (40, 52))
    net = timm.create_model(name).to(setting.device).train()
    images = torch.randn(2, 3, height, width, device=setting.device)
    try:
        with kernels(way), autocast(setting, dtype):
            kept = kept_bytes(net, lambda: net.forward_features(images)) / 2 / MIB
        report.add(f"{name}, {way}, {height}×{width}: kept per image", kept, "MiB")
    except torch.OutOfMemoryError:
        report.add(f"{name}, {way}, {height}×{width}: kept per image", "does not fit")
