"""Image checks: every file of a dataset, recorded in an index so that an interrupted check continues."""

import functools
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import ImageDataset
from data.decode import EXIF_TRANSPOSES, UNREADABLE, decode, open_image, orientation
from data.readers import Reader, StaleListingError
from tools.checks.report import Finding
from utils.errors import ConfigError
from utils.files import read_again, write_atomically
from utils.text import quantity

CHUNK = 64  # files examined between two writes of the index
MIN_SIDE = 32  # pixels
MAX_PIXELS = 50e6
MAX_ASPECT = 10  # longer by shorter side
# The format, in Pillow's words, of suffixes that are not its name.
USUAL = {
    **dict.fromkeys(("JPG", "JPE", "JFIF"), "JPEG"),
    **dict.fromkeys(("PGM", "PBM", "PNM"), "PPM"),
    "APNG": "PNG",
    "TIF": "TIFF",
}


class Examination(Dataset):
    """The record of each file in `todo`, pairs of split and position, for the index."""

    def __init__(
        self,
        datasets: dict[str, ImageDataset],
        todo: list[tuple[str, int]],
        pixels: bool,
        sha: bool,
    ):
        self.datasets = datasets
        self.todo = todo
        self.pixels = pixels
        self.sha = sha

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, item: int) -> dict:
        split, index = self.todo[item]
        dataset = self.datasets[split]
        name = os.fsdecode(dataset.reader.names[index])
        record = {"split": split, "name": name, "size": int(dataset.reader.sizes[index])}
        try:
            # Before the content: what changes meanwhile is examined again the next time.
            record["state"] = read_again(functools.partial(dataset.reader.state, index))
            data = dataset.read(index)
            if self.sha:
                record["sha256"] = hashlib.sha256(data).hexdigest()
            image = open_image(data)
            record |= {"format": image.format, "mode": image.mode, "pixels": image.size}
            record["turned"] = orientation(image) in EXIF_TRANSPOSES
            record["animated"] = _is_animated(image)
            if self.pixels:
                decode(data)
                record["decoded"] = True
        except StaleListingError as error:
            record |= {"problem": str(error), "stale": error.remedy}
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or str(error)
            record["problem"] = f"{type(error).__name__}: {reason}, {record['size']} bytes"
        return record


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except UNREADABLE:  # it has a second frame, which is damaged
        return True


@dataclass
class Tally:
    """Counts of the examined files, and lists of those that need attention."""

    count: Counter = field(default_factory=Counter)  # by split
    reused: int = 0  # examined before, and not changed since
    # SHA-256 at the last check, by split and name.
    hashes: dict[tuple[str, str], str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)  # whose SHA-256 is another one than before
    kinds: Counter = field(default_factory=Counter)  # by format and mode
    misnamed: int = 0
    rotated: int = 0
    animated: int = 0
    odd: list[str] = field(default_factory=list)
    huge: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)  # by split
    stale: dict[str, list[str]] = field(default_factory=dict)  # of another size, by what to do
    owners: dict[str, list[str]] = field(default_factory=dict)  # by SHA-256, "split/name"

    def add(self, record: dict) -> None:
        """Count one record of the index."""
        split, path = record["split"], f"{record['split']}/{record['name']}"
        self.count[split] += 1
        if "sha256" in record:
            before = self.hashes.get((split, record["name"]), record["sha256"])
            if before != record["sha256"]:
                self.changed.append(path)
            self.owners.setdefault(record["sha256"], []).append(path)
        if "stale" in record:
            self.stale.setdefault(record["stale"], []).append(path)
            return
        if "problem" in record:
            self.problems.setdefault(split, []).append(f"{path} ({record['problem']})")
            return
        self.kinds[f"{record['format']} {record['mode']}"] += 1
        suffix = Path(record["name"]).suffix[1:].upper()
        usual = USUAL.get(suffix, suffix)
        self.misnamed += usual not in ("", record["format"].replace("MPO", "JPEG"))
        self.rotated += record["turned"]
        self.animated += record["animated"]
        width, height = record["pixels"]
        text = f"{path} ({width}×{height})"
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            self.odd.append(text)
        if width * height > MAX_PIXELS:
            self.huge.append(text)


def examine(
    datasets: dict[str, ImageDataset], index: Path, pixels: bool, sha: bool, jobs: int
) -> Tally:
    """Examine every image that is not in `index` yet, and add its record.

    Files that had a problem, and files or archives of another size or time of change than at their examination, are
    examined again. Raises ConfigError if `index` cannot be written.
    """
    tally = Tally()
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        known = _keep_valid(index, datasets, pixels, sha, tally)
        file = index.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{index}: {error.strerror}; name another file with --index") from error
    todo = [
        (split, position)
        for split, dataset in datasets.items()
        for position, name in enumerate(dataset.reader.names.tolist())
        if (split, os.fsdecode(name)) not in known
    ]
    examination = Examination(datasets, todo, pixels, sha)
    loader = DataLoader(examination, CHUNK, num_workers=jobs, collate_fn=list)
    with (
        file,
        warnings.catch_warnings(action="ignore"),  # of Pillow, about unusual headers
        tqdm(total=len(known) + len(todo), initial=len(known), unit=" files", leave=False,
             dynamic_ncols=True, disable=None) as progress,
    ):  # fmt: skip
        for records in loader:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            for record in records:
                tally.add(record)
            progress.update(len(records))
    return tally


def _keep_valid(
    index: Path, datasets: dict[str, ImageDataset], pixels: bool, sha: bool, tally: Tally
) -> set[tuple[str, str]]:
    """Drop outdated and incomplete records from `index`; count the others and return their names.

    Records of a split that is not among `datasets` stay, uncounted.
    """
    known: set[tuple[str, str]] = set()
    if not index.exists():
        return known
    positions = {
        (split, os.fsdecode(name)): position
        for split, dataset in datasets.items()
        for position, name in enumerate(dataset.reader.names.tolist())
    }
    lines = []
    try:
        for line in index.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):  # cut off when the process was killed
                break
            record = json.loads(line)
            name = record["split"], record["name"]
            if record["split"] not in datasets:
                lines.append(line)
                continue
            wanted = {"state"} | ({"decoded"} if pixels else set()) | ({"sha256"} if sha else set())
            valid = wanted <= record.keys() and "problem" not in record and name in positions
            if valid and _is_unchanged(record, datasets[name[0]].reader, positions[name]):
                known.add(name)
                tally.add(record)
                lines.append(line)
            elif "sha256" in record:
                tally.hashes[name] = record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{index}: not an index of images; name another file with --index"
        ) from error
    write_atomically(index, "".join(lines))
    tally.reused = len(known)
    return known


def _is_unchanged(record: dict, reader: Reader, position: int) -> bool:
    """Whether an image has the listed size, and its file or archive the state, of its examination."""
    try:
        state = reader.state(position)
        return record["state"] == state and record["size"] == reader.sizes[position]
    except OSError:
        return False


def judge_images(
    tally: Tally, index: Path, pixels: bool, sha: bool, allowed: int, *, skip_bad: bool
) -> Iterator[Finding]:
    """Findings about the examined files, for a run in which `allowed` training files may be unreadable.

    skip_bad: TEST.SKIP_BAD, with which unreadable images of val count as wrong.
    """
    total = sum(tally.count.values())
    read = f"{quantity(total, 'file')}, {'decoded' if pixels else 'headers read'}"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in tally.kinds.most_common())
    parts = [f"{read}: {kinds or 'none valid'}"]
    if tally.reused:
        parts.append(f"{tally.reused:,} of {total:,} checked before, unchanged since")
    advice = "" if pixels else "--pixels decodes them too, which finds truncated images"
    yield Finding("OK", "files", "; ".join([*parts, f"index {index}"]), advice)
    if tally.changed:
        text = f"{quantity(len(tally.changed), 'file')} of another SHA-256 than at the last check"
        remedy = "if nobody changed them, restore them: a disk or a copy has damaged them"
        yield Finding("WARN", "changes", text, remedy, tally.changed)
    for remedy, files in tally.stale.items():
        text = f"{quantity(len(files), 'file')} of another size than when they were listed"
        yield Finding("FAIL", "listing", text, remedy, files)
    for split, problems in tally.problems.items():
        replaced = split == "train" and len(problems) <= allowed
        counted = split == "val" and skip_bad
        text = f"{len(problems):,} of {tally.count[split]:,} {split} images cannot be read"
        remedy = "restore them from the original dataset"
        if replaced:
            remedy += (
                f", or train with others of their class in their place (at most {allowed} files)"
            )
        elif counted:
            remedy += "; with TEST.SKIP_BAD they count as wrong"
        elif split == "val":
            remedy += ", or count them as wrong with TEST.SKIP_BAD=True"
        else:
            remedy += ", or remove them"
        level = "WARN" if replaced or counted else "FAIL"
        yield Finding(level, "unreadable", text, remedy, problems)
    if tally.misnamed:
        text = f"{quantity(tally.misnamed, 'file')} of another format than the suffix"
        yield Finding("OK", "names", text, "nothing to do: the content counts")
    if tally.rotated:
        text = f"EXIF rotates {quantity(tally.rotated, 'image')}"
        remedy = "published results ignore it; DATA.EXIF=apply rotates them"
        yield Finding("OK", "rotation", text, remedy)
    if tally.animated:
        text = f"{quantity(tally.animated, 'image')} with several frames: the first one is used"
        yield Finding("OK", "animation", text)
    if tally.odd:
        text = f"{quantity(len(tally.odd), 'image')} below {MIN_SIDE} pixels or over {MAX_ASPECT} times as long as wide"
        remedy = "look at them; they are used unchanged"
        yield Finding("WARN", "odd shapes", text, remedy, tally.odd)
    if tally.huge:
        text = f"{quantity(len(tally.huge), 'image')} of more than {MAX_PIXELS / 1e6:.0f} million pixels"
        remedy = "a worker needs 3 bytes per pixel; resize them if memory is short"
        yield Finding("WARN", "huge images", text, remedy, tally.huge)
    if sha:
        yield from _duplicates(tally)


def _duplicates(tally: Tally) -> Iterator[Finding]:
    """Findings about identical files in both splits, or under two labels."""
    leaked, ambiguous, repeated = [], [], 0
    for paths in tally.owners.values():
        if len(paths) > 1:
            repeated += len(paths) - 1
            by_split, by_label = ({path.split("/")[i]: path for path in paths} for i in (0, 1))
            if len(by_split) > 1:
                leaked.append(" = ".join(by_split.values()))
            if len(by_label) > 1:
                ambiguous.append(" = ".join(by_label.values()))
    if leaked:
        text = f"{quantity(len(leaked), 'image')} in train and in val"
        remedy = "remove them from train, or the accuracy will be too high"
        yield Finding("FAIL", "duplicates", text, remedy, leaked)
    if ambiguous:
        text = f"{quantity(len(ambiguous), 'image')} with two labels"
        yield Finding("WARN", "duplicates", text, "keep the correct one", ambiguous)
    if not leaked and not ambiguous:
        text = f"{repeated:,} repeated files, none across splits or classes"
        yield Finding("OK", "duplicates", text)
