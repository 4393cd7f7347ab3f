#!/usr/bin/env python
"""Still pictures of attention: what one query attends to in every stage, and where its sampled points moved.

The model is that of a run, of a file or folder of weights, or of a configuration, which has random weights. For DAT
with any mixers, and timm's Swin, ViT and PVTv2. The picture is cropped as for an evaluation.

examples:
  python tools/visualize.py photo.jpg --pretrained weights/dat_pp_nano_imagenette --size 224
  python tools/visualize.py photo.jpg --resume output/dat_tiny/default --point 0.4,0.6 --block 3.2
"""

import argparse
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.figures import plain_label
from analysis.recording import KINDS, NEGLIGIBLE, BlockWeights, QueryAttention, record
from engine import build
from tools.common.classifier import add_arguments, log_to_stderr
from tools.common.pictures import load_recordable, parse_point, read_pixels
from utils.errors import ConfigError, StorageError, as_exit_code
from utils.files import replace_atomically, require_folder_of
from utils.logging import logger
from utils.text import quantity

# --- Picture --------------------------------------------------------------------------------------

DPI = 100
COLUMNS = 4  # at least; four are 1200 pixels
PANEL, GAP, TITLE, HEADER, FOOTER = 2.88, 0.1, 0.28, 1.0, 0.6  # inches
WEIGHT_COLOURS = ListedColormap(plt.get_cmap("inferno")(np.linspace(0.15, 1, 256)))
QUERY_COLOUR = "#00e5ff"


class BlockAttention(NamedTuple):
    """What the query in cell (y, x) of a block's map attends to."""

    block: BlockWeights
    query: tuple[int, int]
    attention: QueryAttention

    @property
    def groups(self) -> int:
        """The number of offset groups; 0 where keys are cells."""
        return 0 if self.attention.points is None else len(self.attention.points)


class Panel(NamedTuple):
    """One picture of the figure: the query's weights, or the offsets of all groups."""

    seen: BlockAttention
    title: str
    part: int | None = None  # the offset group, without groups the head; None: the mean of all
    offsets: bool = False


def look(block: BlockWeights, point: tuple[float, float], size: tuple[int, int]) -> BlockAttention:
    """The attention of the query in whose cell `point` lies, (y, x) in shares of an image of `size` (H, W)."""
    query = tuple(
        min(int(share * pixels) // block.cell, cells - 1)
        for share, pixels, cells in zip(point, size, block.map_size, strict=True)
    )
    return BlockAttention(block, query, block.at(query))


def overview(all_seen: list[BlockAttention]) -> list[list[Panel | None]]:
    """Rows of panels with a column per stage: its blocks, each above its offsets if it has any."""
    columns: dict[int, list[Panel]] = {}
    for seen in all_seen:
        block = seen.block
        column = columns.setdefault(block.stage, [])
        column.append(Panel(seen, f"block {block.block + 1}: {KINDS[block.letter]}"))
        if seen.groups:
            column.append(Panel(seen, offsets_title(seen), offsets=True))
    return [list(row) for row in zip_longest(*columns.values())]


def detail(seen: BlockAttention) -> list[list[Panel | None]]:
    """Rows of panels of one block: one per offset group and one for the offsets, or one per head."""
    if seen.groups:
        panels = [Panel(seen, f"group {i + 1}", i) for i in range(seen.groups)]
        panels.append(Panel(seen, offsets_title(seen), offsets=True))
    else:
        panels = [Panel(seen, f"head {i + 1}", i) for i in range(seen.block.heads)]
    return [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]


def offsets_title(seen: BlockAttention) -> str:
    """The title of a panel of offsets."""
    return f"sampled points, {quantity(seen.groups, 'group')}"


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
    figure.text(
        GAP / width, 1 - 0.22 / height, plain_label(title), fontsize=14, weight="bold", va="center"
    )
    figure.text(
        GAP / width, 1 - 0.5 / height, plain_label(subtitle), fontsize=10, color="0.35", va="center"
    )
    headlines = [stage_title(panel.seen.block) for panel in rows[0]]
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


def stage_title(block: BlockWeights) -> str:
    """The headline of the columns of a stage."""
    cells = "×".join(str(n) for n in block.map_size)
    return f"Stage {block.stage + 1}: {cells} cells, {quantity(block.heads, 'head')}"


def draw_panel(ax: Axes, panel: Panel, image: np.ndarray, point: tuple[float, float]) -> None:
    """Draw one panel: the darkened image, and over it the weights or the offsets."""
    height, width = image.shape[:2]
    ax.imshow(0.5 * image + 0.06, extent=(0, width, height, 0))
    if panel.offsets:
        note = draw_offsets(ax, panel.seen)
    elif panel.seen.groups:
        note = draw_points(ax, panel)
    else:
        note = draw_cells(ax, panel, image)
    if not panel.offsets:
        side = panel.seen.block.cell
        corner = panel.seen.query[1] * side, panel.seen.query[0] * side
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=QUERY_COLOUR, zorder=4))
        style = {"markersize": 13, "markeredgecolor": "black", "markeredgewidth": 0.7, "zorder": 5}
        ax.plot(point[1] * width, point[0] * height, "*", color=QUERY_COLOUR, **style)
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], frame_on=False)
    ax.set_title(panel.title, fontsize=9.5, loc="left", pad=4)
    ax.set_title(note, fontsize=8.5, loc="right", pad=4, color="0.45")


def draw_cells(ax: Axes, panel: Panel, image: np.ndarray) -> str:
    """Draw the weights as colours over the cells of the map; return a note for the title."""
    weights = panel.seen.attention.weights
    weights = (weights.mean(0) if panel.part is None else weights[panel.part]).numpy()
    side = panel.seen.block.key_cell
    rows, columns = np.nonzero(weights > NEGLIGIBLE)
    top, bottom = rows.min() * side, (rows.max() + 1) * side
    left, right = columns.min() * side, (columns.max() + 1) * side
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white")
    ax.add_patch(frame)
    grey = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)  # leaves all colour to the weights
    ax.imshow(grey, extent=(0, image.shape[1], image.shape[0], 0)).set_clip_path(frame)
    colours = WEIGHT_COLOURS(weights / weights.max())
    colours[..., 3] = np.where(weights > NEGLIGIBLE, 0.7, 0)
    ax.imshow(colours, extent=(0, weights.shape[1] * side, weights.shape[0] * side, 0))
    return f"max {100 * weights.max():.2g} %"


def draw_points(ax: Axes, panel: Panel) -> str:
    """Draw the weights as sizes and colours of the sampled points, strongest on top; return a note for the title."""
    attention, cell = panel.seen.attention, panel.seen.block.cell
    part = slice(None) if panel.part is None else slice(panel.part, panel.part + 1)
    weights = attention.weights.unflatten(0, (panel.seen.groups, -1)).mean(1)[part].flatten()
    order = weights.argsort()
    weights = weights[order].numpy()
    points = (cell * attention.points[part]).flatten(0, 1)[order].numpy()
    reference = attention.reference.expand_as(attention.points[part])
    reference = (cell * reference).flatten(0, 1)[order].numpy()
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


def draw_offsets(ax: Axes, seen: BlockAttention) -> str:
    """Draw the points of every offset group, each with its offset; return a note for the title."""
    attention, cell = seen.attention, seen.block.cell
    points, reference = cell * attention.points, cell * attention.reference
    for group, colour in zip(points.numpy(), group_colours(len(points)), strict=True):
        draw_arrows(ax, reference.numpy(), group, [colour])
        ax.scatter(*group.T[::-1], s=8, color=[colour], zorder=3)
    return f"mean offset {(points - reference).norm(dim=-1).mean():.3g} px"


def draw_arrows(ax: Axes, start: np.ndarray, end: np.ndarray, colours: list[tuple]) -> None:
    """Draw arrows between points (n, 2) as (y, x)."""
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
    """Draw one line below the panels: the query, its cell, the colours of the weights and of the offset groups."""
    width, height = figure.get_size_inches()
    star = {"marker": "*", "markersize": 13, "markeredgecolor": "black", "linestyle": "none"}
    square = {"marker": "s", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
    handles = [
        Line2D([], [], color=QUERY_COLOUR, label="query", **star),
        Line2D([], [], markeredgecolor=QUERY_COLOUR, label="its cell", **square),
    ]
    if any(not panel.seen.groups for panel in panels):
        handles.append(
            Line2D([], [], markeredgecolor="0.6", label="cells it may attend to", **square)
        )
    if any(panel.offsets for panel in panels):
        arrow = {"marker": r"$\rightarrow$", "markersize": 16, "linestyle": "none"}
        text = "offset of a sampled point (colours: offset groups)"
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


def choose_block(text: str, blocks: list[BlockWeights]) -> BlockWeights:
    """The one of `blocks` that --block names, "stage.block" counted from 1. Raises ConfigError."""
    names = {block.name: block for block in blocks}
    if text not in names:
        raise ConfigError(f"--block {text}: no such block; expected one of {', '.join(names)}")
    return names[text]


def make_picture(args: argparse.Namespace) -> Figure:
    """The picture that the command line asks for."""
    point = parse_point(args.point)
    classifier = load_recordable(args)
    pixels = classifier.transform(read_pixels(classifier, args.image))
    images = build.normalize(classifier.cfg, classifier.device)(pixels[None])
    blocks = record(classifier.model, images, heads=bool(args.block), last=not args.block).blocks
    if args.block:
        block = choose_block(args.block, blocks)
        rows = detail(look(block, point, pixels.shape[1:]))
        subject = f"block {args.block}, by head or offset group"
    else:
        rows = overview([look(block, point, pixels.shape[1:]) for block in blocks])
        subject = "the last block of every kind, mean of the heads"
    query = f"y {point[0]:g}, x {point[1]:g} of {args.image.name}"
    subtitle = f"What the query at {query} attends to: {subject}"
    image = pixels.permute(1, 2, 0).numpy() / 255
    return draw(rows, image, point, classifier.title, subtitle)


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "image", type=Path, metavar="IMAGE", help="image file, cropped as for an evaluation"
    )
    add_arguments(parser, precision=False)
    parser.add_argument("--size", type=int, default=0, help="pixels of the model's input")
    parser.add_argument(
        "--point",
        default="0.5,0.5",
        metavar="Y,X",
        help="the query, as shares of the height and width of the cropped image; default 0.5,0.5",
    )
    parser.add_argument(
        "--block",
        metavar="STAGE.BLOCK",
        help="draw every head or offset group of this block, counted from 1, instead of the last blocks of each stage",
    )
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="picture to write")
    args = parser.parse_args(arguments)
    require_folder_of(args.out)
    log_to_stderr()
    figure = make_picture(args)
    try:
        with replace_atomically(args.out) as temporary:
            figure.savefig(temporary, format=args.out.suffix[1:] or "png")
    except ValueError as error:  # lists the known formats
        raise StorageError(f"--out {args.out} cannot be written: {error}") from error
    logger.info(f"{args.out} is written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
