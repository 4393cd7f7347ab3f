#!/usr/bin/env python
"""Pictures of attention: what one query attends to in every stage, how strongly, and where its sampled points moved.

The model is that of a configuration, with the weights of a file (--pretrained), the best ones of a run (--resume), or
random ones. The image is cropped as for an evaluation.

examples:
  python tools/visualize.py --cfg configs/dat_tiny.yaml --pretrained dat_tiny_in1k_224.pth --image cat.jpg
  python tools/visualize.py --cfg configs/cifar10.yaml --resume output/dat_pp_micro/cifar10 --image cat.jpg --block 3.2
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
from torch import Tensor
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
import data
from analysis.attention import NEGLIGIBLE, BlockAttention, record_attention
from analysis.recording import KINDS
from data.decode import UNREADABLE, decode_pixels
from engine import build, checkpoint
from engine.build import build_model
from engine.pretrained import load_pretrained
from models.dat import DAT
from utils.errors import ConfigError, DataError, StorageError, as_exit_code
from utils.text import quantity

# --- Picture --------------------------------------------------------------------------------------

DPI = 100
COLUMNS = 4  # at least; four are 1200 pixels
PANEL, GAP, TITLE, HEADER, FOOTER = 2.88, 0.1, 0.28, 1.0, 0.6  # inches
WEIGHT_COLOURS = ListedColormap(plt.get_cmap("inferno")(np.linspace(0.15, 1, 256)))
QUERY_COLOUR = "#00e5ff"


class Panel(NamedTuple):
    """One picture of the figure: the query's weights, or the offsets of all groups."""

    record: BlockAttention
    title: str
    part: int | None = None  # the offset group, without groups the head; None: the mean of all
    offsets: bool = False


def overview(records: list[BlockAttention]) -> list[list[Panel | None]]:
    """Rows of panels with a column per stage: its blocks, each above its offsets if it has any."""
    columns: dict[int, list[Panel]] = {}
    for record in records:
        column = columns.setdefault(record.stage, [])
        column.append(Panel(record, f"block {record.block + 1}: {KINDS[record.letter]}"))
        if record.attention.points is not None:
            column.append(Panel(record, offsets_title(record), offsets=True))
    return [list(row) for row in zip_longest(*columns.values())]


def detail(record: BlockAttention) -> list[list[Panel | None]]:
    """Rows of panels of one block: one per offset group and one for the offsets, or one per head."""
    if record.attention.points is None:
        panels = [Panel(record, f"head {i + 1}", i) for i in range(len(record.attention.weights))]
    else:
        panels = [Panel(record, f"group {i + 1}", i) for i in range(len(record.attention.points))]
        panels.append(Panel(record, offsets_title(record), offsets=True))
    return [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]


def offsets_title(record: BlockAttention) -> str:
    """The title of a panel of offsets."""
    groups = len(record.attention.points)
    return f"sampled points, {groups} group{'s' * (groups > 1)}"


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
    headlines = [stage_title(panel.record) for panel in rows[0]]
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


def stage_title(record: BlockAttention) -> str:
    """The headline of the columns of a stage."""
    cells = "×".join(str(n) for n in record.map_size)
    heads = len(record.attention.weights)
    return f"Stage {record.stage + 1}: {cells} cells, {heads} head{'s' * (heads > 1)}"


def draw_panel(ax: Axes, panel: Panel, image: np.ndarray, point: tuple[float, float]) -> None:
    """Draw one panel: the darkened image, and over it the weights or the offsets."""
    height, width = image.shape[:2]
    ax.imshow(0.5 * image + 0.06, extent=(0, width, height, 0))
    if panel.offsets:
        note = draw_offsets(ax, panel.record)
    elif panel.record.attention.points is None:
        note = draw_cells(ax, panel, image)
    else:
        note = draw_points(ax, panel)
    if not panel.offsets:
        side = panel.record.cell
        corner = panel.record.query[1] * side, panel.record.query[0] * side
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=QUERY_COLOUR, zorder=4))
        style = {"markersize": 13, "markeredgecolor": "black", "markeredgewidth": 0.7, "zorder": 5}
        ax.plot(point[1] * width, point[0] * height, "*", color=QUERY_COLOUR, **style)
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], frame_on=False)
    ax.set_title(panel.title, fontsize=9.5, loc="left", pad=4)
    ax.set_title(note, fontsize=8.5, loc="right", pad=4, color="0.45")


def draw_cells(ax: Axes, panel: Panel, image: np.ndarray) -> str:
    """Draw the weights as colours over the cells of the map; return a note for the title."""
    weights = panel.record.attention.weights
    weights = (weights.mean(0) if panel.part is None else weights[panel.part]).numpy()
    side = panel.record.key_cell
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
    attention, cell = panel.record.attention, panel.record.cell
    groups = len(attention.points)
    part = slice(None) if panel.part is None else slice(panel.part, panel.part + 1)
    weights = attention.weights.unflatten(0, (groups, -1)).mean(1)[part].flatten()
    order = weights.argsort()
    weights = weights[order].numpy()
    points = (cell * attention.points[part]).flatten(0, 2)[order].numpy()
    reference = attention.reference.expand_as(attention.points[part])
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


def draw_offsets(ax: Axes, record: BlockAttention) -> str:
    """Draw the points of every offset group, each with its offset; return a note for the title."""
    points, reference = (
        record.cell * p for p in (record.attention.points, record.attention.reference)
    )
    for group, colour in zip(points, group_colours(len(points)), strict=True):
        end = group.flatten(0, 1).numpy()
        draw_arrows(ax, reference.flatten(0, 1).numpy(), end, [colour])
        ax.scatter(*end.T[::-1], s=8, color=[colour], zorder=3)
    return f"mean offset {(points - reference).norm(dim=-1).mean():.2g} px"


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
    if any(panel.record.attention.points is None for panel in panels):
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


def load_model(cfg: CfgNode, pretrained: str, run: str) -> tuple[DAT, str]:
    """The model with the weights of a file, of a run's best checkpoint or initial ones, and words for which."""
    classes = cfg.MODEL.NUM_CLASSES or 1000
    if run:
        source = checkpoint.resolve(Path(run), best=True)
        metadata = checkpoint.read_metadata(source)
        classes = len(metadata["classes"])
    model = build_model(cfg, classes, torch.device("cpu")).eval()
    if not isinstance(model, DAT):
        raise ConfigError(
            f"{cfg.MODEL.NAME} has none of the spatial mixers of models/attention.py, which this tool draws; "
            "expected a configuration of one that has, such as configs/dat_tiny.yaml"
        )
    if run:
        checkpoint.load_strictly(model, source / "model.safetensors")
        return (
            model,
            f"run {metadata['config']['TAG']} after {quantity(metadata['epoch'], 'epoch')}",
        )
    if pretrained:
        load_pretrained(model, Path(pretrained), strict=False)
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
        exact=True,
    )
    return transform(pixels)


def parse_point(text: str) -> tuple[float, float]:
    """The text "y,x" as shares of the image."""
    try:
        y, x = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--point {text}: expected y,x such as 0.5,0.5, the centre") from None
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise ConfigError(
            f"--point {text} is outside the image: expected y,x from 0,0, its upper left corner, to 1,1; "
            "divide pixels by the image's height and width"
        )
    return y, x


def parse_block(text: str, model: DAT) -> tuple[int, int]:
    """The text "stage.block", counted from 1, as (stage, block) from 0."""
    names = {
        f"{i + 1}.{j + 1}": (i, j)
        for i, letters in enumerate(model.config.stages)
        for j in range(len(letters))
    }
    if text not in names:
        raise ConfigError(f"--block {text}: no such block; expected one of {', '.join(names)}")
    return names[text]


def make_picture(args: argparse.Namespace) -> str:
    """Write the picture that the command line asks for; return its title."""
    point = parse_point(args.point)
    cfg = config.load(args.cfg, args.opts)
    model, weights = load_model(cfg, args.pretrained, args.resume)
    pixels = load_image(cfg, args.image)
    images = build.normalize(cfg, torch.device("cpu"))(pixels[None])
    if args.block:
        rows = detail(*record_attention(model, images, point, [parse_block(args.block, model)]))
        subject = f"block {args.block}, by head or offset group"
    else:
        last_of_each_kind = [
            (stage, letters.rindex(letter))
            for stage, letters in enumerate(model.config.stages)
            for letter in dict.fromkeys(letters)
        ]
        rows = overview(record_attention(model, images, point, last_of_each_kind))
        subject = "the last block of every kind, mean of the heads"
    title = f"{cfg.MODEL.NAME}, {weights}"
    query = f"y {point[0]:g}, x {point[1]:g} of {args.image.name}"
    subtitle = f"What the query at {query} attends to: {subject}"
    image = pixels.permute(1, 2, 0).numpy() / 255
    try:
        draw(rows, image, point, title, subtitle).savefig(args.out)
    except (OSError, ValueError) as error:  # a ValueError lists the known formats
        raise StorageError(f"--out {args.out} cannot be written: {error}") from error
    return title


@as_exit_code
def main(arguments: list[str]) -> None:
    """Run the command line."""
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
        help="the query, as shares of the height and width of the cropped image; default 0.5,0.5",
    )
    parser.add_argument(
        "--block",
        metavar="STAGE.BLOCK",
        help="draw every head or offset group of this block, counted from 1, instead of the last blocks of each stage",
    )
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="picture to write")
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="any key of the configuration"
    )
    args = parser.parse_args(arguments)
    print(f"{args.out}: {make_picture(args)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
