"""tools/explore.py and analysis/explorer.py: the page has the recorded numbers, loads nothing, runs nothing foreign.

pytest tests/unit/test_explorer.py
"""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import timm
import torch
from helpers.browser import chromium
from helpers.run_dirs import ATTACK
from PIL import Image
from safetensors.torch import save_file

from analysis import explorer
from analysis.recording import Points, record
from tools import explore

ALL_KINDS = "MODEL.ARGS.stages=[GL, PS, NDC, LD]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a configuration, pictures, and what is none."""
    folder = tmp_path_factory.mktemp("explorer")
    rng = np.random.default_rng(0)
    for name, size in {
        "image.png": (40, 50),
        "dot.png": (1, 1),
        "</script><b>.png": (20, 20),
    }.items():
        path = folder / name.replace("/", "∕")
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    (folder / "words.jpg").write_text("not an image")
    (folder / "micro.yaml").write_text("MODEL: {NAME: dat_micro}\nDATA: {IMG_SIZE: 32}\n")
    names = [ATTACK, *map(str, range(9))]
    (folder / "names.txt").write_text("\n".join(names))
    return folder


def command(folder, *more: str, image: str = "image.png", out: str = "out.html") -> list[str]:
    paths = [folder / image, "--cfg", folder / "micro.yaml", "--out", folder / out]
    return [*map(str, paths), *more, "--opts", "MODEL.NUM_CLASSES=10", ALL_KINDS]


def page_of(folder, *more: str, **files: str) -> str:
    assert explore.main(command(folder, *more, **files)) == 0
    return (folder / files.get("out", "out.html")).read_text()


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


class Decoded:
    """A block of a page, decoded as the page's script does."""

    def __init__(self, page: str, name: str):
        picture = data_of(page)["models"][0]["pictures"][0]
        blob = re.search(rf'id="blob-{picture["blob"]}">(.*?)</script>', page, re.DOTALL)[1]
        content = gzip.decompress(base64.b64decode(blob))
        self.block = next(block for block in picture["blocks"] if block["name"] == name)
        shape = self.block["shape"]
        share = np.frombuffer(content, np.uint8, np.prod(shape), self.block["weights"]).reshape(
            shape
        )
        largest = np.frombuffer(content, "<f4", np.prod(shape[:2]), self.block["largest"])
        self.weights = (share / 255.0) ** 2 * largest.reshape(*shape[:2], 1)
        if self.block["layout"] == "points":
            places = self.block["points"]
            count = 2 * self.block["groups"] * shape[2]
            numbers = np.frombuffer(content, "<u2", count, places["start"])
            self.points = (places["low"] + places["step"] * numbers).reshape(-1, shape[2], 2)


@pytest.fixture(scope="module")
def page(folder):
    return page_of(folder)


def test_the_page_has_the_recorded_numbers(folder):
    torch.manual_seed(0)
    model = timm.create_model("dat_micro", num_classes=10, stages=("GL", "PS", "NDC", "LD")).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_file(model.state_dict(), folder / "noisy.safetensors")
    page = page_of(folder, "--pretrained", str(folder / "noisy.safetensors"))
    classifier = explore.load_models(
        explore.parse(command(folder, "--pretrained", str(folder / "noisy.safetensors")))
    )[0]
    seen = classifier.transform(explore.read_pixels(classifier, folder / "image.png"))
    recording = record(
        model, explore.build.normalize(classifier.cfg, torch.device("cpu"))(seen[None])
    )
    assert len(recording.blocks) == 9
    for block in recording.blocks:
        decoded = Decoded(page, block.name)
        weights = block.weights.numpy()
        error = np.abs(decoded.weights - weights) / weights.max(-1, keepdims=True)
        assert error.max() < 0.0041, block.name
        if isinstance(block.layout, Points):
            assert np.abs(decoded.points - block.cell * block.layout.points.numpy()).max() < 0.01
            assert set(decoded.block["health"]) == {"offset", "outside", "coverage", "distance"}
    shown = data_of(page)["models"][0]["pictures"][0]["predictions"]
    expected = recording.logits.softmax(0).sort(descending=True)
    assert [p["p"] for p in shown] == pytest.approx(expected.values[:5].tolist(), abs=1e-6)
    assert [p["name"] for p in shown] == [str(i) for i in expected.indices[:5].tolist()]


def test_equal_inputs_give_equal_bytes(folder, page):
    assert page_of(folder, out="again.html") == page


def test_the_page_loads_nothing_from_anywhere(page):
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src &#39;none&#39;; img-src data:;")
    assert "script-src &#39;sha256-" in policy
    assert "unsafe-eval" not in policy
    assert not re.search(r"<link|<iframe|@import", page)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not re.findall(r"url\((?!data:)", page)
    assert not re.findall(r"https?://", page)
    assert not re.findall(r"<[^>]+ on\w+=", page)


def test_names_are_text(folder):
    page = page_of(folder, "--names", str(folder / "names.txt"), image="<∕script><b>.png")
    assert ATTACK not in page
    assert "<script>document" not in page
    assert "onerror=" not in re.sub(r"onerror=\\u|onerror=\\\"", "", page)
    predictions = data_of(page)["models"][0]["pictures"][0]["predictions"]
    assert all(isinstance(one["name"], str) for one in predictions)


def test_a_picture_of_one_pixel(folder):
    page = page_of(folder, image="dot.png")
    weights = Decoded(page, "3.2").weights
    np.testing.assert_allclose(weights.sum(-1), 1, atol=0.02)


def test_two_models_side_by_side(folder):
    (folder / "swin.yaml").write_text(
        "MODEL: {NAME: dat_micro, ARGS: {stages: [LS, LS, LSLS, LS]}, NUM_CLASSES: 10}\nDATA: {IMG_SIZE: 32}\n"
    )
    out = folder / "two.html"
    both = [str(folder / "swin.yaml"), str(folder / "micro.yaml")]
    assert explore.main([str(folder / "image.png"), "--compare", *both, "--out", str(out)]) == 0
    models = data_of(out.read_text())["models"]
    assert [model["notes"][1:] for model in models] == [
        ["This model has no deformable attention: there are no offsets to see."],
        [],
    ]
    assert [len(model["pictures"][0]["blocks"]) for model in models] == [10, 10]


def test_another_size_has_more_queries_and_last_blocks_alone(folder):
    page = page_of(folder, "--size", "64", "--blocks", "last")
    blocks = data_of(page)["models"][0]["pictures"][0]["blocks"]
    assert {block["name"]: block["map"] for block in blocks}["3.2"] == [8, 8]


def test_timms_swin_is_explored(folder):
    args = "{embed_dim: 16, depths: [2, 2, 2, 2], num_heads: [1, 1, 2, 2]}"
    name = "swin_tiny_patch4_window7_224"
    (folder / "timm.yaml").write_text(f"MODEL: {{NAME: {name}, ARGS: {args}}}\n")
    words = [str(folder / "image.png"), "--cfg", str(folder / "timm.yaml")]
    assert explore.main([*words, "--out", str(folder / "out.html")]) == 0
    blocks = data_of((folder / "out.html").read_text())["models"][0]["pictures"][0]["blocks"]
    assert [block["letter"] for block in blocks] == list("LSLSLSLL")  # one window is not shifted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny", "dat_base"])
def test_a_picture_of_224_pixels_takes_two_megabytes(name):
    torch.manual_seed(0)
    store = explorer.Store()
    for block in record(timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)).blocks:
        store.add(block)
    assert len(explorer.pages.pack(bytes(store.content))) <= explorer.BUDGET


def test_too_much_for_a_page_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(explorer, "BUDGET", 10_000)
    assert explore.main(command(folder)) == 2
    assert "add --blocks last" in capsys.readouterr().err
    words = command(folder)
    assert explore.main([*[words[0]] * 12, *words]) == 2
    assert "13 pictures are more than the 12 of one page" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "message", "files", "more"),
    [
        (3, "No such file", {"image": "absent.png"}, []),
        (3, "words.jpg cannot be read as an image", {"image": "words.jpg"}, []),
        (2, "expected at least 32 pixels", {}, ["--size", "8"]),
        (2, "--compare names both models", {}, ["--compare", "a", "b"]),
        (2, "--point 3: expected y,x", {}, ["--point", "3"]),
        (2, "has its own configuration; remove --cfg", {}, ["--resume", "absent"]),
        (6, "no such folder for --out", {"out": "absent/out.html"}, []),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_commands_are_answered_in_one_line(folder, capsys, code, message, files, more):
    assert explore.main(command(folder, *more, **files)) == code
    answer = capsys.readouterr().err
    assert message in answer


def test_a_model_without_attention_is_refused(folder, capsys):
    (folder / "resnet.yaml").write_text("MODEL: {NAME: resnet18}\nDATA: {IMG_SIZE: 32}\n")
    words = [str(folder / "image.png"), "--cfg", str(folder / "resnet.yaml")]
    assert explore.main(words) == 2
    assert "its attention cannot be recorded" in capsys.readouterr().err


# --- In a browser ---------------------------------------------------------------------------------

READY = "document.body?.hasAttribute('data-ready')"


def test_clicks_show_the_numbers_of_the_store(folder, tmp_path):
    page = page_of(folder, "--names", str(folder / "names.txt"), image="<∕script><b>.png")
    with chromium(tmp_path) as browser:
        browser.open(folder / "out.html", READY)
        for name, y, x in (
            ("3.2", 0.1, 0.9),
            ("1.2", 0.6, 0.3),
            ("2.1", 0.5, 0.5),
            ("3.3", 0.9, 0.2),
        ):
            browser.click(f'[data-block="{name}"]')
            browser.click(".large", y, x)
            decoded = Decoded(page, name)
            height, width = decoded.block["map"]
            query = int(y * height) * width + int(x * width)
            strongest = np.sort(decoded.weights[:, query].ravel())[::-1][:5]
            shown = browser.run(
                "[...document.querySelectorAll('.keys tr')].map(row => Number(row.dataset.weight))"
            )
            np.testing.assert_allclose(shown, strongest[: len(shown)], rtol=1e-5)
            assert f"Block {name}" in browser.text(".block-title")
            assert f"Query at y {round(32 * y)}, x {round(32 * x)}" in browser.text(".readout")
        # What reads a point, and the keys of all queries.
        decoded = Decoded(page, "3.2")
        browser.click('[data-block="3.2"]')
        browser.key("2")
        browser.click(".large", 0.4, 0.7)
        distance = np.linalg.norm(decoded.points - 32 * np.array([0.4, 0.7]), axis=-1)
        group, key = np.unravel_index(distance.argmin(), distance.shape)
        (shown,) = browser.run("[Number(document.querySelector('.keys tr').dataset.weight)]")
        assert shown == pytest.approx(decoded.weights[group, :, key].max(), rel=1e-5)
        browser.key("3")
        (shown,) = browser.run("[Number(document.querySelector('.keys tr').dataset.weight)]")
        assert shown == pytest.approx(decoded.weights.mean(1).max(), rel=1e-5)
        # Keys step through blocks; nothing that a name says has run.
        browser.key("ArrowRight")
        assert "Block 3.3" in browser.text(".block-title")
        browser.key("c")
        assert browser.run("document.getElementById('gradient').checked")
        assert browser.run("document.title") == "What dat_micro attends to"
        assert ATTACK in browser.run("document.querySelector('.predictions').textContent")
        assert browser.problems == []
