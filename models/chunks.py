"""A batch in chunks: on a CPU modules take so many images at a time that their largest tensor stays in the caches."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.kernels import neighborhood_tiles
from models.tracing import is_tracing, one_node

# Larger tensors leave a CPU's caches, and the allocator gives them back to the system after each use: page faults then
# cost more than arithmetic.
CPU_BYTES = 20 * 2**20


def in_chunks(largest: Callable[[nn.Module, Tensor], int]) -> Callable[[type], type]:
    """Class decorator: on a CPU, `forward` takes so many images at a time that its largest tensor has CPU_BYTES.

    `largest(module, x)` is the size in bytes of that tensor for x (B, H, W, C). Modules with hooks inside see complete
    batches. To FX the module is one node.
    """

    def decorate(cls: type) -> type:
        forward = cls.forward

        @functools.wraps(forward)
        def forward_in_chunks(self: nn.Module, x: Tensor) -> Tensor:
            if x.device.type != "cpu" or is_tracing():
                return forward(self, x)
            chunks = -(-largest(self, x) // CPU_BYTES)
            if chunks <= 1 or any(has_hooks(module) for module in self.modules()):
                return forward(self, x)
            return torch.cat([forward(self, part) for part in x.chunk(chunks)])

        cls.forward = forward_in_chunks
        return one_node(cls)

    return decorate


def window_bytes(module: nn.Module, x: Tensor) -> int:
    """Window attention: the queries, keys and values, or the scores."""
    return x.nbytes * max(3, module.num_heads * module.window_size**2 // x.shape[-1])


def neighborhood_bytes(module: nn.Module, x: Tensor) -> int:
    """Neighbourhood attention: the scores, or the keys and values of all regions."""
    tiles = neighborhood_tiles(*x.shape[1:3], module.window_size, x.device)
    scores = len(x) * module.num_heads * tiles.relative.numel() * x.element_size()
    repeats = len(tiles.rows) * len(tiles.columns) / (x.shape[1] * x.shape[2])
    return max(scores, int(2 * repeats * x.nbytes))


def deformable_bytes(module: nn.Module, x: Tensor) -> int:
    """Deformable attention: the bias, which is float32."""
    batch, height, width = x.shape[:3]
    return 4 * batch * module.num_heads * (height * width // module.positions.stride) ** 2


def deform_conv_bytes(module: nn.Module, x: Tensor) -> int:
    """Deformable convolution: what the nine positions read."""
    return 9 * x.numel() * module.conv.weight.element_size()


def mlp_bytes(module: nn.Module, x: Tensor) -> int:
    """MLP: the hidden layer."""
    return x.nbytes * module.expansion


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at the calls of `module`."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)
