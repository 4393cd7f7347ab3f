"""Image decoding: the bytes of a file to an RGB picture or its pixels."""

import base64
import contextlib
import hashlib
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from data.listing import EXTENSIONS
from utils.errors import DataError

# The formats behind the file names that are read as images; Pillow's other readers are not used (its
# EPS reader starts Ghostscript). GIF is found in the wild under a JPEG's name.
AVIF = ("AVIF",) if b".avif" in EXTENSIONS else ()
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", *AVIF)

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

# What makes a picture upright, by EXIF's orientation; 1 is upright.
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes) -> Image.Image:
    """An image file with its header read and its pixels not yet; raises one of `UNREADABLE`."""
    try:
        with _avif_errors():
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow's message holds the address of the buffer, and logs have to be reproducible.
        raise ValueError(f"not one of {', '.join(FORMATS)}") from None


def decode(data: bytes, *, apply_exif: bool = False) -> Image.Image:
    """The first frame of an image file as an RGB picture, alpha dropped.

    16-bit grey is scaled by 1/257, where Pillow's own conversion would clip nearly all of it to
    white. The rotation that EXIF asks for is ignored, as by the published numbers, unless `apply_exif`.
    Raises one of `UNREADABLE`.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is switched on, which silently paints the missing part of a "
            "truncated image grey; remove the line that does it"
        )
    image = open_image(data)
    with _avif_errors():
        image.load()
    if apply_exif and (method := EXIF_TRANSPOSES.get(orientation(image))) is not None:
        image = image.transpose(method)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    # convert() copies even where there is nothing to convert.
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """The orientation in a picture's EXIF data, 1 to 8; 1 if it is damaged or absent."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1


def decode_pixels(data: bytes, *, apply_exif: bool = False) -> torch.Tensor:
    """The same picture as uint8 [height, width, 3], JPEGs without the copies of Pillow's way.

    simplejpeg and Pillow both have libjpeg-turbo and give the same pixels. Other formats, four
    colours, pictures to be rotated and what simplejpeg finds damaged are left to `decode`. Raises
    one of `UNREADABLE`.
    """
    image = open_image(data)
    rotated = apply_exif and orientation(image) in EXIF_TRANSPOSES
    if image.format == "JPEG" and image.mode in ("RGB", "L") and not rotated:
        import simplejpeg  # here, so that what decodes no JPEG runs without it

        with contextlib.suppress(ValueError):
            return torch.from_numpy(simplejpeg.decode_jpeg(data))
    return torch.from_numpy(np.array(decode(data, apply_exif=apply_exif)))


@contextlib.contextmanager
def _avif_errors() -> Iterator[None]:
    """Raise ValueError for a damaged AVIF file, where Pillow raises RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


# 16×16 pixels of noise, a JPEG with halved chroma: what decoders compute in different ways.
SAMPLE = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERX"
    "RTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAARCAAQABADASIAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAA"
    "BAID/8QAHxAAAgEEAwEBAAAAAAAAAAAAAQMCAAQFERIhQVET/8QAFAEBAAAAAAAAAAAAAAAAAAAAAf/EAB8RAAED"
    "AwUAAAAAAAAAAAAAAAIAAQMRITESIlFhof/aAAwDAQACEQMRAD8APk5468nB71P6I1qPtMfcXUeJWAICIA38q8jl"
    "HWqwXKVwJ0NR9rBt7H8Qq6GpHscflEQlGNXuL3ymLUTsYbus+cr/2Q=="
)


def decoder_fingerprint() -> dict[str, str]:
    """The versions of this machine's decoders and a hash of the pixels that they make of a certain JPEG."""
    import simplejpeg

    pixels = decode_pixels(SAMPLE).numpy().tobytes() + np.asarray(decode(SAMPLE)).tobytes()
    return {
        "pillow": Image.__version__,
        "simplejpeg": simplejpeg.__version__,
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "pixels": hashlib.sha256(pixels).hexdigest()[:16],
    }
