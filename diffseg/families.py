"""What differs between the families of text-to-image generators: one table, and the few functions that read it.

Attention reads the image's positions as queries and the prompt's tokens as keys. In **cross-attention** the keys are
the tokens alone. In **joint attention** image and tokens are one sequence, and each reads all. A prompt may pass
several text encoders; their keys stand one behind the other.

Read from diffusers 0.42.1, and checked on small pipelines of the real classes (tests/method/test_families.py). SD 1.x,
2.x, XL, Turbo and LCM differ in nothing that matters here but the class.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from diffseg.errors import DiffsegError


@dataclass(frozen=True)
class Family:
    """The facts of one family.

    keys: for each tokenizer (an attribute of the pipeline), in the order of the keys, how many keys its tokens have;
        0 for the tokenizer's own longest sequence. A tokenizer that is None (T5 in SD 3) leaves its keys empty.
    joint: None for cross-attention; else which part of the joint sequence comes first, "image" or "text".
    layers: how the names of the layers end in which the image reads the prompt, a regular expression.
    filled: in the joint sequence the image's positions are filled up to a multiple of this number.
    lower: the pipeline lowers the prompt and strips its blanks.
    chat: the prompt is a user's message in the tokenizer's chat template.
    negative: a negative prompt acts, with guidance.
    guidance: the argument of the call that is the strength of guidance.
    guides_above_zero: that argument is what exceeds 1 in the others', so that 0 is none.
    prompts_first: with guidance the batch is [prompts; negative prompts], and not the other way round.
    patches: the denoiser's channels hold 2 x 2 of the VAE's latents, which a call takes as a "sequence" of patches
        (B x positions x channels) or as "channels" (B x channels x h x w); None where there are no such patches.
    """

    keys: Mapping[str, int]
    joint: str | None = None
    layers: str = "attn2"
    filled: int = 1
    lower: bool = False
    chat: bool = False
    negative: bool = True
    guidance: str = "guidance_scale"
    guides_above_zero: bool = False
    prompts_first: bool = False
    patches: str | None = None


FAMILIES = {
    "StableDiffusionPipeline": Family({"tokenizer": 0}),
    # the two CLIPs of XL split alike, and their features are joined: one key a token
    "StableDiffusionXLPipeline": Family({"tokenizer": 0}),
    "LatentConsistencyModelPipeline": Family({"tokenizer": 0}, negative=False),
    "PixArtAlphaPipeline": Family({"tokenizer": 120}, lower=True),
    "PixArtSigmaPipeline": Family({"tokenizer": 300}, lower=True),
    "SanaPipeline": Family({"tokenizer": 300}, lower=True),
    "SanaSprintPipeline": Family({"tokenizer": 300}, lower=True, negative=False),
    "HunyuanDiTPipeline": Family({"tokenizer": 77, "tokenizer_2": 256}),
    "StableDiffusion3Pipeline": Family({"tokenizer": 0, "tokenizer_3": 256}, joint="image", layers="attn"),
    # CLIP gives Flux one vector for the whole prompt and no key
    "FluxPipeline": Family({"tokenizer_2": 512}, joint="text", layers="attn", negative=False, patches="sequence"),
    "Flux2KleinPipeline": Family(
        {"tokenizer": 512}, joint="text", layers="attn", chat=True, negative=False, patches="channels"
    ),
    # refiners before these layers see the image alone or the text alone
    "ZImagePipeline": Family(
        {"tokenizer": 512},
        joint="image",
        layers=r"layers\.\d+\.attention",
        filled=32,
        chat=True,
        guides_above_zero=True,
        prompts_first=True,
    ),
    "QwenImagePipeline": Family(
        {"tokenizer": 512}, joint="text", layers="attn", guidance="true_cfg_scale", patches="sequence"
    ),
}
SCHNELL = dataclasses.replace(FAMILIES["FluxPipeline"], keys={"tokenizer_2": 256})  # the same class, trained on 256


def family_of(pipeline) -> Family:
    """Return the facts of a pipeline's family, by its class. Raises a DiffsegError for an unknown one."""
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise DiffsegError(f"there is no attention capture for {name}; use a generator of {', '.join(FAMILIES)}")
    if name == "FluxPipeline" and not pipeline.transformer.config.guidance_embeds:
        return SCHNELL
    return FAMILIES[name]


def denoiser_name(pipeline) -> str:
    """Return which component runs once a step, "unet" or "transformer"."""
    return "unet" if getattr(pipeline, "unet", None) is not None else "transformer"


def denoiser_of(pipeline) -> torch.nn.Module:
    return getattr(pipeline, denoiser_name(pipeline))


def layer_names(pipeline) -> list[str]:
    """Return the names of the layers in which the image reads the prompt, as the denoiser lists them."""
    ending = rf"(.*\.)?{family_of(pipeline).layers}"
    return [name for name, _ in denoiser_of(pipeline).named_modules() if re.fullmatch(ending, name)]


def key_ranges(pipeline) -> dict[str, range]:
    """Return for each tokenizer with keys, by its name, the keys of its tokens."""
    ranges, start = {}, 0
    for name, count in family_of(pipeline).keys.items():
        count = count or getattr(pipeline, name).model_max_length
        if getattr(pipeline, name) is not None:
            ranges[name] = range(start, start + count)
        start += count
    return ranges


def before_prompt(pipeline) -> tuple[str, int]:
    """Return what the pipeline writes before each prompt, and how many of its tokens have no key."""
    parameter = inspect.signature(pipeline.__call__).parameters.get("complex_human_instruction")
    if parameter and parameter.default:
        # Sana tells Gemma how to enhance the prompt, and keeps the first token and the last ones of the padded sequence
        prefix = "\n".join(parameter.default)
        return prefix, len(pipeline.tokenizer.encode(prefix)) - 2
    if template := getattr(pipeline, "prompt_template_encode", ""):  # Qwen-Image's, with an instruction for the prompt
        return template.partition("{}")[0], pipeline.prompt_template_encode_start_idx
    if family_of(pipeline).chat:
        message = [{"role": "user", "content": "PROMPT"}]
        return pipeline.tokenizer.apply_chat_template(message, tokenize=False).partition("PROMPT")[0], 0
    return "", 0


def image_grid(denoiser, args: tuple, kwargs: Mapping) -> tuple[int, int]:
    """Return (h, w), the positions that the denoiser makes of its latents, from the arguments of its call."""
    if "img_ids" in kwargs:  # of packed latents: index, row and column of each position
        rows, columns = kwargs["img_ids"][..., 1:3].reshape(-1, 2).amax(dim=0).tolist()
        return int(rows) + 1, int(columns) + 1
    if "img_shapes" in kwargs:  # frames, rows and columns of each image
        return kwargs["img_shapes"][0][0][1:]
    latents = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    height, width = latents[0].shape[-2:]  # of the first, as some take a list
    return height // patch_size(denoiser), width // patch_size(denoiser)


def patch_size(denoiser) -> int:
    """Return how many latents, across and down, the denoiser makes one position of."""
    [patch] = denoiser.config.get("all_patch_size", [denoiser.config.get("patch_size") or 1])
    return patch


def image_size(pipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Return (height, width) in pixels, the generator's usual one where None is given.

    Raises a DiffsegError for a side that its positions do not fill.
    """
    # Z-Image names its 1024 pixels in its code only
    side = getattr(pipeline, "default_sample_size", None) or denoiser_of(pipeline).config.get("sample_size", 128)
    size = height or side * pipeline.vae_scale_factor, width or side * pipeline.vae_scale_factor
    patch = 2 if family_of(pipeline).patches else patch_size(denoiser_of(pipeline))
    multiple = math.lcm(8, patch * pipeline.vae_scale_factor)  # diffusers itself asks for 8 of most
    for name, pixels in zip(("height", "width"), size, strict=True):
        if pixels % multiple:
            raise DiffsegError(f"{name} is {pixels}; {type(pipeline).__name__} draws multiples of {multiple} here.")
    return size


def latent_noise(pipeline, generators: Sequence[torch.Generator], height: int, width: int) -> torch.Tensor:
    """Return float32 noise, one image from each generator, as the pipeline would draw it."""
    channels, factor = denoiser_of(pipeline).config.in_channels, pipeline.vae_scale_factor
    generators, patches = list(generators), family_of(pipeline).patches
    if patches == "sequence":
        shape = len(generators), channels // 4, 2 * (height // (2 * factor)), 2 * (width // (2 * factor))
        return pipeline._pack_latents(randn_tensor(shape, generators), *shape)
    factor = 2 * factor if patches == "channels" else factor
    return randn_tensor((len(generators), channels, height // factor, width // factor), generators)


def call_arguments(pipeline, sampling_steps: int) -> dict:
    """Return the arguments that make a call obey: no other image size, no other prompt, the table's number of keys.

    Only those that the pipeline's signature has.
    """
    options = {
        "use_resolution_binning": False,
        "clean_caption": False,  # it is active only where two further packages are installed
        "max_sequence_length": [*family_of(pipeline).keys.values()][-1],
    }
    if sampling_steps != 2:  # Sana Sprint has one for two steps, and refuses it for other numbers
        options["intermediate_timesteps"] = None
    accepted = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in options.items() if name in accepted}
