"""tools/visualize.py: its weights and points reproduce what every mixer computes; the picture; wrong commands.

pytest tests/test_attention_tool.py
"""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from engine import checkpoint
from engine.checkpoint import TrainState
from models.dat import MIXERS, DATConfig
from models.ops import convolve, sample
from tools import visualize
from tools.visualize import NOT_READ, look, read

CONFIG = DATConfig(
    dims=(24,) * 4, num_heads=(4,) * 4, offset_groups=(2,) * 4, sr_ratios=(3,) * 4, window_size=4
)
PLUS_PLUS = {
    "plus_plus": True,
    "stages": ("ND", "ND", "NDND", "DD"),
    "offset_strides": (4, 2, 1, 1),
}
ALL_KINDS = "MODEL.ARGS.stages=[GL, PS, NDC, LD]"
# Two windows high, where the shift joins the first and the last rows; padded in width.
SIZE = (8, 10)
QUERIES = [(0, 0), (4, 5), (7, 9)]


@pytest.fixture(params=QUERIES, ids=str)
def query(request):
    return request.param


def make_mixer(letter: str, noise: float = 0.3) -> torch.nn.Module:
    """A mixer with large random weights, so that attention is far from uniform and offsets are long."""
    torch.manual_seed(0)
    mixer = MIXERS[letter](CONFIG, 0, SIZE).eval().requires_grad_(False)
    for parameter in mixer.parameters():
        parameter.copy_(parameter + noise * torch.randn_like(parameter))
    return mixer


def values(mixer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the queries' weights are for, (Hk, Wk, C), computed without the tool."""
    if hasattr(mixer, "qkv"):
        return mixer.qkv(x)[0, ..., -x.shape[-1] :]
    if hasattr(mixer, "positions"):
        positions = mixer.positions(mixer.q(x))
        source = sample(x, positions).unflatten(1, positions.shape[2:4])
    else:
        source = mixer.reduce(x)
    return mixer.kv(source)[0, ..., -x.shape[-1] :]


@pytest.mark.parametrize("letter", "LSNDGP")
def test_weights_of_the_values_are_the_mixers_output(letter, query):
    mixer, x = make_mixer(letter), torch.randn(1, *SIZE, 24)
    weights = read(mixer, x, query).weights
    assert weights.min() >= 0
    assert weights.max() > 2 * weights.mean()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(4))
    by_head = values(mixer, x).unflatten(-1, (4, -1))  # (Hk, Wk, M, D)
    z = torch.einsum("mhw,hwmd->md", weights, by_head).flatten()
    torch.testing.assert_close(mixer.proj(z), mixer(x)[0, *query], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("letter", "LSN")
def test_the_query_reads_the_cells_with_weight_and_no_others(letter, query):
    mixer, x = make_mixer(letter, noise=0), torch.randn(1, *SIZE, 24)
    reads = (read(mixer, x, query).weights > NOT_READ).any(0)
    assert 2 <= reads.sum() <= 16
    for cell in np.ndindex(*SIZE):
        changed = x.clone()
        changed[0, *cell] += torch.randn(24)
        same = torch.allclose(mixer(changed)[0, *query], mixer(x)[0, *query], atol=1e-6)
        assert same != reads[cell], cell


def test_a_convolution_reads_at_the_drawn_points(query):
    mixer, x = make_mixer("C"), torch.randn(1, *SIZE, 24)
    reading = read(mixer, x, query)
    torch.testing.assert_close(reading.weights.sum((1, 2)), torch.ones(4))
    centres = torch.tensor(SIZE) - 1
    positions = (reading.points - 0.5) / centres * 2 - 1  # ±1 at the border cells' centres
    source = sample(x, positions[None])[0].unflatten(-1, (4, -1))  # (9, M, D)
    kernel = mixer.conv.weight.flatten(2).unflatten(0, (4, -1))  # (M, D, D, 9)
    modulation = (
        convolve(mixer.positions, x)[0, *query, 36:].sigmoid().view(2, 9).repeat_interleave(2, 0)
    )
    z = torch.einsum("moik,mk,kmi->mo", kernel, modulation, source).flatten() + mixer.conv.bias
    torch.testing.assert_close(mixer.proj(z), mixer(x)[0, *query], atol=1e-4, rtol=1e-4)
    strength = (kernel * modulation[:, None, None]).norm(dim=(1, 2))
    share = strength / strength.sum(1, keepdim=True)
    torch.testing.assert_close(reading.weights.flatten(1), share)


@pytest.mark.parametrize("architecture", [{}, PLUS_PLUS], ids=["dat", "dat++"])
def test_points_are_the_models_sampling_positions(architecture):
    torch.manual_seed(0)
    model = timm.create_model("dat_micro", **architecture).eval()
    images = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        samplings = model.sampling_positions(images)
    looks = look(model, images, (0.9, 0.2), [(s.stage, s.block) for s in samplings])
    for seen, sampling in zip(looks, samplings, strict=True):
        size = torch.tensor(sampling.map_size)
        assert seen.size == sampling.map_size
        assert seen.query == (int(0.9 * size[0]), int(0.2 * size[1]))
        for ours, theirs in (
            (seen.reading.points, sampling.positions[0]),
            (seen.reading.reference, sampling.reference),
        ):
            cells = (theirs * (size - 1) + size) / 2  # -1 is at 0.5, 1 at half a cell from the end
            torch.testing.assert_close(ours, cells)


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
    paths = ["--cfg", folder / "micro.yaml", "--image", folder / image, "--out", folder / out]
    return [*map(str, paths), *more]


@pytest.mark.parametrize("more", [[], ["--block", "3.2"], ["--block", "1.2"]], ids=str)
def test_a_picture_of_every_kind_is_drawn(folder, capsys, more):
    assert visualize.main(command(folder, *more, "--point", "0.2,1", "--opts", ALL_KINDS)) == 0
    assert "dat_micro, untrained, random weights" in capsys.readouterr().out
    with Image.open(folder / "out.png") as picture:
        assert picture.width == 1202
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(64**2)) > 500


def test_trained_weights_are_drawn_and_named(folder, capsys):
    model = timm.create_model("dat_micro", num_classes=7)
    save_file(model.state_dict(), folder / "trained.safetensors")
    weights = str(folder / "trained.safetensors")
    assert visualize.main(command(folder, "--pretrained", weights)) == 0
    assert "weights of trained.safetensors" in capsys.readouterr().out
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model, None, optimizer, torch.amp.GradScaler(enabled=False), epoch=3)
    metadata = {"classes": list("abcdefg"), "config": {"TAG": "tiny"}}
    files = checkpoint.snapshot(state, metadata)
    checkpoint.write(folder / "run" / "checkpoints", "step-0", files)
    assert visualize.main(command(folder, "--resume", str(folder / "run"))) == 0
    assert "run tiny after 3 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "message", "files", "more"),
    [
        (3, "No such file", {"image": "absent.png"}, []),
        (3, "words.jpg cannot be read as an image", {"image": "words.jpg"}, []),
        (2, "--point 0.5,1.2 is outside", {}, ["--point", "0.5,1.2"]),
        (2, "--point 3: expected y,x", {}, ["--point", "3"]),
        (2, "--block 5.1: there is no such block", {}, ["--block", "5.1"]),
        (2, "resnet18 has none of the spatial mixers", {}, ["--opts", "MODEL.NAME", "resnet18"]),
        (2, "did you mean MODEL.NAME", {}, ["--opts", "MODEL.NAM", "dat_tiny"]),
        (4, "absent.pth does not exist", {}, ["--pretrained", "absent.pth"]),
        (4, "is neither a run", {}, ["--resume", "absent"]),
        (6, "cannot be written", {"out": "absent/out.png"}, []),
        (6, "is not supported", {"out": "out.xyz"}, []),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_commands_are_answered_in_one_line(folder, capsys, code, message, files, more):
    assert visualize.main(command(folder, *more, **files)) == code
    answer = capsys.readouterr().err
    assert message in answer
    assert answer.count("\n") == 1
