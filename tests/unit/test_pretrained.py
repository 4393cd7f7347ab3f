"""Weights from elsewhere: opening them, telling them apart, what fits a model; tools/checkpoint.py and hubconf.py.

pytest tests/unit/test_pretrained.py
"""

import hashlib
import itertools
import json
import pickle
import random
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers.run_dirs import make_run
from helpers.variants import micro, same
from torch import Tensor, nn
from yacs.config import CfgNode

import hubconf
from engine.hub_folder import read_hub_folder
from engine.pretrained import load_pretrained
from engine.weight_files import read_weights
from models.convert import derived_buffers, resize_table, to_official
from models.dat import VARIANTS
from models.identify import identify
from tools.checkpoint import main as tool
from utils.errors import CheckpointError

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def skeleton(name: str, **args) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **args)


def hollow(shapes: dict) -> dict[str, Tensor]:
    """Zeros of these shapes that take no memory, nor much space in a pickle."""
    return {name: torch.zeros(1).expand(getattr(s, "shape", s)) for name, s in shapes.items()}


# --- Opening --------------------------------------------------------------------------------------


class Payload:
    """A pickle that would run code."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        ("bare", ""),
        ("model", "module."),
        ("state_dict", "_orig_mod."),
        ("model_ema", "module._orig_mod."),
        ("state_dict_ema", ""),
        ("state_dict", "backbone."),
        ("model", "module.backbone."),
    ],
)
def test_wrapped_weights_are_found(wrapper, prefix, tmp_path):
    tensors = micro().state_dict()
    state = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    if "backbone" in prefix:
        state |= {prefix.replace("backbone", "neck") + "weight": torch.zeros(1)}
    content = state if wrapper == "bare" else {wrapper: state, "optimizer": {}, "epoch": 299}
    torch.save(content, tmp_path / "w.pth")
    target = micro(seed=1)
    report = load_pretrained(target, tmp_path / "w.pth", strict=True)
    assert report.matched == list(tensors)
    assert same(target.state_dict(), tensors)


def test_released_pickle_with_a_configuration_inside(tmp_path):
    source = micro()
    config = CfgNode({"MODEL": {"TYPE": "dat", "DAT": {"dims": [32, 64]}}, "EVAL_MODE": False})
    state = to_official(source.state_dict(), source) | derived_buffers(source)
    torch.save({"model": state, "epoch": 299, "config": config}, tmp_path / "w.pth")
    assert b"yacs.config" in (tmp_path / "w.pth").read_bytes()
    target = micro(seed=1)
    load_pretrained(target, tmp_path / "w.pth", strict=True)
    assert same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("keys", [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_the_average_is_read_when_asked_for(keys, tmp_path):
    file = tmp_path / "w.pth"
    torch.save({key: {"weight": torch.full((1,), i)} for i, key in enumerate(keys)}, file)
    assert read_weights(file)["weight"] == 0
    assert read_weights(file, ema=True)["weight"] == 1
    torch.save({keys[0]: {"weight": torch.zeros(1)}}, file)
    with pytest.raises(
        CheckpointError, match=rf"no average of weights: it holds {keys[0]} \(1 ten"
    ):
        read_weights(file, ema=True)


@pytest.mark.parametrize(
    "content",
    [{}, {"weights": {}}, {0: torch.zeros(1)}, [torch.zeros(1)], torch.zeros(1)],
    ids=["empty", "empty key", "numbers", "list", "tensor"],
)
def test_unknown_layout(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth holds no such weights"):
        read_weights(tmp_path / "w.pth")


def test_pickled_code_does_not_run(tmp_path):
    canary = tmp_path / "canary"
    config = CfgNode({"MODEL": {"TYPE": "dat"}})
    dict.__setitem__(config, "PAYLOAD", Payload(canary))
    contents = {"model": Payload(canary)}, Payload(canary), {"model": {}, "config": config}
    for content, zipped in itertools.product(contents, (True, False)):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        assert b"canary" in (tmp_path / "w.pth").read_bytes()
        with pytest.raises(CheckpointError, match="not executed"):
            read_weights(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match=r"w\.pth"):
        read_weights(tmp_path / "w.pth")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "the payload would not have run anywhere"


@pytest.mark.parametrize("size", [2**60, 2**64 - 1, 100_000_001, 10_000])
def test_a_header_that_claims_to_be_huge_takes_no_memory(size, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(size.to_bytes(8, "little") + b'{"a":' + b" " * 99)
    with pytest.raises(CheckpointError, match=r"w\.safetensors is truncated or damaged"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("layout", ["zip.pth", "legacy.pth", "w.safetensors"])
def test_damaged_files_are_our_own_error(layout, tmp_path):
    path, tensors = tmp_path / layout, {"a.weight": torch.randn(3, 4), "b": torch.randn(2)}
    if path.suffix == ".pth":
        torch.save(tensors, path, _use_new_zipfile_serialization=layout == "zip.pth")
    else:
        safetensors.torch.save_file(tensors, path)
    content = path.read_bytes()
    for size in (0, 1, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=layout):
            read_weights(path)
    rng, refused = random.Random(0), 0
    for _ in range(200):
        flipped = bytearray(content)
        flipped[rng.randrange(min(len(content), 300))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            read_weights(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


# --- Telling apart --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "released"),
    [*((name, False) for name in VARIANTS), ("dat_micro", True), ("dat_pp_small", True)],
)
def test_variants_are_identified_by_their_tensors(name, released):
    model = skeleton(name, num_classes=7)
    tensors = model.state_dict()
    found = identify(to_official(tensors, model) if released else tensors)
    assert name in found.variants
    assert name.removesuffix("_384") == found.variant or name == "dat_base_384"
    assert len(found.variants) == (2 if name.startswith("dat_pp_base") else 1)
    assert found.num_classes == 7
    assert found.img_size == model.img_size
    assert found.window_size == model.config.window_size
    assert found.released == released
    assert {n: t.shape for n, t in found.build().state_dict().items()} == {
        n: t.shape for n, t in tensors.items()
    }


@pytest.mark.parametrize("name", ["dat_tiny", "dat_base_384", "dat_pp_tiny", "dat_pp_base_384"])
def test_released_files_are_identified_and_written_alike(name):
    shapes = json.loads((GOLDEN / f"{name}.json").read_text())["state_dict"]
    found = identify(hollow(shapes))
    assert name in found.variants
    model = found.build()
    written = to_official(model.state_dict(), model) | derived_buffers(model)
    assert {n: list(t.shape) for n, t in written.items()} == shapes


@pytest.mark.parametrize(
    ("args", "img_size", "window_size"),
    [
        ({"img_size": 384}, (384, 384), 7),
        ({"img_size": (96, 160)}, (96, 160), 7),
        ({"window_size": 12}, (224, 224), 12),
        ({"num_classes": 0}, (224, 224), 7),
    ],
)
def test_sizes_and_classes_do_not_make_another_variant(args, img_size, window_size):
    found = identify(skeleton("dat_tiny", **args).state_dict())
    assert found.variants == ("dat_tiny",)
    assert (found.img_size, found.window_size) == (img_size, window_size)
    assert found.num_classes == args.get("num_classes", 1000)


def test_other_networks_are_no_variant():
    assert identify(skeleton("resnet18").state_dict()) is None
    assert identify(skeleton("dat_tiny", stages=("LS", "LS", "LSLDLD", "LD")).state_dict()) is None


# --- Fitting --------------------------------------------------------------------------------------


def test_other_classes_mean_a_new_head_when_training_and_an_error_when_evaluating(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(micro(10).state_dict(), path)
    target = micro(7)
    head = target.get_classifier().weight.clone()
    assert load_pretrained(target, path, strict=False).new == ["head.fc.weight", "head.fc.bias"]
    assert torch.equal(target.get_classifier().weight, head)
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight is \[10, 256\] instead of \[7, 2"):
        load_pretrained(target, path, strict=True)
    headless = load_pretrained(micro(0), path, strict=False)
    assert sorted(headless.unexpected) == ["head.fc.bias", "head.fc.weight"]


def test_a_hugging_face_folder_brings_its_classes(tmp_path):
    source, target = micro(3), micro(3)
    head = target.get_classifier().weight.clone()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "dat_micro", "pretrained_cfg": {"label_names": ["a", "b", "c"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_pretrained(target, tmp_path, strict=False, classes=["x", "b", "c"])
    assert torch.equal(target.get_classifier().weight, head)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        load_pretrained(target, path, strict=False, classes=["c", "a", "b"])
        expected = source.get_classifier().weight[[2, 0, 1]]
        assert torch.equal(target.get_classifier().weight, expected)
    config["pretrained_cfg"]["label_names"] = ["d", "c", "b", "a"]  # of a head of three rows
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = load_pretrained(micro(4), tmp_path, strict=False, classes=["a", "b", "c", "d"])
    assert report.misshapen == ["head.fc.weight", "head.fc.bias"]
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object"):
        load_pretrained(target, tmp_path, strict=False, classes=["c", "a", "b"])
    load_pretrained(target, tmp_path / "model.safetensors", strict=False, classes=["c", "a", "b"])
    assert torch.equal(target.get_classifier().weight, source.get_classifier().weight)


def test_a_config_json_without_a_mean_is_refused(tmp_path):
    config = {"architecture": "dat_micro", "num_classes": 3, "pretrained_cfg": {"mean": None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: no configuration of a timm model"):
        read_hub_folder(tmp_path)
    for damaged in (None, {"mean": []}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": damaged}))
        with pytest.raises(CheckpointError, match=r"config\.json: no configuration of a timm mode"):
            read_hub_folder(tmp_path)
    config |= {"pretrained_cfg": {}, "label_names": [0, 1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"label_names cannot be read \(expected texts\)"):
        read_hub_folder(tmp_path)


def test_a_detectors_backbone_starts_a_training_but_is_not_evaluated(tmp_path):
    tensors = micro().state_dict()
    end = [name for name in tensors if name.startswith(("norm", "head"))]
    backbone = {f"backbone.{name}": t for name, t in tensors.items() if name not in end}
    torch.save({"state_dict": {**backbone, "bbox_head.fc": torch.ones(3)}}, tmp_path / "w.pth")
    assert load_pretrained(micro(), tmp_path / "w.pth", strict=False).new == end
    with pytest.raises(CheckpointError, match=r"4 missing \(.*norm\.weight"):
        load_pretrained(micro(), tmp_path / "w.pth", strict=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["stem.0.weight", "norm.bias", "head.fc.weight"])
def test_a_renamed_tensor_is_refused_under_both_names(name, strict, tmp_path):
    tensors = micro().state_dict()
    tensors[f"{name}s"] = tensors.pop(name)
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    target, before = micro(seed=1), micro(seed=1).state_dict()
    with pytest.raises(CheckpointError, match=rf"1 missing \(.*: {name};.*1 unexpected .*{name}s"):
        load_pretrained(target, tmp_path / "w.safetensors", strict=strict)
    assert same(target.state_dict(), before)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    source = micro()
    source.stages[1].blocks[1].attn.proj.weight.data[3, 4] = value
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"in stages\.1\.blocks\.1\.attn\.proj\.weight\."):
        load_pretrained(micro(), tmp_path / "w.safetensors", strict=False)


@pytest.mark.parametrize("asked", ["dat_tiny", "swin_tiny_patch4_window7_224"])
def test_a_file_for_another_model_is_answered_with_its_name(asked, tmp_path):
    path, model = tmp_path / "w.pth", skeleton(asked)
    small = skeleton("dat_small")
    torch.save({"model": hollow(to_official(small.state_dict(), small))}, path)
    with pytest.raises(CheckpointError, match=rf"does not fit {asked}.*MODEL\.NAME dat_small"):
        load_pretrained(model, path, strict=False)
    torch.save(hollow(skeleton("swin_small_patch4_window7_224").state_dict()), path)
    with pytest.raises(CheckpointError, match=rf"does not fit {asked}.*with MODEL\.NAME and MODEL"):
        load_pretrained(model, path, strict=False)


def test_384_pixels_start_from_224_but_are_not_evaluated_with_them(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(hollow(skeleton("dat_base").state_dict()), path)
    report = load_pretrained(skeleton("dat_base_384"), path, strict=False)
    assert len(report.resized) == 24
    assert all(name.endswith(("bias_table", "rpe_table")) for name in report.resized)
    with pytest.raises(CheckpointError, match=r"The file is dat_base with .*MODEL\.NAME dat_base,"):
        load_pretrained(skeleton("dat_base_384"), path, strict=True)
    report = load_pretrained(skeleton("dat_base", img_size=384), path, strict=True)
    assert all(name.endswith("rpe_table") for name in report.resized)


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_resized_table_keeps_its_values_at_the_displacements_it_had(dtype):
    table = torch.randn(3, 7, 5).to(dtype)
    larger = resize_table(table, torch.empty(3, 13, 9))
    assert larger.dtype == torch.float32
    torch.testing.assert_close(larger[:, ::2, ::2], table.float())  # twice as fine
    flat = torch.randn(7 * 7, 3)
    larger = resize_table(flat, torch.empty(13 * 13, 3)).view(13, 13, 3)
    torch.testing.assert_close(larger[::2, ::2], flat.view(7, 7, 3))


def test_resizing_is_symmetric_and_leaves_other_tables_alone():
    table = torch.randn(3, 27, 27)
    own = torch.empty(3, 47, 47)
    mirrored = resize_table(table.flip(1, 2), own).flip(1, 2)
    torch.testing.assert_close(resize_table(table, own), mirrored)
    for other in (torch.randn(4, 27, 27), torch.randn(50, 3), torch.randn(27)):
        assert resize_table(other, own) is other
    assert resize_table(table, table.clone()) is table


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("args", [{"img_size": 48}, {"img_size": 64, "window_size": 7}])
def test_another_size_is_loaded_and_said(args, released, tmp_path):
    source, path = micro(), tmp_path / "w.pth"
    state = source.state_dict()
    torch.save(to_official(state, source) | derived_buffers(source) if released else state, path)
    target = micro(seed=1, **args)
    report = load_pretrained(target, path, strict=True)
    tables = [name for name in state if name.endswith("rpe_table")]
    windows = [name for name in state if name.endswith("position_bias_table")]
    assert sorted(report.resized) == sorted(tables + (windows if "window_size" in args else []))
    assert report.share("matched") + report.share("resized") == pytest.approx(1)
    assert f"{len(report.resized)} resized ({report.share('resized'):.2%})" in str(report)
    loaded = target.state_dict()
    assert same({n: loaded[n] for n in report.matched}, {n: state[n] for n in report.matched})
    assert all(
        torch.equal(loaded[n], resize_table(state[n], loaded[n])) and loaded[n].std() > 0
        for n in report.resized
    )


def test_timm_models_resize_their_own_tables(tmp_path):
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5}
    name = "swin_tiny_patch4_window7_224"
    torch.save(
        timm.create_model(name, img_size=56, window_size=7, **small).state_dict(),
        tmp_path / "w.pth",
    )
    target = timm.create_model(name, img_size=96, window_size=12, **small)
    report = load_pretrained(target, tmp_path / "w.pth", strict=True)
    assert [n.rpartition(".")[2] for n in report.resized] == ["relative_position_bias_table"] * 2


@pytest.mark.parametrize("name", ["dat_pp_micro", "test_resnet"])
def test_weights_of_colours_start_a_training_on_grey_images_and_are_not_evaluated_on_them(
    name, tmp_path
):
    colours, grey = (timm.create_model(name, num_classes=10, in_chans=n) for n in (3, 1))
    torch.save(colours.state_dict(), tmp_path / "w.pth")
    first = f"{colours.pretrained_cfg['first_conv']}.weight"
    report = load_pretrained(grey, tmp_path / "w.pth", strict=False)
    assert report.adapted == [first]
    images = torch.randn(2, 1, 32, 32)
    expected = colours.eval()(
        images.expand(-1, 3, -1, -1)
    )  # normalised alike, grey is three equal colours
    torch.testing.assert_close(grey.eval()(images), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_pretrained(grey, tmp_path / "w.pth", strict=True)


# --- tools/checkpoint.py --------------------------------------------------------------------------


def test_inspect_shows_what_a_run_and_a_file_hold(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert tool(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "step-3",
        "dat_micro with 10 classes",
        "windows of 4",
        "32×32 pixels",
        "this project's names",
    ):
        assert part in printed
    size = sum(p.numel() for p in micro().parameters())
    for part in (f"{size:,} in ", "50.000 % top-1", "step 3", "43.000 % top-1, 93.000 % top-5"):
        assert part in printed
    source = micro()
    torch.save(
        {"model": to_official(source.state_dict(), source) | derived_buffers(source)},
        tmp_path / "w.pth",
    )
    assert tool(["inspect", str(tmp_path / "w.pth")]) == 0
    printed = capsys.readouterr().out
    assert "the authors' names" in printed
    assert f"{size:,} in " in printed
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    assert tool(["inspect", str(tmp_path / "w.pth")]) == 0
    assert "not a DAT variant" in capsys.readouterr().out


def test_verify_is_of_checkpoints(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert tool(["verify", str(tmp_path)]) == 4
    assert "is no run or checkpoint of this project" in capsys.readouterr().err


def test_verify_names_the_damaged_ones(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    older, newer = (run / "checkpoints" / f"step-{step}" for step in (3, 5))
    assert tool(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": valid") == 2
    (newer / "ema.safetensors").write_bytes(b"")
    assert tool(["verify", str(run)]) == 4
    printed = capsys.readouterr()
    assert f"{newer}: ema.safetensors has 0 bytes" in printed.out
    assert f"{older}: valid" in printed.out
    assert "1 of 2 checkpoints are damaged" in printed.err
    assert tool(["verify", str(newer)]) == 4
    assert tool(["verify", str(older)]) == 0
    (older / "manifest.json").unlink()
    assert tool(["verify", str(run)]) == 4
    assert "2 of 2 checkpoints are damaged" in capsys.readouterr().err
    assert tool(["verify", str(tmp_path)]) == 4


@pytest.mark.parametrize("name", ["dat_micro", "dat_pp_micro"])
def test_conversion_changes_no_bit(name, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(name)
    ours, released, back, again = (
        tmp_path / n for n in ("a.safetensors", "b.pth", "c.safetensors", "d.pth")
    )
    safetensors.torch.save_file(source.state_dict(), ours)
    assert tool(["convert", str(ours), str(released), "--to", "released"]) == 0
    assert tool(["convert", str(released), str(back), "--to", "ours"]) == 0
    assert tool(["convert", str(back), str(again), "--to", "released"]) == 0
    expected = to_official(source.state_dict(), source) | derived_buffers(source)
    assert same(torch.load(released)["model"], expected)
    assert same(torch.load(again)["model"], expected)
    assert same(safetensors.torch.load_file(back), source.state_dict())


def test_strip_writes_the_weights_or_their_average(tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "w.safetensors"
    step = run / "checkpoints" / "step-5"
    assert tool(["strip", str(step), str(out)]) == 0
    assert hashlib.sha256(out.read_bytes()).hexdigest() in capsys.readouterr().out
    assert same(safetensors.torch.load_file(out), micro(seed=5).state_dict())
    assert tool(["strip", str(step), str(out), "--ema"]) == 2
    assert "--force" in capsys.readouterr().err
    assert same(safetensors.torch.load_file(out), micro(seed=5).state_dict())
    assert tool(["strip", str(step), str(out), "--ema", "--force"]) == 0
    assert same(safetensors.torch.load_file(out), micro(seed=-5).state_dict())
    assert tool(["strip", str(out), str(tmp_path / "x.safetensors"), "--ema"]) == 4
    assert tool(["strip", str(out), str(tmp_path / "x.pth")]) == 2
    assert tool(["strip", str(out), str(tmp_path / "no" / "x.safetensors")]) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "w.safetensors"]


def test_average_is_the_mean_in_float64(tmp_path, capsys):
    run, out = make_run(tmp_path / "run", (3, 5, 7)), tmp_path / "mean.safetensors"
    paths = [str(run / "checkpoints" / f"step-{step}") for step in (3, 5, 7)]
    assert tool(["average", *paths, str(out)]) == 0
    states = [micro(seed=step).state_dict() for step in (3, 5, 7)]
    mean = {n: torch.stack([s[n].double() for s in states]).mean(0).float() for n in states[0]}
    assert same(safetensors.torch.load_file(out), mean)
    safetensors.torch.save_file(micro(7).state_dict(), tmp_path / "other.safetensors")
    assert (
        tool(["average", paths[0], str(tmp_path / "other.safetensors"), str(out), "--force"]) == 4
    )
    assert (
        "hold different models; these tensors differ: head.fc.bias, head.fc.weight"
        in capsys.readouterr().err
    )


def test_counters_are_not_averaged(tmp_path):
    for count in (4, 9):
        tensors = {
            "bn.num_batches_tracked": torch.tensor(count),
            "bn.mean": torch.tensor(float(count)),
        }
        torch.save(tensors, tmp_path / f"{count}.pth")
    out = tmp_path / "mean.safetensors"
    assert tool(["average", str(tmp_path / "4.pth"), str(tmp_path / "9.pth"), str(out)]) == 0
    mean = safetensors.torch.load_file(out)
    assert (mean["bn.num_batches_tracked"], mean["bn.mean"]) == (9, 6.5)


def test_the_tool_refuses_bad_weights_in_one_line(tmp_path, capsys):
    torch.save({"model": {"head.weight": torch.tensor([torch.nan])}}, tmp_path / "w.pth")
    assert tool(["strip", str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors")]) == 4
    message = capsys.readouterr().err
    assert message.startswith(f"CheckpointError: {tmp_path / 'w.pth'} holds NaN or infinite")
    assert message.count("\n") == 1


# --- hubconf.py -----------------------------------------------------------------------------------


def hub(name: str, **kwargs) -> nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


def test_hub_has_every_variant_and_nothing_else():
    entries = {n for n in dir(hubconf) if callable(getattr(hubconf, n)) and not n.startswith("_")}
    assert entries == set(VARIANTS)
    assert hub("dat_tiny", num_classes=3, drop_path_rate=0.2).num_classes == 3


def test_hub_loads_weights_through_the_same_reader(tmp_path, recwarn):
    source, path = micro(), str(tmp_path / "w.pth")
    torch.save({"model": to_official(source.state_dict(), source)}, path)
    assert same(hub("dat_micro", weights=path).state_dict(), source.state_dict())
    images = torch.randn(1, 3, 32, 32)
    maps = hub("dat_micro", weights=path, features_only=True, out_indices=(0, 2))(images)
    expected = source.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    torch.testing.assert_close(maps, expected)
    assert hub("dat_micro", weights=path, num_classes=0)(images).shape == (1, 256)
    assert not [w for w in recwarn if "dat_micro" in str(w.message) or path in str(w.message)]
    with pytest.warns(UserWarning, match=r"4 resized"):
        hub("dat_micro", weights=path, img_size=64)
    with pytest.warns(UserWarning, match=r"2 new .*head\.fc\.weight"):
        hub("dat_micro", weights=path, num_classes=3)
    with pytest.raises(CheckpointError, match=r"MODEL\.NAME dat_micro"):
        hub("dat_tiny", weights=path)
