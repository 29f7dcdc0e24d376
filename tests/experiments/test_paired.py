"""Trainings that are compared seed by seed: where each is kept, what it starts from, and what is scored."""

from dataclasses import replace

import pytest
import torch
from tiny_training import OPTIONS, STEP4, finish_images

from diffseg.benchmarks.classes import VOC
from diffseg.errors import DiffsegError
from diffseg.experiments import paired
from diffseg.experiments.paired import (
    Relabelled,
    images_key,
    network_folder,
    options_of,
    recipe_of,
    training_parameters,
)
from diffseg.files import write_text
from diffseg.lab.batch import resolve
from diffseg.lab.steps import code_of


def test_a_network_of_another_recipe_other_images_or_another_seed_lies_elsewhere(tmp_path):
    options = options_of(STEP4, "baseline")
    for name, weights in (("start", "one"), ("again", "two"), ("copy", "one")):
        write_text(tmp_path / name / "model.safetensors", weights)

    def place(name="ours", images="key", options=options, seed=0, **changes):
        return network_folder(tmp_path, name, images, STEP4 | changes, options, seed)

    begun = place(initial_network=str(tmp_path / "start"))
    others = [
        place(),
        place("theirs"),
        place(images="other"),
        place(images=None),
        place(seed=1),
        place(segmenter="unet-resnet50"),
        place(encoder_weights="imagenet"),
        place(options=replace(options, iterations=9)),
        place(options=options_of(STEP4, "ensemble")),
        begun,
        place(initial_network=str(tmp_path / "again")),
    ]
    assert len(set(others)) == len(others)
    assert place() == others[0] and place(initial_network=str(tmp_path / "copy")) == begun  # wherever it lies


def test_other_parameters_or_other_code_of_the_training_are_another_recipe(tmp_path, monkeypatch):
    recipe, place = recipe_of({"iterations": 8}), network_folder(tmp_path, "ours", "key", STEP4, OPTIONS, 0)
    assert recipe == recipe_of({"iterations": 8}) != recipe_of({"iterations": 9})
    digests = code_of([paired.TRAINING])
    assert "diffseg.augmentation" in digests
    monkeypatch.setattr(paired, "code_of", lambda _: digests | {"diffseg.augmentation": "another"})
    assert recipe_of({"iterations": 8}) != recipe
    assert network_folder(tmp_path, "ours", "key", STEP4, OPTIONS, 0) != place


class Loaded(torch.nn.Module):
    """A network that knows where it was loaded from."""

    def __init__(self, place):
        super().__init__()
        self.place = place


def test_a_seed_is_that_of_the_decoder_and_of_the_training(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(paired, "train_once", lambda *given: calls.append(given))
    monkeypatch.setattr(paired, "load_segmenter", Loaded)
    parameters = STEP4 | {"encoder_weights": "imagenet", "initial_network": str(tmp_path)}
    options = options_of(parameters, "ensemble")
    for seed in range(2):
        network = paired.trained(tmp_path, "ours", "key", parameters, options, ["images"], VOC, seed)
        place, untrained, dataset, ignore, given, training_seed, *_ = calls[-1]
        assert network.place == place == network_folder(tmp_path, "ours", "key", parameters, options, seed)
        assert untrained.func is paired.new_networks
        assert untrained.args == (2, "unet-resnet18", VOC.classes, seed, "imagenet", str(tmp_path))
        assert (dataset, ignore, given, training_seed) == (["images"], 255, options, seed)


def test_other_labels_of_the_same_images_are_another_training(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(paired, "train_once", lambda place, *_: places.append(place))
    monkeypatch.setattr(paired, "load_segmenter", Loaded)
    images = [("name", torch.zeros(3, 4, 4), torch.zeros(4, 4))]
    for value in (1, 2, 1):
        labelled = Relabelled(images, lambda name, image, label, value=value: label + value)
        paired.trained(tmp_path, "ours", "key", STEP4, OPTIONS, labelled, VOC, 0)
    assert places[0] == places[2] != places[1]


def test_scores_are_in_percent():
    label, seen = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[[0, 0, 1, 0]]])
    images = [("one", torch.zeros(3, 1, 4, dtype=torch.uint8), label)]
    network = torch.nn.Conv2d(3, 1, 1)  # it is scored where its weights are
    network.forward = lambda batch: seen
    found = paired.scores(network, images, replace(VOC, groups={"both": (0, 1)}))
    assert found == {"miou": pytest.approx(100 * (2 / 3 + 1 / 2) / 2), "both": 100}


def test_the_images_of_a_run_are_known_by_the_step_that_made_them(tmp_path):
    (tmp_path / "ours").mkdir()
    for name in ("ours", "nothing"):
        with pytest.raises(DiffsegError, match="no finished step 3"):
            images_key(tmp_path / name)
    finish_images(tmp_path / "ours")
    assert images_key(tmp_path / "ours") == "key of ours"


def test_a_file_whose_run_is_scored_otherwise_is_refused():
    with pytest.raises(DiffsegError, match="says evaluation_flip=True, evaluation_crf=True, but comparisons"):
        training_parameters({"evaluation_flip": True, "evaluation_crf": True})
    with pytest.raises(DiffsegError, match=r"says evaluation_scales=\[0.5\], but comparisons score at scale 1"):
        training_parameters(resolve("cityscapes", {})[0])
    assert training_parameters(resolve("voc", {})[0])["benchmark"] == "voc"
