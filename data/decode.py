"""Image decoding: the bytes of a file to an RGB picture or its pixels."""

import base64
import contextlib
import hashlib
import io
import struct
import warnings
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

# What a picture may cost: a small file can hold any number of pixels, and a JPEG any number of passes over them. They
# are limited by numbers, not by seconds: which files are read must not depend on the machine. Photographs cost less.
MAX_PIXELS = 89_478_485  # where Pillow begins to warn: a quarter of a GiB of RGB
MAX_PASSES = 2**30  # pixels × scans of a JPEG; a progressive one of a camera has ten
MAX_SIDES = (
    20_000  # longer / shorter side: to resize the shorter one resizes the longer one with it
)
MAX_TILES = 2**16  # parts of a TIFF file, each read by itself
MAX_BYTES_IN_PYTHON = 4 * 2**20  # where Pillow has no fast decoder: text in PPM, run lengths in BMP
SCAN = b"\xff\xda"

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
    """An image file with its header read and its pixels not yet; raises one of `UNREADABLE`.

    A ValueError for one that would cost too much time or memory to decode.
    """
    try:
        with _avif_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow's message holds the address of the buffer, and logs have to be reproducible.
        raise ValueError(f"not one of {', '.join(FORMATS)}") from None
    if problem := _excess(image, data):
        raise ValueError(f"costs too much to decode: {problem}")
    return image


def _excess(image: Image.Image, data: bytes) -> str | None:
    """What makes a file too costly to decode, None if nothing does."""
    pixels, (short, long) = image.width * image.height, sorted(image.size)
    if pixels > MAX_PIXELS:
        return f"{image.width} × {image.height} pixels, more than {MAX_PIXELS:,}"
    if long > MAX_SIDES * short:
        return f"{image.width} × {image.height} pixels, one side over {MAX_SIDES:,} times the other"
    if len(image.tile) > MAX_TILES:
        return f"{len(image.tile):,} parts, more than {MAX_TILES:,}"
    # MPO: a JPEG with further pictures behind it.
    if {"JPEG", "MPO"} & {image.format, str(image.info.get("compression")).upper()}:
        scans = data.count(SCAN)
        if pixels * scans > MAX_PASSES:
            return f"{scans:,} scans of {pixels:,} pixels, more than {MAX_PASSES:,} in all"
    in_python = any(tile[0] in Image.DECODERS for tile in image.tile)
    if in_python and len(data) > MAX_BYTES_IN_PYTHON:
        kind = f"a {image.format} file of a kind that is decoded slowly"
        return f"{kind}, of more than {MAX_BYTES_IN_PYTHON >> 20} MiB"
    return None


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
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    table = ((np.arange(65536) + 128) // 257).astype(np.uint8)
    return Image.fromarray(table[values])


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
