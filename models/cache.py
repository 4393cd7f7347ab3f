"""Cached tensors: grids, masks and index tables that depend on sizes alone, made once per size and device.

Their precision is written out: torch's default may be another one at the next call.

Coordinates are (y, x), normalised so that -1 and 1 are the centres of the border cells.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from models.tracing import fake_mode, is_tracing


def cached_tensor(function: Callable) -> Callable:
    """Decorator: keep the tensors that `function` makes of sizes and a device, as every forward pass needs the same.

    The tensors are shared: nobody may change them in place. Batch sizes do not belong among the arguments, because
    stochastic depth makes a new one in every block.
    """

    @functools.lru_cache(maxsize=256)
    def remembered(mode: object, *args):  # fake tensors are for their mode alone
        return function(*args)

    @functools.wraps(function)
    def wrapped(*args):
        if is_tracing():  # record the operations: some sizes may be symbols
            return function(*args)
        # A tensor made in inference mode could not be kept for a later backward pass.
        with torch.inference_mode(False):
            return remembered(fake_mode(), *args)

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


@cached_tensor
def window_mask(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """What is added to the scores of padded and shifted windows, (K, n, n), float32.

    −100 between regions that only the cyclic shift made neighbours (as released); −∞ from real
    queries to padded keys, so that padding never changes a real output, however large its scores.
    """
    region, real = [], []
    for length, extent, offset in zip(size, window, shift, strict=True):
        padded = length + -length % extent
        index = torch.arange(padded, device=device)
        # Along one axis after the shift: 0 up to the last window, which holds 1 and, rolled in from the other end, 2.
        region.append((index >= padded - extent).long() + (index >= padded - offset).long())
        real.append(((index + offset) % padded) < length)
    regions = to_windows(3 * region[0][:, None] + region[1], window)  # (K, n)
    reals = to_windows(real[0][:, None] & real[1], window)
    mask = -100.0 * (regions[:, :, None] != regions[:, None, :]).float()
    return mask.masked_fill(reals[:, :, None] & ~reals[:, None, :], -torch.inf)


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(H, W) to (K, n), windows in reading order."""
    rows, columns = (x.shape[i] // window[i] for i in range(2))
    return x.view(rows, window[0], columns, window[1]).transpose(1, 2).reshape(rows * columns, -1)
