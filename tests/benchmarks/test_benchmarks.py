"""Classes, label coding and readers, checked against the official tables and hand-made folders."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffseg.benchmarks.classes import (
    BENCHMARKS,
    CITYSCAPES,
    CITYSCAPES_THINGS,
    MINI_IMAGENET_S,
    VOC,
    get_benchmark,
    imagenet_s,
    voc_palette,
)
from diffseg.benchmarks.labels import read_label, read_prediction, write_label, write_picture_label, write_prediction
from diffseg.benchmarks.readers import open_split, pictures_set
from diffseg.errors import DiffsegError
from diffseg.generator import load_tokenizer
from diffseg.miniworld import disk, scenes
from diffseg.miniworld import imagenet_s as imagenet_s_writer
from diffseg.reliability import rank_within_class
from diffseg.words import known_words, load_words

IMAGENET_S_50 = BENCHMARKS["imagenet-s-50"]
IMAGENET_S_919 = BENCHMARKS["imagenet-s-919"]


def random_label(benchmark, shape=(6, 8), seed=0):
    """A label map that holds the first and last class and, often, ignored pixels."""
    random = np.random.default_rng(seed)
    label = random.integers(0, benchmark.num_classes, shape)
    label[random.random(shape) < 0.2] = benchmark.ignore
    label[0, :3] = 0, benchmark.num_classes - 1, benchmark.ignore
    return label


def save_image(path, size=(6, 8), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG")


def make_voc(root, names=("2007_000033", "2007_000042"), split="val"):
    base = root / "VOCdevkit" / "VOC2012"
    for name in names:
        save_image(base / "JPEGImages" / f"{name}.jpg")
        write_label(base / "SegmentationClass" / f"{name}.png", random_label(VOC), VOC)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return base


def make_cityscapes(root, label=None, split="val"):
    for city, frame in (("munster", "000001_000019"), ("frankfurt", "000000_000294")):
        stem = f"{city}_{frame}"
        save_image(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        path = root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"
        if label is None:
            write_label(path, random_label(CITYSCAPES), CITYSCAPES)
        else:
            path.parent.mkdir(parents=True)
            Image.fromarray(label.astype(np.uint8)).save(path)
    return root / "gtFine" / split


def make_imagenet_s(root, benchmark=IMAGENET_S_50):
    for tag in benchmark.classes[2], benchmark.classes[1]:
        base = root / benchmark.folder
        save_image(base / "validation" / tag / f"{tag}_1.JPEG")
        write_label(base / "validation-segmentation" / tag / f"{tag}_1.png", random_label(benchmark), benchmark)
    return base


# Classes


def test_class_lists_have_the_official_sizes_and_no_name_twice():
    sizes = {name: benchmark.num_classes for name, benchmark in BENCHMARKS.items()}
    assert sizes == {
        "voc": 21,
        "imagenet-s-50": 51,
        "imagenet-s-300": 301,
        "imagenet-s-919": 920,
        "cityscapes": 19,
        "cityscapes-things": 9,
        "mini-imagenet-s": 97,
    }
    for benchmark in BENCHMARKS.values():
        assert len(set(benchmark.classes)) == len(benchmark.palette) == benchmark.num_classes
        assert {benchmark.training_split, benchmark.evaluation_split} <= set(benchmark.splits)
    assert VOC.classes[15] == "person" and VOC.foreground == VOC.classes[1:]
    assert CITYSCAPES.foreground == CITYSCAPES.classes


def test_imagenet_s_ids_are_ranks_of_the_sorted_tags_and_the_merged_tags_are_gone():
    assert imagenet_s("two", ["n02", "n01"], "Two").classes == ("background", "n01", "n02")
    assert IMAGENET_S_50.classes[1] == "n01443537"  # goldfish, the first of the official list of 50
    merged = {"n04356056", "n04493381", "n03642806", "n04008634", "n03887697"}
    into = {"n04355933", "n02808440", "n03832673", "n03773504", "n15075141"}
    assert not merged & set(IMAGENET_S_919.classes) and into <= set(IMAGENET_S_919.classes)
    with pytest.raises(DiffsegError, match="999 different tags"):
        imagenet_s("double", ["n01", "n01"], "Double")


def test_voc_palette_has_the_colours_printed_in_the_development_kit():
    palette = voc_palette(256)
    assert palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert palette[15] == (192, 128, 128) and palette[20] == (0, 64, 128) and palette[255] == (224, 224, 192)
    assert len(set(voc_palette(920))) == 920


def test_cityscapes_table_is_that_of_cityscapesscripts():
    official = pytest.importorskip("cityscapesscripts.helpers.labels")
    for index, name in enumerate(CITYSCAPES.classes):
        row = official.trainId2label[index]
        assert (name, CITYSCAPES.palette[index]) == (row.name, row.color)
    for group, category in (("Human", "human"), ("Vehicle", "vehicle")):
        rows = [row for row in official.category2labels[category] if not row.ignoreInEval]
        assert CITYSCAPES.groups[group] == tuple(sorted(row.trainId for row in rows))


def test_an_unknown_benchmark_is_answered_with_the_known_ones():
    assert get_benchmark("voc") is VOC
    with pytest.raises(DiffsegError, match="imagenet-s-919"):
        get_benchmark("coco")


# Label coding


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(BENCHMARKS)), seed=st.integers(0, 10**6), side=st.integers(3, 9))
def test_every_coding_gives_back_what_was_written(tmp_path_factory, name, seed, side):
    benchmark = BENCHMARKS[name]
    path = tmp_path_factory.mktemp("coding") / "label.png"
    label = random_label(benchmark, (side, 5), seed)
    write_label(path, label, benchmark)
    again = read_label(path, benchmark)
    assert again.dtype == np.int64
    np.testing.assert_array_equal(again, label)


def test_voc_files_hold_the_index_and_the_palette(tmp_path):
    write_label(tmp_path / "label.png", np.array([[0, 1, 255]]), VOC)
    with Image.open(tmp_path / "label.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), [[0, 1, 255]])
        np.testing.assert_array_equal(np.array(picture.convert("RGB"))[0], [(0, 0, 0), (128, 0, 0), (224, 224, 192)])


def test_imagenet_s_ids_beyond_255_do_not_overflow(tmp_path):
    write_label(tmp_path / "label.png", np.array([[255, 256, 919, 1000]]), IMAGENET_S_919)
    with Image.open(tmp_path / "label.png") as picture:
        np.testing.assert_array_equal(np.array(picture)[0], [(255, 0, 0), (0, 1, 0), (151, 3, 0), (232, 3, 0)])
    np.testing.assert_array_equal(read_label(tmp_path / "label.png", IMAGENET_S_919), [[255, 256, 919, 1000]])


def test_cityscapes_label_ids_become_train_ids_as_in_cityscapesscripts(tmp_path):
    official = pytest.importorskip("cityscapesscripts.helpers.labels")
    ids = np.arange(34, dtype=np.uint8)[None]
    Image.fromarray(ids).save(tmp_path / "label.png")
    expected = [[official.id2label[index].trainId for index in range(34)]]
    np.testing.assert_array_equal(read_label(tmp_path / "label.png", CITYSCAPES), expected)
    write_label(tmp_path / "again.png", np.array([[0, 13, 255]]), CITYSCAPES)
    with Image.open(tmp_path / "again.png") as picture:
        np.testing.assert_array_equal(np.array(picture), [[7, 26, 0]])


@pytest.mark.parametrize(
    ("name", "pixels", "words"),
    [
        ("voc", np.zeros((4, 4, 3), np.uint8), "never convert it to RGB"),
        ("voc", np.full((4, 4), 21, np.uint8), "label id 21"),
        ("imagenet-s-50", np.zeros((4, 4), np.uint8), "id = R \\+ 256"),
        ("imagenet-s-50", np.full((4, 4, 3), 7, np.uint8), "B = 0"),
        ("imagenet-s-50", np.array([[[51, 0, 0]]], np.uint8), "label id 51"),
        ("imagenet-s-300", np.array([[[231, 3, 0]]], np.uint8), "label id 999"),
        ("cityscapes", np.array([[0, 8, 255]], np.uint8), "255 occurs in trainIds"),
        ("cityscapes", np.array([[34]], np.uint8), "largest value 34"),
        ("cityscapes", np.array([[26001]], np.uint16), "labelIds"),
        ("cityscapes", np.zeros((4, 4, 3), np.uint8), "labelIds"),
    ],
)
def test_another_coding_is_refused_with_the_name_of_the_file(tmp_path, name, pixels, words):
    path = tmp_path / "wrong.png"
    Image.fromarray(pixels).save(path)
    with pytest.raises(DiffsegError, match=words) as caught:
        read_label(path, BENCHMARKS[name])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "words"), [("RGB", "never convert it to RGB"), ("RGBA", "RGBA"), ("L", "label id 147")]
)
def test_a_palette_png_that_lost_its_index_is_refused_as_label_and_as_prediction(tmp_path, mode, words):
    base = make_voc(tmp_path)
    path = base / "SegmentationClass" / "2007_000033.png"
    write_label(path, np.full((6, 8), 15), VOC)
    with Image.open(path) as picture:
        converted = picture.convert(mode)
    converted.save(path)
    with pytest.raises(DiffsegError, match=words) as caught:
        open_split(VOC, tmp_path, "val")[0]
    assert str(path) in str(caught.value)
    with pytest.raises(DiffsegError, match=words):
        read_prediction(base / "SegmentationClass", "2007_000033", VOC, (6, 8))


def test_a_file_named_as_train_ids_is_refused(tmp_path):
    path = tmp_path / "munster_000001_000019_gtFine_labelTrainIds.png"
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(path)
    with pytest.raises(DiffsegError, match="labelIds"):
        read_label(path, CITYSCAPES)


def test_nothing_is_written_for_an_id_that_is_no_class(tmp_path):
    for label in (np.array([[21]]), np.array([[-1]]), np.zeros((2, 2, 2))):
        with pytest.raises(DiffsegError):
            write_label(tmp_path / "label.png", label, VOC)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_predictions_in_the_servers_format_come_back(tmp_path, name):
    benchmark = BENCHMARKS[name]
    prediction = torch.randint(0, benchmark.num_classes, (5, 7), generator=torch.Generator().manual_seed(0))
    path = write_prediction(tmp_path, "folder/picture", prediction, benchmark, (5, 7))
    assert path == tmp_path / "folder" / "picture.png"
    np.testing.assert_array_equal(read_prediction(tmp_path, "folder/picture", benchmark, (5, 7)), prediction)
    with pytest.raises(DiffsegError, match="\\(5, 7\\).*7 x 5"):
        read_prediction(tmp_path, "folder/picture", benchmark, (7, 5))
    with pytest.raises(DiffsegError, match="The prediction for other"):
        write_prediction(tmp_path, "other", prediction, benchmark, (7, 5))
    with pytest.raises(DiffsegError, match="without a class"):
        write_prediction(tmp_path, "other", torch.full((5, 7), benchmark.ignore), benchmark, (5, 7))
    with pytest.raises(DiffsegError, match="other.png is missing"):
        read_prediction(tmp_path, "other", benchmark, (5, 7))


def test_predictions_are_coded_as_the_servers_ask(tmp_path):
    """The PNG's mode and numbers, looked at without our reader."""
    for name, ids, mode, pixels in (
        ("voc", [[0, 15, 20]], "P", [[0, 15, 20]]),
        ("cityscapes", [[0, 13, 18]], "L", [[7, 26, 33]]),
        ("imagenet-s-919", [[0, 255, 919]], "RGB", [[[0, 0, 0], [255, 0, 0], [151, 3, 0]]]),
    ):
        path = write_prediction(tmp_path, name, np.array(ids), BENCHMARKS[name], (1, 3))
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, np.array(picture).tolist()) == ("PNG", mode, pixels)
            if mode == "P":
                assert picture.getpalette()[45:48] == [192, 128, 128], "VOC's colour of a person"


def test_cityscapes_predictions_in_train_ids_are_refused_with_the_remedy(tmp_path):
    Image.fromarray(np.arange(19, dtype=np.uint8)[None]).save(tmp_path / "a.png")
    with pytest.raises(DiffsegError, match="without a class of cityscapes.*labelId \\(not trainId\\)"):
        read_prediction(tmp_path, "a", CITYSCAPES, (1, 19))


# Readers


def test_voc_split_is_read_in_the_order_of_its_list(tmp_path):
    base = make_voc(tmp_path)
    dataset = open_split(VOC, tmp_path, "val")
    assert [dataset[index][0] for index in range(len(dataset))] == ["2007_000033", "2007_000042"]
    _, image, label = pickle.loads(pickle.dumps(dataset))[1]
    assert (image.dtype, image.shape, label.dtype) == (torch.uint8, (3, 6, 8), torch.int64)
    with Image.open(base / "JPEGImages" / "2007_000042.jpg") as picture:
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.array(picture))
    np.testing.assert_array_equal(label, random_label(VOC))


def test_trainaug_reads_lists_of_names_and_of_paths_and_says_what_it_needs(tmp_path):
    base = make_voc(tmp_path, split="trainaug")
    with pytest.raises(DiffsegError, match="SegmentationClassAug.*Semantic Boundaries"):
        open_split(VOC, tmp_path, "trainaug")
    (base / "SegmentationClass").rename(base / "SegmentationClassAug")
    names = open_split(VOC, tmp_path, "trainaug").items
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name, _, _ in names]
    (base / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("".join(lines))
    dataset = open_split(VOC, tmp_path, "trainaug")
    assert dataset.items == names and len(dataset[0]) == 3
    (base / "JPEGImages" / "2007_000042.jpg").unlink()  # found out before anything is drawn, not when it is read
    with pytest.raises(
        DiffsegError, match="^1 of the files .*trainaug.txt names are missing, .*2007_000042.jpg; unpack"
    ):
        open_split(VOC, tmp_path, "trainaug")


@pytest.mark.parametrize("size", [50, 300, 919])
def test_imagenet_s_split_is_read_by_its_label_files(tmp_path, size):
    benchmark = BENCHMARKS[f"imagenet-s-{size}"]
    folder = make_imagenet_s(tmp_path, benchmark) / "validation-segmentation"
    assert folder.parent.name == f"ImageNetS{size}"
    dataset = open_split(benchmark, tmp_path, "validation")
    first, second = benchmark.classes[1:3]
    assert [name for name, _, _ in dataset.items] == [f"{first}/{first}_1", f"{second}/{second}_1"]
    label = dataset[0][2]
    np.testing.assert_array_equal(label, random_label(benchmark))
    assert {size, 1000} <= set(label.flatten().tolist())
    (folder / first).rename(folder / "n00000001")
    with pytest.raises(DiffsegError, match="n00000001 is no class"):
        open_split(benchmark, tmp_path, "validation")


@pytest.mark.parametrize("half", ["validation", "validation-segmentation"])
def test_a_half_unpacked_imagenet_s_is_not_scored_on_fewer_pictures(tmp_path, half):
    lost = sorted((make_imagenet_s(tmp_path) / half).glob("*/*"))
    for gone, path in enumerate(lost, start=1):
        path.unlink()
        with pytest.raises(DiffsegError) as caught:
            open_split(IMAGENET_S_50, tmp_path, "validation")
        message = str(caught.value)
        assert message.startswith(f"{gone} of the images and masks of imagenet-s-50 validation are missing")
        assert (
            f"the first is {lost[0]}; unpack validation and validation-segmentation again" in message
            and "\n" not in message
        )


@pytest.mark.parametrize("benchmark", [CITYSCAPES, IMAGENET_S_50])
def test_hidden_files_and_folders_are_no_part_of_a_split(tmp_path, benchmark):
    (make_cityscapes if benchmark is CITYSCAPES else make_imagenet_s)(tmp_path)
    split = benchmark.evaluation_split
    items = open_split(benchmark, tmp_path, split).items
    for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
        shutil.copyfile(file, file.with_name(f"._{file.name}"))
        hidden = file.parents[1] / ".ipynb_checkpoints" / file.name
        hidden.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, hidden)
        (file.parents[1] / ".DS_Store").touch()
    assert open_split(benchmark, tmp_path, split).items == items


def test_cityscapes_split_is_sorted_and_in_train_ids(tmp_path):
    make_cityscapes(tmp_path)
    dataset = open_split(CITYSCAPES, tmp_path, "val")
    assert [item[0] for item in dataset.items] == ["frankfurt_000000_000294", "munster_000001_000019"]
    np.testing.assert_array_equal(dataset[0][2], random_label(CITYSCAPES))


def test_a_half_unpacked_cityscapes_is_not_scored_on_fewer_images(tmp_path):
    labels = make_cityscapes(tmp_path)
    next((tmp_path / "leftImg8bit/val/munster").iterdir()).unlink()
    lost = labels / "munster" / "munster_000001_000019_gtFine_labelIds.png"
    with pytest.raises(DiffsegError, match=f"1 labels of cityscapes val have no image, the first is {lost}; unpack"):
        open_split(CITYSCAPES, tmp_path, "val")


def test_an_image_of_cityscapes_without_its_label_is_found_when_the_split_is_opened(tmp_path):
    lost = make_cityscapes(tmp_path) / "munster" / "munster_000001_000019_gtFine_labelIds.png"
    lost.unlink()
    with pytest.raises(
        DiffsegError, match=f"1 images of cityscapes val have no label, .* at {lost}; unpack gtFine/val"
    ):
        open_split(CITYSCAPES, tmp_path, "val")


def test_train_ids_in_the_place_of_label_ids_are_noticed_without_255(tmp_path):
    make_cityscapes(tmp_path, label=np.arange(48).reshape(6, 8) % 19)
    with pytest.raises(DiffsegError, match="hold trainIds"):
        open_split(CITYSCAPES, tmp_path, "val")


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_missing_tree_names_what_is_missing_where_it_is_had_and_the_tree(tmp_path, name):
    benchmark = BENCHMARKS[name]
    with pytest.raises(DiffsegError) as caught:
        open_split(benchmark, tmp_path / "nothing", benchmark.evaluation_split)
    message = str(caught.value)
    assert benchmark.source in message and str(tmp_path / "nothing" / benchmark.folder) in message
    assert message.count("\n") == 0
    with pytest.raises(DiffsegError, match="hold back a part of its training images as dev"):
        open_split(benchmark, tmp_path / "nothing", "dev")
    with pytest.raises(DiffsegError, match="has no split 'best'; it has"):
        open_split(benchmark, tmp_path, "best")


@pytest.mark.parametrize(
    ("benchmark", "make", "part"),
    [
        (VOC, make_voc, "VOCdevkit/VOC2012/JPEGImages"),
        (VOC, make_voc, "VOCdevkit/VOC2012/SegmentationClass"),
        (VOC, make_voc, "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"),
        (IMAGENET_S_50, make_imagenet_s, "ImageNetS50/validation"),
        (IMAGENET_S_50, make_imagenet_s, "ImageNetS50/validation-segmentation"),
        (CITYSCAPES, make_cityscapes, "leftImg8bit/val"),
        (CITYSCAPES, make_cityscapes, "gtFine/val"),
    ],
)
def test_a_wrong_tree_is_answered_with_the_missing_part_its_source_and_the_tree(tmp_path, benchmark, make, part):
    make(tmp_path)
    open_split(benchmark, tmp_path, benchmark.evaluation_split)
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(DiffsegError) as caught:
        open_split(benchmark, tmp_path, benchmark.evaluation_split)
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path / part} is missing: get {benchmark.source} and unpack it so that there is")
    assert sentence.count(str(tmp_path / benchmark.folder)) >= 3 and "\n" not in sentence
    (tmp_path / "elsewhere").rename(tmp_path / part)
    with pytest.raises(DiffsegError, match="is missing"):  # the root itself is one folder too deep
        open_split(benchmark, (tmp_path / part).parent, benchmark.evaluation_split)


def test_broken_files_are_named(tmp_path):
    base = make_voc(tmp_path)
    dataset = open_split(VOC, tmp_path, "val")
    image = base / "JPEGImages" / "2007_000033.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(DiffsegError, match="2007_000033.jpg is truncated"):
        dataset[0]
    label = base / "SegmentationClass" / "2007_000042.png"
    label.write_bytes(label.read_bytes()[:-30])
    with pytest.raises(DiffsegError, match="2007_000042.png is truncated"):
        dataset[1]
    label.unlink()
    with pytest.raises(DiffsegError, match="2007_000042.png is missing"):
        dataset[1]
    write_label(label, random_label(VOC, (8, 6)), VOC)
    with pytest.raises(DiffsegError, match="8 x 6 pixels.*6 x 8"):
        dataset[1]
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    with pytest.raises(DiffsegError, match="is empty"):
        open_split(VOC, tmp_path, "val")


# Synthetic sets


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_synthetic_set_of_any_benchmark_is_read_back(tmp_path, name):
    benchmark = BENCHMARKS[name]
    label = random_label(benchmark)
    save_image(tmp_path / "JPEGImages" / "a.jpg")
    write_picture_label(tmp_path / "SegmentationClass" / "a.png", label, benchmark)
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    with Image.open(tmp_path / "SegmentationClass" / "a.png") as picture:
        assert picture.mode == ("P" if benchmark.num_classes <= 255 else "RGB")
        assert np.array(picture)[0, 2].tolist() == (255 if picture.mode == "P" else [232, 3, 0])

    picture_name, image, again, reliability = pictures_set(tmp_path, benchmark)[0]
    assert picture_name == "a" and image.shape == (3, 6, 8) and reliability is None
    np.testing.assert_array_equal(again, label)

    margin = np.arange(48, dtype=np.uint8).reshape(6, 8)
    (tmp_path / "Reliability").mkdir()
    Image.fromarray(margin).save(tmp_path / "Reliability" / "a.png")
    read_margin, rank = pictures_set(tmp_path, benchmark)[0][3]
    np.testing.assert_array_equal(read_margin, margin)
    assert torch.equal(rank, rank_within_class(torch.from_numpy(label), read_margin))  # an older set has no file
    (tmp_path / "ReliabilityRank").mkdir()
    Image.fromarray(255 - rank.numpy()).save(tmp_path / "ReliabilityRank" / "a.png")
    assert torch.equal(pictures_set(tmp_path, benchmark)[0][3][1], 255 - rank)
    Image.fromarray(margin[1:]).save(tmp_path / "Reliability" / "a.png")
    with pytest.raises(DiffsegError, match="no one-channel image of its label's size"):
        pictures_set(tmp_path, benchmark)[0]


def test_an_official_voc_folder_is_a_picture_set_too(tmp_path):
    base = make_voc(tmp_path)
    dataset = pictures_set(base, VOC, "val")
    assert len(dataset) == 2 and torch.equal(dataset[1][2], open_split(VOC, tmp_path, "val")[1][2])
    with pytest.raises(DiffsegError, match="train.txt is missing"):
        pictures_set(base, VOC)


def test_cityscapes_things_are_the_official_classes_and_the_other_evaluated_pixels_are_background(tmp_path):
    everything = np.arange(34, dtype=np.uint8)[None]
    Image.fromarray(everything).save(tmp_path / "label.png")
    official, things = (read_label(tmp_path / "label.png", b)[0] for b in (CITYSCAPES, CITYSCAPES_THINGS))
    assert ((official == 255) == (things == 255)).all()  # the same pixels count
    for train_id, thing in zip(official, things, strict=True):
        name = CITYSCAPES.classes[train_id] if train_id != 255 else None
        if name in CITYSCAPES_THINGS.classes:
            assert CITYSCAPES_THINGS.classes[thing] == name
        else:
            assert thing == (255 if name is None else 0)
    for group, ids in CITYSCAPES_THINGS.groups.items():
        names = [CITYSCAPES.classes[k] for k in CITYSCAPES.groups[group]]
        assert [CITYSCAPES_THINGS.classes[k] for k in ids] == names
    write_label(tmp_path / "again.png", np.arange(9)[None], CITYSCAPES_THINGS)
    np.testing.assert_array_equal(read_label(tmp_path / "again.png", CITYSCAPES_THINGS), np.arange(9)[None])
    assert [word.class_name for word in load_words("cityscapes-things") if word.relation == "plain"] == list(
        CITYSCAPES_THINGS.foreground
    )


# Mini ImageNet-S


def test_mini_imagenet_s_has_every_picture_of_the_mini_world_as_a_class_with_words_of_its_own():
    tags = sorted(imagenet_s_writer.tag_of(picture) for picture in scenes.load_pictures())
    assert list(MINI_IMAGENET_S.foreground) == tags, "run python -m diffseg.miniworld.imagenet_s"
    rows = load_words("mini-imagenet-s")
    assert rows == imagenet_s_writer.class_words(), "run python -m diffseg.miniworld.imagenet_s"
    assert [row.class_name for row in rows if row.relation == "plain"] == tags and len(tags) >= 50
    assert len({row.word for row in rows}) == len(rows), "a word stands for one class only"
    words = {row.word for row in rows}
    assert known_words(words, load_tokenizer("mini")) == words


def test_mini_imagenet_s_is_read_by_the_imagenet_s_reader_one_object_a_picture(tmp_path):
    world = {"version": 1, "seed": 0, "imagenet-s": {"train-semi": 96, "validation": 4}}
    for name in ("a", "b"):
        disk.write_benchmarks(tmp_path / name, world)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 2 * 100 + 1
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    training = open_split(MINI_IMAGENET_S, tmp_path / "a", MINI_IMAGENET_S.training_split)
    assert len(open_split(MINI_IMAGENET_S, tmp_path / "a", "validation")) == 4 and len(training) == 96
    for name, image, label in training:
        tag, file = name.split("/")
        assert label.unique().tolist() == [0, MINI_IMAGENET_S.classes.index(tag)]
        _, scene = imagenet_s_writer.imagenet_s_scene(0, "train-semi", int(file.removeprefix("train-semi_")))
        assert np.array_equal(label > 0, scene.instances > 0) and [p.word for p in scene.objects] == [
            tag.replace("_", " ")
        ]
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - scene.image).mean() < 4
    assert len({name.split("/")[0] for name, *_ in training}) == 96, "every class as often as any other"


def test_the_mini_benchmarks_do_not_change_each_other(tmp_path):
    """A world of VOC alone, and of VOC with all the others: the same bytes."""
    disk.write_benchmarks(tmp_path / "voc", {"version": 1, "seed": 0, "voc": {"train": 2}})
    disk.write_benchmarks(
        tmp_path / "both", {"version": 1, "seed": 0, "voc": {"train": 2}, "imagenet-s": {"validation": 2}}
    )
    files = [path for path in (tmp_path / "voc" / "VOCdevkit").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "both" / file.relative_to(tmp_path / "voc")).read_bytes() == file.read_bytes()
