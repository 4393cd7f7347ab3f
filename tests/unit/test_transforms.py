"""Transforms and mixing: what timm, torchvision and Pillow do, to the pixel or to a stated rounding."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.pipeline import CPU, batch_transform, eval_transform, train_transform
from PIL import Image
from scipy import stats
from timm.data import Mixup, auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from data import Normalize
from data.fast_ops import REPLACED_IF_BICUBIC, posterize
from data.transforms import RandomResizedCrop
from utils.errors import ConfigError
from utils.rng import key, reseed

BICUBIC = Image.Resampling.BICUBIC
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
).resize((400, 300), Image.Resampling.BICUBIC)


def pixels_of(picture):
    return torch.from_numpy(np.array(picture))


def resize(picture, size, resample=BICUBIC):
    """Along x, then along y: what Pillow's one call did until 12."""
    return picture.resize((size[0], picture.height), resample).resize(size, resample)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("img_size", "crop_pct", "side"),
    [(224, 0.875, 256), (224, 0.9, 249), (384, 1.0, 384), (32, 1.0, 32), (160, 0.94, 170)],
)
def test_squash_ignores_the_aspect_ratio(img_size, crop_pct, side, interpolation):
    transform = eval_transform(
        img_size, crop_mode="squash", crop_pct=crop_pct, interpolation=interpolation
    )
    for size in ((400, 300), (300, 400), (333, 500), (256, 256), (257, 32), (1, 1), (3, 900)):
        picture = PICTURE.resize(size)
        squashed = resize(picture, (side, side), Image.Resampling[interpolation.upper()])
        expected = v2.functional.center_crop(pil_to_tensor(squashed), img_size)
        pixels = transform(pixels_of(picture))
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, expected)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((400, 300), (341, 256)),
        ((300, 400), (256, 341)),
        ((512, 384), (341, 256)),
        ((600, 300), (512, 256)),
        ((500, 375), (341, 256)),
        ((20, 16), (320, 256)),
    ],
)
def test_center_keeps_the_aspect_ratio(size, resized):
    picture = PICTURE.resize(size)
    pixels = eval_transform(224, crop_mode="center", crop_pct=0.875)(pixels_of(picture))
    expected = v2.functional.center_crop(pil_to_tensor(resize(picture, resized)), 224)
    assert torch.equal(pixels, expected)
    theirs = create_transform(224, crop_pct=0.875, interpolation="bicubic", use_prefetcher=True)
    # Pillow 13 resizes some shapes along y first: the 8 bits in between are others.
    assert (pixels.int() - theirs(picture).int()).abs().float().mean() < 0.1


@pytest.mark.parametrize("crop_mode", ["squash", "center"])
@pytest.mark.parametrize("size", [(500, 375), (300, 451), (40, 50)])
def test_fast_evaluation_is_the_exact_one_with_other_rounding(crop_mode, size):
    pixels = pixels_of(PICTURE.resize(size))
    fast = eval_transform(224, crop_mode=crop_mode, exact=False)(pixels)
    exact = eval_transform(224, crop_mode=crop_mode)(pixels)
    difference = (fast.int() - exact.int()).abs()
    assert fast.dtype == torch.uint8
    assert difference.max() <= 2
    assert difference.float().mean() < 0.05
    other = eval_transform(224, interpolation="lanczos", exact=False)
    assert torch.equal(other(pixels), eval_transform(224, interpolation="lanczos")(pixels))


def test_unknown_crop_mode_is_refused():
    with pytest.raises(ConfigError, match="'squsah': expected squash or center"):
        eval_transform(224, crop_mode="squsah")


def test_padding_shifts_instead_of_resizing():
    picture = PICTURE.resize((32, 32))
    transform = train_transform(32, padding=4, hflip=0.0, color_jitter=0.0, auto_augment="")
    border = torch.nn.functional.pad(pil_to_tensor(picture), (4, 4, 4, 4))
    windows = {
        border[:, y : y + 32, x : x + 32].numpy().tobytes() for y in range(9) for x in range(9)
    }
    seen = set()
    for number in range(300):
        reseed(number)
        seen.add(transform(pixels_of(picture)).numpy().tobytes())
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
    picture, black = pixels_of(PICTURE.resize((16, 16))), 0
    for number in range(2000 if policy.startswith("rand") else 400):
        reseed(key(0, policy, number))
        black += not transform(picture).any()
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is before, "timm itself is left alone"
    assert black > 0 or not policy.startswith("rand"), "posterize to 0 bits has not been met"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_crop_is_timms_resized_with_other_rounding(interpolation):
    resample = Image.Resampling[interpolation.upper()]
    picture = PICTURE.resize((500, 375))
    crop = RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3), interpolation)
    for number in range(20):
        reseed(number)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            picture, crop.scale, crop.ratio
        )
        kept = picture.crop((left, top, left + width, top + height))
        reseed(number)
        ours, theirs = (
            np.asarray(crop(pixels_of(picture))),
            np.asarray(resize(kept, (224, 224), resample)),
        )
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.max() <= 2
        assert difference.mean() < 0.05


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (64, 640)])
@pytest.mark.parametrize("crop_mode", ["squash", "center"])
def test_sizes_that_are_no_square_are_timms(crop_mode, size):
    """(height, width) of the model's input against timm's evaluation and training transforms."""
    settings = {"crop_mode": crop_mode, "crop_pct": 0.8, "interpolation": "bicubic"}
    picture = PICTURE.resize(size)
    theirs = np.asarray(create_transform((48, 80), use_prefetcher=True, **settings)(picture))
    for exact in (True, False):
        ours = eval_transform((48, 80), exact=exact, **settings)(pixels_of(picture)).numpy()
        assert ours.shape == (3, 48, 80)
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    policy = {"auto_augment": "", "color_jitter": 0.0}
    for padding in (0, 4):
        train = train_transform((48, 80), padding=padding, **policy)
        assert train(pixels_of(picture)).shape == (3, 48, 80)
    reseed(5)
    ours = train_transform((48, 80), **policy)(pixels_of(picture)).numpy()
    reseed(5)
    theirs = create_transform(
        (48, 80), is_training=True, use_prefetcher=True, interpolation="bicubic", **policy
    )(picture)
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 2


def test_one_channel_is_pillows_luma_and_keeps_grey_values():
    pixels = pixels_of(PICTURE.resize((40, 30))).permute(2, 0, 1)[None]
    luma = np.asarray(PICTURE.resize((40, 30)).convert("L"))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    shift, scale = (np.dot((0.299, 0.587, 0.114), colour) for colour in (mean, std))
    found = Normalize(mean, std, in_chans=1, device=CPU)(pixels)
    assert found.shape == (1, 1, 30, 40)
    expected = torch.tensor((luma / 255 - shift) / scale, dtype=torch.float32)[None, None]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    grey = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    found = Normalize([0.0] * 3, [1 / 255] * 3, in_chans=1, device=CPU)(grey)
    torch.testing.assert_close(found.flatten(), torch.arange(256.0))
    micro_batch = batch_transform(10, in_chans=1, reprob=1.0, mixup=0.8, cutmix=1.0)
    assert micro_batch(pixels.repeat(4, 1, 1, 1), torch.arange(4))[0].shape == (4, 1, 30, 40)


@pytest.mark.parametrize("theirs", REPLACED_IF_BICUBIC)
def test_moved_rows_are_pillows_with_other_rounding(theirs):
    picture = PICTURE.resize((224, 200))
    scale = 0.3 if "shear" in theirs.__name__ else 60 if "abs" in theirs.__name__ else 0.45
    options = {"fillcolor": (124, 116, 104), "resample": BICUBIC}
    differing = []
    for share in (-1, -0.37, -1e-3, 0, 1e-3, 0.5, 0.81, 1):
        ours = np.asarray(REPLACED_IF_BICUBIC[theirs](picture, share * scale, **options))
        expected = np.asarray(theirs(picture, share * scale, **dict(options)))
        assert np.abs(ours.astype(int) - expected).max() <= 1
        differing.append((ours != expected).mean())
    assert np.mean(differing) < 1e-3


@pytest.mark.parametrize("policy", ["3a", "augmix-m3-w3", "original", "rand-m9-n3-p0.3-t3a"])
def test_every_policy_is_timms_to_the_bit(policy):
    """3-Augment (DeiT III) with its colour jitter, AugMix, AutoAugment: nothing of them is left out."""
    settings = {"auto_augment": policy, "color_jitter": 0.3, "interpolation": "nearest"}
    ours = train_transform(48, **settings)
    theirs = create_transform(48, is_training=True, use_prefetcher=True, **settings)
    plain = train_transform(48, **settings | {"auto_augment": "", "color_jitter": 0.0})
    picture, changed = PICTURE.resize((64, 56)), 0
    for number in range(60):
        results = []
        for transform, image in (
            (ours, pixels_of(picture)),
            (theirs, picture),
            (plain, pixels_of(picture)),
        ):
            reseed(number)
            results.append(np.asarray(transform(image)))
        assert (results[0] == results[1]).all()
        changed += (results[0] != results[2]).any()
    assert changed > 30


def test_every_decision_is_timms(monkeypatch):
    """The same seed: the same crop, flip, operations, strengths and signs, and the same end."""
    calls = []

    def record(name):
        return lambda image, *args, **kwargs: calls.append((name, args)) or image

    def decisions(transform, picture):
        calls.clear()
        crop, *_, augment, _ = transform.transforms
        for op in augment.ops:
            op.aug_fn = record(op.name)
        get_params = RandomResizedCropAndInterpolation.get_params
        crop.get_params = lambda *args: calls.append(get_params(*args)) or calls[-1]
        for number in range(500):
            reseed(number)
            left = transform(picture)[:, :, 0].float().mean()
            calls.append((round(left.item()) // 64, random.random()))
        return list(calls)

    picture = Image.fromarray(np.repeat(np.arange(0, 256, 16, np.uint8), 16).reshape(16, 16).T)
    picture = picture.convert("RGB")  # dark on the left
    policy = {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}
    theirs = create_transform(8, is_training=True, use_prefetcher=True, **policy)
    ours = decisions(train_transform(8, **policy), pixels_of(picture))
    assert ours == decisions(theirs, picture)


def test_the_augmentation_follows_the_laws_of_the_papers():
    """Szegedy et al. 2015 for the crop, RandAugment for the operations; nothing of timm's in it."""
    transform = train_transform(8, auto_augment="rand-m9-mstd0.5-inc1")
    crop, flip, augment, _ = transform.transforms
    picture, names = PICTURE.resize((400, 400)), []
    for op in augment.ops:
        op.aug_fn = lambda image, *args, name=op.name, **kwargs: names.append(name) or image
    areas, ratios, flips = [], [], 0
    dark_left = Image.fromarray(np.repeat(np.uint8([[[0], [255]]]), 3, axis=2))
    draws = 3000
    for number in range(draws):
        reseed(key(0, "law", number))
        _, _, height, width = crop.get_params(picture, crop.scale, crop.ratio)
        areas.append(height * width / 400**2)
        ratios.append(np.log(width / height) / np.log(4 / 3))
        flips += flip(dark_left).getpixel((0, 0)) != (0, 0, 0)
        augment(dark_left)
    areas, ratios = np.array(areas), np.array(ratios)
    # A wide or high crop of nearly the full picture does not fit and is drawn again.
    fits = areas < 0.7
    assert stats.kstest((areas[fits] - 0.08) / 0.62, "uniform").pvalue > 1e-3
    assert stats.kstest((ratios[fits] + 1) / 2, "uniform").pvalue > 1e-3
    assert stats.binomtest(flips, draws).pvalue > 1e-3
    counts = Counter(names)
    assert len(counts) == 15
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert stats.binomtest(len(names), 2 * draws).pvalue > 1e-3


def test_transforms_can_be_sent_to_other_processes():
    for transform in (train_transform(8), eval_transform(8), train_transform(8, padding=2)):
        copy = pickle.loads(pickle.dumps(transform))
        reseed(0)
        expected = transform(pixels_of(PICTURE))
        reseed(0)
        assert torch.equal(copy(pixels_of(PICTURE)), expected)


def batch(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def test_normalize_is_torchvisions():
    images, _ = batch()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = v2.functional.normalize(images / 255, mean, std)
    for layout in (torch.channels_last, torch.contiguous_format):
        images = images.contiguous(memory_format=layout)
        result = Normalize(mean, std, in_chans=3, device=CPU)(images)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        assert result.is_contiguous(memory_format=layout)
    assert images.dtype == torch.uint8, "the batch itself is left alone"


def test_odd_batches_are_not_mixed_with_probability_0():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    _, targets = batch_transform(10, mixup=0.8, mixup_prob=0.0)(images, torch.tensor([1, 2, 3]))
    assert targets.tolist() == [1, 2, 3]


def test_without_mixing_targets_are_labels():
    images, labels = batch()
    micro_batch = batch_transform(10)
    inputs, targets = micro_batch(images, labels)
    assert torch.equal(targets, labels)
    assert torch.equal(inputs, micro_batch.normalize(images))


def test_erasing_and_mixing_are_functions_of_the_seed():
    images, labels = batch()
    micro_batch = batch_transform(10, reprob=1.0, mixup=0.8, cutmix=1.0)
    results = []
    for value in (1, 1, 2):
        reseed(value)
        results.append(micro_batch(images, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    erased = batch_transform(10, reprob=1.0)(images, labels)[0]
    assert (erased != micro_batch.normalize(images)).flatten(1).any(1).all()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_smoothing_in_the_loss_equals_timms_smoothed_targets(mode):
    micro_batch = batch_transform(10, mixup=0.8, cutmix=1.0, mixup_mode=mode)
    timm_mix = Mixup(0.8, 1.0, mode=mode, label_smoothing=0.1, num_classes=10)
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    for number in range(20):
        images, labels = batch(number)
        reseed(number)
        inputs, targets = micro_batch(images, labels)
        reseed(number)
        expected_inputs, expected_targets = timm_mix(micro_batch.normalize(images), labels)
        assert torch.equal(inputs, expected_inputs)
        loss = cross_entropy(logits, targets, label_smoothing=0.1)
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, expected_targets))
    torch.testing.assert_close(
        cross_entropy(logits, labels, label_smoothing=0.1),
        LabelSmoothingCrossEntropy(0.1)(logits, labels),
    )


@pytest.mark.parametrize("exact", [True, False])
def test_a_very_long_picture_is_not_resized_in_full(exact, monkeypatch):
    """The centre is the same, and no side of what is computed exceeds the limit."""
    source = np.random.default_rng(0).integers(0, 256, (4000, 3, 3)).astype(np.uint8)
    transform = eval_transform(32, crop_mode="center", exact=exact)
    full = transform(torch.from_numpy(source))
    monkeypatch.setattr("data.transforms.MAX_RESIZED", 1000)
    resize, sides = Image.Image.resize, []

    def note_and_resize(image, size, *rest):
        sides.append(max(size))
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", note_and_resize)
    found = transform(torch.from_numpy(source))
    assert max(sides) <= 4000
    assert (found.int() - full.int()).abs().max() <= 2
