#!/usr/bin/env python
"""Object detection and semantic segmentation with a timm backbone, trained for minutes on a CPU.

    python tools/dense.py detect --backbones dat_pp_nano swin_nano --data-path imagenette --json detect.json
    python tools/dense.py segment --backbones dat_pp_nano --pretrained weights/dat_pp_nano_imagenette --layer-decay 0.8

detect: torchvision's Faster R-CNN with a feature pyramid; segment: UPerNet of segmentation-models-pytorch. Scenes are
handwritten digits on photographs; without --data-path, on two photographs of scikit-learn. Every backbone gets the same
head, the same scenes in the same order and the same seed. A backbone is any name that timm knows, or swin_nano, a Swin
of the cost of dat_pp_nano. docs/dense.md shows the parts for a detector of your own.
"""

import argparse
import datetime
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.memory import use_large_pages

use_large_pages()  # as main.py does
import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR  # noqa: E402
from torchvision.models.detection import FasterRCNN  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402
from tqdm import tqdm  # noqa: E402

import models  # noqa: E402
from engine.compat import device_name, revision  # noqa: E402
from engine.optim import Schedule  # noqa: E402
from engine.pretrained import load_pretrained  # noqa: E402
from models.dense import BackboneWithFPN, freeze_stages, parameter_groups  # noqa: E402
from tools.benchmarks.macs import count_macs  # noqa: E402
from tools.benchmarks.model import at_least  # noqa: E402
from tools.common.classifier import log_to_stderr  # noqa: E402
from tools.common.scenes import CLASSES, Scene, Scenes  # noqa: E402
from utils.download import download  # noqa: E402
from utils.errors import ConfigError, DivergedError, as_exit_code  # noqa: E402
from utils.files import write_atomically  # noqa: E402
from utils.rng import key, reseed  # noqa: E402

# timm's Swin with the widths and heads of dat_pp_nano and one block more, for the same cost; windows of 8 tile maps of
# 32, 16 and 8 positions.
SWIN_NANO = {
    "embed_dim": 48,
    "depths": (2, 2, 5, 2),
    "num_heads": (2, 4, 8, 16),
    "window_size": 8,
    "img_size": 128,
    "strict_img_size": False,
}
# What the tasks need beside requirements.txt.
PACKAGES = {"detect": ("torchmetrics", "pycocotools"), "segment": ("segmentation_models_pytorch",)}
CHANNELS = 64  # of the pyramid: small, as the backbones are
# Sixteenths of a scene's side, a size for each map: digits have 0.2 to 0.5.
ANCHORS = (2, 3, 4, 6, 8)
WEIGHT_DECAY = 0.05
MAX_NORM = 1.0  # of the gradient
WARMUP = 0.1  # of the steps


# --- Models ---------------------------------------------------------------------------------------


def timm_name(backbone: str) -> tuple[str, dict]:
    """The name that timm knows and the arguments of the backbone `backbone`. Raises ConfigError for an unknown one."""
    if backbone == "swin_nano":
        return "swin_tiny_patch4_window7_224", dict(SWIN_NANO)
    models.check(backbone, {})
    return backbone, {}


def build_detector(backbone: str, size: int, **kwargs) -> tuple[nn.Module, nn.Module]:
    """A Faster R-CNN for images of `size` pixels and the timm features inside; `kwargs` go to the backbone."""
    name, arguments = timm_name(backbone)
    features = timm.create_model(
        name, features_only=True, feature_cls="getter", **arguments, **kwargs
    )
    pyramid = BackboneWithFPN(features, CHANNELS)
    width = 4 * CHANNELS
    detector = FasterRCNN(
        pyramid,
        min_size=size,
        max_size=size,
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((size * sixteenths // 16,) for sixteenths in ANCHORS),
            aspect_ratios=((0.5, 1.0, 2.0),) * len(ANCHORS),
        ),
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_head=TwoMLPHead(CHANNELS * 7**2, width),
        box_predictor=FastRCNNPredictor(width, len(CLASSES)),
        box_batch_size_per_image=64,
    )
    return detector, features


def build_segmenter(backbone: str, size: int, **kwargs) -> tuple[nn.Module, nn.Module]:
    """A UPerNet for images of multiples of 32 pixels and the timm features inside."""
    from segmentation_models_pytorch import UPerNet

    name, arguments = timm_name(backbone)
    segmenter = UPerNet(
        f"tu-{name}",
        encoder_weights=None,
        decoder_channels=CHANNELS,
        classes=len(CLASSES),
        **arguments,
        **kwargs,
    )
    return segmenter, segmenter.encoder.model


# --- Tasks ----------------------------------------------------------------------------------------


def to_targets(scenes: list[Scene]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images from 0 to 1 and targets, as torchvision's detectors take them."""
    images = [scene.image.float() / 255 for scene in scenes]
    return images, [{"boxes": scene.boxes, "labels": scene.labels} for scene in scenes]


def to_batch(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Normalised images (B, 3, H, W) and masks (B, H, W)."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    images = torch.stack([scene.image for scene in scenes])
    return (images / 255 - mean) / std, torch.stack([scene.mask for scene in scenes])


def detection_loss(detector: nn.Module, scenes: list[Scene]) -> Tensor:
    """The sum of Faster R-CNN's four losses."""
    return sum(detector(*to_targets(scenes)).values())


def segmentation_loss(segmenter: nn.Module, scenes: list[Scene]) -> Tensor:
    """The mean cross-entropy of the pixels."""
    images, masks = to_batch(scenes)
    return F.cross_entropy(segmenter(images), masks)


@torch.inference_mode()
def evaluate_detector(detector: nn.Module, batches: Iterator[list[Scene]]) -> dict[str, float]:
    """COCO's mAP (IoU 0.50 to 0.95) and mAP at IoU 0.50, in %."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="pycocotools")
    for scenes in batches:
        images, targets = to_targets(scenes)
        metric.update(detector(images), targets)
    result = metric.compute()
    return {"mAP": 100 * float(result["map"]), "mAP50": 100 * float(result["map_50"])}


@torch.inference_mode()
def evaluate_segmenter(segmenter: nn.Module, batches: Iterator[list[Scene]]) -> dict[str, float]:
    """The mean IoU of the classes, background included, and of the digits alone, in %."""
    classes = len(CLASSES)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)  # [true, predicted]
    for scenes in batches:
        images, masks = to_batch(scenes)
        pairs = classes * masks + segmenter(images).argmax(1)
        confusion += pairs.flatten().bincount(minlength=classes**2).view(classes, classes)
    right = confusion.diagonal()
    iou = 100 * right / (confusion.sum(0) + confusion.sum(1) - right).clamp(min=1)
    return {"mIoU": float(iou.mean()), "mIoU of digits": float(iou[1:].mean())}


TASKS = {
    "detect": (build_detector, detection_loss, evaluate_detector),
    "segment": (build_segmenter, segmentation_loss, evaluate_segmenter),
}


# --- Training -------------------------------------------------------------------------------------


def batches_of(scenes: Scenes, batch: int) -> Iterator[list[Scene]]:
    """The scenes in their order, `batch` at a time."""
    for start in range(0, len(scenes), batch):
        yield [scenes[i] for i in range(start, min(start + batch, len(scenes)))]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module, list[Scene]], Tensor],
    scenes: Scenes,
    args: argparse.Namespace,
) -> list[float]:
    """Train for a step per batch of `scenes`; the loss of every step. Raises DivergedError."""
    warmup = round(WARMUP * args.steps)
    schedule = LambdaLR(optimizer, Schedule(args.steps, warmup, base=1.0, start=0.01, end=0.0))
    losses = []
    model.train()
    for batch in tqdm(batches_of(scenes, args.batch), total=args.steps, leave=False, disable=None):
        reseed(key(args.seed, "step", len(losses)))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp_dtype == "bfloat16"):
            loss = loss_of(model, batch)
        if not loss.isfinite():
            raise DivergedError(f"step {len(losses)}: the loss is {loss.item()}; lower --lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def run(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Train and evaluate one backbone; what is written and printed of it."""
    build, loss_of, evaluate = TASKS[args.task]
    reseed(key(args.seed, "weights"))
    model, features = build(name, args.size, drop_path_rate=args.drop_path)
    backbone = getattr(features, "model", features)
    if args.pretrained:
        load_pretrained(backbone, download(args.pretrained), strict=False)
    if args.frozen_stages >= 0:
        freeze_stages(backbone, args.frozen_stages)
    groups = parameter_groups(
        model, backbone, lr=args.lr, weight_decay=WEIGHT_DECAY, layer_decay=args.layer_decay
    )
    source = {"data_path": args.data_path, "seed": args.seed}
    scenes = Scenes("train", args.size, args.steps * args.batch, **source)
    losses = train(model, torch.optim.AdamW(groups), loss_of, scenes, args)
    val = Scenes("val", args.size, args.val_scenes, **source)
    accuracy = evaluate(model.eval(), batches_of(val, args.batch))
    return {
        "backbone": name,
        "weights": args.pretrained or "random",
        "parameters": sum(p.numel() for p in features.parameters()),
        "macs": count_macs(features, args.size, args.size),
        "accuracy": accuracy,
        "losses": losses,
    }


# --- Command line ---------------------------------------------------------------------------------


def table(results: list[dict], steps: int) -> str:
    """A Markdown table with a row per backbone; losses are means of the first and last tenth of the steps."""
    tenth = max(1, steps // 10)
    rows = []
    for result in results:
        losses, accuracy = result["losses"], result["accuracy"]
        first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        rows.append(
            [
                result["backbone"],
                result["weights"],
                f"{result['parameters'] / 1e6:.2f} M",
                f"{result['macs'] / 1e9:.3f}",
                f"{first:.3f} → {last:.3f}",
                *(f"{value:.2f}" for value in accuracy.values()),
            ]
        )
    head = ["Backbone", "Weights", "Parameters", "GMACs", "Loss", *accuracy]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises ConfigError for what cannot be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--backbones", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--pretrained", default="", metavar="FILE", help="backbone's weights")
    parser.add_argument(
        "--data-path", type=Path, metavar="FOLDER", help="photographs, train and val"
    )
    parser.add_argument("--size", type=at_least(64), default=128, help="a scene's side in pixels")
    parser.add_argument("--steps", type=at_least(1), default=400)
    parser.add_argument("--batch", type=at_least(2), default=8, help="scenes of a step")
    parser.add_argument("--val-scenes", type=at_least(1), default=500, help="scenes of validation")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the head")
    parser.add_argument("--layer-decay", type=float, default=1.0, help="of the learning rate")
    parser.add_argument("--drop-path", type=float, default=0.0, help="rate of stochastic depth")
    parser.add_argument(
        "--frozen-stages", type=int, default=-1, metavar="N", help="0: the stem, 1: and a stage, …"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    parser.add_argument("--amp-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results")
    args = parser.parse_args(arguments)
    if args.size % 32:
        raise ConfigError(f"--size {args.size}: expected a multiple of 32, as UPerNet takes")
    if args.pretrained and len(args.backbones) > 1:
        raise ConfigError("--pretrained is for one backbone; compare with a call for each")
    for package in PACKAGES[args.task]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            names = " ".join(PACKAGES[args.task]).replace("_", "-")
            raise ConfigError(
                f"{args.task} needs {package}, which is not installed: pip install {names}"
            ) from error
    return args


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    args = parse(arguments)
    log_to_stderr()
    torch.set_num_threads(args.threads)
    results = [run(name, args) for name in args.backbones]
    print(table(results, args.steps))
    if args.json:
        content = {
            "command": shlex.join(["python", "tools/dense.py", *arguments]),
            "commit": revision(),
            "machine": device_name(torch.device("cpu")),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "results": results,
        }
        write_atomically(args.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
