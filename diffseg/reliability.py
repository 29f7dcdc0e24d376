"""Which pixels of a pseudo-label are believed.

Attention gives every pixel a margin between its best and its second-best score (`diffseg.masks`). Two files beside a
synthetic label keep what follows from it: Reliability/ the margin, 0..255 for 0..1, and ReliabilityRank/ the place of
the pixel among those of its class in the image, 0 for the largest margins and 255 for the smallest. A share s of each
class is then rank < 256 s, however often an image is seen.
"""

from collections.abc import Iterable, Sequence

import torch

from diffseg.errors import DiffsegError

TAUGHT = ("cotrain", "selftrain")  # training modes in which a network's answer replaces labels that are not reliable


def rank_within_class(label: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Rank the pixels of each class of one image by descending margin; the background is a class like any other.

    label (integers) and margin (uint8): H x W. Returns uint8 H x W on the CPU: floor(256 p / n) for the pixel at place
    p = 0, 1, ... of the n pixels of its class. Equal margins (there are only 256) are ranked in an order that is
    scattered over the image and the same in every run.
    """
    shape, label, margin = label.shape, label.flatten().cpu(), margin.flatten().cpu()
    scattered = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
    by_margin = scattered[margin[scattered].argsort(descending=True, stable=True)]
    labels, rank = label[by_margin], torch.empty(len(label), dtype=torch.uint8)
    for value in labels.unique():
        pixels = by_margin[labels == value]
        rank[pixels] = (256 * torch.arange(len(pixels)) // len(pixels)).to(torch.uint8)
    return rank.view(shape)


def reliable_pixels(rank: torch.Tensor, share: float) -> torch.Tensor:
    """Return the reliable pixels (bool, of the shape of `rank`): of each class, the `share` of largest margin.

    Every class of the image keeps a pixel at least. The share is met within a pixel where it is a multiple of 1/256,
    and rounded up to the next one elsewhere. The rule and its share of 0.5 are BECO's (CVPR 2023). Raises a
    DiffsegError for a share outside 0..1.
    """
    if not 0 < share <= 1:
        raise DiffsegError(f"reliable_share is {share}; give a number above 0 and up to 1")
    return rank < 256.0 * share  # of an integer 256 uint8 would make 0


def margin_thresholds(pairs: Iterable[tuple[torch.Tensor, torch.Tensor | None]], share: float) -> dict[int, int]:
    """Return for each class of a whole set the margin from which on its pixels are reliable (our choice).

    Where `reliable_pixels` believes the best part of every image, however bad, this believes the `share` of each
    class's pixels in the set that have the largest margins; an image may have none, or all. pairs: label (H x W) and
    margin (uint8 H x W, or None: an image without reliability, which is left out) of each image.
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


def certain_pixels(label: torch.Tensor, margin: torch.Tensor, powers: Sequence[float], beta: float) -> torch.Tensor:
    """Return the pixels (bool H x W) whose label survives response scaling, after URN (AAAI 2022).

    URN raises the class map to several powers, thresholds each, and calls a pixel uncertain where its normalised
    variance u over the results leaves 1 - u <= 0.05. The label and its 8-bit margin (H x W) hold what that needs
    for one class: with a_bg = max(1 - beta - a, 0) (`diffseg.masks`) the class score is a = (1 - beta + margin) / 2 on
    the object, or the margin where that is more, and (1 - beta - margin) / 2 off it; the threshold is (1 - beta) / 2.
    In two things this is simpler than URN: no CRF runs on each result (six a class and image), and of several classes
    only the winner counts. Ignored pixels may come out either way; no loss counts them.
    """
    signed = torch.where(label > 0, 1, -1) * margin.float() / 255
    score = torch.maximum(signed, (1 - beta + signed) / 2).clamp(0, 1)
    scaled = torch.stack([score**power >= (1 - beta) / 2 for power in powers]).float()
    uncertainty = 4 * scaled.var(dim=0, correction=0)  # of a yes-or-no result at most 1/4
    return 1 - uncertainty > 0.05


def trusted_pixels(
    label: torch.Tensor, reliability: torch.Tensor | None, options, thresholds: dict[int, int] | None = None
) -> torch.Tensor:
    """Return the pixels (bool H x W) of a whole image whose label the training mode trusts.

    label: int64 H x W. reliability: uint8 2 x H x W (margin, rank), or None: all pixels are trusted. options: a
    `diffseg.training_options.TrainingOptions`. thresholds: of the whole set's margins, for the reliable_rule "set".
    """
    if reliability is not None and options.training_mode in TAUGHT:
        margin, rank = reliability
        if thresholds is None:
            return reliable_pixels(rank, options.reliable_share)
        limits = torch.tensor([thresholds.get(value, 256) for value in range(int(label.max()) + 1)])
        return margin >= limits[label]
    if reliability is not None and options.training_mode == "urn":
        return certain_pixels(label, reliability[0], options.urn_powers, options.beta)
    return torch.ones_like(label, dtype=torch.bool)
