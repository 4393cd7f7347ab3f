"""File kinds: what a file is by its content, whatever its name says, and what to do with one that holds no weights."""

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

AGAIN = "Download or copy it again."
UNPACK = "Unpack it and give the path of the file of weights inside."
OTHER = "Get the weights as .pth or .safetensors."
PAGE = (
    "Download the file itself: the address is that of a page about it, or needs a login or a token."
)
SAVE = "save its state_dict() with torch.save."
# Names that files of weights have; the content decides, these only show what an archive or a folder has to offer.
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


class FileKind(NamedTuple):
    """What a file is, as a noun phrase, and what to do about it; no remedy where weights can be read."""

    name: str
    remedy: str = ""


SAFETENSORS = FileKind("a safetensors file")
TORCH = FileKind("a file of torch.save")
LEGACY_TORCH = FileKind("a file of torch.save before 1.6")
INDEX = FileKind("an index of safetensors files")

# Where in a file which bytes are, and what it then is.
SIGNATURES = [
    (0, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", *LEGACY_TORCH),
    (0, b"version https://git-lfs", "a Git LFS pointer", "Get the file with `git lfs pull`."),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", OTHER),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", OTHER),
    (0, b"GGUF", "a GGUF file of llama.cpp", OTHER),
    (4, b"TFL3", "a TensorFlow Lite model", OTHER),
    (0, b"%PDF", "a PDF document", OTHER),
    (0, b"\x89PNG\r\n", "a PNG image", OTHER),
    (0, b"\xff\xd8\xff", "a JPEG image", OTHER),
]


def kind_of(path: Path) -> FileKind:
    """The kind of the file at `path`. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        return FileKind("an empty file", AGAIN)
    for offset, signature, name, remedy in SIGNATURES:
        if head[offset:].startswith(signature):
            return FileKind(name, remedy)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_zip(path)
    if head[8:9] == b"{":  # after the length of this JSON header
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return FileKind(
            "a pickle that torch.save did not write", f"Load it where it is from and {SAVE}"
        )
    if (head[:1] == b"\x08" and path.suffix.lower() == ".onnx") or b"pytorch\x1a" in head[:32]:
        return FileKind("an ONNX model", OTHER)
    if not any(head):
        return FileKind("a file of zeros, an incomplete download", AGAIN)
    return _kind_of_text(path, head)


def _kind_of_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        return FileKind(f"truncated or damaged: a zip without its end ({error})", AGAIN)
    files = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in files:
        if "constants.pkl" in files:
            return FileKind("a TorchScript program", f"Open it with torch.jit.load and {SAVE}")
        return TORCH
    if files & {"archive_format", "serialized_exported_program.json"}:
        return FileKind(
            "a program of torch.export (.pt2)", f"Open it with torch.export.load and {SAVE}"
        )
    if "model.weights.h5" in files:
        return FileKind("a Keras model", OTHER)
    if files and all(name.endswith(".npy") for name in files):
        return FileKind("an archive of NumPy arrays (.npz)", OTHER)
    inside = [name for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]
    first = f" with {printable(inside[0])} in it" if inside else ""
    return FileKind(f"a zip archive{first}", UNPACK)


def _kind_of_text(path: Path, head: bytes) -> FileKind:
    """What begins with `head` and is none of the binary formats."""
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("<"):
        return FileKind("a web page (HTML or XML)", PAGE)
    if not all(c.isprintable() or c.isspace() for c in text[:200]):
        return FileKind(
            f"truncated, damaged or no known format: it begins with the bytes {head[:8].hex(' ')}",
            AGAIN,
        )
    if text.startswith(("{", "[")):
        return INDEX if read_index(path) else FileKind(f"JSON text, {_quote(text)}", PAGE)
    if "/annex/objects/" in text:
        return FileKind("a git-annex pointer", "Get the file with `git annex get`.")
    return FileKind(f"text, {_quote(text)}", PAGE)


def read_index(path: Path) -> list[Path]:
    """The files that an index of Hugging Face's, model.safetensors.index.json, lists; [] if `path` is none."""
    try:
        names = set(json.loads(path.read_bytes())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    # Names of files beside it: an index does not reach other folders.
    plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    return [path.parent / name for name in sorted(names)] if plain else []


def printable(text: str, length: int = 100) -> str:
    """`text` without line breaks and escape codes, in at most so many characters."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= length else f"{clean[:length]}…"


def _quote(text: str) -> str:
    return f"which begins with {printable(text.strip(), 60)!r}"
