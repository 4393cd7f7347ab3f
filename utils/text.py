"""Words for messages: shortened lists and the nearest known name."""

import difflib
from collections.abc import Iterable


def join_some(items: Iterable[str], count: int = 10) -> str:
    """The first `count` of `items`, separated by commas, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message: the entry of `known` most like `word`; empty if none is."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
