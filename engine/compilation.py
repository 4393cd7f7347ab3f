"""torch.compile of a complete model: one graph for training, one for evaluation, the same kernels each time."""

import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from utils.errors import ConfigError

# A module of a compiler, its errors' base class, what failed, and what turns it off.
COMPILERS = (
    ("torch._dynamo.exc", "TorchDynamoException", "torch.compile", "MODEL.COMPILE False"),
    ("triton.errors", "TritonError", "A fused kernel", "MODEL.KERNELS reference"),
)


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


@contextmanager
def explain_compile_errors() -> Iterator[None]:
    """Raise a ConfigError with the key to change where a compiler fails."""
    try:
        yield
    except tuple(_compiler_errors()) as error:
        found = _compiler_errors().items()
        what, remedy = next(words for base, words in found if isinstance(error, base))
        raise ConfigError(f"{what} failed ({describe_error(error)}). Set {remedy}.") from error


def describe_error(error: Exception) -> str:
    """The kind of a compiler's error and the first paragraph of what it says, in one line."""
    reason = " ".join(str(error).strip().partition("\n\n")[0].split())
    return f"{type(error).__name__}: {textwrap.shorten(reason, 400, placeholder=' …')}"


def _compiler_errors() -> dict[type[Exception], tuple[str, str]]:
    """The errors of the compilers that are imported by now, with what failed and the remedy."""
    return {
        getattr(sys.modules[module], base): (what, remedy)
        for module, base, what, remedy in COMPILERS
        if module in sys.modules
    }
