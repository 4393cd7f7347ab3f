"""analysis/recording.py: all weights of a model equal the reading by gradients; class gradients; offsets' health.

pytest tests/unit/test_recording.py
"""

import pytest
import timm
import torch
from helpers.attention import record_attention
from helpers.variants import thin

from analysis.class_gradient import class_gradients
from analysis.recording import Points, can_record, measure_points, record
from models.dat import VARIANTS

# Every letter, on maps that are no multiples of windows, and whose last cells are partial.
KINDS = {
    "dat": ({"stages": ("GLS", "PS", "NDC", "LD")}, (40, 56)),
    "dat++": ({"plus_plus": True, "stages": ("ND", "ND", "ND", "DD"), "offset_strides": (4, 2, 1, 1)}, (72, 40)),
}  # fmt: skip
POINTS = [(0.0, 0.0), (0.5, 0.4), (0.99, 0.99), (0.3, 0.9), (0.8, 0.1)]


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with weights so large that attention is far from uniform and offsets are long."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_weights_equal_the_reading_by_gradients(kind):
    architecture, size = KINDS[kind]
    model = noisy(timm.create_model("dat_micro", **architecture))
    images = torch.randn(1, 3, *size)
    recording = record(model, images, heads=True)
    with torch.no_grad():
        torch.testing.assert_close(recording.logits, model(images)[0], atol=1e-4, rtol=1e-4)
    letters = "".join(model.config.stages)
    assert "".join(block.letter for block in recording.blocks) == letters
    for block in recording.blocks:
        torch.testing.assert_close(block.weights.sum(-1), torch.ones(block.weights.shape[:2]))
        for point in POINTS:
            (oracle,) = record_attention(model, images, point, [(block.stage, block.block)])
            found = block.at(oracle.query)
            assert block.key_cell == oracle.key_cell
            difference = (
                (found.weights.flatten(1) - oracle.attention.weights.flatten(1)).abs().max()
            )
            assert difference < 1e-5, (block.name, block.letter, point)
            assert (found.points is None) == (oracle.attention.points is None)
            if found.points is not None:
                torch.testing.assert_close(
                    found.points, oracle.attention.points.flatten(1, 2), atol=1e-4, rtol=0
                )
                torch.testing.assert_close(
                    found.reference, oracle.attention.reference.flatten(0, 1)
                )


def test_the_parts_are_means_over_the_heads_of_a_group():
    model = noisy(timm.create_model("dat_micro", stages=("C", "L", "D", "D")))
    images = torch.randn(1, 3, 32, 32)
    by_head, by_group = record(model, images, heads=True), record(model, images)
    assert [block.parts for block in by_group.blocks] == ["mean", "mean", "group", "group"]
    for all_heads, means in zip(by_head.blocks, by_group.blocks, strict=True):
        expected = all_heads.weights.unflatten(0, (len(means.weights), -1)).mean(1)
        torch.testing.assert_close(means.weights, expected)


def test_the_last_blocks_of_each_kind():
    model = timm.create_model("dat_micro", stages=("LSLS", "L", "LDLD", "D")).eval()
    blocks = record(model, torch.randn(1, 3, 32, 32), last=True).blocks
    assert [block.name for block in blocks] == ["1.3", "1.4", "2.1", "3.3", "3.4", "4.1"]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recorded(name):
    model = thin(name)
    recording = record(model, torch.randn(1, 3, 64, 64))
    assert len(recording.blocks) == sum(len(letters) for letters in model.config.stages)
    for block in recording.blocks:
        torch.testing.assert_close(block.weights.sum(-1), torch.ones(block.weights.shape[:2]))


TIMM = {
    "swin_tiny_patch4_window7_224": {"img_size": 112, "embed_dim": 24, "depths": (2, 2, 2, 2)},
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "pvt_v2_b0": {},
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_attention_is_recorded(name):
    """The recorded weights times the values are what the layer projects."""
    model = noisy(timm.create_model(name, **TIMM[name]))
    size = TIMM[name].get("img_size", 96)
    images = torch.randn(1, 3, size, size)
    projected = {}
    hooks = [
        module.register_forward_hook(lambda m, inputs, output, key=key: projected.update({key: (inputs[0], output)}))
        for key, module in model.named_modules()
        if key.endswith(("attn.proj", "attn.qkv", "attn.kv"))
    ]  # fmt: skip
    recording = record(model, images, heads=True)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(recording.logits, model(images)[0], atol=1e-4, rtol=1e-4)
    for block in recording.blocks:
        sums = block.weights.sum(-1)
        assert (sums <= 1 + 1e-5).all()
        torch.testing.assert_close(1 - sums.min().item(), block.elsewhere, atol=1e-5, rtol=0)
    if name.startswith("pvt"):  # the order of its keys is that of the map
        block = recording.blocks[0]
        value = projected["stages.0.blocks.0.attn.kv"][1][0].chunk(2, -1)[1]
        z = torch.einsum("qs,sd->qd", block.weights[0], value)
        torch.testing.assert_close(z, projected["stages.0.blocks.0.attn.proj"][0][0], atol=1e-4, rtol=1e-3)  # fmt: skip
    if name.startswith(
        "swin"
    ):  # after a shift by 3, the last window has 4 rows and 3 from the other end
        shifted = next(block for block in recording.blocks if block.letter == "S")
        height, width = shifted.map_size
        places = shifted.layout.places((height - 1, width - 1))
        assert {int(p) // width for p in places if p >= 0} == set(range(height - 4, height))


def test_what_cannot_be_recorded_is_known():
    assert not can_record(timm.create_model("resnet18"))
    assert can_record(timm.create_model("dat_micro"))


def test_recording_leaves_the_model_as_it_was():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2).eval()
    before = [block.attn.fused_attn for block in model.blocks]
    record(model, torch.randn(1, 3, 32, 32))
    assert [block.attn.fused_attn for block in model.blocks] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_equal_keys_without_bias_are_read_equally():
    model = timm.create_model("dat_micro", stages=("L", "N", "D", "G")).eval()
    for name, parameter in model.named_parameters():
        if "table" in name or name.endswith("rpb") or ".attn.q" in name or ".attn.kv" in name:
            parameter.data.zero_()
    for block in record(model, torch.randn(1, 3, 64, 64)).blocks:
        positive = block.weights[block.weights > 0]
        torch.testing.assert_close(positive, torch.full_like(positive, positive[0].item()))


def test_the_health_of_points():
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) + 0.5  # a 4 × 4 map's centres
    still = Points((4, 4), grid[None], grid, clamped=False)
    assert measure_points(still, (4, 4), 8) == (0, 0, 1, 0)
    clamped = measure_points(still._replace(clamped=True), (4, 4), 8)
    assert clamped.outside == 12 / 16  # all but the inner four are at the border
    apart = torch.stack([grid, grid + torch.tensor((0.0, 1.0))])
    moved = measure_points(Points((4, 4), apart, grid, clamped=False), (4, 4), 8)
    assert (moved.offset, moved.outside, moved.distance) == (4, 4 / 32, 8)
    one_cell = torch.full((1, 16, 2), 1.5)
    assert (
        measure_points(Points((4, 4), one_cell, grid, clamped=False), (4, 4), 8).coverage == 1 / 16
    )


def test_class_gradients_are_class_activation_maps():
    """The logit of a DAT is the mean of the map before it is rectified, plus the bias."""
    model = noisy(timm.create_model("dat_micro", num_classes=7))
    images = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        features, logits = model.forward_features(images)[0], model(images)[0]
    weight, bias = model.head.fc.weight, model.head.fc.bias
    for index, found in zip((2, 5), class_gradients(model, images, [2, 5]), strict=True):
        whole = features @ weight[index]
        torch.testing.assert_close(whole.mean() + bias[index], logits[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found, whole.relu() / whole.numel(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_have_class_gradients(name):
    model = noisy(timm.create_model(name, **TIMM[name]))
    size = TIMM[name].get("img_size", 96)
    maps = class_gradients(model, torch.randn(1, 3, size, size), [0, 1])
    assert maps.shape[0] == 2
    assert maps.min() >= 0
    assert maps.max() > 0
