"""A small Segment Anything for 64-pixel pictures: segment-anything's own classes, trained on the mini world's objects.

It is trained by `diffseg.experiments.small_sam`.
"""

import json
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from diffseg.errors import DiffsegError

SIDE = 64  # pixels; patches of 4 give 16 x 16 tokens, and the decoder's fourfold upscaling a mask for every pixel


CONFIG = {"side": SIDE, "patch": 4, "width": 160, "depth": 4, "heads": 4, "prompt_width": 128}


def build_small_sam(side: int, patch: int, width: int, depth: int, heads: int, prompt_width: int) -> Sam:
    """Return an untrained Sam for pictures of `side` pixels; every block of its encoder attends globally."""
    tokens = side // patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            out_chans=prompt_width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=0,
        ),
        prompt_encoder=PromptEncoder(prompt_width, (tokens, tokens), (side, side), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=prompt_width,
            transformer=TwoWayTransformer(depth=2, embedding_dim=prompt_width, num_heads=8, mlp_dim=4 * prompt_width),
            iou_head_hidden_dim=prompt_width,
        ),
    )


def load_small_sam(folder: Path) -> Sam:
    """Read a small Sam in evaluation mode, float32. Raises a DiffsegError when there is none."""
    try:
        sam = build_small_sam(**json.loads((folder / "config.json").read_text()))
        sam.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # missing, truncated or foreign files come as many kinds of exception
        raise DiffsegError(
            f"{folder} holds no usable small Sam ({error}); restore the package's weights (git checkout, or reinstall)"
        ) from error
    return sam.eval()
