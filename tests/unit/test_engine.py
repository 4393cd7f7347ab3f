"""Parts of the engine: schedule, decay groups, checkpoint folder, skipped steps, evaluation, records."""

import dataclasses
import json
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers.images import write_image_folder, write_zip
from helpers.runs import arguments
from helpers.states import make_optimizer, make_state, save_state, save_steps
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader

import config
import models  # noqa: F401  registers the variants
from data import TrainBatch
from engine import build, checkpoint, compat
from engine.grad_sync import DDPSync
from engine.loop import Accuracy, apply_gradient, forward_backward, validate
from engine.optim import Schedule, create_optimizer, parameter_groups
from engine.results import StepResults
from engine.state import TrainState
from models import ops
from utils.distributed import Process
from utils.errors import CheckpointError, ConfigError, StorageError
from utils.logging import MetricWriter
from utils.rng import key, permutation
from utils.step_timer import StepTimer

ROOT = Path(__file__).resolve().parents[2]
CPU = Process(0, 1, torch.device("cpu"))
EACH_OPTIMIZER = pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "lion", "muon"])


def test_sgd_without_momentum():
    model = nn.Linear(2, 1, bias=False)
    settings = {
        "weight_decay": 0.0,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "lr_scales": {"weight": 1.0},
    }
    optimizer = create_optimizer(model, "sgd", momentum=0.0, **settings)
    for _ in range(2):
        before = model.weight.detach().clone()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        assert torch.allclose(model.weight, before - 0.1)


def make_results(state: TrainState) -> StepResults:
    sizes = {"steps_per_epoch": 10, "epochs": 1, "later_epochs": 0.0, "global_batch": 2}
    writer = MetricWriter(None, 0, 0, every=1)
    return StepResults(state, writer, StepTimer(CPU.device), CPU.device, **sizes)


def train_a_little(state: TrainState, steps: int = 3) -> None:
    results = make_results(state)
    for _ in range(steps):
        state.optimizer.zero_grad()
        inputs = torch.arange(8.0).view(2, 4) + state.step
        state.scaler.scale(state.model(inputs).square().sum()).backward()
        norm = apply_gradient(state, clip_grad=1.0)
        state.step += 1
        results.add(0.1, norm, None)
    assert list(results.read(keep=0)) == []


def bits(state: TrainState) -> dict:
    tensors = {**state.model.state_dict(), "ema": state.ema.module[0].weight}
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def test_the_main_process_logs_once_which_forms_of_a_split_are_not_read(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "set", classes=2, train=2, val=2)
    write_zip(root / "val", root / "val.zip")
    cfg = config.parse(arguments(tmp_path, root)).cfg
    logged = []
    monkeypatch.setattr(build.logger, "warning", logged.append)
    for main in (False, True, True):
        monkeypatch.setattr(build, "is_main", lambda main=main: main)
        build.open_split(cfg, "train", None)
        build.open_split(cfg, "val", None)
        assert len(logged) == main
    assert logged == [f"{root}/val is read; val.zip beside it is not"]


def test_remaining_time_knows_that_later_epochs_have_larger_images(monkeypatch, caplog):
    cfg = config.load(str(ROOT / "configs" / "digits.yaml"), [])
    cfg.defrost()
    cfg.TRAIN.EPOCHS, cfg.DATA.IMG_SIZE = 4, 64
    cfg.DATA.IMG_SIZE_SCHEDULE = [[1, 32], [3, [64, 128]]]
    pixels = build.epoch_pixels(cfg)
    assert pixels == (64 * 64, 32 * 32, 32 * 32, 64 * 128)
    later = sum(pixels[2:]) / pixels[1]  # those after epoch 1
    state = make_state()
    state.epoch, state.step = 1, 10
    timer = StepTimer(CPU.device)
    monkeypatch.setattr(timer, "lap", lambda: SimpleNamespace(seconds=lambda: {"forward": 60.0}))
    sizes = {"steps_per_epoch": 10, "epochs": 4, "later_epochs": later, "global_batch": 2}
    results = StepResults(state, MetricWriter(None, 0, 0, every=1), timer, CPU.device, **sizes)
    state.step += 1
    results.add(0.1, torch.tensor(1.0), torch.tensor(2.0))
    with caplog.at_level(logging.INFO):
        assert list(results.read(keep=0)) == []
    # 9 steps of a minute, 10 of a minute, 10 of eight minutes.
    assert "eta 1:39:00" in caplog.text


# --- Randomness, schedule, groups -----------------------------------------------------------------


def test_random_numbers_are_frozen():
    """Other values would change every run that resumes under a new version."""
    assert key(0, "sample", 3, 7) == 0xB191A725ACD45BDF
    assert permutation(8, key(0, "order", 0)).tolist() == [5, 0, 1, 7, 3, 2, 6, 4]


@pytest.mark.parametrize(("total", "warmup"), [(50, 10), (50, 0), (7, 3)])
def test_schedule_is_the_released_one(total, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4e-3)
    reference = CosineLRScheduler(
        optimizer,
        t_initial=total,
        lr_min=4e-5,
        warmup_lr_init=4e-6,
        warmup_t=warmup,
        cycle_limit=1,
        t_in_epochs=False,
    )
    schedule = Schedule(total, warmup, base=4e-3, start=4e-6, end=4e-5)
    for step in range(total):
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        reference.step_update(step)  # the released code sets the rate after the step


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        ("dat_micro", ("relative_position_bias_table", "rpe_table")),
        ("swin_tiny_patch4_window7_224", ("relative_position_bias_table",)),
        ("deit_tiny_patch16_224", ("cls_token", "pos_embed")),
    ],
)
def test_what_is_not_decayed(name, exempt):
    model = timm.create_model(name)
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.05, scales)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    for parameter in free["params"]:
        assert parameter.ndim <= 1 or names[parameter].endswith(exempt)
    for parameter in decayed["params"]:
        assert parameter.ndim > 1
        assert not names[parameter].endswith((*exempt, "bias"))


@pytest.mark.parametrize("name", ["dat_pp_micro", "deit_tiny_patch16_224"])
def test_muon_leaves_ends_and_tables_to_adamw(name):
    model = timm.create_model(name)
    optimizer = make_optimizer(model, "muon")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    by_muon = {n for n, p in model.named_parameters() if optimizer.state[p]["use_muon"]}
    assert by_muon
    for n, p in model.named_parameters():
        # What has one input channel a group is depthwise: rows without a product to orthogonalise.
        matrix = p.ndim > 1 and p.shape[1] > 1 and min(p.shape[0], p[0].numel()) >= 4
        embeds = n.startswith(("stem.0.", "head.", "patch_embed.", "cls_token", "pos_embed"))
        assert (n in by_muon) == (matrix and not embeds and not n.endswith("table")), n


# --- Steps that are not applied -----------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("fp16", [False, True])
@EACH_OPTIMIZER
def test_step_without_a_finite_gradient_is_skipped(optimizer, value, fp16):
    state = make_state(optimizer=optimizer, fp16=fp16, lr=0.01)
    train_a_little(state)
    before, scale = bits(state), state.scaler.get_scale()
    kept = checkpoint.snapshot(state, {})["optimizer.safetensors"]
    state.model[0].weight.grad.fill_(value)
    results = make_results(state)
    norm = apply_gradient(state, clip_grad=1.0)
    results.add(0.1, norm, None)
    assert bits(state) == before
    assert checkpoint.snapshot(state, {})["optimizer.safetensors"] == kept
    assert state.skipped == 0  # not known yet
    assert list(results.read(keep=0)) == [state.step]
    assert state.skipped == 1
    assert not fp16 or state.scaler.get_scale() == scale / 2
    train_a_little(state, 1)
    assert bits(state) != before
    assert state.skipped == 0


# --- What depends on the step ---------------------------------------------------------------------


def test_the_average_warms_up_by_timms_formula():
    state = make_state()
    state.ema.use_warmup, state.ema.warmup_gamma, state.ema.warmup_power = True, 2.0, 0.75
    expected = state.ema.module[0].weight.clone()
    for step in range(1, 40):
        train_a_little(state, 1)
        keep = min(1 - (1 + (step - 1) / 2) ** -0.75, 0.9)
        expected = keep * expected + (1 - keep) * state.model[0].weight
        torch.testing.assert_close(state.ema.module[0].weight, expected)
    assert keep == pytest.approx(0.9, abs=0.01)


def test_images_are_mixed_until_the_epoch_in_which_mixing_is_off():
    asked = []

    def transform(images, labels, ops, *, mix):
        asked.append(mix)
        return torch.ones(2, 4), labels

    cfg = config.load(
        str(ROOT / "configs/digits.yaml"), ["AUG.MIXUP_OFF_EPOCH=2", "AMP_DTYPE=float32"]
    )
    recipe = build.build_recipe(cfg, 3, ["a", "b"], CPU)
    recipe = dataclasses.replace(recipe, transform=transform, micro_batches=range(1))
    state, batch = make_state(), TrainBatch(torch.zeros(2), torch.tensor([0, 1]), [], None)
    for state.step in range(9):
        sync = DDPSync(state.model, recipe.micro_batches, CPU)
        forward_backward(state, sync, iter([batch]), recipe, CPU, StepTimer(CPU.device))
    assert asked == [True] * 6 + [False] * 3


def test_warm_up_in_steps():
    cfg = config.load(
        str(ROOT / "configs/digits.yaml"), ["TRAIN.WARMUP_STEPS=7", "AMP_DTYPE=float32"]
    )
    assert build.build_recipe(cfg, 10, ["a", "b"], CPU).schedule.warmup == 7
    with pytest.raises(ConfigError, match=r"WARMUP_STEPS is 7, but the training has 7 steps\. Sh"):
        build.warmup_steps(
            config.load_values({"TRAIN": {"WARMUP_STEPS": 7, "EPOCHS": 7}}, "").TRAIN, 1
        )


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fp16", [False, True])
@EACH_OPTIMIZER
def test_restored_state_continues_with_the_same_bits(optimizer, fp16, tmp_path):
    settings = {"optimizer": optimizer, "fp16": fp16, "lr": 0.01}
    state = make_state(**settings)
    train_a_little(state)
    state.epoch, state.skipped, state.best = 2, 1, {"acc1": 50.0, "step": 2}
    path = save_state(tmp_path, state, {"model": "toy"})
    other = make_state(**settings)
    train_a_little(other, 1)  # nothing of this may remain
    checkpoint.restore(path, other)
    assert other.counters() == state.counters()
    assert checkpoint.read_metadata(path)["model"] == "toy"
    train_a_little(state)
    train_a_little(other)
    assert bits(other) == bits(state)


def test_an_average_may_be_switched_on_and_off(tmp_path, logged_warnings):
    without = make_state(3)
    without.ema = None
    path = save_state(tmp_path, without)
    state = make_state(1)
    checkpoint.restore(path, state)
    weights = zip(state.ema.module.parameters(), without.model.parameters(), strict=True)
    assert all(torch.equal(average, weight) for average, weight in weights)
    assert "has no EMA: it starts from the checkpoint's weights" in logged_warnings[-1]
    checkpoint.restore(save_state(tmp_path, make_state(4)), without)
    assert (without.step, without.ema) == (4, None)


def test_other_folders_beside_checkpoints_are_none(tmp_path):
    path = save_state(tmp_path, make_state(2))
    for name in ("step-22-hf", "step-3.bak", "step-", "last"):
        (tmp_path / name).mkdir()
    assert checkpoint.list_checkpoints(tmp_path) == [path] == [checkpoint.latest(tmp_path)]


@pytest.mark.parametrize("before", ["sgd", "lamb", "muon"])
@EACH_OPTIMIZER
def test_another_optimizer_starts_without_a_state(optimizer, before, tmp_path, logged_warnings):
    old = make_state(optimizer=before)
    train_a_little(old)
    state = make_state(optimizer=optimizer)
    checkpoint.restore(save_state(tmp_path, old), state)
    assert bits(state) == bits(old)
    if before != optimizer:
        assert state.optimizer_tensors() == {}
        assert f"has the optimizer state of {before}: " in logged_warnings[-1]
    train_a_little(state)
    checkpoint.restore(save_state(tmp_path, state), make_state(optimizer=optimizer))


def test_an_optimizer_state_of_other_tensors_is_refused(tmp_path):
    adamw = {"config": {"TRAIN": {"OPTIMIZER": {"NAME": "adamw"}}}}
    path = save_state(tmp_path, make_state(optimizer="lion"), adamw)
    with pytest.raises(CheckpointError, match=r"state of AdamW .* has exp_avg instead of exp_avg,"):
        checkpoint.restore(path, make_state())


def test_hyperparameters_come_from_the_configuration(tmp_path):
    state = make_state(lr=0.1, weight_decay=0.5)
    train_a_little(state)
    path = save_state(tmp_path, state)
    other = make_state(lr=0.2, weight_decay=0.25)
    checkpoint.restore(path, other)
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.2, 0.2]
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.25, 0.0]


@pytest.mark.parametrize("name", ["model", "ema", "optimizer", "state", "manifest"])
def test_every_kind_of_damage_is_found_and_the_one_before_is_used(name, tmp_path):
    good, bad = save_steps(tmp_path, 9, 10)
    file = next(bad.glob(f"{name}.*"))
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", content[: len(content) // 2], content[:-1], bytes(flipped), None):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        assert checkpoint.verify(bad) is not None
        assert checkpoint.latest(tmp_path) == good
        with pytest.raises(CheckpointError, match=file.name):
            checkpoint.resolve(bad)
    file.write_bytes(content)
    assert checkpoint.verify(bad) is None


def test_all_damaged_is_an_error_and_none_is_not(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    (path,) = save_steps(tmp_path, 1)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints"):
        checkpoint.latest(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 9, 10, 11)
    (tmp_path / ".tmp-step-12").mkdir()
    checkpoint.prune(tmp_path / "step-11", keep=2, best="step-2")
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-11", "step-2"]


def test_failed_save_leaves_the_others_alone(tmp_path, monkeypatch):
    (older,) = save_steps(tmp_path, 1)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(StorageError, match="No space left"):
        save_steps(tmp_path, 2)
    assert os.listdir(tmp_path) == [older.name]
    assert checkpoint.verify(older) is None


def test_what_is_saved_is_the_state_at_that_moment(tmp_path, monkeypatch):
    state = make_state()
    train_a_little(state)
    before = bits(state)
    begin, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: begin.wait() and write(*args))
    with checkpoint.Saver(tmp_path, keep=2) as saver:
        saver.save(state, {})
        train_a_little(state)  # while the disk is slow
        begin.set()
    other = make_state()
    checkpoint.restore(checkpoint.latest(tmp_path), other)
    assert bits(other) == before


def test_failed_background_write_ends_the_run(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    saver = checkpoint.Saver(tmp_path / "checkpoints", keep=2)
    saver.save(make_state(), {})
    with pytest.raises(StorageError, match="step-0"), saver:
        saver.save(make_state(), {})


# --- Evaluation and records -----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_is_the_mean_over_images(batch_size):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 2, 2), dtype=torch.uint8)
    labels = torch.randint(0, 8, (23,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    samples = [(images[i], labels[i], i, []) for i in range(23)]
    result = validate(
        model=model,
        loader=DataLoader(samples, batch_size),
        normalize=lambda images: images.float() / 255,
        process=CPU,
        amp_dtype=torch.float32,
        batch_size=0,
        print_freq=10,
    )
    with torch.no_grad():
        logits = model(images.float() / 255)
    ranks = logits.argsort(descending=True)
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert result.images == 23
    assert result.top1 == (ranks[:, 0] == labels).sum()
    assert result.top5 == (ranks[:, :5] == labels[:, None]).sum()
    assert result.loss == pytest.approx(loss)
    assert Accuracy(8, 2, 4, 1.0).acc1 == 25


def test_records_beyond_the_resumed_step_are_cut(tmp_path):
    writer = MetricWriter(tmp_path, 0, 0, every=1)
    for step in (1, 2, 3):
        writer.metrics(step, {"train/loss": 0.5})
    writer.close()
    expected = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # a kill within a line
    writer = MetricWriter(tmp_path, 2, 0, every=1)
    writer.metrics(3, {"train/loss": 0.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == expected
    assert [json.loads(line)["step"] for line in expected.splitlines()] == [1, 2, 3]


def test_the_evaluation_of_an_epoch_that_was_not_closed_is_recorded_once(tmp_path):
    """A run that is asked to stop at the end of an epoch is saved before its evaluation."""
    writer = MetricWriter(tmp_path, 0, 0, every=1)
    writer.metrics(1, {"train/loss": 0.5})
    writer.metrics(1, {"epoch": 1, "val/acc1": 50.0})
    writer.close()
    expected = (tmp_path / "metrics.jsonl").read_text()
    MetricWriter(tmp_path, 1, 1, every=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == expected
    writer = MetricWriter(tmp_path, 1, 0, every=1)  # killed before the epoch was saved as closed
    writer.metrics(1, {"epoch": 1, "val/acc1": 50.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == expected


# --- AMP_DTYPE auto -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "bfloat16", "expected"),
    [("cuda", False, "float16"), ("cpu", True, "bfloat16"), ("cpu", False, "float32")],
)
def test_auto_is_the_recipes_type_or_what_the_cpu_is_fast_with(
    device, bfloat16, expected, monkeypatch
):
    monkeypatch.setattr(compat, "cpu_multiplies_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(ops, "_kernels", "auto")  # restored after the test
    cfg = config.load(str(ROOT / "configs/dat_tiny.yaml"))
    assert cfg.AMP_DTYPE == "auto"
    assert expected == build.prepare_device(cfg, torch.device(device)).AMP_DTYPE
    named = config.load(str(ROOT / "configs/dat_tiny.yaml"), ["AMP_DTYPE=float16"])
    assert build.prepare_device(named, torch.device(device)).AMP_DTYPE == "float16"
