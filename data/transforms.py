"""Image transforms of training and evaluation: pixels uint8 [height, width, 3] to the model's, uint8 [3, H, W]."""

import math
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data import create_transform, str_to_interp_mode, str_to_pil_interp
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.layers import to_2tuple
from torchvision import transforms
from torchvision.transforms.functional import center_crop, pil_to_tensor

from data.device_augment import DeferredTransform
from data.fast_ops import BY_TORCH, REPLACED, REPLACED_IF_BICUBIC, resize, to_picture
from utils.errors import ConfigError

MAX_RESIZED = 2**15  # pixels of a side of a resized picture of which only the centre is kept


def train_transform(
    img_size: int | Sequence[int],
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
    """timm's training augmentation, from pixels to [3, H, W]; `img_size` is H = W, or (H, W).

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
    img_size: int | Sequence[int],
    *,
    crop_mode: str,
    crop_pct: float,
    interpolation: str,
    exact: bool,
) -> "ResizedCenterCrop":
    """Resize and centre crop, from pixels to [3, H, W]; `img_size` is H = W, or (H, W).

    crop_mode: `squash`, as the released DAT code: squash to img_size / crop_pct, whatever the
    aspect ratio; `center`, as timm: shorter side to img_size / crop_pct, or if that is no square
    the side that is shorter in comparison. Any other value raises ConfigError.
    exact: resize with Pillow; without it, where interpolation is bilinear or bicubic, with torch,
    four times as fast and for one in 30 values 1 away.
    """
    if crop_mode not in ("squash", "center"):
        raise ConfigError(f"crop mode {crop_mode!r}: expected squash or center")
    squash = crop_mode == "squash"
    img_size, rounded = to_2tuple(img_size), round if squash else math.floor
    sides = tuple(rounded(length / crop_pct) for length in img_size)
    fast = not exact and interpolation in BY_TORCH
    crop = FastResizedCenterCrop if fast else ResizedCenterCrop
    return crop(img_size, sides, squash=squash, interpolation=interpolation)


class ResizedCenterCrop:
    """Resize a picture to `sides`, or until it just covers them, and keep `img_size` in the centre.

    Sizes are (height, width).

    Along x first, then along y, the 8 bits between them included: so did Pillow until 12, with
    which the published accuracies were measured; 13 swaps the two for some shapes. Where the
    scale's denominator is a power of two, only what is kept is computed: every number in Pillow's
    arithmetic is then exact, and the pixels are those of resizing the complete picture. So it is,
    but for rounding, where a picture is so long that the complete one would fill the memory.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        sides: tuple[int, int],
        *,
        squash: bool,
        interpolation: str,
    ):
        self.img_size = img_size
        self.sides = sides
        self.squash = squash
        self.resample = str_to_pil_interp(interpolation)
        self.mode = interpolation

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of a picture of any size to [3, H, W]."""
        picture = to_picture(pixels)
        full, length = picture.height, picture.width
        (height, (y0, y1), top), (width, (x0, x1), left) = map(
            self._axis, (full, length), self._resized((full, length)), self.img_size
        )
        picture = picture.resize((width, full), self.resample, (x0, 0, x1, full))
        picture = picture.resize((width, height), self.resample, (0, y0, width, y1))
        kept_height, kept_width = self.img_size
        picture = picture.crop((left, top, left + kept_width, top + kept_height))
        return pil_to_tensor(picture)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.squash:
            return self.sides
        if self.sides[0] == self.sides[1]:  # torchvision's Resize rounds down
            return tuple(self.sides[0] * length // min(size) for length in size)
        ratio = min(length / side for length, side in zip(size, self.sides, strict=True))
        return tuple(round(length / ratio) for length in size)  # timm's ResizeKeepRatio

    def _axis(self, length: int, resized: int, kept: int) -> tuple[int, tuple[float, float], int]:
        """For one axis: the pixels to compute, from which part of the source, and the first kept."""
        first = round((resized - kept) / 2)
        denominator = resized // math.gcd(length, resized)
        if denominator & (denominator - 1) and resized <= MAX_RESIZED:
            return resized, (0, length), first
        last = first + kept
        return kept, (first * length / resized, last * length / resized), 0


class FastResizedCenterCrop(ResizedCenterCrop):
    """The same by torch."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of a picture of any size to [3, H, W]."""
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
        # Of pictures of a few pixels timm's crop can round to nothing, beside the last pixel.
        top, left = min(top, image.shape[1] - 1), min(left, image.shape[2] - 1)
        crop = pixels[top : top + max(1, height), left : left + max(1, width)]
        resized = resize(crop, self.size, self.interpolation.value)
        return to_picture(resized.permute(1, 2, 0))


def _augment_ops(augment: transforms.Compose) -> Iterator[timm_augment.AugmentOp]:
    """The operations inside timm's RandAugment, AugMix or AutoAugment."""
    for transform in augment.transforms:
        yield from getattr(transform, "ops", ())
        for policy in getattr(transform, "policy", ()):
            yield from policy
