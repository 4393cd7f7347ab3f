"""Configuration, in one file: every key with default and check, flags, foreign names, and what does not fit together.

`parse(argv)` gives the frozen configuration, or one ConfigError that lists everything wrong, a line each. The last of
these wins: the defaults below, `BASE` files, the file of `--cfg`, `--opts`, the other flags. Neither torch nor NumPy
is imported, so that help and refusals come at once. The values live in a yacs CfgNode; utils/schema.py reads them.
"""

import argparse
import contextlib
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from yacs.config import CfgNode

from utils import first_edition
from utils.checks import (
    ANY,
    AREAS,
    BETAS,
    CHANNELS,
    CLASSES,
    COLOURS,
    DATA_PATH,
    DECAY,
    FACTOR,
    FILLED_PATH,
    FOLDER_NAME,
    NAME,
    NAME_OR_NONE,
    NAMES,
    PATH,
    PATTERNS,
    POLICY,
    POSITIVE,
    RATIOS,
    RUN_PATH,
    SCALES,
    SET_NAMES,
    SHARE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    SIZE,
    SIZE_SCHEDULE,
    SIZES,
    SPREADS,
    WEIGHTS,
    at_least,
    between,
    one_of,
)
from utils.errors import ConfigError
from utils.schema import Draft, Key, Schema, last_part, read_file
from utils.yaml_nodes import Loader, dump, to_python

__all__ = [
    "FLAGS",
    "KEYS",
    "SCHEMA",
    "Command",
    "check_world_size",
    "dump",
    "load",
    "load_values",
    "parse",
]

# --- The keys -------------------------------------------------------------------------------------


# fmt: off
SCHEMA = (
    # ---- the run ----
    Key("OUTPUT", "output", FILLED_PATH, "folder of all runs; this one is <OUTPUT>/<MODEL.NAME>/<TAG>"),
    Key("TAG", "default", FOLDER_NAME, "name that distinguishes this run from others of the same model"),
    Key("SEED", 0, at_least(0), "every random number of the run is a function of it"),
    Key("PRINT_FREQ", 10, at_least(1), "steps from one log line and metrics record to the next"),
    Key("EVAL_FREQ", 1, at_least(1), "epochs from one evaluation to the next"),
    Key("SAVE_FREQ", 1, at_least(1), "epochs from one checkpoint to the next"),
    Key("SAVE_STEPS", 0, at_least(0), "steps from one checkpoint to the next; 0: by epochs alone"),
    Key("THREADS", 0, between(0, 1024), "CPU threads of a process; 0: OMP_NUM_THREADS, else cores / processes"),
    Key("DEVICE", "auto", one_of("auto", "cpu", "cuda"), "where to compute; auto: cuda where there is one"),
    Key("AMP_DTYPE", "auto", one_of("auto", "float32", "bfloat16", "float16"),
        "autocast type, float32: none; auto: float16 on CUDA, bfloat16 on CPUs with instructions for it, else float32"),

    # ---- data ----
    Key("DATA.PATH", "imagenet", DATA_PATH,
        "dataset: folder with train and val, each a folder, .pack, .zip or .tar of class folders; or its address"),
    Key("DATA.CACHE_DIR", "", PATH, "folder for parts of data that is on a server; empty: ~/.cache/dat"),
    Key("DATA.CACHE_SIZE", 20.0, at_least(0),
        "size limit of DATA.CACHE_DIR in GiB, for all runs with that folder; 0: no cache"),
    Key("DATA.HOLDOUT", 0.0, SHARE_BELOW_1,
        "fraction of each training class to validate on, chosen by a hash of <class>/<file>; 0: the val split"),
    Key("DATA.CLASS_LIST", "", PATH,
        "text file, a class name a line, or imagenet-1k; empty: the training set's class folders"),
    Key("DATA.VAL_SUBSET", False, ANY, "the validation set may lack classes"),
    Key("DATA.BATCH_SIZE", 128, at_least(1), "images of a micro-batch: what a process forwards at once"),
    Key("DATA.IMG_SIZE", 224, SIZE, "pixels of the model's input: side of a square, or [height, width]", pair=True),
    Key("DATA.IMG_SIZE_SCHEDULE", [], SIZE_SCHEDULE, "training's sizes from some epochs on; evaluation is at IMG_SIZE"),
    Key("DATA.INTERPOLATION", "bicubic", one_of("nearest", "bilinear", "bicubic", "lanczos"), "for resizing"),
    Key("DATA.IN_CHANS", 3, CHANNELS, "channels of the model's input; 1: the luma of the colours"),
    Key("DATA.MEAN", [0.485, 0.456, 0.406], COLOURS, "mean of the red, green and blue values, scaled to 0 … 1"),
    Key("DATA.STD", [0.229, 0.224, 0.225], SPREADS, "standard deviations of the same values"),
    Key("DATA.NUM_WORKERS", 8, between(0, 1024), "loader processes of each process; 0: load in the process itself"),
    Key("DATA.EXIF", "ignore", one_of("ignore", "apply"), "what to do with the EXIF orientation; published: ignore"),
    Key("DATA.VERIFY", "", PATH, "index of tools/doctor.py --sha, compared with every image read; empty: sizes alone"),
    Key("DATA.MAX_BAD_SAMPLES", -1, at_least(-1),
        "unreadable training files replaced before the run ends; -1: 0.01 % of the images, at least 10"),

    # ---- model ----
    Key("MODEL.NAME", "dat_tiny", NAME, "any name that timm knows, ours included"),
    Key("MODEL.ARGS", {}, ANY, "further arguments of the model's constructor"),
    Key("MODEL.NUM_CLASSES", 0, CLASSES, "size of the head; 0: as many as the class list has"),
    Key("MODEL.DROP_PATH_RATE", 0.2, SHARE_BELOW_1, "fraction of residual branches skipped in the last block"),
    Key("MODEL.STOCHASTIC_DEPTH", "independent", one_of("independent", "balanced"),
        "independent: drops each image at random (published); balanced: as many in every micro-batch (our models)"),
    Key("MODEL.LABEL_SMOOTHING", 0.1, SHARE_BELOW_1, "fraction of the target spread over all classes"),
    Key("MODEL.COMPILE", False, ANY, "torch.compile the model, as one graph; for GPUs, on CPUs it is slower"),
    Key("MODEL.KERNELS", "auto", one_of("auto", "reference", "fused"),
        "attention kernels; fused: those in Triton; auto: fused on CUDA cards that run them, else PyTorch reference"),
    Key("MODEL.GRAD_CHECKPOINTING", False, ANY, "recompute activations in the backward pass to save memory"),

    # ---- augmentation ----
    Key("AUG.SCALE", [0.08, 1.0], AREAS, "fraction of the image's area that the random crop keeps"),
    Key("AUG.RATIO", [3 / 4, 4 / 3], RATIOS, "width / height of the random crop"),
    Key("AUG.PADDING", 0, at_least(0), "pixels; above 0: pad and crop at random (CIFAR) instead of SCALE and RATIO"),
    Key("AUG.HFLIP", 0.5, SHARE, "probability of a horizontal flip"),
    Key("AUG.COLOR_JITTER", 0.4, SHARE, "strength; timm applies it only without AUTO_AUGMENT or with 3a"),
    Key("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", POLICY, "timm's policy; empty: none"),
    Key("AUG.ON_DEVICE", False, ANY, "the policy, a RandAugment, changes pixels on the device; the workers draw it"),
    Key("AUG.REPEATS", 1, at_least(1), "times that a step holds each image, augmented differently (DeiT: 3)"),
    Key("AUG.REPROB", 0.25, SHARE, "probability of random erasing"),
    Key("AUG.REMODE", "pixel", one_of("const", "rand", "pixel"), "filling of erased boxes"),
    Key("AUG.RECOUNT", 1, at_least(1), "most boxes erased in an image"),
    Key("AUG.MIXUP", 0.8, at_least(0), "Mixup's alpha; 0: off"),
    Key("AUG.CUTMIX", 1.0, at_least(0), "CutMix's alpha; 0: off"),
    Key("AUG.MIXUP_PROB", 1.0, SHARE, "probability that a micro-batch is mixed"),
    Key("AUG.MIXUP_SWITCH_PROB", 0.5, SHARE, "probability of CutMix where both are on"),
    Key("AUG.MIXUP_MODE", "batch", one_of("batch", "pair", "elem"), "what shares one mixing coefficient"),
    Key("AUG.MIXUP_OFF_EPOCH", 0, at_least(0), "epoch, counted from 0, from which on nothing is mixed; 0: never"),

    # ---- training; the learning rates are for a global batch of LR_BASE_SIZE and scale with it ----
    Key("TRAIN.EPOCHS", 300, at_least(1), "passes over the training set"),
    Key("TRAIN.WARMUP_EPOCHS", 20, at_least(0), "epochs of linear warm-up, part of EPOCHS"),
    Key("TRAIN.WARMUP_STEPS", 0, at_least(0), "steps of linear warm-up instead; 0: WARMUP_EPOCHS"),
    Key("TRAIN.GLOBAL_BATCH_SIZE", 4096, between(1, 1_000_000), "images of a step, over all processes"),
    Key("TRAIN.BASE_LR", 5e-4, POSITIVE, "peak learning rate, per LR_BASE_SIZE images"),
    Key("TRAIN.WARMUP_LR", 5e-7, at_least(0), "first learning rate, per LR_BASE_SIZE images"),
    Key("TRAIN.MIN_LR", 5e-6, at_least(0), "last learning rate, per LR_BASE_SIZE images"),
    Key("TRAIN.LR_BASE_SIZE", 512, at_least(1), "global batch that the learning rates are for"),
    Key("TRAIN.OPTIMIZER.NAME", "adamw", one_of("adamw", "sgd", "lamb", "lion", "muon"), "AdamW, or one of timm's"),
    Key("TRAIN.OPTIMIZER.MOMENTUM", 0.9, SHARE_BELOW_1, "of SGD (Nesterov) and Muon"),
    Key("TRAIN.LAYER_DECAY", 1.0, FACTOR, "factor on the learning rate from each layer to the one before it (BEiT)"),
    Key("TRAIN.LR_SCALES", [], SCALES, "factors on learning rates by name, such as of the offset networks"),
    Key("TRAIN.FREEZE", "", PATTERNS, "what is not trained; ! takes back"),
    Key("TRAIN.WEIGHT_DECAY", 0.05, between(0, 1), "for weights of two and more dimensions"),
    Key("TRAIN.CLIP_GRAD", 5.0, at_least(0), "largest norm of the gradient; 0: not clipped"),
    Key("TRAIN.ADAM_BETAS", [0.9, 0.999], BETAS, "of AdamW, LAMB, Lion and the AdamW in Muon"),
    Key("TRAIN.ADAM_EPS", 1e-8, POSITIVE, "of AdamW, LAMB and Muon"),
    Key("TRAIN.EMA_DECAY", 0.0, DECAY, "fraction of the averaged weights kept by a step; 0: no average"),
    Key("TRAIN.EMA_WARMUP", False, ANY, "average over few steps at first; docs/finetuning.md has the formula"),
    Key("TRAIN.EMA_WARMUP_GAMMA", 1.0, POSITIVE, "timm's warmup_gamma"),
    Key("TRAIN.EMA_WARMUP_POWER", 2 / 3, POSITIVE, "timm's warmup_power; 3/4 reaches 0.999 after 10,000 steps"),
    Key("TRAIN.MAX_SECONDS", 0.0, at_least(0),
        "seconds from the start of the command, or of torchrun, to a saved stop (exit 75); 0: no limit"),
    Key("TRAIN.EXACT_WORLD_SIZE", False, ANY, "the same bits on 1, 2, 4 … processes, at the cost of speed"),
    Key("TRAIN.DETERMINISTIC", False, ANY, "repeat the bits on CUDA too, at the cost of speed; CPUs always do"),
    Key("TRAIN.HANG_SECONDS", 300.0, at_least(0),
        "without progress until stack traces are written and the run ends (exit 76); half of it for a batch; 0: off"),
    Key("TRAIN.REPORT", False, ANY, "write report.html to the run's directory when the run ends or stops"),
    Key("TRAIN.MAX_SKIPPED", 20, at_least(1),
        "steps in a row without a finite gradient that end the run; fp16's loss scale may need 16 to come down"),

    # ---- distillation (DeiT) ----
    Key("DISTILL.TEACHER_PATH", "", WEIGHTS, "a run or checkpoint, or TEACHER_MODEL's weights; empty: no teacher"),
    Key("DISTILL.TEACHER_MODEL", "", NAME_OR_NONE, "timm's name of the teacher, whose weights are a file"),
    Key("DISTILL.TYPE", "hard", one_of("hard", "soft"), "follow the teacher's class, or its probabilities"),
    Key("DISTILL.ALPHA", 0.5, SHARE_ABOVE_0, "part of the loss that follows the teacher (DeiT: 0.5 hard, 0.1 soft)"),
    Key("DISTILL.TAU", 1.0, POSITIVE, "temperature of the probabilities, soft (DeiT: 3)"),

    # ---- checkpoints ----
    Key("CHECKPOINT.RESUME", "", RUN_PATH, "run or checkpoint folder to resume from; overrides PRETRAINED"),
    Key("CHECKPOINT.AUTO_RESUME", True, ANY,
        "resume from the latest valid checkpoint of the run's own folder; False: refused where there is one"),
    Key("CHECKPOINT.ACCEPT", "", NAMES, "what changed on purpose since the checkpoint: names that a refusal lists"),
    Key("CHECKPOINT.PRETRAINED", "", WEIGHTS,
        "weights to start from: run, checkpoint, file, Hugging Face folder, or https://…#sha256=<64 hex digits>"),
    Key("CHECKPOINT.KEEP", 3, at_least(2), "newest checkpoints kept besides the best"),

    # ---- evaluation ----
    Key("TEST.CROP_MODE", "squash", one_of("squash", "center"),
        "squash: resize to IMG_SIZE / CROP_PCT squared, crop; center: resize the shorter side to that, crop"),
    Key("TEST.EXACT", True, ANY, "resize with Pillow, as published; False: with torch, twice the images/s, pixels ±1"),
    Key("TEST.CROP_PCT", 0.875, SHARE_ABOVE_0, "side of the centre crop / side of the resized image"),
    Key("TEST.SKIP_BAD", False, ANY, "an unreadable image counts as wrong instead of ending the evaluation"),
    Key("TEST.BATCH_SIZE", 0, at_least(0), "images forwarded at once; 0: DATA.BATCH_SIZE"),
    Key("TEST.SETS", "", PATH, "folder of ImageNet's test sets, evaluated beside val; docs/evaluation.md lists them"),
    Key("TEST.ONLY", "", SET_NAMES, "which of val, v2, a, r, sketch, c, c-extra, objectnet; empty: all that are there"),
    Key("TEST.SIZES", "", SIZES, "image sizes to evaluate at, such as 192,224,256; empty: DATA.IMG_SIZE"),
    Key("TEST.OUT", "", PATH, "folder of the predictions; empty: eval in the run's own folder"),
    Key("TEST.SAVE_LOGITS", False, ANY, "keep the logits of every image too, as float16"),
)
# fmt: on
KEYS = {key.name: key for key in SCHEMA}

FLAGS = {
    "--data-path": "DATA.PATH",
    "--batch-size": "DATA.BATCH_SIZE",
    "--output": "OUTPUT",
    "--tag": "TAG",
    "--resume": "CHECKPOINT.RESUME",
    "--pretrained": "CHECKPOINT.PRETRAINED",
    "--accept": "CHECKPOINT.ACCEPT",
    "--amp-dtype": "AMP_DTYPE",
    "--seed": "SEED",
    "--print-freq": "PRINT_FREQ",
    "--workers": "DATA.NUM_WORKERS",
    "--sets": "TEST.SETS",
    "--only": "TEST.ONLY",
    "--sizes": "TEST.SIZES",
    "--out": "TEST.OUT",
}

# Arguments that have a key of their own: a second place for the same number would hide which one counts.
OWNED_ARGS = {
    "num_classes": "MODEL.NUM_CLASSES",
    "drop_path_rate": "MODEL.DROP_PATH_RATE",
    "stochastic_depth": "MODEL.STOCHASTIC_DEPTH",
    "img_size": "DATA.IMG_SIZE",
    "in_chans": "DATA.IN_CHANS",
    "pretrained": "CHECKPOINT.PRETRAINED",
}

# What other programs and the first edition call it, where the nearest name would mislead.
_ACCUMULATION = "TRAIN.GLOBAL_BATCH_SIZE; the steps of accumulation follow from it"
_IN_PLACE = "DATA.PATH alone; archives are read in place, the system caches them"
_TORCHRUN = "torchrun [--nproc-per-node N] main.py …, which sets ranks itself"
FOREIGN = {
    **first_edition.KEYS,
    "TEST.PROTOCOL": "TEST.CROP_MODE, squash (was: official) or center (was: standard)",
    "AMP_ENABLE": "AMP_DTYPE; float32 means off",
    "BASE": "BASE at the top of a file; --opts cannot change what a file builds on",
    "DATA.DATASET": "DATA.PATH alone: any folder of class folders, .zip or .tar is read",
    "MODEL.TYPE": "MODEL.NAME, any name that timm knows",
    "MODEL.DAT": "MODEL.NAME for the variant, MODEL.ARGS for what differs from it",
    "MODEL.SWIN": "MODEL.NAME for the variant, MODEL.ARGS for what differs from it",
    "MODEL.DROP_RATE": "MODEL.ARGS.drop_rate",
    "TRAIN.LR": "TRAIN.BASE_LR, per TRAIN.LR_BASE_SIZE images",
    "TRAIN.ACCUMULATION_STEPS": _ACCUMULATION,
    "DATA.ZIP_MODE": _IN_PLACE,
    "DATA.CACHE_MODE": _IN_PLACE,
    "DATA.PIN_MEMORY": "nothing in its place: memory is pinned for CUDA",
    "FUSED_WINDOW_PROCESS": "nothing in its place: kernels are chosen by device",
    "TRAIN.USE_CHECKPOINT": "MODEL.GRAD_CHECKPOINTING",
    "TRAIN.OPTIMIZER.BETAS": "TRAIN.ADAM_BETAS",
    "TRAIN.OPTIMIZER.EPS": "TRAIN.ADAM_EPS",
    "TRAIN.LR_SCHEDULER": "TRAIN.EPOCHS, WARMUP_EPOCHS and MIN_LR; the schedule is a cosine per step",
    "TEST.CROP": "TEST.CROP_MODE center, and TEST.CROP_PCT 1.0 for no crop",
    "--accumulation-steps": _ACCUMULATION,
    "--grad-accum-steps": _ACCUMULATION,
    "--zip": _IN_PLACE,
    "--cache-mode": _IN_PLACE,
    "--model": "--opts MODEL.NAME, any name that timm knows",
    "--model-kwargs": "--opts MODEL.ARGS.<name> VALUE",
    "--drop_path": "--opts MODEL.DROP_PATH_RATE",
    "--drop-path": "--opts MODEL.DROP_PATH_RATE",
    "--smoothing": "--opts MODEL.LABEL_SMOOTHING",
    "--aa": "--opts AUG.AUTO_AUGMENT",
    "--opt": "--opts TRAIN.OPTIMIZER.NAME",
    "--sched": "--opts TRAIN.EPOCHS, TRAIN.WARMUP_EPOCHS and TRAIN.MIN_LR; the schedule is a cosine",
    "--initial-checkpoint": "--pretrained",
    "--experiment": "--tag",
    "--class-map": "--opts DATA.CLASS_LIST",
    "--use-checkpoint": "--opts MODEL.GRAD_CHECKPOINTING True",
    "--skip-bad": "--opts TEST.SKIP_BAD True",
    "--logits": "--opts TEST.SAVE_LOGITS True",
    "--amp": "--amp-dtype float16, bfloat16 or float32",
    "--use-bf16": "--amp-dtype bfloat16",
    "--disable_amp": "--amp-dtype float32",
    "--checkpoint": "--resume for a run, --pretrained for a file of weights",
    "--log-interval": "--print-freq",
    "--model-ema": "--opts TRAIN.EMA_DECAY 0.9999",
    "--lr": "--opts TRAIN.BASE_LR, per TRAIN.LR_BASE_SIZE images",
    "--local_rank": _TORCHRUN,
    "--local-rank": _TORCHRUN,
    "--nproc-per-node": _TORCHRUN,
    "--nproc_per_node": _TORCHRUN,
}

READER = Schema(KEYS, "MODEL.ARGS", OWNED_ARGS, FOREIGN)

EXAMPLES = """examples:
  torchrun --nproc-per-node 8 main.py --cfg configs/dat_tiny.yaml --data-path /imagenet
  python main.py --cfg configs/dat_tiny.yaml --data-path /imagenet --eval --pretrained dat_tiny_in1k_224.pth
  python main.py --cfg configs/cifar10.yaml --tag lr1e-3 --opts TRAIN.BASE_LR 1e-3 TRAIN.EPOCHS=50

Every key that files and --opts may set is listed in config.py with its default. The same command resumes a run."""

# --- The interface --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    mode: str  # "train", "eval" or "throughput"
    cfg: CfgNode  # frozen
    # Key that is no default -> "configs/dat_tiny.yaml:12", "--opts" or "--batch-size".
    sources: dict[str, str]
    given: frozenset[str]  # keys set on the command line itself


def parse(argv: list[str]) -> Command:
    """The command of `argv` (without the program's name).

    Raises:
        ConfigError: lists everything wrong with flags, files, values and their combination.
        SystemExit: after printing the help.
    """
    draft = Draft(READER)
    words = _read_words(argv, draft)
    mode = "eval" if words["eval"] else "throughput" if words["throughput"] else "train"
    if words["eval"] and words["throughput"]:
        draft.refuse("--throughput", "excludes --eval; run one after the other")
    if words["cfg"] is None:
        draft.refuse("--cfg", "missing; say what to train, such as --cfg configs/dat_tiny.yaml")
        draft.complete = False
    else:
        _read_cfg(words["cfg"], draft)
    _read_opts(words["opts"], draft)
    for flag, name in FLAGS.items():
        if words[name] is not None:
            draft.set(name, _node_of(words[name], name), flag, flag)
            draft.given.add(name)
    return _finish(draft, mode)


def load(path: str, opts: Iterable[str] = ()) -> CfgNode:
    """The frozen configuration of the file at `path`, changed by `opts` as `--opts` does; for tools.

    Raises ConfigError as `parse` does; what only a run needs is not checked.
    """
    draft = Draft(READER)
    _read_cfg(path, draft)
    _read_opts(opts, draft)
    return _finish(draft, "load").cfg


def load_values(values: dict, where: str, opts: Iterable[str] = ()) -> CfgNode:
    """The frozen configuration that `values` hold, nested as a checkpoint's metadata do; `where` names it in errors.

    Keys that `values` lack have their defaults. Raises ConfigError.
    """
    draft = Draft(READER)
    for name, value in _flatten(values):
        draft.set_value(name, value, where)
    _read_opts(opts, draft)
    return _finish(draft, "load").cfg


def _read_cfg(path: str, draft: Draft) -> None:
    """Read the file of `--cfg`; the config.yaml that a first-edition run left in its directory is translated."""
    file, values = Path(path), {}
    # What is wrong with the file is named where it is read below.
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        if file.name == "config.yaml" and (file.parent / "checkpoints").is_dir():
            node = yaml.compose(file.read_text(encoding="utf-8"), Loader)
            values = to_python(node) if isinstance(node, yaml.MappingNode) else {}
    if (translated := first_edition.translate_keys(values)) == values:
        read_file(path, "--cfg", draft)
        return
    for name, value in _flatten(translated):
        draft.set_value(name, value, path)


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        inside = f"{prefix}{name}."
        if isinstance(value, dict) and prefix != f"{READER.free_group}.":
            yield from _flatten(value, inside)
        else:
            yield f"{prefix}{name}", value


def _finish(draft: Draft, mode: str) -> Command:
    """Check the combinations that matter in `mode`, a command's or "load", and freeze.

    Raises ConfigError with every problem that there is.
    """
    cfg = draft.build()
    if draft.complete:
        for names, message in _conflicts(cfg, mode, draft.given):
            draft.refuse_together(names, message)
    draft.raise_problems()
    cfg.freeze()
    changed = {
        name: source
        for name, source in draft.sources.items()
        if name not in KEYS or draft.values[name] != KEYS[name].default
    }
    return Command(mode, cfg, changed, frozenset(draft.given))


def check_world_size(cfg: CfgNode, world_size: int) -> None:
    """Refuse to train on a number of processes that cannot share the micro-batches of a step evenly.

    Raises:
        ConfigError: names numbers of processes and micro-batch sizes that work.
    """
    total, size = cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE
    micro_batches = total // size
    if micro_batches % world_size == 0:
        return
    start = f"start {_nearest_divisors(micro_batches, world_size)} processes"
    # The micro-batches are a power of two, and so is what divides them.
    if cfg.TRAIN.EXACT_WORLD_SIZE:
        raise ConfigError(
            "TRAIN.EXACT_WORLD_SIZE takes 1, 2, 4 … processes, at most as many as the micro-batches of a step, "
            f"got {world_size} for {micro_batches} micro-batches; {start}"
        )
    remedies = [start]
    sizes = _nearest_divisors(total // world_size, size, even=_mixes(cfg.AUG))
    if total % world_size == 0 and sizes:
        remedies.append(f"set --batch-size to {sizes}")
    else:
        share = size * world_size
        remedies.append(f"set TRAIN.GLOBAL_BATCH_SIZE to {-(-total // share) * share}")
    raise ConfigError(
        f"{world_size} processes cannot share the {micro_batches} micro-batches of a step evenly "
        f"(TRAIN.GLOBAL_BATCH_SIZE {total} / DATA.BATCH_SIZE {size}); {', or '.join(remedies)}"
    )


# --- Values that do not fit one another -----------------------------------------------------------

Conflict = tuple[str, str]


def _conflicts(cfg: CfgNode, mode: str, given: set[str]) -> Iterator[Conflict]:
    """("KEY KEY …", why they do not fit and what to do) of every impossible combination that matters in `mode`."""
    yield from _renamed_arguments(cfg.MODEL)
    if cfg.MODEL.STOCHASTIC_DEPTH != "independent" and not first_edition.is_own_model(
        cfg.MODEL.NAME
    ):
        message = f"{cfg.MODEL.NAME} draws for each image by itself; set it to independent"
        yield "MODEL.STOCHASTIC_DEPTH MODEL.NAME", message
    if mode in ("train", "throughput"):
        instead = " in the place of --throughput" if mode == "throughput" else ""
        for name in sorted(given & {"TEST.SETS", "TEST.ONLY", "TEST.SIZES", "TEST.OUT"}):
            yield name, f"belongs to evaluation; add --eval{instead}"
    if mode in ("throughput", "load"):
        return
    yield from _weight_conflicts(cfg.CHECKPOINT, mode, given)
    if mode == "train":
        yield from _batch_conflicts(cfg)
        yield from _exactness_conflicts(cfg)
        yield from _schedule_conflicts(cfg.TRAIN)
        yield from _teacher_conflicts(cfg.DISTILL)
        yield from _augmentation_conflicts(cfg.AUG, cfg.DATA, cfg.TRAIN.GLOBAL_BATCH_SIZE)
    elif cfg.TEST.ONLY and not cfg.TEST.SETS:
        yield "TEST.ONLY TEST.SETS", "chooses among the test sets of --sets; add it"


def _renamed_arguments(model: CfgNode) -> Iterator[Conflict]:
    if first_edition.is_own_model(model.NAME):
        for old in model.ARGS.keys() & first_edition.MODEL_ARGS.keys():
            yield f"MODEL.ARGS.{old}", f"renamed; use MODEL.ARGS.{first_edition.MODEL_ARGS[old]}"


def _weight_conflicts(weights: CfgNode, mode: str, given: set[str]) -> Iterator[Conflict]:
    both = weights.RESUME and weights.PRETRAINED
    # A run's own config.yaml keeps the PRETRAINED that it began with: to resume it is no contradiction.
    if both and (mode == "eval" or "CHECKPOINT.PRETRAINED" in given):
        message = "two places to take the weights from; drop one, such as --pretrained ''"
        yield "CHECKPOINT.PRETRAINED CHECKPOINT.RESUME", message
    if mode == "eval" and not (weights.RESUME or weights.PRETRAINED or weights.AUTO_RESUME):
        message = "--eval needs weights; add --resume RUN or --pretrained FILE"
        yield "CHECKPOINT.AUTO_RESUME CHECKPOINT.RESUME CHECKPOINT.PRETRAINED", message


def _batch_conflicts(cfg: CfgNode) -> Iterator[Conflict]:
    total, size, mixes = cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE, _mixes(cfg.AUG)
    if mixes and size % 2:
        message = "images are mixed in pairs; use an even size, or set AUG.MIXUP and CUTMIX to 0"
        yield "DATA.BATCH_SIZE AUG.MIXUP AUG.CUTMIX AUG.MIXUP_PROB", message
    if total % size:
        sizes = _nearest_divisors(total, size, even=mixes)
        message = f"the global batch must be a multiple of the batch size; set it to {-(-total // size) * size}"
        message += f", or the batch size to {sizes}" if sizes else ""
        yield "DATA.BATCH_SIZE TRAIN.GLOBAL_BATCH_SIZE", message


def _exactness_conflicts(cfg: CfgNode) -> Iterator[Conflict]:
    if not cfg.TRAIN.EXACT_WORLD_SIZE:
        return
    micro_batches, rest = divmod(cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE)
    if not rest and micro_batches & (micro_batches - 1):
        below = cfg.DATA.BATCH_SIZE << (micro_batches.bit_length() - 1)
        message = f"micro-batches are summed in pairs, but {micro_batches} is no power of two; "
        message += f"set the global batch to {below} or {2 * below}"
        yield "TRAIN.EXACT_WORLD_SIZE TRAIN.GLOBAL_BATCH_SIZE DATA.BATCH_SIZE", message
    if not cfg.THREADS:
        message = "0 shares out the cores, and another number of threads gives other bits; set THREADS, such as 1"
        yield "TRAIN.EXACT_WORLD_SIZE THREADS", message


def _mixes(aug: CfgNode) -> bool:
    return aug.MIXUP_PROB > 0 and (aug.MIXUP > 0 or aug.CUTMIX > 0)


def _nearest_divisors(number: int, wanted: int, even: bool = False) -> str:
    """The divisors of `number` next to `wanted`, below and above: "64 or 128"; empty where there is none."""
    divisors = [i for i in range(1, number + 1) if number % i == 0 and not (even and i % 2)]
    below = [i for i in divisors if i <= wanted][-1:]
    above = [i for i in divisors if i > wanted][:1]
    return " or ".join(map(str, below + above))


def _schedule_conflicts(train: CfgNode) -> Iterator[Conflict]:
    if not train.WARMUP_STEPS and train.WARMUP_EPOCHS >= train.EPOCHS:
        message = "the warm-up must end before the training; shorten it, 0 switches it off"
        yield "TRAIN.WARMUP_EPOCHS TRAIN.EPOCHS", message
    if train.MIN_LR > train.BASE_LR:
        yield "TRAIN.MIN_LR TRAIN.BASE_LR", "the last rate is above the highest; lower MIN_LR"
    if (train.WARMUP_STEPS or train.WARMUP_EPOCHS) and train.WARMUP_LR > train.BASE_LR:
        message = "the first rate is above the highest; lower WARMUP_LR"
        yield "TRAIN.WARMUP_LR TRAIN.BASE_LR", message
    if train.EMA_WARMUP and not train.EMA_DECAY:
        yield (
            "TRAIN.EMA_WARMUP TRAIN.EMA_DECAY",
            "there is no average to warm up; set EMA_DECAY, such as 0.9999",
        )
    for name in ("EMA_WARMUP_GAMMA", "EMA_WARMUP_POWER"):
        if not train.EMA_WARMUP and train[name] != KEYS[f"TRAIN.{name}"].default:
            yield (
                f"TRAIN.{name} TRAIN.EMA_WARMUP",
                "the average does not warm up; set EMA_WARMUP True",
            )
    scale = train.GLOBAL_BATCH_SIZE / train.LR_BASE_SIZE
    if train.OPTIMIZER.NAME == "adamw" and scale > 1 and train.BASE_LR * scale > 0.02:
        scaled = train.BASE_LR <= 0.02
        advice = (
            f"if it was scaled already, write {train.BASE_LR / scale:g}" if scaled else "lower it"
        )
        message = f"per {train.LR_BASE_SIZE} images, a rate of {train.BASE_LR * scale:g}, which AdamW does not survive"
        message += f"; {advice}"
        yield "TRAIN.BASE_LR TRAIN.GLOBAL_BATCH_SIZE", message


def _teacher_conflicts(distill: CfgNode) -> Iterator[Conflict]:
    for name in ("TEACHER_MODEL", "TYPE", "ALPHA", "TAU"):
        if not distill.TEACHER_PATH and distill[name] != KEYS[f"DISTILL.{name}"].default:
            yield (
                f"DISTILL.{name} DISTILL.TEACHER_PATH",
                "there is no teacher; set TEACHER_PATH to its weights",
            )
    if distill.TYPE == "hard" and KEYS["DISTILL.TAU"].default != distill.TAU:
        yield (
            "DISTILL.TAU DISTILL.TYPE",
            "a class has no temperature; remove it, or set TYPE to soft",
        )


def _augmentation_conflicts(aug: CfgNode, data: CfgNode, batch: int) -> Iterator[Conflict]:
    if batch < aug.REPEATS:
        message = "a step is too small for the repeats of one image; lower REPEATS"
        yield "AUG.REPEATS TRAIN.GLOBAL_BATCH_SIZE", message
    for name in ("SCALE", "RATIO"):
        if aug.PADDING and aug[name] != KEYS[f"AUG.{name}"].default:
            message = "padded crops do not use it; remove it, or set AUG.PADDING to 0"
            yield f"AUG.{name} AUG.PADDING", message
    sizes = [data.IMG_SIZE, *(size for _, size in data.IMG_SIZE_SCHEDULE)]
    if min(min(s) if isinstance(s, list) else s for s in sizes) < 2 * aug.PADDING:
        message = "more border than image; the usual padding of CIFAR is 4 for 32 pixels"
        yield "AUG.PADDING DATA.IMG_SIZE DATA.IMG_SIZE_SCHEDULE", message
    if aug.ON_DEVICE and aug.AUTO_AUGMENT.partition("-")[0] != "rand":
        message = "only RandAugment runs on the device; set AUG.AUTO_AUGMENT to rand-…, or AUG.ON_DEVICE to False"
        yield "AUG.ON_DEVICE AUG.AUTO_AUGMENT", message
    if aug.ON_DEVICE and data.INTERPOLATION not in ("bilinear", "bicubic"):
        message = "the device moves pixels by bilinear or bicubic interpolation; choose one of them"
        yield "AUG.ON_DEVICE DATA.INTERPOLATION", message
    unused = aug.AUTO_AUGMENT and "3a" not in aug.AUTO_AUGMENT
    if unused and aug.COLOR_JITTER not in (0, KEYS["AUG.COLOR_JITTER"].default):
        message = "timm skips jitter beside this policy; remove it, or set AUG.AUTO_AUGMENT to ''"
        yield "AUG.COLOR_JITTER AUG.AUTO_AUGMENT", message


# --- The command line -----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="main.py --cfg FILE [flags] [--opts KEY VALUE …]",
        description="Train an image classifier, evaluate it (--eval) or time it (--throughput).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--cfg", metavar="FILE", help="YAML file of what differs from the defaults")
    parser.add_argument("--eval", action="store_true", help="evaluate and exit; never trains")
    parser.add_argument("--throughput", action="store_true", help="time the model and exit")
    for flag, name in FLAGS.items():
        names = ["-j", flag] if flag == "--workers" else [flag]
        default = f", default {KEYS[name].default}" if KEYS[name].default != "" else ""
        text = f"{KEYS[name].text} ({name}{default})"
        parser.add_argument(*names, dest=name, metavar=last_part(name), help=text)
    parser.add_argument(
        "--opts",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY VALUE",
        help="any other key; KEY=VALUE is the same",
    )
    return parser


def _read_words(argv: list[str], draft: Draft) -> dict:
    """argv as a dict of texts (None where absent): "cfg", "eval", "throughput", "opts" and the key of each flag.

    argparse stops at the first flag without its value: that flag is noted and left out, and the rest read again.
    """
    parser = _parser()
    while True:
        try:
            known, rest = parser.parse_known_args(argv)
            break
        except argparse.ArgumentError as error:
            names = error.argument_name.split("/")
            key = FLAGS.get(names[-1], "")
            draft.refuse(names[-1], f"{error.message}; see main.py --help", key)
            given = [(word, {word.partition("=")[0], word[:2]}) for word in argv]  # --x, --x=y, -xy
            argv = [word for word, spellings in given if not spellings.intersection(names)]
    for before, word in zip(["", *rest], rest, strict=False):
        flag = word.partition("=")[0]
        if word.startswith("-"):
            advice, meant = _flag_advice(flag)
            draft.refuse(flag, f"unknown flag; {advice}", *meant)
        elif not before.startswith("-"):  # else it is the value of an unknown flag
            draft.refuse(repr(word), "belongs to no flag; keys and their values follow --opts")
    return vars(known)


def _flag_advice(flag: str) -> tuple[str, list[str]]:
    """What to do about an unknown flag, and the keys that were probably meant."""
    if flag in FOREIGN:
        return f"use {FOREIGN[flag]}", [key for key in KEYS if key in FOREIGN[flag]]
    last = flag.strip("-").replace("-", "_").upper()
    keys = [key for key in KEYS if last_part(key) == last and key not in FLAGS.values()]
    if keys and flag.replace("_", "-") not in FLAGS:
        return f"use --opts {' or '.join(keys)}", keys
    flags = [*FLAGS, "--cfg", "--eval", "--throughput", "--opts", "--help"]
    if close := difflib.get_close_matches(flag, flags, n=1, cutoff=0.7):
        return f"did you mean {close[0]}?", [FLAGS.get(close[0], "")]
    return "main.py --help lists every flag", []


def _read_opts(words: Iterable[str], draft: Draft) -> None:
    """Set what `--opts` gives as KEY VALUE or KEY=VALUE."""
    words = list(words)
    while words:
        name, equals, text = words.pop(0).partition("=")
        if not equals and (not words or words[0].partition("=")[0] in KEYS):
            message = f"{name}: has no value; write {name} VALUE or {name}=VALUE"
            draft.refuse("--opts", message, name)
        else:
            node = _node_of(text if equals else words.pop(0), name)
            draft.set(name, node, "--opts", "--opts")
            draft.given.add(name)


def _node_of(text: str, name: str) -> yaml.Node:
    """A word of the command line as YAML; as mere text where the key is text, or where it is no YAML."""
    if name not in KEYS or not isinstance(KEYS[name].default, str):
        try:
            return yaml.compose(text, Loader) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except (yaml.YAMLError, RecursionError):
            pass
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)
