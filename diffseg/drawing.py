"""Draw the images of a synthetic set, and keep the attention to their words.

Drawing is expensive and knows nothing of masks. It writes the images (JPEGImages/) and, for each, the maps of its words
(WordMaps/, `diffseg.word_maps`), from which masks are cut later (`diffseg.synthesis`). Images that are there are kept,
and the work is divided by the numbers of the images, so that a process needs to know nothing of the others.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from diffseg.attention import AttentionRecorder
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path
from diffseg.forking import context
from diffseg.generator import draw
from diffseg.prompts import Prompt
from diffseg.sampling_steps import parse_steps
from diffseg.tokens import key_positions
from diffseg.word_maps import WordMaps
from diffseg.workers import begin

IMAGES, MAPS = "JPEGImages", "WordMaps"


@dataclass(frozen=True)
class DrawingOptions:
    """The constants of drawing; the notebook's parameters of the same names explain each."""

    height: int
    width: int
    sampling_steps: int
    guidance_scale: float
    kept_steps: str = field(default="each", kw_only=True)
    self_attention: int = field(default=0, kw_only=True)
    attention_softmax: str = field(default="joint", kw_only=True)
    jpeg_quality: int = field(default=95, kw_only=True)


def check_prompts(pipeline, rows: Sequence[Prompt]) -> None:
    """Raise a DiffsegError when a prompt has a word that a text encoder cannot read, before anything is drawn."""
    wrong = []
    for row in rows:
        try:
            key_positions(pipeline, row.prompt, row.spans)
        except DiffsegError as error:
            wrong.append(f"prompt {row.index}: {error}")
    if wrong:
        raise DiffsegError(f"{len(wrong)} of {len(rows)} prompts cannot be drawn; {wrong[0]}")


def draw_rows(pipeline, rows: Sequence[Prompt], options: DrawingOptions) -> list[Image.Image]:
    """Draw the images of some rows of prompts.csv in one batch, each from its own seed."""
    return draw(
        pipeline,
        [row.prompt for row in rows],
        [row.seed for row in rows],
        [row.negative for row in rows],
        options.height,
        options.width,
        options.sampling_steps,
        options.guidance_scale,
    )


def draw_with_maps(
    pipeline, rows: Sequence[Prompt], options: DrawingOptions, resolutions: Sequence[int] | None = None
) -> tuple[list[Image.Image], list[WordMaps]]:
    """Draw some rows in one batch and record the attention to their words at `resolutions` (None: at all)."""
    tokens = [key_positions(pipeline, row.prompt, row.spans) for row in rows]
    separately = options.kept_steps == "each"
    steps = parse_steps("all" if separately else options.kept_steps, options.sampling_steps)
    with AttentionRecorder(
        pipeline, tokens, resolutions, steps, options.self_attention, separately, options.attention_softmax
    ) as recorder:
        images = draw_rows(pipeline, rows, options)
    return images, recorder.word_maps()


def draw_set(
    pipeline,
    rows: Sequence[Prompt],
    folder: Path,
    options: DrawingOptions,
    batch_size: int = 8,
    share: tuple[int, int] = (0, 1),
    beside: AbstractContextManager[Callable[[Prompt], None]] | None = None,
    workers: int = 0,
) -> int:
    """Draw the images of `rows` that are not in `folder` yet, with their word maps; return how many were drawn.

    An interrupted or divided run computes exactly what one process would have, as its batches are the same. The files
    of a batch are written while the next one is drawn. `beside` is entered for that time, and what it gives is called
    with each row whose files are there (`diffseg.synthesis.cut_beside`). workers: processes that draw on this machine's
    CPU, with one thread and a copy of the generator each; 0: this process.
    """
    batches = batches_of(rows, batch_size, share)
    done, todo = [], []
    for batch in batches:
        (done if all(is_drawn(folder, row) for row in batch) else todo).append(batch)
    made = (
        by_workers(pipeline, todo, folder, options, workers)
        if workers
        else by_this_process(pipeline, todo, folder, options)
    )
    bar = tqdm(total=sum(map(len, batches)), desc="drawing images", unit="image", smoothing=0.1)
    with bar, beside or nullcontext(lambda row: None) as take:
        for batch in chain(done, made):
            bar.update(len(batch))
            for row in batch:
                take(row)
    return sum(map(len, todo))


def write_batch(
    folder: Path, options: DrawingOptions, batch: Sequence[Prompt], images: Sequence[Image.Image], maps: list[WordMaps]
) -> Sequence[Prompt]:
    for row, image, words in zip(batch, images, maps, strict=True):
        words.save(folder / MAPS / f"{name_of(row)}.safetensors")
        with atomic_path(folder / IMAGES / f"{name_of(row)}.jpg") as path:
            image.save(path, quality=options.jpeg_quality, subsampling=0)
    return batch


def by_this_process(
    pipeline, batches: Sequence[Sequence[Prompt]], folder: Path, options: DrawingOptions
) -> Iterator[Sequence[Prompt]]:
    """Draw batches one after the other, and yield each when its files are written."""
    written = None
    with ThreadPoolExecutor(1) as writer:
        for batch in batches:
            made = draw_with_maps(pipeline, batch, options)
            if written:
                yield written.result()  # so that two batches at most are in memory, and a full disk ends the drawing
            written = writer.submit(write_batch, folder, options, batch, *made)
        if written:
            yield written.result()


def by_workers(
    pipeline, batches: Sequence[Sequence[Prompt]], folder: Path, options: DrawingOptions, workers: int
) -> Iterator[Sequence[Prompt]]:
    """Draw batches in several processes, and yield each when its files are written."""
    if not batches:
        return
    # bytes, because tensors that are handed over would be shared, a file descriptor each: too many for most systems
    copy = pickle.dumps(pipeline)
    with ProcessPoolExecutor(workers, context(), take_pipeline, (copy,)) as pool:
        tasks = [pool.submit(draw_batch, batch, folder, options) for batch in batches]
        try:
            for task in as_completed(tasks):
                yield task.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def take_pipeline(copy: bytes) -> None:
    """In a new worker: keep a copy of the generator."""
    global _pipeline
    begin()
    _pipeline = pickle.loads(copy)


def draw_batch(batch: Sequence[Prompt], folder: Path, options: DrawingOptions) -> Sequence[Prompt]:
    """In a worker: draw a batch and write its files."""
    return write_batch(folder, options, batch, *draw_with_maps(_pipeline, batch, options))


def batches_of(rows: Sequence, batch_size: int, share: tuple[int, int] = (0, 1)) -> list[Sequence]:
    """Return the batches of share (k, n): every n-th from the k-th on. A batch is that of a multiple of batch_size."""
    starts = range(share[0] * batch_size, len(rows), share[1] * batch_size)
    return [rows[start : start + batch_size] for start in starts]


def name_of(row: Prompt) -> str:
    return f"{row.index:06d}"


def is_drawn(folder: Path, row: Prompt) -> bool:
    return (folder / IMAGES / f"{name_of(row)}.jpg").is_file() and (
        folder / MAPS / f"{name_of(row)}.safetensors"
    ).is_file()


def read_drawn(folder: Path, row: Prompt) -> tuple[Image.Image, WordMaps]:
    """Return what `draw_set` wrote of one row."""
    with Image.open(folder / IMAGES / f"{name_of(row)}.jpg") as file:
        return file.convert("RGB"), WordMaps.load(folder / MAPS / f"{name_of(row)}.safetensors")
