"""Which of a file's tensors does a model start from? Weights from elsewhere, with a report of what fits."""

import collections
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from engine import checkpoint
from models.released import unwrap
from utils.errors import CheckpointError
from utils.logging import logger

# What the released DAT and Swin files hold besides tensors: a yacs CfgNode, read as the dict that it is.
SAFE_GLOBALS = [(collections.OrderedDict, "yacs.config.CfgNode")]


@dataclass
class Report:
    """What became of a file's tensors, by parameter name; `new_head` tells that the classifier was left as it was."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    new_head: bool = False

    def __str__(self) -> str:
        counts = [f"{len(self.matched)} tensors matched"]
        for word in ("missing", "unexpected", "misshapen"):
            if names := getattr(self, word):
                counts.append(f"{len(names)} {word}: {checkpoint.some(names)}")
        return "; ".join(counts) + ("; the classifier is new" if self.new_head else "")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, a checkpoint or run of ours (the best), or a pickle of any trainer.

    A pickle is opened with `weights_only=True`: code in it never runs. Raises CheckpointError naming the file.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: --pretrained takes a weights file, a run or a checkpoint"
        )
    if path.is_dir():
        path = checkpoint.locate(path, best=True) / "model.safetensors"
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain weights file and was not executed: {str(error).splitlines()[0]}"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: {error or 'it is empty'}"
        ) from error
    tensors = unwrap(content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no weights: expected a state dict, bare or under 'model' or 'state_dict'"
        )
    return tensors


def load_pretrained(model: nn.Module, path: Path, *, whole: bool) -> Report:
    """Load the weights at `path` into `model`, renaming what the model's architecture knows to rename.

    With `whole` (evaluation) every tensor must fit; otherwise (a new training) a classifier of another size is left
    at its initial values, which is said, and all else must fit. Raises CheckpointError with the report.
    """
    tensors = read_weights(path)
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        tensors = rename(tensors, model)
    own = model.state_dict()
    report = Report(
        matched=[n for n in own if n in tensors and tensors[n].shape == own[n].shape],
        missing=[n for n in own if n not in tensors],
        unexpected=[n for n in tensors if n not in own],
        misshapen=[n for n in own if n in tensors and tensors[n].shape != own[n].shape],
    )
    heads = model.pretrained_cfg["classifier"] if getattr(model, "pretrained_cfg", None) else ()
    heads = (heads,) if isinstance(heads, str) else heads
    classifier = [n for n in report.misshapen if any(n.startswith(f"{head}.") for head in heads)]
    if classifier and not whole:
        report.misshapen = [n for n in report.misshapen if n not in classifier]
        report.new_head = True
    if report.missing or report.unexpected or report.misshapen:
        raise CheckpointError(
            f"{path} does not fit the model: {report}. Name the model it was made for with MODEL.NAME and MODEL.ARGS"
            + (", and its number of classes." if classifier else ".")
        )
    own.update({name: tensors[name] for name in report.matched})
    model.load_state_dict(own)
    logger.info(f"{path}: {report}")
    return report
