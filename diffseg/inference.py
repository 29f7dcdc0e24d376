"""Use a trained network on any picture."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import resize, to_image

from diffseg.errors import DiffsegError
from diffseg.segmenters import load_segmenter


def read_picture(picture: Image.Image | str | os.PathLike) -> Image.Image:
    """Return a picture, or a file's, upright in 8-bit RGB.

    The camera's orientation (EXIF) is obeyed, transparency shows white, and modes of more than 8 bits (I, F) are
    scaled so that their largest value is white. Raises DiffsegError for a file that is missing or no picture.
    """
    if not isinstance(picture, Image.Image):
        try:
            with Image.open(picture) as file:
                file.load()
                picture = file
        except (OSError, ValueError, SyntaxError) as error:
            raise DiffsegError(f"{picture} cannot be read as a picture ({error}); give a JPEG or PNG file.") from error
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float64).clip(0)
        picture = Image.fromarray((255 * values / max(values.max(), 1e-9)).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


@torch.inference_mode()
def predict(
    network: torch.nn.Module | str | os.PathLike, picture: Image.Image | str | os.PathLike, side: int = 0
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the label map (int64 H x W, the picture's own size) and the class names; names[id] is a pixel's class.

    network: what `load_segmenter` returns, or the folder of its model.safetensors and config.json. picture: a PIL
    image of any size and mode, or a file. side: the picture is scaled so that its shorter side has that many pixels,
    before the network sees it; 0: its own size. A network knows objects at the size at which it was trained: give
    the side of its training pictures (mini: 64) for a photograph. Raises DiffsegError for what cannot be read.
    """
    if not isinstance(network, torch.nn.Module):
        network = load_segmenter(Path(network))
    image = to_image(read_picture(picture)).float() / 255
    size = image.shape[1:]
    if side:
        image = resize(image, [side], antialias=True)
    device = next(network.parameters()).device
    logits = network(image[None].to(device)).float()
    if side:
        logits = torch.nn.functional.interpolate(logits, size, mode="bilinear")
    return logits[0].argmax(dim=0).cpu().numpy(), tuple(network.classes)
