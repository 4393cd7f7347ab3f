"""Exports: formats that are loaded again and agree with PyTorch, the model card, refusals, the snippets of the docs.

pytest tests/unit/test_export.py                            # one ONNX file and the refusals
pytest tests/unit/test_export.py -m "slow or not slow"      # every format; needs onnx, onnxscript, onnxruntime and g++
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers.commands import FENCE
from helpers.evaluations import add_set, random_logits, write_evaluation
from helpers.images import write_image_folder
from helpers.runs import arguments
from torch._inductor.exc import CppCompileError, InductorError

import config
import main
from engine import build, checkpoint
from models.dat import VARIANTS
from tools import export
from tools.common.classifier import Classifier, load_classifier
from tools.exports import card, formats
from utils.yaml_nodes import to_dict

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
DATA: {IMG_SIZE: 32}
MODEL:
  NAME: dat_micro
  NUM_CLASSES: 4
  ARGS:
    {stages: [LD], dims: [16], num_heads: [2], offset_groups: [2], offset_kernels: [3], offset_strides: [1],
     sr_ratios: [1]}
TEST: {CROP_PCT: 1.0}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The configuration of a model of two blocks, which is recorded in seconds."""
    path = tmp_path_factory.mktemp("small") / "small.yaml"
    path.write_text(SMALL)
    return path


def read_record(out: Path) -> dict:
    return json.loads((out / "export.json").read_text())


def nodes(graph):
    """The nodes of an ONNX graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


# --- Formats --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory) -> Path:
    """The small model as ONNX."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("exported") / "out"
    assert export.main([str(small), str(out), "--to", "onnx"]) == 0
    return out


def test_an_onnx_file_reads_by_grid_sample_and_knows_its_images(exported):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported / "model.onnx")
    counts = Counter(node.op_type for node in nodes(model.graph))
    assert counts["GridSample"] == 2  # the values, and the bias
    assert not counts["Loop"]
    assert [(i.domain, i.version) for i in model.opset_import] == [("", 18)]
    properties = {
        p.key: json.loads(p.value) for p in model.metadata_props if p.key in ("classes", "images")
    }
    assert properties["classes"] == ["0", "1", "2", "3"]
    assert (properties["images"]["height"], properties["images"]["crop_mode"]) == (32, "squash")


def test_the_differences_from_pytorch_are_recorded(exported):
    record = read_record(exported)
    assert set(record["files"]) == {"onnx"}
    row = record["files"]["onnx"]
    assert set(row["differences"]) == {"1", "3"}
    assert all(0 < value < 1e-5 for value in row["differences"].values())
    assert row["bytes"] == (exported / "model.onnx").stat().st_size
    assert 0 < row["milliseconds"] < 1000
    text = (exported / "README.md").read_text()
    for batch, value in row["differences"].items():
        assert f"{value:.1e} (batch {batch})" in text


def test_a_card_says_what_it_knows(exported):
    _, head, text = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "timm"
    for words in (
        "dat_micro",
        "random, untrained",
        "Not evaluated.",
        "crop_mode squash, 32 px",
        "opset 18",
    ):
        assert words in text
    assert str(exported) not in text


def test_a_card_has_the_evaluations_of_these_weights_alone(tmp_path):
    step = tmp_path / "checkpoints" / "step-10"
    step.mkdir(parents=True)
    logits, label = random_logits(60, 3)
    folder = write_evaluation(tmp_path / "eval" / "step-10-ema", ["a", "b", "c"])
    add_set(folder, "val", logits, label)
    (table,) = card.find_evaluations(card.Origin("w", "0" * 64, "ema", step))
    assert f"{100 * (logits.argmax(1) == label).mean():.3f} [" in table
    assert card.find_evaluations(card.Origin("w", "1" * 64, "ema", step)) == []


def test_each_accuracy_of_a_card_says_how_its_images_were_prepared(small, tmp_path):
    own = config.load(str(small))
    step = tmp_path / "checkpoints" / "step-10"
    step.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "val/acc1": 80.0}\n')
    metadata = {"step": 10, "images": {"val": 50}, "config": to_dict(own)}
    origin = card.Origin("w", "0" * 64, "model", step, metadata)
    larger = Classifier(build.at_size(own, 64), None, torch.device("cpu"), [], [], "")
    text = card.describe_accuracy(larger, origin, None)
    assert "80.00 % top-1" in text
    assert text.endswith("They were prepared by crop_mode squash, 32 px, crop_pct 1, bicubic.")
    measured = {"images": 9, "folder": "val", "onnx": {"top1": 70.0, "interval": [60.0, 80.0]}}
    text = card.describe_accuracy(larger, origin, measured)
    assert "9 images of val, prepared by crop_mode squash, 64 px, crop_pct 1, bicubic:" in text
    assert text.count(" px") == 2


def test_grey_models_record_the_mean_of_their_input(small):
    cfg = config.load(str(small), ["DATA.IN_CHANS", "1"])
    classifier = Classifier(cfg, None, torch.device("cpu"), [], [], "")
    args = export.parse([str(small), "out", "--to", "onnx"])
    images = export.describe(classifier, args)["images"]
    normalize = build.normalize(cfg, classifier.device)
    assert images["mean"] == pytest.approx([normalize.shift.item() / 255])
    assert images["std"] == pytest.approx([normalize.scale.item() / 255])


def test_a_file_that_computes_something_else_is_noticed(exported):
    images = {1: export.make_pixels(1, 32).float()}
    close = formats.compare("onnx", exported / "model.onnx", images, {1: torch.zeros(1, 4)})
    assert not close.agrees
    assert not formats.Comparison({1: math.nan}, 1.0, 1.0).agrees
    assert formats.Comparison({1: 9e-5, 3: 0.0}, 0.5, 1.0).agrees
    assert formats.Comparison({1: 9e-4}, 10.0, 1.0).agrees
    assert not formats.Comparison({1: 9e-5, 3: 2e-4}, 0.5, 1.0).agrees


def test_a_file_that_cannot_be_loaded_is_named(exported, tmp_path):
    (tmp_path / "model.onnx").write_bytes((exported / "model.onnx").read_bytes()[:1000])
    images = {1: export.make_pixels(1, 32).float()}
    with pytest.raises(
        formats.ExportError, match=r"model\.onnx was written and cannot be loaded again: .*"
    ):
        formats.compare("onnx", tmp_path / "model.onnx", images, {1: torch.zeros(1, 4)})


def test_timm_loads_the_hugging_face_folder(small, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "compare", lambda *_: formats.Comparison({1: 0.0}, 1.0, 1.0))
    assert export.main([str(small), str(tmp_path / "out"), "--to", "hf"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    saved = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert model.pretrained_cfg["crop_mode"] == "squash"
    assert model.config.stages == ["LD"]


def test_half_precision_halves_the_file_and_is_in_the_card(small, tmp_path):
    flags = ["--half", "--license", "apache-2.0", "--note", "Trained on pictures of cats."]
    assert export.main([str(small), str(tmp_path / "out"), "--to", "hf", *flags]) == 0
    saved = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert saved["head.fc.weight"].dtype == torch.float16
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(model.head.fc.weight, saved["head.fc.weight"].float())
    assert set(read_record(tmp_path / "out")["files"]["hf"]["differences"].values()) == {0.0}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in text
    assert "rounded to float16" in text
    shipped = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert f"{shipped}  model.safetensors" in text
    assert "## Note\n\nTrained on pictures of cats.\n" in text
    assert "--license" not in text


# --- Refusals -------------------------------------------------------------------------------------


def refuse(capsys, tmp_path, *argv, code: int, message: str) -> None:
    """Fail unless the export ends with `code` and `message`, and leaves nothing in tmp_path / "new"."""
    folder = tmp_path / "new"
    folder.mkdir(exist_ok=True)
    assert export.main([*map(str, argv)]) == code
    assert message in capsys.readouterr().err
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("hf", "--val", "absent"), 2, "--val measures the ONNX model: add onnx to --to"),
        (("onnx", "--val", "absent"), 3, "--val absent: no such folder or archive"),
        (("onnx-int8",), 2, "add onnx"),
        (("onnx", "--opset", "17"), 2, "--opset 17: expected at least 18"),
        (("hf", "--size", "8"), 2, "--size 8: expected at least 32 pixels"),
        (("hf", "--ema"), 2, "is no run or checkpoint, and has one set of weights"),
        (("hf", "--model", "resnet50"), 2, "small.yaml is none: leave them out"),
    ],
)
def test_flags_that_cannot_work(small, tmp_path, capsys, flags, code, message):
    out = tmp_path / "new" / "out"
    refuse(capsys, tmp_path, small, out, "--to", *flags, code=code, message=message)


def test_a_folder_with_content_is_left_alone(small, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    argv = (small, tmp_path / "out", "--to", "hf")
    refuse(capsys, tmp_path, *argv, code=2, message="out exists and is not an empty folder")
    assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ["mine"]
    argv = (small, tmp_path / "absent" / "out", "--to", "hf")
    refuse(capsys, tmp_path, *argv, code=6, message="out cannot be written: No such file")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/weights.pth"), "/weights.pth: Permission"),
        (OSError(28, "No space left on device"), "out cannot be written: No space left"),
    ],
)
def test_the_file_that_fails_is_named(error, message, small, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(export, "load_classifier", fail)
    argv = (small, tmp_path / "new" / "out", "--to", "hf")
    refuse(capsys, tmp_path, *argv, code=6, message=message)


def test_the_folder_that_one_is_in_can_be_filled(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with export.new_folder(Path(".")) as folder:
        (folder / "export.json").touch()
    assert [path.name for path in tmp_path.glob("**/*")] == ["out", "export.json"]


@pytest.mark.parametrize("package", formats.ONNX_PACKAGES)
def test_a_missing_package_is_named(small, tmp_path, capsys, monkeypatch, package):
    for other in formats.ONNX_PACKAGES:
        monkeypatch.setitem(sys.modules, other, None if other == package else sys)
    argv = (small, tmp_path / "new" / "out", "--to", "onnx")
    refuse(
        capsys,
        tmp_path,
        *argv,
        code=2,
        message=f"--to onnx needs {package}, which is not installed: pip install",
    )


def test_an_opset_that_the_runtime_lacks(small, tmp_path, capsys):
    for package in formats.ONNX_PACKAGES:
        pytest.importorskip(package)
    argv = (small, tmp_path / "new" / "out", "--to", "onnx", "--opset", 99)
    refuse(capsys, tmp_path, *argv, code=2, message="does not have it; use 18")


def test_a_missing_compiler(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "absent-g++ -O1")
    argv = (small, tmp_path / "new" / "out", "--to", "aoti")
    refuse(capsys, tmp_path, *argv, code=2, message="there is no absent-g++ -O1: install g++")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CppCompileError(["g++"], "no space left"), "CppCompileError: C++ compile error"),
        (InductorError(OSError("killed"), None), "InductorError: OSError: killed"),
    ],
)
def test_a_compiler_that_fails(error, message, small, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    argv = (small, tmp_path / "new" / "out", "--to", "aoti", "--size", 32)
    message = f"--to aoti: the compiler failed ({message}). Leave aoti out"
    refuse(capsys, tmp_path, *argv, code=2, message=message)


@pytest.mark.slow
def test_a_folder_of_a_grey_and_wide_model_is_exported_again(tmp_path):
    config = tmp_path / "grey.yaml"
    config.write_text(SMALL.replace("IMG_SIZE: 32", "IMG_SIZE: [32, 64], IN_CHANS: 1"))
    first, second = tmp_path / "first", tmp_path / "second"
    assert export.main([str(config), str(first), "--to", "hf"]) == 0
    assert export.main([str(first), str(second), "--to", "hf"]) == 0
    settings, again = (
        json.loads((p / "config.json").read_text())["pretrained_cfg"] for p in (first, second)
    )
    assert settings["input_size"] == again["input_size"] == [1, 32, 64]
    assert settings["mean"] == again["mean"] == pytest.approx([0.45897], abs=1e-5)


def test_weights_that_are_not_finite(small, tmp_path, capsys, monkeypatch):
    def load_spoiled(*args, **kwargs):
        classifier = load_classifier(*args, **kwargs)
        torch.nn.init.constant_(classifier.model.head.fc.bias, math.nan)
        return classifier

    monkeypatch.setattr(export, "load_classifier", load_spoiled)
    argv = (small, tmp_path / "new" / "out", "--to", "hf")
    refuse(capsys, tmp_path, *argv, code=4, message="NaN or infinite weights, in head.fc.bias")


def test_nothing_is_left_of_an_export_that_disagrees(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(formats, "compare", lambda *_: formats.Comparison({1: 0.5}, 1.0, 1.0))
    argv = (small, tmp_path / "new" / "out", "--to", "hf")
    message = "model.safetensors computes other logits than PyTorch: 5.0e-01 apart"
    refuse(capsys, tmp_path, *argv, code=1, message=message)


# --- A trained model in every format --------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run and its EMA in every format but aoti."""
    for package in formats.ONNX_PACKAGES:
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("trained")
    images = write_image_folder(folder / "data")
    argv = arguments(folder, images, "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert main.main(argv) == 0
    run = folder / "dat_micro" / "run"
    flags = ["--ema", "--val", str(images / "val")]
    argv = [str(run), str(out := folder / "out"), "--to", "hf", "onnx", "onnx-int8", "pt2", *flags]
    assert export.main(argv) == 0
    return run, out


@pytest.mark.slow
def test_every_format_agrees(trained):
    _, out = trained
    record = read_record(out)
    assert set(record["files"]) == {"hf", "onnx", "onnx-int8", "pt2"}
    for name, row in record["files"].items():
        limit = 0.5 if name == "onnx-int8" else 1e-5
        assert max(row["differences"].values()) < limit, name
        assert (out / row["file"]).stat().st_size == row["bytes"]
    assert record["files"]["onnx-int8"]["bytes"] < record["files"]["onnx"]["bytes"]


@pytest.mark.slow
def test_the_ema_is_exported(trained):
    run, out = trained
    step = checkpoint.resolve(run, best=True)
    saved = safetensors.torch.load_file(step / "ema.safetensors")
    written = safetensors.torch.load_file(out / "model.safetensors")
    assert all(torch.equal(saved[name], written[name]) for name in saved)
    digest = checkpoint.read_manifest(step)["ema.safetensors"]["sha256"]
    weights = {
        "name": f"dat_micro/run/{step.name}/ema.safetensors",
        "sha256": digest,
        "kind": "ema",
        "half": False,
        "license": "unknown",
        "note": "",
    }
    assert read_record(out)["weights"] == weights


@pytest.mark.slow
def test_the_card_of_a_run(trained):
    run, out = trained
    metadata = checkpoint.read_metadata(checkpoint.resolve(run, best=True))
    text = (out / "README.md").read_text()
    for words in (
        metadata["data"],
        metadata["val_data"],
        metadata["revision"],
        "`TRAIN.EMA_DECAY` 0.9",
        "(EMA)",
    ):
        assert words in text
    assert "DATA.PATH" not in text
    assert str(run.parents[1]) not in text
    assert "Validation in training" in text
    measured = read_record(out)["accuracy"]
    assert measured["images"] == 16
    for name in ("onnx", "onnx-int8"):
        low, high = measured[name]["interval"]
        assert f"{measured[name]['top1']:.2f} % [{low:.2f}, {high:.2f}]" in text


@pytest.mark.slow
def test_the_accuracy_of_onnx_is_that_of_an_evaluation(trained):
    run, out = trained
    lines = (run / "metrics.jsonl").read_text().splitlines()
    recorded = [json.loads(line)["val_ema/acc1"] for line in lines if "val_ema/acc1" in line]
    assert read_record(out)["accuracy"]["onnx"]["top1"] == pytest.approx(recorded[-1])


SNIPPETS = [
    block
    for _, language, block in FENCE.findall((ROOT / "docs" / "export.md").read_text())
    if language == "py"
]


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda block: block.splitlines()[0])
def test_the_snippets_of_the_docs_give_the_logits_of_pytorch(trained, snippet, tmp_path):
    _, out = trained
    program = snippet.replace("224", "32")
    if "aoti" in program:
        pytest.skip("test_a_compiled_library loads one")
    program += (
        f"\nimport numpy\nnumpy.save({str(tmp_path / 'logits.npy')!r}, numpy.asarray(logits))\n"
    )
    (tmp_path / "exported").symlink_to(out)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        expected = model(torch.zeros(1, 3, 32, 32))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)


# --- Other inputs and models ----------------------------------------------------------------------


@pytest.mark.slow
def test_pixels_of_another_size_in_a_fixed_batch(small, tmp_path):
    for package in formats.ONNX_PACKAGES:
        pytest.importorskip(package)
    out = tmp_path / "out"
    flags = ["--with-preprocessing", "--batch", "2", "--size", "40", "--opset", "20"]
    assert export.main([str(small), str(out), "--to", "onnx", "pt2", *flags]) == 0
    record = read_record(out)
    assert {name: set(row["differences"]) for name, row in record["files"].items()} == {
        "onnx": {"2"},
        "pt2": {"2"},
    }
    program = torch.export.load(out / "model.export.pt2").module()
    assert program(export.make_pixels(2, 40)).shape == (2, 4)
    with pytest.raises(AssertionError):
        program(export.make_pixels(3, 40))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_micro", "dat_pp_micro"])
def test_no_variant_has_a_loop(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    config = tmp_path / "micro.yaml"
    config.write_text(f"DATA: {{IMG_SIZE: 32}}\nMODEL: {{NAME: {name}, NUM_CLASSES: 10}}\n")
    assert export.main([str(config), str(tmp_path / "out"), "--to", "onnx"]) == 0
    counts = Counter(n.op_type for n in nodes(onnx.load(tmp_path / "out" / "model.onnx").graph))
    blocks = "".join(VARIANTS[name]["stages"]).count("D")
    assert counts["GridSample"] == 2 * blocks
    assert not counts["Loop"] + counts["If"]


@pytest.mark.slow
def test_a_compiled_library(small, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    out = tmp_path / "exported"
    assert export.main([str(small), str(out), "--to", "hf", "aoti", "--size", "32"]) == 0
    row = read_record(out)["files"]["aoti"]
    assert row["file"] == "model.aoti-cpu.pt2"
    assert max(row["differences"].values()) < 1e-5
