#!/usr/bin/env python
"""How fast is it, beside what, and how far from what the machine could do?

    python tools/benchmark.py model dat_tiny swin_tiny_patch4_window7_224 --dtype bfloat16
    python tools/benchmark.py data --data-path /imagenet --workers 8
    python tools/benchmark.py loop --cfg configs/dat_tiny.yaml --data-path /imagenet
    python tools/benchmark.py scaling dat_tiny --processes 2 --threads 1

Leave the machine alone meanwhile. docs/performance.md says how it is measured.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.memory import use_large_pages

use_large_pages()  # as main.py does
from tools.benchmarks import data, loop, model, scaling  # noqa: E402
from utils.errors import StorageError, as_exit_code  # noqa: E402

SUBJECTS = {
    "model": model,
    "data": data,
    "loop": loop,
    "scaling": scaling,
}


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="subject", required=True)
    for name, module in SUBJECTS.items():
        subparser = subparsers.add_parser(name, help=module.__doc__, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    args = parser.parse_args(arguments)
    result = SUBJECTS[args.subject].run(args)
    print(SUBJECTS[args.subject].table(result))
    if args.json:
        write(args.json, result)


def write(path: Path, result: dict) -> None:
    """The numbers as JSON."""
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"--json {path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
