"""Evaluation of weights, checkpoints and runs on val and other test sets, and timing of a model."""

import functools
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from yacs.config import CfgNode

import data
import models
from analysis import imagenet
from analysis.collector import Collector
from analysis.predictions import Evaluation
from analysis.scores import write_scores
from analysis.suite_table import markdown
from data import Loader
from engine import build, checkpoint, compat, suite
from engine.hooks import InterruptibleLoader
from engine.loop import Accuracy, autocast, validate
from engine.pretrained import load_pretrained
from utils.distributed import Process, init_distributed
from utils.download import download
from utils.errors import CheckpointError, ConfigError
from utils.logging import logger, start_logging
from utils.yaml_nodes import to_dict


@dataclass(frozen=True)
class Weights:
    """What is evaluated: a checkpoint of a run, whose class list decides the labels, or a file of weights."""

    path: Path
    classes: list[str] | None  # of the checkpoint; of DATA.CLASS_LIST, if any, for a file
    is_checkpoint: bool

    def files(self) -> Iterator[tuple[str, Path]]:
        """What can be evaluated: ("model", file) and, of a checkpoint with an EMA, ("ema", file)."""
        if not self.is_checkpoint:
            yield "model", self.path
            return
        for kind in ("model", "ema"):
            if (file := self.path / f"{kind}.safetensors").exists():
                yield kind, file


def evaluate(cfg: CfgNode, sources: dict[str, str], given: frozenset[str]) -> None:
    """Evaluate weights, or a checkpoint and its EMA, on the validation images or on test sets; never trains.

    sources: where values that are no defaults come from. given: keys set on the command line. Raises CheckpointError
    for weights that do not fit in full.
    """
    models.check(cfg.MODEL.NAME, cfg.MODEL.ARGS)
    with init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        build.log_start(cfg, sources, process)
        cfg = build.prepare_device(cfg, process.device)
        weights = choose_weights(cfg, given)
        if cfg.TEST.SETS or cfg.TEST.OUT or cfg.TEST.SIZES or cfg.TEST.SAVE_LOGITS:
            record = evaluate_sets(cfg, weights, process, has_val="DATA.PATH" in sources)
        else:
            record = evaluate_val(cfg, weights, process)
        if process.is_main:
            print(json.dumps(record))


def evaluate_val(cfg: CfgNode, weights: Weights, process: Process) -> dict:
    """The accuracies of `weights` on the validation images."""
    val_set = build.open_split(cfg, "val", weights.classes)
    loader = build.val_loader(cfg, val_set, process)
    model = build.build_model(cfg, len(val_set.classes), process.device)
    changes = changes_since_training(cfg, weights, val_set.fingerprint)
    results = {}
    for kind, file in weights.files():
        load_weights(model, file, weights.is_checkpoint)
        results[kind] = score(cfg, loader, model, process)
    preprocessing = build.describe_preprocessing(cfg)
    for kind, result in results.items():
        log_accuracy(result, kind)
    logger.info(f"Evaluated {weights.path}: {preprocessing}")
    record = {"weights": str(weights.path), "preprocessing": preprocessing, "changes": changes}
    return record | {kind: result.asdict() for kind, result in results.items()}


def choose_weights(cfg: CfgNode, given: frozenset[str]) -> Weights:
    """What `--eval` evaluates: --resume's run or checkpoint, --pretrained's file, else the run of this configuration.

    A run means its best checkpoint. PRETRAINED in a file is what that run began with: only on the command line does
    it name what to evaluate. Raises CheckpointError if there is nothing to evaluate.
    """
    run, file = cfg.CHECKPOINT.RESUME, cfg.CHECKPOINT.PRETRAINED
    own = build.run_path(cfg)
    if (
        not run
        and "CHECKPOINT.PRETRAINED" not in given
        and checkpoint.list_checkpoints(own / "checkpoints")
    ):
        run = own
    if run:
        path = checkpoint.resolve(Path(run), best=True)
        return Weights(path, checkpoint.read_metadata(path)["classes"], is_checkpoint=True)
    if file:
        return Weights(download(file), build.class_list(cfg), is_checkpoint=False)
    raise CheckpointError(
        f"--eval needs weights, and {own} has no checkpoints. Add --pretrained FILE or --resume RUN."
    )


def load_weights(model: nn.Module, file: Path, is_checkpoint: bool) -> None:
    """Load `file` in full; CheckpointError where it does not fit."""
    if is_checkpoint:
        checkpoint.load_strictly(model, file)
    else:
        load_pretrained(model, file, strict=True)


def changes_since_training(cfg: CfgNode, weights: Weights, val_data: str | None) -> list[str]:
    """What changes pixels or logits and differs from the run that wrote `weights`; logged, a line each.

    val_data: fingerprint of the validation images, None where they are not evaluated.
    """
    if not weights.is_checkpoint:
        return []
    now = {"decoder": data.decoder_fingerprint(), "config": to_dict(cfg)}
    now |= {"val_data": val_data} if val_data is not None else {}
    changes = compat.list_evaluation_changes(checkpoint.read_metadata(weights.path), now)
    for change in changes:
        logger.warning(f"Differs from the run's own evaluation: {change}")
    return changes


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


# --- Test sets ------------------------------------------------------------------------------------


def evaluate_sets(cfg: CfgNode, weights: Weights, process: Process, *, has_val: bool) -> dict:
    """Evaluate on val and the test sets of --sets, at every size, and keep the predictions of every image.

    has_val: whether DATA.PATH was set, so that a missing folder is an error.
    """
    if not weights.is_checkpoint and not cfg.TEST.OUT:
        raise ConfigError("The predictions of a file of weights need a folder. Add --out DIR.")
    data_path = Path(cfg.DATA.PATH)
    found = suite.find_sets(
        Path(cfg.TEST.SETS) if cfg.TEST.SETS else None,
        data_path if has_val or data_path.is_dir() else None,
        suite.parse_only(cfg.TEST.ONLY) if cfg.TEST.SETS else ["val"],
    )
    sizes = [int(size) for size in cfg.TEST.SIZES.split(",") if size] or [cfg.DATA.IMG_SIZE]
    classes = weights.classes or class_list_of(cfg, found)
    results = []
    for size in sizes:
        sized = build.at_size(cfg, size)
        opener = suite.OpenDataset(
            dataset=functools.partial(build.open_set, sized),
            val=functools.partial(build.open_split, sized, "val"),
            pixels=functools.partial(build.describe_pixels, sized),
            val_subset=cfg.DATA.VAL_SUBSET,
            holdout=cfg.DATA.HOLDOUT,
        )
        passes = suite.open_sets(found, classes, opener)
        val_data = next((one.dataset.fingerprint for one in passes if one.group == "val"), None)
        changes = changes_since_training(sized, weights, val_data)
        model = build.build_model(sized, len(classes), process.device)
        for kind, file in weights.files():
            # Another size is another shape for models that have one.
            load_weights(model, file, weights.is_checkpoint and size == cfg.DATA.IMG_SIZE)
            evaluation = build_evaluation(sized, weights, kind, file, classes, changes, process)
            folder = predictions_folder(cfg, weights, kind, size if len(sizes) > 1 else None)
            evaluation = suite.evaluate_sets(
                passes,
                replace(evaluation, folder=folder),
                score=functools.partial(_collect, sized, model, process),
                process=process,
                keep_logits=cfg.TEST.SAVE_LOGITS,
            )
            if process.is_main:
                results.append(score_predictions(cfg, evaluation, size, several=len(sizes) > 1))
    if not process.is_main:
        return {}
    logger.info(f"Evaluated {weights.path}\n\n{markdown(results)}")
    return {"weights": str(weights.path), "results": results}


def class_list_of(cfg: CfgNode, found: list[suite.Found]) -> list[str]:
    """The classes of weights that do not name theirs: val's folders, or ImageNet-1k's."""
    if any(one.test_set.group == "val" for one in found):
        return build.open_split(cfg, "val", None).classes
    logger.info("The weights name no classes: they are taken for ImageNet-1k's")
    return imagenet.wnids()


def build_evaluation(
    cfg: CfgNode,
    weights: Weights,
    kind: str,
    file: Path,
    classes: list[str],
    changes: list[str],
    process: Process,
) -> Evaluation:
    """The record of what an evaluation depends on, without its folder and sets."""
    step = checkpoint.read_metadata(weights.path)["step"] if weights.is_checkpoint else None
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Evaluation(
        folder=Path(),
        weights={"path": str(file), "sha256": digest, "step": step, "kind": kind},
        model={
            "name": cfg.MODEL.NAME,
            "args": {**cfg.MODEL.ARGS, "img_size": cfg.DATA.IMG_SIZE},
        },
        classes=classes,
        names=imagenet.describe(classes),
        sets={},
        pixels={
            **build.describe_pixels(cfg, "own"),
            "mean": cfg.DATA.MEAN,
            "std": cfg.DATA.STD,
            "exif": cfg.DATA.EXIF,
            "decoder": data.decoder_fingerprint(),
        },
        logits={
            "amp_dtype": cfg.AMP_DTYPE,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        environment={
            **compat.describe_environment(process),
            "batch_size": cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE,
            "changes": changes,
        },
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=shlex.join(sys.argv),
    )


def predictions_folder(cfg: CfgNode, weights: Weights, kind: str, size: int | None) -> Path:
    """Where predictions go: <run>/eval/<step>-<model|ema>, or below --out; `size` of several sizes."""
    suffix = [f"{size}px"] if size else []
    if weights.is_checkpoint:
        base = Path(cfg.TEST.OUT) if cfg.TEST.OUT else weights.path.parents[1] / "eval"
        step = weights.path.name.removeprefix("step-")
        return base / "-".join([step, kind, *suffix])
    return Path(cfg.TEST.OUT, *suffix)


def _collect(
    cfg: CfgNode,
    model: nn.Module,
    process: Process,
    dataset: Dataset,
    collectors: list[Collector],
) -> None:
    """Run the model over the images of `dataset` and fill `collectors`."""
    validate(
        model=model,
        loader=build.val_loader(cfg, dataset, process),
        normalize=build.normalize(cfg, process.device),
        process=process,
        amp_dtype=getattr(torch, cfg.AMP_DTYPE),
        print_freq=0,
        collectors=collectors,
    )


def score_predictions(cfg: CfgNode, evaluation: Evaluation, size: int, *, several: bool) -> dict:
    """Write scores.json and scores.md beside the predictions; the results for the table, with the size if `several`."""
    factors = Path(cfg.TEST.SETS, suite.FACTORS_FILE) if cfg.TEST.SETS else None
    found = write_scores(evaluation.folder, factors if factors and factors.exists() else None)
    results = found["suite"]
    return results | ({"model": f"{results['model']}, {size} px"} if several else {})


# --- Log and time ---------------------------------------------------------------------------------


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
    models.check(cfg.MODEL.NAME, cfg.MODEL.ARGS)
    with init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        build.log_start(cfg, sources, process)
        cfg = build.prepare_device(cfg, process.device)
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
