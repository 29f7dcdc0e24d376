"""One confusion matrix over a whole split, and the numbers that the official protocols make of it.

All three benchmarks define mIoU by the pixel counts of the WHOLE set, not by the mean of per-image IoUs.
Pixels whose ground truth is the ignore label never count, neither as misses nor as false positives.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from diffseg.errors import DiffsegError


class ConfusionMatrix:
    """Pixel counts, streamed over batches on the device of the labels, and added up over processes.

    `counts` is int64 K x K on the CPU, rows ground truth, columns prediction. `per_image` is a list of int32
    K x 3 arrays, one an image: true positives, ground truth and predicted pixels per class (for
    `bootstrap_interval`).
    """

    def __init__(self, num_classes: int, ignore: int):
        self.num_classes = num_classes
        self.ignore = ignore
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.per_image: list[np.ndarray] = []

    def update(self, label: torch.Tensor, prediction: torch.Tensor) -> None:
        """Count one batch: label and prediction are integer tensors N x H x W, or H x W for one image.

        Raises a DiffsegError for different shapes, a label that is neither 0..K-1 nor the ignore label, or a
        prediction outside 0..K-1 where the label is not ignored.
        """
        if label.shape != prediction.shape:
            raise DiffsegError(
                f"The prediction's shape {tuple(prediction.shape)} is not its label's {tuple(label.shape)}; "
                "resize the scores to the image before taking the best class."
            )
        size = self.num_classes
        pairs = [(label, prediction)] if label.ndim == 2 else zip(label, prediction, strict=True)
        for truth, guess in pairs:
            # no pixel is taken out, which would cost more than all the rest: ignored ones get a count of their own
            valid = truth != self.ignore
            truth, guess = (torch.where(valid, ids, 0).long() for ids in (truth, guess))
            limits = torch.stack([*truth.aminmax(), *guess.aminmax()]).tolist()  # one transfer from a GPU
            self._check_range("A label map", limits[:2])
            self._check_range("A prediction", limits[2:])
            codes = torch.where(valid, truth * size + guess, size**2).flatten()
            matrix = torch.bincount(codes, minlength=size**2 + 1)[:-1].view(size, size).cpu().numpy()
            self.counts += matrix
            sums = (matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0))
            self.per_image.append(np.stack(sums, axis=-1).astype(np.int32))

    def _check_range(self, what: str, limits: Sequence[int]) -> None:
        wrong = [value for value in limits if not 0 <= value < self.num_classes]
        if wrong:
            raise DiffsegError(
                f"{what} holds the id {wrong[0]}, but the classes are 0 to {self.num_classes - 1} and "
                f"{self.ignore} is ignored; read labels with benchmarks.labels.read_label, which converts labelIds."
            )

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        """Return the matrix of both parts of a split, as of two processes; the images of self come first."""
        if (self.num_classes, self.ignore) != (other.num_classes, other.ignore):
            raise DiffsegError("Two confusion matrices can be added only for the same classes and ignore label.")
        total = ConfusionMatrix(self.num_classes, self.ignore)
        total.counts = self.counts + other.counts
        total.per_image = self.per_image + other.per_image
        return total

    @property
    def class_sums(self) -> np.ndarray:
        """int64 K x 3: true positives, ground truth and predicted pixels per class."""
        return np.stack([self.counts.diagonal(), self.counts.sum(axis=1), self.counts.sum(axis=0)], axis=-1)

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels that count whose class is right; nan where none counts."""
        total = self.counts.sum()
        return float(self.counts.trace() / total) if total else math.nan

    def group_iou(self, ids: Sequence[int]) -> float:
        """IoU of several classes merged into one, as Cityscapes scores its categories; nan if absent."""
        ids = list(ids)
        inside = self.counts[np.ix_(ids, ids)].sum()
        union = self.counts[ids].sum() + self.counts[:, ids].sum() - inside
        return float(inside / union) if union else math.nan


def iou_per_class(sums: np.ndarray, protocol: str) -> np.ndarray:
    """Return the IoU per class, float64 in 0..1, of counts ... x K x 3.

    A class absent from both ground truth and predictions is nan for VOC and Cityscapes (left out of the mean,
    as Cityscapes' evaluator does; VOC's kit leaves 0/0 undefined, and it does not occur on its official sets)
    and 0 for ImageNet-S, whose evaluator computes TP / (T + P - TP + 1e-10) over all K + 1 ids.
    """
    hits, truth, predicted = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    union = truth + predicted - hits
    if protocol == "imagenet-s":
        return hits / (union + 1e-10)
    return np.divide(hits, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_iou(sums: np.ndarray, protocol: str) -> np.ndarray | np.float64:
    """Return the mean of `iou_per_class` over the classes that are not nan; nan if all are."""
    iou = iou_per_class(sums, protocol)
    known = ~np.isnan(iou)
    total, classes = np.where(known, iou, 0.0).sum(axis=-1), known.sum(axis=-1)
    return np.divide(total, classes, out=np.full(total.shape, np.nan), where=classes > 0)[()]


def bootstrap_interval(
    per_image: Sequence[np.ndarray], protocol: str, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the mIoU when the images are drawn anew with replacement.

    `per_image` holds K x 3 counts an image. It tells what the choice of test images contributes, not what
    another training seed would. 1,000 samples and 95 % are our choice. A class that no drawn image has counts
    as the protocol says: with one or two images a class the interval may lie beside the mIoU itself, below it for
    ImageNet-S, above it for the others. (nan, nan) without a defined mIoU.
    """
    images = len(per_image)
    if images == 0:
        return math.nan, math.nan
    flat = np.stack(per_image).reshape(images, -1).astype(np.float64)  # whole numbers below 2**53: sums stay exact
    random = np.random.default_rng(seed)
    draws = []
    for start in range(0, samples, 100):  # in pieces, so that 919 classes fit in memory
        times_drawn = random.multinomial(images, np.full(images, 1 / images), size=min(100, samples - start))
        draws.append(mean_iou((times_drawn @ flat).reshape(len(times_drawn), -1, 3), protocol))
    values = np.concatenate(draws)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# What ImageNet-S prints besides

SIZE_BINS = {"S": 5, "MS": 25, "ML": 50, "L": 100}  # upper limits in percent of the image's valid area


def boundary_map(label: torch.Tensor) -> torch.Tensor:
    """Return where a label map H x W has its regions' inner boundaries (bool H x W).

    As in Boundary IoU: a region minus its erosion by a square, 3 % of the image's diagonal wide (as in
    ImageNet-S; at least one pixel), the image's edge being a boundary. A pixel survives its own region's
    erosion where the square around it holds no two neighbours of different ids, which is asked for all ids at
    once.
    """
    height, width = label.shape
    reach = max(1, round(0.03 * math.hypot(height, width)))
    side = 2 * reach + 1
    padded = F.pad(label.long(), [reach] * 4, value=-1)
    beside = _any_in_window(_any_in_window(padded[:, 1:] != padded[:, :-1], side, 0), side - 1, 1)
    below = _any_in_window(_any_in_window(padded[1:] != padded[:-1], side - 1, 0), side, 1)
    return beside | below


def _any_in_window(marks: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Return whether each window of `length` along `dim` holds a mark; windows of windows double their length."""
    reached = 1
    while reached < length:
        step = min(reached, length - reached)  # two windows may overlap: a mark seen twice is a mark
        windows = marks.shape[dim] - step
        marks = marks.narrow(dim, 0, windows) | marks.narrow(dim, step, windows)
        reached += step
    return marks


class ImageNetSScores:
    """Image-level accuracy, F-measure, boundary mIoU and four object-size bins, as ImageNet-S's evaluator.

    Size bins, per image and ground-truth id: ceil(100 * area / valid area) <= 5 S, <= 25 MS, <= 50 ML, else
    L; a bin counts the pixels whose ground truth is background or one of its ids. The official code adds
    areas in float32; here they are int64.
    """

    def __init__(self, num_classes: int, ignore: int):
        self.num_classes = num_classes
        self.ignore = ignore
        self.images = 0
        self.right_images = 0
        self.f_measure_sum = 0.0
        self.boundary = np.zeros((num_classes, 3), dtype=np.int64)
        self.bins = {name: np.zeros((num_classes, 3), dtype=np.int64) for name in SIZE_BINS}
        self.boundary_bins = {name: np.zeros((num_classes, 3), dtype=np.int64) for name in SIZE_BINS}

    def update(self, label: torch.Tensor, prediction: torch.Tensor) -> None:
        """Count one image: integer tensors H x W whose ids `ConfusionMatrix.update` has checked."""
        size = self.num_classes
        # Boundaries are made before ignored pixels are removed: a region also ends where ignored ones begin.
        truth_edge, guess_edge = boundary_map(label), boundary_map(prediction)
        valid = label != self.ignore
        truth, guess = torch.where(valid, label, size).int(), torch.where(valid, prediction, 0).int()

        # A group for background, one for the ids of each size bin, and one for ignored pixels, which is dropped
        inner, edges = _count(2 * truth + truth_edge.int(), (size + 1, 2))[:-1].unbind(-1)
        areas = inner + edges
        percent = -(-100 * areas // areas.sum().clamp(min=1))  # rounded up, in whole numbers
        group = 1 + torch.bucketize(percent, torch.tensor(list(SIZE_BINS.values())[:-1], device=label.device))
        group[0] = 0
        ignored = 1 + len(SIZE_BINS)
        group_of = F.pad(group, (0, 1), value=ignored).int()

        # One count of all pixels by group, predicted id, hit, truth's edge and prediction's edge; int32 is enough for
        # an image's codes, and several times faster than int64
        flags = 4 * (truth == guess).byte() + 2 * truth_edge.byte() + guess_edge.byte()
        code = (8 * size * group_of)[truth] + 8 * guess + flags.int()
        counts = _count(code, (ignored + 1, size, 2, 2, 2))[:-1]
        in_group = group == torch.arange(ignored, device=label.device)[:, None]
        sums = torch.stack([counts[:, :, 1].sum((-1, -2)), areas * in_group, counts.sum((-1, -2, -3))], -1)
        edge_sums = torch.stack([counts[:, :, 1, 1, 1], edges * in_group, counts[..., 1].sum((-1, -2))], -1)
        sums, edge_sums = sums.cpu().numpy(), edge_sums.cpu().numpy()  # groups x K x 3, as in `class_sums`

        self.images += 1
        truth_pixels, predicted = sums[:, 1:, 1].sum(0), sums[:, 1:, 2].sum(0)
        if predicted.any():
            self.right_images += int(truth_pixels[predicted.argmax()] > 0)
        hits = int(sums[1:, 1:, 2].sum())  # any id predicted on any object
        if hits:
            precision, recall = hits / int(predicted.sum()), hits / int(truth_pixels.sum())
            self.f_measure_sum += 1.3 * precision * recall / (0.3 * precision + recall)
        self.boundary += edge_sums.sum(0)
        for k, name in enumerate(SIZE_BINS, 1):
            if sums[k, :, 1].any():
                self.bins[name] += sums[0] + sums[k]
                self.boundary_bins[name] += edge_sums[0] + edge_sums[k]

    def __add__(self, other: "ImageNetSScores") -> "ImageNetSScores":
        """Return the scores of both parts of a split."""
        total = ImageNetSScores(self.num_classes, self.ignore)
        total.images = self.images + other.images
        total.right_images = self.right_images + other.right_images
        total.f_measure_sum = self.f_measure_sum + other.f_measure_sum
        total.boundary = self.boundary + other.boundary
        total.bins = {name: self.bins[name] + other.bins[name] for name in SIZE_BINS}
        total.boundary_bins = {name: self.boundary_bins[name] + other.boundary_bins[name] for name in SIZE_BINS}
        return total

    def compute(self) -> dict[str, float]:
        """Return the scores, each in 0..1; a size bin without objects is nan."""
        scores = {
            "image_accuracy": self.right_images / self.images if self.images else math.nan,
            "f_measure": self.f_measure_sum / self.images if self.images else math.nan,
            "boundary_miou": float(mean_iou(self.boundary, "imagenet-s")),
        }
        for prefix, bins in (("miou", self.bins), ("boundary_miou", self.boundary_bins)):
            for name, sums in bins.items():
                present = sums[:, 1] > 0  # the mean goes over the ids that have ground truth in the bin
                value = iou_per_class(sums[present], "imagenet-s").mean() if present.any() else math.nan
                scores[f"{prefix}_{name}"] = float(value)
        return scores


def _count(codes: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return how often each code 0..prod(shape)-1 occurs, int64 of this shape."""
    return torch.bincount(codes.flatten(), minlength=math.prod(shape)).view(shape)
