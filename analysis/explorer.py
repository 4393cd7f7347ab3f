"""Deformation explorer: one HTML file in which a click on a picture shows what that query reads in every block.

Weights are stored as bytes, √(weight / the row's largest), with that largest weight; places as 16 bits of their
range. A weight is read back to 0.4 % of the largest of its row, a place to a hundredth of a pixel. `BlockStore` is
what the page's script (templates/explorer.js) decodes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from analysis import pages
from analysis.recording import (
    KINDS,
    BlockWeights,
    Cells,
    Points,
    Recording,
    Taps,
    measure_points,
)
from utils.errors import ConfigError

BUDGET = 2 * 2**20  # bytes of an image's attention in the file, for one model
MAX_IMAGES = 12
SCALE = 65535  # of places


@dataclass(frozen=True)
class Prediction:
    """One of the most probable classes of a picture, with the map that its score depends on."""

    name: str
    probability: float
    gradient: Tensor  # (H', W'), see analysis/class_gradient.py


@dataclass(frozen=True)
class Exploration:
    """What a model made of a picture.

    shown, seen: uint8 (H, W, 3), the picture for people and the model's pixels, cropped alike.
    """

    name: str
    shown: np.ndarray
    seen: np.ndarray
    predictions: list[Prediction]
    recording: Recording


@dataclass(frozen=True)
class ExploredModel:
    """A model of the page: its title, notes for readers, and its pictures in the order of the page."""

    title: str
    notes: list[str]
    pictures: list[Exploration]


def make_page(title: str, models: list[ExploredModel], query: tuple[float, float]) -> str:
    """The HTML of one model, or of two side by side; `query` (y, x) in shares of the picture is shown first.

    Raises ConfigError for more pictures, or larger ones, than a page should have.
    """
    if len(models[0].pictures) > MAX_IMAGES:
        raise ConfigError(
            f"{len(models[0].pictures)} pictures are more than the {MAX_IMAGES} of one page; "
            "make several with --out"
        )
    blobs: list[str] = []
    data = {
        "models": [_describe_model(model, blobs) for model in models],
        "query": query,
        "kinds": KINDS,
    }
    return pages.render(
        "explorer.html",
        scripts=["explorer.js"],
        styles=["page.css", "explorer.css"],
        title=title,
        models=models,
        data=data,
        blobs=blobs,
    )


def _describe_model(model: ExploredModel, blobs: list[str]) -> dict[str, Any]:
    described = []
    for one in model.pictures:
        store = Store()
        blocks = [store.add(block) for block in one.recording.blocks]
        blobs.append(pages.pack(bytes(store.content)))
        if len(blobs[-1]) > BUDGET:
            raise ConfigError(
                f"the attention for {one.name} takes {len(blobs[-1]) / 1e6:.1f} MB, more than "
                f"{BUDGET / 1e6:.0f} MB: add --blocks last, leave out --heads, or choose a smaller --size"
            )
        described.append(
            {
                "name": one.name,
                "size": one.seen.shape[:2],
                "shown": pages.picture(one.shown),
                "seen": pages.picture(one.seen, quality=95),
                "predictions": [_describe_prediction(p) for p in one.predictions],
                "blocks": blocks,
                "blob": len(blobs) - 1,
            }
        )
    return {"title": model.title, "notes": model.notes, "pictures": described}


def _describe_prediction(prediction: Prediction) -> dict[str, Any]:
    gradient = prediction.gradient.numpy()
    largest = float(gradient.max())
    share = gradient / largest if largest > 0 else gradient
    return {
        "name": prediction.name,
        "p": round(prediction.probability, 6),
        "gradient": np.round(share, 3).tolist(),
    }


# --- Still pictures -------------------------------------------------------------------------------

GROUP_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#FFFFFF")  # fmt: skip
LARGEST = 300  # points of a still picture


def draw_overall(explored: Exploration) -> list[tuple[str, str]]:
    """A title and an SVG for the last deformable block of each stage: its sampled points by the weight of all queries.

    The weight of a point is its average over all queries and the heads of its group; areas are proportional to it.
    """
    last = {b.stage: b for b in explored.recording.blocks if isinstance(b.layout, Points)}
    top = explored.predictions[0]
    return [
        (
            f"{explored.name}, block {block.name}; taken for {top.name} ({100 * top.probability:.0f} %)",
            _draw_points(block, explored),
        )
        for block in last.values()
    ]


def _draw_points(block: BlockWeights, explored: Exploration) -> str:
    height, width = explored.seen.shape[:2]
    weights = block.weights.mean(1).numpy()  # (G, S)
    points = block.cell * block.layout.points.numpy()
    reference = block.cell * block.layout.reference.numpy()
    order = np.argsort(-weights, axis=None, kind="stable")[:LARGEST][::-1]  # the strongest on top
    unit = width / 224
    lines, circles = [], []
    for group, s in zip(*np.unravel_index(order, weights.shape), strict=True):
        (y, x), (y0, x0) = points[group, s], reference[s]
        share = weights[group, s] / weights.max()
        colour = GROUP_COLOURS[group % len(GROUP_COLOURS)]
        ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x:.1f}" y2="{y:.1f}"'
        lines.append(f'<line {ends} stroke="{colour}" opacity="{0.2 + 0.5 * share:.2f}"/>')
        circle = f'cx="{x:.1f}" cy="{y:.1f}" r="{unit * (1 + 4 * share**0.5):.2f}"'
        circles.append(f'<circle {circle} fill="{colour}" opacity="{0.35 + 0.65 * share:.2f}"/>')
    size = f'width="{width}" height="{height}"'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="sampled points">'
        f'<image href="{pages.picture(explored.shown)}" {size} style="filter:brightness(0.6)"/>'
        f'<g stroke-width="{0.7 * unit:.2f}">{"".join(lines)}</g>'
        f'<g stroke="#000" stroke-width="{0.3 * unit:.2f}">{"".join(circles)}</g></svg>'
    )


# --- Store ----------------------------------------------------------------------------------------


class Store:
    """The arrays of a picture's blocks, one after the other, and where each begins."""

    def __init__(self):
        self.content = bytearray()

    def add(self, block: BlockWeights) -> dict[str, Any]:
        """Append the arrays of `block`; its description for the page."""
        weights = block.weights.numpy()  # (P, N, S)
        largest = weights.max(-1, keepdims=True)
        share = np.sqrt(weights / np.maximum(largest, np.finfo(np.float32).tiny))
        described = {
            "name": block.name,
            "stage": block.stage,
            "letter": block.letter,
            "map": block.map_size,
            "cell": block.cell,
            "heads": block.heads,
            "parts": block.parts,
            "shape": weights.shape,
            "weights": self._append(np.round(255 * share).astype(np.uint8)),
            "largest": self._append(largest[..., 0].astype("<f4")),
            "elsewhere": round(block.elsewhere, 6),
            "health": None,
        }
        return described | self._add_layout(block)

    def _add_layout(self, block: BlockWeights) -> dict[str, Any]:
        layout = block.layout
        if isinstance(layout, Cells):
            axes = zip(("firstRow", "rows", "firstColumn", "columns"), layout[1:], strict=True)
            return {
                "layout": "cells",
                "keyMap": layout.key_map,
                "keyCell": [block.key_cell, block.key_cell],
                **{name: values.tolist() for name, values in axes},
            }
        places = {
            "points": self._append_places(block.cell * layout.points.numpy()),
            "reference": self._append_places(block.cell * layout.reference.numpy()),
            "groups": len(layout.points),
        }
        if isinstance(layout, Taps):
            return {"layout": "taps", **places}
        assert isinstance(layout, Points)
        health = measure_points(layout, block.map_size, block.cell)
        return {
            "layout": "points",
            "grid": layout.grid,
            **places,
            "health": {name: round(value, 4) for name, value in health._asdict().items()},
            "clamped": layout.clamped,
        }

    def _append(self, array: np.ndarray) -> int:
        start = len(self.content)
        self.content += array.tobytes()
        return start

    def _append_places(self, places: np.ndarray) -> dict[str, float]:
        """Append pixels as 16 bits of their range."""
        low, high = float(places.min()), float(places.max())
        step = (high - low) / SCALE or 1.0
        start = self._append(np.round((places - low) / step).astype("<u2"))
        return {"start": start, "low": low, "step": step}
