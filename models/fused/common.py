"""Sizes of blocks, and the gradient of a gradient, which all fused kernels share.

Block sizes are fixed by precision: choosing them by timing would change the order of sums from run to run. None of them
spills registers on sm_90 with heads of 32 channels (tests/unit/test_fused.py assembles them).
"""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import ops

HEAD_WIDTHS = (16, 32, 64)


def block_side(largest: int, length: int) -> int:
    """A power of 2 of at least 16 that covers `length`, or `largest`."""
    return min(largest, max(16, triton.next_power_of_2(length)))


def precision(half: bool) -> str:
    """How float32 is multiplied: among half-precision inputs by TF32, else exactly."""
    return "tf32" if half else "ieee"


def is_half(x: Tensor) -> bool:
    """Whether x is float16 or bfloat16."""
    return x.dtype != torch.float32


def reference_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dz: Tensor
) -> list[Tensor | None]:
    """The gradients of function(*inputs) as a graph of their own."""
    wanted = [t for t in inputs if t.requires_grad]
    with ops.reference_kernels(), sdpa_kernel(SDPBackend.MATH):
        gradients = iter(torch.autograd.grad(function(*inputs), wanted, dz, create_graph=True))
    return [next(gradients) if t.requires_grad else None for t in inputs]
