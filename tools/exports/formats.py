"""Formats of an exported model: how each is called, what it needs, how it is written and compared with eager.

hf         model.safetensors, config.json   timm and the Hugging Face hub; the weights
onnx       model.onnx                       ONNX runtimes; GridSample for the bilinear reads
onnx-int8  model.int8.onnx                  the same, quantised (tools/exports/quantize.py)
pt2        model.export.pt2                 torch.export; compatible versions of torch
aoti       model.aoti-cpu.pt2               AOTInductor; a library for this processor and torch
"""

import copy
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from yacs.config import CfgNode

import data
from data.mixup import luma
from engine import build
from engine.compilation import describe_error
from tools.common.classifier import Classifier
from utils.errors import ConfigError, UserError
from utils.logging import logger

FILES = {
    "hf": "model.safetensors",
    "onnx": "model.onnx",
    "onnx-int8": "model.int8.onnx",
    "pt2": "model.export.pt2",
    "aoti": "model.aoti-cpu.pt2",
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # from 20 on GridSample has a mode of another name, which some runtimes do not read
TOLERANCE = 1e-4  # of logits, and of the largest where that is above 1
BATCHES = (1, 3)  # compared if the batch is free
RELOAD = Path(__file__).with_name("reload.py")


class ExportError(UserError):
    """A file that was written, but cannot be loaded or computes something else."""


class Batches(NamedTuple):
    """Which batches an exported model takes; `size` 0: any."""

    size: int

    @property
    def example(self) -> int:
        """The batch that is recorded; a batch of one would be taken for a constant."""
        return self.size or 2

    @property
    def compared(self) -> tuple[int, ...]:
        """The batches with which a file is compared with eager."""
        return (self.size,) if self.size else BATCHES

    @property
    def dynamic_shapes(self) -> tuple[dict, ...] | None:
        """The argument of torch.export."""
        return None if self.size else ({0: torch.export.Dim("batch")},)


class WithPreprocessing(nn.Module):
    """A model on pixels, uint8 (B, 3, H, W): mean and standard deviation are applied inside."""

    def __init__(self, model: nn.Module, normalize: data.Normalize):
        super().__init__()
        self.model = model
        self.normalize = normalize

    def forward(self, pixels: Tensor) -> Tensor:
        """To logits (B, classes)."""
        return self.model(self.normalize(pixels))


# --- What a format needs --------------------------------------------------------------------------


def check_requirements(formats: list[str], opset: int) -> None:
    """Raise ConfigError for a package, opset or compiler that is missing here."""
    if "onnx" in formats:
        for package in ONNX_PACKAGES:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ConfigError(
                    f"--to onnx needs {package}, which is not installed: pip install {' '.join(ONNX_PACKAGES)}"
                ) from error
        check_opset(opset)
    if "aoti" in formats:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise ConfigError(
                f"--to aoti compiles C++ and there is no {compiler}: install g++, or set CXX to a compiler"
            )


def check_opset(opset: int) -> None:
    """Raise ConfigError unless the installed onnxruntime loads a model of this opset."""
    import onnx
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    def value(name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])

    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "opset", [value("x")], [value("y")])
    imports = [onnx.helper.make_opsetid("", opset)]
    tried = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    try:
        onnxruntime.InferenceSession(tried.SerializeToString(), providers=["CPUExecutionProvider"])
    except Fail as error:
        raise ConfigError(
            f"--opset {opset}: onnxruntime {onnxruntime.__version__} does not have it; use {OPSET}"
        ) from error


# --- Write ----------------------------------------------------------------------------------------


def mean_and_std(cfg: CfgNode) -> tuple[list[float], list[float]]:
    """What the model's input is normalised with, a value a channel: for grey models the luma of the colours."""
    mean, std = cfg.DATA.MEAN, cfg.DATA.STD
    if cfg.DATA.IN_CHANS == 1:
        mean, std = (luma(torch.tensor(colour)).tolist() for colour in (mean, std))
    return [*mean], [*std]


def write_hf(classifier: Classifier, folder: Path, *, half: bool) -> None:
    """config.json and model.safetensors, which timm loads as local-dir:FOLDER after `import models`.

    half: the file has float16; models that load it have float32.
    """
    cfg = classifier.cfg
    model = copy.deepcopy(classifier.model).half() if half else classifier.model
    described = dict(zip(classifier.classes, classifier.names, strict=True))
    words = {"label_descriptions": described} if classifier.names != classifier.classes else {}
    mean, std = mean_and_std(cfg)
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": classifier.classes, **words},
        safe_serialization=True,
        data_config={
            "input_size": build.input_shape(cfg),
            "mean": tuple(mean),
            "std": tuple(std),
            "interpolation": cfg.DATA.INTERPOLATION,
            "crop_mode": cfg.TEST.CROP_MODE,
            "crop_pct": cfg.TEST.CROP_PCT,
        },
    )
    # safetensors lets only its owner read what it writes.
    (folder / FILES["hf"]).chmod((folder / "config.json").stat().st_mode)


@torch.no_grad()
def write_onnx(
    model: nn.Module,
    example: Tensor,
    batches: Batches,
    file: Path,
    *,
    opset: int,
    properties: dict[str, str],
) -> None:
    """An ONNX file with input "images" and output "logits"; `properties` are kept in it.

    Raises ConfigError for an opset that it is not converted to.
    """
    import onnx

    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=batches.dynamic_shapes,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    program.model.metadata_props.update(properties)
    program.save(file, external_data=False)
    onnx.checker.check_model(str(file), full_check=True)
    found = next(one.version for one in onnx.load(file).opset_import if not one.domain)
    if found != opset:
        raise ConfigError(
            f"--opset {opset}: the installed onnxscript writes {found} in its place; use {OPSET}"
        )


@torch.no_grad()
def write_programs(
    model: nn.Module, example: Tensor, batches: Batches, files: dict[str, Path]
) -> None:
    """Of `files` "pt2", a program of torch.export, and "aoti", the same compiled.

    Raises ConfigError where the compiler fails.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    program = torch.export.export(model, (example,), dynamic_shapes=batches.dynamic_shapes)
    if "pt2" in files:
        torch.export.save(program, files["pt2"])
    if "aoti" in files:
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(files["aoti"]))
        except (TorchDynamoException, CppCompileError) as error:
            raise ConfigError(
                f"--to aoti: the compiler failed ({describe_error(error)}). Leave aoti out, or set CXX to another one."
            ) from error


# --- Compare --------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """How far the logits of a file are from eager's: the largest difference of each batch; and its speed.

    milliseconds: of one image on one thread.
    """

    differences: dict[int, float]
    largest_logit: float
    milliseconds: float

    @property
    def agrees(self) -> bool:
        """Whether every difference is within `TOLERANCE`; NaN is not."""
        return all(d <= TOLERANCE * max(1, self.largest_logit) for d in self.differences.values())


def compare(
    name: str, file: Path, images: dict[int, Tensor], expected: dict[int, Tensor]
) -> Comparison:
    """The file of format `name`, loaded in another process, against the logits `expected` of `images`, by batch.

    Raises ExportError where it cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        sent, received = Path(folder, "images.npz"), Path(folder, "logits.npz")
        np.savez(sent, **{str(batch): pixels.numpy() for batch, pixels in images.items()})
        reloaded = subprocess.run(
            [sys.executable, RELOAD, name, file, sent, received],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if reloaded.returncode:
            reason = (reloaded.stderr.strip() or f"exit code {reloaded.returncode}").splitlines()
            raise ExportError(f"{file.name} was written and cannot be loaded again: {reason[-1]}")
        with np.load(received) as found:
            milliseconds = float(found["milliseconds"])
            differences = {
                batch: float(np.abs(found[str(batch)] - logits.numpy()).max())
                for batch, logits in expected.items()
            }
    largest = max(float(logits.abs().max()) for logits in expected.values())
    logger.info(
        f"{file.name}: loaded again, logits differ by at most {max(differences.values()):.1e}, "
        f"{milliseconds:.1f} ms an image on one thread"
    )
    return Comparison(differences, largest, milliseconds)
