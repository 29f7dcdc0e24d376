"""Train a segmentation network on pictures and (pseudo-)labels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from diffseg.errors import DiffsegError
from diffseg.seeds import derive_seed
from diffseg.segmenters import Segmenter

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainingOptions:
    """The constants of the training; the notebook's parameters of the same names explain each."""

    iterations: int
    training_batch: int
    crop: int
    scale_jitter: tuple[float, float]
    colour_jitter: float
    learning_rate: float
    weight_decay: float
    precision: str
    workers: int


class Augmented(Dataset):
    """Joint augmentation of picture and label: scale, crop, flip, colour (torchvision's v2 transforms)."""

    def __init__(self, dataset: Dataset, ignore: int, options: TrainingOptions):
        self.dataset = dataset
        strength = options.colour_jitter
        self.transform = v2.Compose(
            [
                v2.ScaleJitter((options.crop, options.crop), options.scale_jitter, antialias=True),
                v2.RandomCrop(options.crop, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: ignore}),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(strength, strength, strength, strength / 4),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        name, image, label = self.dataset[index][:3]
        image, label = self.transform(tv_tensors.Image(image), tv_tensors.Mask(label))
        return name, image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor).long()


def batches(dataset: Dataset, options: TrainingOptions, seed: int) -> Iterator:
    """Yield `options.iterations` shuffled batches; the order and the augmentation follow from the seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    count = options.iterations * options.training_batch
    epochs = math.ceil(count / len(dataset))
    order = torch.cat([torch.randperm(len(dataset), generator=generator) for _ in range(epochs)])[:count]
    return iter(
        DataLoader(
            dataset,
            options.training_batch,
            sampler=order.tolist(),
            num_workers=options.workers,
            generator=generator,
        )
    )


def train(
    segmenter: Segmenter,
    dataset: Dataset,
    ignore: int,
    options: TrainingOptions,
    seed: int,
    device: str | torch.device = "cpu",
    title: str = "training",
) -> list[float]:
    """Minimise the cross-entropy over all pixels that are not ignored; return the loss of every iteration.

    AdamW with the poly schedule (power 0.9, DeepLab). dataset: items (name, image uint8 3 x H x W, label int64
    H x W, ...). Raises a DiffsegError that names iteration and pictures when the loss is not finite.
    """
    torch.manual_seed(derive_seed(seed, "augmentation"))  # torchvision draws from the global generator
    segmenter.to(device).train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, options.iterations, power=0.9)
    if options.precision not in PRECISIONS:
        raise DiffsegError(f"there is no precision {options.precision!r}; choose one of {', '.join(PRECISIONS)}")
    precision = PRECISIONS[options.precision]
    losses = []
    bar = tqdm(batches(Augmented(dataset, ignore, options), options, seed), title, options.iterations, unit="step")
    for names, images, labels in bar:
        with torch.autocast(torch.device(device).type, precision, enabled=precision is not None):
            logits = segmenter(images.to(device))
        loss = F.cross_entropy(logits.float(), labels.to(device), ignore_index=ignore)
        if not torch.isfinite(loss):
            raise DiffsegError(
                f"the loss is not finite at iteration {len(losses)} (pictures {', '.join(names)}); "
                "lower learning_rate, and look at these pictures and labels"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    segmenter.eval()
    return losses
