#!/usr/bin/env python
"""Replay of a diverged step in float32: the range of every layer's outputs and gradients, and the first non-finite one.

PATH is the folder diverged-<n> of a run that ended with exit code 5, or a checkpoint step-<n>: its next step is
replayed. The same images, augmented and mixed the same way, pass through the same model and loss, micro-batch by
micro-batch. The terminal shows the most extreme numbers, replay.json in that folder holds all of them.

examples:
  python tools/replay.py output/dat_tiny/default/diverged-12345
  python tools/replay.py output/dat_tiny/default/checkpoints/step-12345 --data-path /imagenet
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from yacs.config import CfgNode

import config
import data
from engine import build, checkpoint
from engine.grad_sync import DDPSync
from engine.hooks import images_of
from engine.loop import Recipe, forward_backward
from engine.state import TrainState
from utils import distributed
from utils.distributed import Process
from utils.errors import CheckpointError, DataError, as_exit_code
from utils.files import write_atomically
from utils.logging import start_logging
from utils.step_timer import StepTimer

TABLE_ROWS = 10


def describe(tensors: list[Tensor]) -> dict[str, float]:
    """Number of elements and of non-finite ones; min, max, mean and std of the finite ones (0 if there are none)."""
    values = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    finite = values[values.isfinite()]
    numbers = {"elements": len(values), "nonfinite": len(values) - len(finite)}
    finite = finite if len(finite) else torch.zeros(1)
    std, mean = torch.std_mean(finite, correction=0)
    return numbers | {
        "min": finite.min().item(),
        "max": finite.max().item(),
        "mean": mean.item(),
        "std": std.item(),
    }


def observe(model: nn.Module) -> list[dict]:
    """A list that each forward pass extends by a row per module that describes its output, inner modules first."""
    rows: list[dict] = []

    def add_row(name: str, value: object) -> None:
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
        if tensors:
            rows.append({"name": name, **describe(tensors)})

    model.register_forward_pre_hook(lambda module, inputs: add_row("(images)", inputs))
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: add_row(name or "(logits)", output)
        )
    return rows


def load_step(
    cfg: CfgNode, path: Path, process: Process
) -> tuple[TrainState, Recipe, data.ImageDataset, data.TrainBatchSampler]:
    """The state saved at `path` and what trains its next step, with all micro-batches in this one process.

    Raises DataError where the images have changed since.
    """
    metadata = checkpoint.read_metadata(path)
    train_set = build.open_split(cfg, "train", metadata["classes"])
    if train_set.fingerprint != metadata["data"]:
        raise DataError(
            f"{train_set.reader.path} does not hold the images that {path} was trained on"
        )
    recipe = build.build_recipe(cfg, metadata["steps_per_epoch"], metadata["classes"], process)
    model = build.build_model(cfg, len(metadata["classes"]), process.device)
    build.freeze_some(cfg.TRAIN, model)
    optimizer = build.build_optimizer(cfg.TRAIN, model)
    scaler = torch.amp.GradScaler(process.device.type, enabled=False)
    state = TrainState(model, None, optimizer, scaler)
    checkpoint.restore(path, state)
    return (
        state,
        recipe,
        train_set,
        build.train_sampler(cfg, train_set, recipe, process, state.step),
    )


def replay(cfg: CfgNode, path: Path) -> dict:
    """Run the step after the state at `path`; describe the weights, every micro-batch and the mean gradient."""
    with distributed.init_distributed(cfg.DEVICE, cfg.THREADS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        state, recipe, train_set, sampler = load_step(cfg, path, process)
        images = images_of(state.step, train_set, sampler)
        batches = iter(data.train_loader(train_set, sampler, num_workers=0, timeout=0))
        parameters = dict(state.model.named_parameters())
        gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
        rows, micro_batches, timer = observe(state.model), [], StepTimer(process.device)
        for micro_batch in recipe.micro_batches:
            rows.clear()
            single = dataclasses.replace(recipe, micro_batches=range(micro_batch, micro_batch + 1))
            sync = DDPSync(state.model, single.micro_batches, process)
            (loss,) = forward_backward(state, sync, batches, single, process, timer)
            grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            for name, gradient in grads.items():
                gradients[name] += gradient / len(recipe.micro_batches)
            norm = nn.utils.get_total_norm(grads.values()).item()
            micro_batches.append(
                {"micro_batch": micro_batch, "loss": loss.item(), "grad_norm": norm}
            )
            micro_batches[-1] |= {"images": images[micro_batch], "outputs": list(rows)}
    return {
        "step": state.step + 1,
        "micro_batches": micro_batches,
        "weights": [{"name": name, **describe([p])} for name, p in parameters.items()],
        "gradients": [{"name": name, **describe([g])} for name, g in gradients.items()],
    }


def diagnose(report: dict) -> str:
    """One sentence: where the first non-finite number comes from."""
    for row in report["weights"]:
        if row["nonfinite"]:
            return f"The weights are not finite before the step: {row['name']} is the first."
    for micro_batch in report["micro_batches"]:
        for row in micro_batch["outputs"]:
            if row["nonfinite"]:
                return (
                    f"Micro-batch {micro_batch['micro_batch']}: {row['nonfinite']} of {row['elements']} values of "
                    f"{row['name']} are the first that are not finite."
                )
    for row in reversed(report["gradients"]):  # the order of the backward pass
        if row["nonfinite"]:
            return (
                f"All outputs are finite; the gradient of {row['name']} is the first that is not."
            )
    return (
        "Everything is finite in float32: either the largest outputs exceed the range of the training's AMP_DTYPE, "
        "or the hardware failed."
    )


def severity(row: dict) -> tuple[int, float]:
    """Sort key of a row: the number of non-finite values, then the largest magnitude."""
    return row["nonfinite"], max(-row["min"], row["max"])


def print_tables(report: dict) -> None:
    """Print the micro-batches, and the most severe outputs and gradients."""
    print(f"\n{'micro-batch':>11} {'loss':>12} {'grad_norm':>12}  first image")
    for micro_batch in report["micro_batches"]:
        print(
            f"{micro_batch['micro_batch']:>11} {micro_batch['loss']:>12.5g} {micro_batch['grad_norm']:>12.5g}  "
            f"{micro_batch['images'][0]}"
        )
    worst: dict[str, dict] = {}
    for micro_batch in report["micro_batches"]:
        for row in micro_batch["outputs"]:
            if row["name"] not in worst or severity(row) > severity(worst[row["name"]]):
                worst[row["name"]] = {**row, "micro_batch": micro_batch["micro_batch"]}
    outputs = [
        {**row, "name": f"{name} (micro-batch {row['micro_batch']})"} for name, row in worst.items()
    ]
    for title, rows in (("outputs", outputs), ("gradients", report["gradients"])):
        columns = ("nonfinite", "min", "max", "mean", "std")
        print("\n" + "".join(f"{column:>12}" for column in columns) + f"  {title}")
        for row in sorted(rows, key=severity, reverse=True)[:TABLE_ROWS]:
            print("".join(f"{row[column]:>12.5g}" for column in columns) + f"  {row['name']}")


def load_config(path: Path, data_path: str | None) -> CfgNode:
    """The configuration of the checkpoint at `path` in float32, with `data_path` instead of its own if given."""
    if not (path / checkpoint.MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint; expected RUN/diverged-<n> or RUN/checkpoints/step-<n>"
        )
    if damage := checkpoint.verify(path):
        raise CheckpointError(f"{path}: {damage}")
    opts = ["AMP_DTYPE=float32", *([f"DATA.PATH={data_path}"] if data_path else [])]
    values = checkpoint.read_metadata(path)["config"]
    return config.load_values(values, str(path / "state.json"), opts)


def to_json(value: object) -> object:
    """`value` with text in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@as_exit_code
def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="folder diverged-<n> or step-<n>")
    parser.add_argument("--data-path", metavar="FOLDER", help="the dataset, if it has moved")
    args = parser.parse_args(argv)
    report = replay(load_config(args.path, args.data_path), args.path)
    report = {"diagnosis": diagnose(report), **report}
    file = args.path / "replay.json"
    write_atomically(file, json.dumps(to_json(report), indent=1))
    print_tables(report)
    print(f"\nStep {report['step']}: {report['diagnosis']} All numbers are in {file}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
