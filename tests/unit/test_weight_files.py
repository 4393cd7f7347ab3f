"""Files of weights as trainers, hubs and accidents leave them: what opens, what is refused, what each is called.

pytest tests/unit/test_weight_files.py
"""

import argparse
import collections
import datetime
import gzip
import io
import itertools
import json
import pathlib
import pickle
import random
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers.run_dirs import make_run
from helpers.states import make_state, save_state
from helpers.variants import micro, same
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from engine import checkpoint
from engine.pretrained import load_pretrained
from engine.weight_files import HARMLESS, hash_weights, read_weights
from tools.checkpoint import main as tool
from tools.common.weights import describe
from utils.errors import CheckpointError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return micro()


def class_of(name: str, bases: tuple = (), **members: object) -> type:
    """A class of the full name `name`, for pickles: the library itself need not be installed."""
    module_name, _, class_name = name.rpartition(".")
    for depth in range(1, module_name.count(".") + 2):
        part = ".".join(module_name.split(".")[:depth])
        sys.modules.setdefault(part, types.ModuleType(part))
    cls = type(class_name, bases, {"__module__": module_name, **members})
    setattr(sys.modules[module_name], class_name, cls)
    return cls


@pytest.fixture(autouse=True)
def _modules():
    """The modules that `class_of` makes are gone after the test."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) is None:
            del sys.modules[name]


# --- Trainers -------------------------------------------------------------------------------------


def timm_saver(model: nn.Module, folder: Path) -> Path:
    """As timm's own saver writes it, with an EMA."""
    optimizer = torch.optim.AdamW(model.parameters())
    args = argparse.Namespace(model="dat_micro", opt_betas=None, data_dir=pathlib.Path("/imagenet"))
    saver = CheckpointSaver(
        model, optimizer, args, ModelEmaV3(micro(seed=5)), checkpoint_dir=folder, recovery_dir=""
    )
    saver.save_checkpoint(3, metric=np.float64(81.2))
    return folder / "last.pth.tar"


def deit(tensors: dict) -> dict:
    args = argparse.Namespace(lr=1e-3, output=pathlib.PurePosixPath("runs/x"), when=None)
    return {"model": tensors, "optimizer": optimizer_state(), "args": args, "epoch": 299}


def optimizer_state() -> dict:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def numbers(tensors: dict) -> dict:
    """Accuracies, arrays and the states of all generators."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.RandomState(0).get_state(),
        "torch": torch.get_rng_state(),
    }
    generator = np.random.default_rng(0)
    best = {
        "best_acc": np.float64(81.2),
        "top5": np.float32(95),
        "n": np.int64(3),
        "ok": np.bool_(1),
    }
    history = {"curve": np.arange(6.0).reshape(2, 3), "dtype": np.dtype("int32"), "type": np.uint8}
    return {"model": tensors, "rng": state, "rng2": generator, **best, **history}


def standard_library(tensors: dict) -> dict:
    counts = collections.defaultdict(list, {"a": [1]})
    return {
        "state_dict": tensors,
        "date": datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC),
        "took": datetime.timedelta(hours=3),
        "recent": collections.deque([1.0, 2.0], maxlen=5),
        "counts": counts,
        "tags": frozenset({"a"}),
        "args": types.SimpleNamespace(lr=1),
        "path": pathlib.PureWindowsPath("C:/runs"),
    }


def lightning(tensors: dict) -> dict:
    attribute_dict = class_of("lightning.fabric.utilities.data.AttributeDict", (dict,))
    scores = {"best_model_score": torch.tensor(0.9), "best_k_models": {"a.ckpt": torch.tensor(0.9)}}
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": scores},
        "optimizer_states": [optimizer_state()],
        "hyper_parameters": attribute_dict(lr=1e-3, model="dat_micro"),
    }


def mmengine(tensors: dict) -> dict:
    history = class_of("mmengine.logging.history_buffer.HistoryBuffer", mean=lambda self: None)
    history.mean.__module__ = history.__module__
    history.mean.__qualname__ = "HistoryBuffer.mean"
    config = class_of(
        "mmengine.config.config.ConfigDict",
        (dict,),
        __reduce_ex__=lambda self, protocol: (type(self), (dict(self),), None, None, None),
    )
    buffer = history()
    buffer._log_history, buffer._count_history = np.ones(5), np.ones(5)
    buffer._statistics_methods = collections.OrderedDict(mean=history.mean)
    return {
        "meta": {"cfg": "model = dict()", "mmengine_version": "0.10.4", "seed": np.int32(7)},
        "state_dict": {f"backbone.{n}": t for n, t in tensors.items()} | {"head.x": torch.ones(2)},
        "message_hub": {"log_scalars": {"train/loss": buffer}, "runtime_info": config(iter=3)},
        "optimizer": optimizer_state(),
    }


def dino(tensors: dict) -> dict:
    return {
        "student": {f"module.backbone.{name}": tensor + 1 for name, tensor in tensors.items()},
        "teacher": {f"backbone.{name}": t for name, t in tensors.items()}
        | {"head.a": torch.ones(2)},
        "dino_loss": {"center": torch.zeros(1, 8)},
        "args": argparse.Namespace(arch="dat_micro"),
    }


def tutorial(tensors: dict) -> dict:
    loss = torch.tensor(0.3, requires_grad=True)
    state = {"model_state_dict": tensors, "optimizer_state_dict": optimizer_state()}
    return {"epoch": 5, **state, "loss": loss}


def omegaconf(tensors: dict) -> dict:
    metadata = class_of("omegaconf.base.ContainerMetadata")()
    metadata.__dict__ |= {"ref_type": dict, "key_type": int, "flags": {}}
    node = class_of("omegaconf.nodes.AnyNode")()
    node.__dict__ |= {"_val": 3, "_metadata": metadata}
    config = class_of("omegaconf.dictconfig.DictConfig")()
    config.__dict__ |= {"_content": {"lr": node}, "_metadata": metadata}
    return {"net": tensors, "cfg": config}


def torchvision_ema(tensors: dict) -> dict:
    ema = AveragedModel(micro())
    ema.module.load_state_dict(tensors)
    return {"model_ema": ema.state_dict(), "args": argparse.Namespace(lr=1)}


def thop(tensors: dict) -> dict:
    names = {name.rpartition(".")[0] for name in tensors} | {""}
    counters = [f"{n}.{c}".lstrip(".") for n in names for c in ("total_ops", "total_params")]
    return {"model": tensors | {n: torch.zeros(1, dtype=torch.float64) for n in counters}}


TRAINERS = [deit, numbers, standard_library, lightning, mmengine, dino, tutorial, omegaconf]
TRAINERS += [torchvision_ema, thop]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_files_of_trainers_open(trainer, zipped, model, tmp_path):
    content = trainer(model.state_dict())
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    target = micro(seed=1)
    report = load_pretrained(target, tmp_path / "w.pth", strict=True)
    assert not report.unexpected
    assert same(target.state_dict(), model.state_dict())
    rows = describe(tmp_path / "w.pth")
    assert "dat_micro with 10 classes" in rows["weights"]
    assert "problem" not in rows
    assert "removed" in rows or trainer not in (lightning, mmengine, dino, torchvision_ema, thop)


def test_timms_own_checkpoint_opens_and_its_average_is_read(model, tmp_path):
    path = timm_saver(model, tmp_path)
    assert b"argparse" in path.read_bytes()
    assert same(read_weights(path), model.state_dict())
    assert same(read_weights(path, ema=True), micro(seed=5).state_dict())


PREFIXES = ["model.", "net.", "encoder.", "module.model.", "_forward_module.", "model._orig_mod."]


@pytest.mark.parametrize("name", ["dat_micro", "resnet18"])
def test_one_prefix_is_removed(name, tmp_path, caplog):
    source, target = (timm.create_model(name, num_classes=3) for _ in range(2))
    for prefix in PREFIXES:
        state = {f"{prefix}{n}": t for n, t in source.state_dict().items()}
        rest = {} if prefix == "_forward_module." else {"loss.weight": torch.ones(3)}
        torch.save({"state_dict": state | rest}, tmp_path / "w.pth")
        nn.init.zeros_(target.get_classifier().weight)
        with caplog.at_level("INFO", logger="dat"):
            report = load_pretrained(target, tmp_path / "w.pth", strict=True)
        assert len(report.matched) == len(source.state_dict())
        assert same(target.state_dict(), source.state_dict())
    assert "the prefix 'net.'" in caplog.text
    assert "1 tensor without it (loss.weight …)" in caplog.text


def test_of_two_models_in_one_state_dict_the_preferred_is_taken(model, tmp_path):
    for chosen, other in (("model", "ema_model"), ("teacher", "student")):
        state = {f"{chosen}.{n}": t for n, t in model.state_dict().items()}
        state |= {f"{other}.{n}": t + 1 for n, t in model.state_dict().items()}
        torch.save(state, tmp_path / "w.pth")
        assert same(read_weights(tmp_path / "w.pth"), model.state_dict())


def test_several_state_dicts_are_listed_and_one_is_chosen_by_its_key(model, tmp_path, capsys):
    path, out = tmp_path / "gan.pth", tmp_path / "w.safetensors"
    content = {"nets": {"generator": {"a": torch.ones(2)}, "critic": model.state_dict()}}
    torch.save(content, path)
    listed = r"generator \(1 tensor\), nets.critic \(175 tensors\).*--key nets.generator"
    with pytest.raises(CheckpointError, match=listed):
        read_weights(path)
    assert tool(["strip", str(path), str(out), "--key", "nets.critic"]) == 0
    assert same(safetensors.torch.load_file(out), model.state_dict())
    assert tool(["strip", str(path), str(out), "--key", "critic", "--force"]) == 4
    assert "under 'critic'" in capsys.readouterr().err


def test_what_a_file_holds_too_much_can_be_dropped(model, tmp_path, capsys):
    path, out = tmp_path / "w.pth", tmp_path / "w.safetensors"
    torch.save(model.state_dict() | {"aux.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"and more: .*--drop aux\.weight"):
        load_pretrained(micro(), path, strict=True)
    assert tool(["strip", str(path), str(out), "--drop", "aux."]) == 0
    load_pretrained(micro(), out, strict=True)
    assert tool(["strip", str(path), str(out), "--drop", "neck.", "--force"]) == 2


# --- Code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["foo.Bar", "__main__.Config", "timm.models.resnet.Nothing"])
def test_other_classes_are_refused_by_name(name, model, tmp_path, capsys):
    thing = class_of(name)() if name != "__main__.Config" else class_of("main2.Config")()
    torch.save({"model": model.state_dict(), "x": thing}, tmp_path / "w.pth")
    name = f"{type(thing).__module__}.{type(thing).__name__}"
    with pytest.raises(CheckpointError, match=rf"it holds a {name}, which is code") as error:
        read_weights(tmp_path / "w.pth")
    for advice in ("weights_only", "trust", "add_safe_globals", "\x1b", "\n"):
        assert advice not in str(error.value)
    assert tool(["inspect", str(tmp_path / "w.pth")]) == 0
    assert name in capsys.readouterr().out


# Instructions that would make the file `canary`, by the ways that a pickle has to call something.
MALICIOUS = [
    "cposix\nsystem\n(V{command}\ntR.",
    "cos\nsystem\n(V{command}\ntR.",
    "(V{command}\niposix\nsystem\n.",
    "(cposix\nsystem\nV{command}\no.",
    "cbuiltins\neval\n(V__import__('os').system('{command}')\ntR.",
    "c__builtin__\nexec\n(Vimport os; os.system('{command}')\ntR.",
    "cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V{command}\ntR.",
    "cbuiltins\ngetattr\n(cos\nVsystem\ntR(V{command}\ntR.",
    "cfunctools\npartial\n(cos\nsystem\nV{command}\ntR.",
    "csubprocess\nPopen\n((lV/bin/sh\naV-c\naV{command}\natR.",
    "cnumpy.testing._private.utils\nrunstring\n(Vimport os; os.system('{command}')\n(dtR.",
    "ctypes\nFunctionType\n(V{command}\ntR.",
    "cargparse\nos.system\n(V{command}\ntR.",
    "cargparse\nNamespace\n)R(dV__setstate__\ncposix\nsystem\nsbV{command}\nb.",
    "cpathlib\nPath.touch\n(cpathlib\nPosixPath\n(V{canary}\ntRtR.",
    "ccollections\nUserDict.__init__.__globals__\n.",
]


def zip_around(data: bytes) -> bytes:
    """A file of torch.save whose pickle is `data`."""
    torch.save({}, buffer := io.BytesIO())
    out = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith("data.pkl") else source.read(name))
    return out.getvalue()


def legacy_around(data: bytes) -> bytes:
    torch.save({}, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    content = pickle.dumps({}, protocol=2)
    return buffer.getvalue().replace(content, data, 1)


@pytest.mark.parametrize("around", [zip_around, legacy_around, bytes])
def test_code_never_runs(around, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "w.pth"
    rng = random.Random(0)
    for template in MALICIOUS:
        data = template.format(command=f"touch {canary}", canary=canary).encode()
        for damage in range(6):
            changed = bytearray(b"\x80\x02" + data)
            for _ in range(damage):
                changed[rng.randrange(2, len(changed))] = rng.randrange(256)
            path.write_bytes(around(bytes(changed)))
            with pytest.raises(CheckpointError) as error:
                read_weights(path)
            assert "\x1b" not in str(error.value)
            assert "weights_only" not in str(error.value)
            assert tool(["inspect", str(path)]) == 0
            assert not canary.exists(), template


def test_a_payload_beside_harmless_classes_is_refused(model, tmp_path):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return Path.touch, (canary,)

    content = deit(model.state_dict())
    content["args"].hidden = Payload()
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="was not executed"):
        read_weights(tmp_path / "w.pth")
    assert not canary.exists()


def test_only_data_is_harmless():
    for name in ("builtins.eval", "builtins.exec", "builtins.__import__", "builtins.open"):
        assert not HARMLESS.fullmatch(name)
    for name in ("os.system", "posix.system", "functools.partial", "pathlib.os", "random.seed"):
        assert not HARMLESS.fullmatch(name)


# --- Kinds of files -------------------------------------------------------------------------------


def as_zip(**files: bytes) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return out.getvalue()


def traced() -> bytes:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), out := io.BytesIO())
    return out.getvalue()


def numpy_archive() -> bytes:
    np.savez(out := io.BytesIO(), a=np.ones(3))
    return out.getvalue()


def exported() -> bytes:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, out := io.BytesIO())
    return out.getvalue()


def torch_file() -> bytes:
    torch.save({"a": torch.ones(300)}, out := io.BytesIO())
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS = {
    "page": (b"\n<!DOCTYPE html><html>Sign in</html>", r"a web page.*Download the file itself"),
    "answer": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", r"a web page \(HTML or XML\)"),
    "json": (b'{"message": "Not Found"}', r"JSON text, which begins with '{\"message\""),
    "text": (b"404: Not Found", r"text, which begins with '404: Not Found'"),
    "lfs": (LFS, r"a Git LFS pointer\. .*git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s1--a.pth", r"git-annex pointer"),
    "gzip": (gzip.compress(b"x"), "a gzip archive.*Unpack"),
    "npz": (numpy_archive, r"an archive of NumPy arrays \(\.npz\)"),
    "npy": (b"\x93NUMPY\x01\x00v\x00{", r"a NumPy array"),
    "h5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x032.1", "an ONNX model"),
    "pt2": (exported, r"a program of torch\.export.*torch\.export\.load"),
    "script": (traced, r"a TorchScript program.*torch\.jit\.load"),
    "zip": (lambda: as_zip(w__pth=torch_file()), r"a zip archive with w\.pth in it.*Unpack"),
    "photos": (lambda: as_zip(a__jpg=b"x"), r"a zip archive\. Unpack"),
    "keras": (lambda: as_zip(config__json=b"{}", model__weights__h5=b""), "a Keras model"),
    "pickle": (pickle.dumps({"a": np.ones(3)}, protocol=4), r"a pickle that torch\.save did not"),
    "empty": (b"", "an empty file.*again"),
    "zeros": (bytes(5000), "a file of zeros"),
    "truncated": (lambda: torch_file()[:700], "truncated or damaged.*again"),
    "noise": (random.Random(0).randbytes(3000), "no known format"),
}


@pytest.mark.filterwarnings("ignore")  # jit's age
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_without_weights_is_named_for_what_it_is(name, tmp_path, capsys):
    content, words = OTHERS[name]
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content())
        with pytest.raises(CheckpointError, match=words) as error:
            read_weights(path)
        assert str(path) in str(error.value)
        assert not any(c in str(error.value) for c in "\n\x1b")
        assert tool(["inspect", str(path)]) == 0
        assert "format" in capsys.readouterr().out


def test_the_content_decides_and_not_the_suffix(model, tmp_path):
    state = model.state_dict()
    for name in ("w.pth", "w.SAFETENSORS", "w.bin", "w"):
        safetensors.torch.save_file(state, tmp_path / name)
        assert same(read_weights(tmp_path / name), state)
    for name, zipped in itertools.product(("w.safetensors", "w.tar", "w"), (True, False)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert same(read_weights(tmp_path / name), state)


def test_folders_of_the_hugging_face_hub(model, tmp_path):
    state = model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "dat_micro"}')
    (tmp_path / "manifest.json").write_text("{}")  # of a web application
    assert same(read_weights(tmp_path), state)
    # In two files with an index of them.
    (tmp_path / "model.safetensors").unlink()
    names = list(state)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        safetensors.torch.save_file({n: state[n] for n in part}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for f, part in shards.items() for n in part}}))
    assert same(read_weights(tmp_path), state)
    assert same(read_weights(index), state)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"lists {file}, which is missing"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="JSON text"):
        read_weights(index)


def test_other_folders(model, tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights: expected a run"):
        read_weights(tmp_path)
    torch.save(model.state_dict(), tmp_path / "epoch_12.pth")
    (tmp_path / "log.txt").touch()
    assert same(read_weights(tmp_path), model.state_dict())
    shutil.copy(tmp_path / "epoch_12.pth", tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=r"name one of best\.pth, epoch_12\.pth"):
        read_weights(tmp_path)


# --- Checkpoints of ours under another name -------------------------------------------------------


def test_a_damaged_file_of_a_checkpoint_is_refused_by_its_own_name_too(tmp_path):
    folder = save_state(tmp_path, make_state(3))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    assert read_weights(file).keys() == read_weights(folder).keys()
    content[-1] ^= 64
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the SHA-256 of model\.safetensors is not"):
        read_weights(file)
    (folder / "manifest.json").unlink()  # somebody keeps the weights alone
    assert read_weights(file)


def test_the_manifest_decides_what_a_checkpoint_is(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    best = shutil.copytree(run / "checkpoints" / "step-5", tmp_path / "best")
    assert same(read_weights(best), micro(seed=5).state_dict())
    assert same(read_weights(best, ema=True), micro(seed=-5).state_dict())
    assert checkpoint.resolve(best) == best
    assert tool(["verify", str(best)]) == 0
    assert tool(["inspect", str(best)]) == 0
    assert "step        5, after 1" in capsys.readouterr().out
    (best / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"best: model\.safetensors has 0 bytes"):
        read_weights(best)
    assert tool(["inspect", str(best)]) == 0
    assert "problem" in capsys.readouterr().out


def test_weights_whose_average_was_the_runs_best_are_named(tmp_path, logged_warnings):
    for ema in (False, True):
        state = make_state(3)
        state.best = {"acc1": 70.0, "step": 3, "ema": ema}
        (tmp_path / str(ema)).mkdir()
        read_weights(save_state(tmp_path / str(ema), state))
        assert len(logged_warnings) == ema
    assert "best by the average (EMA) of its weights, 70.00 % top-1" in logged_warnings[0]
    assert logged_warnings[0].endswith("FILE.safetensors --ema` writes it")


# --- Channels and remedies ------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4, 6])
@pytest.mark.parametrize("name", ["dat_micro", "resnet18"])
def test_rgb_weights_are_adapted_as_timm_does(name, channels, tmp_path):
    path = tmp_path / "w.pth"
    source = timm.create_model(name)
    torch.save(source.state_dict(), path)
    overlay = {"file": str(path), "url": "", "hf_hub_id": None}
    expected = timm.create_model(
        name, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay
    )
    target = timm.create_model(name, in_chans=channels)
    report = load_pretrained(target, path, strict=False)
    assert same(target.state_dict(), expected.state_dict())
    assert report.adapted == [f"{source.pretrained_cfg['first_conv']}.weight"]
    assert "1 adapted" in str(report)
    with pytest.raises(CheckpointError, match=rf"images of 3 channels, the model for {channels}: "):
        load_pretrained(target, path, strict=True)


def test_weights_for_other_channels_are_not_adapted(tmp_path):
    torch.save(micro(in_chans=4).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="images of 4 channels, the model for 3: "):
        load_pretrained(micro(), tmp_path / "w.pth", strict=False)


def test_the_remedy_for_other_classes_names_the_keys(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"10 classes, the data has 3.*CLASS_LIST.*VAL_SUBSET"
    ):
        load_pretrained(micro(3), tmp_path / "w.pth", strict=True)


# --- Hashes ---------------------------------------------------------------------------------------


def test_a_hash_is_that_of_the_tensors_files_wherever_they_lie(tmp_path):
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    for folder in (alone, parts):
        folder.mkdir()
    safetensors.torch.save_file({"a": torch.zeros(2)}, alone / "model.safetensors")
    assert hash_weights(alone) == hash_weights(alone / "model.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    found = set()
    for value in (0.0, 1.0):
        safetensors.torch.save_file({"a": torch.zeros(2)}, parts / "1.safetensors")
        safetensors.torch.save_file({"b": torch.full((2,), value)}, parts / "2.safetensors")
        found.add(hash_weights(parts))
    assert len(found) == 2, "the index is the same"
