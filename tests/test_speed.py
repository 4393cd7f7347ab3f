"""What makes the models fast, without timing anything: operations, memory, and that every path computes the same."""

from argparse import Namespace

import pytest
import timm
import torch
import torch.nn.functional as F

from models import attention
from models.attention import attend, sample, sample_by_grid, sample_by_rows
from models.dat import GELULinear
from tools.bench_model import Subject

BOTH = pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])


@pytest.mark.parametrize(
    ("name", "operations", "mib"), [("dat_tiny", 860, 60), ("dat_pp_tiny", 2600, 104)]
)
def test_operations_and_memory_of_a_forward_pass(name, operations, mib):
    subject = Subject(name, Namespace(device="cpu", dtype="bfloat16", size=224, batch=4))
    assert subject.kept_mib() <= mib  # and masks and grids are remembered
    assert subject.operations() <= operations


# --- The same numbers on every path ---------------------------------------------------------------


def gradients(function, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The value of `function` and its gradients for all `tensors`, under weights that differ everywhere."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*tensors)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    return [value, *torch.autograd.grad((value * weights).sum(), tensors)]


def positions(batch: int = 2, groups: int = 3) -> torch.Tensor:
    """Inside, outside, far outside, on cells and on the border of a map of 5 × 7."""
    points = torch.rand(batch, groups, 4, 6, 2, dtype=torch.float64) * 3 - 1.5
    points[0, 0, 0, 0] = torch.tensor((-9.0, 9.0))
    points[0, 0, 0, 1] = torch.tensor((-1.0, 0.99))
    points[0, 0, 0, 2] = torch.tensor((0.5 + 1e-9, -1 / 3 + 1e-9))  # as good as on a cell
    return points


def test_readings_by_rows_and_by_grid_are_the_same():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    points = positions()
    rows, grid = gradients(sample_by_rows, x, points), gradients(sample_by_grid, x, points)
    for own, other in zip(rows, grid, strict=True):
        torch.testing.assert_close(own, other)
    assert (rows[0].view(2, 24, 3, 4)[0, 0, 0] == 0).all()  # far outside
    assert rows[0].is_contiguous()
    assert grid[0].is_contiguous()


def test_a_position_that_is_no_number_gives_no_number():
    points = positions().float()
    points[1, 2, 3, 3, 0] = torch.nan
    read = sample(torch.ones(2, 5, 7, 12), points).view(2, 24, 3, 4)
    assert read[1, 21, 2].isnan().all()
    assert read.isnan().sum() == 4


@pytest.mark.parametrize("repeats", [1, 2, 6])
def test_attention_equals_the_fused_kernel(repeats):
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 2, n, 4, dtype=torch.float64) for n in (5, 3, 3))
    bias = torch.randn(6 // repeats, 2, 5, 3, dtype=torch.float64)

    def fused(q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, bias.repeat(repeats, 1, 1, 1))

    for own, other in zip(
        gradients(attend, q, k, v, bias), gradients(fused, q, k, v, bias), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_the_gelu_that_is_computed_again_is_the_same():
    torch.manual_seed(0)
    layer = GELULinear(6, 4).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def again(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    def plain(x, weight, bias):
        return F.linear(F.gelu(x), weight, bias)

    inputs = x, layer.weight, layer.bias
    for own, other in zip(gradients(again, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(own, other)


@BOTH
def test_parts_of_a_batch_are_the_same_as_all_of_it(name, monkeypatch):
    torch.manual_seed(0)
    args = {"stages": ("LS", "ND", "NS", "D"), "dims": (8, 16, 16, 32), "heads": (1, 2, 2, 4)}
    model = timm.create_model(name, groups=(1, 1, 2, 2), **args).double()
    images = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    whole = gradients(model, images)
    mlp, calls = model.stages[0].blocks[0].mlp, []
    forward = mlp.fc2.forward
    monkeypatch.setattr(mlp.fc2, "forward", lambda x: calls.append(len(x)) or forward(x))
    two_images = 2 * mlp.largest(torch.empty(1, 16, 16, 8, dtype=torch.float64))
    monkeypatch.setattr(attention, "CPU_BYTES", two_images)
    for own, other in zip(gradients(model, images), whole, strict=True):
        torch.testing.assert_close(own, other)
    assert calls == [2, 2, 1]
    seen = []
    mlp.fc1.register_forward_hook(lambda *args: seen.append(len(args[2])))
    model(images)
    assert seen == [5]  # who looks inside sees whole batches
