"""A trained network on files and folders of pictures, from Python and from the command line."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from diffseg.augmentation import shown_side
from diffseg.benchmarks.classes import CITYSCAPES, VOC
from diffseg.benchmarks.evaluation import best_class, predict_labels
from diffseg.errors import DiffsegError
from diffseg.files import read_rows
from diffseg.inference import find_pictures, predict, predict_files
from diffseg.lab.cli import main
from diffseg.segmenters import load_segmenter, new_networks, save_segmenter
from diffseg.training import train_once
from diffseg.training_options import TrainingOptions

CLASSES = CITYSCAPES.classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network that was never trained, saved as step 4 saves it."""
    place = tmp_path_factory.mktemp("network")
    network = new_networks(1, "resunet-resnet10t", CLASSES, 0, palette=CITYSCAPES.palette)
    network.side = 32
    save_segmenter(network, place)
    return place


@pytest.fixture
def pictures(tmp_path):
    """A folder of five pictures of three sizes, one of them turned by its EXIF, one below a folder of its own."""
    place = tmp_path / "pictures"
    (place / "more").mkdir(parents=True)
    for name, size in {"a.jpg": (64, 48), "b.png": (80, 60), "c.png": (64, 48), "d.bmp": (40, 90)}.items():
        photo(*size).save(place / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(48, 64).save(place / "more" / "turned.jpg", exif=exif)
    return place


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def test_what_a_training_shows_is_remembered(tmp_path):
    options = TrainingOptions(1, 2, 32, (0.9, 1.1), 0.1, 1e-3, 0.0, "fp32", 0)
    data = [("wide", torch.zeros(3, 24, 48, dtype=torch.uint8), torch.zeros(24, 48, dtype=torch.int64))] * 2

    untrained = partial(new_networks, 2, "resunet-resnet10t", CLASSES, 0, palette=CITYSCAPES.palette)
    train_once(tmp_path / "network", untrained, data, 255, replace(options, training_mode="ensemble"), 0)
    panorama = ("panorama", torch.zeros(3, 8, 48, dtype=torch.uint8), torch.zeros(8, 48, dtype=torch.int64))
    train_once(
        tmp_path / "mixed",
        partial(new_networks, 1, "resunet-resnet10t", CLASSES, 0),
        [panorama, *data],
        255,
        options,
        0,
    )
    assert load_segmenter(tmp_path / "mixed").side == 16  # the usual image's, not the first one's
    network = load_segmenter(tmp_path / "network")
    assert [each.side for each in network.networks] == [16, 16]
    assert network.side == 16 and network.palette == CITYSCAPES.palette and network.classes == CLASSES
    saved = json.loads((tmp_path / "network" / "config.json").read_text())
    assert saved["side"] == 16 and saved["palette"][:2] == ["#804080", "#f423e8"]
    del saved["side"], saved["palette"]  # as diffseg 0.3.0 wrote it
    (tmp_path / "network" / "config.json").write_text(json.dumps(saved))
    assert load_segmenter(tmp_path / "network").side == 0
    for wrong in ({"palette": ["#804080"]}, {"side": -5}):
        (tmp_path / "network" / "config.json").write_text(json.dumps(saved | wrong))
        with pytest.raises(DiffsegError, match="no usable segmenter"):
            load_segmenter(tmp_path / "network")


@pytest.mark.parametrize(
    "size, crop, jitter, side",
    [
        ((64, 64), 64, (0.9, 1.1), 64),  # mini VOC
        ((64, 128), 64, (1.8, 2.2), 64),  # mini Cityscapes
        ((512, 512), 512, (0.5, 2.0), 512),  # VOC
        ((512, 1024), 512, (1.0, 4.0), 512),  # Cityscapes at half its size, as it is scored
        ((1024, 1024), 512, (0.5, 2.0), 512),  # larger on disk than the training shows it
    ],
)
def test_the_side_is_that_of_the_parameter_files(size, crop, jitter, side):
    assert shown_side(size, TrainingOptions(1, 1, crop, jitter, 0.0, 1.0, 0.0, "fp32", 0)) == side


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_a_saved_network_can_be_read_by_whom_the_umask_allows(tmp_path, umask, mode):
    """safetensors alone gives its files the mode 0600."""
    previous = os.umask(umask)
    try:
        save_segmenter(new_networks(1, "resunet-resnet10t", CLASSES, 0), tmp_path)
    finally:
        os.umask(previous)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "config.json": mode,
        "model.safetensors": mode,
    }


def test_a_picture_is_seen_at_the_side_of_the_training_unless_another_is_given(folder):
    network, picture = load_segmenter(folder), photo(96, 80)
    label, classes = predict(network, picture)
    assert classes == CLASSES and label.shape == (80, 96)
    assert np.array_equal(label, predict(folder, picture, side=32)[0])
    assert not np.array_equal(label, predict(network, picture, side=0)[0])


class Cars(torch.nn.Module):
    """A network that sees cars everywhere, and keeps what it was shown."""

    side, classes, palette = 8, CLASSES, CITYSCAPES.palette

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, images):
        self.seen.append(images)
        logits = torch.zeros(len(images), len(CLASSES), *images.shape[2:])
        logits[:, CLASSES.index("car")] = 1
        return logits


def test_the_network_sees_levels_from_0_to_1_scaled_without_aliasing():
    network, picture = Cars(), photo(20, 16)
    predict(network, picture)
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    expected = torch.nn.functional.interpolate(levels, (8, 10), mode="bilinear", antialias=True)
    torch.testing.assert_close(network.seen[0], expected, rtol=0, atol=1e-5)


def test_overlays_have_the_classs_colour_and_are_png_beyond_what_jpeg_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("diffseg.inference.JPEG_LIMIT", 50)
    for name, size in {"small": (50, 20), "large": (51, 20)}.items():
        Image.new("RGB", size, "grey").save(tmp_path / f"{name}.png")
    predict_files(Cars(), [tmp_path / "small.png", tmp_path / "large.png"], tmp_path / "out")
    overlays = sorted((tmp_path / "out" / "overlays").iterdir())
    assert [path.name for path in overlays] == ["large.png", "small.jpg"]
    for path in overlays:
        red, green, blue = np.asarray(Image.open(path).convert("RGB"), float)[4:-4, 4:-4].mean(axis=(0, 1))
        assert blue > 1.5 * max(red, green)  # a car is (0, 0, 142)


def test_classes_one_at_a_time_are_the_argmax_of_all():
    logits = torch.randn(5, 9, 7)
    logits[3] = logits[1]  # of equal ones the first
    scaled = torch.nn.functional.interpolate(logits[None], (31, 40), mode="bilinear")[0]
    assert torch.equal(best_class(logits[None], (31, 40))[0], scaled.argmax(dim=0))


def test_a_class_ruled_out_by_minus_infinity_rules_out_no_other():
    logits = torch.zeros(1, VOC.num_classes, 5, 7)
    logits[:, 3], logits[:, 5] = -torch.inf, 9.0
    assert (best_class(logits, (31, 40)) == 5).all()
    images = torch.zeros(1, 3, 31, 40, dtype=torch.uint8)
    assert all((predict_labels(lambda _: logits, images, VOC, flip=flip) == 5).all() for flip in (False, True))


def test_the_command_writes_masks_overlays_and_areas(folder, pictures, capsys):
    out, network = pictures / "out", load_segmenter(folder)
    assert main(["predict", str(folder), str(pictures), "--out", str(out)]) == 0
    assert main(["predict", str(folder), str(pictures), "--out", str(pictures), "--batch", "2"]) == 0  # not those masks
    assert capsys.readouterr().out.splitlines()[-1].startswith("5 images:")
    files = {"a": "a.jpg", "b": "b.png", "c": "c.png", "d": "d.bmp", "more/turned": "more/turned.jpg"}
    rows = read_rows(out / "areas.csv")
    assert {row["picture"] for row in rows} == set(files) and read_rows(out / "failed.csv") == []
    for name, file in files.items():
        label, _ = predict(network, pictures / file)
        with Image.open(out / "masks" / f"{name}.png") as mask, Image.open(out / "overlays" / f"{name}.jpg") as overlay:
            assert mask.mode == "P" and (np.asarray(mask) != label).mean() < 0.01  # a batch may round otherwise
            assert mask.getpalette()[:3] == [128, 64, 128] and overlay.size == mask.size
            areas = {row["class"]: int(row["pixels"]) for row in rows if row["picture"] == name}
            ids, counts = np.unique(np.asarray(mask), return_counts=True)
        assert areas == {CLASSES[k]: count for k, count in zip(ids, counts, strict=True)}
        shares = [float(row["share"]) for row in rows if row["picture"] == name]
        assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_more_classes_than_a_palette_has_are_written_as_imagenet_s_does(pictures, tmp_path):
    network = new_networks(1, "resunet-resnet10t", [f"class {k}" for k in range(300)], 0).eval()
    assert predict_files(network, [pictures / "a.jpg"], tmp_path / "out", side=0) == 1
    pixels = np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png")).astype(int)
    assert np.array_equal(pixels[..., 0] + 256 * pixels[..., 1], predict(network, pictures / "a.jpg")[0])


def test_a_broken_picture_stops_no_other(folder, pictures, tmp_path, capsys):
    (pictures / "b.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert main(["predict", str(folder), str(pictures), "--out", str(out)]) == 1
    assert "1 of 5 images could not be read" in capsys.readouterr().err
    assert len(list(out.rglob("*.png"))) == 4 and "b.png" in read_rows(out / "failed.csv")[0]["picture"]


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["nowhere.jpg"], "no image or folder nowhere.jpg"),
        (["--side", "-3"], "side -3"),
        (["--batch", "0"], "batch is 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(folder, pictures, tmp_path, capsys, more, sentence):
    assert main(["predict", str(folder), str(pictures), *more, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert sentence in error and "\n" not in error and not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_one_sentence(folder, pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["predict", str(folder), str(pictures), "--out", str(tmp_path / "file")]) == 1
    assert f"diffseg: cannot write to {tmp_path / 'file'} (" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["areas.csv", "masks"])
def test_an_earlier_prediction_and_masks_of_ones_own_are_kept(folder, pictures, tmp_path, capsys, name):
    command = ["predict", str(folder), str(pictures / "a.jpg"), "--out", str(tmp_path / "out")]
    if name == "masks":
        (tmp_path / "out" / "masks").mkdir(parents=True)
        (tmp_path / "out" / "masks" / "a.png").write_text("corrected by hand")
    else:
        assert main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert main([*command, "--side", "64"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path / 'out'} holds" in error and name in error
    assert "give another --out" in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


def test_what_is_interrupted_leaves_nothing_and_is_made_by_the_same_command(folder, pictures, tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("diffseg.inference.write_rows", cut)  # after the last picture
        with pytest.raises(KeyboardInterrupt):
            predict_files(load_segmenter(folder), [pictures], out)
    assert list(out.iterdir()) == []
    assert predict_files(load_segmenter(folder), [pictures], out) == 5


def test_a_name_that_no_table_holds_is_refused_before_anything_is_predicted(pictures):
    odd = pictures / os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(pictures / "b.png", odd)
    for place in (odd, pictures):
        with pytest.raises(DiffsegError, match="is not UTF-8"):
            find_pictures([place])


def test_two_pictures_of_one_name_and_no_picture_are_refused(pictures, tmp_path):
    shutil.copyfile(pictures / "c.png", pictures / "a.png")
    with pytest.raises(DiffsegError, match="would both become a.png"):
        find_pictures([pictures])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffsegError, match="no image in"):
        find_pictures([tmp_path / "empty"])


def test_a_network_of_unknown_side_asks_for_it(pictures, tmp_path):
    network = new_networks(1, "resunet-resnet10t", VOC.classes, 0).eval()
    with pytest.raises(DiffsegError, match="give --side"):
        predict_files(network, [pictures], tmp_path / "out")
    assert predict_files(network, [pictures / "a.jpg"], tmp_path / "out", side=0) == 1


def test_a_network_of_the_hub_that_cannot_be_had_is_one_sentence(monkeypatch, pictures, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["predict", "nobody/nothing", str(pictures), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert "nobody/nothing is no folder here, and the hub did not give such a network" in error
    assert "go online once" in error and "\n" not in error and len(error) < 200


def test_a_network_in_the_hubs_cache_is_read_offline(folder, monkeypatch, tmp_path):
    """In the layout in which the hub's client keeps what it downloaded."""
    cached, revision = tmp_path / "models--somebody--network", "0" * 40
    shutil.copytree(folder, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    network = load_segmenter("somebody/network")
    assert network.side == 32 and network.classes == CLASSES
