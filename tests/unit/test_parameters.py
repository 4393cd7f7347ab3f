"""Parameters by name: what is frozen needs no memory and stays, learning rates by layer and name, wrong names."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.states import make_optimizer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import models  # noqa: F401  registers the variants
from engine.checkpoint import snapshot
from engine.parameters import freeze, learning_rate_scales, match_names
from engine.state import TrainState
from utils.errors import ConfigError


def micro(name: str = "dat_micro") -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    F.cross_entropy(model(images), labels).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    optimizer.step()


# --- Patterns -------------------------------------------------------------------------------------


def test_a_pattern_means_parameters_and_what_is_inside_of_modules():
    names = ["stem.0.weight", "stages.1.q.weight", "stages.1.q.bias", "stages.10.q.bias"]
    assert match_names(names, "stages.1") == set(names[1:3])
    assert match_names(names, "*.q") == set(names[1:])
    assert match_names(names, "*.bias") == set(names[2:])
    assert match_names(names, "stem.0.weight") == {names[0]}
    assert match_names(names, "q") == set()


# --- Freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dat_micro", "dat_pp_micro", "test_resnet"])
def test_what_is_frozen_stays_and_the_others_have_the_same_gradients(name):
    frozen, free = micro(name), micro(name)
    freeze(frozen, "*,!layer4,!fc" if name == "test_resnet" else "*,!stages.3,!head")
    for (
        n,
        module,
    ) in free.named_modules():  # a frozen BatchNorm normalises by its running statistics
        if isinstance(module, torch.nn.BatchNorm2d) and not n.startswith("layer4"):
            module.eval()
    before = copy.deepcopy(frozen.state_dict())
    optimizers = [make_optimizer(model) for model in (frozen, free)]
    for model, optimizer in zip((frozen, free), optimizers, strict=True):
        train_step(model, optimizer)
    others = dict(free.named_parameters())
    trained = {n for n, p in frozen.named_parameters() if p.requires_grad}
    assert trained
    for n, p in frozen.named_parameters():
        assert n in trained or torch.equal(p, before[n]), n
        assert (p.grad is None) == (n not in trained)
        assert (p in optimizers[0].state) == (n in trained)
        assert n not in trained or torch.equal(p.grad, others[n].grad), n


def test_statistics_of_frozen_batchnorm_stay_also_after_an_evaluation():
    model = micro("test_resnet")
    freeze(model, "*,!fc,!layer4")
    model = copy.deepcopy(model)  # as an average of the weights is made
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        model.train()
        model(torch.randn(4, 3, 32, 32))
        model.eval()
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved
    assert all((n.startswith("layer4") and "running" in n) or "num_batches" in n for n in moved)


def test_checkpoints_lack_the_state_of_what_is_frozen_and_their_size_is_foreseen():
    model = micro()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sizes = {}
    for patterns in ("", "*,!head"):
        if patterns:
            freeze(model, patterns)
        optimizer = make_optimizer(model)
        train_step(model, optimizer)
        state = TrainState(model, ModelEmaV3(model), optimizer, scaler)
        files = snapshot(state, {})
        sizes[patterns] = sum(map(len, files.values()))
        tensors = state.num_bytes()
        assert tensors < sizes[patterns] < 1.1 * tensors
        model.zero_grad(set_to_none=True)
    assert sizes["*,!head"] < 0.52 * sizes[""]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("stem,stage.0", "no parameter of the model matches 'stage.0'; did you mean 'stages.0'?"),
        ("*", "'*' freezes every parameter of the model"),
        ("stem,head,stages,norm", "freezes every parameter of the model; leave it empty"),
        ("head,!head", "'head,!head' freezes nothing of the model"),
        ("!head", "'!head' freezes nothing of the model"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(patterns, message):
    with pytest.raises(ConfigError) as caught:
        freeze(micro(), patterns)
    assert message in str(caught.value)


# --- Learning-rate scales -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dat_micro", "swin_tiny_patch4_window7_224"])
def test_layers_have_timms_scales(name):
    model = timm.create_model(name, num_classes=4)
    reference = create_optimizer_v2(model, opt="adamw", layer_decay=0.75)
    scales = learning_rate_scales(model, 0.75, [])
    names = {parameter: n for n, parameter in model.named_parameters()}
    for group in reference.param_groups:
        for parameter in group["params"]:
            assert scales[names[parameter]] == group["lr_scale"]
    assert len(set(scales.values())) > 5


def test_scales_by_name_multiply_and_reach_the_optimizer():
    model = micro()
    scales = learning_rate_scales(model, 0.5, [("*.positions", 0.1), ("stages.3", 2.0)])
    plain = learning_rate_scales(model, 0.5, [])
    for n, scale in scales.items():
        expected = plain[n] * (0.1 if ".positions." in n else 1.0)
        expected *= 2.0 if n.startswith("stages.3") else 1.0
        assert scale == expected
    assert learning_rate_scales(model, 1.0, [])["stem.0.weight"] == 1.0
    with pytest.raises(ConfigError, match=r"LR_SCALES: no parameter of the model matches 'off"):
        learning_rate_scales(model, 1.0, [("offsets", 0.1)])
    freeze(model, "*,!head")
    with pytest.raises(
        ConfigError, match=r"all that 'stages\.3' matches is frozen by TRAIN\.FREEZE"
    ):
        learning_rate_scales(model, 1.0, [("stages.3", 0.1)])
