"""Conversion of checkpoints: names of the released DAT and DAT++ code to ours and back, and files of other trainers.

The tables below are the complete correspondence. A released 1×1 convolution is our Linear; released keys and values
have a projection each, ours is one.
"""

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import relative_position_index
from models.cache import window_mask
from models.state_dicts import choose, clean, find_state_dicts, strip_prefix
from utils import first_edition


class Entry(NamedTuple):
    """One of our modules or parameters, inside a block, and its released counterparts."""

    ours: str
    released: tuple[str, ...]  # several are one after another along the first dimension of ours
    pointwise: bool = False  # released as 1×1 convolution


WINDOW = [
    Entry("relative_position_bias_table", ("relative_position_bias_table",)),
    Entry("qkv", ("proj_qkv",)),
    Entry("proj", ("proj_out",)),
]
ATTENTION = {
    "L": WINDOW,
    "S": WINDOW,
    "N": [Entry("rpb", ("rpb",)), Entry("qkv", ("qkv",)), Entry("proj", ("proj",))],
    "D": [
        Entry("rpe_table", ("rpe_table",)),
        Entry("positions.dwconv", ("conv_offset.0",)),
        Entry("positions.norm", ("conv_offset.1.norm",)),
        Entry("positions.proj", ("conv_offset.3",), pointwise=True),
        Entry("q", ("proj_q",), pointwise=True),
        Entry("kv", ("proj_k", "proj_v"), pointwise=True),
        Entry("proj", ("proj_out",), pointwise=True),
    ],
}
MLP = [Entry("fc1", ("chunk.linear1",)), Entry("fc2", ("chunk.linear2",))]
MLP_PLUS_PLUS = [
    Entry("fc1", ("linear1.0",), pointwise=True),
    Entry("local.conv", ("dwc",)),
    Entry("fc2", ("linear2.0",), pointwise=True),
]
# A tensor that every DAT has, under our name and the released one.
ANCHORS = ("stem.0.weight", "patch_proj.0.weight")
# Buffers of the released code that every model derives itself: they hold nothing that was learned.
DERIVED = re.compile(r"stages\.\d+\.attns\.\d+\.(relative_position_index|attn_mask)")
# Tables whose size follows the window and those whose size follows the image.
WINDOW_TABLES = ("relative_position_bias_table", "rpb")
IMAGE_TABLES = ("rpe_table",)
TABLES = WINDOW_TABLES + IMAGE_TABLES


# --- Names ----------------------------------------------------------------------------------------


def correspondence(model: nn.Module) -> list[Entry]:
    """The released name of every module and parameter of the DAT or DAT++ `model`."""
    plus_plus = model.config.plus_plus
    entries = [Entry("norm", ("cls_norm.norm",)), Entry("head.fc", ("cls_head",))]
    for index in (0, 3) if plus_plus else (0,):  # convolutions, each followed by its norm
        entries.append(Entry(f"stem.{index}", (f"patch_proj.{index}",)))
        entries.append(Entry(f"stem.{index + 1}", (f"patch_proj.{index + 1}.norm",)))
    for i, letters in enumerate(model.config.stages):
        if i:
            entries.append(Entry(f"stages.{i}.downsample.0", (f"down_projs.{i - 1}.0",)))
            entries.append(Entry(f"stages.{i}.downsample.1", (f"down_projs.{i - 1}.1.norm",)))
        for j, letter in enumerate(letters):
            ours = f"stages.{i}.blocks.{j}"
            stage = f"stages.{i}"
            entries += [
                Entry(f"{ours}.norm1", (f"{stage}.layer_norms.{2 * j}.norm",)),
                Entry(f"{ours}.norm2", (f"{stage}.layer_norms.{2 * j + 1}.norm",)),
                *prefixed(f"{ours}.attn", f"{stage}.attns.{j}", ATTENTION.get(letter, [])),
                *prefixed(f"{ours}.mlp", f"{stage}.mlps.{j}", MLP_PLUS_PLUS if plus_plus else MLP),
            ]
            if plus_plus:
                unit = f"{stage}.local_perception_units.{j}"
                entries.append(Entry(f"{ours}.lpu.conv", (unit,)))
    return entries


def prefixed(ours: str, released: str, entries: list[Entry]) -> list[Entry]:
    """`entries` under the prefixes `ours` and `released`."""
    return [
        Entry(f"{ours}.{e.ours}", tuple(f"{released}.{name}" for name in e.released), e.pointwise)
        for e in entries
    ]


def from_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Released names to ours, for `model`; names without counterpart are kept as they are."""
    rest = {name: value for name, value in state_dict.items() if not DERIVED.fullmatch(name)}
    ours = {}
    for entry in correspondence(model):
        for suffix in ("", ".weight", ".bias"):
            names = [name + suffix for name in entry.released]
            if not all(name in rest for name in names):
                continue
            values = [rest.pop(name) for name in names]
            value = torch.cat(values) if len(values) > 1 else values[0]
            pointwise = entry.pointwise and suffix == ".weight"
            ours[entry.ours + suffix] = value.flatten(1) if pointwise else value
    return ours | rest


def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Our names to the released ones, the exact inverse of `from_official`; names without counterpart are kept."""
    rest = dict(state_dict)
    released = {}
    for entry in correspondence(model):
        for suffix in ("", ".weight", ".bias"):
            if entry.ours + suffix not in rest:
                continue
            value = rest.pop(entry.ours + suffix)
            if entry.pointwise and suffix == ".weight":
                value = value[:, :, None, None]
            parts = value.chunk(len(entry.released))
            released |= {
                name + suffix: part for name, part in zip(entry.released, parts, strict=True)
            }
    return released | rest


def derived_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What released files hold besides the weights, under released names: every window's index and mask."""
    tensors = {}
    for i, letters in enumerate(model.config.stages):
        reduction = model.feature_info[i]["reduction"]
        size = tuple(-(-extent // reduction) for extent in model.img_size)
        for j, letter in enumerate(letters):
            if letter not in "LS":
                continue
            attn = model.stages[i].blocks[j].attn
            window, shift = (attn.window_size,) * 2, (attn.shift_size,) * 2
            name = f"stages.{i}.attns.{j}"
            tensors[f"{name}.relative_position_index"] = relative_position_index(attn.window_size)
            if letter == "S":
                tensors[f"{name}.attn_mask"] = window_mask(
                    size, window, shift, torch.device("cpu")
                ).clone()
    return tensors


# --- Files ----------------------------------------------------------------------------------------


def is_official(state_dict: dict[str, Tensor]) -> bool:
    """Whether the names are those of the released code."""
    return ANCHORS[1] in state_dict


def to_ours(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state_dict`, released, ours or of our first edition, under our names."""
    if is_official(state_dict):
        return from_official(state_dict, model)
    return first_edition.translate_tensors(state_dict, model.state_dict())


def checkpoint_filter_fn(file: dict, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's content, ours or released, as state dict for `model` (timm calls it for pretrained files)."""
    found = find_state_dicts(file)
    tensors = clean(found[choose(found)[0]]).tensors if found else {}
    tensors = strip_prefix(tensors, ANCHORS).tensors
    return resize_tables(to_ours(tensors, model), model)


# --- Tables ---------------------------------------------------------------------------------------


def resize_tables(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state_dict`, under our names, with every bias table in the size that `model` has it."""
    own = model.state_dict()
    return {
        name: resize_table(table, own[name]) if name.endswith(TABLES) and name in own else table
        for name, table in state_dict.items()
    }


def resize_table(table: Tensor, own: Tensor) -> Tensor:
    """`table` in the shape of `own`, by bicubic interpolation in float32; as it is if it is for other heads."""
    grid, target = to_grid(table), to_grid(own)
    if table.shape == own.shape or grid is None or len(grid) != len(target):
        return table
    # The entries are displacements from one end of the window or map to the other. With align_corners the ends stay
    # the ends and displacement 0 stays in the middle. Deformable attention reads its table under the same convention,
    # so its bias stays the same function of the displacement. Without, every end would move by a part of an entry.
    size = target.shape[1:]
    grid = F.interpolate(grid[None].float(), size=size, mode="bicubic", align_corners=True)[0]
    return grid.flatten(1).t() if own.ndim == 2 else grid


def to_grid(table: Tensor) -> Tensor | None:
    """A bias table as (heads, n, n'), which window attention keeps as (n², heads); None if it is neither."""
    if table.ndim == 2 and (side := math.isqrt(len(table))) ** 2 == len(table):
        return table.t().unflatten(1, (side, side))
    return table if table.ndim == 3 else None
