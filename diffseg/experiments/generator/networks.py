"""The networks of the mini generator, untrained: the real diffusers and transformers classes at small size.

`changes` replace single settings, as `diffseg.experiments.generator.compare` does.
"""

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffseg.miniworld.scenes import PLACES, TEMPLATES, load_pictures

MAX_TOKENS = 20  # the longest caption has 18 tokens
STREET_WORDS = "street scene city rider human vehicle road building traffic sign tree many with two of in".split()


def build_tokenizer() -> CLIPTokenizer:
    """A word-level CLIP tokenizer: every word of the mini world is one token, any other word is unknown."""
    texts = [*PLACES, *TEMPLATES, *(word for picture in load_pictures() for word in picture.words)]
    words = {word for text in texts for word in text.replace("{}", "").split()} | {"a", "an", "and"}
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=MAX_TOKENS)
    ordered = sorted(words | set(STREET_WORDS))
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True, lstrip=True) for word in ordered])
    # declared for diffseg.words.known_words: a compound of known words that no caption holds was never learnt
    compounds = {word for picture in load_pictures() for word in picture.words if " " in word}
    tokenizer.init_kwargs["phrases"] = sorted(compounds)
    return tokenizer


def build_vae(**changes) -> AutoencoderKL:
    settings = dict(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )
    return AutoencoderKL(**settings | changes)


def build_text_encoder(vocabulary: int, **changes) -> CLIPTextModel:
    settings = dict(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(CLIPTextConfig(**settings | changes))


def build_unet(**changes) -> UNet2DConditionModel:
    """Three levels (16, 8, 4); attention at 16 x 16 and 8 x 8, and in the 4 x 4 middle; `attention_head_dim` is heads.

    A block of attention holds self-attention, cross-attention to the words and a feed-forward layer.
    """
    settings = dict(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4, 6),
        norm_num_groups=16,
        cross_attention_dim=128,
    )
    return UNet2DConditionModel(**settings | changes)


def build_scheduler(**changes) -> DDIMScheduler:
    settings = dict(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return DDIMScheduler(**settings | changes)
