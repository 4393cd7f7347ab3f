"""Folders as timm's `save_for_hf` and the Hugging Face hub have them: config.json beside weights."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from timm.models import PretrainedCfg

from engine.weight_files import HUB_FILES
from utils.errors import CheckpointError

CONFIG = "config.json"
SETTINGS = {field.name for field in fields(PretrainedCfg)}


@dataclass(frozen=True)
class HubFolder:
    """What a config.json says of the model beside it.

    settings: how its images are prepared. classes: in the order of the logits, None where it names none. descriptions:
    of some classes, in words.
    """

    name: str
    model_args: dict
    settings: PretrainedCfg
    num_classes: int
    classes: list[str] | None
    descriptions: dict[str, str] | None


def is_hub_folder(path: str | Path) -> bool:
    """Whether `path` is a folder with a config.json."""
    return bool(path) and Path(path, CONFIG).is_file()


def hub_folder_of(path: Path) -> Path | None:
    """The folder with a config.json that weights at `path` are from: `path`, or the one with this file of weights.

    The config.json beside a file counts only if it is timm's.
    """
    if is_hub_folder(path):
        return path
    beside = path.name.removesuffix(".index.json") in HUB_FILES and is_hub_folder(path.parent)
    return path.parent if beside and _is_timms(path.parent / CONFIG) else None


def read_hub_folder(folder: Path) -> HubFolder:
    """What the config.json of `folder` says. Raises CheckpointError where it describes no model of timm's."""
    file = folder / CONFIG
    content = _read(file)
    settings = _read_settings(content, file)
    try:
        name = content["architecture"]
        count = content.get("num_classes", content.get("pretrained_cfg", {}).get("num_classes"))
        args = dict(content.get("model_args", {}))
        described = content.get("label_descriptions", settings.label_descriptions)
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: no configuration of a timm model ({error!r})") from error
    if count is None:
        raise CheckpointError(f"{file}: does not say num_classes")
    classes = _label_names(content, file)
    if classes is not None and len(classes) != count:
        raise CheckpointError(f"{file}: {len(classes)} label_names for {count} classes")
    return HubFolder(name, args, settings, count, classes, described)


def evaluation_values(settings: PretrainedCfg) -> dict[str, dict]:
    """What timm keeps about a model's images, as values of DATA and TEST in a configuration."""
    channels, height, width = settings.input_size
    mean, std = list(settings.mean), list(settings.std)
    return {
        "DATA": {
            "IMG_SIZE": height if height == width else [height, width],
            "IN_CHANS": channels,
            "MEAN": mean * (3 // len(mean)),  # one value is that of grey
            "STD": std * (3 // len(std)),
            "INTERPOLATION": settings.interpolation or "bicubic",
        },
        "TEST": {
            "CROP_MODE": settings.crop_mode or "center",
            "CROP_PCT": settings.crop_pct or 0.875,
        },
    }


def read_evaluation_values(folder: Path) -> dict[str, dict]:
    """`evaluation_values` of the config.json of `folder`; empty where it is not timm's."""
    file = folder / CONFIG
    return evaluation_values(_read_settings(_read(file), file)) if _is_timms(file) else {}


def label_names(folder: Path) -> list[str] | None:
    """The classes that the config.json of `folder` names, in the order of the logits; None without them.

    Raises CheckpointError where it cannot be read.
    """
    file = folder / CONFIG
    return _label_names(_read(file), file)


def _label_names(content: dict, file: Path) -> list[str] | None:
    try:
        names = content.get("label_names", (content.get("pretrained_cfg") or {}).get("label_names"))
        if isinstance(names, dict):  # from index to name
            names = [names[key] for key in sorted(names, key=int)]
        if names is not None and not all(isinstance(name, str) for name in names):
            raise ValueError("expected texts")
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: label_names cannot be read ({error})") from error
    return names


def _read_settings(content: dict, file: Path) -> PretrainedCfg:
    try:
        raw = content.get("pretrained_cfg", content)
        settings = PretrainedCfg(**{k: v for k, v in raw.items() if k in SETTINGS})
        evaluation_values(settings)  # raises an error where it has none
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: no configuration of a timm model ({error!r})") from error
    return settings


def _is_timms(file: Path) -> bool:
    try:
        return _read(file).keys() >= {"architecture", "pretrained_cfg"}
    except CheckpointError:
        return False


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected an object in JSON, as the Hugging Face hub has it")
    return content
