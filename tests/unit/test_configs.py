"""Shipped configurations: they parse, their headers are true, their models train; timm's models run like ours."""

import re
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from helpers import commands
from helpers.images import write_image_folder
from yacs.config import CfgNode

import config
import main
import models
from engine import checkpoint
from tools.benchmarks.macs import count_macs

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MIXERS = [path for path in CONFIGS if path.parent.name == "mixers"]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def parse(path: Path) -> CfgNode:
    return config.parse(["--cfg", str(path), "--data-path", "somewhere"]).cfg


SMALL = [path for path in CONFIGS if parse(path).DATA.IMG_SIZE == 32]


def build(cfg: CfgNode) -> torch.nn.Module:
    return models.build(
        cfg.MODEL.NAME,
        num_classes=1000 if cfg.DATA.IMG_SIZE >= 224 else 10,
        img_size=cfg.DATA.IMG_SIZE,
        drop_path_rate=cfg.MODEL.DROP_PATH_RATE,
        **cfg.MODEL.ARGS,
    )


def images_of(cfg: CfgNode) -> int:
    """Training images of the data set that the tag begins with: by default ImageNet's, else CIFAR-10's."""
    images = {"default": 1_281_167, "digits": 1_442, "imagenette": 9_469}
    return images.get(cfg.TAG.partition("_")[0], 50_000)


@cache
def size(path: Path) -> tuple[int, int]:
    """Parameters and multiply-adds of the model, from a forward pass of shapes without values."""
    cfg = parse(path)
    with torch.device("meta"):
        model = build(cfg)
    macs = count_macs(model, cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE)
    return sum(p.numel() for p in model.parameters()), macs


def is_rounded(text: str, value: float) -> bool:
    """Whether `text` is `value` in as many digits as it has."""
    return text == f"{value:.{len(text.partition('.')[2])}f}"


@pytest.mark.parametrize("path", CONFIGS, ids=label)
def test_header_is_true(path, monkeypatch):
    cfg, text = parse(path), path.read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"main.py --cfg {path.relative_to(ROOT)}" in header
    assert "# Expected: " in header
    monkeypatch.chdir(ROOT)
    for command in commands.in_lines(header.replace("\n#", "\n")):
        commands.check(command)
    parameters, macs = size(path)
    for written in re.findall(r"([\d.]+) M parameters", text)[:1]:
        assert is_rounded(written, parameters / 1e6)
    for written in re.findall(r"([\d.]+) GMACs", text)[:1]:
        assert is_rounded(written, macs / 1e9)
    epochs, images, unit = re.search(r"Cost: (\d+) epochs, ([\d.]+) (\w+) images", text).groups()
    assert int(epochs) == cfg.TRAIN.EPOCHS
    total = float(images) * {"thousand": 1e3, "million": 1e6}[unit]
    assert total == pytest.approx(images_of(cfg) * cfg.TRAIN.EPOCHS, rel=0.02)


@pytest.mark.parametrize("path", SMALL, ids=label)
def test_small_models_take_a_step(path):
    cfg = parse(path)
    torch.manual_seed(0)
    model = build(cfg).eval()  # drop path might leave a block without gradient
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name


# --- The six mixers -------------------------------------------------------------------------------


def test_mixers_have_models_of_one_size():
    assert len(MIXERS) == 6
    for numbers in zip(*map(size, MIXERS), strict=True):
        assert max(numbers) <= 1.1 * min(numbers)


def test_mixers_have_one_recipe():
    recipes, tags = [], set()
    for path in MIXERS:
        cfg = parse(path)
        cfg.defrost()
        tags.add(cfg.pop("TAG"))
        cfg.MODEL.ARGS = CfgNode()
        recipes.append(config.dump(cfg))
    assert len(tags) == 6
    assert len(set(recipes)) == 1


# --- timm's models --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("deit_small", ["MODEL.NAME=deit_tiny_patch16_224", "MODEL.ARGS.depth=2"]),
        ("swin_tiny", ["MODEL.ARGS.embed_dim=24", "MODEL.ARGS.depths=[1, 2, 1, 1]"]),
        ("pvt_v2_b2", ["MODEL.NAME=pvt_v2_b0", "MODEL.ARGS.depths=[1, 1, 1, 1]"]),
    ],
)
def test_timm_models_train_resume_and_evaluate(name, model, tmp_path):
    """Two steps of 8 images under the published recipe; stopped after the first, they end in the same bits."""
    images = write_image_folder(tmp_path / "images", classes=4, train=4, val=2)
    command = ["--cfg", str(ROOT / f"configs/baselines/{name}.yaml"), "--data-path", str(images)]
    command += ["--batch-size", "4", "--workers", "0", "--amp-dtype", "bfloat16", "--opts"]
    command += ["DATA.IMG_SIZE=32", "TRAIN.GLOBAL_BATCH_SIZE=8", "THREADS=1"]
    command += ["TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0", *model]

    unbroken = [*command, "--output", str(tmp_path / "unbroken")]
    broken = [*command, "--output", str(tmp_path / "broken")]
    assert main.main(unbroken) == 0
    assert main.main([*broken, "--opts", "TRAIN.MAX_SECONDS=1e-3"]) == 75
    assert main.main(broken) == 0
    assert last_weights(tmp_path / "broken") == last_weights(tmp_path / "unbroken")
    assert main.main([*broken, "--eval"]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs/finetune").glob("*.yaml")), ids=label)
def test_fine_tuning_recipes_train_and_resume(path, tmp_path):
    """Two steps of a small model under the recipe, from weights of other classes; stopped after the first."""
    images = write_image_folder(tmp_path / "images", classes=4, train=4, val=2)
    torch.manual_seed(0)
    stages = ["N", "D", "ND", "D"]
    before = timm.create_model("dat_pp_micro", num_classes=7, stages=stages).state_dict()
    torch.save(before, tmp_path / "w.pth")
    command = ["--cfg", str(path), "--data-path", str(images), "--batch-size", "4", "--workers"]
    command += ["0", "--amp-dtype", "float32", "--pretrained", str(tmp_path / "w.pth")]
    command += ["--tag", "default", "--opts"]
    size = 48 if "384" in path.stem else 32  # as the weights, or larger
    command += ["MODEL.NAME=dat_pp_micro", f"MODEL.ARGS.stages=[{','.join(stages)}]", "THREADS=1"]
    command += [f"DATA.IMG_SIZE={size}", "TRAIN.GLOBAL_BATCH_SIZE=8"]
    command += ["TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0", "TRAIN.WARMUP_STEPS=0"]

    unbroken = [*command, "--output", str(tmp_path / "unbroken")]
    broken = [*command, "--output", str(tmp_path / "broken")]
    assert main.main(unbroken) == 0
    assert main.main([*broken, "--opts", "TRAIN.MAX_SECONDS=1e-3"]) == 75
    assert main.main(broken) == 0
    assert last_weights(tmp_path / "broken") == last_weights(tmp_path / "unbroken")
    after = safetensors.torch.load(last_weights(tmp_path / "broken"))
    same = {n for n, t in before.items() if t.shape == after[n].shape and torch.equal(t, after[n])}
    if path.stem == "linear_probe":
        changed = {
            n for n in before.keys() - same if not n.endswith("rpe_table")
        }  # of another size
        assert changed == {"head.fc.weight", "head.fc.bias"}
    else:
        assert not {n for n in same if n.endswith("weight")}


def last_weights(output: Path) -> bytes:
    (checkpoints,) = output.glob("*/default/checkpoints")
    return (checkpoint.list_checkpoints(checkpoints)[0] / "model.safetensors").read_bytes()
