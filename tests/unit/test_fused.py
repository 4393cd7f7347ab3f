"""Fused kernels in Triton's interpreter: equal to the reference, forward and backward, and to themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import config
import models
from engine import build, precision
from models import ops
from models.attention import (
    DATGeometry,
    DATPlusPlusGeometry,
    DeformableAttention,
    GlobalAttention,
    WindowAttention,
)
from models.cache import grid
from utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="conftest.py could not turn Triton's interpreter on"
)
fused = pytest.importorskip("models.fused")

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3}
PRECISIONS = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def kernels():
    """Models use the fused kernels on the CPU."""
    ops.use_kernels("fused")
    yield
    ops.use_kernels("auto")


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1)).item()


def compare(function, reference, leaves, halves, dtype):
    """`function` of the leaves, the first `halves` of them in `dtype`, against `reference` in float64."""
    expected = reference(*leaves)
    dz = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, dz)
    low = [
        t.detach().to(dtype if i < halves else torch.float32).requires_grad_()
        for i, t in enumerate(leaves)
    ]
    z = function(*low)
    assert z.dtype == dtype
    assert error(z, expected) < TOLERANCE[dtype]
    got = torch.autograd.grad(z, low, dz.to(dtype), retain_graph=True)
    for a, b in zip(got, gradients, strict=True):
        assert error(a, b) < TOLERANCE[dtype]
    again = torch.autograd.grad(z, low, dz.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert torch.equal(z, function(*low))


WINDOWS = {
    "plain": ((8, 4), 4, False, 2, 16),
    "shifted": ((8, 8), 4, True, 1, 16),
    "padded": ((5, 9), 7, False, 1, 32),
    "shifted and padded": ((7, 6), 4, True, 2, 16),
    "a map of one window": ((5, 5), 7, True, 2, 16),
    "one window along y": ((5, 9), 7, True, 1, 16),
    "one position": ((1, 1), 7, True, 1, 16),
}


@PRECISIONS
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, dtype):
    torch.manual_seed(0)
    size, side, shifted, heads, width = WINDOWS[case]
    window = tuple(min(side, length) for length in size)
    shift = tuple(
        (side + 1) // 2 if shifted and length > extent else 0
        for length, extent in zip(size, window, strict=True)
    )
    leaves = leaf(2, *size, 3 * heads * width), leaf(heads, *[window[0] * window[1]] * 2)
    compare(
        lambda qkv, bias: fused.window_attend(qkv, bias, window, shift),
        lambda qkv, bias: ops.attend_windows(qkv, bias, window, shift),
        leaves,
        1,
        dtype,
    )


def test_reference_of_windows_is_the_mixer():
    """`ops.attend_windows` moves qkv where the mixer moves its input; the kernel is compared with the first."""
    torch.manual_seed(0)
    mixer = WindowAttention(32, 2, 4, shifted=True).double()
    x = torch.randn(2, 9, 10, 32, dtype=torch.float64)
    z = ops.attend_windows(mixer.qkv(x), mixer.bias((4, 4)), (4, 4), (2, 2))
    torch.testing.assert_close(mixer.proj(z), mixer(x))


# geometry, batch, heads, groups, map, keys, the map that the table was made for, width of a head
DEFORMABLE = {
    "DAT": (DATGeometry, 2, 4, 2, (3, 4), (3, 4), (3, 4), 16),
    "DAT++": (DATPlusPlusGeometry, 2, 2, 1, (6, 6), (2, 2), (6, 6), 32),
    "a foreign table": (DATPlusPlusGeometry, 1, 2, 2, (5, 7), (3, 2), (14, 14), 16),
    "several blocks": (DATGeometry, 1, 1, 1, (7, 10), (5, 7), (7, 10), 16),
    "one position": (DATGeometry, 1, 1, 1, (1, 1), (1, 1), (1, 1), 16),
}


def deformable_case(case):
    geometry, batch, heads, groups, size, keys, table, width = DEFORMABLE[case]
    queries = grid(geometry.query, size, torch.device("cpu"))
    reference = grid(geometry.reference, keys, torch.device("cpu"))
    theta = torch.randn(batch, groups, *keys, 2, dtype=torch.float64) * 0.8
    # Not on the border, where a bilinear reading has a kink.
    positions = geometry.place(reference.double(), theta).flatten(2, 3) * 0.97
    positions = positions.detach().requires_grad_()
    leaves = (
        leaf(batch, *size, heads * width),
        leaf(batch, keys[0] * keys[1], 2 * heads * width),
        leaf(heads, 2 * table[0] - 1, 2 * table[1] - 1),
        positions,
    )
    return queries, leaves


def deformable_kernel(queries):
    return lambda q, kv, table, positions: fused.deformable_attend(
        q, kv, table, queries, positions
    )[0]


def deformable_reference(queries):
    return lambda q, kv, table, positions: ops.attend_at(
        q, kv, table, queries.to(positions.dtype), positions
    ).view(q.shape)


@PRECISIONS
@pytest.mark.parametrize("case", DEFORMABLE)
def test_deformable_attention(case, dtype):
    torch.manual_seed(0)
    queries, leaves = deformable_case(case)
    compare(
        deformable_kernel(queries),
        deformable_reference(queries),
        leaves,
        2,
        dtype,
    )


def test_a_batch_in_parts(monkeypatch):
    """The scores' gradient is limited in size; the sum over the parts is the gradient of all."""
    torch.manual_seed(0)
    queries, leaves = deformable_case("DAT")
    monkeypatch.setattr(fused.deformable, "MAX_SCORES_BYTES", 1)
    compare(
        deformable_kernel(queries),
        deformable_reference(queries),
        leaves,
        2,
        torch.float32,
    )


@PRECISIONS
@pytest.mark.parametrize(
    "shape", [(2, 7, 9, 64, 2, 20), (2, 8, 8, 48, 1, 9), (1, 1, 1, 32, 2, 3)], ids=str
)
def test_sample(shape, dtype):
    torch.manual_seed(0)
    batch, height, width, channels, groups, points = shape
    positions = torch.rand(batch, groups, points, 2, dtype=torch.float64) * 2.8 - 1.4
    leaves = leaf(batch, height, width, channels), positions.requires_grad_()
    if height == width == 1:  # no displacement moves a reading on a map of one cell
        leaves = (leaves[0], torch.zeros_like(positions).requires_grad_())
        z = fused.sample(*(t.to(torch.float32) for t in leaves))
        torch.testing.assert_close(z, leaves[0].flatten(1, 2).expand(-1, points, -1).float())
        return
    compare(
        fused.sample,
        lambda x, p: ops.sample_by_grid(x, p[:, :, :, None]),
        leaves,
        1,
        dtype,
    )


def test_nan_passes_on():
    qkv, bias = torch.randn(1, 4, 4, 96), torch.zeros(2, 16, 16)
    qkv[0, 0, 0, 0] = torch.nan  # a query of the first head
    z = fused.window_attend(qkv, bias, (4, 4), (0, 0))
    assert z[0, 0, 0, :16].isnan().all()
    assert not z[..., 16:].isnan().any()
    x, positions = torch.randn(1, 4, 4, 16), torch.zeros(1, 1, 2, 2)
    positions[0, 0, 1, 0] = torch.nan
    read = fused.sample(x, positions)
    assert read[0, 1].isnan().all()
    assert read[0, 0].isfinite().all()


def small_inputs():
    """Bias and positions are permuted, as those of a mixer are."""
    qkv, bias = (
        torch.randn(1, 4, 4, 96, requires_grad=True),
        torch.randn(16, 16, 2).permute(2, 0, 1),
    )
    q, kv = torch.randn(1, 3, 3, 32, requires_grad=True), torch.randn(1, 4, 64)
    table, queries = torch.randn(2, 5, 5), grid(DATGeometry.query, (3, 3), torch.device("cpu"))
    positions = (torch.rand(1, 4, 2, 2) - 0.5).transpose(1, 2)  # of two groups
    return {
        "window_attend": (qkv, bias.requires_grad_(), [4, 4], [0, 0]),
        "deformable_attend": (
            q,
            kv.requires_grad_(),
            table.requires_grad_(),
            queries,
            positions.requires_grad_(),
        ),
        "sample": (torch.randn(1, 3, 3, 32, requires_grad=True), positions.requires_grad_()),
    }


@pytest.mark.parametrize("name", small_inputs())
def test_operators_are_what_torch_expects(name):
    torch.library.opcheck(getattr(torch.ops.dat, name).default, small_inputs()[name])


@pytest.mark.parametrize("name", small_inputs())
def test_gradient_of_a_gradient(name):
    torch.manual_seed(0)
    inputs = small_inputs()[name]
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def curvature():
        z = getattr(fused, name)(*inputs)
        z = z[0] if isinstance(z, tuple) else z
        first = torch.autograd.grad(z.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    by_kernels = curvature()
    references = {
        "window_attend": ops.attend_windows,
        "deformable_attend": ops.attend_at,
        "sample": lambda x, p: ops.sample_by_grid(x, p[:, :, :, None]),
    }
    z = references[name](*inputs)
    first = torch.autograd.grad(z.square().sum(), wanted, create_graph=True)
    by_reference = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    torch.testing.assert_close(by_kernels, by_reference, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", small_inputs())
@torch.no_grad()
def test_fake_operators_have_the_strides_of_real_ones(name):
    """torch.compile relies on the strides of the fake operators."""

    def strides(*inputs):
        made = getattr(torch.ops.dat, name)(*inputs)
        made = made if isinstance(made, tuple) else (made,)
        saved = made if name == "deformable_attend" else ()
        backward = getattr(torch.ops.dat, f"{name}_backward")
        return [t.stride() for t in (*made, *backward(torch.ones_like(made[0]), *inputs, *saved))]

    inputs = small_inputs()[name]
    with FakeTensorMode() as fake:
        fakes = [fake.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in inputs]
        expected = strides(*fakes)
    assert strides(*inputs) == expected


@pytest.mark.parametrize(
    "mixer",
    [
        lambda: WindowAttention(32, 2, 4, shifted=True),
        lambda: DeformableAttention(32, 2, 2, 3, 1, (4, 4), DATGeometry),
    ],
    ids=["windows", "deformable"],
)
def test_kernels_are_part_of_a_compiled_graph(kernels, mixer):
    torch.manual_seed(0)
    module, x = mixer(), torch.randn(1, 4, 8, 32)

    def gradients():
        module.zero_grad()
        module(x).square().sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    expected = gradients()
    module.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    assert all(map(torch.equal, gradients(), expected))


def check_equal(module, x, *, atol):
    """`module` by kernels and by reference: outputs and the gradients of input and parameters."""

    def run():
        z = module(x)
        return z, torch.autograd.grad(z.square().mean(), [x, *module.parameters()])

    z, gradients = run()
    with ops.reference_kernels():
        expected, expected_gradients = run()
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=atol)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-7


MIXERS = {
    "L": lambda: WindowAttention(32, 2, 4),
    "S": lambda: WindowAttention(32, 2, 4, shifted=True),
    "D": lambda: DeformableAttention(32, 2, 1, 3, 2, (4, 4), DATPlusPlusGeometry),
    "G": lambda: GlobalAttention(32, 2, (4, 4)),
    "P": lambda: GlobalAttention(32, 2, (4, 4), reduction=2),
}


@pytest.mark.parametrize("letter", MIXERS)
def test_mixers_compute_the_same(kernels, letter, monkeypatch):
    torch.manual_seed(0)
    name = "window_attend" if letter in "LS" else "deformable_attend"
    kernel, calls = getattr(fused, name), []
    monkeypatch.setattr(fused, name, lambda *args: calls.append(args) or kernel(*args))
    mixer = MIXERS[letter]()
    check_equal(mixer, torch.randn(2, 4, 6, 32, requires_grad=True), atol=1e-5)
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_micro", "dat_pp_micro"])
def test_models_compute_the_same(kernels, name):
    torch.manual_seed(0)
    model = getattr(models.dat, name)(num_classes=5)
    check_equal(model, torch.randn(2, 3, 32, 32, requires_grad=True), atol=1e-5)


def test_multiply_adds_are_counted():
    qkv, bias, *layout = small_inputs()["window_attend"]
    with FlopCounterMode(display=False) as counter:
        z = fused.window_attend(qkv, bias, *layout)
    assert counter.get_total_flops() == 2 * 2 * 16 * 16 * 32  # q · k and p · v of two heads
    with FlopCounterMode(display=False) as counter:
        z.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * 16 * 16 * 32


def test_what_the_kernels_cannot_do_is_computed_by_the_reference(kernels):
    assert ops.fused_kernels(torch.zeros(1, dtype=torch.float64)) is None
    assert ops.fused_windows(torch.zeros(1, 12, 12, 32), 1, (12, 12)) is None  # 144 positions
    assert ops.fused_windows(torch.zeros(1, 7, 7, 24), 1, (7, 7)) is None  # a head of 24
    assert ops.fused_windows(torch.zeros(1, 7, 7, 32), 1, (7, 7)) is fused
    torch.func.vmap(lambda x: x if ops.fused_kernels(x) is None else 1 / 0)(torch.zeros(2))
    with ops.reference_kernels():
        assert ops.fused_kernels(torch.zeros(1)) is None
    assert ops.fused_kernels(torch.zeros(1)) is fused


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("obstacle", "device", "asked", "resolved"),
    [
        ("", CUDA, "auto", "fused"),
        ("", CUDA, "reference", "reference"),
        ("", CPU, "auto", "reference"),
        ("Triton is not installed", CUDA, "auto", "reference"),
        ("Triton is not installed", CUDA, "fused", None),
    ],
)
def test_which_kernels_a_run_uses(monkeypatch, obstacle, device, asked, resolved):
    monkeypatch.setattr(precision, "fused_obstacle", lambda: obstacle)
    monkeypatch.setattr(ops, "_kernels", "auto")
    opts = ["MODEL.KERNELS", asked, "AMP_DTYPE", "float32"]
    cfg = config.load(str(ROOT / "configs/digits.yaml"), opts)
    if resolved is None:
        with pytest.raises(ConfigError, match="fused cannot run here: Triton is not installed"):
            build.prepare_device(cfg, device)
        return
    assert resolved == build.prepare_device(cfg, device).MODEL.KERNELS
    assert ops._kernels == resolved


@pytest.mark.slow
def test_kernels_assemble_without_spills():
    """For sm_90, every entry of the block tables, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "tests/helpers/assemble.py"
    result = subprocess.run(
        [sys.executable, script],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {
        f"{group}_{part}"
        for group, parts in {
            "window": ("forward", "backward"),
            "deformable": ("forward", "keys", "queries", "table"),
            "sample": ("forward", "map", "positions"),
        }.items()
        for part in parts
    }
    for row in rows:
        assert (row["spilled"], row["atomics"]) == (0, 0), row
        assert row["shared"] <= 100 * 2**10, row
