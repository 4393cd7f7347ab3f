"""Byte counter: memory that a model moves and keeps on CUDA, counted on fake tensors; neither data nor a GPU is needed.

Every operation of a pass is recorded as CUDA would run it, under CUDA's autocast rules: each reads and writes all of
its tensors. "compiled" is an estimate of what torch.compile leaves: all operations between products, convolutions,
attention, bilinear reads and scatters are one pass, which reads what it needs once and writes what others read. The
speed is what these bytes and products would take on an H100; it is an estimate on paper, good to about a third, and
ratios of models to a tenth. No image is dropped by stochastic depth. Of a fused kernel its arguments and results count,
not what it keeps to itself.

example:
  python tools/benchmark.py bytes dat_tiny dat_pp_tiny swin_tiny_patch4_window7_224 --batch 128
  python tools/benchmark.py bytes dat_tiny --kernels fused --size 800x1333 --batch 2
"""

import argparse
import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import models
from models import ops
from tools.benchmarks.model import at_least

# Operations that move nothing: views, sizes, memory that is only allocated.
MOVES_NOTHING = re.compile(
    r"^(prim|aten)\.(device|view|_unsafe_view|permute|transpose|t|expand|unsqueeze|squeeze|slice|select|split\w*|unbind|"
    r"detach|alias|as_strided|reshape|_reshape_alias|unflatten|lift\w*|empty\w*|new_empty\w*|is_\w+|sym_\w+|stride|size|"
    r"unfold)\."
)
# What overwrites its first argument without reading it.
WRITES_ONLY = re.compile(r"^aten\.(copy_|fill_|zero_)\.")
# What torch.compile calls a kernel of a library or a scatter for.
NOT_FUSED = re.compile(
    r"mm\.|bmm|convolution|_scaled_dot|grid_sampler|embedding_dense|^dat\.|index_add|index_put|index_select|deform_conv"
)
# H100: bytes and FLOP (bfloat16) a second. EFFICIENCY, and with it the 600 TFLOP/s that products reach, was fitted to
# timm's published training speeds on an RTX 3090 (results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv).
BANDWIDTH, PRODUCTS, EFFICIENCY = 3.35e12, 600e12, 0.82
MIB = 2**20


@dataclass
class Traffic:
    """Counts of one pass over a batch."""

    moved: int = 0  # bytes read and written, one operation after the other
    fused: int = 0  # the same, compiled
    kernels: int = 0
    flops: int = 0
    kept: int = 0  # bytes between the forward and the backward pass, parameters not counted
    operations: Counter = field(default_factory=Counter)  # bytes moved by operation


class CudaAttention(TorchFunctionMode):
    """scaled_dot_product_attention as the CUDA dispatcher calls it: the memory-efficient kernel, if there is a bias.

    Rows of the bias whose stride is no multiple of 8 are copied into padded ones; then it is expanded to every image.
    """

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attend_on_cuda(*args, **kwargs)
        return function(*args, **kwargs)


def _attend_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **ignored: object
) -> Tensor:
    with_gradient = torch.is_grad_enabled()
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = (part.to(dtype) for part in (q, k, v))
        attn_mask = None if attn_mask is None else attn_mask.to(dtype)
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    keys = k.shape[-2]
    strides = attn_mask.stride()
    if strides[-1] != 1 or any(stride % 8 for stride in strides[:-1]):
        attn_mask = F.pad(attn_mask, (0, 8 - keys % 8))[..., :keys]
    attn_mask = attn_mask.expand(*q.shape[:-1], keys)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, with_gradient)[0]


def _sampled(x: Tensor, points: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], *points.shape[1:3])


# Of these torch knows no shapes.
SHAPES = {
    torch.ops.aten.cudnn_grid_sampler.default: _sampled,
    torch.ops.aten.cudnn_grid_sampler_backward.default: lambda x, points, grad: (
        torch.empty_like(x),
        torch.empty_like(points),
    ),
}


class Recorder(TorchDispatchMode):
    """Adds up what the operations move."""

    def __init__(self):
        super().__init__()
        self.total = Traffic()
        # Operations of one level are one pass when compiled: the level of an operation is that of its inputs, and one
        # higher if it is a kernel of its own.
        self._levels: dict[int, int] = defaultdict(int)
        self._read: dict[tuple[int, int], int] = {}  # bytes that a level reads of a storage
        self._written: dict[int, list] = {}  # storage: level, bytes, whether another level reads it
        self._alive: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(
        self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = SHAPES.get(operation, operation)(*args, **kwargs)
        name = str(operation)
        if MOVES_NOTHING.match(name):
            return output
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self._alive += [*inputs, *outputs]
        if WRITES_ONLY.match(name):
            inputs = inputs[1:]
        moved = sum(map(num_bytes, inputs + outputs))
        if "embedding" in name and "backward" not in name:  # of the table only what is read
            moved = 2 * sum(map(num_bytes, outputs))
        self.total.moved += moved
        self.total.kernels += 1
        self.total.flops += count_flops(operation, args, kwargs, output)
        self.total.operations[name] += moved
        self._fuse(inputs, outputs, moved if NOT_FUSED.search(name) else None)
        return output

    def _fuse(self, inputs: list[Tensor], outputs: list[Tensor], alone: int | None) -> None:
        """Add an operation to its level; `alone`: the bytes of a kernel of its own."""
        level = max((self._levels[storage_of(t)] for t in inputs), default=0)
        if alone is not None:
            self.total.fused += alone
            level += 1
        for tensor in inputs:
            storage = storage_of(tensor)
            made = self._written.get(storage)
            if made and (alone is not None or made[0] != level):
                made[2] = True
            if alone is None and not (made and made[0] == level):
                known = self._read.get((storage, level), 0)
                self._read[storage, level] = max(known, num_bytes(tensor))
        for tensor in outputs:
            storage = storage_of(tensor)
            self._levels[storage] = max(self._levels[storage], level)
            if alone is None:
                needed = self._written.get(storage, [0, 0, False])[2]
                self._written[storage] = [level, num_bytes(tensor), needed]
            else:
                self._written.pop(storage, None)

    def traffic(self) -> Traffic:
        """The counts so far."""
        passes = sum(self._read.values())
        passes += sum(size for _, size, needed in self._written.values() if needed)
        self.total.fused += passes
        self._read, self._written = {}, {}
        return self.total


def count_flops(operation: Callable, args: tuple, kwargs: dict, output: Any) -> int:
    """Multiplications and additions of a product, a convolution or attention; 0 of anything else."""
    if operation is torch.ops.aten.convolution_backward.default:
        # torch's own count ignores the groups.
        gradient, _, weight, *_, wanted = args
        return 2 * sum(wanted[:2]) * gradient.numel() * weight[0].numel()
    count = flop_registry.get(operation._overloadpacket)
    return count(*args, **kwargs, out_val=output) if count else 0


def storage_of(tensor: Tensor) -> int:
    """A number that names the tensor's memory."""
    return tensor.untyped_storage()._cdata


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's values; what was expanded counts once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


# --- A pass on fake tensors -----------------------------------------------------------------------


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast as on CUDA, which torch.autocast refuses without a GPU."""
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", before)
        torch.clear_autocast_cache()


@contextmanager
def choose_kernels(name: str) -> Iterator[None]:
    """MODEL.KERNELS `name` inside."""
    ops.use_kernels(name)
    try:
        yield
    finally:
        ops.use_kernels("auto")


@contextmanager
def fake_cuda(kernels: str = "reference") -> Iterator[None]:
    """A CUDA device that computes nothing, for which models choose `kernels` as for a real one."""
    former = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            patch.object(ops, "fused_obstacle", lambda: ""),  # the card that is missing here
            choose_kernels(kernels),
            FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True),
        ):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(former)


def count(
    model: nn.Module,
    *,
    batch: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    training: bool,
    kernels: str = "reference",
) -> Traffic:
    """The traffic of a forward pass, and of the backward pass in `training`, over `batch` images (C, H, W).

    The model is left with fake parameters.
    """
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[storage_of(tensor)] = tensor.untyped_storage()
        return tensor

    with fake_cuda(kernels):
        model = model.to_empty(device="cuda").train(training)
        parameters = {storage_of(parameter) for parameter in model.parameters()}
        images = torch.empty(batch, *shape, device="cuda")
        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with CudaAttention(), Recorder() as recorder, torch.set_grad_enabled(training):
            with cuda_autocast(dtype), saved:
                logits = model(images)
            if training:
                with saved:
                    loss = logits.float().square().mean()
                backward(loss)
        traffic = recorder.traffic()
        traffic.kept = sum(
            memory.nbytes() for storage, memory in kept.items() if storage not in parameters
        )
    return traffic


@torch.no_grad()
def backward(loss: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of `loss` by leaf, without torch's engine, which needs a real device: node by node, last first."""
    leaves = {}
    inputs: dict[Any, dict[int, Tensor]] = defaultdict(dict)  # node: gradients of its outputs
    root = loss.grad_fn
    inputs[root][0] = torch.ones_like(loss)
    waiting = count_edges(root)
    order = itertools.count()
    ready = [(-root._sequence_nr(), next(order), root)]
    while ready:
        *_, node = heapq.heappop(ready)
        if type(node).__name__ == "AccumulateGrad":
            leaves[node.variable] = inputs.pop(node)[0]
            continue
        given = inputs.pop(node, {})
        given = [given.get(i) for i in range(len(node._input_metadata))]
        for (target, index), gradient in run_node(node, given):
            if gradient is not None:
                expected = target._input_metadata[index]
                if (
                    gradient.shape != expected.shape
                ):  # an operation that broadcasts leaves the sum to the engine
                    gradient = gradient.sum_to_size(expected.shape)
                gradient = gradient.to(expected.dtype)
                known = inputs[target].get(index)
                inputs[target][index] = gradient if known is None else known + gradient
            waiting[target] -= 1
            if not waiting[target]:
                heapq.heappush(ready, (-target._sequence_nr(), next(order), target))
    return leaves


def run_node(node: Any, gradients: list[Tensor | None]) -> Iterator[tuple[tuple, Tensor | None]]:
    """The edges of a node that lead on, each with its gradient, from the gradients of the node's outputs."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # a Function written in Python
        found = node.apply(*gradients)
        wanted = node.needs_input_grad
    else:
        found = node(*gradients)
        wanted = [target is not None for target, _ in node.next_functions]
    found = found if isinstance(found, tuple) else (found,)
    return zip(edges, itertools.compress(found, wanted), strict=True)


def count_edges(root: Any) -> Counter:
    """How many gradients each node below `root` receives."""
    edges, seen, todo = Counter(), {root}, [root]
    while todo:
        for target, _ in todo.pop().next_functions:
            if target is not None:
                edges[target] += 1
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
    return edges


# --- Command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `benchmark.py bytes`."""
    parser.add_argument("models", nargs="+", help="any names that timm knows")
    parser.add_argument("--batch", type=at_least(1), default=128, help="images at a time")
    parser.add_argument(
        "--size",
        type=image_size,
        default=(224, 224),
        metavar="N|HxW",
        help="pixels, as 224 or 800x1333",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="autocast"
    )
    parser.add_argument("--kernels", choices=("reference", "fused"), default="reference")
    parser.add_argument(
        "--top", type=at_least(0), default=0, metavar="N", help="list the operations that move most"
    )


def image_size(text: str) -> tuple[int, int]:
    """Height and width from "224" or "800x1333"."""
    sides = [at_least(1)(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected pixels, as 224 or 800x1333")
    return sides[0], sides[-1]


def run(args: argparse.Namespace) -> dict:
    """Count every model's traffic in evaluation and training. Raises ConfigError.

    For images that are not square the model is built for 224 pixels and pads its maps, as a detector's backbone does.
    """
    conditions = {
        name: getattr(args, name) for name in ("batch", "size", "dtype", "kernels", "top")
    }
    set_fused_attn(True)
    height, width = args.size
    found = {}
    for name in args.models:
        found[name] = {}
        for phase, training in (("eval", False), ("train", True)):
            model = models.build(
                name,
                num_classes=1000,
                img_size=height if height == width else 224,
                drop_path_rate=0.0,
            )
            traffic = count(
                model,
                batch=args.batch,
                shape=(3, *args.size),
                dtype=getattr(torch, args.dtype),
                training=training,
                kernels=args.kernels,
            )
            found[name][phase] = {
                **asdict(traffic),
                "operations": dict(traffic.operations.most_common()),
                "images_per_s": estimate_speed(traffic.moved, traffic.flops, args.batch),
                "compiled_images_per_s": estimate_speed(traffic.fused, traffic.flops, args.batch),
            }
    return conditions | {"models": found}


def estimate_speed(moved: float, flops: float, batch: int) -> float:
    """Images a second of an H100 that moves and computes so much for `batch` images; on paper."""
    return EFFICIENCY * batch / (moved / BANDWIDTH + flops / PRODUCTS)


def table(result: dict) -> str:
    """The result of `run` as text."""
    batch = result["batch"]
    head = f"{'on paper, per image':36}{'moved':>10}{'compiled':>10}{'kept':>8}  MiB"
    lines = [
        f"batch {batch}, {' × '.join(map(str, result['size']))} px, {result['dtype']}, {result['kernels']} kernels",
        "",
    ]
    lines.append(f"{head}{'kernels':>10}{'GFLOP':>8}{'H100 images/s: eager':>24}{'compiled':>10}")
    for name, phases in result["models"].items():
        for phase, found in phases.items():
            sizes = (found["moved"], found["fused"], found["kept"])
            moved, fused, kept = (f"{size / batch / MIB:.1f}" for size in sizes)
            lines.append(
                f"{name + ', ' + phase:36}{moved:>10}{fused:>10}{kept:>8}     {found['kernels']:>10,}"
                f"{found['flops'] / batch / 1e9:>8.1f}{found['images_per_s']:>24,.0f}"
                f"{found['compiled_images_per_s']:>10,.0f}"
            )
    for name, phases in result["models"].items():
        for phase, found in phases.items():
            lines += _list_operations(f"{name}, {phase}", found, batch, result["top"])
    return "\n".join(lines)


def _list_operations(title: str, found: dict, batch: int, top: int) -> Iterable[str]:
    if not top:
        return
    yield f"\n{title}"
    for name, moved in list(found["operations"].items())[:top]:
        yield f"  {name:62}{moved / batch / MIB:>10.1f} MiB"
