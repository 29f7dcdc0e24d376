"""The charts: scores, intervals, curves of training. Their sizes and colours are those of `diffseg.figures`."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy.special import stdtrit

from diffseg.figures import COLOURS, COLUMN, MARKERS, WIDTH


def half_interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean (Student's t); nan for fewer than two values."""
    if len(values) < 2:
        return float("nan")
    return float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / len(values) ** 0.5)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return a mean and the ends of its 95 % interval; nan for the ends of fewer than two values."""
    mean, half = float(np.mean(values)), half_interval(values)
    return mean, mean - half, mean + half


def dots(axis: Axes, places: Sequence[float], values: Sequence[Sequence[float]], **look) -> None:
    """Draw rows of a dot plot: in each the mean, its 95 % interval over the values, and the values themselves."""
    for place, some in zip(places, values, strict=True):
        axis.plot(some, [place] * len(some), linestyle="", marker="|", markersize=7, color="0.55", zorder=1)
    means, halves = [np.mean(some) for some in values], [half_interval(some) for some in values]
    axis.errorbar(means, places, xerr=halves, linestyle="", capsize=2, zorder=2, **look)


def mean_lines(axis: Axes, rows: pd.DataFrame, place: str, arms: Sequence[str]) -> None:
    """Draw mIoU over the column `place`, a line for each of `arms` that has rows: means, 95 % intervals over them."""
    for arm, colour, marker in zip(arms, COLOURS, MARKERS, strict=False):
        scores = rows[rows.arm == arm].groupby(place).miou
        if len(scores):
            halves = [half_interval(some.tolist()) for _, some in scores]
            look = {"color": colour, "marker": marker, "capsize": 2, "label": arm}
            axis.errorbar(scores.mean().index, scores.mean(), halves, **look)


def curves(
    lines: Mapping[str, Sequence[float]], ylabel: str, window: int = 20, log: bool = False, mark: float | None = None
) -> Figure:
    """Draw what training recorded in each iteration, averaged over a window; `mark` is an iteration to point at."""
    figure, axis = plt.subplots(figsize=(COLUMN, 2.2))
    for k, (name, values) in enumerate(lines.items()):
        kernel, there = np.ones(min(window, len(values))), np.isfinite(values)
        sums, counts = (np.convolve(each, kernel, "valid") for each in (np.where(there, values, 0), there))
        smooth = sums / np.where(counts, counts, np.nan)  # of the iterations up to here
        axis.plot(np.arange(len(kernel) - 1, len(values)), smooth, ["-", "--", ":", "-."][k % 4], marker="", label=name)
    axis.set(xlabel="iteration", ylabel=f"{ylabel}, mean of {window}", yscale="log" if log else "linear")
    if log:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")  # 0.5 rather than 5 x 10^-1
        axis.minorticks_off()
    else:
        axis.set_ylim(0, None)
    if mark is not None:
        axis.axvline(mark, color="0.5", linestyle=":", linewidth=1)
    axis.legend()
    figure.tight_layout()
    return figure


def class_scores(
    per_class: Mapping[str, Mapping[str, float | None]], overall: Mapping[str, tuple[float, float, float]]
) -> Figure:
    """Draw the IoU of each class as dots, one kind a network, below the mIoU with its interval.

    per_class: network -> class -> IoU in 0..1, None or nan where undefined. overall: network -> mIoU, lower and upper
    end of its interval. Classes are ordered by the first network's IoU; of more than 40 the 15 best and worst stay.
    """
    first = next(iter(per_class.values()))
    names = sorted(first, key=lambda name: -np.nan_to_num(first[name] or 0))
    cut = len(names) > 40
    names = [*names[:15], *names[-15:]] if cut else names
    figure, axis = plt.subplots(figsize=(COLUMN, 0.16 * (len(names) + 1) + 0.8))
    if cut:
        axis.axhline(15.5, color="0.5", linestyle=":")  # here the others would stand
    rows = np.arange(1, len(names) + 1)
    values = {
        network: np.array([np.nan if iou[name] is None else iou[name] for name in names], float)
        for network, iou in per_class.items()
    }
    axis.hlines(rows, np.nanmin([*values.values()], axis=0) * 100, np.nanmax([*values.values()], axis=0) * 100, "0.8")
    for (network, ious), colour, marker in zip(values.items(), COLOURS, MARKERS, strict=False):
        axis.plot(100 * ious, rows, linestyle="", marker=marker, color=colour, label=network, clip_on=False)
        mean, low, high = 100 * np.array(overall[network])
        axis.plot(mean, 0, linestyle="", marker=marker, color=colour, ms=3)
        # no error bar: with few images a class the interval may lie beside the mean
        axis.plot([low, high], [0, 0], marker="|", markersize=7, color=colour)
    axis.set_yticks(range(len(names) + 1), ["mIoU, 95 % interval", *names])
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.92")
    axis.set(xlabel="IoU (%)", xlim=(10 * np.floor(10 * np.nanmin([*values.values()])), 100))
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=len(per_class), borderpad=0)
    figure.tight_layout()
    return figure


def confusion_map(counts: np.ndarray, names: Sequence[str], most: int = 21) -> Figure:
    """Draw which share of a class's pixels (rows) is predicted as which class (columns).

    counts: K x K pixels, rows ground truth, columns prediction. Of more than `most` classes those stay that are most
    confused with another than the background, and the background. The colour is the square root of the share, so that
    a few per cent show; 5 % and more are written.
    """
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    if len(names) > most:
        wrong = shares - np.diag(shares.diagonal())
        if names[0] == "background":  # missed objects would fill the figure
            wrong[0] = wrong[:, 0] = 0
            wrong[0, 0] = 1
        kept = np.sort(np.argsort(-np.maximum(wrong.max(axis=0), wrong.max(axis=1)))[:most])
        shares, names = shares[np.ix_(kept, kept)], [names[k] for k in kept]
    side = 0.85 + 0.27 * len(names)
    figure, axis = plt.subplots(figsize=(side, side))
    axis.imshow(np.sqrt(shares), cmap="cividis", vmin=0, vmax=1)
    for t, p in zip(*np.nonzero(shares >= 0.05), strict=True):
        colour = "black" if shares[t, p] > 0.3 else "white"
        axis.text(p, t, f"{100 * shares[t, p]:.0f}", ha="center", va="center", color=colour, fontsize=7)
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted as", ylabel="ground truth (% of its pixels)")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.tight_layout()
    return figure


def study_scores(scores: pd.DataFrame, changes: Mapping[str, Mapping]) -> Figure:
    """Draw each configuration's mean scores with 95 % intervals and the seeds; over the images if only these, and
    perhaps the iterations with them, differ.

    scores: one row for each configuration, seed, network and score, with its value in %. changes: configuration ->
    what it changes.
    """
    sizes = {name: changed.get("images") for name, changed in changes.items()}
    others = [{k: v for k, v in each.items() if k not in ("images", "iterations")} for each in changes.values()]
    is_curve = (
        len({*sizes.values()}) == len(sizes) > 2
        and None not in sizes.values()
        and all(other == others[0] for other in others)
    )
    shown = list(scores.groupby(["network", "score"], sort=False))
    tall = 2.4 if is_curve else 0.14 * len(changes) * (len(shown) + 0.5) + 0.9
    figure, axis = plt.subplots(figsize=(COLUMN, tall))
    for k, ((network, score), rows) in enumerate(shown):
        look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        look["label"] = f"{network}, {'mIoU' if score == 'miou' else score}"
        values = {name: rows.value[rows.configuration == name].dropna().tolist() for name in changes}
        values = {name: some for name, some in values.items() if some}
        if is_curve:
            place = [sizes[name] for name in values]
            means, halves = [np.mean(some) for some in values.values()], [*map(half_interval, values.values())]
            for at, some in zip(place, values.values(), strict=True):
                axis.plot([at] * len(some), some, linestyle="", marker="_", color="0.55")
            axis.errorbar(place, means, yerr=halves, capsize=2, **look)
        else:
            offset = (k - (len(shown) - 1) / 2) * 0.7 / len(shown)
            dots(axis, [list(changes).index(name) + offset for name in values], list(values.values()), **look)
    if is_curve:
        axis.set(xscale="log", xlabel="synthetic images", ylabel="mIoU (%)", ylim=(0, None))
        axis.set_xticks(list(sizes.values()), list(map(str, sizes.values())))
        axis.minorticks_off()
    else:
        axis.set_yticks(range(len(changes)), list(changes))
        axis.set(ylim=(len(changes) - 0.5, -0.5), xlim=(max(0, axis.get_xlim()[0]), None))
        axis.grid(axis="x", color="0.92")
        axis.set(xlabel="mIoU (%)" if all(score == "miou" for (_, score), _ in shown) else "IoU (%)")
    if len(shown) > 1:
        axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2, borderpad=0, columnspacing=1)
    figure.tight_layout()
    return figure


def gains(studies: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw what each technique adds: means and 95 % intervals of differences that are paired by seed.

    studies: a heading (benchmark and baseline) -> technique -> differences in mIoU, percentage points, one a seed.
    """
    count = sum(len(rows) + 1 for rows in studies.values())
    figure, axis = plt.subplots(figsize=(WIDTH, 0.18 * count + 0.5))
    place, ticks = 0, {}
    for heading, rows in studies.items():
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(0, place, heading, weight="bold", va="center", transform=axis.get_yaxis_transform(), bbox=box)
        dots(axis, range(place + 1, place + 1 + len(rows)), list(rows.values()), color=COLOURS[0], marker="o")
        ticks |= {place + 1 + k: name for k, name in enumerate(rows)}
        place += len(rows) + 1
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.tick_params(axis="y", length=0)
    axis.spines.left.set_visible(False)  # the headings would interrupt it
    axis.set(ylim=(place - 0.5, -0.7), xlabel="gain in mIoU (percentage points)")
    axis.grid(axis="x", color="0.92")
    figure.tight_layout()
    return figure
