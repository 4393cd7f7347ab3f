"""Prediction stores for the tests, written row by row from logits, independently of the program's writer."""

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
from scipy import special

CENTER = {"crop_mode": "center", "crop_pct": 0.9, "img_size": 224, "interpolation": "bicubic"}


def random_logits(images: int, classes: int, seed: int = 0, skill: float = 2.0):
    """float64 logits [images, classes] that favour the label by `skill`, and the labels, in order."""
    rng = np.random.default_rng(seed)
    label = np.sort(np.arange(images) % classes)
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), label] += skill
    return logits, label


def write_evaluation(folder: Path, classes: list[str], name: str = "model", **entries) -> Path:
    """An evaluation.json in `folder` that lists no set yet; `add_set` adds them."""
    folder.mkdir(parents=True)
    record = {
        "format": 1,
        "weights": {"path": "model.safetensors", "sha256": "0" * 64, "step": 10, "kind": "ema"},
        "model": {"name": name, "args": {}},
        "classes": classes,
        "sets": {},
        **entries,
    }
    (folder / "evaluation.json").write_text(json.dumps(record))
    return folder


def add_set(
    folder: Path,
    name: str,
    logits: np.ndarray,
    label: np.ndarray,
    *,
    files: list[str] | None = None,
    bad: tuple[int, ...] = (),
    keep_logits: bool = False,
    full1: list[int] | None = None,
    **record,
) -> Path:
    """Write `name`.csv, with rank 0 for the images `bad`, and list it; `record` are further entries of SetRecord.

    full1: the column of that name, without which it is the argmax of the logits.
    """
    evaluation = json.loads((folder / "evaluation.json").read_text())
    classes, kept = record.get("classes") or evaluation["classes"], record.get("kept")
    files = files or [f"{classes[c]}/{i:05d}.JPEG" for i, c in enumerate(label)]
    competing = np.arange(logits.shape[1]) if kept is None else np.array(kept)
    shown = min(5, len(competing))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    pairs = [f"{letter}{place + 1}" for place in range(shown) for letter in "cp"]
    has_full1 = kept is not None or record.get("classes") is not None
    full = ["full1"] if has_full1 else []
    writer.writerow(["file", "label", "rank", "p", *pairs, "nll", "brier", "entropy", *full])
    for index, (file, right) in enumerate(zip(files, label.tolist(), strict=True)):
        if index in bad:
            writer.writerow([file, right, 0, *[""] * (1 + len(pairs) + 3 + len(full))])
            continue
        p = np.zeros(logits.shape[1])
        p[competing] = special.softmax(logits[index, competing])
        order = competing[np.argsort(-p[competing], kind="stable")]
        numbers = [p[right]]
        for c in order[:shown]:
            numbers += [int(c), p[c]]
        one_hot = np.arange(len(p)) == right
        numbers += [-np.log(p[right]), ((p - one_hot) ** 2).sum(), special.entr(p).sum()]
        words = [f"{x:.6g}" if isinstance(x, float) else str(x) for x in numbers]
        guess = int(logits[index].argmax()) if full1 is None else int(full1[index])
        full = [guess] if has_full1 else []
        writer.writerow([file, right, order.tolist().index(right) + 1, *words, *full])
    (folder / f"{name}.csv").write_text(buffer.getvalue())
    if keep_logits:
        np.save(folder / f"{name}.logits.npy", logits.astype(np.float16))
    lines = "".join(f"{file}\t{right}\n" for file, right in zip(files, label, strict=True))
    entry = {
        "images": len(files),
        "fingerprint": hashlib.sha256(lines.encode()).hexdigest(),
        "pixels": CENTER,
        **record,
    }
    evaluation["sets"][name] = entry
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    sign(folder, name)
    return folder / f"{name}.csv"


def sign(folder: Path, name: str) -> None:
    """Record the CSV of `name` as it is now."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    digest = hashlib.sha256((folder / f"{name}.csv").read_bytes()).hexdigest()
    evaluation["sets"][name]["sha256"] = digest
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
