"""How do images get from disk to the model's input? What follows is public."""

from data.bad_samples import BadSamples, allowed_files
from data.dataset import NO_LABEL, BadFile, ImageDataset, read_class_list
from data.decode import decoder_fingerprint
from data.loader import EvalBatch, Loader, TrainBatch, eval_loader, train_loader
from data.mixup import BatchTransform, Normalize
from data.samplers import ShardSampler, TrainBatchSampler, steps_per_epoch
from data.transforms import eval_transform, train_transform

__all__ = [
    "NO_LABEL",
    "BadFile",
    "BadSamples",
    "BatchTransform",
    "EvalBatch",
    "ImageDataset",
    "Loader",
    "Normalize",
    "ShardSampler",
    "TrainBatch",
    "TrainBatchSampler",
    "allowed_files",
    "decoder_fingerprint",
    "eval_loader",
    "eval_transform",
    "read_class_list",
    "steps_per_epoch",
    "train_loader",
    "train_transform",
]
