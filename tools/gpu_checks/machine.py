"""Group 0: versions, card and driver; what it copies, multiplies and launches a second; whether everything imports."""

import importlib
import platform
import shutil
import subprocess
import time
from pathlib import Path

import timm
import torch

from tools.gpu_checks.common import Setting, seconds_in_turns
from tools.gpu_checks.report import Report

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = {"yacs", "simplejpeg"}  # of what a card's machine may lack


def check(report: Report, setting: Setting) -> None:
    """Report the machine."""
    report.add(
        "Python, torch, timm",
        f"{platform.python_version()}, {torch.__version__}, {timm.__version__}",
    )
    report.add("Triton", _version("triton"))
    if setting.cuda:
        properties = torch.cuda.get_device_properties(setting.device)
        report.add("card", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        report.add("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):
            driver = subprocess.run(query, capture_output=True, text=True, check=False)
            report.add("driver", driver.stdout.strip() or "unknown")
    _measure_peaks(report, setting)
    _import_everything(report)


def _version(name: str) -> str:
    try:
        return importlib.import_module(name).__version__
    except ImportError:
        return "not installed"


def _measure_peaks(report: Report, setting: Setting) -> None:
    """Copies, products and launches."""
    rounds, elements = setting.pick((10, 1 << 28), (2, 1 << 16))
    source = torch.zeros(elements, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source)}
    size = setting.pick(8192, 64)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
        steps[str(dtype)[6:]] = lambda a=a, b=b: a @ b
    seconds = {name: min(s) for name, s in seconds_in_turns(setting, steps, rounds).items()}
    report.add("copy, read and written", 2 * elements / seconds.pop("copy") / 1e9, "GB/s")
    for name, best in seconds.items():
        report.add(f"product {size}³, {name}", 2 * size**3 / best / 1e12, "TFLOP/s")
    one = torch.zeros(1, device=setting.device)
    setting.synchronize()
    start = time.perf_counter()
    for _ in range(setting.pick(2000, 10)):
        one.add_(1)
    launch = (time.perf_counter() - start) / setting.pick(2000, 10)
    report.add("launch, on the host", 1e6 * launch, "µs")


def _import_everything(report: Report) -> None:
    """Import the modules that a run needs."""
    folders = ("utils", "models", "models/fused", "data", "engine")
    names = [
        p.relative_to(ROOT).with_suffix("")
        for folder in folders
        for p in (ROOT / folder).glob("*.py")
    ]
    failed, lacking = [], set()
    for name in sorted(".".join(path.parts) for path in names):
        try:
            importlib.import_module(name.removesuffix(".__init__"))
        except ModuleNotFoundError as error:
            lacking.add(error.name)
            if error.name.partition(".")[0] not in OPTIONAL | {"triton"}:
                failed.append(f"{name}: {error}")
        except (ImportError, AttributeError, RuntimeError) as error:
            failed.append(f"{name}: {error}")
    report.add("packages that are not installed", ", ".join(sorted(lacking)) or "none")
    bar = "every module imports under this torch"
    report.add("modules that do not import", "; ".join(failed) or "none", bar=bar, ok=not failed)
