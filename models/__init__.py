"""Models by name: importing this package registers the DAT variants with timm, `build` makes any model timm knows."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence

import timm
import torch
from torch import nn

from models.dat import DAT, VARIANTS, DATConfig, SamplingPoints
from utils.errors import ConfigError
from utils.text import format_size, nearest

__all__ = ["SamplingPoints", "build", "check", "check_forward", "set_grad_checkpointing"]

# How constructors and forward passes of timm's models fail on arguments that they cannot work with.
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
_FITTING: set[tuple] = set()  # what `check_forward` has tried in this process


def build(
    name: str,
    *,
    num_classes: int,
    img_size: int | Sequence[int],
    drop_path_rate: float,
    in_chans: int = 3,
    **args,
) -> nn.Module:
    """The model that timm knows as `name`, untrained; `args` go to its constructor.

    `img_size` is passed on where a model depends on it. Unknown names and arguments raise
    ConfigError with the nearest.
    """
    check(name, args)
    settings = timm.get_pretrained_cfg(name)
    if name in VARIANTS or (settings and settings.fixed_input_size):
        args["img_size"] = img_size
    if in_chans != 3:  # what every model takes
        args["in_chans"] = in_chans
    try:
        return timm.create_model(
            name, num_classes=num_classes, drop_path_rate=drop_path_rate, **args
        )
    except TypeError as error:
        unknown = re.search(
            r"(\w+)\.__init__\(\) got (?:an )?unexpected keyword .*?'(\w+)'", str(error)
        )
        if unknown is None:
            raise
        class_name, argument = unknown.groups()
        if argument == "drop_path_rate" and drop_path_rate == 0:  # what such a model does anyway
            return timm.create_model(name, num_classes=num_classes, **args)
        if argument == "drop_path_rate":
            raise ConfigError(
                f"{name} has no stochastic depth: set MODEL.DROP_PATH_RATE 0"
            ) from error
        known = constructor_arguments(name, class_name)
        raise ConfigError(
            f"{name} takes no argument {argument!r}{nearest(argument, known)}"
        ) from error


def check(name: str, args: dict[str, object]) -> None:
    """Raise ConfigError for a name that timm does not know, and for arguments that a DAT cannot be built from.

    The arguments of timm's models are known only when one is built.
    """
    try:
        known = timm.is_model(name)
        timm.get_pretrained_cfg(name)  # which knows the tag of weights, after a dot
    except RuntimeError:
        known = False
    if not known:
        names = timm.list_models() + timm.list_pretrained()
        raise ConfigError(f"there is no model {name!r}{nearest(name, names)}")
    if name not in VARIANTS:
        return
    known = constructor_arguments(name, "DAT")
    for argument in args:
        if argument not in known:
            raise ConfigError(f"{name} takes no argument {argument!r}{nearest(argument, known)}")
    shape = {field.name for field in dataclasses.fields(DATConfig)}
    DATConfig(**{k: v for k, v in {**VARIANTS[name], **args}.items() if k in shape})


def check_forward(
    name: str,
    *,
    num_classes: int,
    img_size: int | Sequence[int],
    sizes: list[tuple[int, int]],
    in_chans: int,
    drop_path_rate: float,
    batch_size: int,
    training: bool,
    grad_checkpointing: bool,
    **args,
) -> None:
    """Raise ConfigError unless the model can be built and maps images (B, C, H, W) to logits (B, `num_classes`).

    img_size: the size that the model is made for; `sizes`: each (H, W); in_chans: C.

    Tried with shapes alone, on the meta device. What that device cannot do, such as reading a value, is not tried.
    """
    shape = img_size, sizes, in_chans
    tried = repr((name, num_classes, shape, drop_path_rate, batch_size, training, args))
    if (tried, grad_checkpointing) in _FITTING:
        return
    check(name, args)
    asked, size = (f"{name} with {args}" if args else name), img_size
    try:
        with torch.device("meta"):
            model = build(
                name,
                num_classes=num_classes,
                img_size=img_size,
                in_chans=in_chans,
                drop_path_rate=drop_path_rate,
                **args,
            )
        with torch.no_grad():
            for size in sizes:
                images = torch.empty(batch_size, in_chans, *size, device="meta")
                logits = model.train(training)(images)
    except FAILURES as error:
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            return
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        if "more than 1 value per channel" in reason:
            raise ConfigError(
                f"{name} has BatchNorm, which needs more than one value per channel to train: DATA.BATCH_SIZE "
                f"{batch_size} is too small for images of {format_size(size)} pixels"
            ) from error
        raise ConfigError(
            f"{asked} cannot take images of {format_size(size)} pixels: {reason}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (batch_size, num_classes):
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(
            f"{asked} returns {found}, expected logits {[batch_size, num_classes]}: leave out the argument that "
            "changes what it returns"
        )
    if grad_checkpointing:
        set_grad_checkpointing(model)
    _FITTING.add((tried, grad_checkpointing))


def set_grad_checkpointing(model: nn.Module) -> None:
    """Let a model of timm's recompute its activations in the backward pass. Raises ConfigError where it cannot."""
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing: set MODEL.GRAD_CHECKPOINTING False, and to save "
            "memory lower DATA.BATCH_SIZE"
        ) from error


def constructor_arguments(name: str, class_name: str) -> list[str]:
    """The arguments of the class that the timm model `name` is made of."""
    if name in VARIANTS:
        classes = [DAT, DATConfig]
    else:
        classes = [getattr(sys.modules[timm.models.model_entrypoint(name).__module__], class_name)]
    return [argument for cls in classes for argument in inspect.signature(cls).parameters]
