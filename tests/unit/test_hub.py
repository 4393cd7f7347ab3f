"""torch.hub in projects that have `utils`, `models` and `engine` of their own, beside other repositories.

pytest tests/unit/test_hub.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = """
import pickle, sys, warnings
import torch
warnings.simplefilter("error")
import utils, engine
ROOT, OTHER, weights = sys.argv[1:]

def load(**kwargs):
    torch.manual_seed(0)
    return torch.hub.load(ROOT, "dat_micro", source="local", **kwargs).eval()

before = torch.hub.load(OTHER, "thing", source="local")
model = load()
after = torch.hub.load(OTHER, "thing", source="local")
import models  # the other repository's, or the project's own
assert not hasattr(models, "build"), models
assert (utils.X, engine.X) == (1, 1)
assert not [name for name in ("data", "config", "analysis") if name in sys.modules]

images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    logits = model(images)
    assert torch.equal(load()(images), logits)  # loaded again
    assert isinstance(load(), type(model))
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), logits)
    torch.save({"model": model.state_dict()}, weights)
    assert torch.equal(load(weights=weights)(images), logits)
    assert len(load(features_only=True)(images)) == 4
    options = {"features_only": True, "out_indices": (0, 2), "feature_cls": "getter"}
    maps = load(weights=weights, **options)(images)
    expected = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    assert all(map(torch.equal, maps, expected))
    torch.testing.assert_close(torch.compile(model, backend="eager")(images), logits)
    sys.modules["dat_hub.models.ops"].use_kernels("fused")  # in Triton's interpreter, where it is installed
    torch.testing.assert_close(model(images), logits)
    sys.modules["dat_hub.models.ops"].use_kernels("auto")
model(images).sum().backward()
try:
    torch.hub.load(ROOT, "dat_pp_micro", source="local", weights=weights)
except Exception as error:
    assert type(error).__name__ == "CheckpointError", error
    assert "MODEL.NAME dat_micro" in str(error)
try:
    load(weights="https://example.com/x.pth")
except Exception as error:
    assert "#sha256=" in str(error), error
print("loaded")
"""


@pytest.mark.slow
def test_hub_loads_beside_modules_of_the_same_names(tmp_path):
    project, other = tmp_path / "project", tmp_path / "other"
    (other / "models").mkdir(parents=True)
    (other / "models" / "__init__.py").touch()
    (other / "models" / "yolo.py").write_text("class Thing: pass\n")
    (other / "hubconf.py").write_text(
        "dependencies = ['torch']\nfrom models.yolo import Thing\ndef thing(): return Thing()\n"
    )
    project.mkdir()
    for name in ("utils", "engine"):
        (project / f"{name}.py").write_text("X = 1\n")
    (project / "run.py").write_text(PROJECT)
    command = [sys.executable, "run.py", str(ROOT), str(other), str(tmp_path / "w.pth")]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert result.stdout.endswith("loaded\n"), result.stderr[-2000:]
