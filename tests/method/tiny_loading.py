"""Tiny pipelines of diffusers' real classes with random weights, for the tests of loading and of LoRA."""

import string
from functools import partial

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = string.ascii_lowercase
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def clip_tokenizer() -> CLIPTokenizer:
    marks = ["<|startoftext|>", "<|endoftext|>"]
    symbols = [*marks, *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], model_max_length=20)


def clip_encoder(kind=CLIPTextModel, act="quick_gelu"):
    return kind(
        CLIPTextConfig(
            vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=20, projection_dim=16, hidden_act=act, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    )  # fmt: skip


def t5(width: int = 16):
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0), *((c, -8.0) for c in LETTERS)]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=20)
    config = T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def vae(levels: int = 2, **more):
    return AutoencoderKL(
        block_out_channels=[8] * levels, down_block_types=["DownEncoderBlock2D"] * levels, norm_num_groups=2,
        up_block_types=["UpDecoderBlock2D"] * levels, latent_channels=4, **more,
    )  # fmt: skip


def unet(**more):
    options = dict(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return UNet2DConditionModel(**(options | more))


def sd1():
    return diffusers.StableDiffusionPipeline(
        vae(), clip_encoder(), clip_tokenizer(), unet(),
        diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def lcm():
    p = sd1()
    return diffusers.LatentConsistencyModelPipeline(
        p.vae, p.text_encoder, p.tokenizer, unet(time_cond_proj_dim=32), diffusers.LCMScheduler(**NOISE), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl(spacing: str = "leading"):
    network = unet(
        attention_head_dim=[2, 4], use_linear_projection=True, transformer_layers_per_block=[1, 2],
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        cross_attention_dim=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae(), clip_encoder(), clip_encoder(CLIPTextModelWithProjection, "gelu"), clip_tokenizer(), clip_tokenizer(),
        network, diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing=spacing, steps_offset=1),
    )  # fmt: skip


def pixart():
    tokenizer, encoder = t5()
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16,
        in_channels=4, cross_attention_dim=24, out_channels=8, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer, encoder, vae(), network, diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    )


def hunyuan():
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS)]
    bert = BertTokenizer(vocab={s: i for i, s in enumerate(symbols)}, model_max_length=20)
    config = BertConfig(
        vocab_size=len(symbols), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=80,
    )  # fmt: skip
    tokenizer, encoder = t5()
    network = diffusers.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    return diffusers.HunyuanDiTPipeline(
        vae(4), BertModel(config), bert, network, scheduler, None, None, False, encoder, tokenizer
    )


def sd3(with_t5: bool = True):
    network = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=32,
    )  # fmt: skip
    tokenizer, encoder = t5(32) if with_t5 else (None, None)
    return diffusers.StableDiffusion3Pipeline(
        network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        clip_encoder(CLIPTextModelWithProjection), clip_tokenizer(),
        clip_encoder(CLIPTextModelWithProjection, "gelu"), clip_tokenizer(), encoder, tokenizer,
    )  # fmt: skip


def flux():
    tokenizer, encoder = t5(32)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False), clip_encoder(), clip_tokenizer(),
        encoder, tokenizer, network,
    )  # fmt: skip


FAMILIES = {
    "sd1": sd1,
    "lcm": lcm,
    "sdxl": sdxl,
    "sdxl-turbo": partial(sdxl, "trailing"),
    "pixart": pixart,
    "hunyuan": hunyuan,
    "sd3": sd3,
    "sd3-without-t5": partial(sd3, False),
    "flux": flux,
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
