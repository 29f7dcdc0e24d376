"""Score a network, or a folder of predictions, on a benchmark's split by its official protocol."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from diffseg.benchmarks.classes import FOLDER, Benchmark
from diffseg.benchmarks.labels import read_prediction, write_prediction
from diffseg.benchmarks.metrics import ConfusionMatrix, ImageNetSScores, bootstrap_interval, iou_per_class, mean_iou
from diffseg.errors import DiffsegError
from diffseg.refiners import get_refiner


@dataclass(frozen=True)
class Evaluation:
    """What one table row needs; every score is in 0..1, nan where it is not defined.

    `inference` says how the predictions were made ("single scale", "scales 0.5, 1 + flip", ...), `interval`
    is the 95 % bootstrap interval of the mIoU over images, `groups` the IoU of merged classes, `extras` what
    the protocol prints besides (ImageNet-S). `confusion` counts pixels, int64 K x K, rows ground truth, columns
    prediction.
    """

    benchmark: str
    inference: str
    images: int
    miou: float
    interval: tuple[float, float]
    pixel_accuracy: float
    iou: dict[str, float]
    groups: dict[str, float] = field(default_factory=dict)
    extras: dict[str, float] = field(default_factory=dict)
    confusion: np.ndarray | None = field(default=None, repr=False, compare=False)

    def metrics(self) -> dict[str, float | int | str | None]:
        """Return a flat dictionary for a manifest; nan becomes None, which JSON knows."""
        flat: dict[str, float | int | str | None] = {
            "miou": self.miou,
            "miou_low": self.interval[0],
            "miou_high": self.interval[1],
            "pixel_accuracy": self.pixel_accuracy,
            **{f"group/{name}": value for name, value in self.groups.items()},
            **self.extras,
            **{f"iou/{name}": value for name, value in self.iou.items()},
        }
        flat = {name: None if math.isnan(value) else value for name, value in flat.items()}
        return {"benchmark": self.benchmark, "inference": self.inference, "images": self.images, **flat}


Counter = ConfusionMatrix | ImageNetSScores


def count(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], benchmark: Benchmark) -> list[Counter]:
    """Count (label, prediction) pairs, integer tensors H x W of one image each, as the protocol needs."""
    counters: list[Counter] = [ConfusionMatrix(benchmark.num_classes, benchmark.ignore)]
    if benchmark.protocol == "imagenet-s":
        counters.append(ImageNetSScores(benchmark.num_classes, benchmark.ignore))
    for label, prediction in pairs:
        for counter in counters:
            counter.update(label, prediction)
    return counters


def merge_processes(counters: list[Counter]) -> list[Counter]:
    """Return the counts of all processes of a distributed run, the first process's images first; every process
    gets them."""
    return reduce(lambda total, part: [a + b for a, b in zip(total, part, strict=True)], gather_object([counters]))


def summarise(
    counters: Sequence[Counter], benchmark: Benchmark, inference: str, bootstrap: int = 1000, seed: int = 0
) -> Evaluation:
    """Return the scores of what `count` counted, by the official protocol."""
    matrix, *more = counters
    iou = iou_per_class(matrix.class_sums, benchmark.protocol).tolist()
    return Evaluation(
        benchmark=benchmark.name,
        inference=inference,
        images=len(matrix.per_image),
        miou=float(mean_iou(matrix.class_sums, benchmark.protocol)),
        interval=bootstrap_interval(matrix.per_image, benchmark.protocol, samples=bootstrap, seed=seed),
        pixel_accuracy=matrix.pixel_accuracy,
        iou=dict(zip(benchmark.classes, iou, strict=True)),
        groups={name: matrix.group_iou(ids) for name, ids in benchmark.groups.items()},
        extras=more[0].compute() if more else {},
        confusion=matrix.counts,
    )


def score(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], benchmark: Benchmark, inference: str, **options: int
) -> Evaluation:
    """Score (label, prediction) pairs; `options` are those of `summarise` (bootstrap, seed)."""
    return summarise(count(pairs, benchmark), benchmark, inference, **options)


def evaluate_folder(folder: str | os.PathLike, dataset: Dataset, benchmark: Benchmark, **options: int) -> Evaluation:
    """Evaluate prediction files, `<folder>/<name>.png` in the server's format, against an opened split.

    `options` are those of `score` (bootstrap, seed). Raises a DiffsegError for a missing file, another size,
    or an id that is no class.
    """

    def pairs() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for name, _, label, *_ in tqdm((dataset[index] for index in range(len(dataset))), total=len(dataset)):
            yield label, torch.from_numpy(read_prediction(folder, name, benchmark, tuple(label.shape)))

    return score(pairs(), benchmark, "predictions from files", **options)


def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    benchmark: Benchmark,
    *,
    batch_size: int = 8,
    workers: int = 0,
    device: str | torch.device = "cpu",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    refine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    write_to: str | os.PathLike | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Predict every image of an opened split and score it at the image's own size, by the official protocol.

    `predict` takes float32 images N x 3 x H x W in 0..1 on `device` and returns scores (logits, N x K x h x w
    of any size, resized here bilinearly) or a label map (integers, N x H x W). Images of one size share a
    batch. With several `scales`, or `flip` (left-right), the softmax of every view is averaged at the image's
    size. `refine` takes (image uint8 3 x H x W, probabilities K x H x W) and returns probabilities: see `crf`.
    `write_to` keeps the predictions in the server's format. Several processes (started by `accelerate launch` or
    torchrun) share the images, and each returns the scores of all. Raises a DiffsegError for a prediction of
    another size or number of classes.
    """
    state = PartialState()
    first, last = (len(dataset) * k // state.num_processes for k in (state.process_index, state.process_index + 1))
    part = Subset(dataset, range(first, last))  # one after the other, so the images' order is that of one process
    loader = DataLoader(part, batch_size=batch_size, num_workers=workers, collate_fn=list)

    def pairs() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        with tqdm(total=len(part), desc=f"evaluate {benchmark.name}", unit="image") as progress:
            for samples in loader:
                one_size = len({sample[1].shape for sample in samples}) == 1
                for group in [samples] if one_size else [[sample] for sample in samples]:
                    images = torch.stack([sample[1] for sample in group]).to(device)
                    with torch.inference_mode():
                        predictions = predict_labels(predict, images, benchmark, scales, flip, refine)
                    for (name, _, label, *_), prediction in zip(group, predictions, strict=True):
                        if write_to is not None:
                            write_prediction(write_to, name, prediction.cpu(), benchmark, tuple(label.shape))
                        yield label.to(device), prediction
                    progress.update(len(group))

    counters = merge_processes(count(pairs(), benchmark))
    return summarise(counters, benchmark, describe_inference(scales, flip, refine), bootstrap, seed)


def crf(image: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Refine a prediction by a dense CRF, for `evaluate`: image uint8 3 x H x W, probabilities K x H x W.

    The constants are those of the mask step (`refiners.refine_crf`). Raises a DiffsegError without its package.
    """
    # the refiner puts a background before the classes, which has no score if beta is next to 1
    return get_refiner("crf")(image.float() / 255, probabilities, 1 - 1e-6)[1:]


def best_class(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the argmax (int64 N x H x W) of logits (N x K x h x w) scaled to H x W; of equal ones the first.

    A class at a time: all of them at the size of a photograph of 24 megapixels would take two gigabytes for VOC.
    """
    logits = finite(logits)
    best = torch.full((len(logits), *size), -torch.inf, device=logits.device)
    label = torch.zeros(best.shape, dtype=torch.int64, device=logits.device)
    for k in range(logits.shape[1]):
        scaled = F.interpolate(logits[:, k : k + 1], size, mode="bilinear")[:, 0]
        label[scaled > best] = k
        best = torch.maximum(best, scaled)
    return label


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Return logits with the smallest number in place of minus infinity, of which interpolation would make nan."""
    return logits.clamp(min=torch.finfo(logits.dtype).min)


def describe_inference(scales: Sequence[float], flip: bool, refine: Callable | None) -> str:
    """Return the words for a table row, e.g. "single scale" or "scales 0.5, 1, 1.5 + flip + crf"."""
    words = "scales " + ", ".join(f"{scale:g}" for scale in scales)
    words = "single scale" if tuple(scales) == (1.0,) else words
    words += " + flip" if flip else ""
    return words + (f" + {getattr(refine, '__name__', 'refined')}" if refine is not None else "")


def predict_labels(
    predict: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    benchmark: Benchmark,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    refine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the label maps int64 N x H x W of uint8 images N x 3 x H x W; the options are those of `evaluate`.

    Images of any size, a user's own (protocol "folder") and ImageNet-S's, are first scaled to the side at which the
    network saw images in its training, as `diffseg predict` does; VOC's and Cityscapes' are seen at their own.
    """
    size = images.shape[-2:]
    side = getattr(predict, "side", 0)
    if side and benchmark.protocol in (FOLDER, "imagenet-s"):  # one by one: photographs are large
        inputs = torch.cat([resize(image[None].float() / 255, [side], antialias=True) for image in images])
    else:
        inputs = images.float() / 255
    views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
    total: torch.Tensor | float = 0.0
    for scale, mirrored in views:
        view = inputs.flip(-1) if mirrored else inputs
        if scale != 1.0:
            small = [max(1, round(length * scale)) for length in inputs.shape[-2:]]
            view = F.interpolate(view, size=small, mode="bilinear", antialias=True)
        output = predict(view)
        if not output.is_floating_point():
            if len(views) > 1 or refine is not None:
                raise DiffsegError(
                    "Several scales, flip and refinement need scores, but this network gives label maps."
                )
            return output  # its size is checked where it is counted
        if output.ndim != 4 or output.shape[1] != benchmark.num_classes:
            raise DiffsegError(
                f"The network's scores have the shape {tuple(output.shape)}, but {benchmark.name} needs "
                f"{benchmark.num_classes} classes (N x classes x height x width); load a network made for it."
            )
        if len(views) == 1 and refine is None:
            return best_class(output.float(), size)
        logits = F.interpolate(finite(output.float()), size=size, mode="bilinear")
        logits = logits.flip(-1) if mirrored else logits
        total = total + logits.softmax(dim=1) / len(views)
    if refine is not None:
        total = torch.stack([refine(image, scores) for image, scores in zip(images, total, strict=True)])
    return total.argmax(dim=1)
