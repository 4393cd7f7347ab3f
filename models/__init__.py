"""Which model is meant by a name? Importing this package registers the DAT variants with timm."""

import copy
import difflib
import inspect
import re
import sys

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from models.attention import NeighborhoodAttention
from models.dat import DAT, VARIANTS, DATConfig, SamplingPoints
from utils.errors import ConfigError

__all__ = ["SamplingPoints", "build", "count_macs"]

# PyTorch's counter knows this product, but not in place.
flop_registry[torch.ops.aten.baddbmm_] = flop_registry[torch.ops.aten.baddbmm]


def build(
    name: str, *, num_classes: int, img_size: int, drop_path_rate: float, **args
) -> nn.Module:
    """The model that timm knows as `name`, untrained; `args` go to its constructor.

    `img_size` is passed on where a model depends on it. Unknown names and arguments raise
    ConfigError with the nearest.
    """
    if not timm.is_model(name):
        raise ConfigError(f"there is no model {name!r}{nearest(name, timm.list_models())}")
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


def count_macs(model: nn.Module, height: int, width: int, in_chans: int = 3) -> int:
    """Multiply-adds of one image's forward pass: convolutions and matrix products, no bilinear reads.

    Neighbourhood attention counts as its definition says, w² keys per query, not as it is computed.
    """
    masked = 0

    def collect(module: NeighborhoodAttention, inputs: tuple, output: torch.Tensor):
        nonlocal masked
        masked += module.masked_macs(*output.shape[1:3])

    model = copy.deepcopy(model).to("meta").eval()
    for module in model.modules():
        if isinstance(module, NeighborhoodAttention):
            module.register_forward_hook(collect)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, in_chans, height, width, device="meta"))
    return counter.get_total_flops() // 2 - masked


def constructor_arguments(name: str, class_name: str) -> list[str]:
    """The arguments of the class that the timm model `name` is made of."""
    if name in VARIANTS:
        classes = [DAT, DATConfig]
    else:
        classes = [getattr(sys.modules[timm.models.model_entrypoint(name).__module__], class_name)]
    return [argument for cls in classes for argument in inspect.signature(cls).parameters]


def nearest(word: str, known: list[str]) -> str:
    """The end of an error message: the entry of `known` most like `word`, if any is."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
