"""Checks of a model's arguments: types and ranges of a configuration's fields, before anything is built from them."""

import dataclasses
from collections.abc import Sequence

from utils.errors import ConfigError


def check_fields(config: object) -> None:
    """Raise ConfigError for a field of the dataclass `config` whose value is of another kind than its default.

    Numbers are integers of at least 1, texts have letters, lists at least one entry; where None is the default it is
    allowed, beside an image size: a number or a pair of numbers.
    """
    for field in dataclasses.fields(config):
        name, value, default = field.name, getattr(config, field.name), field.default
        listed = isinstance(default, tuple)
        if listed and (not isinstance(value, Sequence) or isinstance(value, str) or not value):
            raise ConfigError(f"{name} is {value!r}, expected a list with one entry per stage")
        if default is None:
            if value is not None:
                check_size(name, value)
            continue
        entries = value if listed else (value,)
        sample = default[0] if listed else default
        for entry in entries:
            if not _is_like(entry, sample):
                where = "" if entry is value else f" in {list(value)}"
                raise ConfigError(f"{name} is {entry!r}{where}, expected {_words(sample)}")


def check_size(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is the size of an image: the side of a square or (height, width), in pixels."""
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else (value,)
    if not all(_is_like(side, 1) for side in sides):
        raise ConfigError(f"{name} is {value!r}, expected {_words(1)}, or two: height and width")


def _is_like(value: object, sample: object) -> bool:
    if isinstance(sample, bool):
        return isinstance(value, bool)
    if isinstance(sample, str):
        return isinstance(value, str) and value != ""
    return type(value) is int and value >= 1


def _words(sample: object) -> str:
    if isinstance(sample, bool):
        return "True or False"
    return "letters" if isinstance(sample, str) else "an integer of at least 1"
