"""Segmentation networks by name, saved as safetensors with a small config beside them."""

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import ImageColor
from safetensors.torch import load_file, save_file
from torch import nn

from diffseg.benchmarks.classes import voc_palette
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path, write_text
from diffseg.paths import is_short_name, locate
from diffseg.seeds import derive_seed
from diffseg.weight_files import get_online

# Name -> (architecture, encoder, options) of segmentation-models-pytorch, but for "resunet", which is `ResUNet`.
SMP_SEGMENTERS = {
    # the mini world's, made for 64 pixels and a CPU (results/tables/networks.csv)
    "resunet-resnet10t": ("resunet", "tu-resnet10t", {"decoder_channels": (128, 64, 48)}),
    # half the usual decoder: a third of the computation at 64 pixels, where a CPU trains it in minutes
    "unet-resnet18": ("unet", "resnet18", {"decoder_channels": (128, 64, 32, 32, 16)}),
    "fpn-resnet18": ("fpn", "resnet18", {}),
    "deeplabv3plus-resnet18": ("deeplabv3plus", "resnet18", {}),
    "deeplabv3plus-resnet50": ("deeplabv3plus", "resnet50", {}),
    "deeplabv3plus-resnet101": ("deeplabv3plus", "resnet101", {}),
    "segformer-b0": ("segformer", "mit_b0", {}),
    "segformer-b2": ("segformer", "mit_b2", {}),
}
# Name -> (architecture, Swin backbone or None, options) of transformers; "tiny" is the published size, "mini" a CPU's.
# With encoder_weights, the folder or hub id of a whole network, that network's size counts in place of the name's.
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN_MINI = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
SWIN_TINY = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
MASK2FORMER_MINI = {
    "feature_size": 64,
    "mask_feature_size": 64,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 128,
    "dim_feedforward": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "num_queries": 40,
}
SEGFORMER_MINI = {
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 3, 4],
    "decoder_hidden_size": 64,
}
TRANSFORMERS_SEGMENTERS = {
    "segformer-mini": ("Segformer", None, SEGFORMER_MINI),
    "upernet-swin-mini": ("UperNet", SWIN_MINI, {"hidden_size": 64}),
    "upernet-swin-tiny": ("UperNet", SWIN_TINY, {"hidden_size": 512}),
    "mask2former-swin-mini": ("Mask2Former", SWIN_MINI, MASK2FORMER_MINI),
    "mask2former-swin-tiny": ("Mask2Former", SWIN_TINY, {}),
}
ARCHITECTURES = {
    "Segformer": (transformers.SegformerConfig, transformers.SegformerForSemanticSegmentation),
    "UperNet": (transformers.UperNetConfig, transformers.UperNetForSemanticSegmentation),
    "Mask2Former": (transformers.Mask2FormerConfig, transformers.Mask2FormerForUniversalSegmentation),
}
SEGMENTERS = (*SMP_SEGMENTERS, *TRANSFORMERS_SEGMENTERS)
WEIGHTS = "model.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images (R, G, B), as all encoders expect


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation beside a 1 x 1 one (He et al., 2016): B x i x H x W to B x o."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResUNet(nn.Module):
    """A U-Net of residual blocks from stride 16 up to stride 2; our choice for images of 64 pixels.

    An encoder of segmentation-models-pytorch without its last stage, which would answer from 2 x 2 positions, a block
    at each coarser map joined with the finer one, and bilinear logits: B x 3 x H x W (multiples of 16) to B x classes.
    """

    def __init__(self, encoder: str, encoder_weights: str | None, classes: int, decoder_channels: Sequence[int]):
        super().__init__()
        self.encoder = smp.encoders.get_encoder(encoder, depth=len(decoder_channels) + 1, weights=encoder_weights)
        *skips, inputs = self.encoder.out_channels[1:]
        blocks = []
        for skip, outputs in zip(reversed(skips), decoder_channels, strict=True):
            blocks.append(ResidualBlock(inputs + skip, outputs))
            inputs = outputs
        self.decoder, self.head = nn.ModuleList(blocks), nn.Conv2d(inputs, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        _, *skips, x = self.encoder(image)
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            x = nn.functional.interpolate(x, skip.shape[-2:], mode="bilinear")
            x = block(torch.cat([x, skip], dim=1))
        return nn.functional.interpolate(self.head(x), image.shape[-2:], mode="bilinear")


class FromTransformers(nn.Module):
    """SegFormer, UperNet or Mask2Former as a map from normalised images to logits at the image's size.

    Mask2Former gives a class distribution and a mask for each query, and its own loss matches queries to segments.
    A per-pixel label with holes and weights fits no such matching, so its output becomes per-class scores by the
    semantic inference of its paper, s_c = sum over queries of p(c) * sigmoid(mask), and log s_c are the logits: their
    softmax is s_c / sum s, and the argmax is unchanged. It is thus trained by per-pixel losses as the others are.
    """

    def __init__(self, name: str, classes: int, weights: str | None, config: dict | None):
        super().__init__()
        architecture, swin, options = TRANSFORMERS_SEGMENTERS[name]
        config_class, model_class = ARCHITECTURES[architecture]
        if weights:  # a hub id or a local folder; its backbone may have any size, its classes give way to ours
            self.model = model_class.from_pretrained(
                weights, num_labels=classes, ignore_mismatched_sizes=True, use_safetensors=True
            )
        else:
            backbone = {"backbone_config": transformers.SwinConfig(**swin, out_features=STAGES)} if swin else {}
            own = config_class(**backbone, num_labels=classes, **options)
            self.model = model_class(config_class.from_dict(config) if config else own)
        if architecture == "UperNet":
            self.model.auxiliary_head = None  # a second loss that no other network here has
            self.model.config.use_auxiliary_head = False
        self.is_mask2former = architecture == "Mask2Former"

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values=image)
        if not self.is_mask2former:  # SegFormer answers at a quarter of the size
            return nn.functional.interpolate(output.logits, image.shape[-2:], mode="bilinear")
        shares = output.class_queries_logits.float().softmax(dim=-1)[..., :-1]  # the last is "no object"
        masks = output.masks_queries_logits.float().sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", shares, masks)
        return nn.functional.interpolate(scores.clamp(min=1e-6).log(), image.shape[-2:], mode="bilinear")


class Segmenter(nn.Module):
    """A network from images (float B x 3 x H x W, 0..1) to logits (B x classes x H x W).

    Normalisation and padding to a multiple of 32 happen inside, so a saved network needs no further knowledge.
    encoder_weights: for the networks of segmentation-models-pytorch "imagenet", or "mini" or a folder with the weights
    of the encoder alone (`load_encoder`); for those of transformers the hub id or local folder of a whole pretrained
    network; None: from scratch.
    config: a saved network's configuration, where transformers has one. `side` is the shorter side, in pixels, at which
    the training showed it images (`diffseg.augmentation.shown_side`; 0: not known), `palette` the classes' colours
    (R, G, B in 0..255; VOC's until set): `diffseg.inference` reads both. Raises a DiffsegError for an unknown name and
    for weights that cannot be had.
    """

    def __init__(
        self, name: str, classes: Sequence[str], encoder_weights: str | None = None, config: dict | None = None
    ):
        super().__init__()
        if name not in SEGMENTERS:
            raise DiffsegError(f"there is no segmenter {name!r}; choose one of {', '.join(SEGMENTERS)}")
        self.name, self.classes = name, tuple(classes)
        self.side, self.palette = 0, voc_palette(len(self.classes))
        try:
            if name in TRANSFORMERS_SEGMENTERS:
                self.network = FromTransformers(name, len(self.classes), encoder_weights, config)
            else:
                architecture, encoder, options = SMP_SEGMENTERS[name]
                folder = encoder_folder(encoder_weights)
                make = ResUNet if architecture == "resunet" else partial(smp.create_model, architecture)
                named = None if folder else encoder_weights
                self.network = make(encoder, encoder_weights=named, classes=len(self.classes), **options)
                if folder:
                    load_encoder(self.network.encoder, folder, name)
        except (OSError, KeyError, ValueError, ImportError) as error:
            raise DiffsegError(f"{name} cannot be made with encoder_weights {encoder_weights!r}: {error}") from error
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    @property
    def config(self) -> dict | None:
        """The configuration that rebuilds the network where its name alone does not (transformers), else None."""
        return self.network.model.config.to_dict() if isinstance(self.network, FromTransformers) else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        image = (image - self.mean) / self.std
        padded = nn.functional.pad(image, (0, -width % 32, 0, -height % 32), mode="replicate")
        return self.network(padded)[..., :height, :width]


def encoder_folder(encoder_weights: str | None) -> Path | None:
    """Return the folder that encoder_weights names (a registered name such as "mini", or a path), else None."""
    if not encoder_weights:
        return None
    folder = locate("encoder_weights", encoder_weights)
    if encoder_weights == "imagenet":  # whatever folder has that name, such as the data set's
        return None
    return folder if is_short_name("encoder_weights", encoder_weights) or folder.is_dir() else None


def load_encoder(encoder: nn.Module, folder: Path, name: str) -> None:
    """Load the weights of an encoder alone (WEIGHTS in `folder`, any floating precision) into that of segmenter `name`.

    Raises a DiffsegError where the file is missing or damaged, or is another encoder's.
    """
    try:
        encoder.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:  # missing, truncated and foreign files come as many kinds of exception
        line = str(error).splitlines()[0]
        raise DiffsegError(
            f"{folder} holds no encoder of {name} ({line}); set encoder_weights to a folder made for it, or leave it "
            "empty to train from scratch"
        ) from error


class Ensemble(nn.Module):
    """Networks of one architecture that answer as one: the mean of their logits.

    Of the logits, not of the softmax, because BECO tests with the mean of both networks' logits, and because the
    result is then logits as any network's, which the evaluation can resize and average over scales.
    """

    def __init__(self, networks: Sequence[Segmenter]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.name, self.classes, self.config = networks[0].name, networks[0].classes, networks[0].config
        self.side, self.palette = networks[0].side, networks[0].palette

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return sum(network(image) for network in self.networks) / len(self.networks)


def new_networks(
    count: int,
    name: str,
    classes: Sequence[str],
    seed: int,
    encoder_weights: str | None = None,
    initial_network: str = "",
    palette: Sequence[tuple[int, int, int]] = (),
) -> Segmenter | Ensemble:
    """Make one network, or an ensemble of `count` whose initial weights differ (by seeds from `seed` and the index).

    initial_network: the folder (a relative one counts from the project's root) of a saved network of the same name
    whose weights are the start (of an ensemble the k-th for the k-th); the last layer starts anew where the classes
    differ. One network for two gives them the same start but for that layer. palette: the classes' colours,
    which are saved with the network; VOC's if empty. Raises a DiffsegError where the architectures differ, or two
    networks would have one start and so stay one.
    """
    networks = []
    for index in range(count):
        torch.manual_seed(derive_seed(seed, "network", index))
        networks.append(Segmenter(name, classes, encoder_weights))
        networks[-1].palette = palette or networks[-1].palette
    if initial_network:
        saved = load_segmenter(locate("initial_network", initial_network))
        starts = list(saved.networks) if isinstance(saved, Ensemble) else [saved]
        by_lot = any(getattr(part, "p", 0) or getattr(part, "drop_prob", 0) for part in networks[0].modules())
        if count > len(starts) and saved.classes == tuple(classes) and not by_lot:  # no dropout tells them apart
            raise DiffsegError(
                f"initial_network {initial_network} is one network, and {count} that begin alike stay alike, as they "
                "see the same images; set training_mode to baseline or selftrain, or initial_network to a saved pair."
            )
        for index, network in enumerate(networks):
            start_from(network, starts[index % len(starts)])
    return networks[0] if count == 1 else Ensemble(networks)


def start_from(network: Segmenter, start: Segmenter) -> None:
    """Copy the weights of `start`, all but the layers whose shape depends on the number of classes if these differ."""
    if start.name != network.name:
        raise DiffsegError(f"initial_network is a {start.name}, not a {network.name}; set segmenter to {start.name}")
    weights = start.state_dict()
    if start.classes != network.classes:
        more, config = (*start.classes, "one more"), start.config
        if config:  # transformers counts the classes by their names
            config |= {"id2label": dict(enumerate(more)), "label2id": {c: k for k, c in enumerate(more)}}
        with torch.device("meta"):  # one class more shows which layers depend on the classes; nothing is computed
            other = Segmenter(start.name, more, config=config).state_dict()
        weights = {key: value for key, value in weights.items() if value.shape == other[key].shape}
    network.load_state_dict(weights, strict=False)


def hex_colours(palette: Sequence[tuple[int, int, int]]) -> list[str]:
    """Return colours (R, G, B in 0..255) as "#rrggbb"."""
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in palette]


def save_segmenter(segmenter: Segmenter | Ensemble, folder: Path) -> None:
    """Write config.json and, as the last file, WEIGHTS (contiguous float32) to `folder`."""
    config = {
        "name": segmenter.name,
        "classes": segmenter.classes,
        "palette": hex_colours(segmenter.palette),
        "side": segmenter.side,
        "networks": len(segmenter.networks) if isinstance(segmenter, Ensemble) else 1,
        "config": segmenter.config,
    }
    write_text(folder / "config.json", json.dumps(config, indent=1))
    weights = {key: value.contiguous() for key, value in segmenter.state_dict().items()}
    with atomic_path(folder / WEIGHTS) as path:
        save_file(weights, path)


def load_segmenter(place: str | os.PathLike) -> Segmenter | Ensemble:
    """Read what `save_segmenter` wrote, in evaluation mode: one module, also of an ensemble.

    place: the folder, or the id of a copy of it on the Hugging Face hub (owner/name). Raises a DiffsegError where there
    is no such network, or it cannot be downloaded.
    """
    folder = network_folder(place)
    try:
        saved = json.loads((folder / "config.json").read_text())
        count, name, classes, config = saved.get("networks", 1), saved["name"], saved["classes"], saved.get("config")
        networks = [Segmenter(name, classes, config=config) for _ in range(count)]
        segmenter = networks[0] if count == 1 else Ensemble(networks)
        segmenter.load_state_dict(load_file(folder / WEIGHTS))
        side = int(saved.get("side", 0))  # networks of diffseg 0.3.0 and older have neither
        if side < 0:
            raise ValueError(f"its side is {side}")
        for each in (segmenter, *networks):
            each.side = side
        if "palette" in saved:
            colours = zip(classes, saved["palette"], strict=True)
            segmenter.palette = tuple(ImageColor.getrgb(colour) for _, colour in colours)
    except DiffsegError:
        raise
    except Exception as error:  # missing, truncated or foreign files come as many kinds of exception
        line = str(error).partition("\n")[0]
        raise DiffsegError(
            f"{folder} holds no usable segmenter ({line}); give the folder of a network's config.json and {WEIGHTS}, "
            "in a run 04_robust_training/synthetic, or train it again."
        ) from error
    return segmenter.eval()


def network_folder(place: str | os.PathLike) -> Path:
    """Return the folder of a saved network: `place` itself, or where the hub's files of that id were downloaded to."""
    folder = Path(place)
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        return folder
    try:
        return Path(snapshot_download(str(place), allow_patterns=["config.json", WEIGHTS]))
    except Exception as error:  # offline, unknown, forbidden: a kind of exception each, whose name says it
        raise DiffsegError(
            f"{place} is no folder here, and the hub did not give such a network ({type(error).__name__}); check the "
            f"name, or {get_online(error)}."
        ) from error
