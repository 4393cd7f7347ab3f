"""Bilinear reads of a map, whose gradient is a product with hat functions instead of a scatter."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models import ops
from models.fused.common import block_side, is_half, precision, reference_gradients

SAMPLE_POINTS, SAMPLE_CELLS = 32, 64  # of a block

# --- Kernels --------------------------------------------------------------------------------------


@triton.jit
def _four_cells(x, y0, x0, H, W, C, c, real):
    """The four rows around the cells (y0, x0), zeros outside, float32."""
    iy = tl.minimum(tl.maximum(y0, -2), H).to(tl.int32)
    ix = tl.minimum(tl.maximum(x0, -2), W).to(tl.int32)
    row = iy * W + ix
    up, down = (iy >= 0) & (iy < H), (iy >= -1) & (iy < H - 1)
    left, right = (ix >= 0) & (ix < W), (ix >= -1) & (ix < W - 1)
    at = x + row[:, None] * C + c[None, :]
    t00 = tl.load(at, mask=(up & left)[:, None] & real, other=0.0).to(tl.float32)
    t01 = tl.load(at + C, mask=(up & right)[:, None] & real, other=0.0).to(tl.float32)
    t10 = tl.load(at + W * C, mask=(down & left)[:, None] & real, other=0.0).to(tl.float32)
    t11 = tl.load(at + (W + 1) * C, mask=(down & right)[:, None] & real, other=0.0).to(tl.float32)
    return t00, t01, t10, t11


@triton.jit
def sample_forward(
    x, position, out, H, W, S, G, PER: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr
):
    """A block of readings and channels of one group."""
    image, group = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    C = G * PER
    real = (s < S)[:, None] & (c < PER)[None, :]
    at = position + (tl.program_id(0) * S + s) * 2
    y = (tl.load(at, mask=s < S, other=0.0) + 1) * (0.5 * (H - 1))
    x_ = (tl.load(at + 1, mask=s < S, other=0.0) + 1) * (0.5 * (W - 1))
    y0, x0 = tl.floor(y), tl.floor(x_)
    fy, fx = (y - y0)[:, None], (x_ - x0)[:, None]
    t00, t01, t10, t11 = _four_cells(x + image * H * W * C + group * PER, y0, x0, H, W, C, c, real)
    top, bottom = t00 + fx * (t01 - t00), t10 + fx * (t11 - t10)
    read = (top + fy * (bottom - top)).to(out.dtype.element_ty)
    tl.store(out + (image * S + s)[:, None] * C + group * PER + c[None, :], read, mask=real)


@triton.jit
def sample_map(
    position, dout, dx, H, W, S, G,
    PER: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """A block of cells and channels of one group: the product of the cells' hats with the gradients of all readings."""
    image, group = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    C = G * PER
    acc = tl.zeros((BN, BC), tl.float32)
    for start in range(0, S, BS):
        s = start + tl.arange(0, BS)
        at = position + (tl.program_id(0) * S + s) * 2
        y = (tl.load(at, mask=s < S, other=-9.0) + 1) * (0.5 * (H - 1))
        x = (tl.load(at + 1, mask=s < S, other=-9.0) + 1) * (0.5 * (W - 1))
        hat = tl.maximum(0.0, 1 - tl.abs(y[None, :] - (n // W)[:, None]))
        hat *= tl.maximum(0.0, 1 - tl.abs(x[None, :] - (n % W)[:, None]))
        real = (s < S)[:, None] & (c < PER)[None, :]
        at = dout + (image * S + s)[:, None] * C + group * PER + c[None, :]
        g = tl.load(at, mask=real, other=0.0)
        acc += tl.dot(hat.to(g.dtype), g, input_precision=IP)
    at = dx + (image * H * W + n)[:, None] * C + group * PER + c[None, :]
    real = (n < H * W)[:, None] & (c < PER)[None, :]
    tl.store(at, acc.to(dx.dtype.element_ty), mask=real)


@triton.jit
def sample_positions(
    x, position, dout, dposition, H, W, S, G,
    PER: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The positions' gradient of a block of readings of one group."""
    image, group = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    C = G * PER
    at = position + (tl.program_id(0) * S + s) * 2
    y = (tl.load(at, mask=s < S, other=0.0) + 1) * (0.5 * (H - 1))
    x_ = (tl.load(at + 1, mask=s < S, other=0.0) + 1) * (0.5 * (W - 1))
    y0, x0 = tl.floor(y), tl.floor(x_)
    fy, fx = (y - y0)[:, None], (x_ - x0)[:, None]
    x += image * H * W * C + group * PER
    gy, gx = tl.zeros((BS,), tl.float32), tl.zeros((BS,), tl.float32)
    for c0 in range(0, PER, BC):
        c = c0 + tl.arange(0, BC)
        real = (s < S)[:, None] & (c < PER)[None, :]
        from_out = dout + (image * S + s)[:, None] * C + group * PER + c[None, :]
        g = tl.load(from_out, mask=real, other=0.0).to(tl.float32)
        t00, t01, t10, t11 = _four_cells(x, y0, x0, H, W, C, c, real)
        gy += tl.sum(g * ((t10 - t00) + fx * ((t11 - t10) - (t01 - t00))), 1)
        gx += tl.sum(g * ((t01 - t00) + fy * ((t11 - t10) - (t01 - t00))), 1)
    to = dposition + (tl.program_id(0) * S + s) * 2
    tl.store(to, gy * (0.5 * (H - 1)), mask=s < S)
    tl.store(to + 1, gx * (0.5 * (W - 1)), mask=s < S)


# --- Operators ------------------------------------------------------------------------------------


def sample_blocks(per_group: int) -> dict:
    """Constants of the kernels over readings; `per_group` channels."""
    return {"PER": per_group, "BS": SAMPLE_POINTS, "BC": block_side(64, per_group)}


@torch.library.custom_op("dat::sample", mutates_args=())
def sample(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, H, W, C) read at positions (B, G, S, 2), each group its own C / G channels, to (B, S, C).

    Bilinear, zeros outside, in the precision of x. As `ops.sample`.
    """
    x, positions = x.contiguous(), positions.float().contiguous()
    (batch, height, width, channels), (groups, points) = x.shape, positions.shape[1:3]
    out = x.new_empty(batch, points, channels)
    blocks = sample_blocks(channels // groups)
    tiles = triton.cdiv(points, SAMPLE_POINTS), triton.cdiv(channels // groups, blocks["BC"])
    sample_forward[batch * groups, *tiles](
        x, positions, out, height, width, points, groups, **blocks
    )
    return out


@torch.library.custom_op("dat::sample_backward", mutates_args=())
def sample_backward(dout: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and positions from that of the output."""
    dout, x, places = dout.contiguous(), x.contiguous(), positions.float().contiguous()
    (batch, height, width, channels), (groups, points) = x.shape, places.shape[1:3]
    dx, dpositions = torch.empty_like(x), torch.empty_like(places)
    blocks, per_group = sample_blocks(channels // groups), channels // groups
    cells = triton.cdiv(height * width, SAMPLE_CELLS), triton.cdiv(per_group, blocks["BC"])
    sample_map[batch * groups, *cells](
        places, dout, dx, height, width, points, groups,
        BN=SAMPLE_CELLS, IP=precision(is_half(x)), **blocks,
    )  # fmt: skip
    sample_positions[batch * groups, triton.cdiv(points, SAMPLE_POINTS)](
        x, places, dout, dpositions, height, width, points, groups, **blocks
    )
    return dx, dpositions.to(positions.dtype)


# --- What torch needs to know ---------------------------------------------------------------------
# Shapes without values, for torch.compile, and gradients. A gradient of a
# gradient (create_graph=True) is that of the reference.


@sample.register_fake
def _(x, positions):
    return x.new_empty(x.shape[0], positions.shape[2], x.shape[3])


@sample_backward.register_fake
def _(dout, x, positions):
    return x.new_empty(x.shape), positions.new_empty(positions.shape)


def _keep_sample(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _sample_gradients(ctx, dout):
    if torch.is_grad_enabled():
        reference = lambda x, p: ops.sample_by_grid(x, p[:, :, :, None])  # noqa: E731
        return tuple(reference_gradients(reference, ctx.saved_tensors, dout))
    return sample_backward(dout, *ctx.saved_tensors)


sample.register_autograd(_sample_gradients, setup_context=_keep_sample)
