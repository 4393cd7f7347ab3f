#!/usr/bin/env python
"""Checkpoint tool: inspect, verify, convert, strip and average checkpoints and files of weights.

FILE is a .safetensors file, the .pth of any trainer or a folder with one, STEP a checkpoint, RUN the folder of a run,
which means its best checkpoint. `inspect` says of any file what it is. Weights are written as .safetensors under this
project's names, or as .pth under the authors'.

examples:
  python tools/checkpoint.py inspect output/dat_tiny/default
  python tools/checkpoint.py inspect download.pth
  python tools/checkpoint.py verify output/dat_tiny/default
  python tools/checkpoint.py convert output/dat_tiny/default dat_tiny.pth --to released
  python tools/checkpoint.py strip output/dat_tiny/default dat_tiny.safetensors --ema
  python tools/checkpoint.py average output/dat_tiny/default/checkpoints/step-* mean.safetensors
"""

import argparse
import hashlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
from torch import Tensor

from engine import checkpoint
from engine.hub_folder import is_hub_folder
from engine.pretrained import refuse_nonfinite
from engine.weight_files import read_weights
from models.convert import derived_buffers, to_official, to_ours
from models.identify import identify
from tools.common.weights import describe
from utils.errors import CheckpointError, ConfigError, as_exit_code
from utils.files import write_atomically
from utils.text import join_some


def read(path: Path, *, ema: bool = False, key: str | None = None) -> dict[str, Tensor]:
    """The weights at `path`, with `ema` their moving average. Raises CheckpointError, also where one is not finite."""
    tensors = read_weights(path, ema=ema, key=key)
    refuse_nonfinite(path, tensors)
    return tensors


def write(tensors: dict[str, Tensor], out: Path) -> None:
    """Write `tensors` to `out`, a .safetensors or .pth file, and print its size and SHA-256."""
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    if out.suffix == ".safetensors":
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    else:
        torch.save({"model": tensors}, buffer := io.BytesIO())
        content = buffer.getvalue()
    write_atomically(out, content)
    digest = hashlib.sha256(content).hexdigest()
    print(f"{out}: {len(tensors)} tensors, {len(content):,} bytes, SHA-256 {digest}")


def inspect(args: argparse.Namespace) -> None:
    """Show what a file, checkpoint or run is: its model, how long it was trained, or why it holds no weights."""
    for name, value in describe(args.path).items():
        print(f"{name:<12}{value}")


def verify(args: argparse.Namespace) -> None:
    """Compare every file of one checkpoint, or of all of a run, with its SHA-256; exit code 4 if one is damaged."""
    if args.path.is_file() or is_hub_folder(args.path):
        raise CheckpointError(
            f"{args.path} is no run or checkpoint of this project, whose manifest.json has the SHA-256s to compare"
        )
    folder = args.path / "checkpoints"
    steps = checkpoint.list_checkpoints(folder) if folder.is_dir() else [args.path]
    damaged = 0
    for step in steps:
        damage = checkpoint.verify(step)
        damaged += damage is not None
        print(f"{step}: {damage or 'valid'}")
    if not steps:
        raise CheckpointError(f"{args.path} has no checkpoints")
    if damaged:
        raise CheckpointError(f"{args.path}: {damaged} of {len(steps)} checkpoints are damaged")


def convert(args: argparse.Namespace) -> None:
    """Write the weights of a DAT under the authors' names or this project's; no bit of them changes."""
    tensors = read(args.path)
    found = identify(tensors)
    if found is None:
        raise CheckpointError(
            f"{args.path} holds no DAT variant; only their weights can be converted"
        )
    model = found.build()
    tensors = to_ours(tensors, model)
    if args.to == "released":
        tensors = to_official(tensors, model) | derived_buffers(model)
    write(tensors, args.out)


def strip(args: argparse.Namespace) -> None:
    """Write the weights without optimizer and configuration."""
    tensors = read(args.path, ema=args.ema, key=args.key)
    for prefix in args.drop:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        if len(kept) == len(tensors):
            raise ConfigError(f"--drop {prefix}: no tensor of {args.path} has a name like this")
        tensors = kept
    write(tensors, args.out)


def average(args: argparse.Namespace) -> None:
    """Write the mean, taken in float64, of several checkpoints of one model; integers are those of the last."""
    shapes, total = None, {}
    for path in args.paths:
        tensors = read(path)
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != (shapes := shapes or found):
            different = sorted({name for name, _ in found.items() ^ shapes.items()})
            raise CheckpointError(
                f"{path} and {args.paths[0]} hold different models; these tensors differ: {join_some(different)}"
            )
        total = {name: total.get(name, 0) + tensor.double() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = (total[name] / len(args.paths)).to(tensor.dtype)
    write(tensors, args.out)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; `run` of the result is the function of the sub-command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable, example: str) -> argparse.ArgumentParser:
        description = f"{function.__doc__}\n\nexample:\n  python tools/checkpoint.py {example}"
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
        help="names and format to write: the authors' as .pth, this project's as .safetensors",
    )

    sub = command(strip, "strip output/dat_tiny/default dat_tiny.safetensors --ema")
    sub.add_argument("path", type=Path, metavar="RUN|STEP|FILE")
    add_out(sub)
    sub.add_argument("--ema", action="store_true", help="write the moving average (EMA) instead")
    sub.add_argument("--key", help="of several state dicts in FILE the one under this key")
    sub.add_argument(
        "--drop",
        metavar="NAME",
        action="append",
        default=[],
        help="leave out the tensors whose names begin with NAME; may be repeated",
    )

    sub = command(average, "average output/dat_tiny/default/checkpoints/step-* mean.safetensors")
    sub.add_argument("paths", type=Path, nargs="+", metavar="STEP", help="or RUN or FILE")
    add_out(sub)
    return parser.parse_args(arguments)


def check_out(args: argparse.Namespace) -> None:
    """Raise ConfigError if OUT exists or has the suffix of another format."""
    suffix = ".pth" if args.to == "released" else ".safetensors"
    if args.out.suffix != suffix:
        raise ConfigError(
            f"{args.out}: expected a name that ends in {suffix}, the format that is written"
        )
    if args.out.exists() and not args.force:
        raise ConfigError(f"{args.out} exists: name another file, or add --force to replace it")


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    args = parse(arguments)
    if args.out is not None:
        check_out(args)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
