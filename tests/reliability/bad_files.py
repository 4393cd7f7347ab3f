#!/usr/bin/env python
"""Damaged, odd and malicious files that training must survive: image files and archives, made on demand.

python tests/reliability/bad_files.py FOLDER writes FOLDER/images, every kind of image file, and FOLDER/archives, every
archive.
"""

import argparse
import functools
import gzip
import io
import os
import random
import stat
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from helpers.images import encode
from helpers.pipeline import image_dataset
from PIL import Image

from data.decode import UNREADABLE, decode
from utils.errors import DataError

GOOD, BAD = "read", "unreadable"  # what a reader makes of a file
ANY = "either"  # as the libraries happen to be built
IGNORED = "no image"
REFUSED = "refused"  # of an archive

# --- Image files ----------------------------------------------------------------------------------


def make_bad_images(folder: Path) -> dict[str, str]:
    """Write one file of every kind into `folder`; returns by name what is expected: GOOD, BAD, ANY or IGNORED."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {**_cut_or_foreign(), **_broken_inside(), **_odd_but_healthy()}
    for name, (content, _) in kinds.items():
        (folder / name).write_bytes(content)
    return {name: expected for name, (_, expected) in kinds.items()} | _not_files(folder)


def _picture() -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)


def _cut_or_foreign() -> dict[str, tuple[bytes, str]]:
    """Files that end early, and files that are something else than an image."""
    picture = _picture()
    jpeg, png = encode(picture, "JPEG"), encode(picture, "PNG")
    half = {f"half.{kind}": (encode(picture, kind), 900) for kind in ("bmp", "tiff", "webp")} | {
        "half_gif.jpg": (encode(picture, "GIF"), 900),
        "half.jpg": (jpeg, len(jpeg) // 2),
        "half.png": (png, len(png) // 2),
        "half_progressive.jpg": (encode(picture, "JPEG", progressive=True), 1500),
        "last_two_bytes_missing.jpg": (jpeg, -2),
        "header_only.jpg": (jpeg, 200),
        "three_bytes.jpg": (jpeg, 3),
        "end_chunk_missing.png": (png, -12),
    }
    foreign = {
        "empty.jpg": b"",
        "html.jpg": b"<!DOCTYPE html><html>404 Not Found</html>",
        "text.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "zeros.jpg": bytes(4096),
        "noise.jpg": np.random.default_rng(2).bytes(4096),
        "zip.jpg": b"PK\x03\x04" + bytes(60),
        "pickle.jpg": b"cposix\nsystem\n(S'false'\ntR.",
        "postscript.jpg": encode(picture, "EPS"),  # Pillow's reader would start Ghostscript
        "targa.jpg": encode(picture, "TGA"),
        "not_utf8_\udcff.jpg": b"<html>",
        "svg.jpg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    }
    cut = {name: (content[:end], BAD) for name, (content, end) in half.items()}
    cut["end_chunk_missing.png"] = (cut["end_chunk_missing.png"][0], ANY)
    return cut | {name: (content, BAD) for name, content in foreign.items()}


def _broken_inside() -> dict[str, tuple[bytes, str]]:
    """Files of the right kind whose contents are damaged, lie or are of no use."""
    picture = _picture()
    jpeg, png, gif = encode(picture, "JPEG"), encode(picture, "PNG"), encode(picture, "GIF")
    sof = jpeg.index(b"\xff\xc0")
    scan = jpeg.index(b"\xff\xda") + 40
    bmp = encode(picture, "BMP")
    webp = bytearray(encode(picture, "WEBP"))
    webp[30:60] = bytes(30)
    floats = Image.fromarray(np.ones((8, 8), np.float32))
    wide = Image.fromarray(np.full((8, 8), 1 << 20, np.int32))
    return {
        "flipped_byte.png": (_flip(png, 400), BAD),
        "flipped_byte.jpg": (
            _flip(jpeg, scan),
            ANY,
        ),  # decodes to another picture: only a SHA-256 tells
        "not_deflated.png": (lying_png(8, 8, b"no zlib stream"), BAD),
        "too_few_pixels.png": (lying_png(64, 64, zlib.compress(b"\0" * 99)), BAD),
        "no_pixels.png": (lying_png(0, 0, b""), BAD),
        "bomb.png": (lying_png(30_000, 30_000, zlib.compress(bytes(99))), BAD),
        "bomb.jpg": (jpeg[: sof + 5] + b"\xff\xdc\xff\xdc" + jpeg[sof + 9 :], BAD),
        "bomb.tiff": (lying_tiff(60_000, 60_000), BAD),
        "text_bomb.png": (_png_with(png, b"zTXt", b"x\0\0" + zlib.compress(bytes(2**22))), BAD),
        "many_scans.jpg": (_with_scans(70), BAD),
        "long_text.ppm": (b"P3 2400 2400 255\n" + b"1 " * (3 * 2400**2), BAD),
        "no_height.jpg": (jpeg[: sof + 5] + b"\0\0" + jpeg[sof + 7 :], BAD),
        "arithmetic.jpg": (jpeg[: sof + 1] + b"\xc9" + jpeg[sof + 2 :], ANY),
        "lossless.jpg": (jpeg[: sof + 1] + b"\xc3" + jpeg[sof + 2 :], BAD),
        "twelve_bits.jpg": (jpeg[: sof + 4] + b"\x0c" + jpeg[sof + 5 :], BAD),
        "no_tables.jpg": (jpeg.replace(b"\xff\xdb", b"\xff\xec"), BAD),
        "lying_header.bmp": (bmp[:18] + struct.pack("<ii", 9999, 9999) + bmp[26:], BAD),
        "lying_gif.jpg": (gif[:6] + b"\xff\xff\xff\xff" + gif[10:], ANY),
        "broken_gif.jpg": (gif[: len(gif) // 3] + bytes(len(gif) // 3), ANY),
        "broken.webp": (bytes(webp), ANY),
        "float.tiff": (encode(floats, "TIFF"), BAD),
        "thirty_two_bits.tiff": (encode(wide, "TIFF"), BAD),
    }


def _odd_but_healthy() -> dict[str, tuple[bytes, str]]:
    """Files that look wrong and have to be read."""
    picture = _picture()
    grey = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    second = [picture.rotate(9)]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    kinds = {
        "sixteen_bits.png": encode(grey, "PNG"),
        "sixteen_bits.tiff": encode(grey, "TIFF"),
        "cmyk.jpg": encode(picture.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(picture.convert("L"), "JPEG"),
        "palette.png": encode(picture.convert("P"), "PNG"),
        "alpha.png": encode(picture.convert("RGBA"), "PNG"),
        "grey_alpha.png": encode(picture.convert("LA"), "PNG"),
        "one_bit.png": encode(picture.convert("1"), "PNG"),
        "animated.png": encode(picture, "PNG", save_all=True, append_images=second),
        "animated_gif.jpg": encode(picture, "GIF", save_all=True, append_images=second),
        "animated.webp": encode(picture, "WEBP", save_all=True, append_images=second),
        "two_pictures.jpg": encode(picture, "MPO", save_all=True, append_images=second),
        "one_pixel.png": encode(Image.new("RGB", (1, 1)), "PNG"),
        "one_pixel_wide.png": encode(Image.new("RGB", (1, 20_000)), "PNG"),
        "png_inside.jpg": encode(picture, "PNG"),
        "gif_inside.jpg": encode(picture, "GIF"),
        "rotated.jpg": encode(picture, "JPEG", exif=rotated),
        "exif_garbage.jpg": encode(picture, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage"),
        "bytes_after_the_end.jpg": encode(picture, "JPEG") + b"<?php evil ?>",
        "progressive.jpg": encode(picture, "JPEG", progressive=True),
    }
    return {name: (content, GOOD) for name, content in kinds.items()}


def _not_files(folder: Path) -> dict[str, str]:
    """What has an image's name and is no file at all; devices and lost permissions need root, or its absence."""
    (folder / "folder.jpg").mkdir(exist_ok=True)
    (folder / ".hidden.jpg").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"")
    for name, target in (
        ("dangling_link.jpg", "nowhere.jpg"),
        ("link_to_itself.jpg", "link_to_itself.jpg"),
        ("link_to_a_device.jpg", "/dev/zero"),
    ):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    if not (folder / "pipe.jpg").exists():
        os.mkfifo(folder / "pipe.jpg")
    with (folder / "seventy_megabytes.jpg").open("wb") as file:
        file.truncate(70 * 2**20)  # a hole: it costs no space
    (folder / "no_permission.jpg").write_bytes(encode(_picture(), "JPEG"))
    (folder / "no_permission.jpg").chmod(0)
    return {
        "folder.jpg": IGNORED,
        ".hidden.jpg": IGNORED,
        "Thumbs.db": IGNORED,
        "dangling_link.jpg": BAD,
        "link_to_itself.jpg": BAD,
        "link_to_a_device.jpg": BAD,
        "pipe.jpg": BAD,
        "seventy_megabytes.jpg": BAD,
        "no_permission.jpg": GOOD if os.geteuid() == 0 else BAD,
    }


def lying_png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG that claims to be `width` × `height` pixels, with `pixels` as its compressed data."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def lying_tiff(width: int, height: int) -> bytes:
    """An uncompressed TIFF that claims to be `width` × `height` grey pixels and has none."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 99}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def _with_scans(count: int) -> bytes:
    """A progressive JPEG of 4096 × 4096 pixels whose last scan comes so many more times."""
    jpeg = encode(Image.new("L", (4096, 4096)), "JPEG", progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * count + jpeg[-2:]


def _png_with(png: bytes, kind: bytes, data: bytes) -> bytes:
    """`png` with another chunk after its header."""
    return png[:33] + _chunk(kind, data) + png[33:]


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]


# --- Archives -------------------------------------------------------------------------------------


def make_bad_archives(folder: Path) -> dict[str, str]:
    """Write `folder`/<kind>/train.zip or .tar of every kind; returns by kind a word of the refusal.

    Opening it as a dataset, or reading all of its images, has to end in a DataError with that word.
    """
    refusals = {}
    for suffix, kinds in ((".zip", _bad_zips()), (".tar", _bad_tars())):
        for kind, (content, refusal) in kinds.items():
            name = f"{suffix[1:]}_{kind}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"train{suffix}").write_bytes(content)
            refusals[name] = refusal
    return refusals


def valid_zip(
    *more: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    """A zip of four images in two classes, and of `more` members."""
    with (
        warnings.catch_warnings(action="ignore"),  # of names that appear twice
        zipfile.ZipFile(buffer := io.BytesIO(), "w", method) as archive,
    ):
        for name, data in (*_images(), *more):
            archive.writestr(name, data)
    return buffer.getvalue()


def valid_tar(*more: tarfile.TarInfo) -> bytes:
    """A tar of four images in two classes, and of `more` members, which have no data."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        for name, data in _images():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in more:
            archive.addfile(member)
    return buffer.getvalue()


def _images() -> list[tuple[str, bytes]]:
    jpeg = encode(_picture(), "JPEG")
    return [(f"class_{number % 2}/{number}.jpg", jpeg) for number in range(4)]


def _bad_zips() -> dict[str, tuple[bytes, str]]:
    valid, jpeg = valid_zip(), encode(_picture(), "JPEG")
    link = zipfile.ZipInfo("class_0/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    zeros = zipfile.ZipInfo("class_0/zeros.jpg")
    zeros.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(prefixed := io.BytesIO(), "w") as archive:
        archive.writestr("class_0/train.zip", valid)
    return {
        "parent": (valid_zip(("../class_0/evil.jpg", jpeg)), "leads out of the archive"),
        "parent_inside": (valid_zip(("class_0/../../evil.jpg", jpeg)), "leads out of the archive"),
        "absolute": (valid_zip(("/etc/evil.jpg", jpeg)), "leads out of the archive"),
        "link": (valid_zip((link, b"/etc/passwd")), "is a link"),
        "duplicate": (valid_zip(("class_0/0.jpg", jpeg[:-9])), "appears twice"),
        "duplicate_spelling": (valid_zip(("./class_0//0.jpg", jpeg)), "appears twice"),
        "bomb": (valid_zip((zeros, bytes(2**22))), "times its size"),
        "bzip2": (valid_zip(method=zipfile.ZIP_BZIP2), "compressed by method 12"),
        "encrypted": (_patch_zip(valid, 8, "<H", 1), "is encrypted"),
        "huge": (_patch_zip(valid, 20, "<II", 2**30, 2**30), "more than 64 MiB"),
        "lying_size": (_patch_zip(valid, 24, "<I", len(jpeg) + 1), "CRC-32"),
        "elsewhere": (_patch_zip(valid, 42, "<I", 2**31), "would lie in bytes"),
        "flipped_byte": (_flip(valid, 300), "CRC-32"),
        "cut": (valid[:-100], "not a readable zip"),
        "cut_in_front": (valid[5000:], "would lie in bytes"),
        "prefixed": (prefixed.getvalue(), "holds no image"),
    }


def _bad_tars() -> dict[str, tuple[bytes, str]]:
    valid = valid_tar()
    member_end = tarfile.BLOCKSIZE * (1 + -(-len(_images()[0][1]) // tarfile.BLOCKSIZE))
    long_names = _tar_member("x", tarfile.GNUTYPE_LONGNAME).tobuf() * 3000
    return {
        "parent": (valid_tar(_tar_member("../class_0/evil.jpg")), "leads out of the archive"),
        "absolute": (valid_tar(_tar_member("/etc/evil.jpg")), "leads out of the archive"),
        "link": (valid_tar(_tar_member("class_0/a.jpg", tarfile.SYMTYPE)), "is a link"),
        "hard_link": (valid_tar(_tar_member("class_0/a.jpg", tarfile.LNKTYPE)), "is a link"),
        "device": (valid_tar(_tar_member("class_0/a.jpg", tarfile.CHRTYPE)), "a device"),
        "pipe": (valid_tar(_tar_member("class_0/a.jpg", tarfile.FIFOTYPE)), "a device"),
        "duplicate": (valid_tar(_tar_member("class_0/0.jpg")), "appears twice"),
        "negative_size": (_patch_tar(valid, 124, b"\xff" * 11 + b"\x00"), "would lie in bytes"),
        "huge": (_patch_tar(valid, 124, b"77777777777\0"), "would lie in bytes"),
        "damaged_header": (_flip(valid, member_end + 10), "damaged or cut off at byte"),
        "cut": (valid[: member_end + 600], "would lie in bytes"),
        "cut_between": (valid[:member_end], "damaged or cut off at byte"),
        "compressed": (gzip.compress(valid), "not a readable uncompressed tar"),
        "headers_without_end": (long_names, "not a readable uncompressed tar"),
        "empty": (b"", "not a readable uncompressed tar"),
    }


def _tar_member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "../../etc/passwd" if kind == tarfile.SYMTYPE else ""
    return member


def _patch_zip(data: bytes, offset: int, form: str, *values: int) -> bytes:
    """`data` with other values in the first entry of its central directory."""
    patched = bytearray(data)
    struct.pack_into(form, patched, data.index(b"PK\x01\x02") + offset, *values)
    return bytes(patched)


def _patch_tar(data: bytes, offset: int, value: bytes) -> bytes:
    """`data` with another value in its first header, which gets the checksum that fits."""
    header = bytearray(data[: tarfile.BLOCKSIZE])
    header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[tarfile.BLOCKSIZE :]


# --- Random damage --------------------------------------------------------------------------------


def fuzz(data: bytes, source: random.Random) -> bytes:
    """`data` with one to six bits, bytes or stretches changed, lost or added, half of them near the front."""
    damaged = bytearray(data)
    for _ in range(source.randint(1, 6)):
        if not damaged:
            break
        near = len(damaged) if source.random() < 0.5 else min(256, len(damaged))
        at = source.randrange(near)
        match source.randrange(5):
            case 0:
                damaged[at] ^= 1 << source.randrange(8)
            case 1:
                damaged[at] = source.choice((0, 127, 128, 255))
            case 2:
                damaged[at:at] = source.randbytes(source.randint(1, 8))
            case 3:
                del damaged[at : at + source.randint(1, 64)]
            case 4:
                del damaged[source.randrange(len(damaged)) :]
    return bytes(damaged)


def read_fuzzed(seed: int, folder: Path) -> str:
    """Damage one of `valid_files` at random, the same for the same seed, and read it as data are read.

    Returns GOOD, BAD or, for an archive that is not opened, REFUSED; any other exception is a fault of ours.
    """
    source = random.Random(seed)
    name, content = source.choice(sorted(valid_files().items()))
    damaged = fuzz(content, source)
    if not name.endswith((".zip", ".tar")):
        try:
            decode(damaged, apply_exif=True)
        except UNREADABLE:
            return BAD
        return GOOD
    path = folder / str(seed) / Path(name).name
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged)
    try:
        dataset = image_dataset(path.parent, transform=torch.clone, skip_bad=True)
    except DataError:
        return REFUSED
    return BAD if any(dataset[index].bad for index in range(len(dataset))) else GOOD


@functools.cache
def valid_files() -> dict[str, bytes]:
    """One healthy file of each format that is read, by name: what `fuzz` starts from."""
    picture, second = _picture(), [_picture().rotate(9)]
    return {
        "a.jpg": encode(picture, "JPEG"),
        "progressive.jpg": encode(picture, "JPEG", progressive=True),
        "cmyk.jpg": encode(picture.convert("CMYK"), "JPEG"),
        "two_pictures.jpg": encode(picture, "MPO", save_all=True, append_images=second),
        "a.png": encode(picture, "PNG"),
        "palette.png": encode(picture.convert("P"), "PNG"),
        "animated.png": encode(picture, "PNG", save_all=True, append_images=second),
        "a.gif": encode(picture, "GIF"),
        "a.bmp": encode(picture, "BMP"),
        "a.webp": encode(picture, "WEBP"),
        "a.tiff": encode(picture, "TIFF"),
        "a.ppm": encode(picture, "PPM"),
        "a.avif": encode(picture, "AVIF"),
        "train.zip": valid_zip(),
        "deflated/train.zip": valid_zip(method=zipfile.ZIP_DEFLATED),
        "train.tar": valid_tar(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write them into")
    target = parser.parse_args().folder
    for made in (make_bad_images(target / "images"), make_bad_archives(target / "archives")):
        for kind, outcome in made.items():
            print(f"{kind!a:<28}{outcome}")
