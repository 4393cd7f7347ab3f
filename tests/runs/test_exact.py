"""Reproducibility in words: the same bits on 1, 2 and 4 processes, also moved between them, and after kills on 3 and 4.

pytest tests/runs/test_exact.py
"""

import json
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import SMALL, arguments, outcome, run_group
from torch import nn

import config
from engine import checkpoint, compat
from engine.grad_sync import DeterministicSync, PairwiseSum
from utils.distributed import Process
from utils.errors import ConfigError
from utils.step_timer import StepTimer

# Everything random is on in both. A ResNet has BatchNorm; its float16 scales the loss.
RUNS = {
    "dat_micro": SMALL,
    "test_resnet": """
AMP_DTYPE: float16
PRINT_FREQ: 1
THREADS: 1
DATA: {BATCH_SIZE: 4, IMG_SIZE: 32, NUM_WORKERS: 0}
MODEL: {NAME: test_resnet, DROP_PATH_RATE: 0.3}
TRAIN:
  {EPOCHS: 2, WARMUP_EPOCHS: 1, GLOBAL_BATCH_SIZE: 24, BASE_LR: 0.01, EMA_DECAY: 0.9}
SAVE_STEPS: 1
CHECKPOINT: {KEEP: 20}
TEST: {CROP_PCT: 1.0}
""",
}
EXACT = ("--opts", "TRAIN.EXACT_WORLD_SIZE=True", "TRAIN.GLOBAL_BATCH_SIZE=16")


# --- The tree -------------------------------------------------------------------------------------


def tree(terms: list[torch.Tensor]) -> torch.Tensor:
    half = len(terms) // 2
    return tree(terms[:half]) + tree(terms[half:]) if half else terms[0].clone()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 64])
def test_the_sum_is_that_of_a_balanced_tree(count):
    generator = torch.Generator().manual_seed(count)
    terms = [torch.randn(1000, generator=generator) for _ in range(count)]
    expected, in_a_row = tree(terms), sum(term.clone() for term in terms)
    total = PairwiseSum()
    for added, term in enumerate(terms, start=1):
        total.add(term)
        assert len(total._sums) == added.bit_count()
    assert torch.equal(total.total(), expected)
    assert count < 4 or not torch.equal(expected, in_a_row)


def test_the_gradient_is_the_tree_of_its_micro_batches_and_the_first_one_moves_the_statistics():
    torch.manual_seed(0)
    micro_batches = torch.randn(4, 8, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss_of(images):
        return F.cross_entropy(model(images), torch.arange(8) % 2)

    gradients, losses, after = [], [], []
    for images in micro_batches:
        model.load_state_dict(start)
        model.zero_grad()
        loss_of(images).backward()
        gradients.append([parameter.grad / 4 for parameter in model.parameters()])
        losses.append(loss_of(images).detach() / 4)
        model.load_state_dict(start)
        model(images)
        after.append({name: buffer.clone() for name, buffer in model.named_buffers()})

    model.load_state_dict(start)
    reduction = DeterministicSync(model, range(4), Process(0, 1, torch.device("cpu")))
    for micro_batch, images in enumerate(micro_batches):
        with reduction.accumulate(micro_batch, StepTimer(torch.device("cpu"))):
            (loss_of(images) / reduction.divisor).backward()
    for parameter, *terms in zip(model.parameters(), *gradients, strict=True):
        assert torch.equal(parameter.grad, tree(terms))
    assert torch.equal(reduction.mean_loss(losses), tree(losses))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, after[0][name])


# --- Whole runs -----------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=["dat_micro", pytest.param("test_resnet", marks=pytest.mark.slow)]
)
def unmoved(request, images, tmp_path_factory) -> tuple[str, Path]:
    """A model's name and the folder of its run on one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("unmoved")
    assert run_group(1, exact(folder, images, request.param)) == [0]
    return request.param, folder


def exact(folder: Path, images: Path, model: str) -> list[str]:
    return arguments(folder, images, *EXACT, text=RUNS[model])


@pytest.mark.parametrize(
    "moves",
    [
        pytest.param([(2, 0)], marks=pytest.mark.slow),  # the last of the moves ends on two
        [(4, 0)],
        [(4, 1), (1, 3), (2, 0)],
    ],
    ids=str,
)
def test_numbers_of_processes_change_no_bit(moves, images, unmoved, tmp_path):
    """`moves` are numbers of processes, each with the steps after which it is asked to stop, 0 for never."""
    model, reference = unmoved
    for processes, steps in moves:
        codes = run_group(processes, exact(tmp_path, images, model), at=steps)
        assert codes == [75 if steps else 0] * processes
    assert outcome(tmp_path, model=model) == outcome(reference, model=model)
    log = (tmp_path / model / "run" / "log.txt").read_text()
    assert ("Changed since the checkpoint: world_size was 4, is 1" in log) == (len(moves) > 1)


@pytest.mark.parametrize(
    ("model", "processes", "batch_size"),
    [("dat_micro", 3, 4), pytest.param("test_resnet", 4, 2, marks=pytest.mark.slow)],
)
def test_killed_and_resumed_under_ddp(model, processes, batch_size, images, tmp_path):
    # Each process has two or three of the micro-batches. In float16 the first steps are skipped.
    more = "--batch-size", str(batch_size), "--amp-dtype", "bfloat16"
    for tag, kill_at in (("broken", 3), ("broken", 0), ("unbroken", 0)):
        argv = arguments(tmp_path, images, *more, tag=tag, text=RUNS[model])
        codes = run_group(processes, argv, at=kill_at, signal=SIGKILL)
        assert all(codes) if kill_at else not any(codes)
    assert outcome(tmp_path, "broken", model) == outcome(tmp_path, "unbroken", model)


# --- What is said ---------------------------------------------------------------------------------


def test_the_level_is_in_the_log_and_in_the_checkpoints(unmoved):
    model, folder = unmoved
    run = folder / model / "run"
    level = "bitwise on any number of processes"
    assert (
        f"Reproducibility: {level}: {compat.EXPLANATIONS[level]}" in (run / "log.txt").read_text()
    )
    newest = checkpoint.list_checkpoints(run / "checkpoints")[0]
    assert json.loads((newest / "state.json").read_text())["reproducibility"] == level


def test_the_level_follows_from_device_and_reduction():
    levels = [
        compat.reproducibility(torch.device(kind), exact_world_size=exact, deterministic=False)
        for kind in ("cpu", "cuda")
        for exact in (False, True)
    ]
    cuda = torch.device("cuda")
    assert compat.reproducibility(cuda, exact_world_size=False, deterministic=True) == "bitwise"
    assert levels == [
        "bitwise",
        "bitwise on any number of processes",
        "same samples",
        "same samples",
    ]
    assert set(levels) == set(compat.EXPLANATIONS)


@pytest.mark.parametrize("processes", [3, 8])
def test_processes_that_do_not_fit_the_tree_are_refused(processes, images, tmp_path):
    cfg = config.parse(exact(tmp_path, images, "dat_micro")).cfg
    with pytest.raises(ConfigError, match=rf"got {processes} for 4 micro-batches; start (2 or )?4"):
        config.check_world_size(cfg, processes)
