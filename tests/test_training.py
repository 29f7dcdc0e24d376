"""Segmenters and their training at tiny size."""

import pytest
import torch

from diffseg.errors import DiffsegError
from diffseg.segmenters import SEGMENTERS, Segmenter, load_segmenter, save_segmenter
from diffseg.training import Augmented, TrainingOptions, train

OPTIONS = TrainingOptions(
    iterations=12,
    training_batch=4,
    crop=32,
    scale_jitter=(0.9, 1.1),
    colour_jitter=0.1,
    learning_rate=2e-3,
    weight_decay=1e-4,
    precision="fp32",
    workers=0,
)


def halves(count: int = 8) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Pictures whose upper half is red and of class 1, the rest blue background."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, :16], image[2, 16:] = 220, 220
    label = torch.zeros(32, 32, dtype=torch.int64)
    label[:16] = 1
    return [(f"picture_{k}", image, label) for k in range(count)]


def trained(dataset, options=OPTIONS, seed=0) -> tuple[Segmenter, list[float]]:
    torch.manual_seed(seed)
    network = Segmenter("fpn-resnet18", ("background", "thing"))
    return network, train(network, dataset, 255, options, seed)


def test_training_learns_an_easy_task_and_repeats_exactly():
    network, losses = trained(halves())
    again, losses_again = trained(halves())
    assert losses == losses_again and len(losses) == OPTIONS.iterations
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_a_set_of_ignored_pixels_only_is_an_error():
    """Where every pixel is ignored there is no loss to learn from, which is said."""
    nothing = [(name, image, torch.full_like(label, 255)) for name, image, label in halves()]
    with pytest.raises(DiffsegError, match="not finite at iteration 0"):
        trained(nothing)


def test_picture_and_label_are_transformed_together():
    """Wherever the transformed picture is red, the label is 1; where it is padded, the label is ignored."""
    options = TrainingOptions(**{**OPTIONS.__dict__, "colour_jitter": 0.0, "scale_jitter": (0.5, 1.5)})
    augmented = Augmented(halves(), 255, options)
    for k in range(8):
        torch.manual_seed(k)
        _, image, label = augmented[k]
        assert image.shape == (3, 32, 32) and 0 <= image.min() and image.max() <= 1
        red, blue = image[0] > 0.8, image[2] > 0.8
        assert (label[red] == 1).float().mean() > 0.97 and (label[blue] == 0).float().mean() > 0.97
        assert (label[image.amax(dim=0) == 0] == 255).all()


def test_a_loss_that_is_not_finite_names_iteration_and_pictures():
    options = TrainingOptions(**{**OPTIONS.__dict__, "learning_rate": float("inf")})
    with pytest.raises(DiffsegError, match=r"iteration 1 \(pictures picture_"):
        trained(halves(), options)


def test_an_unknown_precision_is_named():
    options = TrainingOptions(**{**OPTIONS.__dict__, "precision": "fp8"})
    with pytest.raises(DiffsegError, match="fp8"):
        trained(halves(), options)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_segmenter_maps_odd_sizes_to_logits_of_the_same_size(name):
    network = Segmenter(name, ("background", "thing", "other")).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, 3, 40, 75)).shape == (2, 3, 40, 75)


def test_a_saved_segmenter_predicts_the_same(tmp_path):
    network = Segmenter("unet-resnet18", ("background", "thing")).eval()
    save_segmenter(network, tmp_path)
    image = torch.rand(1, 3, 64, 64)
    loaded = load_segmenter(tmp_path)
    with torch.inference_mode():
        assert torch.equal(network(image), loaded(image))
    assert loaded.classes == ("background", "thing")
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def test_unknown_missing_and_truncated_segmenters_are_one_sentence(tmp_path):
    with pytest.raises(DiffsegError, match="unet-resnet99"):
        Segmenter("unet-resnet99", ("background",))
    with pytest.raises(DiffsegError, match="train it again"):
        load_segmenter(tmp_path / "nowhere")
    save_segmenter(Segmenter("fpn-resnet18", ("background", "thing")), tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DiffsegError, match="train it again"):
        load_segmenter(tmp_path)
