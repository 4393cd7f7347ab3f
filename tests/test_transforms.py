"""Transforms and mixing: what timm and torchvision do, nothing else, and posterize's black image."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from data import Normalize, SlotTransform, eval_transform, train_transform
from data.transforms import posterize
from utils.errors import ConfigError
from utils.rng import key, reseed

CPU = torch.device("cpu")
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
).resize((400, 300), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("img_size", "crop_pct", "side"), [(224, 0.875, 256), (224, 0.9, 249), (384, 1.0, 384)]
)
def test_official_protocol_squashes(img_size, crop_pct, side):
    pixels = eval_transform(img_size, protocol="official", crop_pct=crop_pct)(PICTURE)
    squashed = PICTURE.resize((side, side), Image.Resampling.BICUBIC)
    expected = v2.functional.center_crop(pil_to_tensor(squashed), img_size)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(("size", "resized"), [((400, 300), (341, 256)), ((300, 400), (256, 341))])
def test_standard_protocol_keeps_the_aspect_ratio(size, resized):
    picture = PICTURE.resize(size)
    pixels = eval_transform(224, protocol="standard", crop_pct=0.875)(picture)
    shrunk = picture.resize(resized, Image.Resampling.BICUBIC)
    assert torch.equal(pixels, v2.functional.center_crop(pil_to_tensor(shrunk), 224))


def test_unknown_protocol_is_refused():
    with pytest.raises(ConfigError, match="'offical': expected official or standard"):
        eval_transform(224, protocol="offical")


def test_padding_shifts_instead_of_resizing():
    picture = PICTURE.resize((32, 32))
    transform = train_transform(32, padding=4, hflip=0.0, color_jitter=0.0, auto_augment=None)
    border = torch.nn.functional.pad(pil_to_tensor(picture), (4, 4, 4, 4))
    windows = {
        border[:, y : y + 32, x : x + 32].numpy().tobytes() for y in range(9) for x in range(9)
    }
    seen = set()
    for number in range(300):
        reseed(number)
        seen.add(transform(picture).numpy().tobytes())
    assert seen <= windows
    assert len(seen) > 60


def test_posterize_is_timms_and_black_for_no_bits():
    assert posterize(PICTURE, 0).getextrema() == ((0, 0),) * 3
    assert posterize(PICTURE, 0).size == PICTURE.size
    for bits in range(1, 9):
        assert posterize(PICTURE, bits) == auto_augment.posterize(PICTURE, bits)


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m15-mmax15-n3-inc1", "augmix-m9", "v0r"]
)
def test_no_picture_stops_the_augmentation(policy):
    before = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    transform = train_transform(8, auto_augment=policy)
    picture, black = PICTURE.resize((16, 16)), 0
    for number in range(2000 if policy.startswith("rand") else 400):
        reseed(key(0, policy, number))
        black += not transform(picture).any()
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is before, "timm itself is left alone"
    assert black > 0 or not policy.startswith("rand"), "posterize to 0 bits has not been met"


def test_the_distribution_is_that_of_timm_under_pillow_12(monkeypatch):
    def posterize_of_pillow_12(image, bits):
        return image.point([value & ~(2 ** (8 - bits) - 1) for value in range(256)] * 3)

    monkeypatch.setattr(auto_augment.ImageOps, "posterize", posterize_of_pillow_12)
    policy = {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}
    ours = train_transform(8, **policy)
    theirs = create_transform(8, is_training=True, use_prefetcher=True, **policy)
    picture, black = PICTURE.resize((16, 16)), 0
    for number in range(1000):
        reseed(number)
        pixels = ours(picture)
        reseed(number)
        assert torch.equal(theirs(picture), pixels)
        black += not pixels.any()
    assert black > 0, "posterize to 0 bits has not been met"


def batch(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def test_normalize_is_torchvisions():
    images, _ = batch()
    images = images.contiguous(memory_format=torch.channels_last)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = v2.functional.normalize(images / 255, mean, std)
    result = Normalize(mean, std, device=CPU)(images)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.uint8, "the batch itself is left alone"


def test_without_mixing_targets_are_labels():
    images, labels = batch()
    slot = SlotTransform(10, device=CPU)
    inputs, targets = slot(images, labels)
    assert torch.equal(targets, labels)
    assert torch.equal(inputs, slot.normalize(images))


def test_erasing_and_mixing_are_functions_of_the_seed():
    images, labels = batch()
    slot = SlotTransform(10, device=CPU, reprob=1.0, mixup=0.8, cutmix=1.0)
    results = []
    for value in (1, 1, 2):
        reseed(value)
        results.append(slot(images, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    erased = SlotTransform(10, device=CPU, reprob=1.0)(images, labels)[0]
    assert (erased != slot.normalize(images)).flatten(1).any(1).all()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_smoothing_in_the_loss_equals_timms_smoothed_targets(mode):
    slot = SlotTransform(10, device=CPU, mixup=0.8, cutmix=1.0, mixup_mode=mode)
    timm_mix = Mixup(0.8, 1.0, mode=mode, label_smoothing=0.1, num_classes=10)
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    for number in range(20):
        images, labels = batch(number)
        reseed(number)
        inputs, targets = slot(images, labels)
        reseed(number)
        expected_inputs, expected_targets = timm_mix(slot.normalize(images), labels)
        assert torch.equal(inputs, expected_inputs)
        loss = cross_entropy(logits, targets, label_smoothing=0.1)
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, expected_targets))
    torch.testing.assert_close(
        cross_entropy(logits, labels, label_smoothing=0.1),
        LabelSmoothingCrossEntropy(0.1)(logits, labels),
    )
