"""Mini ImageNet-S: every picture of the mini world is a class of its own, one object a scene.

ImageNet-S has fine-grained classes in pictures of one thing each, so here "taxi" and "police car" are two classes,
where mini VOC knows cars only. Tree and coding are the official ones. A class's tag is its word with underscores
("police_car"), where ImageNet has WordNet's numbers.

python -m diffseg.miniworld.imagenet_s # writes the class list and the word table from art/pictures.csv
"""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffseg.benchmarks.classes import get_benchmark
from diffseg.benchmarks.labels import write_label
from diffseg.files import atomic_path
from diffseg.miniworld.scenes import PLACES, Picture, Scene, draw_scene, load_pictures
from diffseg.seeds import derive_seed
from diffseg.words import DATA, Word, write_words

NAME = "mini-imagenet-s"


def tag_of(picture: Picture) -> str:
    """Return the name of a picture's class, which is also its folder's: "police_car"."""
    return picture.word.replace(" ", "_")


def imagenet_s_scene(seed: int, split: str, index: int) -> tuple[str, Scene]:
    """Return (tag, scene) of a split's picture; the classes come in turn, so all are equally often there."""
    tags = get_benchmark(NAME).foreground
    tag = tags[index % len(tags)]
    [picture] = [picture for picture in load_pictures() if tag_of(picture) == tag]
    rng = np.random.default_rng(derive_seed(seed, "imagenet-s", split, index))
    place = list(PLACES)[rng.integers(len(PLACES))]
    return tag, draw_scene(rng, [picture], [picture.word], place)


def write_imagenet_s(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write `<split>/<tag>/<split>_<index>.JPEG` and `<split>-segmentation/<tag>/<split>_<index>.png`.

    sizes: pictures of each split, "train-semi", "validation" and "dev". Masks are coded R + 256 * G, 0 for the
    background; no pixel is ignored, as every mask is exact.
    """
    benchmark = get_benchmark(NAME)
    for split, size in sizes.items():
        for k in tqdm(range(size), f"drawing mini ImageNet-S {split}", unit="scene"):
            tag, scene = imagenet_s_scene(seed, split, k)
            name = f"{tag}/{split}_{k:06d}"
            label = np.where(scene.instances > 0, benchmark.classes.index(tag), 0)
            write_label(folder / f"{split}-segmentation" / f"{name}.png", label, benchmark)
            path = folder / split / f"{name}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.image).save(path, quality=95, subsampling=0)


def class_words() -> list[Word]:
    """Return the classes' word table: each picture's own word and its synonyms, no hyponyms."""
    rows = []
    for picture in sorted(load_pictures(), key=tag_of):
        rows.append(Word(tag_of(picture), "", picture.word, "plain"))
        rows += [Word(tag_of(picture), "", word, "synonym") for word in picture.synonyms]
    return rows


if __name__ == "__main__":
    with atomic_path(DATA / "imagenet_s_mini.txt") as path:
        path.write_text("".join(f"{tag}\n" for tag in sorted(map(tag_of, load_pictures()))), "utf-8")
    write_words(DATA / f"words_{NAME}.csv", class_words())
