"""Gradient synchronisation: the mean over a step's micro-batches and over all processes.

Either class leaves the mean gradient in the parameters, and on every process the same running statistics of
BatchNorm, so that all of them evaluate, average and save one model. Its time belongs to the backward pass.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from utils import distributed
from utils.distributed import Process
from utils.step_timer import StepTimer


class DDPSync:
    """Each process adds up its micro-batches, and DDP averages over the processes while the last backward pass runs.

    The order of the sums, and with it their last bits, depends on the number of processes.
    """

    def __init__(self, net: nn.Module, micro_batches: range, process: Process):
        self.net = net  # a DistributedDataParallel where there is more than one process
        self.divisor = len(
            micro_batches
        )  # of a micro-batch's loss; DDP divides by the number of processes
        self._micro_batches = micro_batches
        self._process = process
        self._statistics = running_statistics(net)

    @contextmanager
    def accumulate(self, micro_batch: int, timer: StepTimer) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; after the last one the gradient is the mean of all."""
        last = micro_batch == self._micro_batches[-1]
        with nullcontext() if last or self._process.world_size == 1 else self.net.no_sync():
            yield
        if last:
            with timer("backward"):
                distributed.broadcast(self._statistics)

    def mean_loss(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The mean loss of all micro-batches of all processes; `losses` are those of this process, divided."""
        return distributed.all_reduce_sum(sum(losses)) / self._process.world_size


class DeterministicSync:
    """Micro-batches are summed pairwise by their numbers, ((0 + 1) + (2 + 3)) + …, whichever process has them.

    The numbers of micro-batches and processes are powers of two, so a process's micro-batches are a branch of that
    tree and the mean is exact.
    Of the running statistics, which no forward pass in training reads, micro-batch 0's remain.
    """

    def __init__(self, model: nn.Module, micro_batches: range, process: Process):
        self.net = model
        self.divisor = len(micro_batches) * process.world_size
        self._micro_batches = micro_batches
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._statistics = running_statistics(model)

    @contextmanager
    def accumulate(self, micro_batch: int, timer: StepTimer) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; after the last one the gradient is the mean of all."""
        self.net.zero_grad(set_to_none=True)
        yield
        with timer("backward"):
            if micro_batch == self._micro_batches[0]:
                self._sum = PairwiseSum()
                self._first_statistics = [tensor.clone() for tensor in self._statistics]
            self._sum.add(parameters_to_vector(p.grad for p in self._parameters))
            if micro_batch == self._micro_batches[-1]:
                gradient = distributed.pairwise_sum(self._sum.total())
                vector_to_parameters(gradient, (p.grad for p in self._parameters))
                for tensor, first in zip(self._statistics, self._first_statistics, strict=True):
                    tensor.copy_(first)
                distributed.broadcast(
                    self._statistics
                )  # of the process whose first micro-batch is micro-batch 0

    def mean_loss(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The mean loss of all micro-batches of all processes; `losses` are those of this process, divided."""
        own = PairwiseSum()
        for loss in losses:
            own.add(loss.clone())
        return distributed.pairwise_sum(own.total())


GradSync = DDPSync | DeterministicSync


class PairwiseSum:
    """The sum of 2ᵏ tensors that come one by one, as a balanced tree over the order in which they come.

    Partial sums are kept like the digits of a binary counter: at most k + 1 of them at a time.
    """

    def __init__(self):
        self._sums: list[torch.Tensor] = []
        self._count = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Add the next `tensor`, in which later ones may be added up."""
        self._sums.append(tensor)
        self._count += 1
        carries = self._count
        while carries % 2 == 0:
            later = self._sums.pop()
            self._sums[-1].add_(later)
            carries //= 2

    def total(self) -> torch.Tensor:
        """The sum, once 2ᵏ tensors have come."""
        (total,) = self._sums
        return total


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """What forward passes change in `model`: the buffers of its BatchNorm layers."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


def wrap_in_ddp(model: nn.Module, input_shape: tuple[int, int, int], process: Process) -> nn.Module:
    """`model`, of images of `input_shape` (channels, height, width), in DDP where there is more than one process.

    DDP regroups its gradients after the first backward pass and then sums them in another order, which shows in the
    last bits of three and more processes. After one discarded pass every step, resumed or not, is a later one.
    """
    if process.world_size == 1:
        return model
    # A depthwise weight (C, 1, k, k) is contiguous in two layouts, whose strides torch compares without need.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    net = DistributedDataParallel(
        model,
        device_ids=[process.device] if process.device.type == "cuda" else None,
        forward_sync_buffers=False,  # GradSync does it, after a step instead of before
        gradient_as_bucket_view=True,
    )
    net(torch.zeros(2, *input_shape, device=process.device)).sum().backward()
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return net
