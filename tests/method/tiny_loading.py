"""The tiny pipelines as a folder or the hub has them, for the tests of loading and of LoRA."""

from functools import partial

import diffusers as D
import numpy as np
import tiny_pipelines as tiny
import torch

FAMILIES = {
    "sd1": lambda: tiny.sd(scheduler=D.PNDMScheduler(**tiny.NOISE, skip_prk_steps=True, steps_offset=1)),
    "lcm": tiny.lcm,
    "sdxl": lambda: tiny.sdxl(D.EulerDiscreteScheduler(**tiny.NOISE, timestep_spacing="leading", steps_offset=1)),
    "sdxl-turbo": lambda: tiny.sdxl(D.EulerDiscreteScheduler(**tiny.NOISE, timestep_spacing="trailing")),
    "pixart": partial(tiny.pixart, D.PixArtSigmaPipeline),
    "hunyuan": tiny.hunyuan,
    "sd3": tiny.sd3,
    "sd3-without-t5": partial(tiny.sd3, False),
    "flux": partial(tiny.flux, True),
}


def build(family: str):
    """Build a pipeline; all its weights are of some size, as layers that start at zero would hide a LoRA's effect."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family]()
    random = torch.Generator().manual_seed(1)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    for weight in denoiser(pipeline).parameters():
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=random) * (2.0 / weight[0].numel()) ** 0.5
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser(pipeline) -> torch.nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def picture(pipeline) -> np.ndarray:
    """Draw a picture of 32 x 32 (Hunyuan: 64 x 64) pixels; float32, 0..1."""
    family = type(pipeline).__name__
    side = 64 if "Hunyuan" in family else 32
    options = dict(use_resolution_binning=False) if family.startswith(("PixArt", "Hunyuan")) else {}
    options |= dict(clean_caption=False) if "PixArt" in family else {}
    options |= dict(max_sequence_length=20) if family.startswith(("StableDiffusion3", "Flux")) else {}
    random = torch.Generator().manual_seed(3)
    images = pipeline(
        "a cat on grass", height=side, width=side, num_inference_steps=2, generator=random, output_type="np", **options
    ).images
    return np.asarray(images[0])
