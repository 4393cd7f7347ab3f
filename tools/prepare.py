#!/usr/bin/env python
"""Dataset preparation: from a download to the folder that --data-path takes.

python tools/prepare.py imagenet /downloads/imagenet /imagenet --to zip
python tools/prepare.py imagenette imagenette2-160.tgz imagenette
python tools/prepare.py cifar10 cifar-10-python.tar.gz cifar10
python tools/prepare.py digits output/digits

SOURCE is a file or the folder that holds the download; OUT gets `train` and `val`. The same command
resumes where it was stopped. Images are copied byte by byte, counted and compared with the
published numbers; CIFAR-10 and the digits, which are no files, are encoded.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.datasets.cifar10 import Cifar10
from tools.datasets.digits import Digits
from tools.datasets.imagenet import open_imagenet
from tools.datasets.imagenette import ARCHIVES, Imagenette
from tools.datasets.output import OUTPUTS
from tools.datasets.prepare import PUBLISHED, WORK, prepare
from tools.datasets.raw_dataset import RawDataset
from utils.errors import as_exit_code


def open_raw(args: argparse.Namespace) -> RawDataset:
    """The download that the command names."""
    match args.dataset:
        case "imagenet":
            return open_imagenet(args.source)
        case "imagenette":
            return Imagenette(args.source, args.out / WORK, args.size)
        case "cifar10":
            return Cifar10(args.source, args.out / WORK, args.quality)
        case "digits":
            return Digits()


def quality(text: str) -> int:
    """The quality of a JPEG."""
    if not (text.isdigit() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 to 100")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    imagenet = commands.add_parser(
        "imagenet",
        help="the original archives with the devkit, also unpacked, Kaggle's CLS-LOC, timm's "
        "WebDataset shards or Hugging Face's parquet files",
    )
    imagenet.add_argument("source", type=Path, metavar="SOURCE", help="folder of the download")
    imagenette = commands.add_parser("imagenette", help="ten classes of ImageNet")
    imagenette.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="SOURCE",
        help="imagenette2*.tgz or its folder; downloaded if omitted",
    )
    imagenette.add_argument(
        "--size",
        choices=ARCHIVES,
        default="160px",
        help="of the download, if SOURCE is omitted (default: %(default)s)",
    )
    cifar10 = commands.add_parser("cifar10", help="60,000 images of 32×32 pixels")
    cifar10.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="SOURCE",
        help="cifar-10-python.tar.gz or its folder; downloaded if omitted",
    )
    cifar10.add_argument(
        "--quality",
        type=quality,
        metavar="1…100",
        help="write JPEGs of this quality; without it lossless PNGs, which take longer to decode",
    )
    digits = commands.add_parser("digits", help="scikit-learn's handwritten digits, for the demo")
    for command in (imagenet, imagenette, cifar10, digits):
        command.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
        command.add_argument(
            "--to",
            choices=OUTPUTS,
            default="tree",
            help="folders of files, zip files or packs (default: %(default)s)",
        )
        command.add_argument(
            "--any-count",
            action="store_true",
            help="accept other numbers of images and classes than the published ones",
        )
    return parser.parse_args(arguments)


@as_exit_code
def main(arguments: list[str]) -> None:
    """Prepare a dataset."""
    args = parse(arguments)
    raw = open_raw(args)
    where = getattr(args, "source", None)
    plan = {
        "dataset": args.dataset,
        "source": str(where.resolve()) if where else PUBLISHED,
        "to": args.to,
        **raw.settings,
    }
    prepare(raw, args.out, plan, args.to, any_count=args.any_count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
