"""Train the oracle, the network that judges pictures and masks of the mini world (`diffseg.miniworld.oracle`).

python -m diffseg.experiments.oracle train --seconds 3600     goes on where it was stopped
python -m diffseg.experiments.oracle export                   measures it and writes weights/oracle
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.evaluation import evaluate
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.experiments.trainer import Trainer, mixed_precision, parser_of, training_note
from diffseg.files import atomic_path, write_text
from diffseg.miniworld.oracle import (
    CLASS_OF_PICTURE,
    PICTURE_NAMES,
    PICTURES,
    ClassOracle,
    Oracle,
    class_probabilities,
    load_oracle,
    main_picture,
    picture_probabilities,
)
from diffseg.miniworld.scenes import PLACES, Scene, draw_scene
from diffseg.seeds import derive_seed

HELD_OUT = 1920  # scenes on which an exported oracle is measured


def free_scene(seed: int, name: str, index: int, pair_share: float = 0.35) -> Scene:
    """Draw a scene that no benchmark holds: `name` enters its seed, and every picture comes equally often."""
    rng = np.random.default_rng(derive_seed(seed, name, index))
    count = 2 if rng.random() < pair_share else 1
    pictures = [PICTURES[k] for k in rng.integers(len(PICTURES), size=count)]
    words = [picture.word for picture in pictures]
    return draw_scene(rng, pictures, words, list(PLACES)[rng.integers(len(PLACES))])


def picture_label(scene: Scene) -> np.ndarray:
    """Return the int64 H x W map of picture ids: 0 = background, k = PICTURES[k - 1]."""
    return np.array([0, *(1 + PICTURES.index(picture) for picture in scene.objects)])[scene.instances]


class Scenes(Dataset):
    """Endless scenes by number: (image uint8 3 x H x W, picture ids int64 H x W, instances int64 H x W)."""

    def __init__(self, seed: int, name: str):
        self.seed, self.name = seed, name

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scene = free_scene(self.seed, self.name, index)
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        return image, torch.from_numpy(picture_label(scene)), torch.from_numpy(scene.instances).long()


def stream(scenes: Scenes, start: int, batch: int, workers: int, stop: int = 10**12) -> Iterator:
    """Yield batches of the scenes from number `start` on; the workers' count changes nothing but the speed."""
    numbers = range(start, stop)
    own = torch.Generator()  # a loader draws from it when it starts; the training's must stay as resumed
    return iter(DataLoader(scenes, batch, sampler=numbers, num_workers=workers, generator=own))


def degrade(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Blur, tint and roughen pictures (float B x 3 x H x W in 0..1), each by its own amount.

    A generator's pictures are softer than drawn scenes and a little off in colour; without this the oracle would
    judge them by what it never saw. Our choice of strengths: up to the whole of a half-resolution copy, 10 % of
    contrast, 0.06 of each channel, noise of 0.02.
    """

    def draw(low: float, high: float, channels: int = 1) -> torch.Tensor:
        values = rng.uniform(low, high, (len(images), channels, 1, 1)).astype(np.float32)
        return torch.from_numpy(values).to(images.device)

    half = F.interpolate(images, scale_factor=0.5, mode="area")
    soft = F.interpolate(half, size=images.shape[-2:], mode="bilinear", align_corners=False)
    images = torch.lerp(images, soft, draw(0, 1))
    images = (images - 0.5) * draw(0.9, 1.1) + 0.5 + draw(-0.06, 0.06, 3)
    noise = torch.from_numpy(rng.normal(0, 0.02, tuple(images.shape)).astype(np.float32)).to(images.device)
    return (images + noise).clamp(0, 1)


def check_oracle(oracle: Oracle, count: int) -> dict[str, float]:
    """Measure on `count` held-out scenes the objects' IoU, VOC pixel accuracy, and the classifier on single objects."""
    pixels, unions, right, total, named, singles = 0, 0, 0, 0, 0, 0
    for images, labels, _ in stream(Scenes(0, "oracle-test"), 0, 32, 0, count):
        p = picture_probabilities(oracle, images)
        seen, classes = p.argmax(dim=1), class_probabilities(p).argmax(dim=1)
        pixels += ((seen > 0) & (labels > 0)).sum().item()
        unions += ((seen > 0) | (labels > 0)).sum().item()
        right += (classes == CLASS_OF_PICTURE[labels]).sum().item()
        total += labels.numel()
        for picture, label in zip(main_picture(p).tolist(), labels, strict=True):
            ids = label.unique().tolist()
            if len(ids) == 2:
                singles, named = singles + 1, named + (picture == ids[1])
    return {"object_iou": pixels / unions, "pixel_accuracy": right / total, "picture_accuracy": named / singles}


def train_oracle(folder: Path, options: argparse.Namespace) -> Trainer:
    """Minimise the cross-entropy over pictures on scenes drawn on the fly, until the budget is used."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    oracle = Oracle().to(device).train()
    trainer = Trainer(folder, {"oracle": oracle}, options.rate, options.decay)
    scenes = stream(Scenes(options.seed, "oracle"), trainer.samples, options.batch, options.workers)

    def loss_of_batch(rng: np.random.Generator) -> torch.Tensor:
        images, labels, _ = next(scenes)
        images = degrade(images.to(device).float() / 255, rng)
        with mixed_precision(device):
            logits = oracle(images)
        return F.cross_entropy(logits.float(), labels.to(device))

    trainer.run(loss_of_batch, options.steps, options.seconds, options.batch, options.every)
    return trainer


def export_oracle(folder: Path, weights: Path) -> dict:
    """Write the averaged weights in half precision with their numbers and their model card; return the numbers."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    oracle = Oracle()
    oracle.load_state_dict(state["average"]["oracle"])
    save_half(oracle, weights, {"classes": PICTURE_NAMES})
    oracle = load_oracle(weights)  # what is measured is what is shipped
    val = open_split(VOC, data_folder("mini"), "val")
    result = evaluate(ClassOracle(oracle), val, VOC, batch_size=32)
    note = training_note("python -m diffseg.experiments.oracle train | export", folder, state, oracle)
    note |= {"miou": result.miou, "samples": state["samples"], "iou": result.iou, "val_pictures": len(val)}
    note["held_out"] = check_oracle(oracle, HELD_OUT) | {"scenes": HELD_OUT}
    write_card(weights, note, CARD)
    return note


def save_half(network: nn.Module, weights: Path, config: dict) -> None:
    """Write model.safetensors in half precision (counters as they are) and config.json."""
    state = network.state_dict()
    state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    with atomic_path(weights / "model.safetensors") as path:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    write_text(weights / "config.json", json.dumps(config, indent=1) + "\n")


def write_card(weights: Path, note: dict, card: str) -> None:
    """Write training.json and README.md, the model card, whose every number is the note's."""
    write_text(weights / "training.json", json.dumps(note, indent=1) + "\n")
    size = (weights / "model.safetensors").stat().st_size / 1e6
    write_text(weights / "README.md", card.format(size=size, **note))


CARD = """# The oracle

A DeepLabV3+ on the first three stages of a ResNet-18, {parameters:,} parameters, {size:.1f} MB in half precision, from
64 x 64 images to the emoji of the mini world (`config.json`). It only judges: no step of the method uses it. Load it
with `diffseg.miniworld.oracle.load_oracle()`.

- **Data**: scenes drawn on the fly from emoji art with their ground-truth masks (`diffseg/experiments/oracle.py`),
  softened and tinted a little; their seeds are no benchmark's.
- **Recipe**: `{recipe}`, from scratch: {samples_seen:,} scenes, {steps:,} steps of {batch}, {seconds:,.0f} s on
  {hardware[cores]} CPU cores; the loss curve is in `training.json`.
- **Quality**: {miou:.1%} mIoU on mini VOC val ({val_pictures} images); on {held_out[scenes]:,} held-out scenes the
  IoU of objects is {held_out[object_iou]:.1%}, and {held_out[picture_accuracy]:.1%} of the scenes with one object are
  assigned to the right emoji of all.
- **Known failures**: it knows drawn scenes and images like them, and takes everything for one of its emoji or
  background. Thin parts are the least certain. IoU by class: `training.json`; its worst predictions:
  `results/figures/mini_oracle_worst.png`.
- **Licence**: MIT; the art is Twemoji, Copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0.
"""


def main(arguments: list[str] | None = None) -> None:
    options = parser_of(__doc__, 3e-3, "oracle", "oracle").parse_args(arguments)
    if options.stage == "train":
        train_oracle(options.folder, options)
    else:
        note = export_oracle(options.folder, options.weights)
        print(f"mIoU on mini VOC val {note['miou']:.3f}; held-out scenes {note['held_out']}")


if __name__ == "__main__":
    main()
