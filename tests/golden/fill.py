"""Deterministic weights and inputs for the golden files in this folder.

The golden files hold what the published reference implementation of DAT (CVPR 2022) and DAT++ answers when its
parameters are filled by `fill_state_dict` and its input is `make_images`.  A model with the same state-dict names and
shapes, filled the same way, must give the same numbers.
"""

import zlib

import numpy as np
import torch


def _normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard-normal float32 values of `shape`, a pure function of `name`."""
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return (
        torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        if shape
        else torch.tensor(0.0)
    )


def fill_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New values for every floating-point parameter of `state`; integer buffers and `attn_mask` are kept.

    The scales keep activations of order one through all the stages and give the deformable layers offsets that are
    large enough to matter (a fair share of sampling points leaves the feature map).
    """
    filled = {}
    for name, value in state.items():
        if not value.is_floating_point() or name.endswith("attn_mask"):
            filled[name] = value
            continue
        noise = _normal(name, tuple(value.shape))
        if name.endswith("bias") or "table" in name or name.endswith("rpb"):
            filled[name] = 0.5 * noise
        elif value.ndim == 1:  # LayerNorm gains, layer scales
            filled[name] = 1.0 + 0.2 * noise
        elif "conv_offset" in name and name.endswith("3.weight"):  # the 1x1 projection to (dy, dx)
            filled[name] = 2.0 * noise / value[0].numel() ** 0.5
        else:
            filled[name] = noise / value[0].numel() ** 0.5  # unit-variance fan-in
    return filled


def make_images(batch: int, height: int, width: int) -> torch.Tensor:
    """Images of shape [batch, 3, height, width], standard normal, smooth enough for sampling positions to matter."""
    coarse = _normal(f"images-{batch}-{height}-{width}", (batch, 3, height // 8, width // 8))
    return torch.nn.functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    )
