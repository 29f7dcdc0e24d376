"""The mini benchmarks on disk, in the official layouts, so that the same readers serve mini and real data."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffseg.benchmarks.classes import CITYSCAPES, MINI_IMAGENET_S, VOC
from diffseg.benchmarks.labels import write_label
from diffseg.errors import DiffsegError
from diffseg.files import temporary_beside
from diffseg.miniworld.cityscapes import write_cityscapes
from diffseg.miniworld.imagenet_s import write_imagenet_s
from diffseg.miniworld.scenes import Scene, sample_scene
from diffseg.paths import project_root
from diffseg.seeds import derive_seed

# The benchmarks are fixed things: their seed and size are no parameters. Change the name when one of them changes.
# "dev" is drawn as the validation split is, from a seed of its own: whatever is chosen is chosen there.
MINI_BENCHMARKS = {
    "version": 4,
    "seed": 0,
    "voc": {"train": 2000, "val": 600, "dev": 600},
    "imagenet-s": {"train-semi": 960, "validation": 768, "dev": 768},  # ten, eight and eight of each of 96 classes
    "cityscapes": {"train": 800, "val": 400, "dev": 400},
}


def mini_data() -> Path:
    """Return the root folder of the mini benchmarks, results/data/mini-VERSION, which is written on first use.

    Raises a DiffsegError when it cannot be written.
    """
    root = project_root() / "results" / "data" / f"mini-{MINI_BENCHMARKS['version']}"
    if not is_whole(root):
        write_benchmarks(root)
    return root


def is_whole(root: Path) -> bool:
    return (root / "world.json").is_file()


def write_benchmarks(root: Path, sizes: dict = MINI_BENCHMARKS) -> None:
    """Write all mini benchmarks beside `root` and rename the folder at the end, so that it is whole or absent.

    A `root` without world.json, as an interrupted copy leaves it, is replaced.

    sizes: "version", "seed", and for each benchmark to be written its pictures per split (see `MINI_BENCHMARKS`).
    """
    temporary, broken = temporary_beside(root), temporary_beside(root)
    try:
        for name, (folder, write) in WRITERS.items():
            if name in sizes:
                write(temporary / folder, sizes[name], sizes["seed"])
        (temporary / "world.json").write_text(json.dumps(sizes, indent=1))
        if not is_whole(root):  # another process may have been faster
            with contextlib.suppress(FileNotFoundError):
                root.rename(broken)  # a copy that was interrupted; to remove it in place would take too long
            temporary.rename(root)
    except OSError as error:
        if not is_whole(root):  # else another process was faster, after all
            raise DiffsegError(f"the mini world cannot be written to {root} ({error}); free space there") from error
    finally:
        for folder in (temporary, broken):
            shutil.rmtree(folder, ignore_errors=True)


def voc_scene(seed: int, split: str, index: int) -> Scene:
    """Return one scene of mini VOC: every class, and every picture of a class, as often as any other."""
    rng = np.random.default_rng(derive_seed(seed, "voc", split, index))
    return sample_scene(rng, even=True, classes_only=True)


def write_voc(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write mini VOC: JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val,dev}.txt."""
    class_ids = {name: k for k, name in enumerate(VOC.classes)}
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for split, size in sizes.items():
        names = [f"{split}_{k:06d}" for k in range(size)]
        for k, name in enumerate(tqdm(names, f"drawing mini VOC {split}", unit="scene")):
            scene = voc_scene(seed, split, k)
            # no chroma subsampling: at 64 pixels it would smear colours over a tenth of an object
            Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
            write_label(folder / "SegmentationClass" / f"{name}.png", scene.label(class_ids), VOC)
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")


WRITERS = {
    "voc": (VOC.folder, write_voc),
    "imagenet-s": (MINI_IMAGENET_S.folder, write_imagenet_s),
    "cityscapes": (CITYSCAPES.folder, write_cityscapes),
}
