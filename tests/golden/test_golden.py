"""Parity with the released code: logits, loss, sampling positions and gradient norms."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import models  # noqa: F401  registers the variants
from golden.fill import fill_state_dict, make_images
from models import ops
from models.convert import checkpoint_filter_fn, to_official

GOLDEN = Path(__file__).parent


def filled_model(name):
    model = timm.create_model(name).eval()
    filled = fill_state_dict(to_official(model.state_dict(), model))
    model.load_state_dict(checkpoint_filter_fn({"model": filled}, model))
    return model


@pytest.mark.parametrize(
    "name",
    [
        "dat_tiny",
        "dat_pp_tiny",
        pytest.param("dat_base_384", marks=pytest.mark.slow),
        pytest.param("dat_pp_base_384", marks=pytest.mark.slow),
    ],
)
def test_golden_numbers(name):
    expected = load_file(GOLDEN / f"{name}.safetensors")
    metadata = json.loads((GOLDEN / f"{name}.json").read_text())
    model = filled_model(name)
    batch, size = len(expected["logits"]), model.pretrained_cfg["input_size"][1]
    images = make_images(batch, size, size)

    with torch.no_grad():
        sampling = model.sampling_positions(images)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(sampling[0].positions, expected["positions_first"], **close)
    torch.testing.assert_close(sampling[-1].positions, expected["positions_last"], **close)

    logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(batch) + 7)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected["loss"].view(()), **close)

    loss.backward()
    gradients = to_official({n: p.grad for n, p in model.named_parameters()}, model)
    assert gradients.keys() == metadata["grad_norms"].keys()
    for released, norm in metadata["grad_norms"].items():
        # A key bias shifts all scores of a query alike: its gradient is zero up to rounding.
        assert gradients[released].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), (
            released
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
def test_golden_logits_through_the_fused_kernels(name):
    """The first image alone: Triton's interpreter is slow."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("conftest.py could not turn Triton's interpreter on")
    expected = load_file(GOLDEN / f"{name}.safetensors")["logits"]
    model = filled_model(name)
    images = make_images(len(expected), 224, 224)
    ops.use_kernels("fused")
    with torch.no_grad():
        logits = model(images[:1])
    torch.testing.assert_close(logits, expected[:1], atol=1e-4, rtol=0)
