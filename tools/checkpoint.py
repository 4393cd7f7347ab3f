#!/usr/bin/env python
"""What is in a checkpoint, is it whole, and how is it taken elsewhere?

python tools/checkpoint.py inspect output/dat_tiny/default

FILE is a .safetensors file or any trainer's .pth, STEP a folder step-<n>, RUN the folder that holds `checkpoints`
and stands for its best one. Weights come out as .safetensors under our names, or as .pth under the authors'.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
from torch import Tensor

from engine import checkpoint
from engine.pretrained import read_weights, refuse_nonfinite
from models.convert import DERIVED, derived_buffers, to_official, to_ours
from models.identify import identify
from utils.errors import CheckpointError, ConfigError, StorageError, as_exit_code
from utils.text import join_some


def read(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The weights at `path`, with `ema` their average over the training; all are finite."""
    tensors = read_weights(path, ema=ema)
    refuse_nonfinite(path, tensors)
    return tensors


def write(tensors: dict[str, Tensor], out: Path) -> None:
    """Write `tensors` to `out`, .safetensors or .pth as released, and print its size and SHA-256."""
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    if out.suffix == ".safetensors":
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    else:
        torch.save({"model": tensors}, buffer := io.BytesIO())
        content = buffer.getvalue()
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, out)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise StorageError(f"{out} cannot be written: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    print(f"{out}: {len(tensors)} tensors, {len(content):,} bytes, SHA-256 {digest}")


def inspect(args: argparse.Namespace) -> None:
    """Tell which model a file, checkpoint or run holds, and how far it was trained."""
    source = checkpoint.resolve(args.path, best=True) if args.path.is_dir() else args.path
    tensors = read(source)
    found = identify(tensors)
    weights = {name: t for name, t in tensors.items() if not DERIVED.fullmatch(name)}
    names = "released names" if found and found.released else "our names"
    metadata = {
        "file": source,
        "weights": f"{found}, {names}" if found else "none of the DAT variants",
        "parameters": f"{sum(t.numel() for t in weights.values()):,} in {len(weights)} tensors",
    }
    if source.is_dir():
        metadata |= run_facts(source)
    for name, value in metadata.items():
        print(f"{name:<12}{value}")


def run_facts(step: Path) -> dict[str, object]:
    """What a checkpoint of ours knows of the run that wrote it."""
    state = checkpoint.read_metadata(step)
    metadata = {
        "model": f"{state['model']}, {len(state['classes'])} classes",
        "step": f"{state['step']}, after {state['epoch']} whole epochs",
        "best": f"{state['best']['acc1']:.3f} % top-1 so far, at step {state['best']['step']}",
    }
    if arguments := state["config"]["MODEL"]["ARGS"]:
        metadata["MODEL.ARGS"] = arguments
    records = step.parents[1] / "metrics.jsonl"
    for line in records.read_text().splitlines() if records.exists() else ():
        record = json.loads(line)
        for name in ("val", "val_ema"):
            if record["step"] == state["step"] and f"{name}/acc1" in record:
                metadata[name] = (
                    f"{record[f'{name}/acc1']:.3f} % top-1, {record[f'{name}/acc5']:.3f} % top-5"
                )
    return metadata | {
        "written by": f"torch {state['versions']['torch']}, code {state['revision']}"
    }


def verify(args: argparse.Namespace) -> None:
    """Compare the files of a run's checkpoints, or of one, with their SHA-256; exit code 4 if one is damaged."""
    folder = args.path / "checkpoints"
    steps = checkpoint.list_checkpoints(folder) if folder.is_dir() else [args.path]
    damaged = 0
    for step in steps:
        damage = checkpoint.verify(step)
        damaged += damage is not None
        print(f"{step}: {damage or 'whole'}")
    if not steps:
        raise CheckpointError(f"{args.path} has no checkpoints")
    if damaged:
        raise CheckpointError(f"{args.path}: {damaged} of {len(steps)} checkpoints are damaged")


def convert(args: argparse.Namespace) -> None:
    """Write a DAT's weights under the released names or under ours; not a bit of them changes."""
    tensors = read(args.path)
    found = identify(tensors)
    if found is None:
        raise CheckpointError(
            f"{args.path} is none of the DAT variants: there are no other names for it"
        )
    model = found.build()
    tensors = to_ours(tensors, model)
    if args.to == "released":
        tensors = to_official(tensors, model) | derived_buffers(model)
    write(tensors, args.out)


def strip(args: argparse.Namespace) -> None:
    """Write the weights alone: no optimizer, no configuration."""
    write(read(args.path, ema=args.ema), args.out)


def average(args: argparse.Namespace) -> None:
    """Write the mean, taken in float64, of several checkpoints of one model; integers are the last one's."""
    shapes, total = None, {}
    for path in args.paths:
        tensors = read(path)
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != (shapes := shapes or found):
            different = sorted(name for name, _ in found.items() ^ shapes.items())
            raise CheckpointError(
                f"{path} is another model than {args.paths[0]}: {join_some(different)}"
            )
        total = {name: total.get(name, 0) + tensor.double() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = (total[name] / len(args.paths)).to(tensor.dtype)
    write(tensors, args.out)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `run` is the sub-command's function."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable, example: str) -> argparse.ArgumentParser:
        description = f"python tools/checkpoint.py {example}\n\n{function.__doc__}"
        sub = commands.add_parser(
            function.__name__,
            help=function.__doc__,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=function, to="ours", out=None)
        return sub

    def add_out(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("out", type=Path, metavar="OUT", help="file to write")
        sub.add_argument("--force", action="store_true", help="overwrite OUT")

    sub = command(inspect, "inspect output/dat_tiny/default")
    sub.add_argument("path", type=Path, metavar="FILE|RUN|STEP")

    sub = command(verify, "verify output/dat_tiny/default")
    sub.add_argument("path", type=Path, metavar="RUN|STEP")

    sub = command(convert, "convert output/dat_tiny/default dat_tiny.pth --to released")
    sub.add_argument("path", type=Path, metavar="IN", help="FILE, RUN or STEP")
    add_out(sub)
    sub.add_argument(
        "--to",
        choices=("released", "ours"),
        required=True,
        help="whose names: .pth or .safetensors",
    )

    sub = command(strip, "strip output/dat_tiny/default dat_tiny.safetensors --ema")
    sub.add_argument("path", type=Path, metavar="RUN|STEP|FILE")
    add_out(sub)
    sub.add_argument("--ema", action="store_true", help="the average of the weights (EMA) instead")

    sub = command(average, "average output/dat_tiny/default/checkpoints/step-* mean.safetensors")
    sub.add_argument("paths", type=Path, nargs="+", metavar="STEP", help="or RUN or FILE")
    add_out(sub)
    return parser.parse_args(arguments)


def check_out(args: argparse.Namespace) -> None:
    """Raise ConfigError if OUT is there already or has another format's name."""
    suffix = ".pth" if args.to == "released" else ".safetensors"
    if args.out.suffix != suffix:
        raise ConfigError(f"{args.out}: what is written here needs a name that ends in {suffix}")
    if args.out.exists() and not args.force:
        raise ConfigError(f"{args.out} exists: name another file, or add --force to replace it")


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run one sub-command."""
    args = parse(arguments)
    if args.out is not None:
        check_out(args)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
