"""Resume compatibility: what differs from a checkpoint is listed, and refused unless it is ignored or accepted."""

import copy
import functools
import json
import logging
from pathlib import Path

import pytest
import torch

import config
from engine import compat
from engine.checkpoint import read_metadata
from utils import first_edition
from utils.errors import CheckpointError, ConfigError, DataError
from utils.logging import logger

COUNTERS = {"step": 3, "epoch": 1, "skipped": 0, "best": {"acc1": 0.0, "step": 0}, "scaler": {}}
METADATA = {
    "images": {"train": 100, "val": 20},
    "model": "dat_micro",
    "classes": ["cat", "dog"],
    "data": "1f" * 32,
    "val_data": "2e" * 32,
    "decoder": {"pillow": "13.0.0", "libjpeg": "3.1", "pixels": "3d"},
    "format": 2,
    "reproducibility": "bitwise",
    "world_size": 2,
    "steps_per_epoch": 2,
    "versions": {
        "project": "2.0.0",
        "python": "3.11.7",
        "torch": "2.14.1",
        "torchvision": "0.29.1",
        "timm": "1.0.31",
    },
    "revision": "c6d553d",
    "device": "AMD EPYC, AVX2",
    "threads": 1,
    "config": {
        "OUTPUT": "output",
        "SEED": 0,
        "PRINT_FREQ": 10,
        "AMP_DTYPE": "float32",
        "DATA": {"PATH": "a", "NUM_WORKERS": 8, "BATCH_SIZE": 8},
        "MODEL": {"NAME": "dat_micro", "ARGS": {"dims": [8, 8]}},
        "TRAIN": {"EPOCHS": 3, "BASE_LR": 1e-3},
        "CHECKPOINT": {"KEEP": 3},
    },
}


@pytest.fixture
def saved(tmp_path) -> Path:
    (tmp_path / "state.json").write_text(json.dumps(COUNTERS | METADATA))
    return tmp_path


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the project's logger, which does not propagate once a run has started."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    return records


def changed(name: str, value: object) -> dict:
    """METADATA with one value changed; capital names are keys of the configuration."""
    metadata = copy.deepcopy(METADATA)
    *groups, last = name.split(".")
    branch = metadata["config"] if name[0].isupper() else metadata
    for group in groups:
        branch = branch[group]
    branch[last] = value
    return metadata


def test_other_shapes_and_other_classes_are_refused_with_what_helps(saved):
    with pytest.raises(CheckpointError, match=f"do not fit then, .*--pretrained {saved} --tag"):
        compat.check_resume(saved, changed("MODEL.ARGS", {"dims": [9, 9]}), "")
    with pytest.raises(CheckpointError, match=r"it lacks eel and has besides dog.*--pretrained"):
        compat.check_resume(saved, changed("classes", ["cat", "eel"]), "")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("data", "3d" * 32, DataError),
        ("val_data", "3d" * 32, DataError),
        ("decoder.pixels", "4c", CheckpointError),
        ("versions.torch", "2.15.0", CheckpointError),
        ("versions.timm", "1.1.0", CheckpointError),
        ("device", "AMD EPYC, AVX512", CheckpointError),
        ("threads", 2, CheckpointError),
        ("SEED", 1, CheckpointError),
        ("AMP_DTYPE", "bfloat16", CheckpointError),
        ("DATA.BATCH_SIZE", 4, CheckpointError),
        ("MODEL.ARGS", {"dims": [8, 8], "qkv_bias": False}, CheckpointError),
        ("TRAIN.EPOCHS", 4, CheckpointError),
        ("TRAIN.BASE_LR", 2e-3, CheckpointError),
    ],
)
def test_what_changes_bits_has_to_be_accepted(name, value, error, saved, warnings):
    with pytest.raises(error, match=f"(?s){name} was .*, is .*--accept {name}\\b"):
        compat.check_resume(saved, changed(name, value), "")
    assert warnings == []
    compat.check_resume(saved, changed(name, value), f"TRAIN.EPOCHS,{name}")
    assert [text.split(" was ")[0] for text in warnings] == [
        f"Changed since the checkpoint: {name}"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("revision", "c6d553d-dirty"),
        ("versions.python", "3.12.0"),
        ("versions.project", "2.1.0"),
        ("world_size", 1),
        ("OUTPUT", "elsewhere"),
        ("PRINT_FREQ", 1),
        ("DATA.PATH", "b"),
        ("DATA.NUM_WORKERS", 2),
        ("CHECKPOINT.KEEP", 5),
    ],
)
def test_what_changes_no_bit_is_only_listed(name, value, saved, warnings):
    compat.check_resume(saved, changed(name, value), "")
    assert len(warnings) == 1
    assert f"{name} was" in warnings[0]


@pytest.mark.parametrize(
    ("name", "before", "now", "accepted"),
    [
        ("device", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", True),
        ("device", "Tesla T4", "NVIDIA L4", False),
        ("device", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", False),
        ("versions.torch", "2.14.1+cu130", "2.14.2+cu130", True),
        ("versions.torch", "2.14.1", "2.15.0", False),
        ("versions.timm", "1.0.31", "1.0.32", False),
    ],
)
def test_a_gpu_of_the_same_kind_resumes_a_run_on_cuda(
    name, before, now, accepted, tmp_path, warnings
):
    cuda = changed("reproducibility", "same samples")
    group, _, key = name.rpartition(".")
    for metadata, value in (
        (old := copy.deepcopy(cuda), before),
        (new := copy.deepcopy(cuda), now),
    ):
        (metadata[group] if group else metadata)[key] = value
    (tmp_path / "state.json").write_text(json.dumps(COUNTERS | old))
    if accepted:
        compat.check_resume(tmp_path, new, "")
        assert warnings == [f"Changed since the checkpoint: {name} was {before}, is {now}"]
    else:
        with pytest.raises(CheckpointError, match=f"--accept {name}"):
            compat.check_resume(tmp_path, new, "")


@pytest.mark.parametrize("name", compat.REQUIRED)
def test_a_position_that_would_mean_something_else_cannot_be_accepted(name, saved):
    with pytest.raises(CheckpointError, match="--pretrained"):
        compat.check_resume(saved, changed(name, ["another"]), name)


def test_every_change_is_named_at_once_and_the_flag_accepts_them_all(saved):
    metadata = changed("TRAIN.EPOCHS", 4) | {"threads": 2, "data": "3d" * 32}
    with pytest.raises(DataError) as caught:
        compat.check_resume(saved, metadata, "")
    flag = str(caught.value).rpartition("--accept ")[2]
    assert flag == "TRAIN.EPOCHS,data,threads"
    compat.check_resume(saved, metadata, flag)


def test_a_misspelt_acceptance_is_refused(saved):
    with pytest.raises(ConfigError, match=r"--accept EPOCHS: .* TRAIN.EPOCHS$"):
        compat.check_resume(saved, changed("TRAIN.EPOCHS", 4), "EPOCHS")


def test_nothing_changed_is_silent(saved, warnings):
    compat.check_resume(saved, METADATA, "")
    compat.check_resume(saved, METADATA | {"a new field": 1}, "")
    assert warnings == []


def test_ignored_names_exist():
    metadata = set(compat._by_name(METADATA))
    assert metadata | set(config.KEYS) >= compat.IGNORED


def test_a_cpu_is_named_with_its_instructions():
    name = compat.device_name(torch.device("cpu"))
    assert name == compat.device_name(torch.device("cpu"))
    assert name.endswith(torch.backends.cpu.get_cpu_capability())


# --- Checkpoints of the first edition --------------------------------------------------------------

FIRST_EDITION = Path(__file__).parents[1] / "golden/first_edition/run/checkpoints/step-3"


@pytest.fixture
def old() -> tuple[dict, dict]:
    """A first-edition state.json as it is, and as it is read."""
    return json.loads((FIRST_EDITION / "state.json").read_text()), read_metadata(FIRST_EDITION)


def test_fields_and_keys_of_an_old_checkpoint_are_translated(old):
    before, now = old
    assert (before["update"], now["step"], now["best"]["step"]) == (3, 3, 0)
    assert (before["promise"], now["reproducibility"]) == ("L2", "bitwise")
    assert (now["world_size"], now["steps_per_epoch"]) == (1, 2)
    assert not first_edition.METADATA.keys() & now.keys()
    cfg = config.load_values(now["config"], "state.json")
    assert (cfg.EVAL_FREQ, cfg.SAVE_FREQ, cfg.SAVE_STEPS) == (2, 2, 3)
    assert (cfg.TEST.CROP_MODE, cfg.TRAIN.LR_BASE_SIZE) == ("center", 512)
    assert cfg.MODEL.ARGS["sr_ratios"] == before["config"]["MODEL"]["ARGS"]["reductions"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TEST.CROP_MODE", "squash"),
        ("TRAIN.LR_BASE_SIZE", 256),
        ("MODEL.ARGS", {"num_heads": [2, 2, 2, 2]}),
    ],
)
def test_a_changed_value_under_a_renamed_key_is_noticed(name, value, old):
    metadata = json.loads(json.dumps(old[1]))
    compat.check_resume(FIRST_EDITION, metadata, "")
    *groups, last = name.split(".")
    functools.reduce(dict.__getitem__, groups, metadata["config"])[last] = value
    with pytest.raises(CheckpointError, match=f"(?s){name} was .*, is .*--accept {name}\\b"):
        compat.check_resume(FIRST_EDITION, metadata, "")


def test_a_key_that_came_later_was_what_the_code_did_before(saved):
    metadata = copy.deepcopy(METADATA)
    metadata["config"]["TRAIN"]["OPTIMIZER"] = {"NAME": "adamw", "MOMENTUM": 0.5}
    compat.check_resume(saved, metadata, "")
    metadata["config"]["TRAIN"]["OPTIMIZER"]["NAME"] = "sgd"
    with pytest.raises(CheckpointError, match=r"TRAIN\.OPTIMIZER\.NAME was adamw, is sgd"):
        compat.check_resume(saved, metadata, "")


@pytest.mark.parametrize("name", ["EVAL_FREQ", "SAVE_FREQ", "SAVE_STEPS", "world_size"])
def test_a_changed_frequency_under_a_renamed_key_is_listed(name, old, warnings):
    metadata = json.loads(json.dumps(old[1]))
    (metadata if name.islower() else metadata["config"])[name] = 7
    compat.check_resume(FIRST_EDITION, metadata, "")
    assert [text for text in warnings if f"{name} was" in text]


def test_an_old_name_to_accept_is_answered_with_the_new_one(old):
    with pytest.raises(ConfigError, match=r"TRAIN\.EVAL_FREQ is EVAL_FREQ now"):
        compat.check_resume(FIRST_EDITION, old[1], "TRAIN.EVAL_FREQ")
