"""Precision and kernels: what "auto" means on a device."""

import torch

from engine import compat
from models.ops import fused_obstacle, use_kernels
from utils.errors import ConfigError
from utils.logging import logger


def resolve_amp_dtype(name: str, device: torch.device) -> str:
    """The autocast type that AMP_DTYPE `name` means on `device`; warns of one that a CPU computes slowly."""
    cuda = device.type == "cuda"
    if name != "auto":
        if name == "float16" and not cuda:
            logger.warning("float16 is slow on CPUs; --amp-dtype auto chooses what is fast")
        return name
    bfloat16 = not cuda and compat.cpu_multiplies_bfloat16()
    name = "float16" if cuda else "bfloat16" if bfloat16 else "float32"
    logger.info(f"AMP_DTYPE auto: {name}")
    return name


def resolve_kernels(name: str, device: torch.device) -> str:
    """The kernels that MODEL.KERNELS `name` means on `device`, which are used from now on.

    Raises ConfigError for those that it cannot run.
    """
    cuda = device.type == "cuda"
    obstacle = fused_obstacle() if cuda or name == "fused" else "the device is a CPU"
    if name == "auto":
        name = "reference" if obstacle else "fused"
        if cuda:
            reason = f", because {obstacle}" if obstacle else ""
            logger.info(f"MODEL.KERNELS auto: {name}{reason}")
    elif name == "fused" and obstacle:
        raise ConfigError(
            f"MODEL.KERNELS fused cannot run here: {obstacle}. Set it to auto or reference."
        )
    use_kernels(name)
    return name
