"""Identification of weights: which DAT variant the tensors of a file belong to, with its classes and sizes."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.convert import IMAGE_TABLES, TABLES, WINDOW_TABLES, is_official, to_grid, to_ours
from models.dat import VARIANTS, create


class Description(NamedTuple):
    """The DAT that a file's tensors belong to."""

    variants: tuple[str, ...]  # several where the image size is the only difference
    num_classes: int  # 0: no classifier
    window_size: int
    img_size: tuple[int, int]  # height and width that the displacement tables are made for
    released: bool  # under released names

    @property
    def variant(self) -> str:
        """The variant; of several, the one for the smallest images."""
        return self.variants[0]

    def __str__(self) -> str:
        return (
            f"{' or '.join(self.variants)} with {self.num_classes} classes, windows of {self.window_size} "
            f"and tables for {self.img_size[0]}×{self.img_size[1]} pixels"
        )

    def build(self) -> nn.Module:
        """The model on the meta device: names and shapes without values."""
        with torch.device("meta"):
            return create(
                self.variant,
                num_classes=self.num_classes,
                img_size=self.img_size,
                window_size=self.window_size,
            )


def identify(tensors: dict[str, Tensor]) -> Description | None:
    """Which DAT `tensors` are, ours or released; None for other networks and for a DAT of no variant's layout.

    Everything in the stages but the sizes of tables must be as the variant has it. Among variants that are alike in
    this, the window decides.
    """
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    fitting = {
        name: model
        for name, model in skeletons().items()
        if outline(to_ours(shapes, model)) == outline(model.state_dict())
    }
    if not fitting:
        return None
    model = next(iter(fitting.values()))
    state = to_ours(shapes, model)
    window = window_size(state)
    same_window = [n for n, m in fitting.items() if window_size(m.state_dict()) == window]
    classifier = state.get("head.fc.weight", ())
    return Description(
        variants=tuple(same_window or fitting),
        num_classes=len(classifier),
        window_size=window,
        img_size=rpe_img_size(state, model),
        released=is_official(tensors),
    )


@functools.cache
def skeletons() -> dict[str, nn.Module]:
    """Every variant on the meta device."""
    with torch.device("meta"):
        return {name: create(name) for name in VARIANTS}


def outline(state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the stages; of tables, which are resized, the number of heads alone."""
    shapes = {}
    for name, tensor in state_dict.items():
        if name.startswith("stages."):
            grid = to_grid(tensor) if name.endswith(TABLES) else None
            shapes[name] = tuple(tensor.shape) if grid is None else (len(grid),)
    return shapes


def window_size(state_dict: dict[str, Tensor]) -> int:
    """The side of the windows or neighbourhoods that the first table is for."""
    table = next(value for name, value in state_dict.items() if name.endswith(WINDOW_TABLES))
    return (to_grid(table).shape[1] + 1) // 2


def rpe_img_size(state_dict: dict[str, Tensor], model: nn.Module) -> tuple[int, int]:
    """The image size that the displacement tables are made for, in complete cells of the first stage that has them."""
    name = next(name for name in state_dict if name.endswith(IMAGE_TABLES))
    reduction = model.feature_info[int(name.split(".")[1])]["reduction"]
    extents = to_grid(state_dict[name]).shape[1:]
    return tuple((extent + 1) // 2 * reduction for extent in extents)
