"""Checks of one value: numbers in ranges, names, paths, pairs; each says in words what it expects."""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from utils.addresses import SCHEMES, is_address
from utils.download import PINNED_URL


@dataclass(frozen=True)
class Check:
    """What a value must satisfy: `expected` says it in words, `remedy` adds what a wrong value probably meant."""

    expected: str
    holds: Callable
    remedy: Callable = lambda value: ""


def at_least(low: float) -> Check:
    """A number not below `low`."""
    return Check(f"of at least {low}", lambda value: value >= low)


def between(low: float, high: float) -> Check:
    """A number from `low` to `high`, both allowed."""
    return Check(f"from {low} to {high}", lambda value: low <= value <= high)


def one_of(*names: str) -> Check:
    """One of a few words."""

    def remedy(value: str) -> str:
        close = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""

    return Check(f"one of {', '.join(names)}", lambda value: value in names, remedy)


def _share(value: float) -> str:
    return f"; {value:g} % is written {value / 100:g}" if 1 < value <= 100 else ""


def _literal_path(value: str) -> bool:
    """Whether `value` is a path that needs no shell: without ~ before it, and without variables in it."""
    return not re.search(r"^~|(^|/)\$|\$\{|://|\0", value)


def _is_policy(value: str) -> bool:
    """Whether timm takes every section of an augmentation policy; it skips sections without a digit in silence.

    It also takes a probability above 1 for 1, and neither operations nor chains to mix: rand-n0, augmix-w0.
    """
    n, share, some = r"\d+(\.\d+)?", r"(0(\.\d+)?|1(\.0+)?)", r"0*[1-9]\d*"
    rand = rf"rand(-(m\d+|n{some}|inc[01]|mmax\d+|mstd{n}|p{share}|tweights|t3aw?))*"
    augmix = rf"augmix(-(w{some}|[md]\d+|a{n}|b[01]|mstd{n}))*"
    fixed = rf"(originalr?|v0r?|3a)(-mstd{n})?"
    return value == "" or re.fullmatch(rf"{rand}|{augmix}|{fixed}", value) is not None


def _is_size_schedule(value: list) -> bool:
    """Whether `value` is a list of [epoch, size], in the order of the epochs."""
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2]
    epochs = [epoch for epoch, _ in pairs if type(epoch) is int and epoch >= 0]
    fits = len(epochs) == len(value) and epochs == sorted({*epochs})
    return fits and all(_is_size(size) for _, size in pairs)


def _is_size(value: object) -> bool:
    """Whether `value` is the side of a square, or [height, width], of at least 32 pixels."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and side >= 32 for side in sides)


def _is_scale_list(value: list) -> bool:
    """Whether `value` is a list of [pattern, factor] pairs."""
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2]
    return len(pairs) == len(value) and all(
        isinstance(pattern, str)
        and pattern
        and type(factor) in (int, float)
        and 0 < factor < math.inf
        for pattern, factor in pairs
    )


WEIGHT_FILES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")
PATH_TEXT = "a path, written out (no ~, $ or URL)"

ANY = Check("", lambda value: True)
POSITIVE = Check("above 0", lambda value: value > 0)
SHARE = Check("from 0 to 1", lambda value: 0 <= value <= 1, _share)
SHARE_BELOW_1 = Check("from 0 to below 1", lambda value: 0 <= value < 1, _share)
SHARE_ABOVE_0 = Check("above 0, up to 1", lambda value: 0 < value <= 1, _share)
FACTOR = Check("above 0, up to 1", lambda value: 0 < value <= 1)
NAME = Check("a model's name", lambda value: re.fullmatch(r"\w([\w.:/-]*\w)?", value))
NAME_OR_NONE = Check("a model's name", lambda value: value == "" or NAME.holds(value))
PATH = Check(PATH_TEXT, _literal_path)
FILLED_PATH = Check(PATH_TEXT, lambda value: bool(value) and _literal_path(value))
DATA_PATH = Check(
    f"a path, written out (no ~ or $), or an address that begins with {', '.join(f'{name}://' for name in SCHEMES)}",
    lambda value: (bool(value) and _literal_path(value)) or is_address(value),
    lambda value: (
        "; without a password or query, which would be written to files: docs/data.md says where they go"
        if "://" in value and any(sign in value for sign in "@?#")
        else ""
    ),
)
WEIGHTS = Check(
    "a path, written out (no ~ or $), or https://…#sha256=<64 hex digits>",
    lambda value: _literal_path(value) or PINNED_URL.fullmatch(value),
    lambda value: "; only https with the file's SHA-256 is downloaded" if "://" in value else "",
)
RUN_PATH = Check(
    f"{PATH_TEXT} to a run or checkpoint folder",
    lambda value: _literal_path(value) and not value.endswith(WEIGHT_FILES),
    lambda value: "; files of weights go to --pretrained" if value.endswith(WEIGHT_FILES) else "",
)
FOLDER_NAME = Check(
    "a folder's name, without '/'",
    lambda value: value not in ("", ".", "..") and not re.search(r"[/\\\0\n]", value),
)
NAMES = Check(
    "names with commas between, such as TRAIN.EPOCHS,threads",
    lambda value: re.fullmatch(r"([\w.]+(,[\w.]+)*)?", value),
)
PATTERNS = Check(
    "names of parameters or modules, with * or ?, with commas between, such as stem,stages.0 or '*,!head'",
    lambda value: re.fullmatch(r"(!?[\w.*?]+(,!?[\w.*?]+)*)?", value),
)
SCALES = Check(
    "a list of [name of a parameter or module, factor above 0], such as [['*.positions', 0.1]]",
    _is_scale_list,
)
SET_NAMES = Check(
    "names of test sets with commas between, such as val,v2,a",
    lambda value: re.fullmatch(r"([\w-]+(,[\w-]+)*)?", value),
)
SIZES = Check(
    "sizes of at least 32 pixels with commas between, such as 192,224,256",
    lambda value: (
        re.fullmatch(r"(\d+(,\d+)*)?", value)
        and all(int(size) >= 32 for size in value.split(",") if size)
    ),
)
SIZE = Check("of at least 32, or [height, width]", _is_size)
CHANNELS = Check("1 or 3", lambda value: value in (1, 3))
SIZE_SCHEDULE = Check(
    "a list of [first epoch, size of at least 32], epochs ascending, such as [[0, 96], [10, 128]]",
    _is_size_schedule,
)
CLASSES = Check("of 0 or at least 2", lambda value: value == 0 or value >= 2)
COLOURS = Check(
    "with each from 0 to 1",
    lambda values: all(0 <= value <= 1 for value in values),
    lambda values: "; divide values of 0 … 255 by 255" if max(values) > 1 else "",
)
SPREADS = Check(
    "with each above 0, up to 1",
    lambda values: all(0 < value <= 1 for value in values),
    COLOURS.remedy,
)
AREAS = Check("with 0 < first ≤ second ≤ 1", lambda pair: 0 < pair[0] <= pair[1] <= 1)
RATIOS = Check("with 0 < first ≤ second", lambda pair: 0 < pair[0] <= pair[1])
BETAS = Check(
    "with 0 ≤ first ≤ second < 1",
    lambda pair: 0 <= pair[0] <= pair[1] < 1,
    lambda pair: "; are the two swapped?" if 0 <= pair[1] < pair[0] < 1 else "",
)
DECAY = Check(
    "of 0 or from 0.5 to below 1",
    lambda value: value == 0 or 0.5 <= value < 1,
    lambda value: f"; the share that is kept would be {1 - value:g}" if 0 < value < 0.5 else "",
)
POLICY = Check(
    "'' or a policy of timm's such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0, 3a",
    _is_policy,
)
