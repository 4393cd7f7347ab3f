"""tools/visualize.py: the picture, and wrong commands.

pytest tests/unit/test_visualize.py
"""

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from engine import checkpoint
from engine.state import TrainState
from tools import visualize

ALL_KINDS = "MODEL.ARGS.stages=[GL, PS, NDC, LD]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a configuration, an image, and what is none."""
    folder = tmp_path_factory.mktemp("attention")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    (folder / "words.jpg").write_text("not an image")
    (folder / "micro.yaml").write_text("MODEL: {NAME: dat_micro}\nDATA: {IMG_SIZE: 32}\n")
    return folder


def command(folder, *more: str, image: str = "image.png", out: str = "out.png") -> list[str]:
    model = [] if "--resume" in more or "--model" in more else ["--cfg", folder / "micro.yaml"]
    return [*map(str, [folder / image, *model, "--out", folder / out]), *more]


@pytest.mark.parametrize("more", [[], ["--block", "3.2"], ["--block", "1.2"]], ids=str)
def test_a_picture_of_every_kind_is_drawn(folder, capsys, more):
    assert visualize.main(command(folder, *more, "--point", "0.2,1", "--opts", ALL_KINDS)) == 0
    assert "dat_micro, untrained, random weights" in capsys.readouterr().err
    with Image.open(folder / "out.png") as picture:
        assert picture.width == 1202
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(64**2)) > 500


def test_trained_weights_are_drawn_and_named(folder, capsys):
    model = timm.create_model("dat_micro", num_classes=7)
    save_file(model.state_dict(), folder / "trained.safetensors")
    weights = str(folder / "trained.safetensors")
    assert (
        visualize.main(command(folder, "--pretrained", weights, "--opts", "MODEL.NUM_CLASSES=7"))
        == 0
    )
    assert "dat_micro, " + weights in capsys.readouterr().err
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model, None, optimizer, torch.amp.GradScaler(enabled=False), epoch=3)
    values = {"MODEL": {"NAME": "dat_micro"}, "DATA": {"IMG_SIZE": 32}}
    metadata = {"classes": list("abcdefg"), "config": values}
    files = checkpoint.snapshot(state, metadata)
    checkpoint.write(folder / "run" / "checkpoints", "step-0", files)
    assert visualize.main(command(folder, "--resume", str(folder / "run"))) == 0
    assert f"{folder / 'run'}/checkpoints/step-0/model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "message", "files", "more"),
    [
        (3, "No such file", {"image": "absent.png"}, []),
        (3, "words.jpg cannot be read as an image", {"image": "words.jpg"}, []),
        (2, "--point 0.5,1.2 is outside the image", {}, ["--point", "0.5,1.2"]),
        (2, "--point 3: expected y,x", {}, ["--point", "3"]),
        (2, "--block 5.1: no such block", {}, ["--block", "5.1"]),
        (
            2,
            "resnet18, untrained, random weights: its attention cannot",
            {},
            ["--opts", "MODEL.NAME", "resnet18"],
        ),
        (2, "did you mean MODEL.NAME", {}, ["--opts", "MODEL.NAM", "dat_tiny"]),
        (4, "absent.pth does not exist", {}, ["--pretrained", "absent.pth"]),
        (4, "is neither a run", {}, ["--resume", "absent"]),
        (6, "no such folder for --out", {"out": "absent/out.png"}, []),
        (6, "is not supported", {"out": "out.xyz"}, []),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_commands_are_answered_in_a_sentence(folder, capsys, code, message, files, more):
    assert visualize.main(command(folder, *more, **files)) == code
    answer = capsys.readouterr().err.splitlines()
    assert message in answer[-1]
    assert all(line.startswith("INFO ") for line in answer[:-1])


def test_a_picture_is_replaced_by_a_complete_one(folder, monkeypatch):
    def stop(figure, file, **settings):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    (folder / "old.svg").write_text("old")
    argv = command(folder, out="old.svg")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", stop)
        assert visualize.main(argv) == 130
    assert (folder / "old.svg").read_text() == "old"
    assert visualize.main(argv) == 0
    assert "</svg>" in (folder / "old.svg").read_text()
    assert not [*folder.glob(".tmp-*")]


def test_timms_models_are_drawn(folder, capsys):
    swin = "MODEL.ARGS={embed_dim: 24, depths: [2, 2, 2, 2], window_size: 2}"
    options = ["--opts", "MODEL.NAME=swin_tiny_patch4_window7_224", "DATA.IMG_SIZE=64", swin]
    assert visualize.main(command(folder, *options)) == 0
    with Image.open(folder / "out.png") as picture:
        assert picture.width == 1202
