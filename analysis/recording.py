"""Recording of all attention weights of a model in one forward pass, every query of every block.

Whatever goes through a softmax is read where it is computed: of the mixers of models/attention.py in `ops.attend`, of
timm's Swin, ViT and PVTv2 in the module that drops weights out. A deformable convolution has no softmax: its modulation
times the norm of the kernel's slice is read. The tests compare all of it with the gradient of the output by the values.

Shapes: M heads   G offset groups   P parts that are kept: heads, groups, or 1   H, W map, N = H · W queries
Hk, Wk grid of keys   S keys of a query. Places are (y, x) in cells of the map, from its upper left corner.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import timm.models.pvt_v2 as pvt
import timm.models.swin_transformer as swin
import torch
from timm.layers.attention import Attention as ViTAttention
from torch import Tensor, nn

from models import ops
from models.attention import (
    DATPlusPlusGeometry,
    DeformableAttention,
    DeformableConvolution,
    GlobalAttention,
    NeighborhoodAttention,
    WindowAttention,
)
from models.dat import DAT

ROUNDING = 1e-4  # of a cell
NEGLIGIBLE = 1e-30  # a shifted window leaves e^-100 to cells that only the shift brought into it

KINDS = {
    "L": "windows",
    "S": "shifted windows",
    "N": "neighbourhood attention",
    "D": "deformable attention",
    "G": "global attention",
    "P": "spatial reduction",
    "C": "deformable convolution",
}

# --- Layouts --------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """Keys that are cells: query (y, x) has `rows[y]` · `columns[x]` of them, from (first_row[y], first_column[x]).

    In a row of weights, key (i, j) of that rectangle is entry i · columns.max() + j; entries outside of it are 0.
    """

    key_map: tuple[int, int]  # (Hk, Wk); its cells are larger than the map's where keys are reduced
    first_row: Tensor  # (H) int64, as are the others
    rows: Tensor  # (H)
    first_column: Tensor  # (W)
    columns: Tensor  # (W)

    def places(self, query: tuple[int, int]) -> Tensor:
        """The keys of query (y, x) as numbers of cells of the key map, int64 (S); -1 where there is none."""
        i, j = torch.arange(int(self.rows.max())), torch.arange(int(self.columns.max()))
        y, x = query
        cells = (self.first_row[y] + i)[:, None] * self.key_map[1] + self.first_column[x] + j
        inside = (i < self.rows[y])[:, None] & (j < self.columns[x])
        return torch.where(inside, cells, -1).flatten()


class Points(NamedTuple):
    """Keys that are sampled points, the same for all queries."""

    grid: tuple[int, int]  # (Hk, Wk), S = Hk · Wk
    points: Tensor  # (G, S, 2)
    reference: Tensor  # (S, 2), the points without their offsets
    clamped: bool  # points beyond the border were moved to it (DAT++)


class Taps(NamedTuple):
    """The nine points of a deformable convolution, every query's own."""

    points: Tensor  # (G, N, 9, 2)
    reference: Tensor  # (N, 9, 2)


class QueryAttention(NamedTuple):
    """What one query attends to: all cells of the key map, or points."""

    weights: Tensor  # (P, Hk, Wk) of cells, (P, S) of points
    points: Tensor | None = None  # (G, S, 2)
    reference: Tensor | None = None  # (S, 2), the points without their offsets


@dataclass(frozen=True)
class BlockWeights:
    """The attention of all queries of one block.

    weights: (P, N, S), float32; a row sums to 1, but for what goes to `elsewhere`.
    parts: what a part is: "head", "group" or "mean".
    elsewhere: the largest share that a query gives to keys that have no place, such as a class token.
    """

    stage: int  # from 0, as is block
    block: int
    letter: str  # of the mixer, see models/attention.py
    map_size: tuple[int, int]
    cell: int  # pixels of the image along the side of a cell
    heads: int
    parts: str
    weights: Tensor
    layout: Cells | Points | Taps
    elsewhere: float = 0.0

    @property
    def name(self) -> str:
        """Stage and block, counted from 1: "3.2"."""
        return f"{self.stage + 1}.{self.block + 1}"

    @property
    def key_cell(self) -> int:
        """Pixels of the image along the side of a key's cell, which is larger where keys are reduced."""
        if not isinstance(self.layout, Cells):
            return self.cell
        sides = zip(self.map_size, self.layout.key_map, strict=True)
        return self.cell * round(max(positions / keys for positions, keys in sides))

    def at(self, query: tuple[int, int]) -> QueryAttention:
        """What the query at cell (y, x) of the map attends to."""
        row = query[0] * self.map_size[1] + query[1]
        weights, layout = self.weights[:, row], self.layout
        if isinstance(layout, Points):
            return QueryAttention(weights, layout.points, layout.reference)
        if isinstance(layout, Taps):
            return QueryAttention(weights, layout.points[:, row], layout.reference[row])
        places = layout.places(query)
        height, width = layout.key_map
        cells = torch.zeros(len(weights), height * width)
        cells[:, places[places >= 0]] = weights[:, places >= 0]
        return QueryAttention(cells.unflatten(1, (height, width)))


class Recording(NamedTuple):
    """A forward pass: the logits (classes), float32, and the blocks in the order of the model."""

    logits: Tensor
    blocks: list[BlockWeights]


class Health(NamedTuple):
    """Sampled points of a block in four numbers."""

    offset: float  # mean length, pixels of the image
    outside: float  # share of points beyond the centres of the border cells, or clamped to them
    coverage: float  # share of the map's cells that a point's bilinear reading touches
    distance: float  # mean distance of a point between two offset groups, pixels; 0 for one group


def measure_points(layout: Points, map_size: tuple[int, int], cell: int) -> Health:
    """The health of the points of a map of `map_size` (H, W)."""
    points, size = layout.points, torch.tensor(map_size)
    centres = points - 0.5  # the centres of the cells are whole numbers
    # What was clamped is on the border, to rounding; what was not and lies there reads a cell as any other.
    margin = ROUNDING if layout.clamped else -ROUNDING
    outside = ((centres < margin) | (centres > size - 1 - margin)).any(-1)
    first = centres.floor()
    share = centres - first
    touched = torch.zeros(map_size, dtype=torch.bool)
    for dy in (0, 1):
        for dx in (0, 1):
            step = torch.tensor((dy, dx))
            weight = torch.where(step.bool(), share, 1 - share).prod(-1)
            y, x = (first + step).long().unbind(-1)
            valid = (
                (weight > ROUNDING) & (y >= 0) & (y < map_size[0]) & (x >= 0) & (x < map_size[1])
            )
            touched[y[valid], x[valid]] = True
    groups = len(points)
    between = torch.zeros(())
    if groups > 1:
        pairs = torch.combinations(torch.arange(groups))
        between = (points[pairs[:, 0]] - points[pairs[:, 1]]).norm(dim=-1).mean()
    return Health(
        offset=cell * (points - layout.reference).norm(dim=-1).mean().item(),
        outside=outside.float().mean().item(),
        coverage=touched.float().mean().item(),
        distance=cell * between.item(),
    )


# --- Recording ------------------------------------------------------------------------------------


def can_record(model: nn.Module) -> bool:
    """Whether attention of `model` can be recorded: a DAT with any mixers, timm's Swin, ViT and PVTv2."""
    return any(True for _ in _mixers(model))


@torch.no_grad()
def record(
    model: nn.Module, images: Tensor, *, heads: bool = False, last: bool = False
) -> Recording:
    """The attention of all queries of one image in every block, or in the `last` block of each kind of each stage.

    images: (1, in_chans, H, W), normalised. heads: keep every head instead of the mean of each offset group's (D, C),
    or of all of them.
    """
    mixers = list(_mixers(model))
    if last:
        latest = {(mixer.stage, mixer.letter): mixer.block for mixer in mixers}
        mixers = [one for one in mixers if latest[one.stage, one.letter] == one.block]
    found: list[BlockWeights] = []
    with _hooked(mixers, partial(_keep, found, heads)):
        logits = model(images)[0].float()
    return Recording(logits, found)


class Mixer(NamedTuple):
    """A layer whose attention can be recorded."""

    module: nn.Module  # whose input and weights are seen
    owner: nn.Module  # what knows the layout: the module itself, or a block
    stage: int
    block: int
    letter: str
    cell: int  # pixels of the image along the side of a cell


def _mixers(model: nn.Module) -> Iterator[Mixer]:
    """The recordable layers of `model`, in its order."""
    if isinstance(model, DAT):
        for i, letters in enumerate(model.config.stages):
            for j, letter in enumerate(letters):
                attn = model.stages[i].blocks[j].attn
                yield Mixer(attn, attn, i, j, letter, model.feature_info[i]["reduction"])
        return
    stages = getattr(model, "layers", None) or getattr(model, "stages", None)
    if stages is None and hasattr(model, "blocks"):
        stages = [model]
    for i, stage in enumerate(stages or ()):
        for j, block in enumerate(getattr(stage, "blocks", ())):
            attn = getattr(block, "attn", None)
            if isinstance(attn, swin.WindowAttention):
                owner, letter = block, "S" if any(block.shift_size) else "L"
            elif type(attn) is ViTAttention and hasattr(model, "patch_embed"):
                owner, letter = model, "G"
            elif isinstance(attn, pvt.Attention):
                owner, letter = attn, "G" if attn.sr is None else "P"
            else:
                continue
            yield Mixer(attn, owner, i, j, letter, model.feature_info[i]["reduction"])


@contextmanager
def _hooked(mixers: list[Mixer], keep: Callable) -> Iterator[None]:
    """Around a forward pass: `keep(mixer, inputs, attended)` is called for each of `mixers`."""
    attended: list[ops.Attended] = []
    hooks, fused = [], []

    def clear(module: nn.Module, inputs: tuple) -> None:
        attended.clear()

    def see_weights(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        attended.append(inputs[0].float().flatten(0, 1))

    def finish(mixer: Mixer, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        keep(mixer, inputs, [one if isinstance(one, Tensor) else one.weights for one in attended])
        attended.clear()

    for mixer in mixers:
        hooks.append(mixer.module.register_forward_pre_hook(clear))
        hooks.append(mixer.module.register_forward_hook(partial(finish, mixer)))
        if hasattr(mixer.module, "fused_attn"):  # timm's: the reference is not fused
            fused.append((mixer.module, mixer.module.fused_attn))
            mixer.module.fused_attn = False
            hooks.append(mixer.module.attn_drop.register_forward_hook(see_weights))
    try:
        with ops.recorded_attention(attended.append):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, value in fused:
            module.fused_attn = value


def _keep(
    found: list[BlockWeights],
    heads: bool,
    mixer: Mixer,
    inputs: tuple,
    attended: list[Tensor],
) -> None:
    """Append to `found` what `mixer` did with `inputs`."""
    size, groups, elsewhere = None, 1, 0.0
    module = mixer.module
    if isinstance(module, DeformableConvolution):
        size = tuple(inputs[0].shape[1:3])
        weights, layout = _convolution(module, inputs[0])
        groups = len(layout.points)
    elif isinstance(module, DeformableAttention):
        size = tuple(inputs[0].shape[1:3])
        weights, layout = attended[0], _points(module, inputs[0])
        groups = len(layout.points)
    elif isinstance(module, GlobalAttention):
        size = tuple(inputs[0].shape[1:3])
        weights, layout = attended[0], _complete(size, tuple(module.reduce(inputs[0]).shape[1:3]))
    elif isinstance(module, WindowAttention | NeighborhoodAttention):
        size = tuple(inputs[0].shape[1:3])
        weights, layout = _in_rectangles(
            attended[0], module.num_heads, *_cells_of(module, *size), size
        )
    elif isinstance(module, swin.WindowAttention):
        size = tuple(mixer.owner.input_resolution)
        weights, layout = _in_rectangles(
            attended[0], module.num_heads, *_cells_of_swin(mixer.owner, size), size
        )
    elif isinstance(module, pvt.Attention):
        size = tuple(inputs[1])
        weights = attended[0]
        reduced = size if module.sr is None else tuple(-(-n // module.sr.stride[0]) for n in size)
        layout = _complete(size, reduced)
    else:
        size = tuple(mixer.owner.patch_embed.grid_size)
        prefix = attended[0].shape[-1] - size[0] * size[1]  # class and other tokens without a place
        weights = attended[0][:, prefix:]
        elsewhere = weights[..., :prefix].sum(-1).max().item() if prefix else 0.0
        weights, layout = weights[..., prefix:], _complete(size, size)
    count = len(weights)
    if heads:
        parts = "head"
    else:
        parts = "group" if groups > 1 else "mean"
        weights = weights.unflatten(0, (groups, -1)).mean(1)
    found.append(
        BlockWeights(mixer.stage, mixer.block, mixer.letter, size, mixer.cell, count, parts,
                     weights.cpu(), layout, elsewhere)
    )  # fmt: skip


# --- Places of the keys ---------------------------------------------------------------------------


def _complete(size: tuple[int, int], key_map: tuple[int, int]) -> Cells:
    """All cells of the key map, for every query."""
    zeros = [torch.zeros(n, dtype=torch.int64) for n in size]
    full = [torch.full((n,), k, dtype=torch.int64) for n, k in zip(size, key_map, strict=True)]
    return Cells(key_map, zeros[0], full[0], zeros[1], full[1])


def _points(mixer: DeformableAttention, x: Tensor) -> Points:
    positions = mixer.positions(mixer.q(x))[0].cpu()  # (G, Hk, Wk, 2)
    grid = tuple(positions.shape[1:3])
    reference = mixer.positions.reference(grid).cpu()
    reference = mixer.geometry.place(reference, torch.zeros_like(reference))
    to_cells = (torch.tensor(x.shape[1:3]) - 1) / 2  # ±1 are the centres of the border cells
    points, reference = ((p + 1) * to_cells + 0.5 for p in (positions, reference))
    clamped = mixer.geometry is DATPlusPlusGeometry
    return Points(grid, points.flatten(1, 2), reference.flatten(0, 1), clamped)


def _convolution(mixer: DeformableConvolution, x: Tensor) -> tuple[Tensor, Taps]:
    """Weights (M, N, 9) ∝ modulation · norm of the kernel's slice, and the taps."""
    theta = ops.convolve(mixer.positions, x)[0].flatten(0, 1)  # (N, 27 G)
    groups, heads = theta.shape[-1] // 27, mixer.conv.groups
    offsets = theta[:, : 18 * groups].unflatten(-1, (groups, 9, 2)).transpose(0, 1)
    modulation = theta[:, 18 * groups :].sigmoid().unflatten(-1, (groups, 9)).transpose(0, 1)
    norms = mixer.conv.weight.unflatten(0, (heads, -1)).norm(dim=(1, 2)).flatten(1)  # (M, 9)
    weights = norms[:, None] * modulation.repeat_interleave(heads // groups, dim=0)
    window = torch.cartesian_prod(*2 * [torch.arange(-1.0, 2)])  # (9, 2)
    axes = [torch.arange(n) + 0.5 for n in x.shape[1:3]]
    reference = torch.cartesian_prod(*axes)[:, None] + window  # (N, 9, 2)
    taps = Taps(reference + offsets.cpu(), reference)
    return weights / weights.sum(-1, keepdim=True), taps


def _cells_of(
    mixer: WindowAttention | NeighborhoodAttention, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The cells (K, n) of a mixer's queries and (K, S) of its keys, in its own order; -1 for padding.

    A map of cell numbers is sent through the mixer's own windows, shifts and tiles as its queries and keys.
    """
    numbers = torch.arange(1, height * width + 1.0).view(1, height, width, 1)  # padding is 0
    seen: list[ops.Attended] = []
    hook = mixer.qkv.register_forward_hook(
        lambda module, inputs, output: torch.cat(3 * [inputs[0]], dim=-1)
    )
    channels = mixer.qkv.in_features
    try:
        with ops.recorded_attention(seen.append):
            # Not a call of the module, whose own hooks are recording.
            mixer.forward(numbers.expand(-1, -1, -1, channels).to(mixer.qkv.weight.device))
    finally:
        hook.remove()
    return tuple(
        part[:: mixer.num_heads, :, 0].round().long().cpu() - 1 for part in (seen[0].q, seen[0].k)
    )


def _cells_of_swin(block: nn.Module, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`_cells_of` for a block of timm's Swin: its queries and keys are the same cells."""
    numbers = torch.arange(1, size[0] * size[1] + 1.0).view(1, *size, 1)
    numbers = numbers.roll([-n for n in block.shift_size], (1, 2))
    below, right = (-n % w for n, w in zip(size, block.window_size, strict=True))
    numbers = nn.functional.pad(numbers, (0, 0, 0, right, 0, below))
    cells = swin.window_partition(numbers, block.window_size).flatten(1).long() - 1
    return cells, cells


def _in_rectangles(
    weights: Tensor, heads: int, queries: Tensor, keys: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Cells]:
    """Weights (K · M, n, S) of windows or tiles as (M, N, …), and the rectangles of keys that have weight.

    queries, keys: cells (K, n) and (K, S), -1 for padding.
    """
    height, width = size
    weights = weights.cpu().unflatten(0, (-1, heads))  # (K, M, n, S)
    visible = (weights > NEGLIGIBLE).any(1)  # (K, n, S)
    visible &= (queries >= 0)[:, :, None] & (keys >= 0)[:, None]
    window, place, key = visible.nonzero(as_tuple=True)
    query, cell = queries[window, place], keys[window, key]

    def extent(of_query: Tensor, of_key: Tensor, length: int) -> tuple[Tensor, Tensor]:
        first = torch.full((length,), length).scatter_reduce(0, of_query, of_key, "amin")
        last = torch.zeros(length, dtype=torch.int64).scatter_reduce(0, of_query, of_key, "amax")
        return first, last - first + 1

    first_row, rows = extent(query // width, cell // width, height)
    first_column, columns = extent(query % width, cell % width, width)
    layout = Cells(size, first_row, rows, first_column, columns)
    row_length = int(columns.max())
    entry = (cell // width - first_row[query // width]) * row_length
    entry += cell % width - first_column[query % width]
    kept = torch.zeros(heads, height * width, int(rows.max()) * row_length)
    kept[:, query, entry] = weights.transpose(0, 1)[:, window, place, key]
    return kept, layout
