"""Pretrained weights: fitted to a model, with a report of what became of every tensor."""

import sys
from pathlib import Path

from timm.models import adapt_input_conv
from torch import Tensor, nn

from engine.provenance import find_provenance
from engine.weight_files import read_weights
from models.convert import to_ours
from models.dat import DAT
from models.identify import Description, identify
from models.state_dicts import strip_prefix
from utils.errors import CheckpointError
from utils.logging import logger
from utils.text import join_some, plain_name


class Report:
    """What became of a file's tensors, under the model's names, and of the model's: lists of names.

    `resized` are tables for another image or window, `adapted` convolutions for other channels of images, `new` the
    missing and misshapen ones of a classifier that is trained from scratch.
    """

    def __init__(
        self,
        file: dict[str, Tensor],
        model: dict[str, Tensor],
        resized: list[str],
        adapted: list[str],
    ):
        both = [name for name in model if name in file]
        fits = [name for name in both if file[name].shape == model[name].shape]
        self.matched = [name for name in fits if name not in (*resized, *adapted)]
        self.resized = [name for name in fits if name in resized]
        self.adapted = [name for name in fits if name in adapted]
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
        return self.describe(10)

    def describe(self, shown: int) -> str:
        """The numbers, and the first `shown` names of each list."""
        parts = [f"{len(self.matched)} tensors matched ({self.share('matched'):.2%} of parameters)"]
        for word in ("resized", "adapted", "missing", "unexpected", "misshapen", "new"):
            names = getattr(self, word)
            title = "with other shapes" if word == "misshapen" else word
            shares = f"{len(names)} {title} ({self.share(word):.2%})"
            if word == "misshapen":
                shapes = {n: [list(t[n].shape) for t in (self._file, self._model)] for n in names}
                names = [f"{n} is {file} instead of {model}" for n, (file, model) in shapes.items()]
            if names:
                parts.append(f"{shares}: {join_some(names, shown)}")
        return "; ".join(parts)


def refuse_nonfinite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError if a weight is NaN or infinite, naming the tensors that hold it."""
    names = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if names:
        raise CheckpointError(
            f"{path} holds NaN or infinite weights, in {join_some(names)}. "
            "The run that wrote it had diverged: take an earlier checkpoint of it."
        )


def load_pretrained(
    model: nn.Module,
    path: Path,
    *,
    strict: bool,
    classes: list[str] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> Report:
    """Load the weights at `path` into the timm model `model`, renamed and resized as its architecture knows to.

    With `strict` (evaluation) every tensor must be there and the file must be for this variant. Otherwise (a new
    training) a classifier that does not fit keeps its initial values, and the first convolution of a model for RGB is
    adapted to other channels as timm does; all else must fit. With `classes`, those of `model`, the same holds for a
    classifier whose weights name others; one that knows them in another order is reordered. `tensors` are those of
    the file where they were read before. Raises CheckpointError with the report and, for a DAT, the name of the model
    that the file is for.
    """
    tensors = read_weights(path) if tensors is None else tensors
    fitted, resized = _fit(tensors, model, path)
    fitted = _fit_classes(fitted, model, path, classes)
    own = model.state_dict()
    adapted = [] if strict else _adapt_channels(fitted, own, model)
    report = Report(fitted, own, resized, adapted)
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
        remedy = _remedy(found, model, fitted, refused)
        raise CheckpointError(
            f"{path} does not fit {_asked(model)}. {remedy} In numbers: {report.describe(2)}"
        )
    loaded = {name: fitted[name] for name in report.matched + report.resized + report.adapted}
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
    stripped = strip_prefix(tensors, model.state_dict().keys())
    if stripped.removed:
        tensors = stripped.tensors
        logger.info(f"{path}: removed {' and '.join(stripped.removed)}")
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filter_fn is None:
        return tensors, []
    try:
        fitted = filter_fn(dict(tensors), model)
    except (AttributeError, LookupError, ValueError, RuntimeError, AssertionError) as error:
        # timm's filters take the architecture for granted and stumble over another, each in its own way.
        raise CheckpointError(
            f"{path} does not fit {_asked(model)}: {error}. {_name_the_model(identify(tensors), model)}"
        ) from error
    # By count, because the same numbers in another layout are no other size.
    counts = {name: tensor.numel() for name, tensor in tensors.items()}
    resized = [n for n, t in fitted.items() if t.numel() != counts.get(n, t.numel())]
    return fitted, resized


def _fit_classes(
    tensors: dict[str, Tensor], model: nn.Module, path: Path, classes: list[str] | None
) -> dict[str, Tensor]:
    """`tensors` with the classifier for `classes`, where the weights at `path` name others: reordered or dropped."""
    known = find_provenance(path) if classes else None
    saved = known.classes if known else None
    if saved in (None, classes):
        return tensors
    heads = _heads(model)
    row_of = {plain_name(name): row for row, name in enumerate(saved)}
    rows = [row_of.get(plain_name(name)) for name in classes]
    if len(rows) == len(saved) and None not in rows:
        logger.info(f"{path} knows the same classes in another order: its classifier is reordered")
        return {
            n: t[rows] if n.startswith(heads) and len(t) == len(rows) else t
            for n, t in tensors.items()
        }
    logger.warning(
        f"{path} knows other classes ({join_some(saved, 3)}) than the data ({join_some(classes, 3)}): "
        "the classifier starts from scratch"
    )
    return {n: t for n, t in tensors.items() if not n.startswith(heads)}


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's tensors."""
    heads = model.pretrained_cfg["classifier"] or ()
    return tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads))


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


def _adapt_channels(
    fitted: dict[str, Tensor], own: dict[str, Tensor], model: nn.Module
) -> list[str]:
    """Change the first convolutions in `fitted` that are for RGB to the channels of `model`; their names."""
    adapted = []
    for name in _first_convolutions(model):
        if name in fitted and name in own and _channels_alone_differ(fitted[name], own[name]):
            if fitted[name].shape[1] != 3:
                continue
            # One channel: the sum over RGB, so that a grey image is answered as before.
            fitted[name] = adapt_input_conv(own[name].shape[1], fitted[name])
            adapted.append(name)
    return adapted


def _first_convolutions(model: nn.Module) -> list[str]:
    """Names of the weights that read images."""
    first = model.pretrained_cfg["first_conv"] or ()
    return [f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)]


def _channels_alone_differ(one: Tensor, other: Tensor) -> bool:
    shapes = [(*tensor.shape[:1], *tensor.shape[2:]) for tensor in (one, other)]
    return one.ndim == 4 and shapes[0] == shapes[1] and one.shape != other.shape


def _remedy(
    found: Description | None, model: nn.Module, fitted: dict[str, Tensor], refused: list[str]
) -> str:
    """What to do about `fitted` weights, of which the tensors `refused` do not fit `model`; `found` is their DAT."""
    own = model.state_dict()
    if found and _asked(model) not in found.variants:
        return _name_the_model(found, model)
    if refused and not set(refused) & own.keys():
        return (
            "All of the model is in the file, and more: write one without that, with "
            f"`tools/checkpoint.py strip FILE OUT.safetensors --drop {refused[0]}`."
        )
    first = _first_convolutions(model)
    if set(refused) <= set(first) and all(name in fitted for name in refused):
        channels = [weights[refused[0]].shape[1] for weights in (fitted, own)]
        return (
            f"The file is for images of {channels[0]} channels, the model for {channels[1]}: set DATA.IN_CHANS "
            f"{channels[0]}. A training adapts RGB weights to other channels, an evaluation does not."
        )
    if explained := _explain_classes(refused, fitted, model):
        return explained
    return _name_the_model(found, model)


def _name_the_model(found: Description | None, model: nn.Module) -> str:
    """Which settings the file `found` asks for, instead of those of `model`."""
    if found is None:
        return "Name the model that it was made for with MODEL.NAME and MODEL.ARGS."
    if _asked(model) in found.variants:
        return f"The file is {found}: set MODEL.ARGS and the number of classes to match."
    return f"The file is {found}: set MODEL.NAME {found.variant}, or take a --cfg that does."
