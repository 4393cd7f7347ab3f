#!/usr/bin/env python
"""What does a model look at? What one query reads in every stage, how strongly, and where the sampled points moved.

python tools/visualize.py --cfg configs/dat_tiny.yaml --pretrained dat_tiny_in1k_224.pth --image cat.jpg --point 0.4,0.6
"""

import argparse
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config
import data
import models
from data.decode import UNREADABLE, decode_pixels
from engine import checkpoint
from engine.pretrained import load_pretrained
from models.attention import DeformableAttention, DeformableConvolution, GlobalAttention
from models.dat import DAT
from models.ops import convolve
from utils.errors import ConfigError, DataError, StorageError, as_exit_code
from utils.rng import key, reseed

KINDS = {
    "L": "windows",
    "S": "shifted windows",
    "N": "neighbourhood",
    "D": "deformable attention",
    "G": "the whole map",
    "P": "the map, reduced",
    "C": "deformable convolution",
}

# --- What a query reads ---------------------------------------------------------------------------


class Reading(NamedTuple):
    """What one query of a mixer reads: the cells of a map, or points (y, x) in cells from the map's corner."""

    weights: Tensor  # (M, Hk, Wk), of every head, summing to 1
    points: Tensor | None = None  # (G, Hk, Wk, 2), of every group of heads
    reference: Tensor | None = None  # (Hk, Wk, 2), the points without their offsets


@torch.no_grad()
def read(mixer: nn.Module, x: Tensor, query: tuple[int, int]) -> Reading:
    """What `mixer` reads of the map `x` (1, H, W, C) for the query at cell (y, x)."""
    if isinstance(mixer, DeformableConvolution):
        return convolution_reading(mixer, x, query)
    weights = attention_weights(mixer, x, query)
    if isinstance(mixer, GlobalAttention):
        return Reading(weights.unflatten(1, mixer.reduce(x).shape[1:3]))
    if isinstance(mixer, DeformableAttention):
        points = mixer.positions(mixer.q(x))[0]
        reference = mixer.positions.reference(points.shape[1:3])
        reference = mixer.geometry.place(reference, torch.zeros_like(reference))
        to_cells = (torch.tensor(x.shape[1:3]) - 1) / 2  # ±1 are the centres of the border cells
        points, reference = ((p + 1) * to_cells + 0.5 for p in (points, reference))
        return Reading(weights.unflatten(1, reference.shape[:2]), points, reference)
    return Reading(weights)


@torch.enable_grad()
def attention_weights(mixer: nn.Module, x: Tensor, query: tuple[int, int]) -> Tensor:
    """The weights (M, …) that the query at cell (y, x) of the map `x` (1, H, W, C) gives to its keys.

    An attention is z = A(x) · v. With what the values are projected from in the place of v, and z not projected, the
    gradient of z is A, brought to its place by the mixer's own windows, shifts and padding. The keys are the cells of
    the map where one layer projects q, k and v, else what the mixer makes of them for `kv`.
    """
    source = None

    def pass_source(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        nonlocal source
        source = inputs[0]
        return torch.cat([output[..., : -source.shape[-1]].detach(), source], dim=-1)

    x = x.detach().requires_grad_()
    fused = hasattr(mixer, "qkv")
    hooks = [
        (mixer.qkv if fused else mixer.kv).register_forward_hook(pass_source),
        mixer.proj.register_forward_hook(lambda module, inputs, output: inputs[0]),
    ]
    try:
        z = mixer(x)[0, *query]  # (C)
    finally:
        for hook in hooks:
            hook.remove()
    one_of_each_head = z.unflatten(0, (mixer.num_heads, -1))[:, 0].sum()
    gradient = torch.autograd.grad(one_of_each_head, x if fused else source)[0][0]  # (…, C)
    return gradient.unflatten(-1, (mixer.num_heads, -1))[..., 0].movedim(-1, 0)


def convolution_reading(mixer: DeformableConvolution, x: Tensor, query: tuple[int, int]) -> Reading:
    """A convolution has no softmax: the share of (modulation · norm of the kernel's slice) stands for a weight."""
    theta = convolve(mixer.positions, x)[0, *query].unflatten(0, (-1, 3, 3))  # (27 G / 9, 3, 3)
    groups = len(theta) // 3
    offsets = theta[: 2 * groups].flatten().view(groups, 3, 3, 2)
    heads = mixer.conv.groups
    norms = mixer.conv.weight.unflatten(0, (heads, -1)).norm(dim=(1, 2))  # (M, 3, 3)
    weights = norms * theta[2 * groups :].sigmoid().repeat_interleave(heads // groups, dim=0)
    window = torch.stack(torch.meshgrid(*2 * [torch.arange(-1.0, 2)], indexing="ij"), dim=-1)
    reference = torch.tensor(query) + 0.5 + window
    return Reading(weights / weights.sum((1, 2), keepdim=True), reference + offsets, reference)


class Look(NamedTuple):
    """A reading and where in the model and the image it belongs."""

    stage: int  # from 0, as block
    block: int
    letter: str
    query: tuple[int, int]  # cell of the map
    size: tuple[int, int]  # of the map, in cells
    cell: int  # pixels of the image along a cell's side
    key_cell: int  # the same of a key's cell
    reading: Reading


@torch.no_grad()
def look(
    model: DAT, images: Tensor, point: tuple[float, float], places: list[tuple[int, int]]
) -> list[Look]:
    """What the query at `point`, (y, x) in shares of the image, reads in the blocks at `places`, (stage, block).

    `images` (1, in_chans, H, W) are normalised, `model` is in evaluation mode. The looks have the model's order.
    """
    looks = []
    x = model.stem(images.permute(0, 2, 3, 1))
    for i, stage in enumerate(model.stages):
        x = stage.downsample(x)
        cell, size = model.feature_info[i]["reduction"], tuple(x.shape[1:3])
        query = tuple(
            min(int(share * pixels) // cell, cells - 1)
            for share, pixels, cells in zip(point, images.shape[2:], size, strict=True)
        )
        for j, (block, letter) in enumerate(zip(stage.blocks, model.config.stages[i], strict=True)):
            if (i, j) in places:
                reading = read(block.attn, block.norm1(block.lpu(x)), query)
                key_cell = cell * model.config.sr_ratios[i] if letter == "P" else cell
                looks.append(Look(i, j, letter, query, size, cell, key_cell, reading))
            x = block(x)
    return looks


# --- Picture --------------------------------------------------------------------------------------

DPI = 100
COLUMNS = 4  # at least; four are 1200 pixels
PANEL, GAP, TITLE, HEADER, FOOTER = 2.88, 0.1, 0.28, 1.0, 0.6  # inches
WEIGHT_COLOURS = ListedColormap(plt.get_cmap("inferno")(np.linspace(0.15, 1, 256)))
QUERY_COLOUR = "#00e5ff"
NOT_READ = 1e-30  # shifted windows leave e^-100 to regions that only the shift made neighbours


class Panel(NamedTuple):
    """One picture of the figure: the query's weights, or the offsets of all groups."""

    look: Look
    title: str
    part: int | None = None  # the group of heads, without groups the head; None: the mean of all
    offsets: bool = False


def overview(looks: list[Look]) -> list[list[Panel | None]]:
    """A column for every stage: its looks, each above its offsets if it has any."""
    columns: dict[int, list[Panel]] = {}
    for seen in looks:
        column = columns.setdefault(seen.stage, [])
        column.append(Panel(seen, f"block {seen.block + 1}: {KINDS[seen.letter]}"))
        if seen.reading.points is not None:
            column.append(Panel(seen, points_text(seen), offsets=True))
    return [list(row) for row in zip_longest(*columns.values())]


def detail(seen: Look) -> list[list[Panel | None]]:
    """One look: a panel for every group of heads and one for the offsets, or one for every head."""
    if seen.reading.points is None:
        panels = [Panel(seen, f"head {i + 1}", i) for i in range(len(seen.reading.weights))]
    else:
        panels = [Panel(seen, f"group {i + 1}", i) for i in range(len(seen.reading.points))]
        panels.append(Panel(seen, points_text(seen), offsets=True))
    return [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]


def points_text(seen: Look) -> str:
    """The title of a panel of offsets."""
    groups = len(seen.reading.points)
    return f"its points, {groups} group{'s' * (groups > 1)}"


def draw(
    rows: list[list[Panel | None]],
    image: np.ndarray,
    point: tuple[float, float],
    title: str,
    subtitle: str,
) -> Figure:
    """The figure of `rows` over `image` (H, W, 3), in [0, 1]; `point` is (y, x) in shares of the image."""
    columns = max(COLUMNS, len(rows[0]))
    width = columns * (PANEL + GAP) + GAP
    height = HEADER + len(rows) * (PANEL + TITLE) + FOOTER
    figure = plt.figure(figsize=(width, height), dpi=DPI)
    figure.text(GAP / width, 1 - 0.22 / height, title, fontsize=14, weight="bold", va="center")
    figure.text(GAP / width, 1 - 0.5 / height, subtitle, fontsize=10, color="0.35", va="center")
    headlines = [stage_text(panel.look) for panel in rows[0]]
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            if panel is None:
                continue
            left = GAP + j * (PANEL + GAP)
            bottom = height - HEADER - (i + 1) * (PANEL + TITLE)
            box = (left / width, bottom / height, PANEL / width, PANEL / height)
            draw_panel(figure.add_axes(box), panel, image, point)
            if i == 0 and headlines[j] not in headlines[:j]:
                top = (bottom + PANEL + TITLE + 0.08) / height
                figure.text(left / width, top, headlines[j], fontsize=11, weight="bold")
    draw_legend(figure, [panel for row in rows for panel in row if panel])
    return figure


def stage_text(seen: Look) -> str:
    """The headline of the columns of a stage."""
    cells = "×".join(str(n) for n in seen.size)
    heads = len(seen.reading.weights)
    return f"Stage {seen.stage + 1}: {cells} cells, {heads} head{'s' * (heads > 1)}"


def draw_panel(ax: Axes, panel: Panel, image: np.ndarray, point: tuple[float, float]) -> None:
    """One panel: the image, darkened where nothing is read, and what the query makes of it."""
    height, width = image.shape[:2]
    ax.imshow(0.5 * image + 0.06, extent=(0, width, height, 0))
    if panel.offsets:
        note = draw_offsets(ax, panel.look)
    elif panel.look.reading.points is None:
        note = draw_cells(ax, panel, image)
    else:
        note = draw_points(ax, panel)
    if not panel.offsets:
        side = panel.look.cell
        corner = panel.look.query[1] * side, panel.look.query[0] * side
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=QUERY_COLOUR, zorder=4))
        style = {"markersize": 13, "markeredgecolor": "black", "markeredgewidth": 0.7, "zorder": 5}
        ax.plot(point[1] * width, point[0] * height, "*", color=QUERY_COLOUR, **style)
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], frame_on=False)
    ax.set_title(panel.title, fontsize=9.5, loc="left", pad=4)
    ax.set_title(note, fontsize=8.5, loc="right", pad=4, color="0.45")


def draw_cells(ax: Axes, panel: Panel, image: np.ndarray) -> str:
    """The weights as colours over the cells of the map; returns what to note."""
    weights = panel.look.reading.weights
    weights = (weights.mean(0) if panel.part is None else weights[panel.part]).numpy()
    side = panel.look.key_cell
    read_rows, read_columns = np.nonzero(weights > NOT_READ)
    top, bottom = read_rows.min() * side, (read_rows.max() + 1) * side
    left, right = read_columns.min() * side, (read_columns.max() + 1) * side
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white")
    ax.add_patch(frame)
    grey = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)  # leaves all colour to the weights
    ax.imshow(grey, extent=(0, image.shape[1], image.shape[0], 0)).set_clip_path(frame)
    colours = WEIGHT_COLOURS(weights / weights.max())
    colours[..., 3] = np.where(weights > NOT_READ, 0.7, 0)
    ax.imshow(colours, extent=(0, weights.shape[1] * side, weights.shape[0] * side, 0))
    return f"max {100 * weights.max():.2g} %"


def draw_points(ax: Axes, panel: Panel) -> str:
    """The weights as sizes and colours of the sampled points, the strongest on top; returns what to note."""
    reading, cell = panel.look.reading, panel.look.cell
    groups = len(reading.points)
    part = slice(None) if panel.part is None else slice(panel.part, panel.part + 1)
    weights = reading.weights.unflatten(0, (groups, -1)).mean(1)[part].flatten()
    order = weights.argsort()
    weights = weights[order].numpy()
    points = (cell * reading.points[part]).flatten(0, 2)[order].numpy()
    reference = reading.reference.expand_as(reading.points[part])
    reference = (cell * reference).flatten(0, 2)[order].numpy()
    share = weights / weights.max()
    draw_arrows(ax, reference, points, [(1, 1, 1, 0.15 + 0.7 * s**2) for s in share])
    largest = min(130, 15_000 / len(points))  # square points: all together half a panel at most
    ax.scatter(
        *points.T[::-1],
        s=2 + largest * share,
        c=WEIGHT_COLOURS(share),
        edgecolors="white",
        linewidths=0.3 + 0.5 * share,
        zorder=3,
    )
    return f"max {100 * weights.max():.2g} %"


def draw_offsets(ax: Axes, seen: Look) -> str:
    """Every group's points, each with its offset; returns what to note."""
    points, reference = (seen.cell * p for p in (seen.reading.points, seen.reading.reference))
    for group, colour in zip(points, group_colours(len(points)), strict=True):
        end = group.flatten(0, 1).numpy()
        draw_arrows(ax, reference.flatten(0, 1).numpy(), end, [colour])
        ax.scatter(*end.T[::-1], s=8, color=[colour], zorder=3)
    return f"mean offset {(points - reference).norm(dim=-1).mean():.2g} px"


def draw_arrows(ax: Axes, start: np.ndarray, end: np.ndarray, colours: list[tuple]) -> None:
    """Arrows between points (n, 2) as (y, x)."""
    ax.quiver(
        *start.T[::-1],
        *(end - start).T[::-1],
        color=colours,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.0035,
        headwidth=4.5,
        minlength=0,
        zorder=2,
    )


def group_colours(groups: int) -> list[tuple[float, float, float]]:
    """Bright colours as different as can be, none near the query's."""
    return [tuple(hsv_to_rgb(((0.6 + 0.85 * g / groups) % 1, 0.6, 1))) for g in range(groups)]


def draw_legend(figure: Figure, panels: list[Panel]) -> None:
    """One line below the panels: the query, its cell, the weights' colours, and the groups'."""
    width, height = figure.get_size_inches()
    star = {"marker": "*", "markersize": 13, "markeredgecolor": "black", "linestyle": "none"}
    square = {"marker": "s", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
    handles = [
        Line2D([], [], color=QUERY_COLOUR, label="query", **star),
        Line2D([], [], markeredgecolor=QUERY_COLOUR, label="its cell", **square),
    ]
    if any(panel.look.reading.points is None for panel in panels):
        handles.append(Line2D([], [], markeredgecolor="0.6", label="cells it may read", **square))
    if any(panel.offsets for panel in panels):
        arrow = {"marker": r"$\rightarrow$", "markersize": 16, "linestyle": "none"}
        text = "offset of a sampled point (colours: groups of heads)"
        handles.append(Line2D([], [], color="0.4", label=text, **arrow))
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0, 0.28 / height), ncols=4,
                  frameon=False, fontsize=9.5)  # fmt: skip
    ax = figure.add_axes((1 - (GAP + 2.1) / width, 0.32 / height, 2.1 / width, 0.11 / height))
    bar = figure.colorbar(ScalarMappable(cmap=WEIGHT_COLOURS), cax=ax, orientation="horizontal")
    bar.set_ticks([0, 1], labels=["weight 0", "the panel's max"], fontsize=9)
    for label, side in zip(ax.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    bar.outline.set_visible(False)


# --- Command --------------------------------------------------------------------------------------


def load_model(cfg: CfgNode, pretrained: str, run: str) -> tuple[nn.Module, str]:
    """The model with the weights of a file, of a run's best checkpoint or initial ones, and words for which."""
    classes = cfg.MODEL.NUM_CLASSES or 1000
    if run:
        source = checkpoint.resolve(Path(run), best=True)
        metadata = checkpoint.read_metadata(source)
        classes = len(metadata["classes"])
    reseed(key(cfg.SEED, "model"))
    model = models.build(
        cfg.MODEL.NAME,
        num_classes=classes,
        img_size=cfg.DATA.IMG_SIZE,
        drop_path_rate=0.0,
        **cfg.MODEL.ARGS,
    ).eval()
    if not isinstance(model, DAT):
        raise ConfigError(
            f"{cfg.MODEL.NAME} has none of the spatial mixers of models/attention.py, which are what can be drawn; "
            "expected a configuration of one that has, such as configs/dat_tiny.yaml"
        )
    if run:
        checkpoint.load_strictly(model, source / "model.safetensors")
        return model, f"run {metadata['config']['TAG']} after {metadata['epoch']} epochs"
    if pretrained:
        load_pretrained(model, Path(pretrained), whole=False)
        return model, f"weights of {Path(pretrained).name}"
    return model, "untrained, random weights"


def load_image(cfg: CfgNode, path: Path) -> Tensor:
    """The model's input before normalisation, (3, H, W) uint8, prepared as for an evaluation."""
    try:
        pixels = decode_pixels(path.read_bytes())
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"--image {path} cannot be read as an image: {reason}") from None
    transform = data.eval_transform(
        cfg.DATA.IMG_SIZE,
        crop_mode=cfg.TEST.CROP_MODE,
        crop_pct=cfg.TEST.CROP_PCT,
        interpolation=cfg.DATA.INTERPOLATION,
    )
    return transform(pixels)


def parse_point(text: str) -> tuple[float, float]:
    """The words "y,x" as shares of the image."""
    try:
        y, x = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--point {text}: expected y,x such as 0.5,0.5, the centre") from None
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise ConfigError(
            f"--point {text} is outside of the image: expected y,x from 0,0, its upper left corner, to 1,1; "
            "divide pixels by the image's height and width"
        )
    return y, x


def parse_block(text: str, model: DAT) -> tuple[int, int]:
    """The words "stage.block", counted from 1, as (stage, block) from 0."""
    names = {
        f"{i + 1}.{j + 1}": (i, j)
        for i, letters in enumerate(model.config.stages)
        for j in range(len(letters))
    }
    if text not in names:
        raise ConfigError(f"--block {text}: there is no such block, only {', '.join(names)}")
    return names[text]


def make_picture(args: argparse.Namespace) -> str:
    """Write the picture that the command line asks for; returns what it shows."""
    point = parse_point(args.point)
    # --throughput is the mode that needs no data.
    cfg = config.parse(["--throughput", "--cfg", args.cfg, "--opts", *args.opts]).cfg
    model, weights = load_model(cfg, args.pretrained, args.resume)
    pixels = load_image(cfg, args.image)
    images = data.Normalize(cfg.DATA.MEAN, cfg.DATA.STD, device=torch.device("cpu"))(pixels[None])
    if args.block:
        rows = detail(*look(model, images, point, [parse_block(args.block, model)]))
        shown = f"block {args.block}, by head or group of heads"
    else:
        last_of_each_kind = [
            (stage, letters.rindex(letter))
            for stage, letters in enumerate(model.config.stages)
            for letter in dict.fromkeys(letters)
        ]
        rows = overview(look(model, images, point, last_of_each_kind))
        shown = "the last block of every kind, mean of the heads"
    title = f"{cfg.MODEL.NAME}, {weights}"
    query = f"y {point[0]:g}, x {point[1]:g} of {args.image.name}"
    subtitle = f"What the query at {query} reads: {shown}"
    image = pixels.permute(1, 2, 0).numpy() / 255
    try:
        draw(rows, image, point, title, subtitle).savefig(args.out)
    except (OSError, ValueError) as error:  # a ValueError names the formats that there are
        raise StorageError(f"--out {args.out} cannot be written: {error}") from error
    return title


@as_exit_code
def main(arguments: list[str]) -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", required=True, help="configuration of the model")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", default="", metavar="FILE", help="file of weights")
    weights.add_argument(
        "--resume", default="", metavar="RUN", help="run (its best checkpoint) or checkpoint"
    )
    parser.add_argument(
        "--image", type=Path, required=True, help="image file, cropped as for an evaluation"
    )
    parser.add_argument(
        "--point",
        default="0.5,0.5",
        metavar="Y,X",
        help="the query, in shares of the cropped image; default 0.5,0.5",
    )
    parser.add_argument(
        "--block",
        metavar="STAGE.BLOCK",
        help="draw every head group of this one, counted from 1, instead of each stage's last blocks",
    )
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="picture to write")
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="any key of the configuration"
    )
    args = parser.parse_args(arguments)
    print(f"{args.out}: {make_picture(args)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
