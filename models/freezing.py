"""Frozen modules: layers that stay in evaluation mode when the model around them is put in training mode."""

import functools

from torch import nn


def keep_in_eval(module: nn.Module) -> None:
    """Put `module` into evaluation mode, in which it and what is inside stay: its `train` does nothing from now on."""
    module.eval()
    # Not a bound method, which pickle looks up by its name in the module's class.
    module.train = functools.partial(_stay, module)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
