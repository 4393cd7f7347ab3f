"""Kernels in plain PyTorch: faster, smaller or deterministic ways to compute what models/ops.py defines.

Nothing here is called by a model: models/ops.py picks, and holds the plain reference of each. Shapes:

    B batch   H, W map   C channels   M heads   G groups, each of which reads its own channels or heads
    N queries   Hk, Wk grid of positions   S = Hk · Wk keys
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import DeformConv2d

from models.cache import cached_tensor, is_tracing, map_extent

# --- Bilinear reads -------------------------------------------------------------------------------
# A bilinear read is the weighted sum of four rows of the map, each row the channels of one cell. Nothing is rearranged,
# and the gradient is summed in a fixed order.


class RowTable(NamedTuple):
    """A map (H, W, G · c) inside a border of one cell of zeros, as rows of c values: G for every cell."""

    before: Tensor  # (2) the border: coordinates of its first cell,
    last: Tensor  # of the last cell that a read can begin with,
    after: Tensor  # and of its last cell
    # Of the four cells around a point, a share along y and x is `first` + `sign` · distance from the first cell.
    first: Tensor  # (2, 4)
    sign: Tensor  # (2, 4)
    steps: Tensor  # (2) rows from a cell to the next along y and x
    neighbours: Tensor  # (G, 4) rows of the four cells that begin with cell (0, 0)
    rows: int  # of one image


@cached_tensor
def row_table(height: int, width: int, groups: int, device: torch.device) -> RowTable:
    """The rows of a map of this size."""
    last = map_extent(height, width, device) - 1
    along_y = (width + 2) * groups
    cells = torch.tensor((0, groups, along_y, along_y + groups), device=device)
    return RowTable(
        before=torch.full_like(last, -1),
        last=last,
        after=last + 1,
        first=torch.tensor(((1, 1, 0, 0), (1, 0, 1, 0)), device=device, dtype=torch.float32),
        sign=torch.tensor(((-1, -1, 1, 1), (-1, 1, -1, 1)), device=device, dtype=torch.float32),
        steps=torch.tensor((along_y, groups), device=device),
        neighbours=along_y + groups + torch.arange(groups, device=device)[:, None] + cells,
        rows=(height + 2) * along_y,
    )


def sum_rows(values: Tensor, rows: Tensor, share: Tensor) -> Tensor:
    """The sums Σⱼ share[p, j] · values[rows[p, j]]: values (R, c), rows and share (P, 4), to (P, c)."""
    return F.embedding_bag(rows, values, per_sample_weights=share, mode="sum")


def sum_rows_plainly(values: Tensor, rows: Tensor, share: Tensor) -> Tensor:
    """`sum_rows` of operations that can be derived twice, transformed by torch.func and exported to ONNX."""
    return (values[rows] * share.unsqueeze(-1)).sum(-2)


class SumRows(torch.autograd.Function):
    """`sum_rows` on a CPU, with the same first derivatives, which can be derived again."""

    @staticmethod
    def forward(values: Tensor, rows: Tensor, share: Tensor) -> tuple[Tensor, ...]:
        """The sums, and what embedding_bag keeps for its derivatives."""
        bags = torch.arange(0, rows.numel(), rows.shape[1], device=rows.device)
        indices, share = rows.reshape(-1), share.reshape(-1)
        kept = torch.ops.aten._embedding_bag(values, indices, bags, False, 0, False, share)
        return *kept, bags

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: tuple) -> None:
        """Keep all of it."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, None, Tensor | None]:
        """The gradients of values and share from that of the sums."""
        values, rows, share, bag_of, sizes, largest, bags = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            inputs = values, rows, share
            found = derive(sum_rows_plainly, inputs, grad, ctx.needs_input_grad)
            return found[0], None, found[2]
        indices, grad_values, grad_share = rows.reshape(-1), None, None
        if ctx.needs_input_grad[0]:
            grad_values = torch.ops.aten._embedding_bag_backward(
                *(grad, indices, bags, bag_of, sizes, largest, len(values)),
                *(False, 0, False, share.reshape(-1)),
            )
        if ctx.needs_input_grad[2]:
            grad_share = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad, values, indices, bags, bag_of, 0
            ).view(share.shape)
        return grad_values, None, grad_share


def derive(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor, wanted: tuple
) -> list[Tensor | None]:
    """The gradients of the `wanted` of `inputs` from `grad`, that of function(*inputs), which can be derived again."""
    chosen = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(function(*inputs), chosen, grad, create_graph=True))
    return [next(found) if want else None for want in wanted]


class GridSample(torch.autograd.Function):
    """grid_sample with align_corners on a CPU, with the same first derivatives, which can be derived again."""

    @staticmethod
    def forward(image: Tensor, points: Tensor) -> Tensor:
        """image (b, c, H, W) read at points (b, N, S, 2), (x, y), to (b, c, N, S)."""
        return F.grid_sample(image, points, align_corners=True)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the inputs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of image and points from that of the reading."""
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative is wanted
            return tuple(derive(grid_sample_plainly, inputs, grad, wanted))
        return torch.ops.aten.grid_sampler_2d_backward(grad, *inputs, 0, 0, True, list(wanted))


def grid_sample_plainly(image: Tensor, points: Tensor) -> Tensor:
    """`GridSample` of operations that can be derived twice and transformed by torch.func."""
    maps, positions = image.permute(0, 2, 3, 1), points.flip(-1).unsqueeze(1)
    read = sample_by_rows(maps, positions, sum_rows_plainly)  # (b, N · S, c)
    return read.transpose(1, 2).unflatten(-1, points.shape[1:3])


def bilinear_gather(
    x: Tensor, points: Tensor, weights: Tensor | None, sum_rows: Callable[..., Tensor]
) -> Tensor:
    """x (B, H, W, C) read at `points` (B, S, G, 2), counted in cells, times `weights` (B, S, G, 1), to (B, S, C).

    `sum_rows` is one of the three above.
    """
    batch, height, width, channels = x.shape
    groups = points.shape[2]
    table = row_table(height, width, groups, x.device)

    # Points outside read zeros, as do those on the border.
    points = points.clamp(table.before, table.after)
    corner = points.detach().floor().minimum(table.last)  # the first of the four cells
    distance = (points - corner).unsqueeze(-1)  # (B, S, G, 2, 1)
    along_y, along_x = torch.addcmul(table.first, distance, table.sign).unbind(-2)  # (B, S, G, 4)
    share = along_y * along_x
    if weights is not None:
        share = share * weights

    # NaN has no cell: it passes on in the shares.
    first_row = (corner.nan_to_num().long() * table.steps).sum(-1, keepdim=True)  # (B, S, G, 1)
    image = torch.arange(0, batch * table.rows, table.rows, device=x.device).view(-1, 1, 1, 1)
    rows = first_row + (image + table.neighbours)  # (B, S, G, 4)
    values = F.pad(x, (0, 0, 1, 1, 1, 1)).view(-1, channels // groups)
    return sum_rows(values, rows.flatten(0, 2), share.flatten(0, 2)).view(batch, -1, channels)


def sample_by_rows(
    x: Tensor, positions: Tensor, sum_rows: Callable[..., Tensor] = sum_rows
) -> Tensor:
    """`ops.sample`."""
    half = (map_extent(*x.shape[1:3], x.device) - 1) / 2
    points = (positions.flatten(2, 3).transpose(1, 2) + 1) * half
    return bilinear_gather(x, points, None, sum_rows)


def bias_by_rows(tables: Tensor, displacement: Tensor) -> Tensor:
    """`ops.rpe_bias`: the tables (M, …) read at (B, G, N, S, 2), to (B · M, N, S)."""
    batch, _, queries, keys, _ = displacement.shape
    maps = tables.permute(1, 2, 0).expand(batch, -1, -1, -1)
    bias = sample_by_rows(maps, displacement)  # (B, N · S, M)
    return bias.transpose(1, 2).reshape(-1, queries, keys)


# --- Deformable convolution -----------------------------------------------------------------------


def deform_conv_by_rows(
    conv: DeformConv2d,
    x: Tensor,
    offsets: Tensor,
    weights: Tensor,
    sum_rows: Callable[..., Tensor] = sum_rows,
) -> Tensor:
    """`ops.deform_conv`; on a CPU a tenth of torchvision's time."""
    heads, (batch, height, width, channels) = conv.groups, x.shape
    groups = weights.shape[-1] // 9
    points = nine_cells(height, width, x.device) + offsets.unflatten(-1, (groups, 9, 2))
    points = points.transpose(3, 4).reshape(batch, -1, groups, 2)  # (B, H · W · 9, G, 2)
    weights = weights.unflatten(-1, (groups, 9)).transpose(3, 4).reshape(batch, -1, groups, 1)
    read = bilinear_gather(x, points, weights, sum_rows).to(conv.weight.dtype)
    read = read.view(-1, 9, heads, channels // heads).transpose(1, 2)  # (B · H · W, M, 9, D)
    read = read.flatten(2).transpose(0, 1)  # (M, B · H · W, 9 D)
    kernel = conv.weight.unflatten(0, (heads, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)
    z = torch.bmm(read, kernel).transpose(0, 1)  # (B · H · W, M, D)
    return z.reshape(x.shape) + conv.bias


@cached_tensor
def nine_cells(height: int, width: int, device: torch.device) -> Tensor:
    """The 3 × 3 cells around every cell, (H, W, 1, 9, 2)."""
    around = torch.arange(-1, 2, device=device, dtype=torch.float32)
    y, x = (torch.arange(length, device=device)[:, None] + around for length in (height, width))
    cells = torch.broadcast_tensors(y[:, None, :, None], x[None, :, None, :])  # (H, W, 3, 3) each
    return torch.stack(cells, dim=-1).flatten(2, 3)[:, :, None]


# --- Neighbourhoods -------------------------------------------------------------------------------
# The map is cut into w × w tiles of queries. The windows of a tile's queries lie within 2w − 1 rows and columns, its
# region, which is read once and masked per query, so that dense matrix products do the work. An axis of up to 2w
# positions is not cut: reading all of it costs less than gathering parts of it.


class Tiles(NamedTuple):
    """A map cut into K tiles of n queries: which keys a tile reads, and which of them each of its queries."""

    tile: tuple[int, int]
    region: tuple[int, int]  # keys that a tile reads
    rows: Tensor  # of the regions, one after the other
    columns: Tensor
    relative: Tensor  # (K, n, keys of a region) entry of the bias table, which has a border of −∞


@cached_tensor
def neighborhood_tiles(height: int, width: int, window: int, device: torch.device) -> Tiles:
    """The tiles of a map (H, W) for `window` w."""
    rows, columns = (axis_tiles(length, window, device) for length in (height, width))
    index = rows.relative[:, None, :, None, :, None] * (2 * window)
    index = index + columns.relative[None, :, None, :, None, :]
    return Tiles(
        tile=(rows.relative.shape[1], columns.relative.shape[1]),
        region=(rows.keys.shape[1], columns.keys.shape[1]),
        rows=rows.keys.flatten(),
        columns=columns.keys.flatten(),
        relative=index.flatten(4, 5).flatten(2, 3).flatten(0, 1),
    )


class AxisTiles(NamedTuple):
    """One axis cut into T tiles of t queries, each of which reads a region of R keys."""

    keys: Tensor  # (T, R) positions
    relative: Tensor  # (T, t, R) key − query + w − 1, or 2w − 1 where the key is outside the query's window


def axis_tiles(length: int, window: int, device: torch.device) -> AxisTiles:
    """The tiles of an axis of `length` positions."""
    tile = length if length <= 2 * window else window  # queries of a tile
    reach = min(window, length)  # keys of a query
    region = min(tile + reach - 1, length)
    first = torch.arange(0, length, tile, device=device)[:, None]
    keys = (first - window // 2).clamp(0, length - region) + torch.arange(region, device=device)
    queries = (first + torch.arange(tile, device=device)).clamp(max=length - 1)
    start = (queries - window // 2).clamp(0, length - reach)[:, :, None]
    inside = (keys[:, None] >= start) & (keys[:, None] < start + reach)
    relative = torch.where(inside, keys[:, None] - queries[:, :, None] + window - 1, 2 * window - 1)
    return AxisTiles(keys, relative)


def read_table(table: Tensor, index: Tensor) -> Tensor:
    """The entries `index` (K, n, keys) of every head's table (M, entries), to (M, K, n, keys)."""
    if (
        table.is_cuda
    ):  # the gradient of F.embedding is summed in a fixed order, without atomic additions
        return F.embedding(index, table.t()).permute(3, 0, 1, 2)
    return table.index_select(1, index.flatten()).unflatten(1, index.shape)


# --- Fused attention of PyTorch -------------------------------------------------------------------


class AlignedRows(torch.autograd.Function):
    """A copy in another precision whose rows begin at multiples of 8 elements, as fused attention wants a bias."""

    @staticmethod
    def forward(bias: Tensor, dtype: torch.dtype) -> Tensor:
        """bias (b, N, S) to the same shape."""
        keys = bias.shape[-1]
        rows = bias.new_empty((*bias.shape[:-1], -(-keys // 8) * 8), dtype=dtype)
        return rows[..., :keys].copy_(bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        """Keep the precision."""
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of the bias from that of the copy."""
        return grad.to(ctx.dtype), None


# Heads of the fused kernel are an axis of its grid, which on CUDA has at most 65,535 entries.
MAX_HEADS = 65_535


def attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`ops.attend` by PyTorch's fused kernel, which repeats the bias as it reads and never writes the scores."""
    bias = align_rows(bias, q.dtype)
    q, k, v = (part.unflatten(0, (-1, len(bias))) for part in (q, k, v))
    if len(bias) <= MAX_HEADS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).flatten(0, 1)
    parts = zip(*(x.split(MAX_HEADS, dim=-3) for x in (q, k, v, bias)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*x) for x in parts], dim=1).flatten(0, 1)


def align_rows(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias (b, N, S) in `dtype`, its rows S rounded up to 8 apart in memory: the fused kernel would copy others."""
    if is_tracing():  # a compiler lays out its tensors itself
        return bias.to(dtype)
    return AlignedRows.apply(bias, dtype)


# --- Less memory for the backward pass ------------------------------------------------------------


class GELULinear(torch.autograd.Function):
    """linear(GELU(x)) that keeps x alone and computes the GELU again, where autograd would keep both."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (…, in), weight (out, in), bias (out) to (…, out)."""
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep x and weight."""
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, weight and bias from that of the output."""
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        # Under autocast the gradient may be of another precision than x.
        grad_weight = rows.t() @ F.gelu(x).flatten(0, -2).to(grad.dtype)
        grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        return grad_x, grad_weight, rows.sum(0)


class IndexAddScaled(torch.autograd.Function):
    """x with scale · added at the images `chosen`. Unlike index_add it does not keep `added` for the backward pass."""

    @staticmethod
    def forward(x: Tensor, chosen: Tensor, added: Tensor, scale: float) -> Tensor:
        """x (B, …), chosen (b), added (b, …) to (B, …)."""
        return x.index_add(0, chosen, added.to(x.dtype), alpha=scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        """Keep the indices."""
        _, chosen, added, scale = inputs
        ctx.save_for_backward(chosen)
        ctx.scale, ctx.dtype = scale, added.dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        """The gradients of x and added from that of the output."""
        (chosen,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, chosen).mul_(ctx.scale).to(ctx.dtype), None
