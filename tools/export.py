#!/usr/bin/env python
"""Export of a model to other programs: Hugging Face folder, ONNX, torch.export and AOTInductor, with a model card.

SOURCE is a run (its best checkpoint), a checkpoint, a file of weights, a Hugging Face folder or a configuration (random
weights). OUT must not exist, or be empty. Every file is loaded again in a new process and compared with the model in
PyTorch before OUT is there; OUT/export.json and the card, OUT/README.md, have the differences.

examples:
  python tools/export.py output/dat_tiny/default exported --to hf onnx
  python tools/export.py output/dat_tiny/default exported --ema --to onnx pt2 aoti --with-preprocessing
  python tools/export.py output/dat_tiny/default exported --to onnx onnx-int8 --val /imagenet/val
  python tools/export.py output/dat_tiny/default exported --to hf --half --license apache-2.0
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from engine import build, checkpoint, compat
from engine.pretrained import refuse_nonfinite
from engine.weight_files import hash_weights
from tools.common.classifier import (
    CONFIG_SUFFIXES,
    Classifier,
    add_recipe_arguments,
    at_size,
    load_classifier,
    log_to_stderr,
    with_weights,
)
from tools.exports import card, formats, quantize
from tools.exports.formats import FILES, OPSET, Batches
from utils.distributed import Process
from utils.errors import ConfigError, DataError, StorageError, as_exit_code
from utils.files import write_atomically
from utils.logging import logger
from utils.text import quantity

# --- What is asked for ----------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises ConfigError for flags that do not fit together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run, checkpoint or file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--to", nargs="+", required=True, choices=FILES, help="formats")
    add_recipe_arguments(parser)
    parser.add_argument("--size", type=int, default=0, help="pixels of the model's input")
    parser.add_argument(
        "--batch", type=_batch, default=Batches(0), metavar="any|N", help="images at once"
    )
    parser.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="onnx, pt2 and aoti take uint8 pixels and apply mean and standard deviation",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="round the weights to float16, which halves model.safetensors",
    )
    parser.add_argument("--license", default="unknown", metavar="NAME", help="for the card")
    parser.add_argument("--note", default="", metavar="TEXT", help="a paragraph for the card")
    parser.add_argument("--opset", type=int, default=OPSET, help=f"of onnx, default {OPSET}")
    parser.add_argument(
        "--val", type=Path, metavar="IMAGES", help="measure the accuracy of onnx on class folders"
    )
    parser.set_defaults(resume="", pretrained="", device="cpu", amp_dtype="float32")
    args = parser.parse_args(arguments)
    if args.ema and not (args.source.is_dir() and checkpoint.is_own(args.source)):
        raise ConfigError(
            f"--ema: {args.source} is no run or checkpoint, and has one set of weights"
        )
    is_file = not args.source.is_dir() and args.source.suffix not in CONFIG_SUFFIXES
    if (args.cfg or args.model) and not is_file:
        raise ConfigError(
            f"--cfg and --model say what a file of weights was made for; {args.source} is none: leave them out"
        )
    if "onnx-int8" in args.to and "onnx" not in args.to:
        raise ConfigError("--to onnx-int8 is made of the ONNX model: add onnx")
    if args.val is not None and "onnx" not in args.to:
        raise ConfigError("--val measures the ONNX model: add onnx to --to")
    if args.val is not None and args.batch.size:
        raise ConfigError("--val has a last batch of its own size: leave out --batch")
    if args.val is not None and not args.val.exists():
        raise DataError(f"--val {args.val}: no such folder or archive")
    if args.opset < OPSET:
        raise ConfigError(f"--opset {args.opset}: expected at least {OPSET}")
    if args.size and args.size < 32:
        raise ConfigError(f"--size {args.size}: expected at least 32 pixels")
    return args


def _batch(text: str) -> Batches:
    if text != "any" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither any nor a number of images")
    return Batches(0 if text == "any" else int(text))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which becomes `out` when the block ends without an error.

    Raises ConfigError if `out` is there and not empty, StorageError where it cannot be written. Errors of other files
    are passed on.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name another for OUT")
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(temporary):
            raise
        raise StorageError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- Export ---------------------------------------------------------------------------------------


def export(classifier: Classifier, args: argparse.Namespace, folder: Path) -> dict:
    """Write and compare the formats of `args` in `folder`; returns what export.json holds."""
    cfg, model = classifier.cfg, classifier.model
    normalize = build.normalize(cfg, classifier.device)
    pixels = {batch: make_pixels(batch, cfg.DATA.IMG_SIZE) for batch in args.batch.compared}
    images = {batch: normalize(values) for batch, values in pixels.items()}
    with torch.inference_mode():
        expected = {batch: model(values) for batch, values in images.items()}
    example = make_pixels(args.batch.example, cfg.DATA.IMG_SIZE)
    if args.with_preprocessing:
        model = formats.WithPreprocessing(model, normalize).eval()
        taken = pixels
    else:
        example, taken = normalize(example), images

    record = describe(classifier, args)
    files = {name: folder / file for name, file in FILES.items() if name in args.to}
    if "hf" in files:
        formats.write_hf(classifier, folder, half=args.half)
    if "onnx" in files:
        logger.info(f"{FILES['onnx']}: recording the model takes a minute")
        properties = {k: json.dumps(record[k], ensure_ascii=False) for k in ("classes", "images")}
        formats.write_onnx(
            *(model, example, args.batch, files["onnx"]), opset=args.opset, properties=properties
        )
    if programs := {name: files[name] for name in ("pt2", "aoti") if name in files}:
        formats.write_programs(model, example, args.batch, programs)
    if "onnx-int8" in files:
        quantize.write_int8(files["onnx"], files["onnx-int8"])

    for name, file in files.items():
        inputs = images if name == "hf" else taken
        compared = formats.compare(name, file, inputs, expected)
        if name != "onnx-int8" and not compared.agrees:
            largest = max(compared.differences.values())
            raise formats.ExportError(
                f"{file.name} computes other logits than PyTorch: {largest:.1e} apart"
            )
        record["files"][name] = {
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": hash_weights(file),
            "differences": compared.differences,
            "milliseconds": compared.milliseconds,
        }
    if args.val is not None:
        measured = {name: files[name] for name in ("onnx", "onnx-int8") if name in files}
        record["accuracy"] = quantize.measure_accuracy(
            classifier, args.val, measured, preprocessed=args.with_preprocessing
        )
    return record


def make_pixels(batch: int, size: int | list[int]) -> Tensor:
    """Random pixels, uint8 (batch, 3, H, W), the same at every call."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def describe(classifier: Classifier, args: argparse.Namespace) -> dict:
    """export.json without what the files are found to be."""
    cfg = classifier.cfg
    channels, height, width = build.input_shape(cfg)
    mean, std = formats.mean_and_std(cfg)
    return {
        "model": {"name": cfg.MODEL.NAME, "args": {**cfg.MODEL.ARGS}},
        "classes": classifier.classes,
        "names": classifier.names,
        "images": {
            "batch": args.batch.size or "any",
            "channels": 3 if args.with_preprocessing else channels,
            "height": height,
            "width": width,
            "preprocessing": args.with_preprocessing,
            "mean": mean,
            "std": std,
            "exif": cfg.DATA.EXIF,
            **build.describe_pixels(cfg, "own"),
        },
        "opset": args.opset,
        "files": {},
        "accuracy": None,
        "environment": compat.describe_environment(Process(0, 1, classifier.device)),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@as_exit_code
def main(arguments: list[str]) -> None:
    """Export, compare and describe."""
    args = parse(arguments)
    log_to_stderr()
    formats.check_requirements(args.to, args.opset)
    with new_folder(args.out) as folder:
        classifier = load_classifier(with_weights(args, args.source), untrained=True)
        classifier = at_size(classifier, args.size)
        if args.half:
            classifier.model.half().float()
        refuse_nonfinite(args.source, classifier.model.state_dict())
        origin = card.find_origin(args.source, args.ema)
        record = export(classifier, args, folder)
        record["weights"] = {"name": origin.name, "sha256": origin.sha256, "kind": origin.kind}
        record["weights"] |= {"half": args.half, "license": args.license, "note": args.note}
        content = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / "export.json", content + "\n")
        write_atomically(folder / "README.md", card.make_card(classifier, origin, record))
    logger.info(f"{args.out}: {quantity(len(record['files']), 'file')} and README.md")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
