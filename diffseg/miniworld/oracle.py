"""The oracle: a segmenter trained on ground-truth masks of the mini world; a diagnostic, no part of the method.

Its classes are the emoji themselves, so one network answers three questions: which emoji is where, which VOC
class is where (the probabilities of its emoji summed), and where is any object at all. It is trained by
`diffseg.experiments.oracle`.
"""

import json
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from torch import nn

from diffseg.benchmarks.classes import VOC, Benchmark
from diffseg.errors import DiffsegError
from diffseg.miniworld import WEIGHTS
from diffseg.miniworld.scenes import load_pictures
from diffseg.words import load_words

PICTURES = load_pictures()


PICTURE_NAMES = ("background", *(picture.word for picture in PICTURES))


CLASS_IDS = {name: k for k, name in enumerate(VOC.classes)}


def classes_of_pictures(benchmark: Benchmark) -> torch.Tensor:
    """Return the class id of each of PICTURE_NAMES by the benchmark's table of words, int64; 0 for what it lacks.

    Raises a DiffsegError for a benchmark without a table, or without a background.
    """
    named = {word.word: word.class_name for word in load_words(benchmark.name) if word.keep}
    if benchmark.classes[0] != "background":
        raise DiffsegError(
            f"the oracle knows objects and background, and {benchmark.name} has no background; choose a benchmark that "
            "has one, such as cityscapes-things"
        )
    ids = (benchmark.classes.index(named[picture.word]) if picture.word in named else 0 for picture in PICTURES)
    return torch.tensor([0, *ids])


CLASS_OF_PICTURE = classes_of_pictures(VOC)


class Oracle(nn.Module):
    """A network from pictures (float B x 3 x H x W in 0..1, sides divisible by 16) to logits over PICTURE_NAMES.

    A ResNet-18 without its last stage, which would see 2 x 2 positions of a 64-pixel picture and holds three quarters
    of the weights, and a decoder back to every pixel.
    """

    def __init__(self):
        super().__init__()
        self.network = smp.create_model(
            "deeplabv3plus", "resnet18", encoder_weights=None, encoder_depth=4, classes=len(PICTURE_NAMES)
        )
        self.network.encoder.layer4 = nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(4 * image - 2)


def load_oracle(folder: Path = WEIGHTS / "oracle") -> Oracle:
    """Read the oracle in evaluation mode, float32. Raises a DiffsegError when there is none that fits."""
    oracle = Oracle()
    try:
        config = json.loads((folder / "config.json").read_text())
        oracle.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # missing, truncated or foreign files come as many kinds of exception
        raise DiffsegError(
            f"{folder} holds no usable oracle ({error}); restore the package's weights (git checkout, or reinstall)"
        ) from error
    if tuple(config["classes"]) != PICTURE_NAMES:
        raise DiffsegError(f"the oracle in {folder} knows other pictures than art/pictures.csv; train it again")
    return oracle.eval()


@torch.inference_mode()
def picture_probabilities(oracle: Oracle, images: torch.Tensor) -> torch.Tensor:
    """Return float32 B x (1 + pictures) x H x W, on the CPU, of pictures (uint8 B x 3 x H x W)."""
    device = next(oracle.parameters()).device
    return oracle(images.to(device).float() / 255).float().softmax(dim=1).cpu()


def class_probabilities(
    probabilities: torch.Tensor, ids: torch.Tensor = CLASS_OF_PICTURE, classes: int = VOC.num_classes
) -> torch.Tensor:
    """Sum the pictures' probabilities (B x (1 + pictures) x H x W) by class, of VOC by default: B x classes x H x W."""
    shape = (len(probabilities), classes, *probabilities.shape[2:])
    return probabilities.new_zeros(shape).index_add_(1, ids.to(probabilities.device), probabilities)


class ClassOracle(nn.Module):
    """The oracle as a network of a benchmark's classes: pictures (float B x 3 x H x W in 0..1) to logits B x C x H x W.

    Raises a DiffsegError for a benchmark without a table of words, or without a background.
    """

    def __init__(self, oracle: Oracle, benchmark: Benchmark = VOC):
        super().__init__()
        self.oracle, self.ids = oracle, classes_of_pictures(benchmark)
        self.name, self.classes = "the mini world's oracle", benchmark.classes

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return class_probabilities(self.oracle(image).float().softmax(dim=1), self.ids, len(self.classes)).log()


def main_picture(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the id (1..) of the picture that holds most of each image, int64 B: the classifier's answer."""
    return 1 + probabilities[:, 1:].sum(dim=(2, 3)).argmax(dim=1)
