"""What the name "mini" stands for, in every parameter that may have it; registered here and nowhere else."""

from pathlib import Path

from diffseg.paths import register

WEIGHTS = Path(__file__).parent / "weights"


def _data() -> Path:
    from diffseg.miniworld.disk import mini_data  # here: importing diffseg must not load torch

    return mini_data()


register(
    "mini",
    generator=lambda: WEIGHTS / "generator",
    sam_checkpoint=lambda: WEIGHTS / "sam",
    reference_network=lambda: WEIGHTS / "oracle",
    data_root=_data,
    target_images=lambda: _data() / "leftImg8bit" / "train",  # mini Cityscapes' train images
)
