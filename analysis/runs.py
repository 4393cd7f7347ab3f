"""A run from its files alone: settings, state, records, faults, checkpoints, evaluations; no model and no data.

Whatever is missing or damaged is left out and, where it is damaged, named in `damage`: a report of a broken run shows
what is left of it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from analysis.records import number_records
from utils.errors import ConfigError
from utils.first_edition import translate_keys, translate_metadata
from utils.yaml_nodes import Loader

EXIT_CODES = {
    0: "done",
    1: "ended by a bug, or another process of the run was lost",
    2: "the configuration cannot be run",
    3: "data are missing, malformed or unreadable",
    4: "a checkpoint is missing, damaged or of another model",
    5: "diverged",
    6: "the output directory is full, read-only or in use",
    75: "stopped on request and saved; the same command resumes it",
    76: "hung",
    130: "interrupted",
}
ACCURACIES = ("val/acc1", "val_ema/acc1")
LOST = re.compile(r"offsets/stage(\d+)_lost")
MANY_LOST = 0.5  # share of lost points from which a stage is named


class Series(NamedTuple):
    """A value by step."""

    steps: np.ndarray  # int64 [N]
    values: np.ndarray  # float64 [N]


class Checkpoint(NamedTuple):
    """A checkpoint directory; `sha256` is that of its model.safetensors, "" where there is no manifest."""

    name: str
    step: int
    size: int  # bytes
    sha256: str
    damage: str  # "" for none that can be seen without reading the tensors


@dataclass(frozen=True)
class Run:
    """What a run's directory says.

    name: model and tag, "dat_tiny/default".
    config: settings by dotted name. sources: where those that are no defaults came from.
    status: status.json. metadata: state.json of the latest checkpoint. Each is empty where there is none.
    metrics, timing: series by tag. skipped: the records of skipped.jsonl. bad: those of bad_samples.jsonl.
    evaluations: the folders below eval/. faults: diverged and hang files. damage: what could not be read.
    """

    path: Path
    name: str
    config: dict[str, Any]
    sources: dict[str, str]
    status: dict[str, Any]
    metadata: dict[str, Any]
    metrics: dict[str, Series]
    timing: dict[str, Series]
    skipped: list[dict]
    bad: list[dict]
    checkpoints: list[Checkpoint]
    evaluations: list[Path]
    faults: list[str]
    damage: list[str]

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete."""
        return self.status.get("state") == "done"

    @property
    def last_step(self) -> int:
        """The last step that anything is recorded of."""
        ends = [int(one.steps[-1]) for one in (*self.metrics.values(), *self.timing.values())]
        return max([*ends, self.status.get("step", 0) or 0], default=0)

    @property
    def steps_per_epoch(self) -> float | None:
        """From the checkpoint's metadata, or else from the first validation; None if neither is there."""
        if isinstance(found := self.metadata.get("steps_per_epoch"), int) and found > 0:
            return found
        if "epoch" in self.metrics and self.metrics["epoch"].values[-1] > 0:
            return self.metrics["epoch"].steps[-1] / self.metrics["epoch"].values[-1]
        return None

    @property
    def total_steps(self) -> int | None:
        """Of the complete run, if it is known."""
        epochs, steps = self.config.get("TRAIN.EPOCHS"), self.steps_per_epoch
        return round(epochs * steps) if isinstance(epochs, int) and steps else None

    @property
    def val_images(self) -> int | None:
        """How many images a validation counts, None in runs that do not record it."""
        images = self.metadata.get("images")
        return images.get("val") if isinstance(images, dict) else None

    def best(self) -> tuple[float, int, str] | None:
        """The highest validation accuracy in per cent, its step, and "val" or "val_ema"; None without a finite one."""
        found = [
            (float(series.values[place]), int(series.steps[place]), tag.partition("/")[0])
            for tag in ACCURACIES
            if (series := self.metrics.get(tag)) is not None and np.isfinite(series.values).any()
            for place in [int(np.nanargmax(series.values))]
        ]
        return max(found, key=lambda one: (one[0], -one[1]), default=None)

    def lost_points(self) -> dict[str, float]:
        """`list_lost_points` of the last validation."""
        return list_lost_points({tag: float(s.values[-1]) for tag, s in self.metrics.items()})

    def last_accuracy(self) -> float | None:
        """The accuracy of the last validation in per cent, of the weights themselves; None if there was none."""
        series = self.metrics.get("val/acc1")
        return None if series is None else float(series.values[-1])


def list_lost_points(numbers: Mapping[str, float]) -> dict[str, float]:
    """The stages that lost most of their sampled points, "stage 1", with the share; see analysis/offsets.py.

    numbers: of one validation, by tag.
    """
    found = {LOST.fullmatch(tag): share for tag, share in numbers.items() if share > MANY_LOST}
    return {f"stage {match[1]}": share for match, share in found.items() if match}


def read_run(path: Path) -> Run:
    """The run in the directory `path`. Raises ConfigError unless it is one."""
    if not any((path / name).exists() for name in ("metrics.jsonl", "status.json", "checkpoints")):
        raise ConfigError(f"{path} is no run; expected the folder of one, <output>/<model>/<tag>")
    damage: list[str] = []
    checkpoints = [_read_checkpoint(folder) for folder in _checkpoint_folders(path)]
    metadata = {}
    for one in checkpoints:
        metadata = _read_json(path / "checkpoints" / one.name / "state.json", damage)
        if metadata:
            break
    if metadata and "step" not in metadata:
        metadata = translate_metadata(metadata)
    evaluations = sorted(file.parent for file in path.glob("eval/*/evaluation.json"))
    evaluations += sorted(file.parent for file in path.glob("eval/*/*/evaluation.json"))
    faults = [
        file.name for pattern in ("diverged-*", "hang-*.txt") for file in sorted(path.glob(pattern))
    ]
    return Run(
        path=path,
        name="/".join(path.resolve().parts[-2:]),
        config=flatten(_read_yaml(path / "config.yaml", damage) or metadata.get("config", {})),
        sources=_read_json(path / "sources.json", damage),
        status=_read_json(path / "status.json", damage),
        metadata=metadata,
        metrics=_read_series(path / "metrics.jsonl", damage),
        timing=_read_series(path / "timing.jsonl", damage),
        skipped=_read_lines(path / "skipped.jsonl", damage),
        bad=_read_lines(path / "bad_samples.jsonl", damage),
        checkpoints=checkpoints,
        evaluations=evaluations,
        faults=faults,
        damage=damage,
    )


def name_apart(runs: Sequence[Run]) -> list[Run]:
    """`runs`, each named by the shortest end of its path, at least model and tag, that no other's path has."""
    paths = [run.path.resolve().parts for run in runs]
    named = []
    for run, own in zip(runs, paths, strict=True):
        count = 2
        while count < len(own) and [path[-count:] for path in paths].count(own[-count:]) > 1:
            count += 1
        named.append(replace(run, name="/".join(own[-count:])))
    return named


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; MODEL.ARGS is one value, because an argument may come and go."""
    flat = {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict) and full != "MODEL.ARGS":
            flat |= flatten(value, f"{full}.")
        else:
            flat[full] = value
    return flat


def thin(series: Series, most: int) -> Series:
    """At most `most` points (at least 4) of a series: the first, the last, and each bucket's lowest and highest."""
    count = len(series.steps)
    if count <= most:
        return series
    kept = {0, count - 1}
    for bucket in np.array_split(np.arange(count), max(1, (most - 2) // 2)):
        values = series.values[bucket]
        if np.isfinite(values).any():
            kept |= {int(bucket[np.nanargmin(values)]), int(bucket[np.nanargmax(values)])}
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def smooth(series: Series, share: float = 0.02) -> Series:
    """The running mean over a window of `share` of all values, narrower at the ends."""
    width = max(1, int(len(series.values) * share))
    ones, known = np.ones(width), np.isfinite(series.values)
    sums = np.convolve(np.where(known, series.values, 0), ones, "same")
    counts = np.convolve(known, ones, "same")
    return Series(series.steps, np.where(counts > 0.5, sums / np.maximum(counts, 1), np.nan))


# --- Files ----------------------------------------------------------------------------------------


def _read_json(path: Path, damage: list[str]) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        damage.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        damage.append(f"{path.name} holds no object")
        return {}
    return content


def _read_yaml(path: Path, damage: list[str]) -> dict:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a safe loader
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        damage.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return {}
    return translate_keys(content) if isinstance(content, dict) else {}


def _read_series(path: Path, damage: list[str]) -> dict[str, Series]:
    points: dict[str, list[tuple[int, float]]] = {}
    for record in _read_lines(path, damage):
        for tag, value in record.items():
            if tag != "step" and isinstance(value, int | float):
                points.setdefault(tag, []).append((record["step"], value))
    return {
        tag: Series(*(np.array(column) for column in zip(*values, strict=True)))
        for tag, values in points.items()
    }


def _read_lines(path: Path, damage: list[str]) -> list[dict]:
    """The valid lines of a record file; the others are named in `damage`."""
    if not path.is_file():
        return []
    records = []
    numbered = _number_lines(path) if path.name == "bad_samples.jsonl" else number_records(path)
    for number, record in numbered:
        if record is None:
            damage.append(f"{path.name}, line {number}: damaged, left out")
        else:
            records.append(record)
    return records


def _number_lines(path: Path) -> list[tuple[int, dict | None]]:
    """The lines of a file of objects that have no step."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        found.append((number, record if isinstance(record, dict) else None))
    return found


def _checkpoint_folders(path: Path) -> list[Path]:
    folders = [one for one in path.glob("checkpoints/step-*") if one.name[5:].isdigit()]
    return sorted(folders, key=lambda one: -int(one.name[5:]))


def _read_checkpoint(folder: Path) -> Checkpoint:
    problems: list[str] = []
    manifest = _read_json(folder / "manifest.json", problems)
    model, size = manifest.get("model.safetensors"), 0
    if not isinstance(model, dict):
        problems.append("manifest.json lists no model.safetensors")
    for name, entry in manifest.items():
        expected = entry.get("bytes") if isinstance(entry, dict) else None
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        size += actual or 0
        if actual != expected:
            problems.append(f"{name} has {actual} bytes instead of {expected}")
    sha256 = model.get("sha256", "") if isinstance(model, dict) else ""
    return Checkpoint(folder.name, int(folder.name[5:]), size, sha256, "; ".join(problems))
