"""DAT and DAT++ in one file, as timm keeps an architecture: configuration, networks, variants.

DAT: CVPR 2022, arXiv 2201.00520. DAT++: arXiv 2309.01430.

Four stages of blocks; before each stage a convolution halves the map. Inside, tensors are channels-last:

    images (B, 3, H, W) → stem (B, H/4, W/4, C) → stage i (B, H/4/2ⁱ, W/4/2ⁱ, Cᵢ) → norm → mean → logits (B, classes)

Sizes are rounded up. What the second paper changes:

                     DAT                        DAT++ (`plus_plus`)                             where
    stem             4×4 patches                3×3 convolutions of stride 2                    make_stem
    between stages   2×2 patches                3×3 convolution of stride 2                     make_downsample
    block            mixer, MLP                 x + depthwise 3×3(x) first                      LocalPerceptionUnit
    MLP              fc2(GELU(fc1(x)))          the same unit on the hidden layer, before GELU  Mlp
    mixers           windows L, S; deformable   neighbourhoods N instead of windows             VARIANTS
    deformable       a key per position         fewer keys: the offset convolution has strides  VARIANTS
    coordinates      DATGeometry                DATPlusPlusGeometry                             attention.py
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from models import chunks, ops
from models.attention import (
    ConvStack,
    DATGeometry,
    DATPlusPlusGeometry,
    DeformableAttention,
    DeformableConvolution,
    GlobalAttention,
    NeighborhoodAttention,
    WindowAttention,
)
from models.checks import check_fields, check_size
from models.chunks import in_chunks
from models.convert import checkpoint_filter_fn
from utils.errors import ConfigError

# --- Configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DATConfig:
    """The shape of a network; lists have one entry per stage."""

    # One letter per block, see models/attention.py.
    stages: Sequence[str] = ("LS", "LS", "LDLDLD", "LD")
    # Channels, and heads that share them.
    dims: Sequence[int] = (96, 192, 384, 768)
    num_heads: Sequence[int] = (3, 6, 12, 24)
    # Deformable attention and convolution: offset groups.
    offset_groups: Sequence[int] = (1, 1, 3, 6)
    # Deformable attention: kernel and stride of the offset convolution.
    offset_kernels: Sequence[int] = (9, 7, 5, 3)
    offset_strides: Sequence[int] = (1, 1, 1, 1)
    # Spatial reduction (P): positions per key, along each axis.
    sr_ratios: Sequence[int] = (8, 4, 2, 1)
    # Positions along a side of a window or neighbourhood.
    window_size: int = 7
    # Pixels per position of the first stage; a power of two.
    patch_size: int = 4
    # Image size that the displacement tables are made for, one or (height, width); None: the model's `img_size`.
    rpe_img_size: int | Sequence[int] | None = None
    # DAT++ instead of DAT: stem, downsampling, blocks and coordinates; the mixers are those of `stages`.
    plus_plus: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.patch_size & (self.patch_size - 1):
            raise ConfigError(f"patch_size is {self.patch_size}, expected a power of two")
        # The convolutions of its stem halve the map and double the width, which begins with 2 · dim / patch_size.
        if self.plus_plus and not 2 <= self.patch_size <= 2 * self.dims[0]:
            raise ConfigError(
                f"patch_size is {self.patch_size}, a DAT++ of {self.dims[0]} channels in the first stage takes 2 to "
                f"{2 * self.dims[0]}"
            )
        lists = {n: v for n, v in vars(self).items() if isinstance(v, Sequence)}
        lengths = {n: len(v) for n, v in lists.items() if n != "rpe_img_size"}
        if len(set(lengths.values())) != 1:
            raise ConfigError(
                f"every list of a DAT needs one entry per stage; got lengths {lengths}"
            )
        for stage, letters in enumerate(self.stages):
            dim, heads, groups = self.dims[stage], self.num_heads[stage], self.offset_groups[stage]
            if unknown := set(letters) - set(MIXERS):
                raise ConfigError(
                    f"stage {stage} is {letters!r}; {sorted(unknown)} name no spatial mixer, "
                    f"there are {' '.join(MIXERS)}"
                )
            if dim % heads:
                raise ConfigError(f"stage {stage}: {heads} heads do not divide dim {dim}")
            if set(letters) & set("DC") and heads % groups:
                raise ConfigError(f"stage {stage}: {groups} groups do not divide {heads} heads")


# --- Mixers by letter -----------------------------------------------------------------------------


def make_window(config: DATConfig, stage: int, size: tuple[int, int], shifted: bool) -> nn.Module:
    """L and S."""
    return WindowAttention(config.dims[stage], config.num_heads[stage], config.window_size, shifted)


def make_neighborhood(config: DATConfig, stage: int, size: tuple[int, int]) -> nn.Module:
    """N."""
    return NeighborhoodAttention(config.dims[stage], config.num_heads[stage], config.window_size)


def make_deformable(config: DATConfig, stage: int, size: tuple[int, int]) -> nn.Module:
    """D."""
    return DeformableAttention(
        config.dims[stage],
        config.num_heads[stage],
        config.offset_groups[stage],
        config.offset_kernels[stage],
        config.offset_strides[stage],
        table_size=size,
        geometry=DATPlusPlusGeometry if config.plus_plus else DATGeometry,
    )


def make_global(config: DATConfig, stage: int, size: tuple[int, int], reduced: bool) -> nn.Module:
    """G and P."""
    reduction = config.sr_ratios[stage] if reduced else 1
    return GlobalAttention(config.dims[stage], config.num_heads[stage], size, reduction)


def make_convolution(config: DATConfig, stage: int, size: tuple[int, int]) -> nn.Module:
    """C."""
    return DeformableConvolution(
        config.dims[stage], config.num_heads[stage], config.offset_groups[stage]
    )


# letter → (config, stage, (H, W) of the map the model is made for) → module
MIXERS = {
    "L": partial(make_window, shifted=False),
    "S": partial(make_window, shifted=True),
    "N": make_neighborhood,
    "D": make_deformable,
    "G": partial(make_global, reduced=False),
    "P": partial(make_global, reduced=True),
    "C": make_convolution,
}


# --- Blocks ---------------------------------------------------------------------------------------


class LocalPerceptionUnit(nn.Module):
    """x + depthwise 3×3(x): a block of DAT++ starts with it."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return x + ops.convolve(self.conv, x)


@in_chunks(chunks.mlp_bytes)
class Mlp(nn.Module):
    """The MLP of a block, fc2(GELU(fc1(x))); DAT++ has a local perception unit before the activation."""

    def __init__(self, dim: int, expansion: int, plus_plus: bool):
        super().__init__()
        self.expansion = expansion
        self.fc1 = nn.Linear(dim, expansion * dim)
        self.local = LocalPerceptionUnit(expansion * dim) if plus_plus else None
        self.act = nn.GELU()
        self.fc2 = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        hidden = self.fc1(x.flatten(0, 2))  # (B · H · W, 4C)
        if self.local is not None:  # a convolution needs the map
            hidden = self.local(hidden.view(*x.shape[:3], -1)).flatten(0, 2)
        # fc2(GELU(hidden)); as one operation it keeps half as much for the backward pass.
        return ops.gelu_linear(self.act, self.fc2, hidden).view(x.shape)


class StochasticDepth(nn.Module):
    """x + branch(x); in training some images go without the branch, which is not computed for them.

    Stochastic depth (arXiv 1603.09382): each image of a batch is dropped with probability `drop_prob`, and what the
    branch adds to the others is divided by 1 − `drop_prob`. `balanced`: of every batch of B images as many are kept,
    round(B · (1 − drop_prob)), chosen on the device; what the branch adds to them is multiplied by B / kept. Each image
    is kept with the same probability, but no longer independently of the others, and all shapes are known beforehand.
    """

    def __init__(self, drop_prob: float, balanced: bool = False):
        super().__init__()
        self.drop_prob = drop_prob
        self.balanced = balanced

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, …) and a function that maps (b, …) to the same shape, image by image."""
        if not self.training or not self.drop_prob:
            return x + branch(x)
        keep_prob = 1 - self.drop_prob
        if self.balanced:
            batch = x.shape[0]
            kept = max(1, round(batch * keep_prob))
            if kept == batch:
                return x + branch(x)
            chosen = torch.randperm(batch, device=x.device)[:kept]
            return ops.add_chosen(x, branch, chosen, batch / kept)
        # One draw per image, on the host, because the number of kept images is a size.
        kept = torch.empty(x.shape[0], device=ops.drawing_device(x)).bernoulli_(keep_prob)
        return ops.add_kept(x, branch, kept, keep_prob)


class Block(nn.Module):
    """x += StochasticDepth(attn(LN(x))); x += StochasticDepth(mlp(LN(x))); DAT++ prepends local perception."""

    def __init__(
        self, dim: int, attn: nn.Module, drop_path: float, plus_plus: bool, balanced: bool = False
    ):
        super().__init__()
        self.lpu = LocalPerceptionUnit(dim) if plus_plus else nn.Identity()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4, plus_plus)
        self.drop_path = StochasticDepth(drop_path, balanced)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = self.lpu(x)
        # The branches get the kept images alone, so that dropped ones cost nothing.
        x = self.drop_path(x, lambda kept: self.attn(self.norm1(kept)))
        return self.drop_path(x, lambda kept: self.mlp(self.norm2(kept)))


# --- Stages ---------------------------------------------------------------------------------------


class Stage(nn.Module):
    """A convolution to half the map and another width (not in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, C'); in the first stage to the same shape."""
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)


def make_stem(in_chans: int, dim: int, patch_size: int, plus_plus: bool) -> ConvStack:
    """DAT: one patch embedding. DAT++: overlapping 3×3 convolutions, each halving the map and doubling the width."""
    if not plus_plus:
        return ConvStack(nn.Conv2d(in_chans, dim, patch_size, patch_size), nn.LayerNorm(dim))
    layers = []
    # Every convolution halves the map; the widths end at dim: dim / 2, dim for patches of 4.
    while patch_size > 1:
        width = dim * 2 // patch_size
        layers += [nn.Conv2d(in_chans, width, 3, 2, padding=1), nn.LayerNorm(width), nn.GELU()]
        in_chans, patch_size = width, patch_size // 2
    return ConvStack(*layers[:-1])  # no activation after the last norm


def make_downsample(dim: int, out_dim: int, plus_plus: bool) -> ConvStack:
    """Between stages: 2×2 patches (DAT) or an overlapping 3×3 convolution (DAT++), stride 2, without bias."""
    kernel, padding = (3, 1) if plus_plus else (2, 0)
    conv = nn.Conv2d(dim, out_dim, kernel, stride=2, padding=padding, bias=False)
    return ConvStack(conv, nn.LayerNorm(out_dim))


# --- Network --------------------------------------------------------------------------------------


class SamplingPoints(NamedTuple):
    """Where one deformable layer reads."""

    stage: int
    block: int
    positions: Tensor  # (B, G, Hk, Wk, 2), (y, x), ±1 at the centres of the map's border cells
    reference: Tensor  # (Hk, Wk, 2), the positions of zero offsets
    map_size: tuple[int, int]  # (H, W)
    reduction: int  # image pixels per cell of the map

    def offset_length(self) -> Tensor:
        """Length of every offset in pixels of the input image, (B, G, Hk, Wk)."""
        # Coordinates go from -1 to 1 between the centres of the border cells: (cells − 1) / 2 cells per unit.
        pixels = (self.positions.new_tensor(self.map_size) - 1) / 2 * self.reduction
        return ((self.positions - self.reference) * pixels).norm(dim=-1)


class DAT(nn.Module):
    """DAT or DAT++, a classifier and a backbone under timm's contract; any image size at any call.

    Keyword arguments beyond the signature are the fields of `DATConfig`; others raise TypeError,
    impossible values ConfigError. `img_size`, one or (height, width), sets the size of the displacement tables,
    nothing else.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stochastic_depth: str = "independent",
        **architecture,
    ):
        super().__init__()
        if stochastic_depth not in ("independent", "balanced"):
            raise ConfigError(
                f"stochastic_depth is {stochastic_depth!r}; it can be 'independent' or 'balanced'"
            )
        check_size("img_size", img_size)
        config = DATConfig(**architecture)
        self.config = config
        self.img_size = to_2tuple(config.rpe_img_size or img_size)
        # Attributes that timm reads.
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = config.dims[-1]
        self.output_fmt = "NHWC"

        dims = config.dims
        # The probability of being dropped grows from 0 in the first block to the full rate in the last.
        drop_path = calculate_drop_path_rates(drop_path_rate, [len(s) for s in config.stages], True)
        self.stem = make_stem(in_chans, dims[0], config.patch_size, config.plus_plus)
        self.stages = nn.Sequential()
        self.feature_info = []
        for i, letters in enumerate(config.stages):
            # Stage i works on a map of 1 / reduction of the image, which sets the size of its bias tables.
            reduction = config.patch_size * 2**i
            size = tuple(-(-extent // reduction) for extent in self.img_size)
            downsample = (
                make_downsample(dims[i - 1], dims[i], config.plus_plus) if i else nn.Identity()
            )
            blocks = [
                Block(
                    dims[i],
                    MIXERS[letter](config, i, size),
                    rate,
                    config.plus_plus,
                    balanced=stochastic_depth == "balanced",
                )
                for letter, rate in zip(letters, drop_path[i], strict=True)
            ]
            self.stages.append(Stage(downsample, blocks))
            # For timm's feature extraction: channels and reduction of what `stages.i` returns.
            info = {"num_chs": dims[i], "reduction": reduction, "module": f"stages.{i}"}
            self.feature_info.append(info)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = ClassifierHead(
            dims[-1], num_classes, global_pool, drop_rate, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.head.num_features  # twice as many with catavgmax

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the normalised last map (B, ⌈H/32⌉, ⌈W/32⌉, C)."""
        x = self.forward_stem(x)  # (B, H/4, W/4, C)
        x = self.stages(x)  # (B, H/32, W/32, 8C)
        return self.norm(x)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the first map (B, H/4, W/4, C)."""
        if torch.compiler.is_compiling():
            # A compiled graph is for one size: windows, masks and grids of symbols take minutes to reason about.
            for extent in x.shape[2:]:
                operator.index(extent)
        return self.stem(x.permute(0, 2, 3, 1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or to the pooled features (B, C) that the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after the stages `indices`, in `output_fmt` NCHW or NHWC; timm's signature and meaning.

        Before them the last map (B, H, W, C) that was computed, normalised if it is that of the last stage, unless
        `intermediates_only`. Raises ValueError for another format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it can be 'NCHW' or 'NHWC'")
        last = len(self.stages) - 1
        # Indices may be negative or a number of last stages; timm's own function reads them.
        take, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.forward_stem(x)
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                # The norm is that of the last stage: its channels are the only ones that fit.
                intermediates.append(self.norm(x) if norm and i == last else x)
        if output_fmt == "NCHW":
            intermediates = [y.permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == last else x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages that `forward_intermediates` with these `indices` never reaches; the stages that are kept.

        The norm and the classifier are for the last stage: without it they go too.
        """
        take, max_index = feature_take_indices(len(self.stages), indices)
        shorter = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def sampling_positions(self, x: Tensor) -> list[SamplingPoints]:
        """Where every deformable layer reads for the images (B, in_chans, H, W), in the order of the layers."""
        found = []

        # Hooks on the modules that compute positions, so that the forward pass is the ordinary one.
        def collect(stage: int, block: int, module: nn.Module, inputs: tuple, positions: Tensor):
            # With zero offsets the points are where `place` leaves them: DAT++ clamps those beyond the border.
            reference = module.reference(positions.shape[2:4])
            reference = module.geometry.place(reference, torch.zeros_like(reference))
            map_size, reduction = tuple(inputs[0].shape[1:3]), self.feature_info[stage]["reduction"]
            found.append(SamplingPoints(stage, block, positions, reference, map_size, reduction))

        hooks = [
            block.attn.positions.register_forward_hook(partial(collect, i, j))
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage.blocks)
            if isinstance(block.attn, DeformableAttention)
        ]
        try:
            self.stages(self.forward_stem(x))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier; 0 classes: none."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head.reset(num_classes, global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features

    def __prepare_scriptable__(self):
        # torch.jit.script calls this; without it, it would fail somewhere inside with a message about types.
        raise NotImplementedError(
            "a DAT cannot be scripted, because windows and padding follow the size of every input: use "
            "torch.export.export(model, (images,)), or torch.jit.trace(model, images) for images of one size"
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping what they computed."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the bias tables without weight decay; `rpb` is decayed, as released."""
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith(("bias_table", "rpe_table"))
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that order the parameters by depth, for layer-wise decay."""
        # With None a pattern's groups are its numbers: every block is a layer, in order.
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}


# --- Variants -------------------------------------------------------------------------------------

# What differs from DATConfig's defaults. DAT: windows alone in the first two stages, whose maps are large; then
# windows and deformable attention take turns. Small and base differ from tiny in the third stage's depth.
TINY = {"stages": ("LS", "LS", "LD" * 3, "LD")}
SMALL = {"stages": ("LS", "LS", "LD" * 9, "LD")}
BASE = {
    **SMALL,
    "dims": (128, 256, 512, 1024),
    "num_heads": (4, 8, 16, 32),
    "offset_groups": (1, 1, 4, 8),
}
# DAT++: neighbourhoods and deformable attention take turns, the last stage is deformable alone. Strides give 7 × 7 keys
# in every stage.
PP_TINY = {
    "stages": ("ND", "ND" * 2, "ND" * 9, "DD"),
    "dims": (64, 128, 256, 512),
    "num_heads": (2, 4, 8, 16),
    "offset_groups": (1, 2, 4, 8),
    "offset_strides": (8, 4, 2, 1),
    "plus_plus": True,
}
# 8 × 8 keys on maps of 32, 16 and 8 positions.
PP_NANO = {
    **PP_TINY,
    "stages": ("ND", "ND", "NDND", "DD"),
    "dims": (48, 96, 192, 384),
    "offset_kernels": (7, 5, 3, 3),
    "offset_strides": (4, 2, 1, 1),
}
PP_SMALL = {
    **PP_TINY,
    "dims": (96, 192, 384, 768),
    "num_heads": (3, 6, 12, 24),
    "offset_groups": (1, 2, 3, 6),
}
PP_BASE = {
    **PP_TINY,
    "dims": (128, 256, 512, 1024),
    "num_heads": (4, 8, 16, 32),
    "offset_groups": (2, 4, 8, 16),
}

# For 32×32 images: patches of 2 pixels give maps of 16, 8, 4 and 2 positions.
MICRO = {
    "stages": ("LS", "LD", "LDLD", "LD"),
    "dims": (32, 64, 128, 256),
    "num_heads": (1, 2, 4, 8),
    "offset_groups": (1, 1, 2, 4),
    "offset_kernels": (5, 5, 3, 3),
    "window_size": 4,
    "patch_size": 2,
}
# 4 × 4 keys on maps of 16, 8 and 4 positions.
PP_MICRO = {
    **MICRO,
    "stages": ("ND", "ND", "NDND", "DD"),
    "offset_strides": (4, 2, 1, 1),
    "window_size": 5,
    "plus_plus": True,
}

VARIANTS = {
    "dat_micro": MICRO,
    "dat_tiny": TINY,
    "dat_small": SMALL,
    "dat_base": BASE,
    "dat_base_384": {**BASE, "window_size": 12},
    "dat_pp_micro": PP_MICRO,
    "dat_pp_nano": PP_NANO,
    "dat_pp_tiny": PP_TINY,
    "dat_pp_small": PP_SMALL,
    "dat_pp_base": PP_BASE,
    "dat_pp_base_384": {**PP_BASE, "rpe_img_size": 224},
}
# Image sizes other than 224.
IMG_SIZES = {
    "dat_micro": 32,
    "dat_base_384": 384,
    "dat_pp_micro": 32,
    "dat_pp_nano": 128,
    "dat_pp_base_384": 384,
}


def pretrained_cfg(name: str) -> dict:
    """What timm keeps beside a model: how its images are prepared and where its ends are."""
    size = IMG_SIZES.get(name, 224)
    # The last map is smaller than the first by 8.
    pool_size = size // 8 // VARIANTS[name].get("patch_size", DATConfig.patch_size)
    return {
        "input_size": (3, size, size),
        "pool_size": (pool_size, pool_size),
        "num_classes": 10 if size == 32 else 1000,
        "crop_pct": 0.875 if size in (128, 224) else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
    }


# timm finds the settings of a module's models under this name.
default_cfgs = generate_default_cfgs({name: pretrained_cfg(name) for name in VARIANTS})


def create(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """The variant `name`; keyword arguments override its entry in `VARIANTS`."""
    return build_model_with_cfg(
        DAT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{"img_size": IMG_SIZES.get(name, 224), **VARIANTS[name], **kwargs},
    )


@register_model
def dat_micro(pretrained: bool = False, **kwargs) -> DAT:
    """DAT for 32×32 images (CIFAR, digits). Not published: a size of this project."""
    return create("dat_micro", pretrained, **kwargs)


@register_model
def dat_tiny(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-T: 82.0 % ImageNet top-1 as published."""
    return create("dat_tiny", pretrained, **kwargs)


@register_model
def dat_small(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-S: 83.7 % ImageNet top-1 as published."""
    return create("dat_small", pretrained, **kwargs)


@register_model
def dat_base(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-B: 84.0 % ImageNet top-1 as published."""
    return create("dat_base", pretrained, **kwargs)


@register_model
def dat_base_384(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-B for 384×384 images, windows of 12: 84.8 % ImageNet top-1 as published."""
    return create("dat_base_384", pretrained, **kwargs)


@register_model
def dat_pp_micro(pretrained: bool = False, **kwargs) -> DAT:
    """DAT++ for 32×32 images (CIFAR, digits). Not published: a size of this project."""
    return create("dat_pp_micro", pretrained, **kwargs)


@register_model
def dat_pp_nano(pretrained: bool = False, **kwargs) -> DAT:
    """DAT++ for 128×128 images, small enough to train without a GPU. Not published: a size of this project."""
    return create("dat_pp_nano", pretrained, **kwargs)


@register_model
def dat_pp_tiny(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-T++: 83.9 % ImageNet top-1 as published."""
    return create("dat_pp_tiny", pretrained, **kwargs)


@register_model
def dat_pp_small(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-S++: 84.6 % ImageNet top-1 as published."""
    return create("dat_pp_small", pretrained, **kwargs)


@register_model
def dat_pp_base(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-B++: 84.9 % ImageNet top-1 as published."""
    return create("dat_pp_base", pretrained, **kwargs)


@register_model
def dat_pp_base_384(pretrained: bool = False, **kwargs) -> DAT:
    """DAT-B++ for 384×384 images, tables of 224: 85.9 % ImageNet top-1 as published."""
    return create("dat_pp_base_384", pretrained, **kwargs)
