"""No step waits for its device: where a value of a CUDA tensor would be read, these tests fail. None needs a GPU.

pytest tests/unit/test_host_waits.py
"""

import pytest
import timm
import torch
from helpers.images import write_image_folder
from helpers.runs import arguments
from helpers.states import make_optimizer
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import DataDependentOutputException

import main
from engine import loop
from engine.hooks import AfterStep
from engine.loop import apply_gradient
from engine.results import StepResults
from engine.state import TrainState
from tools.benchmarks.traffic import count, fake_cuda

READERS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__array__")
READERS += ("numpy", "cpu", "nonzero")


# --- Fake CUDA tensors, whose values cannot be read -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "stages"),
    [("dat_micro", ["LS", "D", "CG", "P"]), ("dat_pp_micro", ["N", "D", "D", "D"])],
)
def test_a_model_reads_no_value(name, stages):
    args = {"stages": stages, "drop_path_rate": 0.3, "stochastic_depth": "balanced"}
    model = timm.create_model(name, **args)
    traffic = count(model, batch=8, shape=(3, 32, 32), dtype=torch.float16, training=True)
    assert traffic.kernels > 100


def test_a_step_reads_no_value():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    ema = ModelEmaV3(model, decay=0.9)
    with fake_cuda():
        model, ema.module = (net.to_empty(device="cuda") for net in (model, ema.module))
        optimizer = make_optimizer(model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = TrainState(model, ema, optimizer, scaler)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        norm = apply_gradient(state, clip_grad=5.0)
        assert norm.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):  # so would any of the above
            norm.item()


# --- A run on the CPU -----------------------------------------------------------------------------


def test_what_a_step_computes_is_read_after_the_next_one(tmp_path, monkeypatch):
    """The reads of a run: none in a step, and of results only the one before the last, until all have to be known."""
    forbidden, kept = [], []

    def guarded(function):
        def run(*args, **kwargs):
            forbidden.append(function)
            try:
                return function(*args, **kwargs)
            finally:
                forbidden.pop()

        return run

    def refuse(reader, read):
        def run(*args, **kwargs):
            assert not forbidden, f"{reader} in {forbidden}"
            return read(*args, **kwargs)

        return run

    monkeypatch.setattr(loop, "apply_gradient", guarded(loop.apply_gradient))
    monkeypatch.setattr(StepResults, "add", guarded(StepResults.add))
    monkeypatch.setattr(loop.F, "cross_entropy", guarded(loop.F.cross_entropy))
    for reader in READERS:
        monkeypatch.setattr(torch.Tensor, reader, refuse(reader, getattr(torch.Tensor, reader)))
    read = AfterStep.read
    monkeypatch.setattr(
        AfterStep,
        "read",
        lambda self, results, keep: kept.append(keep) or read(self, results, keep),
    )
    images = write_image_folder(tmp_path / "images", classes=2, train=48, val=2)
    opts = ["SAVE_STEPS=0", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"]  # four steps
    assert main.main([*arguments(tmp_path, images), "--opts", *opts]) == 0
    assert kept == [1, 1, 1, 1, 0]  # and at the end of the epoch
