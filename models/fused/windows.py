"""Window attention that reads queries, keys and values where the linear layer left them.

Partition, cyclic shift, padding and mask are arithmetic on addresses. The backward pass computes the softmax again.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models import ops
from models.fused.common import is_half, precision, reference_gradients

MAX_WINDOW = 64  # positions of a window: its scores are one tile in registers

# --- Kernels --------------------------------------------------------------------------------------


@triton.jit
def _window_rows(window, n, H, W, PH, PW, SY, SX, WH: tl.constexpr, WW: tl.constexpr):
    """Row of position n of a window in its image, whether it is real, and its region before the cyclic shift."""
    wide = PW // WW
    y = window // wide * WH + n // WW
    x = window % wide * WW + n % WW
    down = (y >= PH - WH).to(tl.int32) + (y >= PH - SY).to(tl.int32)
    right = (x >= PW - WW).to(tl.int32) + (x >= PW - SX).to(tl.int32)
    y = (y + SY) % PH
    x = (x + SX) % PW
    return y * W + x, (n < WH * WW) & (y < H) & (x < W), down * 3 + right


@triton.jit
def _window_weights(q, k, bias, region, real, scale, n, N: tl.constexpr, IP: tl.constexpr):
    """softmax(q · kᵀ · scale + bias + mask) of one window and head, float32."""
    inside = (n < N)[:, None] & (n < N)[None, :]
    b = tl.load(bias + n[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision=IP) * scale + b
    s += tl.where(region[:, None] != region[None, :], -100.0, 0.0)
    s = tl.where(real[None, :], s, -float("inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def window_forward(
    qkv, bias, z, scale, H, W, PH, PW, SY, SX, M,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One window and head."""
    windows = (PH // WH) * (PW // WW)
    image, window, m = tl.program_id(0) // windows, tl.program_id(0) % windows, tl.program_id(1)
    C, d, n = M * D, tl.arange(0, D), tl.arange(0, BN)
    row, real, region = _window_rows(window, n, H, W, PH, PW, SY, SX, WH, WW)
    first = image.to(tl.int64) * H * W
    at = qkv + first * (3 * C) + row[:, None] * (3 * C) + m * D + d[None, :]
    q = tl.load(at, mask=real[:, None], other=0.0)
    k = tl.load(at + C, mask=real[:, None], other=0.0)
    v = tl.load(at + 2 * C, mask=real[:, None], other=0.0)
    p = _window_weights(q, k, bias + m * (WH * WW) * (WH * WW), region, real, scale, n, WH * WW, IP)
    out = tl.dot(p.to(v.dtype), v, input_precision=IP)
    at = z + first * C + row[:, None] * C + m * D + d[None, :]
    tl.store(at, out.to(z.dtype.element_ty), mask=real[:, None])


@triton.jit
def window_backward(
    qkv, bias, dz, dqkv, dbias, scale, B, H, W, PH, PW, SY, SX, M, PARTS,
    WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One head, every PARTS-th window of all images; their gradients of the bias are added up in that order."""
    part, m = tl.program_id(0), tl.program_id(1)
    windows = (PH // WH) * (PW // WW)
    N: tl.constexpr = WH * WW
    C, d, n = M * D, tl.arange(0, D), tl.arange(0, BN)
    inside = (n < N)[:, None] & (n < N)[None, :]
    total = tl.zeros((BN, BN), tl.float32)
    for index in range(part, B * windows, PARTS):
        row, real, region = _window_rows(index % windows, n, H, W, PH, PW, SY, SX, WH, WW)
        first = (index // windows).to(tl.int64) * H * W
        offset = row[:, None] * (3 * C) + m * D + d[None, :]
        at = qkv + first * (3 * C) + offset
        q = tl.load(at, mask=real[:, None], other=0.0)
        k = tl.load(at + C, mask=real[:, None], other=0.0)
        v = tl.load(at + 2 * C, mask=real[:, None], other=0.0)
        at = dz + first * C + row[:, None] * C + m * D + d[None, :]
        g = tl.load(at, mask=real[:, None], other=0.0)
        p = _window_weights(q, k, bias + m * N * N, region, real, scale, n, N, IP)
        dv = tl.dot(tl.trans(p).to(g.dtype), g, input_precision=IP)
        dp = tl.dot(g, tl.trans(v), input_precision=IP)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        total += ds
        low = ds.to(q.dtype)
        dq = tl.dot(low, k, input_precision=IP) * scale
        dk = tl.dot(tl.trans(low), q, input_precision=IP) * scale
        at = dqkv + first * (3 * C) + offset
        tl.store(at, dq.to(dqkv.dtype.element_ty), mask=real[:, None])
        tl.store(at + C, dk.to(dqkv.dtype.element_ty), mask=real[:, None])
        tl.store(at + 2 * C, dv.to(dqkv.dtype.element_ty), mask=real[:, None])
    at = dbias + (part * M + m) * N * N + n[:, None] * N + n[None, :]
    tl.store(at, total, mask=inside)


# --- Operators ------------------------------------------------------------------------------------


def window_blocks(positions: int, half: bool) -> dict:
    """Constants of the window kernels."""
    side = max(16, triton.next_power_of_2(positions))
    return {"BN": side, "IP": precision(half), "num_warps": 4 if half else 8, "num_stages": 1}


def _window_layout(
    qkv: Tensor, bias: Tensor, window: Sequence[int], shift: Sequence[int]
) -> tuple[int, tuple, dict]:
    """Windows of an image, and the kernels' arguments and constants."""
    (_, height, width, channels), num_heads = qkv.shape, len(bias)
    padded = height + -height % window[0], width + -width % window[1]
    sizes = height, width, *padded, *shift, num_heads
    blocks = window_blocks(window[0] * window[1], is_half(qkv))
    constants = {"WH": window[0], "WW": window[1], "D": channels // 3 // num_heads, **blocks}
    return padded[0] // window[0] * (padded[1] // window[1]), sizes, constants


@torch.library.custom_op("dat::window_attend", mutates_args=())
def window_attend(qkv: Tensor, bias: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Attention inside windows of the shifted map: qkv (B, H, W, 3C) and bias (M, n, n) to (B, H, W, C).

    `window` and `shift` are along (y, x). As `ops.attend_windows`; Swin, arXiv 2103.14030, eq. 4.
    """
    qkv, bias = qkv.contiguous(), bias.float().contiguous()
    windows, sizes, constants = _window_layout(qkv, bias, window, shift)
    z = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    scale = constants["D"] ** -0.5
    window_forward[len(qkv) * windows, len(bias)](qkv, bias, z, scale, *sizes, **constants)
    return z


@torch.library.custom_op("dat::window_attend_backward", mutates_args=())
def window_attend_backward(
    dz: Tensor, qkv: Tensor, bias: Tensor, window: Sequence[int], shift: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and bias from that of the output."""
    dz, qkv, single = dz.contiguous(), qkv.contiguous(), bias.float().contiguous()
    windows, sizes, constants = _window_layout(qkv, bias, window, shift)
    # By shapes alone, so that every card adds up in the same order.
    parts = max(1, min(len(qkv) * windows, 2048 // len(bias)))
    dqkv, dbias = torch.empty_like(qkv), single.new_empty(parts, *bias.shape)
    scale = constants["D"] ** -0.5
    window_backward[parts, len(bias)](
        qkv, single, dz, dqkv, dbias, scale, len(qkv), *sizes, parts, **constants
    )
    return dqkv, dbias.sum(0).to(bias.dtype)


# --- What torch needs to know ---------------------------------------------------------------------
# Shapes without values, for torch.compile; gradients; multiply-adds, for torch's FlopCounterMode. A gradient of a
# gradient (create_graph=True) is that of the reference.


@window_attend.register_fake
def _(qkv, bias, window, shift):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@window_attend_backward.register_fake
def _(dz, qkv, bias, window, shift):
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _keep_window(ctx, inputs, output):
    qkv, bias, ctx.window, ctx.shift = inputs
    ctx.save_for_backward(qkv, bias)


def _window_gradients(ctx, dz):
    layout = ctx.window, ctx.shift
    if torch.is_grad_enabled():
        reference = lambda qkv, bias: ops.attend_windows(qkv, bias, *layout)  # noqa: E731
        return *reference_gradients(reference, ctx.saved_tensors, dz), None, None
    return *window_attend_backward(dz, *ctx.saved_tensors, *layout), None, None


window_attend.register_autograd(_window_gradients, setup_context=_keep_window)


@register_flop_formula(torch.ops.dat.window_attend)
def _(qkv_shape, bias_shape, window, shift, *, out_shape=None, **kwargs) -> int:
    (batch, height, width, channels), (_, positions, _) = qkv_shape, bias_shape
    rows, columns = -(-height // window[0]) * window[0], -(-width // window[1]) * window[1]
    return 4 * batch * rows * columns * positions * (channels // 3)


@register_flop_formula(torch.ops.dat.window_attend_backward)
def _(dz_shape, qkv_shape, bias_shape, window, shift, *, out_shape=None, **kwargs) -> int:
    (batch, height, width, channels), (_, positions, _) = qkv_shape, bias_shape
    rows, columns = -(-height // window[0]) * window[0], -(-width // window[1]) * window[1]
    return 10 * batch * rows * columns * positions * (channels // 3)
