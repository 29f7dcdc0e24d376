"""How a benchmark's PNG files code a label map.

Inside the package a label map is always int64, height x width, with class ids 0..K-1 and the benchmark's ignore
label; only this file knows what stands on disk.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffseg.benchmarks.classes import Benchmark, voc_palette
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path
from diffseg.pictures import decode

_LAST_LABEL_ID = 33  # bicycle; "license plate" is -1 and never drawn into the official files
_UNLABELED = 0  # the labelId that ignored pixels are written as


def read_pixels(path: Path) -> tuple[np.ndarray, str]:
    """Return a file's pixels as they stand there, and the mode that says what they are; errors as `decode`'s."""
    picture = decode(path)
    return np.array(picture), picture.mode


def check_ids(label: np.ndarray | torch.Tensor, benchmark: Benchmark, what: str) -> None:
    """Raise a DiffsegError, naming `what`, for an id that is neither a class of the benchmark nor ignored."""
    wrong = label[(label != benchmark.ignore) & ((label < 0) | (label >= benchmark.num_classes))]
    if len(wrong):
        raise DiffsegError(
            f"{what} holds the label id {int(wrong[0])}, but {benchmark.name} has the ids "
            f"0 to {benchmark.num_classes - 1} and {benchmark.ignore} for ignored pixels; use its own files."
        )


def read_label(path: str | os.PathLike, benchmark: Benchmark) -> np.ndarray:
    """Read a label PNG in the benchmark's official coding as int64 H x W (class ids and `benchmark.ignore`).

    - palette: the index itself, PNG mode P or L; a file converted to RGB has lost the ids and is refused.
    - r256g: id = R + 256 * G, computed in int64 (in uint8 the product overflows).
    - labelids: Cityscapes labelIds 0..33, returned as the benchmark's classes; every other label is ignored.

    Raises a DiffsegError, naming the file, for a truncated file, another kind of PNG, or an id out of range.
    """
    path = Path(path)
    pixels, mode = read_pixels(path)
    label = pixels.astype(np.int64)
    if benchmark.coding == "palette":
        if mode not in ("P", "L"):
            raise DiffsegError(
                f"{path} is a {mode} image, but a {benchmark.name} label is a palette PNG whose index is "
                "the class; use the original file and never convert it to RGB."
            )
    elif benchmark.coding == "r256g":
        if mode != "RGB" or label[..., 2].any():
            raise DiffsegError(
                f"{path} is not coded as ImageNet-S labels are (an RGB PNG, id = R + 256 * G, B = 0); "
                "use the official file, not a coloured or converted one."
            )
        label = label[..., 0] + 256 * label[..., 1]
    else:
        if mode != "L" or path.stem.endswith("labelTrainIds") or label.max(initial=0) > _LAST_LABEL_ID:
            raise DiffsegError(
                f"{path} (mode {mode}, largest value {label.max(initial=0)}) holds no Cityscapes labelIds, "
                f"which are 0 to {_LAST_LABEL_ID} in one channel (255 occurs in trainIds only); use the file "
                "..._gtFine_labelIds.png, or write predictions as labelIds."
            )
        class_of = np.full(_LAST_LABEL_ID + 1, benchmark.ignore)
        for index, label_ids in enumerate(benchmark.label_ids):
            class_of[list(label_ids)] = index
        label = class_of[label]
    check_ids(label, benchmark, str(path))
    return label


def write_label(path: str | os.PathLike, label: np.ndarray | torch.Tensor, benchmark: Benchmark) -> None:
    """Write a label map (integers, H x W) as PNG in the benchmark's coding; the inverse of `read_label`.

    Cityscapes' ignored pixels become labelId 0 (unlabeled). Raises a DiffsegError for an id out of range.
    """
    label = np.asarray(label).astype(np.int64)
    if label.ndim != 2:
        raise DiffsegError(f"The label map for {path} has shape {label.shape}; give one image's height x width.")
    check_ids(label, benchmark, f"The label map for {path}")
    if benchmark.coding == "palette":
        picture = Image.fromarray(label.astype(np.uint8))
        colors = benchmark.palette + voc_palette(256)[benchmark.num_classes :]
        picture.putpalette([value for color in colors for value in color])
    elif benchmark.coding == "r256g":
        channels = np.stack([label % 256, label // 256, np.zeros_like(label)], axis=-1)
        picture = Image.fromarray(channels.astype(np.uint8))
    else:
        ignored = label == benchmark.ignore
        written = np.array([label_ids[0] for label_ids in benchmark.label_ids])
        ids = np.where(ignored, _UNLABELED, written[np.where(ignored, 0, label)])
        picture = Image.fromarray(ids.astype(np.uint8))
    with atomic_path(path) as temporary:
        picture.save(temporary)


def write_prediction(
    folder: str | os.PathLike,
    name: str,
    prediction: np.ndarray | torch.Tensor,
    benchmark: Benchmark,
    size: tuple[int, int],
) -> Path:
    """Write a prediction as `<folder>/<name>.png` in the format of the benchmark's server; return the path.

    VOC: palette PNG. Cityscapes: labelIds. ImageNet-S: (id % 256, id // 256, 0), in a folder per tag, which
    is part of the name. `size` is (height, width) of the image; servers take no other. Raises a
    DiffsegError for another size or an ignored pixel, since every pixel needs a class. Read it back with
    `read_prediction`.
    """
    _check_prediction(np.asarray(prediction), benchmark, size, f"The prediction for {name}")
    path = Path(folder) / f"{name}.png"
    write_label(path, prediction, benchmark)
    return path


def read_prediction(folder: str | os.PathLike, name: str, benchmark: Benchmark, size: tuple[int, int]) -> np.ndarray:
    """Read `<folder>/<name>.png` as int64 H x W; the inverse of `write_prediction`, with the same errors."""
    path = Path(folder) / f"{name}.png"
    if not path.is_file():
        raise DiffsegError(f"{path} is missing: the evaluation needs a prediction for every image of the split.")
    prediction = read_label(path, benchmark)
    _check_prediction(prediction, benchmark, size, str(path))
    return prediction


def _check_prediction(prediction: np.ndarray, benchmark: Benchmark, size: tuple[int, int], what: str) -> None:
    if prediction.shape != tuple(size):
        raise DiffsegError(
            f"{what} has the shape {prediction.shape}, but its image is {size[0]} x {size[1]} pixels "
            "(height x width); resize the scores to the image before taking the best class."
        )
    if (prediction == benchmark.ignore).any():
        coding = ", written as labelId (not trainId)" if benchmark.coding == "labelids" else ""
        raise DiffsegError(
            f"{what} leaves pixels without a class of {benchmark.name}; predict one of its classes{coding}."
        )


def write_picture_label(path: str | os.PathLike, label: np.ndarray | torch.Tensor, benchmark: Benchmark) -> None:
    """Write a label map with the benchmark's ids and ignore label as `pictures_set` reads it."""
    coding = picture_coding(benchmark)
    label = np.array(label, dtype=np.int64)
    check_ids(label, benchmark, f"The label map for {path}")
    label[label == benchmark.ignore] = coding.ignore
    write_label(path, label, coding)


def picture_coding(benchmark: Benchmark) -> Benchmark:
    """Return the same classes as synthetic sets code them: a palette with 255 = ignored, if it suffices."""
    if benchmark.num_classes <= 255:
        return replace(benchmark, coding="palette", ignore=255)
    return replace(benchmark, coding="r256g", ignore=1000)
