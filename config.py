"""What can be set, and to what is it set? Every key with its default and check; command line and files read into them.

`parse(argv)` gives the frozen configuration, or one ConfigError that lists everything wrong, a line each. The last of
these wins: the defaults below, `BASE` files, the file of `--cfg`, `--opts`, the other flags. Neither torch nor NumPy
is imported, so that help and refusals come at once.
"""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from yacs.config import CfgNode

from utils.download import PINNED_URL
from utils.errors import ConfigError
from utils.schema import Dumper, Loader, converted, place, plain, shown

# --- Checks of one value --------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What a value must satisfy: `expected` says it in words, `remedy` adds what a wrong value probably meant."""

    expected: str
    holds: Callable
    remedy: Callable = lambda value: ""


def at_least(low: float) -> Check:
    """A number not below `low`."""
    return Check(f"of at least {low}", lambda value: value >= low)


def between(low: float, high: float) -> Check:
    """A number from `low` to `high`, both allowed."""
    return Check(f"from {low} to {high}", lambda value: low <= value <= high)


def one_of(*names: str) -> Check:
    """One of a few words."""

    def remedy(value: str) -> str:
        close = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""

    return Check(f"one of {', '.join(names)}", lambda value: value in names, remedy)


def _share(value: float) -> str:
    return f"; {value:g} % is written {value / 100:g}" if 1 < value <= 100 else ""


def _literal_path(value: str) -> bool:
    return not value.startswith(("~", "$")) and "://" not in value and "\0" not in value


def _is_policy(value: str) -> bool:
    """Whether timm takes every section of an augmentation policy; it skips sections without a digit in silence."""
    n = r"\d+(\.\d+)?"
    rand = rf"rand(-(m\d+|n\d+|inc[01]|mmax\d+|mstd{n}|p{n}|tweights|t3aw?))*"
    augmix = rf"augmix(-([mwd]\d+|a{n}|b[01]|mstd{n}))*"
    fixed = rf"(originalr?|v0r?|3a)(-mstd{n})?"
    return value == "" or re.fullmatch(rf"{rand}|{augmix}|{fixed}", value) is not None


WEIGHT_FILES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")
PATH_TEXT = "a path, written out (no ~, $ or URL)"

ANY = Check("", lambda value: True)
POSITIVE = Check("above 0", lambda value: value > 0)
SHARE = Check("from 0 to 1", lambda value: 0 <= value <= 1, _share)
SHARE_BELOW_1 = Check("from 0 to below 1", lambda value: 0 <= value < 1, _share)
SHARE_ABOVE_0 = Check("above 0, up to 1", lambda value: 0 < value <= 1, _share)
NAME = Check("a model's name", lambda value: re.fullmatch(r"\w([\w.:/-]*\w)?", value))
PATH = Check(PATH_TEXT, _literal_path)
FILLED_PATH = Check(PATH_TEXT, lambda value: bool(value) and _literal_path(value))
WEIGHTS = Check(
    "a path, written out (no ~ or $), or https://…#sha256=<64 hex digits>",
    lambda value: _literal_path(value) or PINNED_URL.fullmatch(value),
    lambda value: "; only https with the file's SHA-256 is downloaded" if "://" in value else "",
)
RUN_PATH = Check(
    f"{PATH_TEXT} to a run or checkpoint folder",
    lambda value: _literal_path(value) and not value.endswith(WEIGHT_FILES),
    lambda value: "; files of weights go to --pretrained" if value.endswith(WEIGHT_FILES) else "",
)
FOLDER_NAME = Check(
    "a folder's name, without '/'",
    lambda value: value not in ("", ".", "..") and not re.search(r"[/\\\0\n]", value),
)
NAMES = Check(
    "names with commas between, such as TRAIN.EPOCHS,threads",
    lambda value: re.fullmatch(r"([\w.]+(,[\w.]+)*)?", value),
)
CLASSES = Check("of 0 or at least 2", lambda value: value == 0 or value >= 2)
COLOURS = Check(
    "with each from 0 to 1",
    lambda values: all(0 <= value <= 1 for value in values),
    lambda values: "; divide values of 0 … 255 by 255" if max(values) > 1 else "",
)
SPREADS = Check(
    "with each above 0, up to 1",
    lambda values: all(0 < value <= 1 for value in values),
    COLOURS.remedy,
)
AREAS = Check("with 0 < first ≤ second ≤ 1", lambda pair: 0 < pair[0] <= pair[1] <= 1)
RATIOS = Check("with 0 < first ≤ second", lambda pair: 0 < pair[0] <= pair[1])
BETAS = Check(
    "with 0 ≤ first ≤ second < 1",
    lambda pair: 0 <= pair[0] <= pair[1] < 1,
    lambda pair: "; are the two swapped?" if 0 <= pair[1] < pair[0] < 1 else "",
)
DECAY = Check(
    "of 0 or from 0.5 to below 1",
    lambda value: value == 0 or 0.5 <= value < 1,
    lambda value: f"; the share that is kept would be {1 - value:g}" if 0 < value < 0.5 else "",
)
POLICY = Check(
    "'' or a policy of timm's such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0, 3a",
    _is_policy,
)

# --- The keys -------------------------------------------------------------------------------------


KINDS = {bool: "True or False", int: "an integer", float: "a number", str: ""}


@dataclass(frozen=True)
class Key:
    """One thing that can be set; the type of `default` is the type of the value."""

    name: str
    default: bool | int | float | str | list | dict
    check: Check
    text: str

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if isinstance(self.default, list):
            return f"a list of numbers such as {self.default}, {self.check.expected}"
        return f"{KINDS[type(self.default)]} {self.check.expected}".strip()


# fmt: off
SCHEMA = (
    # ---- the run ----
    Key("OUTPUT", "output", FILLED_PATH, "folder of all runs; this one is <OUTPUT>/<MODEL.NAME>/<TAG>"),
    Key("TAG", "default", FOLDER_NAME, "name that tells this run from others of the same model"),
    Key("SEED", 0, at_least(0), "every random number of the run is a function of it"),
    Key("PRINT_FREQ", 10, at_least(1), "steps from one log line and metrics record to the next"),
    Key("EVAL_FREQ", 1, at_least(1), "epochs from one evaluation to the next"),
    Key("SAVE_FREQ", 1, at_least(1), "epochs from one checkpoint to the next"),
    Key("SAVE_STEPS", 0, at_least(0), "steps from one checkpoint to the next; 0: by epochs alone"),
    Key("THREADS", 0, at_least(0), "CPU threads of a process; 0: cores / processes"),
    Key("DEVICE", "auto", one_of("auto", "cpu", "cuda"), "where to compute; auto: cuda where there is one"),
    Key("AMP_DTYPE", "float16", one_of("float32", "bfloat16", "float16"), "autocast type; float32: no autocast"),

    # ---- data ----
    Key("DATA.PATH", "", PATH, "dataset: folder with train and val, each a folder, .zip or .tar of class folders"),
    Key("DATA.CLASS_LIST", "", PATH, "text file, a class name a line; empty: the training set's class folders"),
    Key("DATA.VAL_SUBSET", False, ANY, "the validation set may lack classes"),
    Key("DATA.BATCH_SIZE", 128, at_least(1), "images of a micro-batch: what a process forwards at once"),
    Key("DATA.IMG_SIZE", 224, at_least(32), "pixels of the model's input, height and width"),
    Key("DATA.INTERPOLATION", "bicubic", one_of("nearest", "bilinear", "bicubic", "lanczos"), "for resizing"),
    Key("DATA.MEAN", [0.485, 0.456, 0.406], COLOURS, "of the red, green and blue values, scaled to 0 … 1"),
    Key("DATA.STD", [0.229, 0.224, 0.225], SPREADS, "standard deviations of the same values"),
    Key("DATA.NUM_WORKERS", 8, at_least(0), "loader processes of each process; 0: load in the process itself"),
    Key("DATA.EXIF", "ignore", one_of("ignore", "apply"), "the rotation it asks for; published results ignore it"),
    Key("DATA.VERIFY", "", PATH, "index of tools/doctor.py --sha, compared with every image read; empty: sizes alone"),
    Key("DATA.MAX_BAD_SAMPLES", -1, at_least(-1),
        "unreadable training files replaced before the run ends; -1: 0.01 % of the images, at least 10"),

    # ---- model ----
    Key("MODEL.NAME", "dat_tiny", NAME, "any name that timm knows, ours included"),
    Key("MODEL.ARGS", {}, ANY, "further arguments of the model's constructor"),
    Key("MODEL.NUM_CLASSES", 0, CLASSES, "size of the head; 0: as many as the class list has"),
    Key("MODEL.DROP_PATH_RATE", 0.2, SHARE_BELOW_1, "share of residual branches skipped in the last block"),
    Key("MODEL.LABEL_SMOOTHING", 0.1, SHARE_BELOW_1, "share of the target spread over all classes"),
    Key("MODEL.GRAD_CHECKPOINTING", False, ANY, "recompute activations in the backward pass to save memory"),

    # ---- augmentation ----
    Key("AUG.SCALE", [0.08, 1.0], AREAS, "share of the image's area that the random crop keeps"),
    Key("AUG.RATIO", [3 / 4, 4 / 3], RATIOS, "width / height of the random crop"),
    Key("AUG.PADDING", 0, at_least(0), "pixels; above 0: pad and crop at random (CIFAR) instead of SCALE and RATIO"),
    Key("AUG.HFLIP", 0.5, SHARE, "probability of a horizontal flip"),
    Key("AUG.COLOR_JITTER", 0.4, SHARE, "strength; timm applies it only without AUTO_AUGMENT or with 3a"),
    Key("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", POLICY, "timm's policy; empty: none"),
    Key("AUG.REPROB", 0.25, SHARE, "probability of random erasing"),
    Key("AUG.REMODE", "pixel", one_of("const", "rand", "pixel"), "filling of erased boxes"),
    Key("AUG.RECOUNT", 1, at_least(1), "most boxes erased in an image"),
    Key("AUG.MIXUP", 0.8, at_least(0), "Mixup's alpha; 0: off"),
    Key("AUG.CUTMIX", 1.0, at_least(0), "CutMix's alpha; 0: off"),
    Key("AUG.MIXUP_PROB", 1.0, SHARE, "probability that a micro-batch is mixed"),
    Key("AUG.MIXUP_SWITCH_PROB", 0.5, SHARE, "probability of CutMix where both are on"),
    Key("AUG.MIXUP_MODE", "batch", one_of("batch", "pair", "elem"), "what shares one mixing coefficient"),

    # ---- training; the learning rates are per 512 images of the global batch ----
    Key("TRAIN.EPOCHS", 300, at_least(1), "passes over the training set"),
    Key("TRAIN.WARMUP_EPOCHS", 20, at_least(0), "of them with a rising learning rate"),
    Key("TRAIN.GLOBAL_BATCH_SIZE", 4096, between(1, 1_000_000), "images of a step, over all processes"),
    Key("TRAIN.BASE_LR", 5e-4, POSITIVE, "highest learning rate, per 512 images"),
    Key("TRAIN.WARMUP_LR", 5e-7, at_least(0), "first learning rate, per 512 images"),
    Key("TRAIN.MIN_LR", 5e-6, at_least(0), "last learning rate, per 512 images"),
    Key("TRAIN.WEIGHT_DECAY", 0.05, between(0, 1), "AdamW's, for weights of two and more dimensions"),
    Key("TRAIN.CLIP_GRAD", 5.0, at_least(0), "largest norm of the gradient; 0: not clipped"),
    Key("TRAIN.ADAM_BETAS", [0.9, 0.999], BETAS, "AdamW's"),
    Key("TRAIN.ADAM_EPS", 1e-8, POSITIVE, "AdamW's"),
    Key("TRAIN.EMA_DECAY", 0.0, DECAY, "share of the averaged weights kept by a step; 0: no average"),
    Key("TRAIN.MAX_SECONDS", 0.0, at_least(0), "stop, saved, after so long (exit 75); 0: no limit"),
    Key("TRAIN.EXACT_WORLD_SIZE", False, ANY, "the same bits on 1, 2, 4 … processes, at the cost of speed"),
    Key("TRAIN.HANG_SECONDS", 300.0, at_least(0),
        "without progress until stacks are written and the run ends (exit 76); half for a batch to load; 0: never"),
    Key("TRAIN.MAX_SKIPPED", 20, at_least(1),
        "steps in a row without a finite gradient that end the run; fp16's loss scale may need 16 to come down"),

    # ---- checkpoints ----
    Key("CHECKPOINT.RESUME", "", RUN_PATH, "run or checkpoint folder to go on from; goes before PRETRAINED"),
    Key("CHECKPOINT.AUTO_RESUME", True, ANY, "go on from the run folder's own newest checkpoint"),
    Key("CHECKPOINT.ACCEPT", "", NAMES, "what changed on purpose since the checkpoint: names that a refusal lists"),
    Key("CHECKPOINT.PRETRAINED", "", WEIGHTS, "weights to start from: a file, or https://…#sha256=<64 hex digits>"),
    Key("CHECKPOINT.KEEP", 3, at_least(2), "newest checkpoints kept besides the best"),

    # ---- evaluation ----
    Key("TEST.CROP_MODE", "squash", one_of("squash", "center"),
        "squash: resize to IMG_SIZE / CROP_PCT squared, crop; center: resize the shorter side to that, crop"),
    Key("TEST.EXACT", True, ANY, "resize with Pillow, as published; False: with torch, twice the images/s, pixels ±1"),
    Key("TEST.CROP_PCT", 0.875, SHARE_ABOVE_0, "side of the centre crop / side of the resized image"),
    Key("TEST.SKIP_BAD", False, ANY, "an unreadable image counts as wrong instead of ending the evaluation"),
    Key("TEST.BATCH_SIZE", 0, at_least(0), "images forwarded at once; 0: DATA.BATCH_SIZE"),
)
# fmt: on
KEYS = {key.name: key for key in SCHEMA}
GROUPS = {"DATA", "MODEL", "MODEL.ARGS", "AUG", "TRAIN", "CHECKPOINT", "TEST"}

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
}

# Arguments that have a key of their own: a second place for the same number would hide which one counts.
OWNED_ARGS = {
    "num_classes": "MODEL.NUM_CLASSES",
    "drop_path_rate": "MODEL.DROP_PATH_RATE",
    "img_size": "DATA.IMG_SIZE",
    "pretrained": "CHECKPOINT.PRETRAINED",
}

# What other programs call it, where the nearest name would mislead.
_ACCUMULATION = "TRAIN.GLOBAL_BATCH_SIZE; the steps of accumulation follow from it"
_TORCHRUN = "torchrun [--nproc-per-node N] main.py …, which sets ranks itself"
FOREIGN = {
    "AMP_ENABLE": "AMP_DTYPE; float32 means off",
    "TRAIN.EVAL_FREQ": "EVAL_FREQ",
    "CHECKPOINT.EPOCHS": "SAVE_FREQ",
    "CHECKPOINT.UPDATES": "SAVE_STEPS",
    "TEST.PROTOCOL": "TEST.CROP_MODE, squash (before: official) or center (before: standard)",
    "MODEL.ARGS.heads": "MODEL.ARGS.num_heads",
    "MODEL.ARGS.groups": "MODEL.ARGS.offset_groups",
    "MODEL.ARGS.reductions": "MODEL.ARGS.sr_ratios",
    "MODEL.ARGS.table_img_size": "MODEL.ARGS.rpe_img_size",
    "BASE": "it at the top of a file; --opts cannot change what a file builds on",
    "DATA.DATASET": "DATA.PATH alone: any folder of class folders, .zip or .tar is read",
    "MODEL.TYPE": "MODEL.NAME, any name that timm knows",
    "MODEL.DAT": "MODEL.NAME for the variant, MODEL.ARGS for what differs from it",
    "MODEL.SWIN": "MODEL.NAME for the variant, MODEL.ARGS for what differs from it",
    "MODEL.DROP_RATE": "MODEL.ARGS.drop_rate",
    "TRAIN.LR": "TRAIN.BASE_LR, per 512 images",
    "TRAIN.ACCUMULATION_STEPS": _ACCUMULATION,
    "TRAIN.USE_CHECKPOINT": "MODEL.GRAD_CHECKPOINTING",
    "TRAIN.OPTIMIZER": "TRAIN.ADAM_BETAS and TRAIN.ADAM_EPS; the optimizer is AdamW",
    "TRAIN.LR_SCHEDULER": "TRAIN.EPOCHS, WARMUP_EPOCHS and MIN_LR; the schedule is a cosine per step",
    "TEST.CROP": "TEST.CROP_PCT; 1.0 means no crop",
    "--accumulation-steps": _ACCUMULATION,
    "--grad-accum-steps": _ACCUMULATION,
    "--use-checkpoint": "--opts MODEL.GRAD_CHECKPOINTING True",
    "--skip-bad": "--opts TEST.SKIP_BAD True",
    "--amp": "--amp-dtype float16, bfloat16 or float32",
    "--use-bf16": "--amp-dtype bfloat16",
    "--disable_amp": "--amp-dtype float32",
    "--checkpoint": "--resume for a run, --pretrained for a file of weights",
    "--log-interval": "--print-freq",
    "--model-ema": "--opts TRAIN.EMA_DECAY 0.9999",
    "--lr": "--opts TRAIN.BASE_LR, per 512 images",
    "--local_rank": _TORCHRUN,
    "--local-rank": _TORCHRUN,
    "--nproc-per-node": _TORCHRUN,
    "--nproc_per_node": _TORCHRUN,
}

EXAMPLES = """examples:
  torchrun --nproc-per-node 8 main.py --cfg configs/dat_tiny.yaml --data-path /imagenet
  python main.py --cfg configs/dat_tiny.yaml --data-path /imagenet --eval --pretrained dat_tiny_in1k_224.pth
  python main.py --cfg configs/cifar10.yaml --data-path cifar10 --tag lr1e-3 --opts TRAIN.BASE_LR 1e-3 TRAIN.EPOCHS=50

Every key that files and --opts may set stands in config.py with its default. The same command resumes a run."""

# --- The interface --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What a command line asks for; `sources` says where each value that is not a default comes from."""

    mode: str  # "train", "eval" or "throughput"
    cfg: CfgNode  # frozen
    sources: dict[str, str]  # key -> "configs/dat_tiny.yaml:12", "--opts" or "--batch-size"


def parse(argv: list[str]) -> Command:
    """The command of `argv` (without the program's name).

    Raises:
        ConfigError: lists everything wrong with flags, files, values and their combination.
        SystemExit: after printing the help.
    """
    draft = Draft()
    words = _read_words(argv, draft)
    mode = "eval" if words["eval"] else "throughput" if words["throughput"] else "train"
    if words["eval"] and words["throughput"]:
        draft.refuse("--throughput", "excludes --eval; run one after the other")
    if words["cfg"] is None:
        draft.refuse("--cfg", "missing; say what to train, such as --cfg configs/dat_tiny.yaml")
        draft.complete = False
    else:
        _read_file(words["cfg"], "--cfg", draft)
    _read_opts(words["opts"], draft)
    for flag, name in FLAGS.items():
        if words[name] is not None:
            draft.set(name, _node_of(words[name], name), flag, flag)

    cfg = draft.build()
    if draft.complete:
        for names, message in _conflicts(cfg, mode, draft.sources):
            draft.refuse_together(names, message)
    draft.raise_problems()
    cfg.freeze()
    changed = {
        name: source
        for name, source in draft.sources.items()
        if name not in KEYS or draft.values[name] != KEYS[name].default
    }
    return Command(mode, cfg, changed)


def dump(cfg: CfgNode) -> str:
    """The whole configuration as YAML; a file of it, given to `--cfg`, makes an equal configuration."""
    return yaml.dump(cfg, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def check_world_size(cfg: CfgNode, world_size: int) -> None:
    """Refuse to train on a number of processes that cannot share the micro-batches of a step evenly.

    Raises:
        ConfigError: names numbers of processes and micro-batch sizes that work.
    """
    total, micro_batch = cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE
    micro_batches = total // micro_batch
    if micro_batches % world_size == 0:
        return
    start = f"start {_nearest_divisors(micro_batches, world_size)} processes"
    if (
        cfg.TRAIN.EXACT_WORLD_SIZE
    ):  # the micro-batches are a power of two, and so is what divides them
        raise ConfigError(
            "TRAIN.EXACT_WORLD_SIZE takes 1, 2, 4 … processes, at most as many as the micro-batches of a step, "
            f"got {world_size} for {micro_batches} micro-batches; {start}"
        )
    remedies = [start]
    sizes = _nearest_divisors(total // world_size, micro_batch, even=_mixes(cfg.AUG))
    if total % world_size == 0 and sizes:
        remedies.append(f"set --batch-size to {sizes}")
    else:
        share = micro_batch * world_size
        remedies.append(f"set TRAIN.GLOBAL_BATCH_SIZE to {-(-total // share) * share}")
    raise ConfigError(
        f"{world_size} processes cannot share the {micro_batches} micro-batches of a step evenly (TRAIN.GLOBAL_BATCH_SIZE "
        f"{total} / DATA.BATCH_SIZE {micro_batch}); {', or '.join(remedies)}"
    )


# --- Values that do not fit one another -----------------------------------------------------------

Conflict = tuple[str, str]


def _conflicts(cfg: CfgNode, mode: str, sources: dict[str, str]) -> Iterator[Conflict]:
    """("KEY KEY …", why they do not fit and what to do) of every impossible combination that matters in `mode`."""
    if mode == "throughput":
        return
    if not cfg.DATA.PATH:
        yield "DATA.PATH", f"{mode} needs a dataset; add --data-path, a folder of train and val"
    yield from _weight_conflicts(cfg.CHECKPOINT, mode, sources)
    if mode == "train":
        yield from _batch_conflicts(cfg)
        yield from _exactness_conflicts(cfg)
        yield from _schedule_conflicts(cfg.TRAIN)
        yield from _augmentation_conflicts(cfg.AUG, cfg.DATA.IMG_SIZE)


def _weight_conflicts(weights: CfgNode, mode: str, sources: dict[str, str]) -> Iterator[Conflict]:
    both = weights.RESUME and weights.PRETRAINED
    # A run's own config.yaml keeps the PRETRAINED that it began with: to resume it is no contradiction.
    if both and (mode == "eval" or sources["CHECKPOINT.PRETRAINED"].startswith("--")):
        message = "two places to take the weights from; drop one, such as --pretrained ''"
        yield "CHECKPOINT.PRETRAINED CHECKPOINT.RESUME", message
    if mode == "eval" and not (weights.RESUME or weights.PRETRAINED or weights.AUTO_RESUME):
        message = "--eval needs weights; add --resume RUN or --pretrained FILE"
        yield "CHECKPOINT.AUTO_RESUME CHECKPOINT.RESUME CHECKPOINT.PRETRAINED", message


def _batch_conflicts(cfg: CfgNode) -> Iterator[Conflict]:
    total, micro_batch, mixes = cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE, _mixes(cfg.AUG)
    if mixes and micro_batch % 2:
        message = (
            "images are mixed in pairs; use an even micro-batch, or set AUG.MIXUP and CUTMIX to 0"
        )
        yield "DATA.BATCH_SIZE AUG.MIXUP AUG.CUTMIX AUG.MIXUP_PROB", message
    if total % micro_batch:
        sizes = _nearest_divisors(total, micro_batch, even=mixes)
        message = f"a step is a whole number of micro-batches; set the step to {-(-total // micro_batch) * micro_batch} images"
        message += f", or the micro-batch to {sizes}" if sizes else ""
        yield "DATA.BATCH_SIZE TRAIN.GLOBAL_BATCH_SIZE", message


def _exactness_conflicts(cfg: CfgNode) -> Iterator[Conflict]:
    if not cfg.TRAIN.EXACT_WORLD_SIZE:
        return
    micro_batches, rest = divmod(cfg.TRAIN.GLOBAL_BATCH_SIZE, cfg.DATA.BATCH_SIZE)
    if not rest and micro_batches & (micro_batches - 1):
        below = cfg.DATA.BATCH_SIZE << (micro_batches.bit_length() - 1)
        message = f"micro-batches are summed in pairs, but {micro_batches} is no power of two; set the step to {below} or "
        message += f"{2 * below} images"
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
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        message = "the warm-up must end before the training; shorten it, 0 switches it off"
        yield "TRAIN.WARMUP_EPOCHS TRAIN.EPOCHS", message
    if train.MIN_LR > train.BASE_LR:
        yield "TRAIN.MIN_LR TRAIN.BASE_LR", "the last rate is above the highest; lower MIN_LR"
    if train.WARMUP_EPOCHS and train.WARMUP_LR > train.BASE_LR:
        message = "the first rate is above the highest; lower WARMUP_LR"
        yield "TRAIN.WARMUP_LR TRAIN.BASE_LR", message
    scale = train.GLOBAL_BATCH_SIZE / 512
    if scale > 1 and train.BASE_LR * scale > 0.02:
        message = (
            f"per 512 images, this is a rate of {train.BASE_LR * scale:g}, which AdamW does not survive; "
            f"if it was scaled already, write {train.BASE_LR / scale:g}"
        )
        yield "TRAIN.BASE_LR TRAIN.GLOBAL_BATCH_SIZE", message


def _augmentation_conflicts(aug: CfgNode, img_size: int) -> Iterator[Conflict]:
    for name in ("SCALE", "RATIO"):
        if aug.PADDING and aug[name] != KEYS[f"AUG.{name}"].default:
            message = "padded crops do not use it; remove it, or set AUG.PADDING to 0"
            yield f"AUG.{name} AUG.PADDING", message
    if img_size < 2 * aug.PADDING:
        message = "more border than image; the usual padding of CIFAR is 4 for 32 pixels"
        yield "AUG.PADDING DATA.IMG_SIZE", message
    unused = aug.AUTO_AUGMENT and "3a" not in aug.AUTO_AUGMENT
    if unused and aug.COLOR_JITTER not in (0, KEYS["AUG.COLOR_JITTER"].default):
        message = "timm skips jitter beside this policy; remove it, or set AUG.AUTO_AUGMENT to ''"
        yield "AUG.COLOR_JITTER AUG.AUTO_AUGMENT", message


# --- Putting together -----------------------------------------------------------------------------


@dataclass
class Draft:
    """A configuration being put together: values, where each comes from, and everything wrong so far."""

    values: dict = field(default_factory=lambda: {name: key.default for name, key in KEYS.items()})
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unsettled: set[str] = field(default_factory=set)  # keys that could not be set as asked
    complete: bool = True  # every file could be read

    def refuse(self, where: str, message: str, *names: str) -> None:
        """Note a problem; `names` keep their former values and are left out of the checks of combinations."""
        self.problems.append(f"{where}: {message}")
        self.unsettled.update(names)

    def refuse_together(self, names: str, message: str) -> None:
        """Note that the values of several keys, "KEY KEY …", do not fit one another."""
        if self.unsettled.intersection(names.split()):
            return
        sources = {name: self.sources.get(name, "defaults") for name in names.split()}
        where = next((source for source in sources.values() if source != "defaults"), "defaults")
        parts = []
        for name, source in sources.items():
            elsewhere = f" ({source})" if source != where else ""
            parts.append(f"{name} {self.values[name]!r}{elsewhere}")
        self.refuse(where, f"{', '.join(parts)}: {message}")

    def set(self, name: str, node: yaml.Node, label: str, where: str) -> None:
        """Give key `name`, or each key below the group `name`, the value of a YAML node.

        `label` is the file or flag that holds it, `where` the same with the line.
        """
        if name in GROUPS:
            if isinstance(node, yaml.MappingNode):
                self.set_all(node, label, f"{name}.")
            else:
                got = f"got {shown(node)}, expected keys below it"
                self.refuse(where, f"{name}: {got}; set {name}.<key> or remove it")
        elif name.startswith("MODEL.ARGS."):
            self.set_argument(name, node, where)
        elif name in KEYS:
            try:
                self.values[name] = _value(KEYS[name], node)
                self.sources[name] = where
            except ValueError as error:
                self.refuse(where, f"{name}: {error} ({KEYS[name].text})", name)
        else:
            advice, meant = _advice(name)
            self.refuse(where, f"{name}: unknown key; {advice}", *meant)

    def set_all(self, node: yaml.MappingNode, label: str, prefix: str = "") -> None:
        """Set every key of a mapping."""
        lines = {}
        for key, value in node.value:
            name = f"{prefix}{key.value}" if isinstance(key, yaml.ScalarNode) else shown(key)
            where = place(label, key)
            if name in lines:
                message = f"stands twice, first in line {lines[name]}; remove one"
                self.refuse(where, f"{name}: {message}", name)
            elif "." in name.removeprefix(prefix):
                self.refuse(where, f"{name}: dots are for --opts; write keys below their group")
            elif name != "BASE":
                self.set(name, value, label, where)
            lines[name] = key.start_mark.line + 1

    def set_argument(self, name: str, node: yaml.Node, where: str) -> None:
        """Set one argument of the model's constructor, whose name and type only the model knows."""
        argument = name.removeprefix("MODEL.ARGS.")
        if argument in OWNED_ARGS:
            key = OWNED_ARGS[argument]
            self.refuse(where, f"{name}: has a key of its own; use {key}", key)
        elif not argument.isidentifier():
            self.refuse(where, f"{name}: not an argument's name; write MODEL.ARGS.name")
        else:
            try:
                self.values[name] = plain(node)
                self.sources[name] = where
            except ValueError as error:
                self.refuse(where, f"{name}: {error}")

    def build(self) -> CfgNode:
        """The values as a tree, in the order of the schema."""
        tree: dict = {}
        for name, value in self.values.items():
            *groups, last = name.split(".")
            branch = tree
            for group in groups:
                branch = branch.setdefault(group, {})
            branch[last] = dict(value) if name == "MODEL.ARGS" else value
        return CfgNode(tree)

    def raise_problems(self) -> None:
        """Raise the one ConfigError of all problems, if there are any."""
        if len(self.problems) == 1:
            raise ConfigError(self.problems[0])
        if self.problems:
            raise ConfigError("\n  ".join([f"{len(self.problems)} problems:", *self.problems]))


def _advice(name: str) -> tuple[str, list[str]]:
    """What to do about an unknown key, and the keys that were probably meant."""
    for foreign in (name, name.rpartition(".")[0]):
        if foreign in FOREIGN:
            return f"use {FOREIGN[foreign]}", [key for key in KEYS if key in FOREIGN[foreign]]
    name = name.upper()
    meant = (
        difflib.get_close_matches(name, KEYS, n=1, cutoff=0.99)  # written in small letters
        or [key for key in KEYS if _last(key) == _last(name)]
        or difflib.get_close_matches(name, KEYS, n=1, cutoff=0.8)
    )
    groups = difflib.get_close_matches(name, GROUPS, n=1, cutoff=0.75)
    if groups and not meant:
        return f"did you mean {groups[0]}?", [key for key in KEYS if key.startswith(groups[0])]
    if not meant:
        close = difflib.get_close_matches(_last(name), map(_last, KEYS), n=1, cutoff=0.75)
        meant = [key for key in KEYS if _last(key) in close]
    return f"did you mean {' or '.join(meant)}?" if meant else "config.py lists every key", meant


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _value(key: Key, node: yaml.Node) -> bool | int | float | str | list:
    """The value of a node for a key; ValueError says what was got and expected."""
    try:
        value = converted(node, key.default)
    except (ValueError, yaml.YAMLError):
        raise ValueError(f"got {shown(node)}, expected {key.expected}") from None
    if not key.check.holds(value):
        raise ValueError(f"got {shown(node)}, expected {key.expected}{key.check.remedy(value)}")
    return value


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
    parser.add_argument("--eval", action="store_true", help="evaluate and leave; never trains")
    parser.add_argument("--throughput", action="store_true", help="time the model and leave")
    for flag, name in FLAGS.items():
        names = ["-j", flag] if flag == "--workers" else [flag]
        default = f", default {KEYS[name].default}" if KEYS[name].default != "" else ""
        text = f"{KEYS[name].text} ({name}{default})"
        parser.add_argument(*names, dest=name, metavar=_last(name), help=text)
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
    keys = [key for key in KEYS if _last(key) == last and key not in FLAGS.values()]
    if keys and flag.replace("_", "-") not in FLAGS:
        return f"use --opts {' or '.join(keys)}", keys
    flags = [*FLAGS, "--cfg", "--eval", "--throughput", "--opts", "--help"]
    close = difflib.get_close_matches(flag, flags, n=1)
    if close:
        return f"did you mean {close[0]}?", [FLAGS.get(close[0], "")]
    return "main.py --help lists every flag", []


def _read_opts(words: list[str], draft: Draft) -> None:
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


def _node_of(text: str, name: str) -> yaml.Node:
    """A word of the command line as YAML; as mere text where the key is text, or where it is no YAML."""
    if name not in KEYS or not isinstance(KEYS[name].default, str):
        try:
            return yaml.compose(text, Loader) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except (yaml.YAMLError, RecursionError):
            pass
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


# --- Files ----------------------------------------------------------------------------------------


def _read_file(path: str, where: str, draft: Draft, above: tuple[str, ...] = ()) -> None:
    """Set what a YAML file holds, after the files that it names as BASE.

    `where` is the flag or line that asks for the file, `above` the files that led to it.
    """
    node = _compose_file(path, where, draft)
    if node is None:
        draft.complete = False
        return
    above = (*above, path)
    for value in (value for key, value in node.value if key.value == "BASE"):
        asked = f"{place(path, value)}: BASE"
        for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(base, yaml.ScalarNode) or not base.value:
                draft.refuse(asked, f"got {shown(base)}, expected a path from this file, or a list")
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(path), base.value))
            if os.path.realpath(target) in map(os.path.realpath, above):
                circle = " → ".join([*above, target])
                draft.refuse(asked, f"the files form a circle, {circle}; remove one BASE")
            else:
                _read_file(target, asked, draft, above)
    draft.set_all(node, path)


def _compose_file(path: str, where: str, draft: Draft) -> yaml.MappingNode | None:
    """The file's top mapping; None, after noting why, where there is none."""
    if not path.endswith((".yaml", ".yml")):
        draft.refuse(where, f"{path}: expected a .yaml file; configurations are never run as code")
        return None
    if Path(path).is_char_device() or Path(path).is_fifo():
        draft.refuse(where, f"{path}: is a device, whose text may never end; expected a file")
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        draft.refuse(where, f"{path}: no such file{_nearest_file(path)}")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        draft.refuse(where, f"{path}: {reason}; expected a readable file of UTF-8 text")
    else:
        return _compose_text(text, path, draft)
    return None


def _compose_text(text: str, path: str, draft: Draft) -> yaml.MappingNode | None:
    try:
        node = yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        tab = "\\t" in error.problem
        advice = "indent with spaces, not tabs" if tab else "look at the lines up to it"
        draft.refuse(f"{path}:{mark.line + 1}", f"not valid YAML: {error.problem}; {advice}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"holds a character that is not text, {error.character:#x}; remove it"
        draft.refuse(f"{path}:{line}", message)
    except RecursionError:
        draft.refuse(path, "is nested too deeply for a configuration; expected groups of keys")
    else:
        if isinstance(node, yaml.MappingNode):
            return node
        example = "expected keys such as MODEL: {NAME: dat_tiny}"
        got = "is empty" if node is None else f"got {shown(node)}"
        draft.refuse(path, f"{got}, {example}")
    return None


def _nearest_file(path: str) -> str:
    folder = Path(path).parent
    names = [file.name for file in folder.glob("*.yaml")] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {folder / close[0]}?"
    return "; its folder holds " + (", ".join(sorted(names)) or "no .yaml file, or does not exist")
