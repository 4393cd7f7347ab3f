#!/usr/bin/env python
"""Benchmarks of a model, of its memory traffic on a GPU, of the data loader, the training loop, and more processes.

What is compared is timed in turns, so that a machine that slows down slows all of it. Leave the machine idle
otherwise. docs/performance.md describes the method.

examples:
  python tools/benchmark.py model dat_tiny swin_tiny_patch4_window7_224 --dtype bfloat16
  python tools/benchmark.py bytes dat_tiny swin_tiny_patch4_window7_224
  python tools/benchmark.py data --data-path /imagenet --workers 8
  python tools/benchmark.py loop --cfg configs/dat_tiny.yaml --data-path /imagenet
  python tools/benchmark.py scaling dat_tiny --processes 2 --threads 1
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.memory import use_large_pages

use_large_pages()  # as main.py does
from tools.benchmarks import data, loop, model, scaling, traffic  # noqa: E402
from utils.errors import StorageError, as_exit_code  # noqa: E402

BENCHMARKS = {
    "model": model,
    "bytes": traffic,
    "data": data,
    "loop": loop,
    "scaling": scaling,
}


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module in BENCHMARKS.items():
        subparser = subparsers.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.add_argument(
            "--json", type=Path, metavar="FILE", help="write the numbers to FILE"
        )
    args = parser.parse_args(arguments)
    result = BENCHMARKS[args.benchmark].run(args)
    print(BENCHMARKS[args.benchmark].table(result))
    if args.json:
        write(args.json, result)


def write(path: Path, result: dict) -> None:
    """Write the numbers as JSON. Raises StorageError."""
    try:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"--json {path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
