"""The target domain: its images, the captions they get, and how far drawn images are from them."""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from diffseg.errors import DiffsegError
from diffseg.files import METADATA
from diffseg.pictures import picture_files, read_picture, read_text
from diffseg.seeds import derive_seed
from diffseg.words import nfc, with_article


def find_pictures(folder: str | Path) -> list[Path]:
    """Return all images below a folder, sorted by path, after decoding each one; hidden files are passed over.

    Raises a DiffsegError for an absent or empty folder, a name that is not UTF-8, and what `read_picture` refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DiffsegError(f"there is no folder {folder}; give a folder of target images (JPEG or PNG).")
    paths = picture_files(folder)
    if not paths:
        raise DiffsegError(f"{folder} holds no image; put the target domain's images there.")
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock
        sizes = pool.map(lambda path: read_picture(path).size, paths)
        for _ in tqdm(sizes, "checking images", len(paths), leave=False):
            pass
    return paths


def hold_out(paths: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Split images at random into those to tune on and the `share` (0 to below 1) that is held out.

    The held-out images tell whether the others are memorised. Both lists stay in the order of `paths`.
    Raises a DiffsegError for a share out of range, and where those that generated images are compared with (held out,
    or without these all) are fewer than the two that a distance between sets needs.
    """
    if not 0 <= share < 1:
        raise DiffsegError(f"lora_held_out must be at least 0 and below 1, not {share}.")
    count = round(share * len(paths))
    if (count or len(paths)) < 2:
        raise DiffsegError(
            f"lora_held_out={share} holds out {count} of {len(paths)} target images, but a distance to images needs "
            "two; give more of them in target_images, or hold out none or two."
        )
    order = np.random.default_rng(derive_seed(seed, "lora", "held out")).permutation(len(paths))
    kept = set(order[:count].tolist())
    return [p for k, p in enumerate(paths) if k not in kept], [p for k, p in enumerate(paths) if k in kept]


def build_captions(templates: Sequence[str], words: Sequence[str] = ()) -> list[str]:
    """Return the captions (NFC): each template with `{}` once for each word, with its article; others as they are.

    The words are those of things known or guessed to be in the images; nothing says which are in which.
    Raises a DiffsegError when there is no caption or a template has no word to take.
    """
    captions = []
    for template in templates:
        if "{}" in template and not words:
            raise DiffsegError(f"the caption {template!r} needs words in place of {{}}; give lora_words.")
        captions += [template.replace("{}", with_article(word)) for word in words] if "{}" in template else [template]
    if not captions:
        raise DiffsegError("lora_captions is empty; give at least one that says what the images show.")
    return list(dict.fromkeys(map(nfc, captions)))


def own_captions(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the captions (NFC) that images have of their own; an image without one is left out.

    A caption stands in METADATA beside the image or in a folder above, as a line {"file_name": ..., "text": ...} with
    the path from there; or in a text file with the image's name (1.txt for 1.png). Raises a DiffsegError that names
    file and line for a line that is none, an empty text, one without a letter (labels of another tool), a file_name
    without its file, a file that is not UTF-8, and two different captions of one image.
    """
    found: dict[str, tuple[str, str]] = {}  # image -> its caption, and where that stands
    pictures = {_same_path(path): path for path in paths}
    places = sorted({folder / METADATA for path in paths for folder in path.parents})
    entries = [entry for place in places if place.is_file() for entry in _read_metadata(place, pictures.keys())]
    for name, path in pictures.items():
        if (beside := path.with_suffix(".txt")).is_file():
            entries.append((name, read_text(beside), f"{beside}, line 1"))
    for name, text, where in entries:
        text = nfc(" ".join(text.split()))
        if not text:
            raise DiffsegError(f"{where}: the text is empty; write what {name} shows, or remove it.")
        if not any(letter.isalpha() for letter in text):
            raise DiffsegError(f"{where}: {text[:40]!r} is no caption; write what {name} shows, or move labels away.")
        first, there = found.setdefault(name, (text, where))
        if text != first:
            raise DiffsegError(f"{where}: {name} has another caption in {there}; keep one of the two.")
    return {path: found[name][0] for name, path in pictures.items() if name in found}


def _same_path(path: Path) -> str:
    return nfc(os.path.abspath(path))  # "sub/../1.png" is "1.png", and "é" is "é", however it was typed


def _read_metadata(metadata: Path, pictures: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (the image's `_same_path`, text, file and line) of each line that is not empty."""
    for number, line in enumerate(read_text(metadata).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            entry = json.loads(line)
            file, text = metadata.parent / entry["file_name"], entry["text"].strip()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DiffsegError(f'{where}: give {{"file_name": "1.png", "text": "a street"}}.') from None
        if _same_path(file) not in pictures and not file.is_file():  # it may name one that is held out
            raise DiffsegError(f"{where}: there is no image {file}; correct the file_name, or remove the line.")
        yield _same_path(file), text, where


def fit(picture: Image.Image, height: int, width: int, where: float = 0.5) -> Image.Image:
    """Scale an image to cover height x width and cut off the rest; `where` (0..1) is the place kept."""
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = round(where * (size[0] - width)), round(where * (size[1] - height))
    return picture.crop((left, top, left + width, top + height))


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Return float32 3 x H x W in -1..1, as the VAE reads images."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


class Draws(Dataset):
    """Item n is all that the n-th image of the training depends on; a pure function of (seed, n).

    An image has its own caption (`own_captions`), or one of `captions`, sampled at random.
    pixels: float32 3 x H x W in -1..1; caption; timestep; noise and posterior_noise: float32, of the latent's
    shape. Images come in shuffled rounds, so all are seen equally often.
    """

    def __init__(
        self,
        pipeline,
        paths: Sequence[Path],
        captions: Sequence[str],
        height: int,
        width: int,
        caption_dropout: float,
        seed: int,
    ):
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise DiffsegError(
                f"tuning needs a scheduler of numbered noise levels, and the generator's is "
                f"{type(pipeline.scheduler).__name__}; train a LoRA for it elsewhere and give its file as "
                "generator_lora, with target_images empty."
            )
        factor = pipeline.vae_scale_factor
        self.latent = (pipeline.unet.config.in_channels, height // factor, width // factor)
        self.timesteps = len(pipeline.scheduler.alphas_cumprod)
        self.paths, self.captions, self.size = list(paths), list(captions), (height, width)
        self.caption_dropout, self.seed = caption_dropout, seed
        self.own = own_captions(self.paths)

    def __getitem__(self, n: int) -> dict:
        rounds, place = divmod(n, len(self.paths))
        order = np.random.default_rng(derive_seed(self.seed, "lora", "order", rounds))
        path = self.paths[order.permutation(len(self.paths))[place]]
        rng = np.random.default_rng(derive_seed(self.seed, "lora", "draw", n))
        picture = fit(read_picture(path), *self.size, rng.random())
        by_lot = self.captions[rng.integers(len(self.captions))]
        caption = self.own.get(path, by_lot)
        return {
            "pixels": to_tensor(picture),
            "caption": "" if rng.random() < self.caption_dropout else caption,
            "timestep": int(rng.integers(self.timesteps)),
            "noise": torch.from_numpy(rng.standard_normal(self.latent, np.float32)),
            "posterior_noise": torch.from_numpy(rng.standard_normal(self.latent, np.float32)),
        }


@torch.no_grad()
def latent_features(pipeline, pictures: Sequence[Image.Image], grid: int = 4) -> torch.Tensor:
    """Describe images of one size by their VAE latents: mean and spread in each cell of a raster.

    Returns float32 N x (2 * channels * grid * grid). Our choice: a description of layout, colour and texture
    that needs no other network than the generator's own.
    """
    rows = []
    for picture in pictures:
        pixels = to_tensor(picture)[None].to(pipeline.vae.device, pipeline.vae.dtype)
        latent = pipeline.vae.encode(pixels).latent_dist.mean.float() * pipeline.vae.config.scaling_factor
        mean = F.adaptive_avg_pool2d(latent, grid)
        spread = (F.adaptive_avg_pool2d(latent**2, grid) - mean**2).clamp(min=0).sqrt()
        rows.append(torch.cat([mean, spread], dim=1).flatten().cpu())
    return torch.stack(rows)


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy of two sets of features (N x D, M x D).

    Kernel (x . y / D + 1)^3, as in the kernel inception distance (Binkowski et al. 2018). 0 is expected for
    two samples of one distribution, so small negative values occur. Raises a DiffsegError for less than two.
    """
    if min(len(a), len(b)) < 2:
        raise DiffsegError("a distance between sets of images needs at least two images in each.")

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    def within(x: torch.Tensor) -> torch.Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()
