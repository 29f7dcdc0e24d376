"""Train the mini world's small Segment Anything (`diffseg.small_sam`).

It learns masks of whatever a prompt points at, without classes, on scenes that no benchmark uses; half of them as the
generator's VAE renders them, for drawn pictures have its soft edges and stains. Prompts in training are what the
refiner `sam` gives (a box around coarse attention, its best pixel, the other objects' best pixels), single clicks,
coarse masks, and corrections of its own first answer, as in Kirillov et al. (ICCV 2023).

    python -m diffseg.experiments.small_sam train --seconds 3600     goes on where it was stopped
    python -m diffseg.experiments.small_sam export                   measures it and writes weights/sam
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from segment_anything.modeling import Sam
from torch.nn import functional as F

from diffseg.experiments.oracle import Scenes, degrade, save_half, stream, write_card
from diffseg.experiments.trainer import Trainer, mixed_precision, parser_of, training_note
from diffseg.generator import load_generator
from diffseg.small_sam import CONFIG, build_small_sam, load_small_sam

MOST_NOISE = 0.3  # on the latents of what it learns from; ours, see `through_vae`


@dataclass
class Prompts:
    """K prompts for each of B pictures, all of one kind; None where the kind has no such part.

    points: float B x K x N x 2, (x, y) in pixels; point_labels: int64 B x K x N, 1 = on the object, 0 = off it;
    boxes: float B x K x 4, x0 y0 x1 y1; masks: float B x K x 1 x 64 x 64, logits.
    """

    points: torch.Tensor | None
    point_labels: torch.Tensor | None
    boxes: torch.Tensor | None
    masks: torch.Tensor | None

    @property
    def is_ambiguous(self) -> bool:
        """One click alone: Sam answers with three masks and says which it likes."""
        return self.boxes is None and self.masks is None and self.points.shape[2] == 1


def pixel_of(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Return (x, y) of a random pixel of a bool H x W mask; of the whole picture when the mask is empty."""
    rows, columns = np.nonzero(mask if mask.any() else np.ones_like(mask))
    k = rng.integers(len(rows))
    return float(columns[k]), float(rows[k])


def loose_box(mask: np.ndarray, spread: float, rng: np.random.Generator) -> list[float]:
    """Return the mask's box (x0, y0, x1, y1), each edge off by a normal share `spread` of the box's sides."""
    rows, columns = np.nonzero(mask)
    corners = np.array([columns.min(), rows.min(), columns.max(), rows.max()], float)
    sides = np.tile([np.ptp(columns) + 1, np.ptp(rows) + 1], 2)
    corners = np.clip(corners + rng.normal(0, spread, 4) * sides, 0, mask.shape[0] - 1)
    return [*np.minimum(corners[:2], corners[2:]), *np.maximum(corners[:2], corners[2:])]


def coarse_logits(truths: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Make masks (bool B x K x H x W) as coarse and uncertain as attention's: 16 x 16 with noise, as logits."""
    coarse = F.avg_pool2d(truths.float(), 4)
    coarse = coarse + torch.from_numpy(rng.normal(0, 0.25, tuple(coarse.shape)).astype(np.float32))
    coarse = F.avg_pool2d(coarse, 3, stride=1, padding=1)
    return F.interpolate(12 * (coarse - 0.5), scale_factor=4, mode="bilinear", align_corners=False)[:, :, None]


def make_prompts(instances: torch.Tensor, per_picture: int, rng: np.random.Generator) -> tuple[Prompts, torch.Tensor]:
    """Choose a kind of prompt and `per_picture` objects in each of the instance maps (int64 B x H x W).

    Returns the prompts and the objects' masks, bool B x K x H x W. Kinds: one or two points, a box, a box with one or
    two points, each with or without a coarse mask. The second point lies off the object, on another one if there is
    one. Boxes are off by 3 or 15 % of their sides: attention draws both.
    """
    with_points, count = rng.random() < 0.75, int(rng.integers(1, 3))
    with_box = not with_points or rng.random() < 0.6
    with_mask = rng.random() < 0.25
    maps = instances.numpy()
    points, boxes, truths = [], [], []
    for numbers in maps:
        for _ in range(per_picture):
            chosen = rng.integers(1, numbers.max() + 1)
            truth, others = numbers == chosen, (numbers != chosen) & (numbers > 0)
            truths.append(truth)
            away = others if others.any() else numbers == 0
            points.append([pixel_of(truth, rng), pixel_of(away, rng)][:count])
            boxes.append(loose_box(truth, rng.choice([0.03, 0.15]), rng))
    shape = (len(maps), per_picture)
    truths = torch.from_numpy(np.stack(truths)).unflatten(0, shape)
    labels = torch.tensor([1, 0][:count]).expand(*shape, count)
    prompts = Prompts(
        torch.tensor(points).unflatten(0, shape) if with_points else None,
        labels if with_points else None,
        torch.tensor(boxes, dtype=torch.float32).unflatten(0, shape) if with_box else None,
        coarse_logits(truths, rng) if with_mask else None,
    )
    return prompts, truths


def correct(prompts: Prompts, logits: torch.Tensor, truths: torch.Tensor, rng: np.random.Generator) -> Prompts:
    """Return prompts with one more point where the answer is wrong, and the answer itself as a mask.

    logits: float B x K x H x W; truths: bool B x K x H x W.
    """
    wrong = (logits > 0) != truths
    shape = truths.shape[:2]
    where = [pixel_of(mask, rng) for mask in wrong.flatten(0, 1).numpy()]
    points = torch.tensor(where).unflatten(0, shape)[:, :, None]
    x, y = points.long().flatten(0, 2).unbind(1)
    labels = truths.flatten(0, 1)[torch.arange(len(x)), y, x].long().unflatten(0, shape)[:, :, None]
    if prompts.points is not None:
        points = torch.cat([prompts.points, points], dim=2)
        labels = torch.cat([prompts.point_labels, labels], dim=2)
    return Prompts(points, labels, prompts.boxes, logits[:, :, None])


@torch.no_grad()
def through_vae(images: torch.Tensor, vae: AutoencoderKL, rng: np.random.Generator) -> torch.Tensor:
    """Encode and decode pictures (float B x 3 x H x W in 0..1), each with its own amount of noise on its latents.

    Our choice: normal noise of 0 to MOST_NOISE of the latents' standard deviation, as the UNet's are not an encoder's.
    """
    latents = vae.encode(2 * images - 1).latent_dist.mean * vae.config.scaling_factor
    noise = torch.from_numpy(rng.normal(size=tuple(latents.shape)).astype(np.float32))
    amount = torch.from_numpy(rng.uniform(0, MOST_NOISE, (len(images), 1, 1, 1)).astype(np.float32))
    latents = latents + (amount * noise).to(latents.device)
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def decode(sam: Sam, embeddings: torch.Tensor, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer the prompts: logits float B x K x M x 64 x 64, and the IoU that Sam expects of each, B x K x M.

    embeddings: float B x C x 16 x 16 of the image encoder. M is 3 for an ambiguous prompt, else 1. segment-anything's
    decoder takes the prompts of one picture at a time; vmap lets it take all pictures at once.
    """
    device = embeddings.device
    count = len(embeddings)

    def flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device).flatten(0, 1)

    points = None if prompts.points is None else (flat(prompts.points), flat(prompts.point_labels))
    with torch.autocast(device.type, enabled=False):  # half precision would move points by whole pixels
        sparse, dense = sam.prompt_encoder(points=points, boxes=flat(prompts.boxes), masks=flat(prompts.masks))
        position = sam.prompt_encoder.get_dense_pe()
    sparse, dense = (part.unflatten(0, (count, -1)) for part in (sparse, dense))

    def answer(embedding: torch.Tensor, one_sparse: torch.Tensor, one_dense: torch.Tensor):
        return sam.mask_decoder(embedding[None], position, one_sparse, one_dense, prompts.is_ambiguous)

    logits, quality = (part.float() for part in torch.vmap(answer)(embeddings, sparse, dense))
    return logits, quality


def iou_of(logits: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """Return the IoU of logits > 0 with bool masks, over the last two dimensions; 0 where both are empty."""
    found = logits > 0
    union = (found | truths).sum(dim=(-2, -1))
    return (found & truths).sum(dim=(-2, -1)) / union.clamp(min=1)


def choose(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return of M answers (float B x K x M x H x W) the one that the index (int64 B x K) names: B x K x H x W."""
    return logits.gather(2, index[:, :, None, None, None].expand(-1, -1, 1, *logits.shape[-2:]))[:, :, 0]


def sam_loss(logits: torch.Tensor, quality: torch.Tensor, truths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Sam's loss, 20 focal + dice + squared error of the predicted IoU, and the best answer's logits.

    logits: B x K x M x H x W, quality: B x K x M, truths: bool B x K x H x W. Of M answers only the best one learns.
    """
    target = truths[:, :, None].expand_as(logits).float()
    p = logits.sigmoid()
    p_true = torch.lerp(1 - p, p, target)
    alpha = 0.75 - 0.5 * target  # 0.25 on the object, 0.75 off it (Lin et al. 2017)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (alpha * (1 - p_true) ** 2 * entropy).mean(dim=(-2, -1))
    overlap = (p * target).sum(dim=(-2, -1))
    dice = 1 - (2 * overlap + 1) / (p.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1)) + 1)
    error = (quality - iou_of(logits, truths[:, :, None])) ** 2
    each, best = (20 * focal + dice).min(dim=2)
    return (each + error.mean(dim=2)).mean(), choose(logits, best)


def train_sam(folder: Path, options: argparse.Namespace) -> Trainer:
    """Two rounds a step, a prompt and its correction, on scenes drawn on the fly, until the budget is used."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    sam = build_small_sam(**CONFIG).to(device).train()
    trainer = Trainer(folder, {"sam": sam}, options.rate, options.decay)
    scenes = stream(Scenes(options.seed, "sam"), trainer.samples, options.batch, options.workers)
    vae = load_generator("mini", options.device).vae

    def loss_of_batch(rng: np.random.Generator) -> torch.Tensor:
        images, _, instances = next(scenes)
        images = degrade(images.to(device).float() / 255, rng)
        half = len(images) // 2
        images = 255 * torch.cat([images[:half], through_vae(images[half:], vae, rng)])
        prompts, truths = make_prompts(instances, options.per_picture, rng)
        with mixed_precision(device):
            embeddings = sam.image_encoder(sam.preprocess(images))
            first, answer = sam_loss(*decode(sam, embeddings, prompts), truths.to(device))
            prompts = correct(prompts, answer.detach().cpu(), truths, rng)
            second, _ = sam_loss(*decode(sam, embeddings, prompts), truths.to(device))
        return (first + second) / 2

    trainer.run(loss_of_batch, options.steps, options.seconds, options.batch, options.every)
    return trainer


@torch.inference_mode()
def check_sam(sam: Sam, count: int, seed: int = 0) -> dict[str, float]:
    """Return the mean IoU on the objects of `count` held-out scenes by a click, a box, a loose box with a click, and
    a coarse mask beside them; `coarse` is that mask's own IoU, cut at one half. through_vae: of the loose box with a
    click, on the same scenes as `through_vae` renders them."""
    device = sam.device
    rng = np.random.default_rng(seed)
    vae = load_generator("mini", device).vae
    ious = {"point": [], "box": [], "loose_box_and_point": [], "with_coarse_mask": [], "through_vae": [], "coarse": []}
    for images, _, instances in stream(Scenes(seed, "sam-test"), 0, 16, 0, count):
        images = images.to(device).float()
        embeddings = sam.image_encoder(sam.preprocess(images))
        truths = instances[:, None] == 1
        masks = [truth[0].numpy() for truth in truths]
        points = torch.tensor([[[pixel_of(mask, rng)]] for mask in masks])
        ones = torch.ones(len(masks), 1, 1, dtype=torch.long)
        exact, loose = (torch.tensor([[loose_box(mask, s, rng)] for mask in masks]).float() for s in (0, 0.15))
        coarse = coarse_logits(truths, rng)
        rendered = 255 * through_vae(images / 255, vae, np.random.default_rng(seed))
        for name, seen, prompts in (
            ("point", embeddings, Prompts(points, ones, None, None)),
            ("box", embeddings, Prompts(None, None, exact, None)),
            ("loose_box_and_point", embeddings, Prompts(points, ones, loose, None)),
            ("with_coarse_mask", embeddings, Prompts(points, ones, loose, coarse)),
            ("through_vae", sam.image_encoder(sam.preprocess(rendered)), Prompts(points, ones, loose, None)),
        ):
            logits, quality = decode(sam, seen, prompts)
            answers = choose(logits, quality.argmax(dim=2))
            ious[name] += iou_of(answers.cpu(), truths).flatten().tolist()
        ious["coarse"] += iou_of(coarse[:, :, 0], truths).flatten().tolist()
    return {name: float(np.mean(values)) for name, values in ious.items()}


def export_sam(folder: Path, weights: Path, scenes: int = 960) -> dict:
    """Write the averaged weights in half precision with their numbers and their model card; return the numbers."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    sam = build_small_sam(**CONFIG)
    sam.load_state_dict(state["average"]["sam"])
    save_half(sam, weights, CONFIG)
    sam = load_small_sam(weights)  # what is measured is what is shipped
    note = training_note("python -m diffseg.experiments.small_sam train | export", folder, state, sam)
    note["held_out"] = check_sam(sam, scenes) | {"scenes": scenes}
    write_card(weights, note, CARD)
    return note


CARD = """# The small Sam

segment-anything's `Sam` at small size (`config.json`): {parameters:,} parameters, {size:.1f} MB in half precision, for
images of 64 pixels; larger ones are shrunk to that. Use it as the refiner `sam` with `sam_checkpoint: mini`, or load
it with `diffseg.small_sam.load_small_sam(folder)` and give it to segment-anything's `SamPredictor`.

- **Data**: scenes drawn on the fly from emoji art and the masks of their objects, without classes; their seeds are no
  benchmark's. Images are softened and tinted a little, and half of them are rendered by the generator's VAE, with
  noise on their latents. (The first 65,488 scenes of the shipped weights were drawn without the VAE; training from
  scratch has it throughout.)
- **Recipe**: `{recipe}`, from scratch: {samples_seen:,} scenes, {steps:,} steps of {batch}, {seconds:,.0f} s
  (CPU cores: {hardware[cores]}, OMP_NUM_THREADS: {hardware[threads]}); the loss curve is in `training.json`.
- **Quality**, mean IoU on the first object of {held_out[scenes]:,} held-out scenes: a click {held_out[point]:.1%}, its
  box {held_out[box]:.1%}, a box off by 15 % with a click {held_out[loose_box_and_point]:.1%}, the same with a coarse
  mask {held_out[with_coarse_mask]:.1%} (that mask alone, thresholded at one half: {held_out[coarse]:.1%}); box and
  click on these scenes as the VAE renders them {held_out[through_vae]:.1%}. As a refiner of attention: `refined`,
  `scenes` and `scenes_pairs` in `results/mini_generator.json`.
- **Known failures**: it was trained on one or two objects before plain backgrounds, not on crowded street scenes or
  parts of objects. A click on the background returns some object all the same. Its worst answers to a click are
  in `results/figures/mini_sam_worst.png`.
- **Licence**: MIT; segment-anything's code is Apache 2.0; the art is Twemoji, Copyright 2019 Twitter, Inc and other
  contributors, CC-BY 4.0.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, 1e-3, "sam", "sam")
    parser.add_argument("--per-picture", type=int, default=2, help="prompts for a scene")
    options = parser.parse_args(arguments)
    if options.stage == "train":
        train_sam(options.folder, options)
    else:
        print(export_sam(options.folder, options.weights)["held_out"])


if __name__ == "__main__":
    main()
