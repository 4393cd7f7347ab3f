"""The weights of this repository have their accuracy, on the data sets beside it.

pytest -m slow tests/runs/test_shipped_weights.py
"""

import json
from pathlib import Path

import pytest

import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {  # configuration: folder of weights, data, right answers on an AMD EPYC in bfloat16
    "imagenette": ("dat_pp_nano_imagenette", "imagenette160", 3588),
    "cifar10": ("dat_pp_micro_cifar10", "cifar10", 8727),
}


@pytest.mark.parametrize("config", SHIPPED)
def test_shipped_weights_have_their_accuracy(config, shared_data, capsys):
    folder, images, right = SHIPPED[config]
    command = [
        "--cfg",
        str(ROOT / "configs" / f"{config}.yaml"),
        "--data-path",
        str(shared_data / images),
    ]
    weights = ROOT / "weights" / folder
    assert main.main([*command, "--workers", "0", "--eval", "--pretrained", str(weights)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["model"]
    assert abs(result["top1"] - right) <= result["images"] / 1000
    assert result["unreadable"] == 0
