"""Word maps: what is kept of an image's attention, so that masks can be cut from it in another way later.

A map says how much each position of the image reads of one word. Kept are the maps of every layer and of every step,
or of the sum over some steps. With Stable Diffusion 1.5 at 512 pixels, that is 54 kB a word for each step or sum. Which
layers and steps are averaged is chosen when masks are cut.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional as F

from diffseg.errors import DiffsegError
from diffseg.files import atomic_path

SELF = "self-attention"  # its name in the file, beside the layers'


@dataclass(frozen=True)
class WordMaps:
    """The maps of one image's words.

    layers: name of the layer -> float32 S x W x h x w, probabilities in 0..1 of W words. steps: the denoising steps
    that each of the S maps averages, from 0. attention: float32 h x w x h x w of self-attention, None where none is
    kept.
    """

    layers: dict[str, torch.Tensor]
    steps: list[list[int]]
    attention: torch.Tensor | None = None

    def mean(self, resolutions: Sequence[int], steps: Sequence[int], layers: Sequence[str] = ()) -> torch.Tensor:
        """Return the mean over the layers of some map sizes and some steps, float32 W x h x w of the largest size.

        resolutions: shorter sides in positions, each with the same weight, however many layers it has. layers: the
        only ones that count (`choose_layers`). Raises a DiffsegError for what is not kept.
        """
        kept_layers = [self.layers[name] for name in choose_layers(self.layers, layers)]
        chosen = [k for k, kept in enumerate(self.steps) if set(kept) <= set(steps)]
        if sorted(step for k in chosen for step in self.steps[k]) != sorted(steps):
            kept = ", ".join(f"{some[0]}-{some[-1]}" if len(some) > 1 else str(some[0]) for some in self.steps)
            raise DiffsegError(
                f"the steps {steps[0]} to {steps[-1]} of attention_steps are not kept by themselves (kept: {kept}); "
                "choose attention_steps among them, or another kept_steps, which draws anew"
            )
        means = []
        for resolution in sorted(set(resolutions)):
            found = [maps[chosen].mean(dim=0) for maps in kept_layers if min(maps.shape[-2:]) == resolution]
            if not found:
                there = sorted({min(maps.shape[-2:]) for maps in kept_layers})
                raise DiffsegError(
                    f"no cross-attention is kept at resolution {resolution}: at this image size there is {there}"
                    f"{' in attention_layers' if layers else ''}; choose attention_resolutions among them"
                )
            means.append(torch.stack(found).mean(dim=0)[None])
        return average(means)[0]

    def save(self, path: Path) -> None:
        """Write the maps in half precision, each scaled by its own largest value, so that faint ones keep theirs."""
        tensors = {}
        for layer, maps in self.layers.items():
            scale = maps.amax(dim=(-2, -1), keepdim=True)
            tensors[layer] = torch.where(scale > 0, maps / scale, maps).half().contiguous()
            tensors[f"{layer}.scale"] = scale.contiguous()
        if self.attention is not None:
            tensors[SELF] = self.attention.half().contiguous()
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, {"steps": json.dumps(self.steps)}))

    @classmethod
    def load(cls, path: Path) -> "WordMaps":
        """Read what `save` wrote. Raises a DiffsegError for a file that is missing or damaged."""
        try:
            with safe_open(path, "pt") as file:
                steps = json.loads(file.metadata()["steps"])
                found = {name: file.get_tensor(name).float() for name in file.keys()}
            attention = found.pop(SELF, None)
            layers = {name: found[name] * found[f"{name}.scale"] for name in found if not name.endswith(".scale")}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DiffsegError(
                f"the word maps {path} cannot be read ({error}); remove the file to draw it anew"
            ) from None
        return cls(layers, steps, attention)


def choose_layers(names: Iterable[str], patterns: Sequence[str], parameter: str = "attention_layers") -> list[str]:
    """Return the names that match one of some patterns, such as "up_blocks.1.*" or "*blocks.9.attn"; no pattern: all.

    Raises a DiffsegError that names the parameter for a pattern that matches none.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DiffsegError(f"{parameter} has {pattern!r}, which matches no layer; choose among {', '.join(names)}")
    return [name for name in names if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def average(means: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of maps (B x W x h x w each) at the size of the last one, the largest."""
    size = means[-1].shape[-2:]
    return torch.stack([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in means]).mean(dim=0)
