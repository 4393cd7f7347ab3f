"""Prediction collector: what an evaluation keeps of every image, and the files of the store that it becomes.

`Collector` takes logits, batch by batch and on the device, inside `engine.loop.validate`; `write_set` and
`write_evaluation` write what `analysis/predictions.py` reads.
"""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.predictions import (
    FORMAT,
    TOP,
    Evaluation,
    Predictions,
    SetRecord,
    column_names,
    read_evaluation,
)
from utils.distributed import all_reduce_sum
from utils.errors import DataError, DivergedError
from utils.files import write_atomically
from utils.text import join_some

NO_ROW = -1


@dataclass(frozen=True)
class View:
    """What of a pass over images becomes a set of the store, and how its classes compete.

    name: of the set.
    images: positions in the dataset; None for all.
    kept: classes to which the logits are masked before argmax and softmax; None for all.
    pooled: for each class of the set's own list, the model's classes whose largest logit is its logit; None for the
    model's own classes. `kept` and labels then refer to the set's list.
    classes: that list.
    """

    name: str
    images: np.ndarray | None = None
    kept: list[int] | None = None
    pooled: list[list[int]] | None = None
    classes: list[str] | None = None

    @property
    def has_full1(self) -> bool:
        """Whether the most probable of all classes is kept too."""
        return self.kept is not None or self.pooled is not None


class Collector:
    """One row per image of a view, filled in any order on any number of processes, float64 on the device.

    labels: int64 [N], of the dataset's images; for pooled classes of the set's own list.
    num_classes: of the model.
    keep_logits: whether to keep float16 logits, [images, classes], pooled and not masked.
    """

    def __init__(
        self,
        view: View,
        labels: np.ndarray,
        num_classes: int,
        device: torch.device,
        *,
        keep_logits: bool,
    ):
        images = np.arange(len(labels)) if view.images is None else view.images
        self.view = view
        self.labels = labels[images]
        row_of = np.full(len(labels), NO_ROW)
        row_of[images] = np.arange(len(images))
        self._row_of = torch.from_numpy(row_of).to(device)
        self._labels = torch.from_numpy(self.labels.astype(np.int64)).to(device)
        classes = num_classes if view.pooled is None else len(view.pooled)
        self.competing = classes if view.kept is None else len(view.kept)
        self._shown = min(TOP, self.competing)
        self._dropped = self._pool = self._pool_of = None
        if view.kept is not None:
            self._dropped = torch.ones(classes, dtype=torch.bool, device=device)
            self._dropped[view.kept] = False
        if view.pooled is not None:
            widest = max(map(len, view.pooled))
            padded = [(members * widest)[:widest] for members in view.pooled]
            self._pool = torch.tensor(padded, device=device)
            self._pool_of = torch.full((num_classes,), -1, device=device)
            for index, members in enumerate(view.pooled):
                self._pool_of[members] = index
        # rank, p, nll, brier, entropy, full1, then classes and their probabilities
        self._rows = torch.zeros(
            (len(images), 6 + 2 * self._shown), dtype=torch.float64, device=device
        )
        self._logits = None
        if keep_logits:
            self._logits = torch.zeros((len(images), classes), dtype=torch.float16, device=device)

    def add(self, logits: Tensor, readable: Tensor, indices: Tensor) -> None:
        """Keep what logits [B, classes] say about the images at `indices` [B]; `readable` bool [B]."""
        rows = self._row_of[indices]
        if self.view.images is not None:
            chosen = rows != NO_ROW
            logits, readable, rows = logits[chosen], readable[chosen], rows[chosen]
        labels = self._labels[rows, None]
        full1 = logits.argmax(1)
        if self._pool is not None:
            full1 = self._pool_of[full1]
            logits = logits[:, self._pool].amax(2)
        if self._logits is not None:
            kept = logits.where(readable[:, None], 0)
            self._logits[rows] = kept.half() + 0.0  # no -0, which a sum over processes loses
        if self._dropped is not None:
            logits = logits.masked_fill(self._dropped, -torch.inf)
        top = logits.topk(self._shown).indices
        # The label's place among the first five is topk's, which decides between equal logits.
        found = top == labels
        place = torch.where(found.any(1), found.int().argmax(1), self._shown)
        better = (logits > logits.gather(1, labels)).sum(1)
        rank = 1 + torch.where(place < self._shown, place, better.clamp(min=self._shown))

        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        log_p_label = log_p.gather(1, labels)
        others = p.scatter(1, labels, 0).square().sum(1)
        columns = (
            rank,
            log_p_label[:, 0].exp(),
            -log_p_label[:, 0],
            log_p_label[:, 0].expm1().square() + others,
            torch.special.entr(p).sum(1),
            full1,
        )
        values = torch.cat(
            [torch.stack([c.double() for c in columns], 1), top, p.gather(1, top)], 1
        )
        self._rows[rows] = values.where(readable[:, None], 0) + 0.0

    def gather(self, files: Sequence[str]) -> tuple[Predictions, np.ndarray | None]:
        """The rows of all processes, for images named `files` [N], and the logits if they are kept.

        Raises DivergedError for logits that are not finite.
        """
        rows = all_reduce_sum(self._rows).cpu().numpy()
        logits = None if self._logits is None else all_reduce_sum(self._logits).cpu().numpy()
        rank = rows[:, 0].astype(np.int64)
        readable = rank > 0
        broken = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(broken):
            raise DivergedError(
                f"{self.view.name}: the logits of {len(broken)} of {len(rows)} images are not finite, first "
                f"{files[broken[0]]}. Try --amp-dtype bfloat16 or float32; if it stays, the weights are damaged."
            )

        def numbers(column: np.ndarray) -> np.ndarray:
            return np.where(readable.reshape(-1, *[1] * (column.ndim - 1)), column, np.nan)

        def indices(column: np.ndarray) -> np.ndarray:
            return np.nan_to_num(numbers(column), nan=-1).astype(np.int64)

        _, p, nll, brier, entropy, full1 = rows[:, :6].T
        predictions = Predictions(
            file=list(files),
            label=self.labels.astype(np.int64),
            rank=rank,
            p=numbers(p),
            top=indices(rows[:, 6 : 6 + self._shown]),
            top_p=numbers(rows[:, 6 + self._shown :]),
            nll=numbers(nll),
            brier=numbers(brier),
            entropy=numbers(entropy),
            full1=indices(full1) if self.view.has_full1 else None,
        )
        return predictions, logits


# --- Files ----------------------------------------------------------------------------------------


def format_rows(predictions: Predictions, competing: int) -> str:
    """The CSV of `predictions`, among whose classes `competing` compete."""
    header = column_names(competing, predictions.full1 is not None)
    columns = [predictions.file, predictions.label.tolist(), predictions.rank.tolist()]
    columns += [_digits(predictions.p)]
    for place in range(predictions.top.shape[1]):
        columns += [predictions.top[:, place].tolist(), _digits(predictions.top_p[:, place])]
    columns += [_digits(predictions.nll), _digits(predictions.brier), _digits(predictions.entropy)]
    if predictions.full1 is not None:
        columns += [predictions.full1.tolist()]
    empty = [""] * (len(header) - 3)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in zip(*columns, strict=True):
        writer.writerow(row if row[2] else [*row[:3], *empty])  # rank 0: unreadable
    return text.getvalue()


def _digits(values: np.ndarray) -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]


def write_set(
    folder: Path,
    collector: Collector,
    predictions: Predictions,
    logits: np.ndarray | None,
    record: SetRecord,
) -> SetRecord:
    """Write a set's CSV, and its logits, into `folder`; `record` with the CSV's SHA-256. Raises StorageError."""
    name = collector.view.name
    content = format_rows(predictions, collector.competing).encode()
    write_atomically(folder / f"{name}.csv", content)
    if logits is not None:
        buffer = io.BytesIO()
        np.save(buffer, logits)
        write_atomically(folder / f"{name}.logits.npy", buffer.getvalue())
    else:
        (folder / f"{name}.logits.npy").unlink(missing_ok=True)  # of other predictions
    return replace(record, sha256=hashlib.sha256(content).hexdigest())


def write_evaluation(evaluation: Evaluation) -> None:
    """Write evaluation.json into the evaluation's folder. Raises StorageError."""
    content = {"format": FORMAT, **asdict(evaluation)}
    del content["folder"]
    write_atomically(evaluation.folder / "evaluation.json", json.dumps(content, indent=1) + "\n")


def extend_evaluation(evaluation: Evaluation) -> Evaluation:
    """`evaluation` with the sets that its folder holds already, such as those of an earlier --only.

    Raises DataError where they were made by other weights or settings: different numbers get different folders. Weights
    that lie elsewhere now are the same, if their SHA-256 is.
    """
    if not (evaluation.folder / "evaluation.json").exists():
        return evaluation
    before = read_evaluation(evaluation.folder)
    changed = [
        name
        for name in ("weights", "model", "classes", "pixels", "logits")
        if _plain(getattr(before, name)) != _plain(getattr(evaluation, name))
    ]
    if changed:
        details = [
            f"{name}.{key}" if isinstance(getattr(evaluation, name), dict) else name
            for name in changed
            for key in _changed_keys(getattr(before, name), getattr(evaluation, name))
        ]
        raise DataError(
            f"{evaluation.folder} holds an evaluation that differs in {join_some(details)}. "
            "Give this one a folder of its own with --out DIR, or delete the other."
        )
    return replace(evaluation, sets=before.sets | evaluation.sets)


def _plain(value: object) -> object:
    """`value` as JSON keeps it, without the path of weights."""
    plain = json.loads(json.dumps(value))
    return {k: v for k, v in plain.items() if k != "path"} if isinstance(plain, dict) else plain


def _changed_keys(before: object, now: object) -> list[str]:
    if not isinstance(now, dict):
        return [""]
    before, now = _plain(before), _plain(now)
    return sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
