"""Groups 8 and 9: main.py itself, killed and resumed, with its evaluation; and what waits for the device in a step."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3

from tools.gpu_checks.common import Setting
from tools.gpu_checks.processes import ROOT, end, start
from tools.gpu_checks.report import Report

KILL_AFTER = 5  # steps; a checkpoint every second one

# --- 8: main.py -----------------------------------------------------------------------------------


def check_program(report: Report, setting: Setting) -> None:
    """A run, the same run killed with SIGKILL and resumed, and an evaluation; in fp16 and deterministic on CUDA."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch, images = setting.pick((128, 1280), (4, 40))
        write_images(folder / "images", images, setting.pick(256, 40))
        command = make_command(setting, folder, batch)
        start = time.perf_counter()
        code, log = run(command("unbroken"))
        report.add("main.py: exit code", code, bar="0", ok=code == 0)
        report.add("main.py: seconds of the run", time.perf_counter() - start, "s")
        if code:
            report.add("main.py: last lines", log[-1500:])
            return
        killed = run_and_kill(command("broken"), folder)
        report.add("killed with SIGKILL after a checkpoint", killed, bar="yes", ok=killed)
        code, log = run(command("broken"))
        report.add("resumed: exit code", code, bar="0", ok=code == 0)
        whole, resumed = (read_run(folder, tag) for tag in ("unbroken", "broken"))
        for what in whole:
            equal = whole[what] == resumed.get(what)
            report.add(f"resumed: {what} equal", equal, bar="equal", ok=equal)
        code, log = run([*command("unbroken"), "--eval"])
        found = json.loads(log.strip().splitlines()[-1]) if code == 0 else {}
        counted = found.get("model", {}).get("images")
        expected = sum(1 for _ in (folder / "images" / "val").rglob("*.*"))
        bar = f"{expected}, each once"
        report.add("evaluation: images counted", counted, bar=bar, ok=counted == expected)


def make_command(setting: Setting, folder: Path, batch: int):
    """The command line of a run of three epochs, by its tag."""
    model = setting.pick("dat_tiny", "dat_micro")
    config = folder / "check.yaml"
    config.write_text(f"MODEL: {{NAME: {model}}}\n", encoding="utf-8")
    launcher = [sys.executable]
    if setting.cuda:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    settings = [
        f"DATA.BATCH_SIZE={batch}",
        f"TRAIN.GLOBAL_BATCH_SIZE={batch}",
        f"DATA.IMG_SIZE={setting.pick(224, 32)}",
        f"DATA.NUM_WORKERS={setting.pick(len(os.sched_getaffinity(0)) - 2, 0)}",
        f"DEVICE={setting.device.type}",
        f"AMP_DTYPE={'float16' if setting.cuda else 'float32'}",
        *("TRAIN.EPOCHS=" + str(setting.pick(3, 1)), "TRAIN.WARMUP_EPOCHS=0", "PRINT_FREQ=1"),
        *("SAVE_STEPS=2", "TRAIN.DETERMINISTIC=True", "TRAIN.EMA_DECAY=0.9", "EVAL_FREQ=3"),
    ]

    def command(tag: str) -> list[str]:
        flags = ["--cfg", str(config), "--data-path", str(folder / "images"), "--tag", tag]
        return [*launcher, "main.py", *flags, "--output", str(folder / "runs"), "--opts", *settings]

    return command


def run(command: list[str]) -> tuple[int, str]:
    """The exit code and the output of a command."""
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def run_and_kill(command: list[str], folder: Path) -> bool:
    """Start a command and kill all its processes with SIGKILL when it has made KILL_AFTER steps."""
    process = start(command, subprocess.DEVNULL, subprocess.DEVNULL)
    metrics = None
    while process.poll() is None:
        metrics = next(iter((folder / "runs").glob("*/broken/metrics.jsonl")), None)
        if metrics and metrics.read_bytes().count(b"\n") >= KILL_AFTER:
            end(process)
            return True
        time.sleep(0.02)
    return False


def read_run(folder: Path, tag: str) -> dict[str, bytes]:
    """What a run left that must not depend on whether it was killed."""
    (path,) = (folder / "runs").glob(f"*/{tag}")
    steps = path.glob("checkpoints/step-*")
    last = max(steps, key=lambda step: int(step.name.removeprefix("step-")))
    names = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    return {"metrics.jsonl": (path / "metrics.jsonl").read_bytes()} | {
        name: (last / name).read_bytes() for name in names
    }


def write_images(root: Path, count: int, size: int) -> None:
    """`count` training and 50 validation images of noise in five classes, PNG: every machine reads them."""
    rng = np.random.default_rng(0)
    for label in range(5):
        for split, number in (("train", count // 5), ("val", 10)):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "0.png", compress_level=1)
            for i in range(1, number):
                os.link(folder / "0.png", folder / f"{i}.png")


# --- 9: waits -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """What a loader yields."""

    images: torch.Tensor
    labels: torch.Tensor
    ops: torch.Tensor | None = None


class Steps:
    """The steps of the training loop on batches of noise."""

    def __init__(self, setting: Setting, mode: str):
        import data
        from engine.grad_sync import DDPSync
        from engine.loop import Recipe
        from engine.optim import Schedule
        from engine.results import StepResults
        from engine.state import TrainState
        from utils.distributed import Process
        from utils.logging import MetricWriter
        from utils.step_timer import StepTimer

        torch.manual_seed(0)
        name, batch, size = setting.pick(("dat_tiny", 128, 224), ("dat_micro", 4, 32))
        args = {"drop_path_rate": 0.2, "num_classes": 1000, "stochastic_depth": mode}
        model = timm.create_model(name, **args).to(setting.device)
        groups = [{"params": list(model.parameters()), "lr_scale": 1.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.cuda)
        self.state = TrainState(model, ModelEmaV3(model, decay=0.99), optimizer, scaler)
        self.process = Process(0, 1, setting.device)
        colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        transform = data.BatchTransform(
            1000, device=setting.device, reprob=0.0, remode="pixel", recount=1, mixup=0.8, cutmix=1.0,
            mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch", on_device=False,
            interpolation="bicubic", in_chans=3, **colours,
        )  # fmt: skip
        self.recipe = Recipe(
            seed=0, epochs=1, steps_per_epoch=1000, pixels=(size**2,), global_batch=batch,
            micro_batches=range(1), schedule=Schedule(1000, 0, 1e-3, 1e-3, 1e-5), transform=transform,
            mixup_off_epoch=0, label_smoothing=0.1, distillation=None,
            clip_grad=5.0, amp_dtype=torch.float16 if setting.cuda else torch.float32, print_freq=10,
        )  # fmt: skip
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        labels = torch.randint(0, 1000, (batch,))
        if setting.cuda:
            images, labels = images.pin_memory(), labels.pin_memory()
        self.batch = Batch(images, labels)
        self.sync = DDPSync(model, self.recipe.micro_batches, self.process)
        self.timer = StepTimer(setting.device)
        sizes = {"steps_per_epoch": 1000, "epochs": 1, "later_epochs": 0, "global_batch": batch}
        writer = MetricWriter(None, 0, 0, every=1)
        self.results = StepResults(self.state, writer, self.timer, setting.device, **sizes)

    def start(self) -> None:
        """Start a step."""
        from engine.loop import apply_gradient, forward_backward

        batches = iter([self.batch])
        losses = forward_backward(
            self.state, self.sync, batches, self.recipe, self.process, self.timer
        )
        norm = apply_gradient(self.state, self.recipe.clip_grad)
        self.state.step += 1
        self.results.add(
            1e-3, norm, self.sync.mean_loss(losses) if self.state.step % 10 == 0 else None
        )

    def read(self, keep: int) -> list[int]:
        """Read results; the steps that were skipped."""
        return list(self.results.read(keep))


def check_waits(report: Report, setting: Setting) -> None:
    """Waits of a step by torch's count, seconds of a step read at once and later, and a step that overflows."""
    for mode in ("independent", "balanced"):
        steps = Steps(setting, mode)
        for _ in range(setting.pick(12, 1)):  # fp16's first scale is too high
            steps.start()
        steps.read(keep=0)
        if setting.cuda:
            waits = count_waits(steps, 20)
            what = f"{mode}: waits in 20 steps"
            report.add(what, len(waits), bar="0", ok=not waits)
            for message in sorted(set(waits))[:5]:
                report.add(f"{mode}: waits at", message)
        steps.read(keep=0)
        for keep, how in ((0, "at once"), (1, "one step later")):
            seconds = []
            for _ in range(setting.pick(20, 2)):
                start = time.perf_counter()
                steps.start()
                steps.read(keep)
                seconds.append(time.perf_counter() - start)
            setting.synchronize()
            spent = 1e3 * statistics.median(seconds)
            report.add(f"{mode}: a step whose result is read {how}", spent, "ms")
    check_overflow(report, steps)


def count_waits(steps: Steps, number: int) -> list[str]:
    """Where the host waits for the device in so many steps."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(number):
                steps.start()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def check_overflow(report: Report, steps: Steps) -> None:
    """A step whose gradient overflows changes no weight and no average."""
    from engine.loop import apply_gradient

    steps.read(keep=0)
    state = steps.state
    before = [p.detach().clone() for p in (*state.model.parameters(), *state.ema.parameters())]
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    if state.scaler.is_enabled():  # as backward would have left it
        state.scaler.scale(torch.ones(1, device=before[0].device))
    norm = apply_gradient(state, 5.0)
    state.step += 1
    steps.results.add(1e-3, norm, None)
    skipped = steps.read(keep=0) == [state.step]
    after = (*state.model.parameters(), *state.ema.parameters())
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    ok = skipped and same
    report.add("an overflow: skipped, weights and average as before", ok, bar="yes", ok=ok)
