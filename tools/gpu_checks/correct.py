"""Groups 1 to 3: every path against float64 on the CPU, the numbers of the released code, the same bits twice."""

import json
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import models.attention as mixers
from models import ops
from models.cache import grid
from models.convert import checkpoint_filter_fn, to_official
from tools.gpu_checks.common import (
    Racer,
    Setting,
    autocast,
    fused_obstacle,
    kernel_choices,
    kernels,
    poison,
    relative_error,
)
from tools.gpu_checks.report import Report

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
BARS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# --- 1: paths -------------------------------------------------------------------------------------

Case = tuple[
    Callable[..., Tensor], list[Tensor], int
]  # function, inputs, how many may be in half precision


def make_cases(tiny: bool) -> dict[str, Case]:
    """Every operation that has several kernels, at shapes of the models; inputs are float64, on the CPU."""
    torch.manual_seed(0)
    heads, width = (1, 16) if tiny else (4, 32)
    channels, batch = heads * width, 1 if tiny else 4

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    cases = {}
    windows = {
        "plain": ((8, 4), (4, 4), (0, 0)) if tiny else ((56, 56), (7, 7), (0, 0)),
        "shifted": ((8, 8), (4, 4), (2, 2)) if tiny else ((56, 56), (7, 7), (4, 4)),
        "padded": ((5, 9), (4, 4), (2, 2)) if tiny else ((25, 42), (7, 7), (4, 4)),
    }
    for name, (size, window, shift) in windows.items():
        positions = window[0] * window[1]
        inputs = [leaf(batch, *size, 3 * channels), leaf(heads, positions, positions)]
        function = partial(attend_windows, window=window, shift=shift)
        cases[f"windows, {name}"] = (function, inputs, 1)
    for size in ((5, 5), (9, 11)) if tiny else ((14, 14), (56, 56), (30, 45)):
        rpb = leaf(heads, 5, 5) if tiny else leaf(heads, 13, 13)
        case = (ops.attend_neighborhoods, [leaf(batch, *size, 3 * channels), rpb], 1)
        cases[f"neighbourhoods, {size[0]}×{size[1]}"] = case
    sizes = {"DAT": ((3, 4), (3, 4)) if tiny else ((14, 14), (14, 14))}
    sizes["DAT++"] = ((6, 6), (2, 2)) if tiny else ((56, 56), (7, 7))
    for name, (size, keys) in sizes.items():
        geometry = mixers.DATGeometry if name == "DAT" else mixers.DATPlusPlusGeometry
        queries = grid(geometry.query, size, torch.device("cpu")).double()
        points = (torch.rand(batch, 1, *keys, 2, dtype=torch.float64) * 2.4 - 1.2).float().double()
        table = leaf(heads, 2 * size[0] - 1, 2 * size[1] - 1)
        inputs = [leaf(batch, *size, channels), leaf(batch, keys[0] * keys[1], 2 * channels)]
        function = partial(attend_at, queries=queries)
        cases[f"deformable attention, {name}"] = (function, [*inputs, table, points], 2)
        cases[f"bilinear reads, {name}"] = (ops.sample, [leaf(batch, *size, channels), points], 1)
    return cases


def attend_windows(
    qkv: Tensor, bias: Tensor, *, window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """Window attention as WindowAttention has it computed."""
    fused = ops.fused_windows(qkv[..., : qkv.shape[-1] // 3], len(bias), window)
    attend = ops.attend_windows if fused is None else fused.window_attend
    return attend(qkv, bias, window, shift)


def attend_at(q: Tensor, kv: Tensor, table: Tensor, points: Tensor, *, queries: Tensor) -> Tensor:
    """Deformable attention; the queries' places are constants."""
    return ops.attend_at(q, kv, table, queries.to(points), points)


def check_paths(report: Report, setting: Setting) -> None:
    """The values and all gradients of each case, by each kernel in each precision, against float64 on the CPU."""
    obstacle = fused_obstacle(setting)
    if obstacle:
        report.skip(f"fused kernels: {obstacle}")
    for name, case in make_cases(setting.tiny).items():
        with kernels("reference"):
            expected = gradients(*case[:2])
        for way in kernel_choices(setting):
            for dtype, bar in BARS.items():
                if setting.tiny and dtype == torch.bfloat16:
                    continue  # Triton's interpreter multiplies its bit patterns
                error = error_of(setting, case, expected, way, dtype)
                what = f"{name}, {way}, {str(dtype)[6:]}: relative error"
                report.add(what, error, bar=f"at most {bar:g}", ok=error <= bar)
    check_mixers(report, setting)
    check_convolution(report, setting)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value and the gradients of all inputs, under fixed weights that differ everywhere."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape)
    weights = weights.to(value)
    found = torch.autograd.grad(value, inputs, weights, allow_unused=True)
    return [value, *(f for f in found if f is not None)]


def error_of(
    setting: Setting, case: Case, expected: list[Tensor], way: str, dtype: torch.dtype
) -> float:
    """The largest relative error of the value and the gradients on the device."""
    function, inputs, halves = case
    inputs = [
        tensor.to(setting.device, dtype if i < halves else torch.float32)
        for i, tensor in enumerate(inputs)
    ]
    poison(setting)
    with kernels(way):
        found = gradients(function, inputs)
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def check_mixers(report: Report, setting: Setting) -> None:
    """Complete mixers in float32, forward and all gradients."""
    dim, heads, size = setting.pick((96, 3, (28, 30)), (32, 2, (6, 5)))
    makers = {
        "L": lambda: mixers.WindowAttention(dim, heads, 7),
        "S": lambda: mixers.WindowAttention(dim, heads, 7, shifted=True),
        "N": lambda: mixers.NeighborhoodAttention(dim, heads, 7),
        "G": lambda: mixers.GlobalAttention(dim, heads, size),
        "P": lambda: mixers.GlobalAttention(dim, heads, size, reduction=2),
        "C": lambda: mixers.DeformableConvolution(dim, heads, 1),
    }
    for geometry in (mixers.DATGeometry, mixers.DATPlusPlusGeometry):
        makers[f"D, {geometry.__name__}"] = lambda geometry=geometry: mixers.DeformableAttention(
            dim, heads, 1, 5, 1, size, geometry
        )
    for name, make in makers.items():
        torch.manual_seed(0)
        module, x = make().double(), torch.randn(2, *size, dim, dtype=torch.float64)
        expected = _module_gradients(module, x)
        module = module.float().to(setting.device)
        for way in kernel_choices(setting):
            with kernels(way):
                found = _module_gradients(module, x.float().to(setting.device))
            error = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
            what = f"mixer {name}, {way}, float32: relative error"
            report.add(what, error, bar="at most 0.001", ok=error <= 1e-3)


def _module_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    weights = dict(module.named_parameters())
    # A key's bias moves all scores of a query alike: its gradient is rounding.
    chosen = [p for n, p in weights.items() if not n.endswith(("qkv.bias", "kv.bias"))]
    x = x.detach().requires_grad_()
    value = module(x)
    cotangent = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape)
    return [value, *torch.autograd.grad(value, [x, *chosen], cotangent.to(value))]


# --- 2: the released numbers ----------------------------------------------------------------------


def check_golden(report: Report, setting: Setting) -> None:
    """Logits and gradient norms in float32 without TF32, then the classes in half precision."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    fill = runpy.run_path(str(GOLDEN / "fill.py"))
    names = ("dat_tiny", "dat_pp_tiny", "dat_base_384", "dat_pp_base_384")
    for name in setting.pick(names, ("dat_micro",)):
        model = timm.create_model(name).eval()
        filled = fill["fill_state_dict"](to_official(model.state_dict(), model))
        model.load_state_dict(checkpoint_filter_fn({"model": filled}, model))
        size = model.pretrained_cfg["input_size"][1]
        if setting.tiny:  # no released numbers of this model: the CPU's own
            images = fill["make_images"](2, size, size)
            logits, norms = _logits_and_norms(model.double(), images.double())
            model.float()
        else:
            from safetensors.torch import load_file

            logits = load_file(GOLDEN / f"{name}.safetensors")["logits"]
            norms = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["grad_norms"]
            images = fill["make_images"](len(logits), size, size)
        model, images = model.to(setting.device), images.to(setting.device)
        for way in kernel_choices(setting):
            with kernels(way):
                _compare_golden(report, setting, f"{name}, {way}", model, images, logits, norms)


def _compare_golden(
    report: Report, setting: Setting, name: str, model: nn.Module, images: Tensor, logits: Tensor,
    norms: dict[str, float],
) -> None:  # fmt: skip
    found, found_norms = _logits_and_norms(model, images)
    error = (found.double().cpu() - logits.double()).abs().max().item()
    report.add(f"{name}: largest error of a logit", error, bar="at most 1e-4", ok=error <= 1e-4)
    large = {n: norm for n, norm in norms.items() if norm > 1e-5}
    worst = max(abs(found_norms[n] / norm - 1) for n, norm in large.items())
    report.add(f"{name}: worst gradient norm", worst, bar="within 0.1 %", ok=worst <= 1e-3)
    for dtype in (torch.float16,) if setting.tiny else (torch.bfloat16, torch.float16):
        with torch.no_grad(), autocast(setting, dtype):
            classes = model(images).argmax(-1).cpu()
        same = bool((classes == logits.argmax(-1)).all())
        report.add(f"{name}, {str(dtype)[6:]}: classes equal", same, bar="equal", ok=same)


def _logits_and_norms(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, float]]:
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images), device=images.device) + 7).backward()
    gradients = to_official({n: p.grad for n, p in model.named_parameters()}, model)
    return logits.detach(), {name: g.norm().item() for name, g in gradients.items()}


# --- 3: the same bits -----------------------------------------------------------------------------


def check_bits(report: Report, setting: Setting) -> None:
    """Two steps, made twice: ordinary, and with torch's deterministic algorithms."""
    name, batch = setting.pick(("dat_tiny", 32), ("dat_micro", 2))
    for deterministic in (False, True):
        for way in kernel_choices(setting):
            try:
                torch.use_deterministic_algorithms(deterministic)
                first, second = (_two_steps(setting, name, batch, way) for _ in range(2))
                equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            except RuntimeError as error:
                report.add(f"two steps, {way}, deterministic: refused", str(error).split(".")[0])
                equal = False
            finally:
                torch.use_deterministic_algorithms(False)
            mode = "deterministic" if deterministic else "ordinary"
            bar = "equal" if deterministic else ""
            report.add(f"two steps twice, {way}, {mode}: bits equal", equal, bar=bar, ok=equal)
    if not fused_obstacle(setting):
        for case_name, (function, inputs, halves) in make_cases(setting.tiny).items():
            if "neighbourhoods" in case_name or (setting.tiny and "shifted" not in case_name):
                continue  # there is no such kernel, or the interpreter is slow
            inputs = [
                tensor.to(setting.device, torch.float16 if i < halves else torch.float32)
                for i, tensor in enumerate(inputs)
            ]
            with kernels("fused"):
                first, second = (gradients(function, inputs) for _ in range(2))
            equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            report.add(f"{case_name}, fused, twice: bits equal", equal, bar="equal", ok=equal)


def _two_steps(setting: Setting, name: str, batch: int, way: str) -> list[Tensor]:
    dtype = torch.float16 if setting.cuda else torch.float32
    racer = Racer(setting, name, way, batch, dtype, drop_path_rate=0.2)
    optimizer = torch.optim.AdamW(racer.net.parameters(), lr=1e-3, fused=True)
    for _ in range(2):
        with kernels(way), autocast(setting, dtype):
            loss = racer.net.train()(racer.images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().cpu() for parameter in racer.net.parameters()]


def check_convolution(report: Report, setting: Setting) -> None:
    """Deformable convolution by rows and by torchvision's kernel."""
    torch.manual_seed(0)
    channels, size = setting.pick((64, 28), (4, 5))
    conv = DeformConv2d(channels, channels, 3, padding=1, groups=2).to(setting.device)
    shape = (2, size, size)
    x = torch.randn(*shape, channels, device=setting.device)
    offsets = torch.randn(*shape, 18, device=setting.device)
    weights = torch.rand(*shape, 9, device=setting.device)
    with torch.no_grad():
        found = ops.deform_conv_by_rows(conv, x, offsets, weights)
        expected = ops.deform_conv_by_module(conv, x, offsets, weights)
    error = relative_error(found, expected)
    report.add(
        "deformable convolution: relative error", error, bar="at most 1e-4", ok=error <= 1e-4
    )
