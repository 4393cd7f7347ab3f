#!/usr/bin/env python
"""Where does a step that diverged become infinite? It is run again in float32, and every layer's numbers are told.

python tools/replay.py output/dat_tiny/default/diverged-12345

The folder is what a run leaves when it ends with exit code 5; a checkpoint step-<n> stands for the step after
it. The same images, augmented and mixed the same way, go through the same model and loss, micro-batch by micro-batch. All numbers go
to replay.json in that folder, the worst of them to the terminal.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
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
from engine.loop import forward_backward
from utils import distributed
from utils.errors import CheckpointError, as_exit_code
from utils.logging import start_logging
from utils.step_timer import StepTimer

SHOWN = 10  # rows of a table


def describe(tensors: list[Tensor]) -> dict[str, float]:
    """Elements, how many are not finite, and min, max, mean and std of the others (0 where there are none)."""
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
    """A list that a forward pass fills with the numbers of every module's output, inner modules first."""
    rows: list[dict] = []

    def note(name: str, value: object) -> None:
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
        if tensors:
            rows.append({"name": name, **describe(tensors)})

    model.register_forward_pre_hook(lambda module, inputs: note("(images)", inputs))
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: note(name or "(logits)", output)
        )
    return rows


def replay(cfg: CfgNode, path: Path) -> dict:
    """The numbers of the step after the state at `path`: of its weights, of every micro-batch, of the mean gradient."""
    with distributed.init_distributed(cfg.DEVICE, cfg.THREADS) as process:
        start_logging(cfg.MODEL.NAME, process.rank)
        state, recipe, train_set, sampler = build.load_step(cfg, path, process)
        images = images_of(state.step, train_set, sampler)
        batches = iter(data.train_loader(train_set, sampler, num_workers=0))
        parameters = dict(state.model.named_parameters())
        gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
        rows, micro_batches, timer = observe(state.model), [], StepTimer(process.device)
        for micro_batch in recipe.micro_batches:
            rows.clear()
            alone = dataclasses.replace(recipe, micro_batches=range(micro_batch, micro_batch + 1))
            reduction = DDPSync(state.model, alone.micro_batches, process)
            (loss,) = forward_backward(state, reduction, batches, alone, process, timer)
            own = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            for name, gradient in own.items():
                gradients[name] += gradient / len(recipe.micro_batches)
            norm = nn.utils.get_total_norm(own.values()).item()
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


def verdict(found: dict) -> str:
    """In a sentence, where the first number that is not finite comes from."""
    for row in found["weights"]:
        if row["nonfinite"]:
            return f"The weights are not finite before the step: {row['name']} is the first."
    for micro_batch in found["micro_batches"]:
        for row in micro_batch["outputs"]:
            if row["nonfinite"]:
                return (
                    f"Micro-batch {micro_batch['micro_batch']}: {row['nonfinite']} of {row['elements']} values of {row['name']} "
                    "are the first that are not finite."
                )
    for row in reversed(found["gradients"]):  # as the backward pass goes
        if row["nonfinite"]:
            return (
                f"All outputs are finite; the gradient of {row['name']} is the first that is not."
            )
    return (
        "Everything is finite in float32: either the largest outputs are too large for the training's "
        "number format, or the machine was at fault."
    )


def severity(row: dict) -> tuple[int, float]:
    """What a row of numbers is sorted by: values that are not finite, then the largest one."""
    return row["nonfinite"], max(-row["min"], row["max"])


def print_tables(found: dict) -> None:
    """The micro-batches, and the outputs and gradients with most values that are not finite, then with the largest ones."""
    print(f"\n{'micro_batch':>5} {'loss':>12} {'grad_norm':>12}  first image")
    for micro_batch in found["micro_batches"]:
        print(
            f"{micro_batch['micro_batch']:>5} {micro_batch['loss']:>12.5g} {micro_batch['grad_norm']:>12.5g}  {micro_batch['images'][0]}"
        )
    worst: dict[str, dict] = {}
    for micro_batch in found["micro_batches"]:
        for row in micro_batch["outputs"]:
            if row["name"] not in worst or severity(row) > severity(worst[row["name"]]):
                worst[row["name"]] = {**row, "micro_batch": micro_batch["micro_batch"]}
    outputs = [
        {**row, "name": f"{name} (micro-batch {row['micro_batch']})"} for name, row in worst.items()
    ]
    for title, rows in (("outputs", outputs), ("gradients", found["gradients"])):
        columns = ("nonfinite", "min", "max", "mean", "std")
        print("\n" + "".join(f"{column:>12}" for column in columns) + f"  {title}")
        for row in sorted(rows, key=severity, reverse=True)[:SHOWN]:
            print("".join(f"{row[column]:>12.5g}" for column in columns) + f"  {row['name']}")


def configuration(path: Path, data_path: str | None) -> CfgNode:
    """The configuration of the checkpoint at `path`, in float32, perhaps with the data elsewhere."""
    if not (path / checkpoint.MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is no checkpoint; expected RUN/diverged-<n> or RUN/checkpoints/step-<n>"
        )
    if damage := checkpoint.verify(path):
        raise CheckpointError(f"{path}: {damage}")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(checkpoint.read_metadata(path)["config"], file)  # which YAML can read
        file.flush()
        argv = ["--cfg", file.name, "--amp-dtype", "float32"]
        return config.parse(argv + (["--data-path", data_path] if data_path else [])).cfg


def without_nan(value: object) -> object:
    """`value` with text in place of the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@as_exit_code
def main(argv: list[str]) -> None:
    """Replay one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="diverged-<n> or step-<n>")
    parser.add_argument("--data-path", help="where the data is, if not where it was")
    args = parser.parse_args(argv)
    found = replay(configuration(args.path, args.data_path), args.path)
    report = args.path / "replay.json"
    report.write_text(json.dumps(without_nan({"verdict": verdict(found), **found}), indent=1))
    print_tables(found)
    print(f"\nUpdate {found['step']}: {verdict(found)} All numbers are in {report}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
