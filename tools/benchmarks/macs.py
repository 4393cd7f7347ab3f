"""Multiply-adds (MACs) of a model's forward pass, counted without computing anything."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from models.attention import NeighborhoodAttention
from models.kernels import neighborhood_tiles


def count_macs(model: nn.Module, height: int, width: int, *, in_chans: int = 3) -> int:
    """Multiply-adds of one image's forward pass: convolutions and matrix products, no bilinear reads.

    Neighbourhood attention counts as its definition says, w² keys per query, not as it is computed.
    """
    masked = 0

    def collect(module: NeighborhoodAttention, inputs: tuple, output: torch.Tensor):
        nonlocal masked
        masked += masked_macs(module.window_size, *output.shape[1:])

    model = copy.deepcopy(model).to("meta").eval()
    for module in model.modules():
        if isinstance(module, NeighborhoodAttention):
            module.register_forward_hook(collect)
    counter = FlopCounterMode(display=False)
    # PyTorch's counter knows this product, but not in place.
    counter.flop_registry[torch.ops.aten.baddbmm_] = flop_registry[torch.ops.aten.baddbmm]
    with torch.no_grad(), counter:
        model(torch.empty(1, in_chans, height, width, device="meta"))
    return counter.get_total_flops() // 2 - masked


def masked_macs(window: int, height: int, width: int, channels: int) -> int:
    """Multiply-adds per image that neighbourhood attention spends on keys outside of the queries' windows."""
    tiles = neighborhood_tiles(height, width, window, torch.device("meta"))
    computed = tiles.relative.numel()  # pairs of query and key
    defined = height * width * min(window, height) * min(window, width)
    return 2 * channels * (computed - defined)
