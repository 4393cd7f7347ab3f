"""Spatial mixers, one class per letter: how one position of a map reads the others.

    L  windows                 Swin, arXiv 2103.14030
    S  shifted windows         the same
    N  neighbourhoods          NAT, arXiv 2204.07143
    D  deformable attention    DAT, arXiv 2201.00520; DAT++, arXiv 2309.01430
    G  the complete map        ViT, arXiv 2010.11929
    P  the map, reduced        PVT, arXiv 2102.12122
    C  deformable convolution  DCNv2, arXiv 1811.11168

Every mixer maps (B, H, W, C) to (B, H, W, C) for any H and W. Shapes in this file:

    B batch   H, W map   C channels   M heads   D = C / M channels of a head
    n positions of a window   K number of windows
    G offset groups   Hk, Wk grid of keys   N = H · W queries   S = Hk · Wk keys

Coordinates are (y, x), normalised so that -1 and 1 are the centres of the border cells. The operations are those of
models/ops.py, which knows how each is computed fast.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from models import chunks, ops
from models.cache import grid, map_extent, window_mask
from models.chunks import in_chunks
from models.tracing import one_node

# --- Windows --------------------------------------------------------------------------------------


@in_chunks(chunks.window_bytes)
class WindowAttention(nn.Module):
    """Attention inside w × w windows with a learned bias per relative position (L; S when shifted).

    z = softmax(q · kᵀ / √D + bias + mask) · v in every window. A map smaller than the window is one smaller window.
    Padded positions are never attended to.
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        # The windows' layout: extents, cyclic shift and padding along (y, x).
        height, width = x.shape[1:3]
        window = min(self.window_size, height), min(self.window_size, width)
        # A window that covers the map already connects all of it: nothing to shift.
        shift = tuple(
            self.shift_size if size > length else 0
            for size, length in zip((height, width), window, strict=True)
        )
        if fused := ops.fused_windows(x, self.num_heads, window):
            return self.proj(fused.window_attend(self.qkv(x), self.bias(window), window, shift))
        padding = -height % window[0], -width % window[1]

        # What is added to the scores.
        bias = self.bias(window)  # (M, n, n), the same in every window
        if any(shift) or any(padding):
            mask = window_mask((height, width), window, shift, x.device)  # (K, n, n)
            bias = (bias + mask[:, None]).flatten(0, 1)  # (K · M, n, n)

        # Zeros below and to the right, then up and left by the shift: what leaves the map comes back opposite.
        if any(padding):
            x = F.pad(x, (0, 0, 0, padding[1], 0, padding[0]))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))

        # Attention in every window and head.
        size = tuple(x.shape[1:3])
        qkv = self.qkv(x.flatten(0, 2))  # (B · H · W, 3C)
        q, k, v = ops.split_heads(qkv, size, window, self.num_heads, parts=3)  # (B · K · M, n, D)
        z = ops.attend(q, k, v, bias)  # (B · K · M, n, D)
        z = ops.merge_heads(z, size, window, self.num_heads)  # (B · H · W, C)
        x = self.proj(z).view(x.shape)

        # Shift and padding undone.
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :height, :width] if any(padding) else x

    def bias(self, window: tuple[int, int]) -> Tensor:
        """The bias (M, n, n) of a window no larger than the table's."""
        rows, columns = window
        size = self.window_size
        index = self.relative_position_index  # (w², w²)
        if window != (size, size):
            # The first rows and columns of the full window have the same distances.
            index = index.view(size, size, size, size)[:rows, :columns, :rows, :columns]
            index = index.reshape(rows * columns, rows * columns)
        return F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)


def relative_position_index(size: int) -> Tensor:
    """Row of the bias table for every (query, key) of a window, (size², size²): Δy · (2 · size − 1) + Δx from 0."""
    axis = torch.arange(size)
    delta = axis[:, None] - axis + size - 1  # (query, key) of one axis
    index = delta[:, None, :, None] * (2 * size - 1) + delta[None, :, None, :]
    return index.reshape(size * size, size * size)


# --- Neighbourhoods -------------------------------------------------------------------------------


@in_chunks(chunks.neighborhood_bytes)
class NeighborhoodAttention(nn.Module):
    """Attention of every query to the w × w window centred on it, with a learned bias per relative position (N).

    At a border the window moves inward, so that it always holds w² keys; on a map smaller than w it holds the map.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        table = torch.zeros(num_heads, 2 * window_size - 1, 2 * window_size - 1)
        self.rpb = nn.Parameter(trunc_normal_(table, std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        # z_i = softmax over the keys j around i of (q_i · k_j / √D + rpb[j − i + w − 1]), times v_j
        return self.proj(ops.attend_neighborhoods(self.qkv(x), self.rpb))


# --- Deformable attention -------------------------------------------------------------------------
# What the two papers do differently is where things are. Along an axis with n reference points or N queries, i from 0:
#
#                      DAT                            DAT++
#   reference points   2 (i + ½) / n − 1              2 (i + ½) / (n − 1) − 1, the last lies beyond 1, as released
#   queries            2 (i + ½) / N − 1              2 i / (N − 1) − 1
#   offsets            2 / n · tanh(θ)                θ
#   reads outside      are zeros                      are clamped to the border
#   offset kernel k    padded by k // 2               padded by k // 2, or not at all where k is the stride


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
        """Sampling positions for the reference points (Hk, Wk, 2) and predicted offsets θ (B, G, Hk, Wk, 2)."""
        cells = map_extent(*reference.shape[:2], theta.device)
        return ops.add_scaled(reference, theta.tanh(), cls.range_factor, cells)


class DATPlusPlusGeometry:
    """Coordinates of DAT++ (2023): queries at pixel centres, free offsets, points clamped to the map."""

    @staticmethod
    def padding(kernel: int, stride: int) -> int:
        """Padding of the offset convolution: none where it only cuts the map into patches."""
        return 0 if kernel == stride else kernel // 2

    @staticmethod
    def reference(index: Tensor, size: int) -> Tensor:
        """Reference points along one axis of the sampling grid."""
        return (index + 0.5) / max(size - 1, 1) * 2 - 1

    @staticmethod
    def query(index: Tensor, size: int) -> Tensor:
        """Query positions along one axis of the map, as the bias sees them."""
        return index / max(size - 1, 1) * 2 - 1

    @staticmethod
    def place(reference: Tensor, theta: Tensor) -> Tensor:
        """Sampling positions for the reference points (Hk, Wk, 2) and predicted offsets θ (B, G, Hk, Wk, 2)."""
        return (reference + theta).clamp(-1, 1)


Geometry = type[DATGeometry] | type[DATPlusPlusGeometry]


class SamplingPositions(nn.Module):
    """Where each group reads: reference points plus offsets θ predicted from that group's channels of q.

    θ = 1×1 conv(GELU(LN(depthwise conv(q)))), the offset network; all groups share it.
    """

    def __init__(self, dim: int, groups: int, kernel: int, stride: int, geometry: Geometry):
        super().__init__()
        channels = dim // groups
        self.groups = groups
        self.stride = stride
        self.geometry = geometry
        self.dwconv = nn.Conv2d(
            channels, channels, kernel, stride, geometry.padding(kernel, stride), groups=channels
        )
        self.norm = nn.LayerNorm(channels)
        self.act = nn.GELU()
        self.proj = nn.Linear(channels, 2, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        """q (B, H, W, C) to positions (B, G, Hk, Wk, 2), float32."""
        with ops.full_precision(q.device):  # coordinates are never computed in half precision
            q = q.to(self.norm.weight.dtype)
            theta = ops.convolve_groups(self.dwconv, q, self.groups)  # (B, Hk, Wk, G, C/G)
            theta = self.proj(self.act(self.norm(theta)))  # (B, Hk, Wk, G, 2)
        theta = theta.permute(0, 3, 1, 2, 4)  # (B, G, Hk, Wk, 2)
        return self.geometry.place(self.reference(theta.shape[2:4]), theta)

    def reference(self, size: tuple[int, int]) -> Tensor:
        """The reference points, (Hk, Wk, 2)."""
        return grid(self.geometry.reference, tuple(size), self.norm.weight.device)


@in_chunks(chunks.deformable_bytes)
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        q = self.q(x)  # (B, H, W, C)
        positions = self.positions(q)  # (B, G, Hk, Wk, 2)
        queries = grid(self.geometry.query, tuple(x.shape[1:3]), x.device)  # (H, W, 2)
        kv = self.kv(ops.sample(x, positions).to(x.dtype))  # k̃, ṽ: (B, S, 2C)
        z = ops.attend_at(q, kv, self.rpe_table, queries, positions)  # (B · H · W, C)
        return self.proj(z).view(x.shape)


# --- The complete map -----------------------------------------------------------------------------


@one_node
class GlobalAttention(nn.Module):
    """Attention of every query to the complete map (G), or to the map reduced r × r times by a convolution (P).

    Alone it would not know where anything is. ViT and PVT add a position embedding outside of the mixer; here both have
    the displacement bias of D, with a table of the same size, so that G and D differ only in what is read.
    """

    def __init__(self, dim: int, num_heads: int, table_size: tuple[int, int], reduction: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.reduce = nn.Identity()
        if reduction > 1:
            conv = nn.Conv2d(dim, dim, reduction, reduction)
            self.reduce = ConvStack(conv, nn.LayerNorm(dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        table = torch.zeros(num_heads, 2 * table_size[0] - 1, 2 * table_size[1] - 1)
        self.rpe_table = nn.Parameter(trunc_normal_(table, std=0.01))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        reduced = self.reduce(x)  # (B, Hk, Wk, C)
        queries = grid(DATGeometry.query, tuple(x.shape[1:3]), x.device)  # (H, W, 2)
        keys = grid(DATGeometry.reference, tuple(reduced.shape[1:3]), x.device)  # (Hk, Wk, 2)
        kv = self.kv(reduced.flatten(1, 2))  # (B, S, 2C)
        # One image and one group of keys: the bias serves all images.
        z = ops.attend_at(self.q(x), kv, self.rpe_table, queries, keys[None, None])
        return self.proj(z).view(x.shape)


# --- Deformable convolution -----------------------------------------------------------------------


@in_chunks(chunks.deform_conv_bytes)
class DeformableConvolution(nn.Module):
    """3×3 convolution reading at nine predicted positions, each with a predicted weight, and a projection (C).

    z = Σ over nine taps of W_tap · x̃(tap + offset) · weight. The heads are the convolution's groups, so that it costs
    about what attention does. As published, offsets begin at 0 and weights, a sigmoid, at one half.
    """

    def __init__(self, dim: int, num_heads: int, groups: int):
        super().__init__()
        # Nine times (y, x), then nine weights, for every group.
        self.positions = nn.Conv2d(dim, 27 * groups, 3, padding=1)
        nn.init.zeros_(self.positions.weight)
        nn.init.zeros_(self.positions.bias)
        self.conv = DeformConv2d(dim, dim, 3, padding=1, groups=num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        # In the weights' precision, at least float32: coordinates are never computed in half precision.
        precision = torch.promote_types(self.conv.weight.dtype, torch.float32)
        theta = ops.convolve(self.positions, x).to(precision)  # (B, H, W, 27 G)
        taps = int(theta.shape[-1]) // 3
        offsets, weights = theta.split((2 * taps, taps), dim=-1)
        z = ops.deform_conv(self.conv, x.to(theta.dtype), offsets, weights.sigmoid())
        return self.proj(z)


# --- Convolutions of a map ------------------------------------------------------------------------


@one_node
class ConvStack(nn.Sequential):
    """Plain layers one after another on maps (B, H, W, C), with convolutions among them.

    A convolution without padding cuts the map into patches, of which the last, partial ones are filled with zeros.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        # By place, for whatever takes a convolution's place later.
        self.patches = [patch_of(layer) for layer in self]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C'); a stride s makes ⌈H / s⌉ of H with patches, and with padding k // 2."""
        for layer, patch in zip(self, self.patches, strict=True):
            x = layer(x) if patch is None else ops.convolve(layer, x, patch)
        return x


def patch_of(layer: nn.Module) -> tuple[int, int] | None:
    """The sides of a convolution's patches, (1, 1) if it pads by itself; None for other layers."""
    if not isinstance(layer, nn.Conv2d):
        return None
    return layer.stride if layer.padding == (0, 0) else (1, 1)
