"""Fast image operations: Pillow's and timm's, computed faster or safely, with the same pixels up to rounding."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch.nn.functional import interpolate

BY_TORCH = ("bilinear", "bicubic")  # the interpolations that torch has with antialiasing


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


# What replaces timm's own functions.
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
    pixels_moved = np.floor(shifts)
    t = (shifts - pixels_moved).astype(np.float32)[:, None, None]
    columns = np.arange(-1, width + 2) + pixels_moved.astype(np.int64)[:, None]
    nearest = columns.clip(0, width - 1, out=columns)
    nearest += width * np.arange(height)[:, None]
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    pixels = pixels.take(nearest)  # (height, width + 3)
    values = pixels.view(np.uint8).reshape(height, width + 3, 4).astype(np.int16)
    a, b, c, d = (values[:, first : first + width] for first in range(4))
    # The cubic convolution that Pillow's transforms use, b + t (c - a + t (2 (a - b) + c - d + t (b - a + d - c))),
    # whose brackets are integers: on even ground nothing is rounded.
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
