"""A synthetic set in the formats of other trainers: COCO, YOLO and Hugging Face. On disk it has VOC's layout already.

What becomes of it: images from which no mask could be cut are not in the set's list, and thus in no format. Ignored
pixels keep their value in the masks of Hugging Face; COCO and YOLO have no word for them, so they belong to no object
there, as the background does. The prompt goes to COCO and Hugging Face, the reliability to COCO as each object's mean.
"""

import importlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import yaml
from contourpy import FillType, contour_generator
from tqdm import tqdm

from diffseg.benchmarks.classes import Benchmark
from diffseg.benchmarks.labels import picture_coding
from diffseg.benchmarks.readers import pictures_set
from diffseg.errors import DiffsegError
from diffseg.files import read_rows, write_text

# column of the Hugging Face data set -> folder and suffix in the synthetic set
FILES = {"image": ("JPEGImages", ".jpg"), "mask": ("SegmentationClass", ".png"), "reliability": ("Reliability", ".png")}
ROWS = 1000  # images in a Parquet file: about 100 MB at 512 pixels; our choice
LICENCE = (
    "No person annotated these images. They are the output of the generator named above: its licence and terms of use "
    "decide what may be done with them, so read these before you publish the set. (The generator `mini` was trained on "
    "Twemoji's art, Copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0.)"
)


def write_coco(source: Path, benchmark: Benchmark, folder: Path, about: Mapping[str, str]) -> None:
    """Write images/ and annotations/instances_train.json, with run-length masks by pycocotools.

    One annotation holds all pixels of a class in an image, since masks do not tell objects of one class apart. Beside
    COCO's keys an image has `prompt`, and an annotation `reliability`, the mean margin of its pixels (0..1).
    """
    rle = optional("pycocotools.mask", "coco")
    numbers, images, annotations = numbers_of(benchmark, first=1), [], []
    for row, label, margin in labels(source, benchmark):
        (height, width), file = label.shape, copy_image(source, row["name"], folder / "images")
        image = {"id": len(images) + 1, "file_name": file, "width": width, "height": height}
        images.append(image | {"prompt": row["prompt"]})
        for k in np.unique(label):
            if k not in numbers:
                continue
            coded = rle.encode(np.asfortranarray(label == k, np.uint8))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": len(images),
                "category_id": numbers[k],
                "segmentation": {"size": coded["size"], "counts": coded["counts"].decode()},
                "area": int(rle.area(coded)),
                "bbox": rle.toBbox(coded).tolist(),
                "iscrowd": 0,
            }
            annotations.append(annotation | {"reliability": round(float(margin[label == k].mean()) / 255, 4)})
    content = {
        "info": {"description": "; ".join(f"{key}: {value}" for key, value in about.items())},
        "licenses": [{"id": 1, "name": LICENCE, "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": benchmark.classes[k], "supercategory": ""} for k, n in numbers.items()],
    }
    write_text(folder / "annotations" / "instances_train.json", json.dumps(content, ensure_ascii=False))


def write_yolo(source: Path, benchmark: Benchmark, folder: Path, about: Mapping[str, str]) -> None:
    """Write images/train/, labels/train/ (polygons) and data.yaml, as Ultralytics reads them for segmentation.

    A line holds one connected part of a class: its class, from 0 without the background, and its outline as x and y
    relative to width and height (`outlines`). Lost are prompt, reliability and ignored pixels; a trainer that rounds
    the corners to pixels or takes fewer of them loses up to a pixel along the edges.
    """
    numbers = numbers_of(benchmark, first=0)
    for row, label, _ in labels(source, benchmark):
        copy_image(source, row["name"], folder / "images" / "train")
        size, lines = np.array(label.shape[::-1]), []
        for k in np.unique(label):
            if k in numbers:
                for outline in outlines(label == k):
                    lines.append(" ".join([str(numbers[k]), *(f"{value:.6f}" for value in (outline / size).flat)]))
        write_text(folder / "labels" / "train" / f"{row['name']}.txt", "".join(f"{line}\n" for line in lines))
    listed = {"train": "images/train", "val": "images/train", "names": dict(enumerate(benchmark.foreground))}
    comments = [f"# {key}: {value}\n" for key, value in about.items()]
    comments.append("# val is the training set, since the format wants one: put labelled real images in its place\n")
    write_text(folder / "data.yaml", "".join(comments) + yaml.safe_dump(listed, allow_unicode=True, sort_keys=False))


def write_hf(source: Path, benchmark: Benchmark, folder: Path, about: Mapping[str, str]) -> None:
    """Write data/train-*.parquet and the card README.md, which `datasets.load_dataset(folder)` reads.

    Columns: image (the JPEG), mask (the PNG: a pixel is its class id, 255 ignored; beyond 255 classes R + 256 * G, 1000
    ignored), reliability (a PNG, margin 0..255), prompt, classes, words, seed. The names of the ids are those of the
    column `classes`.
    """
    datasets = optional("datasets", "hf")
    datasets.disable_progress_bars()
    image, text = datasets.Image(), datasets.Value("string")
    features = {"image": image, "mask": image, "reliability": image, "prompt": text, "words": [text]}
    features |= {"classes": [datasets.ClassLabel(names=list(benchmark.classes))], "seed": datasets.Value("int64")}
    index = read_rows(source / "index.csv")
    count = -(-len(index) // ROWS)
    (folder / "data").mkdir(parents=True)
    for part in tqdm(range(count), "writing Parquet", unit="file"):
        rows = []
        for row in index[part * ROWS : (part + 1) * ROWS]:
            files = {column: source / place / f"{row['name']}{suffix}" for column, (place, suffix) in FILES.items()}
            rows.append({column: {"bytes": path.read_bytes(), "path": path.name} for column, path in files.items()})
            rows[-1] |= {"prompt": row["prompt"], "seed": int(row["seed"])}
            rows[-1] |= {column: json.loads(row[column]) for column in ("words", "classes")}
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        table.to_parquet(folder / "data" / f"train-{part:05d}-of-{count:05d}.parquet")
    write_text(folder / "README.md", card(index, benchmark, about))


def card(index: Sequence[Mapping[str, str]], benchmark: Benchmark, about: Mapping[str, str]) -> str:
    """Return the data set's card: what made it, its licence, columns and counts."""
    counts = Counter(name for row in index for name in set(json.loads(row["classes"])))
    coding = picture_coding(benchmark)
    rule = "the class id" if coding.coding == "palette" else "the class id as R + 256 * G"
    head = {
        "pretty_name": "Synthetic images with pseudo-masks",
        "license": "other",
        "task_categories": ["image-segmentation"],
        "tags": ["synthetic", "pseudo-labels"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {head['pretty_name']}",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        f"- Images: {len(index)}",
        "",
        "The masks come from the generator's attention to the words of the prompt, not from an annotator. Some are "
        "wrong. `reliability` is, for each pixel, the difference of its two best scores (0 to 255).",
        "",
        f"A pixel of `mask` is {rule}; {coding.ignore} is ignored, 0 is {benchmark.classes[0]}. The names of the "
        "ids are `dataset.features['classes'].feature.names`.",
        "",
        f"**Licence.** {LICENCE}",
        "",
        "| class | images that name it |",
        "|:--|--:|",
        *(f"| {name} | {counts[name]} |" for name in benchmark.foreground),
    ]
    return "\n".join(lines) + "\n"


FORMATS = {"coco": write_coco, "yolo": write_yolo, "hf": write_hf}


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return the outline of each connected part of a mask (bool H x W) as float N x 2, in pixels (x, y).

    The corner of the upper left pixel is (0, 0). Corners lie midway between the centres of pixels inside and outside,
    so the centres inside an outline are the mask's pixels, exactly. A hole is a further ring of the same line, which
    returns to its start after each: the way there and back has no area, and by the even-odd rule the hole stays open.
    """
    padded = np.pad(mask, 1).astype(np.float32)  # an object at the edge of the image is closed, too
    found = []
    for part, starts in zip(*contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2), strict=True):
        outer, *holes = np.split(part - 0.5, starts[1:-1])
        found.append(np.concatenate([outer, *(ring for hole in holes for ring in (hole, outer[:1]))]))
    return found


def numbers_of(benchmark: Benchmark, first: int) -> dict[int, int]:
    """Return class id -> number in a format that knows objects only: from `first` on, without the background."""
    return {benchmark.classes.index(name): n for n, name in enumerate(benchmark.foreground, first)}


def labels(source: Path, benchmark: Benchmark) -> Iterator[tuple[dict[str, str], np.ndarray, np.ndarray]]:
    """Yield each image's row of index.csv, its label map (int64 H x W) and its margin (uint8 H x W), with a bar."""
    rows, made = {row["name"]: row for row in read_rows(source / "index.csv")}, pictures_set(source, benchmark)
    for k in tqdm(range(len(made)), "exporting", unit="image"):
        name, _, label, reliability = made[k]
        yield rows[name], label.numpy(), reliability[0].numpy()


def copy_image(source: Path, name: str, folder: Path) -> str:
    """Copy an image of the set into a folder, and return its file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(source / "JPEGImages" / f"{name}.jpg", folder / f"{name}.jpg")).name


def optional(module: str, extra: str) -> ModuleType:
    """Import a module of an extra; raise a DiffsegError that names the extra when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DiffsegError(f"{package} is not installed; run pip install 'diffseg[{extra}]'.") from error
