"""A labelled data set of one's own below one folder, as annotation tools export it.

- VOC's layout: `JPEGImages/<name>.<any image suffix>`, `SegmentationClass/<name>.png`,
  `ImageSets/Segmentation/<split>.txt` (labelme writes no such list: write it, a name a line). What a label image's
  values mean stands in `labelmap.txt` (CVAT's "Segmentation mask": a line `name:R,G,B::` a class, label images in these
  colours, or in one channel with the number of the line; no label image where an image shows nothing), else in
  `class_names.txt` (labelme: a line a class, from 0; of old, label images in `SegmentationClassPNG`), else in the class
  list (0 is the background).
- COCO's: `annotations/instances_<split>.json`, images below `images/<split>`, `images` or `<split>`.

The names of classes are the data's. `Benchmark.data_names` says which class each stands for; a name that stands for
none is background. 255 in one channel, and the name "ignored", mean ignored pixels.
"""

import contextlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from diffseg.benchmarks.classes import Benchmark
from diffseg.errors import DiffsegError
from diffseg.pictures import decode, picture_files, read_picture, read_text
from diffseg.words import nfc

IGNORED = "ignored"
_TOOLS = {"_background_": "background", "__ignore__": IGNORED}  # labelme's names
Items = list[tuple[str, Path, Path]]


def class_ids(names: Sequence[str], benchmark: Benchmark, source: Path) -> np.ndarray:
    """Return the class id (or `benchmark.ignore`) of each of the data's names, int64; `source` is where they stand.

    Raises a DiffsegError for a mapping of a name that the data has not, or to what is no class, and for a class of the
    class list that no name stands for: a misspelt name would otherwise be background in silence.
    """
    names = [nfc(_TOOLS.get(name, name)) for name in names]
    targets = {IGNORED: benchmark.ignore} | {name: number for number, name in enumerate(benchmark.classes)}
    mapping = {nfc(name): nfc(word) for name, word in benchmark.data_names.items()}
    for name, word in mapping.items():
        if name not in names:
            raise DiffsegError(f"data_names maps {name!r}, but {source} has {', '.join(names)}; correct the name.")
        if word not in targets:
            raise DiffsegError(
                f"data_names maps {name!r} to {word!r}; map it to a class of class_list, background or {IGNORED}."
            )
    ids = np.array([targets.get(mapping.get(name, name), 0) for name in names], np.int64)
    for number, name in enumerate(benchmark.classes):
        if number and number not in ids:
            raise DiffsegError(
                f"no class of {source} stands for {name!r}; it has {', '.join(names)}: say which one in data_names, as "
                f"in `data_names={{their name: {name}}}`, or take {name!r} out of class_list."
            )
    return ids


def open_folder(benchmark: Benchmark, root: Path, split: str) -> tuple[Items, "ImageLabels | CocoLabels"]:
    """Return (name, image path, label path) of a split, and what reads a label: called with name and path, it returns
    int64 H x W.

    Raises a DiffsegError for a folder in neither layout, an unknown split, images or labels that are missing, and two
    images of one name, since labels and predictions are found by it.
    """
    if (root / "SegmentationClass").is_dir():
        items, labels = _voc_layout(benchmark, root, split)
    elif (root / "annotations").is_dir():
        items, labels = _coco_layout(benchmark, root, split)
    else:
        raise DiffsegError(
            f"{root} holds neither SegmentationClass (VOC's layout) nor annotations (COCO's); set data_root to the "
            "folder of an export that does."
        )
    bare = labels.bare if isinstance(labels, ImageLabels) else {}
    missing = [path for name, *paths in items for path in paths[: 1 if name in bare else 2] if not path.is_file()]
    if missing:
        raise DiffsegError(
            f"{len(missing)} images or labels of the split {split} are missing below {root}, the first is "
            f"{missing[0]}; export the annotations with their images, or shorten the split."
        )
    for name, count in Counter(name for name, *_ in items).items():  # predictions are written by these names
        if count > 1:
            raise DiffsegError(
                f"the split {split} below {root} has {count} images named {name} (suffixes do not count); give each "
                "its own name, or list it once."
            )
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DiffsegError(f"the split {split} below {root} names {name}, outside of the data set; rename it.")
    return items, labels


# VOC's layout


@dataclass(frozen=True)
class ImageLabels:
    """Reads label images: `ids[k]` is the class id of the value k, `colours[k]` (R, G, B) its colour, if it has one;
    `bare` are the images (name -> path) that have none, as they show background alone."""

    ids: np.ndarray
    ignore: int
    colours: tuple[tuple[int, int, int], ...]
    bare: dict[str, Path]

    def __call__(self, name: str, path: Path) -> np.ndarray:
        if name in self.bare:
            return np.zeros(read_picture(self.bare[name]).size[::-1], np.int64)
        picture = decode(path)
        if self.colours and picture.mode in ("P", "RGB"):
            return self._of_colours(np.array(picture.convert("RGB"), np.int64), path)
        if picture.mode not in ("P", "L"):
            raise DiffsegError(
                f"{path} is a {picture.mode} image; give label images of one channel of 8 bits (the class's number), "
                "or in the colours of a labelmap.txt."
            )
        values = np.array(picture, np.int64)
        counted = values != 255
        if wrong := values[counted & (values >= len(self.ids))].tolist():
            raise DiffsegError(
                f"{path} holds the value {wrong[0]}, but there are {len(self.ids)} classes, 0 to {len(self.ids) - 1}, "
                "and 255 for ignored pixels; name the others in class_names.txt or labelmap.txt."
            )
        return np.where(counted, self.ids[np.where(counted, values, 0)], self.ignore)

    def _of_colours(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        code = np.array([65536, 256, 1])
        found, where = np.unique(pixels @ code, return_inverse=True)
        known = {int(np.dot(colour, code)): number for number, colour in enumerate(self.colours)}
        for value in found.tolist():
            if value not in known:
                colour = f"({value >> 16}, {value >> 8 & 255}, {value & 255})"
                raise DiffsegError(f"{path} holds the colour {colour}, which labelmap.txt does not name; add its line.")
        return self.ids[[known[value] for value in found.tolist()]][where.reshape(pixels.shape[:2])]


def _voc_layout(benchmark: Benchmark, root: Path, split: str) -> tuple[Items, ImageLabels]:
    lists = root / "ImageSets" / "Segmentation"
    listed = read_text(_of_split(lists, "", split, ".txt")).splitlines()
    names = [nfc(line.strip()) for line in listed if line.strip()]
    images = root / "JPEGImages"
    found: dict[str, Path] = {}
    for path in picture_files(images):
        name = nfc(path.relative_to(images).with_suffix("").as_posix())
        if name in found:
            raise DiffsegError(f"{found[name]} and {path} would both have the label {name}.png; move one away.")
        found[name] = path
    folder = root / "SegmentationClassPNG" if (root / "SegmentationClassPNG").is_dir() else root / "SegmentationClass"
    items = [(name, found.get(name, images / f"{name}.jpg"), _spelt(folder / f"{name}.png")) for name in names]
    colours: tuple[tuple[int, int, int], ...] = ()
    bare: dict[str, Path] = {}
    if (source := root / "labelmap.txt").is_file():
        lines = [line for line in read_text(source).splitlines() if line.strip() and not line.startswith("#")]
        parts = [re.fullmatch(r"(.+?):(\d+),(\d+),(\d+)(:.*)?", line.strip()) for line in lines]
        for line, part in zip(lines, parts, strict=True):
            if part is None:
                raise DiffsegError(f"{source} holds the line {line!r}; write name:R,G,B:: as CVAT does.")
        classes = [part[1].strip() for part in parts]
        colours = tuple((int(part[2]), int(part[3]), int(part[4])) for part in parts)
        if len(set(colours)) < len(colours):
            colour, _ = Counter(colours).most_common(1)[0]
            raise DiffsegError(f"{source} gives the colour {colour} to two names; give each its own, and export again.")
        bare = {name: image for name, image, label in items if name in found and not label.is_file()}
        if len(bare) == len(items):
            bare = {}  # none at all is another folder
        elif bare:
            print(f"{len(bare)} of {len(items)} images of the split {split} have no label image: all background")
    elif (source := root / "class_names.txt").is_file():
        classes = [line.strip() for line in read_text(source).splitlines() if line.strip()]
    else:
        source, classes = root, list(benchmark.classes)
    labels = ImageLabels(class_ids(classes, benchmark, source), benchmark.ignore, colours, bare)
    some = [path for *_, path in items[:: max(1, len(items) // 8)][:8] if path.is_file()]
    values = np.unique([value for path in some for value in _values(path)])
    if some and values.tolist() == [0, 255]:
        raise DiffsegError(
            f"the label images in {folder} hold 0 and 255 only, and 255 means ignored pixels; "
            "write a class as its number, 1 for the first."
        )
    return items, labels


def _spelt(path: Path) -> Path:
    """Return a file's path as the disk spells it: an "é" is one character or two (macOS), .png may be .PNG."""
    names = path.name, path.with_suffix(path.suffix.upper()).name
    forms = [path.with_name(unicodedata.normalize(form, name)) for name in names for form in ("NFC", "NFD")]
    return next((each for each in forms if each.is_file()), path)


def _values(path: Path) -> np.ndarray:
    """The values of a label image of one channel; none of a coloured one."""
    picture = decode(path)
    return np.unique(picture) if picture.mode in ("P", "L") else np.array([], np.uint8)


def _of_split(folder: Path, before: str, split: str, after: str) -> Path:
    """Return the file `<folder>/<before><split><after>`; where it is missing, name the splits that are there."""
    path = folder / f"{before}{split}{after}"
    if not path.is_file():
        there = sorted(p.name.removeprefix(before).removesuffix(after) for p in folder.glob(f"{before}*{after}"))
        remedy = (
            "Set evaluation_split (scored images) or training_split (real images to train on) to one of them."
            if there
            else "Write it: the names of its images without suffix, one a line."
            if after == ".txt"
            else "Give the export's file that name."
        )
        raise DiffsegError(f"{path} is missing; the splits there are: {', '.join(there) or 'none'}. {remedy}")
    return path


# COCO's layout


@dataclass(frozen=True)
class CocoLabels:
    """Draws the label of an image from its annotations.

    Polygons, RLE and crowds count as their category. A pixel of two classes is ignored, as torchvision's reference for
    semantic segmentation on COCO does.
    """

    coco: object  # pycocotools.coco.COCO
    images: dict[str, tuple[int, int, int]]  # name -> id, height, width
    ids: dict[int, int]  # category id -> class id
    ignore: int

    def __call__(self, name: str, path: Path) -> np.ndarray:
        image, height, width = self.images[name]
        label = np.zeros((height, width), np.int64)
        for annotation in self.coco.imgToAnns[image]:
            number, shape = self.ids[annotation["category_id"]], annotation.get("segmentation")
            if number and not shape:
                raise DiffsegError(
                    f"annotation {annotation['id']} of {path} has no segmentation (a box only); export polygons or "
                    "masks, or map its category to background in data_names."
                )
            if number:
                try:
                    if isinstance(shape, list) and min(map(len, shape)) < 6:  # pycocotools takes four for a box
                        raise ValueError("a polygon has fewer than three corners")
                    mask = self.coco.annToMask(annotation) > 0
                    if mask.shape != label.shape:
                        raise ValueError(f"it is {mask.shape[0]} x {mask.shape[1]}, its image {label.shape}")
                except Exception as error:  # pycocotools raises Exception itself
                    raise DiffsegError(
                        f"the segmentation of annotation {annotation['id']} of {path} cannot be drawn ({error}); "
                        "export it again."
                    ) from None
                label[mask] = np.where(np.isin(label[mask], (0, number)), number, self.ignore)
        return label


def _coco_layout(benchmark: Benchmark, root: Path, split: str) -> tuple[Items, CocoLabels]:
    path = _of_split(root / "annotations", "instances_", split, ".json")
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise DiffsegError(f"{path} is read by pycocotools, which is not installed; pip install pycocotools.") from None
    coco = COCO()
    try:
        coco.dataset = json.loads(read_text(path))
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            coco.createIndex()
        keys = ("id", "file_name", "height", "width")
        listed = [tuple(image[key] for key in keys) for image in coco.dataset["images"]]
        annotations = coco.dataset["annotations"]  # coco.anns has one of each id
        if len({number for number, *_ in listed}) < len(listed) or not isinstance(annotations, list):
            raise ValueError("two images have one id, or there is no list of annotations")
        if not all(isinstance(length, int) for *_, height, width in listed for length in (height, width)):
            raise ValueError("an image has no size")
        names = {number: category["name"] for number, category in coco.cats.items()}
        if not all(isinstance(name, str) for name in (*names.values(), *(file for _, file, *_ in listed))):
            raise ValueError("the name of an image or category is no text")
        used = {annotation["category_id"] for annotation in annotations}
        if lost := {annotation["image_id"] for annotation in annotations} - {number for number, *_ in listed}:
            raise ValueError(f"annotations are of the image {lost.pop()!r}, which is not listed")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiffsegError(f"{path} is no COCO JSON of instances ({error!r}); export it again.") from None
    if not used <= names.keys():
        raise DiffsegError(
            f"{path} uses the category {min(used - names.keys(), key=str)}, which it does not list; add it."
        )
    ids = dict(zip(names, class_ids(list(names.values()), benchmark, path).tolist(), strict=True))
    folders = [root / "images" / split, root / "images", root / split]
    items, images = [], {}
    for number, file, height, width in listed:
        places = [_spelt(folder / file) for folder in folders]
        name = PurePosixPath(file).with_suffix("").as_posix()
        items.append((name, next((place for place in places if place.is_file()), places[0]), path))
        images[name] = number, height, width
    return items, CocoLabels(coco, images, ids, benchmark.ignore)
