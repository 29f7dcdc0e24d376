"""Cut the masks of a synthetic set from what was drawn (`diffseg.drawing`).

Another beta, refiner, layer or step range is thus a matter of minutes. The set has PASCAL VOC's layout, which any
trainer reads: JPEGImages/ (a link to what was drawn), SegmentationClass/ (palette PNG, 255 = ignored),
ImageSets/Segmentation/train.txt, and beside it Reliability/ (margin, 0..255), ReliabilityRank/ (`diffseg.reliability`)
and index.csv (prompt, words, classes, seed of every image).
"""

import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_dtype, to_image
from tqdm import tqdm

from diffseg.benchmarks.classes import Benchmark
from diffseg.benchmarks.labels import write_picture_label
from diffseg.drawing import IMAGES, DrawingOptions, batches_of, draw_with_maps, name_of, read_drawn
from diffseg.errors import DiffsegError, Incomplete
from diffseg.files import atomic_path, write_rows, write_text
from diffseg.forking import context
from diffseg.masks import add_background, class_scores, label_and_margin
from diffseg.prompts import Prompt
from diffseg.refiners import SATURATED, get_refiner
from diffseg.reliability import rank_within_class
from diffseg.sampling_steps import parse_steps
from diffseg.word_maps import WordMaps
from diffseg.workers import begin, threads

MASKS = ("SegmentationClass", "Reliability", "ReliabilityRank")
FAILED = "Failed"  # a text file with the reason for each image from which no mask can be cut


@dataclass(frozen=True)
class SynthesisOptions(DrawingOptions):
    """The constants of drawing and cutting; the notebook's parameters of the same names explain each."""

    attention_resolutions: tuple[int, ...]
    attention_steps: str
    beta: float
    refiner: str
    sam_checkpoint: str = ""
    sam_model: str = "vit_b"
    attention_layers: tuple[str, ...] = ()
    inverted_above: float = 1.0

    def refine(self, device: str | torch.device) -> Callable:
        return get_refiner(self.refiner, self.sam_checkpoint, self.sam_model, device)


@dataclass
class Cut:
    """What is cut from one image's word maps; arrays at the image's size."""

    ids: list[int]  # class ids of the prompt, ascending
    scores: torch.Tensor  # float32 C x H x W, 0..1, before refinement
    label: torch.Tensor  # uint8 or int16 H x W
    margin: torch.Tensor  # uint8 H x W


def cut(
    image: Image.Image, maps: WordMaps, row: Prompt, benchmark: Benchmark, options: SynthesisOptions, refine: Callable
) -> Cut:
    """Cut one image's mask from its word maps. Raises a DiffsegError for a blank image and for flat maps."""
    low, high = np.array(image.convert("L").getextrema())
    if low == high:
        raise DiffsegError("the image has one colour only, as when its pixels are no numbers; use float32 or bf16")
    class_ids = [benchmark.classes.index(name) for name in row.classes]
    steps = parse_steps(options.attention_steps, options.sampling_steps)
    mean = maps.mean(options.attention_resolutions, steps, options.attention_layers)
    ids, scores = class_scores(mean, class_ids, image.size[::-1], options.inverted_above)
    pixels = to_dtype(to_image(image.convert("RGB")), torch.float32, scale=True)
    refined = refine(pixels, scores, options.beta, maps.attention)
    ranking = add_background(scores, options.beta) if options.refiner in SATURATED else None
    return Cut(ids, scores, *label_and_margin(ids, refined, ranking))


@dataclass
class Cutter(Dataset):
    """Cuts the mask of any row of prompts from files to files, in this process or in workers of a DataLoader."""

    drawn: Path
    folder: Path
    benchmark: Benchmark
    options: SynthesisOptions
    device: str | torch.device

    @cached_property
    def refine(self) -> Callable:
        return self.options.refine(self.device)

    def __getitem__(self, row: Prompt) -> None:
        name, refine = name_of(row), self.refine  # one that cannot be made is no fault of the image
        try:
            made = cut(*read_drawn(self.drawn, row), row, self.benchmark, self.options, refine)
        except DiffsegError as error:
            write_text(self.folder / FAILED / f"{name}.txt", f"{error}\n")
            return
        rank = rank_within_class(made.label, made.margin)
        for place, pixels in (("ReliabilityRank", rank), ("Reliability", made.margin)):
            with atomic_path(self.folder / place / f"{name}.png") as path:
                Image.fromarray(pixels.cpu().numpy()).save(path)
        write_picture_label(self.folder / "SegmentationClass" / f"{name}.png", made.label.cpu().numpy(), self.benchmark)

    def loader(self, rows: Iterable[Prompt], workers: int) -> DataLoader:
        """Return what cuts the masks of `rows` as it is iterated, by that many processes; 0: by this one."""
        if self.options.refiner == "sam" and torch.device(self.device).type != "cpu":
            workers = min(workers, 1)  # each would hold a network on the GPU
        return DataLoader(
            self,
            batch_size=None,
            sampler=rows,
            num_workers=workers,
            multiprocessing_context=context() if workers else None,
            worker_init_fn=begin,
        )


def cut_set(
    rows: Sequence[Prompt],
    drawn: Path,
    folder: Path,
    benchmark: Benchmark,
    options: SynthesisOptions,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> None:
    """Cut the masks of the images in `drawn` that are not in `folder` yet; JPEGImages there is a link to the images.

    An image from which no mask can be cut is left out with its reason (`write_lists`); the others go on, and a later
    call tries it again. batch_size and share are those of `draw_set`, so that a process cuts what it has drawn.
    workers: processes that cut, on one core each; 0: this one. Masks are cut on the CPU (only `sam` uses `device`) and
    by one thread each, so that they depend neither on the number of workers nor on the GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # by an earlier call or another process
        (folder / IMAGES).symlink_to(os.path.relpath(drawn / IMAGES, folder), target_is_directory=True)
    mine = [row for batch in batches_of(rows, batch_size, share) for row in batch]
    for row in mine:  # tried again: the reason may be gone
        (folder / FAILED / f"{name_of(row)}.txt").unlink(missing_ok=True)
    todo = [row for row in mine if not is_cut(folder, row)]
    if not todo:
        return  # a loader would start its workers
    loader = Cutter(drawn, folder, benchmark, options, device).loader(todo, workers)
    with threads(1):  # as workers have
        for _ in tqdm(loader, "cutting masks", len(todo), unit="image", smoothing=0.1):
            pass


@contextmanager
def cut_beside(
    drawn: Path,
    folder: Path,
    benchmark: Benchmark,
    options: SynthesisOptions,
    device: str | torch.device = "cpu",
    workers: int = 0,
) -> Iterator[Callable[[Prompt], None]]:
    """Cut masks by `workers` processes while images are drawn: the `beside` of `draw_set`.

    What it gives takes a row whose image is drawn. On leaving, the masks of all rows that were given are cut. Without
    workers it cuts nothing; that, and what an error leaves uncut, is left to `cut_set`.
    """
    if not workers:
        yield lambda row: None
        return
    rows: SimpleQueue[Prompt | None] = SimpleQueue()
    todo = (row for row in iter(rows.get, None) if not is_cut(folder, row))
    loader = Cutter(drawn, folder, benchmark, options, device).loader(todo, workers)
    thread = Thread(target=deque, args=(loader, 0), daemon=True)  # iterates and keeps nothing
    thread.start()
    try:
        yield rows.put
    finally:
        rows.put(None)
    thread.join()  # not where the drawing failed


def is_cut(folder: Path, row: Prompt) -> bool:
    places = [folder / place / f"{name_of(row)}.png" for place in MASKS]
    return (folder / FAILED / f"{name_of(row)}.txt").is_file() or all(path.is_file() for path in places)


def write_lists(rows: Sequence[Prompt], folder: Path, failed_share: float = 0.01) -> dict[str, float]:
    """Write train.txt, index.csv and failed.csv of a whole set from its files; return its means.

    Returned are the mean share of foreground and mean margin (0..1) and the number of images that failed. Raises
    Incomplete when a mask is missing, and a DiffsegError when more than `failed_share` (0..1) of the images failed.
    """
    if missing := [row for row in rows if not is_cut(folder, row)]:
        raise Incomplete(f"{len(missing)} of {len(rows)} masks are not made yet (the first is {name_of(missing[0])}).")
    index, failed = [], []
    for row in rows:
        name = name_of(row)
        reason = folder / FAILED / f"{name}.txt"
        if reason.is_file():
            failed.append({"name": name, "prompt": row.prompt, "reason": reason.read_text(encoding="utf-8").strip()})
            continue
        label, margin = (np.asarray(Image.open(folder / place / f"{name}.png")) for place in MASKS[:2])
        foreground = label.any(axis=-1) if label.ndim == 3 else label > 0
        index.append(
            {
                "name": name,
                "prompt": row.prompt,
                "classes": json.dumps(row.classes),
                "words": json.dumps(row.words),
                "seed": row.seed,
                "foreground": f"{foreground.mean():.4f}",
                "margin": f"{margin.mean() / 255:.4f}",
            }
        )
    write_rows(folder / "failed.csv", failed, ["name", "prompt", "reason"])
    if len(failed) > failed_share * len(rows):
        raise DiffsegError(
            f"{len(failed)} of {len(rows)} images failed, more than failed_share = {failed_share} allows; see "
            f"{folder / 'failed.csv'}, the first: {failed[0]['reason']}"
        )
    write_rows(folder / "index.csv", index)
    write_text(folder / "ImageSets" / "Segmentation" / "train.txt", "".join(f"{row['name']}\n" for row in index))
    means = {name: float(np.mean([float(row[name]) for row in index])) for name in ("foreground", "margin")}
    return means | {"failed": len(failed)}


# ------------------------------------------------------------------------------------------------------ both at once


@dataclass
class Drawn(Cut):
    """One image with everything that led to its mask."""

    image: Image.Image


def draw_with_masks(pipeline, rows: Sequence[Prompt], benchmark: Benchmark, options: SynthesisOptions) -> list[Drawn]:
    """Draw some rows in one batch and cut their masks at once, without files and without what the cut does not read."""
    needed = dataclasses.replace(
        options,
        kept_steps=options.attention_steps,
        self_attention=max(options.attention_resolutions) if options.refiner == "self-attention" else 0,
    )
    refine = options.refine(pipeline._execution_device)
    drawn = []
    images, recorded = draw_with_maps(pipeline, rows, needed, options.attention_resolutions)
    for row, image, maps in zip(rows, images, recorded, strict=True):
        try:
            made = cut(image, maps, row, benchmark, options, refine)
        except DiffsegError as error:
            raise DiffsegError(f"prompt {row.index} ({row.prompt!r}): {error}") from error
        drawn.append(Drawn(**vars(made), image=image))
    return drawn
