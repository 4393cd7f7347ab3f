"""Attention of one query from gradients, which the recording of analysis/recording.py is compared with.

It reads the output alone, by the gradient with respect to the values; the recording reads what goes through a softmax.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.attention import DeformableAttention, DeformableConvolution, GlobalAttention
from models.dat import DAT
from models.ops import convolve


class QueryAttention(NamedTuple):
    """What one query attends to: all cells of a map, or points (y, x) in cells from the map's upper left corner."""

    weights: Tensor  # (M, Hk, Wk), of every head, summing to 1
    points: Tensor | None = None  # (G, Hk, Wk, 2), of every offset group
    reference: Tensor | None = None  # (Hk, Wk, 2), the points without their offsets


class BlockAttention(NamedTuple):
    """The attention of a block's query, with its place in the model and in the image."""

    stage: int  # from 0, as is block
    block: int
    letter: str  # of the mixer, see models/attention.py
    query: tuple[int, int]  # cell (y, x) of the map
    map_size: tuple[int, int]  # (H, W)
    cell: int  # pixels of the image along the side of a cell
    key_cell: int  # the same for the cells of `attention.weights`
    attention: QueryAttention


@torch.no_grad()
def record_attention(
    model: DAT, images: Tensor, point: tuple[float, float], blocks: list[tuple[int, int]]
) -> list[BlockAttention]:
    """The attention of the query at `point` in each of `blocks`, in the order of the model.

    Args:
        model: in evaluation mode.
        images: (1, in_chans, H, W), normalised.
        point: (y, x) as shares of the image's height and width.
        blocks: (stage, block), both from 0.
    """
    records = []
    x = model.stem(images.permute(0, 2, 3, 1))
    for i, stage in enumerate(model.stages):
        x = stage.downsample(x)
        cell, map_size = model.feature_info[i]["reduction"], tuple(x.shape[1:3])
        query = tuple(
            min(int(share * pixels) // cell, cells - 1)
            for share, pixels, cells in zip(point, images.shape[2:], map_size, strict=True)
        )
        for j, (block, letter) in enumerate(zip(stage.blocks, model.config.stages[i], strict=True)):
            if (i, j) in blocks:
                attention = query_attention(block.attn, block.norm1(block.lpu(x)), query)
                key_cell = cell * model.config.sr_ratios[i] if letter == "P" else cell
                records.append(
                    BlockAttention(i, j, letter, query, map_size, cell, key_cell, attention)
                )
            x = block(x)
    return records


@torch.no_grad()
def query_attention(mixer: nn.Module, x: Tensor, query: tuple[int, int]) -> QueryAttention:
    """The attention of the query at cell (y, x) of the map `x` (1, H, W, C) in any mixer of models/attention.py."""
    if isinstance(mixer, DeformableConvolution):
        return convolution_attention(mixer, x, query)
    weights = attention_weights(mixer, x, query)
    if isinstance(mixer, GlobalAttention):
        return QueryAttention(weights.unflatten(1, mixer.reduce(x).shape[1:3]))
    if isinstance(mixer, DeformableAttention):
        points = mixer.positions(mixer.q(x))[0]
        reference = mixer.positions.reference(points.shape[1:3])
        reference = mixer.geometry.place(reference, torch.zeros_like(reference))
        to_cells = (torch.tensor(x.shape[1:3]) - 1) / 2  # ±1 are the centres of the border cells
        points, reference = ((p + 1) * to_cells + 0.5 for p in (points, reference))
        return QueryAttention(weights.unflatten(1, reference.shape[:2]), points, reference)
    return QueryAttention(weights)


@torch.enable_grad()
def attention_weights(mixer: nn.Module, x: Tensor, query: tuple[int, int]) -> Tensor:
    """The weights (M, …) that the query at cell (y, x) of the map `x` (1, H, W, C) gives to its keys.

    Attention is z = A(x) · v. If v is replaced by the input of its projection, and z is not projected, then the
    gradient of z is A. The mixer's own windows, shifts and padding bring the weights to their cells. The keys are the
    cells of the map where one layer projects q, k and v, else the input of `kv`.
    """
    source = None

    def pass_source(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        nonlocal source
        source = inputs[0]
        return torch.cat([output[..., : -source.shape[-1]].detach(), source], dim=-1)

    x = x.detach().requires_grad_()
    fused = hasattr(mixer, "qkv")
    hooks = [
        (mixer.qkv if fused else mixer.kv).register_forward_hook(pass_source),
        mixer.proj.register_forward_hook(lambda module, inputs, output: inputs[0]),
    ]
    try:
        z = mixer(x)[0, *query]  # (C)
    finally:
        for hook in hooks:
            hook.remove()
    one_of_each_head = z.unflatten(0, (mixer.num_heads, -1))[:, 0].sum()
    gradient = torch.autograd.grad(one_of_each_head, x if fused else source)[0][0]  # (…, C)
    return gradient.unflatten(-1, (mixer.num_heads, -1))[..., 0].movedim(-1, 0)


def convolution_attention(
    mixer: DeformableConvolution, x: Tensor, query: tuple[int, int]
) -> QueryAttention:
    """The points of a deformable convolution, whose weights ∝ modulation · norm of the kernel's slice."""
    theta = convolve(mixer.positions, x)[0, *query].unflatten(0, (-1, 3, 3))  # (27 G / 9, 3, 3)
    groups = len(theta) // 3
    offsets = theta[: 2 * groups].flatten().view(groups, 3, 3, 2)
    heads = mixer.conv.groups
    norms = mixer.conv.weight.unflatten(0, (heads, -1)).norm(dim=(1, 2))  # (M, 3, 3)
    weights = norms * theta[2 * groups :].sigmoid().repeat_interleave(heads // groups, dim=0)
    window = torch.stack(torch.meshgrid(*2 * [torch.arange(-1.0, 2)], indexing="ij"), dim=-1)
    reference = torch.tensor(query) + 0.5 + window
    return QueryAttention(
        weights / weights.sum((1, 2), keepdim=True), reference + offsets, reference
    )
