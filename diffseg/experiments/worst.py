"""Where do the oracle and the small Sam fail? Of each a sheet of the worst answers to held-out scenes.

python -m diffseg.experiments.worst     results/figures/mini_oracle_worst.png and mini_sam_worst.png
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from diffseg.benchmarks.classes import VOC
from diffseg.experiments.generator.heldout import iou
from diffseg.experiments.oracle import Scenes, stream
from diffseg.experiments.small_sam import Prompts, choose, decode, pixel_of
from diffseg.figures import Tile, picture_rows, save_figure
from diffseg.miniworld import WEIGHTS
from diffseg.miniworld.oracle import CLASS_OF_PICTURE, class_probabilities, load_oracle, picture_probabilities
from diffseg.paths import project_root
from diffseg.small_sam import load_small_sam

BATCH = 32
Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # image uint8 3 x H x W, ground truth H x W, prediction


def oracle_answers(count: int) -> Iterator[Answer]:
    """Yield the oracle's VOC classes of those of `count` held-out scenes that show any."""
    oracle = load_oracle()
    for images, pictures, _ in stream(Scenes(0, "oracle-test"), 0, BATCH, 0, count):
        found = class_probabilities(picture_probabilities(oracle, images)).argmax(dim=1)
        answers = zip(images, CLASS_OF_PICTURE[pictures], found, strict=True)
        yield from (answer for answer in answers if answer[1].any())


@torch.inference_mode()
def sam_answers(count: int) -> Iterator[Answer]:
    """Yield the small Sam's answers, 1 = on the object, to a click on the first object of `count` held-out scenes."""
    sam, rng = load_small_sam(WEIGHTS / "sam"), np.random.default_rng(0)
    for images, _, instances in stream(Scenes(0, "sam-test"), 0, BATCH, 0, count):
        truths = (instances == 1).long()
        points = torch.tensor([[[pixel_of(truth.bool().numpy(), rng)]] for truth in truths])
        prompts = Prompts(points, torch.ones(len(truths), 1, 1, dtype=torch.long), None, None)
        logits, quality = decode(sam, sam.image_encoder(sam.preprocess(images.float())), prompts)
        found = (choose(logits, quality.argmax(dim=2))[:, 0] > 0).long()
        yield from zip(images, truths, found, strict=True)


def mean_iou(truth: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean over the classes of the ground truth, but 0, of the IoU in one image."""
    return float(np.mean([iou(found == k, truth == k) for k in truth.unique() if k > 0]))


def save_worst(answers: Iterator[Answer], path: Path, classes: Sequence[str], columns: int = 8) -> list[float]:
    """Write a sheet of the worst answers, the worst first; return their IoUs in 0..1. classes: the labels' names."""
    rated = sorted(((mean_iou(*answer[1:]), answer) for answer in answers), key=lambda one: one[0])
    worst = [answer for _, answer in rated[:columns]]
    rows = {
        "scene": [image for image, _, _ in worst],
        "ground truth": [Tile(image, truth) for image, truth, _ in worst],
        "answer, IoU": [Tile(image, found, f"{100 * rate:.0f} %") for rate, (image, _, found) in rated[:columns]],
    }
    save_figure(picture_rows(rows, classes=classes), path)
    return [rate for rate, _ in rated[:columns]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=960, help="held-out scenes that are looked through")
    parser.add_argument("--results", type=Path, default=project_root() / "results", help="where to write")
    options = parser.parse_args(arguments)
    folder = options.results / "figures"
    for name, answers, classes in (
        ("oracle", oracle_answers, VOC.classes),
        ("sam", sam_answers, ("background", "object under the click")),
    ):
        ious = save_worst(answers(options.scenes), folder / f"mini_{name}_worst.png", classes)
        print(f"{name}: IoUs from {ious[0]:.1%} to {ious[-1]:.1%}")


if __name__ == "__main__":
    main()
