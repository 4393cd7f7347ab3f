"""Models of this project for the tests: the smallest one, and every variant with few channels."""

import timm
import torch
from torch import Tensor, nn

import models
from models.dat import VARIANTS


def micro(classes: int = 10, seed: int = 0, **args) -> nn.Module:
    """dat_micro for 32×32 images, its weights a function of `seed`."""
    torch.manual_seed(seed)
    args = {"num_classes": classes, "img_size": 32, "drop_path_rate": 0.0, **args}
    return models.build("dat_micro", **args)


def thin(name: str, **kwargs) -> nn.Module:
    """The variant with four channels a head: its blocks, heads, groups and tables, at a small part of its cost."""
    torch.manual_seed(0)
    dims = [4 * heads for heads in VARIANTS[name].get("num_heads", (3, 6, 12, 24))]
    return timm.create_model(name, dims=dims, **kwargs).eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
