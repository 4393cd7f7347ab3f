"""How do images get from disk to the model's input? What follows is public."""

from data.dataset import NO_LABEL, BadFile, ImageDataset, read_class_list
from data.decode import decoder_fingerprint
from data.loader import EvalBatch, Loader, TrainBatch, eval_loader, train_loader
from data.mixing import Normalize, SlotTransform
from data.report import BadSamples, allowed_files
from data.stream import ShardSampler, SlotSampler, updates_per_epoch
from data.transforms import eval_transform, train_transform

__all__ = [
    "NO_LABEL",
    "BadFile",
    "BadSamples",
    "EvalBatch",
    "ImageDataset",
    "Loader",
    "Normalize",
    "ShardSampler",
    "SlotSampler",
    "SlotTransform",
    "TrainBatch",
    "allowed_files",
    "decoder_fingerprint",
    "eval_loader",
    "eval_transform",
    "read_class_list",
    "train_loader",
    "train_transform",
    "updates_per_epoch",
]
