"""The data package: images from disk to the model's input. The names below are public.

Each is imported when it is first used: what only lists files (`data.readers`) needs no torch.
"""

from importlib import import_module

_MODULES = {
    "BadFile": "dataset",
    "BadSamples": "bad_samples",
    "BatchTransform": "mixup",
    "EvalBatch": "loader",
    "ImageDataset": "dataset",
    "Loader": "loader",
    "NO_LABEL": "dataset",
    "Normalize": "mixup",
    "RemotePath": "remote",
    "ShardSampler": "samplers",
    "TrainBatch": "loader",
    "TrainBatchSampler": "samplers",
    "allowed_files": "bad_samples",
    "decoder_fingerprint": "decode",
    "eval_loader": "loader",
    "eval_transform": "transforms",
    "open_root": "remote",
    "read_class_list": "classes",
    "same_names": "classes",
    "steps_per_epoch": "samplers",
    "train_loader": "loader",
    "train_transform": "transforms",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
