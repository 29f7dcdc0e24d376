"""Segmentation networks by name, saved as safetensors with a small config beside them."""

import json
from collections.abc import Sequence
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffseg.errors import DiffsegError
from diffseg.files import atomic_path

# Name -> (architecture, encoder, options) of segmentation-models-pytorch.
SEGMENTERS = {
    # half the usual decoder: a third of the computation at 64 pixels, where a CPU trains it in minutes
    "unet-resnet18": ("unet", "resnet18", {"decoder_channels": (128, 64, 32, 32, 16)}),
    "fpn-resnet18": ("fpn", "resnet18", {}),
    "deeplabv3plus-resnet18": ("deeplabv3plus", "resnet18", {}),
    "deeplabv3plus-resnet50": ("deeplabv3plus", "resnet50", {}),
    "deeplabv3plus-resnet101": ("deeplabv3plus", "resnet101", {}),
    "segformer-b0": ("segformer", "mit_b0", {}),
    "segformer-b2": ("segformer", "mit_b2", {}),
}


class Segmenter(nn.Module):
    """A network from pictures (float B x 3 x H x W, 0..1) to logits (B x classes x H x W).

    Normalisation and padding to a multiple of 32 happen inside, so a saved network needs no further knowledge.
    """

    def __init__(self, name: str, classes: Sequence[str], encoder_weights: str | None = None):
        super().__init__()
        if name not in SEGMENTERS:
            raise DiffsegError(f"there is no segmenter {name!r}; choose one of {', '.join(SEGMENTERS)}")
        architecture, encoder, options = SEGMENTERS[name]
        self.name, self.classes = name, tuple(classes)
        self.network = smp.create_model(
            architecture, encoder, encoder_weights=encoder_weights, classes=len(self.classes), **options
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        image = (image - self.mean) / self.std
        padded = nn.functional.pad(image, (0, -width % 32, 0, -height % 32), mode="replicate")
        return self.network(padded)[..., :height, :width]


def save_segmenter(segmenter: Segmenter, folder: Path) -> None:
    """Write model.safetensors (contiguous float32) and config.json to `folder`."""
    weights = {key: value.contiguous() for key, value in segmenter.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as path:
        save_file(weights, path)
    with atomic_path(folder / "config.json") as path:
        path.write_text(json.dumps({"name": segmenter.name, "classes": segmenter.classes}, indent=1))


def load_segmenter(folder: Path) -> Segmenter:
    """Read a network that `save_segmenter` wrote, in evaluation mode."""
    try:
        config = json.loads((folder / "config.json").read_text())
        segmenter = Segmenter(config["name"], config["classes"])
        segmenter.load_state_dict(load_file(folder / "model.safetensors"))
    except DiffsegError:
        raise
    except Exception as error:  # missing, truncated or foreign files come as many kinds of exception
        raise DiffsegError(f"{folder} holds no usable segmenter ({error}); train it again") from error
    return segmenter.eval()
