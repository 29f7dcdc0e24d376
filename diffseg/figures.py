"""Grids of images and masks, and what all figures share: sizes, colours, files. Charts are in `diffseg.charts`.

A figure is at most 6.9 inches wide (a page's width; half of it is a column), its text 8 points large, and it reads
without red or green. Classes have colours that also deuteranopes and protanopes tell apart; each figure with masks
says in a legend which is which.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL.ImageColor import getrgb

from diffseg.benchmarks.classes import Benchmark
from diffseg.benchmarks.labels import read_prediction
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.files import atomic_path

Picture = np.ndarray | torch.Tensor
# of lines and dots: Okabe and Ito's, without the one that deuteranopes take for its green
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#56B4E9", "#000000", "#D55E00"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
# of classes: after three of Okabe and Ito's always the one that is farthest (CIELAB) from all before, from black and
# from white, to the worst of normal sight, deuteranopia and protanopia: 22 or more among twelve, 17 among twenty
CLASS_COLOURS = [
    *("#0072B2", "#E69F00", "#009E73", "#6900FF", "#B41E00", "#C3C3FF", "#FFE187", "#4B78FF", "#3C6978", "#C3964B"),
    *("#87A5B4", "#F0F000", "#B40F3C", "#4BA5FF", "#D2C387", "#FFE15A", "#693CC3", "#E14B00", "#5A96C3", "#F04B69"),
]
IGNORED = "#E0E0C0"
# of error maps
ERRORS = {"correct": "#56B4E9", "missed": "#F0E442", "false object": "#D55E00", "wrong class": "#FFFFFF"}
WIDTH, COLUMN, POINTS = 6.9, 3.3, 8.0  # inches, inches, size of the text
LETTER, LINE = 0.56 * POINTS / 72, 1.35 * POINTS / 72  # inches of a letter, about, and of a line

plt.rcParams.update(
    {"font.size": POINTS, "axes.titlesize": POINTS, "legend.fontsize": POINTS, "legend.frameon": False}
    | {"axes.labelsize": POINTS, "xtick.labelsize": POINTS, "ytick.labelsize": POINTS}
    | {"axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 4}
    | {"axes.prop_cycle": cycler(color=COLOURS, marker=MARKERS), "lines.linewidth": 1.2}
)


@dataclass(frozen=True)
class Tile:
    """A place in a grid: an image, a label map, or a label map laid over an image, and a few letters in its corner.

    image: H x W x 3, uint8, or a tensor with the channels first, or H x W, a heat map of 0..1. label: H x W class ids.
    """

    image: Picture | None = None
    label: Picture | None = None
    note: str = ""


def as_array(picture: Picture) -> np.ndarray:
    """Return H x W or H x W x 3 of an image that may be a tensor with the channels first."""
    if isinstance(picture, torch.Tensor):
        picture = (picture.permute(1, 2, 0) if picture.ndim == 3 else picture).cpu().numpy()
    return np.asarray(picture)


def class_colours(labels: Sequence[Picture], classes: Sequence[str]) -> dict[int, str]:
    """Return id -> "#RRGGBB" of the classes that the label maps show, in the classes' order; background is black.

    The colours are dealt out per figure, as a dozen can be told apart and no hundred. With more than twenty classes
    they repeat. Ids beyond the classes are not scored or not trained on ("ignored").
    """
    shown = np.unique(np.concatenate([as_array(label).ravel() for label in labels])).tolist() if labels else []
    start = 1 if classes and classes[0] == "background" else 0
    found = {0: "#000000"} if start else {}
    for place, k in enumerate(k for k in shown if start <= k < len(classes)):
        found[k] = CLASS_COLOURS[place % len(CLASS_COLOURS)]
    return found | {k: IGNORED for k in shown if k >= len(classes)}


def paint(label: Picture, colours: Mapping[int, str]) -> np.ndarray:
    """Return a label map in colours, uint8 H x W x 3."""
    label = as_array(label)
    painted = np.zeros((*label.shape, 3), np.uint8)
    for k, colour in colours.items():
        painted[label == k] = getrgb(colour)
    return painted


def overlay(image: Picture, label: Picture, colours: Mapping[int, str]) -> np.ndarray:
    """Return the image with its label map laid over it, each region with a rim; black background stays the image."""
    image, label = as_array(image), as_array(label).astype(int)
    painted = paint(label, colours)
    padded = np.pad(label, 1, mode="edge")
    around = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    rim = np.any([label != other for other in around], axis=0)
    mixed = np.where(rim[..., None], painted, 0.3 * image + 0.7 * painted)
    bare = np.isin(label, [k for k, colour in colours.items() if colour == "#000000"])
    return np.where(bare[..., None], image, mixed).astype(np.uint8)


def error_masks(label: Picture, prediction: Picture, benchmark: Benchmark) -> dict[str, np.ndarray]:
    """Return where a prediction of one image is right or wrong, kind of `ERRORS` -> bool H x W; background is no kind.

    label, prediction: H x W class ids; ignored pixels of the label are nowhere.
    """
    label, prediction = as_array(label).astype(int), as_array(prediction).astype(int)
    background = 0 if benchmark.classes[0] == "background" else -1
    counted = label != benchmark.ignore
    objects, found = counted & (label != background), counted & (prediction != background)
    return {
        "correct": objects & (label == prediction),
        "missed": objects & ~found,
        "false object": found & ~objects,
        "wrong class": objects & found & (label != prediction),
    }


def image_iou(label: Picture, prediction: Picture, benchmark: Benchmark) -> str:
    """Return the IoU of all objects of one image in %: the correct ones of all pixels that are an object in either."""
    kinds = error_masks(label, prediction, benchmark)
    either = sum(int(where.sum()) for where in kinds.values())
    return f"{100 * int(kinds['correct'].sum()) / either:.0f} %" if either else ""


def error_tile(image: Picture, label: Picture, prediction: Picture, benchmark: Benchmark) -> Tile:
    """Return where a prediction is right and wrong, in the colours of `ERRORS` over the grey image, and its IoU."""
    shown = np.repeat(0.35 * as_array(image).mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    for kind, where in error_masks(label, prediction, benchmark).items():
        shown[where] = getrgb(ERRORS[kind])
    return Tile(shown, note=image_iou(label, prediction, benchmark))


def picture_rows(
    rows: Mapping[str, Sequence[Picture | Tile | None]],
    titles: Sequence[str] = (),
    classes: Sequence[str] = (),
    legend: Mapping[str, str] | None = None,
) -> Figure:
    """Draw named rows of tiles, one column each; see `story`."""
    return story([("", titles, rows)], classes, legend)


def story(
    parts: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[Picture | Tile | None]]]],
    classes: Sequence[str] = (),
    legend: Mapping[str, str] | None = None,
) -> Figure:
    """Draw parts one below the other: a bold line of text, titles of columns, named rows of tiles.

    A part is (text, titles, rows); text, titles and rows may be empty, and None leaves a place empty. Arrays stand for
    tiles without label map. A column is as wide as the page allows, but no tile is higher than 1.3 inches. `classes`
    are the names of the ids in label maps; below stand those that occur, and `legend`, name -> colour.
    """
    gap = 0.04  # inches
    parts = [
        (text, titles, {name: [as_tile(one) for one in row] for name, row in rows.items()})
        for text, titles, rows in parts
    ]
    tiles = [tile for *_, rows in parts for row in rows.values() for tile in row if tile is not None]
    colours = class_colours([tile.label for tile in tiles if tile.label is not None], classes)
    columns = max(len(row) for *_, rows in parts for row in rows.values())
    left = 0.15 + LETTER * max(len(line) for *_, rows in parts for name in rows for line in name.split("\n"))
    height, width = as_array(tiles[0].label if tiles[0].image is None else tiles[0].image).shape[:2]
    side = min((WIDTH - left) / columns - gap, 1.3 * max(1, width / height))
    tall, full = side * height / width, max(left + columns * (side + gap), COLUMN)
    drawn, y = [], 0.0  # what is drawn at which place, inches from the upper left
    for text, titles, rows in parts:
        if text:
            wrapped = textwrap.fill(text, int(full / (1.1 * LETTER)))  # bold is wider
            drawn.append((0, y, wrapped, {"weight": "bold", "va": "top"}))
            y += 0.08 + LINE * (wrapped.count("\n") + 1)
        letters = max(5, int(side / LETTER))
        above = [
            "\n".join(textwrap.fill(line, letters, break_long_words=False) for line in title.split("\n"))
            for title in titles
        ]
        y += LINE * max((title.count("\n") + 1 for title in above), default=0) + (0.06 if above else 0)
        for j, title in enumerate(above):
            drawn.append((left + j * (side + gap) + side / 2, y - 0.04, title, {"ha": "center", "va": "bottom"}))
        for name, row in rows.items():
            drawn.append((left - 0.08, y + tall / 2, name, {"ha": "right", "va": "center"}))
            drawn += [(left + j * (side + gap), y, tile, {}) for j, tile in enumerate(row) if tile is not None]
            y += tall + gap
        y += 0.04
    patches = {classes[k]: colour for k, colour in colours.items() if k < len(classes) and colour != "#000000"}
    patches |= {"ignored": IGNORED} if IGNORED in colours.values() else {}
    legends = [patches for patches in (patches, legend) if patches]  # the classes', and the other one below it
    abreast = [min(len(one), max(1, int(full / (0.45 + LETTER * max(map(len, one)))))) for one in legends]
    below = [LINE * -(-len(one) // columns) + 0.05 for one, columns in zip(legends, abreast, strict=True)]
    y += sum(below)
    figure = plt.figure(figsize=(full, y))
    for x, top, what, style in drawn:
        if isinstance(what, str):
            figure.text(x / full, 1 - top / y, what, **style)
        else:
            axis = figure.add_axes((x / full, 1 - (top + tall) / y, side / full, tall / y))
            draw_tile(axis, what, colours)
    spacing = {"handlelength": 1, "handletextpad": 0.4, "columnspacing": 1, "borderpad": 0, "labelspacing": 0.2}
    for k, (one, columns) in enumerate(zip(legends, abreast, strict=True)):
        handles = [Patch(facecolor=colour, edgecolor="0.5", linewidth=0.5, label=name) for name, colour in one.items()]
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, sum(below[k + 1 :]) / y)}
        figure.legend(handles=handles, ncols=columns, borderaxespad=0.1, **place, **spacing)
    return figure


def as_tile(what: Picture | Tile | None) -> Tile | None:
    return what if what is None or isinstance(what, Tile) else Tile(what)


def draw_tile(axis: Axes, tile: Tile, colours: Mapping[int, str]) -> None:
    """Draw one tile of a grid."""
    if tile.label is None:
        shown = as_array(tile.image)
    else:
        shown = paint(tile.label, colours) if tile.image is None else overlay(tile.image, tile.label, colours)
    axis.imshow(shown, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    if tile.note:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        x, y = emptiest_corner(as_array(tile.label)) if tile.label is not None else ("left", "bottom")
        place = {"left": 0.03, "right": 0.97, "bottom": 0.04, "top": 0.96}
        axis.text(place[x], place[y], tile.note, transform=axis.transAxes, fontsize=7, ha=x, va=y, bbox=box)


def emptiest_corner(label: np.ndarray) -> tuple[str, str]:
    """Return ("left" or "right", "bottom" or "top"): the quarter of a label map with the fewest objects' pixels."""
    middle, centre = (side // 2 for side in label.shape)
    rows = {"bottom": slice(middle, None), "top": slice(None, middle)}
    columns = {"left": slice(None, centre), "right": slice(centre, None)}
    return min(
        ((x, y) for y in rows for x in columns), key=lambda place: (label[rows[place[1]], columns[place[0]]] > 0).sum()
    )


def first_of_each(pictures: Sequence[tuple], classes: Sequence[int]) -> dict[int, int]:
    """Return class id -> index of the first (name, image, label) in which no other of `classes` covers more pixels.

    A class that is nowhere the largest is left out. Images are read until all classes are found.
    """
    found: dict[int, int] = {}
    for k in range(len(pictures)):
        label = as_array(pictures[k][2])
        areas = {c: int((label == c).sum()) for c in classes}
        largest = max(areas, key=areas.get)
        if areas[largest]:
            found.setdefault(largest, k)
        if len(found) == len(set(classes)):
            break
    return found


def study_predictions(
    folders: Mapping[str, Path], benchmark: Benchmark, data_root: str, split: str, columns: int = 6
) -> Figure:
    """Draw images evenly spaced over the evaluated split, their ground truth, and each folder's errors and IoU.

    folders: name of a row -> folder of label maps, as evaluation writes them. Of wide images a row has half as many.
    Raises a DiffsegError for predictions that are not whole.
    """
    validation = open_split(benchmark, data_folder(data_root), split)
    _, height, width = validation[0][1].shape
    count = min(columns // 2 if width > 1.5 * height else columns, len(validation))
    shown = [validation[k] for k in np.linspace(0, len(validation) - 1, count).astype(int)]
    rows: dict[str, list[Tile]] = {
        "image": [Tile(image) for _, image, _ in shown],
        "ground truth": [Tile(image, label) for _, image, label in shown],
    }
    for row, folder in folders.items():
        rows[row] = [
            error_tile(image, label, read_prediction(folder, name, benchmark, tuple(label.shape)), benchmark)
            for name, image, label in shown
        ]
    return picture_rows(rows, classes=benchmark.classes, legend=ERRORS)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and, beside it, as PDF (vectors); both without a date, so the bytes repeat."""
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        with atomic_path(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=150, metadata=metadata, bbox_inches="tight")
