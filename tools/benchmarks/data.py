"""Data benchmark: images per second of the loaders, beside timm's loader and beside decoding alone.

All loaders get the same files, augmentation, batch size and number of workers. They take turns, a pass each, from
files to what the model takes: normalised, erased and mixed. A first pass, which starts workers and fills the page
cache, is not counted.

example:
  python tools/benchmark.py data --data-path /imagenet --workers 8
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import timm.data
import torch
from timm.data import auto_augment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from config import SCHEMA
from data.decode import decode, decode_pixels
from data.fast_ops import posterize
from data.readers import Reader, open_split
from tools import pack
from utils.errors import DataError
from utils.rng import reseed

CPU = torch.device("cpu")
SIZE = 224
AUGMENT = "rand-m9-mstd0.5-inc1"
AUG = {
    key.name.removeprefix("AUG.").lower(): key.default
    for key in SCHEMA
    if key.name.startswith("AUG.")
}
CROP = ("scale", "ratio", "padding", "hflip", "color_jitter", "on_device")
MIXING = (
    "on_device",
    "reprob",
    "remode",
    "recount",
    "mixup",
    "cutmix",
    "mixup_prob",
    "mixup_switch_prob",
    "mixup_mode",
)
COLOURS = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
IMAGES = {
    "allow_missing": False,
    "seed": 0,
    "apply_exif": False,
    "checksums": None,
    "skip_bad": False,
    "holdout": 0.0,
}
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.0}
QUALITY = 90  # of the pack that is encoded again
PEER = "timm with prefetcher"
DECODERS = ("Pillow", "libjpeg-turbo")

Pass = Callable[[], Iterable]  # makes one pass over the images, in batches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `benchmark.py data`."""
    parser.add_argument(
        "--data-path", type=Path, required=True, help="dataset; its val if it has no train"
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="images of a pass, spread over the dataset"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of every loader")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the main process")
    parser.add_argument("--batch-size", type=int, default=50, help="even, as mixing requires")
    parser.add_argument("--shorter-side", type=int, default=288, help="of the pack that is resized")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of every loader")


def run(args: argparse.Namespace) -> dict:
    """Images per second of every loader, absolute and relative to timm's and to decoding alone in the same round.

    Raises DataError without data, or with fewer images than a batch.
    """
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder, plain, small = (Path(scratch) / name for name in ("folder", "plain", "small"))
        count = _sample(args.data_path, folder, args.images, args.batch_size)
        pack.pack(folder, plain, "train", 0, QUALITY, max(1, args.workers))
        pack.pack(folder, small, "train", args.shorter_side, QUALITY, max(1, args.workers))
        passes = {
            "decoding, Pillow": _decoding(folder, decode, args),
            "decoding, libjpeg-turbo": _decoding(folder, decode_pixels, args),
            f"training, {PEER}": _timm_training(folder, args, prefetcher=True),
            "training, timm": _timm_training(folder, args, prefetcher=False),
            "training, ours": _training(folder, args),
            "training, ours, packed": _training(plain, args),
            f"training, ours, packed at {args.shorter_side} px": _training(small, args),
        }
        for crop_mode in ("squash", "center"):
            phase = f"evaluation ({crop_mode})"
            passes |= {
                f"{phase}, {PEER}": _timm_evaluation(folder, args, crop_mode, prefetcher=True),
                f"{phase}, timm": _timm_evaluation(folder, args, crop_mode, prefetcher=False),
                f"{phase}, ours": _evaluation(folder, args, crop_mode),
                f"{phase}, ours, not exact": _evaluation(folder, args, crop_mode, exact=False),
            }
        speeds = _time_in_turns(passes, count, args.rounds)
    return {
        "workers": args.workers,
        "batch_size": args.batch_size,
        "images": count,
        "threads": torch.get_num_threads(),
        "images_per_second": {name: _summary(speed) for name, speed in speeds.items()},
        "times_timm": {
            name: _summary(speed / speeds[f"{name.partition(',')[0]}, {PEER}"])
            for name, speed in speeds.items()
            if "ours" in name
        },
        "share_of_decoding": {
            decoder: {
                name: _summary(speed / speeds[f"decoding, {decoder}"])
                for name, speed in speeds.items()
            }
            for decoder in DECODERS
        },
    }


def table(result: dict) -> str:
    """The result of `run` as text."""
    lines = [
        f"{result['images']} images, {result['workers']} workers, batches of "
        f"{result['batch_size']}; medians of the rounds (lowest … highest)",
        f"{'':34}{'images/s':>24}{'times ' + PEER:>32}{'of decoding, Pillow, libjpeg-turbo':>36}",
    ]
    for name, speed in result["images_per_second"].items():
        times = result["times_timm"].get(name)
        shares = [result["share_of_decoding"][decoder][name]["median"] for decoder in DECODERS]
        lines.append(
            f"{name:34}{_spread(speed, '.0f'):>24}{_spread(times, '.2f') if times else '':>32}"
            f"{shares[0]:>26.0%}{shares[1]:>10.0%}"
        )
    return "\n".join(lines)


def _sample(root: Path, folder: Path, count: int, batch_size: int) -> int:
    """Write up to `count` images, in complete batches, to `folder`/train and as val; return their number."""
    try:
        source = open_split(root, "train")
    except DataError:
        source = open_split(root, "val")
    count = min(count, len(source.names)) // batch_size * batch_size
    if not count:
        raise DataError(
            f"{source.path} has {len(source.names)} images, fewer than a batch of {batch_size}"
        )
    chosen = np.linspace(0, len(source.names) - 1, count).astype(int)
    for index in chosen.tolist():
        path = folder / "train" / os.fsdecode(source.names[index])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(index))
    (folder / "val").symlink_to("train")
    return count


def _time_in_turns(passes: dict[str, Pass], images: int, rounds: int) -> dict[str, np.ndarray]:
    """Images per second of each pass in each round; one more round, the first, is not counted."""
    seconds = {name: [] for name in passes}
    for number in tqdm(range(rounds + 1), unit=" round", disable=None):
        for name, one_pass in passes.items():
            reseed(number)
            start = time.perf_counter()
            for _ in one_pass():
                pass
            seconds[name].append(time.perf_counter() - start)
    return {name: images / np.array(values[1:]) for name, values in seconds.items()}


def _summary(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0, 50, 100)).tolist()
    return {"median": median, "min": low, "max": high}


def _spread(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}} … {values['max']:{form}})"


# --- Ours -----------------------------------------------------------------------------------------


def _training(root: Path, args: argparse.Namespace) -> Pass:
    transform = data.train_transform(
        SIZE,
        **{name: AUG[name] for name in CROP},
        auto_augment=AUGMENT,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
    )
    dataset = data.ImageDataset(root, "train", transform=transform, train=True, **IMAGES)
    steps = len(dataset) // args.batch_size
    sampler = data.TrainBatchSampler(
        len(dataset), batch_size=args.batch_size, micro_batches=1, total_steps=steps, seed=0
    )
    loader = data.train_loader(dataset, sampler, num_workers=args.workers, timeout=0)
    mixing = {name: AUG[name] for name in MIXING}
    micro_batch = data.BatchTransform(
        len(dataset.classes), device=CPU, in_chans=3, interpolation="bicubic", **COLOURS, **mixing
    )
    return lambda: (micro_batch(batch.images, batch.labels) for batch in loader)


def _evaluation(
    root: Path, args: argparse.Namespace, crop_mode: str, *, exact: bool = True
) -> Pass:
    transform = data.eval_transform(
        SIZE, crop_mode=crop_mode, crop_pct=0.875, interpolation="bicubic", exact=exact
    )
    dataset = data.ImageDataset(root, "val", transform=transform, train=False, **IMAGES)
    sampler = data.ShardSampler(len(dataset), batch_size=args.batch_size)
    loader = data.eval_loader(dataset, sampler, num_workers=args.workers, timeout=0)
    normalize = data.Normalize(**COLOURS, in_chans=3, device=CPU)
    return lambda: (normalize(batch.images) for batch in loader)


# --- timm -----------------------------------------------------------------------------------------


def _timm_training(root: Path, args: argparse.Namespace, *, prefetcher: bool) -> Pass:
    dataset = timm.data.ImageDataset(str(root / "train"))
    classes = len(dataset.reader.class_to_idx)
    loader = timm.data.create_loader(
        dataset,
        (3, SIZE, SIZE),
        args.batch_size,
        is_training=True,
        re_prob=0.25,
        re_mode="pixel",
        auto_augment=AUGMENT,
        interpolation="bicubic",
        num_workers=args.workers,
        collate_fn=timm.data.FastCollateMixup(**MIX, num_classes=classes) if prefetcher else None,
        device=CPU,
        use_prefetcher=prefetcher,
    )
    for op in dataset.transform.transforms[2].ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize  # timm's own raises for 0 bits with Pillow 13
    if prefetcher:
        return lambda: loader
    mix = timm.data.Mixup(**MIX, num_classes=classes)
    return lambda: (mix(images, labels) for images, labels in loader)


def _timm_evaluation(
    root: Path, args: argparse.Namespace, crop_mode: str, *, prefetcher: bool
) -> Pass:
    loader = timm.data.create_loader(
        timm.data.ImageDataset(str(root / "val")),
        (3, SIZE, SIZE),
        args.batch_size,
        interpolation="bicubic",
        num_workers=args.workers,
        crop_pct=0.875,
        crop_mode=crop_mode,
        device=CPU,
        use_prefetcher=prefetcher,
    )
    return lambda: loader


# --- Decoding alone -------------------------------------------------------------------------------


class DecodeOnly(Dataset):
    """Reads and decodes every image of `source` and returns nothing."""

    def __init__(self, source: Reader, decoder: Callable[[bytes], object]):
        self.source = source
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> None:
        self.decoder(self.source.read(index))


def _decoding(root: Path, decoder: Callable[[bytes], object], args: argparse.Namespace) -> Pass:
    loader = DataLoader(
        DecodeOnly(open_split(root, "train"), decoder),
        args.batch_size,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        collate_fn=len,
    )
    return lambda: loader
