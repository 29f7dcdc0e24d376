"""Readers: the benchmarks' official folders, and VOC-layout folders with synthetic images."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from diffseg.benchmarks.classes import DEVELOPMENT, FOLDER, Benchmark
from diffseg.benchmarks.folder import open_folder
from diffseg.benchmarks.labels import picture_coding, read_label, read_pixels
from diffseg.errors import DiffsegError
from diffseg.paths import locate
from diffseg.pictures import is_visible, read_picture, read_text
from diffseg.reliability import rank_within_class


class LabelledPictures(Dataset):
    """Images with label maps: item i is (name, image uint8 3 x H x W, label int64 H x W), as torch tensors.

    `items` holds (name, image path, label path); read: called with name and label path, it returns the label map
    (int64 H x W), where the file is not in the benchmark's coding. In a user's folder the camera's orientation (EXIF)
    is obeyed; official labels lie on the pixels as they are stored. Reading raises a DiffsegError that names the file.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        items: Sequence[tuple[str, Path, Path]],
        read: Callable[[str, Path], np.ndarray] | None = None,
    ):
        self.benchmark = benchmark
        self.items = list(items)
        self.read = read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        name, image_path, label_path = self.items[index]
        upright = self.benchmark.protocol == FOLDER
        pixels = np.array(read_picture(image_path, upright))
        label = self.read(name, label_path) if self.read else read_label(label_path, self.benchmark)
        if label.shape != pixels.shape[:2]:
            raise DiffsegError(
                f"{label_path} is {label.shape[0]} x {label.shape[1]} pixels (height x width), but its "
                f"image {image_path} is {pixels.shape[0]} x {pixels.shape[1]}"
                f"{', held upright as its EXIF says' if upright else ''}; use its own label."
            )
        return name, torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(label)


def data_folder(data_root: str) -> Path:
    """Return the root folder of the data sets: "mini" is written on first use, any other name is a folder.

    A relative folder counts from the project's root. Raises a DiffsegError when it is missing or cannot be written.
    """
    folder = locate("data_root", data_root)
    if not folder.is_dir():
        raise DiffsegError(
            f"there is no data root {folder}; set data_root to the folder that holds VOCdevkit, ImageNetS50, "
            "leftImg8bit and the like, or for benchmark=folder to that of your export."
        )
    return folder


def open_split(benchmark: Benchmark, root: str | os.PathLike, split: str) -> LabelledPictures:
    """Open one split of a benchmark below its data root, in the official tree, in sorted or listed order.

    - VOC: `VOCdevkit/VOC2012/`; "trainaug" needs `ImageSets/Segmentation/trainaug.txt` and the Semantic
      Boundaries Dataset's labels as `SegmentationClassAug/<id>.png`. Names are "2007_000033".
    - ImageNet-S: `ImageNetS50/validation/<tag>/<name>.JPEG` and `validation-segmentation/<tag>/<name>.png`,
      or "train-semi". Names are "<tag>/<name>".
    - Cityscapes: `leftImg8bit/<split>/<city>/` and `gtFine/<split>/<city>/..._gtFine_labelIds.png`. Names are
      "<city>_<sequence>_<frame>".
    - A folder of one's own: see `diffseg.benchmarks.folder`; its lists name the splits.
    - "dev" of the official ones, in the same layout: images on which parameters are chosen. The mini benchmarks have
      it.

    Raises a DiffsegError for an unknown split, for missing or wrong folders with the official source and tree, and
    for an image or mask of ImageNet-S without the other, or a label of Cityscapes without its image.
    """
    if benchmark.protocol == FOLDER:
        items, read = open_folder(benchmark, Path(root), split)
        if not items:
            raise DiffsegError(f"The split {split} below {root} names no image; put images into it.")
        return LabelledPictures(benchmark, items, read)
    if not benchmark.splits:
        raise DiffsegError(
            f"{benchmark.name} has no labelled images; set train_real to false and stop after step 4 (--only 1-4)"
        )
    if split not in benchmark.splits:
        raise DiffsegError(f"{benchmark.name} has no split {split!r}; it has {', '.join(benchmark.splits)}.")
    base, sought = Path(root) / benchmark.folder, benchmark
    if split == DEVELOPMENT:  # a missing file must not be sought in the official archives
        sought = replace(benchmark, source=f"{benchmark.source}, hold back a part of its training images as {split}")
    list_items = {"voc": _voc_items, "imagenet-s": _imagenet_s_items, "cityscapes": _cityscapes_items}
    items = list_items[benchmark.protocol](sought, base, split)
    if not items:
        raise DiffsegError(f"The split {split} of {benchmark.name} below {base} is empty; unpack the data again.")
    return LabelledPictures(benchmark, items)


def _require(base: Path, tree: Sequence[str], source: str) -> None:
    for part in tree:
        if not (base / part).exists():
            expected = ", ".join(str(base / part) for part in tree)
            raise DiffsegError(f"{base / part} is missing: get {source} and unpack it so that there is {expected}.")


def _listed(path: Path) -> list[str]:
    """Names in a VOC list; a line may also be a pair of paths, as the circulating trainaug lists are."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    return [re.sub(r"^(?:.*/)?(.+?)\.jpg(\s.*)?$", r"\1", line) for line in lines]


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if is_visible(path, folder))


def _voc_items(benchmark: Benchmark, base: Path, split: str) -> list[tuple[str, Path, Path]]:
    labels = "SegmentationClassAug" if split == "trainaug" else "SegmentationClass"
    source = benchmark.source
    if split == "trainaug":
        source += " and the Semantic Boundaries Dataset's labels as palette PNGs (SegmentationClassAug)"
    _require(base, ("JPEGImages", labels, f"ImageSets/Segmentation/{split}.txt"), source)
    names = _listed(base / f"ImageSets/Segmentation/{split}.txt")
    items = [(name, base / "JPEGImages" / f"{name}.jpg", base / labels / f"{name}.png") for name in names]
    if lost := [path for _, *paths in items for path in paths if not path.is_file()]:
        raise DiffsegError(
            f"{len(lost)} of the files that {base}/ImageSets/Segmentation/{split}.txt names are missing, the first is "
            f"{lost[0]}; unpack {source} again, and whole."
        )
    return items


def _imagenet_s_items(benchmark: Benchmark, base: Path, split: str) -> list[tuple[str, Path, Path]]:
    _require(base, (split, f"{split}-segmentation"), benchmark.source)
    pictures, masks = base / split, base / f"{split}-segmentation"
    items = []
    for label in _visible(masks, "*/*.png"):
        tag = label.parent.name
        if tag not in benchmark.classes:
            raise DiffsegError(f"{label.parent} is no class of {benchmark.name}; give the root of its own data set.")
        items.append((f"{tag}/{label.stem}", pictures / tag / f"{label.stem}.JPEG", label))
    there, expected = set(_visible(pictures, "*/*.JPEG")), {picture for _, picture, _ in items}
    missing = sorted(expected - there)
    missing += sorted(masks / path.parent.name / f"{path.stem}.png" for path in there - expected)
    if missing:  # there is no list of the split, but its two folders hold the same names
        raise DiffsegError(
            f"{len(missing)} of the images and masks of {benchmark.name} {split} are missing, the first is "
            f"{missing[0]}; unpack {split} and {split}-segmentation again, and whole."
        )
    return items


def _cityscapes_items(benchmark: Benchmark, base: Path, split: str) -> list[tuple[str, Path, Path]]:
    _require(base, (f"leftImg8bit/{split}", f"gtFine/{split}"), benchmark.source)
    items = []
    for image in _visible(base / "leftImg8bit" / split, "*/*_leftImg8bit.png"):
        name, city = image.stem.removesuffix("_leftImg8bit"), image.parent.name
        items.append((name, image, base / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"))
    labels = set(_visible(base / "gtFine" / split, "*/*_gtFine_labelIds.png"))
    if lost := sorted(labels - {label for *_, label in items}):  # the images are an archive of their own
        raise DiffsegError(
            f"{len(lost)} labels of {benchmark.name} {split} have no image, the first is {lost[0]}; unpack "
            f"leftImg8bit/{split} again, and whole."
        )
    if lost := [label for *_, label in items if label not in labels]:
        raise DiffsegError(
            f"{len(lost)} images of {benchmark.name} {split} have no label, the first is missing at {lost[0]}; unpack "
            f"gtFine/{split} again, and whole."
        )
    # trainIds are valid labelIds too, so a single file cannot tell; but vegetation, sky, people and vehicles
    # are all above 18, and eight street scenes without any of them are trainIds.
    spread = items[:: max(1, len(items) // 8)][:8]
    if spread and max(read_pixels(label)[0].max() for _, _, label in spread) < 19:
        raise DiffsegError(
            f"The files ..._gtFine_labelIds.png in {base / 'gtFine' / split} hold trainIds (none above 18); "
            "put the official labelIds back, since they are converted to trainIds on reading."
        )
    return items


class PictureSet(LabelledPictures):
    """A VOC-layout folder for training: item i is (name, image, label, reliability).

    Image and label as in `LabelledPictures`, the ignored pixels being `benchmark.ignore`; reliability is
    uint8 2 x H x W (margin and rank, as `diffseg.reliability` explains), or None where the folder has no
    `Reliability`. Where it has no `ReliabilityRank`, the rank is computed on reading.
    """

    def __init__(self, benchmark: Benchmark, items: Sequence[tuple[str, Path, Path]], reliability: Path | None):
        super().__init__(picture_coding(benchmark), items)
        self.ignore = benchmark.ignore
        self.reliability = reliability

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        name, image, label = super().__getitem__(index)
        label[label == self.benchmark.ignore] = self.ignore
        if self.reliability is None:
            return name, image, label, None
        margin = self._read_map(self.reliability / f"{name}.png", label.shape)
        path = self.reliability.with_name("ReliabilityRank") / f"{name}.png"
        rank = self._read_map(path, label.shape) if path.is_file() else rank_within_class(label, margin)
        return name, image, label, torch.stack([margin, rank])

    def _read_map(self, path: Path, shape: torch.Size) -> torch.Tensor:
        pixels, mode = read_pixels(path)
        if mode != "L" or pixels.shape != shape:
            raise DiffsegError(f"{path} is no one-channel image of its label's size; make the synthetic set again.")
        return torch.from_numpy(pixels)


def pictures_set(folder: str | os.PathLike, benchmark: Benchmark, split: str = "train") -> PictureSet:
    """Open a synthetic set, or any folder in VOC's layout, whose labels are the classes of `benchmark`.

    Expects `JPEGImages/<id>.jpg`, `SegmentationClass/<id>.png`, `ImageSets/Segmentation/<split>.txt`, and optionally
    `Reliability/<id>.png` and `ReliabilityRank/<id>.png`. Labels are palette PNGs with 255 = ignored, or R + 256 * G
    with 1000 = ignored where the benchmark has more than 255 classes, as `write_picture_label` writes them. Raises a
    DiffsegError otherwise.
    """
    folder = Path(folder)
    listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    _require(
        folder,
        ("JPEGImages", "SegmentationClass", str(listing.relative_to(folder))),
        "a data set in VOC's layout",
    )
    names = _listed(listing)
    if not names:
        raise DiffsegError(f"{listing} names no image; make the synthetic set again.")
    reliability = folder / "Reliability"
    return PictureSet(
        benchmark,
        [(name, folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png") for name in names],
        reliability if reliability.is_dir() else None,
    )
