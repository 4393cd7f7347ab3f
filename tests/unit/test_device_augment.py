"""RandAugment on the device: the same draws as timm's, and pixels within rounding of Pillow's."""

import random

import numpy as np
import pytest
import torch
from helpers.images import write_image_folder
from helpers.pipeline import batch_transform, image_dataset, train_transform
from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor

from data.device_augment import OPERATIONS, DrawRandAugment, RandAugmentOnDevice
from data.fast_ops import REPLACED, posterize
from data.loader import train_loader
from data.samplers import TrainBatchSampler
from utils.errors import ConfigError
from utils.rng import reseed

FILL = (124, 116, 104)
CPU = torch.device("cpu")
# Arguments over the ranges that timm's magnitudes reach.
ARGUMENTS = {
    "auto_contrast": [None],
    "equalize": [None],
    "invert": [None],
    "rotate": [-30.0, 7.3, 0.0, 30.0],
    "posterize": [0, 1, 2, 4],
    "solarize": [0, 26, 128, 256],
    "solarize_add": [0, 55, 110],
    "color": [0.1, 0.55, 1.0, 1.9],
    "contrast": [0.1, 0.55, 1.9],
    "brightness": [0.1, 0.55, 1.9],
    "sharpness": [0.1, 0.55, 1.9],
    "shear_x": [-0.3, 0.11],
    "shear_y": [-0.3, 0.11],
    "translate_x_abs": [-100.0, 3.7],
    "translate_y_abs": [-100.0, 3.7],
    "translate_x_rel": [-0.45, 0.0, 0.125],
    "translate_y_rel": [-0.45, 0.0, 0.125],
}


@pytest.fixture(scope="module")
def pictures(photo_files):
    """Crops of photographs, and pictures whose histograms are extreme."""
    size = (61, 47)
    crops = [Image.open(file).convert("RGB").resize((120, 90)) for file in photo_files]
    crops = [
        crop.crop((left, 9, left + size[0], 9 + size[1])) for crop in crops for left in (5, 40)
    ]
    ramp = np.arange(size[0] * size[1] * 3).reshape(size[1], size[0], 3) % 256
    plain = np.full((size[1], size[0], 3), (10, 128, 255))
    return [*crops, *(Image.fromarray(array.astype(np.uint8)) for array in (ramp, plain))]


def as_batch(pictures):
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_operations_are_pillows(pictures, name, interpolation):
    function = getattr(timm_augment, name)
    index = list(OPERATIONS).index(function)
    reference = posterize if name == "posterize" else function
    resample = getattr(Image.Resampling, interpolation.upper())
    augment = RandAugmentOnDevice(fill=FILL, interpolation=interpolation, device=CPU)
    for argument in ARGUMENTS[name]:
        given = () if argument is None else (argument,)
        expected = [reference(p, *given, fillcolor=FILL, resample=resample) for p in pictures]
        ops = torch.tensor([[[index, argument or 0.0]]] * len(pictures))
        drawn = augment(as_batch(pictures), ops)
        assert (drawn - as_batch(expected)).abs().max() <= 2, argument
        assert torch.equal(drawn, drawn.round())


def test_every_operation_is_tested():
    assert set(ARGUMENTS) == {function.__name__ for function in OPERATIONS}


def augmentation(policy):
    """timm's part of a training transform."""
    _, augment, _ = create_transform(
        32, is_training=True, auto_augment=policy, interpolation="bicubic", separate=True
    )
    return augment


def test_a_policy_is_timms(pictures):
    """Two layers, each with its coin: the same pixels, and the generators are left in the same state."""
    augment = augmentation("rand-m9-n2-mstd0.5-inc1")
    for op in augment.transforms[0].ops:  # Pillow's posterize refuses less than one bit
        op.aug_fn = REPLACED.get(op.aug_fn, op.aug_fn)
    drawing = DrawRandAugment(augmentation("rand-m9-n2-mstd0.5-inc1"))
    on_device = RandAugmentOnDevice(fill=FILL, interpolation="bicubic", device=CPU)
    drawn, expected = [], []
    for seed in range(60):
        picture = pictures[seed % 4]
        reseed(seed)
        expected.append(augment(picture))
        state = random.random()
        reseed(seed)
        drawn.append(drawing())
        assert random.random() == state
    ops = torch.stack(drawn)
    assert len(ops[..., 0].unique()) == 16  # fifteen operations, and none
    images = on_device(as_batch([pictures[seed % 4] for seed in range(60)]), ops)
    # The second layer sees rounded values of the first, which solarising or equalising may spread.
    difference = (images - as_batch(expected)).abs()
    assert (difference <= 2).double().mean() > 0.999
    single = (ops[..., 0] < 0).any(1)
    assert difference[single].max() <= 2


def test_channels_last_pictures_stay_so(pictures):
    images = as_batch(pictures).contiguous(memory_format=torch.channels_last)
    augment = RandAugmentOnDevice(fill=FILL, interpolation="bicubic", device=CPU)
    ops = torch.tensor([[[-1.0, 0.0]], [[2.0, 0.0]]] * 3)
    drawn = augment(images, ops)
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(drawn[0], images[0].float())
    assert torch.equal(drawn[1], 255 - images[1].float())


@pytest.mark.parametrize("policy", ["augmix-m3-w3", "original", "3a"])
def test_other_policies_are_refused(policy):
    with pytest.raises(ConfigError, match=r"needs AUG\.AUTO_AUGMENT to be a RandAugment policy"):
        DrawRandAugment(augmentation(policy))


def test_other_operations_are_refused():
    augment = augmentation("rand-m9")
    augment.transforms[0].ops[0] = timm_augment.AugmentOp("GaussianBlur", hparams={})
    with pytest.raises(ConfigError, match="cannot compute GaussianBlur"):
        DrawRandAugment(augment)


def test_a_loader_leaves_the_policy_to_the_device(tmp_path):
    """Images and draws come from the sample's key: the same with and without workers, and in every process."""
    root = write_image_folder(tmp_path, classes=2, train=4, val=1)
    batches = []
    for workers in (0, 1):
        dataset = image_dataset(root, transform=train_transform(32, on_device=True), train=True)
        sampler = TrainBatchSampler(8, batch_size=4, micro_batches=2, total_steps=2, seed=3)
        loader = train_loader(dataset, sampler, num_workers=workers, timeout=0)
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.ops, other.ops)
        assert one.ops.shape == (4, 2, 2)
    on_host = image_dataset(root, transform=train_transform(32), train=True)[0, 0]
    sample = dataset[0, 0]
    transform = batch_transform(2, on_device=True)
    plain = batch_transform(2)
    augmented, _ = transform(sample.image[None], torch.tensor([0]), sample.ops[None])
    expected, _ = plain(on_host.image[None], torch.tensor([0]))
    assert (augmented - expected).abs().mean() < 0.02  # in standard deviations
