"""Preparation of a dataset: from a download to `<out>/train` and `<out>/val` as tree, zip or pack.

<out>/prepare.json says what is prepared from what, and which splits are complete, with the sizes of
the parts that they were made from. A split is written below <out>/.prepare and moved to its place
when its images have been counted.
"""

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.decode import UNREADABLE, open_image
from data.readers import open_split
from tools.datasets.output import OUTPUTS, Progress, fingerprint
from tools.datasets.raw_dataset import FILE_NAME, Part, RawDataset, RawImage
from utils.errors import ConfigError, DataError, StorageError
from utils.files import write_atomically
from utils.text import join_some

RECORD, WORK = "prepare.json", ".prepare"
PUBLISHED = "published"  # the source of a dataset that this command downloads or makes
SHOWN = 5  # names in a message


def prepare(
    raw: RawDataset, out: Path, plan: dict[str, int | str], to: str, *, any_count: bool = False
) -> None:
    """Write the splits of `raw` below `out`, continuing where the same command was stopped.

    plan: what decides the content of `out`; the same in every run of one folder.
    to: "tree", "zip" or "pack".
    any_count: accept other numbers of images and classes than the published ones.

    Raises DataError for a damaged or incomplete download, ConfigError for an `out` with other
    content or of a download that has changed since, StorageError where nothing can be written.
    """
    with _storage_errors(out):
        record = _begin(out, plan)
        with _locked(out / WORK):
            for split in raw.splits:
                if split not in record["splits"]:
                    record["splits"][split] = _write_split(raw, out, split, to, any_count)
                    write_atomically(out / RECORD, json.dumps(record, indent=1))
                else:
                    summary = record["splits"][split]
                    if plan["source"] != PUBLISHED:
                        _check_unchanged(raw, out, split, summary)
                    if not (any_count or _is_published(raw, split, summary)):
                        raise ConfigError(
                            f"{out / split} was prepared with --any-count and is a part of the "
                            "data; repeat that flag, or name another folder for all of them"
                        )
                _publish(out, split + OUTPUTS[to].suffix)
                _report(raw, out, split, record["splits"][split])
            for left in out.glob(f".tmp-{RECORD}-*"):  # by a kill
                left.unlink()
            shutil.rmtree(out / WORK)


def _begin(out: Path, plan: dict) -> dict:
    """The record of `out`, new or of the same plan. Raises ConfigError."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        begun = record["plan"]
        record["splits"] = dict(record["splits"])
    except FileNotFoundError:
        # A kill may leave the temporary file of the record.
        found = sorted(os.listdir(out)) if out.exists() else []
        if found := [name for name in found if not name.startswith(f".tmp-{RECORD}")]:
            raise ConfigError(
                f"{out} is not empty (found {join_some(found, SHOWN)}) and was not written by this "
                "command; empty it, or name another folder"
            ) from None
        out.mkdir(parents=True, exist_ok=True)
        record = {"plan": plan, "splits": {}}
        write_atomically(out / RECORD, json.dumps(record, indent=1))
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{out / RECORD}: not a record of this command ({error}); name another folder"
        ) from error
    if begun != plan:
        keys = [key for key in begun | plan if begun.get(key) != plan.get(key)]
        changes = join_some(f"{key} {begun.get(key)}, now {plan.get(key)}" for key in keys)
        raise ConfigError(
            f"{out} was begun with other settings ({changes}); repeat the same command, or name "
            "another folder"
        )
    return record


def _write_split(raw: RawDataset, out: Path, split: str, to: str, any_count: bool) -> dict:
    """Write a split below `out`/.prepare, check it, and say what it holds."""
    name = split + OUTPUTS[to].suffix
    if (out / name).exists():
        raise ConfigError(f"{out / name} exists already; remove it, or name another folder")
    progress = Progress(out / WORK / f"{split}.jsonl")
    output = OUTPUTS[to](out / WORK / name, progress.position)
    if progress.sizes and (stale := progress.first_stale(_sizes(raw, split))):
        output.remove(progress.names_from(stale))
        progress.forget(stale)
        output = OUTPUTS[to](out / WORK / name, progress.position)
    seen = {name.decode() for name in progress.names}
    with tqdm(
        total=raw.counts[split], initial=len(seen), unit=" images", desc=name, disable=None
    ) as bar:
        for part in _parts(raw, split):
            if progress.has(part):
                continue
            images, unreadable = [], []
            for image in part.images:
                path = _checked_name(image, raw, split, part, seen)
                if reason := _problem(image.data):
                    unreadable.append(f"{path}: {reason}")
                crc = zlib.crc32(image.data)
                where = output.write(path, image.data, crc)
                images.append((path, len(image.data), *where, crc))
                bar.update()
            output.sync()
            progress.add(part, images, unreadable, output.position)
    if not progress.names:
        raise DataError(f"{raw.place(split)}: holds no image; expected {raw.layout(split)}")
    order = np.argsort(np.array(progress.names, np.bytes_))
    names, where = np.array(progress.names, np.bytes_)[order], progress.where[order]
    _check_counts(raw, out, split, names, any_count)
    output.close(names, where)
    summary = _verify(out, split, names, where)
    return summary | {"unreadable": progress.unreadable, "parts": progress.sizes}


def _parts(raw: RawDataset, split: str) -> Iterator[Part]:
    """The parts of a split. Raises DataError for two of one name, as `tar -r` leaves them."""
    names: set[str] = set()
    for part in raw.parts(split):
        if part.name in names:
            raise DataError(
                f"{raw.place(split)}: holds {part.name} more than once; keep one of them"
            )
        names.add(part.name)
        yield part


def _sizes(raw: RawDataset, split: str) -> dict[str, int]:
    """The size of each part of a split, by name."""
    return {part.name: part.size for part in _parts(raw, split)}


def _checked_name(image: RawImage, raw: RawDataset, split: str, part: Part, seen: set[str]) -> str:
    """`<class>/<file>` of an image, added to `seen`. Raises DataError for a name it cannot have."""
    path = f"{image.class_name}/{image.file_name}"
    place = raw.place(split)
    where = place if place.name == part.name else place / part.name
    if image.class_name not in raw.known:
        raise DataError(
            f"{where}: {path!r} is of a class that is not one of the {len(raw.classes)} "
            f"(expected {raw.layout(split)}); remove it"
        )
    if not FILE_NAME.fullmatch(image.file_name):
        raise DataError(
            f"{where}: {image.file_name!r} is no plain file name; expected letters, digits, '_', "
            "'-' and '.' only"
        )
    if path in seen:
        raise DataError(f"{where}: {path} was found before; remove one of the two")
    seen.add(path)
    return path


def _problem(data: bytes) -> str:
    """Why the header of an image file cannot be read; empty if it can."""
    if not data:
        return "empty"
    try:
        open_image(data).close()
    except UNREADABLE as error:
        return str(error)
    return ""


def _check_counts(
    raw: RawDataset, out: Path, split: str, names: np.ndarray, any_count: bool
) -> None:
    """Compare the number of images and classes with the published ones. Raises DataError."""
    expected = raw.counts[split]
    found = {name.split(b"/", 1)[0].decode() for name in names.tolist()}
    missing = [name for name in raw.classes if name not in found]
    if any_count or (len(names) == expected and not missing):
        return
    lacks = f"; no image of {join_some(missing, SHOWN)}" if missing else ""
    hint = f" {raw.hint}" if raw.hint else ""
    raise DataError(
        f"{out}: {split} has {len(names):,} images of {len(found):,} classes, expected "
        f"{expected:,} of {len(raw.classes):,}{lacks}.{hint} Complete the download and run the "
        "same command: it resumes. To accept these, add --any-count."
    )


def _verify(out: Path, split: str, names: np.ndarray, where: np.ndarray) -> dict[str, int | str]:
    """Compare what was written, as training reads it, with what was meant to be; a summary."""
    reader = open_split(out / WORK, split)
    same = np.array_equal(reader.names, names)
    if not same or not np.array_equal(reader.where[:, 0], where[:, 0]):
        raise StorageError(
            f"{reader.path} does not hold the files that were written to it; remove {out / WORK} "
            "to start again"
        )
    return {
        "images": len(names),
        "classes": len(reader.folders),
        "bytes": int(where[:, 0].sum()),
        "fingerprint": fingerprint(out / WORK, split),
    }


def _publish(out: Path, name: str) -> None:
    """Move a complete split to its place, unless that was done before."""
    if (out / WORK / name).exists():
        os.replace(out / WORK / name, out / name)
    elif not (out / name).exists():
        raise ConfigError(
            f"{out / RECORD} lists {name}, which is gone; remove {out} to prepare it again"
        )


def _check_unchanged(raw: RawDataset, out: Path, split: str, summary: dict) -> None:
    """Compare the parts of a complete split with those in the download. Raises ConfigError."""
    now = _sizes(raw, split)
    then = summary.get("parts", now)  # records had none before
    if changed := sorted(name for name in then | now if then.get(name) != now.get(name)):
        raise ConfigError(
            f"{raw.place(split)} has changed since {out / split} was written: "
            f"{join_some(changed, SHOWN)}; name another folder, or delete {out}"
        )


def _is_published(raw: RawDataset, split: str, summary: dict) -> bool:
    """Whether the numbers of images and classes of a complete split are the published ones."""
    return (summary["images"], summary["classes"]) == (raw.counts[split], len(raw.classes))


def _report(raw: RawDataset, out: Path, split: str, summary: dict) -> None:
    expected = raw.counts[split], len(raw.classes)
    verdict = "published: {:,} of {:,}".format(*expected)
    if _is_published(raw, split, summary):
        verdict = "as published"
    print(
        f"{out / split}: {summary['images']:,} images of {summary['classes']:,} classes "
        f"({verdict}), {summary['bytes']:,} bytes"
    )
    if unreadable := summary["unreadable"]:
        print(
            f"{out / split}: {len(unreadable)} files cannot be opened as images and were copied as "
            f"they are: {join_some(unreadable, SHOWN)}"
        )


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keep a second process out of `work`. Raises ConfigError if one is there."""
    work.mkdir(exist_ok=True)
    with (work / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{work} is in use by another process; wait until it ends") from None
        except OSError as error:  # some network drives have no locks
            print(f"{work}: {error.strerror}; make sure that no other process writes there")
        yield


@contextmanager
def _storage_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or out} cannot be written: {error.strerror}. Make room or allow "
            "access there and run the same command: it resumes."
        ) from error
