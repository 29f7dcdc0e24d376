"""Which maps make the best masks? One thing varied at a time, on images that are drawn once.

A variant is a set of map resolutions, a choice of denoising steps, a refiner and a choice of layers; each is
thresholded with several betas. All variants have the same images, because one drawing carries one recorder for every
choice of steps: recorders nest, and change neither the image nor another recorder's maps. A recorder keeps the maps of
each layer, so a choice of layers needs none of its own.

The reference is what a segmentation network predicts for the image. A drawn image has no ground-truth mask, so the
network must be better than the masks. For the mini world it is the oracle, which was trained on ground-truth masks.
"""

import argparse
import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import to_dtype, to_image
from tqdm import tqdm

from diffseg.attention import AttentionRecorder
from diffseg.benchmarks.classes import Benchmark
from diffseg.benchmarks.metrics import ConfusionMatrix, bootstrap_interval, mean_iou
from diffseg.drawing import draw_rows
from diffseg.errors import DiffsegError
from diffseg.experiments.speed import time_in_turn
from diffseg.families import layer_names
from diffseg.figures import COLOURS, COLUMN, MARKERS, WIDTH
from diffseg.files import MANIFEST, atomic_path
from diffseg.masks import class_scores, label_and_margin
from diffseg.miniworld.oracle import ClassOracle, load_oracle
from diffseg.paths import project_root
from diffseg.prompts import Prompt
from diffseg.sampling_steps import parse_steps
from diffseg.segmenters import load_segmenter
from diffseg.synthesis import SynthesisOptions, draw_with_masks
from diffseg.tokens import key_positions
from diffseg.word_maps import choose_layers

SMALLEST_OBJECT = 0.01  # share of the picture below which a class counts as not seen; our choice


@dataclass(frozen=True)
class Variant:
    """One way from attention to scores; all but the refiner are `SynthesisOptions`' attention_... of that name."""

    resolutions: tuple[int, ...]
    steps: str
    refiner: str
    layers: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, str]:
        """Its place in the tables."""
        resolutions, layers = "+".join(map(str, self.resolutions)), "+".join(self.layers) or "all"
        return {"resolutions": resolutions, "steps": self.steps, "refiner": self.refiner, "layers": layers}


VARIED = tuple(field.name for field in dataclasses.fields(Variant))


@dataclass
class Recorded:
    """One picture with what each variant needs of its attention, and the options to cut it."""

    row: Prompt
    image: Image.Image
    pixels: torch.Tensor  # float32 3 x H x W in 0..1
    scores: dict[Variant, tuple[list[int], torch.Tensor]]  # class ids, float32 C x H x W in 0..1
    attention: dict[Variant, torch.Tensor | None]  # self-attention, only of the refiner of that name


def step_choices(sampling_steps: int) -> list[str]:
    """Return the choices of steps worth comparing: all, middle (the paper's), both halves, and every single one."""
    half = sampling_steps // 2
    halves = [f"0-{half - 1}", f"{half}-{sampling_steps - 1}"] if half else []
    return ["all", "middle", *halves, *(str(k) for k in range(sampling_steps) if k != half)]


def layer_choices(pipeline, compared: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the patterns of each choice of layers, such as "down_blocks.*+up_blocks.2.*"; of "all" none.

    Raises a DiffsegError for a pattern that matches no layer of the generator.
    """
    choices = [() if text == "all" else tuple(text.split("+")) for text in compared]
    for patterns in choices:
        choose_layers(layer_names(pipeline), patterns, "compared_layers")
    return choices


def one_at_a_time(
    base: Variant,
    resolutions: Sequence[Sequence[int]],
    steps: Sequence[str],
    refiners: Sequence[str],
    layers: Sequence[Sequence[str]],
) -> list[Variant]:
    """Return the base and every variant that differs from it in one thing, each once."""
    varied = [dataclasses.replace(base, resolutions=tuple(sorted(set(r)))) for r in resolutions]
    varied += [dataclasses.replace(base, steps=s) for s in steps]
    varied += [dataclasses.replace(base, refiner=r) for r in refiners]
    varied += [dataclasses.replace(base, layers=tuple(patterns)) for patterns in layers]
    return list(dict.fromkeys([base, *varied]))


def options_of(variant: Variant, beta: float, options: SynthesisOptions) -> SynthesisOptions:
    """Return the options with which `draw_with_masks` makes this variant's masks."""
    return dataclasses.replace(
        options,
        attention_resolutions=variant.resolutions,
        attention_steps=variant.steps,
        attention_layers=variant.layers,
        refiner=variant.refiner,
        beta=beta,
    )


def draw_variants(
    pipeline, rows: Sequence[Prompt], benchmark: Benchmark, options: SynthesisOptions, variants: Sequence[Variant]
) -> list[Recorded]:
    """Draw some rows of prompts.csv in one batch, once, with the scores of every variant.

    Of `options`, picture size, sampling and checkpoint count; what a variant has of its own is the variant's.
    A picture is the same, bit for bit, and has the same scores as `draw_with_masks` gives with that variant alone.
    Raises a DiffsegError for a variant whose layers have no map at one of its resolutions.
    """
    tokens = [key_positions(pipeline, row.prompt, row.spans) for row in rows]
    with ExitStack() as stack:
        recorders: dict[tuple[str, int | None], AttentionRecorder] = {}
        for variant in variants:
            key = (variant.steps, self_resolution(variant))
            if key not in recorders:
                needed = {r for other in variants if other.steps == variant.steps for r in other.resolutions}
                steps = parse_steps(variant.steps, options.sampling_steps)
                recorder = AttentionRecorder(pipeline, tokens, sorted(needed), steps, key[1])
                recorders[key] = stack.enter_context(recorder)
        images = draw_rows(pipeline, rows, options)
    drawn = [Recorded(row, image, as_pixels(image), {}, {}) for row, image in zip(rows, images, strict=True)]
    kept = {key: recorder.word_maps() for key, recorder in recorders.items()}
    for variant in variants:
        steps = parse_steps(variant.steps, options.sampling_steps)
        for one, maps in zip(drawn, kept[variant.steps, self_resolution(variant)], strict=True):
            ids = [benchmark.classes.index(name) for name in one.row.classes]
            mean = maps.mean(variant.resolutions, steps, variant.layers)
            one.scores[variant] = class_scores(mean, ids, one.image.size[::-1], options.inverted_above)
            one.attention[variant] = maps.attention
    return drawn


def self_resolution(variant: Variant) -> int | None:
    return max(variant.resolutions) if variant.refiner == "self-attention" else None


def as_pixels(image: Image.Image) -> torch.Tensor:
    return to_dtype(to_image(image), torch.float32, scale=True)


def cut(one: Recorded, variant: Variant, beta: float, refine: Callable) -> torch.Tensor:
    """Return the label map (H x W) of a variant and a beta."""
    ids, scores = one.scores[variant]
    return label_and_margin(ids, refine(one.pixels, scores, beta, one.attention[variant]))[0]


def load_reference(name: str, benchmark: Benchmark) -> nn.Module:
    """Load the reference network: "mini" (the oracle), or a folder of `save_segmenter`.

    It goes from pictures (float B x 3 x H x W, 0..1) to logits B x classes x H x W and has the attributes name and
    classes. Raises a DiffsegError when its classes are not the benchmark's, or the oracle cannot tell them.
    """
    network = ClassOracle(load_oracle(), benchmark) if name == "mini" else load_segmenter(Path(name))
    if tuple(network.classes) != tuple(benchmark.classes):
        raise DiffsegError(
            f"the reference network {name} knows {len(network.classes)} classes and they are not {benchmark.name}'s; "
            "give a network that was trained on this benchmark's classes"
        )
    return network


def reference_label(
    seen: torch.Tensor, named: Sequence[int], ignore: int, smallest: float = SMALLEST_OBJECT
) -> torch.Tensor | None:
    """Return the reference mask of one picture: background, the prompt's classes, and the rest ignored.

    seen: int64 H x W, the network's label map. named: the class ids of the prompt. None when one of them covers
    less than the share `smallest` of the picture: then the picture failed, not the mask.
    """
    if any((seen == i).float().mean() < smallest for i in named):
        return None
    known = torch.isin(seen, torch.tensor([0, *named]))
    return torch.where(known, seen, ignore)


def ablate(
    pipeline,
    rows: Sequence[Prompt],
    benchmark: Benchmark,
    reference: nn.Module,
    options: SynthesisOptions,
    variants: Sequence[Variant],
    betas: Sequence[float],
    batch_size: int = 8,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Score every variant with every beta against the reference network, on the pictures of `rows`, drawn once.

    Returns a table, one row for a variant and a beta, and the counts that belong to it.
    - miou: ONE confusion matrix over all pictures (VOC's rule), reference against label map; mean IoU over the
      background and the classes that occur. A pixel is background, or a class that its prompt names; where the
      network sees a class that the prompt does not name, the pixel is ignored (the drawn object under another name,
      more often than not). low, high: 95 % bootstrap interval over the pictures.
    - miou_strict: the same with those pixels counted as background.
    - seconds_cut: median over the pictures of the time from scores to label, refiner included.
    Counts: pictures, not_seen (pictures left out of everything, as the network sees too little of a class that the
    prompt names), ignored (share of the pixels of the others).
    """
    refiners = {one: options_of(one, options.beta, options).refine(pipeline._execution_device) for one in variants}
    kinds = ("miou", "miou_strict")
    keys = [(variant, beta) for variant in variants for beta in betas]
    classes, ignore = benchmark.num_classes, benchmark.ignore
    matrices = {(*key, kind): ConfusionMatrix(classes, ignore) for key in keys for kind in kinds}
    seconds: dict[tuple[Variant, float], list[float]] = {key: [] for key in keys}
    not_seen, ignored = 0, []
    for start in tqdm(range(0, len(rows), batch_size), "drawing and cutting", unit="batch"):
        for one in draw_variants(pipeline, rows[start : start + batch_size], benchmark, options, variants):
            with torch.inference_mode():
                seen = reference(one.pixels[None].to(pipeline._execution_device))[0].argmax(dim=0).cpu()
            named = sorted({benchmark.classes.index(name) for name in one.row.classes})
            truth = reference_label(seen, named, ignore)
            if truth is None:
                not_seen += 1
                continue
            ignored.append((truth == ignore).float().mean().item())
            strict = torch.where(truth == ignore, 0, truth)
            for key in keys:
                started = time.perf_counter()
                label = cut(one, *key, refiners[key[0]]).cpu()
                seconds[key].append(time.perf_counter() - started)
                matrices[*key, "miou"].update(truth, label)
                matrices[*key, "miou_strict"].update(strict, label)
    if not ignored:
        raise DiffsegError(
            f"the reference network sees the prompt's class in none of the {len(rows)} pictures; draw more of them, or "
            "give a network that knows such pictures"
        )
    table = []
    for variant, beta in keys:
        found = {kind: mean_iou(matrices[variant, beta, kind].class_sums, "voc") for kind in kinds}
        low, high = bootstrap_interval(matrices[variant, beta, "miou"].per_image, "voc", samples=300)
        table.append(
            {
                **variant.columns,
                "beta": beta,
                **{kind: float(value) for kind, value in found.items()},
                "low": low,
                "high": high,
                "seconds_cut": statistics.median(seconds[variant, beta]),
            }
        )
    counts = {"pictures": len(rows), "not_seen": not_seen, "ignored": statistics.fmean(ignored)}
    return pd.DataFrame(table), counts


def time_variants(
    pipeline,
    rows: Sequence[Prompt],
    benchmark: Benchmark,
    options: SynthesisOptions,
    variants: Sequence[Variant],
    repetitions: int = 3,
) -> pd.DataFrame:
    """Measure what each variant costs alone: seconds a picture from prompt to mask, drawing included.

    rows: one batch. Every repetition draws the batch plainly and then with each variant in turn, so that a change in
    the machine's load meets all of them; the medians are returned. Columns of `VARIED` (all "-" in the row without
    any recorder), seconds (wall time), cpu_seconds (of this process's threads, which other
    processes disturb less), both for one picture.
    """
    calls = {None: lambda: draw_rows(pipeline, rows, options)}
    for variant in variants:
        own = options_of(variant, options.beta, options)
        calls[variant] = lambda own=own: draw_with_masks(pipeline, rows, benchmark, own)
    draw_rows(pipeline, rows, options)  # the first call pays for memory and kernels
    table = []
    for variant, found in time_in_turn(calls, repetitions).items():
        wall, cpu = (statistics.median(values) / len(rows) for values in zip(*found, strict=True))
        columns = variant.columns if variant else dict.fromkeys(VARIED, "-")
        table.append({**columns, "seconds": wall, "cpu_seconds": cpu})
    return pd.DataFrame(table)


def along(table: pd.DataFrame, base: Variant, name: str) -> pd.DataFrame:
    """Return the rows that differ from the base in `name` alone (one of `VARIED`), all betas."""
    fixed = {column: value for column, value in base.columns.items() if column != name}
    return table[(table[list(fixed)] == pd.Series(fixed)).all(axis=1)]


def best_beta(table: pd.DataFrame) -> pd.DataFrame:
    """Return each variant's row with the beta of the highest mIoU."""
    return table.loc[table.groupby([*VARIED], sort=False).miou.idxmax()]


def betas_figure(table: pd.DataFrame, base: Variant) -> Figure:
    """Draw mIoU over beta with 95 % intervals over images: a panel for each thing that was varied, a line a value."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.6), sharex=True, sharey=True)
    for axis, name in zip(axes.flat, VARIED, strict=True):
        shown = along(table, base, name)
        shown = shown[~shown.steps.str.isdecimal()] if name == "steps" else shown
        values = list(shown.groupby(name, sort=False))
        for k, (value, rows) in enumerate(values):
            off = 0.012 * (k - (len(values) - 1) / 2)  # beside each other, or the intervals would hide each other
            bounds = 100 * (rows.miou - rows.low), 100 * (rows.high - rows.miou)
            look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "label": value}
            axis.errorbar(rows.beta + off, 100 * rows.miou, bounds, elinewidth=0.8, **look)
        axis.legend(title=name, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=1, borderpad=0)
    for axis in axes[1]:
        axis.set(xlabel="beta")
    for axis in axes[:, 0]:
        axis.set(ylabel="mask mIoU (%)")
    figure.tight_layout()
    return figure


def steps_figure(table: pd.DataFrame, base: Variant, sampling_steps: int) -> Figure:
    """Draw the mIoU of every single denoising step at its best beta, with the 95 % interval over images."""
    single = along(best_beta(table), base, "steps").replace({"steps": {"middle": str(sampling_steps // 2)}})
    single = single[single.steps.str.isdecimal()].sort_values("steps", key=lambda column: column.astype(int))
    figure, axis = plt.subplots(figsize=(COLUMN, 2.2))
    index = single.steps.astype(int)
    axis.fill_between(index, 100 * single.low, 100 * single.high, alpha=0.2, label="95 % interval over images")
    axis.plot(index, 100 * single.miou)
    axis.set(xlabel=f"denoising step that is read, of {sampling_steps}", ylabel="mask mIoU (%), best beta")
    axis.legend(loc="lower right")
    figure.tight_layout()
    return figure


def publish(folder: Path, root: Path | None = None) -> list[Path]:
    """Copy a finished notebook 07's table, manifest and figures to `root` (results): return the new paths.

    Raises a DiffsegError when the step is not finished.
    """
    root = root or project_root() / "results"
    if not (folder / MANIFEST).is_file():
        raise DiffsegError(f"{folder} holds no finished ablation; run notebook 07 first")
    targets = {
        folder / "ablation.csv": root / "tables" / "mask_ablation.csv",
        folder / MANIFEST: root / "tables" / "mask_ablation.manifest.json",
    }
    for figure in sorted((folder.parent / "figures").glob("07_*")):  # figures are the run's, not the step's
        targets[figure] = root / "figures" / f"mask_ablation_{figure.name.removeprefix('07_')}"
    for source, target in targets.items():
        with atomic_path(target) as path:
            shutil.copyfile(source, path)
    return list(targets.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy the table of a finished notebook 07 to results/.")
    default = project_root() / "results" / "runs" / "mask-ablation" / "07_mask_ablation"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="the step's folder")
    for path in publish(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
