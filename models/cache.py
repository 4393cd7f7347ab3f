"""Cached tensors: grids, masks and index tables that depend on sizes alone, made once per size and device.

Coordinates are (y, x), normalised so that -1 and 1 are the centres of the border cells.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from models.tracing import is_tracing


def cached_tensor(function: Callable) -> Callable:
    """Decorator: keep the tensors that `function` makes of sizes and a device, as every forward pass needs the same.

    The tensors are shared: nobody may change them in place. Batch sizes do not belong among the arguments, because
    stochastic depth makes a new one in every block.
    """
    remembered = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def wrapped(*args):
        if is_tracing():  # record the operations: some sizes may be symbols
            return function(*args)
        # A tensor made in inference mode could not be kept for a later backward pass.
        with torch.inference_mode(False):
            return remembered(*args)

    return wrapped


@cached_tensor
def grid(
    axis: Callable[[Tensor, int], Tensor], size: tuple[int, int], device: torch.device
) -> Tensor:
    """The points (H, W, 2) of a map of `size` (H, W), float32; `axis(index, length)` gives one axis's coordinates."""
    y, x = (axis(torch.arange(n, device=device, dtype=torch.float32), n) for n in size)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


@cached_tensor
def map_extent(height: int, width: int, device: torch.device) -> Tensor:
    """(height, width), float32."""
    return torch.tensor((height, width), device=device, dtype=torch.float32)
