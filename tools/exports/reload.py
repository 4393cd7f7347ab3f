"""Logits of an exported model in a process of its own, and the milliseconds of one image on one thread.

    python tools/exports/reload.py FORMAT PATH IMAGES.npz LOGITS.npz

FORMAT is one of `LOADERS`, PATH what `write` of tools/exports/formats.py made. Every array of IMAGES is a batch; LOGITS
gets an array of the same name for each, and "milliseconds" of an image: the CPU time of the fastest of 20 passes of the
first batch, which on one thread of an idle machine is the time.

Only hf needs this project, to register its models with timm: the other formats are loaded without it.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPEATS = 20

Run = Callable[[np.ndarray], np.ndarray]  # images (B, 3, H, W) to logits (B, classes)


def load_hf(path: Path) -> Run:
    """A folder of timm's `save_for_hf`; the eager model."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import timm

    import models  # noqa: F401 (registers the variants)

    model = timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()
    return _on_tensors(model)


def load_onnx(path: Path) -> Run:
    """An ONNX file, in float32 or int8."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def load_pt2(path: Path) -> Run:
    """A program of torch.export."""
    import torch

    return _on_tensors(torch.export.load(path).module())


def load_aoti(path: Path) -> Run:
    """A package of AOTInductor: a library for the processor that it was compiled on."""
    import torch

    return _on_tensors(torch._inductor.aoti_load_package(str(path)))


def _on_tensors(model: Callable) -> Run:
    import torch

    torch.set_num_threads(1)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return run


LOADERS = {
    "hf": load_hf,
    "onnx": load_onnx,
    "onnx-int8": load_onnx,
    "pt2": load_pt2,
    "aoti": load_aoti,
}


def time_image(run: Run, images: np.ndarray) -> float:
    """Milliseconds of CPU time of an image in a batch like `images`, in the fastest of `REPEATS` passes."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        run(images)
        seconds.append(time.process_time() - start)
    return 1000 * min(seconds) / len(images)


def main(format_name: str, path: str, images: str, logits: str) -> None:
    """Load, compute, time, write."""
    run = LOADERS[format_name](Path(path))
    with np.load(images) as batches:
        found = {name: run(batch) for name, batch in batches.items()}
        milliseconds = time_image(run, batches[batches.files[0]])
    np.savez(logits, milliseconds=milliseconds, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
