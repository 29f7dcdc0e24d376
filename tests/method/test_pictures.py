"""A user's pictures and their captions: every mode, format, orientation and name is read, or refused by name."""

import json
import os
import struct
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffseg.benchmarks.classes import FOLDER, VOC
from diffseg.benchmarks.labels import read_label, write_label
from diffseg.benchmarks.readers import LabelledPictures, open_split, pictures_set
from diffseg.errors import DiffsegError
from diffseg.files import METADATA
from diffseg.inference import predict
from diffseg.pictures import read_picture
from diffseg.segmenters import Segmenter
from diffseg.target_domain import build_captions, find_pictures, own_captions

NOISE = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)


def photo(mode: str, pixels: np.ndarray = NOISE) -> Image.Image:
    picture = Image.fromarray(pixels)
    if mode in ("I", "I;16", "F"):
        kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        return Image.fromarray(np.asarray(picture.convert("L")).astype(kind) * kind(257 if mode != "F" else 1))
    return picture.quantize(64) if mode == "P" else picture.convert(mode)


def save(picture: Image.Image, path, turned: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1  # 6: the camera was held upright
    picture.save(path, exif=exif)


# pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_a_picture_of_any_mode_is_read_as_it_looks(mode):
    seen = read_picture(photo(mode))
    assert seen.mode == "RGB" and seen.size == (50, 37)
    grey = np.asarray(photo("L"))
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(seen, NOISE)
    if mode in ("L", "LA", "I;16"):  # 16 bits by their range, not by the largest value of one picture
        assert np.array_equal(np.asarray(seen), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_whose_white_is_unknown_is_refused(tmp_path, mode):
    photo(mode).save(tmp_path / "a.tif")
    for picture, name in ((photo(mode), "the image"), (tmp_path / "a.tif", "a.tif")):
        with pytest.raises(DiffsegError, match=f"{name} has the mode {mode} .*; convert it to 8-bit RGB"):
            read_picture(picture)


def test_transparency_shows_white():
    clear = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    seen = read_picture(clear)
    assert seen.getpixel((0, 0)) == (10, 20, 30) and seen.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_the_cameras_orientation_is_obeyed(tmp_path, name):
    save(photo("RGB"), tmp_path / name, turned=True)
    assert read_picture(tmp_path / name).size == (37, 50)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA"])
def test_a_turned_tiff_has_its_rows(tmp_path, mode):  # Pillow maps such a file into memory, in the shape of the turned
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(mode).save(tmp_path / "a.tif", exif=exif)
    turned = read_picture(photo(mode)).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(read_picture(tmp_path / "a.tif"), turned)


def test_damaged_exif_stops_nothing(tmp_path):
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(
        "<HHI4s", 0x011A, 2, 3, b"72"
    )  # a text, no number
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    photo("RGB").save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert read_picture(tmp_path / "a.jpg").size == (37, 50)
    photo("RGB").save(tmp_path / "b.png", exif=b"Exif\0\0no TIFF")
    assert read_picture(tmp_path / "b.png").size == (50, 37)


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_pillows(turn):
    picture = photo("RGB")
    picture.getexif()[0x0112] = turn
    assert read_picture(picture).tobytes() == ImageOps.exif_transpose(picture).tobytes()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tiff", "a.png"])
def test_of_several_frames_the_first_is_read(tmp_path, name):
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    black.save(tmp_path / name, save_all=True, append_images=[white])
    assert np.asarray(read_picture(tmp_path / name)).max() < 8


def test_a_picture_too_large_for_pillow_is_refused(tmp_path, monkeypatch):
    photo("RGB").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DiffsegError, match="a.png"):
        read_picture(tmp_path / "a.png")


# every place that reads pictures


def make_voc(root, name: str, picture: Image.Image, label_shape, turned: bool = False):
    base = root / "VOCdevkit" / "VOC2012"
    save(picture, base / "JPEGImages" / f"{name}.jpg", turned)
    write_label(base / "SegmentationClass" / f"{name}.png", np.ones(label_shape, int), VOC)
    listing = base / "ImageSets" / "Segmentation" / "train.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with open(listing, "a") as file:
        file.write(f"{name}\n")
    return base


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_reader_sees_the_same_picture(tmp_path, mode):
    base = make_voc(tmp_path, "a", photo(mode), (37, 50))
    path = base / "JPEGImages" / "a.jpg"
    seen = np.asarray(read_picture(path))
    assert seen.shape == (37, 50, 3)
    for dataset in (open_split(VOC, tmp_path, "train"), pictures_set(base, VOC)):
        assert np.array_equal(dataset[0][1].permute(1, 2, 0), seen)
    label, _ = predict(Segmenter("unet-resnet18", ("background", "dog")).eval(), path)
    assert label.shape == (37, 50)
    assert find_pictures(base / "JPEGImages") == [path]


def test_official_labels_lie_on_the_pixels_as_they_are_stored(tmp_path):
    base = make_voc(tmp_path, "a", photo("RGB"), (37, 50), turned=True)
    stored = np.asarray(Image.open(base / "JPEGImages" / "a.jpg"))
    assert np.array_equal(open_split(VOC, tmp_path, "train")[0][1].permute(1, 2, 0), stored)
    make_voc(tmp_path / "b", "b", photo("RGB"), (50, 37))
    with pytest.raises(DiffsegError, match="b.png is 50 x 37 .* is 37 x 50; use its own label"):
        open_split(VOC, tmp_path / "b", "train")[0]


def test_a_users_label_of_the_picture_before_it_was_turned_is_named(tmp_path):
    own = replace(VOC, protocol=FOLDER)
    make_voc(tmp_path, "a", photo("RGB"), (37, 50), turned=True)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    item = "a", base / "JPEGImages" / "a.jpg", base / "SegmentationClass" / "a.png"
    with pytest.raises(DiffsegError, match="a.png is 37 x 50 .* is 50 x 37, held upright as its EXIF says"):
        LabelledPictures(own, [item], lambda name, path: read_label(path, VOC))[0]


def test_names_with_dots_are_names(tmp_path):
    for name in ("frame.0001", "frame.0002"):
        base = make_voc(tmp_path, name, photo("RGB"), (37, 50))
    for dataset in (open_split(VOC, tmp_path, "train"), pictures_set(base, VOC)):
        assert [dataset[k][0] for k in range(2)] == ["frame.0001", "frame.0002"]
    listing = base / "ImageSets" / "Segmentation" / "train.txt"
    listing.write_text("/JPEGImages/frame.0001.jpg /SegmentationClass/frame.0001.png\nframe.0002\n")
    assert [name for name, *_ in pictures_set(base, VOC).items] == ["frame.0001", "frame.0002"]
    listing.write_bytes(b"frame.0001\nfr\xe4me\n")
    with pytest.raises(DiffsegError, match="train.txt, line 2, is not UTF-8"):
        pictures_set(base, VOC)


# the folder of target pictures


@pytest.mark.parametrize("name", ["a.JPG", "a.jpeg", "a.jfif", "a.png", "a.ppm", "a.webp", "a.bmp", "a.tif", "a.gif"])
def test_target_pictures_of_every_format_and_mode_are_read(tmp_path, name):
    photo("L").save(tmp_path / name)
    assert find_pictures(tmp_path) == [tmp_path / name]
    assert read_picture(tmp_path / name).mode == "RGB"


@pytest.mark.parametrize("name", ["a.heic", "clip.mp4", "a.svg", "a.dng"])
def test_pictures_that_are_not_read_are_refused_by_name(tmp_path, name):
    photo("RGB").save(tmp_path / "1.png")
    (tmp_path / name).write_bytes(b"....ftyp")
    with pytest.raises(DiffsegError, match=f"{name} is truncated or no image that can be read"):
        find_pictures(tmp_path)


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    for name in ("1.png", "sub/2.png", ".ipynb_checkpoints/1-checkpoint.png", "sub/.cache/deep/3.png", "._1.png"):
        save(photo("RGB"), tmp_path / name)
    assert find_pictures(tmp_path) == [tmp_path / "1.png", tmp_path / "sub" / "2.png"]


def test_a_name_that_is_not_utf_8_is_refused_in_one_printable_sentence(tmp_path):
    photo("RGB").save(tmp_path / "1.png")
    os.link(os.fsencode(tmp_path / "1.png"), os.fsencode(tmp_path) + b"/\xe4.png")
    with pytest.raises(DiffsegError, match=r"xe4.png.* is not UTF-8; rename the file") as error:
        find_pictures(tmp_path)
    str(error.value).encode()


# captions of one's own


@pytest.fixture
def paths(tmp_path):
    for name in ("0.png", "sub/0.png", "sub/1.png"):
        save(photo("RGB"), tmp_path / name)
    return find_pictures(tmp_path)


def line(name: str, text: str) -> str:
    return json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n"


def test_captions_stand_above_or_beside_pictures_or_in_their_text_files(tmp_path, paths):
    (tmp_path / METADATA).write_text(line("sub/0.png", "a car") + "\n" + line("sub/../0.png", "a\u2028bus"))
    (tmp_path / "sub" / METADATA).write_text(line("0.png", "a car"))  # the same is no conflict
    (tmp_path / "sub" / "1.txt").write_text("\ufeffa street\n  with a cafe\u0301\n")
    assert own_captions(paths) == dict(zip(paths, ("a bus", "a car", "a street with a café"), strict=True))
    assert own_captions(paths[:1]) == {paths[0]: "a bus"}  # the others are held out


def test_a_caption_finds_its_picture_however_its_name_was_typed(tmp_path):
    save(photo("RGB"), tmp_path / unicodedata.normalize("NFD", "café.png"))
    (tmp_path / METADATA).write_text(line("café.png", "a car"))
    assert list(own_captions(find_pictures(tmp_path)).values()) == ["a car"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (METADATA, b"\n{file_name", "metadata.jsonl, line 2: give"),
        (METADATA, b'["0.png"]', "metadata.jsonl, line 1: give"),
        (METADATA, b'{"file_name": "0.png"}', "metadata.jsonl, line 1: give"),
        (METADATA, b'{"file_name": "0.png", "text": 3}', "metadata.jsonl, line 1: give"),
        (METADATA, b'{"file_name": "7.png", "text": "a car"}', "line 1: there is no image .*7.png"),
        (METADATA, b'{"file_name": "0.png", "text": " "}', "line 1: the text is empty"),
        (METADATA, b'{"file_name": "0.png", "text": "\xe4"}', "metadata.jsonl, line 1, is not UTF-8"),
        ("0.txt", b" \n", "0.txt, line 1: the text is empty"),
        ("0.txt", b"0 0.51 0.44 0.2 0.3", "0.txt, line 1: '0 0.51 0.44 0.2 0.3' is no caption; .* move labels away"),
        ("0.txt", b"a car\n\xe4", "0.txt, line 2, is not UTF-8"),
        ("0.txt", b"a bus", r"0.txt, line 1: .*0.png has another caption in .*sub.metadata.jsonl, line 1"),
    ],
)
def test_what_is_no_caption_is_named_with_its_line(tmp_path, paths, name, content, says):
    if "another" in says:
        (tmp_path / "sub" / METADATA).write_text(line("../0.png", "a car"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DiffsegError, match=says) as error:
        own_captions(paths)
    assert "\n" not in str(error.value)


def test_captions_for_all_are_composed():
    assert build_captions(["a {}"], ["cafe\u0301"]) == build_captions(["a {}"], ["café"])
