"""From configuration to objects, in one file: data sets, loaders, model, optimizer, gradient synchronisation, recipe.

It is one file so that nothing else reads the configuration, group by group: what is built takes plain arguments.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from timm.layers import to_2tuple
from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

import data
import models
from analysis import imagenet
from engine import agreement, compat, suite
from engine.compilation import compile_model
from engine.distill import Colours, Distillation, fingerprint, load_teacher
from engine.grad_sync import DDPSync, DeterministicSync, GradSync, wrap_in_ddp
from engine.loop import Recipe
from engine.optim import Schedule, create_optimizer
from engine.parameters import freeze, learning_rate_scales
from engine.precision import resolve_amp_dtype, resolve_kernels
from engine.pretrained import load_pretrained
from engine.provenance import find_provenance
from engine.sanity import schedule_warnings
from engine.state import TrainState
from models.dat import VARIANTS
from utils.devices import explain_no_gpu
from utils.distributed import Process, init_distributed, is_main, share_errors
from utils.download import download
from utils.errors import ConfigError
from utils.logging import logger, start_logging
from utils.machine import list_shortages
from utils.rng import key, reseed
from utils.text import format_size, quantity
from utils.version import CHECKPOINT_FORMAT, __version__
from utils.yaml_nodes import to_dict

# Keys of AUG: per image in the loader's workers, and per micro-batch on the device.
IMAGE_KEYS = ("SCALE", "RATIO", "HFLIP", "COLOR_JITTER", "AUTO_AUGMENT", "ON_DEVICE", "PADDING")
MIX_KEYS = ("MIXUP", "CUTMIX", "MIXUP_PROB", "MIXUP_SWITCH_PROB", "MIXUP_MODE")
BATCH_KEYS = ("REPROB", "REMODE", "RECOUNT", "ON_DEVICE", *MIX_KEYS)

GPU_DRIVER = Path("/proc/driver/nvidia/version")


def lower(group: CfgNode, names: Iterable[str]) -> dict[str, object]:
    """Keyword arguments: the keys `names` of a group, in small letters."""
    return {name.lower(): group[name] for name in names}


def run_path(cfg: CfgNode) -> Path:
    """The directory of this run."""
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


@contextmanager
def join_run(cfg: CfgNode, mode: str) -> Iterator[Process]:
    """This process, once all processes of the run have joined and agree on what to do.

    mode: "train", "eval" or "throughput". Raises ConfigError where they differ in settings, code or packages.
    """
    with init_distributed(cfg.DEVICE, cfg.THREADS, 2 * cfg.TRAIN.HANG_SECONDS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        with share_errors():
            check_model(cfg, training=mode == "train")
            environment = compat.describe_environment(process)
        agreement.require_same_settings(mode, to_dict(cfg), environment, process.device)
        yield process


def prepare_device(cfg: CfgNode, device: torch.device) -> CfgNode:
    """Make this process compute as `cfg` says; return `cfg` with what AMP_DTYPE and MODEL.KERNELS auto mean here.

    Raises ConfigError for kernels that `device` cannot run, and where auto means something else on another process.
    """
    if cfg.TRAIN.DETERMINISTIC and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first product
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    resolved = cfg.clone()
    resolved.defrost()
    with share_errors():
        resolved.AMP_DTYPE = resolve_amp_dtype(cfg.AMP_DTYPE, device)
        resolved.MODEL.KERNELS = resolve_kernels(cfg.MODEL.KERNELS, device)
    agreement.require_same(
        {"AMP_DTYPE": resolved.AMP_DTYPE, "MODEL.KERNELS": resolved.MODEL.KERNELS}
    )
    resolved.freeze()
    return resolved


def at_size(cfg: CfgNode, size: int | list[int]) -> CfgNode:
    """`cfg` for images of another size; a DAT's tables keep the size that it was trained at."""
    if size == cfg.DATA.IMG_SIZE:
        return cfg
    sized = cfg.clone()
    sized.defrost()
    if "rpe_img_size" not in VARIANTS.get(cfg.MODEL.NAME, {"rpe_img_size": None}):
        sized.MODEL.ARGS.setdefault("rpe_img_size", cfg.DATA.IMG_SIZE)
    sized.DATA.IMG_SIZE = size
    sized.freeze()
    return sized


# --- Data -----------------------------------------------------------------------------------------


def open_data(
    cfg: CfgNode, saved_classes: list[str] | None = None
) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Training and validation set under one class list, the same on all processes.

    The list is the one of DATA.CLASS_LIST, `saved_classes` of the checkpoint that is resumed if they are the same
    classes, or of the training set's folders. Raises ConfigError where MODEL.NUM_CLASSES is another number, and
    DataError where the processes see different data.
    """
    with share_errors():
        train_set = open_split(cfg, "train", class_list(cfg))
        if saved_classes is not None and not cfg.DATA.CLASS_LIST:
            known = train_set.classes
            if saved_classes != known and data.same_names(saved_classes, known):
                train_set = open_split(cfg, "train", saved_classes)  # the run's names, their order
        check_num_classes(cfg, len(train_set.classes), cfg.DATA.CLASS_LIST or cfg.DATA.PATH)
        val_set = open_split(cfg, "val", train_set.classes)
    agreement.require_same_data(train_set.classes, {"train": train_set, "val": val_set})
    logger.info(f"Training on {train_set}; validating on {val_set}")
    return train_set, val_set


def check_num_classes(cfg: CfgNode, count: int, where: str) -> None:
    """Raise ConfigError where MODEL.NUM_CLASSES is another number than the `count` classes of `where`."""
    if cfg.MODEL.NUM_CLASSES not in (0, count):
        raise ConfigError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}, but {where} has {quantity(count, 'class')}. Leave it 0 to "
            "follow the data. To evaluate on a part of the model's classes, name all of them with DATA.CLASS_LIST and "
            "set DATA.VAL_SUBSET=True."
        )


def data_root(cfg: CfgNode) -> Path | data.RemotePath:
    """The folder of DATA.PATH, on a disk or on a server."""
    return data.open_root(cfg.DATA.PATH, **lower(cfg.DATA, ("CACHE_DIR", "CACHE_SIZE")))


def open_split(cfg: CfgNode, split: str, classes: list[str] | None) -> data.ImageDataset:
    """The images of "train", augmented, or of "val", resized and cropped.

    With DATA.HOLDOUT both are parts of the training set, and the validation set is left unread.
    """
    root, share = data_root(cfg), cfg.DATA.HOLDOUT
    if split == "val" and not share:
        return open_set(cfg, root, split, classes, "own", cfg.DATA.VAL_SUBSET)
    if split == "val":
        transform, part = eval_transform(cfg, "own"), "holdout"
    else:
        transform, part = train_transform(cfg, cfg.DATA.IMG_SIZE), "train"
    dataset = data.ImageDataset(
        root,
        "train",
        transform=transform,
        later_transforms=[(e, train_transform(cfg, s)) for e, s in cfg.DATA.IMG_SIZE_SCHEDULE],
        train=split == "train",
        classes=classes,
        allow_missing=False,
        holdout=share,
        part=part,
        checksums=cfg.DATA.VERIFY or None,
        **_image_arguments(cfg),
    )
    _report_unread(dataset)
    return dataset


def open_set(
    cfg: CfgNode,
    root: Path | data.RemotePath,
    split: str,
    classes: list[str] | None,
    crop: str,
    allow_missing: bool,
) -> data.ImageDataset:
    """The images of `split` below `root`, resized and cropped; `crop` is a key of `suite.CROPS`."""
    dataset = data.ImageDataset(
        root,
        split,
        transform=eval_transform(cfg, crop),
        train=False,
        classes=classes,
        allow_missing=allow_missing,
        holdout=0.0,
        checksums=(cfg.DATA.VERIFY or None) if split == "val" else None,
        **_image_arguments(cfg),
    )
    _report_unread(dataset)
    return dataset


def _report_unread(dataset: data.ImageDataset) -> None:
    """Log, on the main process, which other forms of a split are left unread."""
    if is_main() and (warning := dataset.reader.describe_unread()):
        _warn_once(warning)


@functools.cache
def _warn_once(warning: str) -> None:
    """Log a warning once, however often a split is opened."""
    logger.warning(warning)


def _image_arguments(cfg: CfgNode) -> dict[str, object]:
    return {
        "seed": cfg.SEED,
        "apply_exif": cfg.DATA.EXIF == "apply",
        "skip_bad": cfg.TEST.SKIP_BAD,
    }


def train_transform(cfg: CfgNode, size: int | list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """From an image's pixels to an augmented sample of `size`."""
    return data.train_transform(
        size,
        mean=cfg.DATA.MEAN,
        interpolation=cfg.DATA.INTERPOLATION,
        **lower(cfg.AUG, IMAGE_KEYS),
    )


def eval_transform(cfg: CfgNode, crop: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """From a picture's pixels to the model's."""
    settings = lower(cfg.TEST, ("CROP_MODE", "CROP_PCT", "EXACT")) | suite.CROPS[crop]
    transform = data.eval_transform(
        cfg.DATA.IMG_SIZE, interpolation=cfg.DATA.INTERPOLATION, **settings
    )
    return suite.WithoutBorder(transform, suite.BORDER) if crop == "border" else transform


def describe_pixels(cfg: CfgNode, crop: str) -> dict[str, object]:
    """What changes the pixels of a set, for the record of an evaluation."""
    settings = lower(cfg.TEST, ("CROP_MODE", "CROP_PCT", "EXACT")) | suite.CROPS[crop]
    settings |= {"border": suite.BORDER} if crop == "border" else {}
    size = cfg.DATA.IMG_SIZE
    settings |= {"img_size": size if isinstance(size, int) else format_size(size)}
    return settings | lower(cfg.DATA, ("INTERPOLATION",))


def class_list(cfg: CfgNode) -> list[str] | None:
    """The class names of DATA.CLASS_LIST, None without one."""
    if cfg.DATA.CLASS_LIST == "imagenet-1k":
        return imagenet.wnids()
    return data.read_class_list(cfg.DATA.CLASS_LIST) if cfg.DATA.CLASS_LIST else None


def train_sampler(
    cfg: CfgNode, train_set: data.ImageDataset, recipe: Recipe, process: Process, start_step: int
) -> data.TrainBatchSampler:
    """The micro-batches of this process from `start_step` to the end of the run."""
    return data.TrainBatchSampler(
        len(train_set),
        batch_size=cfg.DATA.BATCH_SIZE,
        micro_batches=recipe.global_batch // cfg.DATA.BATCH_SIZE,
        start_step=start_step,
        total_steps=recipe.epochs * recipe.steps_per_epoch,
        seed=cfg.SEED,
        repeats=cfg.AUG.REPEATS,
        rank=process.rank,
        world_size=process.world_size,
    )


def train_batches(
    cfg: CfgNode,
    train_set: data.ImageDataset,
    recipe: Recipe,
    process: Process,
    start_step: int,
    folder: Path,
) -> Iterator[data.TrainBatch]:
    """This process's micro-batches from `start_step` to the end of the run.

    Unreadable images are recorded in `folder`; too many are a DataError.
    """
    loader = data.train_loader(
        train_set,
        train_sampler(cfg, train_set, recipe, process, start_step),
        **_loader_arguments(cfg, process),
    )
    limit = data.allowed_files(cfg.DATA.MAX_BAD_SAMPLES, len(train_set))
    bad_samples = data.BadSamples(folder / "bad_samples.jsonl", limit)
    for batch in loader:
        bad_samples.add(batch.bad)
        yield batch


def val_loader(cfg: CfgNode, val_set: data.ImageDataset, process: Process) -> data.Loader:
    """This process's share of the validation images."""
    sampler = data.ShardSampler(
        len(val_set),
        batch_size=cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE,
        rank=process.rank,
        world_size=process.world_size,
    )
    return data.eval_loader(val_set, sampler, **_loader_arguments(cfg, process))


def compiled_batch_size(cfg: CfgNode) -> int:
    """Images of every batch of an evaluation whose model is compiled, the last one filled up; 0 where it is not."""
    return (cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE) if cfg.MODEL.COMPILE else 0


def _loader_arguments(cfg: CfgNode, process: Process) -> dict[str, object]:
    return {
        "num_workers": cfg.DATA.NUM_WORKERS,
        "pin_memory": process.device.type == "cuda",
        "timeout": cfg.TRAIN.HANG_SECONDS / 2,
    }


def normalize(cfg: CfgNode, device: torch.device) -> data.Normalize:
    """From pixels to the model's input."""
    return data.Normalize(cfg.DATA.MEAN, cfg.DATA.STD, in_chans=cfg.DATA.IN_CHANS, device=device)


def describe_preprocessing(cfg: CfgNode) -> str:
    """What decides the pixels and the precision of an evaluation, for people."""
    return (
        f"crop_mode {cfg.TEST.CROP_MODE}, {format_size(cfg.DATA.IMG_SIZE)} px, crop_pct {cfg.TEST.CROP_PCT:g}, "
        f"{cfg.DATA.INTERPOLATION}{'' if cfg.TEST.EXACT else ' by torch'}, {cfg.AMP_DTYPE}"
    )


# --- Model and state ------------------------------------------------------------------------------


def check_model(cfg: CfgNode, *, training: bool) -> None:
    """Raise ConfigError for a model that cannot be built or take a batch of the images; reads no data.

    training: also for TRAIN.FREEZE and TRAIN.LR_SCALES with names of parameters that it does not have.
    """
    models.check_forward(
        cfg.MODEL.NAME,
        num_classes=cfg.MODEL.NUM_CLASSES or 1000,
        img_size=cfg.DATA.IMG_SIZE,
        sizes=image_sizes(cfg) if training else [to_2tuple(cfg.DATA.IMG_SIZE)],
        in_chans=cfg.DATA.IN_CHANS,
        drop_path_rate=cfg.MODEL.DROP_PATH_RATE,
        batch_size=cfg.DATA.BATCH_SIZE,
        training=training,
        grad_checkpointing=cfg.MODEL.GRAD_CHECKPOINTING,
        **cfg.MODEL.ARGS,
    )
    if training and (cfg.TRAIN.FREEZE or cfg.TRAIN.LR_SCALES):
        model = models.build(cfg.MODEL.NAME, **_model_arguments(cfg, num_classes=2))
        if cfg.TRAIN.FREEZE:
            freeze(model, cfg.TRAIN.FREEZE)
        learning_rate_scales(model, 1.0, cfg.TRAIN.LR_SCALES)


def epoch_pixels(cfg: CfgNode) -> tuple[int, ...]:
    """The pixels of a training image in each epoch."""
    pixels = [math.prod(to_2tuple(cfg.DATA.IMG_SIZE))] * cfg.TRAIN.EPOCHS
    for first, size in cfg.DATA.IMG_SIZE_SCHEDULE:
        pixels[first:] = [math.prod(to_2tuple(size))] * len(pixels[first:])
    return tuple(pixels)


def image_sizes(cfg: CfgNode) -> list[tuple[int, int]]:
    """The sizes (height, width) of images that the model sees, largest last."""
    sizes = [cfg.DATA.IMG_SIZE, *(size for _, size in cfg.DATA.IMG_SIZE_SCHEDULE)]
    return sorted({to_2tuple(size) for size in sizes}, key=math.prod)


def build_model(cfg: CfgNode, num_classes: int, device: torch.device) -> nn.Module:
    """The model with its initial weights, a function of SEED, on `device`."""
    reseed(key(cfg.SEED, "model"))
    model = models.build(cfg.MODEL.NAME, **_model_arguments(cfg, num_classes))
    if cfg.MODEL.GRAD_CHECKPOINTING:
        models.set_grad_checkpointing(model)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info(f"Model: {cfg.MODEL.NAME}, {millions:.2f} M parameters, {num_classes} classes")
    return model.to(device)


def input_shape(cfg: CfgNode) -> tuple[int, int, int]:
    """(channels, height, width) of the model's input."""
    return cfg.DATA.IN_CHANS, *to_2tuple(cfg.DATA.IMG_SIZE)


def _model_arguments(cfg: CfgNode, num_classes: int) -> dict[str, object]:
    own = {"stochastic_depth": cfg.MODEL.STOCHASTIC_DEPTH} if cfg.MODEL.NAME in VARIANTS else {}
    return {
        "num_classes": num_classes,
        "img_size": cfg.DATA.IMG_SIZE,
        "in_chans": cfg.DATA.IN_CHANS,
        "drop_path_rate": cfg.MODEL.DROP_PATH_RATE,
        **own,
        **cfg.MODEL.ARGS,
    }


def compile_if(cfg: CfgNode, model: nn.Module) -> None:
    """Compile `model` if MODEL.COMPILE."""
    if cfg.MODEL.COMPILE:
        own = cfg.MODEL.NAME in VARIANTS  # others may need several graphs
        compile_model(model, cache=Path(cfg.OUTPUT) / "compiled", one_graph=own)


def build_state(
    cfg: CfgNode, classes: list[str], device: torch.device, *, fresh: bool
) -> TrainState:
    """The state before the first step; a `fresh` one starts from the weights of CHECKPOINT.PRETRAINED, if any."""
    model = build_model(cfg, len(classes), device)
    if fresh and cfg.CHECKPOINT.PRETRAINED:
        path = download(cfg.CHECKPOINT.PRETRAINED)
        load_pretrained(model, path, strict=False, classes=classes)
        warn_of_other_colours(cfg, path)
    freeze_some(cfg.TRAIN, model)
    optimizer = build_optimizer(cfg.TRAIN, model)
    ema = build_ema(cfg.TRAIN, model) if cfg.TRAIN.EMA_DECAY else None
    if ema is not None:
        compile_if(cfg, ema.module)
    return TrainState(
        model=model,
        ema=ema,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=cfg.AMP_DTYPE == "float16"),
    )


def warn_of_other_colours(cfg: CfgNode, path: Path) -> None:
    """Warn where the weights at `path` say that they were trained on images normalised otherwise than this run's."""
    known = find_provenance(path)
    saved = known.metadata if known else {"config": {}}
    names = ("DATA.MEAN", "DATA.STD")
    for change in compat.list_evaluation_changes(saved, {"config": to_dict(cfg)}, names):
        logger.warning(f"The weights of {path} were trained with other colours: {change}")


def freeze_some(train: CfgNode, model: nn.Module) -> None:
    """Freeze the parameters of `model` that TRAIN.FREEZE names."""
    if train.FREEZE:
        freeze(model, train.FREEZE)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trained, total = sum(n for n, needed in sizes if needed), sum(n for n, _ in sizes)
        logger.info(f"Trained: {trained:,} of {total:,} parameters; the others are frozen")


def build_ema(train: CfgNode, model: nn.Module) -> ModelEmaV3:
    """The average of the weights, which begins as a copy."""
    return ModelEmaV3(
        model,
        decay=train.EMA_DECAY,
        use_warmup=train.EMA_WARMUP,
        warmup_gamma=train.EMA_WARMUP_GAMMA,
        warmup_power=train.EMA_WARMUP_POWER,
    )


def build_optimizer(train: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `model`'s parameters, without a state yet."""
    return create_optimizer(
        model,
        train.OPTIMIZER.NAME,
        weight_decay=train.WEIGHT_DECAY,
        momentum=train.OPTIMIZER.MOMENTUM,
        betas=train.ADAM_BETAS,
        eps=train.ADAM_EPS,
        lr_scales=learning_rate_scales(model, train.LAYER_DECAY, train.LR_SCALES),
    )


def build_grad_sync(
    cfg: CfgNode, model: nn.Module, micro_batches: range, process: Process
) -> GradSync:
    """How the gradients of `micro_batches`, those of this process, and of all others become one."""
    if cfg.TRAIN.EXACT_WORLD_SIZE:
        compile_if(cfg, model)
        return DeterministicSync(model, micro_batches, process)
    net = wrap_in_ddp(model, input_shape(cfg), process)
    compile_if(cfg, model)  # after the pass of another shape that DDP needs
    return DDPSync(net, micro_batches, process)


def build_recipe(
    cfg: CfgNode, steps_per_epoch: int, classes: list[str], process: Process
) -> Recipe:
    """What every step does."""
    own = cfg.TRAIN.GLOBAL_BATCH_SIZE // cfg.DATA.BATCH_SIZE // process.world_size
    scale = cfg.TRAIN.GLOBAL_BATCH_SIZE / cfg.TRAIN.LR_BASE_SIZE
    schedule = Schedule(
        total=cfg.TRAIN.EPOCHS * steps_per_epoch,
        warmup=warmup_steps(cfg.TRAIN, steps_per_epoch),
        base=cfg.TRAIN.BASE_LR * scale,
        start=cfg.TRAIN.WARMUP_LR * scale,
        end=cfg.TRAIN.MIN_LR * scale,
    )
    for warning in list_schedule_warnings(cfg, steps_per_epoch) if process.is_main else []:
        logger.warning(warning)
    warmup = f"{schedule.start:.3g} (warm-up), " if schedule.warmup else ""
    logger.info(
        f"Step: {quantity(own * process.world_size, 'micro-batch')} of {quantity(cfg.DATA.BATCH_SIZE, 'image')}, {own} "
        f"on each of {process.world_size} process(es); learning rate {warmup}{schedule.base:.3g} (peak), "
        f"{schedule.end:.3g} (last)"
    )
    return Recipe(
        seed=cfg.SEED,
        epochs=cfg.TRAIN.EPOCHS,
        steps_per_epoch=steps_per_epoch,
        pixels=epoch_pixels(cfg),
        global_batch=cfg.TRAIN.GLOBAL_BATCH_SIZE,
        micro_batches=range(process.rank * own, (process.rank + 1) * own),
        schedule=schedule,
        transform=data.BatchTransform(
            num_classes=len(classes),
            device=process.device,
            **lower(cfg.DATA, ("MEAN", "STD", "IN_CHANS")),
            interpolation=cfg.DATA.INTERPOLATION,
            **lower(cfg.AUG, BATCH_KEYS),
        ),
        mixup_off_epoch=cfg.AUG.MIXUP_OFF_EPOCH,
        label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
        distillation=build_distillation(cfg, classes, process.device),
        clip_grad=cfg.TRAIN.CLIP_GRAD,
        amp_dtype=getattr(torch, cfg.AMP_DTYPE),
        print_freq=cfg.PRINT_FREQ,
    )


def list_schedule_warnings(cfg: CfgNode, steps_per_epoch: int) -> list[str]:
    """What in the schedule of the run is probably not meant."""
    return schedule_warnings(
        epochs=cfg.TRAIN.EPOCHS,
        steps_per_epoch=steps_per_epoch,
        ema_decay=0.0 if cfg.TRAIN.EMA_WARMUP else cfg.TRAIN.EMA_DECAY,
        unreached={
            "AUG.MIXUP_OFF_EPOCH": cfg.AUG.MIXUP_OFF_EPOCH,
            "DATA.IMG_SIZE_SCHEDULE": max((e for e, _ in cfg.DATA.IMG_SIZE_SCHEDULE), default=0),
        },
        **lower(cfg, ("PRINT_FREQ", "EVAL_FREQ", "SAVE_FREQ", "SAVE_STEPS")),
    )


def build_distillation(
    cfg: CfgNode, classes: list[str], device: torch.device
) -> Distillation | None:
    """How the student follows its teacher; None without one."""
    if not cfg.DISTILL.TEACHER_PATH:
        return None
    path = download(cfg.DISTILL.TEACHER_PATH)
    teacher = load_teacher(path, cfg.DISTILL.TEACHER_MODEL, classes, device)
    if cfg.DATA.IN_CHANS != 3:
        raise ConfigError("DATA.IN_CHANS 1: a teacher sees colours, set it to 3")
    colours = Colours(cfg.DATA.MEAN, cfg.DATA.STD)
    return Distillation(teacher, colours, **lower(cfg.DISTILL, ("TYPE", "ALPHA", "TAU")))


def warmup_steps(train: CfgNode, steps_per_epoch: int) -> int:
    """Steps of warm-up. Raises ConfigError where that is the entire training."""
    total = train.EPOCHS * steps_per_epoch
    if total <= train.WARMUP_STEPS:
        raise ConfigError(
            f"TRAIN.WARMUP_STEPS is {train.WARMUP_STEPS}, but the training has {total} steps. Shorten the warm-up."
        )
    return train.WARMUP_STEPS or train.WARMUP_EPOCHS * steps_per_epoch


# --- Checkpoints ----------------------------------------------------------------------------------


def build_metadata(
    cfg: CfgNode,
    train_set: data.ImageDataset,
    val_set: data.ImageDataset,
    steps_per_epoch: int,
    process: Process,
) -> dict:
    """What a checkpoint holds beside the state: enough to understand it, and to notice what changed since."""
    path = cfg.DISTILL.TEACHER_PATH
    with share_errors():
        teacher = fingerprint(download(path)) if path else None
    agreement.require_same({"the teacher's SHA-256": teacher})  # each process has its own copy
    return {
        "format": CHECKPOINT_FORMAT,
        "model": cfg.MODEL.NAME,
        "classes": train_set.classes,
        "data": train_set.fingerprint,
        "val_data": val_set.fingerprint,
        "images": {"train": len(train_set), "val": len(val_set)},
        "decoder": data.decoder_fingerprint(),
        "teacher": teacher,
        "steps_per_epoch": steps_per_epoch,
        "reproducibility": compat.reproducibility(
            process.device,
            exact_world_size=cfg.TRAIN.EXACT_WORLD_SIZE,
            deterministic=cfg.TRAIN.DETERMINISTIC,
        ),
        **compat.describe_environment(process),
        "config": to_dict(cfg),
    }


# --- Log ------------------------------------------------------------------------------------------


def log_start(cfg: CfgNode, sources: dict[str, str], process: Process, mode: str) -> None:
    """Log the machine, the versions and every setting that is no default, with the file or flag it comes from.

    mode: "train", "eval" or "throughput", which loads no images.
    """
    logger.info(
        f"{process.world_size} process(es) on {process.device.type}, {torch.get_num_threads()} CPU threads each "
        f"({process.threads_from}), "
        f"torch {torch.__version__}, timm {timm.__version__}, code {__version__} {compat.revision()}"
    )
    if process.device.type == "cpu" and cfg.DEVICE == "auto" and GPU_DRIVER.exists():
        logger.warning(
            f"This machine has a GPU driver, but {explain_no_gpu()}. DEVICE cpu says that this is meant."
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    images = cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE
    images += cfg.DATA.BATCH_SIZE if mode == "train" else 0
    workers = cfg.DATA.NUM_WORKERS if mode != "throughput" else 0
    for shortage in list_shortages(workers, local * workers, images, image_sizes(cfg)[-1]):
        logger.warning(shortage)
    settings: dict[str, list[str]] = {}
    for name, source in sources.items():
        value = functools.reduce(getattr, name.split("."), cfg)
        settings.setdefault(source.partition(":")[0], []).append(f"{name} {value or repr(value)}")
    for source, values in settings.items():
        logger.info(f"{source}: {', '.join(values)}")
