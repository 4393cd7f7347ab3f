"""Group 12: NVIDIA's memory and race checkers on the fused kernels, and the speed of the largest models."""

import shutil
import subprocess
import sys

import torch

from tools.gpu_checks.common import Racer, Setting, describe, free, kernel_choices, seconds_of
from tools.gpu_checks.correct import gradients, make_cases
from tools.gpu_checks.report import Report

SANITIZED = "from tools.gpu_checks.extra import run_kernels; run_kernels()"


def check(report: Report, setting: Setting) -> None:
    """compute-sanitizer, then DAT-B at 224 and 384."""
    if setting.cuda and shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            done = subprocess.run(
                [*command, sys.executable, "-c", SANITIZED],
                capture_output=True,
                text=True,
                check=False,
            )
            clean = done.returncode == 0
            report.add(f"compute-sanitizer {tool}", done.stdout[-300:], bar="clean", ok=clean)
    else:
        report.skip("compute-sanitizer is not installed")
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    for name, batch in setting.pick((("dat_base", 128), ("dat_base_384", 32)), (("dat_micro", 1),)):
        for way in kernel_choices(setting):
            free(setting)
            racer = Racer(setting, name, way, batch, dtype, drop_path_rate=0.5)
            racer.train()
            seconds = [seconds_of(setting, racer.train) for _ in range(setting.pick(5, 1))]
            speed = describe([batch / s for s in seconds])
            report.add(f"{name}, {way}, training", speed, "images/s")


def run_kernels() -> None:
    """Every fused kernel once, forward and backward, on small shapes."""
    from models import ops

    ops.use_kernels("fused")
    for name, (function, inputs, halves) in make_cases(tiny=True).items():
        if "neighbourhoods" not in name:
            inputs = [
                t.to("cuda", torch.float16 if i < halves else torch.float32)
                for i, t in enumerate(inputs)
            ]
            gradients(function, inputs)
    torch.cuda.synchronize()
