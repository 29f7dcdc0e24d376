"""The three benchmarks: their classes and their folders. Nothing is downloaded: what is missing is named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torchvision

from diffseg.errors import DiffsegError
from diffseg.words import class_names

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

# The official table (name, labelId, trainId, colour), carried by torchvision; 19 of 35 labels are evaluated.
_EVALUATED = [row for row in torchvision.datasets.Cityscapes.classes if 0 <= row.train_id < 255]
_CITYSCAPES = sorted(_EVALUATED, key=lambda row: row.train_id)
_THINGS = [row for row in _CITYSCAPES if row.category in ("human", "vehicle")]
_STUFF = [row for row in _CITYSCAPES if row not in _THINGS]


def voc_palette(size: int) -> tuple[tuple[int, int, int], ...]:
    """Return the first `size` colours (R, G, B in 0..255) of PASCAL VOC's colour map, by its kit's rule.

    The id's bits go to R, G, B in turn, each channel filled from its highest bit; so colours beyond VOC's 21
    are distinct too, and 255, the ignore label, is VOC's cream (224, 224, 192).
    """
    palette = []
    for index in range(size):
        color = [0, 0, 0]
        for position in range(8):
            for channel in range(3):
                color[channel] |= ((index >> (3 * position + channel)) & 1) << (7 - position)
        palette.append(tuple(color))
    return tuple(palette)


# Images on which parameters are chosen, so that the evaluation split is not. The mini benchmarks have them, no
# official data set does; whoever holds images back lays them out as any other split, under this name.
DEVELOPMENT = "dev"


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark fixes, whatever method is evaluated on it.

    `classes[i]` is the name of id i, background first where the protocol has one. `protocol` ("voc",
    "imagenet-s", "cityscapes", "folder") settles the folder tree and how mIoU is counted; `coding` ("palette", "r256g",
    "labelids") how a label map is written as PNG. `training_split` has the real masks that a comparison trains on.
    `groups` are sets of ids that are also scored as one merged class. `label_ids` are, for "labelids", the
    labelIds that are read as each class; the first is written. `data_names` maps names of one's own data set to
    classes (see `diffseg.benchmarks.folder`).
    """

    name: str
    protocol: str
    coding: str
    classes: tuple[str, ...]
    ignore: int
    splits: tuple[str, ...]
    training_split: str
    evaluation_split: str
    palette: tuple[tuple[int, int, int], ...]
    source: str
    folder: str = ""
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    label_ids: tuple[tuple[int, ...], ...] = ()
    data_names: dict[str, str] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of ids that are scored, background included where the protocol has one."""
        return len(self.classes)

    @property
    def foreground(self) -> tuple[str, ...]:
        """The class names without background."""
        return tuple(name for name in self.classes if name != "background")


def imagenet_s(name: str, tags: Sequence[str], folder: str) -> Benchmark:
    """Return a benchmark in ImageNet-S's layout and coding, for any list of at most 999 tags (WordNet ids).

    Class id = 1 + rank of the tag in the sorted list; 0 is "other" (background), 1000 is ignored. The tags
    are the class names because ImageNet's English names are not unique ("crane", "cardigan").
    """
    if len(tags) > 999 or len(set(tags)) != len(tags):
        raise DiffsegError(f"{name} needs at most 999 different tags, because id 1000 means ignored in ImageNet-S.")
    classes = ("background", *sorted(tags))
    return Benchmark(
        name=name,
        protocol="imagenet-s",
        coding="r256g",
        classes=classes,
        ignore=1000,
        splits=("train-semi", "validation", DEVELOPMENT),
        training_split="train-semi",
        evaluation_split="validation",
        palette=voc_palette(len(classes)),
        source="ImageNet-S (github.com/LUSSeg/ImageNet-S, data preparation)",
        folder=folder,
    )


def _listed_imagenet_s(name: str, size: int | str) -> Benchmark:
    listed = Path(__file__).parents[1] / "data" / f"imagenet_s_{size}.txt"
    return imagenet_s(name, listed.read_text("utf-8").split(), f"ImageNetS{size}")


VOC = Benchmark(
    name="voc",
    protocol="voc",
    coding="palette",
    classes=VOC_CLASSES,
    ignore=255,
    splits=("train", "val", "trainval", "trainaug", DEVELOPMENT),
    training_split="train",
    evaluation_split="val",
    palette=voc_palette(len(VOC_CLASSES)),
    source="PASCAL VOC 2012 (host.robots.ox.ac.uk/pascal/VOC/voc2012, training/validation data)",
    folder="VOCdevkit/VOC2012",
)
CITYSCAPES = Benchmark(
    name="cityscapes",
    protocol="cityscapes",
    coding="labelids",
    classes=tuple(row.name for row in _CITYSCAPES),
    ignore=255,
    splits=("train", "val", DEVELOPMENT),
    training_split="train",
    evaluation_split="val",
    palette=tuple(row.color for row in _CITYSCAPES),
    source="Cityscapes (www.cityscapes-dataset.com, leftImg8bit_trainvaltest and gtFine_trainvaltest)",
    # DiffuMask's protocol; the same merged classes as the official "human" and "vehicle" categories.
    groups={"Human": (11, 12), "Vehicle": (13, 14, 15, 16, 17, 18)},
    label_ids=tuple((row.id,) for row in _CITYSCAPES),
)
# Its eight things, and the eleven evaluated kinds of stuff (road, sky, ...) as one background: what prompts and their
# masks can tell, as no prompt draws a sky. The things' IoU, Human and Vehicle are those of the official protocol,
# which counts the same pixels; the mIoU is another one. The background is written as "road", which is stuff.
CITYSCAPES_THINGS = replace(
    CITYSCAPES,
    name="cityscapes-things",
    classes=("background", *(row.name for row in _THINGS)),
    palette=((0, 0, 0), *(row.color for row in _THINGS)),
    groups={"Human": (1, 2), "Vehicle": (3, 4, 5, 6, 7, 8)},
    label_ids=(tuple(row.id for row in _STUFF), *((row.id,) for row in _THINGS)),
)
IMAGENET_S = [_listed_imagenet_s(f"imagenet-s-{size}", size) for size in (50, 300, 919)]
MINI_IMAGENET_S = _listed_imagenet_s("mini-imagenet-s", "mini")  # every emoji of the mini world is a class
BENCHMARKS = {b.name: b for b in (VOC, *IMAGENET_S, CITYSCAPES, CITYSCAPES_THINGS, MINI_IMAGENET_S)}
FOLDER = "folder"  # a labelled data set of one's own, with a class list
NAMES = (*BENCHMARKS, FOLDER)


def get_benchmark(name: str, class_list: Sequence[str] = (), data_names: Mapping[str, str] | None = None) -> Benchmark:
    """Return the benchmark of that name or, with a class list, one that is made of it: background and its words.

    One's own classes are coded as VOC's are (palette PNG, 255 = ignored), beyond 254 classes as ImageNet-S' (R + 256 *
    G, 1000 = ignored). They have no splits, as there is nothing to evaluate on, unless the name is "folder": then the
    data set's lists are its splits, and `data_names` maps its names of classes to words of the list where they differ.
    Raises a DiffsegError for a bad list, one of more than 999 classes, and an unknown benchmark.
    """
    if not class_list:
        if name == FOLDER:
            raise DiffsegError("The benchmark folder has no classes of its own: give class_list.")
        if name not in BENCHMARKS:
            raise DiffsegError(f"There is no benchmark {name!r}; the known ones are {', '.join(NAMES)}.")
        return BENCHMARKS[name]
    names = class_names(class_list)
    if len(names) > 999:
        raise DiffsegError(f"The class list has {len(names)} classes: give at most 999, as id 1000 means ignored.")
    classes = ("background", *names)
    in_palette = len(classes) <= 255
    is_folder = name == FOLDER
    return replace(
        VOC,
        name=FOLDER if is_folder else "own-words",
        protocol=FOLDER if is_folder else VOC.protocol,
        coding="palette" if in_palette else "r256g",
        classes=classes,
        ignore=255 if in_palette else 1000,
        splits=(),
        palette=voc_palette(len(classes)),
        source="a data set of one's own" if is_folder else "a class list of one's own",
        folder="",
        data_names=dict(data_names or {}),
    )
