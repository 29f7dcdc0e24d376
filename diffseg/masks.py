"""From attention maps to a label map and its margin.

    a_c  = min-max normalised map of class c, in 0..1; 1 - a_c where the word attends to the background (our choice)
    a_bg = 1 - beta - max_c a_c
    label = argmax over {a_bg, a_c}         margin = best score - second-best score

as in the account of the paper given by OVAM's authors (beta = 0.2 there; for one class the threshold then lies at
a_c = (1 - beta) / 2). What is reliable follows from the margin (`diffseg.reliability`). Between the second line and
the third a refiner (`diffseg.refiners`) may sharpen the scores; where it makes them nearly 0 or 1 everywhere, the
margin is that of the scores before.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from diffseg.errors import DiffsegError


def class_scores(
    maps: torch.Tensor, classes: Sequence[int], size: tuple[int, int], inverted_above: float = 1.0
) -> tuple[list[int], torch.Tensor]:
    """Turn word maps (W x h x w) into class scores at the image's size (H, W).

    classes: the class id (1..K) of each word. A class named twice takes the larger of its words' scores.
    inverted_above: a word whose normalised map has a larger mean along the image's border attends to the background,
    and its map is turned round (our choice; 1: never).
    Returns the prompt's class ids, ascending, and float32 scores (C x H x W) in 0..1.
    Raises a DiffsegError when a word has a flat map, that is, no attention to cut.
    """
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    is_clear = (high - low > 1e-6 * high.abs()).flatten()  # less is rounding; not a number is not clear either
    if not is_clear.all():
        flat = sorted({classes[k] for k in range(len(classes)) if not is_clear[k]})
        raise DiffsegError(
            f"the attention to the word of class {', '.join(map(str, flat))} is flat or not a "
            "number, so it gives no mask; choose another word for it, other attention_steps, or float32"
        )
    maps = (maps - low) / (high - low)
    border = torch.cat([maps[:, [0, -1]].flatten(1), maps[:, 1:-1, [0, -1]].flatten(1)], dim=1).mean(dim=1)
    maps = torch.where((border > inverted_above)[:, None, None], 1 - maps, maps)
    scores = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
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


def label_and_margin(
    ids: Sequence[int], scores: torch.Tensor, ranking: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut scores that have the background's first, (1 + C) x H x W in 0..1, into a label map and its margin.

    ids: the classes of channels 1..C. ranking: other scores of the same shape that the margin is read from, 0 where
    they contradict the label (our choice, for `diffseg.refiners.SATURATED`). Returns the label (uint8, or int16 where
    an id exceeds 254; H x W, 0 = background) and the margin (uint8 H x W, 0..255 for 0..1). Equal scores go to the
    background, then to the smaller id.
    """
    values = torch.tensor([0, *ids], dtype=torch.uint8 if max(ids) < 255 else torch.int16, device=scores.device)
    best, ranking = scores.argmax(dim=0, keepdim=True), scores if ranking is None else ranking
    margin = ranking.gather(0, best)[0] - ranking.scatter(0, best, 0).amax(dim=0)
    return values[best[0]], (margin.clamp(0, 1) * 255).round().to(torch.uint8)
