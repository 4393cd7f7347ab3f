"""How do the bytes of an image file become an RGB picture?"""

import contextlib
import io
import struct
import zlib

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

# The formats behind the file names that are read as images; Pillow's other readers stay shut (its
# EPS reader starts Ghostscript). GIF is found in the wild under a JPEG's name.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")

# What reading and decoding damaged files raises; anything else is a bug and ends the run.
UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,  # Pillow's word for a broken PNG chunk
    TypeError,  # and for a TIFF tag of another type than expected
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode(data: bytes) -> Image.Image:
    """The first frame of an image file as an RGB picture; EXIF rotation is ignored, alpha dropped.

    16-bit grey is scaled by 1/257, where Pillow's own conversion would clip nearly all of it to
    white. Raises one of `UNREADABLE`.
    """
    image = _open(data)
    image.load()
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    # convert() copies even where there is nothing to convert.
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_pixels(data: bytes) -> torch.Tensor:
    """The same picture as uint8 [height, width, 3], JPEGs without the copies of Pillow's way.

    simplejpeg and Pillow both have libjpeg-turbo and give the same pixels. Other formats, four
    colours and what simplejpeg finds damaged are left to `decode`. Raises one of `UNREADABLE`.
    """
    image = _open(data)
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        with contextlib.suppress(ValueError):
            return torch.from_numpy(simplejpeg.decode_jpeg(data))
    return torch.from_numpy(np.array(decode(data)))


def _open(data: bytes) -> Image.Image:
    """The image before its pixels are decoded: format, mode, and a size that is no bomb's."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow's message holds the address of the buffer, and logs have to be reproducible.
        raise ValueError(f"not one of {', '.join(FORMATS)}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
