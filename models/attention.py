"""How does one position read the others? The spatial mixers, one class per letter.

    L  windows                 Swin, arXiv 2103.14030
    S  shifted windows         the same
    N  neighbourhoods          NAT, arXiv 2204.07143
    D  deformable attention    DAT, arXiv 2201.00520; DAT++, arXiv 2309.01430
    G  the whole map           ViT, arXiv 2010.11929
    P  the map, reduced        PVT, arXiv 2102.12122
    C  deformable convolution  DCNv2, arXiv 1811.11168

Every mixer maps (B, H, W, C) to (B, H, W, C) for any H and W. Shapes in this file:

    B batch   H, W map   C channels   M heads   D = C / M channels of a head
    n window height · width           K number of windows
    G offset groups   Hk, Wk grid of keys   N = H · W queries   S = Hk · Wk keys

Coordinates are (y, x), normalised so that -1 and 1 are the centres of the border cells.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from models.ops import (
    allow_atomic_add,
    bilinear_gather,
    constant,
    grid,
    is_tracing,
    map_extent,
    rpe_bias,
    sample,
)

CPU_BYTES = 20 * 2**20

Forward = Callable[[nn.Module, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q · kᵀ / √D + bias) · v with q (b, N, D), k and v (b, S, D), to (b, N, D); b = batch · windows · heads.

    bias is (b', N, S): b' divides b, and the bias is repeated. It may be overwritten.
    """
    bias = bias.to(q.dtype)
    if q.is_cuda:  # the kernel repeats the bias as it reads
        q, k, v = (part.unflatten(0, (-1, bias.shape[0])) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).flatten(0, 1)
    # On a CPU a product that is added to the bias is faster than the fused kernel for windows of 49 positions. Scaled
    # after the product, as released: bilinear reads have kinks, so rounding shows in the gradients of offsets.
    if bias.shape[0] != q.shape[0]:
        bias = bias.repeat(q.shape[0] // bias.shape[0], 1, 1)
    scores = bias.baddbmm_(q, k.mT, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), v)


def split_heads(
    x: Tensor, size: tuple[int, int], window: tuple[int, int], num_heads: int, parts: int = 1
) -> tuple[Tensor, ...]:
    """B maps of `size` (H, W) with parts · C channels, in any shape, to `parts` times (B · K · M, n, D).

    Windows in reading order, head by head.
    """
    (height, width), (rows, columns) = size, window
    dim = x.shape[-1] // (parts * num_heads)
    x = x.view(-1, height // rows, rows, width // columns, columns, parts, num_heads, dim)
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (parts, B, K's rows and columns, M, n's, D)
    return x.reshape(parts, -1, rows * columns, dim).unbind(0)


def merge_heads(
    z: Tensor, size: tuple[int, int], window: tuple[int, int], num_heads: int
) -> Tensor:
    """The inverse: (B · K · M, n, D) to the maps' positions one after the other, (B · H · W, C)."""
    (height, width), (rows, columns), dim = size, window, z.shape[-1]
    z = z.view(-1, height // rows, width // columns, num_heads, rows, columns, dim)
    return z.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, num_heads * dim)


def attend_all(q: Tensor, kv: Tensor, num_heads: int, bias: Tensor) -> Tensor:
    """`attend` from every position of q (B, H, W, C) to all of kv (B, S, 2C), to (B · H · W, C)."""
    size, keys = tuple(q.shape[1:3]), (1, kv.shape[1])
    (q,) = split_heads(q, size, size, num_heads)
    k, v = split_heads(kv, keys, keys, num_heads, parts=2)
    return merge_heads(attend(q, k, v, bias), size, size, num_heads)


def in_parts(forward: Forward) -> Forward:
    """On a CPU, call `forward` with so many images at a time that its largest tensor has at most CPU_BYTES.

    Larger ones leave the caches, and the allocator gives them back to the system after each use: page faults then cost
    more than arithmetic. Modules with hooks inside see whole batches.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, x: Tensor) -> Tensor:
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.children())
        if x.device.type != "cpu" or hooked or is_tracing():
            return forward(self, x)
        parts = -(-self.largest(x) // CPU_BYTES)
        if parts <= 1:
            return forward(self, x)
        return torch.cat([forward(self, part) for part in x.chunk(parts)])

    return wrapped


@register_notrace_module  # its padding depends on the map
class Conv2d(nn.Conv2d):
    """Convolution on (B, H, W, C); the last, partial patch of a patch embedding is filled with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C'); H' = ⌈H / stride⌉ for patches and for kernels with padding k // 2."""
        x = x.permute(0, 3, 1, 2)  # (B, C, H, W), in memory still channels-last
        if self.padding == (0, 0):
            x = F.pad(x, (0, -x.shape[3] % self.stride[1], 0, -x.shape[2] % self.stride[0]))
        return super().forward(x).permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------ windows


@register_notrace_module
class WindowAttention(nn.Module):
    """Attention inside w × w windows with a learned bias per relative position (L; S when shifted).

    A map smaller than the window is one smaller window. Padded positions are never attended to.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, shifted: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift_size = (window_size + 1) // 2 if shifted else 0
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        table = torch.zeros((2 * window_size - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.01))
        index = relative_position_index(window_size)
        self.register_buffer("relative_position_index", index, persistent=False)

    @in_parts
    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        height, width = x.shape[1:3]
        window = min(self.window_size, height), min(self.window_size, width)
        # A window that covers the map already connects all of it: nothing to shift.
        shift = tuple(
            self.shift_size if size > length else 0
            for size, length in zip((height, width), window, strict=True)
        )
        padding = -height % window[0], -width % window[1]

        bias = self.bias(window)  # (M, n, n)
        if any(shift) or any(padding):
            mask = window_mask((height, width), window, shift, x.device)
            bias = (bias + mask[:, None]).flatten(0, 1)  # (K · M, n, n)
        if any(padding):
            x = F.pad(x, (0, 0, 0, padding[1], 0, padding[0]))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        size = tuple(x.shape[1:3])
        q, k, v = split_heads(self.qkv(x.flatten(0, 2)), size, window, self.num_heads, parts=3)
        z = merge_heads(attend(q, k, v, bias), size, window, self.num_heads)
        x = self.proj(z).view(x.shape)
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :height, :width] if any(padding) else x

    def largest(self, x: Tensor) -> int:
        """Bytes of queries, keys and values, or of the scores."""
        return x.nbytes * max(3, self.num_heads * self.window_size**2 // x.shape[-1])

    def bias(self, window: tuple[int, int]) -> Tensor:
        """The bias (M, n, n) of a window no larger than the table's."""
        rows, columns = window
        size = self.window_size
        index = self.relative_position_index
        if window != (size, size):
            index = index.view(size, size, size, size)[:rows, :columns, :rows, :columns]
            index = index.reshape(rows * columns, rows * columns)
        return F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)


def relative_position_index(size: int) -> Tensor:
    """Row of the bias table for every (query, key) of a window, (size², size²): Δy · (2 · size − 1) + Δx from 0."""
    axis = torch.arange(size)
    delta = axis[:, None] - axis + size - 1  # (query, key) of one axis
    index = delta[:, None, :, None] * (2 * size - 1) + delta[None, :, None, :]
    return index.reshape(size * size, size * size)


@constant
def window_mask(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """What is added to the scores of padded and shifted windows, (K, n, n).

    −100 between regions that only the cyclic shift made neighbours (as released); −∞ from real
    queries to padded keys, so that padding never changes a real output, however large its scores.
    """
    region, real = [], []
    for length, extent, offset in zip(size, window, shift, strict=True):
        padded = length + -length % extent
        index = torch.arange(padded, device=device)
        region.append((index >= padded - extent).long() + (index >= padded - offset).long())
        real.append(((index + offset) % padded) < length)
    regions = windows(3 * region[0][:, None] + region[1], window)  # (K, n)
    reals = windows(real[0][:, None] & real[1], window)
    mask = -100.0 * (regions[:, :, None] != regions[:, None, :])
    return mask.masked_fill(reals[:, :, None] & ~reals[:, None, :], -torch.inf)


def windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(H, W) to (K, n), windows in reading order."""
    return split_heads(x[..., None], tuple(x.shape), window, num_heads=1)[0].squeeze(-1)


# ---------------------------------------------------------------------------------- neighbourhoods


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Attention of every query to the w × w window centred on it, with a learned bias per relative position (N).

    At a border the window moves inward, so that it always holds w² keys; on a map smaller than w it holds the map. The
    map is cut into w × w tiles of queries; the windows of a tile lie within 2w − 1 rows and columns, which are read
    once and masked per query, so that dense matrix products do the work. An axis of up to 2w positions is not cut:
    reading all of it costs less than gathering parts of it.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        table = torch.zeros(num_heads, 2 * window_size - 1, 2 * window_size - 1)
        self.rpb = nn.Parameter(trunc_normal_(table, std=0.02))

    @in_parts
    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        height, width, channels = x.shape[1:]
        tiles = neighbourhoods(height, width, self.window_size, x.device)
        bias = self.bias(tiles.relative)
        if tiles.region == (height, width):
            q, k, v = split_heads(
                self.qkv(x.flatten(0, 2)), tiles.region, tiles.region, self.num_heads, parts=3
            )
            z = merge_heads(attend(q, k, v, bias), tiles.region, tiles.region, self.num_heads)
            return self.proj(z).view(x.shape)
        q, kv = self.qkv(x).split((channels, 2 * channels), dim=-1)
        q = F.pad(q, (0, 0, 0, -width % tiles.tile[1], 0, -height % tiles.tile[0]))
        padded = tuple(q.shape[1:3])
        (q,) = split_heads(q, padded, tiles.tile, self.num_heads)
        kv = kv.index_select(1, tiles.rows).index_select(2, tiles.columns)
        k, v = split_heads(kv, tuple(kv.shape[1:3]), tiles.region, self.num_heads, parts=2)
        z = merge_heads(attend(q, k, v, bias), padded, tiles.tile, self.num_heads)
        return self.proj(z.view(-1, *padded, channels)[:, :height, :width])

    def largest(self, x: Tensor) -> int:
        """Bytes of the scores, or of the keys and values of all regions."""
        tiles = neighbourhoods(*x.shape[1:3], self.window_size, x.device)
        scores = len(x) * self.num_heads * tiles.relative.numel() * x.element_size()
        repeats = len(tiles.rows) * len(tiles.columns) / (x.shape[1] * x.shape[2])
        return max(scores, int(2 * repeats * x.nbytes))

    def masked_macs(self, height: int, width: int) -> int:
        """Multiply-adds per image that `forward` spends on keys outside the queries' windows."""
        device = self.rpb.device
        computed = neighbourhoods(height, width, self.window_size, device).relative.numel()
        size = min(self.window_size, height) * min(self.window_size, width)
        return 2 * self.proj.in_features * (computed - height * width * size)

    def bias(self, relative: Tensor) -> Tensor:
        """The bias (K · M, n, keys of a region), −∞ outside a query's window."""
        table = F.pad(self.rpb, (0, 1, 0, 1), value=-torch.inf).flatten(1)
        bias = table.index_select(1, relative.flatten()).unflatten(1, relative.shape)
        return bias.transpose(0, 1).flatten(0, 1)


class Neighbourhoods(NamedTuple):
    """A map cut into K tiles of n queries: which keys a tile reads, and what its queries make of them."""

    tile: tuple[int, int]
    region: tuple[int, int]  # keys that a tile reads
    rows: Tensor  # of the regions, one after the other
    columns: Tensor
    relative: Tensor  # (K, n, keys of a region) entry of the bias table, which has a border of −∞


@constant
def neighbourhoods(height: int, width: int, window: int, device: torch.device) -> Neighbourhoods:
    """The tiles of a map."""
    rows, columns = (neighbourhood(length, window, device) for length in (height, width))
    index = rows.relative[:, None, :, None, :, None] * (2 * window)
    index = index + columns.relative[None, :, None, :, None, :]
    return Neighbourhoods(
        tile=(rows.relative.shape[1], columns.relative.shape[1]),
        region=(rows.keys.shape[1], columns.keys.shape[1]),
        rows=rows.keys.flatten(),
        columns=columns.keys.flatten(),
        relative=index.flatten(4, 5).flatten(2, 3).flatten(0, 1),
    )


class Neighbourhood(NamedTuple):
    """Along one axis cut into T tiles of t queries: which keys a tile reads, and what its queries make of them."""

    keys: Tensor  # (T, R) positions
    relative: Tensor  # (T, t, R) key − query + w − 1, or 2w − 1 where the key is outside the query's window


def neighbourhood(length: int, window: int, device: torch.device) -> Neighbourhood:
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
    return Neighbourhood(keys, relative)


# ------------------------------------------------------------------------------- deformable attention


class DATGeometry:
    """Coordinates of DAT (2022): cell centres; offsets within ± range_factor / Hk may leave the map."""

    range_factor = 2

    @staticmethod
    def padding(kernel: int, stride: int) -> int:
        """Padding of the offset convolution."""
        return kernel // 2

    @staticmethod
    def reference(index: Tensor, size: int) -> Tensor:
        """Reference points along one axis of the sampling grid."""
        return (index + 0.5) / size * 2 - 1

    @staticmethod
    def query(index: Tensor, size: int) -> Tensor:
        """Query positions along one axis of the map, as the bias sees them."""
        return (index + 0.5) / size * 2 - 1

    @classmethod
    def place(cls, reference: Tensor, theta: Tensor) -> Tensor:
        """SamplingPoints positions for the reference points (Hk, Wk, 2) and predicted offsets (B, G, Hk, Wk, 2)."""
        cells = map_extent(*reference.shape[:2], theta.device)
        return torch.addcdiv(reference, theta.tanh(), cells, value=cls.range_factor)


class DATPlusPlusGeometry:
    """Coordinates of DAT++ (2023): queries at pixel centres, free offsets, points clamped to the map."""

    @staticmethod
    def padding(kernel: int, stride: int) -> int:
        """Padding of the offset convolution: none where it only cuts the map into patches."""
        return 0 if kernel == stride else kernel // 2

    @staticmethod
    def reference(index: Tensor, size: int) -> Tensor:
        """Reference points along one axis of the sampling grid; the last lies beyond 1, as released."""
        return (index + 0.5) / max(size - 1, 1) * 2 - 1

    @staticmethod
    def query(index: Tensor, size: int) -> Tensor:
        """Query positions along one axis of the map, as the bias sees them."""
        return index / max(size - 1, 1) * 2 - 1

    @staticmethod
    def place(reference: Tensor, theta: Tensor) -> Tensor:
        """SamplingPoints positions for the reference points (Hk, Wk, 2) and predicted offsets (B, G, Hk, Wk, 2)."""
        return (reference + theta).clamp(-1, 1)


Geometry = type[DATGeometry] | type[DATPlusPlusGeometry]


class SamplingPositions(nn.Module):
    """Where each group reads: reference points plus offsets predicted from that group's channels of q."""

    def __init__(self, dim: int, groups: int, kernel: int, stride: int, geometry: Geometry):
        super().__init__()
        channels = dim // groups
        self.groups = groups
        self.geometry = geometry
        self.dwconv = nn.Conv2d(
            channels, channels, kernel, stride, geometry.padding(kernel, stride), groups=channels
        )
        self.norm = nn.LayerNorm(channels)
        self.act = nn.GELU()
        self.proj = nn.Linear(channels, 2, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        """q (B, H, W, C) to positions (B, G, Hk, Wk, 2), float32."""
        with full_precision(q.device):  # coordinates are never computed in half precision
            # All groups share the kernel: repeating it spares rearranging q into groups.
            theta = F.conv2d(
                q.permute(0, 3, 1, 2).to(self.dwconv.weight.dtype),
                self.dwconv.weight.repeat(self.groups, 1, 1, 1),
                self.dwconv.bias.repeat(self.groups),
                self.dwconv.stride,
                self.dwconv.padding,
                groups=q.shape[-1],
            ).permute(0, 2, 3, 1)  # (B, Hk, Wk, C)
            theta = self.proj(self.act(self.norm(theta.unflatten(-1, (self.groups, -1)))))
        theta = theta.permute(0, 3, 1, 2, 4)  # (B, G, Hk, Wk, 2)
        return self.geometry.place(self.reference(theta.shape[2:4]), theta)

    def reference(self, size: tuple[int, int]) -> Tensor:
        """The reference points, (Hk, Wk, 2)."""
        return grid(self.geometry.reference, tuple(size), self.dwconv.weight.device)


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast, on devices that know it (the meta device does not)."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@register_notrace_module
class DeformableAttention(nn.Module):
    """Attention to keys and values read at positions that follow from the queries (D).

    z = softmax(q · k̃ᵀ / √D + bias) · ṽ with k̃ and ṽ projected from x̃, the bilinear reading of x at those positions. The
    bias of query n and key s is the bilinear reading of the head's table at half the distance of their positions,
    so a table made for one map size serves all.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        groups: int,
        kernel: int,
        stride: int,
        table_size: tuple[int, int],
        geometry: Geometry,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.geometry = geometry
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.positions = SamplingPositions(dim, groups, kernel, stride, geometry)
        table = torch.zeros(num_heads, 2 * table_size[0] - 1, 2 * table_size[1] - 1)
        self.rpe_table = nn.Parameter(trunc_normal_(table, std=0.01))

    @in_parts
    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        q = self.q(x)
        positions = self.positions(q)
        queries = grid(self.geometry.query, tuple(x.shape[1:3]), x.device)
        bias = rpe_bias(self.rpe_table, queries, positions)
        z = attend_all(q, self.kv(sample(x, positions)), self.num_heads, bias)
        return self.proj(z).view(x.shape)

    def largest(self, x: Tensor) -> int:
        """Bytes of the bias, which is float32."""
        batch, height, width = x.shape[:3]
        stride = self.positions.dwconv.stride[0]
        return 4 * batch * self.num_heads * (height * width // stride) ** 2


# ------------------------------------------------------------------------------------ the whole map


@register_notrace_module
class GlobalAttention(nn.Module):
    """Attention of every query to the whole map (G), or to the map reduced r × r times by a convolution (P).

    Alone it would not know where anything is. ViT and PVT add a position embedding outside of the mixer; here both have
    the displacement bias of D, with a table of the same size, so that G and D differ only in what is read.
    """

    def __init__(self, dim: int, num_heads: int, table_size: tuple[int, int], reduction: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.reduce = nn.Identity()
        if reduction > 1:
            conv = Conv2d(dim, dim, reduction, reduction)
            self.reduce = nn.Sequential(conv, nn.LayerNorm(dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        table = torch.zeros(num_heads, 2 * table_size[0] - 1, 2 * table_size[1] - 1)
        self.rpe_table = nn.Parameter(trunc_normal_(table, std=0.01))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        reduced = self.reduce(x)  # (B, Hk, Wk, C)
        queries = grid(DATGeometry.query, tuple(x.shape[1:3]), x.device)
        keys = grid(DATGeometry.reference, tuple(reduced.shape[1:3]), x.device)
        bias = rpe_bias(self.rpe_table, queries, keys[None, None])
        kv = self.kv(reduced.flatten(1, 2))
        return self.proj(attend_all(self.q(x), kv, self.num_heads, bias)).view(x.shape)


# --------------------------------------------------------------------------- deformable convolution


@register_notrace_module
class DeformableConvolution(nn.Module):
    """3×3 convolution reading at nine predicted positions, each with a predicted weight, and a projection (C).

    The heads are the convolution's groups, so that it costs about what attention does. As published, offsets begin at
    0 and weights, a sigmoid, at one half.
    """

    def __init__(self, dim: int, num_heads: int, groups: int):
        super().__init__()
        self.positions = Conv2d(dim, 27 * groups, 3, padding=1)  # nine times (y, x), nine weights
        nn.init.zeros_(self.positions.weight)
        nn.init.zeros_(self.positions.bias)
        self.conv = DeformConv2d(dim, dim, 3, padding=1, groups=num_heads)
        self.proj = nn.Linear(dim, dim)

    @in_parts
    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        # In the weights' precision: coordinates are never computed in half precision.
        theta = self.positions(x).to(self.conv.weight.dtype)
        offsets, weights = theta.tensor_split((2 * theta.shape[-1] // 3,), dim=-1)
        convolve = self.by_torchvision if allow_atomic_add(x.device) else self.by_rows
        return self.proj(convolve(x.to(theta.dtype), offsets, weights.sigmoid()))

    def by_torchvision(self, x: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """The convolution of x (B, H, W, C) with offsets (B, H, W, 18 G) and weights (B, H, W, 9 G)."""
        x, offsets, weights = (part.permute(0, 3, 1, 2) for part in (x, offsets, weights))
        return self.conv(x, offsets, weights).permute(0, 2, 3, 1)

    def by_rows(self, x: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """The same; on a CPU a tenth of the time."""
        heads, (batch, height, width, channels) = self.conv.groups, x.shape
        groups = weights.shape[-1] // 9
        points = nine_cells(height, width, x.device) + offsets.unflatten(-1, (groups, 9, 2))
        points = points.transpose(3, 4).reshape(batch, -1, groups, 2)  # (B, H · W · 9, G, 2)
        weights = weights.unflatten(-1, (groups, 9)).transpose(3, 4).reshape(batch, -1, groups, 1)
        read = bilinear_gather(x, points, weights)
        read = read.view(-1, 9, heads, channels // heads).transpose(1, 2)  # (B · H · W, M, 9, D)
        read = read.flatten(2).transpose(0, 1)  # (M, B · H · W, 9 D)
        kernel = self.conv.weight.unflatten(0, (heads, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)
        z = torch.bmm(read, kernel).transpose(0, 1)  # (B · H · W, M, D)
        return z.reshape(x.shape) + self.conv.bias

    def largest(self, x: Tensor) -> int:
        """Bytes of the readings."""
        return 9 * x.numel() * self.conv.weight.element_size()


@constant
def nine_cells(height: int, width: int, device: torch.device) -> Tensor:
    """The 3 × 3 cells around every cell, (H, W, 1, 9, 2)."""
    around = torch.arange(-1.0, 2, device=device)
    y, x = (torch.arange(length, device=device)[:, None] + around for length in (height, width))
    cells = torch.broadcast_tensors(y[:, None, :, None], x[None, :, None, :])  # (H, W, 3, 3) each
    return torch.stack(cells, dim=-1).flatten(2, 3)[:, :, None]
