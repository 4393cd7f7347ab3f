"""Report of tools/doctor.py: findings, printed as they come and counted."""

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from utils.errors import DataError

MAX_EXAMPLES = 5  # of a finding
COLOURS = {"OK": "32", "WARN": "33", "FAIL": "31"}  # green, yellow, red


class Finding(NamedTuple):
    """One entry of the report: level, topic, what was found, what to do about it, and examples."""

    level: str  # a key of COLOURS
    topic: str
    text: str
    remedy: str = ""
    examples: Sequence[str] = ()


class Report:
    """Prints findings as they come and counts them by level."""

    def __init__(self):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid text
        self.count: Counter = Counter()
        self._coloured = sys.stdout.isatty()
        self._width = max(80, min(120, shutil.get_terminal_size((110, 24)).columns))

    def section(self, title: str) -> None:
        """Start a section of the report."""
        print(f"\n{self._paint(title, '1')}")

    def show(self, findings: Iterable[Finding]) -> None:
        """Print findings, each with its examples and remedy."""
        for level, topic, text, remedy, examples in findings:
            self.count[level] += 1
            head = f"  {self._paint(f'{level:<4}', COLOURS[level])}  {topic:<15} "
            print(head + f"\n{'':24}".join(self._wrap(text)))
            for example in examples[:MAX_EXAMPLES]:
                short = textwrap.shorten(example, self._width - 26, placeholder=" …")
                print(f"{'':24}· {short}")
            if len(examples) > MAX_EXAMPLES:
                print(f"{'':24}  and {len(examples) - MAX_EXAMPLES:,} more")
            for number, line in enumerate(self._wrap(remedy)):
                print(f"{'':24}{'  ' if number else '→ '}{line}")

    def conclude(self) -> int:
        """Print the last line; return the exit code."""
        ok, warn, fail = (self.count[level] for level in COLOURS)
        level = "FAIL" if fail else "WARN" if warn else "OK"
        texts = {
            "FAIL": "Not ready: repair what FAIL reports, then check again.",
            "WARN": "Ready, but read the warnings first.",
            "OK": "Ready.",
        }
        print(f"\n{self._paint(texts[level], COLOURS[level])} {ok} OK, {warn} WARN, {fail} FAIL")
        return DataError.exit_code if fail else 0

    def _wrap(self, text: str) -> list[str]:
        # Paths are not broken, so that they can be copied.
        width = self._width - 26
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)

    def _paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._coloured else text


def format_bytes(count: float) -> str:
    """A number of bytes as text, such as 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
