"""Image transforms of training and evaluation: pixels uint8 [height, width, 3] to the model's, uint8 [3, H, W]."""

import math
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data import create_transform, str_to_interp_mode, str_to_pil_interp
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms.functional import center_crop, pil_to_tensor

from data.device_augment import DeferredTransform
from data.fast_ops import BY_TORCH, REPLACED, REPLACED_IF_BICUBIC, resize, to_picture
from utils.errors import ConfigError

MAX_RESIZED = 2**15  # pixels of a side of a resized picture of which only the centre is kept


def train_transform(
    img_size: int,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
    padding: int,
    hflip: float,
    color_jitter: float,
    auto_augment: str,
    on_device: bool,
    interpolation: str,
    mean: Sequence[float],
) -> transforms.Compose | DeferredTransform:
    """timm's training augmentation, from pixels to [3, img_size, img_size].

    Every random number is timm's. Pixels may differ by rounding where timm's operation is slow:
    bilinear and bicubic crops are resized by torch (`RandomResizedCrop`), bicubic shears and shifts
    are computed along rows (`fast_ops.shift_rows`).

    scale, ratio: of the random resized crop (Szegedy et al. 2015): share of the area, width / height.
    padding: pixels; if positive, a shift inside a zero border replaces the random resized crop, as
    is usual for CIFAR (He et al. 2016, §4.2).
    auto_augment: timm's policy; empty: none. color_jitter acts only without it.
    on_device: the policy, a RandAugment, is drawn only, for `RandAugmentOnDevice`; ConfigError for others.
    mean: the colour, in [0, 1], of what rotations and shifts leave empty.
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
            to_picture,
            transforms.Resize(img_size, interpolation=str_to_interp_mode(interpolation)),
            transforms.RandomCrop(img_size, padding=padding),
        ]
    elif interpolation in BY_TORCH:
        crop.transforms[0] = RandomResizedCrop(img_size, scale, ratio, interpolation)
    else:
        crop.transforms.insert(0, to_picture)
    if on_device:
        return DeferredTransform(crop, augment, to_tensor)
    replaced = REPLACED | (REPLACED_IF_BICUBIC if interpolation == "bicubic" else {})
    for op in _augment_ops(augment):
        op.aug_fn = replaced.get(op.aug_fn, op.aug_fn)
    return transforms.Compose([*crop.transforms, *augment.transforms, *to_tensor.transforms])


def eval_transform(
    img_size: int,
    *,
    crop_mode: str,
    crop_pct: float,
    interpolation: str,
    exact: bool,
) -> "ResizedCenterCrop":
    """Resize and centre crop, from pixels to [3, img_size, img_size].

    crop_mode: `squash`, as the released DAT code: squash to a square of img_size / crop_pct,
    whatever the aspect ratio; `center`, as timm: shorter side to img_size / crop_pct. Any other
    value raises ConfigError.
    exact: resize with Pillow; without it, where interpolation is bilinear or bicubic, with torch,
    four times as fast and for one in 30 values 1 away.
    """
    if crop_mode not in ("squash", "center"):
        raise ConfigError(f"crop mode {crop_mode!r}: expected squash or center")
    squash = crop_mode == "squash"
    side = round(img_size / crop_pct) if squash else math.floor(img_size / crop_pct)
    fast = not exact and interpolation in BY_TORCH
    crop = FastResizedCenterCrop if fast else ResizedCenterCrop
    return crop(img_size, side, squash=squash, interpolation=interpolation)


class ResizedCenterCrop:
    """Resize a picture to a square of `side`, or its shorter side to that, and keep the centre.

    Along x first, then along y, the 8 bits between them included: so did Pillow until 12, with
    which the published accuracies were measured; 13 swaps the two for some shapes. Where the
    scale's denominator is a power of two, only what is kept is computed: every number in Pillow's
    arithmetic is then exact, and the pixels are those of resizing the complete picture. So it is,
    but for rounding, where a picture is so long that the complete one would fill the memory.
    """

    def __init__(self, img_size: int, side: int, *, squash: bool, interpolation: str):
        self.img_size = img_size
        self.side = side
        self.squash = squash
        self.resample = str_to_pil_interp(interpolation)
        self.mode = interpolation

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of a picture of any size to [3, img_size, img_size]."""
        picture = to_picture(pixels)
        (width, (x0, x1), left), (height, (y0, y1), top) = map(
            self._axis, picture.size, self._resized(picture.size)
        )
        full = picture.height
        picture = picture.resize((width, full), self.resample, (x0, 0, x1, full))
        picture = picture.resize((width, height), self.resample, (0, y0, width, y1))
        picture = picture.crop((left, top, left + self.img_size, top + self.img_size))
        return pil_to_tensor(picture)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.squash:
            return self.side, self.side
        return tuple(self.side * length // min(size) for length in size)

    def _axis(self, length: int, resized: int) -> tuple[int, tuple[float, float], int]:
        """For one axis: the pixels to compute, from which part of the source, and the first kept."""
        first = round((resized - self.img_size) / 2)
        denominator = resized // math.gcd(length, resized)
        if denominator & (denominator - 1) and resized <= MAX_RESIZED:
            return resized, (0, length), first
        last = first + self.img_size
        return self.img_size, (first * length / resized, last * length / resized), 0


class FastResizedCenterCrop(ResizedCenterCrop):
    """The same by torch."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of a picture of any size to [3, img_size, img_size]."""
        height, width, _ = pixels.shape
        if max(self._resized((height, width))) > MAX_RESIZED:
            return super().__call__(pixels)
        resized = resize(pixels, self._resized((height, width)), self.mode)
        return center_crop(resized, self.img_size)


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's crop, resized by torch."""

    def __call__(self, pixels: torch.Tensor) -> Image.Image:
        """Pixels to a picture of `self.size`."""
        image = pixels.permute(2, 0, 1)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        # Of pictures of a few pixels timm's crop can round to nothing.
        crop = pixels[top : top + max(1, height), left : left + max(1, width)]
        resized = resize(crop, self.size, self.interpolation.value)
        return to_picture(resized.permute(1, 2, 0))


def _augment_ops(augment: transforms.Compose) -> Iterator[timm_augment.AugmentOp]:
    """The operations inside timm's RandAugment, AugMix or AutoAugment."""
    for transform in augment.transforms:
        yield from getattr(transform, "ops", ())
        for policy in getattr(transform, "policy", ()):
            yield from policy
