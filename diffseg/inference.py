"""Use a trained network on any image, or on files and folders of images."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize, to_image
from tqdm import tqdm

from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.evaluation import best_class
from diffseg.benchmarks.labels import picture_coding, write_label
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path, whole_folder, write_rows
from diffseg.pictures import check_name, picture_files, read_picture
from diffseg.segmenters import hex_colours, load_segmenter

MASKS, OVERLAYS, AREAS, FAILED = "masks", "overlays", "areas.csv", "failed.csv"
JPEG_QUALITY = 95  # of overlays; our choice
JPEG_LIMIT = 65500  # pixels of a side, of Pillow's encoder


@dataclass
class View:
    """An image (uint8 3 x H x W) and what a network sees of it (float32 3 x h x w, 0..1; shorter side `side`)."""

    name: str
    image: torch.Tensor
    side: int

    def __post_init__(self) -> None:
        image = self.image.float() / 255
        self.seen = resize(image, [self.side], antialias=True) if self.side else image


def predict(
    network: torch.nn.Module | str | os.PathLike,
    picture: Image.Image | str | os.PathLike,
    side: int | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the label map (int64 H x W, the image's own size) and the class names; names[id] is a pixel's class.

    network: what `load_segmenter` returns, or the folder or hub id that it takes. picture: a PIL image or a file, of
    any size, read as `read_picture` does. side: the image is scaled so that its shorter side has that many pixels,
    before the network sees it; None: as in its training, which is saved with the network, since it knows objects at
    that size; 0: the image's own size. Raises a DiffsegError for what cannot be read.
    """
    if not isinstance(network, torch.nn.Module):
        network = load_segmenter(network)
    view = View("", to_image(read_picture(picture)), network.side if side is None else side)
    return label_maps(network, [view])[0], tuple(network.classes)


def predict_files(
    network: torch.nn.Module, places: Sequence[Path], folder: Path, side: int | None = None, batch_size: int = 8
) -> int:
    """Predict image files, and all images below folders; return how many there are.

    Written to `folder` are MASKS/<name>.png (palette PNG, a pixel is its class id; beyond 255 classes R + 256 * G),
    OVERLAYS/<name>.jpg (.png beyond JPEG_LIMIT), and AREAS with a row for each class in an image: its pixels and their
    share (0..1). The name is the path below a given folder, or the file's name, without its suffix. side: as in
    `predict`. batch_size: neighbours that have one size for the network are predicted together. What is interrupted
    leaves none of its files.

    Raises a DiffsegError before it begins where there is no image, two have one name, `folder` holds one of these
    files or folders already, or the network does not say at which side it was trained; and one in the end where some
    could not be read: FAILED has the reasons.
    """
    from diffseg.figures import overlay  # here: `predict` need not wait for matplotlib

    if batch_size < 1 or (side or 0) < 0:
        raise DiffsegError(f"batch is {batch_size} and side {side}; give a batch from 1 and a side from 0 on.")
    if side is None and not network.side:
        raise DiffsegError(
            "the network's config.json does not say at which side it was trained (diffseg 0.3.0 did not save it); give "
            "--side, for mini --side 64, or --side 0 for the images' own size."
        )
    if there := [name for name in (MASKS, OVERLAYS, AREAS, FAILED) if (folder / name).exists()]:
        raise DiffsegError(
            f"{folder} holds {', '.join(there)} already, of another prediction or your own; give another --out, or "
            "remove them first."
        )
    pictures, failed, areas = find_pictures(places), [], []
    coding = picture_coding(replace(VOC, classes=network.classes, palette=network.palette))
    colours = dict(enumerate(hex_colours(network.palette)))
    side = network.side if side is None else side
    views = readable(tqdm(pictures.items(), "predicting", unit="picture"), side, failed)
    with whole_folder(folder) as made:
        for batch in batches(views, batch_size):
            for view, label in zip(batch, label_maps(network, batch), strict=True):
                write_label(made / MASKS / f"{view.name}.png", label, coding)
                suffix = "jpg" if max(label.shape) <= JPEG_LIMIT else "png"
                with atomic_path(made / OVERLAYS / f"{view.name}.{suffix}") as path:
                    laid_over = overlay(view.image, label, colours)
                    Image.fromarray(laid_over).save(path, quality=JPEG_QUALITY, subsampling=0)
                pixels = np.bincount(label.ravel())
                for k in pixels.nonzero()[0]:
                    area = {"pixels": pixels[k], "share": f"{pixels[k] / label.size:.6f}"}
                    areas.append({"picture": view.name, "class": network.classes[k], **area})
        write_rows(made / AREAS, areas, ["picture", "class", "pixels", "share"])
        write_rows(made / FAILED, failed, ["picture", "reason"])
    if failed:
        raise DiffsegError(
            f"{len(failed)} of {len(pictures)} images could not be read, the others are done; see {folder / FAILED}, "
            f"the first: {failed[0]['reason']}"
        )
    return len(pictures)


@torch.inference_mode()
def label_maps(network: torch.nn.Module, views: Sequence[View]) -> list[np.ndarray]:
    """Return the label maps (int64, each of its image's size) of views of one size."""
    device = next(network.parameters()).device
    logits = network(torch.stack([view.seen for view in views]).to(device)).float()
    return [
        best_class(own[None], view.image.shape[1:])[0].cpu().numpy() for own, view in zip(logits, views, strict=True)
    ]


def find_pictures(places: Sequence[Path]) -> dict[str, Path]:
    """Return name -> image file, sorted within each place; earlier predictions below a folder are passed over.

    Raises a DiffsegError for a place that is not there, for none at all, for two images of one name, and for a name
    that is not UTF-8, which no table could hold.
    """
    found: dict[str, Path] = {}
    for place in places:
        if not place.exists():
            raise DiffsegError(f"there is no image or folder {place}; check the path.")
        for path in picture_files(place) if place.is_dir() else [place]:
            if place.is_dir() and is_predicted(path):
                continue
            name = (path.relative_to(place) if place.is_dir() else Path(path.name)).with_suffix("").as_posix()
            check_name(Path(name))
            if name in found:
                raise DiffsegError(f"{found[name]} and {path} would both become {name}.png; predict them apart.")
            found[name] = path
    if not found:
        raise DiffsegError(f"there is no image in {', '.join(map(str, places))}; give JPEG or PNG files.")
    return found


def is_predicted(path: Path) -> bool:
    """Return whether an image lies in the MASKS or OVERLAYS of a prediction, which has AREAS beside them."""
    folders = [above.parent for above in path.absolute().parents if above.name in (MASKS, OVERLAYS)]
    return any((folder / AREAS).is_file() for folder in folders)


def readable(pictures: Iterable[tuple[str, Path]], side: int, failed: list[dict[str, str]]) -> Iterator[View]:
    """Yield the images that can be read, and add to `failed` those that cannot, with the reason."""
    for name, path in pictures:
        try:
            yield View(name, to_image(read_picture(path)), side)
        except DiffsegError as error:
            failed.append({"picture": str(path), "reason": str(error)})


def batches(views: Iterable[View], size: int) -> Iterator[list[View]]:
    """Yield lists of up to `size` neighbours whose `seen` have one size."""
    batch: list[View] = []
    for view in views:
        if batch and (len(batch) == size or batch[0].seen.shape != view.seen.shape):
            yield batch
            batch = []
        batch.append(view)
    if batch:
        yield batch
