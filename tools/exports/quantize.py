"""Int8 for CPUs: an ONNX model quantised by onnxruntime, and its accuracy beside float32's.

Dynamic quantisation: weights of linear layers are int8, one scale for each output, and their inputs are quantised when
they are known. Convolutions, norms, softmax, products of attention, bilinear reads and coordinates stay float32.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

import data
from analysis.statistics import compare_pairs, wilson
from engine import build
from tools.common.classifier import Classifier
from tools.features import open_images
from utils.distributed import Process
from utils.errors import DataError
from utils.logging import logger
from utils.text import join_some, quantity

QUANTIZED = ["Gemm", "MatMul"]


def write_int8(source: Path, file: Path) -> None:
    """The ONNX model `source` as int8 in `file`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime advises on the root logger
    with TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(
            str(prepared),
            str(file),
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


# --- Accuracy -------------------------------------------------------------------------------------


def load_batches(
    classifier: Classifier, images: Dataset, *, preprocessed: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What an ONNX model takes of the readable `images`, and their indices, batch by batch."""
    normalize = build.normalize(classifier.cfg, classifier.device)
    loader = build.val_loader(classifier.cfg, images, Process(0, 1, classifier.device))
    for pixels, marks, indices, bad in loader:
        for file in bad:
            logger.warning(f"{file.path} cannot be read: {file.reason}")
        readable = marks != data.NO_LABEL
        if readable.any():
            kept = pixels[readable]
            kept = kept if preprocessed else normalize(kept)
            yield kept.contiguous().numpy(), indices[readable].numpy()


def measure_accuracy(
    classifier: Classifier, folder: Path, files: dict[str, Path], *, preprocessed: bool
) -> dict:
    """Top-1 of every ONNX model of `files`, by format, on the labelled images of `folder`.

    "images"; by format "top1" and its "interval" of 95 %; of int8 also "difference" from float32 with its interval,
    from the same images, and "same": the share of equal predictions. All in per cent. Raises DataError.
    """
    import onnxruntime

    images, labels, classes, _ = open_images(classifier, folder)
    if not classes:
        raise DataError(f"--val {folder}: expected a folder of class folders, or an archive of it")
    if unknown := set(classes) - set(classifier.classes):
        raise DataError(
            f"--val {folder}: classes that the model does not have: {join_some(sorted(unknown), 5)}"
        )
    position = {name: index for index, name in enumerate(classifier.classes)}
    labels = np.array([position[name] for name in classes])[labels]
    sessions = {
        name: onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for name, file in files.items()
    }
    answers: dict[str, list[np.ndarray]] = {name: [] for name in files}
    kept = []
    with tqdm(total=len(images), desc="accuracy", unit="img", leave=False, disable=None) as bar:
        for batch, indices in load_batches(classifier, images, preprocessed=preprocessed):
            kept.append(indices)
            for name, session in sessions.items():
                answers[name].append(session.run(["logits"], {"images": batch})[0].argmax(1))
            bar.update(len(batch))
    if not kept:
        raise DataError(f"--val {folder}: none of the {len(images)} images can be read")
    labels = labels[np.concatenate(kept)]
    found = {name: np.concatenate(parts) for name, parts in answers.items()}
    result: dict = {"folder": folder.name, "images": len(labels)}
    for name, answer in found.items():
        right = answer == labels
        result[name] = {
            "top1": 100 * float(right.mean()),
            "interval": [100 * end for end in wilson(int(right.sum()), len(right))],
        }
        logger.info(
            f"{files[name].name}: {result[name]['top1']:.2f} % of {quantity(len(right), 'image')}"
        )
    if "onnx-int8" in found:
        paired = compare_pairs(found["onnx-int8"] == labels, found["onnx"] == labels)
        result["onnx-int8"] |= {
            "difference": 100 * paired.difference,
            "difference_interval": [100 * end for end in paired.interval or ()] or None,
            "same": 100 * float((found["onnx-int8"] == found["onnx"]).mean()),
        }
    return result
