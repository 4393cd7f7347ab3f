"""Parameters by name: patterns, freezing, and learning-rate scales of layers and of single parameters."""

import fnmatch
from collections.abc import Iterable, Sequence

from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.freezing import keep_in_eval
from utils.errors import ConfigError
from utils.text import nearest

# --- Patterns -------------------------------------------------------------------------------------


def match_names(names: Iterable[str], pattern: str) -> set[str]:
    """The parameters among `names` that `pattern` means: itself, or those inside of a module that it means.

    A pattern may hold * and ?, which match dots too: "stages.0", "*.attn.positions", "head.fc.bias".
    """
    return {
        name
        for name in names
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
    }


def _match_some(model: nn.Module, pattern: str, key: str) -> set[str]:
    """`match_names`; ConfigError where nothing of `model` matches."""
    found = match_names((name for name, _ in model.named_parameters()), pattern)
    if not found:
        known = {name for name, _ in model.named_modules()} | {
            n for n, _ in model.named_parameters()
        }
        raise ConfigError(
            f"{key}: no parameter of the model matches {pattern!r}{nearest(pattern, sorted(known))}"
        )
    return found


# --- Freezing -------------------------------------------------------------------------------------


def freeze(model: nn.Module, patterns: str) -> None:
    """Train only what `patterns`, with commas between, leave: the others keep their values and need no gradient.

    A pattern that begins with "!" takes back what those before it froze: "*,!head" leaves the classifier. A BatchNorm
    layer without a parameter to train keeps its running statistics, and normalises by them. Frozen blocks still drop
    paths. Raises ConfigError for a pattern that matches nothing, and where nothing or everything is left to train.
    """
    frozen: set[str] = set()
    for pattern in patterns.split(","):
        found = _match_some(model, pattern.removeprefix("!"), "TRAIN.FREEZE")
        frozen = frozen - found if pattern.startswith("!") else frozen | found
    parameters = dict(model.named_parameters())
    if not frozen or frozen == parameters.keys():
        what = "nothing" if not frozen else "every parameter"
        raise ConfigError(
            f"TRAIN.FREEZE: {patterns!r} freezes {what} of the model; leave it empty to train all, "
            "or write such as '*,!head' to train the head alone"
        )
    for name in frozen:
        parameters[name].requires_grad = False
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            keep_in_eval(module)


# --- Learning-rate scales -------------------------------------------------------------------------


def learning_rate_scales(
    model: nn.Module, layer_decay: float, scales: Sequence[tuple[str, float]]
) -> dict[str, float]:
    """The factor on the learning rate of every parameter of `model`, by name.

    layer_decay: the factor from one layer to the one before it (BEiT, arXiv 2106.08254), which timm computes from the
    layers of `model.group_matcher`; 1: none.
    scales: (pattern, factor), which multiply.

    Raises ConfigError for a pattern that matches nothing, or nothing that is trained.
    """
    factors = {name: 1.0 for name, _ in model.named_parameters()}
    if layer_decay < 1:
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in param_groups_layer_decay(model, layer_decay=layer_decay):
            factors |= {names[p]: group["lr_scale"] for p in group["params"]}
    for pattern, scale in scales:
        found = _match_some(model, pattern, "TRAIN.LR_SCALES")
        if not any(model.get_parameter(name).requires_grad for name in found):
            raise ConfigError(
                f"TRAIN.LR_SCALES: all that {pattern!r} matches is frozen by TRAIN.FREEZE; remove one of the two"
            )
        for name in found:
            factors[name] *= scale
    return factors
