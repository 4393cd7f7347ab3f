"""What happens to one picture in training and in evaluation?

From its pixels, uint8 [height, width, 3], to the model's, uint8 [3, H, W].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data import create_transform, str_to_interp_mode, str_to_pil_interp
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms.functional import center_crop, pil_to_tensor

from utils.errors import ConfigError

BY_TORCH = ("bilinear", "bicubic")  # the interpolations that torch has with antialiasing


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
    """timm's training augmentation, from pixels to [3, img_size, img_size].

    Every random number is timm's. Pixels may differ by rounding where timm's operation is slow:
    bilinear and bicubic crops are resized by torch (`RandomResizedCrop`), bicubic shears and shifts
    are computed along rows (`shift_rows`).

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
            to_picture,
            transforms.Resize(img_size, interpolation=str_to_interp_mode(interpolation)),
            transforms.RandomCrop(img_size, padding=padding),
        ]
    elif interpolation in BY_TORCH:
        crop.transforms[0] = RandomResizedCrop(img_size, scale, ratio, interpolation)
    else:
        crop.transforms.insert(0, to_picture)
    replaced = REPLACED | (REPLACED_IF_BICUBIC if interpolation == "bicubic" else {})
    for op in _augment_ops(augment):
        op.aug_fn = replaced.get(op.aug_fn, op.aug_fn)
    return transforms.Compose([*crop.transforms, *augment.transforms, *to_tensor.transforms])


def eval_transform(
    img_size: int,
    *,
    crop_mode: str = "squash",
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    exact: bool = True,
) -> "ResizedCenterCrop":
    """Resize and centre crop, from pixels to [3, img_size, img_size].

    crop_mode: `squash`, as the released DAT code: squash to a square of img_size / crop_pct,
    whatever the aspect ratio; `center`, as timm: shorter side to img_size / crop_pct. Another
    one raises ConfigError.
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
    arithmetic is then exact, and the pixels are those of resizing the whole.
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
        whole = picture.height
        picture = picture.resize((width, whole), self.resample, (x0, 0, x1, whole))
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
        if denominator & (denominator - 1):
            return resized, (0, length), first
        last = first + self.img_size
        return self.img_size, (first * length / resized, last * length / resized), 0


class FastResizedCenterCrop(ResizedCenterCrop):
    """The same by torch."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of a picture of any size to [3, img_size, img_size]."""
        height, width, _ = pixels.shape
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


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """Pixels as Pillow has them."""
    return Image.fromarray(pixels.numpy())


def resize(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Pixels uint8 [height, width, 3] to uint8 [3, *size] (channels last), by bilinear or bicubic `mode`.

    A quarter of Pillow's time. One in 30 values is 1 away from Pillow's (along x, then y), as the
    weights have 16 bits and not 32.
    """
    height, width, _ = pixels.shape
    # A view with the strides of a batch in channels-last order, in which pictures lie: with others
    # torch copies to and from planes, which takes longer than the resizing.
    image = pixels.contiguous().view(1, height, width, 3).permute(0, 3, 1, 2)
    resized = interpolate(image, size, mode=mode, antialias=True)  # (1, 3, *size)
    return resized.permute(0, 2, 3, 1)[0].permute(2, 0, 1)


def posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """timm's posterize, black for less than one bit: what Pillow drew until 13, which raises."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_augment.posterize(image, bits_to_keep, **kwargs)


def shear_x(image: Image.Image, factor: float, *, fillcolor: Sequence[int], **_) -> Image.Image:
    """timm's shear_x, bicubic."""
    return shift_rows(image, factor * (np.arange(image.height) + 0.5), fillcolor)


def translate_x(image: Image.Image, pixels: float, *, fillcolor: Sequence[int], **_) -> Image.Image:
    """timm's translate_x_abs, bicubic."""
    return shift_rows(image, np.full(image.height, pixels), fillcolor)


def translate_x_rel(image: Image.Image, pct: float, **kwargs) -> Image.Image:
    """timm's translate_x_rel, bicubic."""
    return translate_x(image, pct * image.width, **kwargs)


def along_y(
    function: Callable[..., Image.Image], image: Image.Image, *args, **kwargs
) -> Image.Image:
    """What `function` does along x, along y."""
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    return function(turned, *args, **kwargs).transpose(Image.Transpose.TRANSPOSE)


# What is done in place of timm's own functions.
REPLACED = {timm_augment.posterize: posterize}
REPLACED_IF_BICUBIC = {
    timm_augment.shear_x: shear_x,
    timm_augment.shear_y: partial(along_y, shear_x),
    timm_augment.translate_x_abs: translate_x,
    timm_augment.translate_y_abs: partial(along_y, translate_x),
    timm_augment.translate_x_rel: translate_x_rel,
    timm_augment.translate_y_rel: partial(along_y, translate_x_rel),
}


def shift_rows(image: Image.Image, shifts: np.ndarray, fill: Sequence[int]) -> Image.Image:
    """Each row of an RGB picture moved to the left by its own number of pixels, float64 [height].

    What Pillow's bicubic `Image.transform` draws when it moves along rows, in a third of the time:
    4 neighbours instead of 16. One value in several thousand differs, by 1, as the cubic is
    evaluated in 32 bits.
    """
    width, height = image.size
    whole = np.floor(shifts)
    t = (shifts - whole).astype(np.float32)[:, None, None]
    columns = np.arange(-1, width + 2) + whole.astype(np.int64)[:, None]
    nearest = columns.clip(0, width - 1, out=columns)
    nearest += width * np.arange(height)[:, None]
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    pixels = pixels.take(nearest)  # (height, width + 3)
    values = pixels.view(np.uint8).reshape(height, width + 3, 4).astype(np.int16)
    a, b, c, d = (values[:, first : first + width] for first in range(4))
    # The cubic convolution that Pillow's transforms use, b + t (c - a + t (2 (a - b) + c - d + t (b - a + d - c))),
    # whose brackets are whole numbers: on even ground nothing is rounded.
    ab, cd = a - b, c - d
    result = (ab + cd) * -t
    result += 2 * ab + cd
    result *= t
    result += c - a
    result *= t
    result += b
    drawn = result.clip(0, 255, out=result).astype(np.uint8)
    centres = np.arange(width) + 0.5 + shifts[:, None]
    outside = (centres < 0) | (centres >= width)
    np.copyto(
        drawn.view(np.uint32)[..., 0], np.array((*fill, 0), np.uint8).view(np.uint32), where=outside
    )
    return Image.frombytes("RGB", image.size, drawn, "raw", "RGBX")


def _augment_ops(augment: transforms.Compose) -> Iterator[timm_augment.AugmentOp]:
    """The operations inside timm's RandAugment, AugMix or AutoAugment."""
    for transform in augment.transforms:
        yield from getattr(transform, "ops", ())
        for policy in getattr(transform, "policy", ()):
            yield from policy
