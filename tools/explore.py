#!/usr/bin/env python
"""Deformation explorer: one HTML file in which you click a picture and see what every block reads there.

The file needs no server, network or library. It has the weights of all queries of all blocks: windows, neighbourhoods,
whole maps, sampled points with their offsets, which queries read a point, and what the class depends on.
For DAT with any mixers, and timm's Swin, ViT and PVTv2.

examples:
  python tools/explore.py cat.jpg dog.jpg --resume output/dat_tiny/default
  python tools/explore.py cat.jpg --pretrained dat_pp_tiny_in1k_224.pth --size 448 --out cat.html
  python tools/explore.py cat.jpg --compare output/dat_micro/imagenette_dat output/dat_micro/imagenette_swin
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from torch import Tensor

from analysis import explorer
from analysis.class_gradient import class_gradients
from analysis.recording import record
from engine import build
from tools.common.classifier import Classifier, add_arguments, log_to_stderr, with_weights
from tools.common.pictures import load_recordable, parse_point, read_pixels
from utils.errors import ConfigError, as_exit_code
from utils.files import require_folder_of, write_atomically
from utils.logging import logger

SHOWN = 448  # pixels of the pictures for people, at least
MANY_PIXELS = 300  # of the model's input, above which the last blocks alone are recorded
TOP = 5  # classes


def load_models(args: argparse.Namespace) -> list[Classifier]:
    """The classifier of the command line, or the two of --compare. Raises ConfigError, CheckpointError."""
    if args.compare and (args.resume or args.pretrained or args.model or args.cfg):
        raise ConfigError(
            "--compare names both models; leave out --resume, --pretrained, --cfg and --model"
        )
    found = []
    for spec in args.compare or [None]:
        one = args if spec is None else with_weights(args, Path(spec))
        found.append(load_recordable(one, args.names))
    return found


def explore(classifier: Classifier, path: Path, *, heads: bool, last: bool) -> explorer.Exploration:
    """What `classifier` makes of the picture at `path`."""
    pixels = read_pixels(classifier, path)
    seen = classifier.transform(pixels)
    scale = max(1, SHOWN / max(seen.shape[1:]))
    large = build.at_size(classifier.cfg, [round(scale * side) for side in seen.shape[1:]])
    images = build.normalize(classifier.cfg, classifier.device)(seen[None])
    recording = record(classifier.model, images, heads=heads, last=last)
    probabilities, classes = recording.logits.softmax(0).topk(min(TOP, len(recording.logits)))
    gradients = class_gradients(classifier.model, images, classes.tolist()).cpu()
    return explorer.Exploration(
        name=path.name,
        shown=to_array(build.eval_transform(large, "own")(pixels)),
        seen=to_array(seen),
        predictions=[
            explorer.Prediction(classifier.names[index], p, gradient)
            for index, p, gradient in zip(
                classes.tolist(), probabilities.tolist(), gradients, strict=True
            )
        ],
        recording=recording,
    )


def to_array(pixels: Tensor) -> np.ndarray:
    """(3, H, W) to (H, W, 3)."""
    return pixels.permute(1, 2, 0).contiguous().numpy()


def make_page(args: argparse.Namespace) -> str:
    """The HTML that the command line asks for."""
    models = []
    for classifier in load_models(args):
        last = args.blocks == "last" or (
            not args.blocks and max(build.input_shape(classifier.cfg)) > MANY_PIXELS
        )
        pictures = [explore(classifier, path, heads=args.heads, last=last) for path in args.images]
        models.append(
            explorer.ExploredModel(
                classifier.title, notes_on(classifier, pictures[0], last), pictures
            )
        )
    names = " and ".join(dict.fromkeys(model.title.partition(",")[0] for model in models))
    return explorer.make_page(f"What {names} attends to", models, parse_point(args.point))


def notes_on(classifier: Classifier, picture: explorer.Exploration, last: bool) -> list[str]:
    """What a reader must know about how the pictures were prepared and what is shown."""
    notes = [f"{build.describe_preprocessing(classifier.cfg)}."]
    blocks = picture.recording.blocks
    if not any(block.letter == "D" for block in blocks):
        notes.append("This model has no deformable attention: there are no offsets to see.")
    if last:
        notes.append("The last block of each kind of every stage; --blocks all has every one.")
    return notes


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="cropped as for an evaluation"
    )
    add_arguments(parser, precision=False)
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two models side by side: runs, files of weights, or configurations (random weights)",
    )
    parser.add_argument("--out", type=Path, default=Path("explore.html"), help="file to write")
    parser.add_argument("--heads", action="store_true", help="every head instead of means; larger")
    parser.add_argument(
        "--blocks",
        choices=("all", "last"),
        help="last of each kind and stage; default above 300 px",
    )
    parser.add_argument("--size", type=int, default=0, help="pixels of the model's input")
    parser.add_argument("--point", default="0.48,0.48", metavar="Y,X", help="the first query")
    parser.add_argument("--names", default="lemma", help="as in tools/predict.py")
    return parser.parse_args(arguments)


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    args = parse(arguments)
    require_folder_of(args.out)
    log_to_stderr()
    page = make_page(args)
    write_atomically(args.out, page)
    logger.info(f"{args.out}: {len(page.encode()) / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
