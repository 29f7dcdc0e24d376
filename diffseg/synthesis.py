"""From prompts to a synthetic data set on disk: pictures, pseudo-masks and their reliability.

The set has PASCAL VOC's layout, so that any trainer reads it: JPEGImages/, SegmentationClass/ (palette PNG, 255 =
ignored), ImageSets/Segmentation/train.txt, and beside it Reliability/ (one-channel PNG, margin 0..255) and
index.csv (prompt, words, classes, seed of every picture).
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torchvision.transforms.v2.functional import to_dtype, to_image
from tqdm import tqdm

from diffseg.attention import AttentionRecorder, parse_steps, token_positions
from diffseg.benchmarks.classes import Benchmark
from diffseg.benchmarks.labels import write_picture_label
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path
from diffseg.generator import draw
from diffseg.masks import class_scores, label_and_margin
from diffseg.prompts import Prompt
from diffseg.refiners import get_refiner


@dataclass(frozen=True)
class SynthesisOptions:
    """The constants of the method; the notebook's parameters of the same names explain each."""

    height: int
    width: int
    sampling_steps: int
    guidance_scale: float
    attention_resolutions: tuple[int, ...]
    attention_steps: str
    beta: float
    refiner: str
    sam_checkpoint: str = ""
    sam_model: str = "vit_b"


@dataclass
class Drawn:
    """One drawn picture with everything that led to its mask (for figures); arrays at the picture's size."""

    image: Image.Image
    ids: list[int]  # class ids of the prompt, ascending
    scores: torch.Tensor  # float32 C x H x W, 0..1, before refinement
    label: torch.Tensor  # uint8 or int16 H x W
    margin: torch.Tensor  # uint8 H x W


def draw_rows(pipeline, rows: Sequence[Prompt], options: SynthesisOptions) -> list[Image.Image]:
    """Draw the pictures of some rows of prompts.csv in one batch, each from its own seed."""
    return draw(
        pipeline,
        [row.prompt for row in rows],
        [row.seed for row in rows],
        [row.negative for row in rows] if any(row.negative for row in rows) else None,
        options.height,
        options.width,
        options.sampling_steps,
        options.guidance_scale,
    )


def draw_with_masks(pipeline, rows: Sequence[Prompt], benchmark: Benchmark, options: SynthesisOptions) -> list[Drawn]:
    """Draw the pictures of some rows of prompts.csv in one batch and cut their masks from the attention."""
    tokens = [token_positions(pipeline.tokenizer, row.prompt, row.spans) for row in rows]
    steps = parse_steps(options.attention_steps, options.sampling_steps)
    refine = get_refiner(options.refiner, options.sam_checkpoint, options.sam_model, pipeline.device)
    reads_self = max(options.attention_resolutions) if options.refiner == "self-attention" else None
    with AttentionRecorder(pipeline, tokens, options.attention_resolutions, steps, reads_self) as recorder:
        images = draw_rows(pipeline, rows, options)
    attentions = recorder.self_attention() if reads_self else [None] * len(rows)
    drawn = []
    for row, image, maps, attention in zip(rows, images, recorder.maps(), attentions, strict=True):
        class_ids = [benchmark.classes.index(name) for name in row.classes]
        try:
            ids, scores = class_scores(maps, class_ids, image.size[::-1])
        except DiffsegError as error:
            raise DiffsegError(f"prompt {row.index} ({row.prompt!r}): {error}") from error
        pixels = to_dtype(to_image(image), torch.float32, scale=True)
        refined = refine(pixels, scores, options.beta, attention)
        drawn.append(Drawn(image, ids, scores, *label_and_margin(ids, refined)))
    return drawn


def synthesise(
    pipeline,
    rows: Sequence[Prompt],
    folder: Path,
    benchmark: Benchmark,
    options: SynthesisOptions,
    batch_size: int = 8,
    jpeg_quality: int = 95,
) -> dict[str, float]:
    """Write the synthetic data set of `rows` to `folder`; pictures that are there already are kept.

    A batch is always made of the same rows (those of one multiple of batch_size), so a run that was cut and goes on
    computes exactly what it would have computed. Several processes (started by `accelerate launch`) take the batches
    in turn and fill one folder, with the files that one process would write; the first writes the lists. Returns the
    mean share of foreground and the mean margin (0..1). Raises a DiffsegError when a picture is missing at the end.
    """
    folders = [(folder / name, suffix) for name, suffix in
               (("JPEGImages", ".jpg"), ("SegmentationClass", ".png"), ("Reliability", ".png"))]  # fmt: skip
    names = [f"{row.index:06d}" for row in rows]

    def is_done(name: str) -> bool:
        return all((place / f"{name}{suffix}").is_file() for place, suffix in folders)

    state = PartialState()
    starts = batches(len(rows), batch_size, state.process_index, state.num_processes)
    todo = [s for s in starts if not all(is_done(name) for name in names[s : s + batch_size])]
    mine, missing = (sum(len(names[s : s + batch_size]) for s in some) for some in (starts, todo))
    bar = tqdm(total=mine, initial=mine - missing, desc="drawing pictures and masks", unit="picture",
               smoothing=0.1, disable=not state.is_main_process)  # fmt: skip
    for start in todo:
        batch = rows[start : start + batch_size]
        for row, drawn in zip(batch, draw_with_masks(pipeline, batch, benchmark, options), strict=True):
            name = f"{row.index:06d}"
            with atomic_path(folder / "JPEGImages" / f"{name}.jpg") as path:
                drawn.image.save(path, quality=jpeg_quality, subsampling=0)
            with atomic_path(folder / "Reliability" / f"{name}.png") as path:
                Image.fromarray(drawn.margin.numpy()).save(path)
            write_picture_label(folder / "SegmentationClass" / f"{name}.png", drawn.label.numpy(), benchmark)
        bar.update(len(batch))
    bar.close()
    state.wait_for_everyone()
    means = [None]
    if state.is_main_process:
        if absent := [name for name in names if not is_done(name)]:
            raise DiffsegError(
                f"picture {absent[0]} is not in {folder} at the end; several machines must share that folder."
            )
        with atomic_path(folder / "ImageSets" / "Segmentation" / "train.txt") as path:
            path.write_text("".join(f"{name}\n" for name in names))
        means = [write_index(rows, names, folder)]
    return broadcast_object_list(means)[0]


def batches(rows: int, batch_size: int, process: int = 0, processes: int = 1) -> range:
    """Return the first row of each batch that is this process's.

    By number, not by what is missing: that changes while another process looks.
    """
    return range(process * batch_size, rows, processes * batch_size)


def write_index(rows: Sequence[Prompt], names: Sequence[str], folder: Path) -> dict[str, float]:
    """Write index.csv, one row a picture, from the files themselves; return the means over the set."""
    shares, margins = [], []
    with atomic_path(folder / "index.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "prompt", "classes", "words", "seed", "foreground", "margin"])
        for row, name in zip(rows, names, strict=True):
            label = np.asarray(Image.open(folder / "SegmentationClass" / f"{name}.png"))
            margin = np.asarray(Image.open(folder / "Reliability" / f"{name}.png"))
            foreground = label.any(axis=-1) if label.ndim == 3 else label > 0
            shares.append(foreground.mean())
            margins.append(margin.mean() / 255)
            writer.writerow([name, row.prompt, json.dumps(row.classes), json.dumps(row.words), row.seed,
                             f"{shares[-1]:.4f}", f"{margins[-1]:.4f}"])  # fmt: skip
    return {"foreground": float(np.mean(shares)), "margin": float(np.mean(margins))}
