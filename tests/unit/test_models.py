"""Models: shapes, sizes and initial values, the mixers against loops, any input size, checkpointing, names.

pytest tests/unit/test_models.py
"""

import copy
import itertools
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import models
from models.attention import (
    DATGeometry,
    DATPlusPlusGeometry,
    DeformableAttention,
    NeighborhoodAttention,
    WindowAttention,
)
from models.cache import window_mask
from models.convert import checkpoint_filter_fn, from_official, to_official
from tools.benchmarks.macs import count_macs
from utils.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
PLUS_PLUS = {
    "plus_plus": True,
    "stages": ("ND", "ND", "NDND", "DD"),
    "offset_strides": (4, 2, 1, 1),
}
BOTH = pytest.mark.parametrize("architecture", [{}, PLUS_PLUS], ids=["dat", "dat++"])
# Parameters and GMACs of reference.md.
SIZES = {
    "dat_tiny": (28_319_138, 4.563),
    "dat_small": (49_700_402, 8.959),
    "dat_base": (87_881_632, 15.721),
    "dat_base_384": (88_178_272, 49.450),
    "dat_pp_tiny": (23_962_876, 4.259),
    "dat_pp_small": (53_127_366, 9.382),
    "dat_pp_base": (93_690_640, 16.502),
    "dat_pp_base_384": (93_690_640, 49.502),
}


def micro(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dat_micro", **kwargs).eval()


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_macs_are_the_published_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"][1]
    parameters, gmacs = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    if "tiny" in name or "384" in name:  # the others differ from these in width and depth only
        assert count_macs(model, size, size) / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "millions", "keys"),
    [
        ("dat_micro", 2.7, {1: 8, 2: 4, 3: 2}),
        ("dat_pp_micro", 3.0, {0: 4, 1: 4, 2: 4, 3: 2}),
        ("dat_pp_nano", 7.0, {0: 8, 1: 8, 2: 8, 3: 4}),
    ],
)
def test_sizes_of_this_project_are_small_and_deformable(name, millions, keys):
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    samplings = model.sampling_positions(torch.zeros(1, *model.pretrained_cfg["input_size"]))
    assert {s.stage: s.positions.shape[2] for s in samplings} == keys


@BOTH
def test_initial_values_are_the_released_ones(architecture):
    for name, value in micro(**architecture).named_parameters():
        if name.endswith(("bias_table", "rpe_table")):
            assert value.std().item() == pytest.approx(0.01, rel=0.3), name
        elif name.endswith("rpb"):
            assert value.std().item() == pytest.approx(0.02, rel=0.3), name
        elif value.ndim > 1:  # PyTorch's default: uniform within 1 / √fan-in
            assert value.abs().max() <= value[0].numel() ** -0.5, name
            assert value.std().item() == pytest.approx((3 * value[0].numel()) ** -0.5, rel=0.2), (
                name
            )
        elif "norm" in name:
            assert value.unique().tolist() == [float(name.endswith("weight"))], name


# -------------------------------------------------------------------------------------------- mixers


def neighbourhood_loop(layer: NeighborhoodAttention, x: torch.Tensor) -> torch.Tensor:
    """The definition, query by query."""
    batch, height, width, channels = x.shape
    heads, w = layer.num_heads, layer.window_size
    qkv = layer.qkv(x).view(batch, height, width, 3, heads, -1)
    q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
    rows, columns = min(w, height), min(w, width)
    out = torch.zeros_like(x).view(batch, height, width, heads, -1)
    for i, j in itertools.product(range(height), range(width)):
        top = min(max(i - w // 2, 0), height - rows)
        left = min(max(j - w // 2, 0), width - columns)
        window = slice(top, top + rows), slice(left, left + columns)
        keys, values = (t[:, :, window[0], window[1]].flatten(2, 3) for t in (k, v))
        a, b = top - i + w - 1, left - j + w - 1
        bias = layer.rpb[:, a : a + rows, b : b + columns].flatten(1)
        scores = (q[:, :, i, j, None] * keys).sum(-1) * (channels // heads) ** -0.5 + bias
        out[:, i, j] = (scores.softmax(-1)[..., None] * values).sum(2)
    return layer.proj(out.flatten(3))


def window_loop(layer: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """The definition without shift, window by window, on the real positions only."""
    heads, w = layer.num_heads, layer.window_size
    out = torch.zeros_like(x)
    table = layer.relative_position_bias_table
    for top, left in itertools.product(range(0, x.shape[1], w), range(0, x.shape[2], w)):
        part = x[:, top : top + w, left : left + w]
        cells = list(itertools.product(range(part.shape[1]), range(part.shape[2])))
        index = [
            [(a - c + w - 1) * (2 * w - 1) + b - d + w - 1 for c, d in cells] for a, b in cells
        ]
        qkv = layer.qkv(part.flatten(1, 2)).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        z = (scores + table[torch.tensor(index)].permute(2, 0, 1)).softmax(-1) @ v
        z = layer.proj(z.transpose(1, 2).flatten(2))
        out[:, top : top + w, left : left + w] = z.unflatten(1, part.shape[1:3])
    return out


MAPS = [(7, 7), (1, 1), (2, 5), (4, 9), (13, 8), (3, 15)]


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize(
    ("kind", "loop"),
    [(NeighborhoodAttention, neighbourhood_loop), (WindowAttention, window_loop)],
)
def test_attention_equals_its_definition_on_any_map(kind, loop, size):
    torch.manual_seed(0)
    layer = kind(8, 2, 5).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, *size, 8, dtype=torch.double, requires_grad=True)
    fast, slow = layer(x), loop(layer, x)
    weight = torch.randn_like(fast)
    torch.testing.assert_close(fast, slow)
    inputs = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, inputs, weight) for y in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "layer",
    [
        NeighborhoodAttention(4, 2, 3),
        WindowAttention(4, 2, 3, shifted=True),
        DeformableAttention(4, 2, 2, 3, 1, (3, 4), DATGeometry),
        DeformableAttention(4, 2, 2, 3, 2, (3, 4), DATPlusPlusGeometry),
    ],
    ids=["N", "S", "D", "D++"],
)
def test_gradients_are_the_derivatives(layer):
    torch.manual_seed(0)
    layer.double()
    x = torch.randn(1, 4, 5, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-4)


def test_shifted_windows_separate_what_only_the_roll_joined():
    mask = window_mask((10, 10), (5, 5), (3, 3), torch.device("cpu"))  # (4 windows, 25, 25)
    assert mask[0].eq(0).all()
    # The last window holds rows and columns 8, 9 | 0, 1, 2 of the map: four corners of it, kept apart.
    corner = torch.tensor([[2 * (i > 1) + (j > 1) for j in range(5)] for i in range(5)]).flatten()
    assert torch.equal(mask[3] == -100, corner[:, None] != corner)


@pytest.mark.parametrize("shifted", [False, True])
def test_padding_is_never_attended_to(shifted):
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, 5, shifted)
    torch.nn.init.constant_(layer.qkv.bias, 30.0)  # padded keys would win every softmax
    x = torch.randn(1, 7, 6, 8)
    expected = layer(x)
    layer.qkv.register_forward_pre_hook(lambda module, inputs: (poison(inputs[0], shifted),))
    torch.testing.assert_close(layer(x), expected)


def poison(x: torch.Tensor, shifted: bool) -> torch.Tensor:
    """A map `x` (10 · 10, C), rolled where shifted, with other values in its padding (rows from 7, columns from 6)."""
    real = torch.zeros(10, 10, dtype=torch.bool)
    real[:7, :6] = True
    real = real.roll((-3, -3), (0, 1)) if shifted else real
    return torch.where(real.view(-1, 1), x, 100.0)


@BOTH
def test_zero_offsets_read_the_reference_points(architecture):
    model = micro(**architecture)
    for name, value in model.named_parameters():
        if name.endswith("positions.proj.weight"):
            value.data.zero_()
    for sampling in model.sampling_positions(torch.randn(2, 3, 40, 56)):
        reference = sampling.reference.expand_as(sampling.positions)
        torch.testing.assert_close(sampling.positions, reference)
        assert sampling.offset_length().max() == 0


def test_offset_length_is_in_pixels_of_the_image():
    reference = torch.zeros(1, 1, 2)
    # The full width of a map, border centre to centre.
    positions = torch.tensor([[[[[0.0, 2.0]]]]])
    sampling = models.SamplingPoints(2, 1, positions, reference, map_size=(7, 14), reduction=16)
    assert sampling.offset_length().item() == pytest.approx(13 * 16)


# ---------------------------------------------------------------------- other people's modules


class Adapter(torch.nn.Module):
    """What a LoRA or quantisation library puts in a layer's place: it has the layer's call and nothing else of it."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.base = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


ALL_MIXERS = {"stages": ("LS", "ND", "DC", "GP"), "offset_groups": (1, 2, 2, 1)}
EACH_PAPER = pytest.mark.parametrize("plus_plus", [False, True], ids=["dat", "dat++"])


def plain_layers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """Every linear layer and convolution with its parent and its name there."""
    kinds = torch.nn.Linear, torch.nn.Conv2d
    parents = list(model.modules())
    return [(p, n, c) for p in parents for n, c in p.named_children() if isinstance(c, kinds)]


def answer(model: torch.nn.Module) -> list[torch.Tensor]:
    """Logits and gradients."""
    model.zero_grad()
    logits = model(torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1)))
    logits.square().sum().backward()
    return [logits, *(p.grad for p in model.parameters())]


@EACH_PAPER
@pytest.mark.parametrize("replace", [Adapter, copy.deepcopy], ids=["adapter", "equal layer"])
def test_layers_may_be_replaced(replace, plus_plus):
    model = micro(plus_plus=plus_plus, **ALL_MIXERS)
    expected = answer(model)
    for parent, name, layer in plain_layers(model):
        assert type(layer) in (torch.nn.Linear, torch.nn.Conv2d)
        setattr(parent, name, replace(layer))
    torch.testing.assert_close(answer(model), expected)


@EACH_PAPER
def test_hooks_see_every_layer_as_its_class_computes(plus_plus, monkeypatch):
    model = micro(plus_plus=plus_plus, **ALL_MIXERS)
    # Offsets of 0 read at the centres of cells, where the derivative has a kink.
    torch.nn.init.normal_(model.stages[2].blocks[1].attn.positions.weight, std=0.1)
    expected, seen = answer(model), set()
    monkeypatch.setattr("models.chunks.CPU_BYTES", 1)

    def check(module, inputs, output):
        torch.testing.assert_close(type(module).forward(module, *inputs), output)
        seen.add(module)

    layers = [m for m in model.modules() if not list(m.children())]
    for layer in layers:
        layer.register_forward_hook(check)
    torch.testing.assert_close(answer(model), expected)
    assert seen == set(layers)


# ------------------------------------------------------------------------------------- any input


@BOTH
@pytest.mark.parametrize("size", [(1, 1), (31, 97), (45, 33)])
def test_any_size_at_any_call(architecture, size):
    model = micro(**architecture)
    images = torch.randn(2, 3, *size, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.isfinite().all()
    maps = model.forward_intermediates(images, intermediates_only=True)
    expected = [tuple(-(-n // 2 ** (i + 1)) for n in size) for i in range(4)]
    assert [tuple(m.shape[2:]) for m in maps] == expected


@BOTH
def test_tables_follow_the_image_size(architecture):
    model = micro(img_size=(64, 40), **architecture)
    table = model.stages[1].blocks[1].attn.rpe_table
    assert table.shape[1:] == (2 * 16 - 1, 2 * 10 - 1)


def test_the_released_plus_plus_384_keeps_the_table_of_224():
    with torch.device("meta"):
        model = models.build("dat_pp_base_384", num_classes=5, img_size=384, drop_path_rate=0.0)
    assert model.stages[0].blocks[1].attn.rpe_table.shape[1:] == (111, 111)


@BOTH
def test_coordinates_are_float32_under_autocast(architecture):
    model = micro(**architecture)
    images = torch.randn(2, 3, 32, 32)
    layer = model.stages[1].blocks[1].attn.positions
    theta = []
    layer.proj.register_forward_hook(lambda module, inputs, output: theta.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(images)
        sampling = next(s for s in model.sampling_positions(images) if s.stage == 1)
    assert theta[1].dtype == torch.float32
    reference = layer.reference(sampling.positions.shape[2:4])
    exact = layer.geometry.place(reference, theta[1].permute(0, 3, 1, 2, 4))
    assert torch.equal(sampling.positions, exact)
    torch.testing.assert_close(half.float(), model(images), atol=0.03, rtol=0)


# ---------------------------------------------------------------------- export and checkpointing


def test_every_mixer_is_exported():
    model = micro(stages=("NS", "LD", "GP", "C"))
    images = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


@BOTH
def test_checkpointing_changes_no_gradient(architecture):
    images = torch.randn(2, 3, 32, 32)
    model = micro(**architecture).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@BOTH
def test_tables_are_not_decayed_but_rpb_is(architecture):
    model = micro(**architecture)
    tables = {n for n, _ in model.named_parameters() if "table" in n}
    assert model.no_weight_decay() == tables
    assert tables


# ----------------------------------------------------------------------------------- released names


@pytest.mark.parametrize("name", ["dat_tiny", "dat_base_384", "dat_pp_tiny", "dat_pp_base_384"])
def test_released_names_and_shapes(name):
    released = json.loads((GOLDEN / f"{name}.json").read_text())["state_dict"]
    derived_buffers = ("relative_position_index", "attn_mask")
    with torch.device("meta"):
        model = timm.create_model(name)
        ours = {n: list(v.shape) for n, v in to_official(model.state_dict(), model).items()}
    assert ours == {n: shape for n, shape in released.items() if not n.endswith(derived_buffers)}


@BOTH
def test_released_names_round_trip_bit_exact(architecture):
    model = micro(**architecture)
    state = model.state_dict()
    back = from_official(to_official(state, model), model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.backbone."])
def test_wrapped_checkpoints_open(prefix):
    model = micro()
    released = to_official(model.state_dict(), model)
    file = {"model": {prefix + name: value for name, value in released.items()}, "epoch": 3}
    if "backbone" in prefix:
        file["model"]["module.neck.weight"] = torch.zeros(1)
    model.load_state_dict(checkpoint_filter_fn(file, model))


def test_weights_of_the_first_edition_are_read():
    step = GOLDEN / "first_edition/run/checkpoints/step-3"
    weights = load_file(step / "model.safetensors")
    model = micro(
        stages=("N", "PD", "G", "D"),
        dims=(8,) * 4,
        num_heads=(1, 2, 2, 2),
        offset_groups=(1, 1, 2, 2),
        plus_plus=True,
        num_classes=len(weights["head.fc.weight"]),
    )
    assert {n for n in weights if "perception" in n or "displacement" in n}
    model.load_state_dict(checkpoint_filter_fn({"model": weights}, model))


def test_timm_loads_a_released_file(tmp_path):
    model = micro()
    released = {k: v.contiguous() for k, v in to_official(model.state_dict(), model).items()}
    save_file(released, tmp_path / "dat.safetensors")
    overlay = {"file": str(tmp_path / "dat.safetensors")}
    loaded = timm.create_model("dat_micro", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


# -------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"]
)
def test_build_any_timm_model(name):
    with torch.device("meta"):
        model = models.build(name, num_classes=5, img_size=64, drop_path_rate=0.0)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("dat_tinny", {}, "no model 'dat_tinny'; did you mean 'dat_tiny'"),
        ("dat_micro", {"window_sise": 7}, "'window_sise'; did you mean 'window_size'"),
        ("vit_tiny_patch16_224", {"embed_dmi": 8}, "'embed_dmi'; did you mean 'embed_dim'"),
        ("dat_micro", {"stages": ("LX", "L", "L", "L")}, "'X'"),
        ("dat_micro", {"offset_groups": (1, 1, 3, 4)}, "3 groups do not divide 4 heads"),
        ("dat_micro", {"num_heads": (1, 2, 3, 8)}, "3 heads do not divide dim 128"),
        ("dat_micro", {"dims": (32, 64)}, "one entry per stage"),
    ],
)
def test_build_refuses_what_it_does_not_know(name, args, message):
    with pytest.raises(ConfigError, match=message):
        models.build(name, num_classes=5, img_size=32, drop_path_rate=0.0, **args)


def test_unknown_constructor_argument_is_a_type_error():
    with pytest.raises(TypeError, match="depht"):
        timm.create_model("dat_tiny", depht=3)
