"""engine/compat.py: what differs from a checkpoint's world is listed, and refused unless it is harmless or accepted.

pytest tests/test_world.py
"""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch

import config
from engine import compat
from utils.errors import CheckpointError, ConfigError, DataError
from utils.logging import logger

COUNTERS = {"step": 3, "epoch": 1, "skipped": 0, "best": {"acc1": 0.0, "step": 0}, "scaler": {}}
FACTS = {
    "model": "dat_micro",
    "classes": ["cat", "dog"],
    "data": "1f" * 32,
    "val_data": "2e" * 32,
    "decoder": {"pillow": "13.0.0", "libjpeg": "3.1", "pixels": "3d"},
    "promise": "L2",
    "processes": 2,
    "steps_per_epoch": 2,
    "versions": {"python": "3.11.7", "torch": "2.14.1", "torchvision": "0.29.1", "timm": "1.0.31"},
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
    (tmp_path / "state.json").write_text(json.dumps(COUNTERS | FACTS))
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
    """FACTS with one of them another; capital names are keys of the configuration."""
    metadata = copy.deepcopy(FACTS)
    *groups, last = name.split(".")
    branch = metadata["config"] if name[0].isupper() else metadata
    for group in groups:
        branch = branch[group]
    branch[last] = value
    return metadata


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
    with pytest.raises(error, match=f"(?s){name} was .*, is .*--accept {name}$"):
        compat.check(saved, changed(name, value), "")
    assert warnings == []
    compat.check(saved, changed(name, value), f"TRAIN.EPOCHS,{name}")
    assert [text.split(" was ")[0] for text in warnings] == [
        f"Changed since the checkpoint: {name}"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("revision", "c6d553d-dirty"),
        ("versions.python", "3.12.0"),
        ("processes", 1),
        ("OUTPUT", "elsewhere"),
        ("PRINT_FREQ", 1),
        ("DATA.PATH", "b"),
        ("DATA.NUM_WORKERS", 2),
        ("CHECKPOINT.KEEP", 5),
    ],
)
def test_what_changes_no_bit_is_only_listed(name, value, saved, warnings):
    compat.check(saved, changed(name, value), "")
    assert len(warnings) == 1
    assert f"{name} was" in warnings[0]


@pytest.mark.parametrize("name", compat.POSITION)
def test_a_position_that_would_mean_something_else_cannot_be_accepted(name, saved):
    with pytest.raises(CheckpointError, match="--pretrained"):
        compat.check(saved, changed(name, ["another"]), name)


def test_every_change_is_named_at_once_and_the_flag_accepts_them_all(saved):
    metadata = changed("TRAIN.EPOCHS", 4) | {"threads": 2, "data": "3d" * 32}
    with pytest.raises(DataError) as caught:
        compat.check(saved, metadata, "")
    flag = str(caught.value).rpartition("--accept ")[2]
    assert flag == "TRAIN.EPOCHS,data,threads"
    compat.check(saved, metadata, flag)


def test_a_misspelt_acceptance_is_refused(saved):
    with pytest.raises(ConfigError, match=r"--accept EPOCHS: .* TRAIN.EPOCHS$"):
        compat.check(saved, changed("TRAIN.EPOCHS", 4), "EPOCHS")


def test_the_same_world_and_an_older_checkpoint_say_nothing(saved, warnings):
    compat.check(saved, FACTS, "")
    compat.check(saved, FACTS | {"a new fact": 1}, "")
    assert warnings == []


def test_harmless_names_exist():
    metadata = set(compat._by_name(FACTS))
    assert metadata | set(config.KEYS) >= compat.HARMLESS


def test_a_cpu_is_named_with_its_instructions():
    name = compat.device_name(torch.device("cpu"))
    assert name == compat.device_name(torch.device("cpu"))
    assert name.endswith(torch.backends.cpu.get_cpu_capability())
