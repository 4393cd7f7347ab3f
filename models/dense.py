"""Backbones of detectors and segmenters: a feature pyramid, frozen stages, parameter groups with layer decay.

`backbone` is a timm model (a DAT, a Swin), `features` what timm.create_model makes of it with features_only.
"""

from collections import OrderedDict

from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models.freezing import keep_in_eval
from utils.errors import ConfigError


class BackboneWithFPN(nn.Module):
    """A feature pyramid (arXiv 1612.03144) on timm's features, as torchvision's detectors take a backbone.

    Each map of `features` has a LayerNorm before the pyramid, as in Swin's detectors: a DAT's own norm is that of the
    classifier. Raises ConfigError for features that are not NCHW.
    """

    def __init__(self, features: nn.Module, out_channels: int = 256):
        super().__init__()
        if features.output_fmt != "NCHW":
            raise ConfigError(
                f"the features are {features.output_fmt.value}, expected NCHW: give timm.create_model "
                "feature_cls='getter'"
            )
        channels = features.feature_info.channels()
        self.features = features
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) to maps (B, `out_channels`, ·, ·) by name: "0", "1", … of the strides of `features`, "pool"."""
        maps = self.features(images)  # (B, C, H/4, W/4), (B, 2C, H/8, W/8), …
        normed = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(normed)))


def freeze_stages(backbone: nn.Module, count: int) -> None:
    """Freeze the stem and the first `count` stages of `backbone`, as mmdetection's frozen_stages.

    They need no gradient and stay in evaluation mode, without stochastic depth, also when the detector is put in
    training mode. Raises ConfigError for a count that is negative or leaves no stage.
    """
    _check_layers(backbone)
    layers = group_parameters(backbone, backbone.group_matcher(coarse=True))  # 0: the stem
    stages = len(backbone.feature_info)
    if not 0 <= count < stages:
        raise ConfigError(f"{count} frozen stages: expected 0, the stem alone, to {stages - 1}")
    for name in (name for layer in range(count + 1) for name in layers[layer]):
        backbone.get_parameter(name).requires_grad = False
    for module in backbone.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            keep_in_eval(module)


def parameter_groups(
    model: nn.Module, backbone: nn.Module, *, lr: float, weight_decay: float, layer_decay: float
) -> list[dict]:
    """What is trained of `model`, the detector or segmenter around `backbone`, as groups for an optimizer of torch.

    The last layer of `backbone` has the learning rate lr · `layer_decay`, each layer before it `layer_decay` times that
    of the next (BEiT, arXiv 2106.08254), and the rest of `model` lr. Layers are those of `backbone.group_matcher()`.
    Vectors and what `backbone.no_weight_decay()` names are not decayed. Raises ConfigError where a layer decay other
    than 1 is asked for and `backbone` has no layers.
    """
    scales: dict[nn.Parameter, float] = {}
    if layer_decay != 1:
        _check_layers(backbone)
        depth = group_parameters(backbone, backbone.group_matcher(), reverse=True)
        last = max(depth.values())
        for name, parameter in backbone.named_parameters():
            scales[parameter] = layer_decay ** (1 + last - depth[name])
    exempt = getattr(backbone, "no_weight_decay", set)()
    free = {parameter for name, parameter in backbone.named_parameters() if name in exempt}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and parameter not in free
            groups.setdefault((scales.get(parameter, 1.0), decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * scale, "weight_decay": weight_decay if decayed else 0.0}
        for (scale, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _check_layers(backbone: nn.Module) -> None:
    if not hasattr(backbone, "group_matcher"):
        raise ConfigError(
            f"{type(backbone).__name__} does not say which its layers are: give the timm model itself, which "
            "timm.create_model(…, features_only=True, feature_cls='getter') has as `model`"
        )
