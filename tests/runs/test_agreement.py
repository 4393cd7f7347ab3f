"""Processes of a run agree on settings, code, data and state, or the run ends on all of them, with what differs.

Two or three processes by hand, as on several machines: each with arguments, folders and memory of its own.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers.ranks import add_arguments, change_answer, flip_bit, lose_file_handle, work_in
from helpers.runs import SMALL, arguments, held, outcome, run_group, run_of

from engine import agreement, checkpoint
from engine.run_dir import RunDir
from utils.distributed import Process

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory) -> Path:
    """The folder of a run on two processes that share it."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run_group(2, arguments(folder, images)) == [0, 0]
    return folder


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.list_checkpoints(run_of(folder) / "checkpoints"))


def own(*more: str, rank: int = 1) -> functools.partial:
    return functools.partial(add_arguments, rank, more)


def output(folder: Path, rank: int) -> str:
    return (folder / f"log-{rank}").read_text()


def refused(folder: Path, images: Path, code: int, *words: str, hooks, more=(), processes=2):
    """Every process ends with `code` and a sentence with `words`; `hooks` may add keys to the arguments."""
    argv = arguments(folder, images, "--opts", *more)
    codes = run_group(processes, argv, hooks=hooks, log=folder / "log")
    texts = [output(folder, rank) for rank in range(processes)]
    assert codes == [code] * processes, texts
    for text in texts:
        assert "Traceback" not in text
        assert not [word for word in words if word not in text], text


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (own("SEED=3"), "SEED is 0 on rank 0 and 3 on rank 1"),
        (own("TRAIN.BASE_LR=0.02", rank=0), "TRAIN.BASE_LR is 0.02 on rank 0 and 0.01 on rank 1"),
        (own("MODEL.ARGS.stages=[L,S,D,L]"), "MODEL.ARGS.stages is"),
        (own("--eval"), "the command is train on rank 0 and eval on rank 1"),
        (own("DEVICE=cuda"), "DEVICE is cuda, but"),
        (own("NO.SUCH_KEY=1"), "NO.SUCH_KEY: unknown key"),
        (own("NO.SUCH_KEY=1", rank=0), "NO.SUCH_KEY: unknown key"),
        (own("MODEL.NAME=nonsense"), "nonsense"),
        (functools.partial(change_answer, 1, "revision", "abcdef"), "revision is"),
        (functools.partial(change_answer, 1, "hash_sources", "abcdef"), "the hash of the sources"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_or_code_on_one_rank_are_refused_on_all(hook, words, images, tmp_path):
    refused(tmp_path, images, 2, words, hooks=[hook])
    assert not run_of(tmp_path).exists()


@pytest.mark.slow
def test_paths_and_workers_may_be_a_machine_s_own(images, unbroken, tmp_path):
    """Also the revision where one machine has no git: the sources are the same."""
    copy, elsewhere = shutil.copytree(images, tmp_path / "copy"), tmp_path / "elsewhere"
    hooks = [
        own("DATA.NUM_WORKERS=1", "--data-path", str(copy), "--output", str(elsewhere)),
        functools.partial(change_answer, 1, "revision", "sources-0123456789ab"),
    ]
    assert run_group(2, arguments(tmp_path, images, "--opts"), hooks=hooks) == [0, 0]
    assert outcome(tmp_path) == outcome(unbroken)
    assert run_of(elsewhere).is_dir(), "the folder for what rank 1 writes"


# --- Data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "order", "absent"])
def test_other_data_on_one_rank_are_refused_on_all(split, images, tmp_path):
    copy, hook = tmp_path / "copy", []
    if split != "absent":
        shutil.copytree(images, copy, ignore=shutil.ignore_patterns(".*"))
    if split == "order":
        names = [f"class_{n}" for n in (0, 2, 1, 3)]
        (tmp_path / "classes.txt").write_text("\n".join(names))
        hook = [own("--data-path", str(copy), "--opts", f"DATA.CLASS_LIST={tmp_path}/classes.txt")]
        words = "class 1 is class_1 on rank 0 and class_2 on rank 1"
    elif split == "absent":
        words = f"{copy}: no such folder"
    else:
        (copy / split / "class_3" / "001.jpg").unlink()
        count = {"train": 51, "val": 12}[split]
        words = f"{split} is {count + 1} images, "
    hook = hook or [own("--data-path", str(copy))]
    refused(tmp_path, images, 3, words, "rank 1" if split != "absent" else "", hooks=hook)
    assert not steps_of(tmp_path)


def test_another_teacher_on_one_rank_is_refused_on_all(images, tmp_path):
    hooks = []
    for rank in (0, 1):
        folder = tmp_path / f"machine{rank}"
        folder.mkdir()
        torch.manual_seed(rank)
        weights = timm.create_model("test_resnet", num_classes=4).state_dict()
        safetensors.torch.save_file(weights, folder / "teacher.safetensors")
        hooks.append(functools.partial(work_in, rank, folder))
    teacher = "DISTILL.TEACHER_PATH=teacher.safetensors", "DISTILL.TEACHER_MODEL=test_resnet"
    refused(tmp_path, images, 2, "the teacher's SHA-256 is", "rank 1", hooks=hooks, more=teacher)
    assert not steps_of(tmp_path)


# --- Folders that are not shared ------------------------------------------------------------------


@pytest.fixture
def stopped(unbroken, tmp_path) -> Path:
    """A copy of the run as a kill after its third step leaves it."""
    shutil.copytree(run_of(unbroken), run_of(tmp_path))
    shutil.rmtree(run_of(tmp_path) / "checkpoints" / "step-4")
    return tmp_path


@pytest.mark.parametrize(
    "theirs",
    [
        "nothing",
        "an older step",
        pytest.param("another run", marks=SLOW),
        pytest.param("a stale handle", marks=SLOW),
    ],
)
def test_resumed_from_rank_0_whatever_the_others_see(theirs, stopped, unbroken, images):
    other = stopped / "other"
    hooks = [own("--output", str(other))]
    if theirs == "an older step":
        shutil.copytree(run_of(stopped), run_of(other))
        shutil.rmtree(run_of(other) / "checkpoints" / "step-3")
    elif theirs == "another run":
        other.mkdir()
        assert run_group(1, arguments(other, images, "--opts", "SEED=5")) == [0]
    elif theirs == "a stale handle":
        hooks = [functools.partial(lose_file_handle, 1, "model.safetensors")]
    codes = run_group(2, arguments(stopped, images), hooks=hooks, log=stopped / "log")
    assert codes == [0, 0]
    assert "step-3: epoch 1, step 3" in output(stopped, 0)
    assert outcome(stopped) == outcome(unbroken)


def test_weights_to_start_from_are_read_by_rank_0(unbroken, images, tmp_path):
    """Nothing else is there on the other machine."""
    file = run_of(unbroken) / "checkpoints" / "step-4" / "model.safetensors"
    argv = [*arguments(tmp_path, images), "--pretrained", str(file), "--opts", "TRAIN.EPOCHS=1"]
    hook = own("--pretrained", "absent.pth", "--output", str(tmp_path / "other"))
    argv += ["TRAIN.WARMUP_EPOCHS=0"]
    assert run_group(2, argv, hooks=[hook], log=tmp_path / "log") == [0, 0]


def test_evaluation_is_of_rank_0_s_checkpoint(unbroken, images, tmp_path):
    """Where the other machine holds an older copy of the run, and where it holds none."""
    shutil.copytree(run_of(unbroken), run_of(tmp_path))
    for step in ("step-2", "step-3", "step-4"):
        shutil.rmtree(run_of(tmp_path) / "checkpoints" / step)
    records = []
    for theirs in (unbroken, tmp_path, tmp_path / "none"):
        argv = arguments(tmp_path, images, "--eval", "--resume", str(run_of(unbroken)))
        hooks = [own("--resume", str(run_of(theirs)))]
        assert run_group(2, argv, hooks=hooks, log=tmp_path / "log") == [0, 0]
        records.append(output(tmp_path, 0).splitlines()[-1])
    assert json.loads(records[0])["model"]["images"] == 13
    assert records == [records[0]] * 3


def test_evaluation_needs_the_same_images(unbroken, images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    (copy / "val" / "class_3" / "001.jpg").unlink()
    more = "--eval", "--resume", str(run_of(unbroken))
    hooks = [own("--data-path", str(copy))]
    refused(tmp_path, images, 3, "val is 13 images", "12 images", hooks=hooks, more=more)


# --- Replicas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "hit", "processes"),
    [
        ("weights", 1, 2),
        ("EMA", 1, 3),
        pytest.param("weights", 0, 3, marks=SLOW),
        pytest.param("moments", 0, 2, marks=SLOW),
    ],
)
def test_a_flipped_bit_ends_the_run_before_anything_is_saved(
    part, hit, processes, images, tmp_path
):
    hooks = [functools.partial(flip_bit, hit, part, 2, 3)]
    words = [f"The {part} of", "Nothing was saved", f"rank {hit} ("]
    if processes == 3:
        words.append(f"of rank {hit} are corrupt")
    refused(tmp_path, images, 4, *words, hooks=hooks, processes=processes)
    assert steps_of(tmp_path) == ["step-1"]
    status = json.loads((run_of(tmp_path) / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)


def test_with_other_processors_the_ema_of_rank_0_counts(unbroken, images, tmp_path):
    hooks = [
        functools.partial(change_answer, 1, "device_name", "another processor"),
        functools.partial(flip_bit, 1, "EMA", 2, 30),
    ]
    argv = arguments(tmp_path, images)
    assert run_group(2, argv, hooks=hooks, log=tmp_path / "log") == [0, 0]
    assert "another processor on rank 1" in output(tmp_path, 0)
    assert "the EMA is taken from rank 0" in output(tmp_path, 0)
    assert outcome(tmp_path) == outcome(unbroken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (7, 1500), (0,)])
def test_every_flipped_bit_changes_the_hash(dtype, shape):
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(dtype)
    others = [torch.zeros(3), torch.randn(5000)[1:]]  # the last one's memory begins at an odd place
    right = agreement.hash_tensors([*others, tensor])
    data = tensor.flatten().view(torch.uint8)
    places = range(0, len(data), max(1, len(data) // 50))
    for place in places:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert agreement.hash_tensors([*others, tensor]) != right
            data[place] ^= 1 << bit
    assert agreement.hash_tensors([*others, tensor]) == right


def test_ranks_in_words():
    assert agreement.name_ranks([1]) == "rank 1"
    assert agreement.name_ranks([0, 1]) == "ranks 0-1"
    assert agreement.name_ranks([3, 7, 5, 4]) == "ranks 3-5, 7"


# --- A refused run --------------------------------------------------------------------------------


def test_no_process_of_a_refused_run_writes_into_the_status_of_the_living_one(images, tmp_path):
    with held(run_of(tmp_path)) as holder:
        before = (run_of(tmp_path) / "status.json").read_text()
        refused(tmp_path, images, 6, f"process {holder}", "--tag", hooks=[])
        assert (run_of(tmp_path) / "status.json").read_text() == before


def test_a_process_whose_run_has_lost_the_lock_writes_no_status(tmp_path):
    """Its main process was killed, another run took the folder, and only then did it notice."""
    with RunDir(tmp_path, Process(0, 1, torch.device("cpu"))).lock() as living:
        late = RunDir(tmp_path, Process(1, 2, torch.device("cpu")))
        for name, state in (("process 1 of before", "running"), (living._holder, "failed")):
            late._holder = name
            late.write_status("failed", exit_code=1)
            assert json.loads((tmp_path / "status.json").read_text())["state"] == state


assert "SAVE_STEPS: 1" in SMALL  # what the tests of flipped bits count on
