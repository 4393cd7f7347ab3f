"""The models among other people's code: precisions, derivatives, graphs, exporters, replaced and pruned layers.

pytest tests/unit/test_other_code.py
"""

import copy
import io

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

from models.dat import MIXERS
from models.kernels import GridSample, SumRows, grid_sample_plainly, sum_rows

LETTERS = pytest.mark.parametrize("letter", MIXERS)
ALL = ("LN", "D", "SG", "CP")


def tiny(*stages: str, **kwargs) -> nn.Module:
    """A model of these stages with few channels; nothing in it is 0."""
    torch.manual_seed(0)
    count = len(stages)
    sizes = {"dims": (8, 16, 16, 16), "num_heads": (2, 2, 2, 4), "offset_groups": (1, 2, 2, 2)}
    sizes |= {"offset_kernels": (3,) * 4, "offset_strides": (1,) * 4, "sr_ratios": (2, 2, 2, 1)}
    sizes = {name: values[:count] for name, values in sizes.items()}
    args = {"stages": stages, "window_size": 3, **sizes, **kwargs}
    model = timm.create_model("dat_micro", **args).eval()
    for name, parameter in model.named_parameters():
        if "positions" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def images(batch: int = 2, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator).to(dtype)


# --- Precisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@LETTERS
def test_weights_of_every_precision(letter, dtype):
    model = tiny(letter, letter)
    x = images()
    with torch.no_grad():
        expected, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
        model, x = model.to(dtype), x.to(dtype)
        atol = 0.05 if dtype == torch.bfloat16 else 0.005
        for name, found, wanted in (
            ("forward", [model(x)], [expected]),
            ("maps", model.forward_intermediates(x, intermediates_only=True), maps),
        ):
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == dtype, name
                torch.testing.assert_close(one.float(), other, atol=atol, rtol=0.05)
        assert model.forward_features(x).dtype == dtype
        points = model.sampling_positions(x)
        assert len(points) == (2 if letter == "D" else 0)
        assert all(p.positions.dtype in (torch.float32, torch.float64) for p in points)
        features = timm.create_model("dat_micro", features_only=True).to(dtype)
        assert features(images(1, 32, dtype))[3].dtype == dtype


def test_half_precision_can_be_trained_and_exported():
    model = tiny("D", "C").to(torch.bfloat16)
    x = images(dtype=torch.bfloat16)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_another_default_precision_between_calls():
    """What is cached has the precision that it needs, whatever torch's default was when it was made."""
    x = images(1, 24)
    for letter in "SDC":
        model = tiny(letter)
        expected = model(x)
        other = images(1, 28)
        torch.set_default_dtype(torch.float64)
        try:
            model(other)
        finally:
            torch.set_default_dtype(torch.float32)
        assert model(other).dtype == torch.float32
        assert torch.equal(model(x), expected)


def test_layers_whose_output_is_float32_under_autocast():
    """As some quantised layers have; a kernel of ours takes the activation and the layer after it together."""
    model, x = tiny("L"), images()
    for block in (m for m in model.modules() if hasattr(m, "fc1")):
        block.fc1.register_forward_hook(lambda layer, inputs, output: output.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=0.05, rtol=0.1)


def test_fake_tensors_leave_nothing_behind():
    model, x = tiny("SN", "D", "C", "P"), images(2, 20)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(model(x), FakeTensor)
    expected = model(x)
    assert not isinstance(expected, FakeTensor)
    with torch.no_grad(), FakeTensorMode() as mode:
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        assert functional_call(model, fake, (mode.from_tensor(x),)).shape == expected.shape
    assert torch.equal(model(x), expected)


# --- Derivatives ----------------------------------------------------------------------------------


@LETTERS
def test_gradients_of_every_sample(letter):
    model, x = tiny(letter), images(3)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict, image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        alone = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for (name, found), expected in zip(together.items(), alone, strict=True):
            torch.testing.assert_close(found[i], expected, msg=lambda m, n=name: f"{n}: {m}")


@LETTERS
def test_derivatives_of_derivatives(letter):
    """By autograd, which cannot know that a second derivative will be asked for, and by torch.func."""
    model = tiny(letter, img_size=8).double()
    x, direction = images(1, 6, torch.float64), images(2, 6, torch.float64)[1:]

    def squares(x: Tensor) -> Tensor:
        return model(x).square().sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(squares(x), x, create_graph=True)
    (found,) = torch.autograd.grad((gradient * direction).sum(), x)
    by_func = grad(lambda x: (grad(squares)(x) * direction).sum())(x.detach())
    torch.testing.assert_close(found, by_func)
    moved = [grad(squares)(x.detach() + step * direction) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(found, (moved[0] - moved[1]) / 2e-6, rtol=1e-3, atol=1e-5)


@LETTERS
def test_forward_mode(letter):
    model, (x, direction) = tiny(letter), images(2)[:, None]
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(found, jvp(model, (x,), (direction,))[1])


def test_second_derivatives_of_the_kernels():
    torch.manual_seed(0)
    values = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    share = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(0, 5, (6, 4))
    assert torch.autograd.gradgradcheck(lambda v, s: SumRows.apply(v, rows, s)[0], (values, share))
    image = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(2, 2, 3, 2, dtype=torch.float64) * 2.4 - 1.2).requires_grad_()
    assert torch.autograd.gradgradcheck(GridSample.apply, (image, points), atol=1e-3)
    assert hessian(lambda v: v.square().sum())(values).shape == (5, 3, 5, 3)


def test_first_derivatives_are_those_of_torch_to_the_bit():
    torch.manual_seed(0)
    values, share, rows = torch.randn(50, 24), torch.rand(1000, 4), torch.randint(0, 50, (1000, 4))
    image, points = torch.randn(2, 3, 7, 9), torch.rand(2, 40, 20, 2) * 2.4 - 1.2

    def by_torch(image: Tensor, points: Tensor) -> Tensor:
        return nn.functional.grid_sample(image, points, align_corners=True)

    for own, torchs, inputs in (
        (
            lambda v, s: SumRows.apply(v, rows, s)[0],
            lambda v, s: sum_rows(v, rows, s),
            (values, share),
        ),
        (GridSample.apply, by_torch, (image, points)),
    ):
        results = []
        for function in (own, torchs):
            tensors = [tensor.clone().requires_grad_() for tensor in inputs]
            value = function(*tensors)
            weights = torch.linspace(-1, 1, value.numel()).view(value.shape)
            results.append([value, *torch.autograd.grad((value * weights).sum(), tensors)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    plain = grid_sample_plainly(image, points)
    torch.testing.assert_close(plain, by_torch(image, points), atol=1e-5, rtol=1e-5)


# --- Graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_torchvisions_feature_extractor(drop_path_rate):
    model = tiny(*ALL, drop_path_rate=drop_path_rate)
    x = images(4)
    extractor = create_feature_extractor(model, ["stages.1", "stages.3", "head.fc"])
    found = extractor.eval()(x)
    maps = model.forward_intermediates(x, [1, 3], output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(found["stages.1"], maps[0])
    assert torch.equal(found["stages.3"], maps[1])
    assert torch.equal(found["head.fc"], model(x))
    trained = extractor.train()(x)["head.fc"]
    assert torch.equal(trained, found["head.fc"]) == (drop_path_rate == 0)
    trained.sum().backward()
    assert all(p.grad is not None for p in extractor.parameters())


@pytest.mark.slow
def test_another_size_is_another_graph_of_constants_and_the_batch_is_free():
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        given = [i for i in inputs if isinstance(i, Tensor) and not isinstance(i, nn.Parameter)]
        graphs.extend(i.shape for i in given if i.ndim == 4)
        return graph.forward

    model = tiny("D")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch, size in ((4, 12), (4, 20), (3, 20), (2, 20), (4, 12)):
            x = images(batch, size)
            torch.testing.assert_close(compiled(x), model(x))
    sizes = [tuple(shape[2:]) for shape in graphs]
    assert all(isinstance(extent, int) for size in sizes for extent in size)
    assert sizes == [(12, 12), (20, 20), (20, 20)]  # the third for any batch


@pytest.mark.filterwarnings("ignore")  # the older exporter's age, constants of the traced size
@pytest.mark.parametrize(
    "dynamo",
    [pytest.param(False, id="older"), pytest.param(True, id="newer", marks=pytest.mark.slow)],
)
def test_onnx(dynamo):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, out = tiny(*ALL), images(2, 20), io.BytesIO()
    axes = {"input_names": ["x"], "output_names": ["y"]}
    if dynamo:
        axes["dynamic_shapes"] = ({0: torch.export.Dim("batch", max=64)},)
    else:
        axes |= {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}, "opset_version": 17}
    with torch.no_grad():
        torch.onnx.export(model, (x,), out, dynamo=dynamo, **axes)
        session = onnxruntime.InferenceSession(out.getvalue(), providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            x = images(batch, 20)
            (found,) = session.run(None, {"x": x.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-5, rtol=1e-5)


def test_the_older_onnx_exporter_knows_every_operation(monkeypatch):
    """Without the packages that run the result: what is recorded for it has no operation that it cannot write."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model = tiny(*ALL)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(), check_trace=False)
        torch.testing.assert_close(traced(images(3)), model(images(3)))
    recorded = {node.kind() for node in traced.inlined_graph.nodes()}
    unknown = {"aten::mT", "aten::addcdiv", "aten::embedding_bag", "aten::tensor_split"}
    assert "aten::grid_sampler" in recorded
    assert not recorded & unknown


# --- Other layers in place of ours ----------------------------------------------------------------


class Wrapped(nn.Module):
    """What an adapter (LoRA) puts in the place of a linear layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.weight.shape[1], 2, bias=False)
        self.up = nn.Linear(2, layer.weight.shape[0], bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("training", [False, True])
def test_linear_layers_can_be_adapted(training):
    model, x = tiny(*ALL).train(training), images(size=32)
    expected = model(x)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Wrapped(child))
    logits = model(x)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    added = {n: p.grad for n, p in model.named_parameters() if n.endswith("up.weight")}
    assert [name for name, grad in added.items() if not grad.any()] == []


def test_positions_after_pruning():
    model, x = tiny("LD", "D", "D"), images()
    points = model.sampling_positions(x)
    assert [p.stage for p in points] == [0, 1, 2]
    shorter = copy.deepcopy(model)
    shorter.prune_intermediate_layers([1])
    found = shorter.sampling_positions(x)
    assert [p.stage for p in found] == [0, 1]
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(found, points, strict=False))
    assert found[0].offset_length().shape == points[0].positions.shape[:-1]
    # Masked weights.
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.3)
    masked = model.sampling_positions(x)
    assert not torch.equal(masked[0].positions, points[0].positions)
    model(x).sum().backward()
    for module in model.modules():
        if prune.is_pruned(module) and hasattr(module, "weight_orig"):
            prune.remove(module, "weight")
    again = model.sampling_positions(x)
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(masked, again, strict=True))


def test_heads_and_hidden_units_can_be_taken_out():
    """Structured pruning: the first of two heads and half of the MLP's hidden units, which are silent before."""
    model, x = tiny("L"), images()
    block = model.stages[0].blocks[0]
    attn, mlp = block.attn, block.mlp
    with torch.no_grad():
        attn.proj.weight[:, :4] = 0  # what reads the first head
        mlp.fc2.weight[:, :16] = 0
        expected = model(x)
        kept = torch.cat([torch.arange(4, 8) + 8 * part for part in range(3)])
        attn.qkv.weight, attn.qkv.bias = (
            nn.Parameter(t[kept]) for t in (attn.qkv.weight, attn.qkv.bias)
        )
        attn.proj.weight = nn.Parameter(attn.proj.weight[:, 4:])
        attn.relative_position_bias_table = nn.Parameter(attn.relative_position_bias_table[:, 1:])
        attn.num_heads = 1
        mlp.fc1.weight, mlp.fc1.bias = (
            nn.Parameter(t[16:]) for t in (mlp.fc1.weight, mlp.fc1.bias)
        )
        mlp.fc2.weight = nn.Parameter(mlp.fc2.weight[:, 16:])
        torch.testing.assert_close(model(x), expected)
