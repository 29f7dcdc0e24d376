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
                "resize the scores to the picture before taking the best class."
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
                f"{self.ignore} is ignored; read labels with benchmarks.read_label, which converts labelIds."
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
    as the protocol says, so ImageNet-S needs several images a class. (nan, nan) without a defined mIoU.
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


def boundary_map(label: torch.Tensor, ratio: float = 0.03) -> torch.Tensor:
    """Return id + 1 on each region's inner boundary and 0 elsewhere (int64 H x W) of a label map H x W.

    As in Boundary IoU: a region minus its erosion by a square, `ratio` of the image's diagonal wide (3 % in
    ImageNet-S; at least one pixel), the image's edge being a boundary. A pixel survives its own region's
    erosion where the square around it holds no two neighbours of different ids, which sums over windows tell
    for all ids at once.
    """
    height, width = label.shape
    reach = max(1, round(ratio * math.hypot(height, width)))
    side = 2 * reach + 1
    padded = F.pad(label.long(), [reach] * 4, value=-1)
    changes = _window_sums(padded[:, 1:] != padded[:, :-1], side, side - 1)
    changes += _window_sums(padded[1:] != padded[:-1], side - 1, side)
    return torch.where(changes == 0, 0, label.long() + 1)


def _window_sums(marks: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    total = F.pad(marks.cumsum(0).cumsum(1), (1, 0, 1, 0))
    bands = total[rows:] - total[:-rows]
    return bands[:, columns:] - bands[:, :-columns]


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
        valid = label != self.ignore
        # Boundaries are made before ignored pixels are removed: a region also ends where ignored ones begin.
        truth_edge, guess_edge = boundary_map(label)[valid], boundary_map(prediction)[valid]
        truth, guess = label[valid].long(), prediction[valid].long()
        areas = torch.bincount(truth, minlength=size)
        predicted = torch.bincount(guess, minlength=size)

        self.images += 1
        if predicted[1:].any():
            self.right_images += int(areas[1:][predicted[1:].argmax()] > 0)
        hits = int(((truth > 0) & (guess > 0)).sum())
        if hits:
            precision, recall = hits / int(predicted[1:].sum()), hits / int(areas[1:].sum())
            self.f_measure_sum += 1.3 * precision * recall / (0.3 * precision + recall)
        self.boundary += _class_sums(truth_edge, guess_edge, size + 1)[1:]

        percent = -(-100 * areas // max(1, len(truth)))  # rounded up, in whole numbers
        lower = 0
        for name, upper in SIZE_BINS.items():
            inside = (percent > lower) & (percent <= upper)
            inside[0] = False
            lower = upper
            if inside.any():
                inside[0] = True
                chosen = inside[truth]
                self.bins[name] += _class_sums(truth[chosen], guess[chosen], size)
                self.boundary_bins[name] += _class_sums(truth_edge[chosen], guess_edge[chosen], size + 1)[1:]

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


def _class_sums(truth: torch.Tensor, guess: torch.Tensor, size: int) -> np.ndarray:
    counts = [torch.bincount(ids, minlength=size) for ids in (truth[truth == guess], truth, guess)]
    return torch.stack(counts, dim=-1).cpu().numpy()
