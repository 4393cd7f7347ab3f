"""What timm's own model tests ask of a model, asked of every variant; export, compilation, copies.

pytest tests/unit/test_timm_contract.py
"""

import copy
import math
import pickle

import pytest
import timm
import torch
from helpers.variants import thin
from timm.models import FeatureGraphNet, group_modules, group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from models.dat import VARIANTS

EACH = pytest.mark.parametrize("name", VARIANTS)
PLUS_PLUS = {"plus_plus": True, "offset_strides": (4, 2, 1, 1)}
# All mixers of the papers in a block each.
SMALL = {
    "dat": {"stages": ("L", "S", "D", "D")},
    "dat++": {"stages": ("N", "D", "N", "D"), **PLUS_PLUS},
}
BOTH = pytest.mark.parametrize("architecture", SMALL.values(), ids=SMALL)


def small(architecture: dict, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dat_micro", **architecture, **kwargs).eval()


def on_meta(name: str, **kwargs) -> tuple[nn.Module, Tensor]:
    """The variant as it is and an image of its size, without their values."""
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs).eval()
        return model, torch.empty(1, *model.pretrained_cfg["input_size"])


def cells(size: tuple[int, int], reduction: int) -> tuple[int, int]:
    return tuple(math.ceil(extent / reduction) for extent in size)


# --------------------------------------------------------------------------- forward and backward


@EACH
def test_every_parameter_has_a_gradient(name):
    model = thin(name, num_classes=7).train()
    logits = model(torch.randn(2, 3, 72, 56))
    logits.square().mean().backward()
    assert logits.shape == (2, 7)
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters())


@EACH
@pytest.mark.parametrize("size", [(1, 1), (31, 97)])
def test_any_size_on_every_variant(name, size):
    model = thin(name)
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [
        cells(size, info["reduction"]) for info in model.feature_info
    ]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("in_chans", [1, 4])
@BOTH
def test_other_channels(architecture, in_chans):
    model = small(architecture, in_chans=in_chans)
    assert model(torch.randn(1, in_chans, 32, 32)).shape == (1, 10)
    with pytest.raises(RuntimeError, match=f"to have {in_chans} channels, but got 3"):
        model(torch.randn(1, 3, 32, 32))


@BOTH
def test_dropout_rates_reach_the_layers(architecture):
    model = small(architecture, drop_rate=0.3, drop_path_rate=0.2).train()
    assert model.head.drop.p == 0.3
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.2 * i / (len(rates) - 1) for i in range(len(rates))])
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


# ------------------------------------------------------------------ settings, head, what is learned


@EACH
def test_default_cfg_describes_the_model(name):
    model, image = on_meta(name)
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert cfg["classifier"] + ".weight" in state
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert state[cfg["first_conv"] + ".weight"].shape[1] == 3
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.num_classes == cfg["num_classes"]

    features = model.forward_features(image)
    assert model.output_fmt == "NHWC"
    assert features.shape == (1, *cfg["pool_size"], model.num_features)
    assert model.forward_head(features).shape == (1, cfg["num_classes"])
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.num_features) == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.forward_head(features).shape == pooled.shape
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape


@BOTH
def test_the_head_is_what_was_asked_for(architecture):
    images = torch.randn(2, 3, 32, 32)
    model = small(architecture)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(
        model.get_classifier()(model.forward_head(features, pre_logits=True)), model(images)
    )
    created = small(architecture, num_classes=0, global_pool="")
    created.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(created(images), features)
    model.reset_classifier(0, "max")
    assert (model.num_classes, model.global_pool) == (0, "max")
    assert torch.equal(model(images), features.amax((1, 2)))
    model.reset_classifier(4)
    assert (model.num_classes, model.global_pool) == (4, "max")
    assert model(images).shape == (2, 4)
    model.reset_classifier(4, "catavgmax")
    pooled = model.forward_head(features, pre_logits=True)
    assert model.head_hidden_size == pooled.shape[1] == 2 * model.num_features


@EACH
def test_groups_for_layer_decay_hold_everything_once(name):
    model, _ = on_meta(name)
    parameters = [n for n, _ in model.named_parameters()]
    modules = {n for n, m in model.named_modules() if m._parameters}
    for coarse in (False, True):
        matcher = model.group_matcher(coarse=coarse)
        groups = group_parameters(model, matcher)
        assert sorted(n for group in groups.values() for n in group) == sorted(parameters)
        assert {n for group in group_modules(model, matcher).values() for n in group} == modules
        depth = {n: layer for layer, group in groups.items() for n in group}
        stages = [n for n in parameters if n.startswith("stages")]
        assert [depth[n] for n in stages] == sorted(depth[n] for n in stages)
        assert depth["stem.0.weight"] == 0
        assert depth["head.fc.weight"] == max(depth.values())
        blocks = [len(stage.blocks) for stage in model.stages]
        assert max(depth.values()) == 1 + (len(blocks) if coarse else sum(blocks))


@BOTH
def test_timms_optimizer_knows_layers_and_what_is_not_decayed(architecture):
    model = small(architecture)
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    settings = {n: groups[id(p)] for n, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(settings)
    free = {n for n, group in settings.items() if group["weight_decay"] == 0}
    assert free == {
        n
        for n, p in model.named_parameters()
        if p.ndim == 1 or n.endswith(("bias_table", "rpe_table"))
    }
    scales = [settings[n]["lr_scale"] for n in ("stem.0.weight", "norm.weight", "head.fc.weight")]
    assert scales == [0.5**5, 0.5, 1]


@BOTH
def test_checkpointing_computes_the_blocks_again(architecture):
    model = small(architecture)
    blocks = [block for stage in model.stages for block in stage.blocks]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, times in ((True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        model(torch.randn(1, 3, 32, 32)).sum().backward()
        assert len(calls) == times * len(blocks)


# --------------------------------------------------------------------------------------- features


@EACH
def test_features_are_what_feature_info_says(name):
    model = thin(name, features_only=True)
    size = (96, 64)
    maps = model(torch.randn(1, 3, *size))
    info = model.feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    assert [tuple(m.shape[2:]) for m in maps] == [cells(size, r) for r in info.reduction()]
    assert info.module_name() == [f"stages.{i}" for i in range(4)]


@BOTH
def test_features_by_index(architecture):
    images = torch.randn(1, 3, 32, 48)
    everything = small(architecture, features_only=True)
    maps = everything(images)
    for indices, taken in (((0, 2), (0, 2)), ((-2, -1), (2, 3)), ((1,), (1,)), (2, (2, 3))):
        model = small(architecture, features_only=True, out_indices=indices)
        model.load_state_dict(everything.state_dict(), strict=False)
        assert all(torch.equal(a, maps[i]) for a, i in zip(model(images), taken, strict=True))
        assert model.feature_info.channels() == [maps[i].shape[1] for i in taken]
        assert len(model.model.stages) == max(taken) + 1  # what is never reached is dropped
    for indices in ((4,), (0, -5), 5):
        with pytest.raises(AssertionError, match=r"out of range \(\d to \d\)"):
            small(architecture, features_only=True, out_indices=indices)


@BOTH
def test_intermediates_in_every_form(architecture):
    images = torch.randn(2, 3, 40, 32)
    model = small(architecture)
    last, maps = model.forward_intermediates(images)
    assert torch.equal(last, model.forward_features(images))
    nhwc = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(maps, nhwc, strict=True))
    final, normed = model.forward_intermediates(images, indices=2, norm=True, output_fmt="NHWC")
    assert torch.equal(normed[0], nhwc[2])  # only the last map has a norm
    assert torch.equal(normed[1], final)
    model.stages[2].register_forward_hook(lambda *_: pytest.fail("it is not stopped early"))
    early = model.forward_intermediates(
        images, indices=[0, -3], stop_early=True, intermediates_only=True
    )
    assert all(torch.equal(a, b) for a, b in zip(early, maps[:2], strict=True))
    stopped, _ = model.forward_intermediates(images, indices=[0], stop_early=True)
    assert torch.equal(stopped, nhwc[0])  # the norm is for the last stage
    with pytest.raises(ValueError, match="it can be 'NCHW' or 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NLC")


@BOTH
def test_pruning_keeps_what_the_indices_need(architecture):
    images = torch.randn(1, 3, 32, 32)
    model = small(architecture)
    maps = model.forward_intermediates(images, intermediates_only=True)
    # The norm and the classifier are for the last stage, which goes.
    assert model.prune_intermediate_layers([0, -2], prune_head=False) == [0, 2]
    assert len(model.stages) == 3
    assert isinstance(model.norm, nn.Identity)
    assert model.num_classes == 0
    kept = model.forward_intermediates(images, indices=[0, 2], norm=True, intermediates_only=True)
    assert all(torch.equal(a, maps[i]) for a, i in zip(kept, (0, 2), strict=True))
    assert model.num_features == model.head_hidden_size == maps[2].shape[1]
    model.reset_classifier(4, "avg")
    assert model(images).shape == (1, 4)


# -------------------------------------------------------------------------------------- weights


@BOTH
@pytest.mark.parametrize(
    ("kwargs", "fresh"),
    [
        ({}, ()),
        ({"num_classes": 5}, ("head.fc.weight", "head.fc.bias")),
        ({"num_classes": 0}, ()),
        ({"in_chans": 1}, ("stem.0.weight",)),
        ({"in_chans": 6, "num_classes": 5}, ("stem.0.weight", "head.fc.weight", "head.fc.bias")),
    ],
)
def test_timm_loads_a_file_into_other_ends(architecture, kwargs, fresh, tmp_path):
    saved = small(architecture).state_dict()
    torch.save(saved, tmp_path / "dat.pth")
    overlay = {"file": str(tmp_path / "dat.pth")}
    model = timm.create_model(
        "dat_micro", pretrained=True, pretrained_cfg_overlay=overlay, **architecture, **kwargs
    )
    state = model.state_dict()
    assert {n for n, v in state.items() if not torch.equal(v, saved[n])} == set(fresh)
    if "in_chans" in kwargs:
        # As timm does it: a grey image is answered as before.
        torch.testing.assert_close(state["stem.0.weight"].sum(1), saved["stem.0.weight"].sum(1))


@BOTH
def test_timm_loads_a_file_for_features(architecture, tmp_path):
    model = small(architecture)
    torch.save(model.state_dict(), tmp_path / "dat.pth")
    backbone = small(
        architecture,
        features_only=True,
        out_indices=(1, 2),
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "dat.pth")},
    )
    images = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(images, [1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(backbone(images), expected, strict=True))


@BOTH
def test_copies_are_the_same_model(architecture):
    model = small(architecture)
    images = torch.randn(1, 3, 32, 32)
    expected = model(images)
    loaded = timm.create_model("dat_micro", **architecture).eval()
    loaded.load_state_dict(model.state_dict())
    ema = ModelEmaV3(model)
    ema.update(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, ema.module):
        assert torch.equal(other(images), expected)


# ---------------------------------------------------------------------- graphs of the model


@BOTH
def test_fx_features_and_gradients(architecture):
    images = torch.randn(2, 3, 32, 32)
    model = small(architecture)
    expected = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    graph = FeatureGraphNet(model, out_indices=(0, 1, 2, 3))
    maps = graph(images)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    maps[3].sum().backward()
    assert all(p.grad is not None for p in graph.parameters())


@pytest.mark.slow
@BOTH
def test_export_for_any_batch_of_one_size(architecture):
    model = small(architecture)
    batch = ({0: torch.export.Dim("batch", max=64)},)
    program = torch.export.export(model, (torch.randn(2, 3, 40, 32),), dynamic_shapes=batch)
    images = torch.randn(3, 3, 40, 32)
    torch.testing.assert_close(program.module()(images), model(images))
    with pytest.raises(AssertionError, match=r"size\(\)\[2\]|shape\[2\]"):  # what torch says
        program.module()(torch.randn(3, 3, 32, 32))


@BOTH
def test_compiled_in_one_graph(architecture):
    torch._dynamo.reset()
    model = small(architecture)
    images = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


@BOTH
@pytest.mark.filterwarnings("ignore")  # constants of the traced size, and jit's age
def test_traced_for_one_size(architecture, tmp_path):
    model = small(architecture)
    traced = torch.jit.trace(model, torch.randn(2, 3, 32, 32), check_trace=False)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(traced(images), model(images))
    traced.save(tmp_path / "dat.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "dat.pt")(images), model(images))


@pytest.mark.parametrize("kwargs", [{}, {"features_only": True}])
@pytest.mark.filterwarnings("ignore")  # jit's age
def test_scripting_is_refused(kwargs):
    model = timm.create_model("dat_micro", scriptable=True, **kwargs)
    with pytest.raises(NotImplementedError, match=r"cannot be scripted.*torch\.export"):
        torch.jit.script(model)
