"""torch.hub entries: every variant of models/dat.py, with timm's keyword arguments.

torch.hub.load("FOLDER", "dat_tiny", source="local", weights="dat_tiny_in1k_224.pth")
"""

import collections.abc
import warnings

import timm
import torch

import engine.pretrained
import models.dat
import utils.download

dependencies = ["torch", "timm", "safetensors"]


def _entry(name: str) -> collections.abc.Callable[..., torch.nn.Module]:
    """The function that torch.hub calls for the variant `name`."""

    def create(weights: str | None = None, **kwargs) -> torch.nn.Module:
        features = {}
        if kwargs.get("features_only"):
            features = {k: kwargs.pop(k) for k in ("features_only", "out_indices") if k in kwargs}
        model = timm.create_model(name, **kwargs)
        if weights is not None:
            # The classifier may differ from the file's only where a number of classes was named, or none is wanted.
            strict = "num_classes" not in kwargs and not features
            path = utils.download.download(str(weights))
            report = engine.pretrained.load_pretrained(model, path, strict=strict)
            if report.resized or report.new:
                warnings.warn(f"{weights}: {report}", stacklevel=2)
        if not features:
            return model
        backbone = timm.create_model(name, **kwargs, **features)
        backbone.model.load_state_dict(model.state_dict(), strict=False)  # it keeps a part of them
        return backbone

    create.__name__ = name
    create.__doc__ = (
        f"{name}: timm's keyword arguments, and `weights`, a file, run or checkpoint to load.\n\n"
        "Weights that do not fit raise utils.errors.CheckpointError; resized tables and a new classifier are warned of."
    )
    return create


globals().update({name: _entry(name) for name in models.dat.VARIANTS})
