"""From attention maps to a label map and its reliability.

    a_c  = min-max normalised map of class c, in 0..1
    a_bg = 1 - beta - max_c a_c
    label = argmax over {a_bg, a_c}         reliability = best score - second-best score

as in the account of the paper given by OVAM's authors (beta = 0.2 there; for one class the cut then lies at
a_c = (1 - beta) / 2). The margin as reliability is BECO's (CVPR 2023). Between the second line and the third
a refiner (`diffseg.refiners`) may sharpen the scores.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from diffseg.errors import DiffsegError


def class_scores(maps: torch.Tensor, classes: Sequence[int], size: tuple[int, int]) -> tuple[list[int], torch.Tensor]:
    """Turn word maps (W x h x w) into class scores at the picture's size (H, W).

    classes: the class id (1..K) of each word. A class named twice takes the larger of its words' scores.
    Returns the prompt's class ids, ascending, and float32 scores (C x H x W) in 0..1.
    Raises a DiffsegError when a word has a flat map, that is, no attention to cut.
    """
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    is_clear = (high - low > 1e-6 * high.abs()).flatten()  # less is rounding; not a number is not clear either
    if not is_clear.all():
        flat = sorted({classes[k] for k in range(len(classes)) if not is_clear[k]})
        raise DiffsegError(
            f"the attention to the word of class {', '.join(map(str, flat))} is flat or not a number: no "
            "mask can be cut; choose another word for it, other attention_steps, or float32"
        )
    scores = F.interpolate(((maps - low) / (high - low))[None], size, mode="bilinear", align_corners=False)[0]
    ids = sorted(set(classes))
    return ids, torch.stack([scores[[k for k, c in enumerate(classes) if c == i]].amax(dim=0) for i in ids])


def add_background(scores: torch.Tensor, beta: float) -> torch.Tensor:
    """Put the background's score a_bg = 1 - beta - max_c a_c, at least 0, before the classes'.

    scores: C x H x W in 0..1. Returns (1 + C) x H x W in 0..1. The bound keeps every margin within 0..1 and
    moves no label. Raises a DiffsegError for a beta outside 0..1 (1 excluded: it would leave no background).
    """
    if not 0 <= beta < 1:
        raise DiffsegError(f"beta is {beta}; give a number from 0 (much background) to below 1 (none)")
    background = (1 - beta - scores.amax(dim=0, keepdim=True)).clamp(min=0)
    return torch.cat([background, scores])


def label_and_margin(ids: Sequence[int], scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut scores that have the background's first, (1 + C) x H x W in 0..1, into a label map and its margin.

    ids: the classes of channels 1..C. Returns the label (uint8, or int16 where an id exceeds 254; H x W, 0 =
    background) and the margin (uint8 H x W, 0..255 for 0..1). Equal scores go to the background, then to the
    smaller id.
    """
    values = torch.tensor([0, *ids], dtype=torch.uint8 if max(ids) < 255 else torch.int16, device=scores.device)
    best, second = scores.topk(2, dim=0).values
    margin = ((best - second).clamp(0, 1) * 255).round().to(torch.uint8)
    return values[scores.argmax(dim=0)], margin


def reliable_pixels(label: torch.Tensor, margin: torch.Tensor, share: float = 0.5) -> torch.Tensor:
    """Return the reliable pixels of one image (bool H x W): of each class, the `share` of largest margin.

    label, margin: H x W of one image; the background is a class like any other. The number of pixels is
    rounded and at least one, so every class of the label stays. Equal margins (there are only 256) are taken
    in an order that is scattered over the image and the same in every run. The rule and its share of 0.5 are
    BECO's. Raises a DiffsegError for a share outside 0..1.
    """
    if not 0 < share <= 1:
        raise DiffsegError(f"the share of reliable pixels is {share}; give a number above 0 and up to 1")
    reliable = torch.zeros(label.numel(), dtype=torch.bool)
    scattered = torch.randperm(label.numel(), generator=torch.Generator().manual_seed(0))
    by_margin = scattered[margin.flatten()[scattered].argsort(descending=True, stable=True)]
    labels = label.flatten()[by_margin]
    for value in labels.unique():
        pixels = by_margin[labels == value]
        reliable[pixels[: max(1, round(share * len(pixels)))]] = True
    return reliable.view(label.shape)


def margin_thresholds(pairs: Iterable[tuple[torch.Tensor, torch.Tensor | None]], share: float = 0.5) -> dict[int, int]:
    """Return for each class of a whole set the margin from which on its pixels are reliable (our choice).

    Where `reliable_pixels` trusts the best part of every picture, however bad, this trusts the `share` of each
    class's pixels in the set that have the largest margins; a picture may have none, or all. pairs: label (H x W) and
    margin (uint8 H x W, or None: a picture without reliability, which is left out) of each image.
    """
    counts: dict[int, torch.Tensor] = {}
    for label, margin in pairs:
        for value in label.unique().tolist() if margin is not None else ():
            found = torch.bincount(margin[label == value].flatten().long(), minlength=256)
            counts[value] = counts.get(value, 0) + found
    thresholds = {}
    for value, found in counts.items():
        at_least = found.flip(0).cumsum(0).flip(0)  # pixels whose margin is k or more
        # the smallest margin that leaves at most the share; where the best margin alone exceeds it, that one
        within = (at_least <= share * at_least[0]) & (at_least > 0)
        thresholds[value] = int(within.nonzero()[0]) if within.any() else int(found.nonzero()[-1])
    return thresholds
