"""Does the GPU wait for masks? Images per second of drawing with each refiner beside it, over drawing alone.

python -m diffseg.experiments.speed.refiners_overlap      writes results/benchmarks/refiners_overlap.json

No GPU is needed: the drawing is a stand-in that sleeps and then gives images and word maps of the size of Stable
Diffusion 1.5's. By default it sleeps as long as an image of voc.yaml, in 100 steps, is estimated to take on a GPU; it
was not measured. All else is real: the files, the processes that cut masks (`diffseg.synthesis.cut_beside`), and the
masks. The server that starts these processes loads the package before the first measurement. The last masks of a set
are hidden by no drawing, so a ratio rises with --images.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image

from diffseg import drawing
from diffseg.benchmarks.classes import VOC
from diffseg.files import write_text
from diffseg.lab.provenance import provenance
from diffseg.paths import project_root
from diffseg.prompts import Prompt, augment
from diffseg.refiners import REFINERS, refiners_at_hand
from diffseg.synthesis import SynthesisOptions, cut_beside, cut_set
from diffseg.word_maps import WordMaps
from diffseg.words import load_words, select_words

SIDE = 512
SELF_ATTENTION = 32  # the map size that Dataset Diffusion reads
LAYERS = {64: 5, 32: 5, 16: 5, 8: 1}  # cross-attention layers of Stable Diffusion 1.5 by map size


def stand_in(row: Prompt) -> tuple[Image.Image, WordMaps]:
    """Return an image of coloured areas with some grain, and the maps of its words, both of the row's seed."""
    generator = torch.Generator().manual_seed(row.seed)

    def smooth(channels: int, positions: int, side: int) -> torch.Tensor:
        noise = torch.rand(1, channels, positions, positions, generator=generator)
        return F.interpolate(noise, (side, side), mode="bicubic")[0].clamp(0, 1)

    image = smooth(3, 8, SIDE) + 0.02 * torch.randn(3, SIDE, SIDE, generator=generator)
    maps = {
        f"{side}.{k}": smooth(len(row.words), 4, side)[None] for side, count in LAYERS.items() for k in range(count)
    }
    attention = torch.rand(SELF_ATTENTION, SELF_ATTENTION, SELF_ATTENTION**2, generator=generator).softmax(dim=-1)
    return to_pil_image(image.clamp(0, 1)), WordMaps(maps, [[0]], attention.unflatten(2, (SELF_ATTENTION,) * 2))


def measure(rows: Sequence[Prompt], refiner: str, seconds: float, batch: int, workers: int, sam: dict) -> dict:
    """Return seconds of the set drawn alone, with masks cut beside, and of its masks cut by this process afterwards.

    seconds: that the drawing of one image takes.
    """
    options = SynthesisOptions(SIDE, SIDE, 1, 7.5, (16, 32, 64), "all", 0.2, refiner, **sam)
    made = {row.index: stand_in(row) for row in rows}

    def draw(pipeline, rows: Sequence[Prompt], options: SynthesisOptions) -> tuple[list, list]:
        time.sleep(seconds * len(rows))
        return tuple(zip(*(made[row.index] for row in rows), strict=True))

    with tempfile.TemporaryDirectory() as name, patch.object(drawing, "draw_with_maps", draw):
        root = Path(name)
        start = time.perf_counter()
        drawing.draw_set(None, rows, root / "alone", options, batch)
        alone = time.perf_counter() - start
        beside = cut_beside(root / "drawn", root / "beside", VOC, options, workers=workers)
        start = time.perf_counter()
        drawing.draw_set(None, rows, root / "drawn", options, batch, beside=beside)
        cut_set(rows, root / "drawn", root / "beside", VOC, options, workers=workers)
        both = time.perf_counter() - start
        start, cpu = time.perf_counter(), time.process_time()
        cut_set(rows, root / "drawn", root / "afterwards", VOC, options)
        after, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "refiner": refiner,
        "images_per_second_alone": len(rows) / alone,
        "images_per_second_beside": len(rows) / both,
        "ratio": alone / both,
        "ratio_afterwards": alone / (alone + after),
        "cutting_cpu_seconds": cpu / len(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.3, help="of one image's drawing")
    parser.add_argument("--sam-checkpoint", default="", help="file of Segment Anything's weights, to time that refiner")
    parser.add_argument("--sam-model", default="vit_b", help="which of its models the file holds")
    arguments = parser.parse_args()
    words = select_words(load_words("voc"), None)
    rows = augment(words, arguments.images, templates=["a photo of a {}"], places=[])
    sam = {"sam_checkpoint": arguments.sam_checkpoint, "sam_model": arguments.sam_model}
    report = {
        "drawing": "a stand-in that sleeps; no GPU was used",
        "seconds_of_an_image": arguments.seconds,
        "side": SIDE,
        "images": arguments.images,
        "batch": arguments.batch,
        "workers": arguments.workers,
        "refiners": [],
    }
    measure(rows[:1], "none", 0, 1, arguments.workers, {})
    for refiner in refiners_at_hand(list(REFINERS), arguments.sam_checkpoint):
        load = os.getloadavg()[0]  # processes that want a core, on average over the minute before
        found = measure(rows, refiner, arguments.seconds, arguments.batch, arguments.workers, sam)
        report["refiners"].append(found | {"load_before": load})
        print(found, flush=True)
    report |= provenance()
    write_text(project_root() / "results" / "benchmarks" / "refiners_overlap.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
