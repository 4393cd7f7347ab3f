"""Configuration checks: batches, learning rate, model, and disk space for its checkpoints."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from yacs.config import CfgNode

import config
from data import ImageDataset, steps_per_epoch
from engine.build import build_model, list_schedule_warnings
from engine.build import check_model as check_forward
from tools.checks.report import Finding, format_bytes
from utils.errors import ConfigError, DataError
from utils.text import quantity


def check_batches(cfg: CfgNode, train: ImageDataset | None, processes: int) -> Iterator[Finding]:
    """Findings about the size of a step and of an epoch."""
    total, micro_batch = cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE
    try:
        config.check_world_size(cfg, processes)
        text = (
            f"{quantity(total, 'image')} a step = {quantity(total // micro_batch, 'micro-batch')} of {micro_batch}, "
            f"{total // micro_batch // processes} on each of {quantity(processes, 'process')}"
        )
        yield Finding("OK", "step", text)
    except ConfigError as error:
        yield Finding("FAIL", "step", str(error))
    if train is not None:
        try:
            steps = steps_per_epoch(len(train), total)
        except DataError as error:
            yield Finding("FAIL", "epoch", str(error))
        else:
            dropped = len(train) - steps * total
            text = (
                f"{quantity(steps, 'step')}, {steps * cfg.TRAIN.EPOCHS:,} in {quantity(cfg.TRAIN.EPOCHS, 'epoch')}; "
                f"every epoch leaves out {quantity(dropped, 'image')} ({dropped / len(train):.1%}), others each time"
            )
            remedy = "a smaller TRAIN.GLOBAL_BATCH_SIZE leaves out less"
            if dropped < 0.05 * len(train):
                yield Finding("OK", "epoch", text)
            else:
                yield Finding("WARN", "epoch", text, remedy)
            for warning in list_schedule_warnings(cfg, steps):
                yield Finding("WARN", "schedule", warning, "change the key, if that is not meant")


def check_learning_rate(cfg: CfgNode) -> Finding:
    """The learning rates of the run, scaled to its global batch."""
    total, base = cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.TRAIN.LR_BASE_SIZE
    rates = (cfg.TRAIN.WARMUP_LR, cfg.TRAIN.BASE_LR, cfg.TRAIN.MIN_LR)
    text = " → ".join(f"{rate * total / base:.3g}" for rate in rates)
    text += (
        f" (warm-up, highest, last) after scaling by {total} / {base}; "
        f"{cfg.TRAIN.WARMUP_EPOCHS} of {quantity(cfg.TRAIN.EPOCHS, 'epoch')} for the warm-up"
    )
    return Finding("OK", "learning rate", text)


def check_model(cfg: CfgNode, classes: int, training: bool) -> Iterator[Finding]:
    """Findings about whether the model can be built and, for training, its checkpoints fit on the disk."""
    try:
        check_forward(cfg, training=training)
        with torch.device("meta"):
            model = build_model(cfg, classes, torch.device("meta"))
    except ConfigError as error:
        yield Finding("FAIL", "model", str(error))
        return
    parameters = sum(p.numel() for p in model.parameters())
    text = f"{cfg.MODEL.NAME}, {parameters / 1e6:.2f} M parameters, {quantity(classes, 'class')}"
    yield Finding("OK", "model", text)
    if training:
        yield _check_disk(cfg, parameters)


def _check_disk(cfg: CfgNode, parameters: int) -> Finding:
    """The finding about free disk space."""
    one = 4 * parameters * (3 + bool(cfg.TRAIN.EMA_DECAY))  # weights, two moments, EMA
    count = cfg.CHECKPOINT.KEEP + 2  # the best, and the one being written
    folder = Path(cfg.OUTPUT).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    need = f"{count} checkpoints of {format_bytes(one)} need {format_bytes(count * one)}"
    text = f"{format_bytes(free)} free in {folder}; {need}"
    if not os.access(folder, os.W_OK):
        return Finding("FAIL", "disk", f"{folder} cannot be written", "choose another --output")
    if free < 2 * one:
        return Finding("FAIL", "disk", text, "free some space, or choose another --output")
    if free < count * one:
        return Finding("WARN", "disk", text, "free some space, or lower CHECKPOINT.KEEP")
    return Finding("OK", "disk", text)
