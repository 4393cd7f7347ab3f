"""Deformable attention whose bias is read from the table while it is needed, without a score or a bias in memory.

The forward pass normalises the softmax while it runs (FlashAttention, arXiv 2205.14135) and keeps one number a query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models import ops
from models.fused.common import block_side, is_half, precision, reference_gradients

MAX_SCORES_BYTES = 256 * 2**20  # of the scores' gradient at once; a larger batch is cut into parts

# --- Kernels --------------------------------------------------------------------------------------


@triton.jit
def _read_table(table, y, x, TY: tl.constexpr, TX: tl.constexpr):
    """The bilinear reading of a table at cells (y, x), zeros outside, and its derivatives along y and x."""
    y0, x0 = tl.floor(y), tl.floor(x)
    fy, fx = y - y0, x - x0
    iy = tl.minimum(tl.maximum(y0, -2), TY).to(tl.int32)
    ix = tl.minimum(tl.maximum(x0, -2), TX).to(tl.int32)
    top_in, bottom_in = (iy >= 0) & (iy < TY), (iy >= -1) & (iy < TY - 1)
    left_in, right_in = (ix >= 0) & (ix < TX), (ix >= -1) & (ix < TX - 1)
    cell = table + iy * TX + ix
    t00 = tl.load(cell, mask=top_in & left_in, other=0.0)
    t01 = tl.load(cell + 1, mask=top_in & right_in, other=0.0)
    t10 = tl.load(cell + TX, mask=bottom_in & left_in, other=0.0)
    t11 = tl.load(cell + TX + 1, mask=bottom_in & right_in, other=0.0)
    along_top, along_bottom = t01 - t00, t11 - t10
    top, bottom = t00 + fx * along_top, t10 + fx * along_bottom
    return top + fy * (bottom - top), bottom - top, along_top + fy * (along_bottom - along_top)


@triton.jit
def _cell(query, position, T: tl.constexpr):
    """Half the displacement, in cells of a table of T entries."""
    return (0.5 * (query - position) + 1) * (0.5 * (T - 1))


@triton.jit
def deformable_forward(
    q, kv, table, query, position, z, lse, scale, N, S, M, PER,
    D: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head over all keys; the softmax is normalised while it runs (FlashAttention)."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    image, m = (tl.program_id(0) // M).to(tl.int64), tl.program_id(0) % M
    C, d = M * D, tl.arange(0, D)
    real = n < N
    rows = n[:, None] * C + m * D + d[None, :]
    queries = tl.load(q + image * N * C + rows, mask=real[:, None], other=0.0)
    qy = tl.load(query + 2 * n, mask=real, other=0.0)
    qx = tl.load(query + 2 * n + 1, mask=real, other=0.0)
    position += (image * (M // PER) + m // PER) * S * 2
    table += m * TY * TX
    acc = tl.zeros((BN, D), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    top = tl.full((BN,), -float("inf"), tl.float32)
    for start in range(0, S, BS):
        s = start + tl.arange(0, BS)
        there = s < S
        at = kv + image * S * (2 * C) + s[:, None] * (2 * C) + m * D + d[None, :]
        k = tl.load(at, mask=there[:, None], other=0.0)
        v = tl.load(at + C, mask=there[:, None], other=0.0)
        py = tl.load(position + 2 * s, mask=there, other=0.0)
        px = tl.load(position + 2 * s + 1, mask=there, other=0.0)
        y, x = _cell(qy[:, None], py[None, :], TY), _cell(qx[:, None], px[None, :], TX)
        bias, _, _ = _read_table(table, y, x, TY, TX)
        score = tl.dot(queries, tl.trans(k), input_precision=IP) * scale + bias
        score = tl.where(there[None, :], score, -float("inf"))
        new = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IP)
        top = new
    out = (acc / total[:, None]).to(z.dtype.element_ty)
    tl.store(z + image * N * C + rows, out, mask=real[:, None])
    tl.store(lse + tl.program_id(0).to(tl.int64) * N + n, top + tl.log(total), mask=real)


@triton.jit
def deformable_keys(
    q, kv, table, query, position, dz, lse, delta, dkv, dscores, dposition, scale, N, S, M, PER,
    D: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """A block of keys of one head over all queries: its dk, dv, dposition, and the scores' gradient (B · M, S, N)."""
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    bm = tl.program_id(0).to(tl.int64)
    image, m = bm // M, tl.program_id(0) % M
    C, d = M * D, tl.arange(0, D)
    there = s < S
    rows = image * S * (2 * C) + s[:, None] * (2 * C) + m * D + d[None, :]
    k = tl.load(kv + rows, mask=there[:, None], other=0.0)
    v = tl.load(kv + rows + C, mask=there[:, None], other=0.0)
    position += (image * (M // PER) + m // PER) * S * 2
    py = tl.load(position + 2 * s, mask=there, other=0.0)
    px = tl.load(position + 2 * s + 1, mask=there, other=0.0)
    table += m * TY * TX
    dk, dv = tl.zeros((BS, D), tl.float32), tl.zeros((BS, D), tl.float32)
    dy, dx = tl.zeros((BS,), tl.float32), tl.zeros((BS,), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        real = n < N
        at = image * N * C + n[:, None] * C + m * D + d[None, :]
        queries = tl.load(q + at, mask=real[:, None], other=0.0)
        g = tl.load(dz + at, mask=real[:, None], other=0.0)
        norm = tl.load(lse + bm * N + n, mask=real, other=float("inf"))  # exp(score − ∞) = 0
        mean = tl.load(delta + bm * N + n, mask=real, other=0.0)
        qy = tl.load(query + 2 * n, mask=real, other=0.0)
        qx = tl.load(query + 2 * n + 1, mask=real, other=0.0)
        y, x = _cell(qy[None, :], py[:, None], TY), _cell(qx[None, :], px[:, None], TX)
        bias, along_y, along_x = _read_table(table, y, x, TY, TX)
        p = tl.dot(k, tl.trans(queries), input_precision=IP) * scale + bias
        p = tl.exp(p - norm[None, :])
        dv += tl.dot(p.to(g.dtype), g, input_precision=IP)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=IP) - mean[None, :])
        dk += tl.dot(ds.to(queries.dtype), queries, input_precision=IP)
        dy += tl.sum(ds * along_y, 1)
        dx += tl.sum(ds * along_x, 1)
        at = dscores + (bm * S + s)[:, None] * N + n[None, :]
        tl.store(at, ds.to(dscores.dtype.element_ty), mask=there[:, None] & real[None, :])
    tl.store(dkv + rows, (dk * scale).to(dkv.dtype.element_ty), mask=there[:, None])
    tl.store(dkv + rows + C, dv.to(dkv.dtype.element_ty), mask=there[:, None])
    tl.store(dposition + (bm * S + s) * 2, dy * (-0.25 * (TY - 1)), mask=there)
    tl.store(dposition + (bm * S + s) * 2 + 1, dx * (-0.25 * (TX - 1)), mask=there)


@triton.jit
def deformable_queries(
    kv, dscores, dq, scale, N, S, M,
    D: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: dq = scale · Σ over the keys of dscores · k."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    bm = tl.program_id(0).to(tl.int64)
    image, m = bm // M, tl.program_id(0) % M
    C, d = M * D, tl.arange(0, D)
    real = n < N
    acc = tl.zeros((BN, D), tl.float32)
    for start in range(0, S, BS):
        s = start + tl.arange(0, BS)
        there = s < S
        at = kv + image * S * (2 * C) + s[:, None] * (2 * C) + m * D + d[None, :]
        k = tl.load(at, mask=there[:, None], other=0.0)
        at = dscores + (bm * S + s)[:, None] * N + n[None, :]
        ds = tl.load(at, mask=there[:, None] & real[None, :], other=0.0)
        acc += tl.dot(tl.trans(ds).to(k.dtype), k, input_precision=IP)
    at = dq + image * N * C + n[:, None] * C + m * D + d[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=real[:, None])


@triton.jit
def deformable_table(
    dscores, query, position, dtable, B, S, M, PER, PARTS, H, W,
    TY: tl.constexpr, TX: tl.constexpr, AY: tl.constexpr, AX: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """AY × AX entries of one head's table, every PARTS-th key of all images.

    A bilinear read is a product with two hats, hat(t) = max(0, 1 − |t|), so its gradient is a sum over the keys of
    hatᵧᵀ · dscores · hatₓ.
    """
    m, part = tl.program_id(0), tl.program_id(1)
    a0 = tl.program_id(2) // tl.cdiv(TX, AX) * AY
    b0 = tl.program_id(2) % tl.cdiv(TX, AX) * AX
    a, b = a0 + tl.arange(0, AY), b0 + tl.arange(0, AX)
    ty, tx = a.to(tl.float32), b.to(tl.float32)
    acc = tl.zeros((AY, AX), tl.float32)
    for key in range(part, B * S, PARTS):
        image, s = (key // S).to(tl.int64), key % S
        at = position + ((image * (M // PER) + m // PER) * S + s) * 2
        py, px = tl.load(at), tl.load(at + 1)
        scores = dscores + ((image * M + m) * S + s) * (H * W)
        for h0 in range(0, H, BH):
            i = h0 + tl.arange(0, BH)
            y = _cell(tl.load(query + 2 * W * i, mask=i < H, other=0.0), py, TY)
            hat_y = tl.maximum(0.0, 1 - tl.abs(y[None, :] - ty[:, None]))
            for w0 in range(0, W, BW):
                j = w0 + tl.arange(0, BW)
                x = _cell(tl.load(query + 2 * j + 1, mask=j < W, other=0.0), px, TX)
                hat_x = tl.maximum(0.0, 1 - tl.abs(x[:, None] - tx[None, :]))
                inside = (i < H)[:, None] & (j < W)[None, :]
                ds = tl.load(scores + i[:, None] * W + j[None, :], mask=inside, other=0.0)
                ds = tl.dot(ds.to(tl.float32), hat_x, input_precision=IP)
                acc += tl.dot(hat_y, ds, input_precision=IP)
    at = dtable + (part * M + m) * TY * TX + a[:, None] * TX + b[None, :]
    tl.store(at, acc, mask=(a < TY)[:, None] & (b < TX)[None, :])


# --- Operators ------------------------------------------------------------------------------------

# (queries, keys, warps, stages) by kernel, in half and in single precision.
DEFORMABLE_BLOCKS = {
    "forward": ((64, 32, 4, 2), (32, 32, 4, 1)),
    "keys": ((32, 64, 8, 1), (16, 32, 4, 1)),
    "queries": ((64, 64, 4, 2), (32, 32, 4, 1)),
}


def deformable_blocks(kernel: str, queries: int, keys: int, half: bool) -> dict:
    """Constants of one of the kernels over queries and keys."""
    rows, columns, warps, stages = DEFORMABLE_BLOCKS[kernel][0 if half else 1]
    return {
        "BN": block_side(rows, queries),
        "BS": block_side(columns, keys),
        "IP": precision(half),
        "num_warps": warps,
        "num_stages": stages,
    }


def table_blocks(
    table: tuple[int, int], size: tuple[int, int], half: bool
) -> dict:  # the gradient of a bias table
    """Constants of the kernel for the bias table's gradient: AY × AX entries, BH × BW queries at once."""
    side = 64 if half else 32
    return {
        "AY": block_side(side, table[0]),
        "AX": block_side(side, table[1]),
        "BH": block_side(side // 2, size[0]),
        "BW": block_side(side if half else 16, size[1]),
        "IP": precision(half),
        "num_warps": 4,
        "num_stages": 1,
    }


@torch.library.custom_op("dat::deformable_attend", mutates_args=())
def deformable_attend(
    q: Tensor, kv: Tensor, table: Tensor, queries: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(q · kᵀ / √D + bias) · v, whose bias is read from the heads' tables: (B, H, W, C) and (B · M, N).

    q (B, H, W, C), kv (B, S, 2C), table (M, Ty, Tx); queries (H, W, 2) are a lattice, keys are at positions
    (B, G, S, 2). As `ops.attend_at`; DAT, arXiv 2201.00520, eq. 7–10. The second tensor, float32, is the logarithm of
    each softmax's sum, which the backward pass needs.
    """
    q, kv, table, queries, positions = (
        t.contiguous() for t in (q, kv, table.float(), queries.float(), positions.float())
    )
    (batch, height, width, channels), keys = q.shape, kv.shape[1]
    num_heads, rows, columns = table.shape
    number = height * width
    z = torch.empty_like(q)
    lse = torch.empty(batch * num_heads, number, dtype=torch.float32, device=q.device)
    blocks = deformable_blocks("forward", number, keys, is_half(q))
    width_of_head = channels // num_heads
    deformable_forward[batch * num_heads, triton.cdiv(number, blocks["BN"])](
        q, kv, table, queries, positions, z, lse, width_of_head**-0.5, number, keys, num_heads,
        num_heads // positions.shape[1], D=width_of_head, TY=rows, TX=columns, **blocks,
    )  # fmt: skip
    return z, lse


@torch.library.custom_op("dat::deformable_attend_backward", mutates_args=())
def deformable_attend_backward(
    dz: Tensor, q: Tensor, kv: Tensor, table: Tensor, queries: Tensor, positions: Tensor,
    z: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, kv, table and positions from that of the output."""
    num_heads = len(table)
    image_bytes = num_heads * q[0, ..., 0].numel() * kv.shape[1] * q.element_size()
    size = max(1, MAX_SCORES_BYTES // image_bytes)  # by shapes alone, for equal bits on every card
    dq, dkv, dpositions = [], [], []
    dtable = torch.zeros_like(table, dtype=torch.float32)
    single, lattice, lse = table.float().contiguous(), queries.float().contiguous(), lse
    parts = zip(
        *(t.split(size) for t in (dz, q, kv, positions, z)),
        lse.split(size * num_heads),
        strict=True,
    )
    for g, queries_, keys, places, out, norm in parts:
        gradients = _deformable_backward(
            *(t.contiguous() for t in (g, queries_, keys, places.float(), out, norm)),
            single,
            lattice,
        )
        for collected, gradient in zip((dq, dkv, dpositions), gradients, strict=False):
            collected.append(gradient)
        dtable += gradients[3]
    return (
        torch.cat(dq),
        torch.cat(dkv),
        dtable.to(table.dtype),
        torch.cat(dpositions).to(positions.dtype),
    )


def _deformable_backward(
    dz: Tensor, q: Tensor, kv: Tensor, positions: Tensor, z: Tensor, lse: Tensor, table: Tensor,
    queries: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dkv, dpositions and dtable of a part of the batch; everything is contiguous."""
    (batch, height, width, channels), keys = q.shape, kv.shape[1]
    (num_heads, rows, columns), groups = table.shape, positions.shape[1]
    number, head = height * width, channels // num_heads
    scale, per_group, half = head**-0.5, num_heads // groups, is_half(q)
    single = {"dtype": torch.float32, "device": q.device}
    delta = (dz.float() * z).view(batch, number, num_heads, head).sum(-1)
    delta = delta.transpose(1, 2).contiguous()  # (B, M, N)
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    dscores = q.new_empty(batch * num_heads, keys, number)
    dpositions = torch.empty(batch, groups, per_group, keys, 2, **single)

    blocks = deformable_blocks("keys", number, keys, half)
    deformable_keys[batch * num_heads, triton.cdiv(keys, blocks["BS"])](
        q, kv, table, queries, positions, dz, lse, delta, dkv, dscores, dpositions, scale, number,
        keys, num_heads, per_group, D=head, TY=rows, TX=columns, **blocks,
    )  # fmt: skip
    blocks = deformable_blocks("queries", number, keys, half)
    deformable_queries[batch * num_heads, triton.cdiv(number, blocks["BN"])](
        kv, dscores, dq, scale, number, keys, num_heads, D=head, **blocks
    )
    blocks = table_blocks((rows, columns), (height, width), half)
    parts = max(1, min(batch * keys, 1024 // num_heads))
    dtable = torch.empty(parts, *table.shape, **single)
    tiles = triton.cdiv(rows, blocks["AY"]) * triton.cdiv(columns, blocks["AX"])
    deformable_table[num_heads, parts, tiles](
        dscores, queries, positions, dtable, batch, keys, num_heads, per_group, parts, height,
        width, TY=rows, TX=columns, **blocks,
    )  # fmt: skip
    return dq, dkv, dpositions.sum(2), dtable.sum(0)


# --- What torch needs to know ---------------------------------------------------------------------
# Shapes without values, for torch.compile; gradients; multiply-adds, for torch's FlopCounterMode. A gradient of a
# gradient (create_graph=True) is that of the reference.


@deformable_attend.register_fake
def _(q, kv, table, queries, positions):
    rows = q.shape[0] * table.shape[0], q.shape[1] * q.shape[2]
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@deformable_attend_backward.register_fake
def _(dz, q, kv, table, queries, positions, z, lse):
    return tuple(t.new_empty(t.shape) for t in (q, kv, table, positions))


def _keep_deformable(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _deformable_gradients(ctx, dz, _):
    *inputs, z, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        reference = lambda q, *rest: ops.attend_at(q, *rest).view(q.shape)  # noqa: E731
        return tuple(reference_gradients(reference, inputs, dz))
    dq, dkv, dtable, dpositions = deformable_attend_backward(dz, *inputs, z, lse)
    return dq, dkv, dtable, None, dpositions


deformable_attend.register_autograd(_deformable_gradients, setup_context=_keep_deformable)


@register_flop_formula(torch.ops.dat.deformable_attend)
def _(q_shape, kv_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * torch.Size(q_shape).numel() * kv_shape[1]


@register_flop_formula(torch.ops.dat.deformable_attend_backward)
def _(dz_shape, q_shape, kv_shape, *args, out_shape=None, **kwargs) -> int:
    return 10 * torch.Size(q_shape).numel() * kv_shape[1]
