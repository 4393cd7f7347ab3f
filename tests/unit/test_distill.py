"""Distillation: DeiT's formulas, what the teacher sees, and teachers that are refused."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from helpers.states import make_optimizer
from timm.models import save_for_hf

from engine import checkpoint
from engine.distill import Colours, Distillation, Teacher, fingerprint, load_teacher
from engine.state import TrainState
from utils.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat", "dog"]
GREY = Colours([0.5] * 3, [0.25] * 3)
IMAGENET = Colours([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def micro(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("dat_micro", num_classes=4)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of dat_micro with one checkpoint."""
    model = micro(seed=3)
    state = TrainState(
        model, None, make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False), step=2
    )
    settings = {
        "MODEL": {"NAME": "dat_micro", "ARGS": {}},
        "DATA": {"IMG_SIZE": 32, "MEAN": GREY.mean, "STD": GREY.std},
    }
    files = checkpoint.snapshot(state, {"classes": CLASSES, "config": settings})
    checkpoint.write(tmp_path / "run" / "checkpoints", "step-2", files)
    return tmp_path / "run"


# --- Loss -----------------------------------------------------------------------------------------


def distillation(**settings) -> Distillation:
    return Distillation(Teacher(micro(), GREY, None), GREY, **settings)


def test_hard_is_formula_3_and_soft_formula_2():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.arange(5) % 4
    loss = F.cross_entropy(student, labels)
    hard = distillation(type="hard", alpha=0.5, tau=1.0)(loss, student, teacher)
    picked = -student.log_softmax(1)[torch.arange(5), teacher.argmax(1)].mean()
    torch.testing.assert_close(hard, 0.5 * loss + 0.5 * picked)
    soft = distillation(type="soft", alpha=0.1, tau=3.0)(loss, student, teacher)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft, 0.9 * loss + 0.1 * 9 * divergence)
    same = distillation(type="soft", alpha=0.1, tau=3.0)(loss, student, student)
    torch.testing.assert_close(same, 0.9 * loss)


def test_the_teacher_sees_the_images_in_its_own_colours_and_size_and_learns_nothing():
    pixels = torch.rand(2, 3, 32, 32)
    images, expected = (
        (pixels - torch.tensor(c.mean).view(-1, 1, 1)) / torch.tensor(c.std).view(-1, 1, 1)
        for c in (IMAGENET, GREY)
    )
    seen = []
    model = micro()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    settings = {"type": "hard", "alpha": 0.5, "tau": 1.0}
    logits = Distillation(Teacher(model.train(), GREY, None), IMAGENET, **settings).logits(images)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)
    assert torch.equal(logits, model.eval()(seen[0]))
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    Distillation(Teacher(model, GREY, (48, 40)), IMAGENET, **settings).logits(images)
    assert seen[-1].shape[2:] == (48, 40)


# --- Teachers -------------------------------------------------------------------------------------


def test_a_run_and_a_file_are_teachers(run, tmp_path):
    teacher = load_teacher(run, "", CLASSES, CPU)
    assert teacher.colours == GREY
    assert teacher.img_size is None
    assert torch.equal(teacher.model.head.fc.weight, micro(seed=3).head.fc.weight)
    step = run / "checkpoints" / "step-2"
    assert fingerprint(run) == fingerprint(step) == fingerprint(step / "model.safetensors")

    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=4)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    teacher = load_teacher(tmp_path / "vit.safetensors", "test_vit", CLASSES, CPU)
    assert torch.equal(teacher.model.head.weight, vit.head.weight)
    assert teacher.img_size == (160, 160)
    assert list(teacher.colours.mean) == list(vit.pretrained_cfg["mean"])


def test_a_hugging_face_folder_is_a_teacher(tmp_path):
    model = micro(seed=3)
    settings = {"mean": GREY.mean, "std": GREY.std, "input_size": (3, 32, 32)}
    config = {"label_names": CLASSES}
    save_for_hf(
        model,
        tmp_path,
        model_config=config,
        model_args={"img_size": 32, "num_classes": 4},
        safe_serialization=True,
        data_config=settings,
    )
    teacher = load_teacher(tmp_path, "", CLASSES, CPU)
    assert (list(teacher.colours.mean), teacher.img_size) == (list(GREY.mean), None)
    assert torch.equal(teacher.model.head.fc.weight, model.head.fc.weight)
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="in another order"):
        load_teacher(tmp_path, "", CLASSES[::-1], CPU)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["ant", "bee"], "the teacher has besides cat, dog"),
        ([*CLASSES[:3], "eel"], "the teacher lacks eel and has besides dog"),
        (CLASSES[::-1], "has them in another order. Name that order with DATA.CLASS_LIST"),
    ],
)
def test_a_run_of_other_classes_is_refused(run, classes, message):
    with pytest.raises(CheckpointError) as caught:
        load_teacher(run, "", classes, CPU)
    assert message in str(caught.value)
    assert str(run) in str(caught.value)


def test_a_file_of_other_classes_without_a_model_or_missing_is_refused(run, tmp_path):
    file = run / "checkpoints" / "step-2" / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"is dat_micro with 4 .* does not fit .* 3 classes"):
        load_teacher(file, "dat_micro", CLASSES[:3], CPU)
    with pytest.raises(ConfigError, match=r"DISTILL.TEACHER_MODEL dat_micro: .*; leave it out"):
        load_teacher(run, "dat_micro", CLASSES, CPU)
    with pytest.raises(ConfigError, match=r"name its model with DISTILL.TEACHER_MODEL"):
        load_teacher(file, "", CLASSES, CPU)
    with pytest.raises(ConfigError, match="no model 'dat_mikro'; did you mean 'dat_micro'"):
        load_teacher(file, "dat_mikro", CLASSES, CPU)
    with pytest.raises(CheckpointError, match=r"DISTILL.TEACHER_PATH .*nowhere: No such file"):
        fingerprint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run"):
        fingerprint(tmp_path)
