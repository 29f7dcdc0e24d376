"""Load a Stable Diffusion, and draw pictures whose every pixel follows from prompt and seed."""

from collections.abc import Sequence

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from diffseg.errors import DiffsegError
from diffseg.families import call_arguments, denoiser_of, family_of, image_size, latent_noise
from diffseg.paths import is_short_name, locate

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def locate_generator(name: str) -> str:
    """Return the folder (a relative one counts from the project's root) or hub id that `name` stands for."""
    folder = locate("generator", name)
    return str(folder) if folder.is_dir() else name


def load_tokenizer(name: str) -> CLIPTokenizer:
    """Load the tokenizer of a generator. Raises a DiffsegError when there is none."""
    place = locate_generator(name)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        raise DiffsegError(_unloadable(name, place, error)) from error
    # for a folder or id that is not there, transformers 5 makes an empty tokenizer instead of raising
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DiffsegError(_unloadable(name, place, OSError("it has no vocabulary")))
    return tokenizer


def load_generator(name: str, device: str | torch.device = "cpu", precision: str = "fp32") -> StableDiffusionPipeline:
    """Load a generator in inference mode, with the second-order multistep solver that needs few steps.

    The scheduler is built from the generator's own configuration (noise schedule, kind of prediction). Only
    safetensors are read. Raises a DiffsegError when the folder is missing or a weights file is damaged.
    """
    if precision not in PRECISIONS:
        raise DiffsegError(f"there is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    place = locate_generator(name)
    diffusers.utils.logging.disable_progress_bar()  # loading is short; our bars are for what takes long
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            place,
            dtype=PRECISIONS[precision],
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except Exception as error:  # from_pretrained raises a dozen kinds for missing and truncated files
        raise DiffsegError(_unloadable(name, place, error)) from error
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _unloadable(name: str, place: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = (
        "restore the package's weights (git checkout, or reinstall)"
        if is_short_name("generator", name)
        else "give a local Stable Diffusion folder, or the hub id of one while online"
    )
    return f"the generator {name!r} cannot be loaded from {place} ({reason}); {remedy}"


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    negative: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    sampling_steps: int = 20,
    guidance_scale: float = 4.0,
) -> list[Image.Image]:
    """Draw one picture for each prompt from its own seed, so that a picture does not depend on its batch.

    The noise of each picture comes from a CPU generator of its own, in float32 whatever the generator's precision:
    the same on every device and, up to rounding, in every precision. (Left to diffusers, it is drawn in the generator's
    precision: on a GPU with torch 2.11 the pictures in fp16 were others altogether.) An image with pixels that are no
    numbers, as a VAE in half precision can give, comes out black. Raises a DiffsegError for negative prompts of a
    family that has none.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    height, width = image_size(pipeline, height, width)
    noise = latent_noise(pipeline, generators, height, width)
    options = call_arguments(pipeline, sampling_steps)
    if negative is not None:
        if not family_of(pipeline).negative:
            raise DiffsegError(f"{type(pipeline).__name__} takes no negative prompt; leave negative_prompt empty")
        options["negative_prompt"] = list(negative)
    pixels = pipeline(
        prompt=list(prompts),
        height=height,
        width=width,
        num_inference_steps=sampling_steps,
        guidance_scale=guidance_scale,
        generator=generators,
        latents=noise.to(denoiser_of(pipeline).dtype),
        output_type="np",
        **options,
    ).images
    pixels[~np.isfinite(pixels).all(axis=(1, 2, 3))] = 0
    return pipeline.image_processor.numpy_to_pil(pixels)
