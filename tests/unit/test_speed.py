"""What makes the models fast, without timing anything: operations, memory, and that every path computes the same."""

import functools
from argparse import Namespace

import pytest
import timm
import torch
import torch.nn.functional as F

from models import chunks, kernels, ops
from models.dat import StochasticDepth
from models.kernels import (
    AlignedRows,
    attend_by_sdpa,
    bias_by_rows,
    neighborhood_tiles,
    read_table,
    sample_by_rows,
)
from models.ops import (
    attend,
    gelu_linear,
    rpe_bias,
    sample,
    sample_by_grid,
)
from tools.benchmarks.model import Subject

BOTH = pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])


@pytest.mark.parametrize(
    ("name", "operations", "mib"), [("dat_tiny", 700, 60), ("dat_pp_tiny", 2220, 104)]
)
def test_operations_and_memory_of_a_forward_pass(name, operations, mib):
    args = Namespace(device="cpu", dtype="bfloat16", size=224, batch=4)
    subject = Subject.from_name(name, args)
    assert subject.activation_mib() <= mib  # and masks and grids are remembered
    assert subject.count_operations() <= operations


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


def test_the_bias_by_rows_and_by_grid_is_the_same():
    torch.manual_seed(0)
    tables = torch.randn(6, 9, 13, dtype=torch.float64)
    queries, keys = torch.rand(5, 7, 2, dtype=torch.float64) * 2 - 1, positions()

    def by_rows(tables, queries, keys):
        displacement = (queries.view(-1, 1, 2) - keys.flatten(2, 3)[:, :, None]) / 2
        return bias_by_rows(tables, displacement)

    one, other = (gradients(f, tables, queries, keys) for f in (rpe_bias, by_rows))
    for own, peer in zip(one, other, strict=True):
        torch.testing.assert_close(own, peer)


def test_a_position_that_is_no_number_gives_no_number():
    points = positions().float()
    points[1, 2, 3, 3, 0] = torch.nan
    read = sample(torch.ones(2, 5, 7, 12), points).view(2, 24, 3, 4)
    assert read[1, 21, 2].isnan().all()
    assert read.isnan().sum() == 4


@pytest.mark.parametrize("repeats", [1, 2, 6])
@pytest.mark.parametrize("most", [65_535, 2])
def test_attention_equals_the_fused_kernel(repeats, most, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_HEADS", most)
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(a[0].shape) or kernel(*a, **k),
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, n, 4, dtype=torch.float64) for n in (5, 3, 3))
    bias = torch.randn(6 // repeats, 5, 3, dtype=torch.float64)

    def own(q, k, v, bias):
        return attend(q, k, v, bias.clone())

    fused = gradients(attend_by_sdpa, q, k, v, bias)  # as on CUDA
    for one, other in zip(gradients(own, q, k, v, bias), fused, strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == -(-6 // repeats // most)
    assert max(shape[1] for shape in calls) <= most  # an axis of a CUDA grid


@pytest.mark.parametrize("keys", [8, 49])
def test_rows_of_a_bias_are_aligned_and_unchanged(keys):
    bias = torch.randn(3, 5, keys, requires_grad=True)
    rows = AlignedRows.apply(bias, torch.bfloat16)
    assert rows.stride()[1] == -(-keys // 8) * 8
    torch.testing.assert_close(rows, bias.bfloat16())
    (gradient,) = torch.autograd.grad(rows, bias, rows)
    torch.testing.assert_close(gradient, bias.bfloat16().float())


def test_neighbourhoods_read_their_table_the_same_way_on_cuda():
    relative = neighborhood_tiles(9, 13, 3, torch.device("cpu")).relative

    class OnCuda(torch.Tensor):
        is_cuda = True

    def read(table):
        return read_table(table, relative)

    def read_on_cuda(table):
        return read_table(table.as_subclass(OnCuda), relative).as_subclass(torch.Tensor)

    table = torch.randn(2, 36, dtype=torch.float64)
    for own, other in zip(gradients(read, table), gradients(read_on_cuda, table), strict=True):
        torch.testing.assert_close(own, other)


def test_the_gelu_that_is_computed_again_is_the_same():
    torch.manual_seed(0)
    act, layer = torch.nn.GELU(), torch.nn.Linear(6, 4).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def plain(x, weight, bias):
        return F.linear(F.gelu(x), weight, bias)

    x.requires_grad_()
    y = gelu_linear(act, layer, x)
    assert "GELULinear" in y.grad_fn.name()
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)  # as in gradients
    inputs = x, layer.weight, layer.bias
    own = [y, *torch.autograd.grad((y * weights).sum(), inputs)]
    for one, other in zip(own, gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("drop_prob", [0.02, 0.5, 0.98])  # often all, some, often none
def test_dropped_images_are_not_computed_and_nothing_else_changes(drop_prob, monkeypatch):
    layer, drop_path = torch.nn.Linear(3, 3).double(), StochasticDepth(drop_prob)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    computed, seen = [], []

    def add(seed, x, weight, bias):
        def branch(some):
            computed.append(len(some))
            return F.linear(some, weight, bias)

        torch.manual_seed(seed)
        return drop_path(x, branch)

    for seed in range(20):
        run = functools.partial(
            gradients, functools.partial(add, seed), x, layer.weight, layer.bias
        )
        monkeypatch.setattr(ops, "is_tracing", lambda: False)
        found = run()
        monkeypatch.setattr(ops, "is_tracing", lambda: True)  # computes all and multiplies by 0
        for own, other in zip(found, run(), strict=True):
            torch.testing.assert_close(own, other)
        kept = (found[0] != x).flatten(1).any(1).sum()
        assert computed[0] == max(1, kept)
        seen.append(int(kept))
        computed.clear()
    assert abs(sum(seen) / 80 - (1 - drop_prob)) < 0.15
    assert torch.equal(drop_path.eval()(x, layer), x + layer(x))


@pytest.mark.parametrize(("drop_prob", "kept"), [(0.1, 7), (0.3, 6), (0.99, 1)])
def test_balanced_stochastic_depth_keeps_as_many_images_of_every_batch(drop_prob, kept):
    depth, layer = StochasticDepth(drop_prob, balanced=True), torch.nn.Linear(3, 3).double()
    x, computed, counts = torch.randn(8, 3, dtype=torch.float64), [], torch.zeros(8)

    def branch(some):
        computed.append(len(some))
        return layer(some)

    for seed in range(400):
        torch.manual_seed(seed)
        found = depth(x, branch)
        moved = (found != x).any(1)
        expected = x + torch.where(moved[:, None], layer(x) * 8 / kept, 0)
        torch.testing.assert_close(found, expected)
        counts += moved
    assert set(computed) == {kept}
    assert counts.sum() == 400 * kept
    assert (counts / 400 - kept / 8).abs().max() < 0.1  # each image as often
    assert torch.equal(depth.eval()(x, layer), x + layer(x))


@BOTH
def test_parts_of_a_batch_are_the_same_as_all_of_it(name, monkeypatch):
    torch.manual_seed(0)
    args = {"stages": ("LS", "ND", "NS", "D"), "dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4)}
    model = timm.create_model(name, offset_groups=(1, 1, 2, 2), **args).double()
    images = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    at_once = gradients(model, images)
    mlp, calls = model.stages[0].blocks[0].mlp, []
    forward = mlp.fc2.forward
    monkeypatch.setattr(mlp.fc2, "forward", lambda x: calls.append(len(x)) or forward(x))
    two_images = 2 * chunks.mlp_bytes(mlp, torch.empty(1, 16, 16, 8, dtype=torch.float64))
    monkeypatch.setattr(chunks, "CPU_BYTES", two_images)
    for own, other in zip(gradients(model, images), at_once, strict=True):
        torch.testing.assert_close(own, other)
    assert calls == [2 * 256, 2 * 256, 256]
    seen = []
    mlp.fc1.register_forward_hook(lambda *args: seen.append(len(args[2])))
    model(images)
    assert seen == [5 * 256]  # who looks inside sees complete batches
