"""Sampling offsets during a training: numbers for its records and pictures for TensorBoard, from a few images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from analysis.explorer import GROUP_COLOURS
from analysis.recording import Points, measure_points
from models.dat import SamplingPoints

SIDE = 288  # pixels of a picture
SHOWN = 4  # images in a picture


def measure_offsets(layers: Sequence[SamplingPoints], *, clamped: bool) -> dict[str, float]:
    """Means over the images and layers of each stage, as "offsets/stage<n>_<quantity>".

    pixels: length of the offsets. outside: share of the points outside of the map, or `clamped` to it. coverage: share
    of the map's cells that a point reads. distance: between offset groups, pixels; none where a stage has one group.
    lost: share of the points that offsets took to the border or beyond, of those that begin inside.
    """
    found: dict[str, list[float]] = {}
    for layer in layers:
        name = f"offsets/stage{layer.stage + 1}"
        found.setdefault(f"{name}_pixels", []).append(layer.offset_length().mean().item())
        found.setdefault(f"{name}_lost", []).append(_lost(layer))
        for points in _points_of(layer, clamped=clamped):
            health = measure_points(points, layer.map_size, layer.reduction)
            found.setdefault(f"{name}_outside", []).append(health.outside)
            found.setdefault(f"{name}_coverage", []).append(health.coverage)
            if len(points.points) > 1:
                found.setdefault(f"{name}_distance", []).append(health.distance)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _lost(layer: SamplingPoints) -> float:
    """The share of the points that begin inside of the map and that offsets took to its border or beyond."""
    inside = (layer.reference.abs() < 1).all(-1)
    moved = layer.positions[:, :, inside]
    return (moved.abs() >= 1).any(-1).float().mean().item() if inside.any() else 0.0


def draw_offsets(layers: Sequence[SamplingPoints], images: Tensor) -> dict[str, np.ndarray]:
    """A picture (H, W, 3) uint8 of the last layer of each stage, "offsets/stage<n>": arrows from the reference points.

    images: (B, 3, H, W) uint8, those that the layers have read; the first few are drawn, side by side.
    """
    last = {layer.stage: layer for layer in layers}
    count = min(SHOWN, len(images))
    pictures = {}
    for layer in last.values():
        canvas = Image.new("RGB", (SIDE * count, SIDE))
        for i, points in enumerate(_points_of(layer, clamped=False)[:count]):
            pixels = images[i].permute(1, 2, 0).cpu().numpy()
            picture = Image.fromarray(pixels // 2).resize((SIDE, SIDE))
            _draw(picture, points, layer.reduction * SIDE / torch.tensor(pixels.shape[:2]))
            canvas.paste(picture, (SIDE * i, 0))
        pictures[f"offsets/stage{layer.stage + 1}"] = np.asarray(canvas)
    return pictures


def _points_of(layer: SamplingPoints, *, clamped: bool) -> list[Points]:
    """The points of every image, in cells from the map's upper left corner."""
    to_cells = (torch.tensor(layer.map_size) - 1) / 2
    positions, reference = (
        (part.float().cpu() + 1) * to_cells + 0.5 for part in (layer.positions, layer.reference)
    )
    grid, reference = tuple(reference.shape[:2]), reference.flatten(0, 1)
    return [Points(grid, one.flatten(1, 2), reference, clamped) for one in positions]


def _draw(picture: Image.Image, points: Points, scale: Tensor) -> None:
    """`scale`: (2,), pixels of the picture in a cell, down and across."""
    draw = ImageDraw.Draw(picture)
    # A model that diverges has points that are far away or nowhere, which Pillow would draw for minutes.
    seen = (scale * points.points).nan_to_num(nan=-SIDE).clamp(-SIDE, 2 * SIDE)
    for group, places in enumerate(seen.tolist()):
        colour = GROUP_COLOURS[group % len(GROUP_COLOURS)]
        for (y0, x0), (y, x) in zip((scale * points.reference).tolist(), places, strict=True):
            draw.line((x0, y0, x, y), fill=colour)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
