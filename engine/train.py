"""What happens in a run, from a frozen configuration to checkpoints and accuracies?

The only file beside main.py and config.py that reads the configuration: all others take plain arguments.
"""

import functools
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torchvision
import yaml
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

import data
import models
from engine import checkpoint, compat
from engine.checkpoint import TrainState
from engine.divergence import Divergence
from engine.grad_sync import DDPSync, DeterministicSync, GradSync
from engine.hooks import AfterStep, InterruptibleLoader
from engine.loop import Accuracy, Recipe, autocast, train_one_epoch, validate
from engine.optim import Schedule, create_optimizer
from engine.pretrained import load_pretrained
from engine.run_dir import RunDir
from utils import distributed
from utils.distributed import Process, explain_lost_process, init_distributed
from utils.download import download
from utils.errors import CheckpointError, ConfigError, DataError, DivergedError
from utils.files import write_atomically
from utils.logging import MetricWriter, logger, start_logging
from utils.rng import key, reseed
from utils.signals import StopRequest
from utils.watchdog import Watchdog

REFERENCE_BATCH = 512  # the learning rates of a configuration are for so many images per step
PROBED_IMAGES = 32  # whose sampling offsets are measured at every validation


def train(cfg: CfgNode, sources: dict[str, str], text: str, stop: StopRequest) -> None:
    """Train from the start, or from where the run's newest whole checkpoint left off, to the last epoch.

    `sources` says where the values of `cfg` that are no defaults come from, `text` is all of it as YAML.
    """
    with (
        init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process,
        RunDir(_run_path(cfg), process).lock() as folder,
        checkpoint.Saver(folder.checkpoints, cfg.CHECKPOINT.KEEP) as saver,
        Watchdog(cfg.TRAIN.HANG_SECONDS, folder.hang_file(), folder.report_hang) as watchdog,
        explain_lost_process(),
    ):
        own_path = folder.path if process.is_main else None  # only the main process writes there
        start_logging(cfg.MODEL.NAME, process.rank, own_path)
        _log_start(cfg, sources, process)
        level = compat.level(process.device, exact_world_size=cfg.TRAIN.EXACT_WORLD_SIZE)
        logger.info(f"Promise {level}: {compat.TEXTS[level]}")

        # --- Data ---------------------------------------------------------------------------------
        train_set, val_set = _open_data(cfg)
        classes = train_set.classes
        steps_per_epoch = data.steps_per_epoch(len(train_set), cfg.TRAIN.GLOBAL_BATCH_SIZE)
        logger.info(f"Training on {train_set}; validating on {val_set}")
        metadata = _metadata(text, level, train_set, val_set, steps_per_epoch, process)
        found = _find_checkpoint(cfg, folder)
        if found is not None:
            compat.check(found, metadata, cfg.CHECKPOINT.ACCEPT)

        # --- Model --------------------------------------------------------------------------------
        model = _build_model(cfg, len(classes), process)
        if cfg.CHECKPOINT.PRETRAINED and found is None:
            load_pretrained(model, download(cfg.CHECKPOINT.PRETRAINED), whole=False)
        ema = ModelEmaV3(model, decay=cfg.TRAIN.EMA_DECAY) if cfg.TRAIN.EMA_DECAY else None
        tensors = 3 + bool(ema)  # weights, two moments and the average
        folder.require_space(tensors * sum(4 * p.numel() for p in model.parameters()))

        # --- What a step does ------------------------------------------------------------------
        recipe = _recipe(cfg, steps_per_epoch, len(classes), process)
        reduction = _reduction(cfg, model, recipe.micro_batches, process)
        optimizer = create_optimizer(
            model,
            weight_decay=cfg.TRAIN.WEIGHT_DECAY,
            betas=cfg.TRAIN.ADAM_BETAS,
            eps=cfg.TRAIN.ADAM_EPS,
        )
        fp16 = recipe.amp_dtype == torch.float16
        scaler = torch.amp.GradScaler(process.device.type, enabled=fp16)
        state = TrainState(model, ema, optimizer, scaler)

        # --- Resume -------------------------------------------------------------------------------
        if found is not None:
            checkpoint.restore(found, state)
            logger.info(f"Resumed from {found}: epoch {state.epoch}, step {state.step}")
        distributed.barrier()  # all have read what the first one is about to write and prune
        if process.is_main:
            write_atomically(folder.path / "config.yaml", text)
        writer = MetricWriter(own_path, state.step, state.epoch, cfg.PRINT_FREQ)

        # --- Between steps ----------------------------------------------------------------------
        sampler = _train_sampler(cfg, train_set, recipe, process)
        after_step = AfterStep(
            state=state,
            metadata=metadata,
            folder=folder,
            saver=saver,
            save_every=cfg.SAVE_STEPS,
            steps_per_epoch=steps_per_epoch,
            stop=stop,
            divergence=Divergence(
                cfg.TRAIN.MAX_SKIPPED, folder.path, metadata, train_set, sampler, process
            ),
            watchdog=watchdog,
            writer=writer,
            process=process,
        )

        # --- Epochs -------------------------------------------------------------------------------
        batches = watchdog.watch(_train_batches(cfg, train_set, state, recipe, process, folder))
        val_loader = InterruptibleLoader(_val_loader(cfg, val_set, process), after_step)
        stop.defer_to_steps()
        while state.epoch < cfg.TRAIN.EPOCHS:
            try:
                train_one_epoch(
                    state=state,
                    reduction=reduction,
                    batches=batches,
                    recipe=recipe,
                    process=process,
                    writer=writer,
                    after_step=after_step,
                )
            except DivergedError as error:
                after_step.rollback(error)
                batches = _train_batches(cfg, train_set, state, recipe, process, folder)
                batches = watchdog.watch(batches)
                continue
            last = state.epoch + 1 == cfg.TRAIN.EPOCHS
            improved = False
            if last or (state.epoch + 1) % cfg.EVAL_FREQ == 0:
                improved = _validate(cfg, val_loader, state, writer, process)
            state.epoch += 1
            if last or improved or state.epoch % cfg.SAVE_FREQ == 0:
                after_step.save()
            after_step.report()
        after_step.finish()
        logger.info(f"Max accuracy: {state.best['acc1']:.2f}% at step {state.best['step']}")
        logger.info(f"The run is complete: {folder.path}")


def evaluate(cfg: CfgNode, sources: dict[str, str]) -> None:
    """Evaluate weights, or a checkpoint and its EMA, on the validation images; never trains.

    A run's folder stands for its best checkpoint. Raises CheckpointError without weights that fit in full.
    """
    with init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        _log_start(cfg, sources, process)

        # --- Weights and classes ------------------------------------------------------------------
        file, run = cfg.CHECKPOINT.PRETRAINED, cfg.CHECKPOINT.RESUME
        # A configuration's PRETRAINED is what its run began with; a flag's is what is to be evaluated.
        if not run and not sources.get("CHECKPOINT.PRETRAINED", "").startswith("--"):
            run = _run_path(cfg) if (_run_path(cfg) / "checkpoints").is_dir() else ""
        if run:
            source = checkpoint.resolve(Path(run), best=True)
            classes = checkpoint.read_metadata(source)["classes"]
        elif file:
            source, classes = download(file), _class_list(cfg)
        else:
            raise CheckpointError(
                f"--eval needs weights, and {_run_path(cfg)} is no run that has any. "
                "Add --pretrained FILE or --resume RUN."
            )
        val_set = _open_split(cfg, "val", classes)
        loader = _val_loader(cfg, val_set, process)
        model = _build_model(cfg, len(val_set.classes), process)

        # --- Evaluate -----------------------------------------------------------------------------
        results = {}
        if not run:
            load_pretrained(model, source, whole=True)
            results["model"] = _score(cfg, loader, model, process)
        else:
            for name in ("model", "ema"):
                if (weights := source / f"{name}.safetensors").exists():
                    checkpoint.load_strictly(model, weights)
                    results[name] = _score(cfg, loader, model, process)
        for name, result in results.items():
            _log_accuracy(result, name)
        logger.info(f"Evaluated {source}: {_preprocessing(cfg)}")
        if process.is_main:
            record = {"weights": str(source), "crop_mode": _preprocessing(cfg)}
            record |= {name: result.asdict() for name, result in results.items()}
            print(json.dumps(record))


def throughput(cfg: CfgNode, sources: dict[str, str]) -> None:
    """Print how many images a second the model classifies, on random images; needs no data."""
    with init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        _log_start(cfg, sources, process)
        model = _build_model(cfg, cfg.MODEL.NUM_CLASSES or 1000, process).eval()
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


def reopen(
    cfg: CfgNode, path: Path, process: Process
) -> tuple[TrainState, Recipe, data.ImageDataset, data.TrainBatchSampler]:
    """The state saved at `path` and what trains its next step, all micro-batches of it in this one process.

    Raises DataError where the images are not those of then.
    """
    metadata = checkpoint.read_metadata(path)
    train_set = _open_split(cfg, "train", metadata["classes"])
    if train_set.fingerprint != metadata["data"]:
        raise DataError(
            f"{train_set.reader.path} does not hold the images that {path} was trained on"
        )
    model = _build_model(cfg, len(metadata["classes"]), process)
    recipe = _recipe(cfg, metadata["steps_per_epoch"], len(metadata["classes"]), process)
    optimizer = create_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    scaler = torch.amp.GradScaler(process.device.type, enabled=False)
    state = TrainState(model, None, optimizer, scaler)
    checkpoint.restore(path, state)
    return state, recipe, train_set, _train_sampler(cfg, train_set, recipe, process, state.step)


# --- Data -----------------------------------------------------------------------------------------


def _open_data(cfg: CfgNode) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Training and validation set under one class list: the one of the file, or the training set's folders."""
    train_set = _open_split(cfg, "train", _class_list(cfg))
    count = len(train_set.classes)
    if cfg.MODEL.NUM_CLASSES not in (0, count):
        raise ConfigError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but {cfg.DATA.PATH} has {count} classes. "
            "Leave it 0 to follow the data."
        )
    return train_set, _open_split(cfg, "val", train_set.classes)


def _open_split(cfg: CfgNode, split: str, classes: list[str] | None) -> data.ImageDataset:
    if not cfg.DATA.PATH:
        raise ConfigError(
            "DATA.PATH is empty. Name the folder that holds train and val with --data-path."
        )
    if split == "train":
        transform = data.train_transform(
            cfg.DATA.IMG_SIZE,
            scale=cfg.AUG.SCALE,
            ratio=cfg.AUG.RATIO,
            hflip=cfg.AUG.HFLIP,
            color_jitter=cfg.AUG.COLOR_JITTER,
            auto_augment=cfg.AUG.AUTO_AUGMENT,
            interpolation=cfg.DATA.INTERPOLATION,
            mean=cfg.DATA.MEAN,
            padding=cfg.AUG.PADDING,
        )
    else:
        transform = data.eval_transform(
            cfg.DATA.IMG_SIZE,
            crop_mode=cfg.TEST.CROP_MODE,
            crop_pct=cfg.TEST.CROP_PCT,
            interpolation=cfg.DATA.INTERPOLATION,
            exact=cfg.TEST.EXACT,
        )
    return data.ImageDataset(
        cfg.DATA.PATH,
        split,
        transform=transform,
        train=split == "train",
        seed=cfg.SEED,
        classes=classes,
        allow_missing=cfg.DATA.VAL_SUBSET and split == "val",
        apply_exif=cfg.DATA.EXIF == "apply",
        checksums=cfg.DATA.VERIFY or None,
        skip_bad=cfg.TEST.SKIP_BAD,
        holdout=0.0,
    )


def _class_list(cfg: CfgNode) -> list[str] | None:
    return data.read_class_list(cfg.DATA.CLASS_LIST) if cfg.DATA.CLASS_LIST else None


def _train_sampler(
    cfg: CfgNode,
    train_set: data.ImageDataset,
    recipe: Recipe,
    process: Process,
    start_step: int = 0,
) -> data.TrainBatchSampler:
    return data.TrainBatchSampler(
        len(train_set),
        batch_size=cfg.DATA.BATCH_SIZE,
        micro_batches=recipe.global_batch // cfg.DATA.BATCH_SIZE,
        start_step=start_step,
        total_steps=recipe.epochs * recipe.steps_per_epoch,
        seed=cfg.SEED,
        rank=process.rank,
        world_size=process.world_size,
    )


def _train_batches(
    cfg: CfgNode,
    train_set: data.ImageDataset,
    state: TrainState,
    recipe: Recipe,
    process: Process,
    folder: RunDir,
) -> Iterator[data.TrainBatch]:
    """This process's micro-batches from `state.step` to the end of the run; too many bad images are a DataError."""
    loader = data.train_loader(
        train_set,
        _train_sampler(cfg, train_set, recipe, process, state.step),
        num_workers=cfg.DATA.NUM_WORKERS,
        pin_memory=process.device.type == "cuda",
        timeout=cfg.TRAIN.HANG_SECONDS / 2,
    )
    limit = data.allowed_files(cfg.DATA.MAX_BAD_SAMPLES, len(train_set))
    bad_samples = data.BadSamples(folder.path / "bad_samples.jsonl", limit)
    for batch in loader:
        bad_samples.add(batch.bad)
        yield batch


# --- Model ----------------------------------------------------------------------------------------


def _build_model(cfg: CfgNode, num_classes: int, process: Process) -> nn.Module:
    """The model with its initial weights, the same on every process, on the device."""
    reseed(key(cfg.SEED, "model"))
    model = models.build(
        cfg.MODEL.NAME,
        num_classes=num_classes,
        img_size=cfg.DATA.IMG_SIZE,
        drop_path_rate=cfg.MODEL.DROP_PATH_RATE,
        **cfg.MODEL.ARGS,
    )
    if cfg.MODEL.GRAD_CHECKPOINTING:
        model.set_grad_checkpointing()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info(f"Model: {cfg.MODEL.NAME}, {millions:.2f} M parameters, {num_classes} classes")
    return model.to(process.device)


def _reduction(cfg: CfgNode, model: nn.Module, micro_batches: range, process: Process) -> GradSync:
    """How the gradients of `micro-batches`, those of this process, and of all others become one."""
    if cfg.TRAIN.EXACT_WORLD_SIZE:
        return DeterministicSync(model, micro_batches, process)
    return DDPSync(_parallel(model, cfg.DATA.IMG_SIZE, process), micro_batches, process)


def _parallel(model: nn.Module, img_size: int, process: Process) -> nn.Module:
    """`model` in DDP where there is more than one process.

    DDP regroups its gradients after the first backward pass and then sums them in another order, which three and more
    processes see in the last bits. One pass that is thrown away makes every step, resumed or not, a later one.
    """
    if process.world_size == 1:
        return model
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    net = DistributedDataParallel(
        model,
        device_ids=[process.device] if process.device.type == "cuda" else None,
        forward_sync_buffers=False,  # the reduction does, after a step instead of before it
        gradient_as_bucket_view=True,
    )
    net(torch.zeros(2, 3, img_size, img_size, device=process.device)).sum().backward()
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return net


def _recipe(cfg: CfgNode, steps_per_epoch: int, num_classes: int, process: Process) -> Recipe:
    micro_batches = cfg.TRAIN.GLOBAL_BATCH_SIZE // cfg.DATA.BATCH_SIZE // process.world_size
    scale = cfg.TRAIN.GLOBAL_BATCH_SIZE / REFERENCE_BATCH
    schedule = Schedule(
        total=cfg.TRAIN.EPOCHS * steps_per_epoch,
        warmup=cfg.TRAIN.WARMUP_EPOCHS * steps_per_epoch,
        base=cfg.TRAIN.BASE_LR * scale,
        start=cfg.TRAIN.WARMUP_LR * scale,
        end=cfg.TRAIN.MIN_LR * scale,
    )
    logger.info(
        f"Step: {micro_batches * process.world_size} micro-batches of {cfg.DATA.BATCH_SIZE} images, {micro_batches} on each of "
        f"{process.world_size} processes; learning rate {schedule.start:.3g}, {schedule.base:.3g}, {schedule.end:.3g}"
    )
    transform = data.BatchTransform(
        num_classes=num_classes,
        mean=cfg.DATA.MEAN,
        std=cfg.DATA.STD,
        device=process.device,
        reprob=cfg.AUG.REPROB,
        remode=cfg.AUG.REMODE,
        recount=cfg.AUG.RECOUNT,
        mixup=cfg.AUG.MIXUP,
        cutmix=cfg.AUG.CUTMIX,
        mixup_prob=cfg.AUG.MIXUP_PROB,
        mixup_switch_prob=cfg.AUG.MIXUP_SWITCH_PROB,
        mixup_mode=cfg.AUG.MIXUP_MODE,
    )
    return Recipe(
        seed=cfg.SEED,
        epochs=cfg.TRAIN.EPOCHS,
        steps_per_epoch=steps_per_epoch,
        global_batch=cfg.TRAIN.GLOBAL_BATCH_SIZE,
        micro_batches=range(process.rank * micro_batches, (process.rank + 1) * micro_batches),
        schedule=schedule,
        transform=transform,
        label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
        clip_grad=cfg.TRAIN.CLIP_GRAD,
        amp_dtype=getattr(torch, cfg.AMP_DTYPE),
        print_freq=cfg.PRINT_FREQ,
    )


# --- Validation -----------------------------------------------------------------------------------


def _val_loader(cfg: CfgNode, val_set: data.ImageDataset, process: Process) -> data.Loader:
    """This process's share of the validation images."""
    sampler = data.ShardSampler(
        len(val_set),
        batch_size=cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE,
        rank=process.rank,
        world_size=process.world_size,
    )
    return data.eval_loader(
        val_set,
        sampler,
        num_workers=cfg.DATA.NUM_WORKERS,
        pin_memory=process.device.type == "cuda",
        timeout=cfg.TRAIN.HANG_SECONDS / 2,
    )


def _score(cfg: CfgNode, loader: data.Loader, model: nn.Module, process: Process) -> Accuracy:
    return validate(
        model=model,
        loader=loader,
        normalize=data.Normalize(cfg.DATA.MEAN, cfg.DATA.STD, device=process.device),
        process=process,
        amp_dtype=getattr(torch, cfg.AMP_DTYPE),
        print_freq=cfg.PRINT_FREQ,
    )


def _validate(
    cfg: CfgNode, loader: data.Loader, state: TrainState, writer: MetricWriter, process: Process
) -> bool:
    """Evaluate the model and its EMA, record the accuracies; whether the better one is the best of the run so far."""
    weights = {"val": state.model} | ({"val_ema": state.ema.module} if state.ema else {})
    values, best = {"epoch": state.epoch + 1}, 0.0
    for name, model in weights.items():
        result = _score(cfg, loader, model, process)
        _log_accuracy(result, name)
        values |= {f"{name}/{key}": getattr(result, key) for key in ("acc1", "acc5", "loss")}
        best = max(best, result.acc1)
    if process.is_main:
        writer.metrics(state.step, values | _offset_lengths(cfg, loader, state.model, process))
    improved = best > state.best["acc1"]
    if improved:
        state.best = {"acc1": best, "step": state.step}
    logger.info(f"Max accuracy: {state.best['acc1']:.2f}%")
    return improved


@torch.inference_mode()
def _offset_lengths(
    cfg: CfgNode, loader: data.Loader, model: nn.Module, process: Process
) -> dict[str, float]:
    """Mean length of the sampling offsets of each deformable stage on a few images, in pixels of the input."""
    if not hasattr(model, "sampling_positions"):
        return {}
    normalize = data.Normalize(cfg.DATA.MEAN, cfg.DATA.STD, device=process.device)
    images = [loader.dataset[i].image for i in range(min(PROBED_IMAGES, len(loader.dataset)))]
    model.eval()
    lengths: dict[str, list[float]] = {}
    for layer in model.sampling_positions(normalize(torch.stack(images))):
        name = f"offsets/stage{layer.stage + 1}_pixels"
        lengths.setdefault(name, []).append(layer.offset_length().mean().item())
    model.train()
    return {name: sum(values) / len(values) for name, values in lengths.items()}


def _log_accuracy(result: Accuracy, name: str) -> None:
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


def _preprocessing(cfg: CfgNode) -> str:
    return (
        f"crop_mode {cfg.TEST.CROP_MODE}, {cfg.DATA.IMG_SIZE} px, crop_pct {cfg.TEST.CROP_PCT:g}, "
        f"{cfg.DATA.INTERPOLATION}{'' if cfg.TEST.EXACT else ' by torch'}, {cfg.AMP_DTYPE}"
    )


# --- Checkpoints ----------------------------------------------------------------------------------


def _metadata(
    text: str,
    level: str,
    train_set: data.ImageDataset,
    val_set: data.ImageDataset,
    steps_per_epoch: int,
    process: Process,
) -> dict:
    """What a checkpoint tells beside the state: enough to understand it, and to notice a changed world."""
    settings = yaml.safe_load(text)
    return {
        "model": settings["MODEL"]["NAME"],
        "classes": train_set.classes,
        "data": train_set.fingerprint,
        "val_data": val_set.fingerprint,
        "decoder": data.decoder_fingerprint(),
        "steps_per_epoch": steps_per_epoch,
        "promise": level,
        "processes": process.world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "revision": compat.revision(),
        "device": compat.device_name(process.device),
        # What a GPU computes does not depend on the threads beside it.
        "threads": torch.get_num_threads() if process.device.type == "cpu" else None,
        "config": settings,
    }


def _find_checkpoint(cfg: CfgNode, folder: RunDir) -> Path | None:
    """The checkpoint to go on from: the run's own newest, else the one that CHECKPOINT.RESUME names.

    The run's own comes first so that a command with --resume can be started again after it was stopped.
    """
    own = checkpoint.latest(folder.checkpoints) if cfg.CHECKPOINT.AUTO_RESUME else None
    if not cfg.CHECKPOINT.RESUME:
        return own
    named = checkpoint.resolve(Path(cfg.CHECKPOINT.RESUME))
    if own is None or own.resolve() == named.resolve():
        return named
    if named.resolve().is_relative_to(folder.path.resolve()):
        raise CheckpointError(
            f"{folder.path} has gone on to {own.name}: to branch off at {named.name}, give the new run another --tag."
        )
    logger.info(f"This run has begun already: it goes on from its own {own.name}, not from {named}")
    return own


# --- Small metadata ----------------------------------------------------------------------------------


def _run_path(cfg: CfgNode) -> Path:
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


def _log_start(cfg: CfgNode, sources: dict[str, str], process: Process) -> None:
    logger.info(
        f"{process.world_size} process(es) on {process.device.type}, {torch.get_num_threads()} CPU threads each, "
        f"torch {torch.__version__}, timm {timm.__version__}, code {compat.revision()}"
    )
    if cfg.AMP_DTYPE == "float16" and process.device.type == "cpu":
        logger.warning("float16 is slow on a CPU: --amp-dtype bfloat16 or float32 is not")
    settings: dict[str, list[str]] = {}
    for name, source in sources.items():
        value = functools.reduce(getattr, name.split("."), cfg)
        settings.setdefault(source.partition(":")[0], []).append(f"{name} {value}")
    for source, values in settings.items():
        logger.info(f"{source}: {', '.join(values)}")
