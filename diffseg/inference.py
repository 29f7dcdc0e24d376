"""Use a trained network on any picture."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize, to_image

from diffseg.pictures import read_picture
from diffseg.segmenters import load_segmenter


@torch.inference_mode()
def predict(
    network: torch.nn.Module | str | os.PathLike, picture: Image.Image | str | os.PathLike, side: int = 0
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the label map (int64 H x W, the picture's own size) and the class names; names[id] is a pixel's class.

    network: what `load_segmenter` returns, or the folder of its model.safetensors and config.json. picture: a PIL
    image or a file, of any size, read as `read_picture` does. side: the picture is scaled so that its shorter side has
    that many pixels, before the network sees it; 0: its own size. A network knows objects at the size at which it was
    trained: give the side of its training pictures (mini: 64) for a photograph. Raises DiffsegError for what cannot be
    read.
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
