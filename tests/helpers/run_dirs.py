"""Directories of runs that nobody trained: records and settings, or checkpoints with metrics."""

import json
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3

from engine import checkpoint
from engine.state import TrainState
from helpers.states import make_optimizer
from helpers.variants import micro

# A name that would run a script in a page that does not escape it.
ATTACK = (
    "<script>document.title='attacked'</script><img src=x onerror=\"document.title='attacked'\">"
)
CLASSES = [ATTACK, *"bcdefgh"]


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 400,
    tag: str = "run",
    accuracy: float = 70,
    **settings,
) -> Path:
    """The directory of a run of 4 epochs: records, settings with their sources, a checkpoint without tensors."""
    rng = np.random.default_rng(seed)
    run = folder / f"seed{seed}" / tag
    step_folder = run / "checkpoints" / f"step-{steps}"
    step_folder.mkdir(parents=True)
    per_epoch = steps // 4
    metrics, timing = [], []
    phases = ("data_wait", "transform", "forward", "backward", "optimizer", "save", "other")
    for step in range(1, steps + 1):
        loss = 3 * 0.99**step + 0.1 * float(rng.random())
        metrics.append(
            {"step": step, "train/loss": loss, "train/lr": 1e-3, "train/grad_norm": 1 + loss}
        )
        shares = dict.fromkeys((f"time/{phase}" for phase in phases), 0.05)
        timing.append(
            {"step": step, "time/images_per_s": 100 + step % 7, **shares, "time/backward": 0.7}
        )
        if step % per_epoch == 0:
            epoch = step // per_epoch
            acc1 = accuracy + 2 * epoch + float(rng.random())
            metrics.append(
                {
                    "step": step,
                    "epoch": epoch,
                    "val/acc1": acc1,
                    "val/acc5": 99.0,
                    "val/loss": 1 / epoch,
                    "offsets/stage3_pixels": 2.0 + epoch,
                }
            )
    for name, records in (("metrics", metrics), ("timing", timing)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    config = {
        "OUTPUT": "output",
        "TAG": tag,
        "SEED": seed,
        "MODEL": {"NAME": "dat_micro", "ARGS": {}},
        "TRAIN": {"EPOCHS": 4, "BASE_LR": 0.001, **settings},
    }
    (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    sources = {"MODEL.NAME": "configs/digits.yaml:13", "TRAIN.EPOCHS": "--opts", "TAG": "--tag"}
    (run / "sources.json").write_text(json.dumps(sources))
    (run / "status.json").write_text(json.dumps({"state": "done", "exit_code": 0}))
    metadata = {
        "step": steps,
        "classes": CLASSES,
        "images": {"train": 1442, "val": 355},
        "steps_per_epoch": per_epoch,
        "data": "0123456789abcdef" * 4,
        "versions": {"torch": "2.14"},
        "device": "CPU",
    }
    (step_folder / "state.json").write_text(json.dumps(metadata))
    (step_folder / "manifest.json").write_text(
        json.dumps(
            {
                "state.json": {"bytes": (step_folder / "state.json").stat().st_size},
                "model.safetensors": {"bytes": 0, "sha256": "f" * 64},
            }
        )
    )
    (step_folder / "model.safetensors").write_bytes(b"")
    return run


def make_run(folder: Path, steps: tuple[int, ...] = (3, 5)) -> Path:
    """A run with checkpoints of different weights, of which the first is the best."""
    config = {"MODEL": {"NAME": "dat_micro", "ARGS": {}}}
    metadata = {"model": "dat_micro", "classes": list("abcdefghij"), "config": config}
    metadata |= {"versions": {"torch": "2.0"}, "revision": "0123456789ab"}
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        model = micro(seed=step)
        ema = ModelEmaV3(micro(seed=-step))
        optimizer = make_optimizer(model, weight_decay=0.1)
        best = {"acc1": 50.0, "step": steps[0]}
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = TrainState(model, ema, optimizer, scaler, step, epoch=1, best=best)
        files = checkpoint.snapshot(state, metadata)
        checkpoint.write(folder / "checkpoints", f"step-{step}", files)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in steps:
            record = {"step": step, "val/acc1": 40.0 + step, "val/acc5": 90.0 + step}
            file.write(json.dumps(record) + "\n")
    return folder
