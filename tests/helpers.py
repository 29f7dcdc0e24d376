"""What several test files share beside fixtures."""

from collections.abc import Sequence

import numpy as np

from diffseg.lab import runs

# changes of the mini generator's networks: small enough to train in a test
TINY_GENERATOR = {
    "text_encoder": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "unet": {"block_out_channels": (16, 16, 16), "cross_attention_dim": 16, "attention_head_dim": 2},
}


def release() -> None:
    """Give back the locks that notebooks hold until their step or their process ends."""
    for file in runs._held.values():
        file.close()
    runs._held.clear()
    runs._at_work.clear()


def assert_equal_images(found: Sequence, expected: Sequence) -> None:
    """Bit for bit: for the same weights in memory, the same machine and batches of the same sizes."""
    assert np.array_equal(np.stack(found), np.stack(expected))


def assert_close_images(found: Sequence, expected: Sequence) -> None:
    """Within one of 255 levels: for weights that were saved and loaded, and for batches of other sizes.

    Weights at another place in memory, like batches of another size, may take another kernel, which rounds the last bit
    of a sum differently.
    """
    difference = np.abs(np.stack(found).astype(int) - np.stack(expected).astype(int))
    assert difference.max() <= 1, f"{difference.max()} levels at {(difference > 1).mean():.2%} of the values"
