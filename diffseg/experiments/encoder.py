"""Train the encoder that stands for the ImageNet backbone: it names the pictures of a scene, and never sees a mask.

VOC's networks begin from an ImageNet backbone, which knows words of whole pictures and no outlines. Here the encoder
of `SEGMENTER` learns the words of scenes (which pictures of the mini world are there, in any number and place). The
scenes have seeds of their own, so none of them is a benchmark's; no mask, no synthetic picture and no caption is used.

python -m diffseg.experiments.encoder train --steps 10000     goes on where it was stopped
python -m diffseg.experiments.encoder export                  measures it and writes weights/encoder
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import normalize

from diffseg.experiments.oracle import HELD_OUT, degrade, free_scene, save_half, stream, write_card
from diffseg.experiments.trainer import Trainer, mixed_precision, parser_of, training_note
from diffseg.miniworld.scenes import load_pictures
from diffseg.segmenters import MEAN, STD, Segmenter, load_encoder

SEGMENTER = "resunet-resnet10t"  # whose encoder it is
NAMES = tuple(picture.word for picture in load_pictures())
PAIR_SHARE = 0.5  # of the scenes; two objects are smaller, and the network must tell them apart
SIDES = (32, 48, 64, 64)  # a batch's side in pixels is one of these: objects of every size, and less to compute


class Namer(nn.Module):
    """A network from pictures (float B x 3 x H x W in 0..1, sides divisible by 16) to logits over NAMES, B x names.

    A name's logit is the largest of all positions of the encoder's last map: a scene shows a picture where one
    position sees it, so the evidence stays local without any mask.
    """

    def __init__(self):
        super().__init__()
        self.encoder = Segmenter(SEGMENTER, ("background",)).network.encoder
        self.head = nn.Conv2d(self.encoder.out_channels[-1], len(NAMES), 1)
        nn.init.constant_(self.head.bias, -4.0)  # a picture is in one or two scenes of a hundred

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = normalize(image, MEAN, STD).contiguous(memory_format=torch.channels_last)
        return self.head(self.encoder(image)[-1]).float().amax(dim=(2, 3))


class NamedScenes(Dataset):
    """Endless scenes by number: (image uint8 3 x H x W, which of NAMES it shows, float32)."""

    def __init__(self, seed: int, name: str):
        self.seed, self.name = seed, name

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        scene = free_scene(self.seed, self.name, index, PAIR_SHARE)
        shown = torch.zeros(len(NAMES))
        shown[[NAMES.index(picture.word) for picture in scene.objects]] = 1
        return torch.from_numpy(scene.image).permute(2, 0, 1), shown


def train_encoder(folder: Path, options: argparse.Namespace) -> Trainer:
    """Minimise the binary cross-entropy, summed over NAMES, on scenes drawn on the fly, until the budget is used."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    namer = Namer().to(device, memory_format=torch.channels_last).train()
    trainer = Trainer(folder, {"namer": namer}, options.rate, options.decay)
    scenes = stream(NamedScenes(options.seed, "encoder"), trainer.samples, options.batch, options.workers)

    def loss_of_batch(rng: np.random.Generator) -> torch.Tensor:
        images, shown = next(scenes)
        images = degrade(images.to(device).float() / 255, rng)
        images = F.interpolate(images, size=int(rng.choice(SIDES)), mode="bilinear", antialias=True)
        with mixed_precision(device):
            logits = namer(images)
        losses = F.binary_cross_entropy_with_logits(logits, shown.to(device), reduction="none")
        return losses.sum(dim=1).mean()

    trainer.run(loss_of_batch, options.steps, options.seconds, options.batch, options.every)
    return trainer


@torch.inference_mode()
def check_namer(namer: Namer, count: int) -> dict[str, float]:
    """Measure on `count` held-out scenes how often the best names, as many as there are pictures, are all right."""
    right, seen = {1: 0, 2: 0}, {1: 0, 2: 0}
    for images, shown in stream(NamedScenes(0, "encoder-test"), 0, 32, 0, count):
        for row, target in zip(namer(images.float() / 255), shown, strict=True):
            many = int(target.sum())  # one, too, where both objects are the same picture
            seen[many] += 1
            right[many] += bool(target[row.topk(many).indices].all())
    return {"one": right[1] / seen[1], "two": right[2] / seen[2]}


def export_encoder(folder: Path, weights: Path) -> dict:
    """Write the averaged encoder in half precision with its numbers and its model card; return the numbers."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    namer = Namer().eval()
    namer.load_state_dict(state["average"]["namer"])
    save_half(namer.encoder, weights, {"segmenter": SEGMENTER, "names": NAMES})
    load_encoder(namer.encoder, weights, SEGMENTER)  # what is measured is what is shipped
    note = training_note("python -m diffseg.experiments.encoder train | export", folder, state, namer.encoder)
    note |= {"held_out": check_namer(namer, HELD_OUT) | {"scenes": HELD_OUT}}
    write_card(weights, note, CARD)
    return note


CARD = """# The pretrained encoder

The encoder of the segmenter `resunet-resnet10t` (timm's ResNet-10-T without its last stage), {parameters:,} parameters,
{size:.1f} MB in half precision. It stands for the ImageNet backbone from which networks for PASCAL VOC begin:
`encoder_weights: mini` loads it into the synthetic network and into the real one; empty trains from scratch.

- **Data**: scenes drawn on the fly from emoji art (`diffseg/experiments/encoder.py`), half of them with two objects,
  softened, tinted and scaled. Their seeds are no benchmark's. It was trained on words of whole scenes, never on a mask.
- **Recipe**: `{recipe}`, from scratch: which emoji of the
  mini world a scene shows, largest logit over all positions, binary cross-entropy; {samples_seen:,} scenes, {steps:,}
  steps of {batch}, {seconds:,.0f} s of one thread beside other work; the loss curve is in `training.json`.
- **Quality**: on {held_out[scenes]:,} held-out scenes the best name is right in {held_out[one]:.1%} of those with one
  emoji, the best two in {held_out[two]:.1%} of those with two.
- **Known failures**: it knows drawn scenes only, and no objects below eight pixels.
- **Licence**: MIT; the art is Twemoji, Copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0.
"""


def main(arguments: list[str] | None = None) -> None:
    options = parser_of(__doc__, 2e-3, "encoder", "encoder").parse_args(arguments)
    if options.stage == "train":
        train_encoder(options.folder, options)
    else:
        print(f"held-out scenes {export_encoder(options.folder, options.weights)['held_out']}")


if __name__ == "__main__":
    main()
