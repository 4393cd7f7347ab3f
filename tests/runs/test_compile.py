"""MODEL.COMPILE: one graph for training and one for evaluation, plain names, the same bits after a resume."""

import functools

import pytest
import torch
from helpers.images import write_image_folder
from helpers.runs import SMALL, arguments, outcome
from torch._dynamo.testing import CompileCounterWithBackend

import main
from engine import checkpoint
from engine.compilation import explain_compile_errors
from utils.errors import ConfigError
from utils.signals import StopRequest

pytestmark = pytest.mark.usefixtures("restore_signals")
EVERY_MIXER = "ARGS: {stages: [LS, ND, CG, P]"
TEXT = SMALL.replace("ARGS: {stages: [L, S, D, D]", EVERY_MIXER)


@pytest.fixture
def graphs(monkeypatch):
    """A compiler that runs graphs as they are and counts them; what cannot be one graph is an error."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


OPTS = ["MODEL.COMPILE=True", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0", "SAVE_STEPS=1"]
OPTS += ["TRAIN.EMA_DECAY=0", "TRAIN.GLOBAL_BATCH_SIZE=12", "CHECKPOINT.KEEP=4"]


@pytest.fixture
def command(tmp_path):
    """The command line of a run of four steps and an evaluation of six images, by its tag."""
    images = write_image_folder(tmp_path / "images", classes=2, train=24, val=3)
    return lambda tag: [*arguments(tmp_path, images, tag=tag, text=TEXT), "--opts", *OPTS]


@pytest.mark.slow
def test_a_run_is_two_graphs(graphs, command, tmp_path):
    assert EVERY_MIXER in TEXT
    assert main.main(command("run")) == 0
    assert graphs.frame_count == 2  # of the evaluation's batches of four, the last one is filled up
    last = checkpoint.list_checkpoints(tmp_path / "dat_micro" / "run" / "checkpoints")[0]
    assert "stem.0.weight" in checkpoint.read_tensors(last / "model.safetensors")


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bits(graphs, command, tmp_path, monkeypatch):
    assert main.main(command("unbroken")) == 0
    asked, agree = [], StopRequest.agree
    with monkeypatch.context() as patch:
        patch.setattr(
            StopRequest,
            "agree",
            lambda self: "tired" if asked.append(0) or len(asked) == 2 else agree(self),
        )
        assert main.main(command("broken")) == 75
    assert main.main(command("broken")) == 0
    assert outcome(tmp_path, "broken") == outcome(tmp_path, "unbroken")
    assert main.main([*command("broken"), "MODEL.COMPILE=False", "TRAIN.EPOCHS=1"]) == 4


def test_errors_of_compilers_name_the_key_that_turns_them_off(command, monkeypatch, capsys):
    def fail(graph, inputs):
        raise AssertionError("no such instruction")

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
        assert main.main([*command("compiled"), "MODEL.ARGS.stages=[L,L,L,L]"]) == 2
    torch._dynamo.reset()
    assert "no such instruction). Set MODEL.COMPILE False." in capsys.readouterr().err


def test_errors_of_triton_name_the_key_that_turns_them_off():
    triton = pytest.importorskip("triton")
    message = r"A fused kernel failed .* Set MODEL\.KERNELS reference"
    with pytest.raises(ConfigError, match=message), explain_compile_errors():
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
