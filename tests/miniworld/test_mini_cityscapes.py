"""Mini Cityscapes: the official tree and codes, every class, and the same bytes each time."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from diffseg.benchmarks.classes import CITYSCAPES
from diffseg.benchmarks.readers import open_split
from diffseg.miniworld import cityscapes
from diffseg.miniworld.scenes import load_art

OFFICIAL = {row.name: row for row in torchvision.datasets.Cityscapes.classes}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cityscapes")
    cityscapes.write_cityscapes(folder, {"train": 60, "val": 8}, seed=0)
    return folder


def test_the_official_reader_opens_it(root):
    for split, size in (("train", 60), ("val", 8)):
        dataset = open_split(CITYSCAPES, root, split)
        assert len(dataset) == size
        name, image, label = dataset[0]
        city = name.split("_")[0]
        assert (root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png").is_file()
        assert image.shape == (3, 64, 128) and image.dtype == torch.uint8 and label.shape == (64, 128)
    cities = [{path.name for path in (root / "leftImg8bit" / split).iterdir()} for split in ("train", "val")]
    assert not cities[0] & cities[1]  # as in Cityscapes, no city is in two splits


def test_label_ids_are_the_official_ones_and_every_thing_occurs(root):
    assert all(OFFICIAL[name].id == value for name, value in cityscapes.LABEL_IDS.items())
    files = sorted((root / "gtFine" / "train").rglob("*_gtFine_labelIds.png"))
    labels = []
    for file in files:
        with Image.open(file) as picture:
            assert picture.mode == "L" and picture.size == (128, 64)
            labels.append(np.asarray(picture))
    labels = np.stack(labels)
    assert set(np.unique(labels)) <= set(cityscapes.LABEL_IDS.values())
    border = np.concatenate([labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]], axis=None)
    assert (border == OFFICIAL["out of roi"].id).all()
    assert (labels[:, -3, 64] == OFFICIAL["ego vehicle"].id).all()  # the bonnet
    pictures_with = {name: (labels == OFFICIAL[name].id).any((1, 2)).sum() for name in cityscapes.LABEL_IDS}
    for name in cityscapes.THINGS:
        assert pictures_with[name] >= 5, name
    for name in ("road", "sidewalk", "building", "sky"):
        assert pictures_with[name] == 60, name
    assert pictures_with["vegetation"] > 30 and pictures_with["traffic sign"] > 10 and pictures_with["pole"] > 10
    things = np.isin(labels, [OFFICIAL[name].id for name in cityscapes.THINGS]).mean((1, 2))
    assert 0.02 < things.mean() < 0.3  # small things in a wide scene


def test_a_scene_follows_from_seed_split_and_number_alone(root, tmp_path):
    cityscapes.write_cityscapes(tmp_path / "again", {"val": 3}, seed=0)
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.png")]
    assert len(files) == 6
    assert all((tmp_path / "again" / file).read_bytes() == (root / file).read_bytes() for file in files)
    cityscapes.write_cityscapes(tmp_path / "other", {"val": 3}, seed=1)
    assert all((tmp_path / "other" / file).read_bytes() != (root / file).read_bytes() for file in files)
    with pytest.raises(KeyError):
        cityscapes.write_cityscapes(tmp_path, {"test": 1}, seed=0)


def test_labels_lie_where_the_picture_shows_the_thing(monkeypatch):
    """A red square pasted for every emoji: what is labelled as a thing is red, and the rest is not."""
    square = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    monkeypatch.setattr(cityscapes, "cut_out", lambda word: (square, square.getchannel("A")))
    scenes = [cityscapes.street_scene(np.random.default_rng(k)) for k in range(10)]
    redness = np.stack([picture[..., 0].astype(int) - picture[..., 1] for picture, _ in scenes])
    labels = np.stack([label for _, label in scenes])
    things = np.isin(labels, [OFFICIAL[name].id for name in cityscapes.THINGS])
    red = redness > 60
    assert (red & things).sum() / (red | things).sum() > 0.97  # but for the border; a quarter of a pixel off: 0.955
    bicycle, rider = (labels == OFFICIAL[name].id for name in ("bicycle", "rider"))
    for k in np.flatnonzero(rider.any((1, 2))):
        columns = rider[k].any(0)
        assert np.flatnonzero(rider[k].any(1)).min() < 50 and bicycle[k][:, columns].any()  # on top of a bicycle


def test_what_is_seen_through_a_wheel_is_labelled_bicycle():
    art, outline = cityscapes.cut_out("bicycle")
    opaque, inside = np.asarray(art)[..., 3] > 127, np.asarray(outline) > 0
    assert (inside[opaque]).all() and inside.sum() > 1.2 * opaque.sum()
    assert not inside[0, 0] and set(np.unique(outline)) == {0, 255}
    assert opaque.any(1)[[0, -1]].all() and opaque.any(0)[[0, -1]].all()  # no margin: it stands on the ground
    assert art.size < load_art("bicycle").size
