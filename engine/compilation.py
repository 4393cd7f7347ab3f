"""torch.compile of a complete model: one graph for training, one for evaluation, the same kernels each time."""

import os
from pathlib import Path

from torch import nn


def compile_model(model: nn.Module, *, cache: Path, one_graph: bool) -> None:
    """Let calls of `model` run compiled code, made at the first call; its tensors keep their names.

    cache: folder of compiled kernels. one_graph: what cannot be one graph is an error.
    """
    import torch._dynamo.config  # takes seconds
    import torch._inductor.config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute()))
    # A graph for training, one for evaluation, each for every image size.
    torch._dynamo.config.recompile_limit = 64
    # Kernels that were chosen by timing would add in another order the next time.
    exact = torch.are_deterministic_algorithms_enabled()
    torch._inductor.config.deterministic = exact or next(model.parameters()).device.type == "cpu"
    model.compile(fullgraph=one_graph, dynamic=False)
