"""Evaluation of weights, checkpoints and runs on the validation images, and timing of a model."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from data import Loader
from engine import build, checkpoint
from engine.hooks import InterruptibleLoader
from engine.loop import Accuracy, autocast, validate
from engine.pretrained import load_pretrained
from utils.distributed import Process, init_distributed
from utils.download import download
from utils.errors import CheckpointError
from utils.logging import logger, start_logging


@dataclass(frozen=True)
class Weights:
    """What is evaluated: a checkpoint of a run, whose class list decides the labels, or a file of weights."""

    path: Path
    classes: list[str] | None  # of the checkpoint; of DATA.CLASS_LIST, if any, for a file
    is_checkpoint: bool


def evaluate(cfg: CfgNode, sources: dict[str, str], given: frozenset[str]) -> None:
    """Evaluate weights, or a checkpoint and its EMA, on the validation images; never trains.

    given: keys set on the command line. Raises CheckpointError for weights that do not fit in full.
    """
    with init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        build.log_start(cfg, sources, process)
        weights = choose_weights(cfg, given)
        val_set = build.open_split(cfg, "val", weights.classes)
        loader = build.val_loader(cfg, val_set, process)
        model = build.build_model(cfg, len(val_set.classes), process.device)

        results = {}
        if weights.is_checkpoint:
            for name in ("model", "ema"):
                if (file := weights.path / f"{name}.safetensors").exists():
                    checkpoint.load_strictly(model, file)
                    results[name] = score(cfg, loader, model, process)
        else:
            load_pretrained(model, weights.path, strict=True)
            results["model"] = score(cfg, loader, model, process)

        preprocessing = build.describe_preprocessing(cfg)
        for name, result in results.items():
            log_accuracy(result, name)
        logger.info(f"Evaluated {weights.path}: {preprocessing}")
        if process.is_main:
            record = {"weights": str(weights.path), "preprocessing": preprocessing}
            record |= {name: result.asdict() for name, result in results.items()}
            print(json.dumps(record))


def choose_weights(cfg: CfgNode, given: frozenset[str]) -> Weights:
    """What `--eval` evaluates: --resume's run or checkpoint, --pretrained's file, else the run of this configuration.

    A run means its best checkpoint. PRETRAINED in a file is what that run began with: only on the command line does
    it name what to evaluate. Raises CheckpointError if there is nothing to evaluate.
    """
    run, file = cfg.CHECKPOINT.RESUME, cfg.CHECKPOINT.PRETRAINED
    own = build.run_path(cfg)
    if not run and "CHECKPOINT.PRETRAINED" not in given and (own / "checkpoints").is_dir():
        run = own
    if run:
        path = checkpoint.resolve(Path(run), best=True)
        return Weights(path, checkpoint.read_metadata(path)["classes"], is_checkpoint=True)
    if file:
        return Weights(download(file), build.class_list(cfg), is_checkpoint=False)
    raise CheckpointError(
        f"--eval needs weights, and {own} has no checkpoints. Add --pretrained FILE or --resume RUN."
    )


def score(
    cfg: CfgNode, loader: Loader | InterruptibleLoader, model: nn.Module, process: Process
) -> Accuracy:
    """Accuracy and loss of `model` on the images of `loader`, over all processes."""
    return validate(
        model=model,
        loader=loader,
        normalize=build.normalize(cfg, process.device),
        process=process,
        amp_dtype=getattr(torch, cfg.AMP_DTYPE),
        print_freq=cfg.PRINT_FREQ,
    )


def log_accuracy(result: Accuracy, name: str) -> None:
    """Log the accuracies of the weights `name` in Swin's words."""
    suffix = " (EMA)" if "ema" in name else ""
    logger.info(f" * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}{suffix}")
    logger.info(
        f"Accuracy of the network on the {result.images} test images: {result.acc1:.2f}%{suffix}"
    )
    if result.unreadable:
        logger.warning(
            f"{result.images - result.unreadable} of {result.images} images were evaluated, "
            f"{result.unreadable} cannot be read and count as wrong"
        )


def throughput(cfg: CfgNode, sources: dict[str, str]) -> None:
    """Print how many images a second the model classifies, on random images; needs no data."""
    with init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        build.log_start(cfg, sources, process)
        model = build.build_model(cfg, cfg.MODEL.NUM_CLASSES or 1000, process.device).eval()
        size, batch = cfg.DATA.IMG_SIZE, cfg.DATA.BATCH_SIZE
        images = torch.randn(batch, 3, size, size, device=process.device)
        seconds = []
        with torch.inference_mode(), autocast(process.device, getattr(torch, cfg.AMP_DTYPE)):
            while len(seconds) < 13 or sum(seconds) < 10:
                start = time.perf_counter()
                model(images)
                if process.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
    speeds = sorted(batch / s for s in seconds[3:])  # the first three warm up
    logger.info(
        f"batch_size {batch} throughput {speeds[len(speeds) // 2]:.1f} images/s per process "
        f"(median of {len(speeds)}; {speeds[0]:.1f} to {speeds[-1]:.1f}), "
        f"{size} px, {cfg.AMP_DTYPE}, {process.device}"
    )
