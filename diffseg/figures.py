"""The figures: grids of pictures, masks and curves, in VOC's colours and readable at column width."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from diffseg.benchmarks.classes import Benchmark
from diffseg.benchmarks.labels import read_prediction
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.files import atomic_path

Picture = np.ndarray | torch.Tensor
# Okabe and Ito's, told apart by the colour-blind
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]


def as_array(picture: Picture) -> np.ndarray:
    """Return H x W or H x W x 3 of a picture that may be a tensor with the channels first."""
    if isinstance(picture, torch.Tensor):
        picture = (picture.permute(1, 2, 0) if picture.ndim == 3 else picture).cpu().numpy()
    return np.asarray(picture)


def paint(label: Picture, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return a label map in colours, uint8 H x W x 3; ids beyond the palette (ignored) are cream."""
    colours = np.array([*palette, (224, 224, 192)], np.uint8)
    return colours[np.minimum(as_array(label).astype(int), len(palette))]


def overlay(image: Picture, label: Picture, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return the picture with its label map laid over it; background stays as it is."""
    image, label = as_array(image), as_array(label)
    mixed = 0.4 * image + 0.6 * paint(label, palette)
    return np.where((label > 0)[..., None], mixed, image).astype(np.uint8)


def picture_rows(rows: Mapping[str, Sequence[Picture]], titles: Sequence[str] = (), size: float = 1.0) -> Figure:
    """Draw named rows of pictures, `size` inches wide, one column each; H x W arrays become heat maps of 0..1.

    The text grows with the figure's width, so that it can be read where a wide figure is scaled to a column. A title
    that is wider than its picture is broken into lines.
    """
    columns, gap = max(len(pictures) for pictures in rows.values()), 0.03
    height, width = as_array(next(iter(rows.values()))[0]).shape[:2]
    row_height = size * height / width
    font = max(9.0, columns * size)
    letters = max(8, int(size * 72 / (0.6 * font)))  # of a line above a picture
    above = ["\n".join(textwrap.fill(line, letters) for line in title.split("\n")) for title in titles]
    left = 0.1 + max(map(len, rows)) * 0.6 * font / 72
    top = 0.1 + max((title.count("\n") + 1 for title in above), default=0) * 1.3 * font / 72
    full = left + columns * (size + gap), top + len(rows) * (row_height + gap)
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=full,
        squeeze=False,
        gridspec_kw={"left": left / full[0], "right": 1, "bottom": 0, "top": 1 - top / full[1]}
        | {"wspace": gap / size, "hspace": gap / row_height},
    )
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=font)
        for axis, picture in zip(row, [*pictures, *[None] * (columns - len(pictures))], strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if picture is not None:
                axis.imshow(as_array(picture), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for axis, title in zip(axes[0], above, strict=False):
        axis.set_title(title, fontsize=font, pad=4)
    return figure


def story(
    parts: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[Picture | None]]]], width: float = 9
) -> Figure:
    """Draw parts one below the other, `width` inches wide: a line of text, titles of columns, named rows of pictures.

    A part is (text, titles, rows); it may have no rows, None leaves a picture's place empty, and all pictures have one
    size. The text is 10 points large, to be read where the figure is scaled to 900 pixels.
    """
    font, gap, line = 10.0, 0.04, 0.19  # points; inches between pictures; inches a line of text
    letter = 0.56 * font / 72  # inches, about
    columns = max(len(titles) for _, titles, _ in parts)
    left = 0.15 + letter * max(len(line) for *_, rows in parts for name in rows for line in name.split("\n"))
    side = (width - left) / columns - gap
    shape = next(as_array(p).shape for *_, rows in parts for row in rows.values() for p in row if p is not None)
    tall = side * shape[0] / shape[1]
    drawn, y = [], 0.0  # what is drawn at which place, inches from the upper left
    for text, titles, rows in parts:
        wrapped = textwrap.fill(text, int(width / (1.25 * letter)))  # bold is wider
        drawn.append((0, y, wrapped, {"weight": "bold", "va": "top"}))
        y += 0.08 + line * (wrapped.count("\n") + 1)
        titles = [textwrap.fill(title.replace("_", " "), max(8, int(side / letter))) for title in titles]
        y += line * max((title.count("\n") + 1 for title in titles), default=0)
        for j, title in enumerate(titles):
            drawn.append((left + j * (side + gap) + side / 2, y - 0.04, title, {"ha": "center", "va": "bottom"}))
        for name, pictures in rows.items():
            drawn.append((left - 0.1, y + tall / 2, name, {"ha": "right", "va": "center"}))
            drawn += [(left + j * (side + gap), y, picture, {}) for j, picture in enumerate(pictures)]
            y += tall + gap
        y += 0.12
    figure = plt.figure(figsize=(width, y))
    for x, top, what, style in drawn:
        if isinstance(what, str):
            figure.text(x / width, 1 - top / y, what, fontsize=font, **style)
        elif what is not None:
            axis = figure.add_axes((x / width, 1 - (top + tall) / y, side / width, tall / y))
            axis.imshow(as_array(what), interpolation="nearest", aspect="auto")
            axis.set_axis_off()
    return figure


def first_of_each(pictures: Sequence[tuple], classes: Sequence[int]) -> dict[int, int]:
    """Return class id -> index of the first (name, image, label) in which no other of `classes` covers more pixels.

    A class that is nowhere the largest is left out. Pictures are read until all classes are found.
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


def training_curves(
    curves: Mapping[str, Sequence[float]], ylabel: str, is_log: bool = False, window: int = 20
) -> Figure:
    """Draw values of each iteration, such as losses, as running means over a window of iterations."""
    figure, axis = plt.subplots(figsize=(5, 3))
    for name, values in curves.items():
        kernel = np.ones(min(window, len(values)))
        smooth = np.convolve(values, kernel / kernel.sum(), "valid")
        axis.plot(np.arange(len(kernel) - 1, len(values)), smooth, label=name)  # of the iterations up to here
    axis.set(xlabel="iteration", ylabel=f"{ylabel}, mean of {window}")
    if is_log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")  # 0.5 rather than 5 x 10^-1
        axis.minorticks_off()
    else:
        axis.set_ylim(0, None)
    axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def dots_with_spread(scores: pd.DataFrame, xlabel: str) -> Figure:
    """Draw a dot and a bar of one standard deviation to each side for every row: its name (index), mean and spread."""
    figure, axis = plt.subplots(figsize=(5, 0.35 * len(scores) + 0.8))
    axis.errorbar(scores["mean"], range(len(scores)), xerr=scores["spread"], fmt="o", color=COLOURS[0], capsize=3)
    axis.set_yticks(range(len(scores)), scores.index)
    axis.set(xlabel=xlabel, ylim=(len(scores) - 0.5, -0.5))
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def iou_bars(per_class: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Draw per-class IoU as horizontal bars, one colour a network; of more than 40 classes the 15 best and worst."""
    first = next(iter(per_class.values()))
    names = list(first)
    if len(names) > 40:
        ranked = sorted(names, key=lambda name: -np.nan_to_num(first[name] or 0))
        names = [*ranked[:15], *ranked[-15:]]
    figure, axis = plt.subplots(figsize=(5, 0.28 * len(names) + 1))
    height = 0.8 / len(per_class)
    for k, (network, values) in enumerate(per_class.items()):
        positions = np.arange(len(names)) + (k - (len(per_class) - 1) / 2) * height
        axis.barh(positions, [100 * np.nan_to_num(values[name] or 0) for name in names], height, label=network)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set(xlabel="IoU (%)", xlim=(0, 100))
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(per_class))
    figure.tight_layout()
    return figure


def study_scores(scores: pd.DataFrame, changes: Mapping[str, Mapping]) -> Figure:
    """Draw each configuration's mean scores with the seeds as points; over the images if only these differ.

    scores: one row for each configuration, seed, network and score, with its value in %. changes: configuration ->
    what it changes.
    """
    sizes = {name: changed.get("images") for name, changed in changes.items()}
    others = [{k: v for k, v in changed.items() if k != "images"} for changed in changes.values()]
    is_curve = len(sizes) > 2 and None not in sizes.values() and all(other == others[0] for other in others)
    shown = list(scores.groupby(["network", "score"], sort=False))
    height = 0.8 / len(shown)
    bars = 4.5, 0.25 * len(changes) * (len(shown) + 0.5) + 0.9
    figure, axis = plt.subplots(figsize=(4.5, 3) if is_curve else bars)
    points = {"linestyle": "", "marker": "o", "color": "black", "markersize": 3, "markerfacecolor": "white"}
    for k, ((network, score), rows) in enumerate(shown):
        look = {"color": COLOURS[k % len(COLOURS)], "label": f"{network}, {'mIoU' if score == 'miou' else score}"}
        if is_curve:
            place = rows.configuration.map(sizes)
            means = rows.value.groupby(place).mean()
            axis.plot(means.index, means, **look)
            axis.plot(place, rows.value, **points)
        else:
            place = rows.configuration.map(list(changes).index) + (k - (len(shown) - 1) / 2) * height
            means = rows.value.groupby(place).mean()
            axis.barh(means.index, means, 0.9 * height, **look)
            axis.plot(rows.value, place, **points)
    if is_curve:
        axis.set(xscale="log", xlabel="synthetic images", ylabel="mIoU (%)", ylim=(0, None))
        axis.set_xticks(list(sizes.values()), list(map(str, sizes.values())))
        axis.minorticks_off()
    else:
        axis.set_yticks(range(len(changes)), list(changes))
        axis.invert_yaxis()
        axis.set(xlabel="mIoU (%)" if all(score == "miou" for (_, score), _ in shown) else "IoU (%)", xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    if len(shown) > 1:
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(len(shown), 3), fontsize=8)
    figure.tight_layout()
    return figure


def study_predictions(
    folders: Mapping[str, Path], benchmark: Benchmark, data_root: str, split: str, columns: int = 8
) -> Figure:
    """Draw images evenly spaced over the evaluated split, their ground truth, and the predictions in each folder.

    folders: name of a row -> folder of label maps, as evaluation writes them. Of wide images a row has half as many.
    Raises a DiffsegError for predictions that are not whole.
    """
    validation = open_split(benchmark, data_folder(data_root), split)
    _, height, width = validation[0][1].shape
    size = 2.0 if width > 1.5 * height else 1.0
    count = min(round(columns / size), len(validation))
    shown = [validation[k] for k in np.linspace(0, len(validation) - 1, count).astype(int)]
    rows = {
        "image": [image for _, image, _ in shown],
        "ground truth": [overlay(image, label, benchmark.palette) for _, image, label in shown],
    }
    for row, folder in folders.items():
        rows[row] = [
            overlay(image, read_prediction(folder, name, benchmark, tuple(label.shape)), benchmark.palette)
            for name, image, label in shown
        ]
    return picture_rows(rows, size=size)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and, beside it, as PDF (vectors); both without a date, so the bytes repeat."""
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        with atomic_path(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=150, metadata=metadata, bbox_inches="tight")
