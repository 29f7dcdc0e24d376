"""One's own words: a class list in the place of a benchmark, and the trained network on any picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffseg.benchmarks.classes import get_benchmark
from diffseg.benchmarks.labels import write_picture_label
from diffseg.benchmarks.readers import open_split, pictures_set
from diffseg.errors import DiffsegError
from diffseg.generator import load_tokenizer
from diffseg.inference import predict
from diffseg.lab.batch import run
from diffseg.lab.combinations import check_together
from diffseg.lab.parameters import read_yaml
from diffseg.paths import project_root
from diffseg.prompts import augment
from diffseg.segmenters import Segmenter, load_segmenter, save_segmenter
from diffseg.words import load_class_list, select_words

PARAMETERS = project_root() / "notebooks" / "params" / "own-words.yaml"
CLASSES = ("background", "owl", "fire engine", "crêpe, salée")


# the class list as a benchmark


def test_a_class_list_is_a_benchmark_of_background_and_its_words():
    benchmark = get_benchmark("voc", ["owl, owl.n.01", "fire engine", "crêpe, salée, none"])
    assert benchmark.classes == CLASSES and benchmark.ignore == 255 and len(set(benchmark.palette)) == 4
    assert get_benchmark("voc") is get_benchmark("voc", []) is get_benchmark("voc")
    with pytest.raises(DiffsegError, match="twice"):
        get_benchmark("voc", ["owl", "Owl, none"])
    with pytest.raises(DiffsegError, match="no benchmark 'coco'"):
        get_benchmark("coco")


@pytest.mark.parametrize("count", [1, 254, 255, 999])
def test_labels_of_a_list_of_any_length_survive_their_files(tmp_path, count):
    benchmark = get_benchmark("voc", [f"thing {k}, none" for k in range(count)])
    label = np.array([[0, 1, count], [benchmark.ignore, count, 0]])
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(tmp_path / "JPEGImages" / "a.jpg")
    write_picture_label(tmp_path / "SegmentationClass" / "a.png", label, benchmark)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    assert np.array_equal(pictures_set(tmp_path, benchmark)[0][2], label)


def test_a_thousand_classes_are_too_many_and_a_list_has_no_labelled_split(tmp_path):
    with pytest.raises(DiffsegError, match="at most 999"):
        get_benchmark("voc", [f"thing {k}" for k in range(1000)])
    with pytest.raises(DiffsegError, match="own-words"):
        open_split(get_benchmark("voc", ["owl"]), tmp_path, "train")


def test_the_example_needs_no_wordnet_and_the_mini_generator_knows_its_words():
    class_list = read_yaml(PARAMETERS)["class_list"]
    words = select_words(load_class_list(class_list), load_tokenizer("mini"))
    prompts = augment(words, 2 * len(class_list))
    names = get_benchmark("voc", class_list).foreground
    assert sorted(prompt.classes[0] for prompt in prompts) == sorted(2 * names)
    assert {prompt.prompt for prompt in prompts} >= {"a photo of an owl", "a photo of a fire engine"}
    with pytest.raises(DiffsegError, match="'unicorn'.* generator=stabilityai/sdxl-turbo"):
        select_words(load_class_list([*class_list, "unicorn, none"]), load_tokenizer("mini"))


def test_a_generator_of_the_hub_does_not_draw_at_minis_size():
    own = read_yaml(PARAMETERS) | {"generator": "stabilityai/sdxl-turbo", "height": 64, "width": 64}
    with pytest.raises(DiffsegError, match="`height` is 64 .* at least 256 .* own-words-sdxl.yaml"):
        check_together(own, "--set")
    check_together(own | {"height": 512, "width": 512}, "--set")
    check_together(own | {"generator": "mini"}, "--set")


# the network on any picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network that was never trained, saved as step 4 saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network")
    save_segmenter(Segmenter("unet-resnet18", CLASSES).eval(), path)
    return path


@pytest.fixture(scope="module")
def network(folder):
    return load_segmenter(folder)


def photo(mode: str, width: int = 50, height: int = 37) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (64, 64), (131, 33)])
@pytest.mark.parametrize("side", [0, 32])
def test_a_picture_of_any_size_gets_a_label_of_its_size(network, size, side):
    label, _ = predict(network, photo("RGB", *size), side)
    assert label.shape == size[::-1]


def test_a_folder_and_a_file_give_what_network_and_picture_give(folder, network, tmp_path):
    picture = photo("RGB", 64, 48)
    picture.save(tmp_path / "photo.png")
    expected = network(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)[0].argmax(dim=0)
    for label, _ in (predict(network, picture), predict(str(folder), str(tmp_path / "photo.png"))):
        assert np.array_equal(label, expected)


def test_side_scales_the_picture_for_the_network_and_the_label_back(network):
    small = photo("RGB", 32, 32)
    large = small.resize((96, 96), Image.Resampling.BICUBIC)
    as_trained, _ = predict(network, small)
    label, _ = predict(network, large, side=32)
    # the middle pixel of each 3 x 3 block; the two resamplings differ a little
    assert (label[1::3, 1::3] == as_trained).mean() > 0.8


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_named(network, tmp_path, content):
    if content is not None:
        (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(DiffsegError, match="photo.jpg") as error:
        predict(network, tmp_path / "photo.jpg")
    assert "\n" not in str(error.value)


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(DiffsegError, match="no usable segmenter"):
        predict(tmp_path, photo("RGB"))


# from words to a network


@pytest.mark.slow
def test_a_class_list_becomes_a_network_without_labelled_data(tmp_path):
    """The real steps 1 to 4 with tiny numbers, then the inference example."""
    tiny = {"images": 16, "sampling_steps": 3, "attention_steps": "all", "iterations": 4, "training_batch": 4}
    made = run("own-words", "1-4", tiny, str(tmp_path)) / "04_robust_training"
    assert not (made / "real").exists()
    label, classes = predict(made / "synthetic", photo("RGBA", 200, 120), side=64)
    assert classes == get_benchmark("", read_yaml(PARAMETERS)["class_list"]).classes and label.shape == (120, 200)
