"""Class gradients (Grad-CAM): on which places of the last map the score of a class depends."""

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn


@torch.enable_grad()
def class_gradients(model: nn.Module, images: Tensor, classes: list[int]) -> Tensor:
    """Grad-CAM of `classes` (K) for one image, (K, H', W'), not negative: relu(Σ_c α_c A_c).

    A is the model's last normalised map, α_c the mean over its places of the gradient of the class's logit
    (arXiv 1610.02391, eq. 1 and 2). Where the logit is linear in the mean of that map, as in DAT, this is the class
    activation map. A ViT's last map is what its last block reads, as its class token alone reaches the logits.

    images: (1, in_chans, H, W), normalised. Raises ValueError for a model without such a map.
    """
    with torch.no_grad():
        features = _last_map(model, images)
    features.requires_grad_()
    logits = _head(model, features)[0]
    maps = []
    for index in classes:
        (gradient,) = torch.autograd.grad(logits[index], features, retain_graph=True)
        weighted, alpha = (_as_map(model, part) for part in (features.detach(), gradient))
        maps.append((weighted * alpha.mean((0, 1))).sum(-1).relu())
    return torch.stack(maps)


def _last_map(model: nn.Module, images: Tensor) -> Tensor:
    if not isinstance(model, VisionTransformer):
        return model.forward_features(images).detach()
    inputs: list[Tensor] = []
    hook = model.blocks[-1].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        model(images)
    finally:
        hook.remove()
    return inputs[0].detach()


def _head(model: nn.Module, features: Tensor) -> Tensor:
    if isinstance(model, VisionTransformer):
        features = model.norm(model.blocks[-1](features))
    return model.forward_head(features)


def _as_map(model: nn.Module, features: Tensor) -> Tensor:
    """Features of one image as (H', W', C)."""
    if isinstance(model, VisionTransformer):
        return features[0, model.num_prefix_tokens :].unflatten(0, model.patch_embed.grid_size)
    if features.ndim != 4:
        raise ValueError(
            f"{type(model).__name__} has no last map, its features are {list(features.shape)}"
        )
    return (
        features[0]
        if getattr(model, "output_fmt", "NCHW") == "NHWC"
        else features[0].movedim(0, -1)
    )
