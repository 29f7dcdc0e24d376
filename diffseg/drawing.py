"""Draw the images of a synthetic set, and keep the attention to their words.

Drawing is expensive and knows nothing of masks. It writes the images (JPEGImages/) and, for each, the maps of its words
(WordMaps/, `diffseg.word_maps`), from which masks are cut later (`diffseg.synthesis`). Images that are there are kept,
and the work is divided by the numbers of the images, so that a process needs to know nothing of the others.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from diffseg.attention import AttentionRecorder
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path
from diffseg.generator import draw
from diffseg.prompts import Prompt
from diffseg.sampling_steps import parse_steps
from diffseg.tokens import key_positions
from diffseg.word_maps import WordMaps

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
        [row.negative for row in rows] if any(row.negative for row in rows) else None,
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
) -> int:
    """Draw the images of `rows` that are not in `folder` yet, with their word maps; return how many were drawn.

    An interrupted or divided run computes exactly what one process would have, as its batches are the same. The files
    of a batch are written while the next one is drawn. `beside` is entered for that time, and what it gives is called
    with each row whose files are there (`diffseg.synthesis.cut_beside`).
    """
    batches, drawn, written = batches_of(rows, batch_size, share), 0, None
    bar = tqdm(total=sum(map(len, batches)), desc="drawing images", unit="image", smoothing=0.1)

    def write(batch: Sequence[Prompt], images: Sequence[Image.Image], recorded: Sequence[WordMaps]) -> None:
        for row, image, maps in zip(batch, images, recorded, strict=True):
            maps.save(folder / MAPS / f"{name_of(row)}.safetensors")
            with atomic_path(folder / IMAGES / f"{name_of(row)}.jpg") as path:
                image.save(path, quality=options.jpeg_quality, subsampling=0)
            take(row)
        bar.update(len(batch))

    with bar, beside or nullcontext(lambda row: None) as take, ThreadPoolExecutor(1) as writer:
        for batch in batches:
            if all(is_drawn(folder, row) for row in batch):
                for row in batch:
                    take(row)
                bar.update(len(batch))
                continue
            made = draw_with_maps(pipeline, batch, options)
            if written:
                written.result()  # so that two batches at most are in memory, and a full disk ends the drawing
            written = writer.submit(write, batch, *made)
            drawn += len(batch)
        if written:
            written.result()
    return drawn


def batches_of(rows: Sequence[Prompt], batch_size: int, share: tuple[int, int] = (0, 1)) -> list[Sequence[Prompt]]:
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
