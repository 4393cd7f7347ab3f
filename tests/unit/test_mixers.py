"""The rivals: every spatial mixer against an implementation that is not ours, and in the backbone like any other.

pytest tests/unit/test_mixers.py
"""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features_fx import create_feature_extractor
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.swin_transformer import SwinTransformerBlock

import models
from models.attention import DeformableConvolution, GlobalAttention, WindowAttention
from models.dat import MIXERS
from models.kernels import deform_conv_by_rows
from models.ops import convolve, deform_conv_by_module
from tools.benchmarks.macs import count_macs
from utils.errors import ConfigError

RIVALS = pytest.mark.parametrize("letter", "GPC")


def randomised(layer: torch.nn.Module) -> torch.nn.Module:
    """`layer` in float64 with every parameter drawn again, so that none is hidden by being 0 or 1."""
    torch.manual_seed(0)
    for parameter in layer.double().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def features(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------- against references


def read(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """`image` (…, H, W) at the pixel (y, x), between pixels by bilinear weights, 0 outside."""
    height, width = image.shape[-2:]
    value = torch.zeros_like(image[..., 0, 0])
    for i, j in itertools.product(range(height), range(width)):
        value = value + image[..., i, j] * max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
    return value


def bias_loop(table: torch.Tensor, size: tuple, reduced: tuple) -> torch.Tensor:
    """(M, N, S): the table (M, h, w) read where centres of queries and keys, as shares of the map, differ."""
    rows, columns = ((n - 1) / 2 for n in table.shape[1:])
    bias = []
    for i, j in itertools.product(range(size[0]), range(size[1])):
        for k, m in itertools.product(range(reduced[0]), range(reduced[1])):
            dy = (i + 0.5) / size[0] - (k + 0.5) / reduced[0]
            dx = (j + 0.5) / size[1] - (m + 0.5) / reduced[1]
            bias.append(read(table, rows * (1 + dy), columns * (1 + dx)))
    return torch.stack(bias, dim=-1).unflatten(-1, (size[0] * size[1], -1))


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """(B, …, C) to (B, M, N, D)."""
    return x.flatten(1, -2).unflatten(-1, (count, -1)).transpose(1, 2)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 4), (6, 3)])
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_global_and_reduced_attention_equal_torch(size, reduction):
    layer = randomised(GlobalAttention(8, 2, (4, 4), reduction))
    x = features(2, *size, 8)
    source = x
    if reduction > 1:
        conv, norm = layer.reduce
        missing = [-n % reduction for n in size]
        image = F.pad(x.permute(0, 3, 1, 2), (0, missing[1], 0, missing[0]))
        image = F.conv2d(image, conv.weight, conv.bias, stride=reduction)
        source = F.layer_norm(image.permute(0, 2, 3, 1), (8,), norm.weight, norm.bias)
    bias = bias_loop(layer.rpe_table, size, source.shape[1:3])
    k, v = layer.kv(source).chunk(2, dim=-1)
    q, k, v = (heads(t, 2) for t in (layer.q(x), k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    expected = layer.proj(expected.transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)  # coordinates are float32


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_reduced_attention_without_bias_equals_timms_pvt(reduction):
    layer = randomised(GlobalAttention(8, 2, (8, 8), reduction))
    torch.nn.init.zeros_(layer.rpe_table)
    reference = PVTAttention(8, 2, reduction).double()
    state = {
        name.replace("reduce.0", "sr").replace("reduce.1", "norm"): value
        for name, value in layer.state_dict().items()
        if name != "rpe_table"
    }
    reference.load_state_dict(state)
    x = features(2, 8, 4, 8)
    torch.testing.assert_close(layer(x), reference(x.flatten(1, 2), (8, 4)).view(x.shape))


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (12, 8)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_equal_timms_swin(shifted, size):
    layer = randomised(WindowAttention(8, 2, 4, shifted))
    reference = SwinTransformerBlock(8, size, 2, window_size=4, shift_size=layer.shift_size)
    reference.double().attn.load_state_dict(layer.state_dict())
    x = features(2, *size, 8)
    torch.testing.assert_close(layer(x), reference._attn(x))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 4), (6, 3)])
@pytest.mark.parametrize(("num_heads", "groups"), [(1, 1), (4, 1), (4, 2), (2, 2)])
def test_deformable_convolution_equals_nine_bilinear_readings(num_heads, groups, size):
    """The layer reads rows; here `grid_sample` reads and one product per tap sums. Torchvision's agrees with both."""
    layer = randomised(DeformableConvolution(8, num_heads, groups))
    x = features(2, *size, 8)
    theta = convolve(layer.positions, x)
    offsets = theta[..., : 18 * groups].unflatten(-1, (groups, 9, 2))
    masks = theta[..., 18 * groups :].unflatten(-1, (groups, 9)).sigmoid()
    cell = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"), dim=-1)
    extent = torch.tensor(size)
    # Inside one pixel of zeros: maps of 1 need an extent.
    image = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1))
    out = torch.zeros_like(x)
    for tap in range(9):
        read = []
        for group, part in enumerate(image.chunk(groups, dim=1)):
            pixel = cell + torch.tensor([tap // 3 - 1, tap % 3 - 1]) + offsets[..., group, tap, :]
            points = (pixel + 1) / (extent + 1) * 2 - 1
            value = F.grid_sample(part, points.flip(-1), align_corners=True)
            read.append(value * masks[:, None, ..., group, tap])
        kernel = layer.conv.weight[:, :, tap // 3, tap % 3, None, None]
        out = out + F.conv2d(torch.cat(read, 1), kernel, groups=num_heads).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.proj(out + layer.conv.bias))
    parts = theta[..., : 18 * groups], masks.flatten(-2)
    one, other = (f(layer.conv, x, *parts) for f in (deform_conv_by_rows, deform_conv_by_module))
    torch.testing.assert_close(one, other)


def test_deformable_convolution_begins_as_half_a_convolution():
    layer = DeformableConvolution(8, 2, 2)
    x = torch.randn(2, 5, 7, 8)
    plain = F.conv2d(x.permute(0, 3, 1, 2), layer.conv.weight, padding=1, groups=2)
    expected = layer.proj(0.5 * plain.permute(0, 2, 3, 1) + layer.conv.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "layer",
    [
        GlobalAttention(4, 2, (3, 4)),
        GlobalAttention(4, 2, (3, 4), reduction=2),
        DeformableConvolution(4, 2, 2),
    ],
    ids=["G", "P", "C"],
)
def test_gradients_are_the_derivatives(layer):
    randomised(layer)
    x = features(1, 4, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-4)


# --------------------------------------------------------------------------------- in the backbone


def micro(letter: str, **kwargs) -> torch.nn.Module:
    """dat_micro of one block per stage; nothing in it is 0, so that everything has a gradient."""
    torch.manual_seed(0)
    model = timm.create_model("dat_micro", stages=(letter,) * 4, **kwargs).eval()
    for name, parameter in model.named_parameters():
        if "positions" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@RIVALS
@pytest.mark.parametrize("size", [(1, 1), (31, 97), (32, 32)])
def test_any_size_at_any_call(letter, size):
    model = micro(letter)
    images = torch.randn(2, 3, *size, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.isfinite().all()
    assert all(p.grad is not None for p in model.parameters())


@RIVALS
def test_tracing_and_half_precision(letter):
    model = micro(letter)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    assert create_feature_extractor(model, {"stages.1": "x"})(images)["x"].shape == (2, 8, 8, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("letter", MIXERS)
def test_blocks_differ_in_the_mixer_alone(letter):
    shapes = {n: p.shape for n, p in micro(letter).named_parameters() if ".attn." not in n}
    assert shapes == {n: p.shape for n, p in micro("L").named_parameters() if ".attn." not in n}


def test_reductions_are_set_by_stage():
    with torch.device("meta"):
        model = timm.create_model("dat_micro", stages=("P",) * 4, sr_ratios=(4, 2, 2, 1))
    kernels = [getattr(s.blocks[0].attn.reduce, "0", None) for s in model.stages]
    assert [conv and conv.kernel_size for conv in kernels] == [(4, 4), (2, 2), (2, 2), None]


def test_macs_of_a_deformable_convolution_are_those_of_a_convolution():
    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = DeformableConvolution(8, 2, 1)

        def forward(self, x):
            return self.layer(x.permute(0, 2, 3, 1))

    positions, convolution, projection = 9 * 8 * 27, 9 * 8 * 8 // 2, 8 * 8
    expected = 5 * 7 * (positions + convolution + projection)
    assert count_macs(Images(), 5, 7, in_chans=8) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"stages": ("GX", "G", "G", "G")}, "'X'.* L S N D G P C"),
        ({"stages": ("C",) * 4, "offset_groups": (1, 1, 3, 4)}, "3 groups do not divide 4 heads"),
        ({"stages": ("P",) * 4, "sr_ratios": (8, 4)}, "one entry per stage"),
    ],
)
def test_impossible_layouts_are_refused(args, message):
    with pytest.raises(ConfigError, match=message):
        models.build("dat_micro", num_classes=5, img_size=32, drop_path_rate=0.0, **args)
