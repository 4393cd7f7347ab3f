"""Shared fixtures: small images, real photographs, a run's signals and warnings, and the data of ../shared."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from helpers.images import write_image_folder

from utils.logging import logger
from utils.signals import SIGNALS

ROOT = Path(__file__).resolve().parents[1]
# Triton reads it when it is imported: kernels then run on the CPU.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """Hear signals that nohup or a shell's & made this process ignore: tests send them."""
    for number in (*SIGNALS, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A small data set, not to be changed: two steps of 24 images an epoch, and 13 validation images.

    No number of processes divides 13.
    """
    root = write_image_folder(tmp_path_factory.mktemp("images"), classes=4, train=13, val=4)
    for label in range(3):
        (root / "val" / f"class_{label}" / "003.jpg").unlink()
    return root


@pytest.fixture(scope="session")
def unbroken(images, tmp_path_factory) -> Path:
    """The folder of the small run of helpers/runs.py in one process that nothing stopped, not to be changed."""
    from helpers.runs import arguments  # imports torch, for which tests of texts need not wait

    import main

    folder = tmp_path_factory.mktemp("unbroken")
    assert main.main(arguments(folder, images)) == 0
    return folder


@pytest.fixture(scope="session")
def photo_files() -> list[Path]:
    """Two photographs as JPEG files of 640×427 pixels, which come with scikit-learn."""
    folder = resources.files("sklearn.datasets.images")
    return [Path(str(folder / name)) for name in ("china.jpg", "flower.jpg")]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets beside this project, too large for a clone; a test that needs them is skipped without them."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs CIFAR-10 and ImageNet samples in ../shared/data")
    return folder


@pytest.fixture(autouse=True)
def _unchanged_logger() -> Iterator[None]:
    """Undo what a run in this process changes: it takes the project's logger for itself."""
    former = logger.handlers, logger.propagate, logger.level, logging.raiseExceptions
    yield
    logger.handlers, logger.propagate, logger.level, logging.raiseExceptions = former


@pytest.fixture(autouse=True)
def _unchanged_kernels() -> Iterator[None]:
    """Undo the choice of kernels of a run in this process: in Triton's interpreter a model takes minutes."""
    yield
    if "models.ops" in sys.modules:
        sys.modules["models.ops"].use_kernels("auto")


@pytest.fixture
def logged_warnings() -> Iterator[list[str]]:
    """The warnings that were logged so far."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def restore_signals() -> Iterator[None]:
    """Give the signals their handlers back: a run that was asked to stop ignores them, as its process is to end."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)
