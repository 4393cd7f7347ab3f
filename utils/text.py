"""Words for messages: shortened lists, numbers with their nouns, the nearest known name, plain names."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence


def join_some(items: Iterable[str], count: int = 10) -> str:
    """The first `count` of `items`, separated by commas, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def quantity(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: 1 epoch, 1,442 images, 2 classes."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'tch', 'sh')) else 's'}"


def compare_names(names: Sequence[str], others: Sequence[str]) -> str:
    """How `names` differ from `others`: "lacks eel and has besides cat, dog", or "has them in another order"."""
    lacking, more = set(others) - set(names), set(names) - set(others)
    parts = [
        f"{verb} {join_some(sorted(some), 5)}"
        for verb, some in (("lacks", lacking), ("has besides", more))
        if some
    ]
    return " and ".join(parts) or "has them in another order"


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message: the entry of `known` most like `word`; empty if none is."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def plain_name(name: str) -> str:
    """What is equal of two spellings of one name: composed accents, no spaces at the ends."""
    return unicodedata.normalize("NFC", name).strip()


def format_size(size: int | Sequence[int]) -> str:
    """The size of images for people: "224", or "160×320" of (height, width)."""
    return str(size) if isinstance(size, int) else "×".join(map(str, size))
