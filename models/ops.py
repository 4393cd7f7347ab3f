"""Operations of the models, each with one plain reference, and the choice among its kernels.

Nothing else picks a kernel. Where a device or a situation has a faster way than the reference, it is in
models/kernels.py (plain PyTorch) or models/fused (Triton) and gives the same values and gradients. Shapes in this
file:

    B batch   H, W map   C channels   M heads   D = C / M channels of a head   n positions of a window
    G groups, each of which reads its own channels or heads   N queries   Hk, Wk grid of positions   S = Hk · Wk keys

Coordinates are (y, x), normalised so that -1 and 1 are the centres of the border cells.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from models.cache import window_mask
from models.chunks import has_hooks
from models.kernels import (
    GELULinear,
    GridSample,
    IndexAddScaled,
    SumRows,
    attend_by_sdpa,
    bias_by_rows,
    deform_conv_by_rows,
    grid_sample_plainly,
    neighborhood_tiles,
    read_table,
    sample_by_rows,
    sum_rows,
    sum_rows_plainly,
)
from models.tracing import (
    is_exported_to_onnx,
    is_symbol,
    is_tracing,
    is_transformed,
)

# --- What decides ---------------------------------------------------------------------------------


def allow_atomic_add(device: torch.device) -> bool:
    """Whether to use kernels whose gradient is summed in no fixed order: on a GPU that need not repeat its bits."""
    return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling `module` does what `cls` does and nothing else, so that a kernel may read its parameters instead.

    Adapters (LoRA), quantisation, parametrizations and hooks put something else in its place or around it.
    """
    return type(module) is cls and "forward" not in vars(module) and not has_hooks(module)


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast; the meta device has none."""
    # Not torch.amp.is_autocast_available, which torch.compile of 2.11 cannot trace.
    return torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()


# --- Fused kernels --------------------------------------------------------------------------------

_kernels = "auto"


def use_kernels(kernels: str) -> None:
    """Set which kernels this process uses: "auto" is fused where a card runs them, "reference" never.

    "fused" is "auto", and in Triton's interpreter also on the CPU.
    """
    global _kernels
    _kernels = kernels


@contextmanager
def reference_kernels() -> Iterator[None]:
    """The reference in place of fused kernels, for whoever looks at what attention computes."""
    global _kernels
    before, _kernels = _kernels, "reference"
    try:
        yield
    finally:
        _kernels = before


@functools.cache
def fused_obstacle() -> str:
    """Why this machine cannot run models/fused; empty: it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _is_interpreted():
        return ""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"the card has compute capability {'.'.join(map(str, capability))}, 8.0 is needed"
    return ""


def _is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return importlib.import_module("triton").knobs.runtime.interpret


@torch.compiler.assume_constant_result
def _constant_obstacle() -> str:
    """`fused_obstacle`, into which torch.compile does not look."""
    return fused_obstacle()


def fused_kernels(x: Tensor) -> ModuleType | None:
    """models/fused if it is to compute for `x`, else None.

    The reference computes what is recorded for other programs (torch.jit, torch.export), transformed by torch.func,
    or in float64.
    """
    if _kernels == "reference" or not (x.is_cuda or _kernels == "fused"):
        return None
    recorded = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if recorded or is_transformed() or x.dtype == torch.float64 or _constant_obstacle():
        return None
    from models import fused  # a statement, which torch.compile can trace

    return fused


def fused_windows(x: Tensor, num_heads: int, window: tuple[int, int]) -> ModuleType | None:
    """models/fused if it is to compute windows of x (B, H, W, C), else None."""
    fused = fused_kernels(x)
    if fused is None or window[0] * window[1] > fused.MAX_WINDOW:
        return None
    return fused if x.shape[-1] // num_heads in fused.HEAD_WIDTHS else None


# --- Attention ------------------------------------------------------------------------------------


class Attended(NamedTuple):
    """What a call of `attend` computed, float32; b = batch · windows · heads."""

    q: Tensor  # (b, N, D)
    k: Tensor  # (b, S, D)
    weights: Tensor  # (b, N, S), the softmax


_recorder: Callable[[Attended], None] | None = None


@contextmanager
def recorded_attention(recorder: Callable[[Attended], None]) -> Iterator[None]:
    """Inside, `attend` is its reference in float32 and passes on to `recorder` what it computed. For analysis alone."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        with reference_kernels():
            yield
    finally:
        _recorder = before


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q · kᵀ / √D + bias) · v with q (b, N, D), k and v (b, S, D), to (b, N, D); b = batch · windows · heads.

    bias is (b', N, S): b' divides b, and the bias is repeated. It may be overwritten.
    """
    if _recorder is not None:
        return attend_recorded(q, k, v, bias, _recorder)
    if q.is_cuda:
        return attend_by_sdpa(q, k, v, bias)
    bias = bias.to(q.dtype)
    # On a CPU a product that is added to the bias is faster than the fused kernel for windows of 49 positions. Scaled
    # after the product, as released: bilinear reads have kinks, so rounding shows in the gradients of offsets.
    if bias.shape[0] != q.shape[0]:
        bias = bias.repeat(q.shape[0] // bias.shape[0], 1, 1)
    add_product = torch.baddbmm if is_transformed() else Tensor.baddbmm_
    scores = add_product(bias, q, k.transpose(-2, -1), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), v)


def attend_recorded(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, recorder: Callable[[Attended], None]
) -> Tensor:
    """The reference of `attend`, in float32; its weights are shown to `recorder`."""
    queries, keys = q.float(), k.float()
    scores = queries @ keys.mT * q.shape[-1] ** -0.5
    weights = (scores.unflatten(0, (-1, len(bias))) + bias.float()).flatten(0, 1).softmax(dim=-1)
    recorder(Attended(queries, keys, weights))
    return (weights @ v.float()).to(v.dtype)


def split_heads(
    x: Tensor, size: tuple[int, int], window: tuple[int, int], num_heads: int, parts: int = 1
) -> tuple[Tensor, ...]:
    """B maps of `size` (H, W) with parts · C channels, in any shape, to `parts` times (B · K · M, n, D).

    The K windows are in reading order, each head by head.
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


def attend_at(q: Tensor, kv: Tensor, table: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
    """`attend` from q (B, H, W, C) at `queries` (H, W, 2) to kv (B, S, 2C) at positions, to (B · H · W, C).

    The bias is `rpe_bias` of the heads' tables (M, …). Positions are (B, G, …, 2), or (1, G, …, 2) for all images.
    """
    fused = fused_kernels(q)
    if fused is not None and q.shape[-1] // len(table) in fused.HEAD_WIDTHS:
        positions = positions.flatten(2, -2).expand(len(q), -1, -1, -1)
        return fused.deformable_attend(q, kv, table, queries, positions)[0].flatten(0, 2)
    bias = rpe_bias(table, queries, positions)  # (B · M, N, S), or (M, N, S)
    return attend_all(q, kv, len(table), bias)


def attend_windows(
    qkv: Tensor, bias: Tensor, window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """The reference of `window_attend` of models/fused: (B, H, W, 3C) to (B, H, W, C).

    bias is (M, n, n). WindowAttention on the CPU does the same, but moves C channels instead of 3C.
    """
    (height, width, channels), num_heads = qkv.shape[1:], len(bias)
    padding = -height % window[0], -width % window[1]
    mask = window_mask((height, width), tuple(window), tuple(shift), qkv.device)
    bias = (bias + mask[:, None]).flatten(0, 1)
    qkv = F.pad(qkv, (0, 0, 0, padding[1], 0, padding[0]))
    qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
    size = tuple(qkv.shape[1:3])
    q, k, v = split_heads(qkv, size, window, num_heads, parts=3)
    z = merge_heads(attend(q, k, v, bias), size, window, num_heads)
    z = z.view(-1, *size, channels // 3).roll(tuple(shift), (1, 2))
    return z[:, :height, :width]


def attend_neighborhoods(qkv: Tensor, rpb: Tensor) -> Tensor:
    """`attend` from every position to the w × w window around it, (B, H, W, 3C) to (B, H, W, C).

    The bias of query i and key j is rpb (M, 2w − 1, 2w − 1) at their distance, j − i + w − 1. At a border the window
    moves inward; on a map smaller than w it is the map.
    """
    (height, width, channels), num_heads = qkv.shape[1:], len(rpb)
    tiles = neighborhood_tiles(height, width, (rpb.shape[-1] + 1) // 2, qkv.device)
    table = F.pad(rpb, (0, 1, 0, 1), value=-torch.inf).flatten(1)  # −∞: outside of the window
    bias = read_table(table, tiles.relative).transpose(0, 1).flatten(0, 1)  # (K · M, n, keys)
    # The reference: one tile, which reads the complete map.
    if tiles.region == (height, width):
        q, k, v = split_heads(qkv, tiles.region, tiles.region, num_heads, parts=3)
        z = merge_heads(attend(q, k, v, bias), tiles.region, tiles.region, num_heads)
        return z.view(-1, height, width, channels // 3)
    # Tiles of queries; a key of a map is in the regions of several tiles.
    q, kv = qkv.split((channels // 3, 2 * channels // 3), dim=-1)
    below, right = -height % tiles.tile[0], -width % tiles.tile[1]
    if below or right:  # padding by nothing would copy
        q = F.pad(q, (0, 0, 0, right, 0, below))
    padded = tuple(q.shape[1:3])
    (q,) = split_heads(q, padded, tiles.tile, num_heads)
    kv = kv.index_select(1, tiles.rows).index_select(2, tiles.columns)
    k, v = split_heads(kv, tuple(kv.shape[1:3]), tiles.region, num_heads, parts=2)
    z = merge_heads(attend(q, k, v, bias), padded, tiles.tile, num_heads)
    return z.view(-1, *padded, channels // 3)[:, :height, :width]


# --- Bilinear reads -------------------------------------------------------------------------------


def sample(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, H, W, C) read at positions (B, G, Hk, Wk, 2), each group its own C / G channels, to (B, S, C).

    Bilinear, zeros outside. Values take the precision of the coordinates, never the reverse.
    """
    if fused := fused_kernels(x):
        return fused.sample(x, positions.flatten(2, 3))
    x = x.to(positions.dtype)
    if allow_atomic_add(x.device) or is_exported_to_onnx():
        return sample_by_grid(x, positions)
    return sample_by_rows(x, positions, row_sum(x.device))


def row_sum(device: torch.device) -> Callable[..., Tensor]:
    """The kernel that sums rows; on a CPU as fast as embedding_bag, whose derivatives have none."""
    if is_transformed() or is_exported_to_onnx():
        return sum_rows_plainly
    if device.type == "cpu" and torch.is_grad_enabled() and not is_tracing():
        return lambda *tensors: SumRows.apply(*tensors)[0]
    return sum_rows


def add_scaled(x: Tensor, offset: Tensor, factor: float, scale: Tensor) -> Tensor:
    """x + factor · offset / scale."""
    if is_exported_to_onnx():
        return x + factor * offset / scale
    return torch.addcdiv(x, offset, scale, value=factor)


def grid_sample(image: Tensor, points: Tensor) -> Tensor:
    """image (b, c, H, W) read at points (b, N, S, 2), (x, y) with ±1 at the centres of the border cells."""
    if is_transformed():
        return grid_sample_plainly(image, points)
    if image.device.type == "cpu" and torch.is_grad_enabled() and not is_tracing():
        return GridSample.apply(image, points)
    return F.grid_sample(image, points, align_corners=True)


def sample_by_grid(x: Tensor, positions: Tensor) -> Tensor:
    """The reference of `sample`."""
    batch, groups = positions.shape[0], positions.shape[1]
    image = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2)  # (B, G, C/G, H, W)
    points = positions.flatten(0, 1).flip(-1)  # (x, y)
    read = grid_sample(image.flatten(0, 1), points)  # (B·G, C/G, Hk, Wk)
    return read.flatten(2).unflatten(0, (batch, groups)).flatten(1, 2).transpose(1, 2).contiguous()


def rpe_bias(tables: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
    """The heads' tables (M, …) read at half the displacement from every query to every key, (B · M, N, S), float32.

    Queries are at (H, W, 2), keys at (B, G, Hk, Wk, 2).
    """
    batch, groups = positions.shape[0], positions.shape[1]
    # Halved before they are subtracted, so that the backward pass scales keys and not pairs.
    keys = -0.5 * positions.reshape(batch * groups, 1, -1, 2)
    displacement = torch.add(keys, queries.view(-1, 1, 2), alpha=0.5)  # (B·G, N, S, 2)
    tables = tables.to(keys.dtype)
    if displacement.is_cuda and not allow_atomic_add(displacement.device):
        return bias_by_rows(tables, displacement.unflatten(0, (batch, groups)))
    # grid_sample wants (x, y): (y, x) is that of the transposed table.
    tables = tables.transpose(-2, -1).unflatten(0, (groups, -1)).repeat(batch, 1, 1, 1)
    return grid_sample(tables, displacement).flatten(0, 1)  # of (B·G, M/G, N, S)


def deform_conv(conv: DeformConv2d, x: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """The 3×3 `conv` of x (B, H, W, C), every tap moved by an offset and multiplied by a weight, to (B, H, W, C).

    For G groups of channels: offsets (B, H, W, 18 G) are nine times (y, x) in cells, weights (B, H, W, 9 G). Read in
    the precision of the offsets; the result is in that of the kernel.
    """
    # Torchvision's computes in one precision, and has no second derivative.
    torchvision = allow_atomic_add(x.device) and x.dtype == conv.weight.dtype
    if not is_plain(conv, DeformConv2d) or (torchvision and not is_transformed()):
        return deform_conv_by_module(conv, x, offsets, weights)
    return deform_conv_by_rows(conv, x, offsets, weights, row_sum(x.device))


def deform_conv_by_module(conv: nn.Module, x: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """The reference of `deform_conv`."""
    x, offsets, weights = (part.permute(0, 3, 1, 2) for part in (x, offsets, weights))
    return conv(x, offsets, weights).permute(0, 2, 3, 1)


# --- Convolutions ---------------------------------------------------------------------------------


def convolve(conv: nn.Module, x: Tensor, patch: tuple[int, int] = (1, 1)) -> Tensor:
    """The convolution `conv` of a map (B, H, W, C), to (B, H', W', C'); a channels-last map stays so in memory.

    Zeros below and to the right make H and W multiples of `patch`.
    """
    x = x.permute(0, 3, 1, 2)
    if patch != (1, 1):
        below, right = -x.shape[2] % patch[0], -x.shape[3] % patch[1]
        if below or right:  # padding by nothing would copy
            x = F.pad(x, (0, right, 0, below))
    return conv(x).permute(0, 2, 3, 1)


def convolve_groups(conv: nn.Module, x: Tensor, groups: int) -> Tensor:
    """The depthwise convolution `conv` of c channels, shared by all groups: (B, H, W, G · c) to (B, H', W', G, c)."""
    if groups > 1 and is_plain(conv, nn.Conv2d) and conv.bias is not None:
        # Repeating the kernel spares rearranging x into groups.
        weight, bias = conv.weight.repeat(groups, 1, 1, 1), conv.bias.repeat(groups)
        x = x.permute(0, 3, 1, 2)
        theta = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, x.shape[1])
        theta = theta.permute(0, 2, 3, 1)
        # Sizes in full: ONNX's older exporter takes the batch for a constant after an unflatten.
        return theta.view(x.shape[0], theta.shape[1], theta.shape[2], groups, -1)
    # The reference: every group is an image.
    images = x.unflatten(-1, (groups, -1)).movedim(3, 1).flatten(0, 1)  # (B·G, H, W, c)
    theta = convolve(conv, images)
    return theta.view(x.shape[0], groups, *theta.shape[1:]).movedim(1, 3)


# --- Parts of a block -----------------------------------------------------------------------------


def gelu_linear(act: nn.Module, fc: nn.Module, x: Tensor) -> Tensor:
    """fc(act(x)), where the layers are as a rule a GELU and a linear layer; (…, in) to (…, out)."""
    if not torch.is_grad_enabled() or is_tracing():  # nothing is kept, or the tracer decides
        return fc(act(x))
    plain = is_plain(act, nn.GELU) and is_plain(fc, nn.Linear)
    if plain and act.approximate == "none" and fc.bias is not None:
        return GELULinear.apply(x, fc.weight, fc.bias)
    return fc(act(x))


def drawing_device(x: Tensor) -> torch.device:
    """Where to draw which images of x are kept: on the host, where their number is a size; in a graph where x is."""
    return x.device if is_tracing() else torch.device("cpu")


def add_kept(
    x: Tensor, branch: Callable[[Tensor], Tensor], kept: Tensor, keep_prob: float
) -> Tensor:
    """x + branch(x) · kept / keep_prob, image by image; `kept` (B) of zeros and ones is on the `drawing_device`.

    `branch` maps (b, …) to the same shape, image by image.
    """
    if is_symbol(x) or is_tracing():  # the reference
        scaled = branch(x).movedim(0, -1) * (kept.to(x) / keep_prob)
        return x + scaled.movedim(-1, 0)
    if kept.all():
        return torch.add(x, branch(x), alpha=1 / keep_prob)
    # If none is kept, one is computed all the same and added 0 times: every weight needs a gradient.
    scale = 1 / keep_prob if kept.any() else 0.0
    chosen = kept.nonzero().flatten() if scale else torch.tensor([0])
    if x.is_cuda:  # from other memory the copy would wait for the device
        chosen = chosen.pin_memory().to(x.device, non_blocking=True)
    return add_chosen(x, branch, chosen, scale)


def add_chosen(
    x: Tensor, branch: Callable[[Tensor], Tensor], chosen: Tensor, scale: float
) -> Tensor:
    """x + scale · branch(x) at the images `chosen` (b) of x (B, …), without the branch at the others."""
    return IndexAddScaled.apply(x, chosen, branch(x.index_select(0, chosen)), scale)
