"""Tracing: whether somebody records or transforms what the models compute, and modules that are one node of a graph."""

import functools

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_tracing() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or an exporter record what is computed, or torch.func does.

    What torch.func (grad, vmap, jvp, …) transforms is computed without own derivatives and in-place operations.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()


def is_transformed() -> bool:
    """Whether a transformation of torch.func is active, or forward-mode differentiation of torch.autograd."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def fake_mode() -> object | None:
    """torch's FakeTensorMode, inside of which tensors have sizes and no values; None outside."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def is_exported_to_onnx() -> bool:
    """Whether one of torch's ONNX exporters, of which the older one traces, records what is computed."""
    recorded = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return recorded and torch.onnx.is_in_onnx_export()


def is_symbol(x: Tensor) -> bool:
    """Whether FX traces the call and x has no size."""
    return isinstance(x, torch.fx.Proxy)


def one_node(cls: type) -> type:
    """Class decorator: to FX, whoever traces, a call of the module is one node: it depends on the size of the map."""
    forward = cls.forward

    @functools.wraps(forward)
    def forward_or_node(self: nn.Module, x: Tensor) -> Tensor:
        if is_symbol(x):
            tracer = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        return forward(self, x)

    cls.forward = forward_or_node
    return register_notrace_module(cls)
