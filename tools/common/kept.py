"""Kept memory: what a forward pass holds for its backward pass, counted by storage, so exactly."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def kept_bytes(net: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that `forward` keeps for the backward pass, the parameters of `net` not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}  # by address; the storages are held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(s.nbytes() for address, s in kept.items() if address not in parameters)
