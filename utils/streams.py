"""Standard streams: output that is closed, broken or full is dropped, and text is UTF-8 whatever the locale."""

import io
import os
import sys


class _Output(io.FileIO):
    """A file that loses what cannot be written, as into a pipe whose reader has ended or onto a full disk."""

    def write(self, content: bytes) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def protect_streams() -> None:
    """Make the standard streams of this process safe to write to; call it once, first of all.

    In a locale without UTF-8, where paths and printed text could not be encoded, the program starts again with Python's
    UTF-8 mode.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # it takes the number of a closed stream, which would go to the next file
    os.close(free)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # replaced by a caller, such as a test
        if stream is not None:
            stream.flush()
        output = io.TextIOWrapper(
            io.BufferedWriter(_Output(number, "w", closefd=False)),
            encoding=stream.encoding if stream is not None else "utf-8",
            errors="backslashreplace",
            line_buffering=number == 2 or os.isatty(number),
        )
        setattr(sys, name, output)
