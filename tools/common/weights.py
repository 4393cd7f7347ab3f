"""Description of a file, checkpoint or run: what it is, which model it holds, how long it was trained."""

from pathlib import Path

from torch import Tensor

from analysis.records import read_records
from engine import checkpoint, weight_files
from models.convert import DERIVED
from models.identify import identify
from models.state_dicts import find_state_dicts
from utils.errors import CheckpointError
from utils.file_kinds import kind_of, printable
from utils.text import join_some, quantity

# Keys of a file by which its trainer is known.
TRAINERS = {
    "pytorch-lightning_version": "Lightning",
    "message_hub": "mmengine",
    "student": "DINO or another trainer of a student and a teacher",
    "model_state_dict": "PyTorch's tutorial, or code after it",
    "state_dict_ema": "timm",
    "arch": "timm, or code after PyTorch's ImageNet example",
}


def describe(path: Path) -> dict[str, object]:
    """The rows that `checkpoint.py inspect` prints for `path`, also where it is damaged or holds no weights.

    Raises CheckpointError if there is nothing at `path`.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    rows: dict[str, object] = {"file": path}
    try:
        if path.is_dir() and checkpoint.is_own(path):
            step = checkpoint.resolve(path, best=True)
            tensors = checkpoint.read_tensors(step / "model.safetensors")
            return {"file": step} | describe_weights(tensors) | describe_training(step)
        if path.is_dir():
            rows["file"] = path = weight_files.find_file(path)
        rows["size"] = f"{path.stat().st_size:,} bytes"
        rows["format"] = kind_of(path).name
        if names := weight_files.class_names(path):
            own = [name for name in names if not name.startswith(("torch.", "collections.Ordered"))]
            refused = sorted(n for n in own if not weight_files.HARMLESS.fullmatch(n))
            rows["classes"] = f"{len(own) - len(refused)} that are read as data"
            if refused:
                rows["classes"] += f", {len(refused)} others: {printable(join_some(refused), 500)}"
        content = weight_files.open_file(path)
        if isinstance(content, dict):
            rows |= describe_content(content)
        tensors, removed = weight_files.select(path, find_state_dicts(content))
        if removed:
            rows["removed"] = ", ".join(removed)
        return rows | describe_weights(tensors)
    except CheckpointError as error:
        return rows | {"problem": error}
    except OSError as error:
        return rows | {"problem": f"{path} cannot be read: {error.strerror}"}


def describe_content(content: dict) -> dict[str, object]:
    """The trainer and the keys of what a file holds; none for a bare state dict."""
    found = find_state_dicts(content)
    if "" in found:
        return {}
    rows = {}
    if trainer := next((TRAINERS[key] for key in TRAINERS if key in content), None):
        rows["written by"] = trainer
    keys = [
        f"{printable(str(key))} {value}" if isinstance(value, int | float) else printable(str(key))
        for key, value in content.items()
    ]
    rows["keys"] = join_some(keys, 20)
    if found:
        rows["state dicts"] = join_some(
            f"{printable(key)} ({quantity(len(tensors), 'tensor')})"
            for key, tensors in found.items()
        )
    return rows


def describe_weights(tensors: dict[str, Tensor]) -> dict[str, object]:
    """The model, size and type of a state dict, and which of its values are not finite."""
    found = identify(tensors)
    weights = {name: t for name, t in tensors.items() if not DERIVED.fullmatch(name)}
    names = "the authors' names" if found and found.released else "this project's names"
    known = f"{found}, {names}"
    rows = {
        "weights": known
        if found
        else f"not a DAT variant; {printable(join_some(tensors, 3), 300)}",
        "parameters": f"{sum(t.numel() for t in weights.values()):,} in {len(weights)} tensors",
        "types": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in weights.values()})),
    }
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        rows["problem"] = f"NaN or infinite weights in {join_some(bad)}"
    return rows


def describe_training(step: Path) -> dict[str, object]:
    """What the checkpoint `step` and the records of its run say about the training."""
    metadata = checkpoint.read_metadata(step)
    best = metadata["best"]
    rows = {
        "model": f"{metadata['model']}, {len(metadata['classes'])} classes",
        "step": f"{metadata['step']}, after {metadata['epoch']} complete epochs",
    }
    if best["step"]:
        whose = " of the average" if best.get("ema") else ""
        rows["best"] = f"{best['acc1']:.3f} % top-1{whose} so far, at step {best['step']}"
    if arguments := metadata["config"]["MODEL"]["ARGS"]:
        rows["MODEL.ARGS"] = arguments
    folder = step.resolve().parent
    file = folder.parent / "metrics.jsonl"  # of the run, where the checkpoint is still in one
    for record in read_records(file) if folder.name == "checkpoints" and file.exists() else ():
        for name in ("val", "val_ema"):
            keys = [f"{name}/acc1", f"{name}/acc5"]
            if record["step"] == metadata["step"] and record.keys() >= set(keys):
                acc1, acc5 = (record[key] for key in keys)
                rows[name] = f"{acc1:.3f} % top-1, {acc5:.3f} % top-5"
    return rows | {
        "written by": f"torch {metadata['versions']['torch']}, code {metadata['revision']}"
    }
