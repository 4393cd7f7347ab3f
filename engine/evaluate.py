"""Evaluation of weights, checkpoints and runs on val and other test sets, and timing of a model."""

import functools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from yacs.config import CfgNode

import data
from analysis import imagenet
from analysis.collector import Collector
from analysis.predictions import Evaluation
from analysis.scores import write_scores
from analysis.suite_table import markdown
from engine import agreement, build, checkpoint, compat, suite
from engine.compilation import explain_compile_errors
from engine.hooks import WatchedLoader, watch_evaluation
from engine.loop import Accuracy, autocast, validate
from engine.pretrained import load_pretrained
from engine.provenance import Provenance, find_provenance
from engine.sanity import class_order_warnings
from engine.weight_files import hash_weights
from utils.distributed import Process, explain_failures, on_main, share_errors
from utils.download import download
from utils.errors import CheckpointError, ConfigError
from utils.logging import logger
from utils.text import format_size, join_some, quantity
from utils.yaml_nodes import to_dict

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """What is evaluated: a checkpoint of a run, whose class list decides the labels, or weights from elsewhere."""

    path: Path
    classes: list[str] | None  # of the weights or of DATA.CLASS_LIST; None: val's folders decide
    source: str  # where `classes` come from, for people
    provenance: Provenance | None  # None of weights that say nothing of themselves
    files: dict[str, Path]  # that can be evaluated: "model" and, of a checkpoint with an EMA, "ema"
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 of a checkpoint's files

    @property
    def is_checkpoint(self) -> bool:
        """Whether a checkpoint of this project is evaluated as such, and not as weights for --pretrained."""
        return bool(self.digests)


def evaluate(cfg: CfgNode, sources: dict[str, str], given: frozenset[str]) -> None:
    """Evaluate weights, or a checkpoint and its EMA, on the validation images or on test sets; never trains.

    sources: where values that are no defaults come from. given: keys set on the command line. Raises CheckpointError
    for weights that do not fit in full.
    """
    with build.join_run(cfg, "eval") as process, explain_failures(), explain_compile_errors():
        build.log_start(cfg, sources, process, "eval")
        cfg = build.prepare_device(cfg, process.device)
        weights = on_main(lambda: choose_weights(cfg, given))
        with share_errors():
            tensors = read_tensors(weights) if process.is_main else {}
        if cfg.TEST.SETS or cfg.TEST.OUT or cfg.TEST.SIZES or cfg.TEST.SAVE_LOGITS:
            record = evaluate_sets(cfg, weights, tensors, process, has_val="DATA.PATH" in sources)
        else:
            record = evaluate_val(cfg, weights, tensors, process)
        if process.is_main:
            print(json.dumps(record))


def evaluate_val(
    cfg: CfgNode, weights: Weights, tensors: dict[str, Tensors], process: Process
) -> dict:
    """The accuracies of `weights` on the validation images."""
    with share_errors():
        val_set = build.open_split(cfg, "val", weights.classes)
        report_labels(cfg, val_set.classes, weights.source if weights.classes else None)
    agreement.require_same_data(val_set.classes, {"val": val_set})
    loader = build.val_loader(cfg, val_set, process)
    model = build.build_model(cfg, len(val_set.classes), process.device)
    build.compile_if(cfg, model)
    changes = changes_since_training(cfg, weights, val_set.fingerprint)
    results = {}
    for kind in weights.files:
        load_weights(model, weights, kind, tensors)
        with watch_evaluation(loader, process, cfg.TRAIN.HANG_SECONDS) as watched:
            results[kind] = score(cfg, watched, model, process)
    preprocessing = build.describe_preprocessing(cfg)
    for kind, result in results.items():
        log_accuracy(result, kind)
    logger.info(f"Evaluated {weights.path}: {preprocessing}")
    record = {"weights": str(weights.path), "preprocessing": preprocessing, "changes": changes}
    record |= {"pixels": describe_pixels(cfg), "val_data": val_set.fingerprint}
    return record | {kind: result.asdict() for kind, result in results.items()}


def choose_weights(cfg: CfgNode, given: frozenset[str]) -> Weights:
    """What `--eval` evaluates: --resume's run or checkpoint, --pretrained's file, else the run of this configuration.

    A run means its best checkpoint. PRETRAINED in a file is what that run began with: only on the command line does
    it name what to evaluate. Raises CheckpointError if there is nothing to evaluate.
    """
    run, file = cfg.CHECKPOINT.RESUME, cfg.CHECKPOINT.PRETRAINED
    own = build.run_path(cfg)
    if (
        not run
        and "CHECKPOINT.PRETRAINED" not in given
        and checkpoint.list_checkpoints(own / "checkpoints")
    ):
        run = own
    if run:
        path = checkpoint.resolve(Path(run), best=True)
        known, manifest = find_provenance(path), checkpoint.read_manifest(path)
        files = {kind: path / f"{kind}.safetensors" for kind in ("model", "ema")}
        files = {kind: file for kind, file in files.items() if file.name in manifest}
        digests = {kind: manifest[file.name]["sha256"] for kind, file in files.items()}
        return Weights(path, *_saved_classes(cfg, known, given), known, files, digests)
    if file:
        path = download(file)
        known = find_provenance(path)
        if known is None or known.step is None:
            return Weights(path, *_named_classes(cfg, known), known, {"model": path})
        file = path if path.is_file() else known.step / "model.safetensors"
        return Weights(file, *_saved_classes(cfg, known, given), known, {"model": file})
    raise CheckpointError(
        f"--eval needs weights, and {own} has no checkpoints. Add --pretrained FILE or --resume RUN."
    )


def read_tensors(weights: Weights) -> dict[str, Tensors]:
    """The tensors of a checkpoint's files, which a run that still trains may delete; of a file of weights, none."""
    files = weights.files if weights.is_checkpoint else {}
    return {kind: checkpoint.read_tensors(file) for kind, file in files.items()}


def _saved_classes(cfg: CfgNode, known: Provenance, given: frozenset[str]) -> tuple[list[str], str]:
    """The class list of a checkpoint, and its name. Raises ConfigError for another on the command line."""
    saved = known.classes
    if "DATA.CLASS_LIST" in given and (listed := build.class_list(cfg)) not in (None, saved):
        raise ConfigError(
            f"DATA.CLASS_LIST {cfg.DATA.CLASS_LIST} ({join_some(listed, 3)}) is not the class list of {known.path} "
            f"({join_some(saved, 3)}), which decides the labels. Leave it out."
        )
    return saved, str(known.path)


def _named_classes(cfg: CfgNode, known: Provenance | None) -> tuple[list[str] | None, str]:
    """The class list of weights from elsewhere, and its name: DATA.CLASS_LIST, or what a Hugging Face folder names.

    Raises ConfigError where both have the same classes in another order.
    """
    listed = build.class_list(cfg)
    named = known.classes if known else None
    if listed and named and listed != named and data.same_names(listed, named):
        raise ConfigError(
            f"DATA.CLASS_LIST {cfg.DATA.CLASS_LIST} has the classes of {known.path} in another order; the order "
            "of the weights counts. Leave it out."
        )
    if listed is not None or named is None:
        return listed, "DATA.CLASS_LIST"
    logger.info(
        f"{known.path} names {quantity(len(named), 'class')}; if your folders have other names, list them in the "
        "same order with DATA.CLASS_LIST"
    )
    return named, str(known.path)


def report_labels(cfg: CfgNode, classes: list[str], source: str | None) -> None:
    """Log that the labels are those of `source`; warn where the weights may count their classes otherwise.

    source: where the list is from; None: the sorted folders of val. Raises ConfigError where MODEL.NUM_CLASSES is
    another number.
    """
    build.check_num_classes(cfg, len(classes), source or cfg.DATA.PATH)
    where = source or f"the sorted folders of {cfg.DATA.PATH}"
    logger.info(
        f"Labels: {quantity(len(classes), 'class')} as in {where}, {classes[0]} first, {classes[-1]} last"
    )
    for warning in class_order_warnings(classes) if source is None else ():
        logger.warning(
            f"{warning} If the accuracy is at chance, name the order with DATA.CLASS_LIST."
        )


def load_weights(
    model: nn.Module,
    weights: Weights,
    kind: str,
    tensors: dict[str, Tensors],
    *,
    resized: bool = False,
) -> None:
    """Load the `kind` of `weights`, which the main process has for all, in full; CheckpointError where it does not fit.

    tensors: what `read_tensors` read on the main process. resized: `model` is for another image size than theirs.
    """
    file = weights.files[kind]
    if weights.is_checkpoint and not resized:
        on_main(lambda: checkpoint.load_tensors(model, tensors[kind], file))
    else:
        on_main(lambda: load_pretrained(model, file, strict=True, tensors=tensors.get(kind)))
    agreement.send_weights(model)


def changes_since_training(
    cfg: CfgNode, weights: Weights, val_data: str | None, size: int | None = None
) -> list[str]:
    """What changes pixels or logits and differs from the run or folder that `weights` are from; logged, a line each.

    val_data: fingerprint of the validation images, None where they are not evaluated. size: instead of DATA.IMG_SIZE.
    """
    known = weights.provenance
    if known is None:
        return []
    where = "the run's own evaluation" if known.step else known.path
    now = {"decoder": data.decoder_fingerprint(), "config": to_dict(cfg)}
    now["config"]["DATA"]["IMG_SIZE"] = size or cfg.DATA.IMG_SIZE
    now |= {"val_data": val_data} if val_data is not None else {}
    changes = compat.list_evaluation_changes(known.metadata, now)
    for change in changes:
        logger.warning(f"Differs from {where}: {change}")
    return changes


def score(
    cfg: CfgNode,
    loader: WatchedLoader,
    model: nn.Module,
    process: Process,
    collectors: Sequence[Collector] = (),
) -> Accuracy:
    """Accuracy and loss of `model` on the images of `loader`, over all processes; fills `collectors`."""
    return validate(
        model=model,
        loader=loader,
        normalize=build.normalize(cfg, process.device),
        process=process,
        amp_dtype=getattr(torch, cfg.AMP_DTYPE),
        print_freq=0 if collectors else cfg.PRINT_FREQ,  # sets are logged when they end
        batch_size=build.compiled_batch_size(cfg),
        collectors=collectors,
    )


# --- Test sets ------------------------------------------------------------------------------------


def evaluate_sets(
    cfg: CfgNode,
    weights: Weights,
    tensors: dict[str, Tensors],
    process: Process,
    *,
    has_val: bool,
) -> dict:
    """Evaluate on val and the test sets of --sets, at every size, and keep the predictions of every image.

    has_val: whether DATA.PATH was set, so that a missing folder is an error.
    """
    with share_errors():
        found = find_sets(cfg, weights, has_val=has_val)
        classes, source = weights.classes, weights.source
        if classes is None:
            classes, source = class_list_of(cfg, found)
        report_labels(cfg, classes, source)
    asked = [int(size) for size in cfg.TEST.SIZES.split(",") if size]
    sizes = list(dict.fromkeys(asked)) or [cfg.DATA.IMG_SIZE]
    for size in sizes:
        build.check_model(build.at_size(cfg, size), training=False)
    results = []
    for size in sizes:
        sized = build.at_size(cfg, size)
        opener = suite.OpenDataset(
            dataset=functools.partial(build.open_set, sized),
            val=functools.partial(build.open_split, sized, "val"),
            pixels=functools.partial(build.describe_pixels, sized),
            val_subset=cfg.DATA.VAL_SUBSET,
            holdout=cfg.DATA.HOLDOUT,
        )
        with share_errors():
            passes = suite.open_sets(found, classes, opener)
        agreement.require_same_data(classes, {one.title: one.dataset for one in passes})
        val_data = next((one.dataset.fingerprint for one in passes if one.group == "val"), None)
        changes = changes_since_training(cfg, weights, val_data, size)
        model = build.build_model(sized, len(classes), process.device)
        build.compile_if(sized, model)
        for kind, file in weights.files.items():
            # Another size is another shape for models that have one.
            load_weights(model, weights, kind, tensors, resized=size != cfg.DATA.IMG_SIZE)
            other = len(sizes) > 1 or size != cfg.DATA.IMG_SIZE
            folder = predictions_folder(cfg, weights, kind, size if other else None)
            args = sized, weights, kind, file, classes, changes, process
            evaluation = on_main(functools.partial(build_evaluation, *args))
            evaluation = suite.evaluate_passes(
                passes,
                replace(evaluation, folder=folder),
                score=functools.partial(_collect, sized, model, process),
                process=process,
                keep_logits=cfg.TEST.SAVE_LOGITS,
            )
            if process.is_main:
                results.append(score_predictions(cfg, evaluation, size if other else None))
    if not process.is_main:
        return {}
    logger.info(f"Evaluated {weights.path}\n\n{markdown(results)}")
    return {"weights": str(weights.path), "results": results}


def find_sets(cfg: CfgNode, weights: Weights, *, has_val: bool) -> list[suite.Found]:
    """The test sets to evaluate. Raises ConfigError where there is no folder for their predictions."""
    if not weights.is_checkpoint and not cfg.TEST.OUT:
        raise ConfigError("The predictions of a file of weights need a folder. Add --out DIR.")
    data_path = build.data_root(cfg)
    return suite.find_sets(
        Path(cfg.TEST.SETS) if cfg.TEST.SETS else None,
        data_path if has_val or data_path.is_dir() else None,
        suite.parse_only(cfg.TEST.ONLY) if cfg.TEST.SETS else ["val"],
    )


def class_list_of(cfg: CfgNode, found: list[suite.Found]) -> tuple[list[str], str | None]:
    """The classes of weights that do not name theirs, and their source: val's folders (None), or ImageNet-1k's."""
    if any(one.test_set.group == "val" for one in found):
        return build.open_split(cfg, "val", None).classes, None
    return imagenet.wnids(), "ImageNet-1k"


def build_evaluation(
    cfg: CfgNode,
    weights: Weights,
    kind: str,
    file: Path,
    classes: list[str],
    changes: list[str],
    process: Process,
) -> Evaluation:
    """The record of what an evaluation depends on, without its folder and sets."""
    step = weights.provenance.metadata["step"] if weights.is_checkpoint else None
    digest = weights.digests.get(kind) or hash_weights(file)
    return Evaluation(
        folder=Path(),
        weights={"path": str(file), "sha256": digest, "step": step, "kind": kind},
        model={
            "name": cfg.MODEL.NAME,
            "args": {**cfg.MODEL.ARGS, "img_size": cfg.DATA.IMG_SIZE},
        },
        classes=classes,
        names=imagenet.describe(classes),
        sets={},
        pixels=describe_pixels(cfg),
        logits={
            "amp_dtype": cfg.AMP_DTYPE,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "compiled": cfg.MODEL.COMPILE,
        },
        environment={
            **compat.describe_environment(process),
            "batch_size": cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE,
            "changes": changes,
        },
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=shlex.join(sys.argv),
    )


def describe_pixels(cfg: CfgNode) -> dict[str, object]:
    """What changes the model's input, for the record of an evaluation."""
    return {
        **build.describe_pixels(cfg, "own"),
        "mean": cfg.DATA.MEAN,
        "std": cfg.DATA.STD,
        "exif": cfg.DATA.EXIF,
        "decoder": data.decoder_fingerprint(),
    }


def predictions_folder(cfg: CfgNode, weights: Weights, kind: str, size: int | None) -> Path:
    """Where predictions go: <run>/eval/<step>-<model|ema>, or below --out; `size`: of --sizes, None for DATA.IMG_SIZE.

    A checkpoint that lies in no run has its predictions in the run directory of the configuration.
    """
    suffix = [f"{size}px"] if size else []
    if weights.is_checkpoint:
        folder = weights.path.resolve().parent
        run = folder.parent if folder.name == "checkpoints" else build.run_path(cfg)
        base = Path(cfg.TEST.OUT) if cfg.TEST.OUT else run / "eval"
        step = weights.path.name.removeprefix("step-")
        return base / "-".join([step, kind, *suffix])
    return Path(cfg.TEST.OUT, *suffix)


def _collect(
    cfg: CfgNode,
    model: nn.Module,
    process: Process,
    dataset: Dataset,
    collectors: list[Collector],
) -> None:
    """Run the model over the images of `dataset` and fill `collectors`."""
    loader = build.val_loader(cfg, dataset, process)
    with watch_evaluation(loader, process, cfg.TRAIN.HANG_SECONDS) as watched:
        score(cfg, watched, model, process, collectors)


def score_predictions(cfg: CfgNode, evaluation: Evaluation, size: int | None) -> dict:
    """Write scores.json and scores.md beside the predictions; the results for the table, with the `size` if given."""
    factors = Path(cfg.TEST.SETS, suite.FACTORS_FILE) if cfg.TEST.SETS else None
    found = write_scores(evaluation.folder, factors if factors and factors.exists() else None)
    results = found["suite"]
    return results | ({"model": f"{results['model']}, {size} px"} if size else {})


# --- Log and time ---------------------------------------------------------------------------------


def log_accuracy(result: Accuracy, name: str) -> None:
    """Log the accuracies of the weights `name` in Swin's words."""
    suffix = " (EMA)" if "ema" in name else ""
    logger.info(f" * Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}{suffix}")
    logger.info(
        f"Accuracy of the network on the {result.images} test images: {result.acc1:.2f}%{suffix}"
    )
    if result.unreadable:
        logger.warning(
            f"{result.images - result.unreadable} of {result.images} images were evaluated, "
            f"{result.unreadable} cannot be read and count as wrong"
        )


def throughput(cfg: CfgNode, sources: dict[str, str]) -> None:
    """Print how many images a second the model classifies, on random images; needs no data."""
    with build.join_run(cfg, "throughput") as process, explain_compile_errors():
        build.log_start(cfg, sources, process, "throughput")
        cfg = build.prepare_device(cfg, process.device)
        model = build.build_model(cfg, cfg.MODEL.NUM_CLASSES or 1000, process.device).eval()
        build.compile_if(cfg, model)
        batch = cfg.DATA.BATCH_SIZE
        images = torch.randn(batch, *build.input_shape(cfg), device=process.device)
        seconds = []
        with torch.inference_mode(), autocast(process.device, getattr(torch, cfg.AMP_DTYPE)):
            while len(seconds) < 13 or sum(seconds) < 10:
                start = time.perf_counter()
                model(images)
                if process.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
    speeds = sorted(batch / s for s in seconds[3:])  # the first three warm up
    logger.info(
        f"batch_size {batch} throughput {speeds[len(speeds) // 2]:.1f} images/s per process "
        f"(median of {len(speeds)}; {speeds[0]:.1f} to {speeds[-1]:.1f}), "
        f"{format_size(cfg.DATA.IMG_SIZE)} px, {cfg.AMP_DTYPE}, {process.device}"
    )
