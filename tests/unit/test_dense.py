"""Dense tasks: scenes, backbones in detectors and segmenters, freezing, layer decay, detectors' checkpoints, training.

pytest tests/unit/test_dense.py
"""

import copy
import json
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.images import write_image_folder
from torch import nn

from engine.pretrained import load_pretrained
from models.convert import to_official
from models.dense import BackboneWithFPN, freeze_stages, parameter_groups
from tools import dense
from tools.benchmarks.macs import count_macs
from tools.common.scenes import CLASSES, Scenes
from utils.errors import CheckpointError, ConfigError

# All mixers of each paper in a block a stage, with four channels a head.
SMALL = {
    "dat": ("dat_tiny", {"stages": ("L", "S", "D", "D"), "dims": (12, 24, 48, 96)}),
    "dat++": ("dat_pp_nano", {"stages": ("N", "D", "N", "D"), "dims": (8, 16, 32, 64)}),
}
BOTH = pytest.mark.parametrize("architecture", SMALL.values(), ids=SMALL)
SIZES = [(64, 96), (75, 53), (33, 130)]


def small_features(architecture: tuple[str, dict], **kwargs) -> nn.Module:
    torch.manual_seed(0)
    name, arguments = architecture
    return timm.create_model(name, features_only=True, **arguments, **kwargs)


@pytest.fixture
def small_build(monkeypatch) -> None:
    """The tool takes "dat" and "dat++" for small models."""
    monkeypatch.setattr(dense, "timm_name", lambda backbone: copy.deepcopy(SMALL[backbone]))


# --- Scenes ---------------------------------------------------------------------------------------


def test_scenes_are_functions_of_seed_split_and_index():
    scenes = Scenes("train", 96, 40, data_path=None, seed=0)
    again = Scenes("train", 96, 40, data_path=None, seed=0)
    for index in (7, 3):
        assert all(torch.equal(a, b) for a, b in zip(scenes[index], again[index], strict=True))
    others = [
        Scenes(split, 96, 1, data_path=None, seed=seed)[0].image
        for split, seed in (("train", 0), ("train", 1), ("val", 0))
    ]
    assert not any(torch.equal(a, b) for a, b in zip(others, others[1:] + others[:1], strict=True))
    with pytest.raises(IndexError):
        scenes[40]


def test_boxes_are_the_narrowest_around_the_pixels_of_a_digit():
    scenes = Scenes("val", 96, 60, data_path=None, seed=3)
    seen, numbers = set(), set()
    for image, boxes, labels, mask in scenes:
        assert image.dtype == torch.uint8
        assert image.shape == (3, 96, 96)
        rest = mask.clone()
        for (left, top, right, bottom), label in zip(boxes.int().tolist(), labels, strict=True):
            inside = mask[top:bottom, left:right] == label
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            rest[top:bottom, left:right] = 0
        assert not rest.any()
        seen |= set(mask.unique().tolist())
        numbers.add(len(boxes))
    assert seen == set(range(len(CLASSES)))
    assert numbers == {1, 2, 3, 4}


def test_photographs_of_a_folder_are_behind_the_digits(tmp_path):
    write_image_folder(tmp_path, classes=2, train=1, val=1)
    for split, other in (("train", "val"), ("val", "train")):
        scene = Scenes(split, 64, 1, data_path=tmp_path, seed=0)[0]
        behind = scene.image[:, scene.mask == 0].float()
        assert behind.std() > 5  # the noise of these images
        (tmp_path / other).rename(tmp_path / "elsewhere")
        assert torch.equal(Scenes(split, 64, 1, data_path=tmp_path, seed=0)[0].image, scene.image)
        (tmp_path / "elsewhere").rename(tmp_path / other)


# --- Sizes and padding ----------------------------------------------------------------------------


@BOTH
def test_maps_have_the_strides_of_a_pyramid_at_any_size(architecture):
    pyramid = BackboneWithFPN(small_features(architecture), 16).eval()
    for height, width in SIZES:
        maps = pyramid(torch.randn(2, 3, height, width))
        expected = {
            name: (2, 16, math.ceil(height / stride), math.ceil(width / stride))
            for name, stride in zip("0123", (4, 8, 16, 32), strict=True)
        }
        assert {name: tuple(maps[name].shape) for name in expected} == expected
        assert list(maps) == [*expected, "pool"]
        assert all(x.isfinite().all() for x in maps.values())


@pytest.mark.parametrize("backbone", SMALL)
def test_a_detector_pads_images_of_any_size_and_trains(backbone, small_build):
    detector, features = dense.build_detector(backbone, 64)
    sizes = []
    features.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    images = [torch.rand(3, 75, 53), torch.rand(3, 41, 64)]
    targets = [
        {"boxes": torch.tensor([[5.0, 6.0, 40.0, 38.0]]), "labels": torch.tensor([digit])}
        for digit in (1, 10)
    ]
    losses = detector(images, targets)
    sum(losses.values()).backward()
    assert sizes == [(2, 3, 64, 64)]  # both shrunk to at most 64 pixels, then padded
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.any() for p in features.parameters())
    found = detector.eval()(images)
    assert all(prediction.keys() == {"boxes", "labels", "scores"} for prediction in found)


@pytest.mark.parametrize("backbone", SMALL)
def test_a_segmenter_has_logits_for_every_pixel_and_trains(backbone, small_build):
    pytest.importorskip("segmentation_models_pytorch")
    segmenter, features = dense.build_segmenter(backbone, 64)
    logits = segmenter(torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, len(CLASSES), 64, 96)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in features.parameters())


# --- Freezing -------------------------------------------------------------------------------------


@BOTH
def test_frozen_stages_have_no_gradient_and_no_stochastic_depth(architecture):
    pyramid = BackboneWithFPN(small_features(architecture, drop_path_rate=0.9), 16)
    backbone = pyramid.features.model
    freeze_stages(backbone, 2)
    for model in (pyramid, copy.deepcopy(pyramid), pickle.loads(pickle.dumps(pyramid))):
        modules = dict(model.features.model.named_modules())
        frozen = [m for n, m in modules.items() if n.startswith(("stem", "stages.0", "stages.1"))]
        model.eval()
        assert not any(m.training for m in model.modules())
        model.train()
        assert not any(m.training for m in frozen)
        assert model.features.model.stages[2].blocks[0].drop_path.training
        images = torch.randn(4, 3, 64, 64)
        (a, b, c, d), (e, f, g, h) = model.features(images), model.features(images)
        assert torch.equal(a, e)
        assert torch.equal(b, f)
        assert not torch.equal(c, g)
        assert not torch.equal(d, h)
        sum(x.sum() for x in model(images).values()).backward()
        with_gradient = {
            n for n, p in model.features.model.named_parameters() if p.grad is not None
        }
        assert with_gradient
        assert all(n.startswith(("stages.2", "stages.3")) for n in with_gradient)


def test_zero_frozen_stages_freeze_the_stem():
    backbone = small_features(SMALL["dat"]).model
    freeze_stages(backbone, 0)
    frozen = {n.partition(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"stem"}
    for count in (-1, 4):
        with pytest.raises(ConfigError, match=f"{count} frozen stages: expected 0.*to 3"):
            freeze_stages(backbone, count)


# --- Layer decay ----------------------------------------------------------------------------------


@BOTH
def test_learning_rates_decay_from_the_head_to_the_stem(architecture):
    pyramid = BackboneWithFPN(small_features(architecture), 16)
    backbone = pyramid.features.model
    freeze_stages(backbone, 0)
    groups = parameter_groups(pyramid, backbone, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    of = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert of.keys() == {p for p in pyramid.parameters() if p.requires_grad}
    blocks = [block for stage in backbone.stages for block in stage.blocks]
    rates = [{of[p]["lr"] for p in block.parameters()} for block in blocks]
    assert rates == [{0.5 ** (len(blocks) - i)} for i in range(len(blocks))]
    assert {of[p]["lr"] for p in [*pyramid.norms.parameters(), *pyramid.fpn.parameters()]} == {1.0}
    free = {
        name for name, p in pyramid.named_parameters() if p in of and of[p]["weight_decay"] == 0
    }
    assert free == {
        name
        for name, p in pyramid.named_parameters()
        if p in of and (p.ndim == 1 or name.endswith(("bias_table", "rpe_table")))
    }


def test_swin_takes_the_same():
    kwargs = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 64}
    features = timm.create_model(
        "swin_tiny_patch4_window7_224",
        features_only=True,
        feature_cls="getter",
        strict_img_size=False,
        **kwargs,
    )
    pyramid, backbone = BackboneWithFPN(features, 16), features.model
    freeze_stages(backbone, 1)
    groups = parameter_groups(pyramid, backbone, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {1, 0.5, 0.25, 0.125}
    assert not backbone.layers[0].train().training
    assert pyramid(torch.randn(1, 3, 64, 96))["3"].shape == (1, 16, 2, 3)


def test_a_backbone_without_layers_is_refused_unless_none_decay():
    """timm takes a Swin apart when it is not asked for the getter."""
    kwargs = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": 64}
    features = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **kwargs)
    (group, *rest) = parameter_groups(features, features, lr=1.0, weight_decay=0.1, layer_decay=1)
    assert {g["lr"] for g in (group, *rest)} == {1.0}
    for call in (
        lambda: parameter_groups(features, features, lr=1.0, weight_decay=0.1, layer_decay=0.9),
        lambda: freeze_stages(features, 1),
    ):
        with pytest.raises(ConfigError, match="FeatureListNet does not say which its layers are"):
            call()
    with pytest.raises(ConfigError, match=r"features are NHWC, expected NCHW: .*getter"):
        BackboneWithFPN(features)


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True], ids=["ours", "released"])
@BOTH
def test_a_detectors_checkpoint_fills_the_backbone_exactly(architecture, released, tmp_path):
    source, target = small_features(architecture).model, small_features(architecture).model
    torch.manual_seed(1)
    expected = {name: torch.randn_like(t) for name, t in source.state_dict().items()}
    state = to_official(expected, source) if released else expected
    file = {f"backbone.{name}": t for name, t in state.items()}
    file |= {
        "neck.lateral_convs.0.conv.weight": torch.ones(3),
        "rpn_head.rpn_cls.bias": torch.ones(3),
    }
    torch.save({"meta": {"epoch": 12}, "state_dict": file}, tmp_path / "detector.pth")
    report = load_pretrained(target, tmp_path / "detector.pth", strict=False)
    assert report.matched == list(expected)
    assert all(torch.equal(t, expected[name]) for name, t in target.state_dict().items())
    # The same by timm's own way.
    name, arguments = architecture
    other = timm.create_model(
        name,
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "detector.pth")},
        **arguments,
    ).model
    assert all(torch.equal(t, expected[name]) for name, t in other.state_dict().items())
    del file[next(name for name in file if "stages.2" in name)]
    torch.save({"state_dict": file}, tmp_path / "incomplete.pth")
    with pytest.raises(CheckpointError, match="1 missing"):
        load_pretrained(target, tmp_path / "incomplete.pth", strict=False)


# --- The tool -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "100"], "--size 100: expected a multiple of 32"),
        (
            ["--backbones", "dat_pp_nano", "swin_nano", "--pretrained", "x.pth"],
            "is for one backbone",
        ),
        (["--backbones", "dat_nano"], "there is no model 'dat_nano'; did you mean"),
        (["--backbones", "swin_nano", "--layer-decay", "0.9"], "does not say which its layers are"),
    ],
)
def test_what_cannot_be_trained_is_refused(flags, words, capsys):
    pytest.importorskip("segmentation_models_pytorch")
    arguments = ["segment", "--backbones", "dat_micro", "--steps", "1", *flags]
    assert dense.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(dense.PACKAGES, "detect", ("torchmetrics", "no_such_package"))
    assert dense.main(["detect", "--backbones", "dat_micro"]) == 2
    message = (
        "needs no_such_package, which is not installed: pip install torchmetrics no-such-package"
    )
    assert message in capsys.readouterr().err


def test_mean_iou_counts_pixels_of_all_scenes():
    """A segmenter that calls everything in the left half of an image background, and is right in the other."""
    scenes = Scenes("val", 64, 24, data_path=None, seed=0)
    masks = torch.stack([scene.mask for scene in scenes])
    answer = masks.clone()
    answer[..., :32] = 0
    batches = iter(F.one_hot(answer, len(CLASSES)).permute(0, 3, 1, 2).split(2))
    found = dense.evaluate_segmenter(lambda images: next(batches), dense.batches_of(scenes, 2))
    background = ((masks == 0).sum() / (answer == 0).sum()).item()
    digits = [((answer == k).sum() / (masks == k).sum()).item() for k in range(1, len(CLASSES))]
    assert 0 < sum(digits) < 9
    assert found["mIoU of digits"] == pytest.approx(100 * sum(digits) / 10)
    assert found["mIoU"] == pytest.approx(100 * (background + sum(digits)) / 11)


@pytest.mark.parametrize(("shift", "accuracy"), [(0, 100), (1, 0)])
def test_map_counts_digits_that_are_found_with_their_label(shift, accuracy):
    pytest.importorskip("pycocotools")
    scenes = Scenes("val", 64, 4, data_path=None, seed=0)
    answers = iter(
        [
            {
                "boxes": scene.boxes,
                "labels": (scene.labels - 1 + shift) % 10 + 1,
                "scores": torch.ones(len(scene.labels)),
            }
            for scene in batch
        ]
        for batch in dense.batches_of(scenes, 2)
    )
    found = dense.evaluate_detector(lambda images: next(answers), dense.batches_of(scenes, 2))
    assert found == pytest.approx({"mAP": accuracy, "mAP50": accuracy})


def test_the_two_backbones_that_are_compared_cost_the_same():
    costs = []
    for name in ("dat_pp_nano", "swin_nano"):
        with torch.device("meta"):
            name, arguments = dense.timm_name(name)
            features = timm.create_model(
                name, features_only=True, feature_cls="getter", **arguments
            )
        costs.append(
            (sum(p.numel() for p in features.parameters()), count_macs(features, 128, 128))
        )
    assert costs[1] == pytest.approx(costs[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("task", dense.TASKS)
def test_training_learns(task, small_build, tmp_path, capsys):
    for package in dense.PACKAGES[task]:
        pytest.importorskip(package)
    arguments = [task, "--backbones", "dat", "dat++", "--size", "64", "--steps", "60"]
    arguments += ["--batch", "4", "--val-scenes", "8", "--json", str(tmp_path / "r.json")]
    assert dense.main(arguments) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    assert [result["backbone"] for result in content["results"]] == ["dat", "dat++"]
    for result in content["results"]:
        losses = result["losses"]
        assert len(losses) == 60
        assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert "| dat++ | random |" in capsys.readouterr().out
