"""The terms of reliability-aware training, each a pure function of tensors.

Pseudo-labels are weak labels: where they are reliable they teach, elsewhere a network does, or they count little. The
co-training of two networks is BECO's (CVPR 2023), which the paper modifies; that a network may name only the image's
classes and that its answer follows the image's edges are our additions. The weights are URN's (AAAI 2022).
Every loss is a sum over pixels divided by the number of pixels that are not ignored, so a pixel weighs the same in
every image, and an image without a single reliable or valid pixel adds zero and no nan.

Shapes: images float32 B x 3 x H x W; logits float32 B x K x H x W; labels int64 B x H x W; masks bool B x H x W.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from diffseg.refiners import pamr


def cross_entropies(logits: torch.Tensor, label: torch.Tensor, ignore: int) -> torch.Tensor:
    """Return the cross-entropy of every pixel, float32 B x H x W; 0 where the label is `ignore`."""
    return F.cross_entropy(logits.float(), label, ignore_index=ignore, reduction="none")


def mean_over_valid(losses: torch.Tensor, label: torch.Tensor, ignore: int) -> torch.Tensor:
    """Return the sum of per-pixel losses divided by the number of pixels whose label is not `ignore`."""
    return losses.sum() / (label != ignore).sum().clamp(min=1)


def baseline_loss(logits: torch.Tensor, label: torch.Tensor, ignore: int) -> torch.Tensor:
    """The baseline: cross-entropy to the pseudo-label, whatever its reliability."""
    return mean_over_valid(cross_entropies(logits, label, ignore), label, ignore)


def reliable_loss(
    logits: torch.Tensor,
    label: torch.Tensor,
    reliable: torch.Tensor,
    ignore: int,
    band: torch.Tensor | None = None,
    band_weight: float = 0.2,
) -> torch.Tensor:
    """Cross-entropy to the pseudo-label on reliable pixels only, times 1 + band_weight on the boundary band (BECO)."""
    weights = reliable.float()
    if band is not None:
        weights = weights * (1 + band_weight * band)
    return mean_over_valid(weights * cross_entropies(logits, label, ignore), label, ignore)


def peer_loss(
    logits: torch.Tensor,
    peer: torch.Tensor,
    label: torch.Tensor,
    reliable: torch.Tensor,
    ignore: int,
    is_soft: bool = False,
) -> torch.Tensor:
    """Cross-entropy to an answer (the OTHER network's; in selftrain its own) on pixels neither reliable nor ignored.

    peer: the answer's probabilities (B x K x H x W), through which no gradient flows; its best class is the target
    (BECO), or all of its distribution (is_soft; our choice).
    """
    losses = F.cross_entropy(logits.float(), peer.detach() if is_soft else peer.argmax(dim=1), reduction="none")
    return mean_over_valid(losses * ~(reliable | (label == ignore)), label, ignore)


def classes_of_images(label: torch.Tensor, classes: int) -> torch.Tensor:
    """Return which classes each label map holds, bool B x K; ids beyond the K classes, as the ignored, count not."""
    held = torch.zeros(len(label), max(classes, int(label.max()) + 1), dtype=torch.bool, device=label.device)
    return held.scatter_(1, label.flatten(1), True)[:, :classes]


def restricted(probabilities: torch.Tensor, named: torch.Tensor, background: int | None) -> torch.Tensor:
    """Return probabilities (B x K x H x W) over the `named` classes (bool B x K) and the background alone (our choice).

    An image was drawn for known classes, so another class cannot be right there: what a network says of objects of
    other classes counts for the named ones, in proportion. The background keeps its probability; where no object is
    named it has all. Without a background (None) the named classes share everything.
    """
    objects, rest = named.clone(), torch.ones_like(probabilities[:, :1])
    if background is not None:
        objects[:, background] = False
        rest = 1 - probabilities[:, background : background + 1]
    found = probabilities * objects[:, :, None, None]
    shared = rest * found / found.sum(dim=1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)
    if background is not None:
        shared[:, background] = 1 - shared.sum(dim=1)
    return shared


def edge_aware(
    probabilities: torch.Tensor, images: torch.Tensor, label: torch.Tensor, reliable: torch.Tensor
) -> torch.Tensor:
    """Return probabilities that follow the edges of the images (float B x 3 x H x W in 0..1): the reliable labels, and
    the probabilities elsewhere, refined together by PAMR.

    Single-stage segmentation (Araslanov & Roth, CVPR 2020) learns from its own masks, refined so. The use on doubtful
    pixels among reliable labels is our choice. Classes that have neither a probability nor a reliable label in an image
    get none, and cost nothing where no image of the batch has them.
    """
    count = probabilities.shape[1]
    found = (probabilities.amax(dim=(2, 3)) > 0) | classes_of_images(label.masked_fill(~reliable, count), count)
    most = max(1, int(found.sum(dim=1).max()))
    classes = found.float().topk(most).indices[:, :, None, None]  # of each image, B x C x 1 x 1
    channels = classes.expand(-1, -1, *label.shape[1:])
    scores = torch.where(reliable[:, None], (classes == label[:, None]).float(), probabilities.gather(1, channels))
    return torch.zeros_like(probabilities).scatter(1, channels, pamr(images, scores))


def weighted_loss(
    logits: torch.Tensor, label: torch.Tensor, certain: torch.Tensor, ignore: int, uncertain_weight: float = 0.05
) -> torch.Tensor:
    """URN's loss: cross-entropy times 1 on certain pixels and `uncertain_weight` on the others."""
    weights = uncertain_weight + (1 - uncertain_weight) * certain.float()
    return mean_over_valid(weights * cross_entropies(logits, label, ignore), label, ignore)


@torch.no_grad()
def online_labels(logits: Sequence[torch.Tensor], label: torch.Tensor, confidence: float, ignore: int) -> torch.Tensor:
    """Return the networks' common labels: argmax of their mean probability, `ignore` where it is not confident.

    logits: one tensor a network. A pixel is confident where its largest mean probability exceeds `confidence`
    (BECO: 0.95). Where `label` is ignored (padding, say) the result is, too.
    """
    best, online = torch.stack([each.float().softmax(dim=1) for each in logits]).mean(dim=0).max(dim=1)
    return online.masked_fill((best <= confidence) | (label == ignore), ignore)


def half_of_the_classes(
    online: torch.Tensor, background: int | None, ignore: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the region (bool H x W) of a random half, rounded up, of the foreground classes of one label map."""
    classes = [value for value in online.unique().tolist() if value not in (background, ignore)]
    order = torch.randperm(len(classes), generator=generator).tolist()
    chosen = [classes[k] for k in order[: (len(classes) + 1) // 2]]
    return torch.isin(online, torch.tensor(chosen, dtype=online.dtype, device=online.device))


def boundary_band(region: torch.Tensor) -> torch.Tensor:
    """Return the 3 x 3 dilation minus the 3 x 3 erosion of a region, bool B x H x W (BECO's boundary band)."""
    pixels = region.float()
    dilated, eroded = F.max_pool2d(pixels, 3, 1, 1), 1 - F.max_pool2d(1 - pixels, 3, 1, 1)
    return dilated > eroded


def paste(
    images: torch.Tensor,
    label: torch.Tensor,
    reliable: torch.Tensor,
    online: torch.Tensor,
    source: torch.Tensor,
    region: torch.Tensor,
    receives: torch.Tensor,
    ignore: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Paste regions of other images on those of a batch, and let the networks label all of what receives (BECO's code).

    online: the networks' labels, `ignore` where they are not sure (B x H x W). source (B): whom each image takes from.
    region (bool B x H x W): what it takes, where the networks are sure. receives (bool B): the images with a region,
    which may be empty. Returns images, label, reliable and the boundary band. In an image that receives, reliable is
    where the networks are sure, with their label; elsewhere the pseudo-label stays, and is not reliable. The other
    images do not change.
    """
    taken, receives = torch.where(region, online[source], online), receives[:, None, None]
    sure = taken != ignore
    label, reliable = torch.where(receives & sure, taken, label), torch.where(receives, sure, reliable)
    return torch.where(region[:, None], images[source], images), label, reliable, boundary_band(region)


def partners(count: int) -> torch.Tensor:
    """Return whom each image of a batch takes from: neighbours exchange, an odd last one keeps to itself."""
    return torch.tensor([k ^ 1 if k ^ 1 < count else k for k in range(count)])
