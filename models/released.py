"""What did the authors call it? Names and shapes of the released DAT and DAT++ checkpoints, to ours and back.

The tables below are the whole correspondence. A released 1×1 convolution is our Linear; released keys and values have a
projection each, ours is one.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn


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
        Entry("displacement_bias_table", ("rpe_table",)),
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
    Entry("conv", ("dwc",)),
    Entry("fc2", ("linear2.0",), pointwise=True),
]
# Derived by every model itself: they carry nothing that was learned.
DERIVED = re.compile(r"stages\.\d+\.attns\.\d+\.(relative_position_index|attn_mask)")


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
                *nested(f"{ours}.attn", f"{stage}.attns.{j}", ATTENTION[letter]),
                *nested(f"{ours}.mlp", f"{stage}.mlps.{j}", MLP_PLUS_PLUS if plus_plus else MLP),
            ]
            if plus_plus:
                unit = f"{stage}.local_perception_units.{j}"
                entries.append(Entry(f"{ours}.perception.conv", (unit,)))
    return entries


def nested(ours: str, released: str, entries: list[Entry]) -> list[Entry]:
    """`entries` under the prefixes `ours` and `released`."""
    return [
        Entry(f"{ours}.{e.ours}", tuple(f"{released}.{name}" for name in e.released), e.pointwise)
        for e in entries
    ]


def from_released(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
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


def to_released(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Our names to the released ones, the exact inverse of `from_released`; names without counterpart are kept."""
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


def unwrap(file: dict) -> dict[str, Tensor]:
    """The state dict inside a checkpoint as DAT, Swin, timm or a detector wrote it, without wrappers' prefixes."""
    for key in ("model", "state_dict"):
        if isinstance(file.get(key), dict):
            file = file[key]
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in file.items()}
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.")
    }
    return backbone or state


def checkpoint_filter_fn(file: dict, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's content, ours or released, as state dict for `model` (timm calls it for pretrained files)."""
    state = unwrap(file)
    return from_released(state, model) if "patch_proj.0.weight" in state else state
