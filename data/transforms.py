"""What happens to one picture on its way to a uint8 tensor, in training and in evaluation?"""

from collections.abc import Iterator, Sequence

from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data import create_transform, str_to_interp_mode
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torchvision import transforms

from utils.errors import ConfigError


def train_transform(
    img_size: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float = 0.4,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    padding: int = 0,
) -> transforms.Compose:
    """timm's training augmentation up to the uint8 tensor [3, img_size, img_size].

    color_jitter: acts only without `auto_augment`.
    mean: the colour, in [0, 1], of what rotations and shifts leave empty.
    padding: pixels; if positive, a shift inside a zero border replaces the random resized crop, as
    is usual for CIFAR (He et al. 2016, §4.2).
    """
    crop, augment, to_tensor = create_transform(
        img_size,
        is_training=True,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        interpolation=interpolation,
        mean=mean,
        use_prefetcher=True,
        separate=True,
    )
    if padding:
        crop.transforms[:1] = [
            transforms.Resize(img_size, interpolation=str_to_interp_mode(interpolation)),
            transforms.RandomCrop(img_size, padding=padding),
        ]
    for op in _augment_ops(augment):
        if op.aug_fn is timm_augment.posterize:
            op.aug_fn = posterize
    return transforms.Compose([*crop.transforms, *augment.transforms, *to_tensor.transforms])


def eval_transform(
    img_size: int,
    *,
    protocol: str = "official",
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
) -> transforms.Compose:
    """Resize and centre crop up to the uint8 tensor [3, img_size, img_size].

    protocol: `official`, as the released DAT code: squash to a square of img_size / crop_pct,
    whatever the aspect ratio; `standard`, as timm: shorter side to img_size / crop_pct. Another
    one raises ConfigError.
    """
    if protocol not in ("official", "standard"):
        raise ConfigError(f"evaluation protocol {protocol!r}: expected official or standard")
    if protocol == "standard":
        return create_transform(
            img_size, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True
        )
    side = round(img_size / crop_pct)
    return transforms.Compose(
        [
            transforms.Resize((side, side), interpolation=str_to_interp_mode(interpolation)),
            transforms.CenterCrop(img_size),
            transforms.PILToTensor(),
        ]
    )


def posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """timm's posterize, black for less than one bit: what Pillow drew until 13, which raises."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_augment.posterize(image, bits_to_keep, **kwargs)


def _augment_ops(augment: transforms.Compose) -> Iterator[timm_augment.AugmentOp]:
    """The operations inside timm's RandAugment, AugMix or AutoAugment."""
    for transform in augment.transforms:
        yield from getattr(transform, "ops", ())
        for policy in getattr(transform, "policy", ()):
            yield from policy
