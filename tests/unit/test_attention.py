"""helpers/attention.py: weights and points from gradients reproduce the output of every mixer.

pytest tests/unit/test_attention.py
"""

import numpy as np
import pytest
import timm
import torch
from helpers.attention import query_attention, record_attention

from analysis.recording import NEGLIGIBLE
from models.dat import MIXERS, DATConfig
from models.ops import convolve, sample

CONFIG = DATConfig(
    dims=(24,) * 4, num_heads=(4,) * 4, offset_groups=(2,) * 4, sr_ratios=(3,) * 4, window_size=4
)
PLUS_PLUS = {
    "plus_plus": True,
    "stages": ("ND", "ND", "NDND", "DD"),
    "offset_strides": (4, 2, 1, 1),
}
# Two windows high, where the shift joins the first and the last rows; padded in width.
SIZE = (8, 10)
QUERIES = [(0, 0), (4, 5), (7, 9)]


@pytest.fixture(params=QUERIES, ids=str)
def query(request):
    return request.param


def make_mixer(letter: str, noise: float = 0.3) -> torch.nn.Module:
    """A mixer with large random weights, so that attention is far from uniform and offsets are long."""
    torch.manual_seed(0)
    mixer = MIXERS[letter](CONFIG, 0, SIZE).eval().requires_grad_(False)
    for parameter in mixer.parameters():
        parameter.copy_(parameter + noise * torch.randn_like(parameter))
    return mixer


def values(mixer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The values that the weights belong to, (Hk, Wk, C), computed without the recording."""
    if hasattr(mixer, "qkv"):
        return mixer.qkv(x)[0, ..., -x.shape[-1] :]
    if hasattr(mixer, "positions"):
        positions = mixer.positions(mixer.q(x))
        source = sample(x, positions).unflatten(1, positions.shape[2:4])
    else:
        source = mixer.reduce(x)
    return mixer.kv(source)[0, ..., -x.shape[-1] :]


@pytest.mark.parametrize("letter", "LSNDGP")
def test_weights_of_the_values_are_the_mixers_output(letter, query):
    mixer, x = make_mixer(letter), torch.randn(1, *SIZE, 24)
    weights = query_attention(mixer, x, query).weights
    assert weights.min() >= 0
    assert weights.max() > 2 * weights.mean()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(4))
    by_head = values(mixer, x).unflatten(-1, (4, -1))  # (Hk, Wk, M, D)
    z = torch.einsum("mhw,hwmd->md", weights, by_head).flatten()
    torch.testing.assert_close(mixer.proj(z), mixer(x)[0, *query], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("letter", "LSN")
def test_the_output_depends_on_the_cells_with_weight_and_no_others(letter, query):
    mixer, x = make_mixer(letter, noise=0), torch.randn(1, *SIZE, 24)
    weighted = (query_attention(mixer, x, query).weights > NEGLIGIBLE).any(0)
    assert 2 <= weighted.sum() <= 16
    for cell in np.ndindex(*SIZE):
        changed = x.clone()
        changed[0, *cell] += torch.randn(24)
        same = torch.allclose(mixer(changed)[0, *query], mixer(x)[0, *query], atol=1e-6)
        assert same != weighted[cell], cell


def test_a_convolution_samples_at_the_recorded_points(query):
    mixer, x = make_mixer("C"), torch.randn(1, *SIZE, 24)
    attention = query_attention(mixer, x, query)
    torch.testing.assert_close(attention.weights.sum((1, 2)), torch.ones(4))
    centres = torch.tensor(SIZE) - 1
    positions = (attention.points - 0.5) / centres * 2 - 1  # ±1 at the border cells' centres
    source = sample(x, positions[None])[0].unflatten(-1, (4, -1))  # (9, M, D)
    kernel = mixer.conv.weight.flatten(2).unflatten(0, (4, -1))  # (M, D, D, 9)
    theta = convolve(mixer.positions, x)[0, *query]
    modulation = theta[36:].sigmoid().view(2, 9).repeat_interleave(2, 0)
    z = torch.einsum("moik,mk,kmi->mo", kernel, modulation, source).flatten() + mixer.conv.bias
    torch.testing.assert_close(mixer.proj(z), mixer(x)[0, *query], atol=1e-4, rtol=1e-4)
    strength = (kernel * modulation[:, None, None]).norm(dim=(1, 2))
    share = strength / strength.sum(1, keepdim=True)
    torch.testing.assert_close(attention.weights.flatten(1), share)


@pytest.mark.parametrize("architecture", [{}, PLUS_PLUS], ids=["dat", "dat++"])
def test_points_are_the_models_sampling_positions(architecture):
    torch.manual_seed(0)
    model = timm.create_model("dat_micro", **architecture).eval()
    images = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        samplings = model.sampling_positions(images)
    records = record_attention(model, images, (0.9, 0.2), [(s.stage, s.block) for s in samplings])
    for record, sampling in zip(records, samplings, strict=True):
        size = torch.tensor(sampling.map_size)
        assert record.map_size == sampling.map_size
        assert record.query == (int(0.9 * size[0]), int(0.2 * size[1]))
        for ours, theirs in (
            (record.attention.points, sampling.positions[0]),
            (record.attention.reference, sampling.reference),
        ):
            cells = (theirs * (size - 1) + size) / 2  # -1 is at 0.5, 1 at half a cell from the end
            torch.testing.assert_close(ours, cells)
