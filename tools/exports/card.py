"""Model card of an exported model: README.md with recipe, data, accuracy, files, limits and how to load each file."""

from pathlib import Path
from typing import NamedTuple

from timm.models._hub import generate_readme
from yacs.config import CfgNode

import config
from analysis import suite_table
from analysis.predictions import read_evaluation
from analysis.runs import read_run
from analysis.scores import read_scores
from analysis.statistics import wilson
from engine import build, checkpoint, compat
from engine.weight_files import hash_weights
from models.dat import VARIANTS
from tools.common.classifier import CONFIG_SUFFIXES, Classifier
from utils.errors import DataError
from utils.logging import logger
from utils.text import format_size, quantity

PAPERS = """\
- Vision Transformer With Deformable Attention, CVPR 2022, arXiv:2201.00520
- DAT++: Spatially Dynamic Vision Transformer with Deformable Attention, 2023, arXiv:2309.01430"""
KINDS = {
    "model": "no average",
    "ema": "moving average (EMA)",
    "file": "as they are in the file",
    "random": "random, untrained",
}
USES = {
    "hf": 'timm.create_model("local-dir:FOLDER", pretrained=True) after `import models` of the project',
    "onnx": "ONNX runtimes",
    "onnx-int8": "onnxruntime on CPUs with int8 instructions",
    "pt2": "torch.export.load(FILE).module()",
    "aoti": "torch._inductor.aoti_load_package(FILE), and C++",
}


class Origin(NamedTuple):
    """Where weights are from, without the paths of this machine.

    name: of the file, with those of its run and checkpoint. sha256: of the file, None without one.
    kind: a key of `KINDS`. step, metadata: of the checkpoint; None for weights from elsewhere.
    """

    name: str
    sha256: str | None
    kind: str
    step: Path | None = None
    metadata: dict | None = None


def find_origin(path: Path, ema: bool) -> Origin:
    """The origin of the weights that `path` means, as for `with_weights`."""
    if path.suffix in CONFIG_SUFFIXES:
        return Origin(path.name, None, "random")
    step = checkpoint.containing(path) if path.exists() else None
    if step is None:
        return Origin(path.name, hash_weights(path), "file")
    kind = "ema" if ema or path.name == "ema.safetensors" else "model"
    file = f"{kind}.safetensors"
    run = step.resolve().parents[1]
    name = f"{run.parent.name}/{run.name}/{step.name}/{file}"
    digest = checkpoint.read_manifest(step)[file]["sha256"]
    return Origin(name, digest, kind, step, checkpoint.read_metadata(step))


def make_card(classifier: Classifier, origin: Origin, record: dict) -> str:
    """The text of README.md; `record` is what export.json holds."""
    cfg, images, environment = classifier.cfg, record["images"], record["environment"]
    millions = sum(p.numel() for p in classifier.model.parameters()) / 1e6
    weights = record["weights"]
    mean, std = ([round(value, 6) for value in images[key]] for key in ("mean", "std"))
    rounded = ", rounded to float16" if weights["half"] else ""
    inside = "; applied inside the ONNX and torch files" if images["preprocessing"] else ""
    details = {
        "Model": f"{cfg.MODEL.NAME}, {millions:.1f} M parameters, {quantity(len(classifier.classes), 'class')}",
        "Input": f"images of {format_size(cfg.DATA.IMG_SIZE)} pixels, batch {images['batch']}",
        "Images are prepared by": _preprocessing(cfg),
        "Mean, standard deviation": f"{mean}, {std} of values from 0 to 1{inside}",
        "Weights": f"{origin.name}, {KINDS[origin.kind]}{rounded}",
        **({"SHA-256 of that file": origin.sha256} if origin.sha256 else {}),
        **(describe_training(origin.metadata) if origin.metadata else {}),
        "Exported with": f"code {environment['revision']}, torch {environment['versions']['torch']}",
    }
    deformable = " with deformable attention (DAT, DAT++)" if cfg.MODEL.NAME in VARIANTS else ""
    head = {
        "description": f"An image classifier{deformable}, exported for other programs.",
        "details": details,
        "tags": ["image-classification", "timm"],
        "license": weights["license"],
    }
    sections = {
        **({"Note": weights["note"]} if weights["note"] else {}),
        "Accuracy": describe_accuracy(classifier, origin, record["accuracy"]),
        "Files": describe_files(record["files"]),
        "Limits": "\n".join(f"- {limit}" for limit in list_limits(classifier, record)),
        **({"Papers": PAPERS} if deformable else {}),
    }
    text = generate_readme(head, cfg.MODEL.NAME)
    return text + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items())


def _preprocessing(cfg: CfgNode) -> str:
    return build.describe_preprocessing(cfg).rpartition(",")[0]  # without the precision


# --- Training -------------------------------------------------------------------------------------


def describe_training(metadata: dict) -> dict[str, object]:
    """Recipe and data of the run that wrote a checkpoint with these metadata."""
    defaults = {key.name: key.default for key in config.SCHEMA}
    recipe = compat.list_hparams(metadata["config"])
    changed = [
        f"`{name}` {'none' if value == '' else value}"
        for name, value in recipe.items()
        if name not in defaults or str(defaults[name]) != str(value)
    ]
    images = metadata.get("images", {})
    rows: dict[str, object] = {
        "Trained for": f"{quantity(metadata['step'], 'step')}, {quantity(metadata['epoch'], 'complete epoch')}"
    }
    for title, split, key in (("Training", "train", "data"), ("Validation", "val", "val_data")):
        count = f"{quantity(images[split], 'image')}, " if split in images else ""
        if key in metadata:
            rows[f"{title} data"] = f"{count}fingerprint {metadata[key]}"
    rows["Trained with"] = f"code {metadata['revision']}, torch {metadata['versions']['torch']}"
    rows["Recipe, where it differs from the defaults"] = changed
    return rows


# --- Accuracy -------------------------------------------------------------------------------------


def describe_accuracy(classifier: Classifier, origin: Origin, measured: dict | None) -> str:
    """Evaluations of these weights, or else the validation in training; what was `measured` of the files.

    Each says how its own images were prepared: the classifier may be for another size than its run's.
    """
    lines = find_evaluations(origin) or find_validation(origin)
    if measured is not None:
        count = quantity(measured["images"], "image")
        prepared = f"prepared by {_preprocessing(classifier.cfg)}"
        lines += [f"ONNX files on the {count} of {measured['folder']}, {prepared}:"]
        lines += [_table_of(measured)]
    return "\n\n".join(lines) or "Not evaluated."


def _table_of(measured: dict) -> str:
    header = ["file", "top-1 [95 %]", "difference from float32 [95 %]", "same class"]
    float32 = measured["onnx"]
    body = [["float32", f"{float32['top1']:.2f} % {_interval(float32['interval'])}", "—", "—"]]
    if int8 := measured.get("onnx-int8"):
        ends = int8["difference_interval"]
        difference = f"{int8['difference']:+.2f}" + (f" {_interval(ends)}" if ends else "")
        accuracy = f"{int8['top1']:.2f} % {_interval(int8['interval'])}"
        body.append(["int8", accuracy, difference, f"{int8['same']:.2f} %"])
    return "\n".join(suite_table.format_table(header, body))


def find_evaluations(origin: Origin) -> list[str]:
    """The tables of the run's evaluations of these very weights."""
    found = []
    for folder in read_run(_run_of(origin.step)).evaluations if _run_of(origin.step) else ():
        try:
            if read_evaluation(folder).weights["sha256"] == origin.sha256:
                found.append(suite_table.markdown([read_scores(folder)["suite"]]).rstrip("\n"))
        except DataError as error:
            logger.warning(f"{error}; left out of the model card")
    return found


def find_validation(origin: Origin) -> list[str]:
    """The accuracy of these weights that the run recorded when it wrote them."""
    if (path := _run_of(origin.step)) is None:
        return []
    run, metadata = read_run(path), origin.metadata
    series = run.metrics.get("val_ema/acc1" if origin.kind == "ema" else "val/acc1")
    if series is None or metadata["step"] not in series.steps:
        return []
    acc1 = float(series.values[list(series.steps).index(metadata["step"])])
    text = f"{acc1:.2f} % top-1"
    if images := metadata.get("images", {}).get("val"):
        ends = [100 * end for end in wilson(round(acc1 * images / 100), images)]
        text += f" {_interval(ends)} of {quantity(images, 'image')}"
    cfg = config.load_values(metadata["config"], str(origin.step / "state.json"))
    return [
        f"Validation in training: {text} (95 % Wilson interval over images; other seeds are not counted). The same "
        f"images chose the checkpoint. They were prepared by {_preprocessing(cfg)}."
    ]


def _run_of(step: Path | None) -> Path | None:
    """The run that the checkpoint is still in."""
    if step is None or step.resolve().parent.name != "checkpoints":
        return None
    return step.resolve().parents[1]


def _interval(ends: list[float]) -> str:
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]"


# --- Files ----------------------------------------------------------------------------------------


def describe_files(files: dict[str, dict]) -> str:
    """A table of the files, with their differences from eager."""
    header = ["file", "for", "MB", "largest difference of logits", "ms an image on one thread"]
    body = [
        [
            row["file"],
            USES[name],
            f"{row['bytes'] / 1e6:.1f}",
            ", ".join(f"{value:.1e} (batch {n})" for n, value in row["differences"].items()),
            f"{row['milliseconds']:.1f}",
        ]
        for name, row in files.items()
    ]
    table = "\n".join(suite_table.format_table(header, body))
    hashes = "\n".join(f"{row['sha256']}  {row['file']}" for row in files.values())
    return (
        f"{table}\n\nSHA-256, for `sha256sum --check`:\n\n```\n{hashes}\n```\n\n"
        "Each file was loaded in a new process and compared with the model in PyTorch, on images of random pixels."
    )


def list_limits(classifier: Classifier, record: dict) -> list[str]:
    """What the files were not made for, and were not tried with."""
    size, device = format_size(classifier.cfg.DATA.IMG_SIZE), record["environment"]["device"]
    limits = [
        f"One image size, {size} pixels, for every file but model.safetensors.",
        f"Checked on the CPU of one machine ({device}). No other machine was tried.",
        "What is not under Accuracy was not measured: other images, other ways to prepare them, robustness, fairness.",
    ]
    if record["weights"]["license"] == "unknown":
        limits.append(
            "The licence of the weights is unknown (--license): name it before you publish them."
        )
    if record["weights"]["half"]:
        limits.append(
            "Accuracies of a run are those of its float32 weights, before they were rounded to float16."
        )
    if "onnx" in record["files"]:
        opset = f"ONNX opset {record['opset']}"
        limits.append(f"{opset}, checked with onnxruntime's CPU provider and no other runtime.")
    if "onnx-int8" in record["files"]:
        limits.append(
            "int8: its logits are not float32's; Accuracy has what that costs, if it was measured."
        )
    if "aoti" in record["files"]:
        limits.append(
            "model.aoti-cpu.pt2 is machine code, for this kind of processor and version of torch."
        )
    if record["images"]["preprocessing"]:
        limits.append("Files other than model.safetensors take uint8 pixels.")
    return limits
