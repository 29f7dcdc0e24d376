"""Refiners: from the class scores of attention, which are coarse, to scores that follow the image's edges.

Every refiner is called alike, for one image:

    refine(image, scores, beta, attention) -> refined
        image      float32 3 x H x W in 0..1
        scores     float32 C x H x W in 0..1 (`diffseg.masks.class_scores`)
        beta       the background's constant (`diffseg.masks.add_background`)
        attention  float32 h x w x h x w (`AttentionRecorder.self_attention`); only `self-attention` reads it
        refined    float32 (1 + C) x H x W in 0..1, the background first, for `label_and_margin`

The channels are the background and the prompt's classes, so no refiner can bring in another class.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn import functional as F

from diffseg.errors import DiffsegError
from diffseg.masks import add_background
from diffseg.paths import locate


def refine_none(image, scores: torch.Tensor, beta: float, attention=None) -> torch.Tensor:
    return add_background(scores, beta)


def pamr(
    images: torch.Tensor, scores: torch.Tensor, iterations: int = 10, dilations: Sequence[int] | None = None
) -> torch.Tensor:
    """Pixel-adaptive mask refinement (Araslanov & Roth, CVPR 2020): neighbours of like colour come to agree.

    images: float B x 3 x H x W in 0..1; scores: float B x C x H x W; returns the like of scores.
    dilations: None for those up to 1/16 of the shorter side; at 512 pixels that is the paper's reach.
    Each pixel becomes a mean of its 8 neighbours at every dilation, weighted by the softmax over the
    neighbours of the colour channels' mean of -|difference| / (0.1 (deviation + 0.1)), with the standard
    deviation of the channel in the pixel's neighbourhood. The second 0.1 is our choice (the paper has none):
    it keeps differences of less than 0.01, a generator's noise, from being taken for edges.
    """

    if dilations is None:
        dilations = [d for d in (1, 2, 4, 8, 12, 24) if d <= max(1, min(images.shape[-2:]) // 16)]

    def neighbours(x: torch.Tensor) -> list[torch.Tensor]:  # 8 D of them, each of the size of x
        height, width = x.shape[-2:]
        around = []
        for d in dilations:
            padded = F.pad(x, (d, d, d, d), mode="replicate")
            around += [
                padded[..., i * d : i * d + height, j * d : j * d + width]
                for i in range(3)
                for j in range(3)
                if (i, j) != (1, 1)
            ]
        return around

    around = neighbours(images)
    window = [images, *around]
    mean = sum(window) / len(window)
    deviation = (sum((x - mean) ** 2 for x in window) / (len(window) - 1)).sqrt()
    scale = 0.1 * (deviation + 0.1)
    differences = [((x - images).abs() / scale).mean(dim=1, keepdim=True) for x in around]
    weights = (-torch.stack(differences)).softmax(dim=0)
    for _ in range(iterations):
        scores = sum(weight * x for weight, x in zip(weights, neighbours(scores), strict=True))
    return scores


def refine_pamr(image: torch.Tensor, scores: torch.Tensor, beta: float, attention=None) -> torch.Tensor:
    return add_background(pamr(image[None], scores[None])[0], beta)


def refine_self_attention(
    image, scores: torch.Tensor, beta: float, attention: torch.Tensor | None, power: int = 4
) -> torch.Tensor:
    """Let every position take the mean of the scores that it reads in self-attention, `power` times over.

    Positions of one object read each other, so its inside fills and its surroundings empty. Then each class
    is min-max normalised again, as averaging narrows its range. As in Dataset Diffusion (NeurIPS 2023), whose
    power is 4. Raises a DiffsegError without self-attention.
    """
    if attention is None:
        raise DiffsegError(
            "the refiner self-attention needs the generator's self-attention; record it (self_resolution)"
        )
    size = attention.shape[:2]
    reads = attention.to(scores.device).flatten(2).flatten(0, 1)
    spread = F.interpolate(scores[None], size, mode="area")[0].flatten(1)
    for _ in range(power):
        spread = spread @ reads.T
    low, high = spread.amin(dim=1, keepdim=True), spread.amax(dim=1, keepdim=True)
    spread = ((spread - low) / (high - low).clamp(min=1e-6)).unflatten(1, size)
    spread = F.interpolate(spread[None], scores.shape[-2:], mode="bilinear", align_corners=False)[0]
    return add_background(spread, beta)


def refine_crf(image: torch.Tensor, scores: torch.Tensor, beta: float, attention=None) -> torch.Tensor:
    """Dense conditional random field (Krahenbuhl & Koltun, NeurIPS 2011), by the extra package pydensecrf2.

    Unary: the scores with the background, made to sum to 1. Pairwise and iterations as in OVAM's account of
    the paper: bilateral 80 pixels and 13 grey levels with weight 10, Gaussian 3 pixels with weight 3, 5
    iterations. Returns the posterior.
    """
    crf = importlib.import_module("pydensecrf.densecrf")
    height, width = scores.shape[-2:]
    probabilities = add_background(scores, beta).clamp(min=1e-4)
    probabilities = (probabilities / probabilities.sum(dim=0)).flatten(1).cpu().numpy()
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy()
    field = crf.DenseCRF2D(width, height, len(probabilities))
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(probabilities), dtype=np.float32))
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=80, srgb=13, rgbim=pixels, compat=10)
    posterior = np.array(field.inference(5), dtype=np.float32).reshape(-1, height, width)
    return torch.from_numpy(posterior).to(scores.device)


def refine_sam(image, scores: torch.Tensor, beta: float, attention=None, *, predictor) -> torch.Tensor:
    """Ask Segment Anything (Kirillov et al., ICCV 2023) for each class's mask.

    Its prompts: the box around the pixels where the class has the best score, the class's best pixel as a
    point of the object, and the other classes' best pixels as points of the background. A class that has no
    pixel has no prompt and stays away. The score is the sigmoid of the mask's logits, the background's 1 -
    the largest.
    """
    found = add_background(scores, beta).argmax(dim=0)
    width = scores.shape[-1]
    points = np.array([divmod(int(score.argmax()), width)[::-1] for score in scores])  # (x, y) of each class
    predictor.set_image((image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy())
    masks = torch.zeros_like(scores)
    for c in range(len(scores)):
        rows, columns = torch.where(found == c + 1)
        if len(rows) == 0:
            continue
        box = np.array([int(edge) for edge in (columns.min(), rows.min(), columns.max(), rows.max())])
        is_object = np.arange(len(scores)) == c
        logits, _, _ = predictor.predict(points, is_object, box, multimask_output=False, return_logits=True)
        masks[c] = torch.from_numpy(logits[0]).to(masks).sigmoid()
    return torch.cat([1 - masks.amax(dim=0, keepdim=True), masks])


@lru_cache(maxsize=1)  # every batch asks for it again
def load_sam(checkpoint: str, model: str, device: str | torch.device = "cpu"):
    """Return a segment_anything.SamPredictor with weights from a local file; model: a key of its registry.

    A folder with config.json and model.safetensors is a small Sam (`diffseg.small_sam`), whatever the model; the name
    "mini" is the mini world's. A relative path counts from the project's root. Raises a DiffsegError when the model is
    unknown, or the file is absent or does not fit it.
    """
    from segment_anything import SamPredictor, sam_model_registry

    from diffseg.small_sam import load_small_sam

    path = locate("sam_checkpoint", checkpoint) if checkpoint else None
    if path and path.is_dir():
        return SamPredictor(load_small_sam(path).to(device))
    if model not in sam_model_registry:
        raise DiffsegError(f"sam_model is {model!r}; choose one of {', '.join(sam_model_registry)}")
    if not checkpoint:
        raise DiffsegError("the refiner sam needs sam_checkpoint, the path of a Segment Anything checkpoint")
    sam = sam_model_registry[model]()
    try:
        sam.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise DiffsegError(f"there is no sam_checkpoint at {checkpoint}; give the path of one") from None
    except Exception as error:  # torch.load alone raises half a dozen kinds for a file that is something else
        raise DiffsegError(
            f"the sam_checkpoint {checkpoint} does not fit the model {model}; give one of that model, or "
            "the sam_model that it belongs to"
        ) from error
    return SamPredictor(sam.to(device).eval())


REFINERS: dict[str, Callable] = {
    "none": refine_none,
    "pamr": refine_pamr,
    "self-attention": refine_self_attention,
    "crf": refine_crf,
    "sam": refine_sam,
}
# Their scores are so near 0 or 1 that most margins are equal and say nothing (on 60 images of mini VOC 93 % of the
# CRF's and 57 % of SAM's are the largest that there is), so the margin is read from the scores before (our choice).
SATURATED = ("crf", "sam")


def refiners_at_hand(names: Sequence[str], sam_checkpoint: str = "") -> list[str]:
    """Return those of the names that can run here: crf needs its package, sam a checkpoint."""
    absent = {"crf"} if importlib.util.find_spec("pydensecrf") is None else set()
    return [name for name in names if name not in absent and (name != "sam" or sam_checkpoint)]


def get_refiner(
    name: str, sam_checkpoint: str = "", sam_model: str = "vit_b", device: str | torch.device = "cpu"
) -> Callable:
    """Return the refiner of that name (see above for how it is called); only `sam` reads the other arguments.

    Raises a DiffsegError for an unknown name, for `crf` without its package, and for a checkpoint that does
    not fit.
    """
    if name not in REFINERS:
        raise DiffsegError(f"there is no refiner {name!r}; choose one of {', '.join(REFINERS)}")
    if name == "sam":
        return partial(refine_sam, predictor=load_sam(sam_checkpoint, sam_model, device))
    if name == "crf":
        try:
            importlib.import_module("pydensecrf.densecrf")
        except ImportError:
            raise DiffsegError(
                "the refiner crf needs the package pydensecrf2: pip install pydensecrf2, or choose pamr"
            ) from None
    return REFINERS[name]
