"""Weights checks: what the run would resume, start from or evaluate, loaded by the code of the run."""

from collections.abc import Iterator
from pathlib import Path

import torch
from yacs.config import CfgNode

import config
from data import same_names
from engine import build, checkpoint
from engine.evaluate import Weights, choose_weights, load_weights, read_tensors
from engine.pretrained import load_pretrained
from engine.run_dir import RunDir
from engine.sanity import class_order_warnings
from engine.train import find_checkpoint
from tools.checks.report import Finding
from utils.distributed import Process
from utils.download import download
from utils.errors import CheckpointError, UserError
from utils.text import quantity

CPU = torch.device("cpu")


def find_evaluated(command: config.Command) -> tuple[Weights | None, list[Finding]]:
    """What --eval would evaluate; None, and a finding, where it cannot be found."""
    try:
        return choose_weights(command.cfg, command.given), []
    except UserError as error:
        return None, [Finding("FAIL", "weights", str(error))]


def check_evaluated(cfg: CfgNode, weights: Weights, classes: list[str]) -> Iterator[Finding]:
    """Findings about whether `weights` fit the model, and about the order in which they may count `classes`."""
    model = build.build_model(cfg, len(classes), CPU)
    tensors = read_tensors(weights)
    for kind, file in weights.files.items():
        try:
            load_weights(model, weights, kind, tensors)
        except CheckpointError as error:
            yield Finding("FAIL", "weights", str(error))
        else:
            yield Finding("OK", "weights", f"{file} fits {cfg.MODEL.NAME} ({kind})")
    for warning in class_order_warnings(classes) if weights.classes is None else ():
        yield Finding(
            "WARN", "labels", warning, "name the order of the weights with DATA.CLASS_LIST"
        )


def check_start(cfg: CfgNode, classes: list[str]) -> Iterator[Finding]:
    """Findings about what a training resumes or starts from."""
    try:
        run_dir = RunDir(build.run_path(cfg), Process(rank=0, world_size=1, device=CPU))
        resumed = find_checkpoint(cfg, run_dir)
        if resumed is not None:
            yield _check_resumed(cfg, resumed, classes)
        elif cfg.CHECKPOINT.PRETRAINED:
            model = build.build_model(cfg, len(classes), CPU)
            path = download(cfg.CHECKPOINT.PRETRAINED)
            report = load_pretrained(model, path, strict=False, classes=classes)
            yield Finding("OK", "weights", f"{path}: {report}")
    except UserError as error:
        yield Finding("FAIL", "weights", str(error))


def _check_resumed(cfg: CfgNode, path: Path, classes: list[str]) -> Finding:
    metadata = checkpoint.read_metadata(path)
    if metadata["model"] != cfg.MODEL.NAME:
        text = f"{path} holds {metadata['model']}, MODEL.NAME is {cfg.MODEL.NAME}"
        return Finding("FAIL", "weights", text, "set MODEL.NAME to it, or choose another --tag")
    if not same_names(metadata["classes"], classes):
        text = f"{path} knows other classes than the data"
        remedy = f"start a new run from its weights: --pretrained {path} --tag NAME"
        return Finding("FAIL", "weights", text, remedy)
    model = build.build_model(cfg, len(classes), CPU)
    checkpoint.load_strictly(model, path / "model.safetensors")
    text = f"{path} is valid: the run resumes there, after {quantity(metadata['step'], 'step')}"
    return Finding("OK", "weights", text)
