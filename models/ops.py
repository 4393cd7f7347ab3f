"""How is a map read between its cells? Bilinear readings at any positions, and the constants that they need.

Shapes in this file:

    B batch   H, W map   C channels   M heads   G groups, each of which reads its own channels or heads
    N queries   Hk, Wk grid of positions   S = Hk · Wk keys

Coordinates are (y, x), normalised so that -1 and 1 are the centres of the border cells.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------- constants


def is_tracing() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace follow what is computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def constant(function: Callable) -> Callable:
    """Remember the tensors that `function` makes of sizes and a device: every forward pass needs the same few.

    They are shared: nobody may change them in place.
    """
    remembered = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def wrapped(*args):
        if is_tracing():  # as operations on sizes, of which some may change
            return function(*args)
        # For training too, where they may be kept for the backward pass.
        with torch.inference_mode(False):
            return remembered(*args)

    return wrapped


@constant
def grid(
    axis: Callable[[Tensor, int], Tensor], size: tuple[int, int], device: torch.device
) -> Tensor:
    """The points (H, W, 2) of `size` = (H, W), float32, where `axis(index, length)` places those of one axis."""
    y, x = (axis(torch.arange(n, device=device, dtype=torch.float32), n) for n in size)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


@constant
def map_extent(height: int, width: int, device: torch.device) -> Tensor:
    """(height, width), float32."""
    return torch.tensor((height, width), device=device, dtype=torch.float32)


# ----------------------------------------------------------------------------------------- readings


def sample(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, H, W, C) read at positions (B, G, Hk, Wk, 2), each group its own C / G channels, to (B, S, C).

    Bilinear, zeros outside. Values take the precision of the coordinates, never the reverse.
    """
    read = sample_by_grid if allow_atomic_add(x.device) else sample_by_rows
    return read(x.to(positions.dtype), positions)


def allow_atomic_add(device: torch.device) -> bool:
    """Whether to use kernels whose gradient is summed in no fixed order: on a GPU that need not repeat its bits."""
    return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


def sample_by_grid(x: Tensor, positions: Tensor) -> Tensor:
    """`sample` in few kernels."""
    batch, groups = positions.shape[:2]
    image = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2)  # (B, G, C/G, H, W)
    points = positions.flatten(0, 1).flip(-1)  # (x, y)
    read = F.grid_sample(image.flatten(0, 1), points, align_corners=True)  # (B·G, C/G, Hk, Wk)
    return read.flatten(2).unflatten(0, (batch, groups)).flatten(1, 2).transpose(1, 2).contiguous()


def sample_by_rows(x: Tensor, positions: Tensor) -> Tensor:
    """`sample` without rearranging anything."""
    half = (map_extent(*x.shape[1:3], x.device) - 1) / 2
    return bilinear_gather(x, (positions.flatten(2, 3).transpose(1, 2) + 1) * half)


def bilinear_gather(x: Tensor, points: Tensor, weights: Tensor | None = None) -> Tensor:
    """x (B, H, W, C) read at `points` (B, S, G, 2), counted in cells, times `weights` (B, S, G, 1), to (B, S, C).

    A bilinear reading is the weighted sum of four rows of x.
    """
    batch, height, width, channels = x.shape
    readings, groups = points.shape[1:3]
    rows = row_numbers(batch, height, width, groups, readings, x.device)
    points = points.clamp(rows.before, rows.after)  # a border of zeros lies around the map
    # Of the four cells around a point, the first.
    corner = points.detach().floor().minimum(rows.last)
    beyond = (points - corner).unsqueeze(-1)  # (B, S, G, 2, 1)
    along_y, along_x = torch.addcmul(rows.first, beyond, rows.sign).unbind(-2)  # (B, S, G, 4)
    share = along_y * along_x
    if weights is not None:
        share = share * weights
    # NaN has no cell: it passes on in the shares.
    taps = (corner.nan_to_num().long() * rows.steps).sum(-1, keepdim=True) + rows.taps
    table = F.pad(x, (0, 0, 1, 1, 1, 1)).view(-1, channels // groups)
    read = F.embedding_bag(
        taps.flatten(), table, rows.offsets, per_sample_weights=share.flatten(), mode="sum"
    )
    return read.view(batch, -1, channels)


class RowNumbers(NamedTuple):
    """What `bilinear_gather` needs to know of maps (B, H, W, G · c) with a border of one cell, as rows of c values."""

    before: Tensor  # (2) the border
    last: Tensor
    after: Tensor
    first: Tensor  # (2, 4) a tap's share along y and x: this
    sign: Tensor  # and this times the way beyond the first cell
    steps: Tensor  # (2) rows from a cell to the next along y and x
    taps: Tensor  # (B, 1, G, 4) rows of the four cells that begin with cell (0, 0)
    offsets: Tensor  # (B · S · G) where the four taps of a reading begin


@constant
def row_numbers(
    batch: int, height: int, width: int, groups: int, readings: int, device: torch.device
) -> RowNumbers:
    """For S = `readings` of each group."""
    last = map_extent(height, width, device) - 1
    along_y = (width + 2) * groups
    images = torch.arange(batch, device=device) * ((height + 2) * along_y) + along_y + groups
    cells = torch.tensor((0, groups, along_y, along_y + groups), device=device)
    taps = images[:, None, None] + torch.arange(groups, device=device)[:, None] + cells
    return RowNumbers(
        before=torch.full_like(last, -1),
        last=last,
        after=last + 1,
        first=torch.tensor(((1.0, 1, 0, 0), (1, 0, 1, 0)), device=device),
        sign=torch.tensor(((-1.0, -1, 1, 1), (-1, 1, -1, 1)), device=device),
        steps=torch.tensor((along_y, groups), device=device),
        taps=taps[:, None],
        offsets=torch.arange(0, 4 * batch * readings * groups, 4, device=device),
    )


# -------------------------------------------------------------------------------------------- biases


def rpe_bias(tables: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
    """The heads' tables (M, …) read at half the displacement from every query to every key, (B · M, N, S), float32.

    Queries stand at (H, W, 2), keys at (B, G, Hk, Wk, 2).
    """
    batch, groups = positions.shape[:2]
    keys = positions.reshape(batch * groups, 1, -1, 2)
    displacement = torch.sub(queries.view(-1, 1, 2) / 2, keys, alpha=0.5)  # (B·G, N, S, 2)
    tables = tables.to(keys.dtype)
    if displacement.is_cuda and not allow_atomic_add(displacement.device):
        return bias_by_rows(tables, displacement.unflatten(0, (batch, groups)))
    # grid_sample wants (x, y): (y, x) is that of the transposed table.
    tables = tables.mT.unflatten(0, (groups, -1)).repeat(batch, 1, 1, 1)
    bias = F.grid_sample(tables, displacement, align_corners=True)  # (B·G, M/G, N, S)
    return bias.flatten(0, 1)


def bias_by_rows(tables: Tensor, displacement: Tensor) -> Tensor:
    """The tables (M, …) read at (B, G, N, S, 2), to (B · M, N, S), with a gradient that is summed in a fixed order."""
    batch, _, queries, keys, _ = displacement.shape
    maps = tables.permute(1, 2, 0).expand(batch, -1, -1, -1)
    bias = sample_by_rows(maps, displacement)  # (B, N · S, M)
    return bias.transpose(1, 2).reshape(-1, queries, keys)
