#!/usr/bin/env python
"""Picture of an HTML page, such as the explorer or a report, as a small PNG; needs Chromium.

example:
  python tools/screenshot.py explore.html docs/explorer.png --size 1280x960
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from utils.errors import ConfigError, DataError, as_exit_code
from utils.files import write_atomically

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--virtual-time-budget=20000"),
)


def photograph(page: Path, size: tuple[int, int]) -> Image.Image:
    """The page as a browser window of `size` (width, height) shows it first. Raises ConfigError, DataError."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise ConfigError(f"no {' or '.join(PROGRAMS)} is installed; apt-get install chromium")
    if not page.is_file():
        raise DataError(f"{page} does not exist; expected an HTML file")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "page.png")
        window = f"--window-size={size[0]},{size[1]}"
        command = [program, *FLAGS, f"--user-data-dir={folder}/profile", window]
        command += [f"--screenshot={picture}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not picture.exists():
            raise DataError(f"{page}: the browser made no picture: {done.stderr.strip()[-300:]}")
        return Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, metavar="PAGE", help="HTML file")
    parser.add_argument("out", type=Path, metavar="PNG", help="file to write")
    parser.add_argument("--size", default="1280x960", help="of the window; default 1280x960")
    args = parser.parse_args(arguments)
    try:
        width, height = map(int, args.size.split("x"))
    except ValueError:
        raise ConfigError(f"--size {args.size}: expected WIDTHxHEIGHT, such as 1280x960") from None
    # 256 colours take a third of the size; this method keeps the few bright ones of points and marks.
    small = photograph(args.page, (width, height)).quantize(256, method=Image.Quantize.FASTOCTREE)
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    write_atomically(args.out, file.getvalue())
    print(f"{args.out}: {len(file.getvalue()) / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
