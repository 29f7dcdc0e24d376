"""What the name "mini" stands for, in every parameter that may have it; registered here and nowhere else."""

from pathlib import Path

from diffseg.paths import register

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"


def _data() -> Path:
    from diffseg.miniworld.disk import mini_data  # here: importing diffseg must not load torch

    return mini_data()


# the data is made when it is first asked for, by these modules from this art
_MADE_OF = [HERE / "art", *(HERE / f"{name}.py" for name in ("scenes", "disk", "imagenet_s", "cityscapes"))]

register("generator", "mini", lambda: WEIGHTS / "generator")
register("encoder_weights", "mini", lambda: WEIGHTS / "encoder")
register("sam_checkpoint", "mini", lambda: WEIGHTS / "sam")
register("reference_network", "mini", lambda: WEIGHTS / "oracle")
register("data_root", "mini", _data, _MADE_OF)
register("target_images", "mini", lambda: _data() / "leftImg8bit" / "train", _MADE_OF)  # of mini Cityscapes
