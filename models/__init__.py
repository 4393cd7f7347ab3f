"""Models by name: importing this package registers the DAT variants with timm, `build` makes any model timm knows."""

import dataclasses
import inspect
import re
import sys

import timm
from torch import nn

from models.dat import DAT, VARIANTS, DATConfig, SamplingPoints
from utils.errors import ConfigError
from utils.text import nearest

__all__ = ["SamplingPoints", "build", "check"]


def build(
    name: str, *, num_classes: int, img_size: int, drop_path_rate: float, **args
) -> nn.Module:
    """The model that timm knows as `name`, untrained; `args` go to its constructor.

    `img_size` is passed on where a model depends on it. Unknown names and arguments raise
    ConfigError with the nearest.
    """
    check(name, args)
    settings = timm.get_pretrained_cfg(name)
    if name in VARIANTS or (settings and settings.fixed_input_size):
        args["img_size"] = img_size
    try:
        return timm.create_model(
            name, num_classes=num_classes, drop_path_rate=drop_path_rate, **args
        )
    except TypeError as error:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword .*?'(\w+)'", str(error))
        if unknown is None:
            raise
        class_name, argument = unknown.groups()
        if argument == "drop_path_rate" and drop_path_rate == 0:  # what such a model does anyway
            return timm.create_model(name, num_classes=num_classes, **args)
        known = constructor_arguments(name, class_name)
        raise ConfigError(
            f"{name} takes no argument {argument!r}{nearest(argument, known)}"
        ) from error


def check(name: str, args: dict[str, object]) -> None:
    """Raise ConfigError for a name that timm does not know, and for arguments that a DAT cannot be built from.

    The arguments of timm's models are known only when one is built.
    """
    if not timm.is_model(name):
        raise ConfigError(f"there is no model {name!r}{nearest(name, timm.list_models())}")
    if name not in VARIANTS:
        return
    known = constructor_arguments(name, "DAT")
    for argument in args:
        if argument not in known:
            raise ConfigError(f"{name} takes no argument {argument!r}{nearest(argument, known)}")
    shape = {field.name for field in dataclasses.fields(DATConfig)}
    DATConfig(**{k: v for k, v in {**VARIANTS[name], **args}.items() if k in shape})


def constructor_arguments(name: str, class_name: str) -> list[str]:
    """The arguments of the class that the timm model `name` is made of."""
    if name in VARIANTS:
        classes = [DAT, DATConfig]
    else:
        classes = [getattr(sys.modules[timm.models.model_entrypoint(name).__module__], class_name)]
    return [argument for cls in classes for argument in inspect.signature(cls).parameters]
