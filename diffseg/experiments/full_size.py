"""Generators at their published size with random weights: what a machine, and this package, make of them.

The configurations are those of the published repositories (Stable Diffusion 1.5, XL base 1.0, 3.5 medium without its
optional T5). Images of random weights show nothing.
"""

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffseg.errors import DiffsegError

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
CLIP_SYMBOLS = 49408  # bytes, bytes at the end of a word, merges, and two marks


def clip_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer, of the vocabulary in the package open_clip_torch. Raises a DiffsegError without it."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        raise DiffsegError("CLIP's vocabulary is in the package open_clip_torch: pip install 'diffseg[rehearsal]'")
    path = Path(found.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    letters = sorted(ByteLevel.alphabet())
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()[1:]  # the first is a comment
    merges = [tuple(line.split()) for line in lines[: CLIP_SYMBOLS - 2 * len(letters) - 2]]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={s: k for k, s in enumerate(symbols)}, merges=merges, model_max_length=77)


def clip(config: dict, kind: type = CLIPTextModel) -> CLIPTextModel | CLIPTextModelWithProjection:
    marks = {"bos_token_id": CLIP_SYMBOLS - 2, "eos_token_id": CLIP_SYMBOLS - 1}
    return kind(CLIPTextConfig(vocab_size=CLIP_SYMBOLS, **marks, **config)).eval()


def vae(**config) -> AutoencoderKL:
    downs, ups = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    config = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4} | config
    return AutoencoderKL(3, 3, downs, ups, layers_per_block=2, **config).eval()


def sd15_networks() -> tuple[CLIPTextModel, UNet2DConditionModel, AutoencoderKL]:
    """Return text encoder, UNet and VAE of Stable Diffusion 1.5, on torch's default device."""
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    return clip(CLIP_L), unet.eval(), vae(sample_size=512)


def sdxl_unet(heads: int = 10) -> UNet2DConditionModel:
    """Return the UNet of Stable Diffusion XL. heads: of its layers with 64 x 64 positions, an even number; fewer than
    10 make all layers narrower, with heads of the real size."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(32 * heads, 64 * heads, 128 * heads),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[heads // 2, heads, 2 * heads],  # in diffusers the number of heads, for a UNet
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ).eval()


def sd35_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    ).eval()


def sd15() -> StableDiffusionPipeline:
    text, unet, decoder = sd15_networks()
    scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True)
    return StableDiffusionPipeline(
        decoder, text, clip_tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
    )


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae(sample_size=1024, scaling_factor=0.13025),
        clip(CLIP_L),
        clip(CLIP_G, CLIPTextModelWithProjection),
        clip_tokenizer(),
        clip_tokenizer(),
        sdxl_unet(),
        EulerDiscreteScheduler(**NOISE),
    )


def sd35_medium() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        sd35_transformer(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(
            sample_size=1024,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        clip(CLIP_L | {"projection_dim": 768}, CLIPTextModelWithProjection),
        clip_tokenizer(),
        clip(CLIP_G, CLIPTextModelWithProjection),
        clip_tokenizer(),
        None,
        None,
    )


GENERATORS: dict[str, Callable[[], DiffusionPipeline]] = {"sd15": sd15, "sdxl": sdxl, "sd35-medium": sd35_medium}


def save_generator(name: str, folder: Path) -> None:
    """Save one of GENERATORS with random weights, in half precision, as the published repositories are."""
    torch.manual_seed(0)
    GENERATORS[name]().to(torch.float16).save_pretrained(folder, safe_serialization=True)
