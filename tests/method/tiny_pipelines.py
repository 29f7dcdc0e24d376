"""Small pipelines of the real classes, one for each family, built offline with random weights that are not zero.

No weight of the denoiser is left zero: fresh ones (adaLN-zero) would give images that do not depend on the attention.
"""

import string

import diffusers as D
import torch
import transformers as T
from tokenizers.pre_tokenizers import ByteLevel

CHARACTERS = string.printable[:94]
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


# ------------------------------------------------------------------------------- text encoders, tokenizers


def clip_tokenizer(longest: int = 20) -> T.CLIPTokenizer:
    """CLIP's byte-pair encoding with a few merges: "cat" and "and" are one token, "dogs" is "dog" + "s"."""
    symbols = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    merges = "c a, ca t</w>, p l, pl a, pla n, plan t</w>, a n, an d</w>, d o, do g, o n</w>".split(", ")
    symbols += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return T.CLIPTokenizer(
        vocab={symbol: k for k, symbol in enumerate(symbols)},
        merges=[tuple(merge.split()) for merge in merges],
        model_max_length=longest,
    )


def clip_encoder(kind: type, tokenizer: T.CLIPTokenizer):
    config = T.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=16,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    return kind(config).eval()


def t5(width: int = 16) -> tuple[T.T5TokenizerFast, T.T5EncoderModel]:
    """T5's unigram pieces: "cat" is one, "plant" too, and all else single characters."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    vocabulary += [(piece, -3.0) for piece in ("▁cat", "▁and", "▁dog", "▁plant", "▁on")]
    vocabulary += [(c, -8.0) for c in CHARACTERS]
    tokenizer = T.T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = T.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T.T5EncoderModel(config).eval()


def gemma() -> tuple[T.GemmaTokenizer, T.Gemma2Model]:
    """Gemma's byte-pair encoding, in which a blank is a letter: "dog" is one token, " cat" too."""
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("d", "o"), ("do", "g")]
    symbols += ["".join(merge) for merge in merges] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {symbol: k for k, symbol in enumerate(symbols)}
    tokenizer = T.GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=4096, add_bos_token=True)
    config = T.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        sliding_window=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return tokenizer, T.Gemma2Model(config).eval()


def bert() -> tuple[T.BertTokenizer, T.BertModel]:
    """BERT's word pieces: "cat" is one, "dogs" is "dog" + "##s"."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    pieces += [*(f"##{c}" for c in string.ascii_lowercase), "cat", "dog", "and", "plant", "-", ","]
    tokenizer = T.BertTokenizer(vocab={piece: k for k, piece in enumerate(pieces)}, model_max_length=77)
    config = T.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
    )
    return tokenizer, T.BertModel(config).eval()


def qwen_tokenizer() -> T.Qwen2Tokenizer:
    """Qwen's bytes with a few merges and its chat template."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("d", "o"), ("do", "g")]
    symbols = [*sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges), *marks]
    tokenizer = T.Qwen2Tokenizer(vocab={s: k for k, s in enumerate(symbols)}, merges=merges, model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen(layers: int) -> tuple[T.Qwen2Tokenizer, T.Qwen3ForCausalLM]:
    tokenizer = qwen_tokenizer()
    config = T.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    return tokenizer, T.Qwen3ForCausalLM(config).eval()


def qwen_vl() -> tuple[T.Qwen2Tokenizer, T.Qwen2_5_VLForConditionalGeneration]:
    """Qwen's model of pictures and text, of which Qwen-Image reads the text alone."""
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 16}
    config = T.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tokenizer, T.Qwen2_5_VLForConditionalGeneration(config).eval()


# ------------------------------------------------------------------------------------------ autoencoders


def kl(levels: int = 2, **options) -> D.AutoencoderKL:
    return D.AutoencoderKL(
        block_out_channels=[8] * levels,
        latent_channels=4,
        norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **options,
    ).eval()


def shifted_kl() -> D.AutoencoderKL:
    return kl(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def deep_compression() -> D.AutoencoderDC:
    return D.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ).eval()


# --------------------------------------------------------------------------------------------- pipelines


def sd(kind: type = D.StableDiffusionPipeline, scheduler=None, **options):
    tokenizer = clip_tokenizer()
    unet = D.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )
    return kind(
        vae=kl(),
        text_encoder=clip_encoder(T.CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler or D.DDIMScheduler(clip_sample=False, **NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lcm():
    scheduler = D.LCMScheduler(clip_sample=False, **NOISE)
    return sd(D.LatentConsistencyModelPipeline, scheduler, time_cond_proj_dim=32)


def sdxl(scheduler=None):
    tokenizer = clip_tokenizer()
    unet = D.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=[2, 4],
        cross_attention_dim=32,
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return D.StableDiffusionXLPipeline(
        vae=kl(),
        text_encoder=clip_encoder(T.CLIPTextModel, tokenizer),
        text_encoder_2=clip_encoder(T.CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler or D.EulerDiscreteScheduler(**NOISE),
        add_watermarker=False,
    )


def sdxl_turbo():
    return sdxl(D.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **NOISE))


def pixart(kind: type):
    tokenizer, encoder = t5()
    transformer = D.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        use_additional_conditions=False,
    )
    return kind(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=kl(),
        transformer=transformer.eval(),
        scheduler=D.DPMSolverMultistepScheduler(),
    )


def sana(kind: type = D.SanaPipeline, scheduler=None, **options):
    tokenizer, encoder = gemma()
    transformer = D.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        **options,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return kind(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=deep_compression(),
        transformer=transformer.eval(),
        scheduler=scheduler or D.DPMSolverMultistepScheduler(**flow),
    )


def hunyuan():
    (tokenizer, encoder), (tokenizer_2, encoder_2) = bert(), t5()
    transformer = D.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    return D.HunyuanDiTPipeline(
        vae=kl(levels=4),  # its factor of 8 is fixed in the pipeline
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
        scheduler=D.DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3(with_t5: bool = True, **options):
    tokenizer = clip_tokenizer()
    tokenizer_3, encoder_3 = t5(32) if with_t5 else (None, None)
    transformer = D.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=32,
        **options,
    )
    return D.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        vae=shifted_kl(),
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_encoder(T.CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(T.CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(guidance: bool):
    tokenizer, (tokenizer_2, encoder_2) = clip_tokenizer(), t5(32)
    transformer = D.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance,
    )
    return D.FluxPipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance),
        vae=shifted_kl(),
        text_encoder=clip_encoder(T.CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )


def flux2_klein():
    tokenizer, encoder = qwen(layers=28)  # the layers 9, 18 and 27 are read
    transformer = D.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = D.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    return D.Flux2KleinPipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def z_image():
    tokenizer, encoder = qwen(layers=2)
    transformer = D.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
    )
    return D.ZImagePipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_kl(),
        text_encoder=encoder.model,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def qwen_image():
    tokenizer, encoder = qwen_vl()
    transformer = D.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = D.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return D.QwenImagePipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


NORMED = {"qk_norm": "rms_norm_across_heads"}
BUILDERS = {
    "sd": sd,
    "lcm": lcm,
    "sdxl": sdxl,
    "sdxl-turbo": sdxl_turbo,
    "pixart-alpha": lambda: pixart(D.PixArtAlphaPipeline),
    "pixart-sigma": lambda: pixart(D.PixArtSigmaPipeline),
    "sana": sana,
    "sana-1.5": lambda: sana(**NORMED),
    "sana-sprint": lambda: sana(D.SanaSprintPipeline, D.SCMScheduler(), guidance_embeds=True, **NORMED),
    "hunyuan": hunyuan,
    "sd3": sd3,
    "sd3.5": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "sd3-without-t5": lambda: sd3(False),
    "flux-dev": lambda: flux(True),
    "flux-schnell": lambda: flux(False),
    "flux2-klein": flux2_klein,
    "z-image": z_image,
    "qwen-image": qwen_image,
}


def build(name: str):
    """Return the small pipeline of a family, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = BUILDERS[name]()
        denoiser = pipeline.components.get("unet") or pipeline.transformer
        for key, weight in denoiser.named_parameters():
            if weight.ndim > 1:
                weight.data = torch.randn(weight.shape) / weight[0].numel() ** 0.5
            # fresh weights read all tokens almost alike; sharpen them, so that an error would show
            if key.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
                weight.data *= 2
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
