"""Pretrained weights: files of many trainers read without running code, fitted to a model, with a report."""

import collections
import pickle
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from engine import checkpoint
from models.convert import to_ours, unwrap
from models.dat import DAT
from models.identify import Description, identify
from utils.errors import CheckpointError
from utils.logging import logger
from utils.text import join_some, plain_name

# What the released DAT and Swin files hold besides tensors: a yacs CfgNode, read as the dict that it is.
SAFE_GLOBALS = [(collections.OrderedDict, "yacs.config.CfgNode")]
# How torch's reader fails on files with missing and flipped bytes, as tried on thousands of them.
DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


class Report:
    """What became of a file's tensors, under the model's names, and of the model's: lists of names.

    `new` are the missing and misshapen ones of a classifier that is trained from scratch.
    """

    def __init__(self, file: dict[str, Tensor], model: dict[str, Tensor], resized: list[str]):
        both = [name for name in model if name in file]
        fits = [name for name in both if file[name].shape == model[name].shape]
        self.matched = [name for name in fits if name not in resized]
        self.resized = [name for name in fits if name in resized]
        self.missing = [name for name in model if name not in file]
        self.unexpected = [name for name in file if name not in model]
        self.misshapen = [name for name in both if name not in fits]
        self.new: list[str] = []
        self._file, self._model = file, model

    def share(self, word: str) -> float:
        """The tensors under `word`, as a share of the model's parameters."""
        sizes = {name: tensor.numel() for name, tensor in (self._file | self._model).items()}
        return sum(sizes[n] for n in getattr(self, word)) / sum(sizes[n] for n in self._model)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors matched ({self.share('matched'):.2%} of parameters)"]
        for word in ("resized", "missing", "unexpected", "misshapen", "new"):
            names = getattr(self, word)
            title = "with other shapes" if word == "misshapen" else word
            shares = f"{len(names)} {title} ({self.share(word):.2%})"
            if word == "misshapen":
                shapes = {n: [list(t[n].shape) for t in (self._file, self._model)] for n in names}
                names = [f"{n} is {file} instead of {model}" for n, (file, model) in shapes.items()]
            if names:
                parts.append(f"{shares}: {join_some(names)}")
        return "; ".join(parts)


def read_weights(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, a checkpoint or run of ours (the best), or a pickle of any trainer.

    With `ema` their average over the training. A pickle is opened with `weights_only=True`: code in it never runs.
    Raises CheckpointError naming the file.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: expected a file of weights, a run or a checkpoint"
        )
    if path.is_dir():
        step = checkpoint.resolve(path, best=True)
        file = step / ("ema.safetensors" if ema else "model.safetensors")
        if not file.exists():
            raise CheckpointError(f"{step} has no EMA: its run had TRAIN.EMA_DECAY 0")
        return checkpoint.read_tensors(file)
    content = _open(path)
    tensors = unwrap(content, ema=ema) if isinstance(content, dict) else {}
    if not tensors:
        places = "'model_ema' or 'state_dict_ema'" if ema else "'model' or 'state_dict', or bare"
        raise CheckpointError(f"{path} holds no such weights: expected a state dict under {places}")
    return tensors


def _open(path: Path) -> object:
    """What the file at `path` holds."""
    if path.suffix == ".safetensors":
        return checkpoint.read_tensors(path)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain weights file and was not executed: {str(error).splitlines()[0]}"
        ) from error
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is truncated or damaged ({reason})") from error


def refuse_nonfinite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError if a weight is NaN or infinite, naming the tensors that hold it."""
    names = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if names:
        raise CheckpointError(
            f"{path} holds NaN or infinite weights, in {join_some(names)}. "
            "The run that wrote it had diverged: take an earlier checkpoint of it."
        )


def load_pretrained(
    model: nn.Module, path: Path, *, strict: bool, classes: list[str] | None = None
) -> Report:
    """Load the weights at `path` into the timm model `model`, renamed and resized as its architecture knows to.

    With `strict` (evaluation) every tensor must be there and the file must be for this variant. Otherwise (a new
    training) a classifier that does not fit keeps its initial values; all else must fit. With `classes`, those of
    `model`, the same holds for a classifier whose checkpoint knows others; one that knows them in another order is
    reordered. Raises CheckpointError with the report and, for a DAT, the name of the model that the file is for.
    """
    tensors = read_weights(path)
    fitted, resized = _fit(tensors, model, path)
    if not strict:
        resized += _fit_channels(fitted, model)
    fitted = _fit_classes(fitted, model, path, classes)
    own = model.state_dict()
    report = Report(fitted, own, resized)
    fresh = () if strict else _classifier(model)
    report.new = [n for n in report.missing + report.misshapen if n.startswith(fresh)]
    unwanted = report.unexpected  # a model without a classifier wants none
    if model.num_classes == 0:
        unwanted = [n for n in unwanted if not n.startswith(fresh)]
    refused = [n for n in report.missing + report.misshapen if n not in report.new] + unwanted

    found = identify(tensors) if refused or resized else None
    # Windows are resized for a training only: evaluated, the result would be neither variant's.
    misnamed = found and _asked(model) not in found.variants
    if refused or (strict and misnamed):
        remedy = _explain_classes(refused, fitted, model) or _remedy(found, model)
        raise CheckpointError(f"{path} does not fit {_asked(model)}. {remedy} In numbers: {report}")
    loaded = {name: fitted[name] for name in report.matched + report.resized}
    refuse_nonfinite(path, loaded)
    model.load_state_dict(own | loaded)
    logger.info(f"{path}{f', {found}' if found else ''}: {report}")
    return report


def _fit(
    tensors: dict[str, Tensor], model: nn.Module, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """`tensors` under the names and in the sizes of `model`, and the names of those that were resized."""
    if isinstance(model, DAT):
        tensors = to_ours(tensors, model)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filter_fn is None:
        return tensors, []
    try:
        fitted = filter_fn(dict(tensors), model)
    except (AttributeError, LookupError, ValueError, RuntimeError, AssertionError) as error:
        # timm's filters take the architecture for granted and stumble over another, each in its own way.
        raise CheckpointError(
            f"{path} does not fit {_asked(model)}: {error}. {_remedy(identify(tensors), model)}"
        ) from error
    # By count, because the same numbers in another layout are no other size.
    counts = {name: tensor.numel() for name, tensor in tensors.items()}
    resized = [n for n, t in fitted.items() if t.numel() != counts.get(n, t.numel())]
    return fitted, resized


def _fit_channels(tensors: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Fit the first convolutions among `tensors` to the channels of `model`'s images, as timm does; their names.

    For one channel the weights of the colours are added, for three a single one is shared out.
    """
    own, fitted = model.state_dict(), []
    for layer in _names(model.pretrained_cfg.get("first_conv")):
        name = f"{layer}.weight"
        before, wanted = tensors.get(name), own[name].shape
        if before is not None and before.ndim == 4 and before.shape[1] != wanted[1]:
            tensors[name] = adapt_input_conv(wanted[1], before)
            fitted.append(name)
    return fitted


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in an entry of timm's settings: none, one or several."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _fit_classes(
    tensors: dict[str, Tensor], model: nn.Module, path: Path, classes: list[str] | None
) -> dict[str, Tensor]:
    """`tensors` with the classifier for `classes`, where the checkpoint at `path` has others: reordered or dropped."""
    step = checkpoint.origin_of(path) if classes else None
    saved = checkpoint.read_metadata(step)["classes"] if step else classes
    if saved == classes:
        return tensors
    heads = _heads(model)
    row_of = {plain_name(name): row for row, name in enumerate(saved)}
    rows = [row_of.get(plain_name(name)) for name in classes]
    if len(rows) == len(saved) and None not in rows:
        logger.info(f"{path} knows the same classes in another order: its classifier is reordered")
        return {n: t[rows] if n.startswith(heads) else t for n, t in tensors.items()}
    logger.warning(
        f"{path} knows other classes ({join_some(saved, 3)}) than the data ({join_some(classes, 3)}): "
        "the classifier starts from scratch"
    )
    return {n: t for n, t in tensors.items() if not n.startswith(heads)}


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's tensors."""
    return tuple(f"{name}." for name in _names(model.pretrained_cfg["classifier"]))


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of what a new training may start from scratch; a detector's backbone ends before the norm."""
    return (*_heads(model), "norm.")


def _explain_classes(refused: list[str], file: dict[str, Tensor], model: nn.Module) -> str:
    """What to do where the number of classes is all that does not fit; empty where more does not."""
    rows = {len(file[name]) for name in refused if name in file and name.startswith(_heads(model))}
    if len(rows) != 1 or any(
        name not in file or not name.startswith(_heads(model)) for name in refused
    ):
        return ""
    return (
        f"All but the classifier fits: the file knows {rows.pop():,} classes, the data has {model.num_classes:,}. "
        "Name all classes of the file, in their order, with DATA.CLASS_LIST (a text file, or imagenet-1k) and set "
        "DATA.VAL_SUBSET=True; all of them then compete for an image."
    )


def _asked(model: nn.Module) -> str:
    """The MODEL.NAME of `model`."""
    return model.pretrained_cfg["architecture"]


def _remedy(found: Description | None, model: nn.Module) -> str:
    """What to do about a file that does not fit `model` and in which `identify` has found `found`."""
    if found is None:
        return "Name the model that it was made for with MODEL.NAME and MODEL.ARGS."
    if _asked(model) in found.variants:
        return f"The file is {found}: set MODEL.ARGS and the number of classes to match."
    return f"The file is {found}: set MODEL.NAME {found.variant}, or take a --cfg that does."
