import csv
import functools
import io
import json
import shutil
import struct
import tracemalloc
import zlib

import pytest
import safetensors.torch
import timm
import torch
from helpers.images import write_image_folder
from helpers.runs import arguments
from PIL import ExifTags, Image
from timm.models import save_for_hf
from timm.utils import ModelEmaV3

import main
from engine import checkpoint
from engine.state import TrainState
from tools import predict
from tools.common import classifier
from utils.errors import DataError

SHARED = ["file", "c1", "p1", "c2", "p2", "c3", "p3", "c4", "p4", "entropy"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch with its evaluation: its path, the images, and the rows of val by file."""
    folder = tmp_path_factory.mktemp("run")
    images = write_image_folder(folder / "data")
    argv = arguments(folder, images, "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert main.main(argv) == 0
    path = folder / "dat_micro" / "run"
    assert main.main([*argv, "--eval", "--out", str(folder / "out")]) == 0
    (found,) = (folder / "out").glob("*-model")
    return path, images, read_csv((found / "val.csv").read_text())


def read_csv(text: str) -> dict[str, dict]:
    """Rows by the last two parts of the file's path, with the columns that predictions share with evaluations."""
    rows = csv.DictReader(io.StringIO(text))
    by_name = {"/".join(row["file"].split("/")[-2:]): row for row in rows}
    return {n: {c: row[c] for c in SHARED if c != "file"} for n, row in by_name.items()}


def predictions(tmp_path, *argv, out="out.csv"):
    assert predict.main([*map(str, argv), "--out", str(tmp_path / out)]) == 0
    return (tmp_path / out).read_text()


# --- Weights --------------------------------------------------------------------------------------


def test_predictions_of_a_run_are_those_of_its_evaluation_to_the_digit(run, tmp_path):
    path, images, expected = run
    assert read_csv(predictions(tmp_path, images / "val", "--resume", path)) == expected


def test_files_of_weights_and_hugging_face_folders_predict_the_same(run, tmp_path):
    path, images, expected = run
    (step,) = (path / "checkpoints").iterdir()
    metadata = checkpoint.read_metadata(step)
    opts = ("--opts", "MODEL.NUM_CLASSES", "4", "CHECKPOINT.PRETRAINED", "")
    file = (step / "model.safetensors", "--cfg", path / "config.yaml", *opts)
    assert read_csv(predictions(tmp_path, images / "val", "--pretrained", *file)) == expected

    args = metadata["config"]["MODEL"]["ARGS"]
    model = timm.create_model("dat_micro", num_classes=4, **args)
    model.load_state_dict(safetensors.torch.load_file(step / "model.safetensors"))
    names = metadata["classes"]
    save_for_hf(
        model,
        tmp_path / "hf",
        model_config={"label_names": names, "label_descriptions": {names[1]: "a cat"}},
        model_args=args,
        safe_serialization=True,
        data_config={"crop_mode": "squash", "crop_pct": 1.0, "input_size": (3, 32, 32)},
    )
    bare = tmp_path / "bare" / "model.safetensors"
    bare.parent.mkdir()
    shutil.copy(step / "model.safetensors", bare)
    (bare.parent / "config.json").write_text('{"model_type": "dat"}')  # not timm's
    (tmp_path / "classes").write_text("".join(f"{name}\n" for name in names))
    flags = ("--opts", "DATA.CLASS_LIST", tmp_path / "classes", "CHECKPOINT.PRETRAINED", "")
    text = predictions(tmp_path, images / "val", "--pretrained", bare, *file[1:3], *flags)
    assert {row["name1"] for row in csv.DictReader(io.StringIO(text))} <= {*names}
    for path in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors"):
        text = predictions(tmp_path, images / "val", "--pretrained", path, "--batch-size", "4")
        assert read_csv(text) == expected
        assert {row["name1"] for row in csv.DictReader(io.StringIO(text))} <= {*names, "a cat"}


def test_the_ema_is_another_model(run, tmp_path):
    path, images, expected = run
    found = read_csv(predictions(tmp_path, images / "val", "--resume", path, "--ema"))
    assert found.keys() == expected.keys()
    assert found != expected


def test_any_model_of_timms_predicts_imagenet_by_name(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    argv = [str(tmp_path / "red.png"), "--model", "test_resnet"]
    assert predict.main([*argv, "--pretrained", str(tmp_path / "w.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert "1000 outputs are taken as ImageNet-1k's" in err
    settings = timm.data.resolve_data_config({}, model=model)
    picture = timm.data.create_transform(**settings)(Image.open(tmp_path / "red.png"))
    with torch.no_grad():
        best = int(model(picture[None]).argmax())
    name = timm.data.ImageNetInfo().index_to_description(best).split(", ")[0]
    assert out.startswith(f"{tmp_path / 'red.png'}  {name} 0.")


def test_timms_own_weights_follow_the_options(tmp_path, capsys, monkeypatch):
    safetensors.torch.save_file(
        timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors"
    )
    stored = {"file": str(tmp_path / "w.safetensors"), "url": "", "hf_hub_id": None}
    create = functools.partial(timm.create_model, pretrained_cfg_overlay=stored)
    monkeypatch.setattr(timm, "create_model", create)
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    argv = [str(tmp_path / "red.png"), "--model", "test_vit", "--opts"]
    assert predict.main([*argv, "DATA.IMG_SIZE", "96", "DATA.IN_CHANS", "1"]) == 0
    assert "96 px" in capsys.readouterr().err
    assert predict.main([*argv, "MODEL.ARGS.absent", "1"]) == 2
    message = (
        "--model test_vit cannot be built with what --opts changes (TypeError: VisionTransformer"
    )
    assert message in capsys.readouterr().err
    assert predict.main([*argv, "MODEL.ARGS.depth", "9"]) == 4
    assert "or do not fit what --opts changes" in capsys.readouterr().err


def test_a_run_whose_average_was_better_says_how_to_take_it(tmp_path, capsys):
    model = timm.create_model("dat_micro", num_classes=2)
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler(enabled=False)
    best = {"acc1": 70.0, "step": 0, "ema": True}
    state = TrainState(model, ModelEmaV3(model), optimizer, scaler, best=best)
    values = {"MODEL": {"NAME": "dat_micro"}, "DATA": {"IMG_SIZE": 32}}
    files = checkpoint.snapshot(state, {"classes": ["a", "b"], "config": values})
    checkpoint.write(tmp_path / "run" / "checkpoints", "step-0", files)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    argv = [str(tmp_path / "a.png"), "--resume", str(tmp_path / "run"), "--topk", "1"]
    remedy = "70.00 % top-1. That average is not taken: --ema takes it"
    for flags in ([], ["--ema"]):
        assert predict.main([*argv, *flags]) == 0
        assert (remedy in capsys.readouterr().err) == (not flags)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ((), 2, "name the weights"),
        (("--model", "dat_tinyy", "--pretrained", "x"), 2, "timm does not know"),
        (("--pretrained", "absent.pth"), 4, "does not exist"),
        (("--resume", "absent"), 4, "neither a run"),
        (("--resume", "run", "--cfg", "a.yaml"), 2, "has its own configuration; remove --cfg"),
        (("--resume", "run", "--model", "resnet18"), 2, "remove --model"),
        (("--pretrained", "w.pth", "--cfg", "a.yaml", "--ema"), 2, "--ema belongs to --resume"),
    ],
)
def test_weights_that_cannot_be_had_are_refused(tmp_path, capsys, argv, code, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert predict.main([str(tmp_path / "a.png"), *argv]) == code
    assert message in capsys.readouterr().err


def test_a_folder_whose_labels_do_not_fit_is_refused(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = {"architecture": "dat_micro", "num_classes": 3, "label_names": ["a", "b"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    command = [str(tmp_path / "a.png"), "--pretrained", str(tmp_path)]
    assert predict.main(command) == 4
    assert "2 label_names for 3 classes" in capsys.readouterr().err
    assert predict.main([*command, "--cfg", "a.yaml"]) == 2
    assert "has its own configuration" in capsys.readouterr().err


# --- Pictures -------------------------------------------------------------------------------------


def test_pictures_come_from_files_folders_globs_and_stdin(tmp_path, monkeypatch):
    other = ("deep/notes.txt", "@eaDir/d.png")  # a disk station's thumbnails
    for name in ("b.png", "a.jpg", "deep/c.JPEG", "e.gif", ".hidden/d.png", *other):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*paths):
        return [f.removeprefix(f"{tmp_path}/") for f in predict.list_pictures(map(str, paths))]

    assert names(tmp_path) == ["a.jpg", "b.png", "deep/c.JPEG", "e.gif"]
    assert names(tmp_path / "*.png", tmp_path) == ["b.png", "a.jpg", "deep/c.JPEG", "e.gif"]
    assert names(tmp_path / "**" / "*.JPEG") == ["deep/c.JPEG"]
    assert names(tmp_path / "de*") == ["deep/c.JPEG"], "folders are listed"
    listed = (
        f"{tmp_path}/deep/c.JPEG\n\r\n{tmp_path}/x y.png\r\n{tmp_path}/".encode() + b"\xff.png\n"
    )
    stdin = io.TextIOWrapper(io.BytesIO(listed), "utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", stdin)
    assert names("-", tmp_path / "b.png") == ["deep/c.JPEG", "x y.png", "\udcff.png", "b.png"]
    with pytest.raises(DataError, match=r"\*\.bmp: matches no file"):
        names(tmp_path / "b.png", tmp_path / "*.bmp")


def test_linked_folders_are_followed_and_what_is_ignored_is_counted(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    folder = tmp_path / "pictures"
    Image.new("RGB", (8, 8)).save(folder / "deep" / "photo", "PNG")
    for file in (folder / "a.png", tmp_path / "elsewhere" / "b.png", folder / "deep" / "c.png"):
        file.touch()
    for name in ("notes.txt", "more.TXT", "readme", ".hidden"):
        (folder / name).touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "loop").symlink_to(folder)
    classifier.log_to_stderr()
    files = predict.list_pictures([str(folder)])
    names = ["a.png", "deep/c.png", "deep/photo", "link/b.png"]
    assert files == [str(folder / name) for name in names]
    ignored = "4 other files ignored (.txt 2, hidden or system 1, no suffix 1)"
    assert f"{folder}: 4 pictures, {ignored}" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_exif_rotations_that_are_ignored_are_counted(run, tmp_path, capsys, workers):
    exif = Image.Exif()
    for number in range(1, 9):
        exif[ExifTags.Base.Orientation] = number
        Image.new("RGB", (8, 6)).save(tmp_path / f"{number}.jpg", exif=exif)
    Image.new("RGB", (8, 6)).save(tmp_path / "none.png")
    argv = [str(tmp_path), "--resume", str(run[0]), "--workers", str(workers)]
    assert predict.main(argv) == 0
    hint = (
        "EXIF rotations are ignored, as in training, in 7 of 9 pictures: `--opts DATA.EXIF apply`"
    )
    assert hint in capsys.readouterr().err
    assert predict.main([*argv, "--opts", "DATA.EXIF", "apply"]) == 0
    assert "EXIF" not in capsys.readouterr().err


def test_no_picture_is_an_error(tmp_path, capsys):
    assert predict.main([str(tmp_path), "--model", "test_resnet"]) == 2
    assert "no picture in" in capsys.readouterr().err


def huge_png() -> bytes:
    """A PNG that says it has 30,000 × 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    crc = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc


def test_unreadable_pictures_are_named_counted_and_left_out(run, tmp_path, capsys):
    path, _, _ = run
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    Image.new("RGB", (30_000, 8)).save(folder / "wide.png")
    (folder / "huge.png").write_bytes(huge_png())
    (folder / "text.jpg").write_text("no picture")
    absent = tmp_path / "absent.jpg"
    rows = predictions(tmp_path, folder, absent, "--resume", path)
    names = [row["file"].rpartition("/")[2] for row in csv.DictReader(io.StringIO(rows))]
    assert names == ["tiny.png", "wide.png"]
    err = capsys.readouterr().err
    for name in ("huge.png", "text.jpg", "absent.jpg"):
        assert f"{name} cannot be read" in err
    assert "3 of 5 pictures cannot be read" in err


def test_the_exit_code_is_3_only_if_no_picture_can_be_read(run, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no picture")
    assert predict.main([str(tmp_path / "text.jpg"), "--resume", str(run[0])]) == 3
    assert "none of the 1 pictures can be read" in capsys.readouterr().err


# --- Output ---------------------------------------------------------------------------------------


def test_json_lines_hold_what_the_csv_holds(run, tmp_path):
    path, images, _ = run
    argv = (images / "val" / "class_0", "--resume", path, "--topk", "2")
    rows = list(csv.DictReader(io.StringIO(predictions(tmp_path, *argv))))
    lines = predictions(tmp_path, *argv, out="out.jsonl").splitlines()
    assert list(rows[0]) == ["file", "c1", "p1", "c2", "p2", "entropy", "name1", "name2"]
    for row, record in zip(rows, map(json.loads, lines), strict=True):
        assert list(record) == list(row)
        texts = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in record.items()}
        assert texts == row


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_rows_are_written_as_they_come(tmp_path, name):
    rows = ({"file": f"{n}.jpg", "c1": 1, "p1": 0.25} for n in range(50_000))
    tracemalloc.start()
    predict.write(tmp_path / name, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000 < (tmp_path / name).stat().st_size


def test_names_with_carriage_returns_leave_a_csv_readable(tmp_path):
    predict.write(tmp_path / "out.csv", iter([{"file": "cat\r/a.jpg", "c1": 1}]))
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"file": r"cat\x0d/a.jpg", "c1": "1"}]


def test_names_come_from_the_run_or_a_file_of_the_right_length(run, tmp_path, capsys):
    path, images, _ = run
    argv = [str(images / "val" / "class_0"), "--resume", str(path), "--topk", "1"]
    assert predict.main(argv) == 0
    assert "  class_" in capsys.readouterr().out
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    assert predict.main([*argv, "--names", str(names)]) == 3
    assert "3 names, the model has 4 classes" in capsys.readouterr().err
    names.write_text("ant\nbee\ncat\ndog\n")
    assert predict.main([*argv, "--names", str(names)]) == 0
    assert capsys.readouterr().out.split("  ")[1].split()[0] in ("ant", "bee", "cat", "dog")


def test_wordnet_names_need_no_network():
    wnids = ["n01440764", "n02123045"]
    assert classifier.choose_names(wnids, None, "lemma") == [
        "tench, Tinca tinca",
        "tabby, tabby cat",
    ]
    assert classifier.choose_names(wnids, None, "definition")[1].startswith("tabby, tabby cat: ")
    assert classifier.choose_names(wnids, None, "wnid") == wnids
    assert classifier.choose_names(["cat"], None, "lemma") == ["cat"]


def test_places_that_cannot_be_written_are_refused_before_the_work(
    run, tmp_path, capsys, monkeypatch
):
    path, images, _ = run
    argv = [str(images / "val"), "--resume", str(path)]
    monkeypatch.delattr(predict, "predict")
    assert predict.main([*argv, "--out", str(tmp_path / "x.txt")]) == 2
    assert predict.main([*argv, "--out", str(tmp_path / "absent" / "x.csv")]) == 6
    shutil.copy(images / "val" / "class_0" / "000.jpg", tmp_path / "file.csv")
    assert predict.main([*argv, "--out", str(tmp_path / "file.csv" / "x.csv")]) == 6
    assert "no such folder" in capsys.readouterr().err
