"""torch.hub entries: every variant of models/dat.py, with timm's keyword arguments.

torch.hub.load("FOLDER", "dat_tiny", source="local", weights="dat_tiny_in1k_224.pth")

The packages of this repository are imported below the name `dat_hub`: the caller, and other repositories of torch.hub,
may have a `utils`, `models` or `engine` of their own. A program that has imported our own `models` gets those.
"""

# Modules alone: torch.hub takes every function and class here for an entry.
import builtins
import collections.abc
import importlib.machinery
import pathlib
import sys
import types
import warnings

import timm
import torch

dependencies = ["torch", "timm", "safetensors"]

# --- Imports below a private name -----------------------------------------------------------------

PACKAGE = "dat_hub"
ROOT = pathlib.Path(__file__).resolve().parent
OWN = {file.parent.name for file in ROOT.glob("*/__init__.py")} | {"config"}


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module whose import statements find this repository's packages below PACKAGE."""

    def exec_module(self, module: types.ModuleType) -> None:
        module.__builtins__ = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder:
    """Finds the modules of PACKAGE in the folder of this repository."""

    package = PACKAGE

    @staticmethod
    def find_spec(
        name: str, path: collections.abc.Sequence[str] | None = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The specification of the module `name` in the folder `path`; None for modules of others."""
        if not name.startswith(f"{PACKAGE}."):
            return None
        loader = (_Loader, importlib.machinery.SOURCE_SUFFIXES)
        return importlib.machinery.FileFinder(path[0], loader).find_spec(name)


def _import(
    name: str,
    globals: dict | None = None,
    locals: dict | None = None,
    fromlist: collections.abc.Sequence[str] = (),
    level: int = 0,
) -> types.ModuleType:
    """What an import statement calls in modules of PACKAGE: `__import__`, for own names below PACKAGE."""
    first = name.partition(".")[0]
    if level or first not in OWN:
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = importlib.import_module(f"{PACKAGE}.{name}")
    if not fromlist:
        return sys.modules[f"{PACKAGE}.{first}"]
    return builtins.__import__(module.__name__, globals, locals, fromlist, 0)


def _is_ours(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and pathlib.Path(file).resolve().is_relative_to(ROOT)


def _module(name: str) -> types.ModuleType:
    """The module `name` of this repository, imported below PACKAGE unless the program has it under its own name."""
    if "models" in sys.modules and all(_is_ours(own) for own in OWN & sys.modules.keys()):
        return importlib.import_module(name)
    loaded = sys.modules.get(PACKAGE)
    if loaded is None or loaded.__path__ != [
        str(ROOT)
    ]:  # none yet, or of another copy of this repository
        for other in [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]:
            del sys.modules[other]
        package = types.ModuleType(PACKAGE, "This repository, as torch.hub has loaded it.")
        package.__path__ = [str(ROOT)]
        sys.modules[PACKAGE] = package
        others = [f for f in sys.meta_path if getattr(f, "package", None) != PACKAGE]
        sys.meta_path[:] = [_Finder, *others]
    return importlib.import_module(f"{PACKAGE}.{name}")


# --- Entries --------------------------------------------------------------------------------------

_pretrained, _download, _dat = map(_module, ("engine.pretrained", "utils.download", "models.dat"))


def _entry(name: str) -> collections.abc.Callable[..., torch.nn.Module]:
    """The function that torch.hub calls for the variant `name`."""

    def create(weights: str | None = None, **kwargs) -> torch.nn.Module:
        if weights is None:
            return timm.create_model(name, **kwargs)
        # A file's weights are checked against the model itself; a backbone for features keeps a part of them.
        features = {}
        if kwargs.pop("features_only", False):
            options = ("out_indices", "feature_cls")
            features = {k: kwargs.pop(k) for k in options if k in kwargs} | {"features_only": True}
        model = timm.create_model(name, **kwargs)
        # The ends may differ from the file's only where classes or channels were named, or no classes are wanted.
        strict = not ({"num_classes", "in_chans"} & kwargs.keys() or features)
        path = _download.download(str(weights))
        report = _pretrained.load_pretrained(model, path, strict=strict)
        if report.resized or report.adapted or report.new:
            warnings.warn(f"{weights}: {report}", stacklevel=2)
        if not features:
            return model
        backbone = timm.create_model(name, **kwargs, **features)
        backbone.model.load_state_dict(model.state_dict(), strict=False)
        return backbone

    create.__name__ = name
    create.__doc__ = (
        f"{name}: timm's keyword arguments, and `weights`, a file, run or checkpoint to load.\n\n"
        "Weights that do not fit raise utils.errors.CheckpointError; resized tables, a first convolution for other "
        "channels and a new classifier are warned of."
    )
    return create


globals().update({name: _entry(name) for name in _dat.VARIANTS})
